//! A restored guest's new identity and the right time, both proved by its own answers.
//!
//! A clock is proved by asking: the guest read its clock at some moment between the question and the answer, so however
//! the way was split, that clock is off by no more than the larger of its distances to the host's clock at those two
//! moments. A slow round trip proves little; the question is then asked again, which also sets the clock again.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ark_types::guest::{ClockSet, Frame, Kind, Renew, Renewed};
use ark_types::receipt::MAX_CLOCK_ERROR_MS;
use tokio::time::{sleep, timeout};

use super::{Address, Connection, GuestFailure};

/// How often the clock is set at most.
const CLOCK_TRIES: usize = 8;
/// Time between two attempts to reach a VMM that has just been started.
const KNOCK: Duration = Duration::from_millis(1);

/// What a guest answered, and how far its clock can be off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renewal {
    /// Its answer.
    pub answer: Renewed,
    /// Bound on the distance between its clock and the host's, nanoseconds.
    pub clock_error_ns: u64,
}

/// Tells the guest at `address` who it is from now on. Its VMM may just have been started, and holds the connection back
/// until the guest can take it; after `limit` that is given up. The time in `order` is filled in here.
///
/// # Errors
/// [`GuestFailure`]; a clock that cannot be proved to be right is none: the bound says it.
pub async fn renew(address: &Address, order: Renew, limit: Duration) -> Result<Renewal, GuestFailure> {
    timeout(limit, try_to_renew(address, order)).await.map_err(|_| GuestFailure::Late(limit))?
}

async fn try_to_renew(address: &Address, mut order: Renew) -> Result<Renewal, GuestFailure> {
    let mut connection = reach(address).await?;
    let sent = unix_ns();
    // Only now, with the guest at the other end, is it known when the time arrives.
    order.unix_ns = sent;
    connection.writer.send(&Frame::json(Kind::Renew, &order)?).await?;
    let answer: Renewed = connection.reader.expect(Kind::Renewed).await?.parse()?;
    let mut error = clock_error(sent, answer.unix_ns, unix_ns());
    let mut tries = 1;
    while error > max_error_ns() && tries < CLOCK_TRIES {
        tries += 1;
        error = error.min(set_clock_on(&mut connection).await?);
    }
    address.idle.keep(connection);
    Ok(Renewal { answer, clock_error_ns: error })
}

/// A connection to a guest whose VMM may not listen yet.
async fn reach(address: &Address) -> Result<Connection, GuestFailure> {
    loop {
        match Connection::open(address, b"").await {
            // Nothing was asked for yet, so asking again repeats nothing. Who waits notices a VMM that ended.
            Err(GuestFailure::Unreachable(_) | GuestFailure::Closed | GuestFailure::Broken(_)) => {
                sleep(KNOCK).await;
            }
            other => return other,
        }
    }
}

/// Sets the clock of the guest at `address`, again until it is proved to be right, at most 8 times; the bound of its error
/// in nanoseconds.
///
/// # Errors
/// [`GuestFailure`].
pub async fn set_clock(address: &Address, limit: Duration) -> Result<u64, GuestFailure> {
    let set = async {
        let mut connection = Connection::open(address, b"").await?;
        let mut error = u64::MAX;
        for _ in 0..CLOCK_TRIES {
            error = error.min(set_clock_on(&mut connection).await?);
            if error <= max_error_ns() {
                break;
            }
        }
        address.idle.keep(connection);
        Ok(error)
    };
    timeout(limit, set).await.map_err(|_| GuestFailure::Late(limit))?
}

async fn set_clock_on(connection: &mut Connection) -> Result<u64, GuestFailure> {
    let sent = unix_ns();
    connection.writer.send(&Frame::json(Kind::ClockSet, &ClockSet { unix_ns: sent })?).await?;
    let ClockSet { unix_ns: guest } = connection.reader.expect(Kind::ClockSet).await?.parse()?;
    Ok(clock_error(sent, guest, unix_ns()))
}

/// Bound on the error of a clock that showed `guest` at a moment between `sent` and `received`.
fn clock_error(sent: u64, guest: u64, received: u64) -> u64 {
    guest.abs_diff(sent).max(guest.abs_diff(received))
}

/// [`MAX_CLOCK_ERROR_MS`] in nanoseconds.
pub(crate) const fn max_error_ns() -> u64 {
    MAX_CLOCK_ERROR_MS * 1_000_000
}

fn unix_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_bound_holds_however_the_way_is_split(
            sent in 1_000_000_000u64..2_000_000_000, there in 0u64..500_000, back in 0u64..500_000, off in -900_000i64..900_000,
        ) {
            let truth = sent + there;
            let guest = truth.checked_add_signed(off).unwrap();
            let bound = clock_error(sent, guest, truth + back);
            prop_assert!(bound >= off.unsigned_abs());
            prop_assert!(bound <= off.unsigned_abs() + there + back);
        }
    }
}

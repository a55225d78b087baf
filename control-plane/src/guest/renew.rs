//! A restored guest's new identity and the right time, both proved by its own answers.
//!
//! A clock is proved by asking: the guest read its clock at some moment between the question and the answer, so however
//! the way was split, that clock is off by no more than the larger of its distances to the host's clock at those two
//! moments. A slow round trip proves little; the question is then asked again, which also sets the clock again, and to the
//! time that it will be half a round trip later: then the answer lies in the middle, and the bound is half as large.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ark_types::guest::{ClockSet, Frame, Kind, Renew, Renewed};
use ark_types::receipt::MAX_CLOCK_ERROR_MS;
use tokio::time::{sleep, timeout};

use super::{Address, Connection, GuestFailure};

/// How often the clock is set at most.
const CLOCK_TRIES: usize = 24;
/// So many tries follow each other at once; then a busy moment of the host is given time to pass.
const CLOCK_RUSH: usize = 6;
/// Time between the later tries.
const CLOCK_PAUSE: Duration = Duration::from_millis(50);
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
    let first = Trip::new(sent, answer.unix_ns, unix_ns());
    let clock_error_ns = prove_clock(&mut connection, first, CLOCK_TRIES - 1).await?;
    address.idle.keep(connection);
    Ok(Renewal { answer, clock_error_ns })
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

/// Sets the clock of the guest at `address`, again until it is proved to be right, at most [`CLOCK_TRIES`] times; the bound of
/// its error in nanoseconds.
///
/// # Errors
/// [`GuestFailure`].
pub async fn set_clock(address: &Address, limit: Duration) -> Result<u64, GuestFailure> {
    let set = async {
        let mut connection = Connection::open(address, b"").await?;
        let first = set_clock_on(&mut connection, 0).await?;
        let error = prove_clock(&mut connection, first, CLOCK_TRIES - 1).await?;
        address.idle.keep(connection);
        Ok(error)
    };
    timeout(limit, set).await.map_err(|_| GuestFailure::Late(limit))?
}

/// Sets the clock up to `tries` times more, until a round trip proves it to be right. The bound is that of the last trip:
/// earlier ones were about a clock that was set since.
async fn prove_clock(connection: &mut Connection, first: Trip, tries: usize) -> Result<u64, GuestFailure> {
    let mut trip = first;
    for number in 0..tries {
        if trip.error_ns <= max_error_ns() {
            break;
        }
        if number >= CLOCK_RUSH {
            sleep(CLOCK_PAUSE).await;
        }
        trip = set_clock_on(connection, (trip.time_ns / 2).min(max_error_ns())).await?;
    }
    Ok(trip.error_ns)
}

/// Sets the clock to the time that it will be in `ahead_ns`, and asks for it.
async fn set_clock_on(connection: &mut Connection, ahead_ns: u64) -> Result<Trip, GuestFailure> {
    let sent = unix_ns();
    let order = ClockSet { unix_ns: sent.saturating_add(ahead_ns) };
    connection.writer.send(&Frame::json(Kind::ClockSet, &order)?).await?;
    let ClockSet { unix_ns: guest } = connection.reader.expect(Kind::ClockSet).await?.parse()?;
    Ok(Trip::new(sent, guest, unix_ns()))
}

/// A question about a clock and its answer.
#[derive(Clone, Copy, Debug)]
struct Trip {
    /// From the question to the answer, nanoseconds.
    time_ns: u64,
    /// Bound on the clock's error, nanoseconds.
    error_ns: u64,
}

impl Trip {
    /// The clock showed `guest` at a moment between `sent` and `received`.
    fn new(sent: u64, guest: u64, received: u64) -> Self {
        let error_ns = guest.abs_diff(sent).max(guest.abs_diff(received));
        Self { time_ns: received.saturating_sub(sent), error_ns }
    }
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
            let bound = Trip::new(sent, guest, truth + back).error_ns;
            prop_assert!(bound >= off.unsigned_abs());
            prop_assert!(bound <= off.unsigned_abs() + there + back);
        }

        #[test]
        fn a_clock_set_half_a_trip_ahead_is_proved_twice_as_well(there in 0u64..500_000, back in 0u64..500_000) {
            let (sent, trip) = (1_000_000_000, there + back);
            let bound = Trip::new(sent, sent + trip / 2, sent + trip).error_ns;
            prop_assert!(bound <= trip / 2 + 1);
        }
    }
}

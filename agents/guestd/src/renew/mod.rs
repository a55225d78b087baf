//! Becoming somebody else: what a restored guest does before it serves anyone.
//!
//! | file | what |
//! |---|---|
//! | [`random`] | the kernel's random generator: seed in, reseed, bytes out |
//! | [`identity`] | host name, machine-id, boot id |
//! | [`secrets`] | what the parent was trusted with and its forks are not |
//!
//! The order matters: random numbers first, for the boot id and the interpreters' seeds are drawn after it; the clock is read
//! last. Every step can be repeated, and a guest can be renewed as often as it is forked. Nothing is started for it, so it
//! takes the kernel a few system calls.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use ark_types::guest::{ClockSet, ErrorCode, GuestError, Renew, Renewed};

use crate::eval::Evaluators;
use crate::failure::{failure, system_failure};
use crate::system;

pub(crate) mod identity;
mod random;
pub(crate) mod secrets;

/// Hexadecimal digits of a nonce, and of a seed.
const NONCE_DIGITS: usize = 32;
const SEED_DIGITS: usize = 2 * random::SEED_LEN;

/// How often this guest was renewed. The number is cloned with the guest, so forks go on counting where their parent was.
#[derive(Debug, Default)]
pub(crate) struct Renewals(Mutex<u64>);

impl Renewals {
    /// Takes on the identity that `order` names, one order at a time.
    ///
    /// # Errors
    /// The step that failed. The guest may then be half renewed: it is to be ended, or renewed again.
    pub(crate) fn renew(&self, order: &Renew, evaluators: &Evaluators) -> Result<Renewed, GuestError> {
        if !system::is_init() {
            let message = "only a guest's PID 1 can renew it; this guestd serves another system";
            return Err(failure(ErrorCode::BadRequest, message));
        }
        let seed = check(order)?;
        let root = Path::new("/");
        let mut count = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let step = |what: &'static str| move |e| system_failure(&format!("renewal: {what}"), &e);
        random::reseed(&seed).map_err(step("the kernel's random generator was not reseeded"))?;
        system::set_clock(ClockSet { unix_ns: order.unix_ns })?;
        nix::unistd::sethostname(&order.hostname).map_err(|e| step("the host name was not set")(e.into()))?;
        identity::write_hostname(root, &order.hostname).map_err(step("/etc/hostname was not written"))?;
        identity::write_machine_id(root, &order.machine_id)
            .map_err(step("/etc/machine-id was not written"))?;
        let boot_id = random::uuid().map_err(step("no boot id could be drawn"))?;
        identity::show_boot_id(&boot_id).map_err(step("the boot id was not replaced"))?;
        let dropped_secrets =
            secrets::drop_all(root).map_err(step("the parent's secrets were not all removed"))?;
        let fresh = random::bytes::<{ random::SEED_LEN }>().map_err(step("no seed could be drawn"))?;
        let evaluator_random = evaluators.reseed(&random::hex(&fresh))?;
        let shown = random::bytes::<32>().map_err(step("no random bytes could be drawn"))?;
        let hostname =
            nix::unistd::gethostname().map_err(|e| step("the host name is not known")(e.into()))?;
        let machine_id = identity::machine_id(root).map_err(step("/etc/machine-id could not be read"))?;
        let boot_id = identity::boot_id().map_err(step("the boot id could not be read"))?;
        *count = count.saturating_add(1);
        Ok(Renewed {
            nonce: order.nonce.clone(),
            renewals: *count,
            random: random::hex(&shown),
            evaluator_random,
            hostname: hostname.to_string_lossy().into_owned(),
            machine_id,
            boot_id,
            dropped_secrets,
            unix_ns: system::clock().unix_ns,
        })
    }
}

/// Checks what `order` says before anything is changed; its seed.
fn check(order: &Renew) -> Result<[u8; random::SEED_LEN], GuestError> {
    let bad = |what: &str| failure(ErrorCode::BadRequest, format!("renewal: {what}"));
    if !identity::is_hex(&order.nonce, NONCE_DIGITS) {
        return Err(bad("the nonce is not 32 hexadecimal digits"));
    }
    if !identity::is_hex(&order.machine_id, identity::MACHINE_ID_DIGITS) {
        return Err(bad("the machine-id is not 32 hexadecimal digits"));
    }
    if !identity::is_hostname(&order.hostname) {
        return Err(bad("the host name is not 1 to 64 letters, digits, dots and hyphens"));
    }
    let seed = identity::is_hex(&order.seed, SEED_DIGITS).then(|| random::from_hex(&order.seed)).flatten();
    seed.ok_or_else(|| bad("the seed is not 64 hexadecimal digits"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(change: impl FnOnce(&mut Renew)) -> Renew {
        let mut order: Renew = serde_json::from_value(serde_json::json!({
            "generation": "0".repeat(32), "nonce": "1".repeat(32), "hostname": "fork-1", "machine_id": "a".repeat(32),
            "seed": "0f".repeat(32), "unix_ns": 1,
        }))
        .unwrap();
        change(&mut order);
        order
    }

    #[test]
    fn an_order_is_checked_before_anything_changes() {
        assert_eq!(check(&order(|_| ())).unwrap(), [15; 32]);
        for bad in [
            order(|o| o.nonce = "x".repeat(32)),
            order(|o| o.machine_id.push('0')),
            order(|o| o.machine_id = "A".repeat(32)),
            order(|o| o.hostname = "a\nb".into()),
            order(|o| o.hostname = String::new()),
            order(|o| o.seed = "é".repeat(32)),
        ] {
            assert_eq!(check(&bad).unwrap_err().code, ErrorCode::BadRequest, "{bad:?}");
        }
    }

    #[test]
    fn only_a_guests_pid_1_is_renewed() {
        let refused = Renewals::default().renew(&order(|_| ()), &Evaluators::new(None)).unwrap_err();
        assert_eq!(refused.code, ErrorCode::BadRequest);
        assert!(refused.message.contains("PID 1"));
    }
}

//! What a restored guest has to prove before it is an agent, and the receipt over it.
//!
//! | check | evidence | holds when |
//! |---|---|---|
//! | vsock to the guest | host | the challenge came back over a connection made after the restore |
//! | vsock to the host | host | the guest called the host anew, said hello, and was heard within the last 10 s |
//! | random numbers | guest | well-formed, and nothing that any guest of this `arkd` has answered before |
//! | clock | guest | its distance to the host's is bounded by 50 ms, see [`crate::guest::renew`] |
//! | machine-id, host name | guest | those that were given, and no other living agent's |
//! | renewals | guest | one more than the snapshot's |
//! | secrets | guest | it dropped those of its parent and says how many |
//!
//! A guest could lie about what only it can see: those checks say so. What the host can compare it does.

use std::collections::{HashSet, VecDeque};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use ark_types::agent::AgentName;
use ark_types::guest::Renew;
use ark_types::layout::AgentDir;
use ark_types::receipt::{Check, CheckKind, Evidence, MAX_CLOCK_ERROR_MS, Receipt};
use ark_types::vmm::Generation;
use sha2::{Digest as _, Sha256};

use super::identity::{dice, hex};
use crate::guest::{Renewal, max_error_ns};
use crate::host::unix_ms;

/// File in a snapshot's directory that says how often its guest had been renewed; written by `arkd`, not by the VMM.
pub const RENEWALS_FILE: &str = "renewals";
/// File in an agent's directory that holds its receipt.
const RECEIPT_FILE: &str = "receipt.json";
/// Random answers whose hashes are remembered; the oldest make room.
const MAX_SEEN: usize = 1 << 16;
/// What stands before the hash of a random answer, which is told instead of it.
const HASHED: &str = "sha256:";
/// Most characters of a guest's text that are told.
const MAX_TOLD: usize = 200;

/// A check that a fork did not pass.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the check of its {} failed: {why}", label(*.check))]
pub struct FailedCheck {
    /// Which.
    pub check: CheckKind,
    /// What was seen, and what was wanted.
    pub why: String,
}

const fn label(check: CheckKind) -> &'static str {
    match check {
        CheckKind::Random => "random numbers",
        CheckKind::EvaluatorRandom => "evaluator's random numbers",
        CheckKind::Clock => "clock",
        CheckKind::MachineId => "machine-id",
        CheckKind::Hostname => "host name",
        CheckKind::VsockToGuest => "vsock connection from the host",
        CheckKind::VsockToHost => "vsock connection to the host",
        CheckKind::Renewals => "renewals",
        CheckKind::Secrets => "secrets",
    }
}

/// Hashes of the random answers that guests of this `arkd` gave.
#[derive(Debug, Default)]
pub struct Seen(Mutex<Hashes>);

#[derive(Debug, Default)]
struct Hashes {
    known: HashSet<[u8; 32]>,
    /// Oldest first.
    order: VecDeque<[u8; 32]>,
}

impl Seen {
    /// Takes in what `receipt` proves that a guest has answered to an earlier `arkd`.
    pub(super) fn remember(&self, receipt: Option<&Receipt>) {
        for check in receipt.iter().flat_map(|receipt| &receipt.checks) {
            if let Some(hash) = check.answer.strip_prefix(HASHED).and_then(unhex) {
                self.is_new(hash);
            }
        }
    }

    /// Takes `hash` in; whether it is new.
    fn is_new(&self, hash: [u8; 32]) -> bool {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Hashes { known, order } = &mut *seen;
        if !known.insert(hash) {
            return false;
        }
        order.push_back(hash);
        if order.len() > MAX_SEEN
            && let Some(oldest) = order.pop_front()
        {
            known.remove(&oldest);
        }
        true
    }
}

/// What is compared with a guest's answer.
#[derive(Debug)]
pub(super) struct Wanted<'a> {
    /// What it was told.
    pub(super) order: &'a Renew,
    /// How often it has to have been renewed; none where the snapshot does not say.
    pub(super) renewals: Option<u64>,
    /// What it said when it called the host.
    pub(super) hello: &'a str,
    /// Whether another living agent has the machine-id.
    pub(super) machine_id_taken: bool,
    /// Whether another living agent has the host name.
    pub(super) hostname_taken: bool,
}

/// A fresh order for the guest of the agent `hostname`.
pub(super) fn order(generation: Generation, hostname: &AgentName, machine_id: &str) -> Renew {
    Renew {
        generation,
        nonce: dice::<16>(),
        hostname: hostname.to_string(),
        machine_id: machine_id.to_owned(),
        seed: dice::<32>(),
        unix_ns: 0,
    }
}

/// How often the guest of the snapshot in `dir` had been renewed.
pub(super) fn renewals_of(dir: &Path) -> Option<u64> {
    // A number and a line's end; anything longer was not written by arkd.
    let path = dir.join(RENEWALS_FILE);
    let short = std::fs::metadata(&path).is_ok_and(|meta| meta.len() <= 32);
    if short { std::fs::read_to_string(path).ok()?.trim().parse().ok() } else { None }
}

/// Runs every check.
///
/// # Errors
/// The first [`FailedCheck`].
pub(super) fn check(renewal: &Renewal, wanted: &Wanted<'_>, seen: &Seen) -> Result<Vec<Check>, FailedCheck> {
    let (answer, order) = (&renewal.answer, wanted.order);
    let mut list = List { nonce: &order.nonce, checks: Vec::with_capacity(9) };
    let same = |given: &str, said: &str| {
        (given != said).then(|| format!("it was told {given:?} and answered {:?}", cut(said)))
    };
    let unique = |what: &str, taken: bool| taken.then(|| format!("another living agent has the {what} too"));
    let (guest, host) = (Evidence::GuestReported, Evidence::HostObserved);

    list.add(CheckKind::VsockToGuest, host, cut(&answer.nonce), same(&order.nonce, &answer.nonce))?;
    list.add(CheckKind::VsockToHost, host, cut(wanted.hello), None)?;
    list.random(CheckKind::Random, &answer.random, 64, seen)?;
    if let Some(random) = &answer.evaluator_random {
        list.random(CheckKind::EvaluatorRandom, random, 32, seen)?;
    }
    let off = format!("within {} us of the host's", renewal.clock_error_ns.div_ceil(1000));
    let wrong = (renewal.clock_error_ns > max_error_ns())
        .then(|| format!("it is only known to be {off}, more than {MAX_CLOCK_ERROR_MS} ms"));
    list.add(CheckKind::Clock, guest, off, wrong)?;
    let wrong =
        same(&order.machine_id, &answer.machine_id).or_else(|| unique("machine-id", wanted.machine_id_taken));
    list.add(CheckKind::MachineId, guest, cut(&answer.machine_id), wrong)?;
    let wrong =
        same(&order.hostname, &answer.hostname).or_else(|| unique("host name", wanted.hostname_taken));
    list.add(CheckKind::Hostname, guest, cut(&answer.hostname), wrong)?;
    let wrong = match wanted.renewals {
        Some(count) if count != answer.renewals => {
            Some(format!("it counts {} where {count} are due", answer.renewals))
        }
        None if answer.renewals == 0 => Some("it counts none".to_owned()),
        _ => None,
    };
    list.add(CheckKind::Renewals, guest, answer.renewals.to_string(), wrong)?;
    list.add(CheckKind::Secrets, guest, format!("dropped {}", answer.dropped_secrets), None)?;
    Ok(list.checks)
}

/// The 32 bytes that `text` has as hexadecimal digits.
fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(text.get(at..at + 2)?, 16).ok()?;
    }
    (text.len() == 64).then_some(bytes)
}

/// The first characters of a guest's text.
fn cut(text: &str) -> String {
    text.chars().take(MAX_TOLD).collect()
}

/// Checks that passed.
struct List<'a> {
    nonce: &'a str,
    checks: Vec<Check>,
}

impl List<'_> {
    fn add(
        &mut self,
        check: CheckKind,
        evidence: Evidence,
        answer: String,
        wrong: Option<String>,
    ) -> Result<(), FailedCheck> {
        if let Some(why) = wrong {
            return Err(FailedCheck { check, why });
        }
        let sha256 = hex(&Sha256::new().chain_update(self.nonce).chain_update(&answer).finalize());
        self.checks.push(Check { check, evidence, answer, sha256, passed: true });
        Ok(())
    }

    /// A random number of `digits` hexadecimal digits; only its hash is kept, for it may seed secrets.
    fn random(
        &mut self,
        check: CheckKind,
        number: &str,
        digits: usize,
        seen: &Seen,
    ) -> Result<(), FailedCheck> {
        let is_hex = number.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        let wrong = if number.len() != digits || !is_hex {
            Some(format!("{:?} is not {digits} hexadecimal digits", cut(number)))
        } else if seen.is_new(Sha256::digest(number).into()) {
            None
        } else {
            Some("the same ones were answered before".to_owned())
        };
        let hash = hex(&Sha256::digest(number));
        self.add(check, Evidence::GuestReported, format!("{HASHED}{hash}"), wrong)
    }
}

/// Puts the hash over all of the rest into `receipt`: SHA-256 of its JSON without `sha256`, keys sorted, no white space.
pub(super) fn seal(mut receipt: Receipt) -> Receipt {
    receipt.at_unix_ms = unix_ms();
    receipt.sha256 = hash_of(&receipt);
    receipt
}

/// Keeps `receipt` in the agent's directory, for whoever looks there.
pub(super) fn write(dir: &AgentDir, receipt: &Receipt) -> std::io::Result<()> {
    std::fs::write(dir.0.join(RECEIPT_FILE), serde_json::to_vec_pretty(receipt)?)
}

fn hash_of(receipt: &Receipt) -> String {
    let mut value = serde_json::to_value(receipt).unwrap_or_default();
    if let Some(object) = value.as_object_mut() {
        object.remove("sha256");
    }
    hex(&Sha256::digest(value.to_string()))
}

#[cfg(test)]
mod tests {
    use ark_types::guest::Renewed;

    use super::*;

    fn asked() -> Renew {
        order(Generation([7; 16]), &"a1-1".parse().unwrap(), &"1".repeat(32))
    }

    fn answered(order: &Renew) -> Renewal {
        let answer = Renewed {
            nonce: order.nonce.clone(),
            renewals: 3,
            random: dice::<32>(),
            evaluator_random: Some(dice::<16>()),
            hostname: order.hostname.clone(),
            machine_id: order.machine_id.clone(),
            boot_id: "b".into(),
            dropped_secrets: 2,
            unix_ns: 0,
        };
        Renewal { answer, clock_error_ns: 40_000_000 }
    }

    fn wanted(order: &Renew) -> Wanted<'_> {
        Wanted { order, renewals: Some(3), hello: "hello", machine_id_taken: false, hostname_taken: false }
    }

    #[test]
    fn an_honest_answer_passes_all_nine_and_the_receipt_is_sealed() {
        let order = asked();
        let checks = check(&answered(&order), &wanted(&order), &Seen::default()).unwrap();
        assert_eq!(checks.len(), 9);
        assert!(checks.iter().all(|check| check.passed && check.sha256.len() == 64));
        let clock = checks.iter().find(|check| check.check == CheckKind::Clock).unwrap();
        assert_eq!(
            (clock.answer.as_str(), clock.evidence),
            ("within 40000 us of the host's", Evidence::GuestReported)
        );
        let receipt = seal(Receipt {
            agent_id: "0".repeat(16),
            name: "a1-1".parse().unwrap(),
            snapshot: "s".into(),
            generation: order.generation,
            nonce: order.nonce,
            at_unix_ms: 0,
            took_ms: 1,
            checks,
            sha256: String::new(),
        });
        assert_eq!(receipt.sha256, hash_of(&receipt));
        assert_ne!(receipt.sha256, hash_of(&Receipt { took_ms: 2, ..receipt.clone() }));
    }

    #[test]
    fn every_lie_and_every_repetition_fails_its_own_check() {
        let order = asked();
        let seen = Seen::default();
        let fails = |change: fn(&mut Renewal)| {
            let mut renewal = answered(&order);
            change(&mut renewal);
            check(&renewal, &wanted(&order), &seen).unwrap_err()
        };
        assert_eq!(fails(|r| r.answer.nonce.clear()).check, CheckKind::VsockToGuest);
        assert_eq!(fails(|r| r.answer.random = "zz".into()).check, CheckKind::Random);
        assert_eq!(
            fails(|r| r.answer.evaluator_random = Some("0".repeat(33))).check,
            CheckKind::EvaluatorRandom
        );
        assert_eq!(fails(|r| r.clock_error_ns = 50_000_001).check, CheckKind::Clock);
        assert_eq!(fails(|r| r.answer.machine_id = "2".repeat(32)).check, CheckKind::MachineId);
        assert_eq!(fails(|r| r.answer.renewals = 2).check, CheckKind::Renewals);
        let failed = fails(|r| r.answer.hostname = "x".repeat(1000));
        assert_eq!(failed.check, CheckKind::Hostname);
        assert!(
            failed.to_string().contains("check of its host name failed") && failed.to_string().len() < 400
        );

        let twice = answered(&order);
        check(&twice, &wanted(&order), &seen).unwrap();
        let failed = check(&twice, &wanted(&order), &seen).unwrap_err();
        assert_eq!(
            (failed.check, failed.why.as_str()),
            (CheckKind::Random, "the same ones were answered before")
        );
        let taken = Wanted { machine_id_taken: true, ..wanted(&order) };
        assert_eq!(check(&answered(&order), &taken, &seen).unwrap_err().check, CheckKind::MachineId);
        let taken = Wanted { hostname_taken: true, ..wanted(&order) };
        assert_eq!(check(&answered(&order), &taken, &seen).unwrap_err().check, CheckKind::Hostname);
    }

    #[test]
    fn what_a_guest_answered_to_an_earlier_arkd_is_known_to_the_next() {
        let order = asked();
        let renewal = answered(&order);
        let checks = check(&renewal, &wanted(&order), &Seen::default()).unwrap();
        let receipt = Receipt {
            agent_id: "0".repeat(16),
            name: "a1-1".parse().unwrap(),
            snapshot: "s".into(),
            generation: order.generation,
            nonce: order.nonce.clone(),
            at_unix_ms: 0,
            took_ms: 1,
            checks,
            sha256: String::new(),
        };
        let next = Seen::default();
        next.remember(Some(&receipt));
        assert_eq!(check(&renewal, &wanted(&order), &next).unwrap_err().check, CheckKind::Random);
        let another = Renewed { random: dice::<32>(), ..renewal.answer.clone() };
        let another = Renewal { answer: another, clock_error_ns: 0 };
        assert_eq!(check(&another, &wanted(&order), &next).unwrap_err().check, CheckKind::EvaluatorRandom);
        assert_eq!(unhex(&"f".repeat(66)), None);
    }

    #[test]
    fn what_was_seen_is_bounded() {
        let seen = Seen::default();
        let hash = |n: usize| -> [u8; 32] { Sha256::digest(n.to_le_bytes()).into() };
        assert!((0..=MAX_SEEN).all(|n| seen.is_new(hash(n))));
        assert!(seen.is_new(hash(0)), "the oldest made room");
        assert!(!seen.is_new(hash(MAX_SEEN)));
    }
}

//! Replicas that did not come to be, or did not last, and when the next one is tried.

use std::time::{Duration, Instant};

/// Wait after the first failure; after each further one it is twice as long.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// Longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Failures in a row after which a generation counts as failed.
const MOST: u32 = 3;

/// Failures in a row since a replica of the generation last proved itself.
#[derive(Debug, Default)]
pub(super) struct Attempts {
    /// Those that are the generation's fault.
    faults: u32,
    /// All of them.
    failures: u32,
    /// The last one.
    last: Option<Failure>,
}

#[derive(Debug)]
struct Failure {
    why: String,
    next: Instant,
}

impl Attempts {
    /// Takes note of a failure at `now`; whether it is the generation's fault, and not for want of room. Several that were tried
    /// at once count as one.
    pub(super) fn note(&mut self, why: String, is_fault: bool, now: Instant) {
        if self.wait(now).is_some() {
            return;
        }
        self.faults = self.faults.saturating_add(u32::from(is_fault));
        self.failures = self.failures.saturating_add(1);
        let doublings = self.failures.saturating_sub(1).min(10);
        let wait = FIRST_WAIT.saturating_mul(1 << doublings).min(LONGEST_WAIT);
        self.last = Some(Failure { why, next: now + wait });
    }

    /// A replica proved itself.
    pub(super) fn succeed(&mut self) {
        *self = Self::default();
    }

    /// How long the next try waits; none when it may begin.
    pub(super) fn wait(&self, now: Instant) -> Option<Duration> {
        let wait = self.last.as_ref()?.next.saturating_duration_since(now);
        (!wait.is_zero()).then_some(wait)
    }

    /// Whether the generation failed so often that it is not worth another try while others serve.
    pub(super) const fn is_hopeless(&self) -> bool {
        self.faults >= MOST
    }

    /// Why the last one failed, and how many did.
    pub(super) fn last(&self) -> Option<(&str, u32)> {
        self.last.as_ref().map(|failure| (failure.why.as_str(), self.failures))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_end_with_a_success() {
        let mut attempts = Attempts::default();
        let mut now = Instant::now();
        assert_eq!(attempts.wait(now), None);
        let mut waits = Vec::new();
        for _ in 0..8 {
            attempts.note("it broke".to_owned(), true, now);
            // One of the same batch.
            attempts.note("it broke, too".to_owned(), true, now);
            let wait = attempts.wait(now).unwrap();
            waits.push(wait.as_secs());
            now += wait;
            assert_eq!(attempts.wait(now), None);
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(attempts.last(), Some(("it broke", 8)));
        assert!(attempts.is_hopeless());
        attempts.succeed();
        assert!(!attempts.is_hopeless() && attempts.last().is_none());
    }

    #[test]
    fn want_of_room_is_nobodys_fault() {
        let mut attempts = Attempts::default();
        let mut now = Instant::now();
        for _ in 0..10 {
            attempts.note("the host is full".to_owned(), false, now);
            now += LONGEST_WAIT;
        }
        assert!(!attempts.is_hopeless());
    }
}

//! Replicas that did not come to be, or did not last, and when the next one is tried.

use std::time::{Duration, Instant};

use ark_types::service::{MOST_ENDS, QUIET_S, ServiceSpec};

/// Wait after the first failure; after each further one it is twice as long.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// Longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Failures in a row after which a generation counts as failed.
const MOST: u32 = 3;
/// After this time without an end of a command those before count no more.
const QUIET: Duration = Duration::from_secs(QUIET_S);

/// Failures in a row since a replica of the generation last proved itself, and ends of its command.
#[derive(Debug, Default)]
pub(super) struct Attempts {
    /// Those that are the generation's fault.
    faults: u32,
    /// All of them.
    failures: u32,
    /// The last one.
    last: Option<Failure>,
    /// Ends of commands, without [`QUIET`] in between.
    ends: u32,
    /// Waits that there were for those.
    waits: u32,
    /// The last one, and when it was.
    ended: Option<(Failure, Instant)>,
}

#[derive(Debug)]
struct Failure {
    why: String,
    next: Instant,
}

impl Failure {
    /// The failure number `count` in a row.
    fn new(why: String, count: u32, now: Instant) -> Self {
        let doublings = count.saturating_sub(1).min(10);
        let wait = FIRST_WAIT.saturating_mul(1 << doublings).min(LONGEST_WAIT);
        Self { why, next: now + wait }
    }
}

impl Attempts {
    /// Takes note of a failure at `now`; whether it is the generation's fault, and not for want of room. Several that were tried
    /// at once count as one.
    pub(super) fn note(&mut self, why: String, is_fault: bool, now: Instant) {
        if self.last.as_ref().is_some_and(|last| now < last.next) {
            return;
        }
        self.faults = self.faults.saturating_add(u32::from(is_fault));
        self.failures = self.failures.saturating_add(1);
        self.last = Some(Failure::new(why, self.failures, now));
    }

    /// Takes note that the command of a replica ended at `now`, whether or not that had proved itself. Several at once are one
    /// reason to wait.
    pub(super) fn command_ended(&mut self, why: String, now: Instant) {
        if self.ended.as_ref().is_none_or(|(_, at)| now.duration_since(*at) >= QUIET) {
            (self.ends, self.waits) = (0, 0);
        }
        self.ends = self.ends.saturating_add(1);
        self.ended = match self.ended.take() {
            Some((last, _)) if now < last.next => Some((Failure { why, ..last }, now)),
            _ => {
                self.waits = self.waits.saturating_add(1);
                Some((Failure::new(why, self.waits, now), now))
            }
        };
    }

    /// Whether commands of replicas of `spec` ended so often that no more are made.
    pub(super) fn is_loop(&self, spec: &ServiceSpec) -> bool {
        let most = spec.restart.max_restarts().unwrap_or(MOST_ENDS).saturating_mul(spec.replicas.max(1));
        self.ends > most
    }

    /// How the last command ended, and how many did.
    pub(super) fn last_end(&self) -> Option<(&str, u32)> {
        self.ended.as_ref().map(|(failure, _)| (failure.why.as_str(), self.ends))
    }

    /// A replica proved itself. Its command may end all the same.
    pub(super) fn succeed(&mut self) {
        (self.faults, self.failures, self.last) = (0, 0, None);
    }

    /// How long the next try waits; none when it may begin.
    pub(super) fn wait(&self, now: Instant) -> Option<Duration> {
        let ended = self.ended.as_ref().map(|(failure, _)| failure);
        let next = self.last.iter().chain(ended).map(|failure| failure.next).max()?;
        let wait = next.saturating_duration_since(now);
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
    fn commands_that_end_again_and_again_are_waited_for_and_then_given_up() {
        let spec = |text: &str| -> ServiceSpec { serde_json::from_str(text).unwrap() };
        let two = spec(r#"{ "name": "web", "replicas": 2, "image": "base" }"#);
        let mut attempts = Attempts::default();
        let mut now = Instant::now();
        let mut waits = Vec::new();
        for _ in 0..5 {
            assert!(!attempts.is_loop(&two));
            // Both end; those that come after them prove themselves.
            attempts.command_ended("one ended".to_owned(), now);
            attempts.command_ended("the other ended".to_owned(), now);
            let wait = attempts.wait(now).unwrap();
            waits.push(wait.as_secs());
            now += wait + Duration::from_secs(5);
            attempts.succeed();
        }
        assert_eq!((waits, attempts.wait(now)), (vec![1, 2, 4, 8, 16], None));
        assert_eq!(attempts.last_end(), Some(("the other ended", 10)));
        assert!(!attempts.is_loop(&two));
        attempts.command_ended("once more".to_owned(), now);
        assert!(attempts.is_loop(&two));
        let one = spec(
            r#"{ "name": "web", "replicas": 1, "image": "base", "restart": { "when": "always", "max_restarts": 11 } }"#,
        );
        assert!(!attempts.is_loop(&one), "it has a bound of its own");
        // What was long ago counts no more.
        now += QUIET;
        attempts.command_ended("much later".to_owned(), now);
        assert_eq!((attempts.is_loop(&two), attempts.wait(now)), (false, Some(FIRST_WAIT)));
        assert_eq!(attempts.last_end(), Some(("much later", 1)));
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

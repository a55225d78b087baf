//! What becomes of a task. Nothing here does I/O.
//!
//! ```text
//!            no agent is to be had: room ──► back to its place, no attempt
//!                                   else ──► failed
//!  attempt ─► succeeded ─────────────────► succeeded
//!          ─► refused by its agent ──────► failed
//!          ─► failed, timed out, lost ───► the next one after a wait ──► … ──► failed, timed out
//!          ─► cut off by the end of arkd ► the next one at once
//! ```

use std::time::Duration;

use ark_types::event::Event;
use ark_types::problem::ProblemKind;
use ark_types::task::{AttemptEnd, AttemptOutcome, Retry, Task};

use crate::host::millis;

/// What a refusal to make an agent means for the task that it was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// There is no room now, or nothing can be recorded: it waits, and that was no attempt.
    NoRoom,
    /// No agent like that can be had, however often it is asked for.
    Never,
    /// An agent was begun and did not come up: that was an attempt.
    Lost,
}

impl Refused {
    /// What a refusal of `kind` means. It was asked for with patience, so that who finds the host full can never fit.
    pub(super) const fn of(kind: ProblemKind) -> Self {
        match kind {
            ProblemKind::QuotaExceeded
            | ProblemKind::QueueFull
            | ProblemKind::QueueTimeout
            | ProblemKind::HostUnable
            | ProblemKind::DiskFull
            | ProblemKind::LogFull
            | ProblemKind::LogUnavailable
            | ProblemKind::InUse => Self::NoRoom,
            ProblemKind::AgentGone
            | ProblemKind::BootFailed
            | ProblemKind::ForkFailed
            | ProblemKind::GuestMisbehaved
            | ProblemKind::DeadlinePassed
            | ProblemKind::Internal => Self::Lost,
            _ => Self::Never,
        }
    }
}

/// Whether an agent that says so can never do what the task wants.
pub(super) const fn is_refusal(kind: ProblemKind) -> bool {
    matches!(
        kind,
        ProblemKind::ProgramNotFound
            | ProblemKind::ProgramNotExecutable
            | ProblemKind::BadWorkingDirectory
            | ProblemKind::UnknownUser
            | ProblemKind::NoEvaluator
            | ProblemKind::InvalidValue
    )
}

/// How long `task` has to wait at `now`, and how long it has until its deadline. A clock that was set makes neither longer than it
/// was to be.
pub(super) fn times(task: &Task, now_unix_ms: u64) -> (Duration, Option<Duration>) {
    let until =
        |unix_ms: u64, most: u64| Duration::from_millis(unix_ms.saturating_sub(now_unix_ms).min(most));
    let spec = &task.spec;
    let wait = task.retry_unix_ms.map_or(Duration::ZERO, |at| until(at, spec.retry.max_backoff_ms));
    let left = spec.deadline_ms.map(|ms| until(spec.created_unix_ms.saturating_add(ms), ms));
    (wait, left)
}

/// How long to wait after the failure number `failures`, from 1.
pub(super) fn backoff(retry: &Retry, failures: u32) -> Duration {
    let doubled = 2u64.saturating_pow(failures.saturating_sub(1)).saturating_mul(retry.backoff_ms);
    Duration::from_millis(doubled.min(retry.max_backoff_ms))
}

/// What becomes of a task when an attempt has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    /// What is recorded of that, in order.
    pub(super) events: Vec<Event>,
    /// After how long it is tried again; none when it has ended, with the last of the events.
    pub(super) again: Option<Duration>,
}

/// What becomes of a task whose attempt number `attempt` ended with `end` at `now_unix_ms`, after `failures` earlier ones that count.
pub(super) fn after(
    retry: &Retry,
    failures: u32,
    attempt: u32,
    end: AttemptEnd,
    now_unix_ms: u64,
) -> Verdict {
    let failures = failures + u32::from(end.outcome.is_failure());
    let why = end.reason.clone().unwrap_or_default();
    let given_up = match retry.max_attempts {
        1 => why.clone(),
        _ => format!("{why}; it is not tried again after {attempt} attempts"),
    };
    let last = match end.outcome {
        AttemptOutcome::Succeeded => {
            return Verdict { events: vec![Event::TaskSucceeded { attempt, end }], again: None };
        }
        AttemptOutcome::CutOff => {
            let cut_off = Event::TaskAttemptFailed { attempt, end, retry_unix_ms: None };
            return Verdict { events: vec![cut_off], again: Some(Duration::ZERO) };
        }
        AttemptOutcome::Failed | AttemptOutcome::TimedOut | AttemptOutcome::Lost
            if failures < retry.max_attempts =>
        {
            let wait = backoff(retry, failures);
            let retry_unix_ms = (!wait.is_zero()).then(|| now_unix_ms.saturating_add(millis(wait)));
            let failed = Event::TaskAttemptFailed { attempt, end, retry_unix_ms };
            return Verdict { events: vec![failed], again: Some(wait) };
        }
        AttemptOutcome::Refused => Event::TaskFailed { reason: why },
        AttemptOutcome::Stopped => Event::TaskCancelled {},
        AttemptOutcome::TimedOut => Event::TaskTimedOut { reason: given_up },
        AttemptOutcome::Failed | AttemptOutcome::Lost => Event::TaskFailed { reason: given_up },
    };
    let failed = Event::TaskAttemptFailed { attempt, end, retry_unix_ms: None };
    Verdict { events: vec![failed, last], again: None }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OUTCOMES: [AttemptOutcome; 7] = [
        AttemptOutcome::Succeeded,
        AttemptOutcome::Failed,
        AttemptOutcome::TimedOut,
        AttemptOutcome::Lost,
        AttemptOutcome::Refused,
        AttemptOutcome::CutOff,
        AttemptOutcome::Stopped,
    ];

    fn end(outcome: AttemptOutcome) -> AttemptEnd {
        AttemptEnd { outcome, reason: Some("it broke".to_owned()), exit_code: None, output: None }
    }

    fn retry(max_attempts: u32, backoff_ms: u64, max_backoff_ms: u64) -> Retry {
        Retry { max_attempts, backoff_ms, max_backoff_ms }
    }

    #[test]
    fn a_refusal_is_for_good_for_want_of_room_or_an_attempt() {
        for (kind, refused) in [
            (ProblemKind::QueueTimeout, Refused::NoRoom),
            (ProblemKind::QuotaExceeded, Refused::NoRoom),
            (ProblemKind::LogFull, Refused::NoRoom),
            (ProblemKind::HostFull, Refused::Never),
            (ProblemKind::ImageNotFound, Refused::Never),
            (ProblemKind::InvalidValue, Refused::Never),
            (ProblemKind::BootFailed, Refused::Lost),
            (ProblemKind::ForkFailed, Refused::Lost),
        ] {
            assert_eq!(Refused::of(kind), refused, "{kind:?}");
        }
        assert!(is_refusal(ProblemKind::ProgramNotFound) && !is_refusal(ProblemKind::AgentGone));
    }

    #[test]
    fn waits_double_up_to_the_longest() {
        let waits: Vec<_> = (1..6).map(|n| backoff(&retry(9, 100, 500), n).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 500, 500]);
        assert_eq!(backoff(&retry(9, u64::MAX, u64::MAX), 99), Duration::from_millis(u64::MAX));
        assert_eq!(backoff(&retry(9, 0, 500), 50), Duration::ZERO);
    }

    #[test]
    fn no_step_of_the_clock_makes_a_wait_or_a_deadline_longer() {
        let task: Task = serde_json::from_value(serde_json::json!({
            "id": "1", "work": { "kind": "command", "program": "true" }, "created_unix_ms": 1000, "deadline_ms": 500,
            "retry": { "max_attempts": 3, "backoff_ms": 10, "max_backoff_ms": 100 }, "state": "waiting", "retry_unix_ms": 1060,
        }))
        .unwrap();
        let at = |now| {
            let (wait, left) = times(&task, now);
            (wait.as_millis(), left.unwrap().as_millis())
        };
        assert_eq!((at(1010), at(9000), at(0)), ((50, 490), (0, 0), (100, 500)));
    }

    #[test]
    fn the_end_says_why_and_after_how_many_attempts() {
        let last =
            |retry, failures, outcome| after(retry, failures, 4, end(outcome), 0).events.pop().unwrap();
        let (once, thrice) = (retry(1, 1, 1), retry(3, 1, 1));
        let reason = "it broke".to_owned();
        assert_eq!(last(&once, 0, AttemptOutcome::Failed), Event::TaskFailed { reason: reason.clone() });
        assert_eq!(last(&thrice, 0, AttemptOutcome::Refused), Event::TaskFailed { reason });
        let reason = "it broke; it is not tried again after 4 attempts".to_owned();
        assert_eq!(last(&thrice, 2, AttemptOutcome::TimedOut), Event::TaskTimedOut { reason });
    }

    proptest! {
        /// However attempts end, those that count are at most as many as may fail, and what ends a task is told once, last.
        #[test]
        fn a_task_ends_after_as_many_failures_as_it_may_have(
            outcomes in prop::collection::vec(0usize..7, 1..200),
            max_attempts in 1u32..=100,
            backoff_ms in 0u64..100_000,
            max_backoff_ms in 0u64..100_000,
        ) {
            let retry = retry(max_attempts, backoff_ms, max_backoff_ms);
            let is_end = |event: &Event| !matches!(event, Event::TaskAttemptFailed { .. });
            let mut failures = 0;
            for (attempt, outcome) in (1..).zip(outcomes) {
                let end = end(OUTCOMES[outcome]);
                let Verdict { events, again } = after(&retry, failures, attempt, end.clone(), 1000);
                failures += u32::from(end.outcome.is_failure());
                prop_assert!(failures <= max_attempts);
                prop_assert_eq!(events.iter().filter(|event| is_end(event)).count(), usize::from(again.is_none()));
                let Some(wait) = again else {
                    prop_assert!(events.last().is_some_and(is_end));
                    break;
                };
                prop_assert!(failures < max_attempts && wait <= Duration::from_millis(max_backoff_ms));
                if end.outcome == AttemptOutcome::CutOff {
                    prop_assert_eq!(wait, Duration::ZERO);
                }
            }
        }
    }
}

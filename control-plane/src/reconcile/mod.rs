//! What an agent needs now: its desired and its observed state, compared. Nothing here looks, waits or acts.
//!
//! ```text
//!             ended, and its policy says so             until is over
//!  running ───────────────────────────────► Wait ────────────────────► Restart ──► running, from a checkpoint or fresh
//!     │ ▲                                     ▲                           │
//!     │ └── Tell: well ◄── Tell: it is not    └───────────────────────────┤ it did not come up
//!     │                       │ with a policy                             ▼
//!     │                       └──► Kill ──► ended        too many ──► Stay, with the reason; what the host is to blame for is not counted
//!     ├── time for a health check ──► Check
//!     ├── time for a checkpoint, and well ──► Checkpoint
//!     └── ttl or idle timeout is over ──► Remove (the ttl: whatever state it is in)
//! ```
//!
//! Times are milliseconds on one clock that is never set, [`Clock`].

use ark_types::event::Outcome;
use ark_types::healing::RestartPolicy;
use ark_types::vmm::SnapshotId;
use serde::{Deserialize, Serialize};

mod clock;
mod health;
mod lineage;
#[cfg(test)]
mod tests;

pub(crate) use clock::{Clock, Reading};
pub(crate) use health::{Health, Tally};
pub(crate) use lineage::Lineage;

/// Wait before the second restart; the first does not wait, and each further one waits twice as long.
const FIRST_WAIT_MS: u64 = 1000;
/// Longest wait before a restart.
pub(crate) const LONGEST_WAIT_MS: u64 = 60_000;
/// Who ran for this long without ending runs well: what was before counts no more.
const RAN_WELL_MS: u64 = 10 * 60_000;
/// Within this time an agent without a bound of its own is restarted [`MOST_RESTARTS`] times at most.
const WINDOW_MS: u64 = 10 * 60_000;
/// See [`WINDOW_MS`].
const MOST_RESTARTS: usize = 5;

/// What an agent's creator wants of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Desired {
    pub(crate) restart: RestartPolicy,
    pub(crate) ttl_ms: Option<u64>,
    pub(crate) idle_timeout_ms: Option<u64>,
    /// From one checkpoint to the next.
    pub(crate) checkpoint_ms: Option<u64>,
    /// Its own health check.
    pub(crate) check: Option<Check>,
    /// Somebody asked for its removal.
    pub(crate) is_removal_asked: bool,
}

/// How often an agent is checked, and how often in a row that may fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Check {
    /// From the end of one to the next.
    pub(crate) interval_ms: u64,
    pub(crate) failures: u32,
}

/// What is seen of an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Observed {
    pub(crate) created_ms: u64,
    pub(crate) condition: Condition,
}

/// Where an agent is, as far as this matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    /// Its guest comes up.
    ComingUp,
    /// Its guest takes commands.
    Running(Running),
    /// Its processors stand still, as somebody asked.
    Paused,
    /// Its VMM is being ended.
    Ending,
    /// It ended, or did not come up again, and nothing was decided yet.
    Ended {
        outcome: Outcome,
        /// How long it ran, milliseconds; none when it did not come up.
        ran_ms: Option<u64>,
        /// Whether the host is to blame, another time it might well have come up.
        is_of_the_host: bool,
        history: History,
    },
    /// It is to begin anew then.
    Waiting {
        until_ms: u64,
        /// Checkpoints that there are, oldest first.
        checkpoints: Vec<SnapshotId>,
        lineage: Lineage,
    },
    /// It stays as it ended.
    Over,
}

/// An agent whose guest takes commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Running {
    /// How long its guest was not heard, milliseconds.
    pub(crate) silent_ms: u64,
    /// From when on that is too long, milliseconds.
    pub(crate) patience_ms: u64,
    /// Whether it was not heard at all since this `arkd` looks after it.
    pub(crate) is_unheard: bool,
    /// What was told of its health.
    pub(crate) told: Health,
    /// How long nothing was asked of it, milliseconds.
    pub(crate) unused_ms: u64,
    /// How long ago a checkpoint was last begun, or it came up, milliseconds; none while one is being taken.
    pub(crate) unsaved_ms: Option<u64>,
    /// Its own health checks.
    pub(crate) checked: Checked,
}

/// An agent's own health checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Checked {
    /// What came of them.
    pub(crate) tally: Tally,
    /// How long ago the last one ended, or the agent came up or went on, milliseconds; none while one is under way.
    pub(crate) idle_ms: Option<u64>,
}

/// Restarts of an agent since it last ran well.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct History {
    /// How many.
    pub(crate) streak: u32,
    /// When those of the last [`WINDOW_MS`] were decided.
    recent_ms: Vec<u64>,
    /// Restarts since its last end that the host failed.
    #[serde(default)]
    faults: u32,
}

impl History {
    /// The history with what the end of one that ran for `ran_ms` makes of it.
    fn after(&self, ran_ms: Option<u64>) -> Self {
        if ran_ms.is_some_and(|ran| ran >= RAN_WELL_MS) { Self::default() } else { self.clone() }
    }

    /// Takes note of a restart that is decided at `now`.
    pub(crate) fn note(&mut self, ran_ms: Option<u64>, now: u64) {
        *self = self.after(ran_ms);
        self.streak = self.streak.saturating_add(1);
        self.recent_ms.retain(|at| now.saturating_sub(*at) < WINDOW_MS);
        self.recent_ms.push(now);
        self.faults = 0;
    }

    /// Takes note of a restart that failed and that the host is to blame for: the agent has none less for that.
    pub(crate) const fn note_fault(&mut self) {
        self.faults = self.faults.saturating_add(1);
    }

    fn recent(&self, now: u64) -> usize {
        self.recent_ms.iter().filter(|at| now.saturating_sub(**at) < WINDOW_MS).count()
    }
}

/// What an agent's owner is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Let it begin anew after this time.
    Wait { attempt: u32, after_ms: u64 },
    /// Leave it as it ended; `why` where its policy alone would have it begin anew.
    Stay { why: Option<String> },
    /// Let it begin anew now: from the first of these checkpoints that can be used, or else as what it is made of.
    Restart { from: Vec<SnapshotId> },
    /// Take a checkpoint.
    Checkpoint,
    /// Check its health.
    Check,
    /// Tell that this is its health now.
    Tell(Health),
    /// End its VMM, as it is not well.
    Kill { health: Health },
    /// Remove it, for this reason.
    Remove { why: String },
}

/// What `observed` needs at `now` to be as `desired`.
pub(crate) fn decide(desired: &Desired, observed: &Observed, now: u64) -> Vec<Action> {
    if desired.is_removal_asked {
        return Vec::new();
    }
    if let Some(why) = expired(desired, observed, now) {
        return vec![Action::Remove { why }];
    }
    match &observed.condition {
        Condition::Running(running) => look_after(desired, running),
        Condition::Ended { outcome, ran_ms, is_of_the_host, history } => {
            vec![after_end(desired.restart, *outcome, *is_of_the_host, &history.after(*ran_ms), now)]
        }
        Condition::Waiting { until_ms, checkpoints, lineage } if *until_ms <= now => {
            vec![Action::Restart { from: lineage.usable(checkpoints) }]
        }
        Condition::ComingUp
        | Condition::Paused
        | Condition::Ending
        | Condition::Waiting { .. }
        | Condition::Over => Vec::new(),
    }
}

/// Which of its limits an agent is over.
fn expired(desired: &Desired, observed: &Observed, now: u64) -> Option<String> {
    let age = now.saturating_sub(observed.created_ms);
    if let Some(ttl) = desired.ttl_ms.filter(|ttl| age >= *ttl) {
        return Some(format!("its ttl of {} s is over", ttl / 1000));
    }
    match &observed.condition {
        Condition::Running(Running { unused_ms, .. }) => desired
            .idle_timeout_ms
            .filter(|limit| unused_ms >= limit)
            .map(|limit| format!("nothing was asked of it for {} s, its idle timeout", limit / 1000)),
        Condition::ComingUp
        | Condition::Paused
        | Condition::Ending
        | Condition::Ended { .. }
        | Condition::Waiting { .. }
        | Condition::Over => None,
    }
}

/// What an agent that runs needs.
fn look_after(desired: &Desired, running: &Running) -> Vec<Action> {
    let Running { told, unsaved_ms, checked, silent_ms, patience_ms, .. } = *running;
    let health = health(desired, running);
    let mut actions = Vec::new();
    if health != told {
        actions.push(Action::Tell(health));
    }
    // What an earlier arkd missed is given its time to be heard by this one.
    let is_missed = health == Health::Failing || silent_ms >= patience_ms;
    if health != Health::Well && is_missed && !desired.restart.is_never() {
        actions.push(Action::Kill { health });
        return actions;
    }
    let is_check_due =
        desired.check.zip(checked.idle_ms).is_some_and(|(check, idle)| idle >= check.interval_ms);
    if is_check_due && health != Health::Silent {
        actions.push(Action::Check);
    }
    let is_due = desired.checkpoint_ms.zip(unsaved_ms).is_some_and(|(every, unsaved)| unsaved >= every);
    // Of a guest that is not well nothing is kept: it would not be well again. One that is late with its heartbeats may hang
    // already.
    if is_due && health == Health::Well && checked.tally.failed == 0 && silent_ms < patience_ms / 2 {
        actions.push(Action::Checkpoint);
    }
    actions
}

fn health(desired: &Desired, running: &Running) -> Health {
    let Running { silent_ms, patience_ms, is_unheard, told, checked, .. } = *running;
    if silent_ms >= patience_ms || is_unheard && told == Health::Silent {
        Health::Silent
    } else if desired.check.is_some_and(|check| checked.tally.is_failing(check.failures, told)) {
        Health::Failing
    } else {
        Health::Well
    }
}

fn after_end(
    policy: RestartPolicy,
    outcome: Outcome,
    is_of_the_host: bool,
    history: &History,
    now: u64,
) -> Action {
    let is_due = match policy {
        RestartPolicy::Never => false,
        RestartPolicy::OnFailure { .. } => outcome == Outcome::Failed,
        RestartPolicy::Always { .. } => true,
    };
    if !is_due {
        return Action::Stay { why: None };
    }
    if is_of_the_host {
        // Still the same attempt, however often it takes.
        let after_ms = wait(history.faults.saturating_add(1));
        return Action::Wait { attempt: history.streak.max(1), after_ms };
    }
    let spent = match policy.max_restarts() {
        Some(most) => (history.streak >= most).then(|| format!("it was restarted {}", times(history.streak))),
        None => {
            let recent = history.recent(now);
            (recent >= MOST_RESTARTS)
                .then(|| format!("it was restarted {recent} times within {} minutes", WINDOW_MS / 60_000))
        }
    };
    match spent {
        Some(spent) => Action::Stay { why: Some(format!("{spent}, so it is not restarted any more")) },
        None => Action::Wait { attempt: history.streak.saturating_add(1), after_ms: wait(history.streak) },
    }
}

fn times(count: u32) -> String {
    if count == 1 { "once".to_owned() } else { format!("{count} times") }
}

/// How long a restart waits that comes after `streak` others.
fn wait(streak: u32) -> u64 {
    let Some(doublings) = streak.checked_sub(1) else { return 0 };
    let doubled = 1u64.checked_shl(doublings).map_or(u64::MAX, |factor| FIRST_WAIT_MS.saturating_mul(factor));
    doubled.min(LONGEST_WAIT_MS)
}

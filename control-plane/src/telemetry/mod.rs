//! What happened how often and how long it took: counted where it happens, told by `GET /metrics`.
//!
//! | part | what it knows |
//! |---|---|
//! | [`Telemetry`] | counters and histograms; every room that has something to count calls a method of it |
//! | [`Phase`] | the steps of an agent's start and of what is done in it |
//! | [`Inference`] | calls of models |
//! | `http` | requests by route template, method and status |
//! | `scrape` | what is only looked at when somebody asks: pools, agents, this process |
//!
//! The names are frozen in `api/types/schema/metrics.txt`. Labels have few values: no name that a client chose is one, except
//! those of living agents, of templates that have a pool, of services, of models and of the first owners, which are bounded in number.

mod http;
mod inference;
mod scrape;

use std::borrow::Cow;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ark_types::agent::Origin;
use ark_types::task::TaskState;
use ark_types::vmm::ExitReason;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;

use crate::problems::Refusal;
use crate::settings;

pub use http::measured;
pub use inference::{Inference, InferenceOutcome};
pub use scrape::{CONTENT_TYPE, scrape};

/// Names and values of a series.
type Labels<const N: usize> = [(&'static str, Cow<'static, str>); N];
type Counters<const N: usize> = Family<Labels<N>, Counter>;
type Histograms<const N: usize> = Family<Labels<N>, Histogram, fn() -> Histogram>;

/// Upper bounds of the histograms' buckets, seconds: 1-2.5-5 from half a millisecond to a minute.
const BUCKETS: [f64; 16] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

fn histogram() -> Histogram {
    Histogram::new(BUCKETS)
}

/// A step whose time is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A wish for agents waits for room.
    Queue,
    /// A restore waits for its turn.
    Turn,
    /// A standby becomes an agent: renewal and every check.
    Claim,
    /// From the start of a VMM to its booted guest's hello.
    Boot,
    /// From a snapshot, given to a VMM, to a guest that passed every check.
    Restore,
    /// From a restored guest's challenge to its last check: a part of `Restore` and of `Claim`.
    Renew,
    /// From the owner's beginning to the running agent, whichever way.
    Ready,
    /// A program whose output is captured.
    Exec,
    /// Code in a warm interpreter.
    Eval,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Self; 9] = [
        Self::Queue,
        Self::Turn,
        Self::Claim,
        Self::Boot,
        Self::Restore,
        Self::Renew,
        Self::Ready,
        Self::Exec,
        Self::Eval,
    ];

    const fn label(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Turn => "turn",
            Self::Claim => "claim",
            Self::Boot => "boot",
            Self::Restore => "restore",
            Self::Renew => "renew",
            Self::Ready => "ready",
            Self::Exec => "exec",
            Self::Eval => "eval",
        }
    }
}

/// What is made ahead of need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ahead {
    /// A VMM that waits for a snapshot.
    Prepared,
    /// A fork that waits for an agent to become.
    Standby,
}

impl Ahead {
    const fn label(self) -> &'static str {
        match self {
            Self::Prepared => "prepared",
            Self::Standby => "standby",
        }
    }
}

/// What an agent is to be made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// An image, booted.
    Boot,
    /// A template.
    Template,
    /// A named snapshot.
    Snapshot,
    /// A living agent.
    Fork,
}

impl Source {
    const fn label(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Template => "template",
            Self::Snapshot => "snapshot",
            Self::Fork => "fork",
        }
    }
}

impl From<&Origin> for Source {
    fn from(origin: &Origin) -> Self {
        match origin {
            Origin::Boot => Self::Boot,
            Origin::Template { .. } => Self::Template,
            Origin::Snapshot { .. } => Self::Snapshot,
            // Nobody asks for an agent of a checkpoint: it begins anew by itself.
            Origin::Fork { .. } | Origin::Checkpoint { .. } => Self::Fork,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Telemetry {
    creates: Counters<2>,
    phases: Histograms<1>,
    claims: Counters<2>,
    vmm_exits: Counters<1>,
    requests: Counters<3>,
    request_time: Histograms<2>,
    tasks: Counters<1>,
    task_wait: Histogram,
    /// Calls of models.
    pub inference: Inference,
    settings: Mutex<settings::Telemetry>,
}

impl Telemetry {
    /// Nothing counted yet.
    #[must_use]
    pub fn new(settings: settings::Telemetry) -> Self {
        let new = histogram as fn() -> Histogram;
        let telemetry = Self {
            creates: Family::default(),
            phases: Family::new_with_constructor(new),
            claims: Family::default(),
            vmm_exits: Family::default(),
            requests: Family::default(),
            request_time: Family::new_with_constructor(new),
            tasks: Family::default(),
            task_wait: histogram(),
            inference: Inference::new(),
            settings: Mutex::new(settings),
        };
        // A rate needs a zero to begin with.
        for phase in Phase::ALL {
            drop(telemetry.phases.get_or_create(&[("phase", phase.label().into())]));
        }
        for state in TaskState::ALL.into_iter().filter(|state| state.is_ended()) {
            drop(telemetry.tasks.get_or_create(&[("outcome", state.word().into())]));
        }
        for kind in [Ahead::Prepared, Ahead::Standby] {
            for result in ["hit", "miss"] {
                drop(
                    telemetry
                        .claims
                        .get_or_create(&[("kind", kind.label().into()), ("result", result.into())]),
                );
            }
        }
        telemetry
    }

    /// Has other settings from now on.
    pub fn configure(&self, settings: settings::Telemetry) {
        *self.settings.lock().unwrap_or_else(PoisonError::into_inner) = settings;
    }

    fn settings(&self) -> settings::Telemetry {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// `phase` took `elapsed`.
    pub fn phase(&self, phase: Phase, elapsed: Duration) {
        self.phases.get_or_create(&[("phase", phase.label().into())]).observe(elapsed.as_secs_f64());
    }

    /// Somebody wanted one of what is made ahead; whether there was one.
    pub fn claimed(&self, kind: Ahead, hit: bool) {
        let result = if hit { "hit" } else { "miss" };
        self.claims.get_or_create(&[("kind", kind.label().into()), ("result", result.into())]).inc();
    }

    /// A VMM ended.
    pub fn vmm_ended(&self, reason: ExitReason) {
        self.vmm_exits.get_or_create(&[("reason", word(reason).into())]).inc();
    }

    /// The first attempt of a task began, so long after its creation.
    pub fn task_began(&self, waited: Duration) {
        self.task_wait.observe(waited.as_secs_f64());
    }

    /// A task ended, in `state`.
    pub fn task_ended(&self, state: TaskState) {
        self.tasks.get_or_create(&[("outcome", state.word().into())]).inc();
    }

    /// `count` agents were made, or not.
    pub fn created(&self, source: Source, outcome: Outcome, count: usize) {
        let labels = [("origin", source.label().into()), ("outcome", outcome.label().into())];
        self.creates.get_or_create(&labels).inc_by(u64::try_from(count).unwrap_or(u64::MAX));
    }

    /// An agent is asked for; whoever holds the attempt says what came of it.
    #[must_use]
    pub const fn attempt(&self, source: Source) -> Attempt<'_> {
        Attempt { telemetry: self, source, outcome: Outcome::Abandoned, count: 1 }
    }
}

/// What came of a wish for an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It runs.
    Ok,
    /// It was not begun: the request or the host did not allow it.
    Refused,
    /// It was begun and did not come up.
    Failed,
    /// Who asked left before.
    Abandoned,
}

impl Outcome {
    const fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Abandoned => "abandoned",
        }
    }

    /// What a refusal amounts to: an answer 500 to 502, or 504, tells of something that was begun.
    #[must_use]
    pub const fn of(refusal: &Refusal) -> Self {
        match refusal.0.status {
            500..=502 | 504 => Self::Failed,
            _ => Self::Refused,
        }
    }
}

/// A wish for an agent; counted when dropped.
#[derive(Debug)]
pub struct Attempt<'a> {
    telemetry: &'a Telemetry,
    /// What the agent is to be made of.
    pub source: Source,
    outcome: Outcome,
    count: usize,
}

impl Attempt<'_> {
    /// It came to `result`.
    pub fn end<T>(mut self, result: &Result<T, Refusal>) {
        self.outcome = match result {
            Ok(_) => Outcome::Ok,
            Err(refusal) => Outcome::of(refusal),
        };
    }

    /// It came to `ok` agents that run and `failed` ones that do not.
    pub fn end_with(mut self, ok: usize, failed: usize) {
        self.telemetry.created(self.source, Outcome::Failed, failed);
        (self.outcome, self.count) = (Outcome::Ok, ok);
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        self.telemetry.created(self.source, self.outcome, self.count);
    }
}

/// The reason as the wire has it: `guest_panic`.
const fn word(reason: ExitReason) -> &'static str {
    match reason {
        ExitReason::GuestPoweroff => "guest_poweroff",
        ExitReason::GuestReboot => "guest_reboot",
        ExitReason::GuestPanic => "guest_panic",
        ExitReason::GuestCrash => "guest_crash",
        ExitReason::Stopped => "stopped",
        ExitReason::StopDeadline => "stop_deadline",
        ExitReason::Signal => "signal",
        ExitReason::Killed => "killed",
        ExitReason::BadConfig => "bad_config",
        ExitReason::BadSnapshot => "bad_snapshot",
        ExitReason::HostError => "host_error",
        ExitReason::Internal => "internal",
    }
}

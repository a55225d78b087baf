//! Calls of models: how many, how long they took, and the tokens that they took.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ark_types::label::Owner;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::{Counters, Histograms, histogram};

/// Owners with series of their own, those that came first; the others are one.
const MOST_OWNERS: usize = 100;
/// Name of the others; none of an owner, as those have no underscore.
const OTHERS: &str = "_others";
/// Upper bounds of the buckets of speeds, tokens per second.
const SPEEDS: [f64; 13] =
    [0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 10_000.0];

fn speeds() -> Histogram {
    Histogram::new(SPEEDS)
}

/// What came of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InferenceOutcome {
    /// It has a result.
    Ok,
    /// It was not begun: the request, the budget or the queue did not allow it.
    Refused,
    /// The VM failed at it, or ended.
    Failed,
    /// It took too long.
    Late,
    /// Who asked left before.
    Abandoned,
}

impl InferenceOutcome {
    /// A word for it.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Late => "late",
            Self::Abandoned => "abandoned",
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Inference {
    calls: Counters<3>,
    tokens: Counters<2>,
    owner_tokens: Counters<1>,
    owners: Mutex<BTreeSet<Owner>>,
    queue: Histograms<1>,
    first_token: Histograms<1>,
    time: Histograms<1>,
    speed: Histograms<1>,
}

impl Inference {
    /// Nothing counted yet.
    pub(super) fn new() -> Self {
        let new = histogram as fn() -> Histogram;
        Self {
            calls: Family::default(),
            tokens: Family::default(),
            owner_tokens: Family::default(),
            owners: Mutex::default(),
            queue: Family::new_with_constructor(new),
            first_token: Family::new_with_constructor(new),
            time: Family::new_with_constructor(new),
            speed: Family::new_with_constructor(speeds as fn() -> Histogram),
        }
    }

    /// A call of `tool` ended; `model` is none where there is no such model.
    pub(crate) fn ended(&self, model: Option<&str>, tool: &'static str, outcome: InferenceOutcome) {
        let model = model.unwrap_or("none").to_owned();
        let labels = [("model", model.into()), ("tool", tool.into()), ("outcome", outcome.label().into())];
        self.calls.get_or_create(&labels).inc();
    }

    /// How long a call waited for its turn and a VM, until its first token if one came, and as a whole.
    pub(crate) fn times(&self, model: &str, queued: Duration, first: Option<Duration>, whole: Duration) {
        let labels = [("model", model.to_owned().into())];
        self.queue.get_or_create(&labels).observe(queued.as_secs_f64());
        self.time.get_or_create(&labels).observe(whole.as_secs_f64());
        if let Some(first) = first {
            self.first_token.get_or_create(&labels).observe(first.as_secs_f64());
        }
    }

    /// Tokens that a call took.
    pub(crate) fn tokens(&self, model: &str, prompt: u32, cached: u32, reply: u32) {
        for (kind, count) in [("prompt", prompt), ("cached", cached), ("completion", reply)] {
            let labels = [("model", model.to_owned().into()), ("kind", kind.into())];
            self.tokens.get_or_create(&labels).inc_by(count.into());
        }
    }

    /// `count` tokens of a reply came, all but the first within `time`.
    pub(crate) fn rate(&self, model: &str, count: u32, time: Duration) {
        let after_first = f64::from(count.saturating_sub(1));
        if after_first > 0.0 && !time.is_zero() {
            let labels = [("model", model.to_owned().into())];
            self.speed.get_or_create(&labels).observe(after_first / time.as_secs_f64());
        }
    }

    /// Tokens that an owner's call took.
    pub(crate) fn owner_tokens(&self, owner: &Owner, count: u64) {
        let is_told = {
            let mut owners = self.owners.lock().unwrap_or_else(PoisonError::into_inner);
            owners.contains(owner) || (owners.len() < MOST_OWNERS && owners.insert(owner.clone()))
        };
        let owner = if is_told { owner.to_string() } else { OTHERS.to_owned() };
        self.owner_tokens.get_or_create(&[("owner", owner.into())]).inc_by(count);
    }

    /// Names all of it in `registry`.
    pub(super) fn register(&self, registry: &mut Registry) {
        let Self { calls, tokens, owner_tokens, owners: _, queue, first_token, time, speed } = self;
        registry.register(
            "ark_inference_calls",
            "Calls of models, by tool and by what came of them",
            calls.clone(),
        );
        registry.register(
            "ark_inference_tokens",
            "Tokens of prompts, of those the ones that were computed before, and of replies",
            tokens.clone(),
        );
        registry.register(
            "ark_inference_owner_tokens",
            "Tokens that the calls of an owner took",
            owner_tokens.clone(),
        );
        registry.register(
            "ark_inference_queue_seconds",
            "Time that calls waited for their turn and a VM",
            queue.clone(),
        );
        registry.register(
            "ark_inference_first_token_seconds",
            "Time from a call to the first text of its reply",
            first_token.clone(),
        );
        registry.register("ark_inference_seconds", "Time that calls took", time.clone());
        registry.register(
            "ark_inference_tokens_per_second",
            "Tokens of a reply per second after its first text",
            speed.clone(),
        );
    }
}

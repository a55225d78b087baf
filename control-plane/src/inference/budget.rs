//! How many calls and tokens agents and owners may have per minute.
//!
//! Each budget is a bucket that fills evenly, up to a minute's worth. A call takes one of the calls when it begins; its tokens are
//! taken when it ends, as nobody knows them before, so that a bucket may be overdrawn, and then it has to fill up again first.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ark_types::label::Owner;

use super::error::Failure;
use super::{Caller, Who};
use crate::settings;

/// Seconds that a bucket takes to fill.
const MINUTE: f64 = 60.0;
/// Buckets beyond which those that are full are forgotten, which changes nothing.
const MANY: usize = 1024;

/// Whose budget.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Agent(String),
    Owner(Owner),
}

/// How much may be had in a minute; no bound where 0.
#[derive(Clone, Copy, Debug, Default)]
struct Limits {
    calls: u64,
    tokens: u64,
}

/// How much of a minute's worth is taken.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    calls: f64,
    tokens: f64,
    at: Instant,
}

impl Bucket {
    /// What is taken by `now`.
    fn at(self, now: Instant, limits: Limits) -> Self {
        let minutes = now.saturating_duration_since(self.at).as_secs_f64() / MINUTE;
        let left = |taken: f64, limit: u64| (taken - minutes * precise(limit)).max(0.0);
        Self { calls: left(self.calls, limits.calls), tokens: left(self.tokens, limits.tokens), at: now }
    }

    fn is_full(&self) -> bool {
        self.calls <= 0.0 && self.tokens <= 0.0
    }
}

#[expect(clippy::cast_precision_loss, reason = "budgets are far below 2^52")]
const fn precise(value: u64) -> f64 {
    value as f64
}

/// All budgets.
#[derive(Debug)]
pub(super) struct Budgets {
    buckets: Mutex<HashMap<Key, Bucket>>,
    agent: Limits,
    owner: Limits,
}

impl Budgets {
    /// As `settings` say.
    pub(super) fn new(settings: &settings::Inference) -> Self {
        Self {
            buckets: Mutex::default(),
            agent: Limits {
                calls: settings.agent_calls_per_minute.get(),
                tokens: settings.agent_tokens_per_minute.get(),
            },
            owner: Limits {
                calls: settings.owner_calls_per_minute.get(),
                tokens: settings.owner_tokens_per_minute.get(),
            },
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Bucket>> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keys(&self, caller: &Caller) -> impl Iterator<Item = (Key, Limits)> {
        let agent = match &caller.who {
            Who::Agent(id) => Some((Key::Agent(id.clone()), self.agent)),
            Who::Host => None,
        };
        let owner = (Key::Owner(caller.owner.clone()), self.owner);
        agent.into_iter().chain([owner]).filter(|(_, limits)| limits.calls > 0 || limits.tokens > 0)
    }

    /// Takes one call.
    ///
    /// # Errors
    /// [`Failure::Spent`]; nothing is taken then.
    pub(super) fn take(&self, caller: &Caller, now: Instant) -> Result<(), Failure> {
        let mut buckets = self.lock();
        if buckets.len() > MANY {
            let (agent, owner) = (self.agent, self.owner);
            buckets.retain(|key, bucket| {
                !bucket.at(now, if matches!(key, Key::Agent(_)) { agent } else { owner }).is_full()
            });
        }
        let mut after = Vec::new();
        for (key, limits) in self.keys(caller) {
            let empty = Bucket { calls: 0.0, tokens: 0.0, at: now };
            let mut bucket = buckets.get(&key).copied().unwrap_or(empty).at(now, limits);
            let whose = match &key {
                Key::Agent(_) => "the agent".to_owned(),
                Key::Owner(owner) => format!("the owner {owner}"),
            };
            let mut wait = None;
            if limits.calls > 0 && bucket.calls + 1.0 > precise(limits.calls) {
                wait = Some(("calls", limits.calls, bucket.calls + 1.0 - precise(limits.calls)));
            } else if limits.tokens > 0 && bucket.tokens >= precise(limits.tokens) {
                wait = Some(("tokens", limits.tokens, bucket.tokens - precise(limits.tokens)));
            }
            if let Some((what, limit, over)) = wait {
                let wait = Duration::from_secs_f64((over / precise(limit) * MINUTE).clamp(0.0, 86_400.0));
                return Err(Failure::Spent {
                    what: format!("{whose} may have {limit} {what} of models per minute, and has had them"),
                    wait,
                });
            }
            bucket.calls += 1.0;
            after.push((key, bucket));
        }
        buckets.extend(after);
        Ok(())
    }

    /// Takes the tokens of a call that ended.
    pub(super) fn charge(&self, caller: &Caller, tokens: u64, now: Instant) {
        let mut buckets = self.lock();
        for (key, limits) in self.keys(caller) {
            let empty = Bucket { calls: 0.0, tokens: 0.0, at: now };
            let bucket = buckets.entry(key).or_insert(empty);
            *bucket = bucket.at(now, limits);
            bucket.tokens += precise(tokens);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Allowed;
    use super::*;

    fn budgets(text: &str) -> Budgets {
        Budgets::new(&toml::from_str(text).unwrap())
    }

    fn agent(id: &str) -> Caller {
        Caller::agent(id.to_owned(), "team".parse().unwrap(), Allowed::All)
    }

    fn wait(result: Result<(), Failure>) -> u64 {
        match result {
            Err(Failure::Spent { wait, .. }) => wait.as_secs(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn calls_come_back_evenly() {
        let budgets = budgets("agent_calls_per_minute = 6");
        let now = Instant::now();
        (0..6).for_each(|_| budgets.take(&agent("a"), now).unwrap());
        assert_eq!(wait(budgets.take(&agent("a"), now)), 10);
        budgets.take(&agent("b"), now).unwrap();
        budgets.take(&agent("a"), now + Duration::from_secs(10)).unwrap();
        assert!(budgets.take(&agent("a"), now + Duration::from_secs(10)).is_err());
    }

    #[test]
    fn tokens_may_be_overdrawn_and_are_the_owners_too() {
        let budgets = budgets("owner_tokens_per_minute = 60");
        let now = Instant::now();
        budgets.take(&agent("a"), now).unwrap();
        budgets.charge(&agent("a"), 90, now);
        assert_eq!(wait(budgets.take(&agent("b"), now)), 30, "another agent of the same owner");
        budgets.take(&agent("b"), now + Duration::from_secs(31)).unwrap();
        budgets.take(&Caller::host("other".parse().unwrap(), 0), now).unwrap();
    }

    #[test]
    fn without_bounds_nothing_is_kept() {
        let budgets = budgets("");
        let now = Instant::now();
        budgets.take(&agent("a"), now).unwrap();
        budgets.charge(&agent("a"), 1 << 40, now);
        assert!(budgets.lock().is_empty());
    }
}

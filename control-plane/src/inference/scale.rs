//! How many VMs each model has: decided from what is asked of it, without a clock or anything else of the world, and then made so.
//!
//! ```text
//!  calls wait, all VMs are ready, for a moment ──────► one more      up to max
//!  one VM fewer was enough, all the quiet time ──────► one fewer     down to min
//!  none is wanted, and there is a call ──────────────► one
//! ```
//!
//! What is wanted is the number of replicas of the model's service, and nowhere else: a later `arkd` finds it in the log. That
//! number is `arkd`'s own. Who sets it by hand, or the bounds, changes where it goes on from; what is outside the bounds is brought
//! back, which is logged. Services that are not a model's own are left alone, and one that is removed meanwhile stays removed.
//!
//! One more is asked for only while there is room for it. Without room that is said once, and tried again later; whoever waits for
//! room goes first. What a VM that goes has under way it may end.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use ark_mcp::MAX_TIMEOUT_MS;
use ark_types::agent::AgentName;
use ark_types::problem::ProblemKind;

use super::queue::Load;
use crate::admission;
use crate::core::Core;
use crate::models;
use crate::problems::Refusal;
use crate::scheduler::Ask;
use crate::services::change;
use crate::settings;

/// How long calls have to wait until there is to be one VM more: a fork takes about as long.
const MOMENT: Duration = Duration::from_millis(500);
/// How long after a change that could not be made the next one is tried.
const AGAIN: Duration = Duration::from_secs(60);
/// How long a VM that is one too many may end what is under way in it: no call takes longer.
const GRACE: Duration = Duration::from_millis(MAX_TIMEOUT_MS);

/// How many VMs a model may have, and when that changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Policy {
    /// At least.
    pub(super) min: u32,
    /// At most; no less than `min`, nor than 1.
    pub(super) max: u32,
    /// Calls that one VM takes at a time.
    sessions: u64,
    /// How long one fewer has to be enough.
    quiet: Duration,
}

impl From<&settings::Inference> for Policy {
    fn from(settings: &settings::Inference) -> Self {
        let count = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
        let min = count(settings.replicas_min.get());
        Self {
            min,
            max: count(settings.replicas_max.get()).max(min),
            sessions: settings.sessions.get(),
            quiet: Duration::from_secs(settings.scale_down_s.get()),
        }
    }
}

/// What is seen of a model at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    /// VMs that it is to have.
    replicas: u32,
    /// Those that take calls.
    ready: u32,
    load: Load,
}

/// For how long a model has had too few VMs, or more than it needs. Times are since any beginning, and do not go back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Demand {
    /// What it was seen to be to have: with another number it begins anew.
    replicas: Option<u32>,
    /// Since when calls wait although all VMs are ready.
    pressed: Option<Duration>,
    /// Since when one fewer would have been enough.
    calm: Option<Duration>,
}

impl Demand {
    /// How many VMs there are to be, `at` which this is `seen`.
    fn wanted(&mut self, at: Duration, seen: &Seen, policy: &Policy) -> u32 {
        let Seen { replicas, ready, load } = *seen;
        if self.replicas != Some(replicas) {
            *self = Self { replicas: Some(replicas), ..Self::default() };
        }
        let is_pressed = load.waiting > 0 && ready >= replicas;
        let fewer = replicas.checked_sub(1);
        let is_calm =
            fewer.is_some_and(|fewer| load.peak <= policy.sessions.saturating_mul(u64::from(fewer)));
        self.pressed = is_pressed.then(|| self.pressed.unwrap_or(at));
        self.calm = is_calm.then(|| self.calm.unwrap_or(at));
        let lasts =
            |since: Option<Duration>, long| since.is_some_and(|since| at.saturating_sub(since) >= long);
        let wanted = match fewer {
            None => u32::from(load.peak > 0),
            Some(_) if lasts(self.pressed, MOMENT) => replicas.saturating_add(1),
            Some(fewer) if lasts(self.calm, policy.quiet) => fewer,
            Some(_) => replicas,
        };
        wanted.min(policy.max).max(policy.min)
    }
}

/// What is known of one model.
#[derive(Debug, Default)]
struct Watched {
    demand: Demand,
    /// When a change could not be made, as long as that is not forgotten.
    refused: Option<Instant>,
}

impl Watched {
    /// Whether a change may be tried at `now`. Where none is `needed` and none failed lately, the next failure is news again.
    fn may_try(&mut self, now: Instant, needed: bool) -> bool {
        let rests = self.refused.is_some_and(|at| now.duration_since(at) < AGAIN);
        if !needed && !rests {
            self.refused = None;
        }
        needed && !rests
    }

    /// Takes note that a change of `service` could not be made at `now`, and says so unless that is no news.
    fn refused(&mut self, now: Instant, service: &AgentName, (from, to): (u32, u32), why: &str) {
        if self.refused.replace(now).is_none() {
            let again_s = AGAIN.as_secs();
            tracing::warn!(%service, from, to, why, again_s, "a model cannot have another number of VMs now; it is tried again as long as that is needed");
        }
    }
}

/// Scales the models of `core` until that goes.
pub(super) async fn scale(core: Weak<Core>, policy: Policy) {
    let began = Instant::now();
    let mut watched = BTreeMap::new();
    let Some(mut looks) = core.upgrade().map(|core| core.services.looks()) else { return };
    // Services are looked at whenever something happens to them, and now and then.
    while looks.changed().await.is_ok() {
        let Some(core) = core.upgrade() else { return };
        // A VM may have become ready.
        core.inference.turns.let_go(&core);
        look(&core, &policy, began, &mut watched).await;
    }
}

/// Looks at each model, and changes how many VMs it has where that is due.
async fn look(core: &Arc<Core>, policy: &Policy, began: Instant, watched: &mut BTreeMap<AgentName, Watched>) {
    let (loads, models) = (core.inference.turns.look(), core.services.replicas(models::is_own));
    watched.retain(|name, _| models.iter().any(|(other, ..)| other == name));
    for (service, replicas, ready) in models {
        let now = Instant::now();
        let load = loads.get(&service).copied().unwrap_or_default();
        let one = watched.entry(service.clone()).or_default();
        let wanted = one.demand.wanted(now.duration_since(began), &Seen { replicas, ready, load }, policy);
        if !one.may_try(now, wanted != replicas) {
            continue;
        }
        match change(core, &service, (replicas, wanted)).await {
            Ok(()) => {
                one.refused = None;
                let Policy { min, max, .. } = *policy;
                if !(min..=max).contains(&replicas) {
                    tracing::info!(%service, replicas, min, max, "a model's number of VMs was out of its bounds, and is brought back");
                }
            }
            // It was removed meanwhile.
            Err(Refusal(problem)) if problem.kind == ProblemKind::ServiceNotFound => {}
            Err(Refusal(problem)) => one.refused(now, &service, (replicas, wanted), &problem.detail),
        }
    }
}

/// Has `service` have `to` replicas, where it was to have `from`.
///
/// # Errors
/// A [`Refusal`]: there is no room for one more, or it cannot be recorded.
async fn change(core: &Arc<Core>, service: &AgentName, (from, to): (u32, u32)) -> Result<(), Refusal> {
    // The first one is worth waiting for room.
    if from > 0 && to > from {
        let template = core.templates.describe(service.as_ref())?;
        let needs = core.scheduler.config().forked((template.vcpus, template.memory_mib));
        admission::check_host(core).await?;
        drop(core.scheduler.admit(Ask { patience: Duration::ZERO, ..Ask::system(needs) }).await?);
    }
    change::scale(core, service.as_ref(), to, GRACE).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const QUIET: Duration = Duration::from_secs(60);

    fn policy(min: u32, max: u32, sessions: u64) -> Policy {
        Policy { min, max, sessions, quiet: QUIET }
    }

    fn seen(replicas: u32, ready: u32, waiting: u64, peak: u64) -> Seen {
        Seen { replicas, ready, load: Load { waiting, peak } }
    }

    #[test]
    fn the_bounds_are_in_order_whatever_was_set() {
        let of = |text: &str| Policy::from(&toml::from_str::<settings::Inference>(text).unwrap());
        assert_eq!((of("").min, of("").max, of("").quiet), (1, 2, QUIET));
        assert_eq!((of("replicas_min = 5").min, of("replicas_min = 5").max), (5, 5));
    }

    #[test]
    fn one_more_is_wanted_once_calls_wait_for_a_moment() {
        let (mut demand, policy) = (Demand::default(), policy(1, 3, 2));
        let at = Duration::from_secs(1);
        assert_eq!(demand.wanted(at, &seen(1, 1, 1, 3), &policy), 1);
        assert_eq!(demand.wanted(at + MOMENT / 2, &seen(1, 1, 1, 3), &policy), 1);
        assert_eq!(demand.wanted(at + MOMENT, &seen(1, 1, 1, 3), &policy), 2);
        // The next one comes when that one is ready, and calls wait still.
        for passed in 1..100 {
            assert_eq!(demand.wanted(at + MOMENT * passed, &seen(2, 1, 9, 11), &policy), 2);
        }
        let at = at + MOMENT * 100;
        assert_eq!(demand.wanted(at, &seen(2, 2, 9, 13), &policy), 2);
        assert_eq!(demand.wanted(at + MOMENT, &seen(2, 2, 9, 13), &policy), 3);
        assert_eq!(demand.wanted(at + MOMENT * 2, &seen(3, 3, 9, 15), &policy), 3);
        assert_eq!(demand.wanted(at + MOMENT * 9, &seen(3, 3, 9, 15), &policy), 3, "there may be no more");
    }

    #[test]
    fn waits_with_pauses_in_between_want_none() {
        let (mut demand, policy) = (Demand::default(), policy(1, 3, 2));
        for step in 0..100 {
            let waiting = u64::from(step % 2 == 0);
            let at = MOMENT * step * 2 / 3;
            assert_eq!(demand.wanted(at, &seen(1, 1, waiting, 3), &policy), 1);
        }
    }

    #[test]
    fn one_fewer_is_wanted_when_that_was_enough_all_the_quiet_time() {
        let (mut demand, policy) = (Demand::default(), policy(0, 3, 2));
        let at = Duration::from_secs(1);
        assert_eq!(demand.wanted(at, &seen(2, 2, 0, 2), &policy), 2);
        assert_eq!(demand.wanted(at + QUIET / 2, &seen(2, 2, 0, 3), &policy), 2, "that needs both");
        assert_eq!(demand.wanted(at + QUIET, &seen(2, 2, 0, 2), &policy), 2, "it begins anew");
        assert_eq!(demand.wanted(at + QUIET * 2, &seen(2, 2, 0, 2), &policy), 1);
        // And another quiet time for the last one, which a single brief call keeps.
        let at = at + QUIET * 2;
        assert_eq!(demand.wanted(at, &seen(1, 1, 0, 0), &policy), 1);
        assert_eq!(demand.wanted(at + QUIET / 2, &seen(1, 1, 0, 1), &policy), 1);
        assert_eq!(demand.wanted(at + QUIET, &seen(1, 1, 0, 0), &policy), 1);
        assert_eq!(demand.wanted(at + QUIET * 2, &seen(1, 1, 0, 0), &policy), 0);
        assert_eq!(demand.wanted(at + QUIET * 9, &seen(0, 0, 0, 0), &policy), 0);
        assert_eq!(demand.wanted(at + QUIET * 9, &seen(0, 0, 0, 1), &policy), 1, "at once");
    }

    #[test]
    fn a_failure_is_told_once_and_tried_again_later() {
        let (mut one, now, service) = (Watched::default(), Instant::now(), "model-m".parse().unwrap());
        assert!(one.may_try(now, true));
        one.refused(now, &service, (1, 2), "the host is full");
        assert!(!one.may_try(now + AGAIN / 2, true));
        assert!(
            !one.may_try(now + AGAIN / 2, false) && one.refused.is_some(),
            "it may be needed in a moment"
        );
        assert!(one.may_try(now + AGAIN, true));
        one.refused(now + AGAIN, &service, (1, 2), "the host is full");
        assert!(!one.may_try(now + AGAIN * 3 / 2, true));
        assert!(!one.may_try(now + AGAIN * 2, false) && one.refused.is_none());
    }

    /// Steps of time, each with how many are ready, wait and were there at most.
    fn steps() -> impl Strategy<Value = Vec<(u64, u32, u64, u64)>> {
        prop::collection::vec((0..90_000_u64, 0..6_u32, 0..9_u64, 0..40_u64), 1..200)
    }

    proptest! {
        #[test]
        fn it_is_in_its_bounds_and_changes_by_one(
            (a, b, sessions) in (0..5_u32, 0..5_u32, 1..9_u64), first in 0..9_u32, steps in steps(),
        ) {
            let policy = policy(a.min(b), a.max(b).max(1), sessions);
            let (mut demand, mut at, mut replicas) = (Demand::default(), Duration::ZERO, first);
            for (ms, ready, waiting, more) in steps {
                at += Duration::from_millis(ms);
                let wanted = demand.wanted(at, &seen(replicas, ready, waiting, waiting + more), &policy);
                prop_assert!((policy.min..=policy.max).contains(&wanted), "{wanted} of {policy:?}");
                let from = replicas.clamp(policy.min, policy.max);
                prop_assert!(wanted.abs_diff(from) <= 1, "{wanted} after {replicas}");
                prop_assert!(wanted >= from || waiting + more <= sessions * u64::from(replicas - 1), "it is needed");
                prop_assert!(wanted <= from || waiting > 0 || replicas == 0, "nobody needs it");
                replicas = wanted;
            }
        }

        #[test]
        fn work_that_stays_the_same_settles(
            (a, b, sessions) in (0..5_u32, 0..5_u32, 1..9_u64), first in 0..9_u32, work in 0..60_u64,
        ) {
            let policy = policy(a.min(b), a.max(b).max(1), sessions);
            let (mut demand, mut at, mut replicas) = (Demand::default(), Duration::ZERO, first);
            let mut look = |replicas: u32| {
                at += MOMENT / 2;
                let waiting = work.saturating_sub(sessions * u64::from(replicas.max(1)));
                demand.wanted(at, &seen(replicas, replicas, waiting, work), &policy)
            };
            // Twice as many looks as the quiet time has, for each that may have to go.
            for _ in 0..9 * 2 * 2 * QUIET.as_secs() {
                replicas = look(replicas);
            }
            let needed = u32::try_from(work.div_ceil(sessions)).unwrap();
            prop_assert_eq!(replicas, needed.clamp(policy.min, policy.max));
            for _ in 0..4 * QUIET.as_secs() {
                prop_assert_eq!(look(replicas), replicas);
            }
        }
    }
}

//! What is known of one template: its standbys, the demand for them, and what was set for it.

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use ark_types::agent::AgentName;
use ark_types::pool::{Pool as View, PoolPolicy, PoolWait};
use ark_types::scheduling::Resources;

use super::autoscale::Demand;
use crate::agent::Standby;
use crate::host::millis;

/// Agents whose waits are remembered.
const WAITS: usize = 256;

/// Why a line makes nothing for now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Rest {
    /// It may make something.
    None,
    /// There is no room for another standby, until it is looked again.
    NoRoom,
    /// The host's memory is short.
    NoMemory,
    /// It could not be made, so it is tried again then.
    Failed {
        /// Why, as a sentence.
        why: String,
        /// When it is tried again.
        until: Instant,
    },
}

impl Rest {
    /// Why, as a sentence.
    pub(super) fn why(&self) -> Option<&str> {
        match self {
            Self::None => None,
            Self::NoRoom => Some("there is no room for another standby: agents have what the host may give"),
            Self::NoMemory => Some("the host's memory is short, and what there is of it is for agents"),
            Self::Failed { why, .. } => Some(why),
        }
    }
}

/// How much a line's lack matters; the later ones go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Urgency {
    /// Nothing was set for its template.
    Default,
    /// It has a policy.
    Set,
    /// And fewer standbys than its min.
    BelowMin,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) policy: Option<PoolPolicy>,
    /// Those that wait, longest first.
    pub(super) standbys: VecDeque<Standby>,
    /// How many there are to be, as of the last look.
    pub(super) wanted: u32,
    /// When an agent was last made of the template.
    pub(super) used: Option<Instant>,
    pub(super) rest: Rest,
    /// Whether the scheduler was told that there are standbys.
    pub(super) told_warm: bool,
    demand: Demand,
    hits: u64,
    misses: u64,
    waits: VecDeque<Duration>,
}

impl Line {
    /// The line of a template of which nothing is known; of its demand half is forgotten after each `half_life`.
    pub(super) const fn new(half_life: Duration) -> Self {
        Self {
            policy: None,
            standbys: VecDeque::new(),
            wanted: 0,
            used: None,
            rest: Rest::None,
            told_warm: false,
            demand: Demand::none(half_life),
            hits: 0,
            misses: 0,
            waits: VecDeque::new(),
        }
    }

    /// How many standbys there are.
    pub(super) fn count(&self) -> u32 {
        u32::try_from(self.standbys.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn urgency(&self) -> Urgency {
        match self.policy {
            None => Urgency::Default,
            Some(policy) if self.count() < policy.min => Urgency::BelowMin,
            Some(_) => Urgency::Set,
        }
    }

    /// Standbys that lack.
    pub(super) fn lack(&self) -> u32 {
        self.wanted.saturating_sub(self.count())
    }

    /// Decides how many there are to be; `default` where nothing was set.
    pub(super) fn decide(&mut self, at: Duration, default: u32) {
        self.wanted = match &self.policy {
            Some(policy) => self.demand.wanted(at, policy),
            None => default,
        };
    }

    /// An agent of the template is asked for.
    pub(super) fn asked(&mut self, at: Duration) {
        let policy = self.policy.unwrap_or(PoolPolicy { min: 0, max: 0, target_wait_ms: 0 });
        self.demand.asked(at, &policy);
    }

    /// A standby was made in `elapsed`.
    pub(super) fn made(&mut self, standby: Standby, elapsed: Duration) {
        self.demand.made(elapsed);
        self.rest = Rest::None;
        self.standbys.push_back(standby);
    }

    /// Whether a standby was there for an agent.
    pub(super) const fn claimed(&mut self, hit: bool) {
        if hit { self.hits += 1 } else { self.misses += 1 }
    }

    /// An agent is there, after `elapsed`.
    pub(super) fn waited(&mut self, elapsed: Duration) {
        if self.waits.len() == WAITS {
            self.waits.pop_front();
        }
        self.waits.push_back(elapsed);
    }

    /// Takes out the standbys that are not, as `is_kept` says.
    pub(super) fn keep(&mut self, is_kept: impl Fn(&Standby) -> bool) -> Vec<Standby> {
        let all = std::mem::take(&mut self.standbys);
        let (kept, gone): (Vec<_>, Vec<_>) = all.into_iter().partition(is_kept);
        self.standbys = kept.into();
        gone
    }

    /// Takes out a living standby of the snapshot in `dir`, the one that waited longest.
    pub(super) fn take(&mut self, dir: &Path) -> Option<Standby> {
        let at = self.standbys.iter().position(|one| one.is_of(dir) && !one.has_ended())?;
        self.standbys.remove(at)
    }

    /// It, as it is told.
    pub(super) fn view(&mut self, template: &AgentName, at: Duration) -> View {
        let reserved = self.standbys.iter().map(Standby::needs);
        View {
            template: template.clone(),
            policy: self.policy,
            standbys: self.count(),
            wanted: self.wanted,
            reserved: reserved.fold(Resources::default(), Resources::plus),
            hits: self.hits,
            misses: self.misses,
            demand_per_s: (self.demand.per_second(at) * 1000.0).round() / 1000.0,
            make_ms: self.demand.measured().map(millis),
            wait: wait(&self.waits),
            failure: self.rest.why().map(str::to_owned),
        }
    }
}

fn wait(waits: &VecDeque<Duration>) -> Option<PoolWait> {
    let mut sorted: Vec<Duration> = waits.iter().copied().collect();
    sorted.sort_unstable();
    // The nearest rank: the smallest that so many of a hundred are no longer than.
    let rank = |percent: usize| sorted.get((sorted.len() * percent).div_ceil(100).saturating_sub(1)).copied();
    let agents = u32::try_from(sorted.len()).unwrap_or(u32::MAX);
    Some(PoolWait { agents, p50_ms: millis(rank(50)?), p99_ms: millis(rank(99)?) })
}

/// Of lines, each with its urgency and how many it lacks, the one that is to have the next standby.
pub(super) fn most_lacking<T>(lines: impl Iterator<Item = (T, Urgency, u32)>) -> Option<T> {
    let lacking = lines.filter(|(_, _, lack)| *lack > 0);
    lacking
        .reduce(|best, other| if (other.1, other.2) > (best.1, best.2) { other } else { best })
        .map(|(line, ..)| line)
}

/// Of lines, each with its policy and how many standbys it has, the one that gives the first one up: one without a policy, then
/// the one that has most beyond its min, then the largest.
pub(super) fn first_to_give<T>(lines: impl Iterator<Item = (T, Option<PoolPolicy>, u32)>) -> Option<T> {
    let rank = |policy: Option<PoolPolicy>, count: u32| {
        (policy.is_none(), count.saturating_sub(policy.map_or(0, |policy| policy.min)), count)
    };
    let giving = lines.filter(|(_, _, count)| *count > 0);
    giving
        .reduce(|best, other| if rank(other.1, other.2) > rank(best.1, best.2) { other } else { best })
        .map(|(line, ..)| line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_told_by_rank() {
        let waits = |count: u64| (1..=count).map(Duration::from_millis).collect::<VecDeque<_>>();
        assert_eq!(wait(&waits(0)), None);
        assert_eq!(wait(&waits(1)), Some(PoolWait { agents: 1, p50_ms: 1, p99_ms: 1 }));
        assert_eq!(wait(&waits(200)), Some(PoolWait { agents: 200, p50_ms: 100, p99_ms: 198 }));
        let mut line = Line::new(Duration::from_secs(1));
        (0..WAITS as u64 + 9).for_each(|n| line.waited(Duration::from_millis(n)));
        assert_eq!((line.waits.len(), line.waits[0].as_millis()), (WAITS, 9), "the last ones");
    }

    #[test]
    fn who_is_below_its_min_comes_first_and_who_lacks_most_then() {
        use Urgency::{BelowMin, Default, Set};
        assert_eq!(most_lacking([("a", Set, 0), ("b", BelowMin, 0)].into_iter()), None);
        assert_eq!(most_lacking([("a", Set, 3), ("b", Set, 9), ("c", Set, 9)].into_iter()), Some("b"));
        assert_eq!(
            most_lacking([("a", Set, 9), ("b", BelowMin, 1), ("c", BelowMin, 2)].into_iter()),
            Some("c")
        );
        assert_eq!(most_lacking([("a", Default, 9), ("b", Set, 1)].into_iter()), Some("b"));
    }

    #[test]
    fn what_nobody_set_is_given_up_first_and_what_is_below_its_min_last() {
        let policy = |min| Some(PoolPolicy { min, max: 9, target_wait_ms: 0 });
        assert_eq!(first_to_give([("a", None, 0), ("b", policy(0), 0)].into_iter()), None);
        assert_eq!(first_to_give([("a", policy(0), 9), ("b", None, 1)].into_iter()), Some("b"));
        assert_eq!(first_to_give([("a", policy(5), 6), ("b", policy(0), 2)].into_iter()), Some("b"));
        assert_eq!(first_to_give([("a", policy(5), 3), ("b", policy(5), 4)].into_iter()), Some("b"));
    }
}

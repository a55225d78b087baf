//! What an agent's state goes back to: which checkpoint it may be restored from, and what that loses.

use std::collections::BTreeMap;

use ark_types::vmm::SnapshotId;
use serde::{Deserialize, Serialize};

use super::RAN_WELL_MS;

/// Who ends within this time after it was restored from a checkpoint was broken there already.
pub(super) const PROVED_MS: u64 = 10_000;
/// Restores from one checkpoint that the host failed, at most: then an older one is of more use.
pub(super) const MOST_FAULTS: u32 = 4;
/// Restores from one checkpoint, at most, until the agent ran for [`RAN_WELL_MS`] after one of them.
pub(super) const MOST_RESTORES: u32 = 3;

/// See the module. It belongs to one agent, and is kept with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lineage {
    /// The checkpoint that it was restored from last; none when it began as what it is made of.
    from: Option<SnapshotId>,
    /// How often it was restored from each that there still is, since it ran well after that.
    restores: BTreeMap<SnapshotId, u32>,
    /// How often in a row the host failed to restore it from each.
    #[serde(default)]
    faults: BTreeMap<SnapshotId, u32>,
    /// Checkpoints that are not to be used any more.
    spent: Vec<SnapshotId>,
    /// When it last began as what it is made of; none before its first end.
    fresh_ms: Option<u64>,
    /// When it was last taken back to a snapshot: checkpoints from before are of what it gave up.
    #[serde(default)]
    rewound_ms: Option<u64>,
}

impl Lineage {
    /// The agent ended at `now` after `ran_ms`; none when it did not come up. What it was restored from may be of no more use.
    pub(crate) fn ended(&mut self, ran_ms: Option<u64>, now: u64) {
        // Before its first end it ran in one stretch.
        self.fresh_ms.get_or_insert(now.saturating_sub(ran_ms.unwrap_or_default()));
        let Some(from) = self.from else { return };
        if ran_ms.is_some_and(|ran| ran >= RAN_WELL_MS) {
            self.restores.remove(&from);
        } else if self.restores.get(&from).is_some_and(|times| *times >= MOST_RESTORES)
            || ran_ms.is_some_and(|ran| ran < PROVED_MS)
        {
            self.spent.push(from);
        }
    }

    /// The host failed to restore it from `checkpoint`: how often, once that is too often.
    pub(crate) fn failed(&mut self, checkpoint: SnapshotId) -> Option<u32> {
        let times = self.faults.entry(checkpoint).or_default();
        *times = times.saturating_add(1);
        (*times >= MOST_FAULTS).then_some(*times)
    }

    /// Of `checkpoints`, oldest first, those that it may be restored from, in the order in which they are to be tried.
    pub(crate) fn usable(&self, checkpoints: &[SnapshotId]) -> Vec<SnapshotId> {
        checkpoints.iter().rev().filter(|id| !self.spent.contains(id)).copied().collect()
    }

    /// It runs again, restored from the last of the checkpoints `left`: those that were newer are no more.
    pub(crate) fn restored(&mut self, left: &[SnapshotId]) {
        self.spent.retain(|id| left.contains(id));
        self.restores.retain(|id, _| left.contains(id));
        self.faults.clear();
        self.from = left.last().copied();
        if let Some(from) = self.from {
            let times = self.restores.entry(from).or_default();
            *times = times.saturating_add(1);
        }
    }

    /// It runs again at `now`, as what it is made of: nothing is left of what was before.
    pub(crate) fn began_fresh(&mut self, now: u64) {
        *self = Self { fresh_ms: Some(now), ..Self::default() };
    }

    /// It was taken back to a snapshot at `now`.
    pub(crate) fn rewound(&mut self, now: u64) {
        let fresh_ms = self.fresh_ms;
        *self = Self { fresh_ms, rewound_ms: Some(now), ..Self::default() };
    }

    /// Whether a checkpoint that was taken at `at_ms` is of the life that it leads.
    pub(crate) fn is_of_this_life(&self, at_ms: u64) -> bool {
        self.rewound_ms.is_none_or(|rewound| at_ms >= rewound)
    }

    /// What an agent that ended at `ended_ms` loses when it goes on as it was at `at_ms`, the time of a checkpoint, or as what it
    /// is made of when that is absent; milliseconds.
    pub(crate) fn lost_ms(&self, ended_ms: u64, at_ms: Option<u64>) -> u64 {
        ended_ms.saturating_sub(at_ms.or(self.fresh_ms).unwrap_or(ended_ms))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    /// What happens to an agent: it runs for some time, with checkpoints taken meanwhile, of which some cannot be used when it ends.
    #[derive(Clone, Debug)]
    struct Run {
        ms: u64,
        /// After how long checkpoints are taken, and whether each can be used.
        checkpoints: Vec<(u64, bool)>,
    }

    fn runs() -> impl Strategy<Value = Vec<Run>> {
        let checkpoint = (0u64..900_000, any::<bool>());
        let ms = prop_oneof![0..PROVED_MS, PROVED_MS..RAN_WELL_MS, RAN_WELL_MS..900_000];
        let run = (ms, prop::collection::vec(checkpoint, 0..4))
            .prop_map(|(ms, checkpoints)| Run { ms, checkpoints });
        prop::collection::vec(run, 1..40)
    }

    /// A checkpoint, and what the agent is there: everything that it did up to a time, in all of its life.
    #[derive(Clone, Copy, Debug)]
    struct Point {
        id: SnapshotId,
        at_ms: u64,
        works: bool,
    }

    proptest! {
        /// The agent's state is modelled by the time up to which it goes back without a gap.
        #[test]
        fn no_state_is_claimed_that_was_lost_and_no_checkpoint_is_gone_back_to_for_ever(runs in runs()) {
            let (mut lineage, mut points, mut now, mut number) = (Lineage::default(), Vec::<Point>::new(), 1000u64, 0u8);
            let mut fresh = now;
            // How often each was gone back to since it last ran well after that, and which it ended right after.
            let (mut uses, mut broken) = (HashMap::<SnapshotId, u32>::new(), Vec::new());
            let mut from: Option<SnapshotId> = None;
            for run in runs {
                let mut taken: Vec<_> = run.checkpoints.into_iter().filter(|(at, _)| *at < run.ms).collect();
                taken.sort_unstable();
                for (at, works) in taken {
                    number += 1;
                    points.push(Point { id: SnapshotId([number; 16]), at_ms: now + at, works });
                }
                now += run.ms;
                if let Some(from) = from {
                    if run.ms >= RAN_WELL_MS {
                        uses.insert(from, 0);
                    } else if run.ms < PROVED_MS {
                        broken.push(from);
                    }
                }
                let ended = now;
                lineage.ended(Some(run.ms), now);
                let ids: Vec<_> = points.iter().map(|point| point.id).collect();
                let usable = lineage.usable(&ids);
                prop_assert!(usable.iter().all(|id| ids.contains(id) && !broken.contains(id)));
                let place = |id: &SnapshotId| points.iter().position(|point| point.id == *id).unwrap();
                prop_assert!(usable.windows(2).all(|pair| place(&pair[0]) > place(&pair[1])), "newest first");
                now += 50;
                let chosen = usable.iter().map(place).find(|index| points[*index].works);
                let lost = lineage.lost_ms(ended, chosen.map(|index| points[index].at_ms));
                match chosen {
                    Some(index) => {
                        let point = points[index];
                        prop_assert_eq!(ended - lost, point.at_ms);
                        points.truncate(index + 1);
                        lineage.restored(&points.iter().map(|point| point.id).collect::<Vec<_>>());
                        from = Some(point.id);
                        let used = uses.entry(point.id).or_default();
                        *used += 1;
                        prop_assert!(*used <= MOST_RESTORES);
                    }
                    None => {
                        prop_assert_eq!(ended - lost, fresh, "all is lost that it did since it began");
                        lineage.began_fresh(now);
                        points.clear();
                        (fresh, from) = (now, None);
                    }
                }
            }
        }
    }

    #[test]
    fn the_host_has_a_few_tries_with_each_checkpoint() {
        let (newest, older) = (SnapshotId([2; 16]), SnapshotId([1; 16]));
        let mut lineage = Lineage::default();
        for _ in 1..MOST_FAULTS {
            assert_eq!(lineage.failed(newest), None);
        }
        assert_eq!((lineage.failed(newest), lineage.failed(older)), (Some(MOST_FAULTS), None));
        lineage.restored(&[older]);
        assert_eq!(lineage.failed(older), None, "in a row");
    }

    #[test]
    fn what_was_before_a_rewind_is_not_gone_back_to() {
        let mut lineage = Lineage::default();
        assert!(lineage.is_of_this_life(5));
        lineage.rewound(10);
        assert!(!lineage.is_of_this_life(9) && lineage.is_of_this_life(10));
    }
}

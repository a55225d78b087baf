//! What a service needs now: what it is to be and what is there of it, compared. Nothing here looks, waits or acts.
//!
//! ```text
//!            room for one more                serves for a moment
//!  (nothing) ─────────────────► new, starting ──────────────────► new, proved ──► one of the old ones is drained
//!                                     │ ended
//!                                     └──────► removed; three in a row: the rollout is stopped, the old ones stay
//! ```
//!
//! An old one that serves is drained only while at least `replicas` − `max_unavailable` go on serving, and, where more than
//! `replicas` may be there, only after one of the new ones has proved itself. Replicas that are drained still take room: no
//! more than `replicas` + `max_surge` are there because of an update.

use ark_types::service::{ReplicaState, UpdatePolicy};

/// Replicas of one service that are made at a time.
const MAX_AT_ONCE: u32 = 8;

/// What a service is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Desired {
    pub(super) replicas: u32,
    pub(super) update: UpdatePolicy,
    pub(super) making: Making,
}

/// Whether replicas are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Making {
    /// Where there are too few.
    Goes,
    /// Not for a while: the last one failed.
    Waits,
    /// Not any more: the generation failed, and the replicas before it stay.
    Stopped,
    /// The service is removed, and all its replicas go.
    Removed,
}

/// What is seen of a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) id: String,
    /// Whether it is of the generation that is to be.
    pub(super) is_current: bool,
    pub(super) state: ReplicaState,
    /// Whether it has been ready for long enough to be relied on.
    pub(super) is_proved: bool,
    /// Calls under way in it.
    pub(super) load: u32,
    /// Whether it is drained and no call is under way in it any more, or was given long enough for that.
    pub(super) is_drained: bool,
    /// Whether its removal is under way.
    pub(super) is_going: bool,
}

impl Member {
    /// Whether it counts as one that serves: an old one while it is ready, a new one once it has proved itself.
    const fn serves(&self) -> bool {
        matches!(self.state, ReplicaState::Ready) && (!self.is_current || self.is_proved)
    }

    const fn is_live(&self) -> bool {
        match self.state {
            ReplicaState::Ready | ReplicaState::Starting | ReplicaState::Unready => true,
            ReplicaState::Draining | ReplicaState::Ended => false,
        }
    }
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Make so many.
    Spawn { count: u32 },
    /// Give it no new calls.
    Drain { id: String },
    /// Remove it.
    Remove { id: String },
}

/// What the service needs, while `spawning` replicas of the generation that is to be are made.
pub(super) fn reconcile(desired: Desired, members: &[Member], spawning: u32) -> Vec<Action> {
    let is_over = |m: &&Member| !m.is_going && (m.state == ReplicaState::Ended || m.is_drained);
    let removals = members.iter().filter(is_over).map(|m| Action::Remove { id: m.id.clone() });
    let drains = drains(desired, members).into_iter().map(|m| Action::Drain { id: m.id.clone() });
    let count = missing(desired, members, spawning);
    let spawn = (count > 0).then_some(Action::Spawn { count });
    removals.chain(drains).chain(spawn).collect()
}

/// How many are to be made.
fn missing(desired: Desired, members: &[Member], spawning: u32) -> u32 {
    if desired.making != Making::Goes {
        return 0;
    }
    let current = number(members.iter().filter(|m| m.is_live() && m.is_current)).saturating_add(spawning);
    let there = number(members.iter().filter(|m| m.state != ReplicaState::Ended)).saturating_add(spawning);
    let most = desired.replicas.saturating_add(desired.update.max_surge);
    desired
        .replicas
        .saturating_sub(current)
        .min(most.saturating_sub(there))
        .min(MAX_AT_ONCE.saturating_sub(spawning))
}

/// Those that are to be drained.
fn drains(desired: Desired, members: &[Member]) -> Vec<&Member> {
    let live = members.iter().filter(|m| m.is_live());
    if desired.making == Making::Removed {
        return live.collect();
    }
    let (mut current, mut old): (Vec<&Member>, Vec<&Member>) = live.partition(|m| m.is_current);
    let mut serving = number(members.iter().filter(|m| m.serves()));
    let replicas = desired.replicas as usize;
    let mut candidates = if desired.making == Making::Stopped {
        // All are as good as they will be; among equals the new ones are the less sure.
        let mut all = [old, current].concat();
        let excess = all.len().saturating_sub(replicas);
        least_missed_first(&mut all);
        all.into_iter().take(excess).collect::<Vec<_>>()
    } else {
        let is_proved = current.iter().any(|m| m.serves());
        let replaceable = if is_proved || desired.update.max_surge == 0 || replicas == 0 {
            old.len()
        } else {
            old.len().saturating_sub(replicas)
        };
        let excess = current.len().saturating_sub(replicas);
        least_missed_first(&mut old);
        least_missed_first(&mut current);
        old.into_iter().take(replaceable).chain(current.into_iter().take(excess)).collect()
    };
    let floor = desired.replicas.saturating_sub(desired.update.max_unavailable);
    candidates.retain(|m| {
        let may_go = !m.serves() || serving > floor;
        serving -= u32::from(may_go && m.serves());
        may_go
    });
    candidates
}

/// Those that do not serve, then those with the fewest calls; among equals the youngest.
fn least_missed_first(members: &mut [&Member]) {
    members.reverse();
    members.sort_by_key(|m| (m.state == ReplicaState::Ready, m.load));
}

fn number<'a>(members: impl Iterator<Item = &'a Member>) -> u32 {
    u32::try_from(members.count()).unwrap_or(u32::MAX)
}

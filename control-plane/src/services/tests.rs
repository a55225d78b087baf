//! What a service needs, against a simple model of what becomes of its replicas.

use ark_types::service::{ReplicaState, UpdatePolicy};
use proptest::prelude::*;

use super::reconcile::{Action, Desired, Making, Member, reconcile};

const STATES: [ReplicaState; 5] = ReplicaState::ALL;

fn member(
    id: usize,
    (is_current, state, is_proved, load, is_going): (bool, usize, bool, u32, bool),
) -> Member {
    let state = STATES[state];
    let is_proved = is_proved && state == ReplicaState::Ready;
    let is_drained = state == ReplicaState::Draining && load == 0;
    Member { id: format!("{id:03}"), is_current, state, is_proved, load, is_drained, is_going }
}

fn members() -> impl Strategy<Value = Vec<Member>> {
    let one = (any::<bool>(), 0..STATES.len(), any::<bool>(), 0..3_u32, any::<bool>());
    prop::collection::vec(one, 0..12)
        .prop_map(|all| all.into_iter().enumerate().map(|(id, one)| member(id, one)).collect())
}

fn desired(making: Vec<Making>) -> impl Strategy<Value = Desired> {
    (0..8_u32, 0..4_u32, 0..4_u32, prop::sample::select(making)).prop_map(
        |(replicas, max_unavailable, max_surge, making)| {
            let max_surge = if max_unavailable == 0 { max_surge.max(1) } else { max_surge };
            Desired { replicas, update: UpdatePolicy { max_unavailable, max_surge }, making }
        },
    )
}

const MAKING: [Making; 4] = [Making::Goes, Making::Waits, Making::Stopped, Making::Removed];

fn is_ready(member: &&Member) -> bool {
    member.state == ReplicaState::Ready
}

fn is_live(member: &&Member) -> bool {
    !matches!(member.state, ReplicaState::Draining | ReplicaState::Ended)
}

fn spawned(actions: &[Action]) -> u32 {
    let of = |action: &Action| if let Action::Spawn { count } = action { *count } else { 0 };
    actions.iter().map(of).sum()
}

fn is_drained(actions: &[Action], member: &Member) -> bool {
    actions.iter().any(|action| matches!(action, Action::Drain { id } if *id == member.id))
}

/// What becomes of a service as its actions are done: who is made becomes ready, or ends where `fails`.
struct World {
    members: Vec<Member>,
    spawning: u32,
    made: usize,
    fails: bool,
}

impl World {
    /// Does what is needed once, with a check of each step; whether there was anything to do.
    fn step(&mut self, desired: Desired) -> bool {
        let actions = reconcile(desired, &self.members, self.spawning);
        for action in &actions {
            match action {
                Action::Spawn { count } => self.spawning += count,
                Action::Drain { id } => {
                    let member = self.members.iter_mut().find(|member| member.id == *id).unwrap();
                    member.state = ReplicaState::Draining;
                    member.is_proved = false;
                }
                Action::Remove { id } => self.members.retain(|member| member.id != *id),
            }
        }
        let mut moved = !actions.is_empty() || self.spawning > 0;
        for member in &mut self.members {
            let before = member.clone();
            match member.state {
                ReplicaState::Starting if member.is_current && self.fails => {
                    member.state = ReplicaState::Ended;
                }
                ReplicaState::Starting | ReplicaState::Unready => member.state = ReplicaState::Ready,
                ReplicaState::Ready => member.is_proved = true,
                ReplicaState::Draining => member.load = member.load.saturating_sub(1),
                ReplicaState::Ended => {}
            }
            member.is_drained = member.state == ReplicaState::Draining && member.load == 0;
            moved |= *member != before;
        }
        for _ in 0..std::mem::take(&mut self.spawning) {
            self.made += 1;
            let starting = (true, 1, false, 0, false);
            self.members.push(member(1000 + self.made, starting));
        }
        // What was being removed is gone.
        let count = self.members.len();
        self.members.retain(|member| !member.is_going);
        moved || self.members.len() < count
    }
}

proptest! {
    #[test]
    fn every_service_comes_to_be_as_it_is_to_be(desired in desired(vec![Making::Goes, Making::Removed]), members in members()) {
        let mut world = World { members, spawning: 0, made: 0, fails: false };
        let mut steps = 0;
        while world.step(desired) {
            steps += 1;
            prop_assert!(steps < 300, "{:?}", world.members);
        }
        let wanted = if desired.making == Making::Removed { 0 } else { desired.replicas as usize };
        prop_assert_eq!(world.members.len(), wanted);
        prop_assert!(world.members.iter().all(|member| member.is_current && is_ready(&member)));
    }

    #[test]
    fn no_more_are_made_than_there_is_room_for(desired in desired(MAKING.to_vec()), members in members(), spawning in 0..4_u32) {
        let count = spawned(&reconcile(desired, &members, spawning));
        let there = members.iter().filter(|member| member.state != ReplicaState::Ended).count();
        let there = u32::try_from(there).unwrap() + spawning;
        prop_assert!(count == 0 || there + count <= desired.replicas + desired.update.max_surge);
        prop_assert!(count == 0 || desired.making == Making::Goes);
    }

    #[test]
    fn never_fewer_serve_than_may_be_missing(desired in desired(MAKING[..3].to_vec()), members in members(), spawning in 0..4_u32) {
        let actions = reconcile(desired, &members, spawning);
        let before = members.iter().filter(is_ready).count();
        let after = members.iter().filter(|member| is_ready(member) && !is_drained(&actions, member)).count();
        let floor = desired.replicas.saturating_sub(desired.update.max_unavailable) as usize;
        prop_assert!(after >= before.min(floor), "{before} to {after}, {actions:?}");
    }

    #[test]
    fn nobody_goes_who_takes_calls(desired in desired(MAKING.to_vec()), members in members()) {
        for action in reconcile(desired, &members, 0) {
            if let Action::Remove { id } = action {
                let member = members.iter().find(|member| member.id == id).unwrap();
                prop_assert!(!is_live(&member) && !member.is_going);
                prop_assert!(member.state == ReplicaState::Ended || member.load == 0);
            }
        }
    }

    #[test]
    fn a_generation_that_fails_leaves_those_that_serve(replicas in 1..8_u32, max_surge in 1..4_u32, max_unavailable in 0..4_u32) {
        let old = (0..replicas as usize).map(|id| member(id, (false, 0, false, 0, false))).collect();
        let mut world = World { members: old, spawning: 0, made: 0, fails: true };
        let update = UpdatePolicy { max_unavailable, max_surge };
        for step in 0..50 {
            let making = if step < 40 { Making::Goes } else { Making::Stopped };
            world.step(Desired { replicas, update, making });
            let serving = world.members.iter().filter(|member| !member.is_current && is_ready(member)).count();
            prop_assert_eq!(serving, replicas as usize);
        }
        prop_assert!(world.made > 0);
    }
}

#[test]
fn a_dead_replica_is_replaced_at_once() {
    let desired = Desired { replicas: 2, update: UpdatePolicy::default(), making: Making::Goes };
    let members = [member(0, (true, 0, true, 0, false)), member(1, (true, 4, false, 0, false))];
    let actions = reconcile(desired, &members, 0);
    assert_eq!(actions, [Action::Remove { id: "001".to_owned() }, Action::Spawn { count: 1 }]);
    assert_eq!(reconcile(desired, &members[..1], 1), [], "one is being made");
}

#[test]
fn those_that_are_missed_least_go_first() {
    let desired = Desired { replicas: 1, update: UpdatePolicy::default(), making: Making::Goes };
    let busy = member(0, (true, 0, true, 2, false));
    let idle = member(1, (true, 0, true, 0, false));
    let unready = member(2, (true, 2, false, 0, false));
    let drained = |members: &[Member]| reconcile(desired, members, 0);
    let drain = |id: &str| Action::Drain { id: id.to_owned() };
    assert_eq!(drained(&[busy.clone(), idle.clone(), unready]), [drain("002"), drain("001")]);
    assert_eq!(drained(&[busy, idle]), [drain("001")]);
}

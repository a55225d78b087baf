//! What every life of an agent or a VM has in common, whatever the table says in detail.

use ark_types::agent::AgentState;
use ark_types::vmm::{ExitReason, VmState};
use proptest::prelude::*;

const AGENT: [AgentState; 6] = [
    AgentState::Creating,
    AgentState::Running,
    AgentState::Paused,
    AgentState::Stopping,
    AgentState::Stopped,
    AgentState::Failed,
];

/// Follows `wishes` from `first`, taking only legal moves.
fn live<S: Copy>(first: S, wishes: &[S], may: impl Fn(S, S) -> bool) -> Vec<S> {
    let mut life = vec![first];
    for &next in wishes {
        let now = *life.last().unwrap();
        if may(now, next) {
            life.push(next);
        }
    }
    life
}

proptest! {
    #[test]
    fn an_agent_that_ended_comes_back_from_there_only_by_beginning_anew(wishes in prop::collection::vec(prop::sample::select(&AGENT[..]), 0..40)) {
        let life = live(AgentState::Creating, &wishes, AgentState::may_become);
        // From stopped and failed only a restart leads on, and who is told to stop does nothing else any more.
        let over = |s: &AgentState| matches!(s, AgentState::Stopped | AgentState::Failed);
        for pair in life.windows(2) {
            prop_assert!(!over(&pair[0]) || pair[1] == AgentState::Creating, "{life:?}");
            prop_assert!(pair[0] != AgentState::Stopping || over(&pair[1]), "{life:?}");
            // A guest that stands still cannot have powered itself off.
            prop_assert!(pair != [AgentState::Paused, AgentState::Stopped], "{life:?}");
        }
    }

    #[test]
    fn a_vm_runs_again_only_from_a_pause(wishes in prop::collection::vec(prop::sample::select(&VmState::ALL[..]), 0..60)) {
        let life = live(VmState::Starting, &wishes, VmState::may_become);
        for pair in life.windows(2) {
            if let [from, VmState::Running] = pair {
                prop_assert!(matches!(from, VmState::Starting | VmState::Paused), "{life:?}");
            }
            if let [VmState::Stopping, to] = pair {
                prop_assert_eq!(*to, VmState::Ended);
            }
        }
        prop_assert!(life.iter().filter(|s| **s == VmState::Ended).count() <= 1);
    }
}

#[test]
fn every_state_has_a_way_to_the_end_and_from_the_end_an_agent_only_begins_anew() {
    for state in AGENT {
        let over = matches!(state, AgentState::Stopped | AgentState::Failed);
        assert_eq!(state.may_become(AgentState::Failed), !over, "{state}");
        let next: Vec<AgentState> = AGENT.into_iter().filter(|next| state.may_become(*next)).collect();
        assert_eq!(next == [AgentState::Creating], over, "{state}");
        assert!(!state.may_become(state), "{state}");
    }
    for state in VmState::ALL {
        assert_eq!(state.may_become(VmState::Ended), state != VmState::Ended, "{state}");
        assert!(!state.may_become(state) && !state.may_become(VmState::Starting), "{state}");
    }
}

#[test]
fn exit_codes_tell_the_reasons_apart() {
    let codes = [
        ExitReason::GuestPoweroff,
        ExitReason::GuestReboot,
        ExitReason::GuestPanic,
        ExitReason::GuestCrash,
        ExitReason::StopDeadline,
        ExitReason::Signal,
        ExitReason::Killed,
        ExitReason::BadConfig,
        ExitReason::BadSnapshot,
        ExitReason::HostError,
        ExitReason::Internal,
    ]
    .map(ExitReason::exit_code);
    let distinct: std::collections::BTreeSet<u8> = codes.into_iter().collect();
    assert_eq!(distinct.len(), codes.len());
    assert_eq!(ExitReason::Stopped.exit_code(), 0, "a stop on request is a success");
}

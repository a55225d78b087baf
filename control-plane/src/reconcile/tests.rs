//! What holds of every decision.

use proptest::prelude::*;

use super::*;

const STEPS: std::ops::Range<u64> = 0..2_000_000;

fn policy() -> impl Strategy<Value = RestartPolicy> {
    let max = prop::option::of(1u32..8);
    prop_oneof![
        Just(RestartPolicy::Never),
        max.clone().prop_map(|max_restarts| RestartPolicy::OnFailure { max_restarts }),
        max.prop_map(|max_restarts| RestartPolicy::Always { max_restarts }),
    ]
}

fn desired() -> impl Strategy<Value = Desired> {
    let limit = || prop::option::of(1000u64..1_000_000);
    let check = prop::option::of((1000u64..100_000, 1u32..9));
    (policy(), limit(), limit(), limit(), check, any::<bool>()).prop_map(
        |(restart, ttl_ms, idle_timeout_ms, checkpoint_ms, check, is_removal_asked)| Desired {
            restart,
            ttl_ms,
            idle_timeout_ms,
            checkpoint_ms,
            check: check.map(|(interval_ms, failures)| Check { interval_ms, failures }),
            is_removal_asked,
        },
    )
}

fn history() -> impl Strategy<Value = History> {
    (0u32..80, prop::collection::vec(STEPS, 0..8), 0u32..80).prop_map(|(streak, recent_ms, faults)| History {
        streak,
        recent_ms,
        faults,
    })
}

fn checked() -> impl Strategy<Value = Checked> {
    (prop::collection::vec(any::<bool>(), 0..9), prop::option::of(STEPS)).prop_map(|(checks, idle_ms)| {
        let mut tally = Tally::default();
        for passes in checks {
            if passes { tally.passed() } else { tally.failed(false) }
        }
        Checked { tally, idle_ms }
    })
}

fn condition() -> impl Strategy<Value = Condition> {
    let told = prop::sample::select(vec![Health::Well, Health::Silent, Health::Failing]);
    let heard = (STEPS, 1u64..100_000, any::<bool>(), told);
    let running = (heard, STEPS, prop::option::of(STEPS), checked()).prop_map(
        |((silent_ms, patience_ms, is_unheard, told), unused_ms, unsaved_ms, checked)| {
            let running =
                Running { silent_ms, patience_ms, is_unheard, told, unused_ms, unsaved_ms, checked };
            Condition::Running(running)
        },
    );
    let ended = (any::<bool>(), prop::option::of(STEPS), any::<bool>(), history()).prop_map(
        |(failed, ran_ms, is_of_the_host, history)| {
            let outcome = if failed { Outcome::Failed } else { Outcome::Stopped };
            Condition::Ended { outcome, ran_ms, is_of_the_host, history }
        },
    );
    prop_oneof![
        Just(Condition::ComingUp),
        Just(Condition::Paused),
        Just(Condition::Ending),
        Just(Condition::Over),
        (STEPS, prop::collection::vec(0u8..9, 0..4)).prop_map(|(until_ms, ids)| {
            let checkpoints = ids.into_iter().map(|id| SnapshotId([id; 16])).collect();
            Condition::Waiting { until_ms, checkpoints, lineage: Lineage::default() }
        }),
        running,
        ended,
    ]
}

fn observed() -> impl Strategy<Value = Observed> {
    (STEPS, condition()).prop_map(|(created_ms, condition)| Observed { created_ms, condition })
}

/// What an agent is once its owner did `action`.
fn apply(desired: &mut Desired, observed: &mut Observed, action: &Action, now: u64) {
    let next = match (action, &observed.condition) {
        (Action::Remove { .. }, _) => {
            desired.is_removal_asked = true;
            return;
        }
        (Action::Wait { after_ms, .. }, _) => {
            // Even the first restart is a decision of its own.
            let until_ms = now + after_ms.max(&1);
            Condition::Waiting { until_ms, checkpoints: Vec::new(), lineage: Lineage::default() }
        }
        (Action::Stay { .. }, _) => Condition::Over,
        (Action::Restart { .. }, _) => Condition::ComingUp,
        (Action::Kill { .. }, _) => Condition::Ending,
        (done, Condition::Running(running)) => {
            let mut running = *running;
            match done {
                Action::Tell(health) => running.told = *health,
                Action::Checkpoint => running.unsaved_ms = None,
                Action::Check => running.checked.idle_ms = None,
                other => panic!("{other:?} of {running:?}"),
            }
            Condition::Running(running)
        }
        (other, condition) => panic!("{other:?} of {condition:?}"),
    };
    observed.condition = next;
}

proptest! {
    #[test]
    fn who_has_no_policy_is_never_restarted_nor_killed(mut desired in desired(), observed in observed(), now in STEPS) {
        desired.restart = RestartPolicy::Never;
        if matches!(observed.condition, Condition::Waiting { .. }) {
            return Ok(());
        }
        let begins = |action: &Action| matches!(action, Action::Wait { .. } | Action::Restart { .. } | Action::Kill { .. });
        prop_assert!(!decide(&desired, &observed, now).iter().any(begins));
    }

    #[test]
    fn nothing_is_done_once_removal_was_asked_for(mut desired in desired(), observed in observed(), now in STEPS) {
        desired.is_removal_asked = true;
        prop_assert_eq!(decide(&desired, &observed, now), []);
    }

    #[test]
    fn the_ttl_removes_whatever_else_is_wanted(mut desired in desired(), observed in observed(), over in 0u64..1000) {
        desired.is_removal_asked = false;
        let ttl = desired.ttl_ms.unwrap_or(5000);
        desired.ttl_ms = Some(ttl);
        let actions = decide(&desired, &observed, observed.created_ms + ttl + over);
        prop_assert!(matches!(actions.as_slice(), [Action::Remove { why }] if why.contains("ttl")), "{actions:?}");
    }

    #[test]
    fn only_a_running_agent_is_idle(mut desired in desired(), observed in observed(), now in STEPS) {
        desired.ttl_ms = None;
        let actions = decide(&desired, &observed, now);
        if actions.iter().any(|action| matches!(action, Action::Remove { .. })) {
            let is_running = matches!(observed.condition, Condition::Running(_));
            prop_assert!(is_running);
        }
    }

    #[test]
    fn what_was_done_is_not_decided_again(mut desired in desired(), mut observed in observed(), now in STEPS) {
        for action in decide(&desired, &observed, now) {
            apply(&mut desired, &mut observed, &action, now);
        }
        prop_assert_eq!(decide(&desired, &observed, now), []);
    }

    #[test]
    fn the_first_restart_is_at_once_and_waits_grow_and_are_bounded(streak in 1u32..) {
        prop_assert_eq!(wait(0), 0);
        prop_assert!((FIRST_WAIT_MS..=LONGEST_WAIT_MS).contains(&wait(streak)));
        prop_assert!(wait(streak) <= wait(streak.saturating_add(1)));
    }

    #[test]
    fn checks_never_pile_up_and_an_unhealthy_agent_is_ended_as_a_hung_one_is(
        mut desired in desired(), observed in observed(), now in STEPS,
    ) {
        let Condition::Running(running) = observed.condition else { return Ok(()) };
        (desired.is_removal_asked, desired.ttl_ms, desired.idle_timeout_ms) = (false, None, None);
        let actions = decide(&desired, &observed, now);
        if running.checked.idle_ms.is_none() || desired.check.is_none() {
            prop_assert!(!actions.contains(&Action::Check));
        }
        let is_well = match health(&desired, &running) {
            Health::Well => true,
            Health::Silent => running.silent_ms < running.patience_ms,
            Health::Failing => false,
        };
        let is_ended = actions.iter().any(|action| matches!(action, Action::Kill { .. }));
        prop_assert_eq!(is_ended, !is_well && !desired.restart.is_never());
    }

    #[test]
    fn a_checkpoint_is_taken_of_a_guest_that_is_heard_and_of_no_other(desired in desired(), observed in observed(), now in STEPS) {
        if decide(&desired, &observed, now).contains(&Action::Checkpoint) {
            let Condition::Running(running) = observed.condition else {
                return Err(TestCaseError::fail("it does not run"));
            };
            let Running { silent_ms, patience_ms, unsaved_ms, checked, .. } = running;
            prop_assert!(silent_ms < patience_ms && checked.tally.failed == 0);
            prop_assert!(unsaved_ms >= desired.checkpoint_ms && desired.checkpoint_ms.is_some());
        }
    }

    #[test]
    fn a_crash_loop_ends_with_a_reason(policy in policy(), start in STEPS, runs in prop::collection::vec(0u64..5000, 20)) {
        let desired = Desired { restart: policy, ttl_ms: None, idle_timeout_ms: None, checkpoint_ms: None, check: None, is_removal_asked: false };
        let (mut now, mut history, mut restarts) = (start, History::default(), 0usize);
        for ran in runs {
            now += ran;
            let condition = Condition::Ended { outcome: Outcome::Failed, ran_ms: Some(ran), is_of_the_host: false, history: history.clone() };
            let actions = decide(&desired, &Observed { created_ms: start, condition }, now);
            match actions.as_slice() {
                [Action::Wait { attempt, after_ms }] => {
                    restarts += 1;
                    prop_assert_eq!(*attempt as usize, restarts);
                    history.note(Some(ran), now);
                    now += after_ms;
                }
                [Action::Stay { why }] => {
                    let most = policy.max_restarts().map_or(MOST_RESTARTS, |most| most as usize);
                    prop_assert_eq!(restarts, if policy.is_never() { 0 } else { most });
                    prop_assert_eq!(why.is_some(), !policy.is_never());
                    return Ok(());
                }
                other => prop_assert!(false, "{other:?}"),
            }
        }
        prop_assert!(false, "it went on and on");
    }

    #[test]
    fn what_the_host_is_to_blame_for_is_waited_out_and_costs_no_restart(
        mut desired in desired(), mut history in history(), faults in 1u32..100, start in STEPS,
    ) {
        (desired.is_removal_asked, desired.ttl_ms) = (false, None);
        desired.restart = RestartPolicy::OnFailure { max_restarts: Some(1) };
        let (mut now, mut waited) = (start, 0);
        let before = history.clone();
        history.faults = 0;
        for _ in 0..faults {
            let condition = Condition::Ended { outcome: Outcome::Failed, ran_ms: None, is_of_the_host: true, history: history.clone() };
            let actions = decide(&desired, &Observed { created_ms: start, condition }, now);
            let [Action::Wait { attempt, after_ms }] = actions.as_slice() else {
                return Err(TestCaseError::fail(format!("{actions:?}")));
            };
            prop_assert!(*attempt == history.streak.max(1) && (waited.max(1)..=LONGEST_WAIT_MS).contains(after_ms));
            waited = *after_ms;
            now += after_ms;
            history.note_fault();
        }
        prop_assert_eq!((history.streak, &history.recent_ms), (before.streak, &before.recent_ms));
        history.note(None, now);
        prop_assert_eq!(history.faults, 0);
    }

    #[test]
    fn who_was_missed_by_an_earlier_arkd_is_so_until_heard_and_ended_only_when_missed_by_this_one(
        mut desired in desired(), patience_ms in 1u64..100_000, silent_ms in STEPS,
    ) {
        (desired.is_removal_asked, desired.ttl_ms, desired.idle_timeout_ms) = (false, None, None);
        let checked = Checked { tally: Tally::default(), idle_ms: None };
        let mut running = Running {
            silent_ms, patience_ms, is_unheard: true, told: Health::Silent, unused_ms: 0, unsaved_ms: None, checked,
        };
        let actions = |running| decide(&desired, &Observed { created_ms: 0, condition: Condition::Running(running) }, 0);
        let is_ended = silent_ms >= patience_ms && !desired.restart.is_never();
        let expected = if is_ended { vec![Action::Kill { health: Health::Silent }] } else { Vec::new() };
        prop_assert_eq!(actions(running), expected);
        (running.is_unheard, running.silent_ms) = (false, 0);
        prop_assert_eq!(actions(running), [Action::Tell(Health::Well)]);
    }
}

#[test]
fn who_ran_well_begins_with_a_clean_slate() {
    let restart = RestartPolicy::Always { max_restarts: Some(2) };
    let desired = Desired {
        restart,
        ttl_ms: None,
        idle_timeout_ms: None,
        checkpoint_ms: None,
        check: None,
        is_removal_asked: false,
    };
    let spent = History { streak: 2, recent_ms: vec![1, 2], faults: 0 };
    let after = |ran_ms| {
        let history = spent.clone();
        let condition =
            Condition::Ended { outcome: Outcome::Stopped, ran_ms, is_of_the_host: false, history };
        decide(&desired, &Observed { created_ms: 0, condition }, RAN_WELL_MS * 2)
    };
    assert_eq!(after(Some(RAN_WELL_MS)), [Action::Wait { attempt: 1, after_ms: 0 }]);
    for ran in [Some(RAN_WELL_MS - 1), None] {
        assert!(matches!(after(ran).as_slice(), [Action::Stay { why: Some(_) }]));
    }
}

#[test]
fn only_a_failure_is_one() {
    let restart = RestartPolicy::OnFailure { max_restarts: None };
    let desired = Desired {
        restart,
        ttl_ms: None,
        idle_timeout_ms: None,
        checkpoint_ms: None,
        check: None,
        is_removal_asked: false,
    };
    let after = |outcome| {
        let history = History::default();
        let condition = Condition::Ended { outcome, ran_ms: Some(1), is_of_the_host: false, history };
        decide(&desired, &Observed { created_ms: 0, condition }, 1)
    };
    assert_eq!(after(Outcome::Stopped), [Action::Stay { why: None }]);
    assert_eq!(after(Outcome::Failed), [Action::Wait { attempt: 1, after_ms: 0 }]);
}

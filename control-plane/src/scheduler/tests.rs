//! Admission on the one host.

use proptest::prelude::*;

use super::*;

fn owner(text: &str) -> Owner {
    text.parse().unwrap()
}

fn scheduler(memory_mib: u64, max_agents: u32) -> Arc<Scheduler> {
    let config = SchedulerConfig {
        overcommit_memory: 1.0.try_into().unwrap(),
        max_agents,
        ..SchedulerConfig::default()
    };
    Scheduler::new(config, memory_mib, 4)
}

fn ask(who: &str, memory_mib: u64, patience_ms: u64) -> Ask {
    let needs = Resources { agents: 1, memory_mib, vcpus: 1 };
    Ask { patience: Duration::from_millis(patience_ms), ..Ask::new(owner(who), needs) }
}

fn reserved(scheduler: &Scheduler) -> Resources {
    scheduler.limit_and_reserved().1
}

/// Begins to wait, and returns when it stands in the queue.
async fn waiting(scheduler: &Arc<Scheduler>, ask: Ask) -> tokio::task::JoinHandle<Result<Grant, Denied>> {
    let before = scheduler.waiting().waiting.len();
    let task = tokio::spawn({
        let scheduler = Arc::clone(scheduler);
        async move { scheduler.admit(ask).await }
    });
    while scheduler.waiting().waiting.len() == before {
        tokio::task::yield_now().await;
    }
    task
}

#[tokio::test]
async fn what_fits_is_granted_and_what_is_dropped_is_free_again() {
    let scheduler = scheduler(1000, 10);
    let first = scheduler.admit(ask("a", 600, 0)).await.unwrap();
    let denied = scheduler.admit(ask("a", 500, 0)).await.unwrap_err();
    assert_eq!(
        denied.to_string(),
        "500 MiB are asked for and 400 MiB of 1000 MiB are free (over-commit 1): end an agent, ask for less, or raise \
         --overcommit-memory"
    );
    let never = scheduler.admit(ask("a", 1001, 60_000)).await.unwrap_err();
    assert!(never.to_string().contains("it can never fit"), "{never}");
    let second = first.clone();
    drop(first);
    assert_eq!(reserved(&scheduler).memory_mib, 600, "a clone is the same reservation");
    drop(second);
    assert_eq!(reserved(&scheduler), Resources::default());
    assert!(scheduler.owners().is_empty());
}

#[tokio::test]
async fn who_waits_is_seen_and_gets_in_when_another_ends() {
    let scheduler = scheduler(1000, 1);
    let first = scheduler.admit(ask("a", 10, 0)).await.unwrap();
    let second = waiting(&scheduler, ask("b", 10, 60_000)).await;
    let list = scheduler.waiting();
    let [seen] = list.waiting.as_slice() else { panic!("{list:?}") };
    assert_eq!((seen.position, seen.owner.as_ref(), seen.timeout_ms), (1, "b", 60_000));
    assert!(seen.missing.contains("1 agent is asked for and 0 of 1 may still be had"), "{}", seen.missing);
    assert_eq!(scheduler.owner(&owner("b")).waiting.agents, 1);
    drop(first);
    let grant = second.await.unwrap().unwrap();
    assert_eq!((grant.needs().memory_mib, scheduler.waiting().waiting.len()), (10, 0));
    assert_eq!(scheduler.owner(&owner("b")).waiting, Resources::default());
}

#[tokio::test]
async fn who_waits_too_long_or_leaves_is_out_of_the_queue() {
    let scheduler = scheduler(1000, 1);
    let first = scheduler.admit(ask("a", 10, 0)).await.unwrap();
    let late = scheduler.admit(ask("b", 10, 20)).await.unwrap_err();
    assert!(matches!(late, Denied::Timeout { .. }) && late.to_string().contains("within 20 ms"), "{late}");
    let gone = waiting(&scheduler, ask("b", 10, 60_000)).await;
    gone.abort();
    assert!(gone.await.unwrap_err().is_cancelled());
    assert!(scheduler.waiting().waiting.is_empty());
    drop(first);
    assert_eq!(reserved(&scheduler), Resources::default());
    assert!(scheduler.owners().is_empty());
}

#[tokio::test]
async fn the_queue_is_bounded() {
    let config =
        SchedulerConfig { max_agents: 1, queue: 2.try_into().unwrap(), ..SchedulerConfig::default() };
    let scheduler = Scheduler::new(config, 1000, 4);
    let _first = scheduler.admit(ask("a", 10, 0)).await.unwrap();
    let _waiting =
        [waiting(&scheduler, ask("b", 10, 60_000)).await, waiting(&scheduler, ask("c", 10, 60_000)).await];
    let denied = scheduler.admit(ask("d", 10, 60_000)).await.unwrap_err();
    assert!(matches!(denied, Denied::QueueFull { waiting: 2, .. }), "{denied}");
}

#[tokio::test]
async fn many_are_granted_together_or_not_at_all() {
    let scheduler = scheduler(100, 10);
    let mut grants = scheduler.admit_many(ask("a", 10, 0), 8).await.unwrap();
    assert_eq!((grants.len(), reserved(&scheduler).memory_mib), (8, 80));
    let denied = scheduler.admit_many(ask("a", 10, 0), 3).await.unwrap_err();
    assert!(denied.to_string().starts_with("30 MiB are asked for and 20 MiB of 100 MiB"), "{denied}");
    grants.truncate(3);
    assert_eq!(reserved(&scheduler), Resources { agents: 3, memory_mib: 30, vcpus: 3 });
}

#[tokio::test]
async fn a_claim_goes_over_and_others_wait_until_it_is_below_again() {
    let scheduler = scheduler(100, 10);
    let claims = [60, 60]
        .map(|memory_mib| scheduler.claim(&owner("a"), Resources { agents: 1, memory_mib, vcpus: 1 }, None));
    assert_eq!(reserved(&scheduler).memory_mib, 120);
    let next = waiting(&scheduler, ask("b", 30, 60_000)).await;
    let [first, second] = claims;
    let kept = second.on_disk();
    drop(second);
    assert_eq!(next.await.unwrap().unwrap().needs().memory_mib, 30);
    drop((first, kept));
    assert_eq!(reserved(&scheduler), Resources::default());
}

#[tokio::test]
async fn quotas_refuse_at_once_and_count_what_waits() {
    let scheduler = scheduler(1000, 2);
    let quota = Quota { agents: Some(2), memory_mib: Some(500), vcpus: None };
    scheduler.set_quota(&owner("a"), quota);
    let _one = scheduler.admit(ask("a", 100, 0)).await.unwrap();
    let over = scheduler.admit(ask("a", 401, 60_000)).await.unwrap_err();
    assert_eq!(
        over.to_string(),
        "401 MiB are asked for and 400 MiB of the 500 MiB that a may have are left: end an agent of a, ask for less, or raise \
         its quota with `ark quota a`"
    );
    let other = scheduler.admit(ask("b", 401, 0)).await.unwrap();
    let second = waiting(&scheduler, ask("a", 10, 60_000)).await;
    let third = scheduler.admit(ask("a", 10, 60_000)).await.unwrap_err();
    assert!(matches!(third, Denied::Quota(_)) && third.to_string().contains("0 of the 2"), "{third}");
    // It may have less by the time that there is room.
    scheduler.set_quota(&owner("a"), Quota { agents: Some(1), ..quota });
    drop(other);
    assert!(matches!(second.await.unwrap(), Err(Denied::Quota(_))));
    scheduler.set_quota(&owner("a"), Quota::default());
    assert!(scheduler.admit(ask("a", 600, 0)).await.is_ok());
}

#[tokio::test]
async fn a_strict_group_has_one_agent_per_host_and_holds_nobody_up() {
    let scheduler = scheduler(1000, 10);
    let strict = || Ask { apart: Some(("web".parse().unwrap(), Spread::Hard)), ..ask("a", 10, 60_000) };
    let first = scheduler.admit(strict()).await.unwrap();
    let second = waiting(&scheduler, strict()).await;
    assert!(scheduler.waiting().waiting[0].missing.contains("anti-affinity group web"));
    let _other = scheduler.admit(ask("b", 10, 0)).await.unwrap();
    drop(first);
    assert!(second.await.unwrap().is_ok());
}

#[derive(Clone, Debug)]
enum Step {
    Ask { owner: u8, memory: u64, count: u32, patience_ms: u64, priority: i32 },
    Abort(usize),
    End(usize),
    Quota(u8, Option<u64>),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (0..3_u8, 1..60_u64, 1..4_u32, prop_oneof![Just(0), Just(60_000)], -100..=100)
            .prop_map(|(owner, memory, count, patience_ms, priority)| {
                Step::Ask { owner, memory, count, patience_ms, priority }
            }),
        1 => (0..50_usize).prop_map(Step::Abort),
        3 => (0..50_usize).prop_map(Step::End),
        1 => (0..3_u8, proptest::option::of(0..5_u64)).prop_map(|(owner, agents)| Step::Quota(owner, agents)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn never_is_more_reserved_than_may_be_and_in_the_end_nothing(steps in proptest::collection::vec(step(), 1..80)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let scheduler = scheduler(100, 6);
            let mut asked: Vec<tokio::task::JoinHandle<Result<Vec<Grant>, Denied>>> = Vec::new();
            for step in steps {
                match step {
                    Step::Ask { owner, memory, count, patience_ms, priority } => {
                        let ask = Ask { priority, ..ask(&format!("o{owner}"), memory, patience_ms) };
                        let scheduler = Arc::clone(&scheduler);
                        asked.push(tokio::spawn(async move { scheduler.admit_many(ask, count).await }));
                    }
                    Step::Abort(n) => if let Some(task) = asked.get(n) {
                        task.abort();
                    }
                    Step::End(n) => if n < asked.len() && asked[n].is_finished() {
                        drop(asked.swap_remove(n).await);
                    }
                    Step::Quota(n, agents) => {
                        scheduler.set_quota(&owner(&format!("o{n}")), Quota { agents, ..Quota::default() });
                    }
                }
                tokio::task::yield_now().await;
                let (limit, reserved) = scheduler.limit_and_reserved();
                assert!(reserved.is_within(&limit), "{reserved:?} of {limit:?}");
                let sum = scheduler.owners().iter().fold(Resources::default(), |sum, owner| sum.plus(owner.reserved));
                assert_eq!(sum, reserved, "what owners have is what is reserved");
            }
            asked.iter().for_each(tokio::task::JoinHandle::abort);
            for task in asked {
                drop(task.await);
            }
            assert_eq!(reserved(&scheduler), Resources::default());
            assert!(scheduler.waiting().waiting.is_empty());
            assert!(scheduler.owners().iter().all(|o| o.waiting == Resources::default() && o.quota != Quota::default()));
        });
    }
}

#[tokio::test]
async fn standbys_have_what_nobody_has_and_give_back_what_others_are_promised() {
    let scheduler = scheduler(100, 10);
    let needs = |memory_mib| Resources { agents: 1, memory_mib, vcpus: 1 };
    let first = scheduler.admit(ask("a", 60, 0)).await.unwrap();
    assert!(scheduler.spare(needs(41)).is_none());
    let standby = scheduler.spare(needs(40)).unwrap();
    assert!(scheduler.spare(needs(1)).is_none(), "nor what another standby has");
    assert_eq!((reserved(&scheduler), scheduler.spared()), (needs(60), needs(40)));
    assert_eq!(scheduler.overdrawn(), Resources::default());
    let second = scheduler.admit(ask("a", 30, 0)).await.unwrap();
    assert_eq!(scheduler.overdrawn().memory_mib, 30);
    drop(standby);
    assert_eq!((scheduler.overdrawn(), scheduler.spared()), <_>::default());
    // What agents have beyond the limit is not the standbys' to give back.
    let adopted = scheduler.claim(&owner("b"), needs(50), None);
    assert!(scheduler.spare(needs(1)).is_none());
    assert_eq!(scheduler.overdrawn(), Resources::default());
    drop((first, second, adopted));
    assert!(scheduler.spare(needs(100)).is_some());

    let template = "py".parse().unwrap();
    scheduler.set_warm(&template, true);
    assert_eq!(scheduler.warm(), std::slice::from_ref(&template));
    scheduler.set_warm(&template, false);
    assert!(scheduler.warm().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn standbys_make_no_difference_to_anybody_else(
        steps in proptest::collection::vec((0..4_u8, 1..60_u64, 0..50_usize), 1..80),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let (with, without) = (scheduler(100, 6), scheduler(100, 6));
            let (mut asked, mut spares) = (Vec::new(), Vec::new());
            for (kind, memory, n) in steps {
                match kind {
                    0 => for scheduler in [&with, &without] {
                        let (scheduler, ask) = (Arc::clone(scheduler), ask("a", memory, 60_000));
                        asked.push(tokio::spawn(async move { scheduler.admit(ask).await }));
                    }
                    // Both of a pair or none.
                    1 => if let Some(pair) = asked.len().checked_sub(1).map(|last| n % (last + 1) / 2 * 2) {
                        asked.drain(pair..pair + 2).for_each(|task| task.abort());
                    }
                    2 => spares.extend(with.spare(Resources { agents: 1, memory_mib: memory, vcpus: 1 })),
                    _ => if !spares.is_empty() {
                        drop(spares.swap_remove(n % spares.len()));
                    }
                }
                for _ in 0..4 {
                    tokio::task::yield_now().await;
                }
                let told = |scheduler: &Scheduler| {
                    let waiting = scheduler.waiting().waiting.into_iter();
                    let waiting: Vec<_> = waiting.map(|w| (w.position, w.needs, w.missing)).collect();
                    (scheduler.limit_and_reserved(), waiting)
                };
                assert_eq!(told(&with), told(&without));
                let (limit, reserved) = with.limit_and_reserved();
                assert_eq!(with.overdrawn(), reserved.plus(with.spared()).minus(limit));
            }
        });
    }
}

//! Random comings and goings against what the module promises.

use std::collections::BTreeMap;

use ark_types::scheduling::PRIORITIES;
use proptest::prelude::*;

use super::*;

const TOTAL: Resources = Resources { agents: 100, memory_mib: 10_000, vcpus: 100 };

fn owner(n: u8) -> Owner {
    format!("o{n}").parse().unwrap()
}

fn needs(memory_mib: u64) -> Resources {
    Resources { agents: 1, memory_mib, vcpus: 1 }
}

/// Runs `act` with what the order depends on.
fn at<R>(at_ms: u64, used: &BTreeMap<Owner, Resources>, act: impl FnOnce(&Now<'_>) -> R) -> R {
    let used = |owner: &Owner| used.get(owner).copied().unwrap_or_default();
    act(&Now { at_ms, used: &used, total: TOTAL })
}

#[derive(Clone, Debug)]
enum Step {
    Come {
        owner: u8,
        priority: i32,
        memory: u64,
    },
    /// The n-th in order gives up.
    Leave(usize),
    /// So much memory is free.
    Serve(u64),
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..4_u8, prop_oneof![Just(0), Just(10), PRIORITIES], 1..5_u64)
            .prop_map(|(owner, priority, memory)| Step::Come { owner, priority, memory: memory * 50 }),
        1 => (0..20_usize).prop_map(Step::Leave),
        3 => (0..5_u64).prop_map(|memory| Step::Serve(memory * 50)),
        2 => (0..3000_u64).prop_map(Step::Pass),
    ]
}

proptest! {
    #[test]
    fn nothing_is_lost_nothing_is_twice_and_the_next_one_is_the_first_in_order_that_fits(
        capacity in 0..12_usize,
        steps in proptest::collection::vec(step(), 1..150),
    ) {
        let mut queue = Queue::new(capacity);
        let (mut waiting, mut used, mut now) = (BTreeMap::new(), BTreeMap::new(), 0);
        let mut number = 0;
        for step in steps {
            let order: Vec<(Ticket, u32, u64)> = at(now, &used, |now| {
                queue.order(now).map(|e| (e.ticket, e.passed, e.needs.memory_mib)).collect()
            });
            prop_assert!(queue.len <= capacity && queue.len == waiting.len());
            let mut in_order: Vec<Ticket> = order.iter().map(|(ticket, ..)| *ticket).collect();
            in_order.sort();
            prop_assert!(in_order.iter().eq(waiting.keys()), "every one has exactly one position");
            match step {
                Step::Come { owner: o, priority, memory } => {
                    number += 1;
                    match queue.push(now, (owner(o), priority), needs(memory), number) {
                        Ok(ticket) => prop_assert!(waiting.insert(ticket, number).is_none()),
                        Err(Full(len)) => prop_assert!(len == capacity && waiting.len() == capacity),
                    }
                }
                Step::Leave(n) => if let Some((ticket, ..)) = order.get(n) {
                    let entry = queue.remove(*ticket).unwrap();
                    prop_assert_eq!(Some(entry.what), waiting.remove(ticket));
                    prop_assert!(queue.remove(*ticket).is_none());
                }
                Step::Serve(free) => {
                    let is_blocked = |(_, passed, memory): &(Ticket, u32, u64)| *memory > free && *passed >= MAX_PASSED;
                    let mut allowed = order.iter().take_while(|entry| !is_blocked(entry));
                    let expected = allowed.find(|(_, _, memory)| *memory <= free).map(|(ticket, ..)| *ticket);
                    let fit = |entry: &Entry<_>| if entry.needs.memory_mib <= free { Fit::Now } else { Fit::NotYet };
                    let entry = at(now, &used, |now| queue.next(now, fit));
                    prop_assert_eq!(entry.as_ref().map(|entry| entry.ticket), expected);
                    if let Some(entry) = entry {
                        prop_assert_eq!(Some(entry.what), waiting.remove(&entry.ticket));
                        let used: &mut Resources = used.entry(entry.owner).or_default();
                        *used = used.plus(entry.needs);
                    }
                }
                Step::Pass(ms) => now += ms,
            }
        }
    }

    #[test]
    fn those_that_have_less_go_first_until_all_have_the_same(
        had in proptest::collection::vec(0..10_u64, 2..6),
        count in 1..40_usize,
    ) {
        let mut queue = Queue::new(1000);
        let mut used: BTreeMap<Owner, Resources> =
            (0..).zip(&had).map(|(n, had)| (owner(n), needs(10).times(*had))).collect();
        for _ in 0..50 {
            for owner in used.keys() {
                queue.push(0, (owner.clone(), 0), needs(10), ()).unwrap();
            }
        }
        let before = used.clone();
        for _ in 0..count {
            let entry = at(0, &used, |now| queue.next(now, |_| Fit::Now)).unwrap();
            let used = used.get_mut(&entry.owner).unwrap();
            *used = used.plus(entry.needs);
        }
        let least = used.values().map(|used| used.agents).min().unwrap();
        for (owner, now) in &used {
            let was_served = *now != before[owner];
            prop_assert!(!was_served || now.agents <= least + 1, "{owner} has {} and another {least}", now.agents);
        }
    }

}

proptest! {
    // Each case goes through minutes of the queue's time.
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// One place gets free per `every` ms, and at every moment there are requests of the highest priority and of owners that
    /// have nothing.
    #[test]
    fn nobody_starves_below_a_flood(every in 100..2000_u64, priority in -100..100_i32) {
        let mut queue = Queue::new(1000);
        let loser = owner(0);
        let all = BTreeMap::from([(loser.clone(), TOTAL)]);
        let rivals = 4;
        let ticket = queue.push(0, (loser, priority), needs(10), ()).unwrap();
        // Its priority is served once per this long, and then it is passed over for owners with nothing at most until it has
        // aged by all that there is, or all of those were served since.
        let range = u64::try_from(PRIORITIES.end() - PRIORITIES.start()).unwrap();
        let turn = range * POINT_MS + 2 * every;
        let bound = 1_000_000 / SHARE_PER_MS + (rivals + 2) * turn;
        let mut now = 0;
        loop {
            for rival in 1..=u8::try_from(rivals).unwrap() {
                for priority in [100, priority] {
                    let _ = queue.push(now, (owner(rival), priority), needs(10), ());
                }
            }
            let taken = at(now, &all, |now| queue.next(now, |_| Fit::Now)).unwrap();
            if taken.ticket == ticket {
                break;
            }
            prop_assert!(now <= bound, "it still waits after {now} ms");
            now += every;
        }
    }
}

#[test]
fn one_that_does_not_fit_is_passed_a_bounded_number_of_times() {
    let mut queue = Queue::new(100);
    let used = BTreeMap::new();
    let big = queue.push(0, (owner(0), 5), needs(1000), "big").unwrap();
    for _ in 0..20 {
        queue.push(0, (owner(1), 0), needs(1), "small").unwrap();
    }
    let small_fits = |entry: &Entry<&str>| if entry.what == "small" { Fit::Now } else { Fit::NotYet };
    let served = std::iter::from_fn(|| at(0, &used, |now| queue.next(now, small_fits))).count();
    assert_eq!(served, usize::try_from(MAX_PASSED).unwrap());
    let next = at(0, &used, |now| queue.next(now, |_| Fit::Now)).unwrap();
    assert_eq!(next.ticket, big, "as soon as it fits it goes");
}

#[test]
fn what_room_does_not_help_holds_nobody_up() {
    let mut queue = Queue::new(100);
    let used = BTreeMap::new();
    queue.push(0, (owner(0), 5), needs(1), "aside").unwrap();
    for _ in 0..20 {
        queue.push(0, (owner(1), 0), needs(1), "others").unwrap();
    }
    let fit = |entry: &Entry<&str>| if entry.what == "aside" { Fit::Aside } else { Fit::Now };
    assert_eq!(std::iter::from_fn(|| at(0, &used, |now| queue.next(now, fit))).count(), 20);
}

#[test]
fn a_backlog_gives_its_owner_no_advantage_over_one_that_comes_later() {
    let mut queue = Queue::new(1000);
    let used = BTreeMap::new();
    for _ in 0..500 {
        queue.push(0, (owner(0), 0), needs(10), ()).unwrap();
    }
    // The flood was served until a moment ago.
    let _ = at(60_000, &used, |now| queue.next(now, |_| Fit::Now));
    let late = queue.push(60_000, (owner(1), 0), needs(10), ()).unwrap();
    let used = BTreeMap::from([(owner(0), needs(10))]);
    let position = at(60_100, &used, |now| queue.order(now).position(|entry| entry.ticket == late));
    assert_eq!(position, Some(0));
}

#[test]
fn higher_priorities_go_first_and_lower_ones_age() {
    let mut queue = Queue::new(10);
    let used = BTreeMap::new();
    for priority in [0, -5, 7] {
        queue.push(0, (owner(0), priority), needs(1), priority).unwrap();
    }
    let order =
        |queue: &Queue<i32>, now| at(now, &used, |now| queue.order(now).map(|e| e.what).collect::<Vec<_>>());
    assert_eq!(order(&queue, 0), [7, 0, -5]);
    let _ = at(6000, &used, |now| queue.next(now, |_| Fit::Now));
    queue.push(6000, (owner(1), 7), needs(1), 7).unwrap();
    assert_eq!(order(&queue, 6000), [0, 7, -5], "a priority that was passed over for 6 s has 12 points more");
}

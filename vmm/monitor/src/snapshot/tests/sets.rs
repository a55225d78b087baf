//! Runs of pages and the file that lists them.

use ark_hal::memory::Run;
use proptest::prelude::*;

use crate::snapshot::runs::{bridge, masks, pages, push, stretches, subtract, union, visible};
use crate::snapshot::sums::{Sums, checksum, most_bytes};

const PAGES: usize = 300;

/// Any set of pages, one bool each.
fn set() -> impl Strategy<Value = Vec<bool>> {
    prop_oneof![
        proptest::collection::vec(any::<bool>(), PAGES),
        proptest::collection::vec(proptest::bool::weighted(0.95), PAGES),
        proptest::collection::vec(proptest::bool::weighted(0.05), PAGES),
    ]
}

fn runs_of(set: &[bool]) -> Vec<Run> {
    let mut runs = Vec::new();
    for (page, _) in set.iter().enumerate().filter(|(_, is)| **is) {
        push(&mut runs, page as u64, 1);
    }
    runs
}

fn set_of(runs: &[Run]) -> Vec<bool> {
    let mut set = vec![false; PAGES];
    for page in runs.iter().flat_map(|run| run.first..run.first + run.count) {
        assert!(!std::mem::replace(&mut set[usize::try_from(page).unwrap()], true), "{page} twice");
    }
    set
}

fn combine(a: &[bool], b: &[bool], with: impl Fn(bool, bool) -> bool) -> Vec<bool> {
    a.iter().zip(b).map(|(a, b)| with(*a, *b)).collect()
}

/// Sums of these pages, each chunk's being some number.
fn sums_of(runs: &[Run]) -> Sums {
    let mut sums = Sums::default();
    masks(runs).for_each(|(chunk, mask)| sums.push(chunk, mask, u128::from(mask) << 64 | u128::from(chunk)));
    sums
}

proptest! {
    #[test]
    fn sets_of_runs_behave_as_sets(a in set(), b in set(), c in set()) {
        let [ra, rb, rc] = [&a, &b, &c].map(|set| runs_of(set));
        prop_assert_eq!(set_of(&ra), a.clone());
        prop_assert_eq!(union(&ra, &rb), runs_of(&combine(&a, &b, |a, b| a || b)));
        prop_assert_eq!(subtract(&ra, &rb), runs_of(&combine(&a, &b, |a, b| a && !b)));
        let hidden = combine(&a, &b, |a, b| a || b);
        let seen = visible([ra.as_slice(), &rb, &rc]);
        prop_assert_eq!(&seen[0], &ra);
        prop_assert_eq!(&seen[1], &runs_of(&combine(&b, &a, |b, a| b && !a)));
        prop_assert_eq!(&seen[2], &runs_of(&combine(&c, &hidden, |c, h| c && !h)));
    }

    #[test]
    fn masks_and_stretches_name_the_same_pages(a in set()) {
        let runs = runs_of(&a);
        let mut again = Vec::new();
        for (chunk, mask) in masks(&runs) {
            prop_assert_ne!(mask, 0);
            for (first, count) in stretches(mask) {
                push(&mut again, chunk * 64 + u64::from(first), u64::from(count));
            }
        }
        prop_assert_eq!(&again, &runs);
        prop_assert_eq!(pages(&runs), a.iter().filter(|is| **is).count() as u64);
    }

    #[test]
    fn the_file_of_sums_comes_back_and_keeps_its_bound(a in set()) {
        let sums = sums_of(&runs_of(&a));
        let bytes = sums.encode(PAGES as u64);
        prop_assert!(bytes.len() as u64 <= most_bytes(PAGES as u64));
        prop_assert_eq!(Sums::decode(&bytes, PAGES as u64).unwrap(), sums);
        prop_assert!(Sums::decode(&bytes, PAGES as u64 + 64).is_err());
    }

    #[test]
    fn hostile_sums_never_panic_and_mean_one_thing_only(
        a in set(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in 0_usize..40,
        tail in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut bytes = sums_of(&runs_of(&a)).encode(PAGES as u64);
        bytes.truncate(bytes.len() - cut);
        bytes.extend(tail);
        for (at, byte) in changes {
            // Half of them into the header, where they do the most.
            let at = if byte % 2 == 0 { at.index(40.min(bytes.len())) } else { at.index(bytes.len()) };
            bytes[at] = byte;
        }
        if let Ok(sums) = Sums::decode(&bytes, PAGES as u64) {
            prop_assert_eq!(sums.encode(PAGES as u64), bytes);
        }
    }

    #[test]
    fn any_bytes_as_sums_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(Sums::decode(&bytes, PAGES as u64).is_err());
    }
}

#[test]
fn runs_close_to_each_other_are_bridged() {
    let run = |first, count| Run { first, count };
    assert_eq!(bridge(&[], 3), []);
    let runs = [run(1, 1), run(5, 2), run(11, 1), run(13, 1)];
    assert_eq!(bridge(&runs, 0), runs);
    assert_eq!(bridge(&runs, 3), [run(1, 6), run(11, 3)]);
    assert_eq!(bridge(&runs, 4), [run(1, 13)]);
}

#[test]
fn runs_that_are_empty_touch_overlap_descend_or_end_beyond_memory_are_refused() {
    let run = |first, count| Run { first, count };
    let mut sums = sums_of(&[run(0, 64)]);
    for (runs, good) in [
        (vec![run(0, 2), run(3, 1)], true),
        (vec![run(63, 1)], true),
        (vec![run(0, 0)], false),
        (vec![run(0, 2), run(3, 0)], false),
        (vec![run(0, 2), run(2, 1)], false),
        (vec![run(0, 2), run(1, 2)], false),
        (vec![run(9, 1), run(3, 1)], false),
        (vec![run(63, 2)], false),
        (vec![run(u64::from(u32::MAX), 1)], false),
        (vec![run(1, u64::from(u32::MAX))], false),
    ] {
        sums.runs = runs;
        assert_eq!(Sums::decode(&sums.encode(64), 64).is_ok(), good, "{:?}", sums.runs);
    }
}

#[test]
fn huge_counts_in_sums_are_refused() {
    let good = sums_of(&[Run { first: 0, count: 1 }]).encode(64);
    for (at, count) in [(24, u64::MAX), (32, u64::MAX), (24, 1 << 61), (32, 1 << 60), (24, 3), (24, 0)] {
        let mut bytes = good.clone();
        bytes[at..at + 8].copy_from_slice(&count.to_le_bytes());
        assert!(Sums::decode(&bytes, 64).is_err(), "{at} {count}");
    }
}

#[test]
fn a_checksum_is_that_of_the_named_pages_one_after_the_other() {
    let chunk: Vec<u8> = (0..64_u8).flat_map(|page| [page; 4096]).collect();
    let named = [&[0_u8; 4096][..], &[2; 4096], &[3; 4096], &[63; 4096]].concat();
    let sum = checksum(&chunk, 1 | 1 << 2 | 1 << 3 | 1 << 63);
    assert_eq!(sum, xxhash_rust::xxh3::xxh3_128(&named));
}

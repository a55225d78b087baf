use std::collections::BTreeSet;
use std::os::fd::FromRawFd;
use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;

const MIB: u64 = 1 << 20;
const PAGE: usize = 4096;

/// A file of zeroes that nobody else has.
fn file(length: u64) -> File {
    // SAFETY: the name is a C string that lives for the program's life.
    let fd = unsafe { libc::memfd_create(c"memory-test".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: the descriptor was made just now and nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(length).unwrap();
    file
}

/// New memory that shows what is given.
fn restore(
    size: u64,
    base: &File,
    diffs: &[Layer<'_>],
    huge_pages: HugePages,
) -> Result<GuestMemoryMmap, MemoryError> {
    let memory = create(size, huge_pages)?;
    show(&memory, base, diffs, huge_pages)?;
    Ok(memory)
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn all(memory: &GuestMemoryMmap) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(memory.iter().map(GuestMemoryRegion::len).sum::<u64>()).unwrap()];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

/// The runs of a set of pages.
fn runs_of(pages: &BTreeSet<u64>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(run) if run.first + run.count == *page => run.count += 1,
            _ => runs.push(Run { first: *page, count: 1 }),
        }
    }
    runs
}

/// Writes the pages of `runs` where they belong in `file`, as a snapshot does, and says how many bytes that were. Pages of
/// zeroes stay holes.
fn copy_out(memory: &GuestMemoryMmap, runs: &[Run], file: &File) -> u64 {
    file.set_len(size(memory)).unwrap();
    let mut written = 0;
    for page in pages_of(runs) {
        let offset = page * PAGE_SIZE;
        let gap = if offset < MMIO_GAP_START { 0 } else { MMIO_GAP_END - MMIO_GAP_START };
        let mut bytes = [0; PAGE];
        memory.read_slice(&mut bytes, GuestAddress(offset + gap)).unwrap();
        if bytes != [0; PAGE] {
            file.write_all_at(&bytes, offset).unwrap();
            written += PAGE_SIZE;
        }
    }
    written
}

fn pages_of(runs: &[Run]) -> BTreeSet<u64> {
    runs.iter().flat_map(|run| run.first..run.first + run.count).collect()
}

#[test]
fn memory_begins_zeroed_and_only_what_is_written_counts() {
    let memory = create(64 * MIB, HugePages::Never).unwrap();
    assert_eq!(resident_bytes(&memory).unwrap(), 0);
    memory.write_slice(b"guest", GuestAddress(32 * MIB)).unwrap();
    memory.write_slice(&[1; 2 * PAGE], GuestAddress(32 * MIB + 0x3800)).unwrap();
    assert_eq!(resident_bytes(&memory).unwrap(), 4 * PAGE_SIZE);
    let first = 32 * MIB / PAGE_SIZE;
    assert_eq!(written(&memory).unwrap(), [Run { first, count: 1 }, Run { first: first + 3, count: 3 }]);
    assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1234)).unwrap(), 0);
}

#[test]
fn huge_pages_are_a_hint_and_zeroes_are_not_copied() {
    let memory = create(4 * MIB, HugePages::WhenPossible).unwrap();
    memory.write_slice(b"guest", GuestAddress(3 * MIB)).unwrap();
    let runs = written(&memory).unwrap();
    assert!(pages_of(&runs).contains(&(3 * MIB / PAGE_SIZE)), "{runs:?}");
    let copy = file(0);
    assert_eq!(copy_out(&memory, &runs, &copy), PAGE_SIZE);
    assert_eq!(content(&copy), all(&memory));
    assert_eq!(copy.metadata().unwrap().blocks() * 512, PAGE_SIZE);
}

#[test]
fn impossible_sizes_are_refused_with_a_sentence() {
    for size in [0, 1, 4095, MIB + 1, u64::MAX, !4095] {
        let error = create(size, HugePages::Never).unwrap_err();
        assert!(matches!(error, MemoryError::Size(_)), "{size}: {error}");
    }
    let error = create(1 << 62, HugePages::Never).unwrap_err();
    assert!(error.to_string().contains("less memory"), "{error}");
}

#[test]
fn memory_above_the_gap_continues_the_file() {
    // Hardly anything is touched, so this costs address space only.
    let size = 4 << 30;
    let base = file(size);
    base.write_all_at(b"below", MMIO_GAP_START - 5).unwrap();
    base.write_all_at(b"above", MMIO_GAP_START).unwrap();
    let diff = file(size);
    diff.write_all_at(&[7; 2 * PAGE], MMIO_GAP_START + PAGE_SIZE).unwrap();
    let edge = MMIO_GAP_START / PAGE_SIZE;
    let read = |memory: &GuestMemoryMmap, address: u64| -> [u8; 5] {
        let mut bytes = [0; 5];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    };
    let memory = restore(size, &base, &[], HugePages::Never).unwrap();
    let regions: Vec<_> = memory.iter().map(|r| (r.start_addr().0, r.len())).collect();
    assert_eq!(regions, [(0, 3 << 30), (4 << 30, 1 << 30)]);
    assert_eq!(&read(&memory, MMIO_GAP_START - 5), b"below");
    assert_eq!(&read(&memory, MMIO_GAP_END), b"above");

    // One run across the gap: a page of zeroes on each side, then the sevens.
    let runs = [Run { first: edge - 1, count: 3 }];
    let memory = restore(size, &base, &[Layer { file: &diff, runs: &runs }], HugePages::Never).unwrap();
    assert_eq!(read(&memory, MMIO_GAP_START - 5), [0; 5]);
    assert_eq!(read(&memory, MMIO_GAP_END), [0; 5]);
    assert_eq!(read(&memory, MMIO_GAP_END + PAGE_SIZE), [7; 5]);
    assert_eq!(read(&memory, MMIO_GAP_END + 2 * PAGE_SIZE), [0; 5]);

    memory.write_slice(b"x", GuestAddress(MMIO_GAP_START - 1)).unwrap();
    memory.write_slice(b"y", GuestAddress(MMIO_GAP_END + 9)).unwrap();
    let now = written(&memory).unwrap();
    assert_eq!(now, [Run { first: edge - 1, count: 1 }, Run { first: edge, count: 1 }]);
    let copy = file(0);
    assert_eq!(copy_out(&memory, &[Run { first: edge - 1, count: 2 }], &copy), 2 * PAGE_SIZE);
    let mut bytes = [0; 11];
    copy.read_exact_at(&mut bytes, MMIO_GAP_START - 1).unwrap();
    assert_eq!(&bytes, b"x\0\0\0\0\0\0\0\0\0y");
}

#[test]
fn files_and_runs_that_do_not_fit_are_refused_with_what_to_do() {
    let size = 16 * PAGE_SIZE;
    let (base, diff) = (file(size), file(size));
    for length in [0, size - 1, size + 1, 2 * size] {
        let error = restore(size, &file(length), &[], HugePages::Never).unwrap_err();
        assert!(matches!(error, MemoryError::Length { layer: 0, found, .. } if found == length), "{error}");
        let short = file(length);
        let layers = [Layer { file: &diff, runs: &[] }, Layer { file: &short, runs: &[] }];
        let error = restore(size, &base, &layers, HugePages::Never).unwrap_err();
        assert!(matches!(error, MemoryError::Length { layer: 2, .. }), "{error}");
        assert!(error.to_string().contains("restore another snapshot"), "{error}");
    }
    let run = |first, count| Run { first, count };
    for (runs, bad) in [
        (vec![run(0, 0)], 0),
        (vec![run(16, 1)], 0),
        (vec![run(0, 17)], 0),
        (vec![run(u64::MAX, 1)], 0),
        (vec![run(1, u64::MAX)], 0),
        (vec![run(0, 4), run(3, 1)], 1),
        (vec![run(5, 1), run(0, 1)], 1),
        (vec![run(0, 1), run(1, 1), run(1, 1)], 2),
    ] {
        let error =
            restore(size, &base, &[Layer { file: &diff, runs: &runs }], HugePages::Never).unwrap_err();
        assert!(matches!(error, MemoryError::Runs { layer: 1, run } if run == bad), "{runs:?}: {error}");
    }
    let many = vec![run(0, 1); MAX_RUNS / 2 + 1];
    let layer = Layer { file: &diff, runs: &many };
    let error = restore(size, &base, &[layer, layer], HugePages::Never).unwrap_err();
    assert!(error.to_string().contains("compact it"), "{error}");
}

#[test]
fn as_many_runs_as_are_allowed_can_be_mapped() {
    let size = 2 * MAX_RUNS as u64 * PAGE_SIZE;
    let (base, diff) = (file(size), file(size));
    let runs: Vec<_> = (0..MAX_RUNS as u64).map(|i| Run { first: 2 * i, count: 1 }).collect();
    diff.write_all_at(b"last", (size / PAGE_SIZE - 2) * PAGE_SIZE).unwrap();
    let memory = restore(size, &base, &[Layer { file: &diff, runs: &runs }], HugePages::Never).unwrap();
    let mut bytes = [0; 4];
    memory.read_slice(&mut bytes, GuestAddress((size / PAGE_SIZE - 2) * PAGE_SIZE)).unwrap();
    assert_eq!(&bytes, b"last");
}

#[test]
fn memory_is_remapped_in_place_to_what_its_snapshots_have() {
    let pages = 32;
    let memory = create(pages * PAGE_SIZE, HugePages::Never).unwrap();
    memory.write_slice(&[1; 4 * PAGE], GuestAddress(0)).unwrap();
    let (base, diff) = (file(0), file(0));
    copy_out(&memory, &written(&memory).unwrap(), &base);
    let runs = [Run { first: 2, count: 3 }];
    memory.write_slice(&[2; 3 * PAGE], GuestAddress(2 * PAGE_SIZE)).unwrap();
    copy_out(&memory, &runs, &diff);
    let before = all(&memory);

    let layers = [Layer { file: &diff, runs: &runs }];
    let damaged = [Layer { file: &diff, runs: &[Run { first: pages, count: 1 }] }];
    assert!(matches!(show(&memory, &base, &damaged, HugePages::Never), Err(MemoryError::Runs { .. })));
    assert!(resident_bytes(&memory).unwrap() >= 5 * PAGE_SIZE);
    show(&memory, &base, &layers, HugePages::Never).unwrap();
    assert_eq!(resident_bytes(&memory).unwrap(), 0);
    assert_eq!(all(&memory), before);
    memory.write_slice(b"again", GuestAddress(3 * PAGE_SIZE)).unwrap();
    assert_eq!(written(&memory).unwrap(), [Run { first: 3, count: 1 }]);
    assert_eq!(content(&diff)[3 * PAGE], 2);
}

#[test]
fn a_forked_child_sees_what_its_parent_had_written() {
    let memory = restore(MIB, &file(MIB), &[], HugePages::Never).unwrap();
    memory.write_slice(b"before", GuestAddress(0x7000)).unwrap();
    let (copy, go) = (file(0), file(0));
    // SAFETY: the child only uses this test's own memory and files, and ends by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        while go.metadata().map_or(1, |m| m.len()) == 0 {
            std::thread::yield_now();
        }
        let runs = written(&memory).unwrap_or_default();
        let good = runs == [Run { first: 7, count: 1 }] && copy_out(&memory, &runs, &copy) > 0;
        // SAFETY: ends the child without running the parent's destructors.
        unsafe { libc::_exit(i32::from(!good)) };
    }
    memory.write_slice(b"after!", GuestAddress(0x7000)).unwrap();
    memory.write_slice(b"after!", GuestAddress(0x9000)).unwrap();
    go.set_len(1).unwrap();
    let mut status = 0;
    // SAFETY: waits for the child made above; the status lives here.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!((waited, status), (child, 0));
    assert_eq!(&content(&copy)[0x7000..0x7006], b"before");
    assert_eq!(content(&copy)[0x9000], 0);
}

/// What one snapshot of a chain wrote: page and byte that fills it (0 as often as others).
fn writes(pages: u64) -> impl Strategy<Value = Vec<(u64, u8)>> {
    prop::collection::vec((0..pages, 0_u8..4), 0..24)
}

fn write(memory: &GuestMemoryMmap, model: &mut [u8], writes: &[(u64, u8)]) -> BTreeSet<u64> {
    for (page, byte) in writes {
        let start = usize::try_from(*page).unwrap() * PAGE;
        memory.write_slice(&[*byte; PAGE], GuestAddress(page * PAGE_SIZE)).unwrap();
        model[start..start + PAGE].fill(*byte);
    }
    writes.iter().map(|(page, _)| *page).collect()
}

proptest! {
    #[test]
    fn the_layout_holds_all_memory_and_leaves_the_gap_free(pages in 1_u64..1 << 28) {
        let size = pages * PAGE_SIZE;
        let regions = layout(size);
        prop_assert_eq!(regions.iter().map(|(_, length)| length).sum::<u64>(), size);
        for (start, length) in regions {
            prop_assert!(length > 0);
            prop_assert!(start + length <= MMIO_GAP_START || start >= MMIO_GAP_END);
        }
    }

    /// A VM that boots, is snapshotted, goes on, is snapshotted again, and so on: each snapshot holds exactly what was
    /// written since the one before, the chain gives back all memory, and no snapshot changes once it is there.
    #[test]
    fn a_chain_of_snapshots_gives_back_what_was_written(
        pages in 1_u64..40,
        booted in writes(40),
        later in prop::collection::vec((writes(40), 1_usize..50), 0..4),
        reads in prop::collection::vec(0_u64..40, 0..8),
    ) {
        let size = pages * PAGE_SIZE;
        let within = |writes: Vec<(u64, u8)>| -> Vec<(u64, u8)> {
            writes.into_iter().filter(|(page, _)| *page < pages).collect()
        };
        let mut model = vec![0; usize::try_from(size).unwrap()];
        let memory = create(size, HugePages::Never).unwrap();
        let wrote = write(&memory, &mut model, &within(booted));
        let runs = written(&memory).unwrap();
        prop_assert_eq!(&runs, &runs_of(&wrote));
        let base = file(0);
        copy_out(&memory, &runs, &base);
        prop_assert_eq!(content(&base), model.clone());
        let frozen_base = content(&base);

        let mut diffs: Vec<(File, Vec<Run>, Vec<u8>)> = Vec::new();
        for (writes, most) in later {
            let layers: Vec<_> = diffs.iter().map(|(file, runs, _)| Layer { file, runs }).collect();
            let memory = restore(size, &base, &layers, HugePages::Never).unwrap();
            for page in reads.iter().filter(|page| **page < pages) {
                let _: u8 = memory.read_obj(GuestAddress(page * PAGE_SIZE)).unwrap();
            }
            let wrote = write(&memory, &mut model, &within(writes));
            let exact = written(&memory).unwrap();
            prop_assert_eq!(&exact, &runs_of(&wrote));
            prop_assert_eq!(resident_bytes(&memory).unwrap(), wrote.len() as u64 * PAGE_SIZE);
            let runs = join_runs(exact, most);
            let diff = file(0);
            let bytes = copy_out(&memory, &runs, &diff);
            prop_assert!(bytes <= pages_of(&runs).len() as u64 * PAGE_SIZE);
            prop_assert_eq!(all(&memory), model.clone());
            let frozen = content(&diff);
            diffs.push((diff, runs, frozen));
        }
        let layers: Vec<_> = diffs.iter().map(|(file, runs, _)| Layer { file, runs }).collect();
        let memory = restore(size, &base, &layers, HugePages::WhenPossible).unwrap();
        prop_assert_eq!(all(&memory), model);
        memory.write_slice(&vec![0xff; usize::try_from(size).unwrap()], GuestAddress(0)).unwrap();
        prop_assert_eq!(content(&base), frozen_base);
        for (file, _, frozen) in &diffs {
            prop_assert_eq!(&content(file), frozen);
        }
    }

    #[test]
    fn joined_runs_hold_all_pages_in_order_and_are_few(
        pages in prop::collection::btree_set(0_u64..2000, 0..200),
        most in 0_usize..60,
    ) {
        let runs = runs_of(&pages);
        let joined = join_runs(runs.clone(), most);
        prop_assert!(joined.len() <= most.max(1));
        prop_assert!(pages_of(&joined).is_superset(&pages));
        prop_assert!(check_runs(1, &joined, 2000).is_ok());
        if runs.len() <= most {
            prop_assert_eq!(joined, runs);
        }
    }

    #[test]
    fn runs_are_taken_exactly_when_they_ascend_within_the_memory(
        runs in prop::collection::vec((0_u64..12, 0_u64..4), 0..4),
    ) {
        let runs: Vec<Run> = runs.into_iter().map(|(first, count)| Run { first, count }).collect();
        let pages = pages_of(&runs);
        let good = runs.iter().all(|run| run.count > 0)
            && runs.is_sorted_by_key(|run| run.first)
            && pages.len() as u64 == runs.iter().map(|run| run.count).sum::<u64>()
            && pages.iter().all(|page| *page < 10);
        prop_assert_eq!(check_runs(1, &runs, 10).is_ok(), good);
    }
}

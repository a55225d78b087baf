//! Chains of diffs against a model of the guest's memory.

use std::fs;
use std::path::Path;

use ark_hal::memory::Run;
use ark_types::vmm::{MAX_CHAIN, SnapshotBase};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{
    MIB, STATE_BYTES, about, chain_of_two, content, map, refused, replace, scratch, shown, take, zeroed,
};
use crate::snapshot::{
    Chain, Draft, MANIFEST, MAX_MAPPINGS, Scope, SnapshotError, compact, files, manifest, verify,
};

/// Bytes the guest writes: where, how many, which.
type Write = (u64, usize, u8);

fn writes() -> impl Strategy<Value = Vec<Write>> {
    let write =
        (0..MIB - 20_000, prop_oneof![1_usize..10, 4096_usize..20_000], prop_oneof![Just(0_u8), any::<u8>()]);
    proptest::collection::vec(write, 0..8)
}

fn apply(writes: &[Write], memory: &GuestMemoryMmap, model: &mut [u8]) {
    for (at, length, byte) in writes {
        memory.write_slice(&vec![*byte; *length], GuestAddress(*at)).unwrap();
        let at = usize::try_from(*at).unwrap();
        model[at..at + length].fill(*byte);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_chain_is_the_memory_that_was_written(steps in proptest::collection::vec(writes(), 1..6)) {
        let scratch = scratch();
        let mut model = vec![0; usize::try_from(MIB).unwrap()];
        let mut memory = zeroed(MIB);
        let mut last = None;
        for (number, writes) in steps.iter().enumerate() {
            apply(writes, &memory, &mut model);
            let dir = scratch.path().join(number.to_string());
            let base = last.as_ref().map(|(dir, written): &(std::path::PathBuf, _)| (dir.as_path(), *written));
            let written = take(&dir, &memory, base);
            prop_assert_eq!(written.base, base.map(|(_, written)| written.id));
            // What was taken does not hear of what its VM writes later.
            memory.write_slice(&[0xee; 4096], GuestAddress(0)).unwrap();
            let chain = Chain::open(&dir).unwrap();
            prop_assert_eq!(chain.layers().diffs.len(), number);
            prop_assert_eq!(chain.state(), STATE_BYTES);
            memory = shown(&chain);
            prop_assert!(content(&memory, MIB) == model);
            last = Some((dir, written));
        }
        let (dir, written) = last.unwrap();
        prop_assert_eq!(verify(&dir, Scope::WholeChain).unwrap().snapshots, steps.len());

        let out = scratch.path().join("compact");
        let compacted = compact(&dir, &out).unwrap();
        prop_assert_eq!(compacted.base, None);
        prop_assert_ne!(compacted.id, written.id);
        let chain = Chain::open(&out).unwrap();
        prop_assert!(content(&shown(&chain), MIB) == model);
        prop_assert_eq!(chain.state(), STATE_BYTES);
        let before = Chain::open(&dir).unwrap();
        prop_assert_eq!(&chain.manifest().labels, &before.manifest().labels);
        prop_assert_eq!(chain.manifest().created_unix_ms, before.manifest().created_unix_ms);
        let non_zero = model.chunks(4096).filter(|page| page.iter().any(|byte| *byte != 0)).count();
        prop_assert_eq!(compacted.written_bytes, non_zero as u64 * 4096);
        verify(&out, Scope::WholeChain).unwrap();
    }
}

#[test]
fn memory_above_the_gap_is_part_of_it() {
    let scratch = scratch();
    let (full, diff, out) =
        (scratch.path().join("full"), scratch.path().join("diff"), scratch.path().join("out"));
    let above = GuestAddress(4 << 30);
    let below = GuestAddress((3 << 30) - 4);
    let memory = zeroed((3 << 30) + MIB);
    memory.write_slice(b"over", below).unwrap();
    memory.write_slice(b"there", above).unwrap();
    let written = take(&full, &memory, None);
    assert_eq!(written.written_bytes, 2 * 4096);
    let memory = map(&full);
    // Neighbours in the file, not for the guest.
    memory.write_slice(b"T", above).unwrap();
    memory.write_slice(b"O", below).unwrap();
    take(&diff, &memory, Some((&full, written)));
    compact(&diff, &out).unwrap();
    for dir in [&diff, &out] {
        verify(dir, Scope::WholeChain).unwrap();
        let memory = map(dir);
        let (mut low, mut high) = ([0; 4], [0; 5]);
        memory.read_slice(&mut low, below).unwrap();
        memory.read_slice(&mut high, above).unwrap();
        assert_eq!((&low, &high), (b"Over", b"There"));
    }
}

#[test]
fn scattered_pages_are_joined_so_that_a_diff_maps_fast() {
    let scratch = scratch();
    let (full, diff) = (scratch.path().join("full"), scratch.path().join("diff"));
    let bytes = 128 * MIB;
    let booted = zeroed(bytes);
    (0..bytes / 4096).for_each(|page| booted.write_obj(page, GuestAddress(page * 4096)).unwrap());
    let written = take(&full, &booted, None);
    let memory = map(&full);
    // Too far from each other to be bridged without need.
    (0..6000).for_each(|n| memory.write_obj(!n, GuestAddress((n * 5 + n / 100 % 3) * 4096)).unwrap());
    take(&diff, &memory, Some((&full, written)));
    let chain = Chain::open(&diff).unwrap();
    assert!(chain.layers().diffs[0].runs.len() <= 4096);
    assert!(content(&map(&diff), bytes) == content(&memory, bytes));
}

#[test]
fn a_diff_that_could_not_be_mapped_becomes_a_full_snapshot() {
    let scratch = scratch();
    let full = scratch.path().join("full");
    let bytes = 200 * MIB;
    let written = take(&full, &zeroed(bytes), None);
    let base = SnapshotBase { id: written.id, path: full };
    let draft = Draft::begin(&scratch.path().join("next"), about(), None).unwrap();
    let scattered =
        |count: usize| -> Vec<Run> { (0..count as u64).map(|n| Run { first: 2 * n, count: 1 }).collect() };
    assert!(draft.fits(&base, &scattered(MAX_MAPPINGS), bytes));
    assert!(!draft.fits(&base, &scattered(MAX_MAPPINGS + 1), bytes));
    assert!(!draft.fits(&base, &scattered(1), bytes + MIB));
}

#[test]
fn a_chain_ends_before_it_is_too_long_to_be_opened() {
    let scratch = scratch();
    let mut memory = zeroed(MIB);
    let mut last: Option<(std::path::PathBuf, _)> = None;
    let mut longest = 0;
    for number in 0..=MAX_CHAIN {
        memory.write_obj(number, GuestAddress(number as u64 * 4096)).unwrap();
        let dir = scratch.path().join(number.to_string());
        let written = take(&dir, &memory, last.as_ref().map(|(dir, written)| (dir.as_path(), *written)));
        let chain = Chain::open(&dir).unwrap();
        longest = longest.max(1 + chain.layers().diffs.len());
        memory = shown(&chain);
        assert!((0..=number).all(|n| memory.read_obj::<usize>(GuestAddress(n as u64 * 4096)).unwrap() == n));
        last = Some((dir, written));
    }
    assert_eq!(longest, MAX_CHAIN - 1);
}

#[test]
fn a_base_that_is_gone_or_another_is_refused_and_a_fork_of_it_is_written_in_full() {
    let scratch = scratch();
    let (full, diff) = chain_of_two(scratch.path());
    let chain = Chain::open(&full).unwrap();
    let base = Some(SnapshotBase { id: chain.manifest().id, path: full.clone() });
    let fork = shown(&chain);
    fork.write_slice(b"fork", GuestAddress(5)).unwrap();

    let away = scratch.path().join("away");
    fs::rename(&full, &away).unwrap();
    let error = refused(&diff);
    assert!(
        matches!(error, SnapshotError::Base { .. }) && error.to_string().contains("does not exist"),
        "{error}"
    );
    // Another one in its place: of the same size, valid, and wrong.
    take(&full, &zeroed(2 * MIB), None);
    let error = refused(&diff);
    assert!(matches!(error, SnapshotError::OtherBase { .. }), "{error}");

    // The fork still has its base mapped.
    let next = scratch.path().join("next");
    let written = Draft::begin(&next, about(), base).unwrap().write(&fork, STATE_BYTES).unwrap();
    assert_eq!(written.base, None);
    assert!(content(&map(&next), 2 * MIB) == content(&fork, 2 * MIB));

    fs::remove_dir_all(&full).unwrap();
    fs::rename(&away, &full).unwrap();
    Chain::open(&diff).unwrap();
}

/// Changes a manifest and seals it again.
fn rewrite(dir: &Path, change: impl FnOnce(&mut ark_types::vmm::SnapshotManifest)) {
    let mut manifest = manifest::read(dir).unwrap();
    change(&mut manifest);
    let text = serde_json::to_string(&manifest).unwrap();
    let seal = files::digest(text.as_bytes());
    replace(&dir.join(MANIFEST), format!("{{\"seal\":\"{seal}\",\"manifest\":{text}}}\n").as_bytes());
}

#[test]
fn a_circle_of_bases_and_bases_of_another_shape_are_refused() {
    let scratch = scratch();
    let (full, diff) = chain_of_two(scratch.path());
    let id = manifest::read(&diff).unwrap().id;
    rewrite(&full, |manifest| manifest.base = Some(SnapshotBase { id, path: diff.clone() }));
    assert!(matches!(refused(&diff), SnapshotError::TooLong { .. }));
    rewrite(&full, |manifest| {
        manifest.base = None;
        manifest.vcpus = 1;
    });
    assert!(refused(&diff).to_string().contains("another number of processors"));
    rewrite(&diff, |manifest| {
        manifest.base = manifest.base.clone().map(|base| SnapshotBase { path: "full".into(), ..base });
    });
    assert!(refused(&diff).to_string().contains("absolute"));
}

#[test]
fn damage_is_not_compacted_away() {
    let scratch = scratch();
    let (full, diff) = chain_of_two(scratch.path());
    let path = full.join("memory");
    let mut bytes = fs::read(&path).unwrap();
    bytes[5 * 4096] ^= 1;
    replace(&path, &bytes);
    let out = scratch.path().join("out");
    assert!(matches!(compact(&diff, &out).unwrap_err(), SnapshotError::Damaged { .. }));
    assert!(!out.exists() && !scratch.path().join("out.tmp").exists());
}

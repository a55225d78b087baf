//! The store over directories that look like snapshots, with a shell script for `ark-vmm`.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use ark_types::layout::StateDir;
use ark_types::snapshot::SnapshotKind;
use ark_types::vmm::{MAX_CHAIN, SnapshotId};

use super::*;

/// A state directory, and a program that stands in for `ark-vmm`.
struct World {
    scratch: tempfile::TempDir,
}

/// Proves what has the word `good` in its memory, counts its proofs, and compacts by writing a full snapshot with id 99.
const VMM: &str = r#"#!/bin/sh
here=$(dirname "$0")
case "$1" in
verify)
    echo "$2" >>"$here/proofs"
    grep -q good "$2/memory" && exit 0
    echo "ark-vmm: $2/memory is damaged: chunk 0; take it again" >&2
    exit 23 ;;
compact)
    test -e "$here/full" && { echo "ark-vmm: no space for $3: No space left on device (os error 28)" >&2; mkdir "$3.tmp"; exit 21; }
    mkdir "$3" && cp "$2"/* "$3" && rm -f "$3/record.json" && cp "$here/compacted" "$3/manifest.json" ;;
esac
"#;

fn id(n: u8) -> SnapshotId {
    SnapshotId([n; 16])
}

fn manifest(n: u8, base: Option<(u8, &Path)>) -> String {
    let base = base.map(|(n, path)| serde_json::json!({ "id": id(n), "path": path }));
    let mut manifest = serde_json::json!({
        "version": 1, "id": id(n), "created_unix_ms": n, "vcpus": 1, "memory_mib": 64,
        "processor": { "vendor": "v", "family": 1, "model": 1, "stepping": 1, "brand": "b" },
        "disks": [], "labels": { "image": "base", "image-digest": "sha256:0" },
        "state_bytes": 1, "state_sha256": "", "sums_bytes": 1, "sums_sha256": "", "written_bytes": 4096,
    });
    if let Some(base) = base {
        manifest["base"] = base;
    }
    serde_json::json!({ "seal": "", "manifest": manifest }).to_string()
}

/// Writes what looks like a snapshot.
fn write(dir: &Path, n: u8, base: Option<(u8, &Path)>) {
    fs::create_dir_all(dir).unwrap();
    for file in ["state", "sums", "memory"] {
        fs::write(dir.join(file), "good").unwrap();
    }
    fs::write(dir.join("manifest.json"), manifest(n, base)).unwrap();
}

fn record(name: &str) -> Record {
    Record {
        name: name.parse().unwrap(),
        agent_id: "0123456789abcdef".into(),
        agent: "a1".parse().unwrap(),
        image: "base".parse().unwrap(),
        image_digest: "sha256:0".into(),
        pause_us: 1,
        durable_us: 2,
        request: None,
    }
}

impl World {
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let vmm = scratch.path().join("ark-vmm");
        fs::write(&vmm, VMM).unwrap();
        fs::set_permissions(&vmm, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(scratch.path().join("compacted"), manifest(99, None)).unwrap();
        Self { scratch }
    }

    fn state(&self) -> StateDir {
        StateDir(self.scratch.path().join("state"))
    }

    fn open(&self) -> Store {
        let store = Store::open(&self.state(), self.scratch.path().join("ark-vmm")).unwrap();
        store.sweep();
        store
    }

    /// Directory number `n` of the store's own.
    fn dir(&self, n: u8) -> PathBuf {
        self.state().snapshots().join(id(n).to_string())
    }

    /// Takes in snapshot `n`, over `base`.
    fn take(&self, store: &Store, n: u8, base: Option<u8>, name: Option<&str>) -> Hold {
        let below = base.map(|base| (base, self.dir(base)));
        write(&self.dir(n), n, below.as_ref().map(|(n, dir)| (*n, dir.as_path())));
        store.adopt(&self.dir(n), name.map(record)).unwrap()
    }

    fn proofs(&self) -> usize {
        fs::read_to_string(self.scratch.path().join("proofs")).unwrap_or_default().lines().count()
    }
}

#[test]
fn what_was_named_is_there_after_a_restart_and_what_was_not_finished_is_gone() {
    let world = World::new();
    let store = world.open();
    drop(world.take(&store, 1, None, Some("one")));
    drop(world.take(&store, 2, Some(1), Some("two")));
    drop(store);
    let unfinished = world.state().snapshots().join("0.tmp");
    let unborn = world.state().snapshots().join("1");
    let template = world.state().templates().join("2");
    for dir in [&unfinished, &unborn, &template] {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("memory"), "half").unwrap();
    }
    let paused = world.state().paused().join("0123456789abcdef/begun");
    let torn = world.state().paused().join("00000000000000ab/0.tmp");
    for dir in [&paused, &torn] {
        fs::create_dir_all(dir).unwrap();
    }
    write(&world.dir(3), 3, None);

    let store = world.open();
    assert!(!unfinished.exists() && !unborn.exists() && !template.exists());
    assert!(paused.exists(), "a paused agent's directory is the agent's matter");
    assert!(!torn.parent().unwrap().exists(), "what its VMM was writing is not");
    assert!(!world.dir(3).exists(), "nobody goes on from a branch point of an earlier arkd");
    let [one, two] = <[_; 2]>::try_from(store.list()).unwrap();
    assert_eq!((one.name.as_ref(), one.kind, one.children, one.base), ("one", SnapshotKind::Full, 1, None));
    assert_eq!((two.name.as_ref(), two.kind, two.children), ("two", SnapshotKind::Diff, 0));
    assert_eq!(two.base.as_deref(), Some("snapshot one"));
    assert_eq!(store.find("two").unwrap().1, record("two"));
}

#[test]
fn a_damaged_one_is_listed_refused_with_the_reason_and_can_be_deleted() {
    let world = World::new();
    let store = world.open();
    let cases = [(1, "torn"), (2, "newer"), (3, "older"), (4, "bare"), (5, "odd")];
    for (n, name) in cases {
        drop(world.take(&store, n, None, Some(name)));
    }
    fs::write(world.dir(1).join("manifest.json"), "{").unwrap();
    for (n, version) in [(2, 2), (3, 0)] {
        let other = manifest(n, None).replace("\"version\":1", &format!("\"version\":{version}"));
        fs::write(world.dir(n).join("manifest.json"), other).unwrap();
    }
    fs::remove_file(world.dir(4).join("manifest.json")).unwrap();
    fs::write(world.dir(5).join("record.json"), "\u{0}").unwrap();
    let store = world.open();
    assert_eq!(store.list().len(), 4);
    for (name, why) in [
        ("torn", "damaged"),
        ("newer", "a newer release (format 2)"),
        ("older", "an older"),
        ("bare", "No such"),
    ] {
        assert_eq!(store.describe(name).unwrap().agent.as_ref(), "a1");
        let error = store.find(name).unwrap_err();
        assert!(
            matches!(error, SnapshotError::Unusable { .. }) && error.to_string().contains(why),
            "{error}"
        );
        assert!(matches!(store.reserve(&name.parse().unwrap()), Err(SnapshotError::NameTaken(_))));
        store.remove(name, false).unwrap();
        assert!(matches!(store.find(name), Err(SnapshotError::NotFound(_))));
    }
    assert!((1..=4).all(|n| !world.dir(n).exists()));
    assert!(world.dir(5).join("memory").exists(), "whose name it was cannot be told");
}

#[test]
fn a_branch_point_goes_with_its_last_guard_and_takes_along_what_was_there_for_it() {
    let world = World::new();
    let store = world.open();
    let bottom = world.take(&store, 1, None, None);
    let top = world.take(&store, 2, Some(1), None);
    drop(bottom);
    assert!(world.dir(1).exists(), "it is the base of one that is held");
    let again = top.clone();
    drop(top);
    assert!(world.dir(2).exists());
    assert_eq!(again.base().map(Hold::id), Some(id(1)));
    drop(again);
    assert!(!world.dir(2).exists() && !world.dir(1).exists());
}

#[test]
fn a_branch_point_stays_while_a_named_diff_is_over_it() {
    let world = World::new();
    let store = world.open();
    drop((world.take(&store, 1, None, None), world.take(&store, 2, Some(1), Some("kept"))));
    assert!(world.dir(1).exists());
    assert!(world.open().find("kept").is_ok(), "and it is there after a restart");
    store.remove("kept", false).unwrap();
    assert!(!world.dir(2).exists() && !world.dir(1).exists());
}

#[test]
fn what_is_needed_is_not_deleted_and_orphans_are_made_only_when_asked_for() {
    let world = World::new();
    let store = world.open();
    let base = world.take(&store, 1, None, Some("base"));
    let child = world.take(&store, 2, Some(1), Some("child"));
    let agents = [base.tenant(), base.tenant()];
    let error = store.remove("base", false).unwrap_err().to_string();
    assert!(error.starts_with("2 living agents go on from the snapshot base"), "{error}");
    assert_eq!(store.describe("base").unwrap().agents, 2);
    drop((agents, base));
    let error = store.remove("base", false).unwrap_err().to_string();
    assert!(error.contains("1 snapshot hold") && error.contains("--orphans"), "{error}");

    let agent = child.tenant();
    assert!(matches!(store.remove("base", true), Err(SnapshotError::Lived { agents: 1, .. })));
    drop((agent, child));
    store.remove("base", true).unwrap();
    assert!(!world.dir(1).exists());
    assert_eq!(store.list().len(), 1);
    let error = store.find("child").unwrap_err().to_string();
    assert!(error.contains("was deleted"), "{error}");
    assert!(matches!(store.remove("base", false), Err(SnapshotError::NotFound(_))));
}

#[test]
fn one_that_is_held_without_an_agent_goes_from_the_list_at_once_and_from_disk_with_its_guard() {
    let world = World::new();
    let store = world.open();
    let hold = world.take(&store, 1, None, Some("one"));
    store.remove("one", false).unwrap();
    assert!(store.list().is_empty() && world.dir(1).exists());
    drop(hold);
    assert!(!world.dir(1).exists());
}

#[test]
fn names_are_unique_while_taken_and_while_being_taken() {
    let world = World::new();
    let store = world.open();
    let name = "one".parse().unwrap();
    let reserved = store.reserve(&name).unwrap();
    assert!(matches!(store.reserve(&name), Err(SnapshotError::NameTaken(_))));
    drop(reserved);
    let reserved = store.reserve(&name).unwrap();
    let _hold = world.take(&store, 1, None, Some("one"));
    drop(reserved);
    assert!(matches!(store.reserve(&name), Err(SnapshotError::NameTaken(_))));
}

#[test]
fn a_draft_leaves_nothing_unless_it_was_adopted() {
    let world = World::new();
    let store = world.open();
    let draft = store.draft_at(world.dir(1));
    write(draft.dir(), 1, None);
    let half = world.state().snapshots().join(format!("{}.tmp", id(1)));
    fs::create_dir(&half).unwrap();
    drop(draft);
    assert!(!world.dir(1).exists() && !half.exists());

    let draft = store.draft_at(world.dir(2));
    let hold = world.take(&store, 2, None, None);
    drop(draft);
    assert!(world.dir(2).exists());
    // Another one with its id is refused, and so is a diff without its base.
    let draft = store.draft();
    write(draft.dir(), 2, None);
    assert!(matches!(store.adopt(draft.dir(), None), Err(SnapshotError::Unusable { .. })));
    let draft = store.draft();
    write(draft.dir(), 4, Some((3, &world.dir(3))));
    assert!(store.adopt(draft.dir(), None).unwrap_err().to_string().contains("was deleted"));
    assert!(matches!(store.hold(id(4)), Err(SnapshotError::NotFound(_))));
    assert_eq!(store.hold_dir(hold.dir()).unwrap().id(), id(2));
}

#[test]
fn a_paused_agents_snapshot_keeps_its_base_until_it_is_disposed_of() {
    let world = World::new();
    let store = world.open();
    let base = world.take(&store, 1, None, None);
    let dir = world.state().paused().join("0123456789abcdef/s");
    write(&dir, 2, Some((1, &world.dir(1))));
    drop((store.adopt(&dir, None).unwrap(), base));
    let store = world.open();
    assert!(dir.exists() && world.dir(1).exists());
    store.dispose(id(2));
    assert!(!dir.exists() && !world.dir(1).exists());
}

#[test]
fn a_chain_has_an_end() {
    let world = World::new();
    let store = world.open();
    let last = u8::try_from(MAX_CHAIN).unwrap();
    let holds: Vec<Hold> = (1..=last).map(|n| world.take(&store, n, (n > 1).then(|| n - 1), None)).collect();
    let too_high = last + 1;
    write(&world.dir(too_high), too_high, Some((last, &world.dir(last))));
    let error = store.adopt(&world.dir(too_high), None).unwrap_err().to_string();
    assert!(error.contains("compact"), "{error}");
    drop(holds);
    // A circle on disk is refused like any chain that is too long.
    write(&world.dir(50), 50, Some((51, &world.dir(51))));
    write(&world.dir(51), 51, Some((50, &world.dir(50))));
    let store = world.open();
    assert!(matches!(store.hold(id(50)), Err(SnapshotError::Unusable { .. })));
}

#[tokio::test]
async fn a_proof_holds_while_the_files_stay_and_who_asks_meanwhile_waits_for_it() {
    let world = World::new();
    let store = world.open();
    world.take(&store, 1, None, Some("one")).prove().await.unwrap();
    assert_eq!(world.proofs(), 0, "this host's own VMM has just written it");
    drop(world.take(&store, 2, Some(1), Some("two")));

    let store = world.open();
    let (hold, _) = store.find("two").unwrap();
    let asked: Vec<_> =
        (0..8).map(|_| hold.clone()).map(|hold| tokio::spawn(async move { hold.prove().await })).collect();
    for proof in asked {
        proof.await.unwrap().unwrap();
    }
    assert_eq!(world.proofs(), 2, "each link of the chain once");

    fs::write(world.dir(1).join("memory"), "evil").unwrap();
    let error = hold.prove().await.unwrap_err();
    assert!(matches!(error, SnapshotError::Unusable { .. }));
    assert!(error.to_string().ends_with("memory is damaged: chunk 0; take it again"), "{error}");
    hold.prove().await.unwrap_err();
    fs::write(world.dir(1).join("memory"), "good").unwrap();
    hold.prove().await.unwrap();
    assert_eq!(world.proofs(), 5);
    fs::remove_file(world.dir(2).join("sums")).unwrap();
    assert!(hold.prove().await.unwrap_err().to_string().contains("No such file"));
}

#[tokio::test]
async fn compacting_swaps_the_directory_under_the_name_and_keeps_the_old_one_for_who_needs_it() {
    let world = World::new();
    let store = world.open();
    let _base = world.take(&store, 1, None, None);
    let old = world.take(&store, 2, Some(1), Some("one"));
    fs::write(old.dir().join(crate::agent::RENEWALS_FILE), "7").unwrap();
    let after = store.compact("one").await.unwrap();
    assert_eq!((after.kind, after.base, after.id), (SnapshotKind::Full, None, id(99).to_string()));
    let (new, kept) = store.find("one").unwrap();
    assert_eq!(
        (fs::read_to_string(new.dir().join(crate::agent::RENEWALS_FILE)).unwrap().as_str(), kept),
        ("7", record("one"))
    );
    assert!(world.dir(2).exists() && !world.dir(2).join("record.json").exists());
    // A full one stays what it is.
    assert_eq!(store.compact("one").await.unwrap().id, id(99).to_string());
    let dir = old.dir().to_owned();
    drop(old);
    gone(&dir).await;
    assert_eq!(world.open().list().len(), 1);
}

#[tokio::test]
async fn a_full_disk_is_told_and_nothing_is_left() {
    let world = World::new();
    let store = world.open();
    let holds = [world.take(&store, 1, None, Some("base")), world.take(&store, 2, Some(1), Some("one"))];
    fs::write(world.scratch.path().join("full"), "").unwrap();
    let error = store.compact("one").await.unwrap_err();
    assert!(matches!(error, SnapshotError::DiskFull { .. }), "{error}");
    assert!(!error.to_string().contains("os error"), "{error}");
    assert_eq!(store.find("one").unwrap().0.id(), holds[1].id());
    for _ in 0..500 {
        if fs::read_dir(world.state().snapshots()).unwrap().count() == 2 {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("something is left");
}

#[test]
fn of_two_with_one_name_the_compacted_one_has_it() {
    let world = World::new();
    let store = world.open();
    let holds = [world.take(&store, 1, None, None), world.take(&store, 9, Some(1), Some("one"))];
    drop(world.take(&store, 3, None, Some("two")));
    fs::copy(world.dir(9).join("record.json"), world.dir(3).join("record.json")).unwrap();
    let again = world.open();
    assert_eq!(again.find("one").unwrap().0.id(), id(3));
    assert!(!world.dir(9).exists());
    drop(holds);
}

#[tokio::test]
async fn the_image_has_to_be_the_one_it_was_taken_with() {
    let world = World::new();
    let store = world.open();
    let hold = world.take(&store, 1, None, None);
    assert_eq!(hold.image(), Some(("base".parse().unwrap(), "sha256:0".to_owned())));
    let images = world.scratch.path().join("images");
    fs::create_dir(&images).unwrap();
    fs::write(images.join("base.erofs"), "").unwrap();
    let digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    let manifest = serde_json::json!({
        "manifest_version": 1, "name": "base", "digest": digest, "size": 0,
        "description": "d", "built_from": [], "created_unix": 0,
    });
    fs::write(images.join("base.json"), manifest.to_string()).unwrap();
    let models = crate::models::Models::open("/nonexistent".into(), "/nonexistent".into());
    let images = crate::images::Images::new(images);
    let error = hold.open_media(&images, &models).await.unwrap_err();
    assert!(matches!(error, SnapshotError::OtherImage { .. }), "{error}");
    let none = crate::images::Images::new("/nonexistent".into());
    assert!(matches!(hold.open_media(&none, &models).await, Err(SnapshotError::Image(_))));
}

/// Waits until `dir` was removed, beside the runtime.
async fn gone(dir: &Path) {
    for _ in 0..500 {
        if !dir.exists() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("{} is still there", dir.display());
}

#[tokio::test]
async fn what_is_held_before_the_first_sweep_stays_and_a_store_that_is_closed_removes_nothing() {
    let world = World::new();
    let dir = world.dir(1);
    write(&dir, 1, None);
    let store = Store::open(&world.state(), world.scratch.path().join("ark-vmm")).unwrap();
    let hold = store.hold(id(1)).unwrap();
    store.sweep();
    assert!(dir.exists());
    store.close();
    drop(hold);
    store.sweep();
    store.gone(std::slice::from_ref(&dir)).await;
    assert!(dir.exists(), "whoever goes on from it outlives this arkd");
    // The next one finds that nobody does.
    world.open();
    assert!(!dir.exists());
}

//! Snapshots by name: taken, restored, chained, compacted, removed.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ark_tests::{World, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A small file system of the test's own over `dir`; unmounted when dropped.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn mount(dir: &'a Path, size: &str) -> Self {
        std::fs::create_dir_all(dir).expect("a directory");
        let options = format!("size={size},mode=700");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(dir).status();
        assert!(mount.expect("mount runs").success(), "a small tmpfs can be mounted");
        Self(dir)
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

#[test]
fn a_snapshot_is_restored_while_its_source_still_runs_and_after_it_is_gone() {
    let world = World::new();
    world.create("a1");
    let _ = world.sh("a1", "echo one > /root/f").ok();
    let _ = world.ark(["snapshot", "a1", "s1"]).ok();
    let _ = world.sh("a1", "echo two > /root/f").ok();
    let _ = world.ark(["restore", "s1", "--name", "b1"]).ok();
    assert_eq!(world.sh("b1", "cat /root/f").ok().stdout, "one\n");
    assert_eq!(world.sh("a1", "cat /root/f").ok().stdout, "two\n");
    let _ = world.ark(["rm", "a1"]).ok();
    world.end_daemon(Signal::SIGTERM);
    let _ = world.ark(["restore", "s1", "--name", "b2"]).ok();
    assert_eq!(world.sh("b2", "cat /root/f").ok().stdout, "one\n");
    world.ark(["snapshot", "b2", "s1"]).exits(125).complains_about(&["s1"]);
    world.end();
}

#[test]
fn diffs_chain_compact_and_are_not_orphaned_unasked() {
    let world = World::new();
    world.create("a1");
    let _ = world.ark(["snapshot", "a1", "s1"]).ok();
    let _ = world.ark(["restore", "s1", "--name", "a2"]).ok();
    let _ = world.sh("a2", "echo two > /root/f").ok();
    let _ = world.ark(["snapshot", "a2", "s2"]).ok();
    let list = world.ark(["snapshots", "--json"]).ok().json();
    let find = |list: &serde_json::Value, name: &str| {
        let all = list["snapshots"].as_array().expect("snapshots").clone();
        all.into_iter().find(|s| s["name"] == name).expect("it is listed")
    };
    let (full, diff) = (find(&list, "s1"), find(&list, "s2"));
    assert_eq!((full["kind"].as_str(), diff["kind"].as_str()), (Some("full"), Some("diff")));
    assert!(diff["bytes"].as_u64() < full["bytes"].as_u64(), "{list}");
    for name in ["a1", "a2"] {
        let _ = world.ark(["rm", name]).ok();
    }
    world.ark(["snapshot", "rm", "s1"]).exits(125).complains_about(&["s1", "compact"]);
    let _ = world.ark(["snapshot", "compact", "s2"]).ok();
    let _ = world.ark(["snapshot", "rm", "s1"]).ok();
    assert_eq!(find(&world.ark(["snapshots", "--json"]).ok().json(), "s2")["kind"], "full");
    let _ = world.ark(["restore", "s2", "--name", "a3"]).ok();
    assert_eq!(world.sh("a3", "cat /root/f").ok().stdout, "two\n");
    world.ark(["snapshot", "rm", "s2"]).exits(125).complains_about(&["s2"]);
    let _ = world.ark(["rm", "a3"]).ok();
    let _ = world.ark(["snapshot", "rm", "s2"]).ok();
    assert_eq!(world.stored("snapshots").len(), 0);
    world.end();
}

#[test]
fn an_orphan_that_was_asked_for_is_refused_with_a_sentence() {
    let world = World::new();
    world.create("a1");
    let _ = world.ark(["snapshot", "a1", "s1"]).ok();
    let _ = world.ark(["restore", "s1", "--name", "a2"]).ok();
    let _ = world.ark(["snapshot", "a2", "s2"]).ok();
    for name in ["a1", "a2"] {
        let _ = world.ark(["rm", name]).ok();
    }
    let _ = world.ark(["snapshot", "rm", "s1", "--orphans"]).ok();
    world.ark(["restore", "s2"]).exits(125).complains_about(&["snapshot", "deleted"]);
    assert_eq!(world.vmms(), []);
    let _ = world.ark(["snapshot", "rm", "s2"]).ok();
    world.end();
}

#[test]
fn a_full_disk_leaves_the_agent_running_and_nothing_half_written() {
    let world = World::new();
    let state = world.path().join("state");
    let small = Small::mount(&state, "24m");
    world.create("a1");
    let _ = world.sh("a1", "head -c 60000000 /dev/urandom > /root/noise").ok();
    for line in [&["snapshot", "a1", "s1"][..], &["fork", "a1"], &["pause", "a1"]] {
        world.ark(line.iter().copied()).exits(125).complains_about(&["space"]);
        assert_eq!(world.state("a1"), "running");
        for kind in ["snapshots", "paused"] {
            assert_eq!(world.stored(kind).len(), 0, "{line:?}");
        }
    }
    assert_eq!(world.sh("a1", "echo alive").ok().stdout, "alive\n");
    world.stop();
    drop(small);
    world.end();
}

#[test]
fn a_directory_edited_by_hand_is_refused() {
    let world = World::new();
    world.create("a1");
    let _ = world.ark(["snapshot", "a1", "s1"]).ok();
    world.stop();
    let dir = world.stored("snapshots").remove(0);
    let manifest = dir.join("manifest.json");
    let text = std::fs::read_to_string(&manifest).expect("readable");
    for (from, to) in [
        ("\"version\":1", "\"version\":2"),
        ("\"version\":1", "\"version\":0"),
        ("\"memory_mib\":128", "\"memory_mib\":256"),
        ("\"vendor\":\"", "\"vendor\":\"X"),
    ] {
        assert!(text.contains(from), "{text}");
        std::fs::write(&manifest, text.replace(from, to)).expect("writable");
        world.ark(["restore", "s1"]).exits(125).complains_about(&["snapshot"]);
        assert_eq!(world.vmms(), []);
    }
    std::fs::write(&manifest, &text).expect("writable");
    std::fs::remove_file(dir.join("memory")).expect("it is there");
    world.ark(["restore", "s1"]).exits(125).complains_about(&["memory"]);
    assert_eq!(world.vmms(), []);
    world.end();
}

#[test]
fn a_vmm_killed_while_its_snapshot_is_written_leaves_no_snapshot() {
    let world = World::new();
    world.create("a1");
    let _ = world.sh("a1", "head -c 60000000 /dev/urandom > /root/noise").ok();
    let vmm = world.vmms()[0].pid;
    let taking = world.start(["snapshot", "a1", "s1"]);
    eventually("it is being written", Duration::from_secs(60), || !world.stored("snapshots").is_empty());
    kill(Pid::from_raw(vmm), Signal::SIGKILL).expect("it is there");
    let said = taking.wait();
    let list = world.ark(["snapshots", "--json"]).ok().json();
    if said.code == 0 {
        assert_eq!(list["snapshots"].as_array().map(Vec::len), Some(1));
        let _ = world.ark(["snapshot", "rm", "s1"]).ok();
    } else {
        said.exits(125).complains_about(&["a1"]);
        assert_eq!(list["snapshots"].as_array().map(Vec::len), Some(0));
    }
    eventually("nothing is left", Duration::from_secs(20), || world.stored("snapshots").is_empty());
    world.end();
}

#[test]
fn a_daemon_killed_while_a_snapshot_is_written_leaves_a_whole_one_or_none() {
    let world = World::new();
    world.create("a1");
    let _ = world.sh("a1", "head -c 60000000 /dev/urandom > /root/noise").ok();
    let taking = world.start(["snapshot", "a1", "s1"]);
    eventually("it is being written", Duration::from_secs(60), || !world.stored("snapshots").is_empty());
    world.end_daemon(Signal::SIGKILL);
    let _ = taking.wait();
    let list = world.ark(["snapshots", "--json"]).ok().json();
    match list["snapshots"].as_array().map(Vec::len) {
        Some(0) => assert_eq!(world.stored("snapshots").len(), 0),
        _ => drop(world.ark(["restore", "s1"]).ok()),
    }
    world.end();
}

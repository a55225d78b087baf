//! What goes wrong with snapshots and forks elsewhere: one test for each hazard that was seen in a peer's tracker.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use ark_tests::{World, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// A check of a receipt.
fn check<'a>(receipt: &'a Value, kind: &str) -> &'a Value {
    let checks = receipt["checks"].as_array().expect("checks");
    checks.iter().find(|c| c["check"] == kind).unwrap_or_else(|| panic!("no check {kind} in {receipt}"))
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs()
}

fn sha256(path: &Path) -> String {
    let out = Command::new("sha256sum").arg(path).output().expect("sha256sum runs");
    assert!(out.status.success());
    String::from_utf8_lossy(&out.stdout).split_whitespace().next().expect("a sum").to_owned()
}

#[test]
fn hazard_1_the_clock_is_not_the_snapshots() {
    let world = World::new();
    world.create("a1");
    // As far off as a host's clock can be stepped between snapshot and restore.
    let _ = world.sh("a1", "date -s @1000000000").ok();
    let _ = world.ark(["snapshot", "a1", "s1"]).ok();
    let _ = world.ark(["restore", "s1", "--name", "a2"]).ok();
    let seen: u64 = world.sh("a2", "date +%s").ok().stdout.trim().parse().expect("seconds");
    assert!(seen.abs_diff(now()) < 5, "{seen} is not {}", now());
    assert_eq!(check(&world.receipt("a2"), "clock")["passed"], true);
    world.end();
}

#[test]
fn hazard_2_forks_share_no_random_state() {
    let world = World::new();
    world.create_fork("python", "a1");
    let _ = world.ark(["eval", "--agent", "a1", "import random; random.random()"]).ok();
    let mut kernel = HashSet::new();
    let mut interpreter = HashSet::new();
    for name in world.fork("a1", 3).iter().map(String::as_str).chain(["a1"]) {
        let said = world.sh(name, "head -c 16 /dev/urandom | md5sum").ok().stdout;
        assert!(kernel.insert(said.clone()), "{name}: {said}");
        let said = world.ark(["eval", "--agent", name, "random.random()"]).ok().stdout;
        assert!(interpreter.insert(said.clone()), "{name}: {said}");
        // The kernel itself says that it saw the new generation id; a1 is a fork of its template.
        let log = world.sh(name, "dmesg").ok().stdout;
        assert!(log.contains("crng reseeded due to virtual machine fork"), "{name}: {log}");
    }
    world.end();
}

#[test]
fn hazard_2_a_reseed_that_fails_is_no_success() {
    let world = World::new();
    world.create_fork("python", "a1");
    let sabotage = "import random\ndef refuse(*_): raise RuntimeError('no seed')\nrandom.seed = refuse";
    let _ = world.ark(["eval", "--agent", "a1", sabotage]).ok();
    world.ark(["fork", "a1"]).exits(125).complains_about(&["fork", "not reseeded"]);
    assert_eq!(world.vmms().len(), 1);
    assert_eq!(world.sh("a1", "echo alive").ok().stdout, "alive\n");
    world.end();
}

#[test]
fn hazard_3_forks_share_no_hostname_machine_id_or_boot_id() {
    let world = World::new();
    world.create("a1");
    let forks = world.fork("a1", 2);
    let line = "hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id";
    let mut seen = HashSet::new();
    for name in forks.iter().map(String::as_str).chain(["a1"]) {
        let said = world.sh(name, line).ok().stdout;
        let words: Vec<&str> = said.lines().collect();
        assert_eq!(words.len(), 3, "{said}");
        assert_eq!(words[0], name);
        for word in words {
            assert!(seen.insert(word.to_owned()), "{name} shares {word}");
        }
    }
    world.end();
}

#[test]
fn hazard_4_a_transmit_in_flight_does_not_hang_the_guests_traffic() {
    let world = World::new();
    world.create("a1");
    // Read all the while, so that there is always something on its way.
    let noise = world.start(["exec", "a1", "--", "sh", "-c", "yes | head -c 400000000"]);
    std::thread::sleep(Duration::from_secs(1));
    let names = ["s1", "s2", "s3"];
    for name in names {
        let _ = world.ark(["snapshot", "a1", name]).ok();
    }
    drop(noise);
    for name in names {
        let _ = world.ark(["restore", name, "--name", &format!("of-{name}")]).ok();
        let said = world.sh(&format!("of-{name}"), "yes | head -c 3000000").ok();
        assert_eq!(said.bytes.len(), 3_000_000);
    }
    world.end();
}

#[test]
fn hazard_5_vsock_lives_after_a_restore_for_more_than_one_request() {
    let world = World::new();
    world.create("a1");
    let forks = world.fork("a1", 2);
    for name in &forks {
        for i in 0..5 {
            assert_eq!(world.sh(name, &format!("echo {i}")).ok().stdout, format!("{i}\n"));
        }
        let many: Vec<_> = (0..8).map(|_| world.start(["exec", name, "--", "sh", "-c", "sleep 1"])).collect();
        many.into_iter().for_each(|one| drop(one.wait().ok()));
        eventually("the guest is heard", Duration::from_secs(20), || {
            world.inspect(name)["heartbeat"].is_object()
        });
    }
    world.end();
}

#[test]
fn hazard_6_no_write_lands_in_a_file_that_another_vm_has_mapped() {
    let world = World::new();
    world.create("a1");
    let _ = world.sh("a1", "echo parent > /root/mark").ok();
    let _ = world.ark(["snapshot", "a1", "s1"]).ok();
    let memory: Vec<PathBuf> = world.stored("snapshots").iter().map(|dir| dir.join("memory")).collect();
    assert_eq!(memory.len(), 1);
    let before = sha256(&memory[0]);
    for name in ["b1", "b2"] {
        let _ = world.ark(["restore", "s1", "--name", name]).ok();
    }
    let _ = world.sh("b1", "echo child > /root/mark; head -c 20000000 /dev/urandom > /root/noise").ok();
    let _ = world.ark(["snapshot", "b1", "s2"]).ok();
    assert_eq!(sha256(&memory[0]), before);
    assert_eq!(world.sh("b2", "cat /root/mark; ls /root").ok().stdout, "parent\nmark\n");
    let _ = world.ark(["restore", "s2", "--name", "b3"]).ok();
    assert_eq!(world.sh("b3", "cat /root/mark; wc -c < /root/noise").ok().stdout, "child\n20000000\n");
    world.end();
}

#[test]
fn hazard_7_the_source_keeps_its_connections() {
    let world = World::new();
    world.create("a1");
    let line = "i=0; while [ $i -lt 60 ]; do echo $i; i=$((i+1)); sleep 0.1; done";
    let stream = world.start(["exec", "a1", "--", "sh", "-c", line]);
    std::thread::sleep(Duration::from_secs(1));
    let _ = world.fork("a1", 2);
    let _ = world.ark(["snapshot", "a1", "s1"]).ok();
    let said = stream.wait().ok().stdout;
    let all: Vec<String> = (0..60).map(|i| i.to_string()).collect();
    assert_eq!(said.lines().collect::<Vec<_>>(), all);
    world.end();
}

#[test]
fn hazard_8_secrets_stay_with_the_parent() {
    let world = World::new();
    let create = ["create", "--image", "base", "--name", "a1", "--memory", "128", "--env", "TOKEN=hush"];
    let _ = world.ark(create).ok();
    let _ = world.sh("a1", "mkdir -p /run/secrets/x && echo hush > /run/secrets/x/token").ok();
    assert_eq!(world.sh("a1", "echo $TOKEN").ok().stdout, "hush\n");
    let forks = world.fork("a1", 1);
    let seen = world.sh(&forks[0], "echo \"[$TOKEN]\"; find /run/secrets ! -type d").ok().stdout;
    assert_eq!(seen, "[]\n");
    assert_eq!(world.sh("a1", "cat /run/secrets/x/token").ok().stdout, "hush\n");
    assert_eq!(check(&world.receipt(&forks[0]), "secrets")["passed"], true);
    world.end();
}

#[test]
fn hazard_9_a_dead_fork_is_failed_and_not_replaced() {
    let world = World::new();
    world.create("a1");
    let before: HashSet<i32> = world.vmms().iter().map(|p| p.pid).collect();
    let forks = world.fork("a1", 1);
    let vmm = world.vmms().into_iter().find(|p| !before.contains(&p.pid)).expect("the fork's VMM").pid;
    kill(Pid::from_raw(vmm), Signal::SIGKILL).expect("it is there");
    world.wait_for_state(&forks[0], "failed");
    world.sh(&forks[0], "true").exits(125).complains_about(&[&forks[0], "failed", "killed"]);
    assert_eq!(world.vmms().len(), 1);
    world.end();
}

#[test]
fn hazard_10_nothing_is_orphaned_by_a_killed_daemon() {
    let world = World::new().with_pool(2, 1);
    world.create_fork("base", "a1");
    let forks = world.fork("a1", 2);
    eventually("VMMs are prepared", Duration::from_secs(60), || world.vmms().len() >= 5);
    world.end_daemon(Signal::SIGKILL);
    let left = world.ark(["ps", "--json"]).ok().json();
    assert_eq!(left["agents"].as_array().map(Vec::len), Some(3), "{left}");
    // What is there beside the agents belongs to the new daemon's pool.
    eventually("the pool's VMMs are its own", Duration::from_secs(60), || world.vmms().len() <= 6);
    for name in forks.iter().map(String::as_str).chain(["a1"]) {
        let _ = world.sh(name, "true").ok();
        let _ = world.ark(["rm", name]).ok();
    }
    eventually("no branch point is left", Duration::from_secs(20), || {
        world.stored("snapshots") == Vec::<PathBuf>::new()
    });
    world.end();
}

#[test]
fn hazard_11_a_damaged_snapshot_is_refused() {
    let world = World::new();
    world.create("a1");
    let _ = world.ark(["snapshot", "a1", "s1"]).ok();
    world.stop();
    let dir = world.stored("snapshots").remove(0);
    for file in ["memory", "state", "sums", "manifest.json"] {
        let path = dir.join(file);
        let whole = std::fs::read(&path).expect("readable");
        let mut flipped = whole.clone();
        let at = flipped.iter().rposition(|b| *b != 0).expect("some content") / 2;
        let at = flipped[at..].iter().position(|b| *b != 0).expect("content") + at;
        flipped[at] ^= 4;
        for (damage, bytes) in [("a flipped bit", &flipped[..]), ("a cut", &whole[..whole.len() / 2])] {
            std::fs::write(&path, bytes).expect("writable");
            let said = world.ark(["restore", "s1", "--name", "a2"]).exits(125);
            said.complains_about(&["snapshot"]);
            assert_eq!(world.vmms(), [], "{damage} in {file}");
        }
        std::fs::write(&path, &whole).expect("writable");
    }
    let _ = world.ark(["restore", "s1", "--name", "a2"]).ok();
    assert_eq!(world.sh("a2", "echo whole").ok().stdout, "whole\n");
    world.end();
}

#[test]
fn hazard_11_a_damaged_base_is_refused_below_a_sound_diff() {
    let world = World::new();
    world.create("a1");
    let _ = world.ark(["snapshot", "a1", "s1"]).ok();
    let base = world.stored("snapshots").remove(0).join("memory");
    let _ = world.ark(["restore", "s1", "--name", "a2"]).ok();
    let _ = world.ark(["snapshot", "a2", "s2"]).ok();
    for name in ["a1", "a2"] {
        let _ = world.ark(["rm", name]).ok();
    }
    let mut bytes = std::fs::read(&base).expect("readable");
    let at = bytes.iter().rposition(|b| *b != 0).expect("some content");
    bytes[at] ^= 1;
    std::fs::write(&base, &bytes).expect("writable");
    world.ark(["restore", "s2"]).exits(125).complains_about(&["snapshot"]);
    assert_eq!(world.vmms(), []);
    world.end();
}

//! Pools of templates: standbys by policy, claimed as agents of their own, and replaced.

use std::time::Duration;

use ark_tests::{World, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// An emulated processor takes its time to make standbys.
const LIMIT: Duration = Duration::from_secs(120);

fn pool(world: &World) -> Value {
    world.ark(["pool", "show", "t1", "--json"]).ok().json()
}

fn has(world: &World, standbys: u32) {
    eventually(&format!("{standbys} stand by"), LIMIT, || pool(world)["standbys"] == standbys);
}

/// Process ids of the VMMs that are no agent's.
fn waiting(world: &World, agents: &[&str]) -> Vec<i32> {
    let theirs: Vec<i64> =
        agents.iter().map(|name| world.inspect(name)["vmm_pid"].as_i64().expect("a pid")).collect();
    world.vmms().into_iter().map(|vmm| vmm.pid).filter(|pid| !theirs.contains(&i64::from(*pid))).collect()
}

#[test]
fn a_pool_gives_agents_of_their_own_and_replaces_what_is_taken_or_killed() {
    let world = World::new();
    world.ark(["pool", "set", "t1", "--max", "4"]).exits(125).complains_about(&["t1", "ark template"]);
    let _ = world.ark(["template", "build", "t1", "--image", "base", "--memory", "128"]).ok();
    let _ = world.ark(["pool", "set", "t1", "--min", "2", "--max", "3", "--target-wait", "1m"]).ok();
    has(&world, 2);
    let stood_by = waiting(&world, &[]);

    let names = ["a1", "a2"];
    for name in names {
        let _ = world.ark(["create", "--template", "t1", "--name", name]).ok();
    }
    let now = pool(&world);
    assert_eq!((&now["hits"], &now["misses"]), (&2.into(), &0.into()), "{now}");
    let mut told = Vec::new();
    for name in names {
        let pid = world.inspect(name)["vmm_pid"].as_i64().expect("a pid");
        assert!(stood_by.iter().any(|stood_by| i64::from(*stood_by) == pid), "{name} stood by");
        let receipt = world.receipt(name);
        assert_eq!(receipt["name"], name);
        let checks = receipt["checks"].as_array().expect("checks");
        assert!(checks.iter().all(|check| check["passed"] == true), "{receipt}");
        assert_eq!(world.sh(name, "hostname").ok().stdout, format!("{name}\n"));
        told.push(world.sh(name, "cat /etc/machine-id").ok().stdout);
        told.push(world.sh(name, "head -c 16 /dev/urandom | md5sum").ok().stdout);
        told.push(receipt["nonce"].as_str().expect("a nonce").to_owned());
        told.push(receipt["generation"].as_str().expect("a generation").to_owned());
    }
    let all = told.len();
    told.sort();
    told.dedup();
    assert_eq!(told.len(), all, "each is somebody else");

    has(&world, 2);
    let killed = waiting(&world, &names);
    kill(Pid::from_raw(killed[0]), Signal::SIGKILL).expect("it is there");
    eventually("another takes its place", LIMIT, || {
        let now = waiting(&world, &names);
        now.len() == 2 && !now.contains(&killed[0])
    });
    has(&world, 2);
    let _ = world.ark(["create", "--template", "t1", "--name", "a3"]).ok();
    assert_eq!(pool(&world)["hits"], 3);

    // The policy is in force again after a crash, and nobody stands by who is not known.
    has(&world, 2);
    let before = waiting(&world, &["a1", "a2", "a3"]);
    world.end_daemon(Signal::SIGKILL);
    has(&world, 2);
    let after = waiting(&world, &["a1", "a2", "a3"]);
    assert!(after.len() == 2 && before.iter().all(|pid| !after.contains(pid)), "{before:?} {after:?}");
    let _ = world.ark(["pool", "rm", "t1"]).ok();
    eventually("none stands by", LIMIT, || waiting(&world, &["a1", "a2", "a3"]).is_empty());
    world.end();
}

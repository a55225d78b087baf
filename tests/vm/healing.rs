//! Agents that begin anew when their VMM is killed or hangs.

use std::time::Duration;

use ark_tests::{World, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// How long a restart may take where the processor is emulated, the detection of a guest that hangs included.
const LIMIT: Duration = Duration::from_secs(300);

fn signal_vmm(agent: &Value, signal: Signal) {
    let pid = agent["vmm_pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).expect("it has a VMM");
    kill(Pid::from_raw(pid), signal).expect("the VMM is there");
}

fn has_restarted(world: &World, count: u64) -> bool {
    let agent = world.inspect("a1");
    agent["state"] == "running" && agent["continuity"]["restarts"] == count
}

#[test]
fn a_fork_whose_vmm_is_killed_or_hangs_begins_anew_and_says_so() {
    let world = World::new();
    let create = ["create", "--image", "base", "--name", "a1", "--restart", "on-failure"];
    let _ = world.ark(create).ok();
    let first = world.inspect("a1");
    assert_eq!(first["origin"]["from"], "template");
    assert_eq!(world.sh("a1", "echo mine > /tmp/mine && cat /tmp/mine").ok().stdout, "mine\n");

    signal_vmm(&first, Signal::SIGKILL);
    eventually("it runs again", LIMIT, || has_restarted(&world, 1));
    let second = world.inspect("a1");
    assert_eq!((&second["id"], &second["origin"]), (&first["id"], &first["origin"]));
    assert_eq!(second["continuity"]["restored_from"], first["origin"]);
    assert!(second["continuity"]["lost_ms"].as_u64().is_some_and(|ms| ms > 0), "{second}");
    assert!(
        second["continuity"]["cause"].as_str().is_some_and(|cause| cause.contains("SIGKILL")),
        "{second}"
    );
    assert_eq!(world.sh("a1", "hostname; cat /tmp/mine 2>/dev/null || echo lost").ok().stdout, "a1\nlost\n");

    signal_vmm(&second, Signal::SIGSTOP);
    eventually("it is missed, ended and runs again", LIMIT, || has_restarted(&world, 2));
    let third = world.inspect("a1");
    let cause = third["continuity"]["cause"].as_str().unwrap_or_default();
    assert!(cause.contains("was not heard for"), "{third}");
    assert_eq!(world.sh("a1", "echo alive").ok().stdout, "alive\n");
    assert_eq!(world.vmms().len(), 1);
    let _ = world.ark(["rm", "a1"]).ok();
    world.end();
}

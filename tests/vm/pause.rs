//! Agents that are paused, resumed and rewound.

use std::time::Duration;

use ark_tests::{World, eventually, private_mib};
use nix::sys::signal::Signal;

#[test]
fn a_paused_agent_stands_still_gives_its_memory_back_and_goes_on() {
    let world = World::new();
    world.create("a1");
    let line = "i=0; while [ $i -lt 40 ]; do echo $i; i=$((i+1)); sleep 0.1; done";
    let stream = world.start(["exec", "a1", "--", "sh", "-c", line]);
    let _ =
        world.sh("a1", "head -c 30000000 /dev/urandom > /root/noise; md5sum /root/noise > /root/sum").ok();
    let vmm = world.vmms()[0].pid;
    let before = private_mib(vmm);
    let _ = world.ark(["pause", "a1"]).ok();
    assert_eq!(world.state("a1"), "paused");
    let paused = private_mib(vmm);
    assert!(paused + 29.0 < before, "{before} MiB, paused {paused} MiB");
    world.sh("a1", "true").exits(125).complains_about(&["a1", "paused", "ark resume a1"]);
    world.ark(["pause", "a1"]).exits(125).complains_about(&["a1", "paused"]);
    let _ = world.ark(["resume", "a1"]).ok();
    assert_eq!(stream.wait().ok().stdout.lines().count(), 40);
    let _ = world.sh("a1", "md5sum -c /root/sum").ok();
    world.ark(["resume", "a1"]).exits(125).complains_about(&["a1", "running"]);
    // Its memory is read from there for as long as it lives.
    let _ = world.ark(["rm", "a1"]).ok();
    assert_eq!(world.stored("paused").len(), 0);
    world.end();
}

#[test]
fn a_paused_agent_outlasts_the_daemon_however_that_ends() {
    let world = World::new();
    world.create("a1");
    let _ = world.sh("a1", "echo kept > /root/f; cat /etc/machine-id > /root/id").ok();
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let _ = world.ark(["pause", "a1"]).ok();
        world.end_daemon(signal);
        eventually("no VMM is left or it is cleaned up", Duration::from_secs(20), || {
            let _ = world.ark(["ps"]).ok();
            world.vmms().is_empty()
        });
        assert_eq!(world.state("a1"), "paused");
        let _ = world.ark(["resume", "a1"]).ok();
        assert_eq!(world.state("a1"), "running");
        assert_eq!(world.sh("a1", "cat /root/f; hostname").ok().stdout, "kept\na1\n");
        let _ = world.sh("a1", "cmp /etc/machine-id /root/id").ok();
    }
    let _ = world.ark(["pause", "a1"]).ok();
    let _ = world.ark(["rm", "a1"]).ok();
    assert_eq!(world.stored("paused").len(), 0);
    world.end();
}

#[test]
fn a_rewound_agent_is_the_same_one_back_in_time() {
    let world = World::new();
    world.create("a1");
    let _ = world.sh("a1", "echo before > /root/f").ok();
    let id = world.inspect("a1")["id"].clone();
    let machine_id = world.sh("a1", "cat /etc/machine-id").ok().stdout;
    let _ = world.ark(["snapshot", "a1", "before-edit"]).ok();
    let _ = world.sh("a1", "echo after > /root/f").ok();
    let _ = world.ark(["rewind", "a1", "before-edit"]).ok();
    assert_eq!(world.sh("a1", "cat /root/f; hostname").ok().stdout, "before\na1\n");
    assert_eq!(world.sh("a1", "cat /etc/machine-id").ok().stdout, machine_id);
    assert_eq!(world.inspect("a1")["id"], id);
    assert_eq!(world.vmms().len(), 1);
    world.create("a2");
    world.ark(["rewind", "a2", "before-edit"]).exits(125).complains_about(&[
        "before-edit",
        "a2",
        "ark restore",
    ]);
    world.ark(["rewind", "a1", "nothing"]).exits(125).complains_about(&["nothing"]);
    world.end();
}

//! Forks of living agents.

use std::collections::HashSet;
use std::time::Duration;

use ark_tests::{World, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn a_fork_goes_on_from_where_its_source_is_and_they_part_then() {
    let world = World::new();
    world.create("a1");
    let _ = world.sh("a1", "echo one > /root/f; (while :; do sleep 1; done) & echo $! > /root/pid").ok();
    let forks = world.fork("a1", 3);
    assert_eq!(forks, ["a1-1", "a1-2", "a1-3"]);
    for name in &forks {
        assert_eq!(world.sh(name, "cat /root/f").ok().stdout, "one\n");
        let _ = world.sh(name, "kill -0 $(cat /root/pid)").ok();
        let _ = world.sh(name, "hostname > /root/f").ok();
    }
    assert_eq!(world.sh("a1", "cat /root/f").ok().stdout, "one\n");
    assert_eq!(world.sh("a1-2", "cat /root/f").ok().stdout, "a1-2\n");
    assert_eq!(world.inspect("a1-3")["origin"]["from"], "fork");
    world.end();
}

#[test]
fn forks_of_forks_chain_and_outlive_their_ancestors() {
    let world = World::new();
    world.create("a1");
    let mut name = "a1".to_owned();
    for i in 0..4 {
        let _ = world.sh(&name, &format!("echo {i} >> /root/f")).ok();
        let child = world.fork(&name, 1).remove(0);
        let _ = world.ark(["rm", &name]).ok();
        name = child;
    }
    assert_eq!(world.sh(&name, "cat /root/f").ok().stdout, "0\n1\n2\n3\n");
    let _ = world.ark(["rm", &name]).ok();
    eventually("no branch point is left", Duration::from_secs(10), || world.stored("snapshots").is_empty());
    world.end();
}

#[test]
fn sixty_four_forks_are_pairwise_distinct() {
    let world = World::new();
    world.create("a1");
    let forks = world.fork("a1", 64);
    let mut seen = HashSet::new();
    for name in &forks {
        let receipt = world.receipt(name);
        for check in receipt["checks"].as_array().expect("checks") {
            assert_eq!(check["passed"], true, "{receipt}");
            if ["random", "machine_id", "hostname"].contains(&check["check"].as_str().expect("a kind")) {
                assert!(seen.insert(check["answer"].to_string()), "{name}: {check}");
            }
        }
    }
    assert_eq!(seen.len(), 3 * 64);
    let reads: Vec<_> = forks
        .iter()
        .map(|name| world.sh(name, "head -c 16 /dev/urandom | md5sum; cat /etc/machine-id; hostname").ok())
        .collect();
    for said in reads {
        for line in said.stdout.lines() {
            assert!(seen.insert(line.to_owned()), "{line} is not fresh");
        }
    }
    world.end();
}

#[test]
fn impossible_counts_are_refused_by_a_stated_limit() {
    let world = World::new();
    world.create("a1");
    for count in ["0", "10000"] {
        world.ark(["fork", "a1", "-n", count]).exits(125).complains_about(&["256"]);
    }
    assert_eq!(world.vmms().len(), 1);
    assert_eq!(world.stored("snapshots").len(), 0);
    world.end();
}

#[test]
fn agents_that_are_dead_or_dying_cannot_be_forked() {
    let world = World::new();
    world.ark(["fork", "nobody"]).exits(125).complains_about(&["nobody", "ark ps"]);
    world.create("a1");
    kill(Pid::from_raw(world.vmms()[0].pid), Signal::SIGKILL).expect("the VMM is there");
    world.wait_for_state("a1", "failed");
    world.ark(["fork", "a1"]).exits(125).complains_about(&["a1", "failed"]);
    world.create("a2");
    let line = "trap '' TERM; while :; do sleep 1; done";
    let stubborn = world.start(["exec", "a2", "--", "sh", "-c", line]);
    std::thread::sleep(Duration::from_secs(1));
    let removing = world.start(["rm", "a2"]);
    std::thread::sleep(Duration::from_millis(300));
    let said = world.ark(["fork", "a2"]);
    assert_eq!(said.code, 125, "{said:?}");
    said.complains_about(&["a2"]);
    let _ = removing.wait().ok();
    let _ = stubborn.wait();
    assert_eq!(world.vmms(), []);
    assert_eq!(world.stored("snapshots").len(), 0);
    world.end();
}

#[test]
fn a_paused_agent_can_be_forked_and_stays_paused() {
    let world = World::new();
    world.create("a1");
    let _ = world.sh("a1", "echo one > /root/f").ok();
    let _ = world.ark(["pause", "a1"]).ok();
    let forks = world.fork("a1", 1);
    assert_eq!(world.sh(&forks[0], "cat /root/f").ok().stdout, "one\n");
    assert_eq!(world.state("a1"), "paused");
    let _ = world.ark(["resume", "a1"]).ok();
    assert_eq!(world.sh("a1", "cat /root/f").ok().stdout, "one\n");
    world.end();
}

#[test]
fn an_agent_whose_file_system_is_full_can_be_forked() {
    let world = World::new();
    world.create("a1");
    let _ = world.sh("a1", "dd if=/dev/zero of=/root/full bs=65536; dd if=/dev/zero of=/tmp/full bs=512");
    let forks = world.fork("a1", 1);
    assert_eq!(world.sh(&forks[0], "hostname; cat /etc/hostname").ok().stdout, "a1-1\na1-1\n");
    world.end();
}

#[test]
fn a_vmm_that_is_killed_while_it_branches_leaves_nothing() {
    let world = World::new();
    world.create("a1");
    let _ = world.sh("a1", "head -c 60000000 /dev/urandom > /root/noise").ok();
    let source = world.vmms()[0].pid;
    let forking = world.start(["fork", "a1", "-n", "2"]);
    eventually("a branch is being written", Duration::from_secs(60), || {
        !world.stored("snapshots").is_empty()
    });
    kill(Pid::from_raw(source), Signal::SIGKILL).expect("it is there");
    let said = forking.wait();
    if said.code != 0 {
        said.exits(125).complains_about(&["a1"]);
    }
    world.wait_for_state("a1", "failed");
    for name in ["a1", "a1-1", "a1-2"] {
        let _ = world.ark(["rm", name]);
    }
    eventually("no VMM is left", Duration::from_secs(20), || world.vmms().is_empty());
    eventually("no branch point is left", Duration::from_secs(20), || world.stored("snapshots").is_empty());
    world.end();
}

#[test]
fn a_killed_daemon_leaves_no_half_made_forks() {
    let world = World::new();
    world.create("a1");
    let forking = world.start(["fork", "a1", "-n", "8"]);
    eventually("forks are being made", Duration::from_secs(60), || world.vmms().len() > 2);
    world.end_daemon(Signal::SIGKILL);
    forking.wait().exits(125).complains_about(&["arkd"]);
    // Forks that passed every check before the reply are whole agents; of the others nothing is left.
    let known = world.ark(["ps", "--json"]).ok().json();
    let names: Vec<_> = known["agents"]
        .as_array()
        .expect("agents")
        .iter()
        .map(|a| a["name"].as_str().expect("a name"))
        .collect();
    assert_eq!(names[0], "a1");
    assert_eq!(world.vmms().len(), names.len(), "{known}");
    for name in &names {
        assert_eq!(world.sh(name, "hostname").ok().stdout, format!("{name}\n"));
        let _ = world.ark(["rm", name]).ok();
    }
    eventually("no VMM is left", Duration::from_secs(20), || world.vmms().is_empty());
    eventually("no branch point is left", Duration::from_secs(20), || world.stored("snapshots").is_empty());
    world.end();
}

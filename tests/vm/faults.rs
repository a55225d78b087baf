//! Faults: guests and VMMs that die, hang or fill up.

use std::time::{Duration, Instant};

use ark_tests::World;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn a_killed_vmm_fails_its_agent_with_the_reason() {
    let world = World::new();
    world.create("a1");
    let vmm = world.vmms()[0].pid;
    kill(Pid::from_raw(vmm), Signal::SIGKILL).expect("the VMM is there");
    world.wait_for_state("a1", "failed");
    assert_eq!(world.inspect("a1")["exit"]["reason"], "killed");
    world.ark(["exec", "a1", "--", "true"]).exits(125).complains_about(&["a1", "failed", "killed"]);
    let _ = world.ark(["rm", "a1"]).ok();
    world.create("a1");
    world.end();
}

#[test]
fn an_exec_during_which_the_vmm_dies_ends_with_a_sentence() {
    let world = World::new();
    world.create("a1");
    let running = world.start(["exec", "a1", "--", "sleep", "1000"]);
    std::thread::sleep(Duration::from_secs(2));
    kill(Pid::from_raw(world.vmms()[0].pid), Signal::SIGKILL).expect("the VMM is there");
    running.wait().exits(125).complains_about(&["a1"]);
    world.end();
}

#[test]
fn a_kernel_panic_is_told_apart_and_its_console_kept() {
    let world = World::new();
    world.create("a1");
    let _ = world.sh("a1", "echo c > /proc/sysrq-trigger");
    world.wait_for_state("a1", "failed");
    assert_eq!(world.inspect("a1")["exit"]["reason"], "guest_panic");
    let console = world.ark(["logs", "a1"]).ok().stdout;
    assert!(console.contains("Kernel panic"), "{console:?}");
    world.end();
}

#[test]
fn power_off_and_reboot_from_inside_are_told_apart() {
    let world = World::new();
    for (name, command, state, reason) in [
        ("off", "poweroff -f", "stopped", "guest_poweroff"),
        ("again", "reboot -f", "failed", "guest_reboot"),
    ] {
        world.create(name);
        let _ = world.sh(name, command);
        world.wait_for_state(name, state);
        assert_eq!(world.inspect(name)["exit"]["reason"], reason);
    }
    world.end();
}

#[test]
fn a_guest_out_of_memory_kills_the_program_not_the_agent() {
    let world = World::new();
    world.create("a1");
    // tail keeps all of a line that does not end, in small pieces.
    let said = world.sh("a1", "tail /dev/zero");
    assert_eq!(said.code, 137, "{said:?}");
    assert_eq!(world.sh("a1", "echo alive").ok().stdout, "alive\n");
    world.end();
}

#[test]
fn an_agent_full_of_programs_that_ignore_sigterm_is_removed_in_time() {
    let world = World::new();
    world.create("a1");
    let line = "trap '' TERM; while :; do sleep 1; done";
    let stubborn = world.start(["exec", "a1", "--", "sh", "-c", line]);
    std::thread::sleep(Duration::from_secs(2));
    let begin = Instant::now();
    let _ = world.ark(["rm", "a1"]).ok();
    assert!(begin.elapsed() < Duration::from_secs(30));
    let _ = stubborn.wait();
    assert_eq!(world.vmms(), []);
    world.end();
}

#[test]
fn a_vmm_that_no_longer_answers_is_removed_all_the_same() {
    let world = World::new();
    world.create("a1");
    kill(Pid::from_raw(world.vmms()[0].pid), Signal::SIGSTOP).expect("the VMM is there");
    let _ = world.ark(["rm", "a1"]).ok();
    assert_eq!(world.vmms(), []);
    world.end();
}

/// Where the processor is emulated; a real one spoils no guests, and its agent fails at the boot's deadline.
#[test]
fn a_guest_that_stands_still_before_its_hello_is_booted_again() {
    let world = World::new();
    let _ = world.ark(["ps"]).ok();
    let creating = world.start(["create", "--image", "base", "--name", "a1", "--memory", "128"]);
    ark_tests::eventually("the VMM is there", Duration::from_secs(20), || world.vmms().len() == 1);
    let first = world.vmms()[0].pid;
    kill(Pid::from_raw(first), Signal::SIGSTOP).expect("the VMM is there");
    let created = creating.wait();
    if ark_tests::processor_is_emulated() {
        let _ = created.ok();
        assert_eq!(world.state("a1"), "running");
        assert_ne!(world.vmms()[0].pid, first);
        assert_eq!(world.vmms().len(), 1);
    } else {
        created.exits(125).complains_about(&["did not say hello within"]);
        assert_eq!(world.vmms(), []);
    }
    world.end();
}

#[test]
fn a_run_whose_ark_is_killed_leaves_no_agent() {
    let world = World::new();
    let _ = world.ark(["ps"]).ok();
    let running = world.start(["run", "--image", "base", "--", "sleep", "1000"]);
    ark_tests::eventually("the agent runs", Duration::from_secs(60), || world.vmms().len() == 1);
    std::thread::sleep(Duration::from_secs(3));
    running.signal(Signal::SIGKILL);
    let _ = running.wait();
    ark_tests::eventually("the agent is gone", Duration::from_secs(90), || world.vmms().is_empty());
    world.end();
}

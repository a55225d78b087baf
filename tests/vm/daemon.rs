//! `arkd`: started when needed, one at a time, killed and started again.

use std::time::Duration;

use ark_tests::{World, eventually};
use nix::sys::signal::Signal;

#[test]
fn the_first_command_starts_the_daemon_and_sigterm_ends_everything() {
    let world = World::new();
    assert_eq!(world.daemon_pid(), None);
    world.create("a1");
    assert!(world.daemon_pid().is_some());
    world.end_daemon(Signal::SIGTERM);
    eventually("no VMM is left", Duration::from_secs(20), || world.vmms().is_empty());
    world.end();
}

#[test]
fn a_daemon_killed_with_agents_alive_cleans_up_when_it_starts_again() {
    let world = World::new();
    world.create("a1");
    world.create("a2");
    world.end_daemon(Signal::SIGKILL);
    assert_eq!(world.vmms().len(), 2, "VMMs outlive the daemon until the next one starts");
    world.create("a1");
    assert_eq!(world.vmms().len(), 1);
    assert_eq!(world.sh("a1", "echo alive").ok().stdout, "alive\n");
    world.end();
}

#[test]
fn a_second_daemon_refuses_to_start() {
    let world = World::new();
    let _ = world.ark(["ps"]).ok();
    let second = ark_tests::Running::start(world.command("arkd"), Duration::from_secs(20)).wait();
    second.exits(1).complains_about(&["arkd", "already"]);
    let _ = world.ark(["ps"]).ok();
    world.end();
}

#[test]
fn a_taken_port_is_a_sentence() {
    let world = World::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let mut command = world.command("arkd");
    command.args(["--listen", &address]);
    let said = ark_tests::Running::start(command, Duration::from_secs(20)).wait();
    said.exits(1).complains_about(&[&address]);
    world.end();
}

//! `arkd`: started when needed, one at a time, killed and started again; its agents go on meanwhile.

use std::time::Duration;

use ark_tests::{World, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Names and states of every agent, by name.
fn agents(world: &World) -> Vec<(String, String)> {
    let list = world.ark(["ps", "--json"]).ok().json();
    let text = |agent: &serde_json::Value, key: &str| agent[key].as_str().expect("text").to_owned();
    let all = list["agents"].as_array().expect("agents").clone();
    let mut all: Vec<_> = all.iter().map(|agent| (text(agent, "name"), text(agent, "state"))).collect();
    all.sort();
    all
}

fn in_state(state: &str, names: &[&str]) -> Vec<(String, String)> {
    names.iter().map(|name| ((*name).to_owned(), state.to_owned())).collect()
}

/// Process ids of this world's VMMs.
fn vmms(world: &World) -> Vec<i32> {
    let mut pids: Vec<i32> = world.vmms().iter().map(|vmm| vmm.pid).collect();
    pids.sort_unstable();
    pids
}

#[test]
fn the_first_command_starts_the_daemon_and_stop_ends_everything() {
    let world = World::new();
    assert_eq!(world.daemon_pid(), None);
    world.create("a1");
    assert!(world.daemon_pid().is_some());
    world.stop();
    assert_eq!((world.daemon_pid(), vmms(&world)), (None, vec![]));
    // What is left by a daemon that is no more, too.
    world.create("a1");
    world.end_daemon(Signal::SIGKILL);
    assert_eq!(vmms(&world).len(), 1);
    world.stop();
    assert_eq!((world.daemon_pid(), vmms(&world)), (None, vec![]));
    world.end();
}

#[test]
fn agents_outlive_a_killed_daemon_with_their_memory_and_their_programs() {
    let world = World::new();
    world.create("a1");
    let start = "echo kept > /root/f; setsid sh -c 'i=0; while :; do i=$((i+1)); echo $i > /root/n; sleep 0.1; done' >/dev/null 2>&1 &";
    let _ = world.sh("a1", start).ok();
    let _ = world.fork("a1", 1);
    world.create("p1");
    let _ = world.sh("p1", "echo paused > /root/f").ok();
    let _ = world.ark(["pause", "p1"]).ok();
    let machine_id = world.sh("a1", "cat /etc/machine-id; cat /proc/sys/kernel/random/boot_id").ok().stdout;
    let living: Vec<u64> =
        ["a1", "a1-1"].map(|name| world.inspect(name)["vmm_pid"].as_u64().expect("a pid")).into();
    for signal in [Signal::SIGKILL, Signal::SIGKILL, Signal::SIGTERM] {
        // One is being made, most likely too late for anybody to be told of it.
        let _ = world.ark(["ps"]).ok();
        let before = vmms(&world).len();
        let making = world.start(["create", "--image", "base", "--name", "half", "--memory", "128"]);
        eventually("its VMM runs", Duration::from_secs(60), || vmms(&world).len() > before);
        world.end_daemon(signal);
        let was_made = making.wait().code == 0;
        let is_known = agents(&world).iter().any(|(name, _)| name == "half");
        assert!(is_known || !was_made, "what was acknowledged is there");
        let _ = world.ark(["rm", "half"]);
        let mut wanted = in_state("running", &["a1", "a1-1"]);
        wanted.extend(in_state("paused", &["p1"]));
        assert_eq!(agents(&world), wanted, "{signal}");
        let now: Vec<u64> =
            ["a1", "a1-1"].map(|name| world.inspect(name)["vmm_pid"].as_u64().expect("a pid")).into();
        assert_eq!((now, vmms(&world).len()), (living.clone(), 2), "nothing unknown runs");
        for name in ["a1", "a1-1"] {
            assert_eq!(world.sh(name, "cat /root/f; hostname").ok().stdout, format!("kept\n{name}\n"));
            let _ = world.sh(name, "n=$(cat /root/n); sleep 1; [ $(cat /root/n) -gt $n ]").ok();
            eventually("it is heard again", Duration::from_secs(60), || {
                !world.inspect(name)["heartbeat"].is_null()
            });
        }
        assert_eq!(
            world.sh("a1", "cat /etc/machine-id; cat /proc/sys/kernel/random/boot_id").ok().stdout,
            machine_id
        );
        let _ = world.ark(["resume", "p1"]).ok();
        assert_eq!(world.sh("p1", "cat /root/f; hostname").ok().stdout, "paused\np1\n");
        let _ = world.ark(["pause", "p1"]).ok();
    }
    for name in ["a1", "a1-1", "p1"] {
        let _ = world.ark(["rm", name]).ok();
    }
    for kind in ["snapshots", "paused"] {
        eventually("nothing is left on disk", Duration::from_secs(20), || world.stored(kind).is_empty());
    }
    world.end();
}

#[test]
fn an_adopted_agent_is_forked_snapshotted_paused_and_rewound_like_any() {
    let world = World::new().with_pool(1, 1);
    world.create_fork("base", "a1");
    let _ = world.sh("a1", "echo one > /root/f").ok();
    eventually("VMMs wait in the pool", Duration::from_secs(120), || vmms(&world).len() >= 3);
    world.end_daemon(Signal::SIGKILL);
    let alone = world.inspect("a1")["vmm_pid"].as_i64().expect("a pid");
    assert_eq!(agents(&world), in_state("running", &["a1"]));
    let pool = vmms(&world);
    assert!(pool.contains(&i32::try_from(alone).expect("a pid")) && pool.len() <= 3, "{pool:?}");

    let forks = world.fork("a1", 2);
    let mut machine_ids: Vec<String> = forks
        .iter()
        .map(String::as_str)
        .chain(["a1"])
        .map(|name| world.sh(name, "cat /root/f /etc/machine-id").ok().stdout)
        .collect();
    assert!(machine_ids.iter().all(|said| said.starts_with("one\n")), "{machine_ids:?}");
    machine_ids.sort();
    machine_ids.dedup();
    assert_eq!(machine_ids.len(), 3, "each is somebody else");
    let _ = world.ark(["snapshot", "a1", "s1"]).ok();
    let _ = world.sh("a1", "echo two > /root/f").ok();
    let _ = world.ark(["pause", "a1"]).ok();
    let _ = world.ark(["resume", "a1"]).ok();
    assert_eq!(world.sh("a1", "cat /root/f").ok().stdout, "two\n");
    world.end_daemon(Signal::SIGKILL);
    let _ = world.ark(["rewind", "a1", "s1"]).ok();
    assert_eq!(world.sh("a1", "cat /root/f; hostname").ok().stdout, "one\na1\n");
    world.end_daemon(Signal::SIGKILL);
    assert_eq!(world.sh("a1", "cat /root/f").ok().stdout, "one\n");
    world.end();
}

#[test]
fn what_ends_while_the_daemon_is_away_is_told_by_the_next() {
    let world = World::new();
    for name in ["killed", "off", "crashed"] {
        world.create(name);
    }
    let pid = |name: &str| {
        Pid::from_raw(i32::try_from(world.inspect(name)["vmm_pid"].as_i64().expect("a pid")).expect("a pid"))
    };
    let killed = pid("killed");
    for (name, line) in
        [("off", "sleep 5; poweroff -f"), ("crashed", "sleep 5; echo c > /proc/sysrq-trigger")]
    {
        let _ = world.sh(name, &format!("setsid sh -c '{line}' >/dev/null 2>&1 &")).ok();
    }
    world.end_daemon(Signal::SIGKILL);
    kill(killed, Signal::SIGKILL).expect("it is there");
    eventually("all have ended", Duration::from_secs(60), || world.vmms().is_empty());
    let said = |name: &str| {
        let agent = world.inspect(name);
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        (text(&agent["state"]), text(&agent["exit"]["reason"]), text(&agent["reason"]))
    };
    let (state, reason, words) = said("killed");
    assert_eq!((state.as_str(), reason.as_str()), ("failed", "killed"));
    assert!(words.contains("left no record"), "{words}");
    assert_eq!((said("off").0.as_str(), said("off").1.as_str()), ("stopped", "guest_poweroff"));
    assert_eq!((said("crashed").0.as_str(), said("crashed").1.as_str()), ("failed", "guest_panic"));
    world.sh("killed", "true").exits(125).complains_about(&["killed", "failed"]);
    world.end();
}

#[test]
fn programs_whose_clients_went_with_the_daemon_end_in_the_guest() {
    let world = World::new();
    world.create("a1");
    let streams = ["1001", "1002"].map(|time| world.start(["exec", "a1", "--", "sleep", time]));
    let running = || world.sh("a1", "ps | grep -c 'sleep 100[12]$'").stdout.trim().to_owned();
    eventually("both run", Duration::from_secs(60), || running() == "2");
    let run = world.start(["run", "--image", "base", "--", "sleep", "1003"]);
    eventually("it runs", Duration::from_secs(60), || agents(&world).len() == 2);
    world.end_daemon(Signal::SIGKILL);
    for stream in streams.into_iter().chain([run]) {
        stream.wait().exits(125).complains_about(&["arkd"]);
    }
    assert_eq!(
        agents(&world),
        in_state("running", &["a1"]),
        "`ark run` is no more, and neither is its agent"
    );
    eventually("neither is left", Duration::from_secs(60), || running() == "0");
    assert_eq!(vmms(&world).len(), 1);
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

//! The host's clock is set, forward and back, with agents alive and with `arkd` away.
//!
//! These tests set the clock of the host that they run on, so they run alone, and only where that host is there for nothing else:
//! `tests/on-kvm.sh` runs them in its emulated host.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ark_tests::{World, eventually};
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};
use nix::unistd::Pid;
use serde_json::Value;

/// How long anything may take where the processor is emulated; far below every step.
const LIMIT: Duration = Duration::from_secs(300);
/// How far the clock is set.
const STEP_S: i64 = 5 * 3600;

fn uptime() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).expect("the host knows how long it is up").into()
}

fn wall_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

/// The host's clock, which this puts back when it is dropped.
struct HostClock {
    wall: Duration,
    up: Duration,
}

impl HostClock {
    fn take() -> Self {
        assert!(
            std::env::var_os("ARK_OWN_CLOCK").is_some(),
            "this sets the host's clock: run it with `tests/on-kvm.sh vm --ignored clock::`, where the host is emulated"
        );
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
        Self { wall, up: uptime() }
    }

    /// Sets it to so many seconds off what it would show.
    fn step_to(&self, off_s: i64) {
        let time = self.wall + (uptime() - self.up);
        let seconds = i64::try_from(time.as_secs()).expect("seconds") + off_s;
        let time = TimeSpec::new(seconds, time.subsec_nanos().into());
        clock_settime(ClockId::CLOCK_REALTIME, time).expect("the clock can be set, by root");
    }
}

impl Drop for HostClock {
    fn drop(&mut self) {
        self.step_to(0);
    }
}

fn create(world: &World, name: &str, more: &[&str]) {
    let create = ["create", "--image", "base", "--name", name];
    let _ = world.ark(create.iter().chain(more).copied()).ok();
}

fn guest_s(world: &World, name: &str) -> u64 {
    world.sh(name, "date +%s").ok().stdout.trim().parse().expect("seconds")
}

fn guests_follow(world: &World, names: &[&str]) {
    for name in names {
        eventually("the guest's clock is the host's", LIMIT, || guest_s(world, name).abs_diff(wall_s()) < 60);
    }
}

/// Every event, as a client pages through them.
fn events(world: &World) -> Vec<Value> {
    let text = world.ark(["events", "--json"]).ok().stdout;
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// No position is left out, nobody was taken for hung, and nobody went by itself but `expired` many.
fn check_events(world: &World, expired: usize) {
    let events = events(world);
    let positions: Vec<u64> =
        events.iter().map(|one| one["position"].as_u64().expect("a position")).collect();
    assert!(positions.is_sorted_by(|a, b| a + 1 == *b), "{positions:?}");
    let of = |kind: &str| events.iter().filter(|one| one["event"]["type"] == kind).count();
    assert_eq!((of("agent.health_changed"), of("agent.expired")), (0, expired));
}

fn vmm_of(world: &World, name: &str) -> Pid {
    let pid = world.inspect(name)["vmm_pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
    Pid::from_raw(pid.expect("it has a VMM"))
}

fn restarts(world: &World, name: &str) -> u64 {
    let agent = world.inspect(name);
    if agent["state"] == "running" { agent["continuity"]["restarts"].as_u64().unwrap_or(0) } else { 0 }
}

fn newest_checkpoint(world: &World, name: &str) -> Value {
    world.inspect(name)["checkpoints"].as_array().and_then(|all| all.last().cloned()).unwrap_or_default()
}

#[test]
#[ignore = "it sets the host's clock"]
fn a_step_of_the_hosts_clock_ends_and_keeps_nobody_and_guests_follow_it() {
    let world = World::new();
    let clock = HostClock::take();
    create(&world, "hour", &["--ttl", "1h", "--idle-timeout", "1h"]);
    create(&world, "anew", &["--restart", "always", "--checkpoint", "10s:2"]);
    eventually("there is a checkpoint", LIMIT, || !newest_checkpoint(&world, "anew").is_null());
    let mut count = 0;
    for off_s in [STEP_S, -STEP_S, STEP_S] {
        let task =
            ["task", "run", "--image", "base", "--timeout", "4m", "--", "sh", "-c", "sleep 3; echo done"];
        let task = world.start(task);
        clock.step_to(off_s);
        let before = newest_checkpoint(&world, "anew");
        guests_follow(&world, &["hour", "anew"]);
        assert_eq!(task.wait().ok().stdout, "done\n");
        eventually("the next checkpoint is taken", LIMIT, || newest_checkpoint(&world, "anew") != before);
        // The first restart is at once, the others after seconds of the same clock.
        kill(vmm_of(&world, "anew"), Signal::SIGKILL).expect("the VMM is there");
        count += 1;
        eventually("it begins anew", LIMIT, || restarts(&world, "anew") == count);
        let lost = world.inspect("anew")["continuity"]["lost_ms"].as_u64().expect("what was lost");
        assert!(lost < 300_000, "{lost} ms");
        // A fork's clock is checked to 50 ms.
        let forked = world.fork("hour", 1);
        guests_follow(&world, &[&forked[0]]);
        let _ = world.ark(["rm", &forked[0]]).ok();
    }
    assert_eq!(world.state("hour"), "running");
    check_events(&world, 0);
    world.end();
}

#[test]
#[ignore = "it sets the host's clock"]
fn a_step_while_arkd_is_away_makes_no_limit_shorter_or_longer() {
    let world = World::new();
    let clock = HostClock::take();
    create(&world, "hour", &["--ttl", "1h"]);
    let _ = world.ark(["pause", "hour"]).ok();
    create(&world, "anew", &["--ttl", "1h", "--restart", "always"]);
    kill(vmm_of(&world, "anew"), Signal::SIGKILL).expect("the VMM is there");
    eventually("it begins anew", LIMIT, || restarts(&world, "anew") == 1);
    for (count, off_s) in [(2, STEP_S), (3, -STEP_S)] {
        let vmm = vmm_of(&world, "anew");
        world.end_daemon(Signal::SIGKILL);
        clock.step_to(off_s);
        kill(vmm, Signal::SIGKILL).expect("the VMM is there");
        eventually("it begins anew", LIMIT, || restarts(&world, "anew") == count);
        guests_follow(&world, &["anew"]);
        assert_eq!((world.state("hour"), world.state("anew")), ("paused".to_owned(), "running".to_owned()));
    }
    let began = Instant::now();
    create(&world, "short", &["--ttl", "30s"]);
    world.end_daemon(Signal::SIGKILL);
    clock.step_to(-2 * STEP_S);
    eventually("its ttl ends", LIMIT, || !world.ark(["ps"]).ok().stdout.contains("short"));
    assert!(began.elapsed() > Duration::from_secs(25), "{:?}", began.elapsed());
    check_events(&world, 1);
    world.end();
}

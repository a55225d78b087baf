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

/// Process ids of VMMs that are not the agent's.
fn others(world: &World, agent: &Value) -> Vec<i64> {
    let all = world.vmms().into_iter().map(|vmm| i64::from(vmm.pid));
    all.filter(|pid| agent["vmm_pid"] != *pid).collect()
}

#[test]
fn a_standby_becomes_the_agent_that_begins_anew_and_the_next_arkd_adopts_it() {
    let world = World::new().with_pool(0, 1);
    let create = ["create", "--image", "base", "--name", "a1", "--restart", "always"];
    let _ = world.ark(create).ok();
    let first = world.inspect("a1");
    let before = world.receipt("a1");
    let machine_id = world.sh("a1", "cat /etc/machine-id; echo mine > /tmp/mine").ok().stdout;
    let ready = || world.ark(["pool", "ls", "--json"]).json()["pools"][0]["standbys"] == 1;
    eventually("one stands by", LIMIT, ready);
    let standby = others(&world, &first);

    signal_vmm(&first, Signal::SIGKILL);
    eventually("it runs again", LIMIT, || has_restarted(&world, 1));
    let second = world.inspect("a1");
    assert_eq!(
        vec![second["vmm_pid"].as_i64().expect("it has a VMM")],
        standby,
        "it is the one that stood by"
    );
    assert_eq!((&second["id"], &second["continuity"]["restored_from"]), (&first["id"], &first["origin"]));
    let now =
        world.sh("a1", "cat /etc/machine-id; hostname; cat /tmp/mine 2>/dev/null || echo lost").ok().stdout;
    assert_eq!(now, format!("{machine_id}a1\nlost\n"));
    let after = world.receipt("a1");
    assert_eq!((&after["agent_id"], &after["name"]), (&first["id"], &second["name"]));
    assert!(after["nonce"] != before["nonce"] && after["generation"] != before["generation"], "{after}");

    world.end_daemon(Signal::SIGKILL);
    let third = world.inspect("a1");
    assert_eq!((&third["vmm_pid"], &third["continuity"]), (&second["vmm_pid"], &second["continuity"]));
    // The guest finds the host in the directory's new place, too.
    eventually("it is heard", LIMIT, || !world.inspect("a1")["heartbeat"].is_null());
    // Its end is told from there as well.
    let _ = world.sh("a1", "poweroff -f");
    eventually("it runs again", LIMIT, || has_restarted(&world, 2));
    let cause = world.inspect("a1")["continuity"]["cause"].as_str().unwrap_or_default().to_owned();
    assert!(cause.contains("powered itself off"), "{cause}");
    let _ = world.ark(["rm", "a1"]).ok();
    world.end();
}

/// Milliseconds between two steps of the agent's counter, at least.
const STEP_MS: u64 = 100;
/// Counts in a file that only memory holds.
const COUNTER: &str = "setsid sh -c 'i=0; while :; do i=$((i+1)); echo $i > /tmp/new; mv /tmp/new /tmp/count; sleep 0.1; done' \
                       </dev/null >/dev/null 2>&1 &";

fn count(world: &World) -> u64 {
    world.sh("a1", "cat /tmp/count").ok().stdout.trim().parse().expect("a number")
}

/// The newest checkpoint of `a1`, once one was taken after `after`.
fn checkpoint_after(world: &World, after: u64) -> Value {
    let newest = || world.inspect("a1")["checkpoints"].as_array().and_then(|all| all.last().cloned());
    let taken = |checkpoint: &Value| checkpoint["taken_unix_ms"].as_u64().expect("a time");
    eventually("a checkpoint is taken", LIMIT, || newest().is_some_and(|newest| taken(&newest) > after));
    newest().expect("there is one")
}

fn now_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    u64::try_from(now.as_millis()).expect("before the year 584942417")
}

/// Damages the processors' state in the checkpoint of `agent` that `checkpoint` tells of.
fn damage(world: &World, agent: &Value, checkpoint: &Value) {
    let home = world.path().join("state/checkpoints").join(agent["id"].as_str().expect("an id"));
    let is_it = |dir: &std::path::Path| {
        let manifest: Value =
            serde_json::from_slice(&std::fs::read(dir.join("manifest.json")).expect("a manifest"))
                .expect("JSON");
        manifest["manifest"]["id"] == checkpoint["snapshot"]
    };
    let dirs = std::fs::read_dir(home).expect("checkpoints").map(|dir| dir.expect("a directory").path());
    let dir = dirs.into_iter().find(|dir| is_it(dir)).expect("the checkpoint is there");
    let mut state = std::fs::read(dir.join("state")).expect("a state");
    *state.last_mut().expect("bytes") ^= 1;
    std::fs::write(dir.join("state"), state).expect("it can be written");
}

#[test]
fn a_checkpointed_agent_goes_on_from_its_newest_usable_checkpoint_and_says_what_it_lost() {
    let world = World::new();
    let create = ["create", "--image", "base", "--name", "a1", "--restart", "on-failure"];
    let _ = world.ark(create.into_iter().chain(["--checkpoint", "10s:3"])).ok();
    let first = world.inspect("a1");
    let _ = world.sh("a1", COUNTER).ok();
    eventually("it counts", LIMIT, || world.sh("a1", "test -s /tmp/count").code == 0);
    let before = count(&world);
    let _ = checkpoint_after(&world, now_ms());
    let at_kill = count(&world);
    signal_vmm(&first, Signal::SIGKILL);
    eventually("it runs again", LIMIT, || has_restarted(&world, 1));

    let after = count(&world);
    let second = world.inspect("a1");
    assert_eq!((&second["id"], &second["origin"]), (&first["id"], &first["origin"]));
    let continuity = &second["continuity"];
    assert_eq!(continuity["restored_from"]["from"], "checkpoint", "{second}");
    assert!(after >= before, "{after} is from before the checkpoint, when it was past {before}");
    let number = |value: &Value| value.as_u64().expect("a number");
    let lost = number(&continuity["lost_ms"]);
    // Each step that the counter is behind took that long at least, and all of it lies between the checkpoint and the restart.
    assert!(lost >= at_kill.saturating_sub(after) * STEP_MS, "{at_kill} steps, {after} after {lost} ms lost");
    assert!(
        number(&continuity["restored_from"]["taken_unix_ms"]) + lost <= number(&continuity["at_unix_ms"])
    );
    eventually("its program goes on", LIMIT, || count(&world) > after);
    assert_eq!(world.receipt("a1")["snapshot"], continuity["restored_from"]["snapshot"]);

    // The newest one is damaged while nobody looks.
    let older = checkpoint_after(&world, now_ms());
    let newer = checkpoint_after(&world, number(&older["taken_unix_ms"]));
    world.end_daemon(Signal::SIGKILL);
    signal_vmm(&second, Signal::SIGKILL);
    damage(&world, &first, &newer);
    eventually("it runs again", LIMIT, || has_restarted(&world, 2));
    let third = world.inspect("a1");
    assert_eq!(third["continuity"]["restored_from"]["snapshot"], older["snapshot"], "{third}");
    assert!(count(&world) >= after);
    let told = world.ark(["events"]).ok().stdout;
    assert!(told.contains("agent.checkpoint_unusable"), "{told}");
    let _ = world.ark(["rm", "a1"]).ok();
    assert!(world.stored("checkpoints").is_empty());
    world.end();
}

#[test]
fn an_agent_whose_health_check_fails_is_ended_and_begins_anew() {
    let world = World::new();
    let create = ["create", "--image", "base", "--name", "a1", "--restart", "on-failure"];
    let check = ["--health-cmd", "test ! -e /tmp/ill", "--health-interval", "1s", "--health-retries", "2"];
    let _ = world.ark(create.into_iter().chain(check)).ok();
    let first = world.inspect("a1");
    let _ = world.sh("a1", "touch /tmp/ill").ok();
    eventually("it begins anew", LIMIT, || has_restarted(&world, 1));
    let second = world.inspect("a1");
    assert_ne!(second["vmm_pid"], first["vmm_pid"]);
    let cause = second["continuity"]["cause"].as_str().unwrap_or_default();
    assert!(cause.contains("its health check failed: its command ended with 1"), "{second}");
    assert_eq!(world.sh("a1", "test -e /tmp/ill || echo well").ok().stdout, "well\n");
    let _ = world.ark(["rm", "a1"]).ok();

    // A port is healthy as long as somebody takes its connections.
    let create =
        ["create", "--image", "python", "--name", "a1", "--health-tcp", "8080", "--health-retries", "1"];
    let _ = world.ark(create.into_iter().chain(["--health-interval", "1s"])).ok();
    eventually("nobody listens", LIMIT, || world.inspect("a1")["health"]["is"] == "unhealthy");
    let _ = world.sh("a1", "setsid python3 -m http.server 8080 </dev/null >/dev/null 2>&1 &").ok();
    eventually("somebody does", LIMIT, || world.inspect("a1")["health"].is_null());
    let _ = world.ark(["rm", "a1"]).ok();
    world.end();
}

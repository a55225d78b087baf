//! Services: agents find them by name over vsock and are connected with a program of a replica.

use std::collections::BTreeSet;
use std::time::Duration;

use ark_tests::{World, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// How long a replica may take to come up or to be replaced where the processor is emulated.
const LIMIT: Duration = Duration::from_secs(300);

/// Has a program listen in the replica `name` that answers each client's line with its host's name before it.
fn listen(world: &World, name: &str) {
    let program = "while :; do nc -l -p 7 -e sh -c 'read l; echo $(hostname) $l'; done";
    let detached = "setsid sh -c \"$PROGRAM\" </dev/null >/dev/null 2>&1 &";
    let variable = format!("PROGRAM={program}");
    let _ = world.ark(["exec", "--env", &variable, name, "--", "sh", "-c", detached]).ok();
}

fn show(world: &World) -> Value {
    world.ark(["service", "show", "echo", "--json"]).ok().json()
}

fn replicas(world: &World) -> BTreeSet<String> {
    let service = show(world);
    let all = service["replicas"].as_array().expect("a list").iter();
    all.map(|replica| replica["agent"].as_str().expect("a name").to_owned()).collect()
}

/// Who answers when a program of `caller`, run as `user`, says `line`. Between two clients a replica's program listens anew.
fn ask(world: &World, caller: &str, user: &str, line: &str) -> String {
    let mut by = String::new();
    eventually("a replica answers", LIMIT, || {
        let command = format!("echo {line} | /run/ark/guestd connect echo");
        let said = world.ark(["exec", "--user", user, caller, "--", "sh", "-c", &command]);
        let answer = said.stdout.trim_end().split_once(' ').filter(|(_, answer)| *answer == line);
        answer.map(|(name, _)| by = name.to_owned()).is_some()
    });
    by
}

/// Asks until each of `names` has answered.
fn ask_all(world: &World, caller: &str, names: &BTreeSet<String>) {
    let mut seen = BTreeSet::new();
    eventually("each of them answers", LIMIT, || {
        seen.insert(ask(world, caller, "root", "hello"));
        assert!(seen.is_subset(names), "{seen:?}");
        seen == *names
    });
}

/// Process ids, in the guest `name`, of the commands that were started there and are alive.
fn commands(world: &World, name: &str) -> Vec<String> {
    let said = world.sh(name, "for pid in $(cat /tmp/starts); do kill -0 $pid && echo $pid; done").ok();
    said.stdout.lines().map(str::to_owned).collect()
}

#[test]
fn a_services_command_is_started_once_seen_to_and_found_by_name() {
    let world = World::new();
    // It answers each client with its host's name and the line that was sent.
    let server = "while :; do nc -l -p 7 -e sh -c 'read l; echo $(hostname) $l'; done";
    let server = format!("echo $$ >> /tmp/starts; echo serving; {server}");
    let command = ["sh", "-c", server.as_str()];
    let service = ["service", "create", "echo", "-n", "2", "--tcp", "7", "--wait", "--"];
    let _ = world.ark(service.into_iter().chain(command)).ok();
    let two = replicas(&world);
    assert_eq!(two.len(), 2);
    world.create("caller");
    ask_all(&world, "caller", &two);
    let first = two.first().expect("a replica").clone();
    let second = two.last().expect("a replica").clone();
    assert_eq!((commands(&world, &first).len(), commands(&world, &second).len()), (1, 1));
    let logs = world.ark(["service", "logs", "echo", &first]).ok();
    assert_eq!(logs.stdout, "serving\n");

    // One is killed: its replica has failed, and another takes its place.
    // Its replica may go faster than it is said that the signal was sent.
    let _ = world.sh(&first, "kill -9 $(cat /tmp/starts)");
    eventually("another takes its place", LIMIT, || {
        let now = replicas(&world);
        show(&world)["ready"] == 2 && !now.contains(&first)
    });
    let failure = show(&world)["last_failure"].clone();
    assert_eq!(failure["agent"], first.as_str());
    assert_eq!(failure["reason"], "its command was ended by signal 9; it wrote last: serving");
    let now = replicas(&world);
    assert!(now.contains(&second) && now.len() == 2);

    // arkd is killed: commands go on, and are not started a second time.
    let before: Vec<_> = now.iter().map(|name| commands(&world, name)).collect();
    world.end_daemon(Signal::SIGKILL);
    eventually("both are ready", LIMIT, || show(&world)["ready"] == 2);
    assert_eq!(replicas(&world), now);
    let after: Vec<_> = now.iter().map(|name| commands(&world, name)).collect();
    assert_eq!(after, before);
    ask_all(&world, "caller", &now);
    // And they are seen to as before.
    let _ = world.sh(&second, "kill $(cat /tmp/starts)");
    eventually("it is replaced, too", LIMIT, || {
        show(&world)["ready"] == 2 && show(&world)["last_failure"]["agent"] == second.as_str()
    });

    let _ = world.ark(["service", "rm", "echo"]).ok();
    let _ = world.ark(["rm", "caller"]).ok();
    assert_eq!(world.vmms().len(), 0);
    world.end();
}

#[test]
fn an_agent_calls_a_replicas_program_by_the_name_of_its_service() {
    let world = World::new();
    let _ = world.ark(["service", "create", "echo", "-n", "2", "--tcp", "7", "--wait"]).ok();
    let two = replicas(&world);
    assert_eq!(two.len(), 2);
    two.iter().for_each(|name| listen(&world, name));
    world.create("caller");

    ask_all(&world, "caller", &two);
    let list = world.sh("caller", "/run/ark/guestd services").ok();
    let found: Value = serde_json::from_str(&list.stdout).expect("one line");
    assert_eq!(
        (&found["name"], &found["ready"], &found["connectable"]),
        (&"echo".into(), &2.into(), &true.into())
    );
    let refused = world.sh("caller", "/run/ark/guestd connect other").exits(1);
    assert!(refused.stderr.contains("there is no service \"other\""), "{refused:?}");
    // Programs of other users find services, too; and so do replicas, and forks of the caller.
    assert!(two.contains(&ask(&world, "caller", "agent", "user")));
    let name = two.first().expect("a replica");
    assert!(two.contains(&ask(&world, name, "root", "replica")));
    let fork = world.fork("caller", 1).remove(0);
    assert!(two.contains(&ask(&world, &fork, "root", "fork")));
    let called = world.ark(["service", "call", "echo", "--", "hostname"]).ok();
    assert!(two.contains(called.stdout.trim_end()), "{called:?}");

    // One is killed and begins anew; its program does not, as that was nobody's but ours.
    let pid = world.inspect(name)["vmm_pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
    kill(Pid::from_raw(pid.expect("it has a VMM")), Signal::SIGKILL).expect("the VMM is there");
    eventually("it runs again", LIMIT, || {
        world.inspect(name)["continuity"]["restarts"] == 1 && show(&world)["ready"] == 2
    });
    listen(&world, name);
    ask_all(&world, "caller", &two);

    let _ = world.ark(["service", "rm", "echo"]).ok();
    let _ = world.ark(["rm", "caller", &fork]).ok();
    assert_eq!(world.vmms().len(), 0);
    world.end();
}

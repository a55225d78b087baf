//! Services: replicas that are forks of a template whose warm-up listens, and agents that find them by name.

use std::collections::BTreeSet;
use std::time::Duration;

use ark_tests::{World, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// How long a replica may take to be replaced where the processor is emulated.
const LIMIT: Duration = Duration::from_secs(300);

/// A server that answers each line in capitals with the name of its host before it, for as long as its client speaks.
const SERVER: &str = "\
import socket, socketserver, threading

class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(socket.gethostname().encode() + b' ' + line.upper())

class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

server = Server(('127.0.0.1', 7), Echo)
threading.Thread(target=server.serve_forever, daemon=True).start()
";

fn show(world: &World) -> Value {
    world.ark(["service", "show", "echo", "--json"]).ok().json()
}

fn replicas(world: &World) -> BTreeSet<String> {
    let service = show(world);
    let all = service["replicas"].as_array().expect("a list").iter();
    all.map(|replica| replica["agent"].as_str().expect("a name").to_owned()).collect()
}

/// What a service answers a program of `caller` that says `line`.
fn ask(world: &World, caller: &str, line: &str) -> (String, String) {
    let said = world.sh(caller, &format!("echo {line} | /run/ark/guestd connect echo")).ok();
    let (by, answer) = said.stdout.trim_end().split_once(' ').expect("a name and an answer");
    (by.to_owned(), answer.to_owned())
}

#[test]
fn an_agent_calls_a_replicas_program_by_the_name_of_its_service() {
    let world = World::new();
    let _ = world.ark(["template", "build", "echo", "--image", "python", "--warm", SERVER]).ok();
    let create = ["service", "create", "echo", "-n", "2", "--template", "echo", "--tcp", "7", "--wait"];
    let _ = world.ark(create).ok();
    let two = replicas(&world);
    assert_eq!(two.len(), 2);
    world.create("caller");

    // They take turns, and each answers for itself.
    let answers = [ask(&world, "caller", "one"), ask(&world, "caller", "two")];
    assert_eq!(answers.iter().map(|(_, answer)| answer.as_str()).collect::<Vec<_>>(), ["ONE", "TWO"]);
    assert_eq!(answers.into_iter().map(|(by, _)| by).collect::<BTreeSet<_>>(), two);
    let list = world.sh("caller", "/run/ark/guestd services").ok();
    let found: Value = serde_json::from_str(&list.stdout).expect("one line");
    assert_eq!(
        (&found["name"], &found["ready"], &found["connectable"]),
        (&"echo".into(), &2.into(), &true.into())
    );
    let refused = world.sh("caller", "/run/ark/guestd connect other").exits(1);
    assert!(refused.stderr.contains("there is no service \"other\""), "{refused:?}");
    // Programs of other users find services, too.
    let other =
        ["exec", "--user", "agent", "caller", "--", "sh", "-c", "echo hi | /run/ark/guestd connect echo"];
    assert!(world.ark(other).ok().stdout.ends_with(" HI\n"));
    // A replica is an agent, and finds them as well; so does a fork of the caller.
    let name = two.first().expect("a replica");
    assert_eq!(ask(&world, name, "me").1, "ME");
    let fork = world.fork("caller", 1).remove(0);
    assert_eq!(ask(&world, &fork, "forked").1, "FORKED");

    let called = world.ark(["service", "call", "echo", "--eval", "socket.gethostname()"]).ok();
    assert!(two.iter().any(|name| called.stdout.contains(name.as_str())), "{called:?}");

    // One is killed, begins anew as its template, and listens again.
    let pid = world.inspect(name)["vmm_pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).expect("a VMM");
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("the VMM is there");
    eventually("it runs again", LIMIT, || {
        world.inspect(name)["continuity"]["restarts"] == 1 && show(&world)["ready"] == 2
    });
    let answers = [ask(&world, "caller", "again"), ask(&world, "caller", "again")];
    assert_eq!(answers.into_iter().map(|(by, _)| by).collect::<BTreeSet<_>>(), two);

    let _ = world.ark(["service", "rm", "echo"]).ok();
    let _ = world.ark(["rm", "caller", &fork]).ok();
    assert_eq!(world.vmms().len(), 0);
    world.end();
}

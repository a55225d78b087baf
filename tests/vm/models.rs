//! Models, served by llama.cpp in VMs of their own.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ark_tests::{World, assets, eventually};
use serde_json::{Value, json};

/// Time a server has for an answer: emulated hosts are slow.
const PATIENCE: Duration = Duration::from_secs(300);

/// One connection to the server in an agent.
struct Server<'a> {
    stream: BufReader<UnixStream>,
    world: &'a World,
    agent: &'a str,
}

impl<'a> Server<'a> {
    fn connect(world: &'a World, agent: &'a str) -> Self {
        let id = world.inspect(agent)["id"].as_str().expect("an id").to_owned();
        let mut stream = UnixStream::connect(world.run_dir().agent(&id).vsock()).expect("the VMM listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        stream.write_all(b"CONNECT 1030\n").expect("the VMM reads");
        let mut server = Self { stream: BufReader::new(stream), world, agent };
        assert!(server.line().starts_with("OK "), "the server listens");
        let client = json!({ "name": "test", "version": "1" });
        let hello = json!({ "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": client });
        assert_eq!(server.ask("initialize", &hello)["serverInfo"]["name"], "ark-inference");
        server.send(&json!({ "jsonrpc": "2.0", "method": "notifications/initialized" }));
        server
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("the server answers");
        if !line.ends_with('\n') {
            let (agent, shown) = (self.agent, self.world.ark(["inspect", self.agent, "--json"]));
            let kept = self.world.ark(["exec", agent, "--", "sh", "-c", "ps; dmesg | tail -n 20"]);
            let log = self.world.ark(["logs", agent]);
            panic!("the server in {agent} hung up at {line:?}: {shown:?}\n{kept:?}\n{log:?}");
        }
        line
    }

    fn send(&mut self, message: &Value) {
        self.stream.get_mut().write_all(format!("{message}\n").as_bytes()).expect("the server reads");
    }

    fn ask(&mut self, method: &str, params: &Value) -> Value {
        self.send(&json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params }));
        loop {
            let answer: Value = serde_json::from_str(&self.line()).expect("a line is JSON");
            if answer["id"] == 1 {
                assert!(answer["result"].is_object(), "{answer}");
                return answer["result"].clone();
            }
        }
    }

    /// What the tool `name` gives.
    fn call(&mut self, name: &str, arguments: &Value) -> Value {
        let result = self.ask("tools/call", &json!({ "name": name, "arguments": arguments }));
        assert_ne!(result["isError"], true, "{result}");
        result["structuredContent"].clone()
    }
}

/// The engine's threads are kept off the first processor, which is left to everybody else, where there are more.
fn computes_where_no_timer_ticks(world: &World, agent: &str) {
    let script = "cat /sys/devices/system/cpu/nohz_full
        for thread in /proc/$(pidof ark-inference)/task/*; do
            ! grep -q ark-engine $thread/comm || sed -n 's/^Cpus_allowed_list:.//p' $thread/status
        done";
    let said = world.sh(agent, script).ok().stdout;
    let mut lines = said.lines();
    let (quiet, mut kept) = (lines.next().expect("a list"), lines.peekable());
    let expected = match world.inspect(agent)["vcpus"].as_u64().expect("a number") {
        1 => return,
        2 => "1".to_owned(),
        count => format!("1-{}", count - 1),
    };
    assert_eq!(quiet, expected, "{said}");
    assert!(kept.peek().is_some() && kept.all(|list| list == expected), "{said}");
}

#[test]
fn the_bundled_model_is_served_by_a_fork_that_has_it_loaded() {
    let world = World::new();
    let models = world.ark(["models", "--json"]).ok().json();
    let router = models["data"].as_array().expect("models").iter().find(|model| model["id"] == "router");
    let router = router.expect("it comes with the release");
    assert_eq!((&router["bundled"], &router["state"]), (&json!(true), &json!("idle")));
    let _ = world.ark(["model", "load", "router"]).ok();
    let show = || world.ark(["model", "show", "router", "--json"]).ok().json();
    eventually("a replica is ready", PATIENCE, || show()["state"] == "ready");

    let agents = world.ark(["ps", "--json"]).ok().json();
    let names =
        agents["agents"].as_array().expect("agents").iter().filter_map(|agent| agent["name"].as_str());
    let replica = names.filter(|name| name.starts_with("model-router-")).collect::<Vec<_>>().join(" ");
    let text = json!({ "text": "Sort my invoices into folders by year." });
    let tokens = Server::connect(&world, &replica).call("tokenize", &text);
    assert!(tokens["count"].as_u64() > Some(0) && tokens["model"] == "router", "{tokens}");
    let prompt = json!({ "prompt": "Sort my invoices", "max_tokens": 8, "sampling": { "temperature": 0.0 } });
    let said = Server::connect(&world, &replica).call("generate", &prompt);

    // Another fork of the template, and one of that, answer with the same words.
    let _ = world.ark(["create", "--template", "model-router", "--name", "own"]).ok();
    let [fork] = world.fork("own", 1).try_into().expect("one fork");
    for agent in ["own", &fork] {
        let mut server = Server::connect(&world, agent);
        assert_eq!(server.call("tokenize", &text), tokens, "{agent}");
        assert_eq!(server.call("generate", &prompt)["text"], said["text"], "{agent}");
    }
    computes_where_no_timer_ticks(&world, "own");
    world.ark(["model", "rm", "router"]).exits(125).complains_about(&["router", "release"]);
    world.end();
}

#[test]
fn a_file_that_a_user_adds_is_served_until_it_is_removed() {
    let world = World::new();
    let file = assets().models().join("router.gguf");
    let file = file.to_str().expect("the path is text");
    let _ = world.ark(["model", "add", file, "--name", "mine", "--context", "128"]).ok();
    let bad = world.path().join("bad.gguf");
    std::fs::write(&bad, &std::fs::read(file).expect("the model")[..1000]).expect("a file");
    let bad = bad.to_str().expect("the path is text");
    world.ark(["model", "add", bad, "--name", "bad"]).exits(125).complains_about(&["bad", "truncated"]);
    let _ = world.ark(["model", "load", "mine"]).ok();
    let _ = world.ark(["create", "--template", "model-mine", "--name", "own"]).ok();
    let tokens = Server::connect(&world, "own").call("tokenize", &json!({ "text": "Hello" }));
    assert_eq!(tokens["model"], "mine");
    world.ark(["model", "rm", "mine"]).exits(125).complains_about(&["mine", "1 living agent"]);
    let _ = world.ark(["rm", "own"]).ok();
    let _ = world.ark(["model", "rm", "mine"]).ok();
    eventually("its VMs are gone", PATIENCE, || world.vmms().is_empty());
    assert_eq!((world.stored("models").len(), world.stored("templates").len()), (0, 0));
    world.end();
}

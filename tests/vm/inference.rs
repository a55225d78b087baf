//! Inference as programs in agents find it: at the command, the Python module and the socket, if they are allowed to.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ark_tests::{Rest, World, eventually, private_mib, processor_s};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// How long a model's VM may take to come up or to be replaced where the processor is emulated.
const LIMIT: Duration = Duration::from_secs(300);

/// Asks for the models at the Unix socket for OpenAI's clients; writes the status, and what `detail` says.
const BY_SOCKET: &str = r#"
import http.client, json, socket
class Here(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect("/run/ark/openai.sock")
for _ in range(3):
    here = Here("ark")
    here.request("GET", "/v1/models")
    reply = here.getresponse()
    said = json.loads(reply.read())
    here.close()
    print(reply.status, said.get("type"), said.get("detail"))
"#;

/// Has a model say something; writes the exception's name.
const BY_MODULE: &str = r#"
import ark
try:
    print(ark.ai.chat("hello"))
except ark.ai.AIError as error:
    print(type(error).__name__, error)
"#;

/// Asserts that programs of the agent `name`, of image `python`, are refused wherever they ask, each in a sentence.
fn is_refused(world: &World, name: &str) {
    let word = format!("agent {name} may not use inference");
    // Users of the guest are alike to the host.
    for user in ["root", "agent"] {
        let run = |program: &[&str]| {
            world.ark(["exec", "--user", user, name, "--"].into_iter().chain(program.iter().copied()))
        };
        run(&["ark-ai", "chat", "hello"]).exits(1).complains_about(&[&word, "--allow inference"]);
        let by_socket = run(&["python3", "-c", BY_SOCKET]).ok().stdout;
        assert_eq!(by_socket.lines().count(), 3, "{by_socket}");
        assert!(
            by_socket.lines().all(|line| line.starts_with("403 /problems/not-allowed the ")),
            "{by_socket}"
        );
        assert!(by_socket.lines().all(|line| line.contains(&word)), "{by_socket}");
        let by_module = run(&["python3", "-c", BY_MODULE]).ok().stdout;
        assert!(by_module.starts_with("NotAllowed ") && by_module.contains(&word), "{by_module}");
    }
}

#[test]
fn who_is_allowed_nothing_is_refused_at_every_door_forks_included() {
    let world = World::new();
    let _ = world.ark(["create", "--image", "python", "--name", "a1"]).ok();
    is_refused(&world, "a1");
    for fork in world.fork("a1", 1) {
        is_refused(&world, &fork);
    }
    // A static program needs nothing of its image.
    world.create("b1");
    world
        .ark(["exec", "b1", "--", "ark-ai", "models"])
        .exits(1)
        .complains_about(&["b1", "may not use inference"]);
    let _ = world.ark(["create", "--image", "base", "--name", "c1", "--allow", "inference=router"]).ok();
    let allowed = &world.inspect("c1")["allow"];
    assert_eq!(allowed, &json!(["inference=router"]));
    world
        .ark(["create", "--image", "base", "--allow", "network"])
        .exits(125)
        .complains_about(&["inference=MODEL"]);
    world.end();
}

/// What is asked, and what the bundled model makes of it.
const REQUEST: &str = "Which agent should sort invoices into folders by year?";

/// Asks the bundled model from within Python, always for the same answer.
const CHAT: &str = "import ark, sys; print(ark.ai.chat(sys.argv[1], temperature=0, seed=1))";

/// [`REQUEST`], as clients of `OpenAI`'s API put it.
fn chat() -> Value {
    json!({ "model": "router", "messages": [{ "role": "user", "content": REQUEST }], "temperature": 0, "seed": 1 })
}

/// What the model answers to that over REST.
fn over_rest(world: &World) -> String {
    let (reply, _) = Rest::connect(world).call("POST", "/v1/chat/completions", &chat().to_string());
    assert!(reply["usage"]["completion_tokens"].as_u64() > Some(0), "{reply}");
    reply["choices"][0]["message"]["content"].as_str().expect("a text").to_owned()
}

#[test]
fn who_is_allowed_to_asks_the_bundled_model_without_a_network() {
    let world = World::new();
    let _ = world.ark(["create", "--image", "python", "--name", "a1", "--allow", "inference"]).ok();
    let run = |program: &[&str]| {
        world.ark(["exec", "a1", "--"].into_iter().chain(program.iter().copied())).ok().stdout
    };
    // The first one has the model loaded, in a VM of its own.
    let said = run(&["python3", "-c", CHAT, REQUEST]);
    let answer: Value = serde_json::from_str(&said).expect("the bundled model answers in JSON");
    assert!(answer["agent"].is_string(), "{answer}");
    assert_eq!(run(&["ark-ai", "chat", "--temperature", "0", "--seed", "1", REQUEST]), said);
    assert_eq!(format!("{}\n", over_rest(&world)), said, "the host's clients are told the same");
    let by_socket = run(&["python3", "-c", BY_SOCKET]);
    assert!(by_socket.lines().all(|line| line.starts_with("200 ")), "{by_socket}");
    assert_eq!(run(&["ls", "/sys/class/net"]), "lo\n", "nothing but loopback");
    world.end();
}

/// The VMM of an agent.
fn vmm_of(world: &World, agent: &str) -> Pid {
    let pid = world.inspect(agent)["vmm_pid"].as_u64().expect("it runs");
    Pid::from_raw(i32::try_from(pid).expect("a process id"))
}

/// The VMM of the one replica of the bundled model.
fn replica(world: &World) -> Pid {
    let service = world.ark(["service", "show", "model-router", "--json"]).ok().json();
    let all = service["replicas"].as_array().expect("a list");
    assert_eq!(all.len(), 1, "{service}");
    vmm_of(world, all[0]["agent"].as_str().expect("a name"))
}

#[test]
fn a_killed_model_is_back_and_the_call_says_what_there_was() {
    let world = World::new();
    let _ = world.ark(["models"]).ok();
    let _ = over_rest(&world);
    let pid = replica(&world);
    let under_way = || {
        let service = world.ark(["service", "show", "model-router", "--json"]).ok().json();
        service["replicas"][0]["load"] == 1
    };
    let (status, told) = std::thread::scope(|scope| {
        kill(pid, Signal::SIGSTOP).expect("the VMM is there");
        let call =
            scope.spawn(|| Rest::connect(&world).ask("POST", "/v1/chat/completions", &chat().to_string()));
        eventually("the call is under way", LIMIT, under_way);
        kill(pid, Signal::SIGKILL).expect("the VMM is there");
        call.join().expect("it is answered")
    });
    // It had said nothing yet, so another replica may have answered; else the caller is told why none did.
    assert!(status == 200 || told["error"]["message"].is_string(), "{status} {told}");
    // Whoever asks next waits for the replica that takes its place.
    eventually("the model is back", LIMIT, || {
        Rest::connect(&world).ask("POST", "/v1/chat/completions", &chat().to_string()).0 == 200
    });
    world.end();
}

/// Asks the model while another thread counts; writes whether there is an answer, how far that came, and the time then.
const THINK: &str = r#"
import ark, threading, time
count = 0
def tick():
    global count
    while True:
        count += 1
        time.sleep(0.01)
threading.Thread(target=tick, daemon=True).start()
before = count
said = ark.ai.chat("Sort my invoices", temperature=0)
print(bool(said), count - before, time.time())
"#;

/// How long the model is held up once the agents stand still.
const THOUGHT: Duration = Duration::from_secs(4);

#[test]
fn an_agent_stands_still_while_the_model_thinks_and_wakes_at_the_right_time() {
    let world = World::new();
    let _ = world.ark(["models"]).ok();
    let _ = over_rest(&world);
    let freezing = ["--image", "python", "--allow", "inference", "--freeze-on-inference"];
    for name in ["a1", "a2"] {
        let _ = world.ark(["create", "--name", name].into_iter().chain(freezing)).ok();
    }
    let model = replica(&world);
    kill(model, Signal::SIGSTOP).expect("the VMM is there");
    let [one, two] = ["a1", "a2"].map(|agent| world.start(["exec", agent, "--", "python3", "-c", THINK]));
    let frozen = || Rest::connect(&world).metric("ark_agents_frozen");
    eventually("both agents stand still", LIMIT, || frozen() == Some(2.0));
    let begun = Instant::now();
    let vmm = vmm_of(&world, "a1").as_raw();
    let (before, mib) = (processor_s(vmm), private_mib(vmm));
    // Whoever uses one has it run.
    assert_eq!(world.sh("a2", "echo awake").ok().stdout, "awake\n");
    assert_eq!(frozen(), Some(1.0));
    std::thread::sleep(THOUGHT);
    eventually("its memory is given back", LIMIT, || private_mib(vmm) < mib / 2.0);
    let still = begun.elapsed();
    let used = processor_s(vmm) - before;
    // An arkd that takes it for hung has replaced it: the calls go on elsewhere.
    let _ = kill(model, Signal::SIGCONT);

    let told = [one, two].map(|asking| asking.wait().ok().stdout);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is later").as_secs_f64();
    let [(counted, time), (awake, _)] = told.each_ref().map(|told| {
        let words: Vec<_> = told.split_whitespace().collect();
        let number = |at: usize| words[at].parse::<f64>().expect("a number");
        assert_eq!(words[0], "True", "{told}");
        (number(1), number(2))
    });
    assert!(counted * 3.0 < awake, "one stood still, the other did not: {told:?}");
    assert!(now - time < still.as_secs_f64() / 2.0, "its clock is right: {told:?}, now {now}");
    assert!(used < still.as_secs_f64() / 2.0, "its VMM took {used} s in {still:?}");
    eventually("nothing stands still", LIMIT, || frozen() == Some(0.0));

    // One that stands still ends as any other, and nothing of it is left.
    kill(replica(&world), Signal::SIGSTOP).expect("the VMM is there");
    let asking = world.start(["exec", "a1", "--", "python3", "-c", THINK]);
    eventually("it stands still", LIMIT, || frozen() == Some(1.0));
    let _ = world.ark(["rm", "a1", "a2"]).ok();
    assert_ne!(asking.wait().code, 0);
    let under_way = "ark_inference_running{service=\"model-router\"}";
    eventually("its call is taken back", LIMIT, || Rest::connect(&world).metric(under_way) == Some(0.0));
    assert_eq!(world.stored("paused").len(), 0);
    world.end();
}

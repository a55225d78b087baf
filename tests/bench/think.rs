//! Models in VMs of their own: what a VM costs a token, what the way to it costs an agent, how soon there is one more, and what
//! agents hold that wait for an answer.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ark_tests::{Rest, World, eventually, processor_s, pss_mib};
use ark_types::guest::INFERENCE_PORT;
use serde_json::{Value, json};

use crate::crowd::at_once;
use crate::mcp::{Client, Reply, Server, large_model, speed};
use crate::peers::Bench;
use crate::report::{Must, Report};

/// Tokens of a reply whose speed is measured.
const REPLY: u32 = 96;
/// Replies before those that count: standbys are still being made, and where the processor is emulated code is translated once.
const WARM_UP: usize = 4;
/// Agents that wait at once.
const AGENTS: usize = 20;
/// How long they are watched.
const WINDOW: Duration = Duration::from_secs(20);
/// Longest wait for a VM: where the processor is emulated all is slow.
const LIMIT: Duration = Duration::from_secs(600);

/// In an agent: prompts that nobody sent before; writes the milliseconds to each first token.
const FIRST_TOKENS: &str = r#"
import ark, sys, time
for turn in range(int(sys.argv[1])):
    begun = time.monotonic()
    ark.ai.generate(sys.argv[2] % turn, max_tokens=1)
    print((time.monotonic() - begun) * 1e3)
"#;

/// A prompt that is like others only behind its number.
const PROMPT: &str =
    "%d. Which agent should sort the invoices of last year into folders by month, and tell me the sum?";

pub(crate) fn measure(bench: &Bench, report: &mut Report) {
    let world = World::new();
    let dir = tempfile::tempdir().expect("a directory");
    let large = large_model(dir.path());
    let _ = world.ark(["model", "add", path(&large), "--name", "large", "--context", "512"]).ok();
    for model in ["router", "large"] {
        let _ = world.ark(["model", "load", model]).ok();
        eventually(model, LIMIT, || {
            world.ark(["model", "show", model, "--json"]).ok().json()["state"] == "ready"
        });
    }
    let bundled = ark_tests::assets().models().join("router.gguf");
    in_vm_and_beside(&world, bench, &bundled, report);
    ways(&world, bench, report);
    for (model, file, name) in [("router", &bundled, "bundled model"), ("large", &large, "200 MB model")] {
        replicas(&world, bench, (model, file), name, report);
    }
    frozen(&world, report);
    world.end();
}

fn path(path: &Path) -> &str {
    path.to_str().expect("the path is text")
}

/// The vsock socket of an agent.
fn socket(world: &World, agent: &str) -> PathBuf {
    world.run_dir().agent(world.inspect(agent)["id"].as_str().expect("an id")).vsock()
}

/// The one replica of `model`.
fn replica(world: &World, model: &str) -> String {
    let service = world.ark(["service", "show", &format!("model-{model}"), "--json"]).ok().json();
    service["replicas"][0]["agent"].as_str().expect("a replica").to_owned()
}

/// Tokens a second of the server in its VM, and of the same program on the same kernel without a VM between.
fn in_vm_and_beside(world: &World, bench: &Bench, model: &Path, report: &mut Report) {
    let dir = tempfile::tempdir().expect("a directory");
    let server = Server::start(&bench.inference(), dir.path(), model, &["--sessions=8", "--batch=256"]);
    let vm = socket(world, &replica(world, "router"));
    let (in_vm, no_vm) = (|| Client::in_vm(&vm, INFERENCE_PORT).expect("it listens"), || server.connect());
    let mut forms = [
        ("tokens/s in the VM", Reply::Whole, Must::AtLeast(0.9), (Vec::new(), Vec::new())),
        ("the same, each told as it is said", Reply::Streamed, Must::Shown, (Vec::new(), Vec::new())),
    ];
    for turn in 0..WARM_UP + bench.samples(10) {
        for (_, how, _, (inside, beside)) in &mut forms {
            let both = (speed(&in_vm, 1, REPLY, *how), speed(&no_vm, 1, REPLY, *how));
            if turn >= WARM_UP {
                inside.push(both.0);
                beside.push(both.1);
            }
        }
    }
    for (name, _, must, (inside, beside)) in &forms {
        report.against(name, "1/s", inside, ("no VM", beside), *must);
    }
}

/// Time to the first token of an agent's call, and of one that goes to the server in its VM directly.
fn ways(world: &World, bench: &Bench, report: &mut Report) {
    let turns = bench.samples(30);
    let _ = world.ark(["create", "--image", "python", "--name", "asks", "--allow", "inference"]).ok();
    let ask = |prompt: &str, turns: usize| {
        let turns = turns.to_string();
        let said =
            world.ark(["exec", "asks", "--", "python3", "-c", FIRST_TOKENS, &turns, prompt]).ok().stdout;
        said.lines().map(|line| line.parse().expect("milliseconds")).collect::<Vec<f64>>()
    };
    let vm = socket(world, &replica(world, "router"));
    let (mut through, mut direct) = (Vec::new(), Vec::new());
    let _ = ask(PROMPT, 1);
    for turn in 0..turns / 5 {
        through.extend(ask(&format!("Now {turn}, {PROMPT}"), 5));
        for five in 0..5 {
            let begun = Instant::now();
            let mut client = Client::in_vm(&vm, INFERENCE_PORT).expect("it listens");
            let prompt = format!("Then {turn}, {}", PROMPT.replace("%d", &five.to_string()));
            client.generate(&prompt, 1, 1);
            direct.push(begun.elapsed().as_secs_f64() * 1e3);
        }
    }
    let _ = world.ark(["rm", "asks"]).ok();
    report.against(
        "first token, from an agent",
        "ms",
        &through,
        ("from the VM directly", &direct),
        Must::AtMost(1.3),
    );
}

/// A new replica: a fork of the template that has the model loaded, and a VM that is booted and loads it from its file. Each until
/// it answers.
fn replicas(world: &World, bench: &Bench, (model, file): (&str, &Path), name: &str, report: &mut Report) {
    let shown = world.ark(["inspect", &replica(world, model), "--json"]).ok().json();
    let (memory, vcpus) = (shown["memory_mib"].as_u64().expect("MiB"), &shown["vcpus"]);
    // Milliseconds until it answers, and until it has said a token.
    let answers = |made: &Value, begun: Instant| {
        let vm = world.run_dir().agent(made["id"].as_str().expect("an id")).vsock();
        let mut client = None;
        eventually("the server answers", LIMIT, || {
            client = Client::in_vm(&vm, INFERENCE_PORT);
            client.is_some()
        });
        let mut client = client.expect("it listens");
        assert!(client.tokens("Hello") > 0);
        let answered = begun.elapsed().as_secs_f64() * 1e3;
        client.generate("Hello", 1, 1);
        (answered, begun.elapsed().as_secs_f64() * 1e3)
    };
    let (mut forked, mut loaded) = (Vec::new(), Vec::new());
    let mut rest = Rest::connect(world);
    for _ in 0..bench.samples(5) {
        let begun = Instant::now();
        let fork = json!({ "name": "fork", "template": format!("model-{model}") });
        let (made, _) = rest.call("POST", "/v1/agents", &fork.to_string());
        forked.push(answers(&made, begun));
        rest.delete("fork");

        let begun = Instant::now();
        // Its file lies in memory, too.
        let room = memory + 2 * (file.metadata().expect("a file").len() >> 20);
        let boot =
            json!({ "name": "boot", "image": "inference", "cold": true, "memory_mib": room, "vcpus": vcpus });
        let (made, _) = rest.call("POST", "/v1/agents", &boot.to_string());
        let booted = begun.elapsed().as_secs_f64() * 1e3;
        let _ = world.ark(["cp", path(file), "boot:/tmp/model.gguf"]).ok();
        let line = format!(
            "ark-inference --model {model}=/tmp/model.gguf --vsock {INFERENCE_PORT} --sessions=8 --batch=256 \
             --context=512 >/dev/null 2>&1 &"
        );
        let begun = Instant::now();
        let _ = world.sh("boot", &line).ok();
        let (answered, said) = answers(&made, begun);
        loaded.push((answered + booted, said + booted));
        rest.delete("boot");
    }
    let (answers, says): (Vec<_>, Vec<_>) = forked.into_iter().unzip();
    let (slowly, later): (Vec<_>, Vec<_>) = loaded.into_iter().unzip();
    let other = "booted and loaded";
    report.against(&format!("one more replica, {name}"), "ms", &answers, (other, &slowly), Must::AtMost(0.2));
    report.against("the same, to its first token", "ms", &says, (other, &later), Must::Shown);
}

/// What agents take of the host whose call waits for its turn, made so that they stand still meanwhile or not.
fn frozen(world: &World, report: &mut Report) {
    let (mut seconds, mut mib) = (Vec::new(), Vec::new());
    for freeze in [true, false] {
        at_once(world, 0..AGENTS, |rest, number| {
            let wish = json!({
                "name": format!("waits-{number}"), "image": "python", "allow": ["inference"], "freeze_on_inference": freeze,
            });
            rest.call("POST", "/v1/agents", &wish.to_string());
        });
        let script = "import ark; ark.ai.generate('Say much', model='large', max_tokens=480)";
        let names: Vec<_> = (0..AGENTS).map(|number| format!("waits-{number}")).collect();
        let asking: Vec<_> =
            names.iter().map(|name| world.start(["exec", name, "--", "python3", "-c", script])).collect();
        let open = || {
            let mut rest = Rest::connect(world);
            let number = |rest: &mut Rest, name: &str| rest.metric(name).unwrap_or_default();
            let of = "{service=\"model-large\"}";
            number(&mut rest, &format!("ark_inference_waiting{of}"))
                + number(&mut rest, &format!("ark_inference_running{of}"))
        };
        eventually("all of them wait", LIMIT, || open() >= AGENTS as f64 - 0.5);
        if freeze {
            eventually("all stand still", LIMIT, || {
                Rest::connect(world).metric("ark_agents_frozen") == Some(AGENTS as f64)
            });
        }
        // What is done once they do is done by then.
        std::thread::sleep(WINDOW / 2);
        let vmms: Vec<_> = names.iter().map(|name| vmm(world, name)).collect();
        let before: Vec<_> = vmms.iter().map(|pid| processor_s(*pid)).collect();
        std::thread::sleep(WINDOW);
        assert!(open() > 0.0, "the model was done too soon");
        seconds.push(vmms.iter().zip(before).map(|(pid, before)| processor_s(*pid) - before).sum::<f64>());
        mib.push(vmms.iter().map(|pid| pss_mib(*pid)).collect::<Vec<_>>());
        at_once(world, 0..AGENTS, |rest, number| rest.delete(&format!("waits-{number}")));
        asking.into_iter().for_each(|asking| drop(asking.wait()));
    }
    let window = WINDOW.as_secs();
    let (still, awake) = (&seconds[..1], &seconds[1..]);
    let name = format!("{AGENTS} agents wait {window} s, frozen: CPU");
    report.against(&name, "s", still, ("not frozen", awake), Must::Shown);
    report.against("the same: memory of each", "MiB", &mib[0], ("not frozen", &mib[1]), Must::Shown);
}

fn vmm(world: &World, agent: &str) -> i32 {
    let pid = world.inspect(agent)["vmm_pid"].as_i64().expect("it runs");
    i32::try_from(pid).expect("a process id")
}

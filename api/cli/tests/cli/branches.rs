//! The verbs about templates, snapshots and forks, and `ark eval`, against a server that answers as `arkd` would.

use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::host::{Host, agent, ark, problem, told};
use ark_types::problem::{Problem, ProblemKind};
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use serde_json::{Value, json};

/// `METHOD target` and body of every request but those for health, in order.
type Asked = Arc<Mutex<Vec<(String, Value)>>>;

fn snapshot(name: &str) -> Value {
    json!({
        "name": name, "id": "00", "kind": "diff", "base": "template py", "agent": "a1", "image": "python", "vcpus": 1,
        "memory_mib": 256, "bytes": 9 << 20, "pause_us": 900, "durable_us": 41_000, "created_unix_ms": 0, "children": 1,
        "agents": 2,
    })
}

fn template(name: &str) -> Value {
    json!({
        "name": name, "image": "python", "digest": "sha256:00", "vcpus": 1, "memory_mib": 256, "warm": "import numpy\nx = 1",
        "bytes": 60 << 20, "build_ms": 2500, "created_unix_ms": 0, "used_unix_ms": 0, "agents": 3,
    })
}

fn receipt() -> Value {
    json!({
        "agent_id": "0011223344556677", "name": "a1-3", "snapshot": "ab".repeat(16), "generation": "cd".repeat(16),
        "nonce": "ef".repeat(16), "at_unix_ms": 0, "took_ms": 40, "sha256": "01".repeat(32),
        "checks": [
            { "check": "clock", "evidence": "host_observed", "answer": "3 ms off", "sha256": "00", "passed": true },
            { "check": "hostname", "evidence": "guest_reported", "answer": "a1-3\u{1b}[2J", "sha256": "00", "passed": true },
        ],
    })
}

/// What the code `code` comes to.
fn evaluated(code: &str) -> Response {
    let reply = |stdout: &str, value: Option<&str>, exception: Option<Value>| {
        let mut reply = json!({ "stdout": stdout, "stderr": "", "truncated": false, "duration_us": 5 });
        if let Some(value) = value {
            reply["value"] = value.into();
        }
        if let Some(exception) = exception {
            reply["exception"] = exception;
            reply["stderr"] = "careful\n".into();
        }
        Json(reply).into_response()
    };
    match code {
        "6*7" => reply("", Some("42"), None),
        "import numpy; numpy.arange(3).sum()" => reply("", Some("np.int64(3)"), None),
        "print('a', end=''); 1" => reply("a", Some("1"), None),
        "print('a')" => reply("a\n", None, None),
        "1/0" => {
            let traceback = "Traceback (most recent call last):\nZeroDivisionError: division by zero\n";
            let exception =
                json!({ "kind": "ZeroDivisionError", "message": "division by zero", "traceback": traceback });
            reply("before\n", None, Some(exception))
        }
        "while True: pass" => problem(ProblemKind::DeadlinePassed, "the code ran longer than 1500 ms"),
        _ => problem(ProblemKind::NoEvaluator, "the image base has no evaluator"),
    }
}

fn forked(count: u64) -> Value {
    let (mut agents, mut failed) = (Vec::new(), Vec::new());
    for n in 1..=count {
        // Of many forks, those whose number ends in 3 fail.
        if count > 10 && n % 10 == 3 {
            failed.push(json!({ "name": format!("a1-{n}"), "why": "its clock is 80 ms off" }));
        } else {
            agents.push(agent(&format!("a1-{n}")));
        }
    }
    json!({ "agents": agents, "failed": failed, "pause_us": 900, "durable_us": 41_000 })
}

async fn answer(State(asked): State<Asked>, method: Method, uri: Uri, body: Bytes) -> Response {
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    asked.lock().unwrap().push((format!("{method} {uri}"), body.clone()));
    let parts: Vec<&str> = uri.path().trim_start_matches("/v1/").split('/').collect();
    let name = body["name"].as_str().unwrap_or_default();
    let value = match (method.as_str(), parts.as_slice()) {
        ("GET", ["agents"]) => json!({ "agents": [agent("a1")] }),
        ("POST", ["agents"]) if body["template"] == "none" => {
            return problem(ProblemKind::TemplateNotFound, "there is no template none");
        }
        ("POST", ["agents"]) => return (StatusCode::CREATED, Json(agent(name))).into_response(),
        (_, ["agents", "nobody", ..]) => return problem(ProblemKind::AgentNotFound, "no agent nobody"),
        ("POST", ["agents", _, "eval"]) if body["code"] == "hang" => std::future::pending().await,
        ("POST", ["agents", _, "eval"]) => return evaluated(body["code"].as_str().unwrap()),
        ("POST", ["agents", _, "fork"]) => forked(body["count"].as_u64().unwrap()),
        ("POST", ["agents", name, "pause" | "resume" | "rewind"]) => agent(name),
        ("POST", ["agents", _, "snapshots"]) => snapshot(name),
        ("GET", ["agents", "a1", "receipt"]) => return problem(ProblemKind::NoReceipt, "a1 was booted"),
        ("GET", ["agents", _, "receipt"]) => receipt(),
        ("GET", ["snapshots"]) => json!({ "snapshots": [snapshot("before-edit")] }),
        ("DELETE", ["snapshots", "base"]) if uri.query().is_none() => {
            return problem(ProblemKind::InUse, "1 snapshot holds only what changed since base");
        }
        ("POST", ["snapshots", name, "compact"]) => snapshot(name),
        ("POST", ["snapshots", _, "restore"]) => agent(if name.is_empty() { "made-up" } else { name }),
        ("GET", ["templates"]) => json!({ "templates": [template("py")] }),
        ("POST", ["templates"]) if body["warm"] == "1/0" => {
            return problem(ProblemKind::TemplateFailed, "the warm-up of bad failed: ZeroDivisionError");
        }
        ("POST", ["templates"]) => template(name),
        ("DELETE", _) => return StatusCode::NO_CONTENT.into_response(),
        other => panic!("{other:?}"),
    };
    Json(value).into_response()
}

/// A server, and what it was asked.
fn start() -> (Host, Asked) {
    let asked = Asked::default();
    (Host::start(Router::new().fallback(answer).with_state(asked.clone())), asked)
}

fn only(asked: &Asked) -> (String, Value) {
    let mut all = std::mem::take(&mut *asked.lock().unwrap());
    assert_eq!(all.len(), 1, "{all:?}");
    all.remove(0)
}

#[test]
fn code_is_evaluated_and_its_end_is_arks() {
    let (host, asked) = start();
    let eval = |code: &str| host.run(&["eval", "--agent", "a1", code], "");
    assert_eq!(eval("6*7"), (0, "42\n".into(), String::new()));
    assert_eq!(
        only(&asked),
        ("POST /v1/agents/a1/eval".to_owned(), json!({ "code": "6*7", "language": "python" }))
    );
    assert_eq!(eval("print('a')"), (0, "a\n".into(), String::new()));
    assert_eq!(
        eval("print('a', end=''); 1"),
        (0, "a\n1\n".into(), String::new()),
        "the value has its own line"
    );
    let (code, out, err) = eval("1/0");
    assert_eq!((code, out.as_str()), (1, "before\n"));
    assert_eq!(err, "careful\nTraceback (most recent call last):\nZeroDivisionError: division by zero\n");
    let (code, out, _) = host.run(&["eval", "--json", "--agent", "a1", "1/0"], "");
    let reply: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &reply["agent"]), (1, &json!("a1")));
    assert_eq!(reply["exception"]["kind"], "ZeroDivisionError");
    assert_eq!(host.run(&["eval", "--agent", "a1", "-"], "6*7"), (0, "42\n".into(), String::new()));
    assert_eq!(host.run(&["eval", "--agent", "a1", "-"], &"x".repeat(70_000)).0, 125, "that is too long");

    let (code, _, err) = eval("anything");
    assert_eq!((code, err.as_str()), (125, "ark: the image base has no evaluator\n"));
    let (code, _, err) = host.run(&["eval", "--agent", "nobody", "6*7"], "");
    assert_eq!((code, err.as_str()), (125, "ark: no agent nobody; there are: a1\n"));
    asked.lock().unwrap().clear();
    let (code, _, err) = host.run(&["eval", "--agent", "a1", "--timeout", "1.5", "while True: pass"], "");
    assert_eq!((code, err.as_str()), (124, "ark: the code ran longer than 1500 ms\n"));
    assert_eq!(only(&asked).1["timeout_ms"], 1500);
    assert_eq!(eval("while True: pass").0, 125, "that deadline is not ours");
    assert_eq!(host.run(&["eval", "6*7"], "").0, 125, "where?");
}

#[test]
fn an_agent_made_for_code_goes_with_it() {
    let (host, asked) = start();
    let code = "import numpy; numpy.arange(3).sum()";
    assert_eq!(host.run(&["eval", "--template", "py", code], ""), (0, "np.int64(3)\n".into(), String::new()));
    let all = std::mem::take(&mut *asked.lock().unwrap());
    let [(create, body), (eval, _), (delete, _)] = all.as_slice() else { panic!("{all:?}") };
    let name = body["name"].as_str().unwrap();
    assert_eq!(create, "POST /v1/agents");
    assert_eq!((&body["template"], body.get("image")), (&json!("py"), None));
    assert_eq!(eval, &format!("POST /v1/agents/{name}/eval"));
    assert_eq!(delete, &format!("DELETE /v1/agents/{name}?grace_ms=0"));

    // Whatever becomes of the code.
    for (code, exit) in [("1/0", 1), ("anything", 125)] {
        assert_eq!(host.run(&["eval", "--image", "python", code], "").0, exit);
        let all = std::mem::take(&mut *asked.lock().unwrap());
        assert_eq!(all[0].1["image"], "python");
        assert!(all.last().unwrap().0.starts_with("DELETE /v1/agents/eval-"), "{all:?}");
    }
    let (code, _, err) = host.run(&["eval", "--template", "none", "6*7"], "");
    assert_eq!((code, err.as_str()), (125, "ark: there is no template none\n"));
    assert_eq!(only(&asked).0, "POST /v1/agents", "nothing was made, so nothing is removed");
}

#[test]
fn an_interrupt_ends_the_code_and_its_agent() {
    let (host, asked) = start();
    for (place, last) in
        [("--template=py", "DELETE /v1/agents/eval-"), ("--agent=a1", "POST /v1/agents/a1/eval")]
    {
        let child = host.command(&["eval", place, "hang"]).spawn().unwrap();
        let evaluates = || asked.lock().unwrap().last().is_some_and(|(target, _)| target.ends_with("/eval"));
        while !evaluates() {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
        assert_eq!(told(child.wait_with_output().unwrap()), (130, String::new(), String::new()));
        let all = std::mem::take(&mut *asked.lock().unwrap());
        assert!(all.last().unwrap().0.starts_with(last), "{all:?}");
    }
}

#[test]
fn forks_are_named_and_failures_told() {
    let (host, asked) = start();
    let (code, out, err) = host.run(&["fork", "a1", "-n", "10"], "");
    assert_eq!((code, out.lines().count(), err.as_str()), (0, 10, ""));
    assert!(out.starts_with("a1-1\na1-2\n"), "{out}");
    assert_eq!(only(&asked), ("POST /v1/agents/a1/fork".to_owned(), json!({ "count": 10 })));
    assert_eq!(host.run(&["fork", "a1"], ""), (0, "a1-1\n".into(), String::new()));
    let (code, out, err) = host.run(&["fork", "a1", "-n", "12"], "");
    assert_eq!((code, out.lines().count()), (125, 11));
    assert_eq!(err, "ark: the fork a1-3 did not come to be: its clock is 80 ms off\n");
    let (code, out, err) = host.run(&["fork", "a1", "-n", "23"], "");
    assert_eq!((code, out.lines().count(), err.lines().count()), (125, 20, 4));
    assert!(err.ends_with("ark: 3 of 23 forks did not come to be\n"), "{err}");
    let (code, out, err) = host.run(&["fork", "a1", "-n", "12", "--json"], "");
    assert_eq!(
        (code, serde_json::from_str::<Value>(&out).unwrap()["failed"][0]["name"].as_str()),
        (125, Some("a1-3"))
    );
    assert!(serde_json::from_str::<Problem>(&err).unwrap().detail.contains("80 ms"));
    for count in ["0", "10000"] {
        let (code, _, err) = host.run(&["fork", "a1", "-n", count], "");
        assert!(code == 125 && err.contains("ask for 1 to 256"), "{err}");
    }
}

#[test]
fn agents_pause_resume_and_show_their_receipts() {
    let (host, asked) = start();
    assert_eq!(host.run(&["pause", "a1"], ""), (0, "a1\n".into(), String::new()));
    assert_eq!(only(&asked), ("POST /v1/agents/a1/pause".to_owned(), Value::Null));
    let (code, out, err) = host.run(&["resume", "a1", "nobody", "a2"], "");
    assert_eq!(
        (code, out.as_str(), err.as_str()),
        (125, "a1\na2\n", "ark: no agent nobody; there are: a1\n")
    );
    let (_, out, _) = host.run(&["pause", "--json", "a1"], "");
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["agents"][0]["name"], "a1");

    let (code, out, _) = host.run(&["receipt", "a1-3"], "");
    assert!(code == 0 && out.starts_with("agent      a1-3 (0011223344556677)\n"), "{out}");
    assert!(out.contains("clock is right        passed  host saw it    3 ms off\n"), "{out}");
    assert!(out.contains("host name is its own  passed  guest says so  a1-3\\u{1b}[2J\n"), "{out}");
    let (_, out, _) = host.run(&["receipt", "--json", "a1-3"], "");
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap(), receipt());
    let (code, _, err) = host.run(&["receipt", "a1"], "");
    assert_eq!((code, err.as_str()), (125, "ark: a1 was booted\n"));
}

#[test]
fn snapshots_are_taken_listed_used_and_removed() {
    let (host, asked) = start();
    for line in [&["snapshot", "a1", "before-edit"][..], &["snapshot", "--agent", "a1", "before-edit"]] {
        assert_eq!(host.run(line, ""), (0, "before-edit\n".into(), String::new()));
        assert_eq!(
            only(&asked),
            ("POST /v1/agents/a1/snapshots".to_owned(), json!({ "name": "before-edit" }))
        );
    }
    for line in [&["snapshots"][..], &["snapshot", "ls"]] {
        let (code, out, _) = host.run(line, "");
        assert!(
            code == 0 && out.starts_with("NAME         AGENT  IMAGE   KIND                   SIZE"),
            "{out}"
        );
        assert!(
            out.contains("\nbefore-edit  a1     python  diff over template py  9.0 MiB  900 µs  41 ms"),
            "{out}"
        );
    }
    asked.lock().unwrap().clear();
    assert_eq!(host.run(&["snapshot", "compact", "s1"], ""), (0, "s1\n".into(), String::new()));
    assert_eq!(only(&asked).0, "POST /v1/snapshots/s1/compact");
    assert_eq!(host.run(&["restore", "before-edit"], ""), (0, "made-up\n".into(), String::new()));
    assert_eq!(only(&asked), ("POST /v1/snapshots/before-edit/restore".to_owned(), json!({})));
    assert_eq!(host.run(&["restore", "before-edit", "--name", "a2"], "").1, "a2\n");
    asked.lock().unwrap().clear();
    assert_eq!(host.run(&["rewind", "a1", "before-edit"], ""), (0, "a1\n".into(), String::new()));
    assert_eq!(only(&asked), ("POST /v1/agents/a1/rewind".to_owned(), json!({ "snapshot": "before-edit" })));

    let (code, out, err) = host.run(&["snapshot", "rm", "s1", "base"], "");
    assert_eq!((code, out.as_str()), (125, "s1\n"));
    assert_eq!(err, "ark: 1 snapshot holds only what changed since base\n");
    asked.lock().unwrap().clear();
    assert_eq!(host.run(&["snapshot", "rm", "--orphans", "base"], ""), (0, "base\n".into(), String::new()));
    assert_eq!(only(&asked).0, "DELETE /v1/snapshots/base?orphans=true");

    for (line, words) in [
        (&["snapshot", "a1"][..], "two names are needed"),
        (&["snapshot", "--agent", "a1", "x", "y"], "one name is needed"),
        (&["snapshot", "--agent", "a1", "ls"], "not both at once"),
        (&["snapshot", "a1", "Before"], "use 1 to 63 of a-z"),
        (&["snapshot"], "ark snapshot [OPTIONS] <AGENT> <NAME>"),
        (&["rewind", "a1", "Before"], "use 1 to 63 of a-z"),
    ] {
        let (code, out, err) = host.run(line, "");
        assert!(code == 125 && out.is_empty() && err.contains(words), "{line:?}: {err}");
    }
    assert!(asked.lock().unwrap().is_empty(), "no such request is made");
}

#[test]
fn templates_are_built_listed_and_removed() {
    let (host, asked) = start();
    let line = ["template", "build", "py", "--image", "python", "--warm", "import numpy, json, asyncio"];
    assert_eq!(host.run(&line, ""), (0, "py\n".into(), String::new()));
    let body = json!({
        "name": "py", "image": "python", "vcpus": 1, "memory_mib": 256, "warm": "import numpy, json, asyncio",
        "timeout_ms": 120_000,
    });
    assert_eq!(only(&asked), ("POST /v1/templates".to_owned(), body));
    let line = [
        "template",
        "build",
        "py",
        "--image",
        "python",
        "--warm-file",
        "-",
        "--timeout",
        "30",
        "--memory",
        "1G",
        "--vcpus",
        "2",
    ];
    assert_eq!(host.run(&line, "import json\n").0, 0);
    let (_, body) = only(&asked);
    assert_eq!((&body["warm"], &body["timeout_ms"]), (&json!("import json\n"), &json!(30_000)));
    assert_eq!((&body["memory_mib"], &body["vcpus"]), (&json!(1024), &json!(2)));
    let (code, _, err) = host.run(&["template", "build", "bad", "--image", "python", "--warm", "1/0"], "");
    assert_eq!((code, err.as_str()), (125, "ark: the warm-up of bad failed: ZeroDivisionError\n"));
    let line = ["template", "build", "bad", "--image", "python", "--warm-file", "/no/such"];
    let (code, _, err) = host.run(&line, "");
    assert_eq!((code, err.as_str()), (125, "ark: cannot read /no/such: No such file or directory\n"));

    for line in [&["templates"][..], &["template", "ls"]] {
        let (code, out, _) = host.run(line, "");
        assert!(code == 0 && out.starts_with("NAME  IMAGE   VCPUS  MEMORY   SIZE    BUILD"), "{out}");
        assert!(out.contains("\npy    python  1      256 MiB  60 MiB  2 s"), "{out}");
        assert!(out.trim_end().ends_with("never  3       import numpy; x = 1"), "{out}");
    }
    let (_, out, _) = host.run(&["templates", "--json"], "");
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["templates"][0]["name"], "py");
    assert_eq!(host.run(&["template", "rm", "py", "py2"], ""), (0, "py\npy2\n".into(), String::new()));
    assert_eq!(asked.lock().unwrap().last().unwrap().0, "DELETE /v1/templates/py2");
}

#[test]
fn agents_come_of_an_image_or_a_template() {
    let (host, asked) = start();
    let created = |line: &[&str]| {
        assert_eq!(host.run(&[&["create", "--name", "a1"], line].concat(), "").0, 0, "{line:?}");
        let (_, mut body) = only(&asked);
        body.as_object_mut().unwrap().retain(|key, _| key != "name" && key != "auto_remove");
        body
    };
    assert_eq!(created(&[]), json!({ "image": "base", "cold": false }), "the default is arkd's");
    assert_eq!(created(&["--template", "py"]), json!({ "template": "py", "cold": false }));
    assert_eq!(
        created(&["--image", "python", "--cold", "--vcpus", "2", "-m", "512M"]),
        json!({ "image": "python", "cold": true, "vcpus": 2, "memory_mib": 512 })
    );
    assert_eq!(
        created(&["--restart", "on-failure:3", "--ttl", "1h", "--idle-timeout", "10m"]),
        json!({ "image": "base", "cold": false, "restart": { "when": "on_failure", "max_restarts": 3 }, "ttl_s": 3600,
                "idle_timeout_s": 600 })
    );
    let (code, _, err) = host.run(&["run", "--restart", "always", "--", "true"], "");
    assert!(code == 125 && err.contains("add --keep"), "{err}");
    for (line, words) in [
        (&["--template", "py", "--vcpus", "2"][..], "leave --vcpus and --memory out"),
        (&["--template", "py", "--memory", "2G"], "leave --vcpus and --memory out"),
        (&["--template", "py", "--cold"], "--cold boots an image"),
        (&["--template", "py", "--image", "base"], "cannot be used with"),
    ] {
        for verb in [&["create"][..], &["run"]] {
            let (code, _, err) =
                host.run(&[verb, line, &["--", "true"][..usize::from(verb == ["run"]) * 2]].concat(), "");
            assert!(code == 125 && err.contains(words), "{verb:?} {line:?}: {err}");
        }
    }
    assert!(asked.lock().unwrap().is_empty(), "no such request is made");
}

#[test]
fn shells_complete_the_new_verbs() {
    let dir = tempfile::tempdir().unwrap();
    let (code, script, _) = told(ark(dir.path(), &["completions", "bash"]).output().unwrap());
    assert_eq!(code, 0);
    for word in ["template", "snapshot", "rewind", "receipt", "--orphans", "--warm-file"] {
        assert!(script.contains(word), "{word}");
    }
}

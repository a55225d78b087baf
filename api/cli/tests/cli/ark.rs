//! The program `ark` as users run it, against a small server on a Unix socket that answers as `arkd` would.

use std::process::Command;

use crate::host::{Host, agent, ark, problem, told};
use ark_types::agent::CreateAgent;
use ark_types::exec::{ExecEnd, ExecRequest, ExitStatus};
use ark_types::guest::{ErrorCode, Frame, GuestError, Kind, SignalRequest, Started};
use ark_types::problem::{Problem, ProblemKind};
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path as Segment, RawQuery};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

fn message(kind: Kind, value: &impl serde::Serialize) -> Message {
    Message::Binary(Frame::json(kind, value).unwrap().encode().into())
}

/// A program named by its first argument: `cat` echoes, `trap` answers a signal, `fail` exits with 7, others are missing.
async fn program(mut socket: WebSocket) {
    let exited =
        |code| message(Kind::Exited, &ExecEnd { status: ExitStatus::Exited { code }, duration_us: 5 });
    let mut name = String::new();
    while let Some(Ok(Message::Binary(bytes))) = socket.recv().await {
        let frame = Frame::decode(&bytes).unwrap();
        let replies = match frame.kind {
            Kind::Exec => {
                name = frame.parse::<ExecRequest>().unwrap().argv.remove(0);
                let started = message(Kind::Started, &Started { pid: 7 });
                let bytes =
                    |kind, text: &str| Message::Binary(Frame::raw(kind, text).unwrap().encode().into());
                match name.as_str() {
                    "cat" => vec![started],
                    "trap" => vec![started, bytes(Kind::Stdout, "ready\n")],
                    "fail" => {
                        vec![started, bytes(Kind::Stdout, "out\n"), bytes(Kind::Stderr, "err\n"), exited(7)]
                    }
                    _ => {
                        let message_text = format!("there is no program {name:?}");
                        let error = GuestError { code: ErrorCode::ProgramNotFound, message: message_text };
                        vec![message(Kind::Error, &error)]
                    }
                }
            }
            Kind::Stdin => {
                vec![Message::Binary(Frame::raw(Kind::Stdout, frame.payload).unwrap().encode().into())]
            }
            Kind::StdinClose if name == "cat" => vec![exited(0)],
            Kind::Signal => vec![exited(100 + frame.parse::<SignalRequest>().unwrap().signal)],
            _ => Vec::new(),
        };
        for reply in replies {
            // A program that ended may not be listened to any more.
            let _ = socket.send(reply).await;
        }
    }
}

async fn create(Json(request): Json<CreateAgent>) -> Response {
    let name = request.name.map(|n| n.to_string()).unwrap_or_default();
    if name == "taken" {
        return problem(ProblemKind::NameTaken, "the name taken is taken");
    }
    (StatusCode::CREATED, Json(agent(&name))).into_response()
}

fn owner_of(name: &str, quota: &Value) -> Value {
    let amount = json!({ "agents": 1, "memory_mib": 256, "vcpus": 1 });
    json!({ "owner": name, "quota": quota, "reserved": amount, "waiting": amount })
}

async fn owner(Segment(name): Segment<String>) -> Json<Value> {
    Json(owner_of(&name, &json!({})))
}

async fn set_quota(Segment(name): Segment<String>, Json(quota): Json<Value>) -> Json<Value> {
    Json(owner_of(&name, &quota))
}

/// A console; followed, its stream ends early once, and a part of what follows is left out.
async fn console(RawQuery(query): RawQuery) -> &'static str {
    match query.as_deref() {
        None => "line one\nline two\n",
        Some("follow=true") => {
            "id: 4\nevent: console\ndata: {\"offset\":0,\"data\":\"line\",\"encoding\":\"utf8\"}\n\n"
        }
        Some("follow=true&from=4") => {
            "id: 9\nevent: console\ndata: {\"offset\":4,\"data\":\"IG9uZQo=\",\"encoding\":\"base64\"}\n\n: sign of life\n\n\
             id: 29\nevent: left_out\ndata: {\"offset\":9,\"bytes\":20}\n\n\
             id: 34\nevent: console\ndata: {\"offset\":29,\"data\":\"last\\n\",\"encoding\":\"utf8\"}\n\n\
             id: 34\nevent: end\ndata: {\"offset\":34}\n\n"
        }
        Some(other) => panic!("{other}"),
    }
}

fn routes() -> Router {
    let remove = |Segment(name): Segment<String>| async move {
        if name == "a1" {
            StatusCode::NO_CONTENT.into_response()
        } else {
            problem(ProblemKind::AgentNotFound, "no such agent")
        }
    };
    Router::new()
        .route("/v1/agents", post(create).get(|| async { Json(json!({ "agents": [agent("a1")] })) }))
        .route("/v1/agents/{agent}", delete(remove))
        .route("/v1/owners/{owner}", get(owner).put(set_quota).delete(|| async { StatusCode::NO_CONTENT }))
        .route("/v1/owners", get(|| async { Json(json!({ "owners": [owner_of("team", &json!({}))] })) }))
        .route("/v1/queue", get(|| async { Json(json!({ "capacity": 9, "waiting": [] })) }))
        .route("/v1/agents/{agent}/logs", get(console))
        .route(
            "/v1/agents/{agent}/exec/stream",
            get(|upgrade: WebSocketUpgrade| async { upgrade.on_upgrade(program) }),
        )
}

#[test]
fn a_programs_streams_and_exit_code_are_arks() {
    let host = Host::start(routes());
    assert_eq!(host.run(&["run", "--", "cat"], "hello\n"), (0, "hello\n".into(), String::new()));
    assert_eq!(
        host.run(&["run", "cat"], ""),
        (0, String::new(), String::new()),
        "the dashes may be left out"
    );
    assert_eq!(host.run(&["exec", "a1", "--", "fail"], ""), (7, "out\n".into(), "err\n".into()));
    let (code, out, err) = host.run(&["exec", "--json", "a1", "--", "fail"], "");
    let reply: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, err.as_str()), (7, ""));
    assert_eq!(
        (&reply["agent"], &reply["exit_code"], &reply["stdout"]),
        (&json!("a1"), &json!(7), &json!("out\n"))
    );
    let (code, out, err) = host.run(&["exec", "a1", "--", "nope"], "");
    assert_eq!((code, out.as_str(), err.as_str()), (127, "", "ark: there is no program \"nope\"\n"));
}

#[test]
fn a_signal_reaches_the_program_and_its_answer_comes_back() {
    use std::io::{BufRead, BufReader};
    let host = Host::start(routes());
    let mut child = host.command(&["exec", "a1", "--", "trap"]).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    let kill = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    assert_eq!(child.wait().unwrap().code(), Some(115));
}

#[test]
fn lists_and_errors_come_for_people_and_for_machines() {
    let host = Host::start(routes());
    let (code, out, _) = host.run(&["ps"], "");
    assert!(
        code == 0
            && out.starts_with("NAME  ID")
            && out.contains("\na1    0011223344556677  base   boot    running"),
        "{out}"
    );
    let (_, out, _) = host.run(&["ps", "--json"], "");
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["agents"][0]["name"], "a1");
    let (code, out, err) = host.run(&["create", "--name", "taken", "--json"], "");
    let told: Problem = serde_json::from_str(&err).unwrap();
    assert_eq!((code, out.as_str(), told.kind), (125, "", ProblemKind::NameTaken));
    let (code, out, err) = host.run(&["rm", "a1", "a2"], "");
    assert_eq!((code, out.as_str()), (125, "a1\n"));
    assert_eq!(err, "ark: no such agent; there are: a1\n");
    assert_eq!(host.run(&["rm", "-f", "a1", "a2"], ""), (0, "a1\n".into(), String::new()));
    assert_eq!(
        host.run(&["logs", "--json", "a1"], "").1,
        "{\"line\":\"line one\"}\n{\"line\":\"line two\"}\n"
    );
    let followed = "line one\n\n[console: 20 bytes left out here]\nlast\n";
    assert_eq!(host.run(&["logs", "-f", "a1"], ""), (0, followed.into(), String::new()));
    let (code, _, err) = host.run(&["frobnicate", "--json"], "");
    assert_eq!((code, serde_json::from_str::<Problem>(&err).unwrap().kind), (125, ProblemKind::BadRequest));
    assert_eq!(host.run(&["run"], "").0, 125, "a program is needed");
    assert_eq!(host.run(&["--version"], "").0, 0);
}

#[test]
fn quotas_are_listed_shown_set_and_cleared() {
    let host = Host::start(routes());
    let plain = "OWNER  AGENTS  MEMORY   VCPUS  WAITING\nteam   1       256 MiB  1      1\n";
    for line in [&["quota"][..], &["quota", "team"], &["quota", "team", "--clear"]] {
        assert_eq!(host.run(line, ""), (0, plain.into(), String::new()), "{line:?}");
    }
    let (code, out, _) = host.run(&["quota", "team", "--agents", "3", "--memory", "1G", "--json"], "");
    let told: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &told["quota"]), (0, &json!({ "agents": 3, "memory_mib": 1024 })));
    assert_eq!(host.run(&["quota", "--clear"], "").0, 125, "whose?");
    let (code, out, _) = host.run(&["queue"], "");
    assert!(code == 0 && out.starts_with("POSITION  NAME") && out.lines().count() == 1, "{out}");
}

#[test]
fn a_missing_build_is_said_with_the_next_step() {
    let dir = tempfile::tempdir().unwrap();
    for (host, args, words) in [
        ("native", &["ps"][..], "arkd is missing: say `make`"),
        ("auto", &["run", "--", "true"][..], "ark-vmm is missing: say `make`"),
        ("machine", &["machine", "start"][..], "vmlinuz is missing: say `make`"),
        ("machine", &["machine", "shell", "--", "true"][..], "`ark machine start` starts it"),
    ] {
        let (code, out, err) = told(ark(dir.path(), args).env("ARK_HOST", host).output().unwrap());
        assert_eq!((code, out.as_str()), (125, ""));
        assert!(err.contains(words), "{err}");
    }
    let (code, out, _) = told(ark(dir.path(), &["stop", "--json"]).output().unwrap());
    assert_eq!((code, out.as_str()), (0, "{\"arkd\":false,\"machine\":false}\n"));
    let (code, out, _) = told(ark(dir.path(), &["doctor"]).output().unwrap());
    assert!(code == 1 && out.contains('✗') && out.contains("agents cannot run yet"), "{out}");
}

//! `ark task` against a server that answers as `arkd` would.

use std::sync::{Arc, Mutex};

use crate::host::{Host, problem};
use ark_types::problem::ProblemKind;
use axum::body::Bytes;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use futures_util::StreamExt as _;
use serde_json::{Value, json};

type Asked = Arc<Mutex<Vec<String>>>;

/// The task `id`, whose state is its id.
fn task(id: &str) -> Value {
    let mut task = json!({
        "id": id, "work": { "kind": "command", "program": "make" }, "created_unix_ms": 0, "state": id, "failures": 1,
    });
    if id == "failed" {
        let end = json!({ "outcome": "failed", "reason": "it broke", "exit_code": 7 });
        task["attempts"] = json!([{ "number": 2, "started_unix_ms": 0, "end": end }]);
        task["reason"] = json!("it broke\u{1b}[2J");
    }
    if id == "succeeded" {
        task["result"] = json!({
            "attempt": 1, "exit_code": 0, "stdout": "out\n", "stderr": "", "truncated": false, "value": "42", "duration_us": 1,
        });
    }
    task
}

fn answer(method: &Method, uri: &Uri, body: &str) -> Response {
    let query = uri.query().unwrap_or_default();
    match (method.as_str(), uri.path()) {
        ("POST", "/v1/tasks") => {
            let asked: Value = serde_json::from_str(body).unwrap();
            (StatusCode::CREATED, Json(task(asked["name"].as_str().unwrap_or("succeeded")))).into_response()
        }
        ("GET", "/v1/tasks") if query.contains("cursor=") => {
            Json(json!({ "tasks": [task("failed")] })).into_response()
        }
        ("GET", "/v1/tasks") => {
            Json(json!({ "tasks": [task("succeeded")], "next_cursor": "1-2" })).into_response()
        }
        ("POST", "/v1/tasks/failed/cancel") => problem(ProblemKind::TaskEnded, "the task failed has ended"),
        ("POST", _) => Json(task("cancelled")).into_response(),
        ("DELETE", _) => StatusCode::NO_CONTENT.into_response(),
        (_, path) if path.ends_with("/logs") => {
            if query == "stream=stderr" { "err\n" } else { "out\n" }.into_response()
        }
        // One name for a person, the other for the wire.
        (_, path) => {
            Json(task(&path["/v1/tasks/".len()..].replace("timed-out", "timed_out"))).into_response()
        }
    }
}

fn server() -> (Host, Asked) {
    let asked = Asked::default();
    let notes = asked.clone();
    let routes = Router::new().fallback(move |method: Method, uri: Uri, body: Bytes| async move {
        let body = String::from_utf8(body.to_vec()).unwrap();
        notes.lock().unwrap().push(format!("{method} {uri} {body}").trim_end().to_owned());
        answer(&method, &uri, &body)
    });
    (Host::start(routes), asked)
}

#[test]
fn a_task_is_asked_for_and_its_end_awaited() {
    let (host, asked) = server();
    let line = [
        "task",
        "run",
        "--image",
        "python",
        "--retries",
        "2",
        "--backoff",
        "100ms",
        "--timeout",
        "30s",
        "--deadline",
        "1h",
        "--key",
        "nightly-1",
        "-l",
        "app=x",
        "-e",
        "A=1",
        "-i",
        "--owner",
        "team",
        "--priority",
        "-5",
        "--",
        "make",
        "all",
    ];
    let (code, out, errors) = host.run(&line, "input");
    assert_eq!((code, out.as_str(), errors.as_str()), (0, "out\n42\n", "err\n"));
    let first = asked.lock().unwrap().remove(0);
    let body: Value = serde_json::from_str(first.strip_prefix("POST /v1/tasks ").unwrap()).unwrap();
    let wanted = json!({
        "owner": "team", "labels": { "app": "x" }, "image": "python", "priority": -5, "key": "nightly-1",
        "command": { "argv": ["make", "all"], "env": { "A": "1" }, "stdin": "aW5wdXQ=", "encoding": "base64" },
        "retry": { "max_attempts": 3, "backoff_ms": 100, "max_backoff_ms": 60000 },
        "timeout_ms": 30000, "deadline_ms": 3_600_000,
    });
    assert_eq!(body, wanted);
    assert_eq!(asked.lock().unwrap().remove(0), "GET /v1/tasks/succeeded?wait_ms=30000");

    let (code, out, errors) = host.run(&["task", "run", "--name", "failed", "--", "make"], "");
    assert_eq!((code, out.as_str()), (7, "out\n"));
    assert!(errors.contains("the task failed is failed: it broke\\u{1b}[2J"), "{errors}");
    let (code, out, _) =
        host.run(&["--json", "task", "eval", "--name", "failed", "--template", "py", "6*7"], "");
    assert_eq!((code, serde_json::from_str::<Value>(&out).unwrap()["state"].as_str()), (7, Some("failed")));
    let body = asked.lock().unwrap().iter().find(|line| line.contains("6*7")).cloned().unwrap();
    assert!(body.contains(r#""template":"py","eval":{"code":"6*7","language":"python"}"#), "{body}");
    let (code, out, _) = host.run(&["task", "run", "--detach", "--name", "queued", "--", "make"], "");
    assert_eq!((code, out.as_str()), (0, "queued\n"));

    for (arguments, said) in [
        (&["task", "run", "--retries", "100", "--", "a"][..], "0..=99"),
        (&["task", "run", "--key", "a b", "--", "a"], "is not a task's key"),
        (&["task", "run", "--template", "py", "--vcpus", "2", "--", "a"], "cannot be used with"),
        (&["task", "ls", "--state", "happy"], "is no state of a task"),
    ] {
        let (code, _, told) = host.run(arguments, "");
        assert!(code != 0 && told.contains(said), "{arguments:?}: {told}");
    }
}

#[test]
fn tasks_are_listed_shown_cancelled_and_removed() {
    let (host, asked) = server();
    let (code, out, _) = host.run(&["task", "ls", "-l", "app=x", "--state", "failed"], "");
    assert_eq!((code, out.lines().count()), (0, 3), "{out}");
    assert!(out.contains("it broke\\u{1b}[2J"), "{out}");
    let query = "GET /v1/tasks?state=failed&labels=app%3Dx";
    assert_eq!(*asked.lock().unwrap(), [query.to_owned(), format!("{query}&cursor=1-2")]);
    let (code, out, _) = host.run(&["task", "show", "failed"], "");
    assert!(code == 0 && out.contains("attempt 2 ") && out.contains("failures   1 of 1"), "{out}");
    let (code, out, errors) = host.run(&["task", "logs", "failed"], "");
    assert_eq!((code, out.as_str(), errors.as_str()), (0, "out\n", "err\n"));

    let (code, out, errors) = host.run(&["task", "cancel", "queued", "failed"], "");
    assert_eq!((code, out.as_str()), (125, "cancelled\n"));
    assert!(errors.contains("the task failed has ended"), "{errors}");
    let (code, out, _) = host.run(&["task", "rm", "a", "b", "--json"], "");
    assert_eq!((code, out.as_str()), (0, "{\"removed\":[\"a\",\"b\"]}\n"));
}

#[test]
fn attempts_are_followed_one_after_the_other_and_taken_up_again_where_they_broke() {
    let asked = Asked::default();
    let notes = asked.clone();
    let routes = Router::new().fallback(move |uri: Uri| async move {
        let uri = uri.to_string();
        notes.lock().unwrap().push(uri.clone());
        let looks = notes.lock().unwrap().iter().filter(|uri| !uri.contains("/logs")).count();
        let breaks = || {
            let pieces = futures_util::stream::iter([Ok("on"), Err(std::io::Error::other("arkd is killed"))]);
            // What was written before is on its way by then.
            let pieces = pieces.then(|piece: std::io::Result<&str>| async {
                if piece.is_err() {
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
                piece
            });
            axum::body::Body::from_stream(pieces).into_response()
        };
        match uri.split_once("/logs?stream=").map(|(_, query)| query) {
            Some("stdout&attempt=1&follow=true") => breaks(),
            Some("stdout&attempt=1&from=2&follow=true") => "e\n".into_response(),
            Some("stdout&attempt=2&follow=true") => "two\n".into_response(),
            Some("stderr&attempt=2&follow=true") => "err\n".into_response(),
            Some(_) => "".into_response(),
            None => {
                let attempt = |number: usize| {
                    let end = (looks > number).then(|| json!({ "outcome": "failed" }));
                    json!({ "number": number, "started_unix_ms": 0, "end": end })
                };
                let mut task = task(if looks > 2 { "failed" } else { "running" });
                let attempts: Vec<Value> = (1..=looks.min(2)).map(attempt).collect();
                task["attempts"] = attempts.into();
                Json(task).into_response()
            }
        }
    });
    let host = Host::start(routes);
    let (code, out, errors) = host.run(&["task", "logs", "-f", "t"], "");
    assert_eq!((code, out.as_str(), errors.as_str()), (0, "one\ntwo\n", "err\n"), "{asked:?}");
    let (code, out, _) = host.run(&["task", "logs", "--attempt", "2", "--follow", "t"], "");
    assert_eq!((code, out.as_str()), (0, "two\n"));
    let (code, _, told) = host.run(&["task", "logs", "--attempt", "0", "t"], "");
    assert!(code != 0 && told.contains("--attempt"), "{told}");
}

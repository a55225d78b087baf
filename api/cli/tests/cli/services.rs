//! `ark service …`, against a server that answers as `arkd` would.

use std::sync::{Arc, Mutex};

use crate::host::{Host, problem};
use ark_types::problem::ProblemKind;
use axum::body::Bytes;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use serde_json::{Value, json};

type Asked = Arc<Mutex<Vec<String>>>;

fn service(updated: u32, is_stopped: bool) -> Value {
    let replica = json!({
        "agent": "web-00112233", "id": "0011223344556677", "generation": 2, "state": "ready", "agent_state": "running", "load": 0,
    });
    json!({
        "spec": { "name": "web", "replicas": 1, "image": "base" }, "generation": 2, "ready": 1, "updated": updated,
        "is_stopped": is_stopped, "replicas": [replica],
        "conditions": if is_stopped { json!(["the update is stopped: it panicked"]) } else { json!([]) },
    })
}

fn answer(method: &Method, uri: &Uri, looks: usize, body: &str) -> Response {
    match (method.as_str(), uri.path()) {
        ("GET", "/v1/services") => Json(json!({ "services": [service(1, false)] })).into_response(),
        // The first look is too early.
        ("GET", "/v1/services/web") if looks < 2 => Json(service(0, false)).into_response(),
        ("GET", "/v1/services/web") => Json(service(1, false)).into_response(),
        ("PUT", "/v1/services/web") if body.contains("panics") => Json(service(0, true)).into_response(),
        ("POST", "/v1/services") => (StatusCode::CREATED, Json(service(0, false))).into_response(),
        ("PUT" | "PATCH", "/v1/services/web") | ("POST", "/v1/services/web/drain") => {
            Json(service(0, false)).into_response()
        }
        ("GET", "/v1/services/web/logs") if uri.query() == Some("replica=web-00112233") => {
            "serving\nat 80".into_response()
        }
        ("DELETE", "/v1/services/web") => StatusCode::NO_CONTENT.into_response(),
        ("POST", "/v1/services/web/call") if body.contains("eval") => {
            let eval =
                json!({ "stdout": "", "stderr": "", "value": "42", "truncated": false, "duration_us": 1 });
            Json(json!({ "agent": "web-1", "id": "0011223344556677", "result": { "eval": eval } }))
                .into_response()
        }
        ("POST", "/v1/services/web/call") => {
            let exec = json!({
                "status": { "how": "exited", "code": 3 }, "exit_code": 3, "stdout": "out\n", "stderr": "err\n", "truncated": false,
                "duration_us": 1,
            });
            Json(json!({ "agent": "web-1", "id": "0011223344556677", "result": { "exec": exec } }))
                .into_response()
        }
        _ => problem(ProblemKind::ServiceNotFound, "there is no service \"other\""),
    }
}

fn server() -> (Host, Asked) {
    let asked = Asked::default();
    let notes = asked.clone();
    let routes = Router::new().fallback(move |method: Method, uri: Uri, body: Bytes| async move {
        let body = String::from_utf8(body.to_vec()).unwrap();
        let mut notes = notes.lock().unwrap();
        notes.push(format!("{method} {uri} {body}").trim_end().to_owned());
        let looks = notes.iter().filter(|note| *note == "GET /v1/services/web").count();
        answer(&method, &uri, looks, &body)
    });
    (Host::start(routes), asked)
}

#[test]
fn a_service_is_made_waited_for_and_shown() {
    let (host, asked) = server();
    let line = ["service", "create", "web", "-n", "1", "-e", "A=b", "-l", "app=shop", "--wait"];
    let (code, out, err) = host.run(&line, "");
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(
        out,
        "web: 1 of 1 replicas are ready, generation 2\n\
         REPLICA       ID                GENERATION  STATE  CALLS\n\
         web-00112233  0011223344556677  2           ready  0\n"
    );
    let first = asked.lock().unwrap()[0].clone();
    let body: Value = serde_json::from_str(first.strip_prefix("POST /v1/services ").unwrap()).unwrap();
    assert_eq!(
        (&body["env"]["A"], &body["labels"]["app"], &body["restart"]["when"]),
        (&json!("b"), &json!("shop"), &json!("always"))
    );

    let (code, out, _) = host.run(&["service", "ls"], "");
    assert_eq!(code, 0);
    assert_eq!(
        out,
        "NAME  READY   UPDATED  GENERATION  OF    OWNER    CONDITIONS\n\
         web   1 of 1  1        2           base  default\n"
    );
    let (code, out, _) = host.run(&["--json", "service", "show", "web"], "");
    assert_eq!((code, serde_json::from_str::<Value>(&out).unwrap()["generation"].clone()), (0, json!(2)));
}

#[test]
fn a_command_is_sent_and_what_it_writes_is_shown() {
    let (host, asked) = server();
    let line =
        ["service", "create", "web", "--health-tcp", "80", "-w", "/srv", "--", "httpd", "-f", "--wait"];
    assert_eq!(host.run(&line, "").0, 0);
    let first = asked.lock().unwrap()[0].clone();
    let body: Value = serde_json::from_str(first.strip_prefix("POST /v1/services ").unwrap()).unwrap();
    assert_eq!(body["command"], json!({ "argv": ["httpd", "-f", "--wait"], "cwd": "/srv" }));
    assert_eq!(body["health_check"]["probe"], json!({ "kind": "tcp", "port": 80 }));
    let (code, out, err) = host.run(&["service", "logs", "web"], "");
    assert_eq!((code, out.as_str(), err.as_str()), (0, "==> web-00112233 <==\nserving\nat 80\n", ""));
    let (code, out, _) = host.run(&["service", "logs", "web", "web-00112233"], "");
    assert_eq!((code, out.as_str()), (0, "serving\nat 80\n"));
    let (code, _, err) = host.run(&["service", "logs", "web", "other"], "");
    assert_eq!((code, err.is_empty()), (125, false));
}

#[test]
fn an_update_that_stops_fails_the_wait_with_its_reason() {
    let (host, _) = server();
    let (code, out, _) = host.run(&["service", "update", "web", "--image", "panics", "--wait"], "");
    assert_eq!(code, 1);
    assert!(out.ends_with("- the update is stopped: it panicked\n"), "{out}");
}

#[test]
fn calls_are_made_and_replicas_come_and_go() {
    let (host, asked) = server();
    let (code, out, err) = host.run(&["service", "call", "web", "--wait", "2s", "--", "ls", "-l"], "");
    assert_eq!((code, out.as_str(), err.as_str()), (3, "out\n", "err\n"));
    let (code, out, _) = host.run(&["service", "call", "web", "--eval", "6*7"], "");
    assert_eq!((code, out.as_str()), (0, "42\n"));
    let (code, out, _) = host.run(&["--json", "service", "call", "web", "--", "ls"], "");
    assert_eq!((code, serde_json::from_str::<Value>(&out).unwrap()["agent"].clone()), (3, json!("web-1")));
    for line in [
        &["service", "scale", "web", "1"][..],
        &["service", "drain", "web", "web-1", "--grace", "0"],
        &["service", "rm", "web", "--grace", "5s"],
    ] {
        assert_eq!(host.run(line, "").0, 0, "{line:?}");
    }
    let asked = asked.lock().unwrap().join("\n");
    assert!(
        asked.contains("POST /v1/services/web/call?wait_ms=2000 {\"exec\":{\"argv\":[\"ls\",\"-l\"]"),
        "{asked}"
    );
    assert!(asked.contains("PATCH /v1/services/web {\"replicas\":1}"), "{asked}");
    assert!(asked.contains("POST /v1/services/web/drain?grace_ms=0 {\"agent\":\"web-1\"}"), "{asked}");
    assert!(asked.contains("DELETE /v1/services/web?grace_ms=5000"), "{asked}");
    let (code, _, err) = host.run(&["service", "show", "other"], "");
    assert_eq!((code, err.as_str()), (125, "ark: there is no service \"other\"\n"));
}

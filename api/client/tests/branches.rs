//! The routes of templates, snapshots and forks against a server that tells back what it was asked.

use std::sync::{Arc, Mutex};

use ark_client::{Client, Endpoint};
use ark_types::eval::EvalRequest;
use ark_types::problem::{PROBLEM_JSON, Problem, ProblemKind};
use ark_types::snapshot::{CreateSnapshot, ForkAgent, RestoreSnapshot, RewindAgent};
use ark_types::template::CreateTemplate;
use axum::body::Bytes;
use axum::http::header::CONTENT_TYPE;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use serde_json::{Value, json};

/// `METHOD target body` of every request, in order.
type Asked = Arc<Mutex<Vec<String>>>;

fn answer(method: &Method, path: &str) -> Response {
    let agent = json!({
        "id": "0011223344556677", "name": "a1", "origin": { "from": "snapshot", "name": "s" }, "image": "base",
        "image_digest": "sha256:00", "vcpus": 1, "memory_mib": 256, "state": "paused", "created_unix_ms": 0,
        "auto_remove": false,
    });
    let snapshot = json!({
        "name": "s", "id": "00", "kind": "full", "agent": "a1", "image": "base", "vcpus": 1, "memory_mib": 256, "bytes": 1,
        "pause_us": 1, "durable_us": 2, "created_unix_ms": 0, "children": 0, "agents": 0,
    });
    let template = json!({
        "name": "py", "image": "python", "digest": "sha256:00", "vcpus": 1, "memory_mib": 256, "bytes": 1, "build_ms": 1,
        "created_unix_ms": 0, "used_unix_ms": 0, "agents": 0,
    });
    let value: Value = match (method.as_str(), path) {
        ("DELETE", _) => return StatusCode::NO_CONTENT.into_response(),
        (_, "/v1/agents/a1/receipt") => {
            let problem = Problem::new(ProblemKind::NoReceipt, "a1 was booted");
            let body = serde_json::to_vec(&problem).unwrap();
            return (StatusCode::NOT_FOUND, [(CONTENT_TYPE, PROBLEM_JSON)], body).into_response();
        }
        (_, path) if path.ends_with("/eval") => {
            json!({ "stdout": "", "stderr": "", "value": "42", "truncated": false, "duration_us": 1 })
        }
        (_, path) if path.ends_with("/fork") => {
            json!({ "agents": [agent], "failed": [], "pause_us": 1, "durable_us": 2 })
        }
        ("GET", "/v1/snapshots") => json!({ "snapshots": [snapshot] }),
        ("GET", "/v1/templates") => json!({ "templates": [template] }),
        (_, path) if path.starts_with("/v1/templates") => template,
        (_, path) if path.ends_with("/restore") => agent,
        (_, path) if path.contains("/snapshots") => snapshot,
        _ => agent,
    };
    Json(value).into_response()
}

/// A client of a server that notes every request.
fn server(dir: &tempfile::TempDir) -> (Client, Asked) {
    let asked = Asked::default();
    let notes = asked.clone();
    let routes = Router::new().fallback(move |method: Method, uri: Uri, body: Bytes| async move {
        let body = String::from_utf8(body.to_vec()).unwrap();
        notes.lock().unwrap().push(format!("{method} {uri} {body}").trim_end().to_owned());
        answer(&method, uri.path())
    });
    let path = dir.path().join("arkd.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    tokio::spawn(async move { axum::serve(listener, routes).await });
    (Client::new(Endpoint::Unix(path)), asked)
}

#[tokio::test]
async fn every_route_is_asked_by_its_method_path_and_body() {
    let dir = tempfile::tempdir().unwrap();
    let (client, asked) = server(&dir);
    let last = || asked.lock().unwrap().pop().unwrap();

    let request = EvalRequest { code: "6*7".to_owned(), ..EvalRequest::default() };
    assert_eq!(client.eval("a1", &request).await.unwrap().value.as_deref(), Some("42"));
    assert_eq!(last(), r#"POST /v1/agents/a1/eval {"code":"6*7","language":"python"}"#);
    assert_eq!(
        client.fork("a/1", &ForkAgent { count: 10, ..ForkAgent::default() }).await.unwrap().agents.len(),
        1
    );
    assert_eq!(last(), r#"POST /v1/agents/a%2F1/fork {"count":10}"#);
    client.pause("a1").await.unwrap();
    assert_eq!(last(), "POST /v1/agents/a1/pause");
    client.resume("a1").await.unwrap();
    assert_eq!(last(), "POST /v1/agents/a1/resume");
    client.rewind("a1", &RewindAgent { snapshot: "s".parse().unwrap() }).await.unwrap();
    assert_eq!(last(), r#"POST /v1/agents/a1/rewind {"snapshot":"s"}"#);
    let error = client.receipt("a1").await.unwrap_err();
    assert_eq!(error.problem().map(|p| p.kind), Some(ProblemKind::NoReceipt));
    assert_eq!((error.to_string(), last()), ("a1 was booted".into(), "GET /v1/agents/a1/receipt".into()));

    client.take_snapshot("a1", &CreateSnapshot { name: "s".parse().unwrap() }).await.unwrap();
    assert_eq!(last(), r#"POST /v1/agents/a1/snapshots {"name":"s"}"#);
    assert_eq!(client.snapshots(false).await.unwrap().snapshots.len(), 1);
    assert_eq!(last(), "GET /v1/snapshots");
    client.snapshot("s").await.unwrap();
    assert_eq!(last(), "GET /v1/snapshots/s");
    client.compact("s").await.unwrap();
    assert_eq!(last(), "POST /v1/snapshots/s/compact");
    client.restore("s", &RestoreSnapshot::default()).await.unwrap();
    assert_eq!(last(), "POST /v1/snapshots/s/restore {}");
    client.delete_snapshot("s", false).await.unwrap();
    assert_eq!(last(), "DELETE /v1/snapshots/s");
    client.delete_snapshot("s", true).await.unwrap();
    assert_eq!(last(), "DELETE /v1/snapshots/s?orphans=true");

    let request: CreateTemplate = serde_json::from_str(r#"{"name":"py","image":"python"}"#).unwrap();
    client.build_template(&request).await.unwrap();
    assert!(last().starts_with(r#"POST /v1/templates {"name":"py","image":"python""#));
    assert_eq!(client.templates().await.unwrap().templates.len(), 1);
    assert_eq!(last(), "GET /v1/templates");
    client.template("py").await.unwrap();
    assert_eq!(last(), "GET /v1/templates/py");
    client.delete_template("py").await.unwrap();
    assert_eq!(last(), "DELETE /v1/templates/py");
    assert!(asked.lock().unwrap().is_empty());
}

//! `ark events`, and `ark ps` and `ark create` with labels, against a server that answers as `arkd` would.

use std::sync::{Arc, Mutex};

use crate::host::{Host, agent, problem};
use ark_types::problem::ProblemKind;
use axum::body::Bytes;
use axum::http::{HeaderMap, Method, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use serde_json::{Value, json};

type Asked = Arc<Mutex<Vec<String>>>;

fn event(position: u64) -> Value {
    json!({
        "position": position, "at_unix_ms": 0, "stream": "agent/0011223344556677", "version": position,
        "event": { "type": "agent.ended", "outcome": "failed", "reason": "it broke\u{1b}[2J" },
    })
}

fn sse(position: u64) -> String {
    format!("id: {position}\nevent: agent.ended\ndata: {}\n\n", event(position))
}

fn answer(method: &Method, uri: &Uri, headers: &HeaderMap) -> Response {
    let query = uri.query().unwrap_or_default();
    let streams = headers.get(header::ACCEPT).is_some_and(|accept| accept == "text/event-stream");
    match (method.as_str(), uri.path()) {
        ("GET", "/v1/events") if query.contains("after=99") => {
            problem(ProblemKind::EventsCompacted, "the events after 99 are no longer in the log")
        }
        ("GET", "/v1/events") if streams => {
            let body = format!(": alive\n\n{}{}", sse(8), sse(9));
            ([(header::CONTENT_TYPE, "text/event-stream")], body).into_response()
        }
        ("GET", "/v1/events") => {
            let after: u64 = if query.contains("after=2") { 2 } else { 0 };
            let events: Vec<Value> = (after + 1..=after + 2).map(event).collect();
            Json(json!({ "events": events, "next_after": after + 2, "newest": 4 })).into_response()
        }
        ("GET", "/v1/agents") if query.contains("cursor=") => {
            let mut last = agent("a2");
            last["removed_unix_ms"] = 1.into();
            (last["state"], last["reason"]) = ("stopped".into(), "on request".into());
            Json(json!({ "agents": [last] })).into_response()
        }
        ("GET", "/v1/agents") => {
            Json(json!({ "agents": [agent("a1")], "next_cursor": "1-2" })).into_response()
        }
        _ => Json(agent("a1")).into_response(),
    }
}

fn server() -> (Host, Asked) {
    let asked = Asked::default();
    let notes = asked.clone();
    let routes =
        Router::new().fallback(move |method: Method, uri: Uri, headers: HeaderMap, body: Bytes| async move {
            let body = String::from_utf8(body.to_vec()).unwrap();
            notes.lock().unwrap().push(format!("{method} {uri} {body}").trim_end().to_owned());
            answer(&method, &uri, &headers)
        });
    (Host::start(routes), asked)
}

#[test]
fn events_are_shown_page_by_page_or_as_they_come() {
    let (host, asked) = server();
    let (code, out, _) = host.run(&["events"], "");
    assert_eq!((code, out.lines().count()), (0, 4));
    let first = out.lines().next().unwrap();
    assert!(first.starts_with("     1  ") && first.contains("agent.ended"), "{out}");
    assert!(first.ends_with("agent/0011223344556677  failed: it broke\\u{1b}[2J"), "{out}");
    assert_eq!(*asked.lock().unwrap(), ["GET /v1/events", "GET /v1/events?after=2"]);
    asked.lock().unwrap().clear();

    let (code, out, said) =
        host.run(&["events", "--follow", "--after", "7", "--stream", "agent/0a", "--json"], "");
    let positions: Vec<Value> =
        out.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["position"].clone()).collect();
    assert_eq!((code, positions, said.as_str()), (0, vec![json!(8), json!(9)], ""));
    assert_eq!(*asked.lock().unwrap(), ["GET /v1/events?after=7&stream=agent/0a"]);
    let (code, out, said) = host.run(&["events", "-f"], "");
    assert_eq!((code, out.lines().count()), (0, 2));
    assert!(said.contains("`ark events --follow --after 9`"), "{said}");

    let (code, _, said) = host.run(&["events", "--after", "99"], "");
    assert!(code == 125 && said.contains("no longer in the log"), "{said}");
    let (code, _, said) = host.run(&["events", "--stream", "nonsense"], "");
    assert!(code != 0 && said.contains("is not a stream"), "{said}");
}

#[test]
fn agents_are_labelled_and_selected() {
    let (host, asked) = server();
    let last = || asked.lock().unwrap().pop().unwrap();
    let (code, _, said) = host.run(&["create", "-l", "app=x", "--label", "tier=", "--owner", "team-a"], "");
    assert_eq!(code, 0, "{said}");
    let body: Value = serde_json::from_str(last().strip_prefix("POST /v1/agents ").unwrap()).unwrap();
    assert_eq!((&body["labels"], &body["owner"]), (&json!({ "app": "x", "tier": "" }), &json!("team-a")));

    let (code, out, said) = host.run(&["ps", "--all", "-l", "app=x, env in (a,b)", "--state", "running"], "");
    assert_eq!(code, 0, "{said}");
    assert!(out.contains("a1") && out.contains("removed: on request"), "{out}");
    let query = "all=true&state=running&labels=app%3Dx%2Cenv%20in%20%28a%2Cb%29";
    assert_eq!(last(), format!("GET /v1/agents?{query}&cursor=1-2"));
    assert_eq!(last(), format!("GET /v1/agents?{query}"));
    let (code, out, _) = host.run(&["ps"], "");
    assert!(code == 0 && out.contains("a1") && !out.contains("a2"), "{out}");

    for (arguments, said) in [
        (["ps", "-l", "app in x"], "cannot be understood at \"x\""),
        (["ps", "--state", "happy"], "is no state of an agent"),
        (["create", "-l", "app"], "write KEY=VALUE"),
        (["create", "-l", "_x=y"], "is not a label's key"),
        (["create", "--owner", "Team"], "is not an owner's name"),
    ] {
        let (code, _, told) = host.run(&arguments, "");
        assert!(code != 0 && told.contains(said), "{arguments:?}: {told}");
    }
}

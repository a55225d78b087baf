//! Traces: told to a collector, parented right, passed into the guest; a collector that is down costs nothing else.

use std::collections::HashMap;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::routing::post;
use bytes::Bytes;
use hyper::{Method, StatusCode};
use nix::sys::signal::Signal;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message as _;
use serde_json::{Value, json};

use crate::harness::{Ark, Client, Place, Process, arkd, eventually, signal};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CLIENT_SPAN: &str = "b7ad6b7169203331";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A collector, and the spans that it has.
async fn collector() -> (String, Arc<Mutex<Vec<Span>>>) {
    let spans: Arc<Mutex<Vec<Span>>> = Arc::default();
    let kept = Arc::clone(&spans);
    let receive = move |body: Bytes| {
        let request = ExportTraceServiceRequest::decode(body).unwrap();
        let scopes = request.resource_spans.into_iter().flat_map(|resource| {
            let attributes = resource.resource.unwrap().attributes;
            assert!(attributes.iter().any(|pair| pair.key == "service.name"), "{attributes:?}");
            resource.scope_spans
        });
        kept.lock().unwrap().extend(scopes.flat_map(|scope| scope.spans));
        async {}
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let routes = Router::new().route("/v1/traces", post(receive));
    tokio::spawn(async move { axum::serve(listener, routes).await });
    (address, spans)
}

/// The real program, which sends its traces to `endpoint`.
async fn traced(place: &Place, endpoint: &str, ratio: &str) -> (Process, Client) {
    let mut command = arkd(place, &[]);
    command.env("ARK_TELEMETRY_OTLP_ENDPOINT", endpoint).env("ARK_TELEMETRY_SAMPLE_RATIO", ratio);
    let child = Process::start(place, command.stderr(Stdio::null()));
    let socket = place.run().api_socket();
    eventually("arkd listens", async || tokio::net::UnixStream::connect(&socket).await.is_ok()).await;
    (child, Client::unix(&socket))
}

/// A request in the trace of a client.
async fn within_a_trace(client: &Client, path: &str, body: &Value) -> Value {
    let mut request = client.request(Method::POST, path, body.to_string());
    let context = format!("00-{TRACE}-{CLIENT_SPAN}-01");
    request.headers_mut().insert("traceparent", context.parse().unwrap());
    let body = http_body_util::BodyExt::collect(client.send(request).await.into_body()).await.unwrap();
    serde_json::from_slice(&body.to_bytes()).unwrap()
}

/// What a guest's program has in its environment.
fn traceparent(reply: &Value) -> Option<String> {
    let stdout = reply["stdout"].as_str().unwrap_or_else(|| panic!("{reply}"));
    stdout.lines().find_map(|line| line.strip_prefix("TRACEPARENT=").map(str::to_owned))
}

#[tokio::test]
async fn a_request_is_followed_from_its_client_into_the_guest() {
    let place = Place::new();
    let (endpoint, spans) = collector().await;
    let (mut child, client) = traced(&place, &endpoint, "0.0").await;
    let create = json!({ "name": "a1", "image": "base", "memory_mib": 64 });
    within_a_trace(&client, "/v1/agents", &create).await;
    within_a_trace(&client, "/v1/agents/a1/fork", &json!({ "count": 1 })).await;
    let seen = within_a_trace(&client, "/v1/agents/a1/exec", &json!({ "argv": ["env"] })).await;
    let unsampled: Value = client.exec("a1", &json!({ "argv": ["env"] })).await.json();
    assert_eq!(traceparent(&unsampled), None, "a part of 0.0 is sampled of what no client decided");
    signal(child.child.id(), Signal::SIGTERM);
    // Waited for without standing in the collector's way.
    eventually("arkd ends", async || matches!(child.child.try_wait(), Ok(Some(_)))).await;

    let spans = spans.lock().unwrap();
    let by_id: HashMap<String, &Span> = spans.iter().map(|span| (hex(&span.span_id), span)).collect();
    let path_of = |span: &Span| {
        let mut names = vec![span.name.clone()];
        let mut parent = hex(&span.parent_span_id);
        while let Some(above) = by_id.get(&parent) {
            names.push(above.name.clone());
            parent = hex(&above.parent_span_id);
        }
        assert_eq!(parent, CLIENT_SPAN, "{names:?}");
        names.reverse();
        names.join(" > ")
    };
    assert!(spans.iter().all(|span| hex(&span.trace_id) == TRACE), "only what was sampled is there");
    let mut paths: Vec<String> = spans.iter().map(path_of).collect();
    paths.sort();
    let wanted = [
        "POST /v1/agents",
        "POST /v1/agents > admission",
        "POST /v1/agents > boot",
        "POST /v1/agents > queue",
        "POST /v1/agents/:agent/exec",
        "POST /v1/agents/:agent/exec > exec",
        "POST /v1/agents/:agent/fork",
        "POST /v1/agents/:agent/fork > queue",
        "POST /v1/agents/:agent/fork > restore",
        "POST /v1/agents/:agent/fork > restore > renewal",
    ];
    assert_eq!(paths, wanted);
    let exec = spans.iter().find(|span| span.name == "exec").unwrap();
    assert_eq!(traceparent(&seen).unwrap(), format!("00-{TRACE}-{}-01", hex(&exec.span_id)));
}

/// The lines that a task's attempt wrote; none before it began.
async fn lines(client: &Client, task: &str, attempt: u32) -> Vec<String> {
    let log = client.get(&format!("/v1/tasks/{task}/logs?attempt={attempt}")).await;
    if log.status() != StatusCode::OK {
        return Vec::new();
    }
    String::from_utf8(log.body.to_vec()).unwrap().lines().map(str::to_owned).collect()
}

#[tokio::test]
async fn a_tasks_attempts_go_on_with_the_trace_of_its_request_also_under_the_next_arkd() {
    let place = Place::new();
    let (endpoint, spans) = collector().await;
    let (mut first, client) = traced(&place, &endpoint, "0.0").await;
    let line = "echo $TRACEPARENT; [ $ARK_TASK_ATTEMPT -gt 1 ] || sleep 1000";
    let body = json!({ "image": "base", "memory_mib": 64, "command": { "argv": ["sh", "-c", line] } });
    let task = within_a_trace(&client, "/v1/tasks", &body).await;
    let id = task["id"].as_str().unwrap();
    eventually("the first attempt runs", async || !lines(&client, id, 1).await.is_empty()).await;
    signal(first.child.id(), Signal::SIGKILL);
    first.wait();
    let (mut second, client) = traced(&place, &endpoint, "0.0").await;
    let ended: Value = client.get(&format!("/v1/tasks/{id}?wait_ms=60000")).await.json();
    assert_eq!(
        (&ended["state"], ended["attempts"].as_array().unwrap().len()),
        (&"succeeded".into(), 2),
        "{ended}"
    );
    signal(second.child.id(), Signal::SIGTERM);
    eventually("arkd ends", async || matches!(second.child.try_wait(), Ok(Some(_)))).await;

    let spans = spans.lock().unwrap();
    let attempt = spans.iter().find(|span| span.name == "task attempt").unwrap();
    assert_eq!(hex(&attempt.trace_id), TRACE);
    // That of the request, which has ended before the first arkd was killed or was lost with it.
    assert_eq!(task["traceparent"], format!("00-{TRACE}-{}-01", hex(&attempt.parent_span_id)));
    let attribute = |key: &str| {
        let pair = attempt.attributes.iter().find(|pair| pair.key == key).unwrap();
        format!("{:?}", pair.value)
    };
    assert!(attribute("ark.task.id").contains(id) && attribute("ark.task.attempt").contains("IntValue(2)"));
    assert!(attribute("ark.task.outcome").contains("succeeded"));
    let exec = spans.iter().find(|span| span.name == "exec").unwrap();
    assert_eq!(exec.parent_span_id, attempt.span_id);
    let told = format!("00-{TRACE}-{}-01", hex(&exec.span_id));
    assert_eq!(ended["result"]["stdout"], format!("{told}\n"));
}

#[tokio::test]
async fn a_collector_that_is_down_costs_spans_that_are_counted() {
    let place = Place::new();
    // A port that nobody listens on any more.
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (_child, client) = traced(&place, &format!("http://{free}"), "1.0").await;
    client.create("a1", "base").await;
    let reply: Value = client.exec("a1", &json!({ "argv": ["env"] })).await.json();
    assert!(traceparent(&reply).is_some());
    eventually("spans are counted as dropped", async || {
        let text = String::from_utf8(client.get("/metrics").await.body.to_vec()).unwrap();
        let mut counts =
            text.lines().filter_map(|l| l.strip_prefix("ark_trace_spans_total{outcome=\"dropped\"} "));
        counts.next().is_some_and(|count| count.parse::<f64>().unwrap() >= 4.0)
    })
    .await;
}

#[tokio::test]
async fn without_a_collector_a_clients_own_trace_is_passed_on_and_nothing_is_made_up() {
    let place = Place::new();
    let Ark { daemon, client } = place.start().await;
    client.create("a1", "base").await;
    let reply = within_a_trace(&client, "/v1/agents/a1/exec", &json!({ "argv": ["env"] })).await;
    assert_eq!(traceparent(&reply).unwrap(), format!("00-{TRACE}-{CLIENT_SPAN}-01"));
    let own = json!({ "argv": ["env"], "env": { "TRACEPARENT": "mine" } });
    assert_eq!(traceparent(&within_a_trace(&client, "/v1/agents/a1/exec", &own).await).unwrap(), "mine");
    let reply: Value = client.exec("a1", &json!({ "argv": ["env"] })).await.json();
    assert_eq!(traceparent(&reply), None);

    // A task keeps its client's, or has one of its own that all its attempts share.
    let line = "echo $TRACEPARENT; [ $ARK_TASK_ATTEMPT -gt 1 ]";
    let body = json!({
        "image": "base", "memory_mib": 64, "command": { "argv": ["sh", "-c", line] },
        "retry": { "max_attempts": 2, "backoff_ms": 0 },
    });
    let theirs = within_a_trace(&client, "/v1/tasks", &body).await;
    assert_eq!(theirs["traceparent"], format!("00-{TRACE}-{CLIENT_SPAN}-01"));
    let own: Value = client.post("/v1/tasks", &body).await.json();
    for task in [theirs, own] {
        let id = task["id"].as_str().unwrap();
        client.get(&format!("/v1/tasks/{id}?wait_ms=60000")).await;
        let kept = task["traceparent"].as_str().unwrap();
        assert_eq!(kept.len(), 55, "{kept}");
        for attempt in [1, 2] {
            assert_eq!(lines(&client, id, attempt).await, [kept]);
        }
    }
    daemon.shut_down().await;
}

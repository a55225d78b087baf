//! Traces: told to a collector, parented right, passed into the guest; a collector that is down costs nothing else.

use std::collections::HashMap;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::routing::post;
use bytes::Bytes;
use hyper::Method;
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
    daemon.shut_down().await;
}

//! `/metrics` and `/v1/stats`: a parser understands them, their names are frozen, their numbers are right.

use std::collections::{BTreeMap, BTreeSet};

use ark_types::stats::{AgentStats, StatsList};
use axum::http::header::CONTENT_TYPE;
use hyper::Method;
use nix::sys::signal::Signal;
use prometheus_parse::{Sample, Scrape, Value};
use serde_json::json;

use crate::harness::{Ark, Client, Place, eventually, signal};

const SNAPSHOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../api/types/schema/metrics.txt");

/// What Prometheus would read, and the text.
async fn scrape(client: &Client) -> (Vec<Sample>, String) {
    let reply = client.get("/metrics").await;
    assert_eq!(reply.response.headers()[CONTENT_TYPE], "text/plain; version=0.0.4; charset=utf-8");
    let text = String::from_utf8(reply.body.to_vec()).unwrap();
    let parsed = Scrape::parse(text.lines().map(|line| Ok(line.to_owned()))).unwrap();
    (parsed.samples, text)
}

/// The value of the one series of that name with these labels; histograms by their `_count`.
fn value(samples: &[Sample], name: &str, labels: &[(&str, &str)]) -> f64 {
    let fits = |sample: &&Sample| {
        sample.metric == name && labels.iter().all(|(label, value)| sample.labels.get(label) == Some(*value))
    };
    match samples.iter().filter(fits).collect::<Vec<_>>().as_slice() {
        [] => f64::NAN,
        [one] => match one.value {
            Value::Counter(value) | Value::Gauge(value) | Value::Untyped(value) => value,
            ref other => panic!("{name}: {other:?}"),
        },
        more => panic!("{name} {labels:?}: {more:?}"),
    }
}

/// Name, type and labels of everything in a scrape, a line each.
fn names(text: &str) -> String {
    let mut types = BTreeMap::new();
    let mut labels: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in text.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            types.insert(name.to_owned(), kind.to_owned());
        } else if !line.starts_with('#') {
            let (name, rest) = line.split_once(['{', ' ']).unwrap();
            let family = ["_bucket", "_sum", "_count"]
                .iter()
                .filter_map(|suffix| name.strip_suffix(suffix))
                .find(|family| types.get(*family).is_some_and(|kind| kind == "histogram"))
                .unwrap_or(name);
            let inner = rest.rsplit_once('}').map_or("", |(inner, _)| inner);
            let of = labels.entry(family.to_owned()).or_default();
            of.extend(inner.split(',').filter_map(|label| Some(label.split_once("=\"")?.0.to_owned())));
        }
    }
    let line = |(name, kind): (&String, &String)| {
        let labels: Vec<_> = labels.get(name).into_iter().flatten().map(String::as_str).collect();
        format!("{name} {kind} {}", labels.join(",")).trim_end().to_owned() + "\n"
    };
    types.iter().map(line).collect()
}

#[tokio::test]
async fn what_happens_is_counted_under_names_that_stay() {
    let place = Place::new();
    let Ark { daemon, client } = place.start().await;
    client.create("a1", "base").await;
    client.exec("a1", &json!({ "argv": ["true"] })).await;
    client.post("/v1/agents/a1/eval", &json!({ "code": "hostname" })).await;
    client.post("/v1/agents/a1/fork", &json!({ "count": 2 })).await;
    client.post("/v1/agents/a1/snapshots", &json!({ "name": "s1" })).await;
    client.post("/v1/agents", &json!({ "name": "bad", "image": "panics", "cold": true })).await;
    client.post("/v1/agents", &json!({ "name": "a1", "image": "base", "cold": true })).await;
    client.post("/v1/services", &json!({ "name": "web", "replicas": 0, "image": "base" })).await;
    client.post("/v1/services/web/call?wait_ms=0", &json!({ "eval": { "code": "hostname" } })).await;
    client.get("/nowhere/at/all").await;
    eventually("the guests were heard", async || {
        let list: StatsList = client.get("/v1/stats").await.json();
        list.agents.len() == 3 && list.agents.iter().all(|agent| agent.heartbeat_age_ms.is_some())
    })
    .await;

    let (samples, text) = scrape(&client).await;
    let is = |name: &str, labels: &[(&str, &str)], wanted: f64| {
        let found = value(&samples, name, labels);
        assert!((found - wanted).abs() < 1e-9, "{name} {labels:?} is {found}, not {wanted}:\n{text}");
    };
    is("ark_agents", &[("state", "running")], 3.0);
    is("ark_agents", &[("state", "failed")], 0.0);
    is("ark_creates_total", &[("origin", "boot"), ("outcome", "ok")], 1.0);
    is("ark_creates_total", &[("origin", "boot"), ("outcome", "failed")], 1.0);
    is("ark_creates_total", &[("origin", "boot"), ("outcome", "refused")], 1.0);
    is("ark_creates_total", &[("origin", "fork"), ("outcome", "ok")], 2.0);
    is("ark_vmm_exits_total", &[("reason", "guest_panic")], 1.0);
    for (phase, count) in [
        ("queue", 4.0),
        ("turn", 2.0),
        ("boot", 1.0),
        ("restore", 2.0),
        ("renew", 2.0),
        ("ready", 3.0),
        ("exec", 1.0),
        ("eval", 1.0),
        ("claim", 0.0),
    ] {
        is("ark_phase_seconds_count", &[("phase", phase)], count);
    }
    is("ark_pool_claims_total", &[("kind", "prepared"), ("result", "miss")], 2.0);
    let route = [("route", "/v1/agents/:agent/exec"), ("method", "POST"), ("status", "200")];
    is("ark_http_requests_total", &route, 1.0);
    is("ark_http_requests_total", &[("route", "none"), ("status", "404")], 1.0);
    is("ark_http_request_seconds_count", &route[..2], 1.0);
    is("ark_service_calls_total", &[("service", "web"), ("outcome", "unready")], 1.0);
    is("ark_service_replicas", &[("service", "web"), ("state", "ready")], 0.0);
    is("ark_snapshots", &[("kind", "snapshot")], 2.0);
    is("ark_snapshot_bytes", &[("kind", "snapshot")], 8192.0);
    is("ark_agent_exits_total", &[("agent", "a1")], 7.0);
    is("ark_agent_device_total", &[("agent", "a1"), ("device", "block0"), ("counter", "read_bytes")], 512.0);
    is("ark_agent_series_left_out", &[], 0.0);
    for (name, labels) in [
        ("process_cpu_seconds_total", &[][..]),
        ("process_resident_memory_bytes", &[]),
        ("process_open_fds", &[]),
        ("ark_agent_pss_bytes", &[("agent", "a1")]),
        ("ark_agent_cpu_seconds_total", &[("agent", "a1")]),
        ("ark_heartbeat_age_seconds_max", &[]),
    ] {
        let found = value(&samples, name, labels);
        assert!(found >= 0.0, "{name} is {found}");
    }

    // Pools have series while there are any.
    client.post("/v1/templates", &json!({ "name": "t1", "image": "base", "memory_mib": 64 })).await;
    let policy = json!({ "min": 0, "max": 0, "target_wait_ms": 0 }).to_string();
    assert_eq!(client.ask(Method::PUT, "/v1/pools/t1", policy).await.status(), 200);
    client.post("/v1/agents", &json!({ "name": "t1-1", "template": "t1" })).await;
    // Models have some once they were called.
    crate::inference::serve(&client, 1).await;
    assert_eq!(crate::inference::said(&client, "say 2").await, "1 2 ");
    let (samples, text) = scrape(&client).await;
    for (name, label, wanted) in [
        ("ark_inference_calls_total", ("outcome", "ok"), 1.0),
        ("ark_inference_tokens_total", ("kind", "prompt"), 3.0),
        ("ark_inference_tokens_total", ("kind", "cached"), 2.0),
        ("ark_inference_owner_tokens_total", ("owner", "default"), 5.0),
        ("ark_inference_first_token_seconds_count", ("model", "m"), 1.0),
        ("ark_inference_waiting", ("service", "model-m"), 0.0),
        ("ark_pool_size", ("template", "t1"), 0.0),
        ("ark_pool_wanted", ("template", "t1"), 0.0),
        ("ark_pool_hits_total", ("template", "t1"), 0.0),
        ("ark_pool_misses_total", ("template", "t1"), 1.0),
    ] {
        let found = value(&samples, name, &[label]);
        assert!((found - wanted).abs() < 1e-9, "{name} {label:?} is {found}:\n{text}");
    }

    let now = names(&text);
    if std::env::var_os("ARK_BLESS").is_some() {
        std::fs::write(SNAPSHOT, &now).unwrap();
    }
    let frozen = std::fs::read_to_string(SNAPSHOT).unwrap_or_default();
    assert_eq!(
        now, frozen,
        "the metrics changed; if that is wanted: ARK_BLESS=1 cargo test -p arkd names_that_stay"
    );
    daemon.shut_down().await;
}

#[tokio::test]
async fn agents_have_no_series_of_their_own_where_the_operator_wants_none_and_labels_are_added() {
    let place = Place::new();
    let mut config = place.config();
    config.telemetry = toml::from_str("agent_series = 1\nlabels = { zone = \"a \\\"b\\\"\" }\n").unwrap();
    let Ark { daemon, client } = place.start_with(config).await;
    client.create("a1", "base").await;
    client.create("a2", "base").await;
    let (samples, text) = scrape(&client).await;
    assert!(samples.iter().all(|sample| sample.labels.get("zone").is_some()), "{text}");
    assert!(value(&samples, "ark_agent_exits_total", &[("agent", "a1")]) > 0.0, "{text}");
    assert!(!text.contains("agent=\"a2\""), "{text}");
    assert!((value(&samples, "ark_agent_series_left_out", &[]) - 1.0).abs() < 1e-9, "{text}");
    daemon.shut_down().await;
}

#[tokio::test]
async fn metrics_on_tcp_need_the_token_and_refusals_are_counted() {
    let place = Place::new();
    let mut config = place.config();
    config.listen = Some("127.0.0.1:0".parse().unwrap());
    let Ark { daemon, client } = place.start_with(config).await;
    let address = daemon.tcp_address().unwrap();
    assert_eq!(Client::Tcp(address, None).get("/metrics").await.status(), 401);
    let token = std::fs::read_to_string(place.path("state/token")).unwrap();
    assert_eq!(Client::Tcp(address, Some(token)).get("/metrics").await.status(), 200);
    let (samples, text) = scrape(&client).await;
    let refused = value(&samples, "ark_http_requests_total", &[("route", "/metrics"), ("status", "401")]);
    assert!((refused - 1.0).abs() < 1e-9, "{text}");
    daemon.shut_down().await;
}

#[tokio::test]
async fn what_agents_use_is_told_even_while_a_vmm_hangs() {
    let place = Place::new();
    let Ark { daemon, client } = place.start().await;
    let hangs = client.create("hangs", "base").await.vmm_pid.unwrap();
    client.create("well", "base").await;
    let stats: AgentStats = client.get("/v1/agents/well/stats").await.json();
    assert_eq!((stats.exits, stats.guest_bytes, stats.memory_mib), (Some(7), Some(1 << 20), 64));
    assert!(
        stats.pss_bytes > Some(0) && stats.rss_bytes >= stats.pss_bytes && stats.cpu_us.is_some(),
        "{stats:?}"
    );
    signal(hangs, Signal::SIGSTOP);
    let stats: AgentStats = client.get("/v1/agents/hangs/stats").await.json();
    assert!(stats.exits.is_none() && stats.pss_bytes > Some(0), "{stats:?}");
    let list: StatsList = client.get("/v1/stats").await.json();
    let names: Vec<_> = list.agents.iter().map(|agent| agent.name.to_string()).collect();
    assert_eq!((names, list.left_out), (vec!["hangs".to_owned(), "well".to_owned()], 0));
    signal(hangs, Signal::SIGCONT);
    daemon.shut_down().await;
}

//! Who hangs holds up nobody else: a VMM that stands still, a client that never reads.

use std::time::Duration;

use ark_types::agent::Agent;
use ark_types::health::Health;
use hyper::{Method, StatusCode};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::time::timeout;

use crate::harness::{Client, Place, eventually, signal, started};

/// Longest time that a request may take; guests are missed after two seconds here.
const LIMIT: Duration = Duration::from_secs(60);
/// Clients that never read.
const DEAF: usize = 16;
/// Events that nobody hears.
const UNHEARD: u64 = 3000;

/// What is asked of an agent whose VMM stands still.
const REQUESTS: [(Method, &str, &str); 10] = [
    (Method::POST, "exec", r#"{"argv":["true"]}"#),
    (Method::POST, "eval", r#"{"code":"x"}"#),
    (Method::POST, "fork", r#"{"count":1}"#),
    (Method::POST, "snapshots", r#"{"name":"s1"}"#),
    (Method::POST, "pause", "{}"),
    (Method::GET, "files?path=/etc/hostname", ""),
    (Method::GET, "stats", ""),
    (Method::GET, "files/list?path=/etc", ""),
    (Method::PUT, "files?path=/tmp/hangs", "x"),
    (Method::GET, "files/stat?path=/etc", ""),
];

#[tokio::test]
async fn a_vmm_that_stands_still_is_healed_and_holds_no_request_for_ever() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let body =
        json!({ "name": "a1", "image": "base", "memory_mib": 64, "restart": { "when": "on_failure" } });
    let agent: Agent = client.post("/v1/agents", &body).await.json();
    signal(agent.vmm_pid.unwrap(), Signal::SIGSTOP);
    let asked: Vec<_> = REQUESTS
        .into_iter()
        .map(|(method, what, body)| {
            let client = client.clone();
            let path = format!("/v1/agents/a1/{what}");
            (what, tokio::spawn(async move { client.ask(method, &path, body).await }))
        })
        .collect();
    for (what, reply) in asked {
        let reply = timeout(LIMIT, reply).await.unwrap_or_else(|_| panic!("{what} hangs")).unwrap();
        let is_told = reply.status().is_success() || !reply.json::<Value>()["detail"].is_null();
        assert!(is_told, "{what}: {:?}", reply.body);
    }
    eventually("it began anew", async || {
        let now: Agent = client.get("/v1/agents/a1").await.json();
        now.continuity.is_some_and(|continuity| continuity.restarts == 1)
    })
    .await;
    assert_eq!(client.exec("a1", &json!({ "argv": ["true"] })).await.status(), StatusCode::OK);
    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    ark.daemon.shut_down().await;
}

/// A client that asks for every event there is and reads none.
async fn deaf(client: &Client) -> Box<dyn crate::harness::Stream> {
    let mut stream = client.connect().await;
    let request = "GET /v1/events?after=0 HTTP/1.1\r\nhost: ark\r\naccept: text/event-stream\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

#[tokio::test]
async fn clients_that_follow_and_never_read_hold_up_neither_the_log_nor_the_end_of_arkd() {
    let place = Place::new();
    let (mut arkd, client) = started(&place, &[]).await;
    let mut followers = Vec::new();
    for _ in 0..DEAF {
        followers.push(deaf(&client).await);
    }
    let before = crate::streams::peak_kib(arkd.child.id());
    for agents in 1..=UNHEARD {
        let quota = json!({ "agents": agents }).to_string();
        let set = timeout(LIMIT, client.ask(Method::PUT, "/v1/owners/team", quota)).await;
        assert_eq!(set.expect("it is written").status(), StatusCode::OK);
    }
    let health: Health = client.get("/v1/health").await.json();
    assert_eq!(health.log.newest, UNHEARD);
    let grown = crate::streams::peak_kib(arkd.child.id()).saturating_sub(before);
    assert!(grown < 32 << 10, "arkd grew by {grown} KiB for clients that do not read");
    client.create("a1", "base").await;
    assert!(arkd.end(Signal::SIGTERM), "it ends in order");
    drop(followers);
}

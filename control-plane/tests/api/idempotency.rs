//! Requests with an `Idempotency-Key`: carried out once, however often they are sent, and whatever ends.

use std::time::Duration;

use ark_types::agent::{Agent, AgentList};
use ark_types::problem::ProblemKind;
use ark_types::snapshot::SnapshotList;
use hyper::header::{HeaderValue, LOCATION};
use hyper::{Method, StatusCode};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{Client, Place, Reply, started};

const KEY: &str = "idempotency-key";
const REPLAYED: &str = "idempotency-replayed";

async fn send(client: &Client, key: &str, path: &str, body: &Value) -> Reply {
    let mut request = client.request(Method::POST, path, body.to_string());
    request.headers_mut().insert(KEY, HeaderValue::from_str(key).unwrap());
    client.reply(request).await
}

fn is_replayed(reply: &Reply) -> bool {
    reply.response.headers().get(REPLAYED).is_some_and(|value| value == "true")
}

async fn count(client: &Client) -> usize {
    client.get("/v1/agents").await.json::<AgentList>().agents.len()
}

fn agent(name: &str) -> Value {
    json!({ "name": name, "image": "base", "memory_mib": 64 })
}

/// As if the last `arkd` had ended after what was asked for was made, and before its reply was recorded.
fn forget_the_reply(place: &Place) {
    let database = rusqlite::Connection::open(place.state().events()).unwrap();
    let (position, stream): (i64, String) = database
        .query_row("SELECT position, stream FROM event ORDER BY position DESC LIMIT 1", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .unwrap();
    assert!(stream.starts_with("request/"), "the reply is what was recorded last, not {stream}");
    database.execute("DELETE FROM event WHERE position = ?1", [position]).unwrap();
    database.execute("UPDATE sqlite_sequence SET seq = ?1 WHERE name = 'event'", [position - 1]).unwrap();
    database
        .execute("UPDATE stream SET version = version - 1, ended = 0 WHERE stream = ?1", [&stream])
        .unwrap();
}

#[tokio::test]
async fn whatever_is_made_is_made_once_and_told_alike() {
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("a1", "base").await;
    for (key, path, body) in [
        ("k-create", "/v1/agents", agent("a2")),
        ("k-unnamed", "/v1/agents", json!({ "image": "base", "memory_mib": 64 })),
        ("k-fork", "/v1/agents/a1/fork", json!({ "count": 2 })),
        ("k-snapshot", "/v1/agents/a1/snapshots", json!({ "name": "s1" })),
        ("k-restore", "/v1/snapshots/s1/restore", json!({})),
        ("k-template", "/v1/templates", json!({ "name": "t1", "image": "base" })),
    ] {
        let first = send(&ark.client, key, path, &body).await;
        assert!(first.status().is_success() && !is_replayed(&first), "{path}: {:?}", first.body);
        let agents = count(&ark.client).await;
        // In quotes, as the draft has it, it is the same key.
        for key in [key.to_owned(), format!("\"{key}\"")] {
            let second = send(&ark.client, &key, path, &body).await;
            assert!(is_replayed(&second), "{path}: {:?}", second.body);
            assert_eq!((second.status(), &second.body), (first.status(), &first.body));
            let place = |reply: &Reply| reply.response.headers().get(LOCATION).cloned();
            assert_eq!(place(&second), place(&first));
        }
        assert_eq!(count(&ark.client).await, agents);
    }
    assert_eq!(count(&ark.client).await, 6);
    // What is made without one is made each time.
    let unnamed = json!({ "image": "base", "memory_mib": 64 });
    assert_eq!(ark.client.post("/v1/agents", &unnamed).await.status(), StatusCode::CREATED);
    assert_eq!(count(&ark.client).await, 7);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_key_is_one_request_s_and_a_refusal_frees_it() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let refused = send(client, "k", "/v1/agents", &json!({ "image": "absent" })).await;
    refused.problem(ProblemKind::ImageNotFound);
    let made = send(client, "k", "/v1/agents", &agent("a1")).await;
    assert_eq!(made.status(), StatusCode::CREATED);
    send(client, "k", "/v1/agents", &agent("a2")).await.problem(ProblemKind::IdempotencyKeyReused);
    send(client, "k", "/v1/agents/a1/fork", &agent("a1")).await.problem(ProblemKind::IdempotencyKeyReused);
    for key in ["", "\u{e9}", &"x".repeat(256)] {
        send(client, key, "/v1/agents", &agent("a2")).await.problem(ProblemKind::BadRequest);
    }
    let exec = send(client, "k2", "/v1/agents/a1/exec", &json!({ "argv": ["true"] })).await;
    assert!(exec.problem(ProblemKind::BadRequest).detail.contains("takes no idempotency-key"));
    // A boot that fails leaves nothing, and the key is free.
    let panics = json!({ "name": "a2", "image": "panics", "memory_mib": 64 });
    for _ in 0..2 {
        send(client, "k3", "/v1/agents", &panics).await.problem(ProblemKind::BootFailed);
    }
    assert_eq!(send(client, "k3", "/v1/agents", &agent("a2")).await.status(), StatusCode::CREATED);
    assert_eq!(count(client).await, 2);
    ark.daemon.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_ask_at_once_and_those_who_left_find_the_same_one() {
    let place = Place::new();
    let ark = place.start().await;
    let body = json!({ "image": "base", "memory_mib": 64 });
    let asked = (0..8).map(|_| send(&ark.client, "k", "/v1/agents", &body));
    let replies = futures_util::future::join_all(asked).await;
    let ids: Vec<String> = replies.iter().map(|reply| reply.json::<Agent>().id).collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    assert_eq!(replies.iter().filter(|reply| !is_replayed(reply)).count(), 1);

    ark.client.create("slow", "slow-snapshot").await;
    let mut request =
        ark.client.request(Method::POST, "/v1/agents/slow/snapshots", json!({ "name": "s1" }).to_string());
    request.headers_mut().insert(KEY, HeaderValue::from_static("k2"));
    let leaves = tokio::time::timeout(Duration::from_millis(100), ark.client.send(request)).await;
    let later = send(&ark.client, "k2", "/v1/agents/slow/snapshots", &json!({ "name": "s1" })).await;
    assert_eq!(later.status(), StatusCode::CREATED, "{:?}", later.body);
    // Whether it left before the end is a matter of time.
    assert!(leaves.is_ok() || is_replayed(&later));
    assert_eq!(ark.client.get("/v1/snapshots").await.json::<SnapshotList>().snapshots.len(), 1);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn what_was_acknowledged_is_told_alike_by_the_next_arkd() {
    let place = Place::new();
    let (mut arkd, client) = started(&place, &[]).await;
    let first = send(&client, "k", "/v1/agents", &agent("a1")).await;
    let forked = send(&client, "k-fork", "/v1/agents/a1/fork", &json!({ "count": 2 })).await;
    assert!(first.status().is_success() && forked.status().is_success());
    arkd.end(Signal::SIGKILL);
    let (_arkd, client) = started(&place, &[]).await;
    for (key, path, body, reply) in [
        ("k", "/v1/agents", agent("a1"), &first),
        ("k-fork", "/v1/agents/a1/fork", json!({ "count": 2 }), &forked),
    ] {
        let again = send(&client, key, path, &body).await;
        assert!(is_replayed(&again));
        assert_eq!((again.status(), &again.body), (reply.status(), &reply.body));
    }
    send(&client, "k", "/v1/agents", &agent("a2")).await.problem(ProblemKind::IdempotencyKeyReused);
    assert_eq!(count(&client).await, 3);
}

#[tokio::test]
async fn what_was_cut_off_is_made_again_and_nothing_twice() {
    let place = Place::new();
    let (mut arkd, client) = started(&place, &[]).await;
    client.create("other", "base").await;
    let lost: Agent = send(&client, "k", "/v1/agents", &agent("a1")).await.json();
    arkd.end(Signal::SIGKILL);
    forget_the_reply(&place);

    let (mut arkd, client) = started(&place, &[]).await;
    let gone: Agent = client.get(&format!("/v1/agents/{}", lost.id)).await.json();
    assert!(gone.removed_unix_ms.is_some(), "nobody was told of it");
    let made = send(&client, "k", "/v1/agents", &agent("a1")).await;
    assert!(!is_replayed(&made));
    assert_ne!(made.json::<Agent>().id, lost.id);
    send(&client, "k-fork", "/v1/agents/other/fork", &json!({ "count": 2 })).await;
    assert_eq!(count(&client).await, 4);
    arkd.end(Signal::SIGKILL);
    forget_the_reply(&place);

    let (mut arkd, client) = started(&place, &[]).await;
    assert_eq!(count(&client).await, 2);
    let snapshot = send(&client, "k-snapshot", "/v1/agents/a1/snapshots", &json!({ "name": "s1" })).await;
    assert_eq!(snapshot.status(), StatusCode::CREATED);
    arkd.end(Signal::SIGKILL);
    forget_the_reply(&place);

    // It is whole, so it is what was asked for.
    let (_arkd, client) = started(&place, &[]).await;
    let again = send(&client, "k-snapshot", "/v1/agents/a1/snapshots", &json!({ "name": "s1" })).await;
    assert!(is_replayed(&again), "{:?}", again.body);
    assert_eq!(again.json::<Value>(), snapshot.json::<Value>());
    assert_eq!(again.response.headers()[LOCATION], "/v1/snapshots/s1");
    // Without its key it is another request.
    client.post("/v1/agents/a1/snapshots", &json!({ "name": "s1" })).await.problem(ProblemKind::NameTaken);
}

#[tokio::test]
async fn a_service_is_set_up_once_and_told_of_after_a_kill() {
    let place = Place::new();
    let (mut last, client) = started(&place, &[]).await;
    let web = json!({ "name": "web", "replicas": 0, "image": "base", "memory_mib": 64 });
    let first = send(&client, "k", "/v1/services", &web).await;
    assert_eq!((first.status(), is_replayed(&first)), (StatusCode::CREATED, false), "{:?}", first.body);
    last.end(Signal::SIGKILL);
    forget_the_reply(&place);

    let (mut last, client) = started(&place, &[]).await;
    let again = send(&client, "k", "/v1/services", &web).await;
    assert!(is_replayed(&again), "{:?}", again.body);
    assert_eq!((again.status(), &again.body), (first.status(), &first.body));
    let place_of = |reply: &Reply| reply.response.headers().get(LOCATION).cloned();
    assert_eq!(place_of(&again), place_of(&first));
    // One that somebody else set up is not what was asked for with another key.
    send(&client, "k2", "/v1/services", &web).await.problem(ProblemKind::NameTaken);
    assert_eq!(client.delete("/v1/services/web").await.status(), StatusCode::NO_CONTENT);
    last.end(Signal::SIGTERM);
}

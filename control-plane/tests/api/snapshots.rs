//! Named snapshots: taken, restored, rewound to, compacted, deleted.

use ark_types::agent::{Agent, Origin};
use ark_types::eval::EvalReply;
use ark_types::problem::ProblemKind;
use ark_types::snapshot::{Snapshot, SnapshotKind, SnapshotList};
use hyper::StatusCode;
use serde_json::json;

use crate::harness::{Client, Place, eventually};

async fn take(client: &Client, agent: &str, name: &str) -> Snapshot {
    let reply = client.post(&format!("/v1/agents/{agent}/snapshots"), &json!({ "name": name })).await;
    assert_eq!(reply.status(), StatusCode::CREATED, "{:?}", reply.body);
    assert_eq!(reply.response.headers()["location"], format!("/v1/snapshots/{name}"));
    reply.json()
}

async fn restore(client: &Client, snapshot: &str, name: &str) -> Agent {
    let reply = client.post(&format!("/v1/snapshots/{snapshot}/restore"), &json!({ "name": name })).await;
    assert_eq!(reply.status(), StatusCode::CREATED, "{:?}", reply.body);
    reply.json()
}

async fn eval(client: &Client, agent: &str, code: &str) -> Option<String> {
    let reply = client.post(&format!("/v1/agents/{agent}/eval"), &json!({ "code": code })).await;
    reply.json::<EvalReply>().value
}

async fn gone(client: &Client, path: &str) {
    let reply = client.delete(path).await;
    assert_eq!(reply.status(), StatusCode::NO_CONTENT, "{:?}", reply.body);
}

/// Directories of snapshots that are there.
fn dirs(place: &Place) -> usize {
    std::fs::read_dir(place.state().snapshots()).unwrap().count()
}

#[tokio::test]
async fn a_snapshot_is_taken_restored_rewound_to_and_deleted() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let agent = client.create("a1", "base").await;
    eval(client, "a1", "x=1").await;
    let one = take(client, "a1", "one").await;
    assert_eq!(
        (one.kind, &one.base, one.agent.as_ref(), one.image.as_ref()),
        (SnapshotKind::Full, &None, "a1", "base")
    );
    assert_eq!((one.pause_us, one.durable_us, one.memory_mib, one.children), (7, 70, 64, 0));
    let again = client.post("/v1/agents/a1/snapshots", &json!({ "name": "one" })).await;
    assert!(again.problem(ProblemKind::NameTaken).detail.contains("ark snapshot rm one"));
    eval(client, "a1", "x=2").await;

    let restored = restore(client, "one", "b1").await;
    assert_eq!(restored.origin, Origin::Snapshot { name: "one".parse().unwrap() });
    assert_eq!((restored.image_digest, restored.memory_mib), (agent.image_digest, 64));
    assert_eq!(eval(client, "b1", "x").await.as_deref(), Some("1"));
    assert_eq!(eval(client, "b1", "hostname").await.as_deref(), Some("b1"));
    assert_eq!(client.get("/v1/snapshots/one").await.json::<Snapshot>().agents, 1);
    let refused = client.delete("/v1/snapshots/one").await.problem(ProblemKind::InUse);
    assert!(refused.detail.starts_with("1 living agent go on from the snapshot one"), "{refused:?}");

    let rewind = client.post("/v1/agents/b1/rewind", &json!({ "snapshot": "one" })).await;
    assert!(rewind.problem(ProblemKind::InvalidValue).detail.contains("not one of the agent b1"));
    let rewound: Agent = client.post("/v1/agents/a1/rewind", &json!({ "snapshot": "one" })).await.json();
    assert_eq!((rewound.id, eval(client, "a1", "x").await.as_deref()), (agent.id, Some("1")));

    gone(client, "/v1/agents/a1").await;
    gone(client, "/v1/agents/b1").await;
    gone(client, "/v1/snapshots/one").await;
    client.get("/v1/snapshots/one").await.problem(ProblemKind::SnapshotNotFound);
    assert!(client.get("/v1/snapshots").await.json::<SnapshotList>().snapshots.is_empty());
    eventually("its directory is gone", async || dirs(&place) == 0).await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_diff_needs_its_base_until_it_is_compacted_and_all_of_it_outlasts_arkd() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    client.create("a1", "base").await;
    take(client, "a1", "one").await;
    restore(client, "one", "b1").await;
    eval(client, "b1", "x=2").await;
    let two = take(client, "b1", "two").await;
    assert_eq!((two.kind, two.base.as_deref()), (SnapshotKind::Diff, Some("snapshot one")));
    ark.daemon.shut_down().await;

    let ark = place.start().await;
    let client = &ark.client;
    let list: SnapshotList = client.get("/v1/snapshots").await.json();
    assert_eq!(list.snapshots.len(), 2);
    let refused = client.delete("/v1/snapshots/one").await.problem(ProblemKind::InUse);
    assert!(refused.detail.contains("ark snapshot compact"), "{refused:?}");
    let full: Snapshot = client.post("/v1/snapshots/two/compact", &json!({})).await.json();
    assert_eq!((full.kind, full.base, full.pause_us), (SnapshotKind::Full, None, 7));
    assert_ne!(full.id, two.id);
    gone(client, "/v1/snapshots/one").await;
    eventually("base and diff are gone", async || dirs(&place) == 1).await;
    restore(client, "two", "c1").await;
    assert_eq!(eval(client, "c1", "x").await.as_deref(), Some("2"));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn orphans_are_made_only_on_request_and_say_what_they_miss() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    client.create("a1", "base").await;
    take(client, "a1", "one").await;
    restore(client, "one", "b1").await;
    take(client, "b1", "two").await;
    gone(client, "/v1/agents/b1").await;
    client.delete("/v1/snapshots/one").await.problem(ProblemKind::InUse);
    client.delete("/v1/snapshots/one?orphans=perhaps").await.problem(ProblemKind::BadRequest);
    gone(client, "/v1/snapshots/one?orphans=true").await;
    let refused = client.post("/v1/snapshots/two/restore", &json!({})).await;
    assert!(refused.problem(ProblemKind::SnapshotUnusable).detail.contains("was deleted"));
    gone(client, "/v1/snapshots/two").await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_damaged_snapshot_is_refused_and_no_agent_is_left() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    client.create("a1", "base").await;
    take(client, "a1", "one").await;
    let dir = std::fs::read_dir(place.state().snapshots()).unwrap().next().unwrap().unwrap().path();
    restore(client, "one", "b1").await;
    std::fs::write(dir.join("memory"), "mem0ry").unwrap();
    let before = place.agent_dirs();
    let refused = client.post("/v1/snapshots/one/restore", &json!({})).await;
    let detail = refused.problem(ProblemKind::SnapshotUnusable).detail;
    assert!(detail.contains("memory is damaged in its first chunk"), "{detail}");
    assert_eq!(place.agent_dirs(), before);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn where_there_is_no_room_nothing_is_left_and_the_agent_lives() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    client.create("a1", "full-disk").await;
    let refused = client.post("/v1/agents/a1/snapshots", &json!({ "name": "one" })).await;
    refused.problem(ProblemKind::DiskFull);
    eventually("nothing is left", async || dirs(&place) == 0).await;
    assert_eq!(eval(client, "a1", "hostname").await.as_deref(), Some("a1"));
    client.get("/v1/snapshots/one").await.problem(ProblemKind::SnapshotNotFound);
    client
        .post("/v1/agents/none/snapshots", &json!({ "name": "one" }))
        .await
        .problem(ProblemKind::AgentNotFound);
    client.post("/v1/snapshots/none/restore", &json!({})).await.problem(ProblemKind::SnapshotNotFound);
    ark.daemon.shut_down().await;
}

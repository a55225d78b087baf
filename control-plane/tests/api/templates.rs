//! Templates: built, forked from, replaced, deleted.

use ark_types::agent::{Agent, Origin};
use ark_types::eval::EvalReply;
use ark_types::layout::RunDir;
use ark_types::problem::ProblemKind;
use ark_types::snapshot::{Snapshot, SnapshotKind};
use ark_types::template::{Template, TemplateList};
use arkd::config::Config;
use arkd::daemon::Daemon;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{Client, Place, eventually};

async fn build(client: &Client, body: &Value) -> Template {
    let reply = client.post("/v1/templates", body).await;
    assert_eq!(reply.status(), StatusCode::CREATED, "{:?}", reply.body);
    reply.json()
}

async fn create(client: &Client, body: &Value) -> Agent {
    let reply = client.post("/v1/agents", body).await;
    assert_eq!(reply.status(), StatusCode::CREATED, "{:?}", reply.body);
    reply.json()
}

async fn list(client: &Client) -> Vec<Template> {
    client.get("/v1/templates").await.json::<TemplateList>().templates
}

/// Directories of templates that are there.
fn dirs(place: &Place) -> usize {
    std::fs::read_dir(place.state().templates()).unwrap().count()
}

#[tokio::test]
async fn a_template_is_built_warm_forked_from_and_deleted_when_nobody_needs_it() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let warm = json!({ "name": "warm", "image": "base", "memory_mib": 64, "warm": "x=1" });
    let template = build(client, &warm).await;
    assert_eq!((template.memory_mib, template.vcpus, template.agents), (64, 1, 0));
    assert!(template.digest.starts_with("sha256:") && template.bytes == 4096);
    assert_eq!(place.agent_dirs(), 0, "the agent that was frozen is gone");
    assert_eq!(build(client, &warm).await, template, "it is there already");

    let agent = create(client, &json!({ "name": "a1", "template": "warm" })).await;
    assert_eq!(agent.origin, Origin::Template { name: "warm".parse().unwrap() });
    let value: EvalReply = client.post("/v1/agents/a1/eval", &json!({ "code": "x" })).await.json();
    assert_eq!(value.value.as_deref(), Some("1"));
    let now: Template = client.get("/v1/templates/warm").await.json();
    assert!(now.agents == 1 && now.used_unix_ms >= template.used_unix_ms);
    let refused = client.delete("/v1/templates/warm").await.problem(ProblemKind::InUse);
    assert!(refused.detail.starts_with("1 living agent"), "{refused:?}");

    let snapshot = client.post("/v1/agents/a1/snapshots", &json!({ "name": "s1" })).await.json::<Snapshot>();
    assert_eq!((snapshot.kind, snapshot.base.as_deref()), (SnapshotKind::Diff, Some("template warm")));
    client.delete("/v1/agents/a1").await;
    assert_eq!(client.delete("/v1/templates/warm").await.status(), StatusCode::NO_CONTENT);
    client.get("/v1/templates/warm").await.problem(ProblemKind::TemplateNotFound);
    client.delete("/v1/templates/warm").await.problem(ProblemKind::TemplateNotFound);
    // The diff over it stays usable; with it the template's memory goes.
    let restored = client.post("/v1/snapshots/s1/restore", &json!({ "name": "b1" })).await;
    assert_eq!(restored.status(), StatusCode::CREATED, "{:?}", restored.body);
    client.delete("/v1/agents/b1").await;
    client.delete("/v1/snapshots/s1").await;
    eventually("its memory is gone", async || dirs(&place) == 0).await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn an_images_own_template_is_built_once_lasts_and_is_built_again_when_the_kernel_changes() {
    let place = Place::new();
    let ark = place.start().await;
    let creations = (0..6).map(|n| {
        let client = ark.client.clone();
        tokio::spawn(
            async move { create(&client, &json!({ "name": format!("a{n}"), "image": "base" })).await },
        )
    });
    for creation in creations.collect::<Vec<_>>() {
        let agent = creation.await.unwrap();
        assert_eq!(agent.origin, Origin::Template { name: "default-base".parse().unwrap() });
    }
    let [first] = <[_; 1]>::try_from(list(&ark.client).await).unwrap();
    assert_eq!(first.agents, 6);
    ark.daemon.shut_down().await;

    let ark = place.start().await;
    let client = &ark.client;
    create(client, &json!({ "name": "a1", "image": "base" })).await;
    let [same] = <[_; 1]>::try_from(list(client).await).unwrap();
    assert_eq!((&same.digest, same.created_unix_ms, same.agents), (&first.digest, first.created_unix_ms, 1));
    std::fs::write(place.path("assets/kernel/vmlinux"), "another kernel").unwrap();
    create(client, &json!({ "name": "b1", "image": "base" })).await;
    let [other] = <[_; 1]>::try_from(list(client).await).unwrap();
    assert!(other.digest != first.digest && other.agents == 1);
    assert_eq!(dirs(&place), 2, "an agent goes on from the old one");
    client.delete("/v1/agents/a1").await;
    eventually("the old one is gone", async || dirs(&place) == 1).await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_template_that_cannot_be_built_says_why_and_leaves_nothing() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let ask = |image: &str, warm: &str, timeout_ms: u64| json!({ "name": "t", "image": image, "memory_mib": 64, "warm": warm, "timeout_ms": timeout_ms });
    for (body, kind, why) in [
        (ask("base", "raise", 1000), ProblemKind::TemplateFailed, "failed with Error: raised"),
        (ask("base", "sleep", 200), ProblemKind::TemplateFailed, "did not end within 1 s"),
        (ask("base", "x=1", 0), ProblemKind::InvalidValue, "0 ms"),
        (ask("panics", "x=1", 1000), ProblemKind::BootFailed, "Kernel panic"),
        (ask("full-disk", "x=1", 1000), ProblemKind::DiskFull, "No space left"),
        (ask("nowhere", "x=1", 1000), ProblemKind::ImageNotFound, "nowhere"),
        (json!({ "name": "t", "image": "base", "memory_mib": 1 }), ProblemKind::InvalidValue, "1 MiB"),
        (json!({ "name": "default-x", "image": "base" }), ProblemKind::InvalidValue, "default-"),
    ] {
        let problem = client.post("/v1/templates", &body).await.problem(kind);
        assert!(problem.detail.contains(why), "{problem:?}");
        eventually("nothing is left", async || dirs(&place) == 0 && place.agent_dirs() == 0).await;
    }
    assert!(list(client).await.is_empty());
    let refused = client.post("/v1/agents", &json!({ "template": "t" })).await;
    refused.problem(ProblemKind::TemplateNotFound);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_template_back() {
    let place = Place::new();
    let ark = place.start().await;
    let client = ark.client.clone();
    let body = json!({ "name": "t", "image": "base", "memory_mib": 64, "warm": "sleep" });
    let asking = tokio::spawn(async move { client.post("/v1/templates", &body).await });
    eventually("it is being built", async || place.agent_dirs() == 1).await;
    ark.client.delete("/v1/templates/t").await.problem(ProblemKind::InUse);
    asking.abort();
    eventually("nothing is left", async || dirs(&place) == 0 && place.agent_dirs() == 0).await;
    ark.client.delete("/v1/templates/t").await.problem(ProblemKind::TemplateNotFound);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn the_end_of_arkd_gives_up_what_is_being_built() {
    let place = Place::new();
    let ark = place.start().await;
    let client = ark.client.clone();
    let body = json!({ "name": "t", "image": "base", "memory_mib": 64, "warm": "sleep" });
    tokio::spawn(async move {
        client.try_send(client.request(Method::POST, "/v1/templates", body.to_string())).await
    });
    eventually("it is being built", async || place.agent_dirs() == 1).await;
    ark.daemon.shut_down().await;
    assert_eq!(std::fs::read_dir(place.path("run")).unwrap().count(), 0);
    eventually("nothing is left", async || dirs(&place) == 0).await;
}

#[tokio::test]
async fn two_cannot_keep_the_same_state() {
    let place = Place::new();
    let ark = place.start().await;
    let config = Config { run: RunDir(place.path("other")), ..place.config() };
    let said = Daemon::start(config).await.unwrap_err().to_string();
    assert!(
        said.contains("already serves") && said.ends_with("set ARK_STATE to another directory"),
        "{said}"
    );
    ark.daemon.shut_down().await;
    assert!(!place.state().0.join("arkd.lock").exists());
}

#[tokio::test]
async fn a_damaged_template_is_built_again() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    create(client, &json!({ "name": "a1", "image": "base" })).await;
    let [first] = <[_; 1]>::try_from(list(client).await).unwrap();
    let dir = std::fs::read_dir(place.state().templates()).unwrap().next().unwrap().unwrap().path();
    std::fs::write(dir.join("memory"), "mem0ry").unwrap();
    let agent = create(client, &json!({ "name": "b1", "image": "base" })).await;
    assert_eq!(agent.origin, Origin::Template { name: "default-base".parse().unwrap() });
    let [second] = <[_; 1]>::try_from(list(client).await).unwrap();
    assert_eq!((first.digest, second.agents), (second.digest, 1));
    client.delete("/v1/agents/a1").await;
    eventually("the damaged one is gone", async || !dir.exists()).await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn who_does_not_wait_waits_for_no_template_either() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    // The image's own template is not there yet: the agent is booted, and the next one is a fork.
    let agent = create(client, &json!({ "name": "a1", "image": "base", "queue_timeout_ms": 0 })).await;
    assert_eq!(agent.origin, Origin::Boot);
    eventually("the image's template is there", async || list(client).await.len() == 1).await;
    let agent = create(client, &json!({ "name": "a2", "image": "base", "queue_timeout_ms": 0 })).await;
    assert!(matches!(agent.origin, Origin::Template { .. }), "{agent:?}");

    // A template that its kernel left behind has to be built again.
    build(client, &json!({ "name": "warm", "image": "base", "memory_mib": 64, "warm": "x=1" })).await;
    std::fs::write(ark_types::layout::Assets(place.path("assets")).kernel(), "another kernel").unwrap();
    let now = json!({ "name": "b1", "template": "warm", "queue_timeout_ms": 0 });
    let refused = client.post("/v1/agents", &now).await.problem(ProblemKind::InUse);
    assert!(refused.detail.contains("being built"), "{refused:?}");
    client.get("/v1/agents/b1").await.problem(ProblemKind::AgentNotFound);
    let is_had = async || client.post("/v1/agents", &now).await.status() == StatusCode::CREATED;
    eventually("it is built for the next one", is_had).await;
    ark.daemon.shut_down().await;
}

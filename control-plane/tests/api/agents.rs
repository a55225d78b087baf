//! Life of an agent.

use ark_types::agent::{Agent, AgentList, AgentState};
use ark_types::health::{Health, HealthStatus};
use ark_types::image::ImageList;
use ark_types::problem::ProblemKind;
use ark_types::vmm::ExitReason;
use hyper::{Method, StatusCode};
use serde_json::json;

use crate::harness::{IMAGES, Place, eventually, runs};

#[tokio::test]
async fn an_agent_is_created_watched_and_deleted_and_nothing_is_left() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let health: Health = client.get("/v1/health").await.json();
    assert_eq!((health.status, health.agents), (HealthStatus::Ok, 0));
    let images: ImageList = client.get("/v1/images").await.json();
    assert_eq!(images.images.len(), IMAGES.len());

    let agent = client.create("a1", "base").await;
    assert_eq!((agent.state, agent.name.as_ref()), (AgentState::Running, "a1"));
    let pid = agent.vmm_pid.unwrap();
    assert!(runs(pid) && agent.boot_ms.is_some() && agent.id.len() == 16);
    eventually("a heartbeat arrives", async || {
        client
            .get("/v1/agents/a1")
            .await
            .json::<Agent>()
            .heartbeat
            .is_some_and(|beat| beat.mem_available_kib == 64)
    })
    .await;
    let by_id: Agent = client.get(&format!("/v1/agents/{}", agent.id)).await.json();
    assert_eq!(by_id.name, agent.name);
    let console = client.get("/v1/agents/a1/logs?tail=1").await;
    assert_eq!(console.body, "script base\n");

    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    assert!(!runs(pid));
    assert_eq!(place.agent_dirs(), 0);
    assert!(client.get("/v1/agents").await.json::<AgentList>().agents.is_empty());
    client.get("/v1/agents/a1").await.problem(ProblemKind::AgentNotFound);
    ark.daemon.shut_down().await;
    assert_eq!(std::fs::read_dir(place.path("run")).unwrap().count(), 0);
}

#[tokio::test]
async fn names_are_unique_among_the_living_and_made_up_when_missing() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    client.create("a1", "base").await;
    let again = client.post("/v1/agents", &json!({ "name": "a1", "image": "base", "memory_mib": 64 })).await;
    assert!(again.problem(ProblemKind::NameTaken).detail.contains("a1"));
    let nameless: Agent =
        client.post("/v1/agents", &json!({ "image": "base", "memory_mib": 64 })).await.json();
    assert_eq!(nameless.name.as_ref().split('-').count(), 3);

    let ended = client.create("b1", "powers-off").await;
    eventually("it ends", async || client.get("/v1/agents/b1").await.json::<Agent>().exit.is_some()).await;
    let successor = client.create("b1", "base").await;
    let found: Agent = client.get("/v1/agents/b1").await.json();
    assert_eq!(found.id, successor.id, "the living one has the name");
    let list: AgentList = client.get("/v1/agents").await.json();
    assert!(list.agents.iter().any(|agent| agent.id == ended.id), "the ended one is still known");
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn twenty_agents_at_once() {
    let place = Place::new();
    let ark = place.start().await;
    let creations = (0..20).map(|n| {
        let client = ark.client.clone();
        tokio::spawn(async move { client.create(&format!("a{n}"), "base").await })
    });
    for creation in creations.collect::<Vec<_>>() {
        assert_eq!(creation.await.unwrap().state, AgentState::Running);
    }
    assert_eq!(ark.client.get("/v1/health").await.json::<Health>().agents, 20);
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn a_guest_that_powers_itself_off_is_stopped_and_says_so() {
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("a1", "powers-off").await;
    eventually("it stops", async || {
        ark.client.get("/v1/agents/a1").await.json::<Agent>().state == AgentState::Stopped
    })
    .await;
    let agent: Agent = ark.client.get("/v1/agents/a1").await.json();
    assert_eq!(agent.exit.unwrap().reason, ExitReason::GuestPoweroff);
    assert_eq!((agent.reason.as_deref(), agent.vmm_pid), (Some("the guest powered itself off"), None));
    let refused = ark.client.exec("a1", &json!({ "argv": ["true"] })).await;
    assert!(refused.problem(ProblemKind::AgentNotRunning).detail.contains("powered itself off"));
    assert_eq!(ark.client.get("/v1/agents/a1/logs?follow=true").await.status(), StatusCode::OK);
    assert_eq!(ark.client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    assert_eq!(place.agent_dirs(), 0);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_guest_that_ignores_the_stop_is_ended_after_its_grace_or_at_once() {
    let place = Place::new();
    let ark = place.start().await;
    for (grace, least, most) in [("300", 300, 5000), ("0", 0, 2000)] {
        let agent = ark.client.create("a1", "ignores-stop").await;
        let started = std::time::Instant::now();
        ark.client.delete(&format!("/v1/agents/a1?grace_ms={grace}")).await;
        let took = started.elapsed().as_millis();
        assert!((least..most).contains(&took), "{took} ms with a grace of {grace}");
        assert!(!runs(agent.vmm_pid.unwrap()));
    }
    // A later, shorter grace wins.
    ark.client.create("a1", "ignores-stop").await;
    let started = std::time::Instant::now();
    tokio::join!(ark.client.delete("/v1/agents/a1?grace_ms=60000"), async {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        ark.client.delete("/v1/agents/a1?grace_ms=0").await
    });
    assert!(started.elapsed().as_secs() < 10);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_console_is_followed_until_the_agent_ends() {
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("a1", "base").await;
    let follower = tokio::spawn({
        let client = ark.client.clone();
        async move { client.get("/v1/agents/a1/logs?follow=true").await }
    });
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert!(!follower.is_finished());
    ark.client.delete("/v1/agents/a1").await;
    assert_eq!(follower.await.unwrap().body, "Linux version fake\nscript base\n");
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn who_leaves_before_the_agent_is_up_leaves_nothing() {
    let place = Place::new();
    let ark = place.start().await;
    let body = json!({ "name": "a1", "image": "silent", "memory_mib": 64 }).to_string();
    let request = ark.client.request(Method::POST, "/v1/agents", body);
    let creation = tokio::spawn({
        let client = ark.client.clone();
        async move { client.send(request).await }
    });
    eventually("the VMM runs", async || {
        ark.client.get("/v1/agents/a1").await.status() == StatusCode::OK && place.agent_dirs() == 1
    })
    .await;
    creation.abort();
    // The connection itself ends only with its task, which the client's side drops with the sender.
    eventually("the agent is gone", async || {
        ark.client.get("/v1/agents/a1").await.status() == StatusCode::NOT_FOUND
    })
    .await;
    assert_eq!(place.agent_dirs(), 0);
    ark.daemon.shut_down().await;
}

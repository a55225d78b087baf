//! Consoles of agents that are gone: kept, found, bounded, forgotten.

use ark_types::agent::{Agent, AgentState};
use ark_types::console::KeptConsoleList;
use ark_types::problem::ProblemKind;
use serde_json::json;

use crate::harness::{Ark, Client, Place, eventually};

async fn kept(client: &Client) -> Vec<(String, String)> {
    let list: KeptConsoleList = client.get("/v1/consoles").await.json();
    list.consoles.into_iter().map(|kept| (kept.name.to_string(), kept.reason)).collect()
}

async fn console(client: &Client, agent: &str) -> String {
    String::from_utf8(client.get(&format!("/v1/agents/{agent}/logs")).await.body.to_vec()).unwrap()
}

#[tokio::test]
async fn a_create_that_failed_leaves_its_console() {
    let place = Place::new();
    let Ark { daemon, client } = place.start().await;
    let reply = client.post("/v1/agents", &json!({ "name": "a1", "image": "panics", "cold": true })).await;
    reply.problem(ProblemKind::BootFailed);
    assert_eq!(place.agent_dirs(), 0);
    client.get("/v1/agents/a1").await.problem(ProblemKind::AgentNotFound);
    let list = kept(&client).await;
    assert!(list.len() == 1 && list[0].0 == "a1" && list[0].1.contains("panicked"), "{list:?}");
    let text = console(&client, "a1").await;
    assert!(text.starts_with("Linux version fake") && text.contains("Kernel panic"), "{text}");
    assert_eq!(
        client.get("/v1/agents/a1/logs?follow=true&tail=1").await.body,
        text.lines().last().unwrap().to_owned() + "\n"
    );
    // Three are kept in these tests.
    for name in ["a2", "a3", "a4"] {
        client.post("/v1/agents", &json!({ "name": name, "image": "panics", "cold": true })).await;
    }
    let names: Vec<_> = kept(&client).await.into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["a2", "a3", "a4"]);
    client.get("/v1/agents/a1/logs").await.problem(ProblemKind::AgentNotFound);
    daemon.shut_down().await;
}

async fn has_ended(client: &Client, name: &str) -> bool {
    let agent: Agent = client.get(&format!("/v1/agents/{name}")).await.json();
    agent.state == AgentState::Stopped
}

#[tokio::test]
async fn an_agent_that_ended_by_itself_has_a_console_until_it_is_deleted_and_for_the_next_arkd() {
    let place = Place::new();
    let Ark { daemon, client } = place.start().await;
    client.create("off", "powers-off").await;
    client.create("gone", "powers-off").await;
    client.create("asked", "base").await;
    eventually("both end", async || has_ended(&client, "off").await && has_ended(&client, "gone").await)
        .await;
    assert!(client.delete("/v1/agents/gone").await.status().is_success());
    assert!(client.delete("/v1/agents/asked").await.status().is_success());
    let names =
        async |client: &Client| kept(client).await.into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    assert_eq!(names(&client).await, ["off"], "what is deleted leaves nothing");
    daemon.shut_down().await;

    let Ark { daemon, client } = place.start().await;
    assert!(has_ended(&client, "off").await, "it waits to be deleted");
    assert_eq!(names(&client).await, ["off"]);
    assert!(console(&client, "off").await.contains("script powers-off"));
    daemon.shut_down().await;
}

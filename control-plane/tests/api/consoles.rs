//! Consoles of agents that are gone: kept, found, bounded, forgotten.

use ark_types::agent::{Agent, AgentState};
use ark_types::console::{HEAD_BYTES, KeptConsoleList, note};
use ark_types::problem::ProblemKind;
use hyper::Method;
use serde_json::{Value, json};

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

/// Events of a reply: type, id, data.
fn events(body: &[u8]) -> Vec<(String, u64, Value)> {
    let text = std::str::from_utf8(body).unwrap();
    let field = |block: &str, name: &str| {
        let line = block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.unwrap_or_default().to_owned()
    };
    let blocks = text.split("\n\n").filter(|block| block.contains("data: "));
    blocks
        .map(|block| {
            let data = serde_json::from_str(&field(block, "data")).unwrap();
            (field(block, "event"), field(block, "id").parse().unwrap(), data)
        })
        .collect()
}

#[tokio::test]
async fn a_console_is_read_from_any_byte_on_and_what_the_limit_took_is_counted() {
    let place = Place::new();
    let Ark { daemon, client } = place.start().await;
    let agent = client.create("a1", "base").await;
    let path = place.run().agent(&agent.id).console();
    let head = "x".repeat(usize::try_from(HEAD_BYTES).unwrap());
    std::fs::write(&path, format!("{head}{}tail\n", note(1000))).unwrap();
    let end = HEAD_BYTES + 1005;
    let plain = async |query: &str| {
        let reply = client.get(&format!("/v1/agents/a1/logs?{query}")).await;
        let offset: u64 = reply.response.headers()["ark-console-offset"].to_str().unwrap().parse().unwrap();
        (offset, String::from_utf8(reply.body.to_vec()).unwrap())
    };
    assert_eq!(plain("").await, (0, format!("{head}{}tail\n", note(1000))), "byte for byte");
    let from = HEAD_BYTES + 400;
    assert_eq!(plain(&format!("from={from}")).await, (from, format!("{}tail\n", note(600))));
    assert_eq!(plain(&format!("from={}", end - 3)).await, (end - 3, "il\n".to_owned()));
    assert_eq!(plain(&format!("from={end}")).await, (end, String::new()));
    assert_eq!(plain("tail=1").await, (end - 5, "tail\n".to_owned()));
    let ask = async |query: &str| client.get(&format!("/v1/agents/a1/logs?{query}")).await;
    let beyond = ask(&format!("from={}", end + 1)).await.problem(ProblemKind::InvalidValue);
    assert!(beyond.detail.contains(&format!("so far there are {end}")), "{beyond}");
    ask("from=0&tail=1").await.problem(ProblemKind::InvalidValue);
    ask("from=-1").await.problem(ProblemKind::BadRequest);

    let stream = async |query: &str, last: Option<&str>| {
        let mut request = client.request(Method::GET, &format!("/v1/agents/a1/logs?{query}"), "");
        request.headers_mut().insert("accept", "text/event-stream".parse().unwrap());
        if let Some(last) = last {
            request.headers_mut().insert("last-event-id", last.parse().unwrap());
        }
        client.reply(request).await
    };
    let rest = [
        ("left_out".to_owned(), HEAD_BYTES + 1000, json!({ "offset": from, "bytes": 600 })),
        ("console".to_owned(), end, json!({ "offset": end - 5, "data": "tail\n", "encoding": "utf8" })),
        ("end".to_owned(), end, json!({ "offset": end })),
    ];
    assert_eq!(events(&stream(&format!("from={from}"), None).await.body), rest);
    // Where it was is what the client says it was; `tail` was that of its first request.
    assert_eq!(events(&stream("tail=1", Some(&from.to_string())).await.body), rest);
    assert_eq!(events(&stream("tail=1", None).await.body), rest[1..]);
    stream("", Some("x")).await.problem(ProblemKind::InvalidValue);
    std::fs::write(&path, [b'a', 0xff]).unwrap();
    let (kind, id, data) = events(&stream("", None).await.body).remove(0);
    assert_eq!(
        (kind.as_str(), id, data),
        ("console", 2, json!({ "offset": 0, "data": "Yf8=", "encoding": "base64" }))
    );

    // Followed, it ends with its agent, and says so.
    let following = tokio::spawn({
        let client = client.clone();
        async move {
            let mut request = client.request(Method::GET, "/v1/agents/a1/logs?follow=true&from=2", "");
            request.headers_mut().insert("accept", "text/event-stream".parse().unwrap());
            client.reply(request).await
        }
    });
    std::fs::write(&path, "a\u{0}bc").unwrap();
    assert!(client.delete("/v1/agents/a1").await.status().is_success());
    let told = events(&following.await.unwrap().body);
    assert_eq!(told.last().map(|(kind, ..)| kind.as_str()), Some("end"));
    daemon.shut_down().await;
}

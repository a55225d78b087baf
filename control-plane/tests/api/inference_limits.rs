//! How much of models may be had: bounded queues, turns among owners, budgets, and a thousand calls at once.

use std::time::Duration;

use ark_types::openai::Completion;
use ark_types::problem::ProblemKind;
use hyper::header::RETRY_AFTER;
use hyper::{Method, StatusCode};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use prometheus_parse::Scrape;
use serde_json::{Value, json};

use crate::harness::{Client, Place, Reply, eventually};
use crate::inference::{ask, audited, chat, error, said, served, serving};

/// A call for `owner`.
async fn ask_for(client: &Client, owner: &str, prompt: &str) -> Reply {
    let mut request =
        client.request(Method::POST, "/v1/chat/completions", chat(prompt, &json!({})).to_string());
    request.headers_mut().insert("ark-owner", owner.parse().unwrap());
    client.reply(request).await
}

/// A call for `owner` that goes on by itself.
pub(crate) fn begin(client: &Client, owner: &str, prompt: &str) -> tokio::task::JoinHandle<Reply> {
    let (client, owner, prompt) = (client.clone(), owner.to_owned(), prompt.to_owned());
    tokio::spawn(async move { ask_for(&client, &owner, &prompt).await })
}

/// The value of a metric that has one series.
pub(crate) async fn metric(client: &Client, name: &str) -> f64 {
    let text = String::from_utf8(client.get("/metrics").await.body.to_vec()).unwrap();
    let scrape = Scrape::parse(text.lines().map(|line| Ok(line.to_owned()))).unwrap();
    match scrape.samples.iter().find(|sample| sample.metric == name).map(|sample| sample.value.clone()) {
        Some(prometheus_parse::Value::Gauge(value) | prometheus_parse::Value::Counter(value)) => value,
        _ => 0.0,
    }
}

pub(crate) async fn waiting(client: &Client, count: f64) {
    #[expect(clippy::float_cmp, reason = "a count")]
    eventually("so many wait", async || metric(client, "ark_inference_waiting").await == count).await;
}

pub(crate) async fn running(client: &Client, count: f64) {
    #[expect(clippy::float_cmp, reason = "a count")]
    eventually("so many are under way", async || metric(client, "ark_inference_running").await == count)
        .await;
}

#[tokio::test]
async fn a_full_queue_refuses_and_makes_way_for_other_owners() {
    let place = Place::new();
    let mut config = place.config();
    config.inference = toml::from_str("queue = 3\nsessions = 1\nreplicas_max = 1").unwrap();
    let ark = serving(&place, config, 1).await;
    let client = &ark.client;
    let path = place.path("go");
    let hold = format!("hold {}", path.display());
    let held = begin(client, "greedy", &hold);
    running(client, 1.0).await;
    let mut greedy = Vec::new();
    for count in 1..=3_u32 {
        greedy.push(begin(client, "greedy", "say 1"));
        waiting(client, count.into()).await;
    }
    let full = ask_for(client, "greedy", "say 1").await;
    let (told, problem) = error(&full);
    assert_eq!((problem.kind, told.code.as_deref()), (ProblemKind::QueueFull, Some("queue_full")));
    assert!(full.response.headers().contains_key(RETRY_AFTER));
    let modest = begin(client, "modest", "say 2");
    // The newest of those who have the most makes way.
    let refused = greedy.pop().unwrap().await.unwrap();
    assert_eq!(error(&refused).1.kind, ProblemKind::QueueFull);
    waiting(client, 3.0).await;
    std::fs::write(path, "").unwrap();
    for call in greedy.into_iter().chain([held, modest]) {
        assert_eq!(call.await.unwrap().status(), StatusCode::OK);
    }
    waiting(client, 0.0).await;
    let seen: Value = serde_json::from_str(&said(client, "seen").await).unwrap();
    let order: Vec<_> = seen["owners"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let place_of_modest = order.iter().position(|owner| *owner == "modest").unwrap();
    assert!(place_of_modest <= 2, "owners take turns: {order:?}");
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn who_leaves_gives_the_turn_or_the_place_back() {
    let place = Place::new();
    let mut config = place.config();
    config.inference = toml::from_str("queue = 1\nsessions = 1\nreplicas_max = 1").unwrap();
    let ark = serving(&place, config, 1).await;
    let client = &ark.client;
    let held = begin(client, "a", &format!("hold {}", place.path("never").display()));
    running(client, 1.0).await;
    let leaving = begin(client, "a", "say 1");
    waiting(client, 1.0).await;
    leaving.abort();
    waiting(client, 0.0).await;
    held.abort();
    running(client, 0.0).await;
    eventually("the VM is told", async || {
        let seen: Value = serde_json::from_str(&said(client, "seen").await).unwrap();
        seen["cancelled"] == 1
    })
    .await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_call_that_takes_too_long_leaves_what_was_said() {
    let place = Place::new();
    let mut config = place.config();
    config.inference = toml::from_str("deadline_s = 1").unwrap();
    let ark = serving(&place, config, 1).await;
    let (told, problem) = error(&ask(&ark.client, "stall").await);
    assert_eq!((problem.kind, told.partial.as_deref()), (ProblemKind::DeadlinePassed, Some("begun")));
    assert_eq!(audited(&ark.client, "default", |calls| !calls.is_empty()).await[0].outcome, "late");
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn budgets_of_calls_and_tokens_are_kept() {
    let place = Place::new();
    let mut config = place.config();
    config.inference = toml::from_str("owner_calls_per_minute = 2\nowner_tokens_per_minute = 1000").unwrap();
    let ark = serving(&place, config, 1).await;
    let client = &ark.client;
    for _ in 0..2 {
        assert_eq!(ask_for(client, "team", "say 1").await.status(), StatusCode::OK);
    }
    let spent = ask_for(client, "team", "say 1").await;
    let (told, problem) = error(&spent);
    assert_eq!((problem.kind, told.kind.as_str()), (ProblemKind::BudgetUsed, "rate_limit_error"));
    let wait: u64 = spent.response.headers()[RETRY_AFTER].to_str().unwrap().parse().unwrap();
    assert!((1..=31).contains(&wait), "{wait}");
    assert!(problem.detail.contains("the owner team may have 2 calls"), "{problem:?}");
    // A reply of two thousand tokens is more than there was; the next call waits for that.
    assert_eq!(ask_for(client, "other", "say 2000").await.status(), StatusCode::OK);
    let (_, problem) = error(&ask_for(client, "other", "say 1").await);
    assert!(problem.detail.contains("1000 tokens"), "{problem:?}");
    let calls = audited(client, "team", |calls| calls.len() >= 2).await;
    assert_eq!(calls.len(), 2, "what was refused went nowhere");
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn no_vm_that_is_ready_is_told() {
    let place = Place::new();
    let mut config = place.config();
    config.inference = toml::from_str("wait_s = 1").unwrap();
    let ark = serving(&place, config, 1).await;
    let replica = served(&ark.client).await.replicas[0].agent.clone();
    let paused = ark.client.post(&format!("/v1/agents/{replica}/pause"), &json!({})).await;
    assert_eq!(paused.status(), StatusCode::OK, "{:?}", paused.body);
    let (told, problem) = error(&ask(&ark.client, "say 1").await);
    assert_eq!((problem.kind, told.kind.as_str()), (ProblemKind::ServiceUnready, "server_error"));
    ark.daemon.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_calls_at_once_are_all_answered() {
    const CALLS: usize = 1000;
    // Each has a connection, and both of its ends are here.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let place = Place::new();
    let ark = serving(&place, place.config(), 1).await;
    let calls: Vec<_> = (0..CALLS)
        .map(|n| {
            begin(&ark.client, if n % 10 == 0 { "modest" } else { "greedy" }, &format!("say {}", n % 3 + 1))
        })
        .collect();
    for (n, call) in calls.into_iter().enumerate() {
        let reply = tokio::time::timeout(Duration::from_secs(300), call).await.unwrap().unwrap();
        assert_eq!(reply.status(), StatusCode::OK, "{:?}", reply.body);
        let completion: Completion = reply.json();
        let text = completion.choices[0].message.clone().unwrap().content.unwrap();
        assert_eq!(text, ["1 ", "1 2 ", "1 2 3 "][n % 3], "each got its own");
    }
    audited(&ark.client, "greedy", |calls| calls.len() == CALLS - CALLS / 10).await;
    audited(&ark.client, "modest", |calls| calls.len() == CALLS / 10).await;
    ark.daemon.shut_down().await;
}

//! Pools with a policy: durable, as large as the demand wants, in room that anybody may take, of standbys that live.

use ark_types::agent::{Agent, AgentState};
use ark_types::event::EventList;
use ark_types::pool::{Pool, PoolList, PoolPolicy};
use ark_types::problem::ProblemKind;
use ark_types::scheduling::{Host, HostList, Resources};
use arkd::config::{Config, PoolSizes};
use hyper::{Method, StatusCode};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{Client, Place, Reply, eventually, runs, signal, started};
use crate::pool::vmms;

const GONE: Option<PoolPolicy> = None;

/// The body of a policy.
pub(crate) fn policy(min: u32, max: u32, target_wait_ms: u64) -> Value {
    json!({ "min": min, "max": max, "target_wait_ms": target_wait_ms })
}

pub(crate) async fn put(client: &Client, template: &str, policy: &Value) -> Reply {
    client.ask(Method::PUT, &format!("/v1/pools/{template}"), policy.to_string()).await
}

async fn build(client: &Client, name: &str) {
    let body = json!({ "name": name, "image": "base", "memory_mib": 64 });
    let reply = client.post("/v1/templates", &body).await;
    assert_eq!(reply.status(), StatusCode::CREATED, "{:?}", reply.body);
}

/// Asks for an agent of the template `t1`, without any wait for room.
async fn create(client: &Client, name: &str) -> Agent {
    let body = json!({ "name": name, "template": "t1", "queue_timeout_ms": 0 });
    let reply = client.post("/v1/agents", &body).await;
    assert_eq!(reply.status(), StatusCode::CREATED, "{:?}", reply.body);
    reply.json()
}

async fn pool(client: &Client) -> Pool {
    client.get("/v1/pools/t1").await.json()
}

async fn host(client: &Client) -> Host {
    client.get("/v1/hosts").await.json::<HostList>().hosts.remove(0)
}

/// Waits until `t1` has so many standbys, and is to have as many.
pub(crate) async fn has(client: &Client, count: u32) {
    eventually(&format!("there are {count} standbys"), async || {
        let pool = pool(client).await;
        (pool.standbys, pool.wanted) == (count, count)
    })
    .await;
}

/// A template `t1` with `policy`, and the standbys that it wants without demand.
pub(crate) async fn with_pool(client: &Client, min: u32, max: u32) {
    build(client, "t1").await;
    let reply = put(client, "t1", &policy(min, max, 0)).await;
    assert_eq!(reply.status(), StatusCode::OK, "{:?}", reply.body);
    has(client, min).await;
}

#[tokio::test]
async fn a_policy_is_set_told_and_removed_with_its_template_at_the_latest() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    put(client, "t1", &policy(0, 1, 0)).await.problem(ProblemKind::TemplateNotFound);
    client.get("/v1/pools/t1").await.problem(ProblemKind::TemplateNotFound);
    client.delete("/v1/pools/t1").await.problem(ProblemKind::TemplateNotFound);
    build(client, "t1").await;
    for (wrong, words) in [
        (policy(0, 201, 0), "give a max of at most 200"),
        (policy(3, 2, 0), "give a min that is not above the max"),
        (policy(0, 1, 600_001), "give at most 600000 ms"),
        (json!({ "min": 0, "max": 1 }), "target_wait_ms"),
        (json!({ "min": -1, "max": 1, "target_wait_ms": 0 }), "-1"),
    ] {
        let problem = put(client, "t1", &wrong).await.problem(ProblemKind::InvalidValue);
        assert!(problem.detail.contains(words), "{problem:?}");
    }
    let unset = pool(client).await;
    assert_eq!((unset.policy, unset.standbys, unset.wanted), (GONE, 0, 0));

    let set: Pool = put(client, "t1", &policy(1, 4, 50)).await.json();
    assert_eq!(set.policy, Some(PoolPolicy { min: 1, max: 4, target_wait_ms: 50 }));
    put(client, "t1", &policy(1, 4, 50)).await;
    has(client, 1).await;
    let listed: PoolList = client.get("/v1/pools").await.json();
    let [only] = listed.pools.as_slice() else { panic!("{listed:?}") };
    assert_eq!(
        (only.template.as_ref(), only.reserved),
        ("t1", Resources { agents: 1, memory_mib: 8, vcpus: 1 })
    );
    let here = host(client).await;
    assert_eq!((here.reserved, here.standbys, here.warm.len()), (Resources::default(), only.reserved, 1));

    assert_eq!(client.delete("/v1/pools/t1").await.status(), StatusCode::NO_CONTENT);
    has(client, 0).await;
    assert_eq!(client.delete("/v1/pools/t1").await.status(), StatusCode::NO_CONTENT, "once more");
    assert!(host(client).await.warm.is_empty());

    put(client, "t1", &policy(2, 2, 0)).await;
    has(client, 2).await;
    assert_eq!(client.delete("/v1/templates/t1").await.status(), StatusCode::NO_CONTENT);
    assert!(client.get("/v1/pools").await.json::<PoolList>().pools.is_empty());
    eventually("its standbys are gone", async || place.agent_dirs() == 0).await;
    build(client, "t1").await;
    assert_eq!(pool(client).await.policy, GONE, "another one of that name has its own");
    let told: EventList = client.get("/v1/events?stream=pool/t1").await.json();
    let kinds: Vec<_> = told.events.iter().map(|recorded| recorded.event.kind()).collect();
    assert_eq!(kinds, ["pool.set", "pool.removed", "pool.set", "pool.removed"], "each change once");
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_policy_outlasts_a_killed_arkd_whose_standbys_the_next_one_ends() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    with_pool(&client, 2, 3).await;
    let agent = create(&client, "a1").await;
    has(&client, 2).await;
    let mut waiting = vmms(&place);
    waiting.retain(|pid| Some(*pid) != agent.vmm_pid);
    assert_eq!(waiting.len(), 2);
    first.end(Signal::SIGKILL);
    assert!(waiting.iter().all(|pid| runs(*pid)), "nobody was there to end them");

    let (mut second, client) = started(&place, &[]).await;
    assert!(waiting.iter().all(|pid| !runs(*pid)), "a standby that nobody knows");
    let again = pool(&client).await;
    assert_eq!(again.policy, Some(PoolPolicy { min: 2, max: 3, target_wait_ms: 0 }));
    has(&client, 2).await;
    assert_eq!(place.agent_dirs(), 3, "the agent's and two");
    assert_eq!(create(&client, "a2").await.state, AgentState::Running);
    assert_eq!(pool(&client).await.hits, 1, "of a standby");
    assert!(second.end(Signal::SIGTERM));
}

#[tokio::test]
async fn a_pool_grows_under_a_burst_and_is_back_at_its_min_when_it_is_calm() {
    let place = Place::new();
    let mut config = place.config();
    config.timing.demand = std::time::Duration::from_secs(3);
    let ark = place.start_with(config).await;
    let client = &ark.client;
    with_pool(client, 1, 8).await;
    let burst = (0..6).map(|n| {
        let client = client.clone();
        tokio::spawn(async move { create(&client, &format!("a{n}")).await })
    });
    for agent in burst.collect::<Vec<_>>() {
        assert_eq!(agent.await.unwrap().state, AgentState::Running);
    }
    let seen = pool(client).await;
    assert_eq!(seen.hits + seen.misses, 6, "{seen:?}");
    assert!(seen.hits >= 1 && seen.demand_per_s > 0.0 && seen.make_ms.is_some(), "{seen:?}");
    assert!(seen.wait.is_some_and(|wait| wait.agents == 6 && wait.p50_ms <= wait.p99_ms), "{seen:?}");
    eventually("it grows", async || pool(client).await.standbys >= 3).await;
    let mut most = 0;
    eventually("it is back", async || {
        let now = pool(client).await;
        assert!((1..=8).contains(&now.wanted) && now.standbys <= 8, "{now:?}");
        most = most.max(now.standbys);
        (now.standbys, now.wanted) == (1, 1)
    })
    .await;
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn standbys_have_room_only_while_nobody_else_needs_it() {
    let place = Place::new();
    let mut config = place.config();
    config.scheduler.max_agents = 3;
    let ark = place.start_with(config).await;
    let client = &ark.client;
    with_pool(client, 2, 2).await;
    assert_eq!(host(client).await.standbys.agents, 2);
    // Nobody waits for them, and nobody is refused.
    let cold = |name: &'static str| {
        let body = json!({ "name": name, "image": "base", "memory_mib": 64, "queue_timeout_ms": 0 });
        let client = client.clone();
        async move { client.post("/v1/agents", &body).await.status() }
    };
    for name in ["a1", "a2"] {
        assert_eq!(cold(name).await, StatusCode::CREATED);
    }
    eventually("one gave its room up", async || host(client).await.standbys.agents == 1).await;
    // Whoever asks for what a standby is gets that, and its room.
    let claimed = create(client, "a3").await;
    assert_eq!((claimed.state, pool(client).await.hits), (AgentState::Running, 1));
    eventually("there is none", async || {
        let pool = pool(client).await;
        pool.standbys == 0 && pool.failure.is_some_and(|why| why.contains("no room"))
    })
    .await;
    assert_eq!(host(client).await.reserved.agents, 3);
    assert_eq!(cold("a4").await, StatusCode::SERVICE_UNAVAILABLE, "agents are another matter");
    client.delete("/v1/agents/a1?grace_ms=0").await;
    client.delete("/v1/agents/a2?grace_ms=0").await;
    has(client, 2).await;
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn a_request_that_waits_for_room_does_not_keep_the_pool_from_being_filled() {
    let place = Place::new();
    let config = Config { pool: PoolSizes { prepared: 1, standbys: 1 }, ..place.config() };
    let ark = place.start_with(config).await;
    let client = &ark.client;
    build(client, "t1").await;
    let apart = |name: &str| {
        json!({
            "name": name, "template": "t1", "anti_affinity": "g", "spread": "hard", "queue_timeout_ms": 60_000,
        })
    };
    assert_eq!(client.post("/v1/agents", &apart("a1")).await.status(), StatusCode::CREATED);
    has(client, 1).await;
    let second = tokio::spawn({
        let (client, body) = (client.clone(), apart("a2"));
        async move { client.post("/v1/agents", &body).await.status() }
    });
    let waiting = async || client.get("/v1/queue").await.json::<Value>()["waiting"].as_array().unwrap().len();
    eventually("it waits", async || waiting().await == 1).await;
    create(client, "a3").await;
    assert_eq!(pool(client).await.hits, 1);
    // The standby, a prepared VMM, and those of two agents.
    eventually("all is made again", async || pool(client).await.standbys == 1 && vmms(&place).len() == 4)
        .await;
    assert_eq!(waiting().await, 1, "it still does");
    client.delete("/v1/agents/a1?grace_ms=0").await;
    assert_eq!(second.await.unwrap(), StatusCode::CREATED);
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn a_standby_that_is_killed_becomes_nobody_and_another_takes_its_place() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    with_pool(client, 2, 2).await;
    let before = vmms(&place);
    signal(before[0], Signal::SIGKILL);
    eventually("it is noticed and replaced", async || {
        let now = vmms(&place);
        now.len() == 2 && !now.contains(&before[0]) && now.iter().all(|pid| runs(*pid))
    })
    .await;
    has(client, 2).await;
    // All of them at once, and an agent is asked for in the same moment.
    let killed = vmms(&place);
    killed.iter().for_each(|pid| signal(*pid, Signal::SIGKILL));
    let agent = create(client, "a1").await;
    assert_eq!(agent.state, AgentState::Running);
    assert!(agent.vmm_pid.is_some_and(|pid| !killed.contains(&pid) && runs(pid)), "{agent:?}");
    has(client, 2).await;
    eventually("nothing is left of the dead", async || place.agent_dirs() == 3).await;
    assert_eq!(host(client).await.standbys.agents, 2, "nor of what they had");
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn a_template_that_is_built_again_has_standbys_of_the_new_one() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    with_pool(client, 1, 1).await;
    let old = vmms(&place);
    std::fs::write(place.config().assets.kernel(), "another kernel").unwrap();
    build(client, "t1").await;
    assert!(old.iter().all(|pid| !runs(*pid)), "one of the old");
    has(client, 1).await;
    create(client, "a1").await;
    assert_eq!(pool(client).await.hits, 1);
    has(client, 1).await;
    // As is one that its next use builds again.
    std::fs::write(place.config().assets.kernel(), "yet another kernel").unwrap();
    let waits = client.post("/v1/agents", &json!({ "name": "a2", "template": "t1" })).await;
    assert_eq!(waits.status(), StatusCode::CREATED, "{:?}", waits.body);
    assert_eq!(pool(client).await.misses, 1);
    has(client, 1).await;
    create(client, "a3").await;
    assert_eq!(pool(client).await.hits, 2);
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn what_was_set_is_made_although_a_request_is_at_work() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    build(client, "t1").await;
    let silent = tokio::spawn({
        let client = client.clone();
        async move { client.post("/v1/agents", &json!({ "name": "s1", "image": "silent", "cold": true })).await }
    });
    eventually("it begins", async || client.get("/v1/agents/s1").await.status() == StatusCode::OK).await;
    put(client, "t1", &policy(1, 1, 0)).await;
    has(client, 1).await;
    assert!(!silent.is_finished(), "its guest says nothing for 20 s");
    client.delete("/v1/agents/s1?grace_ms=0").await;
    silent.await.unwrap().problem(ProblemKind::BootFailed);
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}

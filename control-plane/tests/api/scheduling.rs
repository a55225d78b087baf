//! Room for agents: who gets it, who waits, who is refused, and that it comes back.

use ark_types::agent::{Agent, AgentState};
use ark_types::event::EventList;
use ark_types::problem::ProblemKind;
use ark_types::scheduling::{HostList, OwnerList, OwnerQuota, RequestQueue, Resources};
use arkd::scheduler::SchedulerConfig;
use hyper::{Method, StatusCode};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::harness::{Ark, Client, Place, Reply, eventually, runs, signal, started};

/// An `arkd` with room for `max_agents`.
async fn start(place: &Place, max_agents: u32) -> Ark {
    start_with(place, SchedulerConfig { max_agents, ..SchedulerConfig::default() }).await
}

async fn start_with(place: &Place, scheduler: SchedulerConfig) -> Ark {
    let mut config = place.config();
    config.scheduler = scheduler;
    place.start_with(config).await
}

pub(crate) async fn reserved(client: &Client) -> Resources {
    client.get("/v1/hosts").await.json::<HostList>().hosts[0].reserved
}

async fn queue(client: &Client) -> RequestQueue {
    client.get("/v1/queue").await.json()
}

/// A request for an agent, that waits for up to a minute.
fn wanted(name: &str, more: &Value) -> Value {
    let mut body = json!({ "name": name, "image": "base", "memory_mib": 64, "queue_timeout_ms": 60_000 });
    body.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
    body
}

/// Asks for an agent, and returns when the request waits.
async fn waiting(client: &Client, name: &str, more: &Value) -> JoinHandle<Reply> {
    let body = wanted(name, more);
    let task = tokio::spawn({
        let client = client.clone();
        async move { client.post("/v1/agents", &body).await }
    });
    let stands = |queue: RequestQueue| {
        queue.waiting.iter().any(|w| w.name.as_ref().is_some_and(|n| n.as_ref() == name))
    };
    eventually("the request waits", async || stands(queue(client).await)).await;
    task
}

/// Names of those that wait, the next one first.
async fn names(client: &Client) -> Vec<String> {
    queue(client).await.waiting.into_iter().filter_map(|waiting| waiting.name).map(String::from).collect()
}

#[tokio::test]
async fn a_full_host_lets_the_next_one_wait_where_it_is_seen() {
    let place = Place::new();
    let ark = start(&place, 2).await;
    let client = &ark.client;
    client.create("a1", "base").await;
    client.create("a2", "base").await;
    let third = waiting(client, "a3", &json!({ "owner": "team", "priority": 3 })).await;
    let list = queue(client).await;
    let [seen] = list.waiting.as_slice() else { panic!("{list:?}") };
    assert_eq!((seen.position, seen.owner.as_ref(), seen.priority, seen.timeout_ms), (1, "team", 3, 60_000));
    assert!(seen.missing.contains("1 agent is asked for and 0 of 2 may still be had"), "{}", seen.missing);
    assert_eq!(client.get("/v1/agents/a3").await.status(), StatusCode::NOT_FOUND, "nothing was begun");

    client.delete("/v1/agents/a1?grace_ms=0").await;
    let agent: Agent = third.await.unwrap().json();
    assert_eq!((agent.state, agent.owner.as_ref()), (AgentState::Running, "team"));
    assert!(queue(client).await.waiting.is_empty());
    let hosts: HostList = client.get("/v1/hosts").await.json();
    let host = &hosts.hosts[0];
    assert_eq!(host.reserved, Resources { agents: 2, memory_mib: 128, vcpus: 2 });
    assert_eq!((host.limit.agents, host.free.agents), (2, 0));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn what_is_missing_is_told_with_the_right_status() {
    let place = Place::new();
    let scheduler =
        SchedulerConfig { max_agents: 1, queue: 1.try_into().unwrap(), ..SchedulerConfig::default() };
    let ark = start_with(&place, scheduler).await;
    let client = &ark.client;
    client.create("a1", "base").await;
    let refused = client.post("/v1/agents", &wanted("a2", &json!({ "queue_timeout_ms": 0 }))).await;
    let problem = refused.problem(ProblemKind::HostFull);
    assert!(
        problem.detail.contains("end an agent, ask for less, or raise --max-agents"),
        "{}",
        problem.detail
    );
    assert_eq!(refused.response.headers()["retry-after"], "5");
    let refused = client.post("/v1/agents", &wanted("a2", &json!({ "queue_timeout_ms": 100 }))).await;
    assert!(refused.problem(ProblemKind::QueueTimeout).detail.contains("no room within 100 ms"));
    let second = waiting(client, "a2", &json!({})).await;
    let refused = client.post("/v1/agents", &wanted("a3", &json!({}))).await;
    assert!(refused.problem(ProblemKind::QueueFull).detail.contains("1 requests wait"));
    let refused = client.post("/v1/agents/a1/fork", &json!({ "count": 2 })).await;
    assert!(
        refused.problem(ProblemKind::HostFull).detail.contains("2 agents are asked for"),
        "it can never be"
    );
    client.delete("/v1/agents/a1?grace_ms=0").await;
    assert_eq!(second.await.unwrap().status(), StatusCode::CREATED);
    for (wrong, words) in [
        (json!({ "priority": 101 }), "from -100 to 100"),
        (json!({ "queue_timeout_ms": 600_001 }), "more than 600000"),
    ] {
        let refused = client.post("/v1/agents", &wanted("a4", &wrong)).await;
        assert!(refused.problem(ProblemKind::InvalidValue).detail.contains(words));
    }
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn memory_is_given_away_as_often_as_the_operator_says() {
    let place = Place::new();
    let scheduler =
        SchedulerConfig { overcommit_memory: 0.1.try_into().unwrap(), ..SchedulerConfig::default() };
    let limit = scheduler.limit(arkd::host::Memory::read().unwrap().total_mib, 1).memory_mib;
    // Two take nearly all of it.
    let each = limit * 43 / 100;
    let ark = start_with(&place, scheduler).await;
    let create = async |name: &str| {
        let more = json!({ "memory_mib": each, "cold": true, "queue_timeout_ms": 0 });
        ark.client.post("/v1/agents", &wanted(name, &more)).await
    };
    assert_eq!(create("a1").await.status(), StatusCode::CREATED);
    assert_eq!(create("a2").await.status(), StatusCode::CREATED);
    let detail = create("a3").await.problem(ProblemKind::HostFull).detail;
    let free = limit - 2 * each;
    let said = format!("{each} MiB are asked for and {free} MiB of {limit} MiB are free (over-commit 0.1)");
    assert!(detail.starts_with(&said), "{detail}");
    // Two forks share most of what they are forked from.
    let forked = ark.client.post("/v1/agents/a1/fork", &json!({ "count": 2 })).await;
    assert_eq!(forked.status(), StatusCode::OK, "{:?}", forked.body);
    let forks = scheduler.forked((1, each)).memory_mib * 2;
    let all = Resources { agents: 4, memory_mib: 2 * each + forks, vcpus: 4 };
    assert_eq!(reserved(&ark.client).await, all);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn the_highest_priority_goes_first_and_owners_take_turns() {
    let place = Place::new();
    let ark = start(&place, 1).await;
    let client = &ark.client;
    client.create("a0", "base").await;
    let mut tasks = Vec::new();
    for (name, owner, priority) in
        [("x1", "x", 0), ("x2", "x", 0), ("x3", "x", 0), ("y1", "y", 0), ("low", "y", -50), ("high", "x", 50)]
    {
        tasks.push(waiting(client, name, &json!({ "owner": owner, "priority": priority })).await);
    }
    // The one of x that goes first counts among what x has, so y is next.
    assert_eq!(names(client).await, ["high", "y1", "x1", "x2", "x3", "low"]);
    let mut before = "a0";
    // Each ends before the next one goes, so neither owner has anything then: they take turns.
    for next in ["high", "x1", "y1", "x2", "x3", "low"] {
        client.delete(&format!("/v1/agents/{before}?grace_ms=0")).await;
        eventually("the next one runs", async || {
            let reply = client.get(&format!("/v1/agents/{next}")).await;
            reply.status() == StatusCode::OK && reply.json::<Agent>().state == AgentState::Running
        })
        .await;
        before = next;
    }
    for task in tasks {
        assert_eq!(task.await.unwrap().status(), StatusCode::CREATED);
    }
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_client_that_vanishes_leaves_the_queue() {
    let place = Place::new();
    let ark = start(&place, 1).await;
    let client = &ark.client;
    client.create("a1", "base").await;
    let gone = waiting(client, "a2", &json!({})).await;
    let stays = waiting(client, "a3", &json!({})).await;
    gone.abort();
    eventually("it is out", async || names(client).await == ["a3"]).await;
    client.delete("/v1/agents/a1?grace_ms=0").await;
    assert_eq!(stays.await.unwrap().status(), StatusCode::CREATED);
    assert_eq!(client.get("/v1/agents/a2").await.status(), StatusCode::NOT_FOUND);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn quotas_are_set_kept_to_and_cleared() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let quota = json!({ "agents": 1, "memory_mib": 100 });
    let set = client.ask(Method::PUT, "/v1/owners/team", quota.to_string()).await;
    assert_eq!(set.json::<OwnerQuota>().quota.agents, Some(1));
    let create = async |name: &str, memory: u64| {
        let more = json!({ "owner": "team", "memory_mib": memory, "cold": true });
        client.post("/v1/agents", &wanted(name, &more)).await
    };
    let refused = create("a1", 128).await;
    assert!(refused.problem(ProblemKind::QuotaExceeded).detail.contains("the 100 MiB that team may have"));
    assert_eq!(refused.response.headers()["retry-after"], "5");
    assert_eq!(create("a1", 64).await.status(), StatusCode::CREATED);
    assert!(create("a2", 64).await.problem(ProblemKind::QuotaExceeded).detail.contains("`ark quota team`"));
    // Forks belong to whom their agent belongs, others are not touched.
    let refused = client.post("/v1/agents/a1/fork", &json!({})).await;
    assert!(refused.problem(ProblemKind::QuotaExceeded).detail.contains("0 of the 1"));
    // So does what goes on from a snapshot of it.
    client.post("/v1/agents/a1/snapshots", &json!({ "name": "s1" })).await;
    let restore = async || client.post("/v1/snapshots/s1/restore", &json!({})).await;
    restore().await.problem(ProblemKind::QuotaExceeded);
    client.create("b1", "base").await;
    let owners: OwnerList = client.get("/v1/owners").await.json();
    let seen: Vec<_> = owners.owners.iter().map(|o| (o.owner.as_ref(), o.reserved.agents)).collect();
    assert_eq!(seen, [("default", 1), ("team", 1)]);

    assert_eq!(client.delete("/v1/owners/team").await.status(), StatusCode::NO_CONTENT);
    assert_eq!(create("a2", 64).await.status(), StatusCode::CREATED);
    assert_eq!(client.get("/v1/owners/team").await.json::<OwnerQuota>().reserved.agents, 2);
    assert_eq!(restore().await.json::<Agent>().owner.as_ref(), "team");
    client.get("/v1/owners/Team").await.problem(ProblemKind::InvalidValue);
    let wrong = client.ask(Method::PUT, "/v1/owners/team", r#"{"agent":1}"#).await;
    wrong.problem(ProblemKind::InvalidValue);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn quotas_outlast_a_killed_arkd() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    for (owner, quota) in [("team", json!({ "agents": 1 })), ("other", json!({ "vcpus": 9 }))] {
        let set = client.ask(Method::PUT, &format!("/v1/owners/{owner}"), quota.to_string()).await;
        assert_eq!(set.status(), StatusCode::OK);
    }
    assert_eq!(client.delete("/v1/owners/other").await.status(), StatusCode::NO_CONTENT);
    // What changes nothing is not recorded.
    assert_eq!(client.delete("/v1/owners/other").await.status(), StatusCode::NO_CONTENT);
    let team = json!({ "owner": "team", "cold": true, "queue_timeout_ms": 0 });
    assert_eq!(client.post("/v1/agents", &wanted("a1", &team)).await.status(), StatusCode::CREATED);
    client.create("b1", "base").await;
    client.post("/v1/agents/b1/fork", &json!({})).await;
    client.create("b2", "base").await;
    client.post("/v1/agents/b2/pause", &json!({})).await;
    first.end(Signal::SIGKILL);

    let (mut second, client) = started(&place, &[]).await;
    let owners: OwnerList = client.get("/v1/owners").await.json();
    let seen: Vec<_> =
        owners.owners.iter().map(|o| (o.owner.as_ref(), o.quota.agents, o.reserved.agents)).collect();
    assert_eq!(seen, [("default", None, 2), ("team", Some(1), 1)], "adopted agents count");
    // Two that were booted, and a fork; the paused one has no VMM any more.
    assert_eq!(reserved(&client).await, Resources { agents: 3, memory_mib: 64 + 64 + 8, vcpus: 3 });
    client.post("/v1/agents", &wanted("a2", &team)).await.problem(ProblemKind::QuotaExceeded);
    let told: EventList = client.get("/v1/events?type=owner.quota_set").await.json();
    let told: Vec<_> = told.events.iter().map(|event| event.stream.as_ref()).collect();
    assert_eq!(told, ["owner/team", "owner/other", "owner/other"]);
    client.post("/v1/shutdown", &json!({ "agents": "end" })).await;
    assert!(second.wait());
}

#[tokio::test]
async fn a_paused_agent_keeps_little_and_needs_room_to_go_on() {
    let place = Place::new();
    let ark = start(&place, 1).await;
    let client = &ark.client;
    client.create("a1", "base").await;
    assert_eq!(client.post("/v1/agents/a1/pause", &json!({})).await.status(), StatusCode::OK);
    assert_eq!(reserved(client).await, Resources { agents: 0, memory_mib: 4, vcpus: 0 });
    client.create("a2", "base").await;
    let resuming = tokio::spawn({
        let client = client.clone();
        async move { client.post("/v1/agents/a1/resume", &json!({})).await }
    });
    eventually("it waits", async || names(client).await == ["a1"]).await;
    assert_eq!(client.get("/v1/agents/a1").await.json::<Agent>().state, AgentState::Paused);
    client.delete("/v1/agents/a2?grace_ms=0").await;
    assert_eq!(resuming.await.unwrap().json::<Agent>().state, AgentState::Running);
    // It was booted, and is as large as that.
    assert_eq!(reserved(client).await, Resources { agents: 1, memory_mib: 64, vcpus: 1 });
    client.delete("/v1/agents/a1?grace_ms=0").await;
    assert_eq!(reserved(client).await, Resources::default());
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_resume_that_overtook_its_pause_takes_no_room_that_another_has() {
    let place = Place::new();
    let ark = start(&place, 1).await;
    let client = &ark.client;
    client.create("a1", "slow-snapshot").await;
    let next = waiting(client, "a2", &json!({})).await;
    let ask = |verb: &'static str| {
        let client = client.clone();
        tokio::spawn(async move { client.post(&format!("/v1/agents/a1/{verb}"), &json!({})).await })
    };
    let pausing = ask("pause");
    let now = async || client.get("/v1/agents/a1").await.json::<Agent>().state;
    eventually("it stands still", async || now().await == AgentState::Paused).await;
    let resuming = ask("resume");
    assert_eq!(pausing.await.unwrap().status(), StatusCode::OK);
    assert_eq!(next.await.unwrap().status(), StatusCode::CREATED);
    resuming.await.unwrap().problem(ProblemKind::HostFull);
    assert_eq!(now().await, AgentState::Paused);
    assert_eq!(reserved(client).await.agents, 1);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn an_agent_whose_vmm_ended_gives_its_room_back() {
    let place = Place::new();
    let ark = start(&place, 1).await;
    let client = &ark.client;
    let agent = client.create("a1", "base").await;
    let next = waiting(client, "a2", &json!({})).await;
    signal(agent.vmm_pid.unwrap(), Signal::SIGKILL);
    assert_eq!(next.await.unwrap().status(), StatusCode::CREATED);
    assert_eq!(
        client.get("/v1/agents/a1").await.json::<Agent>().state,
        AgentState::Failed,
        "it is still known"
    );
    assert!(!runs(agent.vmm_pid.unwrap()));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn two_of_a_strict_group_are_never_on_one_host() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let group = json!({ "anti_affinity": "web", "spread": "hard" });
    assert_eq!(client.post("/v1/agents", &wanted("a1", &group)).await.status(), StatusCode::CREATED);
    let second = waiting(client, "a2", &group).await;
    client.create("a3", "base").await;
    client.delete("/v1/agents/a1?grace_ms=0").await;
    assert_eq!(second.await.unwrap().status(), StatusCode::CREATED);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_strict_group_is_left_on_disk_and_joined_again_and_outlasts_arkd() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let group = json!({ "anti_affinity": "web", "spread": "hard", "queue_timeout_ms": 0 });
    let create =
        async |client: &Client, name| client.post("/v1/agents", &wanted(name, &group)).await.status();
    let resume = async |client: &Client| client.post("/v1/agents/a1/resume", &json!({})).await.status();
    assert_eq!(create(&client, "a1").await, StatusCode::CREATED);
    assert_eq!(client.post("/v1/agents/a1/pause", &json!({})).await.status(), StatusCode::OK);
    assert_eq!(create(&client, "a2").await, StatusCode::CREATED, "it left the group");
    client.delete("/v1/agents/a2?grace_ms=0").await;
    assert_eq!(resume(&client).await, StatusCode::OK);
    assert_eq!(create(&client, "a3").await, StatusCode::SERVICE_UNAVAILABLE, "it is in the group again");
    first.end(Signal::SIGKILL);
    let (mut second, client) = started(&place, &[]).await;
    assert_eq!(create(&client, "a3").await, StatusCode::SERVICE_UNAVAILABLE, "and so the next arkd knows it");
    client.delete("/v1/agents/a1?grace_ms=0").await;
    assert_eq!(create(&client, "a3").await, StatusCode::CREATED);
    assert!(second.end(Signal::SIGTERM));
}

/// Sends a request, and leaves when there is no answer soon.
async fn send_for_a_moment(client: &Client, path: &str, body: &Value, limit_ms: u64) {
    let request = client.request(Method::POST, path, body.to_string());
    let limit = std::time::Duration::from_millis(limit_ms);
    drop(tokio::time::timeout(limit, client.send(request)).await);
}

/// What a round does to agents; which one is up to the dice.
async fn round(client: &Client, dice: u64) {
    let name = format!("a{}", dice % 7);
    let more = dice / 56;
    match dice / 7 % 8 {
        0..3 => {
            let image = if more.is_multiple_of(2) { "base" } else { "panics" };
            let wishes =
                json!({ "image": image, "queue_timeout_ms": more % 50, "owner": format!("o{}", more % 3) });
            send_for_a_moment(client, "/v1/agents", &wanted(&name, &wishes), 500).await;
        }
        // Whoever asks leaves in the middle.
        3 => send_for_a_moment(client, "/v1/agents", &wanted(&name, &json!({})), more % 20).await,
        4 => {
            let body = json!({ "count": 1 + more % 3 });
            send_for_a_moment(client, &format!("/v1/agents/{name}/fork"), &body, 200).await;
        }
        5 => {
            let verb = ["pause", "resume"][usize::from(more.is_multiple_of(2))];
            send_for_a_moment(client, &format!("/v1/agents/{name}/{verb}"), &json!({}), 200).await;
        }
        _ => drop(client.delete(&format!("/v1/agents/{name}?grace_ms=0")).await),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_random_rounds_leak_no_room() {
    let place = Place::new();
    let ark = start(&place, 5).await;
    let client = &ark.client;
    let mut rounds = Vec::new();
    for _ in 0..4 {
        let client = client.clone();
        rounds.push(tokio::spawn(async move {
            for _ in 0..250 {
                round(&client, rand::random::<u32>().into()).await;
                let hosts: HostList = client.get("/v1/hosts").await.json();
                let host = &hosts.hosts[0];
                assert!(host.reserved.is_within(&host.limit), "{host:?}");
            }
        }));
    }
    for rounds in rounds {
        rounds.await.unwrap();
    }
    eventually("everything is removed", async || {
        let agents: ark_types::agent::AgentList = client.get("/v1/agents").await.json();
        for agent in &agents.agents {
            drop(client.delete(&format!("/v1/agents/{}?grace_ms=0", agent.id)).await);
        }
        agents.agents.is_empty() && queue(client).await.waiting.is_empty()
    })
    .await;
    eventually("nothing is reserved", async || reserved(client).await == Resources::default()).await;
    assert!(client.get("/v1/owners").await.json::<OwnerList>().owners.is_empty());
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}

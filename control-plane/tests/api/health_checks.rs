//! Agents that are checked by a program or a connection of their own.

use std::net::TcpListener;
use std::path::Path;

use ark_types::agent::{Agent, AgentState, Origin};
use ark_types::event::{Event, EventList};
use ark_types::healing::AgentHealth;
use ark_types::problem::ProblemKind;
use hyper::StatusCode;
use serde_json::{Value, json};

use crate::harness::{Client, Place, eventually};

async fn agent(client: &Client) -> Agent {
    client.get("/v1/agents/a1").await.json()
}

/// An agent called `a1` that is checked by `probe` each second, with the fields of `more`.
async fn create(client: &Client, probe: Value, failures: u32, more: Value) -> Agent {
    let mut body = json!({
        "name": "a1", "image": "base", "memory_mib": 64,
        "health_check": { "probe": probe, "interval_s": 1, "timeout_s": 1, "failures": failures },
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let reply = client.post("/v1/agents", &body).await;
    assert_eq!(reply.status(), StatusCode::CREATED, "{:?}", reply.body);
    reply.json()
}

/// A command that is healthy while there is the file at `path`; the fake's guest is this host.
fn while_there(path: &Path) -> Value {
    let script =
        format!("echo looked >> {0}.log; test -e {0} || {{ echo no file >&2; exit 3; }}", path.display());
    json!({ "kind": "exec", "command": ["sh", "-c", script] })
}

fn looks(path: &Path) -> usize {
    std::fs::read_to_string(format!("{}.log", path.display())).map_or(0, |text| text.lines().count())
}

async fn health_events(client: &Client, agent: &Agent) -> Vec<AgentHealth> {
    let list: EventList = client.get(&format!("/v1/events?stream=agent/{}", agent.id)).await.json();
    let health = |event| match event {
        Event::AgentHealthChanged { health } => Some(health),
        _ => None,
    };
    list.events.into_iter().filter_map(|recorded| health(recorded.event)).collect()
}

#[tokio::test]
async fn without_a_policy_an_unhealthy_agent_is_told_and_recovers() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let file = place.path("well");
    std::fs::write(&file, "").unwrap();
    let first = create(client, while_there(&file), 2, json!({})).await;
    eventually("it is checked", async || looks(&file) > 0).await;
    assert!(agent(client).await.health.is_healthy());
    std::fs::remove_file(&file).unwrap();
    eventually("it is unhealthy", async || !agent(client).await.health.is_healthy()).await;
    let ill = agent(client).await;
    let AgentHealth::Unhealthy { since_unix_ms, why } = ill.health.clone() else { panic!("{ill:?}") };
    assert!(since_unix_ms > first.created_unix_ms && why == "its command ended with 3: no file", "{why}");
    assert_eq!(
        (ill.state, ill.vmm_pid),
        (AgentState::Running, first.vmm_pid),
        "without a policy it only shows"
    );
    let listed: Value = client.get("/v1/agents?all=true").await.json();
    assert_eq!(listed["agents"][0]["health"]["is"], "unhealthy");
    std::fs::write(&file, "").unwrap();
    eventually("it is well again", async || agent(client).await.health.is_healthy()).await;
    // What it is shows at once; that it was recorded does once it is on disk.
    let told = [ill.health, AgentHealth::Healthy];
    eventually("both are recorded", async || health_events(client, &first).await == told).await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn with_a_policy_an_unhealthy_agent_is_ended_and_begins_anew_from_its_checkpoint() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let file = place.path("well");
    std::fs::write(&file, "").unwrap();
    let more = json!({ "restart": { "when": "on_failure" }, "checkpoint": { "every_s": 10 } });
    let first = create(client, while_there(&file), 1, more).await;
    eventually("it has a checkpoint", async || !agent(client).await.checkpoints.is_empty()).await;
    std::fs::remove_file(&file).unwrap();
    eventually("it begins anew", async || agent(client).await.continuity.is_some()).await;
    std::fs::write(&file, "").unwrap();
    let continuity = agent(client).await.continuity.unwrap();
    let cause = &continuity.cause;
    assert!(cause.starts_with("its health check failed: its command ended with 3"), "{cause}");
    assert!(matches!(continuity.restored_from, Origin::Checkpoint { .. }), "{continuity:?}");
    let told = health_events(client, &first).await;
    assert!(matches!(told.first(), Some(AgentHealth::Unhealthy { .. })), "{told:?}");
    eventually("it runs well", async || {
        let now = agent(client).await;
        now.state == AgentState::Running && now.health.is_healthy()
    })
    .await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_port_is_checked_by_a_connection_and_a_check_is_no_use() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let probe = json!({ "kind": "tcp", "port": port });
    let first = create(client, probe, 1, json!({ "idle_timeout_s": 6 })).await;
    tokio::task::spawn_blocking(move || listener.accept().map(drop)).await.unwrap().unwrap();
    // Whoever listens is gone by now.
    eventually("it is unhealthy", async || !agent(client).await.health.is_healthy()).await;
    let AgentHealth::Unhealthy { why, .. } = agent(client).await.health else { panic!("it is not") };
    assert!(why.contains(&port.to_string()), "{why}");
    eventually("it is removed unused, though it is checked each second", async || {
        client.get("/v1/agents/a1").await.status() == StatusCode::NOT_FOUND
    })
    .await;
    assert_eq!(health_events(client, &first).await.len(), 1);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn checks_that_take_long_do_not_pile_up_and_none_runs_while_the_agent_is_paused() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let count = place.path("count");
    // It would take for ever: it has a second.
    let script = format!("echo looked >> {}.log; exec sleep 1000", count.display());
    let probe = json!({ "kind": "exec", "command": ["sh", "-c", script] });
    let first = create(client, probe, 3, json!({})).await;
    eventually("it is unhealthy", async || !agent(client).await.health.is_healthy()).await;
    let AgentHealth::Unhealthy { since_unix_ms, why } = agent(client).await.health else {
        panic!("it is not")
    };
    assert!(why.contains("did not end within 1 s") || why.contains("took too long"), "{why}");
    // Each waits for the end of the one before, and then for its interval.
    let came_up = first.created_unix_ms + first.boot_ms.unwrap();
    assert!(looks(&count) as u64 <= (since_unix_ms - came_up) / 2000 + 1, "{} looks", looks(&count));
    assert_eq!(client.post("/v1/agents/a1/pause", &json!({})).await.status(), StatusCode::OK);
    let before = looks(&count);
    tokio::time::sleep(std::time::Duration::from_millis(2500)).await;
    assert_eq!(looks(&count), before);
    assert_eq!(client.post("/v1/agents/a1/resume", &json!({})).await.status(), StatusCode::OK);
    eventually("it is checked again", async || looks(&count) > before).await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_fork_and_a_restored_agent_have_the_policy_that_their_request_names_and_no_other() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let file = place.path("well");
    std::fs::write(&file, "").unwrap();
    let more = json!({ "restart": { "when": "always" }, "checkpoint": { "every_s": 10 } });
    create(client, while_there(&file), 3, more).await;
    client.post("/v1/agents/a1/snapshots", &json!({ "name": "s1" })).await;
    let plain: Value = client.post("/v1/agents/a1/fork", &json!({})).await.json();
    let plain: Agent = serde_json::from_value(plain["agents"][0].clone()).unwrap();
    assert!(plain.restart.is_never() && plain.checkpoint.is_none() && plain.health_check.is_none());
    let wishes = json!({
        "restart": { "when": "on_failure" }, "checkpoint": { "every_s": 10, "keep": 1 },
        "health_check": { "probe": while_there(&file) },
    });
    let fork: Value = client.post("/v1/agents/a1/fork", &wishes).await.json();
    let fork: Agent = serde_json::from_value(fork["agents"][0].clone()).unwrap();
    let restored: Agent = client.post("/v1/snapshots/s1/restore", &wishes).await.json();
    for made in [fork, restored] {
        assert!(!made.restart.is_never() && made.health_check.is_some());
        assert_eq!(made.checkpoint.unwrap().keep, 1);
        let now = async || client.get(&format!("/v1/agents/{}", made.id)).await.json::<Agent>();
        eventually("it has a checkpoint of its own", async || now().await.checkpoints.len() == 1).await;
    }
    let all: Value = client.get("/v1/snapshots?all=true").await.json();
    let all = all["snapshots"].as_array().unwrap();
    let kinds: Vec<_> = all.iter().filter(|one| one["is_checkpoint"] == true).collect();
    assert!(kinds.len() >= 3 && kinds.iter().all(|one| one["name"] == one["id"]), "{all:?}");
    assert_eq!(all.iter().filter(|one| one["name"] == "s1").count(), 1);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_check_that_makes_no_sense_is_refused_with_a_sentence() {
    let place = Place::new();
    let ark = place.start().await;
    for (check, why) in [
        (json!({ "probe": { "kind": "tcp", "port": 0 } }), "port 0 takes no connections"),
        (
            json!({ "probe": { "kind": "exec", "command": [] } }),
            "the command of the health check cannot be run: argv is empty",
        ),
        (
            json!({ "probe": { "kind": "tcp", "port": 1 }, "interval_s": 0 }),
            "interval_s of 0 is out of bounds for a health check",
        ),
        (json!({ "probe": { "kind": "tcp", "port": 1 }, "failures": 101 }), "failures of 101"),
    ] {
        let body = json!({ "image": "base", "memory_mib": 64, "health_check": check });
        let refused = ark.client.post("/v1/agents", &body).await.problem(ProblemKind::InvalidValue);
        assert!(refused.detail.contains(why), "{refused:?}");
    }
    assert_eq!(place.agent_dirs(), 0);
    ark.daemon.shut_down().await;
}

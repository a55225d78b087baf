//! Agents that stand still, outlast their VMM and arkd, and go back in time.

use std::process::Command;

use ark_types::agent::{Agent, AgentState, Origin};
use ark_types::problem::ProblemKind;
use ark_types::receipt::Receipt;
use hyper::StatusCode;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::forks::eval;
use crate::harness::{Client, Place, eventually, runs, signal, started};
use crate::scheduling::reserved;

async fn pause(client: &Client, agent: &str) -> Agent {
    let reply = client.post(&format!("/v1/agents/{agent}/pause"), &json!({})).await;
    assert_eq!(reply.status(), StatusCode::OK, "{:?}", reply.body);
    reply.json()
}

async fn resume(client: &Client, agent: &str) -> Agent {
    let reply = client.post(&format!("/v1/agents/{agent}/resume"), &json!({})).await;
    assert_eq!(reply.status(), StatusCode::OK, "{:?}", reply.body);
    reply.json()
}

fn records(place: &Place) -> usize {
    std::fs::read_dir(place.state().paused()).map_or(0, Iterator::count)
}

#[tokio::test]
async fn a_paused_agent_takes_no_commands_until_it_is_resumed() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let agent = client.create("a1", "base").await;
    client.post("/v1/agents/a1/resume", &json!({})).await.problem(ProblemKind::AgentNotRunning);
    let paused = pause(client, "a1").await;
    assert_eq!((paused.state, paused.vmm_pid), (AgentState::Paused, agent.vmm_pid));
    assert!(place.state().paused().join(&agent.id).join("agent.json").exists());
    let detail =
        client.post("/v1/agents/a1/pause", &json!({})).await.problem(ProblemKind::AgentNotRunning).detail;
    assert!(detail.contains("paused already"), "{detail}");
    let refused = client.exec("a1", &json!({ "argv": ["true"] })).await;
    let detail = refused.problem(ProblemKind::AgentNotRunning).detail;
    assert_eq!(detail, "the agent a1 is paused: resume it with `ark resume a1`");

    // It can be forked as it lies there.
    let forked: Value = client.post("/v1/agents/a1/fork", &json!({ "count": 2 })).await.json();
    assert_eq!(forked["agents"].as_array().unwrap().len(), 2);
    assert_eq!(resume(client, "a1").await.state, AgentState::Running);
    assert!(!place.state().paused().join(&agent.id).join("agent.json").exists());
    assert_eq!(client.exec("a1", &json!({ "argv": ["true"] })).await.status(), StatusCode::OK);
    // What is taken next is a diff over what it was paused to.
    pause(client, "a1").await;
    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    for fork in ["a1-1", "a1-2"] {
        client.delete(&format!("/v1/agents/{fork}")).await;
    }
    assert_eq!((records(&place), place.agent_dirs()), (0, 0));
    ark.daemon.shut_down().await;
    assert!(!runs(agent.vmm_pid.unwrap()));
    assert_eq!((records(&place), place.agent_dirs()), (0, 0));
}

#[tokio::test]
async fn a_paused_agent_outlasts_its_vmm() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let agent = client.create("a1", "base").await;
    eval(client, "a1", "x=5").await;
    pause(client, "a1").await;
    signal(agent.vmm_pid.unwrap(), Signal::SIGKILL);
    let now = async || client.get("/v1/agents/a1").await.json::<Agent>();
    eventually("the VMM is gone", async || now().await.vmm_pid.is_none()).await;
    assert_eq!(now().await.state, AgentState::Paused);
    assert_eq!(resume(client, "a1").await.state, AgentState::Running);
    assert_eq!(eval(client, "a1", "x").await.as_deref(), Some("5"));
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn a_guest_that_ends_as_it_wakes_is_not_said_to_run() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let agent = client.create("a1", "dies-on-resume").await;
    pause(client, "a1").await;
    let reply = client.post("/v1/agents/a1/resume", &json!({})).await;
    let now = async || client.get("/v1/agents/a1").await.json::<Agent>();
    eventually("its end is told", async || now().await.vmm_pid.is_none()).await;
    assert!(!runs(agent.vmm_pid.unwrap()));
    // Either its end was noticed before it was said to run, or after.
    if now().await.state == AgentState::Paused {
        reply.problem(ProblemKind::AgentNotRunning);
        assert!(place.state().paused().join(&agent.id).join("agent.json").exists(), "its memory is kept");
        assert_eq!(resume(client, "a1").await.state, AgentState::Running);
    } else {
        assert_eq!(now().await.state, AgentState::Failed);
        eventually("its room is free", async || reserved(client).await.agents == 0).await;
    }
    client.delete("/v1/agents/a1?grace_ms=0").await;
    assert_eq!(reserved(client).await.agents, 0);
    ark.daemon.shut_down().await;
    assert_eq!((records(&place), place.agent_dirs()), (0, 0));
}

#[tokio::test]
async fn a_paused_agent_that_was_removed_does_not_come_back() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let agent = client.create("a1", "base").await;
    pause(&client, "a1").await;
    let (home, aside) = (place.state().paused().join(&agent.id), place.path("aside"));
    assert!(Command::new("cp").arg("-r").args([&home, &aside]).status().unwrap().success());
    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    first.end(Signal::SIGKILL);
    // As a removal that was cut off leaves it.
    std::fs::rename(&aside, &home).unwrap();

    let (_second, client) = started(&place, &[]).await;
    let list: Value = client.get("/v1/agents").await.json();
    assert_eq!(list["agents"].as_array().unwrap().len(), 0, "{list}");
    assert_eq!(records(&place), 0);
}

#[tokio::test]
async fn a_paused_agent_outlasts_arkd_ended_or_killed() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let agent = client.create("a1", "base").await;
    let machine_id = eval(&client, "a1", "machine_id").await;
    eval(&client, "a1", "x=5").await;
    client.create("b1", "base").await;
    pause(&client, "b1").await;
    pause(&client, "a1").await;
    first.end(Signal::SIGKILL);

    let (mut second, client) = started(&place, &[]).await;
    let back: Agent = client.get("/v1/agents/a1").await.json();
    assert_eq!((back.state, &back.id, back.vmm_pid), (AgentState::Paused, &agent.id, None));
    assert!(!runs(agent.vmm_pid.unwrap()));
    assert!(second.end(Signal::SIGTERM));
    assert_eq!(std::fs::read_dir(place.path("run")).unwrap().count(), 0);

    let (_third, client) = started(&place, &[]).await;
    let woken = resume(&client, "a1").await;
    assert_eq!((woken.state, &woken.id, &woken.origin), (AgentState::Running, &agent.id, &Origin::Boot));
    assert_eq!(eval(&client, "a1", "x").await.as_deref(), Some("5"));
    assert_eq!(eval(&client, "a1", "machine_id").await, machine_id, "it is the same agent");
    let receipt: Receipt = client.get("/v1/agents/a1/receipt").await.json();
    assert_eq!((receipt.agent_id, receipt.checks.len()), (agent.id, 9));
    assert_eq!(client.delete("/v1/agents/b1").await.status(), StatusCode::NO_CONTENT);
    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    assert_eq!((records(&place), place.agent_dirs()), (0, 0));
}

#[tokio::test]
async fn what_a_killed_arkd_had_half_paused_leaves_nothing_and_one_that_ends_in_order_pauses_it_first() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let agent = client.create("a1", "slow-snapshot").await;
    let home = place.state().paused().join(&agent.id);
    // As a VMM that died with its arkd leaves it, and as a removal that was cut off does.
    for half in ["00.tmp", "01"] {
        std::fs::create_dir_all(home.join(half)).unwrap();
        std::fs::write(home.join(half).join("memory"), "half").unwrap();
    }
    first.end(Signal::SIGKILL);

    // It can be connected to before it has looked round.
    let (mut second, client) = started(&place, &[]).await;
    eventually("half a pause is cleared away", async || records(&place) == 0).await;
    eval(&client, "a1", "x=5").await;
    let pausing = tokio::spawn({
        let client = client.clone();
        async move { client.post("/v1/agents/a1/pause", &json!({})).await }
    });
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    signal(second.child.id(), Signal::SIGTERM);
    assert_eq!(pausing.await.unwrap().status(), StatusCode::OK);
    assert!(second.wait());

    let (_third, client) = started(&place, &[]).await;
    assert_eq!(client.get("/v1/agents/a1").await.json::<Agent>().id, agent.id);
    resume(&client, "a1").await;
    assert_eq!(eval(&client, "a1", "x").await.as_deref(), Some("5"));
    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    assert_eq!((records(&place), place.agent_dirs()), (0, 0));
}

#[tokio::test]
async fn an_agent_that_cannot_be_paused_goes_on_and_nothing_is_left() {
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("a1", "full-disk").await;
    let detail =
        ark.client.post("/v1/agents/a1/pause", &json!({})).await.problem(ProblemKind::DiskFull).detail;
    assert!(detail.starts_with("the agent was not paused and goes on"), "{detail}");
    assert_eq!(ark.client.get("/v1/agents/a1").await.json::<Agent>().state, AgentState::Running);
    assert_eq!(ark.client.exec("a1", &json!({ "argv": ["true"] })).await.status(), StatusCode::OK);
    assert_eq!(records(&place), 0);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn an_agent_that_is_removed_while_it_is_paused_leaves_nothing_and_who_leaves_has_it_paused_all_the_same()
 {
    let place = Place::new();
    let ark = place.start().await;
    let pausing = || {
        let client = ark.client.clone();
        tokio::spawn(async move { client.post("/v1/agents/a1/pause", &json!({})).await })
    };
    let under_way = || tokio::time::sleep(std::time::Duration::from_millis(300));
    ark.client.create("a1", "slow-snapshot").await;
    let task = pausing();
    under_way().await;
    assert_eq!(ark.client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    let detail = task.await.unwrap().problem(ProblemKind::AgentGone).detail;
    assert!(detail.starts_with("the agent a1 ended") && detail.contains("stopped on request"), "{detail}");
    eventually("nothing is left on disk", async || records(&place) == 0).await;

    let agent = ark.client.create("a1", "slow-snapshot").await;
    let task = pausing();
    under_way().await;
    task.abort();
    let record = place.state().paused().join(&agent.id).join("agent.json");
    eventually("it is paused, durably", async || record.exists()).await;
    // Whatever comes next waits its turn.
    assert_eq!(resume(&ark.client, "a1").await.state, AgentState::Running);
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn an_agent_goes_back_to_its_snapshot_and_others_are_restored_from_it() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let agent = client.create("a1", "base").await;
    let machine_id = eval(client, "a1", "machine_id").await;
    eval(client, "a1", "x=then").await;
    let taken = client.post("/v1/agents/a1/snapshots", &json!({ "name": "s1" })).await;
    assert_eq!(taken.status(), StatusCode::CREATED, "{:?}", taken.body);
    eval(client, "a1", "x=now").await;
    let rewound = client.post("/v1/agents/a1/rewind", &json!({ "snapshot": "s1" })).await;
    assert_eq!(rewound.status(), StatusCode::OK, "{:?}", rewound.body);
    let rewound: Agent = rewound.json();
    assert_eq!((&rewound.id, rewound.state), (&agent.id, AgentState::Running));
    assert_eq!(rewound.origin, Origin::Snapshot { name: "s1".parse().unwrap() });
    assert!(rewound.vmm_pid != agent.vmm_pid && !runs(agent.vmm_pid.unwrap()));
    assert_eq!(eval(client, "a1", "x").await.as_deref(), Some("then"));
    assert_eq!(eval(client, "a1", "machine_id").await, machine_id);

    let other: Agent = client.post("/v1/snapshots/s1/restore", &json!({ "name": "b1" })).await.json();
    assert_eq!((other.state, &other.origin), (AgentState::Running, &rewound.origin));
    assert_eq!(eval(client, "b1", "x").await.as_deref(), Some("then"));
    assert_ne!(eval(client, "b1", "machine_id").await, machine_id);
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn an_agent_that_was_booted_and_is_rewound_has_reserved_what_a_fork_has() {
    let place = Place::new();
    let (mut process, client) = started(&place, &[]).await;
    let body = json!({ "name": "a1", "image": "base", "memory_mib": 64, "restart": { "when": "always" } });
    let first: Agent = client.post("/v1/agents", &body).await.json();
    signal(first.vmm_pid.unwrap(), Signal::SIGKILL);
    let is_again = async || {
        let agent: Agent = client.get("/v1/agents/a1").await.json();
        agent.state == AgentState::Running && agent.continuity.is_some()
    };
    eventually("it is booted again", is_again).await;
    assert_eq!(reserved(&client).await.memory_mib, 64);
    client.post("/v1/agents/a1/snapshots", &json!({ "name": "s1" })).await;
    let rewound = client.post("/v1/agents/a1/rewind", &json!({ "snapshot": "s1" })).await;
    assert_eq!(rewound.status(), StatusCode::OK, "{:?}", rewound.body);
    assert_eq!(reserved(&client).await.memory_mib, 8);
    process.end(Signal::SIGKILL);
    let (_process, client) = started(&place, &[]).await;
    assert_eq!(reserved(&client).await.memory_mib, 8);
}

#[tokio::test]
async fn a_rewind_that_fails_is_told_and_the_agent_has_failed_for_that_reason() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let agent = client.create("a1", "unrestorable").await;
    client.post("/v1/agents/a1/snapshots", &json!({ "name": "s1" })).await;
    let detail = client.post("/v1/agents/a1/rewind", &json!({ "snapshot": "s1" })).await;
    let detail = detail.problem(ProblemKind::SnapshotUnusable).detail;
    assert!(detail.contains("another kind of processor"), "{detail}");
    let failed: Agent = client.get("/v1/agents/a1").await.json();
    assert_eq!((failed.state, failed.reason.as_deref()), (AgentState::Failed, Some(detail.as_str())));
    assert!(!runs(agent.vmm_pid.unwrap()));
    client
        .post("/v1/agents/a1/rewind", &json!({ "snapshot": "s1" }))
        .await
        .problem(ProblemKind::AgentNotRunning);
    // Waking from disk can be tried again.
    let agent = client.create("b1", "unrestorable").await;
    pause(client, "b1").await;
    signal(agent.vmm_pid.unwrap(), Signal::SIGKILL);
    let now = async || client.get("/v1/agents/b1").await.json::<Agent>();
    eventually("the VMM is gone", async || now().await.vmm_pid.is_none()).await;
    client.post("/v1/agents/b1/resume", &json!({})).await.problem(ProblemKind::SnapshotUnusable);
    assert_eq!(now().await.state, AgentState::Paused);
    assert!(place.state().paused().join(&agent.id).join("agent.json").exists());
    // A paused agent is whole on disk, so a rewind that fails costs it nothing.
    let agent = client.create("c1", "unrestorable").await;
    client.post("/v1/agents/c1/snapshots", &json!({ "name": "s2" })).await;
    pause(client, "c1").await;
    let reply = client.post("/v1/agents/c1/rewind", &json!({ "snapshot": "s2" })).await;
    reply.problem(ProblemKind::SnapshotUnusable);
    let still: Agent = client.get("/v1/agents/c1").await.json();
    assert_eq!((still.state, still.vmm_pid, still.origin), (AgentState::Paused, None, Origin::Boot));
    assert!(place.state().paused().join(&agent.id).join("agent.json").exists());
    assert_eq!(
        client.delete("/v1/snapshots/s2").await.status(),
        StatusCode::NO_CONTENT,
        "nobody lives there"
    );
    for agent in ["b1", "c1"] {
        assert_eq!(client.delete(&format!("/v1/agents/{agent}")).await.status(), StatusCode::NO_CONTENT);
    }
    assert_eq!(records(&place), 0);
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn a_paused_agent_keeps_its_restarts_and_its_share_for_the_next_arkd() {
    let place = Place::new();
    let ark = place.start().await;
    let body = json!({
        "name": "a1", "image": "base", "memory_mib": 64, "restart": { "when": "on_failure", "max_restarts": 1 },
    });
    let first: Agent = ark.client.post("/v1/agents", &body).await.json();
    let share = reserved(&ark.client).await;
    signal(first.vmm_pid.unwrap(), Signal::SIGKILL);
    let now = async |client: &Client| -> Agent { client.get("/v1/agents/a1").await.json() };
    eventually("it runs again", async || {
        let agent = now(&ark.client).await;
        agent.state == AgentState::Running && agent.continuity.is_some()
    })
    .await;
    pause(&ark.client, "a1").await;
    ark.daemon.leave().await;

    let ark = place.start().await;
    let client = &ark.client;
    assert_eq!(reserved(client).await.agents, 0);
    let resumed = resume(client, "a1").await;
    assert_eq!(reserved(client).await, share, "it was booted, and is as large as that");
    signal(resumed.vmm_pid.unwrap(), Signal::SIGKILL);
    eventually("it has ended", async || now(client).await.state == AgentState::Failed).await;
    let over = now(client).await;
    assert!(over.reason.as_deref().unwrap().contains("restarted once"), "{over:?}");
    assert_eq!(over.backoff_until_unix_ms, None);
    ark.daemon.shut_down().await;
}

//! Agents whose VMM ends or hangs, and agents whose time is over.

use std::time::Duration;

use ark_types::agent::{Agent, AgentState, Origin};
use ark_types::event::{Event, EventList};
use ark_types::exec::ExecReply;
use ark_types::healing::{AgentHealth, RestartPolicy};
use ark_types::problem::ProblemKind;
use hyper::StatusCode;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::forks::eval;
use crate::harness::{Client, Place, eventually, runs, signal, started};

pub(crate) async fn agent(client: &Client, name: &str) -> Agent {
    client.get(&format!("/v1/agents/{name}")).await.json()
}

/// An agent called `a1` of `image`, with the fields of `more`.
async fn create(client: &Client, image: &str, more: Value) -> Agent {
    let mut body = json!({ "name": "a1", "image": image, "memory_mib": 64 });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let reply = client.post("/v1/agents", &body).await;
    assert_eq!(reply.status(), StatusCode::CREATED, "{:?}", reply.body);
    reply.json()
}

/// Kills the VMM of `a1` and waits until it runs again; what it is then.
pub(crate) async fn kill_and_wait(client: &Client) -> Agent {
    let before = agent(client, "a1").await;
    signal(before.vmm_pid.unwrap(), Signal::SIGKILL);
    restarted(client, &before).await
}

pub(crate) async fn restarted(client: &Client, before: &Agent) -> Agent {
    let count = |agent: &Agent| agent.continuity.as_ref().map_or(0, |continuity| continuity.restarts);
    eventually("it runs again", async || {
        let now = agent(client, "a1").await;
        now.state == AgentState::Running && count(&now) > count(before)
    })
    .await;
    agent(client, "a1").await
}

pub(crate) async fn kinds(client: &Client, agent: &Agent) -> Vec<&'static str> {
    let events: EventList = client.get(&format!("/v1/events?stream=agent/{}", agent.id)).await.json();
    events.events.iter().map(|recorded| recorded.event.kind()).collect()
}

async fn is_failed(client: &Client) -> bool {
    let now = agent(client, "a1").await;
    now.state == AgentState::Failed && now.backoff_until_unix_ms.is_none()
}

#[tokio::test]
async fn a_killed_agent_begins_anew_and_says_what_it_lost() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let more = json!({
        "restart": { "when": "on_failure" }, "env": { "COLOUR": "red" }, "labels": { "app": "x" }, "owner": "team"
    });
    let first = create(client, "base", more).await;
    assert_eq!((first.restart, &first.continuity), (RestartPolicy::OnFailure { max_restarts: None }, &None));
    eval(client, "a1", "x=5").await;
    let machine_id = eval(client, "a1", "machine_id").await;

    let second = kill_and_wait(client).await;
    assert_eq!((&second.id, &second.owner, &second.labels), (&first.id, &first.owner, &first.labels));
    assert_ne!(second.vmm_pid, first.vmm_pid);
    assert_eq!((&second.reason, &second.exit, second.backoff_until_unix_ms), (&None, &None, None));
    let said: ExecReply = client.exec("a1", &json!({ "argv": ["sh", "-c", "echo $COLOUR"] })).await.json();
    assert_eq!(said.stdout, "red\n");
    assert_eq!(eval(client, "a1", "x").await, None, "what it held in memory is lost");
    assert_eq!(eval(client, "a1", "machine_id").await, machine_id);
    let continuity = second.continuity.clone().unwrap();
    assert!(continuity.cause.contains("SIGKILL"), "{continuity:?}");
    assert_eq!((continuity.restarts, &continuity.restored_from), (1, &Origin::Boot));
    assert!(continuity.at_unix_ms > first.created_unix_ms + continuity.lost_ms);

    let third = kill_and_wait(client).await;
    let again = third.continuity.clone().unwrap();
    assert_eq!(again.restarts, 2);
    assert!(again.at_unix_ms >= continuity.at_unix_ms + again.lost_ms, "{again:?} after {continuity:?}");
    let anew = ["agent.ended", "agent.restarting", "agent.restarted"];
    let all = [&["agent.created", "agent.ready"][..], &anew, &anew].concat();
    assert_eq!(kinds(client, &third).await, all);
    let known: Value = client.get("/v1/agents?all=true&labels=app=x").await.json();
    assert_eq!(known["agents"][0]["continuity"]["restarts"], 2);
    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    assert_eq!(place.agent_dirs(), 0);
    let history: Agent = client.get(&format!("/v1/agents/{}", first.id)).await.json();
    assert_eq!(history.continuity, Some(again));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn an_agent_of_a_template_begins_anew_as_its_fork_with_every_check() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let warm = json!({ "name": "warm", "image": "base", "memory_mib": 64, "warm": "x=1" });
    assert_eq!(client.post("/v1/templates", &warm).await.status(), StatusCode::CREATED);
    let body = json!({ "name": "a1", "template": "warm", "restart": { "when": "always" } });
    let first: Agent = client.post("/v1/agents", &body).await.json();
    eval(client, "a1", "x=2").await;
    let receipt: Value = client.get("/v1/agents/a1/receipt").await.json();

    let second = kill_and_wait(client).await;
    assert_eq!((&second.id, &second.origin), (&first.id, &first.origin));
    assert_eq!(second.continuity.unwrap().restored_from, first.origin);
    assert_eq!(eval(client, "a1", "x").await.as_deref(), Some("1"), "the template's, not its own");
    let renewed: Value = client.get("/v1/agents/a1/receipt").await.json();
    assert_ne!(renewed["nonce"], receipt["nonce"]);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn only_a_policy_that_says_so_has_an_agent_begin_anew() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let first = create(client, "base", json!({ "restart": { "when": "never" } })).await;
    signal(first.vmm_pid.unwrap(), Signal::SIGKILL);
    eventually("it fails", async || is_failed(client).await).await;
    assert!(!kinds(client, &first).await.contains(&"agent.restarting"));
    client.delete("/v1/agents/a1").await;

    // Its guest powers itself off as soon as it is up: no failure, and what `always` is for.
    create(client, "powers-off", json!({ "restart": { "when": "on_failure" } })).await;
    eventually("it stops", async || agent(client, "a1").await.state == AgentState::Stopped).await;
    let stopped = agent(client, "a1").await;
    assert_eq!((stopped.backoff_until_unix_ms, stopped.continuity), (None, None));
    client.delete("/v1/agents/a1").await;

    let first =
        create(client, "powers-off", json!({ "restart": { "when": "always", "max_restarts": 2 } })).await;
    eventually("it gives up", async || {
        let now = agent(client, "a1").await;
        now.state == AgentState::Stopped && now.backoff_until_unix_ms.is_none()
    })
    .await;
    let over = agent(client, "a1").await;
    assert_eq!(over.continuity.as_ref().map(|continuity| continuity.restarts), Some(2));
    let reason = over.reason.as_deref().unwrap();
    assert!(reason.contains("restarted 2 times") && reason.contains("not restarted any more"), "{reason}");
    let told = kinds(client, &first).await;
    assert_eq!(told.iter().filter(|kind| **kind == "agent.restarting").count(), 2);
    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn an_agent_that_waits_keeps_its_name_and_is_removed_at_once() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let first = create(client, "base", json!({ "restart": { "when": "always" } })).await;
    // The first restart is at once, the next one waits a second.
    let second = kill_and_wait(client).await;
    signal(second.vmm_pid.unwrap(), Signal::SIGKILL);
    eventually("it waits", async || agent(client, "a1").await.backoff_until_unix_ms.is_some()).await;
    let refused = client.exec("a1", &json!({ "argv": ["true"] })).await.problem(ProblemKind::AgentNotRunning);
    assert!(refused.detail.contains("SIGKILL"), "{refused:?}");
    let another = json!({ "name": "a1", "image": "base", "memory_mib": 64 });
    client.post("/v1/agents", &another).await.problem(ProblemKind::NameTaken);
    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    assert_eq!(place.agent_dirs(), 0);
    let told = kinds(client, &first).await;
    assert!(told.ends_with(&["agent.removed"]), "{told:?}");
    assert_eq!(told.iter().filter(|kind| **kind == "agent.restarted").count(), 1, "{told:?}");
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn an_agent_that_waits_or_ended_meanwhile_is_restarted_by_the_next_arkd() {
    let place = Place::new();
    let (mut last, client) = started(&place, &[]).await;
    let first = create(&client, "base", json!({ "restart": { "when": "on_failure" } })).await;
    let once = kill_and_wait(&client).await;
    signal(once.vmm_pid.unwrap(), Signal::SIGKILL);
    eventually("it waits", async || agent(&client, "a1").await.backoff_until_unix_ms.is_some()).await;
    last.end(Signal::SIGKILL);

    let (mut last, client) = started(&place, &[]).await;
    let second = restarted(&client, &once).await;
    assert_eq!((&second.id, second.continuity.as_ref().unwrap().restarts), (&first.id, 2));
    assert!(second.continuity.as_ref().unwrap().cause.contains("SIGKILL"));
    last.end(Signal::SIGKILL);
    // Nobody is there to see it.
    signal(second.vmm_pid.unwrap(), Signal::SIGKILL);
    eventually("it is gone", async || !runs(second.vmm_pid.unwrap())).await;

    let (mut last, client) = started(&place, &[]).await;
    let third = restarted(&client, &second).await;
    assert_eq!((&third.id, third.continuity.as_ref().unwrap().restarts), (&first.id, 3));
    assert!(third.continuity.as_ref().unwrap().cause.contains("while arkd was away"));
    let anew = ["agent.ended", "agent.restarting", "agent.restarted"];
    let all = [&["agent.created", "agent.ready"][..], &anew, &anew, &anew].concat();
    assert_eq!(kinds(&client, &third).await, all);
    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    last.end(Signal::SIGTERM);
}

#[tokio::test]
async fn a_guest_that_is_not_heard_is_told_and_recovers() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let first = create(client, "base", json!({})).await;
    let pid = first.vmm_pid.unwrap();
    signal(pid, Signal::SIGSTOP);
    eventually("it is missed", async || !agent(client, "a1").await.health.is_healthy()).await;
    let silent = agent(client, "a1").await;
    let AgentHealth::Unresponsive { since_unix_ms } = silent.health else { panic!("{silent:?}") };
    assert!(since_unix_ms >= first.created_unix_ms);
    assert_eq!(
        (silent.state, silent.vmm_pid),
        (AgentState::Running, Some(pid)),
        "without a policy it only shows"
    );
    signal(pid, Signal::SIGCONT);
    eventually("it is heard again", async || agent(client, "a1").await.health.is_healthy()).await;
    assert_eq!(agent(client, "a1").await.vmm_pid, Some(pid));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_guest_that_hangs_is_ended_and_begins_anew() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let first = create(client, "base", json!({ "restart": { "when": "on_failure" } })).await;
    signal(first.vmm_pid.unwrap(), Signal::SIGSTOP);
    let second = restarted(client, &first).await;
    assert!(!runs(first.vmm_pid.unwrap()));
    let cause = second.continuity.unwrap().cause;
    assert!(cause.starts_with("the guest was not heard for "), "{cause}");
    client.delete("/v1/agents/a1").await;

    // Its VMM is well, only the guest says nothing any more; restored from its template it does so each time.
    let template = json!({ "name": "mute", "image": "falls-silent", "memory_mib": 64 });
    assert_eq!(client.post("/v1/templates", &template).await.status(), StatusCode::CREATED);
    let restart = json!({ "when": "always", "max_restarts": 1 });
    let mute = json!({ "name": "a1", "template": "mute", "restart": restart });
    assert_eq!(client.post("/v1/agents", &mute).await.status(), StatusCode::CREATED);
    eventually("it gives up", async || is_failed(client).await).await;
    let reason = agent(client, "a1").await.reason.unwrap();
    assert!(reason.contains("not heard") && reason.contains("restarted once"), "{reason}");
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn an_agent_goes_when_its_time_is_over_or_nobody_uses_it() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let reason = async |agent: &Agent| {
        let events: EventList = client.get(&format!("/v1/events?stream=agent/{}", agent.id)).await.json();
        events.events.into_iter().find_map(|recorded| match recorded.event {
            Event::AgentExpired { reason } => Some(reason),
            _ => None,
        })
    };
    let is_gone = async || client.get("/v1/agents/a1").await.status() == StatusCode::NOT_FOUND;
    let short = create(client, "base", json!({ "ttl_s": 1, "restart": { "when": "always" } })).await;
    eventually("its ttl removes it", is_gone).await;
    assert_eq!(reason(&short).await.as_deref(), Some("its ttl of 1 s is over"));
    assert!(kinds(client, &short).await.ends_with(&["agent.ended", "agent.removed"]));

    let idle = create(client, "base", json!({ "idle_timeout_s": 1 })).await;
    // While a program runs in it an agent is used, however long that takes.
    let ran: ExecReply = client.exec("a1", &json!({ "argv": ["sleep", "2.5"] })).await.json();
    assert!(ran.duration_us > 2_000_000);
    assert_eq!(agent(client, "a1").await.state, AgentState::Running);
    eventually("it is removed unused", is_gone).await;
    assert!(reason(&idle).await.unwrap().contains("idle timeout"));

    // One that is paused is not unused, yet its ttl goes on.
    let paused = create(client, "base", json!({ "idle_timeout_s": 1, "ttl_s": 4 })).await;
    assert_eq!(client.post("/v1/agents/a1/pause", &json!({})).await.status(), StatusCode::OK);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(agent(client, "a1").await.state, AgentState::Paused);
    eventually("its ttl removes it", is_gone).await;
    assert!(reason(&paused).await.unwrap().contains("ttl"));
    assert_eq!(place.agent_dirs(), 0);
    ark.daemon.shut_down().await;
}

/// Has the record of `agent` say what it would if the host's clock had been set back by so much since it began.
fn set_back(place: &Place, agent: &Agent, ms: i64) {
    let path = place.run().agent(&agent.id).0.join("agent.json");
    let mut record: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for time in ["/agent/created_unix_ms", "/clock/unix_ms"] {
        let time = record.pointer_mut(time).unwrap();
        *time = (time.as_i64().unwrap() + ms).into();
    }
    std::fs::write(path, record.to_string()).unwrap();
}

#[tokio::test]
async fn a_ttl_is_as_long_as_it_was_to_be_when_the_hosts_clock_is_set_while_arkd_is_away() {
    const STEP_MS: i64 = 5 * 3_600_000;
    let place = Place::new();
    let (mut process, client) = started(&place, &[]).await;
    let short = create(&client, "base", json!({ "ttl_s": 3, "name": "a2" })).await;
    let long = create(&client, "base", json!({ "ttl_s": 3600 })).await;
    process.end(Signal::SIGKILL);
    set_back(&place, &short, STEP_MS);
    set_back(&place, &long, -STEP_MS);
    let (_process, client) = started(&place, &[]).await;
    let is_gone = async || client.get("/v1/agents/a2").await.status() == StatusCode::NOT_FOUND;
    eventually("the short ttl is over", is_gone).await;
    // Both are looked at as often.
    assert_eq!(agent(&client, "a1").await.state, AgentState::Running);
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_with_a_sentence() {
    let place = Place::new();
    let ark = place.start().await;
    let refused = async |more: Value| {
        let mut body = json!({ "image": "base", "memory_mib": 64 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ark.client.post("/v1/agents", &body).await.problem(ProblemKind::InvalidValue).detail
    };
    assert!(refused(json!({ "ttl_s": 0 })).await.contains("ttl_s of 0 is out of bounds"));
    assert!(refused(json!({ "idle_timeout_s": 31_536_001 })).await.contains("idle_timeout_s"));
    let none = json!({ "restart": { "when": "always", "max_restarts": 0 } });
    assert!(refused(none).await.contains("max_restarts of 0"));
    let both = json!({ "auto_remove": true, "restart": { "when": "always" } });
    assert!(refused(both).await.contains("cannot be restarted"));
    assert_eq!(place.agent_dirs(), 0);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn what_the_host_lacks_costs_an_agent_none_of_its_restarts() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let first =
        create(client, "base", json!({ "restart": { "when": "on_failure", "max_restarts": 1 } })).await;
    let (program, away) = (place.path("assets/bin/ark-vmm"), place.path("assets/bin/away"));
    std::fs::rename(&program, &away).unwrap();
    signal(first.vmm_pid.unwrap(), Signal::SIGKILL);
    let waits =
        async || kinds(client, &first).await.iter().filter(|kind| **kind == "agent.restarting").count();
    eventually("it was tried more often than it may be restarted", async || waits().await > 2).await;
    let waiting = agent(client, "a1").await;
    assert!(waiting.backoff_until_unix_ms.is_some() && waiting.reason.unwrap().contains("cannot be started"));
    std::fs::rename(&away, &program).unwrap();
    let second = restarted(client, &first).await;
    let continuity = second.continuity.as_ref().unwrap();
    assert!(continuity.restarts == 1 && continuity.cause.contains("SIGKILL"), "{continuity:?}");

    // Its own crash is the last one that it has.
    signal(second.vmm_pid.unwrap(), Signal::SIGKILL);
    eventually("it gives up", async || is_failed(client).await).await;
    let reason = agent(client, "a1").await.reason.unwrap();
    assert!(reason.contains("restarted once"), "{reason}");
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn the_next_arkd_knows_whom_the_last_one_missed_and_tells_that_it_is_heard() {
    let place = Place::new();
    let ark = place.start().await;
    let first = create(&ark.client, "base", json!({})).await;
    signal(first.vmm_pid.unwrap(), Signal::SIGSTOP);
    eventually("it is missed", async || !agent(&ark.client, "a1").await.health.is_healthy()).await;
    let missed = agent(&ark.client, "a1").await;
    assert_eq!(ark.daemon.leave().await, 1);

    let ark = place.start().await;
    let client = &ark.client;
    assert_eq!(agent(client, "a1").await.health, missed.health);
    // For longer than it takes to look.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(agent(client, "a1").await.health, missed.health, "it was not heard yet");
    let changes = async || kinds(client, &first).await.iter().filter(|kind| **kind == "agent.health").count();
    assert_eq!(changes().await, 1);
    signal(first.vmm_pid.unwrap(), Signal::SIGCONT);
    eventually("it is heard", async || agent(client, "a1").await.health.is_healthy()).await;
    eventually("that is recorded", async || changes().await == 2).await;
    ark.daemon.shut_down().await;
}

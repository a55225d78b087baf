//! Agents that begin anew in what the pool has ready.

use std::process::{Command, Stdio};
use std::time::Duration;

use ark_types::agent::{Agent, AgentState, Origin};
use ark_types::receipt::Receipt;
use arkd::supervisor::ProcessIdentity;
use hyper::StatusCode;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::forks::eval;
use crate::harness::{Client, Place, eventually, runs, signal, started};
use crate::healing::{agent, kill_and_wait, kinds, restarted};
use crate::pool::{vmms, with_pool as sized};
use crate::pools::{has, policy, put, with_pool};

/// An agent `a1` of the template `t1` that begins anew whenever it ends.
async fn create(client: &Client) -> Agent {
    let body = json!({ "name": "a1", "template": "t1", "restart": { "when": "always" }, "env": { "COLOUR": "red" } });
    let reply = client.post("/v1/agents", &body).await;
    assert_eq!(reply.status(), StatusCode::CREATED, "{:?}", reply.body);
    reply.json()
}

/// VMMs that run and are not the agent's.
fn others(place: &Place, agent: &Agent) -> Vec<u32> {
    vmms(place).into_iter().filter(|pid| Some(*pid) != agent.vmm_pid && runs(*pid)).collect()
}

async fn receipt(client: &Client) -> Receipt {
    client.get("/v1/agents/a1/receipt").await.json()
}

async fn console(client: &Client) -> String {
    String::from_utf8_lossy(&client.get("/v1/agents/a1/logs").await.body).into_owned()
}

#[tokio::test]
async fn a_standby_becomes_the_agent_that_begins_anew_and_proves_to_be_that() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    with_pool(client, 1, 1).await;
    let first = create(client).await;
    has(client, 1).await;
    eval(client, "a1", "x=5").await;
    let (machine_id, before) = (eval(client, "a1", "machine_id").await, receipt(client).await);
    let standby = others(&place, &first);
    let follower = tokio::spawn({
        let client = client.clone();
        async move { client.get("/v1/agents/a1/logs?follow=true").await.body }
    });
    let said = console(client).await;

    let second = kill_and_wait(client).await;
    assert_eq!(
        (vec![second.vmm_pid.unwrap()], &second.id),
        (standby, &first.id),
        "it is the one that stood by"
    );
    assert_eq!(second.continuity.as_ref().unwrap().restored_from, first.origin);
    assert_eq!(eval(client, "a1", "x").await, None, "what it held in memory is lost");
    assert_eq!(eval(client, "a1", "hostname").await.as_deref(), Some("a1"));
    assert_eq!(eval(client, "a1", "machine_id").await, machine_id);
    let colour = client.exec("a1", &json!({ "argv": ["sh", "-c", "echo $COLOUR"] })).await;
    assert_eq!(colour.json::<Value>()["stdout"], "red\n");
    let after = receipt(client).await;
    assert_eq!((&after.agent_id, after.checks.len()), (&first.id, before.checks.len()));
    assert!(after.nonce != before.nonce && after.generation != before.generation);
    assert_eq!(console(client).await, said, "what it said before it ended is there");
    let pool: Value = client.get("/v1/pools/t1").await.json();
    assert_eq!(pool["hits"], 2, "{pool}");
    has(client, 1).await;
    assert_eq!(place.agent_dirs(), 2, "the agent's and that of the next one that stands by");

    // Without one it is made on the spot, and whoever follows its console goes on.
    assert_eq!(put(client, "t1", &policy(0, 0, 0)).await.status(), StatusCode::OK);
    has(client, 0).await;
    let third = kill_and_wait(client).await;
    assert_eq!(third.id, first.id);
    assert_eq!(console(client).await, said.repeat(2));
    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    assert_eq!(follower.await.unwrap(), said.repeat(2));
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn the_next_arkd_adopts_an_agent_that_was_a_standby() {
    let place = Place::new();
    let (mut last, client) = started(&place, &[]).await;
    with_pool(&client, 1, 1).await;
    let first = create(&client).await;
    has(&client, 1).await;
    let standby = others(&place, &first);
    let second = kill_and_wait(&client).await;
    assert_eq!(vec![second.vmm_pid.unwrap()], standby);
    last.end(Signal::SIGKILL);

    let (mut last, client) = started(&place, &[]).await;
    let adopted = agent(&client, "a1").await;
    assert_eq!((adopted.vmm_pid, adopted.state), (second.vmm_pid, AgentState::Running));
    assert_eq!(adopted.continuity, second.continuity);
    assert_eq!(eval(&client, "a1", "hostname").await.as_deref(), Some("a1"));
    // Its guest finds this arkd, too.
    eventually("it is heard", async || agent(&client, "a1").await.heartbeat.is_some()).await;
    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    last.end(Signal::SIGTERM);
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn a_checkpoint_is_restored_in_a_prepared_vmm() {
    let place = Place::new();
    let ark = place.start_with(sized(&place, 1, 0)).await;
    let client = &ark.client;
    eventually("one is prepared", async || vmms(&place).len() == 1).await;
    let body = json!({
        "name": "a1", "image": "base", "memory_mib": 64, "restart": { "when": "always" },
        "checkpoint": { "every_s": 10, "keep": 1 },
    });
    let first: Agent = client.post("/v1/agents", &body).await.json();
    eventually("there is a checkpoint", async || !agent(client, "a1").await.checkpoints.is_empty()).await;
    let prepared = others(&place, &first);
    let said = console(client).await;
    let second = kill_and_wait(client).await;
    assert_eq!(vec![second.vmm_pid.unwrap()], prepared);
    assert!(matches!(second.continuity.unwrap().restored_from, Origin::Checkpoint { .. }));
    assert_eq!(console(client).await, said.repeat(2), "what it said before it ended is there");
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn a_standby_that_hangs_is_passed_over() {
    let place = Place::new();
    let mut config = place.config();
    // It is wanted before anybody misses it.
    config.timing.silence = Duration::from_secs(600);
    config.timing.renewal = Duration::from_secs(1);
    let ark = place.start_with(config).await;
    let client = &ark.client;
    with_pool(client, 1, 1).await;
    let first = create(client).await;
    has(client, 1).await;
    let hung = others(&place, &first);
    signal(hung[0], Signal::SIGSTOP);
    let second = kill_and_wait(client).await;
    assert!(!hung.contains(&second.vmm_pid.unwrap()) && !runs(hung[0]));
    assert_eq!(eval(client, "a1", "hostname").await.as_deref(), Some("a1"));
    let anew = ["agent.ended", "agent.restarting", "agent.restarted"];
    assert!(kinds(client, &second).await.ends_with(&anew), "that is one restart");
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}

/// What an `arkd` leaves that is killed while a standby becomes the agent: before, and after the directories changed places.
#[tokio::test]
async fn whoever_was_just_becoming_a_standby_is_restarted_by_the_next_arkd() {
    let place = Place::new();
    for changed_places in [false, true] {
        let (mut last, client) = started(&place, &[]).await;
        if !changed_places {
            with_pool(&client, 0, 0).await;
        }
        let first = create(&client).await;
        last.end(Signal::SIGKILL);
        let own = place.run().agent(&first.id);
        signal(first.vmm_pid.unwrap(), Signal::SIGKILL);
        eventually("its VMM is gone", async || !runs(first.vmm_pid.unwrap())).await;
        let path = own.0.join("agent.json");
        let mut record: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        (record["agent"]["state"], record["process"]) = (json!("creating"), Value::Null);
        record["healing"]["lost"] = json!({ "cause": "it was killed", "ended_unix_ms": 1 });
        std::fs::write(&path, record.to_string()).unwrap();
        // Stands in for the standby.
        let mut ready = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
        let other = place.run().agent("00000000000000aa");
        std::fs::create_dir(&other.0).unwrap();
        let standby = ProcessIdentity::of(ready.id()).unwrap();
        std::fs::write(other.0.join("agent.json"), record.to_string()).unwrap();
        standby.write(&if changed_places { own.identity() } else { other.identity() }).unwrap();

        let (mut last, client) = started(&place, &[]).await;
        let second = restarted(&client, &first).await;
        assert_eq!(
            (&second.id, &second.continuity.as_ref().unwrap().cause),
            (&first.id, &"it was killed".to_owned())
        );
        assert!(ready.try_wait().unwrap().is_some(), "what was ready is nobody's");
        assert!(!other.0.exists());
        assert_eq!(client.exec("a1", &json!({ "argv": ["true"] })).await.status(), StatusCode::OK);
        assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
        last.end(Signal::SIGTERM);
        assert_eq!(place.agent_dirs(), 0);
    }
}

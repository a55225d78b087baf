//! What is made ahead of need: prepared VMMs and standbys.

use ark_types::agent::{Agent, AgentList, AgentState};
use ark_types::receipt::Receipt;
use arkd::config::{Config, PoolSizes};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::forks::eval;
use crate::harness::{Client, Place, arkd, eventually, runs, signal};

pub(crate) fn with_pool(place: &Place, prepared: usize, standbys: usize) -> Config {
    Config { pool: PoolSizes { prepared, standbys }, ..place.config() }
}

async fn of_template(client: &Client, name: &str) -> Agent {
    let reply = client.post("/v1/agents", &json!({ "name": name, "image": "base" })).await;
    assert_eq!(reply.status().as_u16(), 201, "{:?}", reply.body);
    reply.json()
}

/// Process ids of VMMs by the identity files in the agents' directories.
pub(crate) fn vmms(place: &Place) -> Vec<u32> {
    let dirs = std::fs::read_dir(place.run().agents()).into_iter().flatten().flatten();
    dirs.filter_map(|dir| {
        let identity: Value =
            serde_json::from_slice(&std::fs::read(dir.path().join("vmm.json")).ok()?).ok()?;
        u32::try_from(identity["pid"].as_u64()?).ok()
    })
    .collect()
}

#[tokio::test]
async fn a_fork_lives_in_a_prepared_vmm_and_the_next_is_prepared_when_it_is_calm() {
    let place = Place::new();
    let ark = place.start_with(with_pool(&place, 2, 0)).await;
    eventually("two VMMs wait", async || vmms(&place).len() == 2).await;
    let waiting = vmms(&place);
    assert!(ark.client.get("/v1/agents").await.json::<AgentList>().agents.is_empty(), "in no list");
    ark.client.create("a1", "base").await;
    // A name that is passed over costs none of them.
    ark.client.create("a1-1", "base").await;
    let forked: Value = ark.client.post("/v1/agents/a1/fork", &json!({ "count": 3 })).await.json();
    let pids: Vec<u64> =
        forked["agents"].as_array().unwrap().iter().filter_map(|a| a["vmm_pid"].as_u64()).collect();
    assert!(waiting.iter().all(|pid| pids.contains(&u64::from(*pid))), "{waiting:?} {pids:?}");
    eventually("two more wait", async || vmms(&place).len() == 7).await;
    let all = vmms(&place);
    ark.daemon.shut_down().await;
    assert!(all.iter().all(|pid| !runs(*pid)));
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn a_prepared_vmm_that_died_is_passed_over() {
    let place = Place::new();
    let ark = place.start_with(with_pool(&place, 1, 0)).await;
    eventually("one waits", async || vmms(&place).len() == 1).await;
    signal(vmms(&place)[0], Signal::SIGKILL);
    ark.client.create("a1", "base").await;
    let forked: Value = ark.client.post("/v1/agents/a1/fork", &json!({})).await.json();
    assert_eq!(forked["agents"].as_array().unwrap().len(), 1, "{forked}");
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn a_standby_becomes_the_next_agent_and_proves_to_be_that() {
    let place = Place::new();
    let ark = place.start_with(with_pool(&place, 0, 1)).await;
    let client = &ark.client;
    of_template(client, "a1").await;
    // A standby is complete once its receipt is there: that of its first renewal.
    let standby = async || {
        let dirs = std::fs::read_dir(place.run().agents()).unwrap().flatten();
        let known: AgentList = client.get("/v1/agents").await.json();
        let mut ids = dirs.filter(|dir| dir.path().join("receipt.json").exists());
        ids.find_map(|dir| {
            let id = dir.file_name().into_string().unwrap();
            known.agents.iter().all(|agent| agent.id != id).then_some(id)
        })
    };
    eventually("one stands by", async || standby().await.is_some()).await;
    let id = standby().await.unwrap();
    // Its first program may still run.
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    let taken = client.post("/v1/agents", &json!({ "name": "a1", "image": "base" })).await;
    taken.problem(ark_types::problem::ProblemKind::NameTaken);
    let agent = of_template(client, "a2").await;
    assert_eq!(
        (agent.id.as_str(), agent.name.as_ref(), agent.state),
        (id.as_str(), "a2", AgentState::Running)
    );
    assert_eq!(eval(client, "a2", "hostname").await.as_deref(), Some("a2"));
    assert_eq!(eval(client, "a2", "renewals").await.as_deref(), Some("2"));
    let receipt: Receipt = client.get("/v1/agents/a2/receipt").await.json();
    assert_eq!(
        (receipt.agent_id.as_str(), receipt.name.as_ref(), receipt.checks.len()),
        (id.as_str(), "a2", 9)
    );

    eventually("another stands by", async || standby().await.is_some()).await;
    let killed = standby().await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    let identity = std::fs::read(place.run().agent(&killed).identity()).unwrap();
    let identity: Value = serde_json::from_slice(&identity).unwrap();
    signal(u32::try_from(identity["pid"].as_u64().unwrap()).unwrap(), Signal::SIGKILL);
    assert_ne!(of_template(client, "a3").await.id, killed, "a dead one is no agent");
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn an_agent_that_is_removed_while_a_standby_becomes_it_stays_removed() {
    let place = Place::new();
    let ark = place.start_with(with_pool(&place, 0, 1)).await;
    let create = |name: &str| {
        let (client, body) = (ark.client.clone(), json!({ "name": name, "image": "slow-second-renewal" }));
        tokio::spawn(async move { client.post("/v1/agents", &body).await })
    };
    assert_eq!(create("a1").await.unwrap().status().as_u16(), 201);
    let receipts = || {
        let dirs = std::fs::read_dir(place.run().agents()).unwrap().flatten();
        dirs.filter(|dir| dir.path().join("receipt.json").exists()).count()
    };
    eventually("one stands by", async || receipts() == 2).await;
    // Its first program may still run.
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    let creating = create("a2");
    let names = async || {
        let list: AgentList = ark.client.get("/v1/agents").await.json();
        list.agents.into_iter().map(|agent| agent.name.to_string()).collect::<Vec<_>>()
    };
    eventually("it is claimed", async || names().await.contains(&"a2".to_owned())).await;
    ark.client.delete("/v1/agents/a2").await;
    let detail = creating.await.unwrap().problem(ark_types::problem::ProblemKind::BootFailed).detail;
    assert!(detail.contains("removed"), "{detail}");
    assert_eq!(names().await, ["a1"]);
    let started = std::time::Instant::now();
    ark.daemon.shut_down().await;
    assert!(started.elapsed().as_secs() < 5);
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn a_standby_that_was_not_heard_for_long_becomes_nobody() {
    let place = Place::new();
    let mut config = with_pool(&place, 0, 1);
    // It is claimed before anybody misses it.
    config.timing.silence = std::time::Duration::from_secs(600);
    let ark = place.start_with(config).await;
    let create = async |name: &str| -> Agent {
        ark.client.post("/v1/agents", &json!({ "name": name, "image": "falls-silent" })).await.json()
    };
    let first = create("a1").await;
    eventually("one stands by", async || vmms(&place).len() == 2).await;
    let waiting: Vec<u32> = vmms(&place).into_iter().filter(|pid| Some(*pid) != first.vmm_pid).collect();
    // It said hello once, as every fork has to, and nothing since.
    tokio::time::sleep(std::time::Duration::from_secs(11)).await;
    let second = create("a2").await;
    assert_eq!(second.state, AgentState::Running);
    assert!(second.vmm_pid.is_some_and(|pid| !waiting.contains(&pid)) && !runs(waiting[0]));
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn a_standby_that_hangs_is_replaced_before_anybody_wants_it() {
    let place = Place::new();
    let ark = place.start_with(with_pool(&place, 0, 1)).await;
    let first = of_template(&ark.client, "a1").await;
    let standby = || vmms(&place).into_iter().find(|pid| Some(*pid) != first.vmm_pid && runs(*pid));
    eventually("one stands by", async || standby().is_some()).await;
    let hung = standby().unwrap();
    // Complete, so that it is not given up for coming up too slowly.
    eventually("it is complete", async || {
        let pools: Value = ark.client.get("/v1/pools").await.json();
        pools["pools"][0]["standbys"] == 1
    })
    .await;
    signal(hung, Signal::SIGSTOP);
    eventually("it is ended", async || !runs(hung)).await;
    eventually("another stands by", async || standby().is_some()).await;
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn what_a_killed_arkd_had_made_ahead_is_cleaned_up_by_the_next() {
    let place = Place::new();
    let mut first = arkd(&place, &["--pool", "2"]).stderr(std::process::Stdio::null()).spawn().unwrap();
    eventually("two wait", async || vmms(&place).len() == 2).await;
    let waiting = vmms(&place);
    first.kill().unwrap();
    first.wait().unwrap();
    let ark = place.start().await;
    assert!(waiting.iter().all(|pid| !runs(*pid)));
    assert_eq!(place.agent_dirs(), 0);
    ark.daemon.shut_down().await;
}

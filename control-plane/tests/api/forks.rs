//! Forks, templates and receipts: who comes from whom, and proves to be somebody else.

use std::collections::HashSet;

use ark_types::agent::{Agent, AgentList, AgentState, Origin};
use ark_types::eval::EvalReply;
use ark_types::problem::ProblemKind;
use ark_types::receipt::{CheckKind, Receipt};
use ark_types::snapshot::Forked;
use ark_types::template::TemplateList;
use hyper::StatusCode;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{Client, Place, eventually, signal};

pub(crate) async fn eval(client: &Client, agent: &str, code: &str) -> Option<String> {
    let reply = client.post(&format!("/v1/agents/{agent}/eval"), &json!({ "code": code })).await;
    assert_eq!(reply.status(), StatusCode::OK, "{:?}", reply.body);
    reply.json::<EvalReply>().value
}

async fn fork(client: &Client, agent: &str, count: u32) -> Forked {
    let reply = client.post(&format!("/v1/agents/{agent}/fork"), &json!({ "count": count })).await;
    assert_eq!(reply.status(), StatusCode::OK, "{:?}", reply.body);
    reply.json()
}

async fn receipt(client: &Client, agent: &str) -> Receipt {
    client.get(&format!("/v1/agents/{agent}/receipt")).await.json()
}

/// Snapshots in the state directory, whatever they are of.
fn snapshots(place: &Place) -> usize {
    std::fs::read_dir(place.state().snapshots()).map_or(0, Iterator::count)
}

#[tokio::test]
async fn forks_have_their_parents_memory_and_an_identity_of_their_own() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let parent = client.create("a1", "base").await;
    assert_eq!(parent.origin, Origin::Boot);
    client.get("/v1/agents/a1/receipt").await.problem(ProblemKind::NoReceipt);
    eval(client, "a1", "x=before").await;
    client.create("a1-2", "base").await;

    let forked = fork(client, "a1", 3).await;
    assert!(forked.failed.is_empty() && (forked.pause_us, forked.durable_us) == (7, 70));
    let names: Vec<_> = forked.agents.iter().map(|agent| agent.name.to_string()).collect();
    assert_eq!(names, ["a1-1", "a1-3", "a1-4"], "a number in use is passed over");
    eval(client, "a1", "x=after").await;
    let mut machine_ids = HashSet::from([eval(client, "a1", "machine_id").await.unwrap()]);
    for agent in &forked.agents {
        let name = agent.name.as_ref();
        assert_eq!(agent.origin, Origin::Fork { name: parent.name.clone(), id: parent.id.clone() });
        assert_eq!((agent.state, &agent.image), (AgentState::Running, &parent.image));
        assert!(agent.boot_ms.is_some() && agent.vmm_pid != parent.vmm_pid);
        assert_eq!(eval(client, name, "x").await.as_deref(), Some("before"));
        assert_eq!(eval(client, name, "hostname").await.as_deref(), Some(name));
        let receipt = receipt(client, name).await;
        assert_eq!(
            (receipt.agent_id.as_str(), &receipt.name, receipt.checks.len()),
            (agent.id.as_str(), &agent.name, 9)
        );
        assert!(receipt.checks.iter().all(|check| check.passed));
        let given = receipt.checks.iter().find(|check| check.check == CheckKind::MachineId).unwrap();
        assert!(machine_ids.insert(given.answer.clone()), "no two have the same machine-id");
        let file = place.run().agent(&agent.id).0.join("receipt.json");
        assert_eq!(serde_json::from_slice::<Receipt>(&std::fs::read(file).unwrap()).unwrap(), receipt);
    }
    // A fork of a fork counts one renewal more, and is a diff over a diff.
    let grandchild = fork(client, "a1-1", 1).await;
    assert_eq!(grandchild.agents[0].name.as_ref(), "a1-1-1");
    assert_eq!(eval(client, "a1-1-1", "renewals").await.as_deref(), Some("2"));

    assert!(snapshots(&place) >= 2);
    for agent in ["a1", "a1-1", "a1-3", "a1-4"] {
        client.delete(&format!("/v1/agents/{agent}")).await;
    }
    assert_eq!(snapshots(&place), 2, "those of the one that is left");
    client.delete("/v1/agents/a1-1-1").await;
    assert_eq!(snapshots(&place), 0);
    ark.daemon.shut_down().await;
    assert_eq!((snapshots(&place), place.agent_dirs()), (0, 0), "branch points go with the last fork");
}

#[tokio::test]
async fn a_burst_of_forks_is_orderly_and_no_two_are_the_same() {
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("a1", "base").await;
    let forked = fork(&ark.client, "a1", 60).await;
    assert!(forked.failed.is_empty(), "{:?}", forked.failed);
    let mut answers = HashSet::new();
    for agent in &forked.agents {
        let receipt = receipt(&ark.client, agent.name.as_ref()).await;
        let unique =
            [CheckKind::Random, CheckKind::EvaluatorRandom, CheckKind::MachineId, CheckKind::Hostname];
        for check in receipt.checks.into_iter().filter(|check| unique.contains(&check.check)) {
            assert!(answers.insert(check.answer.clone()), "{check:?}");
        }
    }
    assert_eq!(answers.len(), 60 * 4);
    ark.daemon.shut_down().await;
    assert_eq!((snapshots(&place), place.agent_dirs()), (0, 0));
}

#[tokio::test]
async fn a_fork_that_fails_a_check_is_ended_and_the_reply_says_which_and_what_was_seen() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    for (image, words) in [
        ("wrong-clock", "clock failed: it is only known to be within"),
        ("another-nonce", "vsock connection from the host failed: it was told"),
        ("no-random", "random numbers failed: \"\" is not 64 hexadecimal digits"),
        ("keeps-its-machine-id", "machine-id failed: it was told"),
        ("counts-no-renewal", "renewals failed: it counts 0 where 1 are due"),
        ("keeps-its-name", "host name failed: it was told \"a1-1\" and answered \"a1\""),
        ("never-calls", "did not call the host within 5 s"),
    ] {
        client.create("a1", image).await;
        let reply = client.post("/v1/agents/a1/fork", &json!({})).await;
        let detail = reply.problem(ProblemKind::ForkFailed).detail;
        assert!(detail.contains("did not come to be") && detail.contains(words), "{detail}");
        assert_eq!(client.get("/v1/agents").await.json::<AgentList>().agents.len(), 1, "no corpse");
        assert_eq!(client.get("/v1/agents/a1").await.json::<Agent>().state, AgentState::Running);
        client.delete("/v1/agents/a1").await;
    }
    // Of those that answer the same random numbers one is the first.
    for (image, words) in [
        ("same-random", "its random numbers failed: the same ones were answered before"),
        ("same-evaluator-random", "its evaluator's random numbers failed: the same ones"),
    ] {
        client.create("a1", image).await;
        let forked = fork(client, "a1", 3).await;
        assert_eq!((forked.agents.len(), forked.failed.len()), (1, 2));
        assert!(forked.failed.iter().all(|fork| fork.why.contains(words)), "{}", forked.failed[0].why);
        for agent in ["a1", forked.agents[0].name.as_ref()] {
            client.delete(&format!("/v1/agents/{agent}")).await;
        }
    }

    client.create("a1", "unrestorable").await;
    let reply = client.post("/v1/agents/a1/fork", &json!({ "count": 2 })).await;
    let detail = reply.problem(ProblemKind::ForkFailed).detail;
    assert!(
        detail.starts_with("none of 2 forks") && detail.contains("another kind of processor"),
        "{detail}"
    );
    ark.daemon.shut_down().await;
    assert_eq!((snapshots(&place), place.agent_dirs()), (0, 0));
}

#[tokio::test]
async fn what_cannot_be_forked_is_refused_before_anything_is_made() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    client.create("a1", "full-disk").await;
    for count in [0, 257] {
        let reply = client.post("/v1/agents/a1/fork", &json!({ "count": count })).await;
        assert!(reply.problem(ProblemKind::InvalidValue).detail.contains("1 to 256"));
    }
    client.post("/v1/agents/a2/fork", &json!({})).await.problem(ProblemKind::AgentNotFound);
    let detail = client.post("/v1/agents/a1/fork", &json!({})).await.problem(ProblemKind::DiskFull).detail;
    assert!(detail.contains("nothing of it is left"), "{detail}");
    let long = "a".repeat(62);
    client.create(&long, "base").await;
    let reply = client.post(&format!("/v1/agents/{long}/fork"), &json!({})).await;
    assert!(reply.problem(ProblemKind::InvalidValue).detail.contains("too long"));
    client.create("b1", "powers-off").await;
    eventually("it ends", async || client.get("/v1/agents/b1").await.json::<Agent>().exit.is_some()).await;
    client.post("/v1/agents/b1/fork", &json!({})).await.problem(ProblemKind::AgentNotRunning);
    assert_eq!(snapshots(&place), 0);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn an_agent_that_is_removed_while_its_snapshot_is_taken_is_gone_at_once() {
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("a1", "slow-snapshot").await;
    let forking = tokio::spawn({
        let client = ark.client.clone();
        async move { client.post("/v1/agents/a1/fork", &json!({})).await }
    });
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    let started = std::time::Instant::now();
    assert_eq!(ark.client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    assert!(started.elapsed().as_millis() < 1500);
    let problem = forking.await.unwrap().problem(ProblemKind::AgentGone);
    assert!(problem.detail.contains("stopped on request"), "{}", problem.detail);
    assert_eq!((snapshots(&place), place.agent_dirs()), (0, 0));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_fork_that_waits_its_turn_can_be_removed_and_who_leaves_takes_all_of_them_along() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    client.create("a1", "never-calls").await;
    let forking = tokio::spawn({
        let client = client.clone();
        async move { client.post("/v1/agents/a1/fork", &json!({ "count": 256 })).await }
    });
    let known = async || client.get("/v1/agents").await.json::<AgentList>().agents.len();
    eventually("all are known", async || known().await == 257).await;
    let started = std::time::Instant::now();
    assert_eq!(client.delete("/v1/agents/a1-256").await.status(), StatusCode::NO_CONTENT);
    assert!(started.elapsed().as_secs() < 3, "those before it take longer");
    forking.abort();
    eventually("they are gone", async || known().await == 1).await;
    client.delete("/v1/agents/a1").await;
    eventually("nothing is left", async || (snapshots(&place), place.agent_dirs()) == (0, 0)).await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_vmm_that_is_killed_during_a_snapshot_or_a_restore_leaves_nothing_and_is_told() {
    let place = Place::new();
    let ark = place.start().await;
    let forking = || {
        let client = ark.client.clone();
        tokio::spawn(async move { client.post("/v1/agents/a1/fork", &json!({})).await })
    };
    let source = ark.client.create("a1", "slow-snapshot").await;
    let task = forking();
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    signal(source.vmm_pid.unwrap(), Signal::SIGKILL);
    let detail = task.await.unwrap().problem(ProblemKind::AgentGone).detail;
    assert!(detail.contains("ended before its snapshot was complete"), "{detail}");
    assert_eq!(ark.client.get("/v1/agents/a1").await.json::<Agent>().state, AgentState::Failed);
    assert_eq!(snapshots(&place), 0);
    ark.client.delete("/v1/agents/a1").await;

    ark.client.create("a1", "never-calls").await;
    let task = forking();
    let fork = async || {
        let reply = ark.client.get("/v1/agents/a1-1").await;
        if reply.status() == StatusCode::OK { reply.json::<Agent>().vmm_pid } else { None }
    };
    eventually("its VMM runs", async || fork().await.is_some()).await;
    signal(fork().await.unwrap(), Signal::SIGKILL);
    let detail = task.await.unwrap().problem(ProblemKind::ForkFailed).detail;
    assert!(detail.contains("the agent ended before its guest was up"), "{detail}");
    ark.client.delete("/v1/agents/a1").await;
    ark.daemon.shut_down().await;
    assert_eq!((snapshots(&place), place.agent_dirs()), (0, 0));
}

#[tokio::test]
async fn an_image_is_forked_from_its_own_template_and_booted_where_that_is_asked_for_or_fails() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let create = async |body: Value| client.post("/v1/agents", &body).await;
    let first: Agent = create(json!({ "name": "a1", "image": "base", "env": { "A": "1" } })).await.json();
    let name = "default-base".parse().unwrap();
    assert_eq!(first.origin, Origin::Template { name });
    let second: Agent = create(json!({ "name": "a2", "image": "base" })).await.json();
    assert_eq!(second.origin, first.origin);
    assert_eq!(eval(client, "a2", "renewals").await.as_deref(), Some("1"));
    let list: TemplateList = client.get("/v1/templates").await.json();
    assert_eq!((list.templates.len(), list.templates[0].agents), (1, 2));
    let said = client.exec("a1", &json!({ "argv": ["sh", "-c", "echo $A"] })).await;
    assert_eq!(said.json::<Value>()["stdout"], "1\n");

    let cold: Agent = create(json!({ "name": "a3", "image": "base", "cold": true })).await.json();
    let sized: Agent = create(json!({ "name": "a4", "image": "base", "memory_mib": 64 })).await.json();
    assert_eq!((cold.origin, sized.origin), (Origin::Boot, Origin::Boot));
    let named: Agent = create(json!({ "name": "a5", "template": "default-base" })).await.json();
    assert_eq!(named.origin, first.origin);
    // Its template cannot be written, so it is booted.
    let booted: Agent = create(json!({ "name": "a6", "image": "full-disk" })).await.json();
    assert_eq!(booted.origin, Origin::Boot);
    for (body, words) in [
        (json!({}), "neither image nor template"),
        (json!({ "image": "base", "template": "t" }), "exclude each other"),
        (json!({ "template": "t", "vcpus": 1 }), "vcpus cannot be chosen"),
        (json!({ "template": "t", "memory_mib": 64 }), "memory_mib cannot be chosen"),
        (json!({ "template": "t", "cold": true }), "cannot be booted cold"),
    ] {
        let detail = create(body).await.problem(ProblemKind::InvalidValue).detail;
        assert!(detail.contains(words), "{detail}");
    }
    create(json!({ "template": "t" })).await.problem(ProblemKind::TemplateNotFound);
    create(json!({ "name": "a1", "image": "base" })).await.problem(ProblemKind::NameTaken);
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn code_is_evaluated_and_its_names_stay() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    client.create("a1", "base").await;
    let ask = async |body: Value| client.post("/v1/agents/a1/eval", &body).await;
    assert_eq!(eval(client, "a1", "x=5").await, None);
    let reply: EvalReply = ask(json!({ "code": "x" })).await.json();
    assert_eq!(
        (reply.value.as_deref(), reply.stdout.as_str(), reply.stderr.as_str()),
        (Some("5"), "out\n", "err\n")
    );
    assert_eq!(ask(json!({ "code": "raise" })).await.json::<EvalReply>().exception.unwrap().kind, "Error");
    ask(json!({ "code": "x".repeat(70_000) })).await.problem(ProblemKind::InvalidValue);
    ask(json!({ "code": "x", "timeout_ms": 0 })).await.problem(ProblemKind::InvalidValue);
    ask(json!({ "code": "sleep", "timeout_ms": 100 })).await.problem(ProblemKind::DeadlinePassed);
    client.post("/v1/agents/a9/eval", &json!({ "code": "x" })).await.problem(ProblemKind::AgentNotFound);
    ark.daemon.shut_down().await;
}

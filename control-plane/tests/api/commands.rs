//! Services with a command: started once in each replica, seen to across restarts of `arkd`, replaced when it ends.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::PathBuf;

use ark_types::agent::Agent;
use ark_types::problem::ProblemKind;
use ark_types::service::{ReplicaState, Service};
use hyper::{Method, StatusCode};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{Client, Place, eventually, runs, signal, started};

/// A service `web` whose replicas run `script`.
fn web(replicas: u32, script: &str, more: &Value) -> Value {
    let command = json!({ "argv": ["sh", "-c", script] });
    let mut spec =
        json!({ "name": "web", "replicas": replicas, "image": "base", "memory_mib": 64, "command": command });
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    spec
}

async fn create(client: &Client, spec: &Value) {
    let reply = client.post("/v1/services", spec).await;
    assert_eq!(reply.status(), StatusCode::CREATED, "{:?}", reply.body);
}

async fn put(client: &Client, spec: &Value) -> Service {
    let reply = client.ask(Method::PUT, "/v1/services/web", spec.to_string()).await;
    assert_eq!(reply.status(), StatusCode::OK, "{:?}", reply.body);
    reply.json()
}

async fn service(client: &Client) -> Service {
    client.get("/v1/services/web").await.json()
}

/// Waits until `web` is as it is to be; what it is then.
async fn settled(client: &Client) -> Service {
    eventually("the service is as it is to be", async || {
        let now = service(client).await;
        now.conditions.is_empty()
            && now.updated == now.spec.replicas
            && now.replicas.len() == now.spec.replicas as usize
    })
    .await;
    service(client).await
}

fn ids(service: &Service) -> BTreeSet<String> {
    service.replicas.iter().map(|replica| replica.id.clone()).collect()
}

/// A file where each start of a command is noted.
struct Starts(PathBuf);

impl Starts {
    fn new(place: &Place) -> Self {
        Self(place.path("starts"))
    }

    /// Notes its process id, and goes on as `then`.
    fn script(&self, then: &str) -> String {
        format!("echo $$ >> {}; {then}", self.0.display())
    }

    /// Process ids of those that were started.
    fn pids(&self) -> Vec<u32> {
        let text = std::fs::read_to_string(&self.0).unwrap_or_default();
        text.lines().map(|line| line.parse().unwrap()).collect()
    }
}

#[tokio::test]
async fn a_command_runs_in_each_replica_and_one_that_ends_is_replaced() {
    let place = Place::new();
    let ark = place.start().await;
    let (client, starts) = (&ark.client, Starts::new(&place));
    let script = starts.script("echo $GREETING; exec sleep 1000");
    create(client, &web(2, &script, &json!({ "env": { "GREETING": "hello" } }))).await;
    let two = settled(client).await;
    let pids = starts.pids();
    assert_eq!(pids.len(), 2);
    assert!(pids.iter().all(|pid| runs(*pid)) && two.last_failure.is_none());
    let log = async |replica: &str| {
        client.get(&format!("/v1/services/web/logs?replica={replica}")).await.body.to_vec()
    };
    for replica in &two.replicas {
        eventually("its words are kept", async || log(replica.agent.as_ref()).await == b"hello\n").await;
    }
    client.get("/v1/services/web/logs?replica=nobody").await.problem(ProblemKind::ServiceNotFound);

    signal(pids[0], Signal::SIGKILL);
    eventually("one has failed and another takes its place", async || {
        let now = service(client).await;
        now.last_failure.is_some() && now.ready == 2
    })
    .await;
    let next = settled(client).await;
    let failure = next.last_failure.clone().unwrap();
    assert_eq!(failure.reason, "its command was ended by signal 9; it wrote last: hello");
    assert!(ids(&two).contains(&failure.id) && !ids(&next).contains(&failure.id));
    assert_eq!((starts.pids().len(), ids(&two).intersection(&ids(&next)).count()), (3, 1));
    assert_eq!(log(&failure.id).await, b"hello\n", "what the failed one wrote is still there");

    // A replica that begins anew does so with its command.
    let agent: Agent = client.get(&format!("/v1/agents/{}", next.replicas[0].id)).await.json();
    signal(agent.vmm_pid.unwrap(), Signal::SIGKILL);
    eventually("it is started anew", async || starts.pids().len() == 4).await;
    assert_eq!(ids(&settled(client).await), ids(&next));
    assert_eq!(client.delete("/v1/services/web").await.status(), StatusCode::NO_CONTENT);
    for pid in starts.pids() {
        eventually("commands end with their replicas", async || !runs(pid)).await;
    }
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn the_next_arkd_goes_on_with_commands_and_starts_none_twice() {
    let place = Place::new();
    let starts = Starts::new(&place);
    let (mut last, client) = started(&place, &[]).await;
    create(&client, &web(2, &starts.script("exec sleep 1000"), &json!({}))).await;
    let two = settled(&client).await;
    last.end(Signal::SIGKILL);
    let (mut last, client) = started(&place, &[]).await;
    assert_eq!(ids(&settled(&client).await), ids(&two));
    last.end(Signal::SIGKILL);
    // One that is killed as soon as it listens.
    let (mut last, _) = started(&place, &[]).await;
    last.end(Signal::SIGKILL);
    let pids = starts.pids();
    assert_eq!(pids.len(), 2);
    // One ends while nobody looks.
    signal(pids[1], Signal::SIGTERM);
    let (mut last, client) = started(&place, &[]).await;
    eventually("that is noticed", async || service(&client).await.last_failure.is_some()).await;
    let next = settled(&client).await;
    assert_eq!(next.last_failure.unwrap().reason, "its command was ended by signal 15");
    let stayed = two.replicas.iter().filter(|replica| next.replicas.iter().any(|now| now.id == replica.id));
    assert_eq!((stayed.count(), starts.pids().len()), (1, 3));
    assert!(runs(pids[0]), "it goes on");
    // And it is seen to still.
    signal(pids[0], Signal::SIGKILL);
    eventually("another takes its place", async || starts.pids().len() == 4).await;
    settled(&client).await;
    assert_eq!(client.delete("/v1/services/web").await.status(), StatusCode::NO_CONTENT);
    last.end(Signal::SIGTERM);
}

#[tokio::test]
async fn a_command_that_ends_again_and_again_is_given_up_with_its_reason() {
    let place = Place::new();
    let ark = place.start().await;
    let (client, starts) = (&ark.client, Starts::new(&place));
    let spec = |script: &str| web(1, script, &json!({ "restart": { "when": "always", "max_restarts": 1 } }));
    create(client, &spec(&starts.script("echo no database; exit 3"))).await;
    eventually("it is given up", async || service(client).await.is_stopped).await;
    let stopped = service(client).await;
    let why = stopped.conditions.join("; ");
    assert!(why.contains("the command ended 2 times in a row and no more replicas are made"), "{why}");
    assert!(why.contains("its command ended with 3; it wrote last: no database"), "{why}");
    assert_eq!((stopped.ready, starts.pids().len()), (0, 2));
    // What cannot even be started is told as that.
    let mut absent = spec("");
    absent["command"] = json!({ "argv": ["/no/such/program"] });
    put(client, &absent).await;
    eventually("that is given up, too", async || {
        let now = service(client).await;
        now.is_stopped && now.conditions.iter().any(|why| why.contains("its command cannot be started"))
    })
    .await;
    // Mended, it goes on.
    put(client, &spec("exec sleep 1000")).await;
    assert_eq!(settled(client).await.generation, 3);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_replica_is_ready_once_its_port_takes_connections_or_its_check_passes() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    create(client, &web(1, "exec sleep 1000", &json!({ "port": port }))).await;
    let waits = async |why: &str| {
        eventually("it waits", async || {
            let now = service(client).await;
            let replica = now.replicas.iter().find(|replica| replica.generation == now.generation);
            replica.is_some_and(|replica| {
                let reason = replica.reason.as_deref().unwrap_or_default();
                replica.state == ReplicaState::Starting && reason.contains(why)
            })
        })
        .await;
    };
    waits(&format!("it is not ready yet: 127.0.0.1:{port}")).await;
    assert!(service(client).await.conditions.iter().any(|why| why.contains("it is not ready yet")));
    // The fake guest's network is this host's.
    let _listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let before = settled(client).await;

    let gate = place.path("gate");
    let check = json!({ "kind": "exec", "command": ["test", "-e", gate.to_str().unwrap()] });
    let more = json!({ "health_check": { "probe": check, "start_period_s": 3600 } });
    let next = put(client, &web(1, "exec sleep 1000", &more)).await;
    assert_eq!(next.generation, 2);
    waits("its command ended with 1").await;
    assert!(
        service(client).await.replicas.iter().any(|one| one.id == before.replicas[0].id),
        "the old one serves"
    );
    std::fs::write(&gate, "").unwrap();
    let after = settled(client).await;
    assert!(ids(&before).is_disjoint(&ids(&after)));

    // Another command is another generation; one that ends at once stops that, and those before stay.
    put(client, &web(1, "exit 1", &more)).await;
    eventually("it stops", async || service(client).await.is_stopped).await;
    let stopped = service(client).await;
    assert_eq!((stopped.generation, stopped.ready, stopped.updated), (3, 1, 0));
    assert!(stopped.conditions.iter().any(|why| why.contains("is stopped after 3 failures")), "{stopped:?}");
    assert!(ids(&after).is_subset(&ids(&stopped)));
    let refused = client.post("/v1/services", &web(1, "a\0b", &json!({ "name": "other" }))).await;
    assert!(refused.problem(ProblemKind::InvalidValue).detail.starts_with("the command: "));
    ark.daemon.shut_down().await;
}

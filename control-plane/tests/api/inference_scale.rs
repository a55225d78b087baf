//! How many VMs a model has: more once calls wait, fewer when it is quiet, between the bounds of the settings.

use std::path::Path;

use ark_gguf::synthetic::Synthetic;
use ark_types::event::{Event, EventList};
use ark_types::model::{Model, ModelState};
use ark_types::service::{ReplicaState, Service};
use hyper::{Method, StatusCode};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{Ark, Client, Place, Process, arkd, eventually};
use crate::inference::{said, serve, served, serving};
use crate::inference_limits::{begin, metric, running, waiting};

/// An `arkd` whose `[inference]` is `text`.
async fn start(place: &Place, text: &str) -> Ark {
    let mut config = place.config();
    config.inference = toml::from_str(text).unwrap();
    place.start_with(config).await
}

/// A call that goes on until `path` is there.
fn hold(client: &Client, path: &Path) -> tokio::task::JoinHandle<crate::harness::Reply> {
    begin(client, "team", &format!("hold {}", path.display()))
}

async fn becomes(client: &Client, what: &str, replicas: u32) -> Service {
    eventually(what, async || {
        let service = served(client).await;
        (service.spec.replicas, service.ready) == (replicas, replicas)
            && service.replicas.len() == replicas as usize
    })
    .await;
    served(client).await
}

/// How many replicas the service of the model `m` was set to have, one time after the other.
async fn set(client: &Client) -> Vec<u32> {
    let list: EventList = client.get("/v1/events?stream=service/model-m&limit=1000").await.json();
    let replicas = list.events.into_iter().filter_map(|recorded| match recorded.event {
        Event::ServiceSet { service, .. } => Some(service.replicas),
        _ => None,
    });
    replicas.collect()
}

async fn scale(client: &Client, replicas: u32) {
    let body = json!({ "replicas": replicas }).to_string();
    let scaled = client.ask(Method::PATCH, "/v1/services/model-m", body).await;
    assert_eq!(scaled.status(), StatusCode::OK, "{:?}", scaled.body);
}

#[tokio::test]
async fn calls_that_wait_have_another_vm_made_which_goes_when_it_is_quiet() {
    let place = Place::new();
    let mut config = place.config();
    config.inference = toml::from_str("sessions = 1\nscale_down_s = 1").unwrap();
    let ark = serving(&place, config, 1).await;
    let client = &ark.client;
    let first = served(client).await.replicas[0].id.clone();
    let (one, other) = (place.path("one"), place.path("other"));
    let held = hold(client, &one);
    running(client, 1.0).await;
    let waits = hold(client, &other);
    // The first one goes on: only a VM of its own lets the other one go.
    running(client, 2.0).await;
    let both = served(client).await;
    assert_eq!((both.spec.replicas, both.ready), (2, 2));
    assert!(both.replicas.iter().all(|replica| replica.load == 1), "{both:?}");
    assert!((metric(client, "ark_inference_replicas_wanted").await - 2.0).abs() < 1e-9);
    // There may be no more.
    let third = begin(client, "team", "say 1");
    waiting(client, 1.0).await;
    std::fs::write(one, "").unwrap();
    for call in [held, third] {
        assert_eq!(call.await.unwrap().status(), StatusCode::OK);
    }
    // One VM is enough for what is left, and that which goes is the other one.
    let left = becomes(client, "one is enough", 1).await;
    assert_eq!((left.replicas[0].load, left.replicas[0].id == first), (1, false));
    std::fs::write(other, "").unwrap();
    assert_eq!(waits.await.unwrap().status(), StatusCode::OK);
    assert_eq!(set(client).await, [1, 1, 2, 1], "made, set by the test, and then by need");
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_model_that_nobody_uses_has_no_vm_until_the_next_call() {
    let place = Place::new();
    let ark = start(&place, "replicas_min = 0\nscale_down_s = 1").await;
    let client = &ark.client;
    let added = client.ask(Method::PUT, "/v1/models/m", Synthetic::default().to_bytes()).await;
    assert_eq!(added.status(), StatusCode::CREATED, "{:?}", added.body);
    let idle = async || {
        becomes(client, "there is none", 0).await;
        let model: Model = client.get("/v1/models/m").await.json();
        assert_eq!(model.state, ModelState::Idle);
    };
    let loaded = client.post("/v1/models/m/load", &json!({})).await;
    assert_eq!(loaded.status(), StatusCode::OK, "{:?}", loaded.body);
    idle().await;
    // Many at once have one made.
    let calls: Vec<_> = (0..9).map(|_| begin(client, "team", "say 1")).collect();
    for call in calls {
        assert_eq!(call.await.unwrap().status(), StatusCode::OK);
    }
    idle().await;
    assert_eq!(said(client, "say 2").await, "1 2 ");
    idle().await;
    let loaded: Model = client.post("/v1/models/m/load", &json!({})).await.json();
    assert_ne!(loaded.state, ModelState::Idle);
    idle().await;
    assert_eq!(set(client).await, [1, 0, 1, 0, 1, 0, 1, 0]);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn what_is_set_by_hand_is_brought_back_between_the_bounds() {
    let place = Place::new();
    let ark = start(&place, "replicas_min = 1\nreplicas_max = 3").await;
    let client = &ark.client;
    serve(client, 1).await;
    // A service of somebody else, whatever its name.
    let other = json!({ "name": "model-x", "replicas": 0, "image": "base" });
    assert_eq!(client.post("/v1/services", &other).await.status(), StatusCode::CREATED);
    scale(client, 9).await;
    becomes(client, "there are as many as may be", 3).await;
    scale(client, 2).await;
    becomes(client, "what is in bounds is kept", 2).await;
    scale(client, 0).await;
    becomes(client, "there are as few as may be", 1).await;
    assert_eq!(set(client).await, [1, 1, 9, 3, 2, 0, 1]);
    let other: Service = client.get("/v1/services/model-x").await.json();
    assert_eq!(other.spec.replicas, 0);
    // One that is removed stays removed.
    scale(client, 9).await;
    assert_eq!(client.delete("/v1/models/m").await.status(), StatusCode::NO_CONTENT);
    client.get("/v1/services/model-m").await.problem(ark_types::problem::ProblemKind::ServiceNotFound);
    ark.daemon.shut_down().await;
}

/// The real program with these variables, once it listens.
async fn started(place: &Place, variables: &[(&str, &str)]) -> (Process, Client) {
    let mut command = arkd(place, &[]);
    command.envs(variables.iter().copied()).stderr(std::process::Stdio::null());
    let child = Process::start(place, &mut command);
    let socket = place.run().api_socket();
    eventually("arkd listens", async || tokio::net::UnixStream::connect(&socket).await.is_ok()).await;
    (child, Client::unix(&socket))
}

#[tokio::test]
async fn the_next_arkd_goes_on_with_as_many() {
    let place = Place::new();
    let sessions = ("ARK_INFERENCE_SESSIONS", "1");
    let (mut first, client) = started(&place, &[sessions]).await;
    serve(&client, 1).await;
    let path = place.path("go");
    let calls = [hold(&client, &path), hold(&client, &path)];
    let both = becomes(&client, "both are needed", 2).await;
    first.end(Signal::SIGKILL);
    // Whoever waits is told by the connection's end.
    calls.iter().for_each(tokio::task::JoinHandle::abort);
    std::fs::write(path, "").unwrap();
    let ids = |service: &Service| -> Vec<_> { service.replicas.iter().map(|one| one.id.clone()).collect() };
    let (mut second, client) = started(&place, &[sessions]).await;
    let same = becomes(&client, "both are there", 2).await;
    assert_eq!((ids(&same), set(&client).await), (ids(&both), vec![1, 1, 2]));
    second.end(Signal::SIGTERM);
    let (_third, client) = started(&place, &[("ARK_INFERENCE_REPLICAS_MAX", "1")]).await;
    becomes(&client, "there may be one", 1).await;
    assert_eq!(set(&client).await, [1, 1, 2, 1]);
}

#[tokio::test]
async fn want_of_room_is_said_once_and_changes_nothing() {
    const WORDS: &str = "a model cannot have another number of VMs now";
    let place = Place::new();
    let log = place.path("arkd.log");
    let variables = [
        ("ARK_INFERENCE_SESSIONS", "1"),
        ("ARK_SCHEDULER_MAX_AGENTS", "1"),
        ("ARK_LOG_FILE", log.to_str().unwrap()),
    ];
    let (_arkd, client) = started(&place, &variables).await;
    serve(&client, 1).await;
    let path = place.path("go");
    let calls = [hold(&client, &path), hold(&client, &path)];
    let told = || -> Vec<Value> {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let lines = text.lines().filter(|line| line.contains(WORDS));
        lines.map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    eventually("it is said", async || !told().is_empty()).await;
    // Each of these has all services looked at.
    for replicas in 0..20 {
        let own = json!({ "name": "own", "replicas": 0, "image": "base", "update": { "max_unavailable": replicas } });
        let set = client.ask(Method::PUT, "/v1/services/own", own.to_string()).await;
        assert!(set.status().is_success(), "{:?}", set.body);
    }
    std::fs::write(path, "").unwrap();
    for call in calls {
        assert_eq!(call.await.unwrap().status(), StatusCode::OK, "one after the other");
    }
    let told = told();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].to_string().contains("1 agent is asked for and 0 of 1 may still be had"), "{told:?}");
    assert_eq!(set(&client).await, [1, 1]);
}

#[tokio::test]
async fn a_service_that_goes_does_not_wait_for_those_that_were_given_longer() {
    let place = Place::new();
    let ark = start(&place, "").await;
    let client = &ark.client;
    serve(client, 1).await;
    let held = hold(client, &place.path("never"));
    running(client, 1.0).await;
    let busy = json!({ "agent": served(client).await.replicas[0].agent });
    let draining = tokio::spawn({
        let client = client.clone();
        async move { client.post("/v1/services/model-m/drain?grace_ms=600000", &busy).await }
    });
    eventually("it drains", async || {
        let replicas = served(client).await.replicas;
        replicas.iter().any(|replica| replica.state == ReplicaState::Draining)
    })
    .await;
    let removed = client.delete("/v1/services/model-m?grace_ms=100").await;
    assert_eq!(removed.status(), StatusCode::NO_CONTENT, "{:?}", removed.body);
    // Nothing was said yet, so it was begun again, in a service that was made for it.
    held.abort();
    draining.abort();
    ark.daemon.shut_down().await;
}

//! Bad input: a sentence as a problem, and nothing left behind.

use ark_types::problem::ProblemKind;
use hyper::{Method, StatusCode};
use serde_json::json;

use crate::harness::{Client, Place};
use crate::inference::error;

#[tokio::test]
async fn agents_that_cannot_be_are_refused_with_the_reason() {
    let place = Place::new();
    let ark = place.start().await;
    for (body, kind, says) in [
        (json!({ "image": "pyton" }), ProblemKind::ImageNotFound, "there are: another-nonce, babbles, base"),
        (json!({ "image": "rotten" }), ProblemKind::ImageCorrupt, "digest"),
        (json!({ "image": "base", "vcpus": 0 }), ProblemKind::InvalidValue, "0 vCPUs"),
        (json!({ "image": "base", "vcpus": 1000 }), ProblemKind::InvalidValue, "1000 vCPUs"),
        (json!({ "image": "base", "memory_mib": 0 }), ProblemKind::InvalidValue, "0 MiB"),
        (json!({ "image": "base", "memory_mib": 1 }), ProblemKind::InvalidValue, "1 MiB"),
        (
            json!({ "image": "base", "memory_mib": 1_u64 << 40 }),
            ProblemKind::InvalidValue,
            "more than this host's",
        ),
        (json!({ "image": "base", "name": "A_b" }), ProblemKind::InvalidValue, "not a valid name"),
        (json!({ "image": "base", "color": "red" }), ProblemKind::InvalidValue, "color"),
        (json!({ "image": "base", "env": { "": "x" } }), ProblemKind::InvalidValue, "environment variable"),
        (json!({ "image": "panics" }), ProblemKind::BootFailed, "not syncing: no init found"),
        (json!({ "image": "no-record" }), ProblemKind::BootFailed, "exit code 22"),
        (json!({ "image": "babbles" }), ProblemKind::BootFailed, "hello"),
    ] {
        let detail = ark.client.post("/v1/agents", &body).await.problem(kind).detail;
        assert!(detail.contains(says), "{detail}");
    }
    assert_eq!(place.agent_dirs(), 0);
    assert_eq!(ark.client.get("/v1/agents").await.body, r#"{"agents":[]}"#);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_guest_that_never_says_hello_is_given_up_at_the_deadline() {
    let place = Place::new();
    let mut config = place.config();
    config.timing.boot = std::time::Duration::from_secs(1);
    let ark = place.start_with(config).await;
    let reply = ark.client.post("/v1/agents", &json!({ "image": "silent", "memory_mib": 64 })).await;
    let detail = reply.problem(ProblemKind::BootFailed).detail;
    assert!(detail.contains("within 1 s") && detail.contains("Linux version fake"), "{detail}");
    assert_eq!(place.agent_dirs(), 0);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_host_without_kvm_or_without_the_vmm_says_so() {
    let place = Place::new();
    std::fs::remove_file(place.path("assets/bin/ark-vmm")).unwrap();
    let ark = place.start().await;
    let reply = ark.client.post("/v1/agents", &json!({ "image": "base" })).await;
    assert!(reply.problem(ProblemKind::HostUnable).detail.contains("cannot run microVMs"));
    let health: serde_json::Value = ark.client.get("/v1/health").await.json();
    assert_eq!(health["status"], "degraded");
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn whatever_axum_refuses_is_a_problem_too() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    client.get("/v2").await.problem(ProblemKind::NoRoute);
    client.get("/").await.problem(ProblemKind::NoRoute);
    client.get("/v1/host/exec/stream").await.problem(ProblemKind::NoRoute);
    let patched = client.ask(Method::PATCH, "/v1/agents", "").await;
    patched.problem(ProblemKind::MethodNotAllowed);
    assert!(patched.response.headers().contains_key("allow"));
    client.ask(Method::POST, "/v1/agents", "{").await.problem(ProblemKind::BadRequest);
    client.ask(Method::POST, "/v1/agents", "{}").await.problem(ProblemKind::InvalidValue);
    client.get("/v1/agents/a1").await.problem(ProblemKind::AgentNotFound);
    client.get("/v1/agents/%ff").await.problem(ProblemKind::BadRequest);
    client.get("/v1/images/none").await.problem(ProblemKind::ImageNotFound);
    client.delete("/v1/agents/a1?grace_ms=x").await.problem(ProblemKind::BadRequest);
    client.delete("/v1/agents/a1?grace_ms=99999999").await.problem(ProblemKind::InvalidValue);
    client.get("/v1/agents/a1/exec/stream").await.problem(ProblemKind::BadRequest);
    let huge = vec![b' '; 17 << 20];
    client.ask(Method::POST, "/v1/agents", huge).await.problem(ProblemKind::TooLarge);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn tcp_needs_the_token_and_the_unix_socket_its_owner() {
    use std::os::unix::fs::MetadataExt as _;
    let place = Place::new();
    let mut config = place.config();
    config.listen = Some("127.0.0.1:0".parse().unwrap());
    let ark = place.start_with(config).await;
    let address = ark.daemon.tcp_address().unwrap();
    let socket = std::fs::metadata(place.run().api_socket()).unwrap();
    assert_eq!(socket.mode() & 0o777, 0o600);

    let token = std::fs::read_to_string(place.path("state/token")).unwrap();
    for wrong in [None, Some(String::new()), Some("x".to_owned()), Some(token[1..].to_owned())] {
        let reply = Client::Tcp(address, wrong).get("/v1/health").await;
        let (error, problem) = error(&reply);
        assert_eq!((problem.kind, &problem.detail), (ProblemKind::Unauthorized, &error.message));
        assert!(
            reply.response.headers().contains_key("www-authenticate") && !problem.detail.contains(&token)
        );
    }
    Client::Tcp(address, None).get("/v2").await.problem(ProblemKind::Unauthorized);
    let client = Client::Tcp(address, Some(token));
    assert_eq!(client.get("/v1/health").await.status(), StatusCode::OK);
    client.create("a1", "base").await;
    assert_eq!(client.exec("a1", &json!({ "argv": ["true"] })).await.status(), StatusCode::OK);
    ark.daemon.shut_down().await;
}

//! What an agent may use of the platform: what its creator allowed, and nothing else.

use std::time::Duration;

use ark_types::agent::{Agent, AgentList};
use ark_types::permission::Permission;
use ark_types::problem::ProblemKind;
use ark_types::snapshot::Forked;
use hyper::{Method, StatusCode};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use crate::harness::{Client, Place, eventually, started};
use crate::inference::error;
use crate::pool::{vmms, with_pool};

/// Code of the JSON-RPC error of an agent that may not.
const NOT_ALLOWED: i64 = -32015;

async fn create(client: &Client, name: &str, allow: &Value) -> Agent {
    let body = json!({ "name": name, "image": "base", "memory_mib": 64, "allow": allow });
    let reply = client.post("/v1/agents", &body).await;
    assert_eq!(reply.status(), StatusCode::CREATED, "{:?}", reply.body);
    reply.json()
}

/// What a program of `agent` hears when it sends `text` to the host's port for MCP and has nothing more to say.
async fn mcp(place: &Place, agent: &Agent, text: &[u8]) -> String {
    let socket = place.run().agent(&agent.id).0.join("v.sock_1031");
    let mut stream = UnixStream::connect(socket).await.unwrap();
    stream.write_all(text).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut said = Vec::new();
    // However the stream ends, what was said counts.
    while let Ok(1..) = stream.read_buf(&mut said).await {}
    String::from_utf8(said).unwrap()
}

/// The host's port for HTTP, as a program of `agent` finds it.
fn openai(place: &Place, agent: &Agent) -> Client {
    Client::unix(&place.run().agent(&agent.id).0.join("v.sock_1032"))
}

const INITIALIZE: &[u8] = b"{\"jsonrpc\":\"2.0\",\"id\":3,\"method\":\"initialize\",\"params\":{}}\n";

/// Whether a program of `agent` may have models say something, at both ports.
async fn may_infer(place: &Place, agent: &Agent) -> bool {
    let said = mcp(place, agent, INITIALIZE).await;
    let by_mcp = !said.contains(&NOT_ALLOWED.to_string());
    let by_http = openai(place, agent).get("/v1/models").await.status() != StatusCode::FORBIDDEN;
    assert_eq!(by_mcp, by_http, "{said}");
    by_mcp
}

#[tokio::test]
async fn an_agent_that_is_allowed_nothing_is_refused_in_a_sentence_at_both_ports() {
    let place = Place::new();
    let ark = place.start().await;
    let agent = ark.client.create("a1", "base").await;
    assert!(agent.allow.is_empty());

    let said: Value = serde_json::from_str(&mcp(&place, &agent, INITIALIZE).await).unwrap();
    assert_eq!((&said["id"], &said["error"]["code"]), (&json!(3), &json!(NOT_ALLOWED)));
    let message = said["error"]["message"].as_str().unwrap();
    assert!(message.contains("a1") && message.contains("--allow inference"), "{message}");
    for hostile in [&b""[..], b"\xff\n", b"{\n", &[b'x'; 100_000]] {
        let said: Value = serde_json::from_str(&mcp(&place, &agent, hostile).await).unwrap();
        assert_eq!((&said["id"], &said["error"]["code"]), (&Value::Null, &json!(NOT_ALLOWED)));
    }

    let openai = openai(&place, &agent);
    for (method, path) in
        [(Method::GET, "/v1/models"), (Method::POST, "/v1/chat/completions"), (Method::GET, "/v1/agents")]
    {
        let (error, problem) = error(&openai.ask(method, path, "{}").await);
        assert_eq!((problem.kind, problem.detail.as_str()), (ProblemKind::NotAllowed, message));
        assert_eq!((error.kind.as_str(), error.message.as_str()), ("permission_error", message));
    }
    // The reply waits for the whole request, so that the connection lasts for the next one.
    let mut stream = openai.connect().await;
    for _ in 0..2 {
        let (head, mut said) =
            (b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{", Vec::new());
        stream.write_all(head).await.unwrap();
        let early = tokio::time::timeout(Duration::from_millis(100), stream.read_buf(&mut said)).await;
        assert!(early.is_err(), "{early:?}");
        stream.write_all(b"}").await.unwrap();
        while !said.ends_with(b"}}") {
            assert_ne!(stream.read_buf(&mut said).await.unwrap(), 0, "it ends early");
        }
        assert!(said.starts_with(b"HTTP/1.1 403 "), "{said:?}");
    }
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn what_is_allowed_is_told_lasts_and_is_inherited_by_nobody() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let all = create(&client, "all", &json!(["inference"])).await;
    let one = create(&client, "one", &json!(["inference=router"])).await;
    assert_eq!(all.allow, [Permission::Inference(None)]);
    assert_eq!(one.allow, [Permission::Inference("router".parse().ok())]);
    assert!(may_infer(&place, &all).await && may_infer(&place, &one).await);

    // Forks and what is restored have what their own request names.
    let fork = async |body: Value| -> Agent {
        let mut forked: Forked = client.post("/v1/agents/all/fork", &body).await.json();
        forked.agents.pop().unwrap()
    };
    let (bare, given) = (fork(json!({})).await, fork(json!({ "allow": ["inference"] })).await);
    assert!(!may_infer(&place, &bare).await && may_infer(&place, &given).await);
    let taken = client.post("/v1/agents/all/snapshots", &json!({ "name": "s" })).await;
    assert_eq!(taken.status(), StatusCode::CREATED);
    for (name, allow, may) in [("b", json!([]), false), ("c", json!(["inference"]), true)] {
        let body = json!({ "name": name, "allow": allow });
        let restored: Agent = client.post("/v1/snapshots/s/restore", &body).await.json();
        assert_eq!(may_infer(&place, &restored).await, may);
    }

    // The next arkd knows, too.
    first.end(Signal::SIGKILL);
    let (_second, client) = started(&place, &[]).await;
    for (before, may) in [(&all, true), (&one, true), (&bare, false)] {
        let now: Agent = client.get(&format!("/v1/agents/{}", before.id)).await.json();
        assert_eq!(now.allow, before.allow);
        // It answers before it has taken up what its agents' programs talk to; this port is the last.
        let socket = place.run().agent(&now.id).0.join("v.sock_1032");
        eventually("it listens", async || UnixStream::connect(&socket).await.is_ok()).await;
        assert_eq!(may_infer(&place, &now).await, may);
    }
}

#[tokio::test]
async fn an_agent_of_the_pool_may_what_its_claim_says() {
    let place = Place::new();
    let ark = place.start_with(with_pool(&place, 0, 1)).await;
    let client = &ark.client;
    let create = async |name: &str, allow: Value| -> Agent {
        client.post("/v1/agents", &json!({ "name": name, "image": "base", "allow": allow })).await.json()
    };
    let mut known = vec![create("a0", json!([])).await.vmm_pid];
    for (name, allow, may) in [("a1", json!(["inference"]), true), ("a2", json!([]), false)] {
        eventually("one stands by", async || {
            let pools: Value = client.get("/v1/pools").await.json();
            pools["pools"][0]["standbys"] == 1
        })
        .await;
        let waiting = vmms(&place).into_iter().map(Some).find(|pid| !known.contains(pid)).unwrap();
        let agent = create(name, allow).await;
        assert_eq!(agent.vmm_pid, waiting, "it is the one that stood by");
        assert_eq!(may_infer(&place, &agent).await, may, "{name}");
        known.push(agent.vmm_pid);
    }
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn replicas_and_attempts_may_what_their_service_or_task_may() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let body =
        json!({ "name": "s", "replicas": 1, "image": "base", "memory_mib": 64, "allow": ["inference"] });
    assert_eq!(client.post("/v1/services", &body).await.status(), StatusCode::CREATED);
    let command = json!({ "argv": ["cat"] });
    let body = json!({ "image": "base", "memory_mib": 64, "allow": ["inference=m"], "command": command });
    let reply = client.post("/v1/tasks", &body).await;
    assert_eq!(reply.status(), StatusCode::CREATED, "{:?}", reply.body);
    for allow in ["inference", "inference=m"] {
        eventually(allow, async || {
            let all: AgentList = client.get("/v1/agents?all=true").await.json();
            all.agents.iter().any(|agent| agent.allow.iter().map(ToString::to_string).eq([allow]))
        })
        .await;
    }
    let many = json!(vec!["inference"; 65]);
    let body = json!({ "image": "base", "allow": many, "command": command });
    client.post("/v1/tasks", &body).await.problem(ProblemKind::InvalidValue);
    let body = json!({ "name": "t", "replicas": 1, "image": "base", "allow": many });
    client.post("/v1/services", &body).await.problem(ProblemKind::InvalidValue);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn what_cannot_be_allowed_is_refused_with_what_can() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let agent = client.create("a1", "base").await;
    assert!(agent.allow.is_empty());
    for wrong in [json!(["network"]), json!(["inference="]), json!(["inference=A"]), json!([""])] {
        let body = json!({ "image": "base", "memory_mib": 64, "allow": wrong });
        let problem = client.post("/v1/agents", &body).await.problem(ProblemKind::InvalidValue);
        assert!(problem.detail.contains("inference=MODEL"), "{}", problem.detail);
        let problem = client.post("/v1/agents/a1/fork", &json!({ "allow": wrong })).await;
        assert!(problem.problem(ProblemKind::InvalidValue).detail.contains("inference=MODEL"));
    }
    let many = json!(vec!["inference"; 65]);
    let body = json!({ "image": "base", "memory_mib": 64, "allow": many });
    let detail = client.post("/v1/agents", &body).await.problem(ProblemKind::InvalidValue).detail;
    assert!(detail.contains("at most 64"), "{detail}");
    let reply = client.post("/v1/agents/a1/fork", &json!({ "allow": many })).await;
    assert!(reply.problem(ProblemKind::InvalidValue).detail.contains("at most 64"));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn connections_end_with_the_vmm_and_are_bounded_in_number() {
    let place = Place::new();
    let ark = place.start().await;
    let agent = ark.client.create("a1", "base").await;
    let socket = place.run().agent(&agent.id).0.join("v.sock_1032");
    let mut open = Vec::new();
    for _ in 0..70 {
        open.push(UnixStream::connect(&socket).await.unwrap());
    }
    // The last ones wait for the first to end.
    let request = b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n";
    let mut late = open.pop().unwrap();
    late.write_all(request).await.unwrap();
    let mut byte = [0];
    assert_eq!(late.try_read(&mut byte).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    open.truncate(5);
    late.read_exact(&mut byte).await.unwrap();
    assert_eq!(ark.client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    for mut stream in open {
        assert!(matches!(stream.read(&mut byte).await, Ok(0) | Err(_)));
    }
    ark.daemon.shut_down().await;
}

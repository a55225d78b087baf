//! Models: added, listed, served, removed; and each kind of file that is none.

use std::os::unix::fs::PermissionsExt as _;

use ark_gguf::synthetic::Synthetic;
use ark_types::agent::{Agent, AgentList};
use ark_types::model::{Model, ModelList, ModelState};
use ark_types::problem::ProblemKind;
use ark_types::service::Service;
use ark_types::template::Template;
use hyper::{Method, StatusCode};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

use crate::harness::{Client, Place, Reply, eventually, started};

/// A small model, of its own for each `seed`.
fn gguf(seed: u64) -> Vec<u8> {
    Synthetic { seed, ..Synthetic::default() }.to_bytes()
}

async fn put(client: &Client, target: &str, body: Vec<u8>) -> Reply {
    client.ask(Method::PUT, &format!("/v1/models/{target}"), body).await
}

async fn add(client: &Client, name: &str, seed: u64) -> Model {
    let reply = put(client, name, gguf(seed)).await;
    assert_eq!(reply.status(), StatusCode::CREATED, "{:?}", reply.body);
    reply.json()
}

async fn list(client: &Client) -> Vec<Model> {
    client.get("/v1/models").await.json::<ModelList>().data
}

async fn state(client: &Client, name: &str) -> ModelState {
    client.get(&format!("/v1/models/{name}")).await.json::<Model>().state
}

async fn replicas(client: &Client) -> Vec<Agent> {
    let agents = client.get("/v1/agents").await.json::<AgentList>().agents;
    agents.into_iter().filter(|agent| agent.name.as_ref().starts_with("model-")).collect()
}

/// What is in the directory of models.
fn dirs(place: &Place) -> Vec<String> {
    let entries = std::fs::read_dir(place.state().models()).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// A place whose release brings the model `router`.
fn with_router() -> Place {
    let place = Place::new();
    let models = place.config().assets.models();
    std::fs::create_dir_all(&models).unwrap();
    std::fs::write(models.join("router.gguf"), gguf(7)).unwrap();
    place
}

/// What the server in `agent` says to `tokenize`.
async fn tokenize(place: &Place, agent: &Agent) -> Value {
    let stream = UnixStream::connect(place.run().agent(&agent.id).vsock()).await.unwrap();
    let mut stream = BufReader::new(stream);
    let call = json!({ "jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": { "name": "tokenize", "arguments": { "text": "abc" } } });
    stream.get_mut().write_all(format!("CONNECT 1030\n{call}\n").as_bytes()).await.unwrap();
    let mut lines = stream.lines();
    while let Some(line) = lines.next_line().await.unwrap() {
        if let Ok(answer) = serde_json::from_str::<Value>(&line)
            && answer["id"] == 7
        {
            return answer["result"]["structuredContent"].clone();
        }
    }
    panic!("no answer");
}

#[tokio::test]
async fn a_model_is_added_once_listed_as_openai_clients_expect_and_removed() {
    let place = with_router();
    let ark = place.start().await;
    let client = &ark.client;
    let added = add(client, "small", 1).await;
    assert_eq!((added.context, added.architecture.as_str(), added.bundled), (2048, "llama", false));
    assert_eq!((added.bytes, added.state), (gguf(1).len() as u64, ModelState::Idle));
    assert!(added.memory_mib > 96 && added.digest.len() == 71, "{added:?}");
    let again = put(client, "small", gguf(1)).await;
    assert_eq!((again.status(), again.json::<Model>()), (StatusCode::OK, added.clone()));
    for (target, body) in [("small", gguf(2)), ("small", vec![0; 9]), ("small?context=64", gguf(1))] {
        let refused = put(client, target, body).await.problem(ProblemKind::NameTaken);
        assert!(refused.detail.contains("ark model rm small"), "{refused:?}");
    }
    let short: Model = put(client, "short?context=64", gguf(1)).await.json();
    assert_eq!(short.context, 64);
    assert!(short.memory_mib <= added.memory_mib);

    let listed: Value = client.get("/v1/models").await.json();
    assert_eq!(listed["object"], "list");
    let ids: Vec<&str> =
        listed["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["router", "short", "small"]);
    assert_eq!(
        (&listed["data"][0]["owned_by"], &listed["data"][0]["object"]),
        (&json!("ark"), &json!("model"))
    );
    let mode = |path: std::path::PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(place.state().models()), 0o700);
    assert_eq!(mode(place.state().models().join("small/model.gguf")), 0o600);

    for refused in [put(client, "router", gguf(1)).await, client.delete("/v1/models/router").await] {
        refused.problem(ProblemKind::ModelBundled);
    }
    for name in ["nothing", "No.Name"] {
        let unknown = client.get(&format!("/v1/models/{name}")).await.problem(ProblemKind::ModelNotFound);
        assert!(unknown.detail.contains("there are: router, short, small"), "{unknown:?}");
        client.delete(&format!("/v1/models/{name}")).await.problem(ProblemKind::ModelNotFound);
    }
    for name in ["small", "short"] {
        assert_eq!(client.delete(&format!("/v1/models/{name}")).await.status(), StatusCode::NO_CONTENT);
    }
    assert_eq!((list(client).await.len(), dirs(&place)), (1, vec![]));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn each_file_that_cannot_be_served_is_refused_and_leaves_nothing() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let (good, mut version, mut kind) = (gguf(1), gguf(1), gguf(1));
    version[4] = 99;
    let at = kind.windows(5).position(|w| w == b"llama").unwrap();
    kind[at..at + 5].copy_from_slice(b"mamba");
    let mut absurd = good.clone();
    absurd[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    let cases = [
        (b"no model at all".to_vec(), "not a GGUF file"),
        (Vec::new(), "truncated"),
        (b"GG".to_vec(), "truncated"),
        (good[..good.len() - 1].to_vec(), "truncated"),
        (good[..good.len() / 2].to_vec(), "truncated"),
        (version, "version 99"),
        (absurd, "at most"),
        (kind, "\"mamba\" is not supported"),
    ];
    for (body, why) in cases {
        let refused = put(client, "bad", body).await.problem(ProblemKind::ModelUnusable);
        assert!(refused.detail.contains(why) && refused.detail.contains("the model bad"), "{refused:?}");
    }
    for context in ["0", "31", "2049", "99999999"] {
        let target = format!("bad?context={context}");
        let refused = put(client, &target, good.clone()).await.problem(ProblemKind::InvalidValue);
        assert!(refused.detail.contains("from 32 to 2048"), "{refused:?}");
    }
    put(client, "bad?context=x", good.clone()).await.problem(ProblemKind::BadRequest);
    put(client, "bad?contxt=1", good.clone()).await.problem(ProblemKind::BadRequest);
    let named = put(client, "Qwen2.5", good.clone()).await.problem(ProblemKind::InvalidValue);
    assert!(named.detail.contains("use 1 to 48"), "{named:?}");
    assert_eq!((list(client).await, dirs(&place)), (vec![], vec![]));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn what_is_too_large_is_refused_before_it_was_sent() {
    let place = Place::new();
    let ark = place.start().await;
    // Says how much comes, and sends no more than the beginning.
    let begin = async |length: u64, body: &[u8]| {
        let mut stream = UnixStream::connect(place.run().api_socket()).await.unwrap();
        let head = format!("PUT /v1/models/big HTTP/1.1\r\nhost: ark\r\ncontent-length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(body).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        reply
    };
    let reply = begin((64 << 30) + 1, b"GGUF").await;
    assert!(reply.starts_with("HTTP/1.1 413") && reply.contains("more than 64 GiB"), "{reply}");
    let reply = begin(32 << 30, b"Once upon a time").await;
    assert!(reply.starts_with("HTTP/1.1 422") || reply.starts_with("HTTP/1.1 507"), "{reply}");
    // A header that is whole and promises what no host has.
    let huge = Synthetic { context: 1 << 20, layers: 64, kv_heads: 4, ..Synthetic::default() }.to_bytes();
    let reply = ark.client.ask(Method::PUT, "/v1/models/big?context=1048576", huge).await;
    let refused = reply.problem(ProblemKind::ModelTooLarge);
    assert!(refused.detail.contains("8 sessions of 1048576 tokens"), "{refused:?}");
    assert_eq!(dirs(&place), Vec::<String>::new());
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_nothing_and_neither_does_one_of_an_earlier_arkd() {
    let place = Place::new();
    let left = place.state().models().join(".passing-0123");
    std::fs::create_dir_all(&left).unwrap();
    std::fs::write(left.join("model.gguf"), "half").unwrap();
    let ark = place.start().await;
    assert_eq!(dirs(&place), Vec::<String>::new());
    let whole = gguf(1);
    let mut stream = UnixStream::connect(place.run().api_socket()).await.unwrap();
    let head =
        format!("PUT /v1/models/half HTTP/1.1\r\nhost: ark\r\ncontent-length: {}\r\n\r\n", whole.len());
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&whole[..whole.len() / 2]).await.unwrap();
    eventually("the upload began", async || dirs(&place).len() == 1).await;
    assert_eq!(list(&ark.client).await, []);
    drop(stream);
    eventually("nothing is left of it", async || dirs(&place).is_empty()).await;
    add(&ark.client, "half", 1).await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_model_is_served_by_forks_of_one_template_and_its_server_is_replaced() {
    let place = with_router();
    let ark = place.start().await;
    let client = &ark.client;
    assert_eq!(state(client, "router").await, ModelState::Idle);
    // One builds, all have it.
    let nothing = json!({});
    let loads = (0..4).map(|_| client.post("/v1/models/router/load", &nothing));
    for reply in futures_util::future::join_all(loads).await {
        assert_eq!(reply.status(), StatusCode::OK, "{:?}", reply.body);
    }
    eventually("it is ready", async || state(client, "router").await == ModelState::Ready).await;
    let template: Template = client.get("/v1/templates/model-router").await.json();
    assert_eq!(template.model.as_ref().map(AsRef::as_ref), Some("router"));
    assert_eq!((template.image.as_ref(), template.warm), ("inference", None));
    let service: Service = client.get("/v1/services/model-router").await.json();
    assert_eq!((service.spec.owner.as_ref(), service.spec.replicas, service.ready), ("system", 1, 1));
    let [replica] = replicas(client).await.try_into().unwrap();
    assert_eq!(tokenize(&place, &replica).await, json!({ "model": "router", "count": 3 }));

    // So does any other fork of the template, and one of that.
    let body = json!({ "name": "own", "template": "model-router" });
    let own: Agent = client.post("/v1/agents", &body).await.json();
    assert_eq!(tokenize(&place, &own).await["model"], "router");
    client.post("/v1/agents/own/fork", &json!({ "count": 1 })).await;
    let fork: Agent = client.get("/v1/agents/own-1").await.json();
    assert_eq!(tokenize(&place, &fork).await["model"], "router");
    client.post("/v1/agents/own/pause", &json!({})).await;
    let resumed: Agent = client.post("/v1/agents/own/resume", &json!({})).await.json();
    assert_eq!(tokenize(&place, &resumed).await["model"], "router");

    // A replica whose server ends is replaced.
    let kill = json!({ "argv": ["/bin/sh", "-c", "kill -9 $(pgrep -P $PPID -x sleep)"] });
    client.exec(replica.name.as_ref(), &kill).await;
    eventually("another one serves it", async || match replicas(client).await.as_slice() {
        [other] => other.id != replica.id && state(client, "router").await == ModelState::Ready,
        _ => false,
    })
    .await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_model_goes_with_its_service_and_template_unless_others_need_them() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    add(client, "small", 1).await;
    client.post("/v1/models/small/load", &json!({})).await;
    eventually("it is ready", async || state(client, "small").await == ModelState::Ready).await;
    client.post("/v1/agents", &json!({ "name": "own", "template": "model-small" })).await;
    let refused = client.delete("/v1/models/small").await.problem(ProblemKind::InUse);
    assert!(refused.detail.contains("1 living agent"), "{refused:?}");
    assert_eq!(state(client, "small").await, ModelState::Idle, "it is there, and served no more");
    client.delete("/v1/agents/own").await;
    assert_eq!(client.delete("/v1/models/small").await.status(), StatusCode::NO_CONTENT);
    client.get("/v1/templates/model-small").await.problem(ProblemKind::TemplateNotFound);
    client.get("/v1/services/model-small").await.problem(ProblemKind::ServiceNotFound);
    assert_eq!((replicas(client).await.len(), dirs(&place)), (0, vec![]));
    client.post("/v1/models/small/load", &json!({})).await.problem(ProblemKind::ModelNotFound);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn the_next_arkd_goes_on_with_what_is_served() {
    let place = with_router();
    let (mut first, client) = started(&place, &[]).await;
    client.post("/v1/models/router/load", &json!({})).await;
    eventually("it is ready", async || state(&client, "router").await == ModelState::Ready).await;
    let [replica] = replicas(&client).await.try_into().unwrap();
    first.end(Signal::SIGKILL);
    let (_second, client) = started(&place, &[]).await;
    eventually("it is ready again", async || state(&client, "router").await == ModelState::Ready).await;
    let [same] = replicas(&client).await.try_into().unwrap();
    assert_eq!((&same.id, tokenize(&place, &same).await["model"].as_str()), (&replica.id, Some("router")));
}

#[tokio::test]
async fn a_server_that_does_not_come_up_is_told_of_and_nothing_is_left() {
    let place = with_router();
    let ark = place.start().await;
    let client = &ark.client;
    let build = async |image: &str, more: Value| {
        let mut body = json!({ "name": "t", "image": image, "memory_mib": 64, "model": "router" });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        client.post("/v1/templates", &body).await
    };
    let failed = build("inference-fails", json!({})).await.problem(ProblemKind::TemplateFailed);
    assert!(failed.detail.contains("it wrote last: llama.cpp cannot load the model"), "{failed:?}");
    let missing = build("base", json!({})).await.problem(ProblemKind::TemplateFailed);
    assert!(missing.detail.contains("there is no program ark-inference"), "{missing:?}");
    build("inference", json!({ "warm": "x=1" })).await.problem(ProblemKind::InvalidValue);
    build("inference", json!({ "model": "nothing" })).await.problem(ProblemKind::ModelNotFound);
    let reserved =
        json!({ "name": "model-router", "image": "inference", "memory_mib": 64, "model": "router" });
    client.post("/v1/templates", &reserved).await.problem(ProblemKind::InvalidValue);
    assert_eq!(place.agent_dirs(), 0);
    assert_eq!(build("inference", json!({})).await.status(), StatusCode::CREATED);
    // A service of somebody else that has the name is not taken for the model's.
    let other = json!({ "name": "model-router", "replicas": 0, "image": "base" });
    assert_eq!(client.post("/v1/services", &other).await.status(), StatusCode::CREATED);
    let taken = client.post("/v1/models/router/load", &json!({})).await.problem(ProblemKind::NameTaken);
    assert!(taken.detail.contains("ark service rm model-router"), "{taken:?}");
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_file_that_changed_on_disk_is_noticed() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    add(client, "small", 1).await;
    let body = json!({ "name": "t", "image": "inference", "memory_mib": 64, "model": "small" });
    assert_eq!(client.post("/v1/templates", &body).await.status(), StatusCode::CREATED);
    client.post("/v1/agents", &json!({ "name": "a1", "template": "t" })).await;
    client.post("/v1/agents/a1/snapshots", &json!({ "name": "s1" })).await;
    client.delete("/v1/agents/a1").await;
    let file = place.state().models().join("small/model.gguf");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    for target in ["/v1/models/small/load", "/v1/snapshots/s1/restore"] {
        let refused = client.post(target, &json!({})).await.problem(ProblemKind::ModelUnusable);
        assert!(refused.detail.contains("changed or damaged on disk"), "{refused:?}");
    }
    // The same bytes, written again, are the same model.
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    let restored: Agent = client.post("/v1/snapshots/s1/restore", &json!({ "name": "a2" })).await.json();
    assert_eq!(tokenize(&place, &restored).await["model"], "small");
    std::fs::write(&file, "GGUF").unwrap();
    client.get("/v1/models/small").await.problem(ProblemKind::ModelUnusable);
    assert_eq!(list(client).await, []);
    client.delete("/v1/agents/a2").await;
    assert_eq!(client.delete("/v1/models/small").await.status(), StatusCode::NO_CONTENT);
    // Another one of that name is not what the snapshot was taken with.
    add(client, "small", 2).await;
    let other =
        client.post("/v1/snapshots/s1/restore", &json!({})).await.problem(ProblemKind::SnapshotUnusable);
    assert!(other.detail.contains("needs the model small as it was"), "{other:?}");
    ark.daemon.shut_down().await;
}

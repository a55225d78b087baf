//! Calls of models over the host's API: whole, streamed, over MCP; what fails, and who is told of it. The VMs' server is a fake.

use std::time::Duration;

use ark_gguf::synthetic::Synthetic;
use ark_types::event::{Event, EventList, InferenceCall};
use ark_types::openai::{ApiError, Completion, EmbeddingList, Vector};
use ark_types::problem::{PROBLEM_JSON, Problem, ProblemKind};
use ark_types::service::Service;
use arkd::config::Config;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::header::{ACCEPT, CONTENT_TYPE};
use hyper::{Method, StatusCode};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{Ark, Client, Place, Reply, eventually, signal};

/// An `arkd` of `config` that serves the model `m`, and no other, in `replicas` VMs.
pub(crate) async fn serving(place: &Place, config: Config, replicas: u32) -> Ark {
    let ark = place.start_with(config).await;
    serve(&ark.client, replicas).await;
    ark
}

/// Has the model `m` served in `replicas` VMs.
pub(crate) async fn serve(client: &Client, replicas: u32) {
    let added = client.ask(Method::PUT, "/v1/models/m", Synthetic::default().to_bytes()).await;
    assert_eq!(added.status(), StatusCode::CREATED, "{:?}", added.body);
    let loaded = client.post("/v1/models/m/load", &json!({})).await;
    assert_eq!(loaded.status(), StatusCode::OK, "{:?}", loaded.body);
    let scale = json!({ "replicas": replicas }).to_string();
    let scaled = client.ask(Method::PATCH, "/v1/services/model-m", scale).await;
    assert_eq!(scaled.status(), StatusCode::OK, "{:?}", scaled.body);
    eventually("the model is served", async || served(client).await.ready == replicas).await;
}

pub(crate) async fn served(client: &Client) -> Service {
    client.get("/v1/services/model-m").await.json()
}

/// A chat whose only message is `prompt`, with the fields of `more`.
pub(crate) fn chat(prompt: &str, more: &Value) -> Value {
    let mut request = json!({ "model": "m", "messages": [{ "role": "user", "content": prompt }] });
    request.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
    request
}

pub(crate) async fn ask(client: &Client, prompt: &str) -> Reply {
    client.post("/v1/chat/completions", &chat(prompt, &json!({}))).await
}

/// What the model said to `prompt`.
pub(crate) async fn said(client: &Client, prompt: &str) -> String {
    let reply = ask(client, prompt).await;
    assert_eq!(reply.status(), StatusCode::OK, "{:?}", reply.body);
    let completion: Completion = reply.json();
    completion.choices[0].message.clone().unwrap().content.unwrap()
}

/// The error of a reply, in the form that clients of this API read, which is also a problem.
pub(crate) fn error(reply: &Reply) -> (ApiError, Problem) {
    let body: Value = reply.json();
    assert_eq!(reply.response.headers()[CONTENT_TYPE], PROBLEM_JSON);
    let (error, problem) = (body["error"].clone(), serde_json::from_value::<Problem>(body).unwrap());
    assert_eq!(reply.status().as_u16(), problem.status);
    (serde_json::from_value(error).unwrap(), problem)
}

/// Server-sent events as they come.
struct Events {
    body: Incoming,
    text: String,
}

impl Events {
    async fn of(client: &Client, path: &str, request: &Value) -> Self {
        let mut response = client.request(Method::POST, path, request.to_string());
        response.headers_mut().insert(ACCEPT, "application/json, text/event-stream".parse().unwrap());
        let response = client.send(response).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()[CONTENT_TYPE], "text/event-stream");
        Self { body: response.into_body(), text: String::new() }
    }

    /// The data of the next one; none at the end.
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let data: Option<String> =
                    event.lines().find_map(|line| line.strip_prefix("data:")).map(|d| d.trim().to_owned());
                self.text = rest.to_owned();
                match data.filter(|data| !data.is_empty()) {
                    Some(data) => return Some(data),
                    None => continue,
                }
            }
            let frame = tokio::time::timeout(Duration::from_secs(60), self.body.frame()).await.unwrap()?;
            let data: Bytes = frame.unwrap().into_data().unwrap_or_default();
            self.text.push_str(std::str::from_utf8(&data).unwrap());
        }
    }

    async fn rest(mut self) -> Vec<String> {
        let mut all = Vec::new();
        while let Some(data) = self.next().await {
            all.push(data);
        }
        all
    }
}

/// The calls that the owner's stream tells of, once that are `enough`: a call is recorded when it is over, and no reply waits for it.
pub(crate) async fn audited(
    client: &Client,
    owner: &str,
    enough: impl Fn(&[InferenceCall]) -> bool,
) -> Vec<InferenceCall> {
    let call = |event| match event {
        Event::InferenceCalled { call } => *call,
        other => panic!("{other:?}"),
    };
    let path = format!("/v1/events?stream=owner/{owner}&type=inference.called&limit=1000");
    let mut calls = Vec::new();
    eventually("the calls are recorded", async || {
        let list: EventList = client.get(&path).await.json();
        calls = list.events.into_iter().map(|recorded| call(recorded.event)).collect();
        enough(&calls)
    })
    .await;
    calls
}

#[tokio::test]
async fn a_chat_is_answered_whole_or_as_it_is_said() {
    let place = Place::new();
    let ark = serving(&place, place.config(), 1).await;
    let client = &ark.client;
    let reply = ask(client, "say 3").await;
    let whole: Completion = reply.json();
    assert_eq!((whole.object.as_str(), whole.model.as_str()), ("chat.completion", "m"));
    let message = whole.choices[0].message.clone().unwrap();
    assert_eq!((message.role.as_deref(), message.content.as_deref()), (Some("assistant"), Some("1 2 3 ")));
    assert_eq!(whole.choices[0].finish_reason.as_deref(), Some("stop"));
    let usage = whole.usage.unwrap();
    assert_eq!((usage.prompt_tokens, usage.completion_tokens, usage.total_tokens), (3, 3, 6));
    assert_eq!(usage.prompt_tokens_details.cached_tokens, 2);

    let more = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let mut told = Events::of(client, "/v1/chat/completions", &chat("say 3", &more)).await.rest().await;
    assert_eq!(told.pop().as_deref(), Some("[DONE]"));
    let chunks: Vec<Completion> = told.iter().map(|data| serde_json::from_str(data).unwrap()).collect();
    assert!(chunks.iter().all(|chunk| chunk.object == "chat.completion.chunk" && chunk.id == chunks[0].id));
    let delta = |chunk: &Completion| chunk.choices.first().and_then(|choice| choice.delta.clone());
    assert_eq!(delta(&chunks[0]).unwrap().role.as_deref(), Some("assistant"));
    let text: String = chunks.iter().filter_map(|chunk| delta(chunk)?.content).collect();
    assert_eq!(text, "1 2 3 ");
    let ends: Vec<_> = chunks.iter().filter_map(|c| c.choices.first()?.finish_reason.clone()).collect();
    assert_eq!(ends, ["stop"]);
    assert_eq!(chunks.last().unwrap().usage.map(|usage| usage.total_tokens), Some(6));

    let tools = json!([{ "type": "function", "function": { "name": "f" } }]);
    let called: Completion =
        client.post("/v1/chat/completions", &chat("say 1", &json!({ "tools": tools }))).await.json();
    let message = called.choices[0].message.clone().unwrap();
    assert_eq!(message.tool_calls.unwrap()[0].function.arguments, r#"{"x":1}"#);
    assert_eq!(called.choices[0].finish_reason.as_deref(), Some("tool_calls"));

    let calls = audited(client, "default", |calls| calls.len() == 3).await;
    assert!(calls.iter().all(|call| call.outcome == "ok" && call.model == "m" && call.tool == "chat"));
    assert_eq!((calls[0].prompt_tokens, calls[0].cached_tokens, calls[0].completion_tokens), (3, 2, 3));
    assert_eq!((calls[0].reply_bytes, &calls[0].reply), (6, &None));
    assert_eq!(calls[0].reply_sha256, calls[1].reply_sha256);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn texts_are_gone_on_with_and_get_vectors() {
    let place = Place::new();
    let ark = serving(&place, place.config(), 1).await;
    let client = &ark.client;
    let request = json!({ "model": "m", "prompt": "say 2", "temperature": 0, "stop": ["x"] });
    let whole: Completion = client.post("/v1/completions", &request).await.json();
    assert_eq!((whole.object.as_str(), whole.choices[0].text.as_deref()), ("text_completion", Some("1 2 ")));
    let request = json!({ "model": "m", "prompt": ["say 2"], "stream": true });
    let mut told = Events::of(client, "/v1/completions", &request).await.rest().await;
    assert_eq!(told.pop().as_deref(), Some("[DONE]"));
    let text: String = told
        .iter()
        .filter_map(|data| serde_json::from_str::<Completion>(data).unwrap().choices.remove(0).text)
        .collect();
    assert_eq!(text, "1 2 ");

    let list: EmbeddingList =
        client.post("/v1/embeddings", &json!({ "model": "m", "input": ["a", "b"] })).await.json();
    assert_eq!(list.data.len(), 2);
    assert_eq!(list.data[1].embedding, Vector::Numbers(vec![0.5, -2.0]));
    let request = json!({ "model": "m", "input": "a", "encoding_format": "base64" });
    let list: EmbeddingList = client.post("/v1/embeddings", &request).await.json();
    assert_eq!(list.data[0].embedding, Vector::Base64("AAAAPwAAAMA=".to_owned()));
    let request = json!({ "model": "m", "input": "a", "dimensions": 3 });
    assert_eq!(error(&client.post("/v1/embeddings", &request).await).1.kind, ProblemKind::BadRequest);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn what_a_client_asks_reaches_the_model_with_whose_it_is() {
    let place = Place::new();
    let mut config = place.config();
    config.inference = toml::from_str("texts = true").unwrap();
    let ark = serving(&place, config, 1).await;
    let more = json!({ "temperature": 0.0, "top_k": 3, "seed": 5, "max_tokens": 9, "response_format": { "type": "json_object" } });
    let mut request =
        ark.client.request(Method::POST, "/v1/chat/completions", chat("echo", &more).to_string());
    request.headers_mut().insert("ark-owner", "team".parse().unwrap());
    let reply = ark.client.reply(request).await;
    let completion: Completion = reply.json();
    let text = completion.choices[0].message.clone().unwrap().content.unwrap();
    let told: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(told["meta"]["noa-ark/owner"], "team");
    let sampling = json!({ "temperature": 0.0, "top_k": 3, "seed": 5, "json_schema": { "type": "object" } });
    assert_eq!(told["arguments"]["sampling"], sampling);
    assert_eq!(told["arguments"]["max_tokens"], 9);
    assert!(told["arguments"]["timeout_ms"].as_u64().unwrap() <= 600_000);
    let calls = audited(&ark.client, "team", |calls| !calls.is_empty()).await;
    assert_eq!(calls[0].reply.as_deref(), Some(text.as_str()), "the operator wants the texts");
    assert!(calls[0].prompt.as_deref().unwrap().contains("echo"));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn what_is_wrong_with_a_call_is_said() {
    let place = Place::new();
    let ark = serving(&place, place.config(), 1).await;
    let client = &ark.client;
    let chats = "/v1/chat/completions";
    let refused = async |body: String, kind: ProblemKind, code: &str| {
        let reply = client.ask(Method::POST, chats, body).await;
        let (error, problem) = error(&reply);
        assert_eq!((problem.kind, error.code.as_deref()), (kind, Some(code)), "{problem:?}");
        problem.detail
    };
    let user = json!([{ "role": "user", "content": "say 1" }]);
    let other = json!({ "model": "other", "messages": user }).to_string();
    refused(other, ProblemKind::ModelNotFound, "model_not_found").await;
    let odd = json!({ "model": "../m", "messages": user }).to_string();
    refused(odd, ProblemKind::ModelNotFound, "model_not_found").await;
    refused("{".to_owned(), ProblemKind::BadRequest, "bad_request").await;
    refused("\u{ff}".to_owned(), ProblemKind::BadRequest, "bad_request").await;
    let empty = json!({ "model": "m" }).to_string();
    assert!(refused(empty, ProblemKind::BadRequest, "bad_request").await.contains("messages"));
    let unnamed = client.post(chats, &json!({ "messages": user })).await;
    assert_eq!(unnamed.json::<Completion>().model, "m", "there is no other");
    let two = chat("say 1", &json!({ "n": 2 })).to_string();
    refused(two, ProblemKind::BadRequest, "bad_request").await;
    let long = chat("overflow", &json!({})).to_string();
    let detail = refused(long, ProblemKind::BadRequest, "context_length_exceeded").await;
    assert!(detail.contains("does not fit"), "{detail}");
    let large = chat(&"x".repeat(11 << 20), &json!({})).to_string();
    let detail = refused(large, ProblemKind::TooLarge, "too_large").await;
    assert!(detail.contains("10485760 bytes"), "{detail}");

    let mut request = client.request(Method::POST, chats, chat("say 1", &json!({})).to_string());
    request.headers_mut().insert("ark-owner", "Not An Owner".parse().unwrap());
    assert_eq!(error(&client.reply(request).await).1.kind, ProblemKind::BadRequest);
    // Nothing of all that has done any harm.
    assert_eq!(said(client, "say 1").await, "1 ");
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_call_whose_client_leaves_is_cancelled_in_the_vm() {
    let place = Place::new();
    let ark = serving(&place, place.config(), 1).await;
    let request = chat("stall", &json!({ "stream": true }));
    let mut events = Events::of(&ark.client, "/v1/chat/completions", &request).await;
    assert!(events.next().await.unwrap().contains("begun"));
    drop(events);
    eventually("the VM is told", async || {
        let seen: Value = serde_json::from_str(&said(&ark.client, "seen").await).unwrap();
        seen["cancelled"] == 1
    })
    .await;
    audited(&ark.client, "default", |calls| calls.iter().any(|call| call.outcome == "abandoned")).await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_vm_that_dies_midway_leaves_what_it_said_and_the_service_heals() {
    let place = Place::new();
    let ark = serving(&place, place.config(), 1).await;
    let reply = ask(&ark.client, "die").await;
    let (told, problem) = error(&reply);
    assert_eq!((problem.kind, told.code.as_deref()), (ProblemKind::AgentGone, Some("replica_gone")));
    assert_eq!(told.partial.as_deref(), Some("half a reply"));
    assert_eq!(said(&ark.client, "say 1").await, "1 ", "another one takes its place");

    let request = chat("die", &json!({ "stream": true }));
    let told = Events::of(&ark.client, "/v1/chat/completions", &request).await.rest().await;
    let last: Value = serde_json::from_str(told.last().unwrap()).unwrap();
    assert_eq!(last["error"]["partial"], "half a reply");
    assert!(!told.iter().any(|data| data == "[DONE]"));
    let outcomes: Vec<_> = audited(&ark.client, "default", |calls| calls.len() >= 3)
        .await
        .into_iter()
        .map(|call| (call.outcome, call.reply_bytes))
        .collect();
    let failed = ("failed".to_owned(), 12);
    assert_eq!(outcomes, [failed.clone(), ("ok".to_owned(), 2), failed]);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_call_is_made_again_elsewhere_before_anything_was_said() {
    let place = Place::new();
    let ark = serving(&place, place.config(), 2).await;
    let path = place.path("died");
    assert_eq!(said(&ark.client, &format!("die-once {}", path.display())).await, "alive");
    assert!(path.exists());
    // A VM that breaks the protocol is not asked again and again.
    let (_, problem) = error(&ask(&ark.client, "babble").await);
    assert_eq!(problem.kind, ProblemKind::AgentGone);
    assert_eq!(said(&ark.client, "say 1").await, "1 ");
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_connection_that_is_cut_is_made_anew() {
    let place = Place::new();
    let ark = serving(&place, place.config(), 1).await;
    assert_eq!(said(&ark.client, "say 1").await, "1 ");
    let replica = served(&ark.client).await.replicas[0].id.clone();
    let agent: ark_types::agent::Agent = ark.client.get(&format!("/v1/agents/{replica}")).await.json();
    signal(agent.vmm_pid.unwrap(), Signal::SIGKILL);
    assert_eq!(said(&ark.client, "say 2").await, "1 2 ");
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn clients_of_mcp_have_the_same_tools() {
    let place = Place::new();
    let ark = serving(&place, place.config(), 1).await;
    let client = &ark.client;
    let post = async |body: Value, session: Option<&str>| {
        let mut request = client.request(Method::POST, "/mcp", body.to_string());
        request.headers_mut().insert(ACCEPT, "application/json, text/event-stream".parse().unwrap());
        if let Some(session) = session {
            request.headers_mut().insert("mcp-session-id", session.parse().unwrap());
            request.headers_mut().insert("mcp-protocol-version", "2025-11-25".parse().unwrap());
        }
        client.reply(request).await
    };
    let hello = json!({ "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": { "name": "t", "version": "1" } });
    let hello = json!({ "jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello });
    let reply = post(hello, None).await;
    assert_eq!(reply.status(), StatusCode::OK, "{:?}", reply.body);
    let session = reply.response.headers()["mcp-session-id"].to_str().unwrap().to_owned();
    let session = Some(session.as_str());
    post(json!({ "jsonrpc": "2.0", "method": "notifications/initialized" }), session).await;
    let list = post(json!({ "jsonrpc": "2.0", "id": 2, "method": "tools/list" }), session).await;
    let list = String::from_utf8(list.body.to_vec()).unwrap();
    for tool in ["chat", "generate", "embed", "tokenize"] {
        assert!(list.contains(&format!("\"name\":\"{tool}\"")), "{list}");
    }
    let call = |prompt: &str, model: &str| {
        let arguments = json!({ "model": model, "messages": [{ "role": "user", "content": prompt }] });
        let params = json!({ "name": "chat", "arguments": arguments, "_meta": { "progressToken": "p" } });
        json!({ "jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": params })
    };
    let told = String::from_utf8(post(call("say 2", "m"), session).await.body.to_vec()).unwrap();
    assert!(told.contains("notifications/progress") && told.contains("\"message\":\"2 \""), "{told}");
    assert!(told.contains("\"content\":\"1 2 \""), "{told}");
    let told = String::from_utf8(post(call("say 2", "other"), session).await.body.to_vec()).unwrap();
    assert!(told.contains("model_not_found"), "{told}");
    let told = String::from_utf8(post(call("overflow", "m"), session).await.body.to_vec()).unwrap();
    assert!(told.contains("context_overflow"), "{told}");
    ark.daemon.shut_down().await;
}

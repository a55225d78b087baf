//! Who among agents may have models say something, and what the others are told.

use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use ark_types::agent::Agent;
use ark_types::guest::MCP_PORT;
use ark_types::layout::AgentDir;
use ark_types::openai::MAX_REQUEST;
use ark_types::permission::Permission;
use ark_types::problem::ProblemKind;
use axum::Router;
use axum::body::Body;
use futures_util::StreamExt as _;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::{Port, caller, part};
use crate::agent::Handle;
use crate::core::Core;
use crate::inference::{Allowed, Caller, Failure, http_router, serve_mcp};
use crate::problems::Refusal;

/// Most connections of one agent at each port, at a time.
const MOST: usize = 64;
/// How long an agent may take to say what it wants, and between two requests of HTTP.
const FIRST_WORD: Duration = Duration::from_secs(30);
/// Longest first line of one that is refused, bytes.
const MAX_LINE: usize = 64 << 10;
/// Code of the JSON-RPC error of one that is refused, from the range that JSON-RPC leaves to servers.
const NOT_ALLOWED: i32 = -32015;

/// Listens for the agent `id` at `port`: [`MCP_PORT`] or [`ark_types::guest::OPENAI_PORT`].
pub(super) fn listen(core: &Arc<Core>, dir: &AgentDir, id: &str, port: u32) -> io::Result<Port> {
    let (core, id) = (Arc::downgrade(core), id.to_owned());
    Port::listen(dir, port, MOST, move |stream| answer(stream, core.clone(), id.clone(), port))
}

/// Answers one connection.
async fn answer(stream: UnixStream, core: Weak<Core>, id: String, port: u32) {
    match admit(&core, &id) {
        Ok((core, agent, caller)) => {
            let answered = async {
                if port == MCP_PORT {
                    serve_mcp(core, caller, stream).await;
                } else {
                    serve_http(stream, http_router(core, caller)).await;
                }
            };
            tokio::select! {
                () = answered => {}
                () = agent.ended() => {}
            }
        }
        Err(why) if port == MCP_PORT => refuse_mcp(stream, &why).await,
        Err(why) => {
            let refuse = async move |body: Body| {
                let _ = timeout(FIRST_WORD, read_off(body)).await;
                Failure::from(Refusal::new(ProblemKind::NotAllowed, why))
            };
            serve_http(stream, Router::new().fallback(refuse)).await;
        }
    }
}

/// Who asks, if the agent `id` is allowed to; else why not.
fn admit(core: &Weak<Core>, id: &str) -> Result<(Arc<Core>, Handle, Caller), String> {
    let none = || "inference is for agents that run".to_owned();
    let core = core.upgrade().ok_or_else(none)?;
    let agent = caller(&core, id).ok_or_else(none)?;
    let (models, owner) = agent.look(|agent| (allowed(agent), agent.owner.clone()));
    let models = models.ok_or_else(|| {
        let name = agent.name();
        format!(
            "the agent {name} may not use inference: allow it when the agent is made, with --allow inference"
        )
    })?;
    let caller = Caller::agent(id.to_owned(), owner, models);
    Ok((core, agent, caller))
}

/// The models that `agent` may use; none when it is not allowed any.
fn allowed(agent: &Agent) -> Option<Allowed> {
    let mut names = Vec::new();
    for Permission::Inference(model) in &agent.allow {
        match model {
            None => return Some(Allowed::All),
            Some(model) => names.push(model.to_string()),
        }
    }
    (!names.is_empty()).then_some(Allowed::Only(names))
}

/// Serves `routes` on `stream`, as HTTP/1.1, until the agent ends it.
async fn serve_http(stream: UnixStream, routes: Router) {
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(FIRST_WORD)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes))
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "an agent's HTTP connection broke");
    }
}

/// Reads what comes with a request that is refused: a connection with something unread is closed after the reply, and the next
/// request on it would be lost.
async fn read_off(body: Body) {
    let mut parts = body.into_data_stream();
    let mut left = MAX_REQUEST;
    while let Some(Ok(part)) = parts.next().await {
        left = left.saturating_sub(part.len());
        if left == 0 {
            return;
        }
    }
}

/// Answers the first request with an error that says `why`.
async fn refuse_mcp(mut stream: UnixStream, why: &str) {
    let id = timeout(FIRST_WORD, first_id(&mut stream)).await.unwrap_or(Value::Null);
    let error = json!({ "code": NOT_ALLOWED, "message": why, "data": { "reason": "not_allowed" } });
    let line = format!("{}\n", json!({ "jsonrpc": "2.0", "id": id, "error": error }));
    // Whoever does not listen is not told.
    let _ = stream.write_all(line.as_bytes()).await;
    part(stream).await;
}

/// The id of the request on the first line; null when it is none.
async fn first_id(stream: &mut UnixStream) -> Value {
    let mut line = Vec::new();
    while line.len() < MAX_LINE && !line.contains(&b'\n') {
        // Its end, or its failure.
        let Ok(1..) = stream.read_buf(&mut line).await else { break };
    }
    let end = line.iter().position(|byte| *byte == b'\n').unwrap_or(line.len());
    let message: Value = serde_json::from_slice(line.get(..end).unwrap_or_default()).unwrap_or_default();
    match message.get("id") {
        Some(id @ (Value::String(_) | Value::Number(_))) => id.clone(),
        _ => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use ark_types::event::AgentSpec;

    use super::*;

    fn allowing(allow: &[&str]) -> Option<Allowed> {
        let spec: AgentSpec = serde_json::from_value(json!({
            "id": "0123456789abcdef", "name": "a1", "allow": allow, "origin": { "from": "boot" }, "image": "base",
            "image_digest": "sha256:0", "vcpus": 1, "memory_mib": 64, "created_unix_ms": 0, "auto_remove": false,
        }))
        .unwrap();
        allowed(&spec.newborn())
    }

    #[test]
    fn an_agent_may_use_what_it_is_allowed_and_nothing_else() {
        assert_eq!(allowing(&[]), None);
        assert_eq!(allowing(&["inference"]), Some(Allowed::All));
        assert_eq!(
            allowing(&["inference=a", "inference=b"]),
            Some(Allowed::Only(vec!["a".to_owned(), "b".to_owned()]))
        );
        assert_eq!(
            allowing(&["inference=a", "inference"]),
            Some(Allowed::All),
            "every model is that one, too"
        );
    }

    async fn refused(sent: &[u8]) -> Value {
        let (mut agent, ours) = UnixStream::pair().unwrap();
        agent.write_all(sent).await.unwrap();
        agent.shutdown().await.unwrap();
        let refusing = tokio::spawn(async move { refuse_mcp(ours, "no \"inference\"\nhere").await });
        let mut said = Vec::new();
        // What was not read of a hostile line has the stream end in an error, after the answer.
        let _ = agent.read_to_end(&mut said).await;
        refusing.await.unwrap();
        let said = String::from_utf8(said).unwrap();
        assert_eq!(said.lines().count(), 1, "{said}");
        serde_json::from_str(&said).unwrap()
    }

    #[tokio::test]
    async fn a_refusal_answers_the_request_that_was_made_whatever_that_is() {
        let said = refused(b"{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"initialize\"}\n{\"more\":1}\n").await;
        assert_eq!((&said["id"], &said["error"]["code"]), (&json!(7), &json!(NOT_ALLOWED)));
        assert_eq!(said["error"]["message"], "no \"inference\"\nhere");
        assert_eq!(refused(b"{\"id\":\"a\",\"method\":\"x\"}").await["id"], "a");
        for hostile in [&b""[..], b"\n", b"\xff\xfe\n", b"{\"id\":{\"a\":1}}\n", b"[]\n", &[b'['; 200_000]] {
            assert_eq!(refused(hostile).await["id"], Value::Null);
        }
    }
}

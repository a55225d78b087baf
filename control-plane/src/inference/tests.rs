//! What agents send, who are hostile: over MCP lines and over HTTP. No VM is needed for what goes wrong before one.

use std::sync::Arc;
use std::time::Duration;

use ark_types::layout::{Assets, RunDir, StateDir};
use ark_types::problem::{Problem, ProblemKind};
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode};
use clap::Parser as _;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, DuplexStream, ReadHalf, WriteHalf};
use tokio::time::timeout;
use tower::ServiceExt as _;

use super::{Allowed, Caller, http_router, serve_mcp};
use crate::args::Args;
use crate::cleanup::make_private_dir;
use crate::config::Config;
use crate::core::Core;
use crate::ledger::Ledger;
use crate::settings::Settings;
use crate::store::{EventLog, SqliteLog};

/// A core in a directory of its own, without any model.
async fn core() -> (tempfile::TempDir, Arc<Core>) {
    let dir = tempfile::tempdir().unwrap();
    let args = Args::try_parse_from(["arkd"]).unwrap();
    let mut config = Config::new(&args, &Settings::default()).unwrap();
    config.assets = Assets(dir.path().join("assets"));
    config.run = RunDir(dir.path().join("run"));
    config.state = StateDir(dir.path().join("state"));
    make_private_dir(&config.state.0).unwrap();
    let log: Arc<dyn EventLog> = Arc::new(SqliteLog::open(&config.state.events()).unwrap());
    let ledger = Ledger::open(Arc::clone(&log), config.compaction).await.unwrap();
    let (core, _) = Core::new(config, &[], log, ledger).unwrap();
    (dir, core)
}

fn agent(models: &[&str]) -> Caller {
    let names = models.iter().map(|name| (*name).to_owned()).collect();
    Caller::agent("0a".to_owned(), "team".parse().unwrap(), Allowed::Only(names))
}

/// An agent's end of a connection.
struct Peer {
    read: BufReader<ReadHalf<DuplexStream>>,
    write: WriteHalf<DuplexStream>,
}

impl Peer {
    /// One that has shaken hands.
    async fn of(core: &Arc<Core>, caller: Caller) -> Self {
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        tokio::spawn(serve_mcp(Arc::clone(core), caller, theirs));
        let (read, write) = tokio::io::split(ours);
        let mut peer = Self { read: BufReader::new(read), write };
        let params = json!({ "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": { "name": "t", "version": "1" } });
        let hello = peer.ask("initialize", params).await;
        assert_eq!(hello["result"]["serverInfo"]["name"], "arkd", "{hello}");
        peer.send(br#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#).await;
        peer
    }

    async fn send(&mut self, line: &[u8]) {
        self.write.write_all(&[line, b"\n"].concat()).await.unwrap();
    }

    async fn receive(&mut self) -> Value {
        let mut line = String::new();
        timeout(Duration::from_secs(60), self.read.read_line(&mut line)).await.unwrap().unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// Reads until nothing comes for a while.
    async fn drain(&mut self) {
        let mut line = Vec::new();
        while matches!(
            timeout(Duration::from_secs(1), self.read.read_until(b'\n', &mut line)).await,
            Ok(Ok(1..))
        ) {
            line.clear();
        }
    }

    async fn ask(&mut self, method: &str, params: Value) -> Value {
        let request = json!({ "jsonrpc": "2.0", "id": method, "method": method, "params": params });
        self.send(request.to_string().as_bytes()).await;
        loop {
            let answer = self.receive().await;
            if answer["id"] == method {
                return answer;
            }
        }
    }

    /// The error of a call.
    async fn refused(&mut self, tool: &str, arguments: Value) -> (i64, String) {
        let answer = self.ask("tools/call", json!({ "name": tool, "arguments": arguments })).await;
        let error = &answer["error"];
        (
            error["code"].as_i64().unwrap_or_default(),
            error["data"]["reason"].as_str().unwrap_or_default().to_owned(),
        )
    }
}

#[tokio::test]
async fn an_agent_is_told_what_there_is_and_what_it_may_not() {
    let (_dir, core) = core().await;
    let mut peer = Peer::of(&core, agent(&["mine", "ours"])).await;
    let list = peer.ask("tools/list", json!({})).await;
    let tools = list["result"]["tools"].as_array().unwrap();
    assert_eq!(tools.len(), 4);
    assert!(tools.iter().all(|tool| tool["inputSchema"]["type"] == "object"), "{list}");
    let models = peer.ask("resources/list", json!({})).await;
    assert_eq!(models["result"]["resources"], json!([]));
    let messages = json!([{ "role": "user", "content": "hello" }]);
    for (model, reason) in [("theirs", "not_allowed"), ("mine", "model_not_found")] {
        let refused = peer.refused("chat", json!({ "model": model, "messages": messages })).await;
        assert_eq!(refused, (-32602, reason.to_owned()));
    }
    let (_, reason) = peer.refused("chat", json!({ "messages": messages })).await;
    assert_eq!(reason, "model_not_found", "it names none, and there is none");
    let (_, reason) = peer.refused("chat", json!({ "model": "mine", "timeout_ms": 0 })).await;
    assert_eq!(reason, "bad_request");
}

#[tokio::test]
async fn lines_that_are_no_calls_do_no_harm() {
    let (_dir, core) = core().await;
    let mut peer = Peer::of(&core, agent(&["mine"])).await;
    let deep = [b"{\"id\":1,\"x\":".as_slice(), &b"[".repeat(10_000)].concat();
    for line in [
        b"not JSON".as_slice(),
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{\"id\":{}}",
        b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/call\"}",
        b"{\"jsonrpc\":\"2.0\",\"id\":2,\"method\":\"tools/call\",\"params\":{\"name\":\"chat\",\"arguments\":\"x\"}}",
        b"{\"jsonrpc\":\"2.0\",\"id\":3,\"method\":\"no/such\"}",
        b"{\"jsonrpc\":\"2.0\",\"method\":\"notifications/cancelled\",\"params\":{\"requestId\":77}}",
        &deep,
    ] {
        peer.send(line).await;
    }
    let (code, reason) = peer.refused("no-such-tool", json!({})).await;
    assert_eq!((code, reason.as_str()), (-32602, "unknown_tool"));
    let model = json!({ "model": 7, "messages": [] });
    assert_eq!(peer.refused("chat", model).await.1, "bad_request");
    assert_eq!(peer.ask("ping", json!({})).await["result"], json!({}));
}

#[tokio::test]
async fn an_agent_that_never_reads_holds_nothing() {
    let (_dir, core) = core().await;
    let mut peer = Peer::of(&core, agent(&["mine"])).await;
    for id in 0..20_000 {
        peer.send(format!("{{\"jsonrpc\":\"2.0\",\"id\":{id},\"method\":\"ping\"}}").as_bytes()).await;
    }
    // Most were refused, or not even that. Once it has read what there is, it is answered again.
    peer.drain().await;
    assert_eq!(peer.ask("ping", json!({})).await["result"], json!({}));
}

#[tokio::test]
async fn over_http_an_agent_has_its_models_and_no_others() {
    let (_dir, core) = core().await;
    let routes = http_router(Arc::clone(&core), agent(&["mine"]));
    let ask = async |method: &str, path: &str, body: Value| {
        let request = Request::builder().method(method).uri(path).body(Body::from(body.to_string())).unwrap();
        let (parts, body) = routes.clone().oneshot(request).await.unwrap().into_parts();
        let body = to_bytes(body, 1 << 20).await.unwrap();
        (parts.status, serde_json::from_slice::<Value>(&body).unwrap())
    };
    let (status, list) = ask("GET", "/v1/models", Value::Null).await;
    assert_eq!((status, list), (StatusCode::OK, json!({ "object": "list", "data": [] })));
    let (status, told) = ask("GET", "/v1/models/theirs", Value::Null).await;
    assert_eq!((status, &told["error"]["code"]), (StatusCode::NOT_FOUND, &json!("model_not_found")));
    let chat = json!({ "model": "theirs", "messages": [{ "role": "user", "content": "hello" }] });
    let (status, told) = ask("POST", "/v1/chat/completions", chat).await;
    assert_eq!((status, &told["error"]["code"]), (StatusCode::FORBIDDEN, &json!("not_allowed")));
    for path in ["/v1/agents", "/mcp", "/metrics"] {
        let (status, told) = ask("GET", path, Value::Null).await;
        let problem: Problem = serde_json::from_value(told).unwrap();
        assert_eq!((status, problem.kind), (StatusCode::NOT_FOUND, ProblemKind::NoRoute), "{path}");
    }
}

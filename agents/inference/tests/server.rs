//! The MCP server over a stream, as a peer sees it that writes its own JSON: good calls, hostile lines, cancellation.

mod common;

use std::sync::Arc;

use ark_inference::engine::Config;
use ark_inference::server::{Models, Served, serve};
use common::{config, engine, eventually};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream, Lines, ReadHalf, WriteHalf};

/// A peer's end of a connection.
struct Peer {
    write: WriteHalf<DuplexStream>,
    lines: Lines<BufReader<ReadHalf<DuplexStream>>>,
    /// Notifications that came while an answer was waited for.
    notes: Vec<Value>,
    next: u64,
}

fn models(config: Config) -> Arc<Models> {
    let served = Served::new("synthetic".to_owned(), engine(config));
    Arc::new(Models::new(vec![served]).expect("one model"))
}

fn connect(models: &Arc<Models>) -> Peer {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let (read, write) = tokio::io::split(theirs);
    tokio::spawn(serve(Arc::clone(models), read, write, false));
    let (read, write) = tokio::io::split(ours);
    Peer { write, lines: BufReader::new(read).lines(), notes: Vec::new(), next: 1 }
}

/// A connection that has shaken hands in the way of 2025-11-25.
async fn ready(models: &Arc<Models>) -> Peer {
    let mut peer = connect(models);
    let answer = peer
        .ask("initialize", json!({"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "0"}}))
        .await;
    assert_eq!(answer["result"]["serverInfo"]["name"], "ark-inference", "{answer}");
    peer.send(br#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#).await;
    peer
}

impl Peer {
    async fn send(&mut self, line: &[u8]) {
        self.write.write_all(line).await.expect("written");
        self.write.write_all(b"\n").await.expect("written");
    }

    async fn receive(&mut self) -> Value {
        let line = tokio::time::timeout(std::time::Duration::from_secs(60), self.lines.next_line())
            .await
            .expect("an answer within a minute")
            .expect("a line")
            .expect("the connection is open");
        serde_json::from_str(&line).expect("JSON")
    }

    async fn begin(&mut self, method: &str, params: Value) -> u64 {
        let id = self.next;
        self.next += 1;
        let line = json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params}).to_string();
        self.send(line.as_bytes()).await;
        id
    }

    async fn answer(&mut self, id: u64) -> Value {
        loop {
            let message = self.receive().await;
            if message["id"] == id {
                return message;
            }
            self.notes.push(message);
        }
    }

    async fn ask(&mut self, method: &str, params: Value) -> Value {
        let id = self.begin(method, params).await;
        self.answer(id).await
    }

    async fn tool(&mut self, name: &str, arguments: Value) -> Value {
        self.ask("tools/call", json!({"name": name, "arguments": arguments})).await
    }

    /// The structured result of a tool.
    async fn good(&mut self, name: &str, arguments: Value) -> Value {
        let answer = self.tool(name, arguments).await;
        assert!(answer["error"].is_null() && answer["result"]["isError"] != true, "{answer}");
        answer["result"]["structuredContent"].clone()
    }

    /// The error of a tool, which is a protocol error with a reason for programs.
    async fn bad(&mut self, name: &str, arguments: Value) -> (i64, String, String) {
        let answer = self.tool(name, arguments).await;
        let error = &answer["error"];
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        (error["code"].as_i64().unwrap_or_default(), text(&error["data"]["reason"]), text(&error["message"]))
    }
}

fn greedy(max_tokens: u32) -> Value {
    json!({"prompt": "Hello", "max_tokens": max_tokens, "sampling": {"temperature": 0}})
}

#[tokio::test(flavor = "multi_thread")]
async fn tools_have_schemas_and_models_are_resources() {
    let mut peer = ready(&models(config())).await;
    let tools = peer.ask("tools/list", json!({})).await;
    let tools = tools["result"]["tools"].as_array().expect("a list").clone();
    let mut names: Vec<_> = tools.iter().filter_map(|t| t["name"].as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["chat", "embed", "generate", "tokenize"]);
    for tool in &tools {
        assert_eq!(tool["inputSchema"]["type"], "object", "{tool}");
        assert_eq!(tool["outputSchema"]["type"], "object", "{tool}");
        assert!(tool["description"].as_str().is_some_and(|d| d.len() > 20), "{tool}");
    }
    let list = peer.ask("resources/list", json!({})).await;
    assert_eq!(list["result"]["resources"][0]["uri"], "model://synthetic");
    let read = peer.ask("resources/read", json!({"uri": "model://synthetic"})).await;
    let text = read["result"]["contents"][0]["text"].as_str().expect("text");
    let model: Value = serde_json::from_str(text).expect("JSON");
    assert_eq!(
        (&model["architecture"], &model["context"], &model["chat"]),
        (&json!("llama"), &json!(512), &json!(true))
    );
    let none = peer.ask("resources/read", json!({"uri": "model://other"})).await;
    assert_eq!(none["error"]["code"], -32002, "{none}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_tool_answers() {
    let mut peer = ready(&models(config())).await;
    let said = peer.good("generate", greedy(8)).await;
    assert_eq!(said["model"], "synthetic");
    assert!(["stop", "length"].contains(&said["finish_reason"].as_str().expect("a reason")));
    assert_eq!(
        said["usage"]["total_tokens"].as_u64(),
        Some(
            said["usage"]["prompt_tokens"].as_u64().unwrap_or(0)
                + said["usage"]["completion_tokens"].as_u64().unwrap_or(0)
        )
    );
    assert!(said["timings"]["total_ms"].as_f64() >= said["timings"]["first_token_ms"].as_f64());
    let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]);
    let chat = peer
        .good("chat", json!({"messages": messages, "max_tokens": 8, "sampling": {"temperature": 0}}))
        .await;
    assert_eq!(chat["message"]["role"], "assistant");
    let embedded = peer.good("embed", json!({"input": ["one", "two", "one"]})).await;
    assert_eq!(embedded["embeddings"][0].as_array().map(Vec::len), Some(64));
    assert_eq!(embedded["embeddings"][0], embedded["embeddings"][2]);
    assert_ne!(embedded["embeddings"][0], embedded["embeddings"][1]);
    let tokens = peer.good("tokenize", json!({"text": "Hello there", "add_special": true})).await;
    assert_eq!(tokens["count"].as_u64(), tokens["tokens"].as_array().map(|t| t.len() as u64));
    let text: String =
        tokens["pieces"].as_array().expect("a list").iter().skip(1).filter_map(Value::as_str).collect();
    assert_eq!(text.trim_start(), "Hello there");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_revision_needs_no_handshake() {
    let mut peer = connect(&models(config()));
    let meta = json!({
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientInfo": {"name": "t", "version": "0"},
        "io.modelcontextprotocol/clientCapabilities": {},
    });
    let found = peer.ask("server/discover", json!({"_meta": meta})).await;
    assert!(
        found["result"]["supportedVersions"].as_array().is_some_and(|v| v.contains(&json!("2026-07-28"))),
        "{found}"
    );
    let answer =
        peer.ask("tools/call", json!({"_meta": meta, "name": "generate", "arguments": greedy(3)})).await;
    assert_eq!(answer["result"]["resultType"], "complete", "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn text_comes_as_progress_while_it_is_said() {
    let mut peer = ready(&models(config())).await;
    let params = json!({"name": "generate", "arguments": greedy(30), "_meta": {"progressToken": "p"}});
    let answer = peer.ask("tools/call", params).await;
    let whole = answer["result"]["structuredContent"]["text"].as_str().expect("a text");
    let parts: Vec<_> = peer.notes.iter().filter(|n| n["method"] == "notifications/progress").collect();
    assert!(parts.iter().all(|n| n["params"]["progressToken"] == "p"));
    let text: String = parts.iter().filter_map(|n| n["params"]["message"].as_str()).collect();
    assert_eq!(text, whole);
    let steps: Vec<_> = parts.iter().filter_map(|n| n["params"]["progress"].as_f64()).collect();
    assert!(steps.is_sorted_by(|a, b| a < b), "{steps:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_parameters_are_refused_with_a_reason() {
    let models = models(config());
    let mut peer = ready(&models).await;
    let long = "word ".repeat(1000);
    for (tool, arguments, reason, says) in [
        ("generate", json!({"prompt": "x", "sampling": {"temperature": -1}}), "temperature", "from 0 to 10"),
        ("generate", json!({"prompt": "x", "sampling": {"top_p": 2}}), "top_p", "to 1"),
        ("generate", json!({"prompt": "x", "sampling": {"grammar": "root ::= ("}}), "grammar", "GBNF"),
        ("generate", json!({"prompt": "x", "sampling": {"json_schema": []}}), "json_schema", "schema"),
        (
            "generate",
            json!({"prompt": "x", "sampling": {"json_schema": {}, "grammar": "root ::= \"x\""}}),
            "both",
            "leave one out",
        ),
        ("generate", json!({"prompt": "x", "model": "gpt-9"}), "unknown_model", "there is synthetic"),
        ("generate", json!({"prompt": "x", "max_tokens": 0}), "max_tokens", "at least 1"),
        ("generate", json!({"prompt": "x", "timeout_ms": 0}), "timeout_ms", "from 1"),
        ("generate", json!({"prompt": "x", "stop": [""]}), "stop", "1 to 256"),
        ("generate", json!({"prompt": long}), "context_overflow", "do not fit the context of 512 tokens"),
        ("generate", json!({"prompt": "x".repeat(10 << 20)}), "too_large", "10485760 bytes"),
        ("chat", json!({"messages": []}), "messages", "from 1 to"),
        ("embed", json!({"input": []}), "input", "from 1 to 64"),
        ("embed", json!({"input": [""], "model": "no"}), "unknown_model", "no model"),
    ] {
        let (code, got, message) = peer.bad(tool, arguments).await;
        assert_eq!((code, got.as_str()), (-32602, reason), "{tool}: {message}");
        assert!(message.contains(says), "{tool}: {message}");
    }
    for (tool, arguments) in [
        ("generate", json!({})),
        ("generate", json!({"prompt": 7})),
        ("generate", json!({"prompt": "x", "temperature": 0})),
        ("generate", json!({"prompt": "x", "sampling": {"temprature": 0}})),
        ("generate", json!({"prompt": "x", "max_tokens": -1})),
        ("chat", json!({"messages": [{"role": "king", "content": "x"}]})),
        ("no_such_tool", json!({})),
    ] {
        // What does not match a tool's schema is the SDK's to refuse: an error of the tool, or of the protocol.
        let answer = peer.tool(tool, arguments).await;
        let refused = answer["error"]["code"] == -32602 || answer["result"]["isError"] == true;
        assert!(refused, "{tool}: {answer}");
    }
    assert_eq!(peer.ask("no/such/method", json!({})).await["error"]["code"], -32601);
    // It still works.
    peer.good("generate", greedy(2)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_lines_are_answered_and_do_no_harm() {
    let mut peer = ready(&models(config())).await;
    for (line, code) in [
        (&b"not json"[..], -32700),
        (b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"", -32700),
        (b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/call\",\"params\":{\"name\":\"generate\",\"arguments\":{\"prompt\":\"\xff\xfe\"}}}", -32700),
        (b"\xff\xff\xff", -32700),
        (b"[]", -32600),
        (b"17", -32600),
        (b"{}", -32600),
        (b"{\"jsonrpc\":\"1.0\",\"id\":1,\"method\":\"ping\"}", -32600),
        (&b"[".repeat(100_000)[..], -32700),
    ] {
        peer.send(line).await;
        let answer = peer.receive().await;
        let shown = String::from_utf8_lossy(&line[..line.len().min(60)]);
        assert_eq!(answer["error"]["code"], code, "{shown}: {answer}");
    }
    let mut long = vec![b'x'; (16 << 20) + 1];
    long[0] = b'"';
    peer.send(&long).await;
    assert_eq!(peer.receive().await["error"]["code"], -32600);
    peer.send(b"").await;
    peer.send(b"{\"jsonrpc\":\"2.0\",\"method\":\"notifications/unheard\"}").await;
    peer.good("generate", greedy(2)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_call_and_a_peer_that_left_free_their_slots() {
    let models = models(Config { sessions: 2, context: 2048, ..config() });
    let active = || models.get(None).map(|m| m.engine().load().active).unwrap_or_default();
    let mut peer = ready(&models).await;
    let id = peer.begin("tools/call", json!({"name": "generate", "arguments": greedy(2000)})).await;
    eventually("it runs", || active() == 1).await;
    let cancel = json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": id}});
    peer.send(cancel.to_string().as_bytes()).await;
    eventually("it is over", || active() == 0).await;
    for token in [None, Some("p")] {
        let mut leaver = ready(&models).await;
        let mut params = json!({"name": "generate", "arguments": greedy(2000)});
        if let Some(token) = token {
            params["_meta"] = json!({"progressToken": token});
        }
        leaver.begin("tools/call", params).await;
        eventually("it runs", || active() == 1).await;
        drop(leaver);
        eventually("it is over", || active() == 0).await;
    }
    peer.good("generate", greedy(2)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_is_an_error_with_the_text_so_far() {
    let mut peer = ready(&models(Config { context: 2048, ..config() })).await;
    let mut arguments = greedy(2000);
    arguments["timeout_ms"] = json!(40);
    let answer = peer.tool("generate", arguments).await;
    // A fast machine may be done by then.
    if answer["result"].is_null() {
        assert_eq!(answer["error"]["code"], -32011, "{answer}");
        assert_eq!(answer["error"]["data"]["reason"], "deadline");
        assert!(answer["error"]["data"]["text"].is_string());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_calls_at_once_are_all_answered() {
    let models = models(Config { queue: 256, ..config() });
    let Peer { mut write, mut lines, .. } = ready(&models).await;
    let writer = tokio::spawn(async move {
        for i in 0..1000 {
            let owner = format!("owner {}", i % 4);
            let params =
                json!({"name": "generate", "arguments": greedy(2), "_meta": {"noa-ark/owner": owner}});
            let line = json!({"jsonrpc": "2.0", "id": i, "method": "tools/call", "params": params});
            write.write_all(format!("{line}\n").as_bytes()).await.expect("written");
        }
        // Kept open: a peer that closes its side has left.
        write
    });
    let (mut good, mut refused) = (0, 0);
    for _ in 0..1000 {
        let line = lines.next_line().await.expect("a line").expect("the connection is open");
        let answer: Value = serde_json::from_str(&line).expect("JSON");
        if answer["error"].is_null() {
            good += 1;
        } else {
            assert_eq!(answer["error"]["code"], -32010, "{answer}");
            refused += 1;
        }
    }
    assert!(good >= 256, "{good} answered, {refused} refused");
    drop(writer.await);
}

/// The program itself, on standard input and output.
#[test]
fn the_program_serves_on_standard_input_and_says_what_is_wrong() {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let program = env!("CARGO_BIN_EXE_ark-inference");
    let model = format!("m={}", common::model().display());
    let mut child = Command::new(program)
        .args(["--stdio", "--threads", "1", "--model", &model])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let lines = [
        json!({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "0"}}}),
        json!({"jsonrpc": "2.0", "method": "notifications/initialized"}),
        json!({"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "generate", "arguments": greedy(5)}}),
        json!({"jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": {"name": "generate", "arguments": greedy(1500)}}),
        json!({"jsonrpc": "2.0", "id": 4, "method": "tools/call", "params": {"name": "generate", "arguments": greedy(1500)}}),
        json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 4}}),
    ];
    let mut stdin = child.stdin.take().expect("piped");
    for line in &lines {
        writeln!(stdin, "{line}").expect("written");
    }
    drop(stdin);
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success());
    let answers: Vec<Value> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|l| serde_json::from_str(l).expect("JSON"))
        .collect();
    for id in [2, 3] {
        let said = |a: &Value| a["id"] == id && a["result"]["structuredContent"]["text"].is_string();
        assert!(answers.iter().any(said), "{id} in {answers:?}");
    }
    for (arguments, says) in [
        (&["--stdio", "--model", "m=/nowhere.gguf"][..], "/nowhere.gguf: the model file cannot be read"),
        (&["--stdio", "--model", &format!("m={program}")], "not a GGUF file"),
        (&["--stdio", "--model", "nowhere"], "NAME=PATH"),
        (&["--stdio", "--model", &model, "--context", "9999999"], "must be from 16 to 2048"),
        (&["--unix", "/nowhere/socket", "--model", &model], "cannot listen on /nowhere/socket"),
        (&["--model", &model], "--stdio"),
    ] {
        let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().expect("it runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(says), "{arguments:?}: {text}");
    }
}

/// An independent peer, in both lifecycles of the protocol.
#[test]
#[ignore = "needs the MCP SDK for Python: make inference-tests"]
fn conformance_with_the_python_sdk() {
    let python = std::env::var("ARK_MCP_PYTHON").expect("ARK_MCP_PYTHON is a Python that has the SDK");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/conformance.py");
    let output = std::process::Command::new(python)
        .args([script, env!("CARGO_BIN_EXE_ark-inference")])
        .arg(common::model())
        .output()
        .expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

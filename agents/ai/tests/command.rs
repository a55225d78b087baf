//! `ark-ai` as programs in an agent use it, against a host that speaks MCP over a Unix socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread::{self, JoinHandle};

use serde_json::{Value, json};

/// A host that takes one connection and answers its requests with what `reply` gives: lines, ids filled in. What it was asked.
struct Host {
    path: PathBuf,
    asked: JoinHandle<Vec<Value>>,
    _dir: tempfile::TempDir,
}

impl Host {
    fn new(reply: impl Fn(&Value) -> Vec<Value> + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mcp");
        let listener = UnixListener::bind(&path).unwrap();
        let asked = thread::spawn(move || converse(&listener.accept().unwrap().0, &reply));
        Self { path, asked, _dir: dir }
    }

    fn ark_ai(&self, args: &[&str]) -> Output {
        ark_ai(&self.path, args, "")
    }

    fn asked(self) -> Vec<Value> {
        self.asked.join().unwrap()
    }
}

fn converse(stream: &UnixStream, reply: &impl Fn(&Value) -> Vec<Value>) -> Vec<Value> {
    let mut asked = Vec::new();
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { break };
        let message: Value = serde_json::from_str(&line).unwrap();
        let id = message.get("id").cloned();
        let replies = match message["method"].as_str() {
            Some("initialize") => vec![json!({ "result": { "protocolVersion": "2025-11-25" } })],
            _ if id.is_none() => Vec::new(),
            _ => reply(&message),
        };
        asked.push(message);
        for mut said in replies {
            said["jsonrpc"] = json!("2.0");
            if said.get("method").is_none() && said.get("id").is_none() {
                said["id"] = id.clone().unwrap();
            }
            // Who got what it wanted may be gone.
            let _ = writeln!(&*stream, "{said}");
        }
    }
    asked
}

fn ark_ai(socket: &Path, args: &[&str], stdin: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ark-ai"));
    command.arg("--socket").arg(socket).args(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn told(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn progress(of: &Value, text: &str) -> Value {
    let token = &of["params"]["_meta"]["progressToken"];
    let params = json!({ "progressToken": token, "progress": 1, "message": text });
    json!({ "method": "notifications/progress", "params": params })
}

fn result(content: Value) -> Value {
    json!({ "result": { "content": [], "structuredContent": content } })
}

fn chatted(text: &str) -> Value {
    result(
        json!({ "model": "m", "message": { "role": "assistant", "content": text }, "finish_reason": "stop" }),
    )
}

#[test]
fn a_reply_is_written_as_it_comes_and_whole() {
    let host = Host::new(|message| {
        let other = json!({ "method": "notifications/progress", "params": { "progressToken": 999, "message": "no" } });
        let ping = json!({ "method": "ping", "id": "p" });
        vec![progress(message, "Hel"), other, ping, progress(message, "lo"), chatted("Hello there")]
    });
    let said = host.ark_ai(&[
        "chat",
        "--model",
        "qwen",
        "--system",
        "be kind",
        "--seed",
        "7",
        "--temperature",
        "0",
        "--max-tokens",
        "5",
        "--stop",
        "!",
        "--json-schema",
        r#"{"type":"string"}"#,
        "hi",
    ]);
    assert_eq!(told(&said), (Some(0), "Hello there\n".to_owned(), String::new()));
    let asked = host.asked();
    assert_eq!(asked[0]["params"]["protocolVersion"], "2025-11-25");
    assert_eq!(asked[1]["method"], "notifications/initialized");
    assert_eq!(asked[2]["params"]["name"], "chat");
    let sampling = json!({ "seed": 7, "temperature": 0.0, "json_schema": { "type": "string" } });
    assert_eq!(
        asked[2]["params"]["arguments"],
        json!({
            "model": "qwen", "max_tokens": 5, "stop": ["!"], "sampling": sampling,
            "messages": [{ "role": "system", "content": "be kind" }, { "role": "user", "content": "hi" }],
        })
    );
    assert_eq!(asked[3], json!({ "jsonrpc": "2.0", "id": "p", "result": {} }), "the host's ping is answered");
}

#[test]
fn what_else_there_is_is_written_as_lines_or_as_json() {
    let host = Host::new(|_| vec![result(json!({ "model": "m", "embeddings": [[0.5, 1], [1, 0]] }))]);
    assert_eq!(told(&host.ark_ai(&["embed", "a", "b"])).1, "[0.5,1]\n[1,0]\n");
    assert_eq!(host.asked()[2]["params"]["arguments"], json!({ "input": ["a", "b"] }));
    let host = Host::new(|_| vec![result(json!({ "tokens": [1, 2], "pieces": ["a", "\n"] }))]);
    assert_eq!(told(&host.ark_ai(&["tokenize", "a\n"])).1, "\"a\"\n\"\\n\"\n");
    let host = Host::new(|_| vec![chatted("x")]);
    let said: Value = serde_json::from_slice(&host.ark_ai(&["chat", "--json", "hi"]).stdout).unwrap();
    assert_eq!(said["message"]["content"], "x");
    let list = json!({ "result": { "resources": [{ "uri": "model://m", "name": "m", "description": "a\nmodel" }] } });
    let host = Host::new(move |_| vec![list.clone()]);
    assert_eq!(told(&host.ark_ai(&["models"])).1, "m                    a model\n");
    assert_eq!(host.asked()[2]["method"], "resources/list");
    let host = Host::new(|message| vec![result(json!({ "text": message["params"]["arguments"]["prompt"] }))]);
    let said = ark_ai(&host.path, &["generate", "-"], "from stdin");
    assert_eq!(told(&said), (Some(0), "from stdin\n".to_owned(), String::new()));
}

#[test]
fn a_call_that_breaks_off_leaves_what_was_said_and_a_sentence() {
    let error =
        json!({ "error": { "code": -32012, "message": "the VM\nended", "data": { "reason": "failed" } } });
    let host = Host::new(move |message| vec![progress(message, "half"), error.clone()]);
    let said = told(&host.ark_ai(&["chat", "hi"]));
    assert_eq!(said, (Some(1), "half\n".to_owned(), "ark-ai: the VM ended\n".to_owned()));
    let host = Host::new(|_| vec![json!({ "result": { "isError": true, "content": [{ "text": "no" }] } })]);
    assert_eq!(told(&host.ark_ai(&["chat", "hi"])), (Some(1), String::new(), "ark-ai: no\n".to_owned()));
    for wrong in [json!({ "result": {} }), json!({ "result": 7 }), json!({ "x": 1 })] {
        let host = Host::new(move |_| vec![wrong.clone(), json!({ "id": null, "error": {} })]);
        let (code, _, stderr) = told(&host.ark_ai(&["embed", "hi"]));
        assert_eq!(code, Some(1), "{stderr}");
    }
}

#[test]
fn who_is_refused_or_finds_nobody_is_told_in_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mcp");
    let (code, _, stderr) = told(&ark_ai(&path, &["chat", "hi"], ""));
    assert_eq!(code, Some(1));
    assert!(stderr.contains("does not answer"), "{stderr}");
    let listener = UnixListener::bind(&path).unwrap();
    // Refused before it has said anything, as by a host that does not allow it.
    let refusing = thread::spawn(move || {
        let stream = listener.accept().unwrap().0;
        let error = json!({ "code": -32015, "message": "a1 may not use inference" });
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        writeln!(&stream, "{}", json!({ "jsonrpc": "2.0", "id": 0, "error": error })).unwrap();
    });
    let said = told(&ark_ai(&path, &["chat", "hi"], ""));
    refusing.join().unwrap();
    assert_eq!(said, (Some(1), String::new(), "ark-ai: a1 may not use inference\n".to_owned()));
}

#[test]
fn wrong_usage_never_asks_the_host() {
    let nowhere = Path::new("/nonexistent");
    for (args, why) in [
        (&["chat"][..], "required"),
        (&["chat", "--model", "A B", "hi"], "--model"),
        (&["chat", "--json-schema", "{", "hi"], "not JSON"),
        (&["chat", "--json-schema", "@/nonexistent", "hi"], "cannot be read"),
        (&["sing"], "sing"),
    ] {
        let (code, _, stderr) = told(&ark_ai(nowhere, args, ""));
        assert_eq!(code, Some(2), "{args:?}: {stderr}");
        assert!(stderr.contains(why), "{stderr}");
    }
}

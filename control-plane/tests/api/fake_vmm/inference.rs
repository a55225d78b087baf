//! The server of models in the fake guest: MCP, one JSON-RPC message a line. What it does with a call is the first word of its prompt.

use std::collections::HashSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ark_types::guest::ErrorCode;
use ark_types::vmm::ExitReason;
use serde_json::{Value, json};

use super::{Machine, end};

/// What it is called.
pub(super) const PROGRAM: &str = "ark-inference";
/// How a connection to it begins.
pub(super) const CONNECT: &[u8; 13] = b"CONNECT 1030\n";

/// A process that lives as long as the server would. Its model is the second disk, and its image has to be one that has it.
pub(super) fn start(argv: &[String], machine: &Machine) -> Result<Vec<String>, (ErrorCode, String)> {
    let mut memory = machine.memory.lock().unwrap();
    if !memory.script.starts_with("inference") {
        return Err((ErrorCode::ProgramNotFound, format!("there is no program {PROGRAM}")));
    }
    let (name, path) = argv[2].split_once('=').unwrap();
    assert_eq!((argv[1].as_str(), path, argv[3].as_str()), ("--model", "/dev/vdb", "--vsock"));
    let fails = |why: &str| vec!["/bin/sh".to_owned(), "-c".to_owned(), format!("echo '{why}' >&2; exit 1")];
    let Some(disk) = machine.disks.get(1) else { return Ok(fails("/dev/vdb: no such file")) };
    assert!(disk.read_only, "a model is not written to");
    if memory.script == "inference-fails" {
        return Ok(fails("llama.cpp cannot load the model"));
    }
    // As it is on the disk that the VMM was given.
    assert!(std::fs::read(&disk.path).unwrap().starts_with(b"GGUF"));
    memory.serves = Some(name.to_owned());
    Ok(vec!["/bin/sleep".to_owned(), "1000".to_owned()])
}

/// What happened so far, on all connections.
static SEEN: Mutex<Seen> = Mutex::new(Seen { owners: Vec::new(), cancelled: 0 });

struct Seen {
    owners: Vec<String>,
    cancelled: usize,
}

/// One connection.
#[derive(Clone)]
struct Wire {
    model: String,
    out: Arc<Mutex<UnixStream>>,
    cancelled: Arc<Mutex<HashSet<u64>>>,
}

pub(super) fn serve(mut stream: UnixStream, machine: &Machine) {
    let Some(model) = machine.memory.lock().unwrap().serves.clone() else { return };
    stream.write_all(b"OK 1073741824\n").unwrap();
    let out = Arc::new(Mutex::new(stream.try_clone().unwrap()));
    let wire = Wire { model, out, cancelled: Arc::default() };
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        let message: Value = serde_json::from_str(&line).unwrap();
        match message["method"].as_str().unwrap() {
            "initialize" => {
                let info = json!({ "name": "fake", "version": "1" });
                let result =
                    json!({ "protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": info });
                wire.send(&json!({ "jsonrpc": "2.0", "id": message["id"], "result": result }));
            }
            "notifications/cancelled" => {
                SEEN.lock().unwrap().cancelled += 1;
                wire.cancelled.lock().unwrap().insert(message["params"]["requestId"].as_u64().unwrap());
            }
            "tools/call" => {
                let wire = wire.clone();
                std::thread::spawn(move || wire.call(&message));
            }
            _ => {}
        }
    }
}

impl Wire {
    fn send(&self, message: &Value) {
        let _ = writeln!(self.out.lock().unwrap(), "{message}");
    }

    fn progress(&self, id: u64, text: &str) {
        let params = json!({ "progressToken": id, "progress": 1, "message": text });
        self.send(&json!({ "jsonrpc": "2.0", "method": "notifications/progress", "params": params }));
    }

    fn fail(&self, id: u64, code: i32, message: &str, data: &Value) {
        let error = json!({ "code": code, "message": message, "data": data });
        self.send(&json!({ "jsonrpc": "2.0", "id": id, "error": error }));
    }

    fn done(&self, id: u64, content: &Value) {
        let result = json!({
            "content": [{ "type": "text", "text": content.to_string() }], "structuredContent": content, "isError": false,
        });
        self.send(&json!({ "jsonrpc": "2.0", "id": id, "result": result }));
    }

    fn is_cancelled(&self, id: u64) -> bool {
        self.cancelled.lock().unwrap().contains(&id)
    }

    fn call(&self, message: &Value) {
        let (id, params) = (message["id"].as_u64().unwrap(), &message["params"]);
        let arguments = &params["arguments"];
        if params["_meta"].is_null() {
            // Whoever loads the model only wants to know that it answers. A notification may come before any answer.
            self.progress(id, "begun");
            return self.done(
                id,
                &match arguments["text"].as_str() {
                    Some(text) => json!({ "model": self.model, "count": text.len() }),
                    None => json!({ "model": self.model, "text": "" }),
                },
            );
        }
        assert_eq!(params["_meta"]["progressToken"], id);
        let owner = params["_meta"]["noa-ark/owner"].as_str().unwrap().to_owned();
        let tool = params["name"].as_str().unwrap();
        let needed = match tool {
            "chat" => "messages",
            "generate" => "prompt",
            "embed" => "input",
            _ => "text",
        };
        if arguments[needed].is_null() {
            let data = json!({ "reason": "params" });
            return self.fail(id, -32602, &format!("missing field `{needed}`"), &data);
        }
        let prompt = match tool {
            // There may be none, or one that says nothing.
            "chat" => {
                let messages = arguments["messages"].as_array().unwrap();
                messages.last().and_then(|message| message["content"].as_str()).unwrap_or_default()
            }
            "generate" => arguments["prompt"].as_str().unwrap(),
            "embed" => {
                let vectors: Vec<_> =
                    arguments["input"].as_array().unwrap().iter().map(|_| [0.5, -2.0]).collect();
                let usage = json!({ "prompt_tokens": 4, "cached_tokens": 0, "completion_tokens": 0, "total_tokens": 4 });
                return self.done(
                    id,
                    &json!({ "model": arguments["model"], "embeddings": vectors, "usage": usage }),
                );
            }
            _ => {
                let tokens =
                    json!({ "model": arguments["model"], "count": 1, "tokens": [7], "pieces": ["x"] });
                return self.done(id, &tokens);
            }
        };
        SEEN.lock().unwrap().owners.push(owner);
        let (word, rest) = prompt.split_once(' ').unwrap_or((prompt, ""));
        let mut text = Vec::new();
        match word {
            "say" => text = (1..=rest.parse().unwrap_or(1)).map(|n: u32| format!("{n} ")).collect(),
            "echo" => text.push(json!({ "arguments": arguments, "meta": params["_meta"] }).to_string()),
            "seen" => {
                let seen = SEEN.lock().unwrap();
                text.push(json!({ "owners": seen.owners, "cancelled": seen.cancelled }).to_string());
            }
            "hold" => {
                while !Path::new(rest).exists() && !self.is_cancelled(id) {
                    std::thread::sleep(Duration::from_millis(5));
                }
                text.push("held".to_owned());
            }
            "stall" => {
                self.progress(id, "begun");
                while !self.is_cancelled(id) {
                    std::thread::sleep(Duration::from_millis(5));
                }
                return self.fail(id, -32013, "cancelled", &json!({ "reason": "cancelled" }));
            }
            "die" => {
                self.progress(id, "half a ");
                self.progress(id, "reply");
                std::thread::sleep(Duration::from_millis(100));
                end(ExitReason::GuestPanic, Some("out of memory"));
            }
            "die-once" if !Path::new(rest).exists() => {
                std::fs::write(rest, "").unwrap();
                end(ExitReason::GuestPanic, Some("out of memory"));
            }
            "die-once" => text.push("alive".to_owned()),
            "babble" => return drop(writeln!(self.out.lock().unwrap(), "\u{7f}{{not JSON")),
            "overflow" => {
                let data = json!({ "reason": "context_overflow", "prompt_tokens": 9, "context": 8 });
                return self.fail(id, -32602, "the prompt does not fit the context", &data);
            }
            other => text.push(format!("{other}?")),
        }
        text.iter().for_each(|piece| self.progress(id, piece));
        self.done(id, &reply(tool, arguments, &text));
    }
}

fn reply(tool: &str, arguments: &Value, text: &[String]) -> Value {
    let whole = text.concat();
    let count = text.len();
    let mut reply = json!({
        "model": arguments["model"], "finish_reason": "stop",
        "usage": { "prompt_tokens": 3, "cached_tokens": 2, "completion_tokens": count, "total_tokens": 3 + count },
        "timings": { "queue_ms": 0.0, "first_token_ms": 1.0, "total_ms": 2.0, "tokens_per_second": 3.0 },
    });
    if tool == "generate" {
        reply["text"] = whole.into();
    } else if arguments["tools"].is_array() {
        let function = json!({ "name": "f", "arguments": { "x": 1 } });
        let calls = json!([{ "id": "call_0", "type": "function", "function": function }]);
        reply["message"] = json!({ "role": "assistant", "content": "", "tool_calls": calls });
        reply["finish_reason"] = "tool_calls".into();
    } else {
        reply["message"] = json!({ "role": "assistant", "content": whole });
    }
    reply
}

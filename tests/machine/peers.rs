//! Clients that others made, on the host, over TCP and with the token: each asks the bundled model in the emulated host.

use std::path::{Path, PathBuf};
use std::process::Command;

use ark_tests::{Output, Running};
use serde_json::{Value, json};

use super::{LIMIT, Machine};

/// What `name` of the environment names; without it nothing is tested here, so that a test fails.
fn told(name: &str) -> PathBuf {
    std::env::var_os(name)
        .unwrap_or_else(|| panic!("{name} is not set: run `make machine-tests`, which installs the clients"))
        .into()
}

/// `OpenAI`'s own client for Python.
fn openai(python: &Path, machine: &Machine, token: &str) {
    let mut client = Command::new(python);
    client
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/openai/client.py"))
        .arg(format!("http://127.0.0.1:{}", machine.port))
        .env("ARK_TOKEN", token);
    let said = Running::start(client, LIMIT).wait().ok();
    assert!(said.stdout.starts_with("openai ") && said.stdout.ends_with(" agrees\n"), "{}", said.stdout);
}

/// Runs the inspector of MCP's makers, which sends `token` and asks as `arguments` say.
fn inspect(peers: &Path, machine: &Machine, token: &str, arguments: &[&str]) -> Output {
    let mut inspector = Command::new(peers.join("node"));
    inspector
        .arg(peers.join("node_modules/.bin/mcp-inspector"))
        .args(["--cli", &format!("http://127.0.0.1:{}/mcp", machine.port), "--transport", "http"])
        .args(["--header", &format!("Authorization: Bearer {token}"), "--stored-auth-only"])
        .args(arguments)
        // Where it keeps what it is told.
        .env("HOME", machine.dir.path());
    Running::start(inspector, LIMIT).wait()
}

/// Has the inspector list and call everything there is.
fn inspector(peers: &Path, machine: &Machine, token: &str) {
    let ask = |arguments: &[&str]| inspect(peers, machine, token, arguments);
    // Strict: with schemas that every client can read.
    let tools = ask(&["--method", "tools/list", "--strict"]).ok().json();
    let names: Vec<&Value> =
        tools["tools"].as_array().expect("a list").iter().map(|tool| &tool["name"]).collect();
    assert_eq!(names, ["chat", "generate", "embed", "tokenize"]);
    let models = ask(&["--method", "resources/list"]).ok().json();
    assert_eq!(models["resources"][0]["uri"], "model://router", "{models}");
    let model = ask(&["--method", "resources/read", "--uri", "model://router"]).ok().json();
    let model: Value =
        serde_json::from_str(model["contents"][0]["text"].as_str().expect("a text")).expect("JSON");
    assert_eq!(model["architecture"], "llama");

    let call = |tool: &str, arguments: &Value| {
        ask(&["--method", "tools/call", "--tool-name", tool, "--tool-args-json", &arguments.to_string()])
    };
    let messages =
        json!([{ "role": "user", "content": "Which agent should sort invoices into folders by year?" }]);
    let said = call("chat", &json!({ "messages": messages, "sampling": { "temperature": 0 } })).ok().json();
    let message = &said["structuredContent"]["message"];
    let answer: Value = serde_json::from_str(message["content"].as_str().expect("a text")).expect("JSON");
    assert!(answer["agent"].is_string(), "{said}");
    let said = call("generate", &json!({ "prompt": "hello", "max_tokens": 3 })).ok().json();
    assert_eq!(said["structuredContent"]["usage"]["completion_tokens"], 3, "{said}");
    let said = call("embed", &json!({ "input": ["a", "b"] })).ok().json();
    assert_eq!(said["structuredContent"]["embeddings"].as_array().map(Vec::len), Some(2), "{said}");
    let said = call("tokenize", &json!({ "text": "hello" })).ok().json();
    assert_eq!(said["structuredContent"]["pieces"].as_array().map(Vec::len), Some(1), "{said}");

    let refused = call("generate", &json!({ "prompt": "hello", "sampling": { "temperature": -1 } }));
    assert_ne!(refused.code, 0, "{refused:?}");
    refused.complains_about(&["temperature"]);
    let refused = inspect(peers, machine, "wrong", &["--method", "tools/list"]);
    assert_ne!(refused.code, 0, "{refused:?}");
    refused.complains_about(&["auth_required"]);
}

#[test]
fn clients_that_others_made_ask_the_bundled_model_with_the_token() {
    let (python, peers) = (told("ARK_OPENAI_PYTHON"), told("ARK_MCP_PEERS"));
    let machine = Machine::new();
    machine.start();
    let token = std::fs::read_to_string(machine.dir.path().join("state/token")).expect("the token");
    openai(&python, &machine, token.trim());
    inspector(&peers, &machine, token.trim());
    let _ = machine.ark(["machine", "stop"]).ok();
}

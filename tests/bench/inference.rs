//! The inference server by itself, as a process on this host: what batching and the prefix cache are worth. No VM.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ark_gguf::synthetic::Synthetic;
use ark_tests::assets;
use serde_json::{Value, json};

use crate::report::{Must, Report};

/// Sessions that are decoded together.
const SESSIONS: usize = 8;
/// Tokens of a reply whose speed is measured.
const REPLY: u32 = 96;
/// Turns of each figure.
const TURNS: usize = 5;
/// Least tokens of the beginning that prompts share.
const SHARED: u64 = 512;
/// Longest wait for a server to load its model.
const LIMIT: Duration = Duration::from_secs(120);

/// Measures with the model in the file `bundled`, and with one of random weights in 200 MB.
pub(crate) fn measure(bundled: &Path, report: &mut Report) {
    let dir = tempfile::tempdir().expect("a directory");
    let large = dir.path().join("large.gguf");
    let sizes = Synthetic {
        layers: 12,
        embedding: 640,
        feed_forward: 1_536,
        heads: 10,
        kv_heads: 2,
        ..Synthetic::default()
    };
    let mut file = std::io::BufWriter::new(std::fs::File::create(&large).expect("a file"));
    sizes.write(&mut file).expect("room for 200 MB");
    drop(file);
    let server = Server::start(dir.path(), bundled, &[]);
    // It fits a processor's cache: there batching saves no reading of weights, which is what makes it worth while.
    throughput(&server, "bundled model", Must::Shown, report);
    first_token(&server, "bundled model", report);
    drop(server);
    let server = Server::start(dir.path(), &large, &[]);
    throughput(&server, "200 MB model", Must::AtLeast(2.0), report);
    first_token(&server, "200 MB model", report);
    drop(server);
    threads(dir.path(), &[("bundled model", bundled), ("200 MB model", &large)], report);
}

/// Tokens a second of all sessions together against one that is alone.
fn throughput(server: &Server, model: &str, must: Must, report: &mut Report) {
    let (mut alone, mut together) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        alone.push(speed(server, 1));
        together.push(speed(server, SESSIONS));
    }
    let name = format!("tokens/s, {SESSIONS} sessions, {model}");
    report.against(&name, "1/s", &together, ("1 session", &alone), must);
}

/// Tokens a second of so many sessions, each on a connection of its own.
fn speed(server: &Server, sessions: usize) -> f64 {
    let mut clients: Vec<_> = (0..sessions).map(|_| server.connect()).collect();
    let begun = Instant::now();
    let tokens: f64 = std::thread::scope(|scope| {
        let talks: Vec<_> = clients
            .iter_mut()
            .enumerate()
            .map(|(seed, client)| {
                scope.spawn(move || {
                    let prompt = format!("Session {seed} begins.");
                    client.generate(&prompt, REPLY, seed).1["usage"]["completion_tokens"].as_f64()
                })
            })
            .collect();
        talks.into_iter().filter_map(|talk| talk.join().expect("a session ends")).sum()
    });
    tokens / begun.elapsed().as_secs_f64()
}

/// Time to the first token of a prompt whose beginning another session has read, against one whose beginning nobody has.
fn first_token(server: &Server, model: &str, report: &mut Report) {
    let (mut first, mut second) = (server.connect(), server.connect());
    let (mut cold, mut warm) = (Vec::new(), Vec::new());
    for turn in 0..TURNS {
        let mut prompt = format!("{turn}. ");
        while first.tokens(&prompt) < SHARED {
            prompt.push_str("Agents read this instruction before they answer a question about invoices. ");
        }
        cold.push(first.generate(&format!("{prompt}Who sorts them?"), 1, turn).0);
        let (time, said) = second.generate(&format!("{prompt}Who pays for them?"), 1, turn);
        assert!(said["usage"]["cached_tokens"].as_u64() >= Some(SHARED - 2), "{said}");
        warm.push(time);
    }
    let name = format!("first token after {SHARED} shared ones, {model}");
    report.against(&name, "ms", &warm, ("cold", &cold), Must::AtMost(0.2));
}

/// One thread fewer than there are processors, which is the server's default, against one for each.
fn threads(dir: &Path, models: &[(&str, &Path)], report: &mut Report) {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let fewer = processors.saturating_sub(1).max(1);
    for (model, file) in models {
        let (mut all, mut less) = (Vec::new(), Vec::new());
        for (threads, speeds) in [(processors, &mut all), (fewer, &mut less)] {
            let server = Server::start(dir, file, &["--threads", &threads.to_string()]);
            speeds.extend((0..TURNS).map(|_| speed(&server, 1)));
        }
        let name = format!("tokens/s, {fewer} of {processors} threads, {model}");
        report.against(&name, "1/s", &less, (&format!("{processors}"), &all), Must::Shown);
    }
}

/// `ark-inference` with one model, on a Unix socket; ended when dropped.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both are harmless when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(dir: &Path, model: &Path, more: &[&str]) -> Self {
        let socket = dir.join("server.sock");
        let program = assets().0.join("bin/ark-inference");
        let child = Command::new(&program)
            .arg("--unix")
            .arg(&socket)
            .arg("--model")
            .arg(format!("m={}", model.display()))
            .args(more)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("{}: {e}; build it with: make inference", program.display()));
        Self { child, socket }
    }

    /// A client that has shaken hands, as soon as the model is loaded.
    fn connect(&self) -> Client {
        let end = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < end, "{}: {error}", self.socket.display()),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut client = Client(BufReader::new(stream));
        let hello = json!({"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "ark-bench", "version": "0"}});
        client.ask("initialize", &hello);
        client.send(&json!({"jsonrpc": "2.0", "method": "notifications/initialized"}));
        client
    }
}

/// A connection, one JSON-RPC message a line.
struct Client(BufReader<UnixStream>);

impl Client {
    fn send(&mut self, message: &Value) {
        writeln!(self.0.get_mut(), "{message}").expect("the server reads");
    }

    /// The answer to a request, and when the first message after it came.
    fn ask(&mut self, method: &str, params: &Value) -> (Duration, Value) {
        let begun = Instant::now();
        self.send(&json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}));
        let mut first = None;
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line).expect("the server answers");
            first.get_or_insert_with(|| begun.elapsed());
            let mut message: Value = serde_json::from_str(&line).expect("JSON");
            if message["id"] == 1 {
                assert!(message["error"].is_null(), "{message}");
                return (first.unwrap_or_default(), message["result"].take());
            }
        }
    }

    fn call(&mut self, tool: &str, arguments: &Value) -> (Duration, Value) {
        let params = json!({"name": tool, "arguments": arguments, "_meta": {"progressToken": 1}});
        let (first, mut result) = self.ask("tools/call", &params);
        (first, result["structuredContent"].take())
    }

    fn tokens(&mut self, text: &str) -> u64 {
        self.call("tokenize", &json!({"text": text})).1["count"].as_u64().expect("a count")
    }

    /// Milliseconds to the first token and the result of so much random text, which seldom ends by itself.
    fn generate(&mut self, prompt: &str, tokens: u32, seed: usize) -> (f64, Value) {
        let sampling = json!({"temperature": 10, "top_k": 40, "top_p": 1, "min_p": 0, "seed": seed});
        let arguments = json!({"prompt": prompt, "max_tokens": tokens, "sampling": sampling});
        let (first, result) = self.call("generate", &arguments);
        (first.as_secs_f64() * 1e3, result)
    }
}

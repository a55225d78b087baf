//! The inference server, as its callers see it: MCP, one JSON-RPC message a line.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ark_gguf::synthetic::Synthetic;
use serde_json::{Value, json};

/// Longest wait for a server to load its model.
const LIMIT: Duration = Duration::from_secs(300);

/// A model of random weights in 200 MB, below `dir`.
pub(crate) fn large_model(dir: &Path) -> PathBuf {
    let path = dir.join("large.gguf");
    let sizes = Synthetic {
        layers: 12,
        embedding: 640,
        feed_forward: 1_536,
        heads: 10,
        kv_heads: 2,
        ..Synthetic::default()
    };
    let mut file = std::io::BufWriter::new(std::fs::File::create(&path).expect("a file"));
    sizes.write(&mut file).expect("room for 200 MB");
    path
}

/// Tokens a second of so many sessions, each on a connection of its own that `connect` makes, of replies of `reply` tokens.
pub(crate) fn speed(connect: &impl Fn() -> Client, sessions: usize, reply: u32, how: Reply) -> f64 {
    let mut clients: Vec<_> = (0..sessions).map(|_| connect()).collect();
    let begun = Instant::now();
    let tokens: f64 = std::thread::scope(|scope| {
        let talks: Vec<_> = clients
            .iter_mut()
            .enumerate()
            .map(|(seed, client)| {
                scope.spawn(move || {
                    let prompt = format!("Session {seed} begins.");
                    client.say(&prompt, reply, seed, how).1["usage"]["completion_tokens"].as_f64()
                })
            })
            .collect();
        talks.into_iter().filter_map(|talk| talk.join().expect("a session ends")).sum()
    });
    tokens / begun.elapsed().as_secs_f64()
}

/// How a reply is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// Each token as it is said.
    Streamed,
    /// All of it at its end.
    Whole,
}

/// `ark-inference` with one model, on a Unix socket; ended when dropped.
pub(crate) struct Server {
    child: Child,
    socket: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        // All are harmless when it has ended. The next one listens at the same place.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl Server {
    /// Starts `program` with `model`; its socket is in `dir`.
    pub(crate) fn start(program: &Path, dir: &Path, model: &Path, more: &[&str]) -> Self {
        let socket = dir.join("server.sock");
        let child = Command::new(program)
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
    pub(crate) fn connect(&self) -> Client {
        let end = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < end, "{}: {error}", self.socket.display()),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        Client::new(stream)
    }
}

/// A connection, one JSON-RPC message a line.
pub(crate) struct Client(BufReader<UnixStream>);

impl Client {
    /// Shakes hands with the server at the other end of `stream`.
    pub(crate) fn new(stream: UnixStream) -> Self {
        let mut client = Self(BufReader::new(stream));
        let hello = json!({"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "ark-bench", "version": "0"}});
        client.ask("initialize", &hello);
        client.send(&json!({"jsonrpc": "2.0", "method": "notifications/initialized"}));
        client
    }

    /// Shakes hands with the server in the VM whose vsock socket is `socket`; none while nobody listens there.
    pub(crate) fn in_vm(socket: &Path, port: u32) -> Option<Self> {
        let mut stream = UnixStream::connect(socket).ok()?;
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).ok()?;
        // Byte by byte: what follows is the server's.
        let mut line = Vec::new();
        let mut byte = [0];
        while !line.ends_with(b"\n") {
            stream.read_exact(&mut byte).ok()?;
            line.extend(byte);
        }
        line.starts_with(b"OK ").then(|| Self::new(stream))
    }

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

    /// The time to the first text, and the result.
    fn call(&mut self, tool: &str, arguments: &Value, how: Reply) -> (Duration, Value) {
        let mut params = json!({"name": tool, "arguments": arguments});
        if how == Reply::Streamed {
            params["_meta"] = json!({"progressToken": 1});
        }
        let (first, mut result) = self.ask("tools/call", &params);
        (first, result["structuredContent"].take())
    }

    pub(crate) fn tokens(&mut self, text: &str) -> u64 {
        self.call("tokenize", &json!({"text": text}), Reply::Whole).1["count"].as_u64().expect("a count")
    }

    /// Milliseconds to the first token and the result of so much random text, which seldom ends by itself.
    pub(crate) fn generate(&mut self, prompt: &str, tokens: u32, seed: usize) -> (f64, Value) {
        self.say(prompt, tokens, seed, Reply::Streamed)
    }

    fn say(&mut self, prompt: &str, tokens: u32, seed: usize, how: Reply) -> (f64, Value) {
        let sampling = json!({"temperature": 10, "top_k": 40, "top_p": 1, "min_p": 0, "seed": seed});
        let arguments = json!({"prompt": prompt, "max_tokens": tokens, "sampling": sampling});
        let (first, result) = self.call("generate", &arguments, how);
        (first.as_secs_f64() * 1e3, result)
    }
}

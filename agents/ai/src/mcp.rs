//! A client of MCP, as much as tools need: one JSON-RPC message a line, one call at a time.
//!
//! ```text
//!  initialize ──► its result ──► notifications/initialized ──► tools/call ──► notifications/progress* ──► its result
//! ```
//!
//! What the host sends is bounded by [`MAX_LINE`]. Whoever leaves closes the connection, which cancels what is under way.

use std::io::{self, BufRead, BufReader, Read, Write};

use ark_link::{Address, Stream};
use ark_types::plain::plain;
use serde_json::{Value, json};

/// Revision of the protocol that is spoken.
const REVISION: &str = "2025-11-25";
/// Longest line that is read, bytes: more than 64 embeddings of a large model.
const MAX_LINE: u64 = 64 << 20;
/// Most words of a sentence that the host sent which are shown, bytes.
const MAX_SHOWN: usize = 4096;
/// JSON-RPC: there is no such method.
const NO_METHOD: i64 = -32601;

/// Why a call came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum AiError {
    /// Nobody listens.
    #[error(
        "the host does not answer at {address}: {}; inference is for agents of a host that has it",
        plain(source)
    )]
    Unreachable {
        /// Where it was looked for.
        address: Address,
        /// What the system said.
        source: io::Error,
    },
    /// The connection is gone.
    #[error("the connection to the host broke: {}", plain(.0))]
    Broken(#[from] io::Error),
    /// It ended before the answer.
    #[error("the host closed the connection without an answer")]
    Closed,
    /// The host, or the model's server, refused.
    #[error("{message}")]
    Refused {
        /// Code of JSON-RPC.
        code: i64,
        /// What it said.
        message: String,
        /// Its further words: `reason`, and `text` with what was there.
        data: Value,
    },
    /// Something that is no MCP.
    #[error("the host's answer is not understood: {0}")]
    NotMcp(String),
    /// What is said cannot be passed on.
    #[error("standard output cannot be written: {}", plain(.0))]
    Output(#[source] io::Error),
}

/// A connection on which tools can be called.
#[derive(Debug)]
pub struct Session<S: Read + Write> {
    stream: BufReader<S>,
    next: u64,
}

/// A socket as std's traits have it.
#[derive(Debug)]
pub struct Socket(Stream);

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(buffer)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&self.0).write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        (&self.0).flush()
    }
}

impl Session<Socket> {
    /// Connects with the host at `address` and introduces itself.
    ///
    /// # Errors
    /// [`AiError`].
    pub fn connect(address: &Address) -> Result<Self, AiError> {
        let stream = Stream::connect(address).map_err(|source| {
            let address = address.clone();
            AiError::Unreachable { address, source }
        })?;
        Self::begin(Socket(stream))
    }
}

impl<S: Read + Write> Session<S> {
    /// Introduces itself on `stream`.
    ///
    /// # Errors
    /// [`AiError`].
    pub fn begin(stream: S) -> Result<Self, AiError> {
        let mut session = Self { stream: BufReader::new(stream), next: 0 };
        let client = json!({ "name": "ark-ai", "version": env!("CARGO_PKG_VERSION") });
        let params = json!({ "protocolVersion": REVISION, "capabilities": {}, "clientInfo": client });
        session.request("initialize", params, &mut |_| Ok(()))?;
        session.send(&json!({ "jsonrpc": "2.0", "method": "notifications/initialized" }))?;
        Ok(session)
    }

    /// Calls `tool` and returns its structured result; `heard` gets the text as it comes.
    ///
    /// # Errors
    /// [`AiError`]; what `heard` fails with is [`AiError::Output`].
    pub fn call(
        &mut self,
        tool: &str,
        arguments: &Value,
        heard: &mut dyn FnMut(&str) -> io::Result<()>,
    ) -> Result<Value, AiError> {
        let params = json!({ "name": tool, "arguments": arguments, "_meta": { "progressToken": self.next } });
        let mut result = self.request("tools/call", params, heard)?;
        if result.get("isError") == Some(&Value::Bool(true)) {
            let message =
                result.pointer("/content/0/text").and_then(Value::as_str).unwrap_or("the tool failed");
            return Err(AiError::Refused { code: 0, message: shown(message), data: Value::Null });
        }
        match result.get_mut("structuredContent").map(Value::take) {
            Some(content @ Value::Object(_)) => Ok(content),
            _ => Err(AiError::NotMcp(format!("the result of {tool} has no structured content"))),
        }
    }

    /// The resources that there are, as MCP describes them.
    ///
    /// # Errors
    /// [`AiError`].
    pub fn resources(&mut self) -> Result<Vec<Value>, AiError> {
        let mut result = self.request("resources/list", json!({}), &mut |_| Ok(()))?;
        match result.get_mut("resources").map(Value::take) {
            Some(Value::Array(resources)) => Ok(resources),
            _ => Err(AiError::NotMcp("the list of resources is none".to_owned())),
        }
    }

    fn request(
        &mut self,
        method: &str,
        params: Value,
        heard: &mut dyn FnMut(&str) -> io::Result<()>,
    ) -> Result<Value, AiError> {
        let id = self.next;
        self.next = id.saturating_add(1);
        self.send(&json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params }))?;
        loop {
            let mut message = self.receive()?;
            let of_method = message.get("method").and_then(Value::as_str).map(str::to_owned);
            match (of_method.as_deref(), message.get("id").cloned()) {
                (Some(method), Some(theirs)) => self.answer(method, &theirs)?,
                (Some("notifications/progress"), None) => {
                    if message.pointer("/params/progressToken").and_then(Value::as_u64) == Some(id)
                        && let Some(text) = message.pointer("/params/message").and_then(Value::as_str)
                    {
                        heard(text).map_err(AiError::Output)?;
                    }
                }
                (Some(_), None) => {}
                // An error without an id is about a line that could not be read: there is but one request that it can be about.
                (None, theirs) => {
                    if let Some(error) = message.get_mut("error").map(Value::take) {
                        return Err(refused(&error));
                    }
                    if theirs.as_ref().and_then(Value::as_u64) == Some(id) {
                        let result = message.get_mut("result").map(Value::take);
                        return result.ok_or_else(|| AiError::NotMcp("a reply has no result".to_owned()));
                    }
                }
            }
        }
    }

    /// Answers a request of the host's.
    fn answer(&mut self, method: &str, id: &Value) -> Result<(), AiError> {
        if method == "ping" {
            return self.send(&json!({ "jsonrpc": "2.0", "id": id, "result": {} }));
        }
        let error = json!({ "code": NO_METHOD, "message": "this client has no such method" });
        self.send(&json!({ "jsonrpc": "2.0", "id": id, "error": error }))
    }

    fn send(&mut self, message: &Value) -> Result<(), AiError> {
        let mut line = message.to_string().into_bytes();
        line.push(b'\n');
        let stream = self.stream.get_mut();
        match stream.write_all(&line).and_then(|()| stream.flush()) {
            // Who was refused may find that out by writing, and the reason is there to be read.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => Ok(other?),
        }
    }

    fn receive(&mut self) -> Result<Value, AiError> {
        loop {
            let mut line = Vec::new();
            self.stream.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)?;
            if line.is_empty() {
                return Err(AiError::Closed);
            }
            if line.trim_ascii().is_empty() {
                continue;
            }
            return serde_json::from_slice(&line)
                .map_err(|e| AiError::NotMcp(format!("a line is no JSON: {e}")));
        }
    }
}

fn refused(error: &Value) -> AiError {
    let message = error.get("message").and_then(Value::as_str).unwrap_or("the host refused without a word");
    AiError::Refused {
        code: error.get("code").and_then(Value::as_i64).unwrap_or_default(),
        message: shown(message),
        data: error.get("data").cloned().unwrap_or_default(),
    }
}

/// What the host said, on one line and no longer than anybody reads.
fn shown(text: &str) -> String {
    let mut end = text.len().min(MAX_SHOWN);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let text = text.get(..end).unwrap_or_default();
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

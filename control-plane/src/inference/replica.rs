//! One connection to an inference VM: MCP, one JSON-RPC message a line, many calls at a time.
//!
//! What the VM says is hostile until checked: lines are bounded, what a reply amounts to is bounded, and a VM that breaks the
//! protocol loses the connection. Whoever waits for an answer on it is told.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ark_mcp::lines::MAX_LINE;
use ark_types::guest::INFERENCE_PORT;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::WriteHalf;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::guest::{Address, Dialled, GuestFailure, connect};

/// Lines that wait to be written before those who have more to say are held up.
const WAITING_LINES: usize = 64;
/// How long the VM's server may take to say hello.
const HELLO_LIMIT: Duration = Duration::from_secs(20);
/// Most bytes of one reply.
const MAX_REPLY: usize = 16 << 20;
/// Revision of the protocol that is spoken.
const REVISION: &str = "2025-11-25";

/// An error that the VM answered with.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct RpcError {
    /// Its number, see [`ark_mcp::code`].
    pub(crate) code: i32,
    /// A sentence.
    pub(crate) message: String,
    /// More, for programs.
    #[serde(default)]
    pub(crate) data: Option<Value>,
}

/// What comes of a call.
#[derive(Debug)]
pub(super) enum Piece {
    /// More of the text.
    Text(String),
    /// Its end.
    End(Result<Value, RpcError>),
}

/// A connection. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Replica {
    lines: mpsc::Sender<Vec<u8>>,
    calls: Arc<Calls>,
    next: AtomicU64,
    serving: AbortHandle,
}

/// Calls that wait for an answer.
#[derive(Debug, Default)]
struct Calls(Mutex<Open>);

#[derive(Debug, Default)]
struct Open {
    waiting: HashMap<u64, Waiting>,
    is_broken: bool,
}

#[derive(Debug)]
struct Waiting {
    pieces: mpsc::UnboundedSender<Piece>,
    /// Bytes that may still come.
    room: usize,
}

/// A message of the VM.
#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    id: Option<Value>,
    #[serde(default)]
    method: Option<String>,
    #[serde(default)]
    params: Option<Value>,
    #[serde(default)]
    result: Option<Value>,
    #[serde(default)]
    error: Option<RpcError>,
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Replica {
    /// Connects with the server in the guest at `address`.
    ///
    /// # Errors
    /// [`GuestFailure`].
    pub(super) async fn connect(address: &Address) -> Result<Arc<Self>, GuestFailure> {
        let dialled = connect(address, INFERENCE_PORT).await?;
        let calls = Arc::<Calls>::default();
        let (lines, waiting) = mpsc::channel(WAITING_LINES);
        let serving = tokio::spawn(serve(dialled, waiting, Arc::clone(&calls)));
        let replica =
            Arc::new(Self { lines, calls, next: AtomicU64::new(1), serving: serving.abort_handle() });
        match timeout(HELLO_LIMIT, replica.say_hello()).await {
            Ok(Some(())) => Ok(replica),
            Ok(None) => Err(GuestFailure::Closed),
            Err(_) => Err(GuestFailure::Late(HELLO_LIMIT)),
        }
    }

    async fn say_hello(self: &Arc<Self>) -> Option<()> {
        let params = json!({
            "protocolVersion": REVISION, "capabilities": {},
            "clientInfo": { "name": "arkd", "version": env!("CARGO_PKG_VERSION") },
        });
        let mut hello = self.ask("initialize", params).await?;
        while let Some(piece) = hello.next().await {
            if let Piece::End(answer) = piece {
                answer.ok()?;
                return self.tell("notifications/initialized", &json!({})).await;
            }
        }
        None
    }

    /// Whether nothing can be asked any more.
    pub(super) fn is_broken(&self) -> bool {
        self.calls.lock().is_broken
    }

    /// Has `tool` called with `arguments`; none when the connection is broken.
    pub(super) async fn call(
        self: &Arc<Self>,
        tool: &str,
        arguments: &Map<String, Value>,
        mut meta: Map<String, Value>,
    ) -> Option<Asked> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        meta.insert("progressToken".to_owned(), id.into());
        let params = json!({ "name": tool, "arguments": arguments, "_meta": meta });
        self.ask_as(id, "tools/call", params).await
    }

    async fn ask(self: &Arc<Self>, method: &str, params: Value) -> Option<Asked> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.ask_as(id, method, params).await
    }

    async fn ask_as(self: &Arc<Self>, id: u64, method: &str, params: Value) -> Option<Asked> {
        let (sender, pieces) = mpsc::unbounded_channel();
        {
            let mut open = self.calls.lock();
            if open.is_broken {
                return None;
            }
            open.waiting.insert(id, Waiting { pieces: sender, room: MAX_REPLY });
        }
        // From here on it is taken back when it is dropped.
        let asked = Asked { replica: Arc::clone(self), id, pieces, is_over: false };
        let line = line_of(&json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params }));
        self.lines.send(line).await.ok()?;
        Some(asked)
    }

    async fn tell(&self, method: &str, params: &Value) -> Option<()> {
        let line = line_of(&json!({ "jsonrpc": "2.0", "method": method, "params": params }));
        self.lines.send(line).await.ok()
    }

    /// Tells the VM that nobody waits for the answer to `id`.
    fn take_back(&self, id: u64) {
        if self.calls.lock().waiting.remove(&id).is_none() {
            return;
        }
        let line = line_of(&json!({
            "jsonrpc": "2.0", "method": "notifications/cancelled", "params": { "requestId": id },
        }));
        if let Err(mpsc::error::TrySendError::Full(line)) = self.lines.try_send(line) {
            let lines = self.lines.clone();
            // It takes part in the line of those who wait to be written.
            tokio::spawn(async move { drop(lines.send(line).await) });
        }
    }
}

fn line_of(message: &Value) -> Vec<u8> {
    let mut line = message.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// Passes messages on both ways until either side has no more.
async fn serve(mut dialled: Dialled, lines: mpsc::Receiver<Vec<u8>>, calls: Arc<Calls>) {
    let first = io::Cursor::new(dialled.first.split());
    let (read, write) = dialled.stream.split();
    let mut reader = BufReader::with_capacity(64 << 10, first.chain(read));
    let listening = async {
        let mut line = Vec::new();
        while let Ok(true) = next_line(&mut reader, &mut line).await {
            if calls.take(&line).is_err() {
                tracing::warn!("an inference VM broke the protocol; its connection is ended");
                return;
            }
        }
    };
    tokio::select! {
        () = listening => {}
        () = pass_on(lines, write) => {}
    }
    calls.break_off();
}

/// Writes `lines` until there are no more, or nobody reads them.
async fn pass_on(mut lines: mpsc::Receiver<Vec<u8>>, mut write: WriteHalf<'_>) {
    while let Some(line) = lines.recv().await {
        if write.write_all(&line).await.is_err() {
            return;
        }
    }
}

/// The next line of `reader`, in `line`; false at the end.
async fn next_line(reader: &mut (impl AsyncBufRead + Unpin), line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    loop {
        let bytes = reader.fill_buf().await?;
        if bytes.is_empty() {
            return Ok(false);
        }
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let part = bytes.get(..end.unwrap_or(bytes.len())).unwrap_or_default();
        if line.len() + part.len() > MAX_LINE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        line.extend_from_slice(part);
        let taken = part.len() + usize::from(end.is_some());
        reader.consume(taken);
        if end.is_some() {
            return Ok(true);
        }
    }
}

/// The VM did what the protocol does not allow.
struct Misbehaved;

impl Calls {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody gets an answer any more; who waits for one is told.
    fn break_off(&self) {
        let mut open = self.lock();
        open.is_broken = true;
        open.waiting.clear();
    }

    /// Takes in a message of the VM.
    fn take(&self, line: &[u8]) -> Result<(), Misbehaved> {
        if line.trim_ascii().is_empty() {
            return Ok(());
        }
        let message: Message = serde_json::from_slice(line).map_err(|_| Misbehaved)?;
        match message.method.as_deref() {
            Some("notifications/progress") => self.progress(message.params, line.len()),
            // It asks or tells something that no call is about.
            Some(_) => Ok(()),
            None => {
                let Some(id) = message.id.as_ref().and_then(Value::as_u64) else {
                    // It did not understand something: whose that was is not known.
                    return Err(Misbehaved);
                };
                let answer = match (message.result, message.error) {
                    (Some(result), None) => Ok(result),
                    (None, Some(error)) => Err(error),
                    _ => return Err(Misbehaved),
                };
                // Whoever asked may have left.
                if let Some(waiting) = self.lock().waiting.remove(&id) {
                    let _ = waiting.pieces.send(Piece::End(answer));
                }
                Ok(())
            }
        }
    }

    fn progress(&self, params: Option<Value>, bytes: usize) -> Result<(), Misbehaved> {
        let Some(Value::Object(mut params)) = params else { return Err(Misbehaved) };
        let token = params.get("progressToken").and_then(Value::as_u64).ok_or(Misbehaved)?;
        let Some(Value::String(text)) = params.remove("message") else { return Ok(()) };
        let mut open = self.lock();
        let Some(waiting) = open.waiting.get_mut(&token) else { return Ok(()) };
        waiting.room = waiting.room.checked_sub(bytes).ok_or(Misbehaved)?;
        let _ = waiting.pieces.send(Piece::Text(text));
        Ok(())
    }
}

/// A call that waits for its answer. Dropped before that, it is taken back.
#[derive(Debug)]
pub(super) struct Asked {
    replica: Arc<Replica>,
    id: u64,
    pieces: mpsc::UnboundedReceiver<Piece>,
    is_over: bool,
}

impl Asked {
    /// What comes next; none when the connection broke.
    pub(super) async fn next(&mut self) -> Option<Piece> {
        let piece = self.pieces.recv().await;
        self.is_over = !matches!(piece, Some(Piece::Text(_)));
        piece
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if !self.is_over {
            self.replica.take_back(self.id);
        }
    }
}

//! The wire: one JSON-RPC message a line, over any stream.
//!
//! Unlike the SDK's own transport for streams, a line that cannot be read is answered (parse error, invalid request) instead of
//! dropped, so that no caller waits for an answer that never comes.

use std::collections::HashSet;
use std::io;
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};

use rmcp::RoleServer;
use rmcp::model::{ClientNotification, ErrorCode, ErrorData, JsonRpcMessage, RequestId};
use rmcp::service::{RxJsonRpcMessage, TxJsonRpcMessage};
use rmcp::transport::Transport;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::{Mutex, Notify, mpsc};
use tokio_util::sync::CancellationToken;

use crate::code::OVERLOADED;

/// Longest line, in bytes: more than the longest text that any tool takes, escaped.
pub const MAX_LINE: usize = 16 << 20;
/// Lines that wait to be written before those who have more to say are held up.
const WAITING_LINES: usize = 64;

/// A stream of messages.
#[derive(Debug)]
pub struct Lines<R> {
    read: BufReader<R>,
    line: Vec<u8>,
    /// Inside a line that is too long.
    skipping: bool,
    /// `None` once closed.
    write: Arc<Mutex<Option<mpsc::Sender<Vec<u8>>>>>,
    writer: Option<tokio::task::JoinHandle<()>>,
    /// Cancelled when the peer has closed its side.
    gone: CancellationToken,
    open: Arc<Requests>,
    /// Most of them.
    most: usize,
    /// The peer may close its side and still gets its answers.
    half_open: bool,
}

enum Line {
    Whole,
    TooLong,
    End,
}

impl<R: AsyncRead + Send + Unpin> Lines<R> {
    /// Messages of `read`, answered on `write`; `gone` is cancelled when `read` ends, with `half_open` only after the last answer. Of
    /// requests at most `most` are answered at a time, and more are refused. Must be called within a runtime.
    pub fn new(
        read: R,
        mut write: impl AsyncWrite + Send + Unpin + 'static,
        gone: CancellationToken,
        most: usize,
        half_open: bool,
    ) -> Self {
        let (sender, mut lines) = mpsc::channel::<Vec<u8>>(WAITING_LINES);
        let broken = gone.clone();
        let writer = tokio::spawn(async move {
            while let Some(line) = lines.recv().await {
                let flush = lines.is_empty();
                if write.write_all(&line).await.is_err() || (flush && write.flush().await.is_err()) {
                    broken.cancel();
                    return;
                }
            }
            // A peer that is gone does not care how the stream ends.
            let _ = write.shutdown().await;
        });
        Self {
            read: BufReader::with_capacity(64 << 10, read),
            line: Vec::new(),
            skipping: false,
            write: Arc::new(Mutex::new(Some(sender))),
            writer: Some(writer),
            gone,
            open: Arc::default(),
            most,
            half_open,
        }
    }

    /// The next line, in `self.line`. What was read stays there when this is dropped half way.
    async fn next_line(&mut self) -> io::Result<Line> {
        loop {
            let bytes = self.read.fill_buf().await?;
            if bytes.is_empty() {
                return Ok(Line::End);
            }
            let end = bytes.iter().position(|b| *b == b'\n');
            let part = bytes.get(..end.unwrap_or(bytes.len())).unwrap_or_default();
            let taken = part.len() + usize::from(end.is_some());
            if self.line.len() + part.len() > MAX_LINE {
                self.skipping = true;
                self.line = Vec::new();
            }
            if !self.skipping {
                self.line.extend_from_slice(part);
            }
            self.read.consume(taken);
            if end.is_some() {
                return Ok(if std::mem::take(&mut self.skipping) { Line::TooLong } else { Line::Whole });
            }
        }
    }

    /// Notes which requests are being answered.
    fn admit(&self, message: &RxJsonRpcMessage<RoleServer>) -> Result<(), (ErrorData, RequestId)> {
        match message {
            JsonRpcMessage::Request(request) => {
                let (mut open, id) = (self.open.ids(), request.id.clone());
                if open.contains(&id) {
                    let text = "a request with this id is under way; give each its own";
                    return Err((ErrorData::new(ErrorCode::INVALID_REQUEST, text, None), id));
                }
                if open.len() >= self.most {
                    let text = format!(
                        "{} requests of this connection are under way, and no more may be; wait for answers",
                        open.len()
                    );
                    return Err((ErrorData::new(OVERLOADED, text, None), id));
                }
                open.insert(id);
            }
            // Nobody answers it any more.
            JsonRpcMessage::Notification(notification) => {
                if let ClientNotification::CancelledNotification(cancelled) = &notification.notification
                    && let Some(id) = &cancelled.params.request_id
                {
                    self.open.end(id);
                }
            }
            JsonRpcMessage::Response(_) | JsonRpcMessage::Error(_) => {}
        }
        Ok(())
    }

    /// Answers what is no request. A peer that does not read its answers gets no more of them.
    async fn refuse(&mut self, error: ErrorData, id: Option<RequestId>) {
        if let Some(sender) = self.write.lock().await.as_ref() {
            let _ = sender.try_send(encode(&TxJsonRpcMessage::<RoleServer>::error(error, id)));
        }
    }
}

/// Requests that are being answered.
#[derive(Debug, Default)]
struct Requests {
    ids: StdMutex<HashSet<RequestId>>,
    fewer: Notify,
}

impl Requests {
    fn ids(&self) -> MutexGuard<'_, HashSet<RequestId>> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, id: &RequestId) {
        self.ids().remove(id);
        self.fewer.notify_one();
    }

    /// Waits until there are none.
    async fn none(&self) {
        while !self.ids().is_empty() {
            self.fewer.notified().await;
        }
    }
}

/// A request that is being answered, until this goes.
struct Open(Arc<Requests>, RequestId);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.end(&self.1);
    }
}

fn encode(message: &TxJsonRpcMessage<RoleServer>) -> Vec<u8> {
    // Messages are made of maps with string keys and numbers, which always have a JSON form.
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}

/// What to answer to a line that is no message; `None` for a notification, which is never answered.
fn refusal(line: &[u8], error: &serde_json::Error) -> Option<(ErrorData, Option<RequestId>)> {
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(line) else {
        let text = format!("this line is not JSON in UTF-8 ({error}); send one JSON-RPC message a line");
        return Some((ErrorData::new(ErrorCode::PARSE_ERROR, text, None), None));
    };
    let id = value.get("id").and_then(|id| serde_json::from_value(id.clone()).ok());
    if id.is_none() && value.get("method").is_some() && value.get("id").is_none() {
        return None;
    }
    Some((ErrorData::new(ErrorCode::INVALID_REQUEST, "this is JSON, but no JSON-RPC 2.0 message", None), id))
}

impl<R: AsyncRead + Send + Unpin + 'static> Transport<RoleServer> for Lines<R> {
    type Error = io::Error;

    fn send(
        &mut self,
        item: TxJsonRpcMessage<RoleServer>,
    ) -> impl Future<Output = io::Result<()>> + Send + 'static {
        let write = Arc::clone(&self.write);
        let answered = match &item {
            JsonRpcMessage::Response(response) => Some(response.id.clone()),
            JsonRpcMessage::Error(error) => error.id.clone(),
            JsonRpcMessage::Request(_) | JsonRpcMessage::Notification(_) => None,
        };
        // It counts until its answer has its place among the lines, and no longer: whoever has read that may use the id again.
        let open = answered.map(|id| Open(Arc::clone(&self.open), id));
        async move {
            let line = encode(&item);
            let sender = write.lock().await.clone().ok_or(io::ErrorKind::NotConnected)?;
            let place = sender.reserve_owned().await.map_err(|_| io::ErrorKind::BrokenPipe)?;
            drop(open);
            drop(place.send(line));
            Ok(())
        }
    }

    async fn receive(&mut self) -> Option<RxJsonRpcMessage<RoleServer>> {
        loop {
            match self.next_line().await {
                Ok(Line::Whole) => {}
                Ok(Line::TooLong) => {
                    let text = format!("this line has more than {MAX_LINE} bytes, which no call needs");
                    self.refuse(ErrorData::new(ErrorCode::INVALID_REQUEST, text, None), None).await;
                    continue;
                }
                Ok(Line::End) | Err(_) => {
                    if self.half_open {
                        // The SDK gives answers a few seconds when a stream ends, so the end is kept from it.
                        tokio::select! { () = self.open.none() => {} () = self.gone.cancelled() => {} }
                    }
                    self.gone.cancel();
                    return None;
                }
            }
            let line = std::mem::take(&mut self.line);
            if line.trim_ascii().is_empty() {
                continue;
            }
            match serde_json::from_slice(&line) {
                Ok(message) => match self.admit(&message) {
                    Ok(()) => return Some(message),
                    Err((error, id)) => self.refuse(error, Some(id)).await,
                },
                Err(error) => {
                    if let Some((error, id)) = refusal(&line, &error) {
                        self.refuse(error, id).await;
                    }
                }
            }
        }
    }

    async fn close(&mut self) -> io::Result<()> {
        drop(self.write.lock().await.take());
        if let Some(writer) = self.writer.take() {
            let _ = writer.await;
        }
        Ok(())
    }
}

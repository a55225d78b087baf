//! REST calls over a Unix socket, on a connection that stays open.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

/// Longest body that is read.
const MAX_BODY: u64 = 64 << 20;

/// A reply, read to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Status.
    pub status: u16,
    /// Tag of what it tells of; none when it has none.
    pub etag: Option<String>,
    /// Whether it was given before, to a request with the same key.
    pub is_replayed: bool,
    /// Body.
    pub body: Vec<u8>,
}

impl Reply {
    /// The body as JSON; null where it is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }
}

/// A header of a request beside those that every one has: name and value.
pub type Header<'a> = Option<(&'a str, &'a str)>;

/// One connection to an `arkd`.
#[derive(Debug)]
pub struct Connection(BufReader<UnixStream>);

impl Connection {
    /// Connects to the socket of an `arkd`. A read that takes longer than `patience` fails with `WouldBlock`.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn open(socket: &Path, patience: Duration) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Sends a request and does not wait for its reply.
    ///
    /// # Errors
    /// When the other side does not take it.
    pub fn send(&mut self, method: &str, path: &str, body: &str) -> io::Result<()> {
        self.send_with(method, path, None, body)
    }

    fn send_with(&mut self, method: &str, path: &str, header: Header<'_>, body: &str) -> io::Result<()> {
        let length = body.len();
        let header = header.map_or_else(String::new, |(name, value)| format!("{name}: {value}\r\n"));
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: ark\r\n{header}content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        self.0.get_mut().write_all(request.as_bytes())
    }

    /// Asks for a stream of server-sent events, and does not read it yet.
    ///
    /// # Errors
    /// When the other side does not take it.
    pub fn follow(&mut self, path: &str) -> io::Result<()> {
        let request = format!("GET {path} HTTP/1.1\r\nhost: ark\r\naccept: text/event-stream\r\n\r\n");
        self.0.get_mut().write_all(request.as_bytes())
    }

    /// Reads until a line has `text` in it, such as the kind of an event that is followed.
    ///
    /// # Errors
    /// When the connection ends before that.
    pub fn wait_for(&mut self, text: &str) -> io::Result<()> {
        while !self.line()?.contains(text) {}
        Ok(())
    }

    /// Reads the reply to a request that was sent.
    ///
    /// # Errors
    /// When the connection ends before it is whole, or it is no reply.
    pub fn receive(&mut self) -> io::Result<Reply> {
        let head = self.line()?;
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or_else(|| broken(&head))?;
        let (mut length, mut etag, mut is_replayed) = (0, None, false);
        loop {
            let line = self.line()?;
            if line.is_empty() {
                break;
            }
            let Some((name, value)) = line.split_once(':') else { return Err(broken(&line)) };
            let value = value.trim();
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.parse().map_err(|_| broken(&line))?,
                "etag" => etag = Some(value.to_owned()),
                "idempotency-replayed" => is_replayed = value == "true",
                _ => {}
            }
        }
        let mut body = Vec::new();
        (&mut self.0).take(length.min(MAX_BODY)).read_to_end(&mut body)?;
        if body.len() as u64 != length {
            return Err(broken("half a body"));
        }
        Ok(Reply { status, etag, is_replayed, body })
    }

    /// One request and its reply.
    ///
    /// # Errors
    /// As [`Self::send`] and [`Self::receive`].
    pub fn call(&mut self, method: &str, path: &str, body: &str) -> io::Result<Reply> {
        self.call_with(method, path, None, body)
    }

    /// The same with a header.
    ///
    /// # Errors
    /// As [`Self::send`] and [`Self::receive`].
    pub fn call_with(
        &mut self,
        method: &str,
        path: &str,
        header: Header<'_>,
        body: &str,
    ) -> io::Result<Reply> {
        self.send_with(method, path, header, body)?;
        self.receive()
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not a reply: {what:?}"))
}

//! REST calls over a connection that stays open, timed.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use serde_json::Value;

use crate::World;

/// One connection to an `arkd`.
pub struct Rest(BufReader<UnixStream>);

impl Rest {
    /// Connects to the `arkd` of `world`.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn connect(world: &World) -> Self {
        Self::try_connect(world).expect("arkd listens")
    }

    /// Connects to the `arkd` of `world`, if one listens.
    #[must_use]
    pub fn try_connect(world: &World) -> Option<Self> {
        let socket = UnixStream::connect(world.run_dir().api_socket()).ok()?;
        Some(Self(BufReader::new(socket)))
    }

    /// One call: the answer, and the time until its last byte in milliseconds.
    ///
    /// # Panics
    /// When it is refused, or `arkd` is gone.
    pub fn call(&mut self, method: &str, path: &str, body: &str) -> (Value, f64) {
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: ark\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        let begin = Instant::now();
        self.0.get_mut().write_all(request.as_bytes()).expect("arkd reads");
        let (status, reply) = self.read();
        let ms = begin.elapsed().as_secs_f64() * 1e3;
        let text = String::from_utf8_lossy(&reply);
        assert!((200..300).contains(&status), "{method} {path} {body}: {status} {text}");
        (serde_json::from_str(&text).unwrap_or(Value::Null), ms)
    }

    fn read(&mut self) -> (u16, Vec<u8>) {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("arkd answers");
        let status = line.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status line");
        let mut length = 0;
        loop {
            line.clear();
            self.0.read_line(&mut line).expect("arkd answers");
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().expect("a length");
            }
            if line == "\r\n" {
                break;
            }
        }
        let mut reply = vec![0; length];
        self.0.read_exact(&mut reply).expect("the body");
        (status, reply)
    }

    /// exec of `/bin/true` in `agent`, milliseconds.
    ///
    /// # Panics
    /// When it does not succeed.
    pub fn exec_true(&mut self, agent: &str) -> f64 {
        let path = format!("/v1/agents/{agent}/exec");
        let (reply, ms) = self.call("POST", &path, "{\"argv\":[\"/bin/true\"]}");
        assert_eq!(reply["exit_code"], 0, "{reply}");
        ms
    }

    /// Creates an agent of `what` (fields of the request) and lets it run `/bin/true`: the time until that is answered,
    /// milliseconds.
    ///
    /// # Panics
    /// When that does not succeed.
    pub fn create_and_exec(&mut self, name: &str, what: &str) -> f64 {
        let body = format!("{{\"name\":\"{name}\",{what}}}");
        let begin = Instant::now();
        self.call("POST", "/v1/agents", &body);
        self.exec_true(name);
        begin.elapsed().as_secs_f64() * 1e3
    }

    /// Deletes an agent at once.
    ///
    /// # Panics
    /// When there is none.
    pub fn delete(&mut self, name: &str) {
        self.call("DELETE", &format!("/v1/agents/{name}?grace_ms=0"), "");
    }
}

//! REST calls over a connection that stays open, timed.

use std::time::{Duration, Instant};

use ark_chaos::http::Connection;
use serde_json::Value;

use crate::World;

/// Longest wait for a reply: emulated hosts are slow, and some requests wait for many guests.
const PATIENCE: Duration = Duration::from_secs(600);

/// One connection to an `arkd`.
pub struct Rest(Connection);

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
        Connection::open(&world.run_dir().api_socket(), PATIENCE).ok().map(Self)
    }

    /// One call: the answer, and the time until its last byte in milliseconds.
    ///
    /// # Panics
    /// When it is refused, or `arkd` is gone.
    pub fn call(&mut self, method: &str, path: &str, body: &str) -> (Value, f64) {
        let begin = Instant::now();
        let reply = self.0.call(method, path, body).expect("arkd answers");
        let ms = begin.elapsed().as_secs_f64() * 1e3;
        let text = String::from_utf8_lossy(&reply.body);
        assert!((200..300).contains(&reply.status), "{method} {path} {body}: {} {text}", reply.status);
        (reply.json(), ms)
    }

    /// One call that may be refused: the status, and the answer.
    ///
    /// # Panics
    /// When `arkd` is gone.
    pub fn ask(&mut self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let reply = self.0.call(method, path, body).expect("arkd answers");
        (reply.status, reply.json())
    }

    /// The number that `/metrics` gives under `name`, labels and all; none where it does not.
    ///
    /// # Panics
    /// When `arkd` is gone.
    pub fn metric(&mut self, name: &str) -> Option<f64> {
        let reply = self.0.call("GET", "/metrics", "").expect("arkd answers");
        let text = String::from_utf8_lossy(&reply.body).into_owned();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        line.parse().ok()
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

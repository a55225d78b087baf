//! `ark` as users run it, with a small server on a Unix socket in arkd's place.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use ark_types::problem::{Problem, ProblemKind};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

/// A refusal.
pub(crate) fn problem(kind: ProblemKind, detail: &str) -> Response {
    let body = serde_json::to_vec(&Problem::new(kind, detail)).unwrap();
    let status = StatusCode::from_u16(kind.status()).unwrap();
    (status, [(CONTENT_TYPE, ark_types::problem::PROBLEM_JSON)], body).into_response()
}

/// An agent as arkd reports it.
#[allow(dead_code, reason = "not every test is about agents")]
pub(crate) fn agent(name: &str) -> Value {
    json!({
        "id": "0011223344556677", "name": name, "origin": { "from": "boot" }, "image": "base", "image_digest": "sha256:00", "vcpus": 1,
        "memory_mib": 256, "state": "running", "created_unix_ms": 0, "auto_remove": true,
    })
}

/// Directories for one test, with a server behind the socket.
pub(crate) struct Host {
    dir: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
}

impl Host {
    /// A server of `routes`, and of its health, which is looked at before anything else.
    pub(crate) fn start(routes: Router) -> Self {
        Self::start_with(routes, |routes| routes)
    }

    /// As [`Self::start`], with `layer` around everything.
    pub(crate) fn start_with(routes: Router, layer: impl FnOnce(Router) -> Router) -> Self {
        let health = json!({
            "status": "ok", "version": "0.1.0", "pid": 1, "host": "native", "cpus": 2, "memory_mib": 1024, "agents": 1,
            "uptime_ms": 1, "kvm": { "usable": true, "reason": "a guest ran", "duration_us": 1 },
        });
        let routes = layer(routes.route("/v1/health", get(|| async move { Json(health) })));
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("run")).unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let socket: PathBuf = dir.path().join("run/arkd.sock");
        let listener = runtime.block_on(async { tokio::net::UnixListener::bind(socket).unwrap() });
        runtime.spawn(async move { axum::serve(listener, routes).await });
        Self { dir, _runtime: runtime }
    }

    /// `ark` with `args`, its streams piped.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        ark(self.dir.path(), args)
    }

    /// Runs `ark` with `input`; its exit code, standard output and standard error.
    pub(crate) fn run(&self, args: &[&str], input: &str) -> (i32, String, String) {
        let mut child = self.command(args).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        told(child.wait_with_output().unwrap())
    }
}

/// `ark` with the directories in `dir`.
pub(crate) fn ark(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ark"));
    for name in ["assets", "state", "run"] {
        command.env(format!("ARK_{}", name.to_uppercase()), dir.join(name));
    }
    command.env("ARK_HOST", "native").env_remove("ARK_PORT").args(args);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Exit code, standard output and standard error.
pub(crate) fn told(output: Output) -> (i32, String, String) {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

//! An `arkd` with fake VMMs in a directory of its own, and a client that speaks to it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ark_types::agent::Agent;
use ark_types::health::HostKind;
use ark_types::layout::{Assets, RunDir, StateDir};
use ark_types::problem::{PROBLEM_JSON, Problem, ProblemKind};
use arkd::config::{Config, ConsoleLimits, PoolSizes, Timing};
use arkd::daemon::Daemon;
use arkd::scheduler::SchedulerConfig;
use arkd::supervisor::ProcessIdentity;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sha2::Digest as _;
use tokio::net::{TcpStream, UnixStream};

/// The example `name`; cargo builds it beside the tests.
fn example(name: &str) -> PathBuf {
    let this = std::env::current_exe().unwrap();
    let built = this.ancestors().nth(2).unwrap().join("examples").join(name);
    assert!(built.exists(), "{} is missing: `cargo test -p arkd` builds it", built.display());
    built
}

/// Images of every test: the name is what the guest does.
pub(crate) const IMAGES: [&str; 29] = [
    "base",
    "inference",
    "inference-fails",
    "panics",
    "silent",
    "no-record",
    "babbles",
    "powers-off",
    "ignores-stop",
    "lies",
    "dies-in-exec",
    "shrinks",
    "rotten",
    "full-disk",
    "slow-snapshot",
    "slow-reclaim",
    "unrestorable",
    "same-random",
    "wrong-clock",
    "keeps-its-name",
    "never-calls",
    "another-nonce",
    "no-random",
    "same-evaluator-random",
    "keeps-its-machine-id",
    "counts-no-renewal",
    "slow-second-renewal",
    "falls-silent",
    "dies-on-resume",
];

/// A directory with assets, state and run directory.
pub(crate) struct Place {
    pub(crate) dir: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join("assets/images");
        std::fs::create_dir_all(&images).unwrap();
        let program = dir.path().join("assets/bin/ark-vmm");
        std::fs::create_dir_all(program.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(example("fake-vmm"), &program).unwrap();
        let kernel = Assets(dir.path().join("assets"));
        std::fs::create_dir_all(kernel.kernel().parent().unwrap()).unwrap();
        std::fs::write(kernel.kernel(), "kernel").unwrap();
        std::fs::write(kernel.initrd(), "guestd").unwrap();
        for name in IMAGES {
            std::fs::write(images.join(format!("{name}.erofs")), name).unwrap();
            let digest: String = sha2::Sha256::digest(name).iter().map(|b| format!("{b:02x}")).collect();
            let digest = if name == "rotten" { "0".repeat(64) } else { digest };
            let manifest = json!({
                "manifest_version": 1, "name": name, "digest": format!("sha256:{digest}"), "size": name.len(),
                "description": "a fake", "built_from": [], "created_unix": 0,
            });
            std::fs::write(images.join(format!("{name}.json")), manifest.to_string()).unwrap();
        }
        Self { dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn run(&self) -> RunDir {
        RunDir(self.path("run"))
    }

    pub(crate) fn state(&self) -> StateDir {
        StateDir(self.path("state"))
    }

    pub(crate) fn config(&self) -> Config {
        Config {
            assets: Assets(self.path("assets")),
            run: self.run(),
            state: self.state(),
            token_file: self.path("state/token"),
            listen: None,
            host_kind: HostKind::Native,
            host_shell: None,
            timing: Timing {
                boot: Duration::from_secs(20),
                probe: Duration::from_secs(20),
                first_stream: Duration::from_millis(700),
                exec_slack: Duration::from_millis(300),
                exec_grace: Duration::from_secs(3),
                renewal: Duration::from_secs(5),
                // Fakes beat ten times a second.
                silence: Duration::from_secs(2),
                demand: Duration::from_secs(60),
                checkpoint_second: Duration::from_millis(20),
            },
            // What is made ahead would be counted among the agents' directories.
            pool: PoolSizes::default(),
            consoles: ConsoleLimits { agents: 3, bytes: 1 << 20 },
            telemetry: arkd::settings::Telemetry::default(),
            compaction: arkd::ledger::Compaction::default(),
            scheduler: SchedulerConfig::default(),
            tasks: arkd::settings::Tasks::default().into(),
            inference: arkd::settings::Inference::default(),
        }
    }

    pub(crate) async fn start(&self) -> Ark {
        self.start_with(self.config()).await
    }

    pub(crate) async fn start_with(&self, config: Config) -> Ark {
        let daemon = Daemon::start(config).await.unwrap();
        Ark { client: Client::unix(&self.run().api_socket()), daemon }
    }

    /// Directories of agents that are there.
    pub(crate) fn agent_dirs(&self) -> usize {
        std::fs::read_dir(self.run().agents()).map_or(0, Iterator::count)
    }
}

/// A serving `arkd`.
pub(crate) struct Ark {
    pub(crate) daemon: Daemon,
    pub(crate) client: Client,
}

/// A client; every request has a connection of its own.
#[derive(Clone)]
pub(crate) enum Client {
    Unix(PathBuf),
    Tcp(SocketAddr, Option<String>),
}

/// An open connection.
pub(crate) trait Stream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send {}
impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send> Stream for T {}

/// A reply, read to its end.
pub(crate) struct Reply {
    pub(crate) response: Response<()>,
    pub(crate) body: Bytes,
}

impl Reply {
    pub(crate) fn status(&self) -> StatusCode {
        self.response.status()
    }

    pub(crate) fn json<T: DeserializeOwned>(&self) -> T {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {:?}", self.body))
    }

    /// The reply as a problem of `kind`, its content type and status checked.
    pub(crate) fn problem(&self, kind: ProblemKind) -> Problem {
        let problem: Problem = self.json();
        assert_eq!(problem.kind, kind, "{problem:?}");
        assert_eq!(self.response.headers()[CONTENT_TYPE], PROBLEM_JSON);
        assert_eq!(self.status().as_u16(), kind.status());
        problem
    }
}

impl Client {
    pub(crate) fn unix(socket: &Path) -> Self {
        Self::Unix(socket.to_owned())
    }

    pub(crate) async fn connect(&self) -> Box<dyn Stream> {
        match self {
            Self::Unix(path) => Box::new(UnixStream::connect(path).await.unwrap()),
            Self::Tcp(address, _) => Box::new(TcpStream::connect(address).await.unwrap()),
        }
    }

    pub(crate) async fn try_send(&self, request: Request<Full<Bytes>>) -> hyper::Result<Response<Incoming>> {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(self.connect().await)).await.unwrap();
        tokio::spawn(connection);
        sender.send_request(request).await
    }

    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        self.try_send(request).await.unwrap()
    }

    pub(crate) fn request(&self, method: Method, path: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
        let mut request = Request::builder().method(method).uri(path).header("host", "ark");
        if let Self::Tcp(_, Some(token)) = self {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        request.header(CONTENT_TYPE, "application/json").body(Full::new(body.into())).unwrap()
    }

    pub(crate) async fn ask(&self, method: Method, path: &str, body: impl Into<Bytes>) -> Reply {
        self.reply(self.request(method, path, body)).await
    }

    /// The reply to `request`.
    pub(crate) async fn reply(&self, request: Request<Full<Bytes>>) -> Reply {
        let (parts, body) = self.send(request).await.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Reply { response: Response::from_parts(parts, ()), body }
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.ask(Method::GET, path, "").await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Reply {
        self.ask(Method::POST, path, body.to_string()).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Reply {
        self.ask(Method::DELETE, path, "").await
    }

    /// An agent called `name`, booted from `image`.
    pub(crate) async fn create(&self, name: &str, image: &str) -> Agent {
        let reply = self.post("/v1/agents", &json!({ "name": name, "image": image, "memory_mib": 64 })).await;
        assert_eq!(reply.status(), StatusCode::CREATED, "{:?}", reply.body);
        reply.json()
    }

    pub(crate) async fn exec(&self, agent: &str, body: &Value) -> Reply {
        self.post(&format!("/v1/agents/{agent}/exec"), body).await
    }
}

/// Asks again and again until `check` says yes.
pub(crate) async fn eventually(what: &str, mut check: impl AsyncFnMut() -> bool) {
    for _ in 0..3000 {
        if check().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("it did not come about that {what}");
}

/// Whether a process runs (and is no zombie).
pub(crate) fn runs(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// Signals a process that is there.
pub(crate) fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
}

/// A command that runs the real program in `place`.
pub(crate) fn arkd(place: &Place, arguments: &[&str]) -> Command {
    arkd_of(Command::new(env!("CARGO_BIN_EXE_arkd")), place, arguments)
}

/// The same of one that takes checkpoints a hundred times as often as it is told.
pub(crate) fn hasty_arkd(place: &Place) -> Command {
    arkd_of(Command::new(example("hasty-arkd")), place, &[])
}

fn arkd_of(mut command: Command, place: &Place, arguments: &[&str]) -> Command {
    command
        .args(arguments)
        .env("ARK_ASSETS", place.path("assets"))
        .env("ARK_STATE", place.path("state"))
        .env("ARK_RUN", place.path("run"))
        .env("ARK_POOL", "0")
        .env("ARK_STANDBY", "0")
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    command
}

/// An `arkd` in a process of its own. With it end the VMMs that it leaves, whatever becomes of the test.
pub(crate) struct Process {
    pub(crate) child: Child,
    run: RunDir,
}

impl Process {
    /// Starts `command`, an `arkd` of `place`.
    pub(crate) fn start(place: &Place, command: &mut Command) -> Self {
        Self { child: command.spawn().unwrap(), run: place.run() }
    }

    /// Signals it and waits for its end; whether that was in order.
    pub(crate) fn end(&mut self, with: Signal) -> bool {
        signal(self.child.id(), with);
        self.child.wait().unwrap().success()
    }

    /// Waits for an end that was asked for.
    pub(crate) fn wait(&mut self) -> bool {
        self.child.wait().unwrap().success()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        end_vmms(&self.run);
    }
}

/// Ends every VMM that an `arkd` left.
pub(crate) fn end_vmms(run: &RunDir) {
    for dir in std::fs::read_dir(run.agents()).into_iter().flatten().flatten() {
        if let Ok(identity) = ProcessIdentity::read(&dir.path().join("vmm.json")) {
            let _ = identity.terminate(Duration::from_secs(5));
        }
    }
}

/// The real program, once it listens.
pub(crate) async fn started(place: &Place, arguments: &[&str]) -> (Process, Client) {
    let child = Process::start(place, arkd(place, arguments).stderr(Stdio::null()));
    let socket = place.run().api_socket();
    eventually("arkd listens", async || tokio::net::UnixStream::connect(&socket).await.is_ok()).await;
    (child, Client::unix(&socket))
}

//! A guestd that serves a Unix socket in a directory of its own, and a small client for it.
#![allow(dead_code, unreachable_pub, reason = "each test program includes this file and uses its share")]

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use ark_link::{Address, Connection, Stream};
use ark_types::exec::{ExecEnd, ExecRequest, ExitStatus, TtySize};
use ark_types::guest::{ErrorCode, Frame, GuestError, Kind, SignalRequest, Started};
use serde::Serialize;

/// Longest wait for any one frame.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A running guestd. It is a subreaper: orphans become its children, as in a guest.
pub struct Guestd {
    child: Child,
    dir: tempfile::TempDir,
}

impl Guestd {
    pub fn start() -> Self {
        Self::start_after(|_| Ok(()))
    }

    /// One with the evaluator that images have.
    pub fn with_evaluator() -> Self {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest-images/python/evaluator.py");
        Self::launch(Some(&file), |_| Ok(()))
    }

    /// Starts it after `prepare` has run in its process, with the test's directory.
    pub fn start_after(prepare: impl Fn(&Path) -> std::io::Result<()> + Send + Sync + 'static) -> Self {
        Self::launch(None, prepare)
    }

    fn launch(
        evaluator: Option<&Path>,
        prepare: impl Fn(&Path) -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_ark-guestd"));
        command.args(["serve", "--listen"]).arg(dir.path().join("s")).stdin(Stdio::null());
        if let Some(file) = evaluator {
            command.arg("--evaluator").arg(file);
        }
        let place = dir.path().to_owned();
        let prepare = move || {
            nix::sys::prctl::set_child_subreaper(true)?;
            prepare(&place)
        };
        // SAFETY: prctl may be called between fork and exec, and so may what the tests prepare: system calls.
        unsafe { command.pre_exec(prepare) };
        let guestd = Self { child: command.spawn().unwrap(), dir };
        wait_until("guestd listens", || guestd.try_connect().is_some());
        guestd
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A file in the test's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn try_connect(&self) -> Option<Connection> {
        Stream::connect(&Address::Unix(self.path("s"))).ok().map(Connection::new)
    }

    pub fn connect(&self) -> Connection {
        let connection = self.try_connect().unwrap();
        connection.stream().set_read_timeout(Some(PATIENCE)).unwrap();
        connection
    }

    /// Sends the first frame of an operation.
    pub fn ask(&self, kind: Kind, message: &impl Serialize) -> Connection {
        let mut connection = self.connect();
        connection.send(&Frame::json(kind, message).unwrap()).unwrap();
        connection
    }

    /// Asks for an operation that is answered by one frame.
    pub fn answer(&self, kind: Kind, message: &impl Serialize) -> Frame {
        self.ask(kind, message).recv().unwrap().unwrap()
    }

    /// Starts a program; `Err` is guestd's refusal.
    pub fn start_exec(&self, request: &ExecRequest) -> Result<Running, GuestError> {
        let mut connection = self.ask(Kind::Exec, request);
        let first = connection.recv().unwrap().unwrap();
        match first.kind {
            Kind::Started => Ok(Running { connection, pid: first.parse::<Started>().unwrap().pid }),
            Kind::Error => Err(first.parse().unwrap()),
            other => panic!("{other:?} instead of Started"),
        }
    }

    /// Runs a program without input to its end.
    pub fn run(&self, request: &ExecRequest) -> Output {
        let mut running = self.start_exec(request).unwrap();
        running.send(&Frame::empty(Kind::StdinClose));
        running.finish()
    }

    /// Runs a shell script.
    pub fn sh(&self, script: &str) -> Output {
        self.run(&sh(script))
    }

    /// The code of a refused exec.
    pub fn refusal(&self, request: &ExecRequest) -> ErrorCode {
        self.start_exec(request).map(|r| r.pid).unwrap_err().code
    }

    /// Children of guestd, zombies included.
    pub fn children(&self) -> Vec<String> {
        let text = Command::new("ps")
            .args(["--no-headers", "-o", "pid,stat,args", "--ppid", &self.pid().to_string()])
            .output()
            .unwrap();
        String::from_utf8_lossy(&text.stdout).lines().map(str::to_owned).collect()
    }
}

impl Drop for Guestd {
    fn drop(&mut self) {
        for child in self.children() {
            let pid = child.split_whitespace().next().unwrap_or_default().to_owned();
            let _ = Command::new("kill").args(["-9", "--", &pid]).stderr(Stdio::null()).status();
            // A child of guestd leads a session; what it started goes with it.
            let _ =
                Command::new("kill").args(["-9", "--", &format!("-{pid}")]).stderr(Stdio::null()).status();
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program that runs.
pub struct Running {
    pub connection: Connection,
    pub pid: u32,
}

/// What a program said and how it ended.
#[derive(Debug)]
pub struct Output {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub end: ExecEnd,
}

impl Output {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    pub fn status(&self) -> ExitStatus {
        self.end.status
    }
}

impl Running {
    pub fn send(&mut self, frame: &Frame) {
        self.connection.send(frame).unwrap();
    }

    pub fn input(&mut self, bytes: &[u8]) {
        self.send(&Frame::raw(Kind::Stdin, bytes).unwrap());
    }

    pub fn signal(&mut self, signal: i32) {
        let signal = u8::try_from(signal).unwrap();
        self.send(&Frame::json(Kind::Signal, &SignalRequest { signal }).unwrap());
    }

    pub fn resize(&mut self, rows: u16, cols: u16) {
        self.send(&Frame::json(Kind::Resize, &TtySize { rows, cols }).unwrap());
    }

    /// Reads output until it contains `text`.
    pub fn read_until(&mut self, text: &str) -> String {
        let mut seen = String::new();
        while !seen.contains(text) {
            let frame = self.connection.recv().unwrap().unwrap();
            assert!(matches!(frame.kind, Kind::Stdout | Kind::Stderr), "{:?} after {seen:?}", frame.kind);
            seen.push_str(&String::from_utf8_lossy(&frame.payload));
        }
        seen
    }

    /// Reads to the end.
    pub fn finish(&mut self) -> Output {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            let frame = self.connection.recv().unwrap().expect("Exited comes before the end");
            match frame.kind {
                Kind::Stdout => stdout.extend(frame.payload),
                Kind::Stderr => stderr.extend(frame.payload),
                Kind::Exited => return Output { stdout, stderr, end: frame.parse().unwrap() },
                other => panic!("{other:?} while a program runs"),
            }
        }
    }
}

/// A request for `argv`.
pub fn exec(argv: &[&str]) -> ExecRequest {
    ExecRequest { argv: argv.iter().map(|&a| a.to_owned()).collect(), ..ExecRequest::default() }
}

/// A request for a shell script.
pub fn sh(script: &str) -> ExecRequest {
    exec(&["/bin/sh", "-c", script])
}

/// Waits, for a bounded time.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "waited too long until {what}");
        sleep(Duration::from_millis(10));
    }
}

/// Whether a process is there and not a zombie.
pub fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|s| !s.rsplit(')').next().unwrap().trim_start().starts_with(['Z', 'X']))
}

/// Names in a directory.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

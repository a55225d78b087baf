//! Programs under a time bound.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What a finished program left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Exit code, or 128 + signal.
    pub code: i32,
    /// Standard output as text.
    pub stdout: String,
    /// Standard output as it came.
    pub bytes: Vec<u8>,
    /// Standard error as text.
    pub stderr: String,
}

impl Output {
    /// Passes on `self` when the program succeeded.
    ///
    /// # Panics
    /// With everything it printed when it did not.
    #[must_use]
    #[track_caller]
    pub fn ok(self) -> Self {
        self.exits(0)
    }

    /// Passes on `self` when the program ended with `code`.
    ///
    /// # Panics
    /// With everything it printed when it did not.
    #[must_use]
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "\n--- stdout\n{}\n--- stderr\n{}", self.stdout, self.stderr);
        self
    }

    /// Standard output as JSON.
    ///
    /// # Panics
    /// When it is none.
    #[must_use]
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e} in {:?}", self.stdout))
    }

    /// Checks that standard error is a helpful sentence: it has each of `words`, and is no panic or debug dump.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn complains_about(&self, words: &[&str]) {
        let text = self.stderr.to_lowercase();
        for word in words {
            assert!(text.contains(&word.to_lowercase()), "no {word:?} in {:?}", self.stderr);
        }
        for bad in ["panicked at", "rust_backtrace", "os { code", "(os error"] {
            assert!(!text.contains(bad), "not a sentence: {:?}", self.stderr);
        }
    }
}

/// A program that runs; one that is dropped is killed.
pub struct Running {
    /// Its name, for messages.
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
    deadline: Instant,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both are harmless when it has been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(from: Option<impl Read + Send + 'static>) -> Option<JoinHandle<Vec<u8>>> {
    let mut from = from?;
    Some(std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // A read that fails ends the text where it is; the exit code tells the rest.
        let _ = from.read_to_end(&mut bytes);
        bytes
    }))
}

fn collected(reader: &mut Option<JoinHandle<Vec<u8>>>) -> Vec<u8> {
    reader.take().map(|r| r.join().expect("the reader ends")).unwrap_or_default()
}

impl Running {
    /// Starts `command` with piped streams; it has `limit` to end.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(mut command: Command, limit: Duration) -> Self {
        let name = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {name}: {e}"));
        let stdin = child.stdin.take();
        let stdout = collect(child.stdout.take());
        let stderr = collect(child.stderr.take());
        Self { name, child, stdin, stdout, stderr, deadline: Instant::now() + limit }
    }

    /// Process id.
    ///
    /// # Panics
    /// Never on Linux.
    #[must_use]
    pub fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).expect("a pid is an i32"))
    }

    /// Writes to its standard input.
    ///
    /// # Panics
    /// When it no longer reads.
    pub fn write(&mut self, bytes: &[u8]) {
        self.stdin.as_mut().expect("stdin is open").write_all(bytes).expect("the program reads its input");
    }

    /// Closes its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Sends it `signal`.
    ///
    /// # Panics
    /// When it is gone.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(self.pid(), signal).expect("the program is there");
    }

    /// Waits for its end with its input closed.
    ///
    /// # Panics
    /// When it does not end in time; it is killed then.
    #[must_use]
    pub fn wait(mut self) -> Output {
        self.stdin = None;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("wait works") {
                break status;
            }
            assert!(Instant::now() <= self.deadline, "{} did not end in time", self.name);
            std::thread::sleep(Duration::from_millis(5));
        };
        let code = {
            use std::os::unix::process::ExitStatusExt;
            status.code().or(status.signal().map(|s| 128 + s)).unwrap_or(-1)
        };
        let bytes = collected(&mut self.stdout);
        let stderr = String::from_utf8_lossy(&collected(&mut self.stderr)).into_owned();
        Output { code, stdout: String::from_utf8_lossy(&bytes).into_owned(), bytes, stderr }
    }
}

/// Waits until `check` says yes, at most `limit`.
///
/// # Panics
/// With `what` when it does not in time.
#[track_caller]
pub fn eventually(what: &str, limit: Duration, mut check: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !check() {
        assert!(Instant::now() < end, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

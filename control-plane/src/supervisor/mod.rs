//! One `ark-vmm` child: start, identity on disk, control socket, end.
//!
//! ```text
//!  spawn (own process group, stdin held) ──► identity written ──► configuration on stdin ──► VM runs ──► ExitRecord
//! ```
//!
//! The configuration goes through standard input and only after the identity is on disk: an `arkd` killed in between
//! leaves a VMM that reads the end of its input and gives up, so no VMM ever runs that a later `arkd` cannot find. Between
//! the two a VMM can wait, prepared, for as long as it takes.

mod control;
mod identity;
mod record;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use ark_types::layout::AgentDir;
use ark_types::plain::plain;
use ark_types::vmm::{ExitRecord, RunConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

pub use control::{ControlError, ask, ask_for};
pub use identity::{ProcessIdentity, Terminated};
pub use record::tail_text;

/// Most bytes of standard output that are read in search of the [`ExitRecord`].
const MAX_RECORD: usize = 64 << 10;
/// How long the record of a VMM that has ended is waited for.
const RECORD_PATIENCE: Duration = Duration::from_millis(200);

/// Why no VMM could be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The program cannot be run.
    #[error("{program} cannot be started: {}; build it with `make`, or set ARK_ASSETS", plain(source))]
    Program {
        /// The program.
        program: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Its log or identity cannot be written.
    #[error("{path} cannot be written: {}; free some space there or set ARK_RUN", plain(source))]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It ended before it took its configuration.
    #[error("the VMM did not take its configuration: {}", plain(.0))]
    Configure(#[source] std::io::Error),
}

/// A running `ark-vmm`. Dropping it kills the process.
#[derive(Debug)]
pub struct Vmm {
    child: Child,
    pid: u32,
    /// Where it waits for its configuration.
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    /// What came on `stdout` so far.
    output: Vec<u8>,
    dir: AgentDir,
}

impl Vmm {
    /// Starts `program run --config -` with `config`, its messages going to `dir`.
    ///
    /// # Errors
    /// [`SpawnError`]; nothing runs then.
    pub async fn start(program: &Path, config: &RunConfig, dir: &AgentDir) -> Result<Self, SpawnError> {
        let mut vmm = Self::spawn(program, &["run", "--config", "-"], dir)?;
        vmm.configure(config).await?;
        Ok(vmm)
    }

    /// Starts `program` ahead of need: a VM with `vcpus` processors is made, and waits for [`Self::configure`].
    ///
    /// # Errors
    /// [`SpawnError`]; nothing runs then.
    pub fn prepare(program: &Path, vcpus: u32, dir: &AgentDir) -> Result<Self, SpawnError> {
        Self::spawn(program, &["run", "--prepared", &vcpus.to_string(), "--config", "-"], dir)
    }

    fn spawn(program: &Path, arguments: &[&str], dir: &AgentDir) -> Result<Self, SpawnError> {
        let file = |path: PathBuf| move |source| SpawnError::File { path, source };
        let log = File::create(dir.vmm_log()).map_err(file(dir.vmm_log()))?;
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            // Its own group: a Ctrl-C on arkd's terminal is for arkd, which ends its VMMs in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| SpawnError::Program { program: program.to_owned(), source })?;
        let pid = child.id().unwrap_or_default();
        let identity = ProcessIdentity::of(pid).map_err(file("/proc".into()))?;
        identity.write(&dir.identity()).map_err(file(dir.identity()))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        Ok(Self { child, pid, stdin, stdout, output: Vec::new(), dir: dir.clone() })
    }

    /// Tells a VMM that waits for it what to run. The second time nobody reads it.
    ///
    /// # Errors
    /// [`SpawnError::Configure`].
    pub async fn configure(&mut self, config: &RunConfig) -> Result<(), SpawnError> {
        let json = serde_json::to_vec(config).map_err(|e| SpawnError::Configure(e.into()))?;
        if let Some(mut stdin) = self.stdin.take()
            && let Err(source) = stdin.write_all(&json).await
            // A VMM that ends without reading tells why in its record, which says more than a broken pipe.
            && source.kind() != std::io::ErrorKind::BrokenPipe
        {
            return Err(SpawnError::Configure(source));
        }
        Ok(())
    }

    /// Whether it has ended already.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Its process id.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for its end and says how it came about. Cancel-safe; asked again it answers the same.
    pub async fn wait(&mut self) -> ExitRecord {
        let status = self.child.wait().await;
        // All it wrote is in the pipe by now; the limit is for a pipe that somebody else still holds open.
        let rest = async {
            while let Some(stdout) = &mut self.stdout {
                match stdout.read_buf(&mut self.output).await {
                    Ok(n) if n > 0 && self.output.len() < MAX_RECORD && !self.output.ends_with(b"\n") => {}
                    _ => self.stdout = None,
                }
            }
        };
        if tokio::time::timeout(RECORD_PATIENCE, rest).await.is_err() {
            self.stdout = None;
        }
        record::of(status, &self.output, &self.dir)
    }

    /// Ends it at once (SIGKILL); [`Self::wait`] then returns soon.
    pub fn kill(&mut self) {
        // Fails only when it has ended already.
        let _ = self.child.start_kill();
    }
}

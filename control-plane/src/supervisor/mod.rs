//! One `ark-vmm`: start, identity on disk, control socket, end.
//!
//! ```text
//!  spawn (own process group, stdin held) ──► identity written ──► configuration on stdin ──► VM runs ──► ExitRecord
//!                                                                                            ▲    │
//!                                                          adopted by a later arkd (pidfd) ──┘    └──► left to it
//! ```
//!
//! The configuration goes through standard input and only after the identity is on disk: an `arkd` killed in between
//! leaves a VMM that reads the end of its input and gives up, so no VMM ever runs that a later `arkd` cannot find. Between
//! the two a VMM can wait, prepared, for as long as it takes.
//!
//! A VMM outlives its `arkd`: nothing that it has from there can stop it. Its standard input has ended by then, its
//! messages go to a file, and when it ends itself it writes the record to its exit file before it finds that nobody reads its
//! standard output (it ignores SIGPIPE). In a process group of its own it hears neither a terminal's Ctrl-C nor its hang-up, which are for
//! the group in the foreground.

mod control;
mod identity;
mod record;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use ark_types::layout::AgentDir;
use ark_types::plain::plain;
use ark_types::vmm::{ExitRecord, RunConfig};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

pub use control::{ControlError, ask, ask_for, set_going};
pub(crate) use identity::boot_id;
pub use identity::{Pinned, ProcessIdentity, Terminated};
pub(crate) use record::left_in as record_left_in;
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

/// A running `ark-vmm`. Dropping it kills the process, unless it is left to a later `arkd`.
#[derive(Debug)]
pub struct Vmm {
    origin: Origin,
    identity: ProcessIdentity,
    dir: AgentDir,
    /// Whether it ends with this.
    is_bound: bool,
}

/// Who started it.
#[derive(Debug)]
enum Origin {
    /// This `arkd`.
    Child {
        child: Box<Child>,
        /// Where it waits for its configuration.
        stdin: Option<ChildStdin>,
        stdout: Option<ChildStdout>,
        /// What came on `stdout` so far.
        output: Vec<u8>,
    },
    /// An earlier one.
    Adopted(AsyncFd<Pinned>),
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
            // Where it finds its files, whatever the directory is called by then.
            .current_dir(&dir.0)
            // Its own group: a Ctrl-C on arkd's terminal is for arkd, which ends its VMMs in order.
            .process_group(0)
            .spawn()
            .map_err(|source| SpawnError::Program { program: program.to_owned(), source })?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        // Without its configuration it ends by itself when its input does, which a failure here leads to.
        let identity = ProcessIdentity::of(child.id().unwrap_or_default()).map_err(file("/proc".into()))?;
        let origin = Origin::Child { child: Box::new(child), stdin, stdout, output: Vec::new() };
        let vmm = Self { origin, identity, dir: dir.clone(), is_bound: true };
        vmm.identity.write(&dir.identity()).map_err(file(dir.identity()))?;
        Ok(vmm)
    }

    /// Takes over the VMM that an earlier `arkd` started in `dir`. It does not end with this before [`Self::bind`]: an `arkd`
    /// that does not come to serve leaves it as it was.
    ///
    /// # Errors
    /// What the system said; the process goes on then.
    pub fn adopt(identity: ProcessIdentity, process: Pinned, dir: AgentDir) -> io::Result<Self> {
        // SAFETY: the descriptor is owned by `process` alone, which keeps it and gives the same one every time.
        let process = unsafe { AsyncFd::register_with_interest(process, Interest::READABLE) }?;
        Ok(Self { origin: Origin::Adopted(process), identity, dir, is_bound: false })
    }

    /// From here on it ends with this, as one that this `arkd` started does.
    pub fn bind(&mut self) {
        self.is_bound = true;
    }

    /// Lets it run on when this `arkd` ends, for a later one to adopt.
    pub fn leave(mut self) {
        self.is_bound = false;
    }

    /// Tells a VMM that waits for it what to run. The second time nobody reads it.
    ///
    /// # Errors
    /// [`SpawnError::Configure`].
    pub async fn configure(&mut self, config: &RunConfig) -> Result<(), SpawnError> {
        let json = serde_json::to_vec(config).map_err(|e| SpawnError::Configure(e.into()))?;
        if let Origin::Child { stdin, .. } = &mut self.origin
            && let Some(mut stdin) = stdin.take()
            && let Err(source) = stdin.write_all(&json).await
            // A VMM that ends without reading tells why in its record, which says more than a broken pipe.
            && source.kind() != io::ErrorKind::BrokenPipe
        {
            return Err(SpawnError::Configure(source));
        }
        Ok(())
    }

    /// Its directory is called `dir` from here on.
    pub(crate) fn moved_to(&mut self, dir: AgentDir) {
        self.dir = dir;
    }

    /// Whether it has ended already.
    pub fn has_ended(&mut self) -> bool {
        match &mut self.origin {
            Origin::Child { child, .. } => !matches!(child.try_wait(), Ok(None)),
            Origin::Adopted(process) => process.get_ref().has_ended().unwrap_or(false),
        }
    }

    /// Which process it is.
    #[must_use]
    pub const fn identity(&self) -> &ProcessIdentity {
        &self.identity
    }

    /// Its process id.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.identity.pid
    }

    /// Waits for its end and says how it came about. Cancel-safe; asked again it answers the same.
    pub async fn wait(&mut self) -> ExitRecord {
        match &mut self.origin {
            Origin::Child { child, stdout, output, .. } => {
                let status = child.wait().await;
                read_record(stdout, output).await;
                record::of(status, output, &self.dir)
            }
            Origin::Adopted(process) => {
                // An error would mean that the runtime ends, and arkd with it.
                let _ = process.readable().await;
                record::left_in(&self.dir, "it was no child of this arkd, which cannot tell how it ended,")
            }
        }
    }

    /// Ends it at once (SIGKILL); [`Self::wait`] then returns soon.
    pub fn kill(&mut self) {
        let killed = match &mut self.origin {
            // Fails only when it has ended already.
            Origin::Child { child, .. } => child.start_kill().or(Ok(())),
            Origin::Adopted(process) => process.get_ref().kill(),
        };
        if let Err(error) = killed {
            tracing::error!(pid = self.pid(), %error, "a VMM cannot be killed");
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if self.is_bound {
            self.kill();
        }
    }
}

/// Reads the record that a VMM which has ended left on its standard output.
async fn read_record(stdout: &mut Option<ChildStdout>, output: &mut Vec<u8>) {
    // All it wrote is in the pipe by now; the limit is for a pipe that somebody else still holds open.
    let rest = async {
        while let Some(pipe) = stdout {
            match pipe.read_buf(output).await {
                Ok(n) if n > 0 && output.len() < MAX_RECORD && !output.ends_with(b"\n") => {}
                _ => *stdout = None,
            }
        }
    };
    if tokio::time::timeout(RECORD_PATIENCE, rest).await.is_err() {
        *stdout = None;
    }
}

//! The emulated host: QEMU (software) running Linux with KVM on an emulated AMD processor, for machines without usable
//! KVM.
//!
//! ```text
//!                start                     /sbin/ark-poweroff, else QMP quit, else SIGKILL
//!  stopped ──────────────► running ──────────────────────────────────────────────────────► stopped
//!     ▲                       │ the process ends by itself or by another's hand
//!     └──── noticed, said ────┴──► crashed
//! ```
//!
//! What is known of a machine is one record in the state directory: the process (pid, start time, boot), its port and its
//! size. The record's process decides: alive means running; gone, without a stop by `ark`, means crashed. `start` and
//! `stop` hold a lock, so that two of them do not race.

mod cpio;
mod disk;
mod qemu;
mod qmp;
mod start;
mod stop;

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::Duration;

use ark_client::{Client, Endpoint};
use ark_types::health::Health;
use ark_types::layout::DEFAULT_LISTEN;
use ark_types::plain::plain;
use serde::{Deserialize, Serialize};

use crate::dirs::{self, Dirs, make_private_dir, write_private};
use crate::identity::Identity;

pub(crate) use disk::{DiskError, free_near};
pub(crate) use qemu::{PACKAGE, PROGRAM, find_program};
pub(crate) use start::Started;
pub(crate) use stop::Stopped;

/// Longest wait for one answer of a machine that runs.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);
/// Pause between two attempts at the lock.
const LOCK_POLL: Duration = Duration::from_millis(50);
/// Lines of the console an error quotes.
const CONSOLE_LINES: usize = 12;

/// The emulated host cannot be started, reached or stopped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    /// QEMU is missing.
    #[error(
        "{PROGRAM} is missing, and without it this machine, whose KVM is not usable, cannot run agents: install Debian's package {PACKAGE}"
    )]
    NoQemu,
    /// A file of the build is missing.
    #[error("{} is missing: say `make` in the project's directory, or set ARK_ASSETS to where it was built", .0.display())]
    NoAsset(PathBuf),
    /// Another program has the port.
    #[error(
        "port {0} of 127.0.0.1 is taken by another program: stop it, or choose another with --port or ARK_PORT"
    )]
    PortTaken(u16),
    /// The machine runs with another port than asked for.
    #[error(
        "the machine runs with port {running}, not {asked}: leave out --port, or `ark machine stop` first"
    )]
    OtherPort {
        /// Its port.
        running: u16,
        /// The port asked for.
        asked: u16,
    },
    /// More memory than there is, or too little to boot.
    #[error("a machine with {asked} MiB cannot be had: ask for 512 to {host} MiB (all this machine has)")]
    Memory {
        /// MiB asked for.
        asked: u64,
        /// MiB of this machine.
        host: u64,
    },
    /// The disk to attach is missing.
    #[error("{} cannot be attached: there is no such file", .0.display())]
    NoAttachment(PathBuf),
    /// The monitor's socket has too long a path.
    #[error("{} is too long for a Unix socket's path (107 bytes): set ARK_RUN to a shorter directory", .0.display())]
    LongPath(PathBuf),
    /// The data disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A file operation.
    #[error("{what} failed: {}{}", plain(source), full_hint(.source))]
    File {
        /// What was tried, with the path.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// QEMU ended before arkd answered.
    #[error("the machine ended while it started{quote}")]
    Died {
        /// Last lines of QEMU's messages and of the console.
        quote: String,
    },
    /// It runs, but arkd does not answer.
    #[error(
        "the machine runs (pid {pid}), but arkd in it did not answer within {seconds} s: {why}; `ark machine stop` ends it{quote}"
    )]
    Silent {
        /// QEMU's process.
        pid: u32,
        /// How long it was asked.
        seconds: u64,
        /// The last answer.
        why: String,
        /// Last lines of the console.
        quote: String,
    },
    /// It was started, but arkd in it never answered.
    #[error(
        "arkd in the machine did not answer within {seconds} s of its start: {why}. It was ended; its processors' state is in {}. Try again: `ark machine start`{quote}",
        evidence.display()
    )]
    Stuck {
        /// How long it was asked.
        seconds: u64,
        /// The last answer.
        why: String,
        /// File with its processors' registers.
        evidence: PathBuf,
        /// Last lines of the console.
        quote: String,
    },
    /// The machine was started with another token than is here now.
    #[error(
        "the machine on port {0} does not take the token of this state directory: `ark machine stop`, then start it anew"
    )]
    OtherToken(u16),
    /// It does not run.
    #[error("the machine does not run: `ark machine start` starts it")]
    NotRunning,
    /// It cannot be ended.
    #[error("the machine (pid {0}) cannot be ended, not even by SIGKILL")]
    Unkillable(u32),
}

fn full_hint(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::StorageFull {
        "; free some space, or set ARK_STATE to a directory elsewhere"
    } else {
        ""
    }
}

/// Gives a failed file operation its name.
fn file_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> MachineError {
    let what = what.into();
    move |source| MachineError::File { what, source }
}

/// The emulated host of this user.
pub(crate) struct Machine {
    dirs: Dirs,
    /// The port the user asked for.
    port: Option<u16>,
}

/// A machine that was started, as it is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    #[serde(flatten)]
    identity: Identity,
    /// Port on 127.0.0.1.
    port: u16,
    /// Memory, MiB.
    memory_mib: u64,
    /// Processors.
    cpus: u32,
    /// When it was started, milliseconds since the Unix epoch.
    started_unix_ms: u64,
}

/// Whether a machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum MachineState {
    /// Its process is alive.
    Running,
    /// None was started, or the last was stopped.
    Stopped,
    /// Its process is gone, and nobody said `ark machine stop`.
    Crashed,
}

/// What `ark machine status` says.
#[derive(Debug, Serialize)]
pub(crate) struct Status {
    /// Whether it runs.
    pub(crate) state: MachineState,
    /// QEMU's process.
    pub(crate) pid: Option<u32>,
    /// Port on 127.0.0.1.
    pub(crate) port: Option<u16>,
    /// Memory, MiB.
    pub(crate) memory_mib: Option<u64>,
    /// Processors.
    pub(crate) cpus: Option<u32>,
    /// When it was started, milliseconds since the Unix epoch.
    pub(crate) started_unix_ms: Option<u64>,
    /// What arkd in it answers.
    pub(crate) health: Option<Health>,
    /// The data disk.
    pub(crate) disk: Option<PathBuf>,
    /// The console's log.
    pub(crate) console: Option<PathBuf>,
    /// What is worth knowing besides.
    pub(crate) note: Option<String>,
}

impl Machine {
    /// The machine whose files are in `dirs`.
    pub(crate) fn new(dirs: Dirs, port: Option<u16>) -> Self {
        Self { dirs, port }
    }

    /// The console's log.
    pub(crate) fn console(&self) -> PathBuf {
        self.dirs.state.machine().join("console.log")
    }

    /// QEMU's own messages.
    fn qemu_log(&self) -> PathBuf {
        self.dirs.state.machine().join("qemu.log")
    }

    /// The processors' registers of the last machine that never came up.
    fn evidence(&self) -> PathBuf {
        self.dirs.state.machine().join("stuck.log")
    }

    fn data_disk(&self) -> PathBuf {
        self.dirs.state.machine().join("data.ext4")
    }

    fn record_path(&self) -> PathBuf {
        self.dirs.state.machine().join("machine.json")
    }

    /// QEMU's monitor; in the run directory, whose path is short.
    fn monitor(&self) -> PathBuf {
        self.dirs.run.0.join("machine.qmp")
    }

    /// The kernel's first root file system with this start's secrets.
    fn initramfs(&self) -> PathBuf {
        self.dirs.state.machine().join("initramfs.cpio")
    }

    /// The port a start would use.
    pub(crate) fn wanted_port(&self) -> u16 {
        let default = DEFAULT_LISTEN.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
        self.port.or(default).unwrap_or(7070)
    }

    /// What is remembered; `None` when there is nothing, or nothing that makes sense.
    fn record(&self) -> Option<Record> {
        serde_json::from_slice(&fs::read(self.record_path()).ok()?).ok()
    }

    fn remember(&self, record: &Record) -> Result<(), MachineError> {
        let path = self.record_path();
        let write = || write_private(&path, &serde_json::to_vec(record)?);
        write().map_err(file_error(format!("writing {}", path.display())))
    }

    /// Removes what a start left besides the disk and the logs.
    fn forget(&self) {
        for path in [self.record_path(), self.monitor(), self.initramfs()] {
            // What is not there need not be removed; what cannot be is overwritten by the next start.
            let _ = fs::remove_file(path);
        }
    }

    /// Whether its process runs.
    pub(crate) fn is_alive(&self) -> bool {
        self.record().is_some_and(|record| record.identity.is_alive())
    }

    /// The record of a machine that runs.
    fn alive(&self) -> Result<Option<Record>, MachineError> {
        let Some(record) = self.record().filter(|r| r.identity.is_alive()) else { return Ok(None) };
        match self.port {
            Some(asked) if asked != record.port => {
                Err(MachineError::OtherPort { running: record.port, asked })
            }
            _ => Ok(Some(record)),
        }
    }

    /// A client of the machine, if it runs and answers.
    pub(crate) async fn running_client(&self) -> Result<Option<Client>, MachineError> {
        let Some(record) = self.alive()? else { return Ok(None) };
        let client = self.client(record.port)?;
        let health = tokio::time::timeout(ANSWER_DEADLINE, client.health()).await;
        Ok(matches!(health, Ok(Ok(_))).then_some(client))
    }

    /// A client of the machine, which must run.
    pub(crate) async fn must_run(&self) -> Result<Client, MachineError> {
        self.running_client().await?.ok_or(MachineError::NotRunning)
    }

    fn client(&self, port: u16) -> Result<Client, MachineError> {
        let path = self.dirs.state.token();
        let token =
            dirs::token(&self.dirs.state).map_err(file_error(format!("reading {}", path.display())))?;
        Ok(Client::new(Endpoint::Tcp { address: format!("127.0.0.1:{port}"), token }))
    }

    /// Whether it runs. A machine that ended by itself is noticed here once, and then forgotten.
    pub(crate) async fn status(&self) -> Result<Status, MachineError> {
        let exists = |path: PathBuf| path.exists().then_some(path);
        let mut status = Status {
            state: MachineState::Stopped,
            pid: None,
            port: None,
            memory_mib: None,
            cpus: None,
            started_unix_ms: None,
            health: None,
            disk: exists(self.data_disk()),
            console: exists(self.console()),
            note: None,
        };
        let Some(record) = self.record() else { return Ok(status) };
        if record.identity.is_alive() {
            let health = tokio::time::timeout(ANSWER_DEADLINE, self.client(record.port)?.health()).await;
            status.state = MachineState::Running;
            status.health = health.ok().and_then(Result::ok);
            if status.health.is_none() {
                status.note = Some("arkd in it does not answer (yet)".to_owned());
            }
            status.pid = Some(record.identity.pid);
            status.port = Some(record.port);
            status.memory_mib = Some(record.memory_mib);
            status.cpus = Some(record.cpus);
            status.started_unix_ms = Some(record.started_unix_ms);
        } else {
            status.state = MachineState::Crashed;
            status.note = Some(self.clean_up_crashed(&record).await?);
        }
        Ok(status)
    }

    /// Forgets a machine whose process is gone, and says how it seems to have ended.
    async fn clean_up_crashed(&self, record: &Record) -> Result<String, MachineError> {
        let _lock = self.lock().await?;
        // Another command may have started a new one since the record was read.
        if self.record().as_ref() == Some(record) {
            self.forget();
        }
        let console = fs::read(self.console()).unwrap_or_default();
        Ok(how_it_ended(record.identity.pid, &String::from_utf8_lossy(&console)))
    }

    /// Waits for the lock that `start` and `stop` hold; asks again and again, so that the wait can be interrupted.
    async fn lock(&self) -> Result<File, MachineError> {
        let dir = self.dirs.state.machine();
        make_private_dir(&dir).map_err(file_error(format!("making {}", dir.display())))?;
        let path = dir.join("lock");
        let open = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let failed = || file_error(format!("locking {}", path.display()));
        let file = open.map_err(failed())?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => tokio::time::sleep(LOCK_POLL).await,
                Err(TryLockError::Error(e)) => return Err(failed()(e)),
            }
        }
    }
}

/// How a machine that nobody stopped ended, as its console tells.
fn how_it_ended(pid: u32, console: &str) -> String {
    let end: String = crate::output::tail(console, 40);
    let cause = if end.contains("Kernel panic") {
        "its kernel panicked"
    } else if end.contains("reboot: Power down") || end.contains("reboot: System halted") {
        "it was powered off from inside"
    } else {
        "it was stopped from outside, or QEMU crashed"
    };
    format!("the machine (pid {pid}) ended without `ark machine stop`: {cause}; its disk and logs are kept")
}

#[cfg(test)]
mod tests {
    use ark_types::layout::{Assets, RunDir, StateDir};

    use super::*;

    fn machine(dir: &std::path::Path) -> Machine {
        let dirs = Dirs {
            assets: Assets(dir.join("assets")),
            state: StateDir(dir.join("state")),
            run: RunDir(dir.join("run")),
        };
        Machine::new(dirs, None)
    }

    fn record(pid: u32) -> Record {
        let identity = Identity::of(pid).unwrap();
        Record { identity, port: 1, memory_mib: 512, cpus: 1, started_unix_ms: 5 }
    }

    #[tokio::test]
    async fn a_machine_that_was_killed_is_noticed_once_and_cleaned_up() {
        let dir = tempfile::tempdir().unwrap();
        let machine = machine(dir.path());
        assert_eq!(machine.status().await.unwrap().state, MachineState::Stopped);
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let record = record(child.id());
        machine.remember(&record).unwrap();
        let status = machine.status().await.unwrap();
        assert_eq!(
            (status.state, status.pid, status.port),
            (MachineState::Running, Some(child.id()), Some(1))
        );
        assert!(status.note.unwrap().contains("does not answer"));
        assert!(machine.running_client().await.unwrap().is_none());
        let other = Machine::new(machine.dirs.clone(), Some(2));
        assert!(matches!(other.alive(), Err(MachineError::OtherPort { running: 1, asked: 2 })));
        record.identity.signal(nix::sys::signal::Signal::SIGKILL).unwrap();
        child.wait().unwrap();
        let status = machine.status().await.unwrap();
        assert_eq!(status.state, MachineState::Crashed);
        assert!(status.note.unwrap().contains("stopped from outside"));
        assert_eq!(machine.status().await.unwrap().state, MachineState::Stopped);
        assert!(matches!(machine.must_run().await, Err(MachineError::NotRunning)));
    }

    #[test]
    fn a_record_survives_and_rubbish_is_no_record() {
        let dir = tempfile::tempdir().unwrap();
        let machine = machine(dir.path());
        let record = record(std::process::id());
        machine.remember(&record).unwrap();
        assert_eq!(machine.record(), Some(record));
        fs::write(machine.record_path(), "{}").unwrap();
        assert_eq!(machine.record(), None);
    }

    #[test]
    fn the_console_tells_how_it_ended() {
        assert!(how_it_ended(7, "x\nKernel panic - not syncing\n").contains("panicked"));
        assert!(how_it_ended(7, "reboot: Power down\n").contains("from inside"));
        assert!(how_it_ended(7, "").contains("from outside"));
    }
}

//! Snapshots while the VM goes on: the VM stands still for as long as it takes to save its state and to call fork(2); the
//! child, the *writer*, has the memory of that moment, copy-on-write, and writes it while the parent runs the VM again.
//!
//! ```text
//!  owner    claim the name ─ park ─ save ─ fork ─ run ───────────────── poll the pipe ─► reply, reap
//!                                            └► writer: write, sync, rename ─ tell ─ exit
//! ```
//!
//! Of a writer that dies, or is killed because the VM ends or whoever asked has hung up, nothing stays behind.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ark_devices::GuestMemory;
use ark_types::vmm::{ControlReply, SnapshotId, SnapshotReport};
use serde::{Deserialize, Serialize};

use super::Owner;
use crate::control::Ticket;
use crate::machine::MachineState;
use crate::mailbox::News;
use crate::snapshot::{Chain, Draft, Written};

/// The snapshots of one VM.
#[derive(Debug, Default)]
pub(super) struct Snapshots {
    writer: Option<Writer>,
    /// The last one that was taken while the VM was paused, if it has not run since.
    of_pause: Option<SnapshotId>,
    /// How often the VM was set running.
    runs: u64,
}

/// A child that writes a snapshot. Dropping it kills it, and removes what it has written so far.
#[derive(Debug)]
struct Writer {
    pid: libc::pid_t,
    /// Its pipe, until its end.
    pipe: File,
    said: Vec<u8>,
    /// To be abandoned when it fails; none once it has ended.
    draft: Option<Draft>,
    dir: PathBuf,
    ticket: Ticket,
    asked: Instant,
    pause: Duration,
    /// [`Snapshots::runs`] when it was made, if the VM was paused.
    while_paused: Option<u64>,
}

/// What a writer tells its parent, as JSON.
#[derive(Debug, Serialize, Deserialize)]
enum Outcome {
    Written { id: SnapshotId, base: Option<SnapshotId>, bytes: u64 },
    Failed { why: String },
}

impl Snapshots {
    /// The VM is set running.
    pub(super) fn note_run(&mut self) {
        self.runs = self.runs.wrapping_add(1);
        self.of_pause = None;
    }

    /// What to poll (readable) while a snapshot is written.
    pub(super) fn fd(&self) -> Option<RawFd> {
        self.writer.as_ref().map(|writer| writer.pipe.as_raw_fd())
    }

    /// The reply to whoever asked for the snapshot, once its writer has ended.
    pub(super) fn finished(&mut self) -> Option<(Ticket, ControlReply)> {
        let writer = self.writer.as_mut()?;
        if !writer.listen() {
            return None;
        }
        let mut writer = self.writer.take()?;
        let reply = match writer.end() {
            Outcome::Written { id, base, bytes } => {
                if writer.while_paused == Some(self.runs) {
                    self.of_pause = Some(id);
                }
                let (pause_us, durable_us) = (micros(writer.pause), micros(writer.asked.elapsed()));
                ControlReply::Snapshot(SnapshotReport {
                    id,
                    base,
                    pause_us,
                    durable_us,
                    written_bytes: bytes,
                })
            }
            Outcome::Failed { why } => ControlReply::Refused { why },
        };
        Some((writer.ticket, reply))
    }

    /// Gives up the snapshot that the request of `ticket` is for: whoever asked is gone, so that nobody would know of it.
    pub(super) fn forget(&mut self, ticket: Ticket) {
        self.writer.take_if(|writer| writer.ticket == ticket);
    }

    /// Whose snapshot comes to nothing because the VM has ended.
    pub(super) fn give_up(&mut self) -> Option<Ticket> {
        self.writer.take().map(|writer| writer.ticket)
    }
}

impl Owner {
    /// Begins a snapshot; the reply comes later unless it is refused.
    pub(super) fn snapshot(&mut self, dir: &Path, ticket: Ticket) -> Option<ControlReply> {
        match self.begin_snapshot(dir, ticket) {
            Ok(()) => None,
            Err(why) => Some(ControlReply::Refused { why }),
        }
    }

    fn begin_snapshot(&mut self, dir: &Path, ticket: Ticket) -> Result<(), String> {
        let asked = Instant::now();
        let running = self.life.may_snapshot().map_err(|refused| refused.to_string())?;
        if let Some(writer) = &self.snapshots.writer {
            return Err(format!("a snapshot is being written to {}; wait for it", writer.dir.display()));
        }
        let about = self.machine.about();
        if let Some(disk) = about.disks.iter().find(|disk| !disk.read_only) {
            let path = disk.path.display();
            return Err(format!(
                "the guest may write to {path}, which would run away from its memory; use it read-only"
            ));
        }
        let (about, base) = (about.clone(), self.machine.base().cloned());
        let (ours, theirs) = pipe().map_err(|error| format!("no pipe for the snapshot's writer: {error}"))?;
        let draft = Draft::begin(dir, about, base).map_err(|error| error.to_string())?;

        let still = Instant::now();
        let forked = self.fork_writer(running, draft, theirs);
        let pause = if running { still.elapsed() } else { Duration::ZERO };
        let (pid, draft) = forked?;
        let while_paused = (!running).then_some(self.snapshots.runs);
        let (said, dir) = (vec![], dir.to_owned());
        let writer =
            Writer { pid, pipe: ours, said, draft: Some(draft), dir, ticket, asked, pause, while_paused };
        self.snapshots.writer = Some(writer);
        Ok(())
    }

    /// Everything for which the VM stands still.
    fn fork_writer(
        &mut self,
        running: bool,
        draft: Draft,
        pipe: File,
    ) -> Result<(libc::pid_t, Draft), String> {
        if running && let Err(error) = self.machine.park() {
            draft.abandon();
            // It stands half still.
            self.mailbox.send(News::Failed(error.to_string()));
            return Err(error.to_string());
        }
        let forked = match self.machine.save() {
            Ok(state) => fork_into(draft, self.machine.memory(), &state, pipe),
            Err(error) => {
                draft.abandon();
                Err(error.to_string())
            }
        };
        if running {
            self.machine.run();
        }
        forked
    }

    /// Reads the memory of the paused VM from the snapshot in `dir` from here on.
    pub(super) fn reclaim(&mut self, dir: &Path) -> Result<(), String> {
        self.life.may_reclaim().map_err(|refused| refused.to_string())?;
        let chain = Chain::open(dir).map_err(|error| error.to_string())?;
        let id = chain.manifest().id;
        if self.snapshots.of_pause != Some(id) {
            let dir = dir.display();
            return Err(format!(
                "{dir} was not taken since the VM was paused: take a snapshot and name that"
            ));
        }
        self.machine.reclaim(&chain, dir).map_err(|error| {
            self.mailbox.send(News::Failed(format!("its memory was lost: {error}")));
            error.to_string()
        })
    }
}

impl Writer {
    /// Takes in what it says; whether it has ended.
    fn listen(&mut self) -> bool {
        loop {
            let mut chunk = [0; 512];
            match self.pipe.read(&mut chunk) {
                Ok(0) => return true,
                Ok(n) => self.said.extend_from_slice(chunk.get(..n).unwrap_or_default()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return e.kind() != io::ErrorKind::WouldBlock,
            }
        }
    }

    /// Reaps it, which has ended or is about to, and clears away after one that failed.
    fn end(&mut self) -> Outcome {
        let status = reap(self.pid);
        let draft = self.draft.take();
        match serde_json::from_slice(&self.said) {
            Ok(outcome @ Outcome::Written { .. }) => return outcome,
            Ok(outcome @ Outcome::Failed { .. }) => {
                draft.into_iter().for_each(Draft::abandon);
                return outcome;
            }
            Err(_) => draft.into_iter().for_each(Draft::abandon),
        }
        let how = match status {
            Some(status) if libc::WIFSIGNALED(status) => {
                format!("was killed by signal {}", libc::WTERMSIG(status))
            }
            Some(status) => format!("ended with status {}", libc::WEXITSTATUS(status)),
            None => "is gone".to_owned(),
        };
        Outcome::Failed { why: format!("the process that wrote the snapshot {how}; take it again") }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(draft) = self.draft.take() {
            // SAFETY: kill touches no memory; the child was not reaped yet, so the number is still its own.
            unsafe { libc::kill(self.pid, libc::SIGKILL) };
            reap(self.pid);
            draft.abandon();
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// A pipe whose first end, the one to read from, does not block. Neither survives an exec.
fn pipe() -> io::Result<(File, File)> {
    let mut fds = [-1; 2];
    // SAFETY: the pointer is to two integers, which the call fills.
    if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both descriptors were made just now and nobody else owns them.
    let [ours, theirs] = fds.map(|fd| File::from(unsafe { OwnedFd::from_raw_fd(fd) }));
    // SAFETY: fcntl on an open descriptor with integer arguments touches no memory of ours.
    if unsafe { libc::fcntl(ours.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((ours, theirs))
}

/// Waits for the end of the child `pid`; gives its status.
fn reap(pid: libc::pid_t) -> Option<libc::c_int> {
    let mut status = 0;
    loop {
        // SAFETY: the pointer is to an integer, which the call fills.
        if unsafe { libc::waitpid(pid, &raw mut status, 0) } == pid {
            return Some(status);
        }
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return None;
        }
    }
}

/// Makes the writer. The parent gets its process id and the draft back.
fn fork_into(
    draft: Draft,
    memory: &GuestMemory,
    state: &MachineState,
    pipe: File,
) -> Result<(libc::pid_t, Draft), String> {
    // SAFETY: getpid has no conditions.
    let parent = unsafe { libc::getpid() };
    // SAFETY: this process has other threads, so that the child may not wait for what they hold: it takes no lock but the
    // allocator's, which the C library's fork keeps usable, starts no thread and never returns from `write`.
    match unsafe { libc::fork() } {
        -1 => {
            let error = io::Error::last_os_error();
            draft.abandon();
            Err(format!(
                "no process to write the snapshot: {error}; raise the limits on processes and memory"
            ))
        }
        0 => write(draft, memory, state, pipe, parent),
        pid => Ok((pid, draft)),
    }
}

/// The writer's life.
fn write(draft: Draft, memory: &GuestMemory, state: &MachineState, mut pipe: File, parent: libc::pid_t) -> ! {
    let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        // SAFETY: prctl with integer arguments touches no memory.
        let bound = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } == 0;
        // SAFETY: getppid has no conditions.
        let orphan = unsafe { libc::getppid() } != parent;
        if !bound || orphan {
            return false;
        }
        let outcome = let_go(&pipe).map_err(|error| error.to_string()).and_then(|()| {
            let state =
                state.encode().map_err(|error| format!("the state cannot be written down: {error}"))?;
            draft.write(memory, &state).map_err(|error| error.to_string())
        });
        let outcome = match outcome {
            Ok(Written { id, base, written_bytes: bytes }) => Outcome::Written { id, base, bytes },
            Err(why) => Outcome::Failed { why },
        };
        serde_json::to_vec(&outcome).is_ok_and(|bytes| pipe.write_all(&bytes).is_ok())
    }));
    let code = i32::from(!told.is_ok_and(|told| told));
    // SAFETY: _exit ends the process at once; what the parent's other threads held is theirs.
    unsafe { libc::_exit(code) }
}

/// Closes the writer's copies of what others wait for the end of: sockets and pipes, but not its own nor standard error.
fn let_go(pipe: &File) -> io::Result<()> {
    let open: Vec<RawFd> = std::fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|fd| ![libc::STDERR_FILENO, pipe.as_raw_fd()].contains(fd))
        .collect();
    for fd in open {
        // SAFETY: all-zero is a valid value of this plain C struct.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is valid for the call, which only writes the struct.
        let known = unsafe { libc::fstat(fd, &raw mut stat) } == 0;
        if known && matches!(stat.st_mode & libc::S_IFMT, libc::S_IFSOCK | libc::S_IFIFO) {
            // SAFETY: this process never uses or drops the descriptor's owner: it ends in `write`.
            unsafe { libc::close(fd) };
        }
    }
    Ok(())
}

//! The one program that a guest keeps running for its host, whoever is connected.
//!
//! ```text
//!  Keep ──► the slot: empty ──► spawned, and followed by a thread of its own: pipe ──► tail, pidfd ──► how it ended
//!             │ taken                                                                       │
//!             └──► Started ◄─────────────────────────────────────────────── Exited ◄────────┘
//! ```
//!
//! Both outputs are one pipe, which is always read: the program is never held up, and the last bytes are kept. The slot is never
//! emptied. So a host that begins anew finds the program, or how it ended, and cannot start it twice; and a guest that goes on
//! from a snapshot has it as it was.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use ark_link::{Connection, LinkError};
use ark_types::exec::{ExecEnd, ExecRequest};
use ark_types::guest::{ErrorCode, Frame, GuestError, Kind, MAX_KEPT_OUTPUT, Started};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;

use crate::children::{Child, Children};
use crate::exec::plan::Plan;
use crate::exec::spawn::{ChildStdio, spawn};
use crate::exec::stdio::{Took, read_into};
use crate::failure::{Failure, failure, system_failure};
use crate::poll::{entry, poll};

/// Bytes of output that are read at a time.
const READ: usize = 16 << 10;
/// Stack of the thread that follows the program.
const STACK: usize = 64 << 10;

/// The place of the program.
#[derive(Debug, Default)]
pub(crate) struct Keeper(Mutex<Option<Arc<Kept>>>);

/// A program that was started.
#[derive(Debug)]
struct Kept {
    pid: u32,
    /// Readable once it has ended.
    pidfd: OwnedFd,
    known: Mutex<Known>,
    /// Told when it is known how it ended.
    ended: Condvar,
}

/// What is known of it.
#[derive(Debug, Default)]
struct Known {
    /// What it wrote last, at most [`MAX_KEPT_OUTPUT`] bytes.
    tail: VecDeque<u8>,
    end: Option<ExecEnd>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Keeper {
    /// Serves one `Keep`: tells that the program runs, which is the one of `request` where there was none, and then how it ended.
    pub(crate) fn serve(
        &self,
        connection: &mut Connection,
        request: Option<ExecRequest>,
        children: &'static Children,
    ) -> Result<(), Failure> {
        let kept = self.kept(request, children)?;
        connection.send(&Frame::json(Kind::Started, &Started { pid: kept.pid })?)?;
        let end = kept.wait(connection).map_err(LinkError::from)?;
        kept.send_tail(connection, Kind::Stdout)?;
        Ok(connection.send(&Frame::json(Kind::Exited, &end)?)?)
    }

    /// Serves one `KeptOutput`.
    pub(crate) fn tell_output(&self, connection: &mut Connection) -> Result<(), Failure> {
        let kept = lock(&self.0).clone().ok_or_else(nothing)?;
        kept.send_tail(connection, Kind::Data)?;
        Ok(connection.send(&Frame::empty(Kind::End))?)
    }

    fn kept(
        &self,
        request: Option<ExecRequest>,
        children: &'static Children,
    ) -> Result<Arc<Kept>, GuestError> {
        // Held until it is there: of two who ask at once one starts it.
        let mut slot = lock(&self.0);
        if let Some(kept) = &*slot {
            return Ok(Arc::clone(kept));
        }
        let kept = start(request.ok_or_else(nothing)?, children)?;
        Ok(Arc::clone(slot.insert(kept)))
    }
}

fn nothing() -> GuestError {
    failure(ErrorCode::NothingKept, "the agent keeps no program running")
}

/// Starts the program of `request` and follows it.
fn start(request: ExecRequest, children: &'static Children) -> Result<Arc<Kept>, GuestError> {
    if request.tty.is_some() || request.timeout_ms.is_some() {
        let message = "a program that is kept running has neither a terminal nor a time limit";
        return Err(failure(ErrorCode::BadRequest, message));
    }
    let begun = Instant::now();
    let plan = Plan::new(request, Path::new("/"))?;
    let streams = || {
        let (ours, theirs) = pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok::<_, io::Error>((File::open("/dev/null")?, ours, theirs))
    };
    let (null, output, theirs) =
        streams().map_err(|e| system_failure("the program's standard streams could not be made", &e))?;
    let fds = [null.as_fd(), theirs.as_fd(), theirs.as_fd()];
    let child = spawn(children, &plan, &ChildStdio { fds, kept: &[], terminal: false })?;
    let pidfd = child.pidfd().try_clone();
    let kept = Arc::new(Kept {
        pid: u32::try_from(child.pid()).unwrap_or(0),
        pidfd: pidfd.map_err(|e| system_failure("the program cannot be followed", &e))?,
        known: Mutex::default(),
        ended: Condvar::new(),
    });
    let followed = Arc::clone(&kept);
    // Where there is no thread the child goes with the closure, and takes its group with it.
    thread::Builder::new()
        .stack_size(STACK)
        .spawn(move || followed.follow(&child, &output, begun))
        .map_err(|e| system_failure("no thread could be started", &e))?;
    Ok(kept)
}

impl Kept {
    /// Reads what `child` writes until it has ended, and takes note of that.
    fn follow(&self, child: &Child<'_>, output: &OwnedFd, begun: Instant) {
        let mut is_open = true;
        let status = loop {
            let mut fds = [
                entry(is_open.then(|| output.as_fd()), libc::POLLIN),
                entry(Some(child.pidfd().as_fd()), libc::POLLIN),
            ];
            // Whatever it says: what cannot be done now is met by the next turn.
            let _ = poll(&mut fds, None);
            let [readable, ended] = fds.map(|fd| fd.revents != 0);
            is_open = is_open && (!readable || self.read(output) != Took::End);
            if let Some(status) = ended.then(|| child.try_wait()).flatten() {
                break status;
            }
        };
        // What the pipe holds; a descendant may go on writing.
        for _ in 0..MAX_KEPT_OUTPUT.div_ceil(READ) {
            if !matches!(self.read(output), Took::Bytes(_)) {
                break;
            }
        }
        let duration_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        lock(&self.known).end = Some(ExecEnd { status, duration_us });
        self.ended.notify_all();
    }

    /// Reads once.
    fn read(&self, output: &OwnedFd) -> Took {
        let mut buffer = Vec::new();
        let took = read_into(output, &mut buffer, READ);
        let mut known = lock(&self.known);
        known.tail.extend(&buffer);
        let excess = known.tail.len().saturating_sub(MAX_KEPT_OUTPUT);
        known.tail.drain(..excess);
        took
    }

    /// Waits for its end, or that of the host's interest.
    fn wait(&self, connection: &Connection) -> io::Result<ExecEnd> {
        let mut fds = [
            entry(Some(connection.stream().as_fd()), libc::POLLRDHUP),
            entry(Some(self.pidfd.as_fd()), libc::POLLIN),
        ];
        while fds.iter().all(|fd| fd.revents == 0) {
            poll(&mut fds, None)?;
        }
        if fds[1].revents == 0 {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let mut known = lock(&self.known);
        loop {
            match known.end {
                Some(end) => return Ok(end),
                None => known = self.ended.wait(known).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Sends what it wrote last as frames of `kind`.
    fn send_tail(&self, connection: &mut Connection, kind: Kind) -> Result<(), Failure> {
        let tail: Vec<u8> = lock(&self.known).tail.iter().copied().collect();
        if !tail.is_empty() {
            connection.send(&Frame::raw(kind, tail)?)?;
        }
        Ok(())
    }
}

//! One request of an evaluator, from its first byte to the reply: one poll(2) loop.
//!
//! - **Output** goes to the host as it comes, in pauses of [`PAUSE`] so that a frame carries much; it is read only while no
//!   earlier output waits to be sent. What the pipes hold when the reply has come (the evaluator flushes first) or the process
//!   has ended is delivered before the end is told. What is written between two requests comes with the next.
//! - **Interruption**, when the time limit passes or the host closes: SIGINT to the interpreter, [`GRACE`] later to its
//!   process group (a program that the code waits for with system(3) keeps the interpreter from noticing), and when that
//!   changes nothing either, SIGKILL to the group. An interpreter that answers in time keeps its state.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use ark_link::{Connection, Outbox};
use ark_types::exec::ExitStatus;
use ark_types::guest::{Frame, Kind};
use nix::errno::Errno;

use super::interpreter::Interpreter;
use super::reply::{MAX_LINE, Reply, Task, request_line};
use crate::exec::stdio::{Took, read_into, waiting};
use crate::poll::{entry, poll, raw_entry};

/// Kinds of the frames that outputs become.
const KINDS: [Kind; 2] = [Kind::Stdout, Kind::Stderr];
/// Most bytes read at once: what a pipe holds.
const ROOM: usize = 64 << 10;
/// Between two reads of an output.
const PAUSE: Duration = Duration::from_millis(2);
/// How long an interpreter may take to start. In an emulated guest it takes a second.
pub(super) const START_LIMIT: Duration = Duration::from_secs(60);
/// Between two steps of an interruption.
const GRACE: Duration = Duration::from_secs(1);

/// Whom a request is for.
pub(super) enum Audience<'a> {
    /// The host; its stream is non-blocking.
    Host(&'a mut Connection),
    /// The host has closed: output is dropped.
    Gone,
    /// guestd itself: output waits in the pipes for the next evaluation. Nothing is interrupted, only ended.
    Guestd,
}

/// Why a request was interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// The interpreter did not start within [`START_LIMIT`].
    Start,
    /// The time limit passed.
    Deadline,
    /// The host closed.
    HostGone,
    /// The pipes to the interpreter are closed, or carry what is no reply.
    Broken,
}

/// How a request ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The interpreter answered and goes on.
    Reply(Reply),
    /// Its process ended.
    Ended(ExitStatus),
}

/// A request that has ended.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) outcome: Outcome,
    pub(super) cause: Option<Cause>,
    /// From the request to the reply, start of the interpreter not included.
    pub(super) duration: Duration,
}

/// How far a request, or its interruption, has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Starting,
    Running,
    /// SIGINT has been sent to the interpreter.
    Asked,
    /// SIGINT has been sent to the process group, or the process is about to end by itself.
    Pressed,
    /// SIGKILL has been sent.
    Killed,
}

/// A request on its way.
pub(super) struct Turn<'a> {
    interpreter: &'a mut Interpreter,
    audience: Audience<'a>,
    outbox: Outbox,
    id: u64,
    limit: Option<Duration>,
    /// The request, and how much of it has been written.
    request: Vec<u8>,
    written: usize,
    stage: Stage,
    /// When the next stage is due, if it is.
    due: Option<Instant>,
    cause: Option<Cause>,
    begun: Instant,
    replies_open: bool,
    finished: Option<(Outcome, Duration)>,
    /// Bytes that were in the outputs at the end and are still to be sent.
    owed: [usize; 2],
    read_at: [Option<Instant>; 2],
}

/// What poll(2) found.
struct Ready {
    host_gone: bool,
    request: bool,
    replies: bool,
    ended: bool,
    outputs: [bool; 2],
}

impl<'a> Turn<'a> {
    /// Prepares `task` for `interpreter`, with so much time from when it has started.
    pub(super) fn new(
        interpreter: &'a mut Interpreter,
        audience: Audience<'a>,
        task: &Task<'_>,
        limit: Option<Duration>,
    ) -> io::Result<Self> {
        interpreter.last += 1;
        let id = interpreter.last;
        let begun = Instant::now();
        let request = request_line(id, task)?;
        let mut turn = Self {
            interpreter,
            audience,
            outbox: Outbox::default(),
            id,
            limit,
            request,
            written: 0,
            stage: Stage::Starting,
            due: Some(begun + START_LIMIT),
            cause: None,
            begun,
            replies_open: true,
            finished: None,
            owed: [0; 2],
            read_at: [None; 2],
        };
        if turn.interpreter.ready {
            turn.begin();
        }
        Ok(turn)
    }

    /// The interpreter takes the request: time runs.
    fn begin(&mut self) {
        self.stage = Stage::Running;
        self.begun = Instant::now();
        self.due = self.limit.and_then(|limit| self.begun.checked_add(limit));
    }

    /// Serves the request to its end.
    ///
    /// # Errors
    /// What poll(2) says: the kernel is out of memory. The interpreter is of no more use then.
    pub(super) fn run(mut self) -> io::Result<Finished> {
        loop {
            let sent = self.flush();
            if sent
                && self.owed == [0; 2]
                && let Some((outcome, duration)) = self.finished.take()
            {
                return Ok(Finished { outcome, cause: self.cause, duration });
            }
            let ready = self.wait()?;
            if ready.host_gone {
                self.lose_host();
            }
            if self.due.is_some_and(|due| due <= Instant::now()) {
                self.advance();
            }
            if ready.request {
                self.write_request();
            }
            if ready.replies {
                self.read_replies();
            }
            if ready.ended && self.finished.is_none() {
                self.note_end();
            }
            for (at, is_ready) in ready.outputs.into_iter().enumerate() {
                if is_ready {
                    self.read_output(at);
                }
            }
        }
    }

    /// Sends what is due to the host; whether nothing is left.
    fn flush(&mut self) -> bool {
        let Audience::Host(connection) = &self.audience else { return true };
        match self.outbox.flush(connection.stream()) {
            Ok(empty) => empty,
            Err(_) => {
                self.lose_host();
                true
            }
        }
    }

    /// Sleeps until something can be done.
    fn wait(&self) -> io::Result<Ready> {
        let now = Instant::now();
        let running = self.finished.is_none();
        let sending = !self.outbox.is_empty();
        let host = match &self.audience {
            Audience::Host(connection) => Some(connection.stream().as_fd()),
            _ => None,
        };
        let host_events = libc::POLLRDHUP | if sending { libc::POLLOUT } else { 0 };
        let writes = running && self.stage != Stage::Starting && self.written < self.request.len();
        let mut due = self.due;
        let mut output = |at: usize| {
            let fd = self.interpreter.outputs.get(at)?.as_ref()?;
            let rests_until = self.read_at.get(at).copied().flatten().map(|read| read + PAUSE);
            match rests_until.filter(|&until| running && until > now) {
                _ if sending || matches!(self.audience, Audience::Guestd) => None,
                Some(until) => {
                    due = Some(due.map_or(until, |d| d.min(until)));
                    None
                }
                None => (running || self.owed.get(at).is_some_and(|&n| n > 0)).then(|| fd.as_raw_fd()),
            }
        };
        let outputs = [output(0), output(1)];
        let mut fds = [
            entry(host, host_events),
            entry(writes.then(|| self.interpreter.requests.as_fd()), libc::POLLOUT),
            entry((running && self.replies_open).then(|| self.interpreter.replies.as_fd()), libc::POLLIN),
            entry(running.then(|| self.interpreter.child.pidfd().as_fd()), libc::POLLIN),
            raw_entry(outputs[0], libc::POLLIN),
            raw_entry(outputs[1], libc::POLLIN),
        ];
        poll(&mut fds, due)?;
        let [host, request, replies, pidfd, stdout, stderr] = fds.map(|fd| fd.revents);
        Ok(Ready {
            host_gone: host & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0,
            request: request != 0,
            replies: replies != 0,
            ended: pidfd != 0,
            outputs: [stdout != 0, stderr != 0],
        })
    }

    /// Nobody hears the end: the code is interrupted.
    fn lose_host(&mut self) {
        self.audience = Audience::Gone;
        self.outbox = Outbox::default();
        self.owed = [0; 2];
        if self.finished.is_none() && matches!(self.stage, Stage::Starting | Stage::Running) {
            self.cause = Some(Cause::HostGone);
            self.advance();
        }
    }

    /// The next step of an interruption.
    fn advance(&mut self) {
        let child = &self.interpreter.child;
        let patient = !matches!(self.audience, Audience::Guestd);
        let (stage, cause) = match self.stage {
            Stage::Starting => (Stage::Killed, Cause::Start),
            Stage::Running if patient => (Stage::Asked, Cause::Deadline),
            Stage::Asked if patient => (Stage::Pressed, Cause::Deadline),
            _ => (Stage::Killed, Cause::Deadline),
        };
        match stage {
            Stage::Asked => child.signal(libc::SIGINT),
            Stage::Pressed => child.signal_group(libc::SIGINT),
            _ => child.signal_group(libc::SIGKILL),
        }
        self.due = (stage != Stage::Killed).then(|| Instant::now() + GRACE);
        self.stage = stage;
        self.cause.get_or_insert(cause);
    }

    /// The pipes are of no more use. A process that is ending closes them a little before it has ended.
    fn note_broken(&mut self) {
        self.replies_open = false;
        self.written = self.request.len();
        if self.stage != Stage::Killed {
            self.cause.get_or_insert(Cause::Broken);
            self.stage = Stage::Pressed;
            self.due = Some(Instant::now() + GRACE);
        }
    }

    fn write_request(&mut self) {
        let rest = self.request.get(self.written..).unwrap_or_default();
        match nix::unistd::write(&self.interpreter.requests, rest) {
            Ok(n) => self.written += n,
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(_) => self.note_broken(),
        }
    }

    /// Reads once from the replies and takes the lines that are whole.
    fn read_replies(&mut self) {
        let mut line = std::mem::take(&mut self.interpreter.line);
        if read_into(&self.interpreter.replies, &mut line, ROOM) == Took::End {
            self.note_broken();
        }
        let mut begin = 0;
        while let Some(end) = line.get(begin..).and_then(|rest| rest.iter().position(|&b| b == b'\n')) {
            let reply = line.get(begin..begin + end).and_then(Reply::parse);
            if let Some(reply) = reply {
                self.take(reply);
            }
            begin += end + 1;
        }
        line.drain(..begin);
        if line.len() > MAX_LINE {
            line = Vec::new();
            self.note_broken();
        }
        self.interpreter.line = line;
    }

    fn take(&mut self, reply: Reply) {
        if self.stage == Stage::Starting && reply.id == 0 {
            self.interpreter.ready = true;
            self.begin();
        } else if reply.id == self.id && self.finished.is_none() && self.stage != Stage::Killed {
            self.finish(Outcome::Reply(reply));
        }
    }

    /// Collects the process.
    fn note_end(&mut self) {
        let Some(status) = self.interpreter.child.try_wait() else { return };
        if self.stage == Stage::Killed {
            self.interpreter.child.kill_left_behind();
        } else if self.cause == Some(Cause::Broken) {
            // It ended by itself, and closed them with that.
            self.cause = None;
        }
        self.finish(Outcome::Ended(status));
    }

    fn finish(&mut self, outcome: Outcome) {
        self.finished = Some((outcome, self.begun.elapsed()));
        self.due = None;
        if matches!(self.audience, Audience::Host(_)) {
            self.owed = self.interpreter.outputs.each_ref().map(|fd| fd.as_ref().map_or(0, waiting));
        }
    }

    /// Reads once from output `at` and sends or drops it. After the end, only what is owed.
    fn read_output(&mut self, at: usize) {
        let (Some(place), Some(owed), Some(read_at), Some(&kind)) = (
            self.interpreter.outputs.get_mut(at),
            self.owed.get_mut(at),
            self.read_at.get_mut(at),
            KINDS.get(at),
        ) else {
            return;
        };
        let Some(fd) = place else { return };
        if !self.outbox.is_empty() {
            return;
        }
        let room = if self.finished.is_some() { ROOM.min(*owed) } else { ROOM };
        if room == 0 {
            return;
        }
        let mut buffer = self.outbox.buffer();
        match read_into(fd, &mut buffer, room) {
            Took::Bytes(n) => {
                *owed = owed.saturating_sub(n);
                *read_at = Some(Instant::now());
                if let (Audience::Host(_), Ok(frame)) = (&self.audience, Frame::raw(kind, buffer)) {
                    self.outbox.put(frame);
                }
                self.flush();
            }
            // Nobody else reads, so there is what is owed, or nothing ever.
            Took::Nothing => *owed = 0,
            Took::End => {
                *owed = 0;
                *place = None;
            }
        }
    }
}

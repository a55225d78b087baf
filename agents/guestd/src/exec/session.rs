//! A program's life on its connection: one thread, one poll(2) loop, one frame of output and a bounded amount of input in
//! memory.
//!
//! - **Output** is read only while no earlier output waits to be sent, so a slow host slows the program down, and nothing
//!   piles up in between. A program that writes much in small pieces is read in pauses of up to 2 ms, so that a frame
//!   carries many; the first output, and single ones, leave at once.
//! - **Input** is taken from the host until [`INPUT_HIGH`] bytes wait for the program; signals and resizes behind that wait
//!   with it.
//! - **The end**: once the program has been collected, what its pipes hold at that moment is delivered. Should a
//!   descendant keep them open, the end waits [`LINGER`] for it, no longer.
//! - **Time limit**: SIGTERM to the process group, [`KILL_AFTER`] later SIGKILL.
//! - **The host closes**: the process group is killed. With a terminal it is hung up first, and programs get
//!   [`KILL_AFTER`] to react to their SIGHUP.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use ark_link::{Connection, LinkError, Outbox, Received};
use ark_types::exec::{ExecEnd, ExitStatus, TtySize};
use ark_types::guest::{Frame, Kind, SignalRequest, Started};
use nix::errno::Errno;

use super::stdio::{Ours, Took, read_into, resize, waiting, widen};
use crate::children::Child;
use crate::poll::{entry, poll, raw_entry};

/// Most output of one frame: with its header it fits four vsock packets (64 KiB each, `VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`), and
/// whole pages leave the pipe at once.
const OUTPUT_MAX: usize = 252 << 10;
/// First, and usually only, room for output; it grows where more comes, and the pipe with it.
const OUTPUT_FIRST: usize = 4 << 10;
/// Size of a pipe through which much comes; the kernel's own is 64 KiB.
const WIDE_PIPE: usize = 256 << 10;
/// A read that brings this much needs no longer pause before the next.
const OUTPUT_PLENTY: usize = 120 << 10;
/// Shortest and longest pause between two reads of a program that writes much in small pieces, so that a frame carries many
/// of them: each frame costs the VMM a wake-up, which is the dearest part where virtualisation is nested.
const PAUSES: (Duration, Duration) = (Duration::from_micros(100), Duration::from_millis(2));
/// Input that waits for the program before no more is taken from the host.
const INPUT_HIGH: usize = 256 << 10;
/// How long the end waits for pipes that a descendant keeps open.
const LINGER: Duration = Duration::from_millis(100);
/// How long `Started` waits for something to leave with it: of a short program, start and end are one packet. Whoever waits
/// for it does not notice.
const STARTED_WAITS: Duration = Duration::from_millis(25);
/// From SIGTERM (or a terminal's SIGHUP) to SIGKILL.
const KILL_AFTER: Duration = Duration::from_secs(2);
/// Input that ends a terminal's stream, typed on its own line (`VEOF`, termios(3): Ctrl-D).
const END_OF_TRANSMISSION: u8 = 4;

/// One running program.
pub(super) struct Session<'a> {
    connection: &'a mut Connection,
    child: Child<'a>,
    begun: Instant,
    outbox: Outbox,
    /// Standard output (or the terminal), standard error.
    outputs: [Option<Output>; 2],
    input: Option<Input>,
    /// When the next step of the time limit is due, if one is.
    deadline: Option<Instant>,
    /// Whether the limit has passed.
    timed_out: bool,
    end: Option<End>,
}

/// A stream from the program.
struct Output {
    fd: OwnedFd,
    kind: Kind,
    /// Whether it is a pipe that much comes through and that holds enough for a pause to be worth it.
    gathers: bool,
    /// Bytes that were in it when the program ended and are still to be sent.
    owed: usize,
    /// How much to ask for next.
    room: usize,
    /// How long to let output gather before the next read; none unless much comes in small pieces.
    pause: Duration,
    /// When it was last read.
    read_at: Option<Instant>,
}

/// The stream to the program. For a terminal, the descriptor is a second one of the master.
struct Input {
    fd: OwnedFd,
    terminal: bool,
    waiting: Vec<u8>,
    /// How much of `waiting` has been written.
    written: usize,
    /// Whether the last byte from the host has begun a line.
    mid_line: bool,
    /// Whether the descriptor is closed once `waiting` is empty.
    ends: bool,
}

/// The program has ended.
#[derive(Clone, Copy)]
struct End {
    what: ExecEnd,
    /// How long open pipes are waited for.
    linger_until: Instant,
    /// Whether `what` has been put into the outbox.
    told: bool,
}

/// What poll(2) found.
#[derive(Default)]
struct Ready {
    host_gone: bool,
    host_readable: bool,
    ended: bool,
    input: bool,
    outputs: [bool; 2],
}

impl<'a> Session<'a> {
    pub(super) fn new(
        connection: &'a mut Connection,
        child: Child<'a>,
        ours: Ours,
        begun: Instant,
        limit: Option<Duration>,
    ) -> Self {
        let output = |fd, kind| Some(Output::new(fd, kind));
        let input = |fd, terminal| Input {
            fd,
            terminal,
            waiting: Vec::new(),
            written: 0,
            mid_line: false,
            ends: false,
        };
        let (outputs, input) = match ours {
            Ours::Pipes { stdin, stdout, stderr } => {
                ([output(stdout, Kind::Stdout), output(stderr, Kind::Stderr)], Some(input(stdin, false)))
            }
            Ours::Terminal(master) => {
                let input = master.try_clone().ok().map(|fd| input(fd, true));
                ([output(master, Kind::Stdout), None], input)
            }
        };
        let deadline = limit.and_then(|l| begun.checked_add(l));
        Self {
            connection,
            child,
            begun,
            outbox: Outbox::default(),
            outputs,
            input,
            deadline,
            timed_out: false,
            end: None,
        }
    }

    /// Serves the program until its end has been told or the host is gone.
    pub(super) fn run(mut self) -> Result<(), LinkError> {
        self.connection.stream().set_nonblocking(true)?;
        let pid = u32::try_from(self.child.pid()).unwrap_or(0);
        self.outbox.hold(&Frame::json(Kind::Started, &Started { pid })?);
        let result = self.turn_until_over();
        if self.end.is_none() {
            self.hang_up();
        }
        result
    }

    fn turn_until_over(&mut self) -> Result<(), LinkError> {
        // Frames that came together with the request are in the connection already.
        self.take_frames()?;
        loop {
            if self.outbox.flush(self.connection.stream())? {
                match &mut self.end {
                    Some(end) if end.told => return Ok(()),
                    Some(end) if drained(&self.outputs, end.linger_until) => {
                        end.told = true;
                        self.outbox.put(Frame::json(Kind::Exited, &end.what)?);
                        continue;
                    }
                    _ => {}
                }
            }
            let ready = self.wait()?;
            if ready.host_readable {
                self.take_frames()?;
            } else if ready.host_gone {
                return Err(io::Error::from(io::ErrorKind::ConnectionReset).into());
            }
            self.mind_the_time();
            if ready.ended {
                self.note_end();
            }
            if ready.input {
                self.write_input();
                // Frames may wait in the connection for this room, where poll does not see them.
                self.take_frames()?;
            }
            for (at, is_ready) in ready.outputs.into_iter().enumerate() {
                if is_ready {
                    self.read_output(at)?;
                }
            }
        }
    }

    /// Sleeps until something can be done.
    fn wait(&self) -> io::Result<Ready> {
        let idle = self.outbox.is_empty();
        let takes_input = self.input.as_ref().is_none_or(|i| i.backlog() < INPUT_HIGH);
        let mut host = libc::POLLRDHUP;
        if takes_input {
            host |= libc::POLLIN;
        }
        if !idle {
            host |= libc::POLLOUT;
        }
        let pidfd = self.end.is_none().then(|| self.child.pidfd().as_fd());
        let input = self.input.as_ref().filter(|i| i.backlog() > 0).map(|i| i.fd.as_fd());
        // A stream nobody reads now must not be in the set: its hang-up could not be masked and poll would never sleep.
        // Nor is one that pauses, unless the program has ended.
        let now = Instant::now();
        let reads =
            |o: &&Output| idle && (self.end.is_some() || o.pauses_until().is_none_or(|until| until <= now));
        let output = |o: &'_ Option<Output>| o.as_ref().filter(reads).map(|o| o.fd.as_raw_fd());
        let mut fds = [
            entry(Some(self.connection.stream().as_fd()), host),
            entry(pidfd, libc::POLLIN),
            entry(input, libc::POLLOUT),
            raw_entry(output(&self.outputs[0]), libc::POLLIN),
            raw_entry(output(&self.outputs[1]), libc::POLLIN),
        ];
        poll(&mut fds, self.next_deadline(now))?;
        let [host, pidfd, input, stdout, stderr] = fds.map(|f| f.revents);
        Ok(Ready {
            host_gone: host & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0,
            host_readable: host & libc::POLLIN != 0 && takes_input,
            ended: pidfd != 0,
            input: input != 0,
            outputs: [stdout != 0, stderr != 0],
        })
    }

    /// When the loop must turn even if nothing happens.
    fn next_deadline(&self, now: Instant) -> Option<Instant> {
        match &self.end {
            // Only open pipes are waited for then; a host that does not read has all the time it wants.
            Some(end) => (self.outbox.is_empty() && !end.told).then_some(end.linger_until),
            None => {
                let started = self.outbox.is_holding().then(|| self.begun + STARTED_WAITS);
                let pauses = self.outputs.iter().flatten().filter_map(Output::pauses_until);
                // While a frame waits for the host, nothing is read however long the pause has been over.
                let pause = pauses.filter(|_| self.outbox.is_empty()).filter(|until| *until > now).min();
                [self.deadline, started, pause].into_iter().flatten().min()
            }
        }
    }

    /// Takes every frame that has arrived.
    fn take_frames(&mut self) -> Result<(), LinkError> {
        while self.input.as_ref().is_none_or(|i| i.backlog() < INPUT_HIGH) {
            match self.connection.try_recv()? {
                Received::Nothing => break,
                Received::Closed => return Err(io::Error::from(io::ErrorKind::ConnectionReset).into()),
                Received::Frame(frame) => self.take(&frame)?,
            }
        }
        Ok(())
    }

    /// One frame from the host. What comes after the end, or is not for a running program, is dropped.
    fn take(&mut self, frame: &Frame) -> Result<(), LinkError> {
        match frame.kind {
            Kind::Stdin => {
                // Who sends and answers in turn is not to wait.
                self.outputs.iter_mut().flatten().for_each(|o| o.pause = Duration::ZERO);
                if let Some(input) = &mut self.input {
                    input.take(&frame.payload);
                }
                self.write_input();
            }
            Kind::StdinClose => {
                if let Some(input) = &mut self.input {
                    input.end();
                }
                self.write_input();
            }
            Kind::Signal => {
                let SignalRequest { signal } = frame.parse()?;
                if (1..=64).contains(&signal) {
                    self.child.signal_group(i32::from(signal));
                }
            }
            Kind::Resize => {
                let size: TtySize = frame.parse()?;
                if let Some(input) = self.input.as_ref().filter(|i| i.terminal) {
                    // A terminal that is hung up has no size; its program is about to end.
                    let _ = resize(&input.fd, size);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Enforces the time limit, and lets `Started` go.
    fn mind_the_time(&mut self) {
        let now = Instant::now();
        if self.outbox.is_holding() && now >= self.begun + STARTED_WAITS {
            self.outbox.release();
        }
        if self.end.is_some() || self.deadline.is_none_or(|d| now < d) {
            return;
        }
        if self.timed_out {
            self.child.signal_group(libc::SIGKILL);
            self.deadline = None;
        } else {
            self.timed_out = true;
            self.child.signal_group(libc::SIGTERM);
            self.deadline = Some(now + KILL_AFTER);
        }
    }

    /// Collects the program if it has ended.
    fn note_end(&mut self) {
        let Some(status) = self.child.try_wait() else { return };
        let status = if self.timed_out {
            self.child.kill_left_behind();
            ExitStatus::TimedOut
        } else {
            status
        };
        for output in self.outputs.iter_mut().flatten() {
            output.owed = waiting(&output.fd);
        }
        let duration_us = u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        let what = ExecEnd { status, duration_us };
        self.end = Some(End { what, linger_until: Instant::now() + LINGER, told: false });
        // Nobody is left to read it. A terminal stays open for what is still to be read from it.
        self.input = None;
    }

    /// Writes what waits to the program; closes the stream where that is due.
    fn write_input(&mut self) {
        if let Some(input) = &mut self.input
            && !input.write()
        {
            self.input = None;
        }
    }

    /// Reads once from output `at` and sends it.
    fn read_output(&mut self, at: usize) -> Result<(), LinkError> {
        let Some(place) = self.outputs.get_mut(at) else { return Ok(()) };
        let Some(output) = place else { return Ok(()) };
        if !self.outbox.is_empty() {
            return Ok(());
        }
        let mut buffer = self.outbox.buffer();
        match read_into(&output.fd, &mut buffer, output.room) {
            Took::Bytes(n) => {
                output.account_for(n, Instant::now());
                self.outbox.put(Frame::raw(output.kind, buffer)?);
                self.outbox.flush(self.connection.stream())?;
            }
            Took::Nothing => {}
            Took::End => *place = None,
        }
        Ok(())
    }

    /// The host has left: hangs up the terminal and gives its programs a moment. The child's own drop kills the group.
    fn hang_up(&mut self) {
        let has_terminal = self.input.as_ref().is_some_and(|i| i.terminal);
        self.input = None;
        self.outputs = [None, None];
        if has_terminal {
            let mut fds = [entry(Some(self.child.pidfd().as_fd()), libc::POLLIN)];
            // Whatever it says, the kill comes next.
            let _ = poll(&mut fds, Some(Instant::now() + KILL_AFTER));
        }
    }
}

/// Whether nothing is left to deliver: every stream has ended, or has had its time and holds only what came after the
/// program's end.
fn drained(outputs: &[Option<Output>; 2], linger_until: Instant) -> bool {
    let mut open = outputs.iter().flatten().peekable();
    open.peek().is_none()
        || (Instant::now() >= linger_until && open.all(|o| o.owed == 0 || waiting(&o.fd) == 0))
}

impl Output {
    fn new(fd: OwnedFd, kind: Kind) -> Self {
        Self { fd, kind, gathers: false, owed: 0, room: OUTPUT_FIRST, pause: Duration::ZERO, read_at: None }
    }

    /// When the next read is due, if it is not at once.
    fn pauses_until(&self) -> Option<Instant> {
        (!self.pause.is_zero()).then_some(self.read_at? + self.pause)
    }

    /// Learns from a read of `n` bytes at `now` how the next is to be.
    fn account_for(&mut self, n: usize, now: Instant) {
        let (shortest, longest) = PAUSES;
        let flows = self.read_at.is_some_and(|last| now.duration_since(last) <= self.pause + longest);
        self.pause = match n {
            OUTPUT_PLENTY.. => self.pause / 2,
            _ if flows && self.gathers => (self.pause * 2).clamp(shortest, longest),
            _ => Duration::ZERO,
        };
        if n == self.room && self.room == OUTPUT_FIRST {
            self.room = OUTPUT_MAX;
            self.gathers = widen(&self.fd, WIDE_PIPE);
        }
        self.owed = self.owed.saturating_sub(n);
        self.read_at = Some(now);
    }
}

impl Input {
    /// Bytes that wait for the program.
    const fn backlog(&self) -> usize {
        self.waiting.len() - self.written
    }

    /// More from the host.
    fn take(&mut self, bytes: &[u8]) {
        if let (false, Some(last)) = (self.ends, bytes.last()) {
            self.waiting.extend_from_slice(bytes);
            self.mid_line = !matches!(last, b'\n' | b'\r');
        }
    }

    /// The host has no more. A terminal is not closed: its line discipline is told, as Ctrl-D would (twice when a line has
    /// begun, the first only completes that).
    fn end(&mut self) {
        if self.terminal && !self.ends {
            self.waiting.push(END_OF_TRANSMISSION);
            if self.mid_line {
                self.waiting.push(END_OF_TRANSMISSION);
            }
        }
        self.ends = true;
    }

    /// Writes what the program takes; whether the stream stays open.
    fn write(&mut self) -> bool {
        while let Some(rest) = self.waiting.get(self.written..).filter(|r| !r.is_empty()) {
            match nix::unistd::write(&self.fd, rest) {
                Ok(n) => self.written += n,
                Err(Errno::EAGAIN) => return true,
                Err(Errno::EINTR) => {}
                // The program has closed its input: the rest has no reader.
                Err(_) => return false,
            }
        }
        self.waiting.clear();
        self.written = 0;
        self.terminal || !self.ends
    }
}

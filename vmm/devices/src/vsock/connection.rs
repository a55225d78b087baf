//! One stream between a guest socket and a Unix socket of the host.
//!
//! ```text
//!   host client                                guest
//!       │ CONNECT                                │ REQUEST, somebody listens
//!       ▼                                        ▼
//!   Requesting ──REQUEST sent──► Requested    Accepting
//!                                    │ RESPONSE  │ RESPONSE sent
//!                                    ▼           ▼
//!                                  Established ──────────► data both ways, half closes
//!                                    │       │
//!          host closed, all is told  │       │ guest closed: SHUTDOWN of both directions
//!                                    ▼       ▼
//!                            Lingering ──► Resetting ──RST sent──► Draining ──► Over
//!                                    └────────── guest's RST ──────────▲
//! ```
//!
//! *Lingering* waits for the guest's RST and gives up after a while. *Draining* has nothing more to do with the guest and
//! lives on until the host's socket has taken what the guest had sent. A breach of the protocol leads to *Resetting* from
//! everywhere, with nothing left to drain.

use std::io::{self, Write};
use std::net::Shutdown as Direction;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;

use super::backlog::Backlog;
use super::credit::Credit;
use super::packet::{HOST_CID, Header, Op, Ports, Shutdown, TYPE_STREAM};
use super::segments::{RxBuffer, TxPacket, receive_data};

/// How long the guest may take to answer a REQUEST. A guest that boots on a crowded, emulated host takes seconds.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the guest may take to confirm a close with RST.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Guest buffers that one turn of a connection may fill at most. Linux offers buffers of 4 KiB, so this makes one
/// `recvmsg` of 64 KiB; and no stream waits longer than that for its turn.
const MAX_BATCH: usize = 16;

/// Where a connection stands; drawn in the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// A REQUEST has to be sent.
    Requesting,
    /// The guest has to answer the REQUEST.
    Requested,
    /// A RESPONSE has to be sent.
    Accepting,
    /// Data may flow.
    Established,
    /// The guest was told that the host closed and has to confirm with RST.
    Lingering,
    /// A RST has to be sent.
    Resetting,
    /// The guest has nothing to do with it any more; the host's socket has to take the rest.
    Draining,
    /// To be removed.
    Over,
}

/// The guest broke the protocol; the connection is being reset.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Violation;

/// A connection; see the module's documentation.
pub(super) struct Connection {
    guest_cid: u64,
    ports: Ports,
    phase: Phase,
    /// Since when it is Requesting, Requested or Lingering.
    since: Instant,
    /// Closed as soon as nobody needs it.
    socket: Option<UnixStream>,
    credit: Credit,
    backlog: Backlog,
    /// What the host's side will not do any more.
    host: Shutdown,
    /// What of `host` the guest was told.
    told: Shutdown,
    /// What the guest will not do any more.
    guest: Shutdown,
    /// The socket may have something to read; epoll reports edges only.
    readable: bool,
    /// The host's side has shut down or closed, so that reads have to go on until they return 0.
    hangup: bool,
    /// The guest asked for our credit.
    owes_update: bool,
    /// The guest was asked for credit and has given none since.
    asked_for_credit: bool,
    /// Epoll was told to report when the socket takes more.
    watches_writable: bool,
    /// Guest buffers worth offering to the next turn.
    batch: usize,
}

impl Connection {
    /// A host client asks for the guest's port. `pending`: events of the socket that were seen already.
    pub(super) fn from_host(guest_cid: u64, ports: Ports, socket: UnixStream, pending: EventSet) -> Self {
        let mut connection = Self::new(guest_cid, ports, socket, Phase::Requesting);
        connection.note_events(pending);
        connection
    }

    /// The guest asked with `request` for a port on which `socket` was connected.
    pub(super) fn from_guest(request: &Header, socket: UnixStream) -> Self {
        let mut connection = Self::new(request.src_cid, request.ports_from_guest(), socket, Phase::Accepting);
        connection.credit.peer_says(request.buf_alloc, request.fwd_cnt);
        connection
    }

    fn new(guest_cid: u64, ports: Ports, socket: UnixStream, phase: Phase) -> Self {
        Self {
            guest_cid,
            ports,
            phase,
            since: Instant::now(),
            socket: Some(socket),
            credit: Credit::default(),
            backlog: Backlog::default(),
            host: Shutdown::default(),
            told: Shutdown::default(),
            guest: Shutdown::default(),
            readable: false,
            hangup: false,
            owes_update: false,
            asked_for_credit: false,
            watches_writable: false,
            batch: 1,
        }
    }

    /// Its ports.
    pub(super) fn ports(&self) -> Ports {
        self.ports
    }

    /// Where it stands.
    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    /// Its socket, to be watched.
    pub(super) fn fd(&self) -> Option<RawFd> {
        self.socket.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Whether it waits for its socket to take more, when that has changed since the last call.
    pub(super) fn wants_writable_changed(&mut self) -> Option<bool> {
        let wants = !self.backlog.is_empty();
        (std::mem::replace(&mut self.watches_writable, wants) != wants).then_some(wants)
    }

    /// Whether [`Self::expire`] may one day end it.
    pub(super) fn has_deadline(&self) -> bool {
        matches!(self.phase, Phase::Requesting | Phase::Requested | Phase::Lingering)
    }

    /// Ends the wait for a guest that takes too long. True: it did.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let limit = match self.phase {
            Phase::Requesting | Phase::Requested => REQUEST_TIMEOUT,
            Phase::Lingering => CLOSE_TIMEOUT,
            Phase::Accepting | Phase::Established | Phase::Resetting | Phase::Draining | Phase::Over => {
                return false;
            }
        };
        if now.saturating_duration_since(self.since) < limit {
            return false;
        }
        self.abort();
        true
    }

    /// Takes a packet of the guest.
    ///
    /// # Errors
    /// [`Violation`]: the packet breaks the protocol.
    pub(super) fn packet(&mut self, packet: &TxPacket<'_>) -> Result<(), Violation> {
        self.credit.peer_says(packet.header.buf_alloc, packet.header.fwd_cnt);
        if self.credit.sendable() > 0 {
            self.asked_for_credit = false;
        }
        let op = Op::from_code(packet.header.op);
        match (self.phase, op) {
            (_, Some(Op::Rst)) => {
                self.leave_guest();
                Ok(())
            }
            // What was on its way when the RST was decided on.
            (Phase::Resetting | Phase::Draining | Phase::Over, _) => Ok(()),
            (_, Some(Op::CreditUpdate)) => Ok(()),
            (_, Some(Op::CreditRequest)) => {
                self.owes_update = true;
                Ok(())
            }
            (Phase::Requested, Some(Op::Response)) => {
                self.accepted();
                Ok(())
            }
            (Phase::Established | Phase::Lingering, Some(Op::Rw)) => self.data(packet),
            (Phase::Established | Phase::Lingering, Some(Op::Shutdown)) => {
                self.guest_shut_down(Shutdown::from_flags(packet.header.flags));
                Ok(())
            }
            _ => Err(self.violation()),
        }
    }

    /// The guest broke the protocol.
    pub(super) fn violation(&mut self) -> Violation {
        self.abort();
        Violation
    }

    /// Its socket has `events`.
    pub(super) fn host_events(&mut self, events: EventSet) {
        self.note_events(events);
        if events.contains(EventSet::OUT) {
            self.flush();
        }
        let gone = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        if gone {
            match self.phase {
                Phase::Requesting | Phase::Requested => self.abort(),
                Phase::Accepting | Phase::Established => self.host_is_deaf(),
                Phase::Lingering | Phase::Resetting | Phase::Draining | Phase::Over => {
                    self.host_is_deaf();
                    self.close_if_unneeded();
                }
            }
        }
    }

    /// Whether [`Self::deliver`] would have a packet. It may find out that there is none after all.
    pub(super) fn has_output(&self) -> bool {
        match self.phase {
            Phase::Requesting | Phase::Accepting | Phase::Resetting => true,
            Phase::Established => {
                (self.can_read() && (self.credit.sendable() > 0 || !self.asked_for_credit))
                    || self.owes_credit()
                    || self.owes_shutdown()
            }
            Phase::Requested | Phase::Lingering | Phase::Draining | Phase::Over => false,
        }
    }

    /// How many guest buffers the next [`Self::deliver`] should be given.
    pub(super) fn wanted_buffers(&self) -> usize {
        match self.phase {
            Phase::Established => self.batch,
            _ => 1,
        }
    }

    /// Its turn: fills one or more of `buffers`, in order, and returns how many.
    pub(super) fn deliver(&mut self, buffers: &mut [RxBuffer<'_>]) -> usize {
        match self.phase {
            Phase::Requesting => {
                self.phase = Phase::Requested;
                self.control(buffers, Op::Request, 0)
            }
            Phase::Accepting => {
                self.phase = Phase::Established;
                self.control(buffers, Op::Response, 0)
            }
            Phase::Resetting => {
                let used = self.control(buffers, Op::Rst, 0);
                self.leave_guest();
                used
            }
            Phase::Established => match self.deliver_data(buffers) {
                0 => self.deliver_control(buffers),
                used => used,
            },
            Phase::Requested | Phase::Lingering | Phase::Draining | Phase::Over => 0,
        }
    }

    fn deliver_control(&mut self, buffers: &mut [RxBuffer<'_>]) -> usize {
        if self.owes_credit() {
            self.control(buffers, Op::CreditUpdate, 0)
        } else if self.owes_shutdown() {
            self.told = self.host;
            if self.told.both() {
                self.phase = Phase::Lingering;
                self.since = Instant::now();
                self.socket = None;
            }
            self.control(buffers, Op::Shutdown, self.told.flags())
        } else if self.can_read() && self.credit.sendable() == 0 && !self.asked_for_credit {
            self.asked_for_credit = true;
            self.control(buffers, Op::CreditRequest, 0)
        } else {
            0
        }
    }

    fn deliver_data(&mut self, buffers: &mut [RxBuffer<'_>]) -> usize {
        let credit = usize::try_from(self.credit.sendable()).unwrap_or(usize::MAX);
        let room = buffers.iter().fold(0_usize, |sum, buffer| sum.saturating_add(buffer.room()));
        let limit = credit.min(room);
        let Some(socket) = self.socket.as_ref().filter(|_| limit > 0 && self.can_read()) else { return 0 };
        match receive_data(socket.as_fd(), buffers, limit) {
            Ok((0, _)) => {
                self.readable = false;
                self.host.send = true;
                0
            }
            Ok((n, more)) => {
                // Less than there was room for: the socket is empty, and epoll will tell when that changes.
                self.readable = n >= limit || more || self.hangup;
                self.spread(buffers, n)
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                0
            }
            Err(_) => {
                self.readable = false;
                self.host.send = true;
                self.host_is_deaf();
                0
            }
        }
    }

    /// `n` bytes of data lie in `buffers`: puts headers before them.
    fn spread(&mut self, buffers: &mut [RxBuffer<'_>], n: usize) -> usize {
        let mut left = n;
        let mut used = 0_usize;
        for buffer in buffers.iter_mut() {
            let here = left.min(buffer.room());
            let Some(len) = u32::try_from(here).ok().filter(|len| *len > 0) else { break };
            self.credit.note_sent(len);
            let header = self.header(Op::Rw, 0, len);
            buffer.finish(&header);
            left = left.saturating_sub(here);
            used = used.saturating_add(1);
        }
        self.batch = if used >= self.batch { used.saturating_mul(2) } else { used }.clamp(1, MAX_BATCH);
        used
    }

    fn control(&mut self, buffers: &mut [RxBuffer<'_>], op: Op, flags: u32) -> usize {
        let header = self.header(op, flags, 0);
        match buffers.first_mut() {
            Some(buffer) => {
                buffer.finish(&header);
                1
            }
            None => 0,
        }
    }

    fn header(&mut self, op: Op, flags: u32, len: u32) -> Header {
        let (buf_alloc, fwd_cnt) = self.credit.announce();
        self.owes_update = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len,
            kind: TYPE_STREAM,
            op: op.code(),
            flags,
            buf_alloc,
            fwd_cnt,
        }
    }

    /// The guest took the host client's request.
    fn accepted(&mut self) {
        self.phase = Phase::Established;
        let line = format!("OK {}\n", self.ports.host);
        // The socket is fresh, so it takes a line at once; one that does not belongs to a client that is gone.
        let told = self.socket.as_ref().is_some_and(|mut s| s.write_all(line.as_bytes()).is_ok());
        if !told {
            self.abort();
        }
    }

    fn data(&mut self, packet: &TxPacket<'_>) -> Result<(), Violation> {
        if self.guest.send || !self.credit.accept(packet.header.len) {
            return Err(self.violation());
        }
        let Some(socket) = self.socket.as_ref().filter(|_| !self.host.receive) else {
            self.credit.note_forwarded(packet.header.len);
            return Ok(());
        };
        let sent = if !self.backlog.is_empty() { Ok(0) } else { packet.send_data(socket.as_fd()) };
        match sent {
            Ok(n) => {
                self.forwarded(n);
                self.keep_rest(packet, n);
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                self.keep_rest(packet, 0);
            }
            Err(_) => {
                self.credit.note_forwarded(packet.header.len);
                self.host_is_deaf();
            }
        }
        Ok(())
    }

    fn keep_rest(&mut self, packet: &TxPacket<'_>, sent: usize) {
        if sent < packet.data_len() {
            self.backlog.push(packet, sent);
        }
    }

    fn flush(&mut self) {
        let Some(socket) = &self.socket else { return };
        match self.backlog.flush(socket) {
            Ok(n) => self.forwarded(n),
            Err(_) => self.host_is_deaf(),
        }
        self.pass_on_half_close();
        self.close_if_unneeded();
    }

    fn guest_shut_down(&mut self, what: Shutdown) {
        self.guest = self.guest.or(what);
        if self.guest.both() {
            self.phase = Phase::Resetting;
            self.close_if_unneeded();
            return;
        }
        if self.guest.receive {
            // The host's side learns from EPIPE that nobody listens; whatever it had sent is lost, as with any closed reader.
            self.host.send = true;
            self.shut_socket_down(Direction::Read);
        }
        self.pass_on_half_close();
    }

    /// Once the guest sends no more and all of it has reached the socket, the socket says so.
    fn pass_on_half_close(&self) {
        if self.guest.send && self.backlog.is_empty() {
            self.shut_socket_down(Direction::Write);
        }
    }

    fn shut_socket_down(&self, direction: Direction) {
        if let Some(socket) = &self.socket {
            // It fails only for a socket whose other end is gone, which epoll reports.
            let _ = socket.shutdown(direction);
        }
    }

    fn note_events(&mut self, events: EventSet) {
        let ends = EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR;
        self.readable |= events.intersects(EventSet::IN | ends);
        self.hangup |= events.intersects(ends);
    }

    /// The host's side takes nothing any more.
    fn host_is_deaf(&mut self) {
        self.host.receive = true;
        let lost = self.backlog.clear();
        self.forwarded(lost);
    }

    fn forwarded(&mut self, bytes: usize) {
        // Never more than WINDOW, see `Credit::accept`.
        self.credit.note_forwarded(u32::try_from(bytes).unwrap_or(0));
    }

    fn can_read(&self) -> bool {
        self.readable && !self.host.send
    }

    fn owes_credit(&self) -> bool {
        self.owes_update || self.credit.update_due()
    }

    fn owes_shutdown(&self) -> bool {
        self.told != self.host
    }

    /// Ends it with nothing left to do for the host's side.
    fn abort(&mut self) {
        // The guest never heard of a request that was not sent.
        self.phase = if self.phase == Phase::Requesting { Phase::Over } else { Phase::Resetting };
        self.backlog.clear();
        self.socket = None;
    }

    /// The guest is done with it; what it had sent still reaches the host's side.
    fn leave_guest(&mut self) {
        self.phase = Phase::Draining;
        self.close_if_unneeded();
    }

    /// Where only the backlog keeps the socket open, closes it with the backlog's last byte.
    fn close_if_unneeded(&mut self) {
        let draining = matches!(self.phase, Phase::Resetting | Phase::Draining);
        if draining && self.backlog.is_empty() {
            self.socket = None;
            if self.phase == Phase::Draining {
                self.phase = Phase::Over;
            }
        }
    }
}

//! Brings the guest's packets and the host's sockets together.
//!
//! Knows no queues: [`Muxer::take_packet`] is given what the guest sent, [`Muxer::deliver`] fills buffers of the guest.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use std::collections::{BTreeSet, VecDeque};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::connection::{Connection, Phase};
use super::host::{Client, Greeting, ListenError, Listener};
use super::metrics::Metrics;
use super::packet::{HOST_CID, Header, Op, Ports, TYPE_STREAM};
use super::restore::VsockState;
use super::segments::{ChainError, RxBuffer, TxPacket};
use super::table::{Key, MAX_STREAMS, Place, Stream, Table};
use crate::virtio::RestoreError;

/// Refusals that may wait for a guest buffer. While there are as many, no packets are taken from the guest.
const MAX_REFUSALS: usize = 128;

/// Connections of before a restore that are remembered: all that there can be, and those of an earlier snapshot.
const MAX_GONE: usize = 2 * MAX_STREAMS;

/// How exactly timeouts are kept.
const TICK: Duration = Duration::from_millis(100);

/// Clients accepted before others have their turn.
const ACCEPT_BATCH: usize = 32;

/// Events fetched at once.
const EVENT_BATCH: usize = 64;

/// `epoll_event.data` of the listener.
const LISTENER: u64 = u64::MAX;
/// `epoll_event.data` of the timer.
const TIMER: u64 = u64::MAX - 1;

/// The device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// No listening socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The process is out of descriptors or memory.
    #[error("cannot make an epoll instance and a timer for vsock: {0}")]
    Descriptors(#[from] io::Error),
    /// Context ids 0 to 2 and the largest are reserved (specification 1.2, section 5.10.4).
    #[error("the guest's vsock context id {0} is reserved; choose one from 3 to 4294967294")]
    ReservedCid(u32),
}

/// See the module's documentation.
pub(super) struct Muxer {
    guest_cid: u32,
    listener: Listener,
    epoll: Epoll,
    timer: TimerFd,
    /// The timer ticks; only [`Self::tick`] stops it.
    ticking: bool,
    /// New clients are looked for.
    listening: bool,
    /// The driver is there.
    started: bool,
    /// Connections wait until the guest has heard that those of before are gone.
    held: bool,
    table: Table,
    refusals: VecDeque<Header>,
    /// Connections of before a restore, of which the guest has to hear once more; at most [`MAX_GONE`].
    gone: VecDeque<Ports>,
    metrics: Metrics,
}

impl Muxer {
    /// Listens on `path`; clients have to wait until [`Self::start`].
    pub(super) fn new(guest_cid: u32, path: &Path) -> Result<Self, VsockError> {
        if guest_cid <= 2 || guest_cid == u32::MAX {
            return Err(VsockError::ReservedCid(guest_cid));
        }
        let timer = TimerFd::new().map_err(io::Error::from)?;
        let epoll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, TIMER);
        epoll.ctl(ControlOperation::Add, timer.as_raw_fd(), event)?;
        Ok(Self {
            guest_cid,
            listener: Listener::bind(path)?,
            epoll,
            timer,
            ticking: false,
            listening: false,
            started: false,
            held: false,
            table: Table::new(),
            refusals: VecDeque::new(),
            gone: VecDeque::new(),
            metrics: Metrics::default(),
        })
    }

    /// The guest's context id.
    pub(super) fn guest_cid(&self) -> u32 {
        self.guest_cid
    }

    /// Readable when [`Self::host_ready`] has something to do.
    pub(super) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// What was counted so far.
    pub(super) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// To count what the queues see.
    pub(super) fn metrics_mut(&mut self) -> &mut Metrics {
        &mut self.metrics
    }

    /// Streams at the moment.
    pub(super) fn streams(&self) -> usize {
        self.table.len()
    }

    /// The driver is there: clients are let in.
    pub(super) fn start(&mut self) {
        self.started = true;
        self.listen();
    }

    /// The driver is gone, and with it all connections.
    pub(super) fn stop(&mut self) {
        self.started = false;
        self.stop_listening();
        self.held = false;
        self.table = Table::new();
        self.refusals.clear();
        self.gone.clear();
    }

    /// From now on connections wait, and are opened after [`Self::release`]. Refusals do not wait: they are what packets of
    /// connections of before are answered with.
    pub(super) fn hold(&mut self) {
        self.held = true;
    }

    /// Opens the connections that waited.
    pub(super) fn release(&mut self) {
        self.held = false;
    }

    /// What a snapshot keeps of it; see [`VsockState`].
    pub(super) fn save(&self, awaited: Option<u16>) -> VsockState {
        let refused =
            self.refusals.iter().map(|refusal| Ports { host: refusal.src_port, guest: refusal.dst_port });
        let gone = self.table.ports().chain(refused).chain(self.gone.iter().copied());
        // Sorted, so that the same state gives the same bytes.
        let gone: BTreeSet<_> = gone.map(|ports| (ports.host, ports.guest)).collect();
        VsockState {
            guest_cid: self.guest_cid,
            next_host_port: self.table.next_host_port(),
            gone: gone.into_iter().take(MAX_GONE).collect(),
            awaited,
        }
    }

    /// Takes over what [`Self::save`] kept.
    ///
    /// # Errors
    /// [`RestoreError`]: another context id, or more connections than there can be.
    pub(super) fn restore(&mut self, state: &VsockState) -> Result<(), RestoreError> {
        let (saved, present) = (state.guest_cid, self.guest_cid);
        if saved != present {
            return Err(RestoreError::ContextId { saved, present });
        }
        if state.gone.len() > MAX_GONE {
            return Err(RestoreError::Connections(state.gone.len()));
        }
        self.table.set_next_host_port(state.next_host_port);
        self.gone = state.gone.iter().map(|&(host, guest)| Ports { host, guest }).collect();
        Ok(())
    }

    /// Whether the guest's packets have to wait for it to take refusals first.
    pub(super) fn is_choked(&self) -> bool {
        self.refusals.len() >= MAX_REFUSALS
    }

    /// Takes what the guest sent.
    pub(super) fn take_packet(&mut self, packet: Result<Result<TxPacket<'_>, Header>, ChainError>) {
        self.metrics.from_guest_packets.inc();
        let packet = match packet {
            Ok(Ok(packet)) => packet,
            Ok(Err(header)) => return self.take_overlong(&header),
            Err(_) => return self.metrics.malformed.inc(),
        };
        let header = &packet.header;
        if header.src_cid != u64::from(self.guest_cid) {
            // An answer would not reach whoever this claims to be.
            self.metrics.malformed.inc();
        } else if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            self.metrics.malformed.inc();
            self.refuse(header);
        } else if let Some(place) = self.table.find(header.ports_from_guest()) {
            self.take_for_connection(place, &packet);
        } else if header.op == Op::Request.code() {
            self.take_request(header);
        } else {
            self.refuse(header);
        }
    }

    /// The header claims more data than there is.
    fn take_overlong(&mut self, header: &Header) {
        self.metrics.malformed.inc();
        let ours = header.src_cid == u64::from(self.guest_cid)
            && header.dst_cid == HOST_CID
            && header.kind == TYPE_STREAM;
        let Some(place) = self.table.find(header.ports_from_guest()).filter(|_| ours) else { return };
        if let Some(connection) = self.table.connection(place) {
            connection.violation();
            self.metrics.violations.inc();
        }
        self.settle(place);
    }

    fn take_for_connection(&mut self, place: Place, packet: &TxPacket<'_>) {
        self.metrics.from_guest_bytes.add(u64::from(packet.header.len));
        if let Some(connection) = self.table.connection(place)
            && connection.packet(packet).is_err()
        {
            self.metrics.violations.inc();
        }
        self.settle(place);
    }

    fn take_request(&mut self, request: &Header) {
        let added = match self.listener.connect_service(request.dst_port) {
            Ok(socket) => self.add(Stream::Connection(Box::new(Connection::from_guest(request, socket)))),
            Err(_) => None,
        };
        match added {
            Some(place) => {
                self.metrics.guest_connects.inc();
                self.settle(place);
            }
            None => {
                self.metrics.refused.inc();
                self.refuse(request);
            }
        }
    }

    /// Answers a packet that belongs to no connection with RST; a RST itself gets no answer.
    fn refuse(&mut self, header: &Header) {
        if header.op != Op::Rst.code() && !self.is_choked() {
            self.refusals.push_back(header.refusal());
        }
    }

    /// How many buffers of the guest [`Self::deliver`] should be given; 0 when there is nothing to send.
    pub(super) fn wanted_buffers(&mut self) -> usize {
        if !self.refusals.is_empty() {
            return 1;
        }
        if self.held {
            return 0;
        }
        while let Some(&ports) = self.gone.front() {
            if self.table.find(ports).is_none() {
                return 1;
            }
            // The guest has used the ports anew.
            self.gone.pop_front();
        }
        while let Some(place) = self.table.front() {
            match self.table.connection(place) {
                Some(connection) if connection.has_output() => return connection.wanted_buffers(),
                _ => self.table.leave_round(),
            }
        }
        0
    }

    /// Fills one or more of `buffers`, in order, and returns how many. None may be filled although some were wanted.
    pub(super) fn deliver(&mut self, buffers: &mut [RxBuffer<'_>]) -> usize {
        let Some(first) = buffers.first_mut() else { return 0 };
        let used = if let Some(refusal) = self.refusals.pop_front() {
            first.finish(&refusal);
            1
        } else if let Some(ports) = self.gone.pop_front() {
            first.finish(&Header::reset(self.guest_cid.into(), ports));
            1
        } else {
            let Some(place) = self.table.front() else { return 0 };
            self.table.leave_round();
            let used = self.table.connection(place).map_or(0, |connection| connection.deliver(buffers));
            self.settle(place);
            used
        };
        for buffer in buffers.iter().take(used) {
            self.metrics.to_guest_packets.inc();
            self.metrics.to_guest_bytes.add(buffer.data_written());
        }
        used
    }

    /// Looks at the host's side. True: the timer has ticked, see [`Self::start_ticking`].
    pub(super) fn host_ready(&mut self) -> bool {
        let mut events = [EpollEvent::default(); EVENT_BATCH];
        // It fails only when a signal comes; the events stay.
        let n = self.epoll.wait(0, &mut events).unwrap_or(0);
        let mut ticked = false;
        for event in events.iter().take(n) {
            match event.data() {
                LISTENER => self.accept(),
                TIMER => {
                    self.tick();
                    ticked = true;
                }
                data => self.stream_ready(Key::from_data(data), event.event_set()),
            }
        }
        ticked
    }

    fn stream_ready(&mut self, key: Key, events: EventSet) {
        // A stream that an earlier event of the same batch ended.
        let Some(place) = self.table.current(key) else { return };
        match self.table.connection(place) {
            Some(connection) => {
                connection.host_events(events);
                self.settle(place);
            }
            None => self.client_ready(key, events),
        }
    }

    fn client_ready(&mut self, key: Key, events: EventSet) {
        let Some(client) = self.table.take_client(key) else { return };
        let place = key.place();
        match client.greet(events) {
            Greeting::Incomplete(client) => self.table.put_back(place, client),
            Greeting::Connect { port, socket, pending } => {
                let connection = self.request(port, socket, pending);
                self.table.replace(place, connection);
                self.settle(place);
            }
            Greeting::Bad => {
                self.metrics.bad_clients.inc();
                self.table.vacate(place);
            }
        }
    }

    fn request(
        &mut self,
        port: u32,
        socket: std::os::unix::net::UnixStream,
        pending: EventSet,
    ) -> Box<Connection> {
        self.metrics.host_connects.inc();
        let ports = Ports { host: self.table.free_host_port(port), guest: port };
        Box::new(Connection::from_host(u64::from(self.guest_cid), ports, socket, pending))
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPT_BATCH {
            match self.listener.accept() {
                Ok(Some(socket)) => self.welcome(Client::new(socket)),
                Ok(None) => return,
                Err(_) => {
                    // Most likely no descriptor is left. Epoll would report the waiting client for ever: try at the next tick.
                    self.stop_listening();
                    self.start_ticking();
                    return;
                }
            }
        }
    }

    /// Most clients have sent their line by the time that they are accepted.
    fn welcome(&mut self, client: Client) {
        let stream = match client.greet(EventSet::empty()) {
            Greeting::Incomplete(client) => Stream::Client(client),
            Greeting::Connect { port, socket, pending } => {
                Stream::Connection(self.request(port, socket, pending))
            }
            Greeting::Bad => return self.metrics.bad_clients.inc(),
        };
        match self.add(stream) {
            Some(place) => {
                self.start_ticking();
                self.settle(place);
            }
            None => self.metrics.bad_clients.inc(),
        }
    }

    /// Adds a stream to the table and watches its socket. `None`, and the stream is closed, when that is not possible.
    fn add(&mut self, stream: Stream) -> Option<Place> {
        let fd = match &stream {
            Stream::Client(client) => Some(client.fd()),
            Stream::Connection(connection) => connection.fd(),
        }?;
        let key = self.table.insert(stream)?;
        if self.watch(ControlOperation::Add, fd, key, false).is_err() {
            self.table.remove(key.place());
            return None;
        }
        Some(key.place())
    }

    /// Edges only: a socket that the guest gives no credit or no buffers for must not wake anyone. Closing a socket ends it.
    fn watch(&self, how: ControlOperation, fd: RawFd, key: Key, writable: bool) -> io::Result<()> {
        let mut events = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        events.set(EventSet::OUT, writable);
        self.epoll.ctl(how, fd, EpollEvent::new(events, key.to_data()))
    }

    /// After anything happened to the connection at `place`: everything that follows from its new state.
    fn settle(&mut self, place: Place) {
        let Some(key) = self.table.key(place) else { return };
        let Some(connection) = self.table.connection(place) else { return };
        let (phase, ports, output) = (connection.phase(), connection.ports(), connection.has_output());
        let (deadline, rewatch, fd) =
            (connection.has_deadline(), connection.wants_writable_changed(), connection.fd());
        if let Some((writable, fd)) = rewatch.zip(fd) {
            // It cannot fail: the socket is being watched, and a change needs no memory.
            let _ = self.watch(ControlOperation::Modify, fd, key, writable);
        }
        if deadline {
            self.start_ticking();
        }
        match phase {
            Phase::Over => drop(self.table.remove(place)),
            Phase::Draining => self.table.release_ports(ports, place),
            _ if output => self.table.join_round(place),
            _ => {}
        }
    }

    fn listen(&mut self) {
        if self.started && !self.listening {
            let event = EpollEvent::new(EventSet::IN, LISTENER);
            self.listening = self.epoll.ctl(ControlOperation::Add, self.listener.as_raw_fd(), event).is_ok();
            if !self.listening {
                self.start_ticking();
            }
        }
    }

    fn stop_listening(&mut self) {
        if std::mem::take(&mut self.listening) {
            let event = EpollEvent::default();
            // It was added, so it can be deleted.
            let _ = self.epoll.ctl(ControlOperation::Delete, self.listener.as_raw_fd(), event);
        }
    }

    /// Lets the timer tick once at least, and on while anything has a deadline.
    pub(super) fn start_ticking(&mut self) {
        if !self.ticking {
            self.ticking = self.timer.reset(TICK, Some(TICK)).is_ok();
        }
    }

    fn tick(&mut self) {
        // The timer is readable, for nobody has set it since: this does not wait.
        let _ = self.timer.wait();
        let waiting = self.expire(Instant::now());
        self.listen();
        if !waiting && self.listening == self.started {
            self.ticking = self.timer.clear().is_err();
        }
    }

    /// Ends whatever took too long. True: something still has a deadline.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let mut waiting = false;
        let (mut late_clients, mut late_guests) = (Vec::new(), Vec::new());
        for (place, stream) in self.table.streams() {
            match stream {
                Stream::Client(client) if client.expired(now) => late_clients.push(place),
                Stream::Client(_) => waiting = true,
                Stream::Connection(connection) => {
                    if connection.expire(now) {
                        late_guests.push(place);
                    }
                    waiting |= connection.has_deadline();
                }
            }
        }
        for place in late_clients {
            self.metrics.bad_clients.inc();
            self.table.remove(place);
        }
        for place in late_guests {
            self.metrics.timeouts.inc();
            self.settle(place);
        }
        waiting
    }
}

//! The guest's side: a driver with a few sockets' worth of state.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::GuestMemory;
use crate::virtio::VirtioDevice;
use crate::virtio::queue::testing::{Buf, DriverQueue, memory};
use crate::vsock::Vsock;
use crate::vsock::packet::{HEADER_LEN, HOST_CID, Header, Op, Ports, Shutdown, TYPE_STREAM};

/// The guest's context id.
pub(super) const CID: u32 = 3;
/// Longest wait of a test for one thing.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

const RX_RINGS: u64 = 0x1000;
const TX_RINGS: u64 = 0x4000;
const TX_AT: u64 = 0x10_000;
const RX_AT: u64 = 0x40_000;
const RX_STRIDE: u64 = 0x2000;
/// As Linux: 4 KiB of data behind the header.
pub(super) const RX_DATA: u32 = 4096;
/// Entries of the two data queues.
const QUEUE: u16 = 128;

/// A packet that the device sent.
#[derive(Clone, Debug)]
pub(super) struct Received {
    pub(super) header: Header,
    pub(super) data: Vec<u8>,
}

impl Received {
    pub(super) fn op(&self) -> Op {
        Op::from_code(self.header.op).unwrap()
    }
}

/// A virtual machine that consists of a socket device.
pub(super) struct Guest {
    pub(super) memory: GuestMemory,
    pub(super) device: Vsock,
    pub(super) rx: DriverQueue,
    pub(super) tx: DriverQueue,
    pub(super) events: DriverQueue,
    /// Buffer addresses by head.
    pub(super) buffers: Vec<u64>,
    pub(super) inbox: VecDeque<Received>,
    /// Whether used buffers go back to the device at once.
    pub(super) refill: bool,
    /// Heads that wait for [`Self::give_buffers`].
    pub(super) idle: Vec<u64>,
    pub(super) dir: tempfile::TempDir,
}

impl Guest {
    /// With EVENT_IDX, as Linux negotiates it, and all of the queue's buffers available.
    pub(super) fn new() -> Self {
        Self::with(true, QUEUE)
    }

    pub(super) fn with(event_idx: bool, buffers: u16) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut device = Vsock::new(CID, &dir.path().join("v.sock")).unwrap();
        let memory = memory(0x40_0000);
        let rx = DriverQueue::new(&memory, RX_RINGS, QUEUE);
        let tx = DriverQueue::new(&memory, TX_RINGS, QUEUE);
        let events = DriverQueue::new(&memory, 0x7000, 8);
        let queues = vec![
            rx.device_queue_with(event_idx),
            tx.device_queue_with(event_idx),
            events.device_queue_with(event_idx),
        ];
        device.activate(memory.clone(), queues, 0).unwrap();
        let idle = (0..u64::from(buffers)).map(|i| RX_AT + i * RX_STRIDE).rev().collect();
        let mut guest = Self {
            memory,
            device,
            rx,
            tx,
            events,
            buffers: vec![0; usize::from(QUEUE)],
            inbox: VecDeque::new(),
            refill: true,
            idle,
            dir,
        };
        guest.give_buffers(usize::from(buffers));
        guest
    }

    pub(super) fn path(&self) -> PathBuf {
        self.dir.path().join("v.sock")
    }

    /// A service of the host on `port`.
    pub(super) fn service(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v.sock_{port}"))).unwrap()
    }

    /// Makes up to `n` idle buffers available and tells the device.
    pub(super) fn give_buffers(&mut self, n: usize) {
        for _ in 0..n {
            let Some(addr) = self.idle.pop() else { break };
            let head = self.rx.add(&[Buf::Write { addr, len: RX_DATA + 44 }]);
            self.buffers[usize::from(head)] = addr;
        }
        self.device.queue_notified(0);
        self.collect();
    }

    /// Sends a packet of which only the data is well-formed.
    pub(super) fn send_raw(&mut self, header: &Header, data: &[u8]) {
        self.memory.write_slice(&header.to_bytes(), GuestAddress(TX_AT)).unwrap();
        self.memory.write_slice(data, GuestAddress(TX_AT + 0x100)).unwrap();
        let len = u32::try_from(data.len()).unwrap();
        let mut buffers = vec![Buf::Read { addr: TX_AT, len: 44 }];
        if len > 0 {
            buffers.push(Buf::Read { addr: TX_AT + 0x100, len });
        }
        self.tx.add(&buffers);
        self.kick_tx();
    }

    /// Sends only a header, whatever it claims, and takes no look at what comes back.
    pub(super) fn send_unchecked(&mut self, header: &Header) {
        self.memory.write_slice(&header.to_bytes(), GuestAddress(TX_AT)).unwrap();
        self.tx.add(&[Buf::Read { addr: TX_AT, len: 2044 }]);
        self.device.queue_notified(1);
        while self.tx.used().is_some() {}
        while let Some((head, _)) = self.rx.used() {
            let addr = self.buffers[usize::from(head)];
            let head = self.rx.add(&[Buf::Write { addr, len: RX_DATA + 44 }]);
            self.buffers[usize::from(head)] = addr;
        }
    }

    /// Sends only a header from a place of its own, so that it may stay in the queue.
    pub(super) fn send_behind(&mut self, header: &Header) {
        self.memory.write_slice(&header.to_bytes(), GuestAddress(TX_AT)).unwrap();
        self.tx.add(&[Buf::Read { addr: TX_AT, len: 44 }]);
        self.kick_tx();
    }

    /// Buffers for a guest that began without.
    pub(super) fn give_unused_buffers(&mut self, n: u64) {
        if self.idle.is_empty() {
            self.idle = (0..n).map(|i| RX_AT + i * RX_STRIDE).collect();
        }
        self.refill = false;
        self.give_buffers(usize::try_from(n).unwrap());
    }

    /// The device sees the packets' queue.
    pub(super) fn kick_tx(&mut self) {
        self.device.queue_notified(1);
        while self.tx.used().is_some() {}
        self.collect();
    }

    fn collect(&mut self) {
        loop {
            let mut reused = 0;
            while let Some((head, written)) = self.rx.used() {
                let addr = self.buffers[usize::from(head)];
                self.idle.push(addr);
                reused += 1;
                if written == 0 {
                    continue;
                }
                let mut bytes = [0; HEADER_LEN];
                self.memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
                let header = Header::from_bytes(&bytes);
                assert_eq!(written, header.len + 44);
                assert!(header.len <= RX_DATA);
                assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, u64::from(CID)));
                let mut data = vec![0; usize::try_from(header.len).unwrap()];
                self.memory.read_slice(&mut data, GuestAddress(addr + 44)).unwrap();
                self.inbox.push_back(Received { header, data });
            }
            if reused == 0 || !self.refill {
                return;
            }
            for _ in 0..reused {
                let addr = self.idle.pop().unwrap();
                let head = self.rx.add(&[Buf::Write { addr, len: RX_DATA + 44 }]);
                self.buffers[usize::from(head)] = addr;
            }
            self.device.queue_notified(0);
        }
    }

    /// What the event loop does once: waits up to `wait` for the host's side and for kicks.
    pub(super) fn turn(&mut self, wait: Duration) {
        let fd = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let kick = |kick: &EventFd| fd(std::os::fd::AsRawFd::as_raw_fd(kick));
        let mut fds = [fd(self.device.host_fd().unwrap()), kick(&self.rx.kick), kick(&self.tx.kick)];
        let wait = i32::try_from(wait.as_millis()).unwrap();
        // SAFETY: three valid entries.
        unsafe { libc::poll(fds.as_mut_ptr(), 3, wait) };
        if fds[1].revents != 0 {
            self.rx.kick.read().unwrap();
            self.device.queue_notified(0);
        }
        if fds[2].revents != 0 {
            self.tx.kick.read().unwrap();
            self.kick_tx();
        }
        if fds[0].revents != 0 {
            self.device.host_ready();
        }
        self.collect();
    }

    /// Lets everything happen that can happen now.
    pub(super) fn settle(&mut self) {
        for _ in 0..8 {
            self.turn(Duration::ZERO);
        }
    }

    /// Turns until `done` yields something.
    pub(super) fn until<T>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(value) = done(self) {
                return value;
            }
            assert!(start.elapsed() < PATIENCE, "waited too long for {what}; inbox: {:?}", self.inbox);
            self.turn(Duration::from_millis(5));
        }
    }

    /// The next packet, which has to be `op`.
    pub(super) fn expect(&mut self, op: Op) -> Received {
        let packet = self.until(&format!("{op:?}"), |guest| guest.inbox.pop_front());
        assert_eq!(packet.op(), op, "{packet:?}");
        packet
    }

    /// Nothing comes.
    pub(super) fn expect_nothing(&mut self) {
        self.settle();
        assert!(self.inbox.is_empty(), "{:?}", self.inbox);
    }

    pub(super) fn counter(&self, name: &str) -> u64 {
        self.device.counters().into_iter().find(|(n, _)| *n == name).unwrap().1
    }

    /// A host client that has asked for `port`, whose request the guest has seen and accepted with `window` of credit.
    pub(super) fn connect_from_host(&mut self, port: u32, window: u32) -> (UnixStream, Socket) {
        let client = self.client(format!("CONNECT {port}\n").as_bytes());
        let request = self.expect(Op::Request);
        assert_eq!(request.header.dst_port, port);
        let mut socket = Socket::new(request.header.src_port, port, window);
        socket.heard(&request.header);
        socket.send(self, Op::Response, 0, &[]);
        assert_eq!(read_line(&client), format!("OK {}\n", socket.ports.host));
        (client, socket)
    }

    /// A host client that has said `greeting` and reads with a time limit.
    pub(super) fn client(&self, greeting: &[u8]) -> UnixStream {
        let mut client = UnixStream::connect(self.path()).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(greeting).unwrap();
        client
    }

    /// The guest connects to `service`.
    pub(super) fn connect_to_host(
        &mut self,
        service: &UnixListener,
        ports: Ports,
        window: u32,
    ) -> (UnixStream, Socket) {
        let mut socket = Socket::new(ports.host, ports.guest, window);
        socket.send(self, Op::Request, 0, &[]);
        let response = self.expect(Op::Response);
        socket.heard(&response.header);
        let (stream, _) = service.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        (stream, socket)
    }
}

/// A line that takes nothing of what follows it.
pub(super) fn read_line(stream: &UnixStream) -> String {
    let mut line = String::new();
    BufReader::with_capacity(1, stream).read_line(&mut line).unwrap();
    line
}

/// Everything up to the end of the stream.
pub(super) fn read_all(mut stream: &UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    all
}

/// A stream socket of the guest.
#[derive(Clone, Debug)]
pub(super) struct Socket {
    pub(super) ports: Ports,
    /// Our receive buffer.
    pub(super) window: u32,
    /// Bytes that our user took.
    pub(super) taken: u32,
    /// Bytes that came.
    pub(super) came: u32,
    /// Bytes that we sent.
    pub(super) sent: u32,
    /// The device's `buf_alloc` and `fwd_cnt`.
    pub(super) peer: (u32, u32),
}

impl Socket {
    pub(super) fn new(host: u32, guest: u32, window: u32) -> Self {
        Self { ports: Ports { host, guest }, window, taken: 0, came: 0, sent: 0, peer: (0, 0) }
    }

    pub(super) fn header(&self, op: Op, flags: u32, len: u32) -> Header {
        Header {
            src_cid: u64::from(CID),
            dst_cid: HOST_CID,
            src_port: self.ports.guest,
            dst_port: self.ports.host,
            len,
            kind: TYPE_STREAM,
            op: op.code(),
            flags,
            buf_alloc: self.window,
            fwd_cnt: self.taken,
        }
    }

    pub(super) fn send(&mut self, guest: &mut Guest, op: Op, flags: u32, data: &[u8]) {
        let len = u32::try_from(data.len()).unwrap();
        self.sent = self.sent.wrapping_add(len);
        let header = self.header(op, flags, len);
        guest.send_raw(&header, data);
    }

    pub(super) fn shut_down(&mut self, guest: &mut Guest, receive: bool, send: bool) {
        self.send(guest, Op::Shutdown, Shutdown { receive, send }.flags(), &[]);
    }

    /// Takes the device's credit and checks that it respects ours.
    pub(super) fn heard(&mut self, header: &Header) {
        assert_eq!((header.src_port, header.dst_port), (self.ports.host, self.ports.guest));
        self.peer = (header.buf_alloc, header.fwd_cnt);
        self.came = self.came.wrapping_add(header.len);
        let waiting = self.came.wrapping_sub(self.taken);
        assert!(waiting <= self.window, "{waiting} bytes for a buffer of {}", self.window);
    }

    /// What may be sent to the device now.
    pub(super) fn credit(&self) -> u32 {
        self.peer.0 - self.sent.wrapping_sub(self.peer.1)
    }

    /// Our user takes everything, and the device is told.
    pub(super) fn take_all(&mut self, guest: &mut Guest) {
        self.taken = self.came;
        self.send(guest, Op::CreditUpdate, 0, &[]);
    }
}

//! A guest that is forked: its memory and its device's state go to another device, its connections do not.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::guest::{CID, Guest, PATIENCE, Socket, read_all, read_line};
use crate::virtio::queue::testing::{Buf, copy};
use crate::virtio::queue::{DeviceQueue, QueuePosition};
use crate::virtio::{DeviceState, VirtioDevice};
use crate::vsock::packet::{Op, Ports};
use crate::vsock::{Vsock, VsockState};

const PORTS: Ports = Ports { host: 1024, guest: 5000 };
const EVENTS_AT: u64 = 0xc000;

impl Guest {
    /// As Linux: the event queue is full.
    fn with_events() -> Self {
        let mut guest = Self::new();
        (0..8).for_each(|_| guest.give_event_buffer());
        guest
    }

    /// Makes a buffer for events available and tells the device if it wants to know.
    fn give_event_buffer(&mut self) {
        let before = self.events.avail_idx();
        let addr = EVENTS_AT + 4 * u64::from(before % 8);
        self.memory.write_obj(u32::MAX, GuestAddress(addr)).unwrap();
        self.events.add(&[Buf::Write { addr, len: 4 }]);
        if self.events.kicks_after(before) {
            self.device.queue_notified(2);
            self.settle();
        }
    }

    /// Another machine that goes on where this one is, as the transport restores it, up to where it wakes.
    fn asleep(&self, event_idx: bool) -> Self {
        let saved = self.device.save();
        let saved: DeviceState = serde_json::from_slice(&serde_json::to_vec(&saved).unwrap()).unwrap();
        let positions: Vec<QueuePosition> =
            self.device.queues().into_iter().map(DeviceQueue::position).collect();
        let dir = tempfile::tempdir().unwrap();
        let memory = copy(&self.memory);
        let [rx, tx, events] = [&self.rx, &self.tx, &self.events].map(|driver| driver.in_copy(&memory));
        let queues = [&rx, &tx, &events].into_iter().zip(&positions);
        let queues = queues.map(|(driver, position)| {
            let mut queue = driver.device_queue_with(event_idx);
            queue.resume_at(position);
            queue
        });
        let mut device = Vsock::new(CID, &dir.path().join("v.sock")).unwrap();
        device.restore(&saved).unwrap();
        device.activate(memory.clone(), queues.collect(), 0).unwrap();
        Self {
            memory,
            device,
            rx,
            tx,
            events,
            buffers: self.buffers.clone(),
            inbox: VecDeque::new(),
            refill: self.refill,
            idle: self.idle.clone(),
            dir,
        }
    }

    /// The same, awake: every queue was kicked.
    fn fork(&self) -> Self {
        let mut fork = self.asleep(true);
        fork.wake();
        fork
    }

    fn wake(&mut self) {
        self.device.restored();
        (0..3).for_each(|queue| self.device.queue_notified(queue));
        self.settle();
    }

    /// The event that the device sent, if any; its buffer is not given back.
    fn event(&mut self) -> Option<u32> {
        let (head, len) = self.events.used()?;
        assert_eq!(len, 4, "Linux ignores events of another length");
        Some(self.memory.read_obj(GuestAddress(EVENTS_AT + 4 * u64::from(head))).unwrap())
    }

    /// As Linux: the event is handled, then the buffer goes back.
    fn handle_reset(&mut self) {
        assert_eq!(self.event(), Some(0), "VIRTIO_VSOCK_EVENT_ID_TRANSPORT_RESET");
        self.give_event_buffer();
    }

    /// Every connection of before gets a RST, even where the guest had not yet heard that it was accepted.
    fn expect_resets(&mut self, connections: &[Ports]) {
        let mut told: Vec<_> = connections.iter().map(|_| self.expect(Op::Rst).header).collect();
        told.sort_by_key(|header| header.src_port);
        let told: Vec<_> =
            told.iter().map(|header| Ports { host: header.src_port, guest: header.dst_port }).collect();
        assert_eq!(told, connections);
    }

    /// What is used of the guest's packets.
    fn taken_packets(&mut self) -> usize {
        std::iter::from_fn(|| self.tx.used()).count()
    }

    /// The guest's answer to the next request, whatever client it is of.
    fn accept(&mut self, port: u32) -> Socket {
        let request = self.expect(Op::Request);
        let mut socket = Socket::new(request.header.src_port, port, 1 << 16);
        socket.heard(&request.header);
        socket.send(self, Op::Response, 0, &[]);
        socket
    }
}

/// Both ways, and `guest` gets nothing else.
fn talk(guest: &mut Guest, stream: &mut UnixStream, socket: &mut Socket) {
    stream.write_all(b"ping").unwrap();
    let packet = guest.expect(Op::Rw);
    socket.heard(&packet.header);
    assert_eq!(packet.data, b"ping");
    socket.send(guest, Op::Rw, 0, b"pong");
    let mut reply = [0; 4];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b"pong");
}

#[test]
fn the_source_keeps_its_connections_and_the_fork_gets_new_ones() {
    let mut guest = Guest::with_events();
    let service = guest.service(1024);
    let (mut client, mut by_host) = guest.connect_from_host(1025, 1 << 16);
    let (mut stream, mut by_guest) = guest.connect_to_host(&service, PORTS, 1 << 16);
    let mut fork = guest.fork();
    let (stale_host, stale_guest) = (by_host.clone(), by_guest.clone());

    talk(&mut guest, &mut client, &mut by_host);
    talk(&mut guest, &mut stream, &mut by_guest);
    assert!(guest.event().is_none(), "nothing was reset");

    fork.expect_nothing();
    fork.handle_reset();
    fork.expect_resets(&[by_guest.ports, by_host.ports]);
    assert_eq!(fork.counter("streams"), 0);
    for mut stale in [stale_host, stale_guest] {
        stale.send(&mut fork, Op::Rw, 0, b"of before");
        let refusal = fork.expect(Op::Rst).header;
        assert_eq!((refusal.src_port, refusal.dst_port), (stale.ports.host, stale.ports.guest));
    }
    let service = fork.service(1024);
    let (mut client, mut by_host) = fork.connect_from_host(1025, 1 << 16);
    talk(&mut fork, &mut client, &mut by_host);
    let (mut stream, mut by_guest) = fork.connect_to_host(&service, PORTS, 1 << 16);
    talk(&mut fork, &mut stream, &mut by_guest);
    assert!(fork.event().is_none(), "once is enough");
}

/// Packets that lie in the queue at the time of the snapshot.
#[test]
fn packets_on_their_way_are_taken_and_traffic_goes_on() {
    let mut guest = Guest::with_events();
    let (client, socket) = guest.connect_from_host(1025, 1 << 16);
    for i in 0..5_u64 {
        let at = 0x20_000 + i * 0x100;
        guest.memory.write_slice(&socket.header(Op::Rw, 0, 4).to_bytes(), GuestAddress(at)).unwrap();
        guest.tx.add(&[Buf::Read { addr: at, len: 44 }, Buf::Read { addr: at + 44, len: 4 }]);
    }
    let mut fork = guest.fork();
    assert_eq!(fork.taken_packets(), 5);
    for _ in 0..5 {
        let refusal = fork.expect(Op::Rst).header;
        assert_eq!((refusal.src_port, refusal.dst_port), (socket.ports.host, socket.ports.guest));
    }
    fork.handle_reset();
    fork.expect_resets(&[socket.ports]);
    let (mut stream, mut socket) = fork.connect_from_host(1025, 1 << 16);
    talk(&mut fork, &mut stream, &mut socket);

    guest.kick_tx();
    let mut bytes = [0xff; 20];
    (&client).read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, [0; 20], "the source sends them on");
}

/// An answer to a request of before must not be taken for one to a request of now.
#[test]
fn an_answer_of_before_does_not_harm_a_connection_of_now() {
    let mut guest = Guest::with_events();
    let _client = guest.client(b"CONNECT 1025\n");
    let request = guest.expect(Op::Request).header;
    let mut stale = Socket::new(request.src_port, 1025, 1 << 16);
    let mut fork = guest.fork();
    let client = fork.client(b"CONNECT 1025\n");
    fork.settle();
    stale.send(&mut fork, Op::Response, 0, &[]);
    assert_eq!(fork.expect(Op::Rst).header.src_port, request.src_port);
    fork.handle_reset();
    fork.expect_resets(&[stale.ports]);
    let socket = fork.accept(1025);
    assert_ne!(socket.ports.host, request.src_port);
    assert_eq!(read_line(&client), format!("OK {}\n", socket.ports.host));
}

#[test]
fn a_hundred_clients_wait_until_the_guest_has_handled_the_reset() {
    for (event_idx, clients) in [(true, 1), (false, 1), (true, 100)] {
        let mut guest = Guest::with_events();
        let (_client, stale) = guest.connect_from_host(1025, 1 << 16);
        let mut fork = guest.asleep(event_idx);
        let early = fork.client(b"CONNECT 7\n");
        fork.settle();
        fork.wake();
        let mut waiting: Vec<_> = (1..clients).map(|_| fork.client(b"CONNECT 7\n")).collect();
        waiting.push(early);
        fork.expect_nothing();
        assert_eq!(fork.counter("streams"), clients);
        assert_eq!(fork.event(), Some(0));
        fork.expect_nothing();
        fork.give_event_buffer();
        fork.expect_resets(&[stale.ports]);
        let mut sockets: Vec<_> = (0..clients).map(|_| fork.accept(7)).collect();
        for stream in &mut waiting {
            let port: u32 = read_line(stream).trim().strip_prefix("OK ").unwrap().parse().unwrap();
            let socket = sockets.iter_mut().find(|socket| socket.ports.host == port).unwrap();
            talk(&mut fork, stream, socket);
        }
    }
}

/// The ring is full of buffers that came before the event, so the device must ask for a kick at the one behind them.
#[test]
fn the_driver_kicks_when_it_has_handled_the_reset() {
    let mut fork = Guest::with_events().fork();
    assert_eq!(fork.event(), Some(0));
    let before = fork.events.avail_idx();
    fork.events.add(&[Buf::Write { addr: EVENTS_AT, len: 4 }]);
    assert!(fork.events.kicks_after(before));
    assert_eq!(fork.events.line.count(), 1, "and was interrupted for the event");
}

#[test]
fn a_guest_that_connects_before_it_handles_the_reset_is_answered_after() {
    let guest = Guest::with_events();
    let mut fork = guest.fork();
    let service = fork.service(1024);
    let mut socket = Socket::new(PORTS.host, PORTS.guest, 1 << 16);
    socket.send(&mut fork, Op::Request, 0, &[]);
    fork.expect_nothing();
    fork.handle_reset();
    socket.heard(&fork.expect(Op::Response).header);
    let mut stream = service.accept().unwrap().0;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    talk(&mut fork, &mut stream, &mut socket);
}

/// A connection of before whose ports the guest uses anew is not ended in the name of the old one.
#[test]
fn ports_may_be_used_anew_at_once() {
    let mut guest = Guest::with_events();
    let service = guest.service(1024);
    let (_stream, stale) = guest.connect_to_host(&service, PORTS, 1 << 16);
    let mut fork = guest.fork();
    let service = fork.service(1024);
    let mut socket = Socket::new(stale.ports.host, stale.ports.guest, 1 << 16);
    socket.send(&mut fork, Op::Request, 0, &[]);
    fork.handle_reset();
    socket.heard(&fork.expect(Op::Response).header);
    let mut stream = service.accept().unwrap().0;
    talk(&mut fork, &mut stream, &mut socket);
}

/// What the guest was to be told and had no buffer for: a refusal, and an acceptance.
#[test]
fn answers_that_were_not_sent_become_resets() {
    let mut guest = Guest::with(true, 0);
    (0..8).for_each(|_| guest.give_event_buffer());
    let _service = guest.service(1024);
    let refused = Ports { host: 9, guest: 5001 };
    for ports in [PORTS, refused] {
        Socket::new(ports.host, ports.guest, 100).send(&mut guest, Op::Request, 0, &[]);
    }
    assert_eq!((guest.counter("refused"), guest.counter("guest_connects")), (1, 1));
    // Over two snapshots, as nothing could be told in between.
    let mut fork = guest.fork().fork();
    fork.handle_reset();
    fork.handle_reset();
    fork.give_unused_buffers(8);
    fork.expect_resets(&[refused, PORTS]);
    fork.expect_nothing();
}

#[test]
fn the_event_comes_with_the_first_buffer() {
    let guest = Guest::new();
    let mut fork = guest.fork();
    let client = fork.client(b"CONNECT 7\n");
    fork.expect_nothing();
    assert_eq!(fork.event(), None);
    // Too small, and nothing to write to: both come back.
    for buffer in [Buf::Write { addr: EVENTS_AT, len: 3 }, Buf::Read { addr: EVENTS_AT, len: 4 }] {
        let before = fork.events.avail_idx();
        let head = fork.events.add(&[buffer]);
        assert!(fork.events.kicks_after(before));
        fork.device.queue_notified(2);
        assert_eq!(fork.events.used(), Some((head, 0)));
    }
    fork.give_event_buffer();
    fork.expect_nothing();
    fork.handle_reset();
    let socket = fork.accept(7);
    assert_eq!(read_line(&client), format!("OK {}\n", socket.ports.host));
}

#[test]
fn clients_do_not_wait_for_a_guest_that_cannot_be_told() {
    let mut guest = Guest::with_events();
    guest.events.set_avail_idx(100);
    let mut fork = guest.fork();
    assert!(fork.events.interrupt.needs_reset());
    let client = fork.client(b"CONNECT 7\n");
    let socket = fork.accept(7);
    assert_eq!(read_line(&client), format!("OK {}\n", socket.ports.host));
}

#[test]
fn a_fork_of_a_fork_waits_for_the_events_of_both() {
    let guest = Guest::with_events();
    let fork = guest.fork();
    let mut second = fork.fork();
    let client = second.client(b"CONNECT 7\n");
    second.handle_reset();
    second.expect_nothing();
    second.handle_reset();
    let socket = second.accept(7);
    assert_eq!(read_line(&client), format!("OK {}\n", socket.ports.host));

    // And of one only where the first is handled.
    let mut fork = guest.fork();
    fork.handle_reset();
    let mut second = fork.fork();
    let _client = second.client(b"CONNECT 7\n");
    second.handle_reset();
    second.accept(7);
    let DeviceState::Vsock(VsockState { awaited, .. }) = second.device.save() else { panic!("no vsock") };
    assert_eq!(awaited, None);
}

#[test]
fn waiting_has_its_limits_of_time_and_number() {
    let guest = Guest::with_events();
    let mut fork = guest.fork();
    let clients: Vec<_> = (0..3).map(|_| fork.client(b"CONNECT 7\n")).collect();
    fork.settle();
    assert_eq!(fork.counter("streams"), 3);
    fork.device.expire_at(Instant::now() + Duration::from_secs(11));
    for client in &clients {
        assert_eq!(read_all(client), b"");
    }
    assert_eq!((fork.counter("streams"), fork.counter("timeouts")), (0, 3));
    fork.handle_reset();
    fork.expect_nothing();
    fork.connect_from_host(7, 1 << 16);
}

#[test]
fn a_driver_that_starts_over_waits_for_nothing() {
    let guest = Guest::with_events();
    let mut fork = guest.fork();
    fork.device.reset();
    assert!(fork.device.queues().is_empty());
    let [rx, tx, events] = [&fork.rx, &fork.tx, &fork.events].map(|driver| driver.in_copy(&fork.memory));
    let positions: Vec<_> = guest.device.queues().into_iter().map(DeviceQueue::position).collect();
    let queues = [&rx, &tx, &events].into_iter().zip(&positions).map(|(driver, position)| {
        let mut queue = driver.device_queue_with(true);
        queue.resume_at(position);
        queue
    });
    fork.device.activate(fork.memory.clone(), queues.collect(), 0).unwrap();
    fork.connect_from_host(7, 1 << 16);
}

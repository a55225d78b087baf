use std::io::Write;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::guest::{Guest, Socket, read_all, read_line};
use crate::virtio::VirtioDevice;
use crate::virtio::queue::testing::{Buf, Descriptor};
use crate::vsock::packet::{Header, Op, Ports};
use crate::vsock::table::MAX_STREAMS;

const PORTS: Ports = Ports { host: 1024, guest: 5000 };

#[test]
fn garbage_and_overlong_lines_are_turned_away() {
    let mut guest = Guest::new();
    for (i, line) in ["GET / HTTP/1.1\r\n", "CONNECT\n", "CONNECT 99999999999\n", "\n"].iter().enumerate() {
        let client = guest.client(line.as_bytes());
        guest.settle();
        // What was not read makes the end a reset on Linux.
        let _ = std::io::Read::read(&mut &client, &mut [0; 8]).map_or(0, |n| n);
        assert_eq!(guest.counter("bad_clients"), u64::try_from(i).unwrap() + 1, "{line}");
    }
    let _client = guest.client(&[b' '; 40]);
    guest.settle();
    assert_eq!((guest.counter("bad_clients"), guest.counter("streams")), (5, 0));
    guest.expect_nothing();
}

#[test]
fn a_slow_client_may_take_its_time_but_not_for_ever() {
    let mut guest = Guest::new();
    let mut client = guest.client(b"");
    for byte in b"CONNECT 1025" {
        client.write_all(&[*byte]).unwrap();
        guest.expect_nothing();
    }
    let mut lazy = guest.client(b"CONN");
    guest.settle();
    client.write_all(b"\n").unwrap();
    let request = guest.expect(Op::Request);
    Socket::new(request.header.src_port, 1025, 0).send(&mut guest, Op::Response, 0, &[]);
    assert!(read_line(&client).starts_with("OK "));
    guest.device.expire_at(Instant::now() + Duration::from_secs(6));
    assert_eq!(guest.counter("bad_clients"), 1);
    assert!(lazy.write_all(b"ECT 1\n").is_err());
    assert_eq!(guest.counter("streams"), 1);
}

#[test]
fn a_client_that_ends_before_its_line_is_forgotten() {
    let mut guest = Guest::new();
    drop(guest.client(b"CONN"));
    let half = guest.client(b"CONNECT 1");
    half.shutdown(std::net::Shutdown::Write).unwrap();
    guest.settle();
    assert_eq!((guest.counter("bad_clients"), guest.counter("streams")), (2, 0));
}

#[test]
fn wrong_addresses_types_and_operations_are_refused_or_ignored() {
    let mut guest = Guest::new();
    let socket = Socket::new(9, 5000, 100);
    let good = socket.header(Op::Rw, 0, 0);
    // Not from this guest: no answer.
    guest.send_raw(&Header { src_cid: 4, ..good }, &[]);
    guest.expect_nothing();
    // A reset is never answered.
    guest.send_raw(&socket.header(Op::Rst, 0, 0), &[]);
    guest.expect_nothing();
    // Sequenced packets, an unknown type, an unknown operation, no connection.
    for header in [
        Header { kind: 2, op: Op::Request.code(), ..good },
        Header { kind: 77, ..good },
        Header { op: 99, ..good },
        good,
    ] {
        guest.send_raw(&header, &[]);
        assert_eq!(guest.expect(Op::Rst).header.kind, header.kind);
    }
    assert_eq!(guest.counter("streams"), 0);
}

#[test]
fn someone_elses_context_id_is_refused_in_its_name() {
    let mut guest = Guest::new();
    let header = Header { dst_cid: 77, ..Socket::new(9, 5000, 100).header(Op::Request, 0, 0) };
    let refusal = header.refusal();
    assert_eq!((refusal.src_cid, refusal.dst_cid), (77, 3));
    guest.refill = false;
    guest.device.queue_notified(0);
    let before = guest.counter("malformed");
    guest.send_unchecked(&header);
    assert_eq!(guest.counter("malformed"), before + 1);
    assert_eq!(guest.counter("to_guest_packets"), 1);
}

#[test]
fn breaches_of_the_protocol_reset_the_connection() {
    let rw = |socket: &mut Socket, guest: &mut Guest, n: usize| socket.send(guest, Op::Rw, 0, &vec![0; n]);
    type Breach = fn(&mut Socket, &mut Guest);
    let breaches: [(&str, Breach); 5] = [
        ("a second request", |s, g| s.send(g, Op::Request, 0, &[])),
        ("an answer to nothing", |s, g| s.send(g, Op::Response, 0, &[])),
        ("an unknown operation", |s, g| g.send_raw(&Header { op: 0, ..s.header(Op::Rw, 0, 0) }, &[])),
        ("more data than the chain has", |s, g| g.send_raw(&s.header(Op::Rw, 0, u32::MAX), b"few")),
        ("data after the end", |s, g| {
            s.shut_down(g, false, true);
            s.send(g, Op::Rw, 0, b"x");
        }),
    ];
    for (what, breach) in breaches {
        let mut guest = Guest::new();
        let (client, mut socket) = guest.connect_from_host(1025, 1 << 16);
        rw(&mut socket, &mut guest, 3);
        breach(&mut socket, &mut guest);
        guest.expect(Op::Rst);
        guest.settle();
        assert_eq!((guest.counter("violations"), guest.counter("streams")), (1, 0), "{what}");
        assert_eq!(read_all(&client), [0; 3], "{what}");
    }
}

#[test]
fn data_beyond_the_credit_is_not_kept() {
    let mut guest = Guest::new();
    let (_client, mut socket) = guest.connect_from_host(1025, 1 << 16);
    let mut sent = 0;
    while guest.counter("violations") == 0 {
        socket.send(&mut guest, Op::Rw, 0, &[0; 60_000]);
        sent += 60_000;
        // The window and what the Unix socket holds.
        assert!(sent < 2_000_000);
    }
    let last = guest.inbox.pop_back().unwrap();
    assert_eq!(last.op(), Op::Rst);
    assert_eq!(guest.counter("streams"), 0);
}

#[test]
fn data_before_the_response_is_a_breach() {
    let mut guest = Guest::with(true, 0);
    let _service = guest.service(1024);
    let mut socket = Socket::new(PORTS.host, PORTS.guest, 100);
    socket.send(&mut guest, Op::Request, 0, &[]);
    socket.send(&mut guest, Op::Rw, 0, b"x");
    assert_eq!(guest.counter("violations"), 1);
    guest.give_unused_buffers(4);
    guest.expect(Op::Rst);
    assert_eq!(guest.counter("streams"), 0);
}

#[test]
fn a_flood_of_requests_fills_the_table_and_no_more() {
    raise_descriptor_limit();
    let mut guest = Guest::new();
    let service = guest.service(1024);
    let mut accepted = Vec::new();
    for i in 0..1200 {
        Socket::new(1024, i, 100).send(&mut guest, Op::Request, 0, &[]);
        accepted.push(service.accept().ok());
        service.set_nonblocking(true).unwrap();
    }
    guest.settle();
    let answers = |op| guest.inbox.iter().filter(|packet| packet.op() == op).count();
    assert_eq!((answers(Op::Response), answers(Op::Rst)), (MAX_STREAMS, 1200 - MAX_STREAMS));
    assert_eq!(guest.counter("streams"), u64::try_from(MAX_STREAMS).unwrap());
    // A place is free again as soon as a stream ends.
    guest.inbox.clear();
    Socket::new(1024, 7, 100).send(&mut guest, Op::Rst, 0, &[]);
    Socket::new(1024, 5000, 100).send(&mut guest, Op::Request, 0, &[]);
    guest.expect(Op::Response);
}

/// Without buffers for answers the device stops taking packets: nothing piles up, and nothing is lost.
#[test]
fn a_flood_of_refusals_waits_in_the_guests_own_queue() {
    let mut guest = Guest::with(true, 0);
    for _ in 0..150 {
        guest.send_behind(&Socket::new(9, 5000, 100).header(Op::Request, 0, 0));
    }
    assert_eq!(guest.counter("from_guest_packets"), 128);
    for _ in 0..30 {
        guest.give_unused_buffers(8);
    }
    guest.settle();
    let refusals = guest.inbox.iter().filter(|packet| packet.op() == Op::Rst).count();
    assert_eq!((refusals, guest.counter("from_guest_packets")), (150, 150));
}

/// Requests and resets of the same ports while the guest takes no answers: bounded by the table.
#[test]
fn churn_without_buffers_leaves_nothing_behind() {
    let mut guest = Guest::with(true, 0);
    let service = guest.service(1024);
    for _ in 0..2000 {
        let mut socket = Socket::new(1024, 5000, 100);
        socket.send(&mut guest, Op::Request, 0, &[]);
        drop(service.accept().unwrap());
        socket.send(&mut guest, Op::Rst, 0, &[]);
    }
    assert_eq!(guest.counter("streams"), 0);
    guest.give_unused_buffers(4);
    guest.expect_nothing();
}

#[test]
fn useless_buffers_come_back_and_the_packet_waits_for_a_good_one() {
    let mut guest = Guest::with(true, 0);
    let _client = guest.client(b"CONNECT 1025\n");
    guest.settle();
    for buffer in [Buf::Write { addr: 0x9000, len: 44 }, Buf::Read { addr: 0x9000, len: 4096 }] {
        guest.rx.add(&[buffer]);
        guest.device.queue_notified(0);
        assert_eq!(guest.rx.used().map(|(_, written)| written), Some(0));
    }
    guest.give_unused_buffers(1);
    guest.expect(Op::Request);
}

/// As many connections as allowed, whose processes' limit is usually lower.
pub(super) fn raise_descriptor_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the struct is valid.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    limit.rlim_cur = limit.rlim_max.min(16_384);
    // SAFETY: the struct is valid.
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any packets for a connection, any chains: no panic, no hang, and the device still serves the next connection.
    #[test]
    fn any_packets_are_survived(
        packets in prop::collection::vec(
            (0_u16..9, 0_u32..5, prop_oneof![Just(0_u32), 0_u32..2000, any::<u32>()], any::<u32>(), any::<u32>()),
            1..60),
        noise in prop::collection::vec((any::<u64>(), any::<u32>(), 0_u16..8, 0_u16..200, 0_u16..130), 0..20),
    ) {
        let mut guest = Guest::new();
        let service = guest.service(1024);
        service.set_nonblocking(true).unwrap();
        let (mut client, socket) = guest.connect_from_host(1025, 1 << 16);
        client.set_nonblocking(true).unwrap();
        for (op, flags, len, buf_alloc, fwd_cnt) in packets {
            let base = socket.header(Op::Rw, flags, len);
            let base = Header { op, buf_alloc, fwd_cnt, ..base };
            guest.send_unchecked(&base);
            guest.send_unchecked(&Header { dst_port: 1024, ..base });
            let _ = client.write(b"some data");
            let _ = service.accept();
            guest.device.host_ready();
        }
        for (addr, len, flags, next, head) in noise {
            guest.memory.write_slice(&[0xff; 64], GuestAddress(0x9000)).unwrap();
            guest.tx.write_descriptor(head % 128, Descriptor { addr, len, flags, next });
            guest.tx.make_available(head);
            guest.device.queue_notified(1);
        }
        guest.device.reset();
        prop_assert_eq!(guest.counter("streams"), 0);
    }
}

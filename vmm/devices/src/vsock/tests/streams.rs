use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown as Direction;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::guest::{Guest, Socket, read_all, read_line};
use crate::virtio::VirtioDevice;
use crate::vsock::packet::{Op, Ports, Shutdown};
use crate::vsock::{ListenError, Vsock, VsockError};

const PORTS: Ports = Ports { host: 1024, guest: 5000 };

fn flags(receive: bool, send: bool) -> u32 {
    Shutdown { receive, send }.flags()
}

#[test]
fn a_host_client_reaches_the_guest_and_both_talk() {
    let mut guest = Guest::new();
    let (mut client, mut socket) = guest.connect_from_host(1025, 1 << 16);
    assert!(socket.ports.host >= 1 << 30);
    client.write_all(b"ping").unwrap();
    assert_eq!(guest.expect(Op::Rw).data, b"ping");
    socket.send(&mut guest, Op::Rw, 0, b"pong");
    let mut reply = [0; 4];
    client.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b"pong");
    assert_eq!((guest.counter("host_connects"), guest.counter("streams")), (1, 1));
}

#[test]
fn data_behind_the_connect_line_is_the_streams_first() {
    let mut guest = Guest::new();
    let client = guest.client(b"CONNECT 7\nearly");
    let request = guest.expect(Op::Request);
    guest.expect_nothing();
    let mut socket = Socket::new(request.header.src_port, 7, 1000);
    socket.send(&mut guest, Op::Response, 0, &[]);
    assert!(read_line(&client).starts_with("OK "));
    assert_eq!(guest.expect(Op::Rw).data, b"early");
}

#[test]
fn the_guest_reaches_a_service_of_the_host() {
    let mut guest = Guest::new();
    let service = guest.service(1024);
    let (mut stream, mut socket) = guest.connect_to_host(&service, PORTS, 1 << 16);
    socket.send(&mut guest, Op::Rw, 0, b"hello");
    let mut reply = [0; 5];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b"hello");
    stream.write_all(b"welcome").unwrap();
    assert_eq!(guest.expect(Op::Rw).data, b"welcome");
    assert_eq!(guest.counter("guest_connects"), 1);
}

#[test]
fn a_port_where_nobody_listens_is_refused() {
    let mut guest = Guest::new();
    Socket::new(9, 5000, 100).send(&mut guest, Op::Request, 0, &[]);
    let refusal = guest.expect(Op::Rst);
    assert_eq!((refusal.header.src_port, refusal.header.dst_port), (9, 5000));
    assert_eq!(guest.counter("refused"), 1);
    assert_eq!(guest.counter("streams"), 0);
}

#[test]
fn a_client_whom_the_guest_refuses_is_disconnected_without_a_word() {
    let mut guest = Guest::new();
    let client = guest.client(b"CONNECT 1025\n");
    let request = guest.expect(Op::Request);
    Socket::new(request.header.src_port, 1025, 0).send(&mut guest, Op::Rst, 0, &[]);
    assert_eq!(read_all(&client), b"");
    guest.expect_nothing();
    assert_eq!(guest.counter("streams"), 0);
}

/// As `echo abc | wc -c` over the stream: the end of the input, then the answer, then the end of that.
#[test]
fn the_host_closes_its_half_and_still_gets_the_answer() {
    let mut guest = Guest::new();
    let (mut client, mut socket) = guest.connect_from_host(1025, 1 << 16);
    client.write_all(b"abc").unwrap();
    client.shutdown(Direction::Write).unwrap();
    assert_eq!(guest.expect(Op::Rw).data, b"abc");
    assert_eq!(guest.expect(Op::Shutdown).header.flags, flags(false, true));
    socket.send(&mut guest, Op::Rw, 0, b"3\n");
    socket.shut_down(&mut guest, true, true);
    guest.expect(Op::Rst);
    assert_eq!(read_all(&client), b"3\n");
    assert_eq!(guest.counter("streams"), 0);
}

#[test]
fn the_guest_closes_its_half_and_still_gets_the_answer() {
    let mut guest = Guest::new();
    let service = guest.service(1024);
    let (mut stream, mut socket) = guest.connect_to_host(&service, PORTS, 1 << 16);
    socket.send(&mut guest, Op::Rw, 0, b"abc");
    socket.shut_down(&mut guest, false, true);
    assert_eq!(read_all(&stream), b"abc");
    stream.write_all(b"3\n").unwrap();
    assert_eq!(guest.expect(Op::Rw).data, b"3\n");
    drop(stream);
    // Nothing is left to be done for the host, so it has closed both.
    let told = guest.until("the close", |guest| {
        guest.inbox.pop_front().filter(|packet| packet.header.flags == flags(true, true))
    });
    assert_eq!(told.op(), Op::Shutdown);
    socket.send(&mut guest, Op::Rst, 0, &[]);
    guest.expect_nothing();
    assert_eq!(guest.counter("streams"), 0);
}

#[test]
fn a_half_close_waits_for_the_data_before_it() {
    let mut guest = Guest::new();
    let (client, mut socket) = guest.connect_from_host(1025, 1 << 16);
    let mut sent = Vec::new();
    // More than the Unix socket takes while nobody reads.
    while socket.credit() > 0 {
        let n = usize::try_from(socket.credit().min(60_000)).unwrap();
        let data = vec![u8::try_from(sent.len() % 251).unwrap(); n];
        socket.send(&mut guest, Op::Rw, 0, &data);
        sent.extend(data);
        while let Some(packet) = guest.inbox.pop_front() {
            socket.heard(&packet.header);
        }
    }
    socket.shut_down(&mut guest, false, true);
    let reader = std::thread::spawn(move || (read_all(&client), client));
    guest.until("the reader", |_| reader.is_finished().then_some(()));
    let (read, mut client) = reader.join().unwrap();
    assert!(read == sent);
    client.write_all(b"thanks").unwrap();
    let answer = guest.until("data", |guest| guest.inbox.pop_front().filter(|p| p.op() == Op::Rw));
    assert_eq!(answer.data, b"thanks");
}

/// The guest is told at once that it is rid of the stream, the host's reader gets all of it.
#[test]
fn a_guest_that_closes_is_released_before_a_slow_host_has_read() {
    let mut guest = Guest::new();
    let (client, mut socket) = guest.connect_from_host(1025, 1 << 16);
    let mut sent = 0;
    while socket.credit() > 0 {
        let n = usize::try_from(socket.credit().min(60_000)).unwrap();
        socket.send(&mut guest, Op::Rw, 0, &vec![1; n]);
        sent += n;
        while let Some(packet) = guest.inbox.pop_front() {
            socket.heard(&packet.header);
        }
    }
    socket.shut_down(&mut guest, true, true);
    guest.expect(Op::Rst);
    assert_eq!(guest.counter("streams"), 1);
    let reader = std::thread::spawn(move || read_all(&client).len());
    guest.until("the reader", |_| reader.is_finished().then_some(()));
    assert_eq!(reader.join().unwrap(), sent);
    guest.expect_nothing();
    assert_eq!(guest.counter("streams"), 0);
}

#[test]
fn a_guest_that_stops_receiving_breaks_the_hosts_pipe() {
    let mut guest = Guest::new();
    let (mut client, mut socket) = guest.connect_from_host(1025, 1 << 16);
    socket.shut_down(&mut guest, true, false);
    guest.settle();
    assert_eq!(client.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    socket.send(&mut guest, Op::Rw, 0, b"still sending");
    socket.shut_down(&mut guest, false, true);
    assert_eq!(read_all(&client), b"still sending");
}

#[test]
fn a_host_that_dies_is_told_after_its_last_words() {
    let mut guest = Guest::new();
    let (mut client, mut socket) = guest.connect_from_host(1025, 1 << 16);
    client.write_all(b"last words").unwrap();
    drop(client);
    let mut words = Vec::new();
    let mut told = Shutdown::default();
    guest.until("the close", |guest| {
        let packet = guest.inbox.pop_front()?;
        match packet.op() {
            Op::Rw => words.extend(packet.data),
            Op::Shutdown => told = Shutdown::from_flags(packet.header.flags),
            op => panic!("{op:?}"),
        }
        told.both().then_some(())
    });
    assert_eq!(words, b"last words");
    // What was on its way is dropped without complaint.
    socket.send(&mut guest, Op::Rw, 0, b"too late");
    guest.expect_nothing();
    socket.send(&mut guest, Op::Rst, 0, &[]);
    assert_eq!(guest.counter("streams"), 0);
    assert_eq!(guest.counter("violations"), 0);
}

#[test]
fn a_client_that_dies_before_the_guest_answers_costs_a_reset() {
    let mut guest = Guest::new();
    let client = guest.client(b"CONNECT 1025\n");
    let request = guest.expect(Op::Request);
    drop(client);
    guest.expect(Op::Rst);
    assert_eq!(guest.counter("streams"), 0);
    // The guest's acceptance crosses it and is refused.
    Socket::new(request.header.src_port, 1025, 0).send(&mut guest, Op::Response, 0, &[]);
    guest.expect(Op::Rst);
}

#[test]
fn a_guest_that_does_not_answer_is_given_up() {
    let mut guest = Guest::new();
    let client = guest.client(b"CONNECT 1025\n");
    guest.expect(Op::Request);
    let later = std::time::Instant::now() + Duration::from_secs(11);
    guest.device.expire_at(later);
    guest.expect(Op::Rst);
    assert_eq!(read_all(&client), b"");
    assert_eq!((guest.counter("timeouts"), guest.counter("streams")), (1, 0));
}

#[test]
fn a_guest_that_does_not_confirm_a_close_is_given_up() {
    let mut guest = Guest::new();
    let (client, _socket) = guest.connect_from_host(1025, 1 << 16);
    drop(client);
    guest.until("the close", |guest| {
        guest.inbox.pop_front().filter(|packet| packet.header.flags == flags(true, true))
    });
    assert_eq!(guest.counter("streams"), 1);
    guest.device.expire_at(std::time::Instant::now() + Duration::from_secs(6));
    guest.expect(Op::Rst);
    assert_eq!((guest.counter("timeouts"), guest.counter("streams")), (1, 0));
}

#[test]
fn credit_is_told_when_asked_for() {
    let mut guest = Guest::new();
    let (_client, mut socket) = guest.connect_from_host(1025, 1 << 16);
    socket.send(&mut guest, Op::Rw, 0, &[0; 100]);
    guest.expect_nothing();
    socket.send(&mut guest, Op::CreditRequest, 0, &[]);
    assert_eq!(guest.expect(Op::CreditUpdate).header.fwd_cnt, 100);
}

#[test]
fn a_guest_without_room_is_asked_once_and_filled_exactly() {
    let mut guest = Guest::new();
    let (mut client, mut socket) = guest.connect_from_host(1025, 10);
    client.write_all(b"0123456789abcde").unwrap();
    assert_eq!(guest.expect(Op::Rw).data, b"0123456789");
    guest.expect(Op::CreditRequest);
    guest.expect_nothing();
    socket.came = 10;
    socket.take_all(&mut guest);
    assert_eq!(guest.expect(Op::Rw).data, b"abcde");
}

#[test]
fn clients_wait_for_the_driver() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let mut device = Vsock::new(3, &path).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"CONNECT 1\n").unwrap();
    device.host_ready();
    device.queue_notified(0);
    client.set_nonblocking(true).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert!(device.counters().iter().all(|(_, value)| *value == 0));
}

#[test]
fn a_reset_ends_all_streams_and_the_next_driver_starts_afresh() {
    let mut guest = Guest::new();
    let (client, _socket) = guest.connect_from_host(1025, 1 << 16);
    guest.device.reset();
    assert_eq!(read_all(&client), b"");
    assert_eq!(guest.counter("streams"), 0);
    let _waiting = guest.client(b"CONNECT 1025\n");
    guest.device.host_ready();
    assert_eq!(guest.counter("streams"), 0);
}

#[test]
fn the_path_is_checked_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let device = Vsock::new(3, &path).unwrap();
    assert!(matches!(Vsock::new(4, &path), Err(VsockError::Listen(ListenError::Bind { .. }))));
    assert!(path.exists());
    drop(device);
    assert!(!path.exists());
    let long = dir.path().join("x".repeat(97));
    assert!(matches!(Vsock::new(3, &long), Err(VsockError::Listen(ListenError::PathTooLong(_)))));
    for cid in [0, 1, 2, u32::MAX] {
        assert!(matches!(Vsock::new(cid, &path), Err(VsockError::ReservedCid(_))));
    }
}

#[test]
fn the_configuration_space_holds_the_context_id() {
    let guest = Guest::new();
    let mut bytes = [0xff; 12];
    guest.device.read_config(0, &mut bytes);
    assert_eq!(bytes, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    guest.device.read_config(u64::MAX, &mut bytes);
    assert_eq!(bytes, [0; 12]);
}

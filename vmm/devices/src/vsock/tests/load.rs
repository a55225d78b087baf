use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown as Direction;
use std::os::unix::net::UnixStream;
use std::thread;

use super::guest::{Guest, PATIENCE, RX_DATA, Socket, read_line};
use super::hostile::raise_descriptor_limit;
use crate::vsock::packet::{Op, Shutdown};

/// Plays an echo server with small windows for every connection that hosts ask for, until all of them have closed and the
/// hosts have got everything.
fn echo_until_closed(guest: &mut Guest, window: u32, streams: usize) {
    let mut sockets: HashMap<u32, (Socket, Vec<u8>, bool)> = HashMap::new();
    let mut closed = 0;
    let start = std::time::Instant::now();
    while closed < streams || guest.counter("streams") > 0 {
        assert!(start.elapsed() < 3 * PATIENCE, "{closed} of {streams} closed");
        guest.turn(std::time::Duration::from_millis(5));
        while let Some(packet) = guest.inbox.pop_front() {
            let host = packet.header.src_port;
            if packet.op() == Op::Request {
                let mut socket = Socket::new(host, packet.header.dst_port, window);
                socket.heard(&packet.header);
                socket.send(guest, Op::Response, 0, &[]);
                sockets.insert(host, (socket, Vec::new(), false));
                continue;
            }
            let Some((socket, unsent, ended)) = sockets.get_mut(&host) else {
                panic!("{packet:?} for nobody")
            };
            socket.heard(&packet.header);
            match packet.op() {
                Op::Rw => {
                    socket.taken = socket.came;
                    unsent.extend(packet.data);
                }
                Op::Shutdown => *ended |= Shutdown::from_flags(packet.header.flags).send,
                Op::CreditUpdate => {}
                Op::CreditRequest => socket.take_all(guest),
                Op::Rst => {
                    closed += 1;
                    sockets.remove(&host);
                    continue;
                }
                op => panic!("{op:?}"),
            }
        }
        for (socket, unsent, ended) in sockets.values_mut() {
            while !unsent.is_empty() && socket.credit() > 0 {
                let n = unsent.len().min(usize::try_from(socket.credit()).unwrap()).min(60_000);
                let rest = unsent.split_off(n);
                socket.send(guest, Op::Rw, 0, unsent);
                *unsent = rest;
            }
            if *ended && unsent.is_empty() {
                *ended = false;
                socket.shut_down(guest, true, true);
            }
        }
    }
}

/// Writes `bytes` and reads them back at the same time; the end of the one leads to the end of the other.
fn talk(path: &std::path::Path, port: u32, bytes: usize) {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(3 * PATIENCE)).unwrap();
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
    assert!(read_line(&stream).starts_with("OK "));
    let byte = u8::try_from(port % 251).unwrap();
    let mut writer = stream.try_clone().unwrap();
    let writer = thread::spawn(move || {
        let chunk = vec![byte; 100_000];
        let mut left = bytes;
        while left > 0 {
            let n = left.min(chunk.len());
            writer.write_all(&chunk[..n]).unwrap();
            left -= n;
        }
        writer.shutdown(Direction::Write).unwrap();
    });
    let mut count = 0;
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = stream.read(&mut buffer).unwrap();
        if n == 0 {
            break;
        }
        assert!(buffer[..n].iter().all(|b| *b == byte));
        count += n;
    }
    writer.join().unwrap();
    assert_eq!(count, bytes);
}

#[test]
fn ten_mebibytes_go_round_through_little_credit() {
    let mut guest = Guest::new();
    let path = guest.path();
    let client = thread::spawn(move || talk(&path, 1025, 10 << 20));
    echo_until_closed(&mut guest, 6000, 1);
    client.join().unwrap();
    assert_eq!((guest.counter("violations"), guest.counter("streams")), (0, 0));
}

#[test]
fn two_hundred_streams_at_once() {
    raise_descriptor_limit();
    let mut guest = Guest::new();
    let clients: Vec<_> = (0..200)
        .map(|i| {
            let path = guest.path();
            thread::spawn(move || talk(&path, 2000 + i, 50_000))
        })
        .collect();
    echo_until_closed(&mut guest, 1 << 16, 200);
    for client in clients {
        client.join().unwrap();
    }
    assert_eq!(guest.counter("host_connects"), 200);
    assert_eq!((guest.counter("violations"), guest.counter("streams")), (0, 0));
}

/// One stream with much to say must not keep another with a word waiting.
#[test]
fn streams_take_turns() {
    let mut guest = Guest::with(true, 8);
    let (mut talker, _) = guest.connect_from_host(1, 1 << 20);
    let (mut quiet, _) = guest.connect_from_host(2, 1 << 20);
    guest.refill = false;
    talker.set_nonblocking(true).unwrap();
    let chunk = [0; 4096];
    while talker.write(&chunk).is_ok() {}
    guest.settle();
    quiet.write_all(b"word").unwrap();
    guest.settle();
    let before = guest.inbox.len();
    // The turn that has begun may go on, but not past its batch.
    for _ in 0..5 {
        guest.give_buffers(8);
    }
    let at = guest.inbox.iter().position(|packet| packet.data == b"word").unwrap();
    assert!(at <= before + 16, "{at} packets before it, {before} of them before it was said");
}

#[test]
fn without_buffers_data_waits_and_nothing_is_lost() {
    for event_idx in [false, true] {
        let mut guest = Guest::with(event_idx, 4);
        let (mut client, mut socket) = guest.connect_from_host(1025, 1 << 20);
        guest.refill = false;
        let sent: Vec<u8> = (0..100_000_u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
        client.write_all(&sent).unwrap();
        client.shutdown(Direction::Write).unwrap();
        guest.settle();
        assert!(guest.counter("starved") > 0);
        let mut came: Vec<u8> = Vec::new();
        let ended = guest.until("the end", |guest| {
            guest.give_buffers(3);
            let packet = guest.inbox.pop_front()?;
            socket.heard(&packet.header);
            assert!(packet.header.len <= RX_DATA);
            came.extend(&packet.data);
            (packet.op() == Op::Shutdown).then_some(packet)
        });
        assert!(Shutdown::from_flags(ended.header.flags).send);
        assert!(came == sent);
    }
}

#[test]
fn one_interrupt_serves_a_batch() {
    let mut guest = Guest::with(false, 64);
    let (mut client, _socket) = guest.connect_from_host(1025, 1 << 20);
    guest.refill = false;
    client.write_all(&[7; 60_000]).unwrap();
    let before = guest.rx.line.count();
    guest.turn(std::time::Duration::from_millis(100));
    assert!(guest.inbox.len() >= 15);
    assert_eq!(guest.rx.line.count(), before + 1);
}

/// The driver only frees memory when it hears that its packets were taken.
#[test]
fn interrupts_for_taken_packets_are_rare() {
    for event_idx in [false, true] {
        let mut guest = Guest::with(event_idx, 64);
        let (_client, mut socket) = guest.connect_from_host(1025, 1 << 20);
        let before = guest.tx.line.count();
        let mut send = |guest: &mut Guest, n| (0..n).for_each(|_| socket.send(guest, Op::Rw, 0, b"x"));
        send(&mut guest, 10);
        assert_eq!(guest.tx.line.count(), before);
        guest.until("a tick", |guest| (guest.tx.line.count() == before + 1).then_some(()));
        guest.tx.set_used_event(11);
        send(&mut guest, 100);
        // With EVENT_IDX the driver has set its mark once and not looked since.
        assert_eq!(guest.tx.line.count(), before + if event_idx { 2 } else { 4 });
    }
}

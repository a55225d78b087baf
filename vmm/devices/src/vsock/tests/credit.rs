use std::io::{ErrorKind, Read, Write};

use proptest::prelude::*;

use super::guest::{Guest, RX_DATA};
use crate::vsock::credit::{Credit, WINDOW};
use crate::vsock::packet::Op;

#[test]
fn nothing_may_be_sent_before_the_peer_speaks_nor_after_it_lies() {
    let mut credit = Credit::default();
    assert_eq!(credit.sendable(), 0);
    credit.peer_says(1000, 0);
    assert_eq!(credit.sendable(), 1000);
    credit.note_sent(600);
    assert_eq!(credit.sendable(), 400);
    // It took more than it was sent.
    credit.peer_says(1000, 601);
    assert_eq!(credit.sendable(), 0);
    // It shrank its buffer below what it holds.
    credit.peer_says(100, 0);
    assert_eq!(credit.sendable(), 0);
}

#[derive(Clone, Debug)]
enum Step {
    /// The guest sends, honestly or not.
    Send(u32),
    /// The host takes a share of what is kept.
    Forward(u32),
    Announce,
    /// The guest announces a window and has taken a share of what it holds.
    Peer(u32, u32),
    /// We send a share of what we may.
    Receive(u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0..2 * WINDOW).prop_map(Step::Send),
        (0..=100_u32).prop_map(Step::Forward),
        Just(Step::Announce),
        (0..1_000_000_u32, 0..=100_u32).prop_map(|(window, share)| Step::Peer(window, share)),
        (0..=100_u32).prop_map(Step::Receive),
    ];
    prop::collection::vec(step, 1..200)
}

fn share(of: u64, percent: u32) -> u32 {
    u32::try_from(of * u64::from(percent) / 100).unwrap()
}

proptest! {
    /// Against a model with counters that never wrap; ours start just below the wrap.
    #[test]
    fn accounting_agrees_with_a_model(steps in steps(), start in (u32::MAX - 500_000)..=u32::MAX) {
        let mut credit = Credit::default();
        credit.start_at(start);
        let (mut kept, mut unannounced) = (0_u64, 0_u64);
        let (mut in_flight, mut window, mut peer_took) = (0_u64, 0_u64, start);
        for step in steps {
            match step {
                Step::Send(n) => {
                    let fits = kept + u64::from(n) <= u64::from(WINDOW);
                    prop_assert_eq!(credit.accept(n), fits);
                    kept += if fits { u64::from(n) } else { 0 };
                }
                Step::Forward(percent) => {
                    let n = share(kept, percent);
                    credit.note_forwarded(n);
                    kept -= u64::from(n);
                    unannounced += u64::from(n);
                }
                Step::Announce => {
                    let (buf_alloc, _) = credit.announce();
                    prop_assert_eq!(buf_alloc, WINDOW);
                    unannounced = 0;
                }
                Step::Peer(new_window, percent) => {
                    let n = share(in_flight, percent);
                    in_flight -= u64::from(n);
                    peer_took = peer_took.wrapping_add(n);
                    window = u64::from(new_window);
                    credit.peer_says(new_window, peer_took);
                }
                Step::Receive(percent) => {
                    let n = share(u64::from(credit.sendable()), percent);
                    credit.note_sent(n);
                    in_flight += u64::from(n);
                }
            }
            prop_assert_eq!(u64::from(credit.sendable()), window.saturating_sub(in_flight));
            prop_assert_eq!(credit.update_due(), unannounced >= u64::from(WINDOW / 2));
        }
    }
}

#[derive(Clone, Debug)]
enum Act {
    HostWrites(usize),
    HostReads(usize),
    GuestSends(u32),
    GuestTakes(u32),
    GuestTells,
    BuffersCome(usize),
    Turn,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        (1..50_000_usize).prop_map(Act::HostWrites),
        (1..50_000_usize).prop_map(Act::HostReads),
        (1..60_000_u32).prop_map(Act::GuestSends),
        (1..30_000_u32).prop_map(Act::GuestTakes),
        Just(Act::GuestTells),
        (1..8_usize).prop_map(Act::BuffersCome),
        Just(Act::Turn),
    ];
    prop::collection::vec(act, 1..120)
}

/// Byte `i` of a stream.
fn pattern(i: usize) -> u8 {
    u8::try_from(i * 7 % 251).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever the order of writes, reads, credit and buffers: nothing is lost, nothing exceeds anyone's credit (which
    /// `Socket::heard` checks), and in the end everything has arrived.
    #[test]
    fn streams_survive_any_order(
        acts in acts(), window in RX_DATA / 4..200_000_u32, buffers in 1_u16..20, event_idx: bool,
    ) {
        let mut guest = Guest::with(event_idx, buffers);
        let (mut client, mut socket) = guest.connect_from_host(1025, window);
        client.set_nonblocking(true).unwrap();
        guest.refill = false;
        let (mut written, mut arrived) = (0, 0);
        let (mut sent, mut read) = (0_usize, 0);
        // After the acts everyone does what is left to do.
        let finale = std::iter::repeat_with(|| [
            Act::BuffersCome(8), Act::Turn, Act::GuestTakes(u32::MAX), Act::GuestTells, Act::HostReads(1 << 20),
        ]).take(400).flatten();
        for act in acts.into_iter().chain(finale) {
            match act {
                Act::HostWrites(n) => {
                    let data: Vec<u8> = (written..written + n).map(pattern).collect();
                    written += client.write(&data).unwrap_or(0);
                }
                Act::HostReads(n) => {
                    let mut data = vec![0; n];
                    match client.read(&mut data) {
                        Ok(n) => {
                            prop_assert!((read..read + n).map(pattern).eq(data[..n].iter().copied()));
                            read += n;
                        }
                        Err(e) => prop_assert_eq!(e.kind(), ErrorKind::WouldBlock),
                    }
                }
                Act::GuestSends(n) => {
                    let n = usize::try_from(n.min(socket.credit())).unwrap();
                    let data: Vec<u8> = (sent..sent + n).map(pattern).collect();
                    socket.send(&mut guest, Op::Rw, 0, &data);
                    sent += n;
                }
                Act::GuestTakes(n) => {
                    let waiting = socket.came.wrapping_sub(socket.taken);
                    socket.taken = socket.taken.wrapping_add(n.min(waiting));
                }
                Act::GuestTells => socket.send(&mut guest, Op::CreditUpdate, 0, &[]),
                Act::BuffersCome(n) => guest.give_buffers(n),
                Act::Turn => guest.turn(std::time::Duration::ZERO),
            }
            while let Some(packet) = guest.inbox.pop_front() {
                socket.heard(&packet.header);
                match packet.op() {
                    Op::Rw => {
                        let n = packet.data.len();
                        prop_assert!((arrived..arrived + n).map(pattern).eq(packet.data.iter().copied()));
                        arrived += n;
                    }
                    Op::CreditUpdate => {}
                    Op::CreditRequest => socket.send(&mut guest, Op::CreditUpdate, 0, &[]),
                    op => prop_assert!(false, "{:?} in the middle of a stream", op),
                }
            }
        }
        prop_assert_eq!((arrived, read), (written, sent));
        prop_assert_eq!(guest.counter("violations"), 0);
    }
}

//! Saved on one machine, restored on another with a copy of its memory.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::*;
use crate::block::Block;
use crate::rng::Rng;
use crate::virtio::queue::QueuePosition;
use crate::virtio::queue::testing::{GuardedMemory, copy};
use crate::virtio::{DeviceState, RestoreError};
use crate::vsock::{Vsock, VsockState};

const RINGS: u64 = 0x1000;
const DATA: u64 = 0x10000;

/// Through the file of a snapshot.
fn stored(state: &TransportState) -> TransportState {
    let stored: TransportState =
        serde_json::from_slice(&serde_json::to_vec(state).unwrap()).expect("what was written can be read");
    assert_eq!(&stored, state);
    stored
}

/// A machine whose driver has set the device's queue up.
fn booted(device: Box<dyn VirtioDevice>) -> (Fixture, DriverQueue) {
    let f = Fixture::of(device, memory(0x20000));
    let driver = DriverQueue::new(&f.memory, RINGS, 16);
    f.negotiate(TRANSPORT_FEATURES);
    f.set_up_queue(0, 16, driver.addresses());
    f.write(STATUS, 15);
    assert_eq!(f.read(STATUS), 15);
    (f, driver)
}

/// A second machine that goes on where `f` is.
fn forked(f: &Fixture, driver: &DriverQueue, device: Box<dyn VirtioDevice>) -> (Fixture, DriverQueue) {
    let state = stored(&f.transport.save().unwrap());
    let fork = Fixture::of(device, copy(&f.memory));
    fork.transport.restore(&state).unwrap();
    let driver = driver.in_copy(&fork.memory);
    (fork, driver)
}

/// What the event loop does for queue 0.
fn serve(f: &Fixture) {
    f.transport.kicks()[0].read().expect("the queue was notified");
    lock_device(f.transport.device()).queue_notified(0);
}

#[test]
fn a_request_on_its_way_is_served_by_source_and_fork() {
    let (f, mut driver) = booted(Box::new(Rng::new()));
    let buffer = [Buf::Write { addr: DATA, len: 64 }];
    for _ in 0..20 {
        let head = driver.add(&buffer);
        f.write(QUEUE_NOTIFY, 0);
        serve(&f);
        assert_eq!(driver.used(), Some((head, 64)));
    }
    let head = driver.add(&buffer);
    // Of the source's machine alone: no state has it.
    f.write(QUEUE_NOTIFY, 0);
    let (fork, mut forked_driver) = forked(&f, &driver, Box::new(Rng::new()));
    assert!(fork.transport.kicks()[0].read().is_err(), "nothing happens before it wakes");
    fork.transport.wake();
    for (machine, driver) in [(&f, &mut driver), (&fork, &mut forked_driver)] {
        serve(machine);
        assert_eq!(driver.used(), Some((head, 64)));
        let head = driver.add(&buffer);
        machine.write(QUEUE_NOTIFY, 0);
        serve(machine);
        assert_eq!(driver.used(), Some((head, 64)));
    }
    let mut bytes = [[0; 64]; 2];
    f.memory.read_slice(&mut bytes[0], GuestAddress(DATA)).unwrap();
    fork.memory.read_slice(&mut bytes[1], GuestAddress(DATA)).unwrap();
    assert_ne!(bytes[0], bytes[1]);
}

#[test]
fn a_disk_is_read_on() {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[7; 512], 512).unwrap();
    let block = |file: &File| Box::new(Block::new("block0", file.try_clone().unwrap(), true).unwrap());
    let (f, mut driver) = booted(block(&file));
    f.memory.write_obj(1_u64, GuestAddress(0x8008)).unwrap();
    let read = [
        Buf::Read { addr: 0x8000, len: 16 },
        Buf::Write { addr: DATA, len: 512 },
        Buf::Write { addr: 0x8100, len: 1 },
    ];
    for _ in 0..7 {
        let head = driver.add(&read);
        f.write(QUEUE_NOTIFY, 0);
        serve(&f);
        assert_eq!(driver.used(), Some((head, 513)));
    }
    let (fork, mut driver) = forked(&f, &driver, block(&file));
    fork.memory.write_slice(&[0; 512], GuestAddress(DATA)).unwrap();
    let head = driver.add(&read);
    fork.transport.wake();
    serve(&fork);
    assert_eq!(driver.used(), Some((head, 513)));
    let mut bytes = [0; 512];
    fork.memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
    assert_eq!(bytes, [7; 512]);
}

#[test]
fn a_socket_device_resets_the_transport_when_it_wakes() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [source, target] = dirs.each_ref().map(|dir| Vsock::new(3, &dir.path().join("v")).unwrap());
    let f = Fixture::of(Box::new(source), memory(0x20000));
    let mut drivers = [RINGS, 0x4000, 0x7000].map(|base| DriverQueue::new(&f.memory, base, 8));
    f.negotiate(TRANSPORT_FEATURES | 1);
    for (index, driver) in (0..).zip(&drivers) {
        f.set_up_queue(index, 8, driver.addresses());
    }
    f.write(STATUS, 15);
    let head = drivers[2].add(&[Buf::Write { addr: DATA, len: 4 }]);
    f.transport.wake();
    assert_eq!(f.line.count(), 0, "nothing to tell on a machine that was never restored");
    let (fork, mut driver) = forked(&f, &drivers[2], Box::new(target));
    assert_eq!(driver.used(), None);
    fork.transport.wake();
    assert_eq!(driver.used(), Some((head, 4)));
    assert_eq!((fork.line.count() > 0, fork.read(INTERRUPT_STATUS)), (true, 1));
    assert_eq!(drivers[2].used(), None, "the source's connections stay");
    assert!(fork.transport.kicks().iter().all(|kick| kick.read().is_ok()));
}

#[test]
fn an_interrupt_on_its_way_is_raised_again() {
    let (f, mut driver) = booted(Box::new(Rng::new()));
    let (fork, _) = forked(&f, &driver, Box::new(Rng::new()));
    fork.transport.wake();
    assert_eq!(fork.line.count(), 0, "none was");

    driver.add(&[Buf::Write { addr: DATA, len: 64 }]);
    f.write(QUEUE_NOTIFY, 0);
    serve(&f);
    let state = f.transport.save().unwrap();
    assert_eq!((f.line.count(), state.interrupt_status), (1, 1));
    let (fork, _) = forked(&f, &driver, Box::new(Rng::new()));
    assert_eq!((fork.line.count(), fork.read(INTERRUPT_STATUS)), (0, 1));
    fork.transport.wake();
    assert_eq!((fork.line.count(), f.line.count()), (1, 1));
}

/// How many chains they are is not saved, so EVENT_IDX cannot tell whether the driver waits for one of them.
#[test]
fn chains_that_were_not_announced_are_announced() {
    let (f, driver) = booted(Box::new(Rng::new()));
    let mut state = f.transport.save().unwrap();
    state.live.as_mut().unwrap().positions[0].unannounced = true;
    let fork = Fixture::of(Box::new(Rng::new()), copy(&f.memory));
    fork.transport.restore(&state).unwrap();
    fork.transport.wake();
    assert_eq!((fork.line.count(), fork.read(INTERRUPT_STATUS)), (1, 1));
    drop(driver);
}

#[test]
fn a_driver_that_is_not_yet_ready_goes_on() {
    let step = |f: &Fixture, steps: usize| {
        let driver = DriverQueue::new(&memory(0x20000), RINGS, 16);
        let sel = |sel, register, value| {
            f.write(DRIVER_FEATURES_SEL, sel);
            f.write(register, value);
        };
        let all: [&dyn Fn(); 7] = [
            &|| f.write(STATUS, 1),
            &|| f.write(STATUS, 3),
            &|| sel(1, DRIVER_FEATURES, 1),
            &|| f.write(STATUS, 11),
            &|| f.write(DEVICE_FEATURES_SEL, 1),
            &|| f.set_up_queue(0, 16, driver.addresses()),
            &|| f.write(STATUS, 15),
        ];
        all[steps]();
    };
    for done in 0..=7 {
        let f = Fixture::of(Box::new(Rng::new()), memory(0x20000));
        (0..done).for_each(|i| step(&f, i));
        let state = stored(&f.transport.save().unwrap());
        assert_eq!(state.live.is_some(), done == 7);
        let fork = Fixture::of(Box::new(Rng::new()), memory(0x20000));
        fork.transport.restore(&state).unwrap();
        fork.transport.wake();
        assert_eq!(fork.transport.save().unwrap(), state);
        (done..7).for_each(|i| step(&fork, i));
        assert_eq!((fork.read(STATUS), fork.ignored()), (15, 0), "after {done} steps");
        assert!(fork.transport.save().unwrap().live.is_some());
    }
}

#[test]
fn what_is_broken_stays_so_until_a_reset() {
    let (f, mut driver) = booted(Box::new(Rng::new()));
    driver.set_avail_idx(1000);
    f.write(QUEUE_NOTIFY, 0);
    serve(&f);
    assert_eq!(f.read(STATUS), 15 | 0x40);
    f.write(STATUS, 15 | 0x80);
    driver.set_avail_idx(1);
    let (fork, mut driver) = forked(&f, &driver, Box::new(Rng::new()));
    fork.transport.wake();
    serve(&fork);
    assert!(driver.used().is_none());
    assert_eq!(fork.read(STATUS), 15 | 0x40 | 0x80);
    assert_eq!((fork.read(CONFIG_GENERATION), fork.read(INTERRUPT_STATUS)), (1, 2));
    fork.write(STATUS, 0);
    assert_eq!(fork.read(STATUS), 0);
    assert!(fork.transport.save().unwrap().live.is_none());
}

#[test]
fn only_a_new_transport_is_restored() {
    let (f, _) = booted(Box::new(Rng::new()));
    let state = f.transport.save().unwrap();
    assert!(matches!(f.transport.restore(&state), Err(PersistError::InUse(4))));
    assert_eq!(f.read(STATUS), 15);
}

#[test]
fn a_device_that_refuses_leaves_the_transport_as_it_was() {
    let f = Fixture::of(Box::new(Rng::new()), memory(0x20000));
    f.negotiate(TRANSPORT_FEATURES);
    f.write(STATUS, 15);
    let mut state = f.transport.save().unwrap();
    assert_eq!((state.status, state.live.is_some()), (15 | 0x40, false));
    state.live =
        Some(LiveState { positions: vec![QueuePosition::default()], device: DeviceState::Stateless });
    let fork = Fixture::of(Box::new(Rng::new()), memory(0x20000));
    assert!(matches!(fork.transport.restore(&state), Err(PersistError::Activate(_))));
    assert_eq!((fork.read(STATUS), fork.read(INTERRUPT_STATUS)), (0, 0));
    state.live = None;
    fork.transport.restore(&state).unwrap();
    assert_eq!(fork.read(STATUS), 15 | 0x40);
}

type Change<'a> = &'a dyn Fn(&mut TransportState);

/// Each change to a good state is told by name.
#[test]
fn states_that_cannot_be_are_refused() {
    let (f, _) = booted(Box::new(Rng::new()));
    let good = f.transport.save().unwrap();
    let vsock = VsockState { guest_cid: 3, next_host_port: 0, gone: Vec::new(), awaited: None };
    let cases: [(Change, &str); 18] = [
        (&|s| s.device_id = 2, "has virtio device 2 where this machine has 4"),
        (&|s| s.status = 7, "status 0x7"),
        (&|s| s.status = 0x10f, "status 0x10f"),
        (&|s| s.status = 11, "a device at work at status 0xb"),
        (&|s| s.live = None, "no device at work at status 0xf"),
        (&|s| s.interrupt_status = 4, "interrupt status 0x4"),
        (&|s| s.driver_features |= 1 << 9, "features 0x200"),
        (&|s| s.driver_features = 0, "features 0x0"),
        (&|s| s.queues.clear(), "of 0 queues, but it has 1"),
        (&|s| s.live.as_mut().unwrap().positions.clear(), "of 0 queues"),
        (&|s| s.queues[0].size = 0, "queue 0"),
        (&|s| s.queues[0].size = 128, "128 entries"),
        (&|s| s.queues[0].size = 24, "24 entries"),
        (&|s| s.queues[0].descriptors = 0x1001, "not aligned"),
        (&|s| s.queues[0].driver = 0x20000, "not in guest memory"),
        (&|s| s.queues[0].device = !0xf, "not in guest memory"),
        (&|s| s.queues[0].ready = false, "did not set its queue up"),
        (&|s| s.live.as_mut().unwrap().device = DeviceState::Vsock(vsock.clone()), "another kind"),
    ];
    for (change, told) in cases {
        let mut state = good.clone();
        change(&mut state);
        let fork = Fixture::of(Box::new(Rng::new()), copy(&f.memory));
        let error = fork.transport.restore(&state).unwrap_err().to_string();
        assert!(error.contains(told), "{error}");
        assert_eq!((fork.read(STATUS), fork.line.count()), (0, 0));
        fork.transport.restore(&good).unwrap();
    }
}

#[test]
fn a_socket_device_checks_its_state() {
    let error = RestoreError::ContextId { saved: 3, present: 4 };
    assert!(error.to_string().contains("is 3, this machine's 4"));
    let dir = tempfile::tempdir().unwrap();
    let mut device = Vsock::new(4, &dir.path().join("v")).unwrap();
    let saved = DeviceState::Vsock(VsockState {
        guest_cid: 3,
        next_host_port: 1 << 30,
        gone: Vec::new(),
        awaited: None,
    });
    assert_eq!(device.restore(&saved), Err(error));
    assert_eq!(device.restore(&DeviceState::Stateless), Err(RestoreError::OtherDevice));
    let mut saved = VsockState { guest_cid: 4, next_host_port: 0, gone: vec![(1, 2); 2048], awaited: None };
    assert_eq!(device.restore(&DeviceState::Vsock(saved.clone())), Ok(()));
    saved.gone.push((1, 2));
    assert_eq!(device.restore(&DeviceState::Vsock(saved)), Err(RestoreError::Connections(2049)));
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        60 => (1..0x30_u64).prop_map(|page| page * 0x1000),
        1 => (GuardedMemory::HIGH_START - 64..GuardedMemory::HIGH_START + 64).prop_map(|a| a & !0xf),
        1 => (0..0x100_u64).prop_map(|back| GuardedMemory::LOW as u64 - back),
        1 => any::<u64>(),
    ]
}

prop_compose! {
    fn queue()(
        size in prop_oneof![30 => (0..4_u32).prop_map(|n| 1 << n), 1 => any::<u32>()],
        ready in prop::bool::weighted(0.95),
        descriptors in address(),
        driver in address(),
        device in address(),
    ) -> QueueState {
        QueueState { size, ready, descriptors, driver, device }
    }
}

prop_compose! {
    fn hostile(device_id: u32, queues: usize)(
        status in prop_oneof![20 => Just(15_u32), 1 => Just(11 | 0x40), 1 => any::<u32>()],
        driver_features in prop_oneof![20 => Just(TRANSPORT_FEATURES), 1 => Just(1_u64 << 32), 1 => any::<u64>()],
        selectors: [u32; 3],
        registers in prop::collection::vec(queue(), queues),
        positions in prop::collection::vec(any::<(u16, u16, bool, bool)>(), queues),
        is_live in prop::bool::weighted(0.95),
        interrupt_status in prop_oneof![20 => 0..4_u32, 1 => any::<u32>()],
        config_generation: u32,
        next_host_port: u32,
        gone in prop::collection::vec(any::<(u32, u32)>(), 0..200),
        awaited: Option<u16>,
    ) -> TransportState {
        let positions = positions
            .into_iter()
            .map(|(next_avail, next_used, unannounced, broken)| {
                QueuePosition { next_avail, next_used, unannounced, broken: broken && next_avail < 0x4000 }
            })
            .collect();
        let vsock = VsockState { guest_cid: 3, next_host_port, gone, awaited };
        let device = if queues == 1 { DeviceState::Stateless } else { DeviceState::Vsock(vsock) };
        TransportState {
            device_id,
            status,
            device_features_sel: selectors[0],
            driver_features_sel: selectors[1],
            driver_features,
            queue_sel: selectors[2],
            queues: registers,
            interrupt_status,
            config_generation,
            live: is_live.then_some(LiveState { positions, device }),
        }
    }
}

/// Restores `state`, lets the device look at every queue however it can be made to, and resets it.
fn use_up(device: Box<dyn VirtioDevice>, state: &TransportState, fill: u16) -> Result<(), TestCaseError> {
    let guarded = GuardedMemory::new();
    let [low, high] = fill.to_le_bytes();
    let bytes: Vec<u8> = (0..=250).flat_map(|i: u8| [low.wrapping_mul(i), high & i]).collect();
    let bytes = bytes.repeat(GuardedMemory::LOW / bytes.len());
    guarded.memory.write_slice(&bytes, GuestAddress(0)).unwrap();
    let f = Fixture::of(device, guarded.memory.clone());
    // Refused or not, the transport has to be of use afterwards.
    let _ = f.transport.restore(&stored(state));
    f.transport.wake();
    for queue in [0, 1, 2, 0] {
        lock_device(f.transport.device()).queue_notified(queue);
    }
    for offset in (0..0x110).step_by(4) {
        f.read(offset);
    }
    f.transport.save().unwrap();
    f.write(STATUS, 0);
    prop_assert_eq!(f.read(STATUS), 0);
    prop_assert!(guarded.is_untouched_outside());
    Ok(())
}

proptest! {
    /// Whatever a file says: no panic, and no byte outside of guest memory is written.
    #[test]
    fn no_state_panics_or_is_written_outside(
        rng in hostile(4, 1),
        vsock in hostile(19, 3),
        fill: u16,
    ) {
        use_up(Box::new(Rng::new()), &rng, fill)?;
        let dir = tempfile::tempdir().unwrap();
        let device = Vsock::new(3, &dir.path().join("v")).unwrap();
        use_up(Box::new(device), &vsock, fill)?;
    }
}

mod persist;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::ActivateError;
use crate::virtio::queue::testing::{Buf, CountingLine, DriverQueue, memory};

/// What the transport did to the device.
#[derive(Default)]
struct Seen {
    queues: Vec<DeviceQueue>,
    features: u64,
    resets: u32,
    refuse: bool,
}

struct Probe(Arc<Mutex<Seen>>);

const DEVICE_FEATURE: u64 = 1 << 9;

impl VirtioDevice for Probe {
    fn id(&self) -> u32 {
        42
    }
    fn name(&self) -> &str {
        "probe"
    }
    fn features(&self) -> u64 {
        DEVICE_FEATURE
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (byte, i) in data.iter_mut().zip(offset..) {
            *byte = u8::try_from(i & 0xff).unwrap();
        }
    }
    fn activate(
        &mut self,
        _memory: GuestMemory,
        queues: Vec<DeviceQueue>,
        driver_features: u64,
    ) -> Result<(), ActivateError> {
        let mut seen = self.0.lock().unwrap();
        if seen.refuse {
            return Err(ActivateError { device: "probe".into(), why: "told to".into() });
        }
        seen.queues = queues;
        seen.features = driver_features;
        Ok(())
    }
    fn queue_notified(&mut self, _index: u16) {}
    fn reset(&mut self) {
        let mut seen = self.0.lock().unwrap();
        seen.queues.clear();
        seen.resets += 1;
    }
    fn queues(&self) -> Vec<&DeviceQueue> {
        Vec::new()
    }
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

struct Fixture {
    transport: MmioTransport,
    seen: Arc<Mutex<Seen>>,
    line: Arc<CountingLine>,
    memory: GuestMemory,
}

const ALL_FEATURES: u64 = TRANSPORT_FEATURES | DEVICE_FEATURE;

impl Fixture {
    fn new() -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        Self { seen: seen.clone(), ..Self::of(Box::new(Probe(seen)), memory(0x20000)) }
    }

    /// Another device.
    fn of(device: Box<dyn VirtioDevice>, memory: GuestMemory) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let line = Arc::new(CountingLine::default());
        let device = Arc::new(Mutex::new(device));
        let transport = MmioTransport::new(device, memory.clone(), line.clone(), vec![]).unwrap();
        Self { transport, seen, line, memory }
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0xaa; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn negotiate(&self, features: u64) {
        for status in [0, 1, 3] {
            self.write(STATUS, status);
        }
        for sel in [0, 1] {
            self.write(DRIVER_FEATURES_SEL, sel);
            self.write(DRIVER_FEATURES, half(features, sel));
        }
        self.write(STATUS, 11);
    }

    fn set_up_queue(&self, index: u32, size: u32, addresses: (u64, u64, u64)) {
        self.write(QUEUE_SEL, index);
        self.write(QUEUE_NUM, size);
        let (descriptors, driver, device) = addresses;
        for (low, address) in
            [(QUEUE_DESC_LOW, descriptors), (QUEUE_DRIVER_LOW, driver), (QUEUE_DEVICE_LOW, device)]
        {
            self.write(low, half(address, 0));
            self.write(low + 4, half(address, 1));
        }
        self.write(QUEUE_READY, 1);
    }

    fn ignored(&self) -> u64 {
        self.transport.counters.ignored_accesses.load(Ordering::Relaxed)
    }
}

#[test]
fn a_driver_finds_the_device() {
    let f = Fixture::new();
    assert_eq!([0, 4, 8, 12].map(|offset| f.read(offset)), [MAGIC, 2, 42, VENDOR]);
    let features = [0, 1, 2].map(|sel| {
        f.write(DEVICE_FEATURES_SEL, sel);
        f.read(DEVICE_FEATURES)
    });
    assert_eq!(features, [1 << 28 | 1 << 29 | 1 << 9, 1, 0]);
    let sizes = [0, 1, 2, u32::MAX].map(|index| {
        f.write(QUEUE_SEL, index);
        f.read(QUEUE_NUM_MAX)
    });
    assert_eq!(sizes, [16, 8, 0, 0]);
    assert_eq!([0xb0, 0xb4, 0xb8, 0xbc].map(|offset| f.read(offset)), [u32::MAX; 4]);
    let mut config = [0; 3];
    f.transport.read(CONFIG + 5, &mut config);
    assert_eq!(config, [5, 6, 7]);
    assert_eq!(f.ignored(), 0);
}

#[test]
fn initialization_hands_over_checked_queues() {
    let f = Fixture::new();
    let mut driver = DriverQueue::new(&f.memory, 0x1000, 8);
    f.negotiate(ALL_FEATURES);
    assert_eq!(f.read(STATUS), 11);
    f.set_up_queue(0, 8, driver.addresses());
    assert_eq!(f.read(QUEUE_READY), 1);
    f.write(STATUS, 15);
    assert_eq!(f.read(STATUS), 15);

    let mut seen = f.seen.lock().unwrap();
    assert_eq!((seen.features, seen.queues.len()), (ALL_FEATURES, 2));
    assert!(!seen.queues[1].is_ready(), "never set up by the driver");
    let queue = &mut seen.queues[0];
    assert_eq!(queue.size(), 8);
    let head = driver.add(&[Buf::Read { addr: 0x8000, len: 1 }]);
    assert_eq!(queue.pop(&f.memory).unwrap().head_index(), head);
    queue.push(&f.memory, head, 0);
    queue.notify(&f.memory);
    drop(seen);

    assert_eq!((f.line.count(), f.read(INTERRUPT_STATUS)), (1, 1));
    f.write(INTERRUPT_ACK, 1);
    assert_eq!(f.read(INTERRUPT_STATUS), 0);
    // Every queue is looked at once, for what came before DRIVER_OK.
    assert!(f.transport.kicks().iter().all(|kick| kick.read().is_ok()));
    assert_eq!(f.ignored(), 0);
}

#[test]
fn features_must_be_known_and_include_version_1() {
    for (features, status) in [
        (FEATURE_VERSION_1, 11),
        (0, 3),
        (DEVICE_FEATURE, 3),
        (FEATURE_VERSION_1 | 1, 3),
        (FEATURE_VERSION_1 | 1 << 63, 3),
    ] {
        let f = Fixture::new();
        f.negotiate(features);
        assert_eq!(f.read(STATUS), status, "{features:#x}");
    }
}

#[test]
fn features_are_closed_once_agreed_on() {
    let f = Fixture::new();
    f.negotiate(ALL_FEATURES);
    f.write(DRIVER_FEATURES_SEL, 0);
    f.write(DRIVER_FEATURES, 0);
    assert_eq!(f.ignored(), 1);
    f.write(STATUS, 15);
    assert_eq!(f.seen.lock().unwrap().features, ALL_FEATURES);
}

#[test]
fn bad_queues_need_a_reset_and_never_reach_the_device() {
    let good = (0x1000, 0x2000, 0x3000);
    for (size, addresses) in [
        (0, good),
        (3, good),
        (32, good),
        (u32::MAX, good),
        (16, (0x1001, 0x2000, 0x3000)),
        (16, (0x1000, 0x2001, 0x3000)),
        (16, (0x1000, 0x2000, 0x3002)),
        (16, (0x1fff0, 0x2000, 0x3000)),
        (16, (0x1000, 0x2000, 0x20000)),
        (16, (0x1000, 0, 0x3000)),
        (16, (!0xf, 0x2000, 0x3000)),
    ] {
        let f = Fixture::new();
        f.negotiate(ALL_FEATURES);
        f.set_up_queue(0, size, addresses);
        assert_eq!(f.read(QUEUE_READY), 0, "{size} {addresses:x?}");
        assert_eq!(f.read(STATUS), 11 | 0x40);
        assert_eq!((f.line.count(), f.read(INTERRUPT_STATUS)), (1, 2));
        assert_eq!(f.read(CONFIG_GENERATION), 1);
        f.write(STATUS, 0);
        assert_eq!((f.read(STATUS), f.read(INTERRUPT_STATUS)), (0, 0));
    }
}

#[test]
fn queues_change_only_between_features_ok_and_driver_ok() {
    let f = Fixture::new();
    let addresses = (0x1000, 0x2000, 0x3000);
    f.set_up_queue(0, 16, addresses);
    assert_eq!(f.read(QUEUE_READY), 0);
    f.negotiate(ALL_FEATURES);
    f.set_up_queue(0, 16, addresses);
    let before = f.ignored();
    f.write(QUEUE_NUM, 8);
    assert_eq!(f.ignored(), before + 1, "a ready queue is closed");
    f.write(STATUS, 15);
    f.write(QUEUE_READY, 0);
    assert_eq!(f.read(QUEUE_READY), 1);
    assert_eq!(f.seen.lock().unwrap().queues[0].size(), 16);
}

#[test]
fn reset_starts_over() {
    let f = Fixture::new();
    f.negotiate(ALL_FEATURES);
    f.set_up_queue(0, 16, (0x1000, 0x2000, 0x3000));
    f.write(STATUS, 15);
    f.write(STATUS, 0);
    assert_eq!(f.seen.lock().unwrap().resets, 1);
    assert_eq!((f.read(STATUS), f.read(QUEUE_READY)), (0, 0));
    assert!(f.transport.kicks().iter().all(|kick| kick.read().is_err()));
    f.negotiate(ALL_FEATURES);
    f.set_up_queue(0, 8, (0x1000, 0x2000, 0x3000));
    f.write(STATUS, 15);
    assert_eq!(f.seen.lock().unwrap().queues[0].size(), 8);
}

#[test]
fn a_device_that_cannot_be_activated_needs_a_reset() {
    let f = Fixture::new();
    f.seen.lock().unwrap().refuse = true;
    f.negotiate(ALL_FEATURES);
    f.write(STATUS, 15);
    assert_eq!(f.read(STATUS), 15 | 0x40);
}

#[test]
fn a_driver_that_gave_up_activates_nothing() {
    let f = Fixture::new();
    f.negotiate(ALL_FEATURES);
    f.write(STATUS, 11 | 0x80);
    f.write(STATUS, 15);
    assert_eq!(f.read(STATUS), 11 | 0x80);
    assert!(f.seen.lock().unwrap().queues.is_empty());
}

#[test]
fn notifications_without_ioeventfd_signal_the_queue() {
    let f = Fixture::new();
    for queue in [1, 2, u32::MAX] {
        f.write(QUEUE_NOTIFY, queue);
    }
    assert!(f.transport.kicks()[0].read().is_err());
    assert_eq!(f.transport.kicks()[1].read().unwrap(), 1);
    assert_eq!(f.ignored(), 2);
}

#[test]
fn odd_accesses_read_as_zero_and_write_nothing() {
    let f = Fixture::new();
    for (offset, len) in [(0, 1), (0, 2), (0, 8), (2, 4), (0xfc + 2, 4), (0, 0)] {
        let mut data = vec![0xaa; len];
        f.transport.read(offset, &mut data);
        assert_eq!(data, vec![0; len]);
        f.transport.write(offset, &data);
    }
    f.transport.write(CONFIG, &[1, 2, 3, 4]);
    assert_eq!(f.ignored(), 13);
}

proptest! {
    /// Whatever a guest writes, in whatever order: no panic, the status stays one the specification knows, and the device
    /// gets only queues whose rings are in memory.
    #[test]
    fn no_sequence_of_accesses_panics(
        accesses in prop::collection::vec((0..0x140_u64, prop_oneof![0..16_u32, Just(0x1000), Just(0x2000), any::<u32>()], any::<bool>()), 0..200),
        polite: bool,
    ) {
        let f = Fixture::new();
        if polite {
            f.negotiate(ALL_FEATURES);
        }
        for (offset, value, aligned) in accesses {
            let offset = if aligned { offset & !3 } else { offset };
            f.write(offset, value);
            f.read(offset);
            let phase = f.read(STATUS) & 0x3f;
            prop_assert!([0, 1, 3, 11, 15].contains(&phase));
        }
        for queue in &mut f.seen.lock().unwrap().queues {
            while queue.pop(&f.memory).is_some() {}
        }
        let _: u8 = f.memory.read_obj(GuestAddress(0)).unwrap();
    }
}

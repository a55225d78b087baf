use std::sync::Mutex;

use proptest::prelude::*;

use super::*;

#[derive(Default)]
struct Recorder(Mutex<Vec<(u64, usize)>>);

impl BusDevice for Recorder {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.lock().unwrap().push((offset, data.len()));
        data.fill(0x11);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap().push((offset, data.len()));
    }
}

fn bus() -> (Bus, Arc<Recorder>) {
    let mut bus = Bus::new();
    let device = Arc::new(Recorder::default());
    bus.insert(0x3f8, 8, device.clone()).unwrap();
    bus.insert(0x600, 4, Arc::new(Recorder::default())).unwrap();
    (bus, device)
}

#[test]
fn an_access_reaches_its_device_with_the_offset() {
    let (bus, device) = bus();
    let mut byte = [0];
    bus.read(0x3ff, &mut byte);
    assert_eq!(byte, [0x11]);
    bus.write(0x3f8, &[1, 2]);
    assert_eq!(*device.0.lock().unwrap(), [(7, 1), (0, 2)]);
}

#[test]
fn nobody_there_reads_as_ones() {
    let (bus, device) = bus();
    for address in [0, 0x3f7, 0x400, 0x604, u64::MAX] {
        let mut data = [0; 4];
        bus.read(address, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.write(address, &data);
    }
    // Half in, half out is nobody's.
    bus.write(0x3ff, &[1, 2]);
    assert!(device.0.lock().unwrap().is_empty());
    let expected = [("reads", 5), ("writes", 6), ("unclaimed_reads", 5), ("unclaimed_writes", 6)];
    assert_eq!(bus.counters(), expected);
}

#[test]
fn ranges_neither_overlap_nor_leave_the_address_space() {
    let (mut bus, device) = bus();
    for (start, len) in [(0x3f8, 8), (0x3f0, 9), (0x3ff, 1), (0, 0x1000)] {
        assert!(
            matches!(bus.insert(start, len, device.clone()), Err(BusError::Overlap { .. })),
            "{start:#x}"
        );
    }
    for (start, len) in [(0, 0), (u64::MAX, 2)] {
        assert_eq!(bus.insert(start, len, device.clone()), Err(BusError::Range { start, len }));
    }
    bus.insert(u64::MAX, 1, device.clone()).unwrap();
    bus.insert(0x400, 0x200, device).unwrap();
}

proptest! {
    #[test]
    fn no_access_panics_or_leaves_its_range(address: u64, len in 0..64_usize, near in 0x3e0..0x410_u64) {
        let (bus, device) = bus();
        for address in [address, near] {
            bus.read(address, &mut vec![0; len]);
            bus.write(address, &vec![0; len]);
        }
        for &(offset, len) in &*device.0.lock().unwrap() {
            prop_assert!(offset + len as u64 <= 8);
        }
    }
}

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::Rng;
use crate::GuestMemory;
use crate::virtio::VirtioDevice;
use crate::virtio::queue::testing::{Buf, Descriptor, DriverQueue, GuardedMemory, memory};

const RINGS: u64 = 0x1000;
const DATA: u64 = 0x10000;

fn device(memory: &GuestMemory, driver: &DriverQueue) -> Rng {
    let mut device = Rng::new();
    device.activate(memory.clone(), vec![driver.device_queue_with(true)], 0).unwrap();
    device
}

fn bytes(memory: &GuestMemory, addr: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
    bytes
}

#[test]
fn buffers_are_filled_with_bytes_that_differ() {
    let memory = memory(0x20000);
    let mut driver = DriverQueue::new(&memory, RINGS, 16);
    let mut device = device(&memory, &driver);
    let mut seen = Vec::new();
    for _ in 0..20 {
        let head =
            driver.add(&[Buf::Write { addr: DATA, len: 40 }, Buf::Write { addr: DATA + 100, len: 24 }]);
        device.queue_notified(0);
        assert_eq!(driver.used(), Some((head, 64)));
        seen.push([bytes(&memory, DATA, 40), bytes(&memory, DATA + 100, 24)].concat());
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 20);
    assert_eq!(bytes(&memory, DATA + 40, 60), [0; 60]);
}

#[test]
fn a_request_gets_at_most_a_page() {
    let memory = memory(0x40000);
    let mut driver = DriverQueue::new(&memory, RINGS, 16);
    let mut device = device(&memory, &driver);
    let head =
        driver.add(&[Buf::Write { addr: DATA, len: 3000 }, Buf::Write { addr: DATA + 0x1000, len: 0x20000 }]);
    device.queue_notified(0);
    assert_eq!(driver.used(), Some((head, 4096)));
    assert_eq!(bytes(&memory, DATA + 0x1000 + 1096, 0x1000), [0; 0x1000]);
    // The end of a request that reaches past memory is not needed.
    let head = driver.add(&[Buf::Write { addr: DATA, len: u32::MAX }]);
    device.queue_notified(0);
    assert_eq!(driver.used(), Some((head, 4096)));
}

#[test]
fn nothing_to_write_to_gets_nothing() {
    let memory = memory(0x20000);
    let mut driver = DriverQueue::new(&memory, RINGS, 16);
    let mut device = device(&memory, &driver);
    for buffer in [
        Buf::Read { addr: DATA, len: 64 },
        Buf::Write { addr: 0x20000, len: 64 },
        Buf::Write { addr: 0x1fff0, len: 64 },
        Buf::Write { addr: u64::MAX, len: 64 },
        Buf::Write { addr: DATA, len: 0 },
    ] {
        let head = driver.add(&[buffer]);
        device.queue_notified(0);
        assert_eq!(driver.used(), Some((head, 0)), "{buffer:?}");
    }
    assert_eq!(device.counters(), [("requests", 5), ("bytes", 0), ("failed", 5)]);
}

proptest! {
    #[test]
    fn no_chain_panics_or_is_written_outside(
        chain in prop::collection::vec((prop_oneof![0..0xa0000_u64, any::<u64>()], any::<u32>(), 0..8_u16, 0..16_u16), 16),
    ) {
        let guarded = GuardedMemory::new();
        let mut driver = DriverQueue::new(&guarded.memory, RINGS, 16);
        let mut device = device(&guarded.memory, &driver);
        for (index, (addr, len, flags, next)) in (0..).zip(chain) {
            driver.write_descriptor(index, Descriptor { addr, len, flags, next });
        }
        for head in 0..16 {
            driver.make_available(head);
            device.queue_notified(0);
        }
        prop_assert!(guarded.is_untouched_outside());
    }
}

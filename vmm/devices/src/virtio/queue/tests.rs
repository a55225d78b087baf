use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::testing::{Buf, Descriptor, DriverQueue, GuardedMemory, NEXT, memory};

const BASE: u64 = 0x1000;
const DATA: u64 = 0x10000;

#[test]
fn chains_come_in_order_and_go_back() {
    let memory = memory(0x20000);
    let mut driver = DriverQueue::new(&memory, BASE, 4);
    let mut queue = driver.device_queue();
    assert!(queue.pop(&memory).is_none());
    // More rounds than entries, so that the indices wrap.
    for round in 0..10 {
        let head = driver.add(&[Buf::Read { addr: DATA, len: 16 }, Buf::Write { addr: DATA + 16, len: 8 }]);
        let chain = queue.pop(&memory).unwrap();
        assert_eq!(chain.head_index(), head);
        let lens: Vec<u32> = chain.map(|d| d.len()).collect();
        assert_eq!(lens, [16, 8]);
        queue.push(&memory, head, round);
        assert_eq!(driver.used(), Some((head, round)));
    }
    assert!(driver.used().is_none());
}

#[test]
fn unpop_yields_the_same_chain_again() {
    let memory = memory(0x20000);
    let mut driver = DriverQueue::new(&memory, BASE, 4);
    let mut queue = driver.device_queue();
    let head = driver.add(&[Buf::Read { addr: DATA, len: 1 }]);
    assert_eq!(queue.pop(&memory).unwrap().head_index(), head);
    queue.unpop();
    assert_eq!(queue.pop(&memory).unwrap().head_index(), head);
    assert!(queue.pop(&memory).is_none());
}

#[test]
fn indirect_chains_are_followed() {
    let memory = memory(0x20000);
    let mut driver = DriverQueue::new(&memory, BASE, 4);
    let mut queue = driver.device_queue();
    driver.add_indirect(DATA, &[Buf::Read { addr: DATA, len: 3 }, Buf::Write { addr: DATA, len: 5 }]);
    let lens: Vec<u32> = queue.pop(&memory).unwrap().map(|d| d.len()).collect();
    assert_eq!(lens, [3, 5]);
}

#[test]
fn the_available_flag_suppresses_interrupts() {
    let memory = memory(0x20000);
    let mut driver = DriverQueue::new(&memory, BASE, 4);
    let mut queue = driver.device_queue();
    for (flags, interrupts) in [(1, 0), (0, 1)] {
        driver.set_avail_flags(flags);
        let head = driver.add(&[Buf::Read { addr: DATA, len: 1 }]);
        queue.pop(&memory).unwrap();
        queue.push(&memory, head, 0);
        queue.notify(&memory);
        assert_eq!(driver.line.count(), interrupts);
    }
    assert_eq!(driver.interrupt.status(), 1);
    // Nothing pushed, nothing to say.
    queue.notify(&memory);
    assert_eq!(driver.line.count(), 1);
}

#[test]
fn event_idx_decides_about_interrupts() {
    let memory = memory(0x20000);
    let mut driver = DriverQueue::new(&memory, BASE, 4);
    let mut queue = driver.device_queue_with(true);
    // The driver wants to hear only when the second chain was used.
    driver.set_used_event(1);
    for expected in [0, 1] {
        let head = driver.add(&[Buf::Read { addr: DATA, len: 1 }]);
        queue.pop(&memory).unwrap();
        queue.push(&memory, head, 0);
        queue.notify(&memory);
        assert_eq!(driver.line.count(), expected);
    }
    // Nothing pushed, nothing to say.
    queue.notify(&memory);
    assert_eq!(driver.line.count(), 1);
}

#[test]
fn enabling_notification_reports_what_arrived_meanwhile() {
    for event_idx in [false, true] {
        let memory = memory(0x20000);
        let mut driver = DriverQueue::new(&memory, BASE, 4);
        let mut queue = driver.device_queue_with(event_idx);
        queue.disable_notification(&memory);
        assert!(!queue.enable_notification(&memory));
        queue.disable_notification(&memory);
        driver.add(&[Buf::Read { addr: DATA, len: 1 }]);
        assert!(queue.enable_notification(&memory));
    }
}

#[test]
fn an_impossible_available_index_breaks_the_queue_for_good() {
    let memory = memory(0x20000);
    let mut driver = DriverQueue::new(&memory, BASE, 4);
    let mut queue = driver.device_queue();
    driver.set_avail_idx(5);
    assert!(queue.pop(&memory).is_none());
    assert!(!queue.is_ready());
    assert!(driver.interrupt.needs_reset());
    assert_eq!((driver.line.count(), driver.interrupt.status()), (1, 2));
    // A device loops `while enable_notification`: that must end, whatever the ring says.
    assert!(!queue.enable_notification(&memory));
    driver.set_avail_idx(0);
    assert!(queue.pop(&memory).is_none());
}

#[test]
fn a_head_outside_of_the_table_breaks_the_queue() {
    let memory = memory(0x20000);
    let mut driver = DriverQueue::new(&memory, BASE, 4);
    let mut queue = driver.device_queue();
    driver.make_available(4);
    assert!(queue.pop(&memory).is_none());
    assert!(driver.interrupt.needs_reset());
}

#[test]
fn a_loop_ends_after_as_many_descriptors_as_the_table_has() {
    let memory = memory(0x20000);
    let mut driver = DriverQueue::new(&memory, BASE, 4);
    let mut queue = driver.device_queue();
    driver.write_descriptor(0, Descriptor { addr: DATA, len: 1, flags: NEXT, next: 0 });
    driver.make_available(0);
    assert_eq!(queue.pop(&memory).unwrap().count(), 4);
}

proptest! {
    /// Rings of random bytes: popping ends, chains end, and pushing what was popped writes nowhere else.
    #[test]
    fn random_rings_neither_panic_nor_hang(
        rings in prop::collection::vec(any::<u8>(), 0x100),
        available in prop::collection::vec(any::<u8>(), 0x30),
        ahead in 0..20_u16,
        event_idx: bool,
    ) {
        let guarded = GuardedMemory::new();
        let memory = &guarded.memory;
        let mut driver = DriverQueue::new(memory, BASE, 16);
        let mut queue = driver.device_queue_with(event_idx);
        memory.write_slice(&rings, GuestAddress(BASE)).unwrap();
        memory.write_slice(&available, GuestAddress(driver.addresses().1)).unwrap();
        driver.set_avail_idx(ahead);
        let mut chains = 0;
        loop {
            queue.disable_notification(memory);
            while let Some(chain) = queue.pop(memory) {
                chains += 1;
                let head = chain.head_index();
                prop_assert!(chain.count() <= usize::from(u16::MAX));
                queue.push(memory, head, 1);
            }
            queue.notify(memory);
            if !queue.enable_notification(memory) {
                break;
            }
        }
        prop_assert!(chains <= 16);
        prop_assert!(guarded.is_untouched_outside());
    }
}

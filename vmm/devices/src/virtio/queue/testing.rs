//! The driver's side of a virtqueue, for tests of devices.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestRegionMmap, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use super::DeviceQueue;
use crate::virtio::interrupt::DeviceInterrupt;
use crate::{GuestMemory, Interrupt};

/// Descriptor flags (specification 1.2, section 2.7.5).
pub(crate) const NEXT: u16 = 1;
/// The device may write the buffer.
pub(crate) const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub(crate) const INDIRECT: u16 = 4;

/// An interrupt line that counts.
#[derive(Default)]
pub(crate) struct CountingLine(AtomicU64);

impl CountingLine {
    /// Interrupts so far.
    pub(crate) fn count(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

impl Interrupt for CountingLine {
    fn trigger(&self) -> std::io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Guest memory of `size` bytes from address 0.
pub(crate) fn memory(size: usize) -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), size)]).unwrap()
}

/// As a snapshot has it: memory of [`memory`] with the same contents.
pub(crate) fn copy(original: &GuestMemory) -> GuestMemory {
    let size = usize::try_from(original.last_addr().0 + 1).unwrap();
    let mut bytes = vec![0; size];
    original.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    let copy = memory(size);
    copy.write_slice(&bytes, GuestAddress(0)).unwrap();
    copy
}

/// Guest memory in two regions whose host mappings lie between canaries, to prove that a device stays inside.
pub(crate) struct GuardedMemory {
    /// `LOW` bytes from address 0 and `HIGH` bytes from [`Self::HIGH_START`]; nothing between and after them.
    pub(crate) memory: GuestMemory,
    host: GuestMemory,
}

impl GuardedMemory {
    /// Bytes of the region at address 0.
    pub(crate) const LOW: usize = 0x40000;
    /// Where the second region begins.
    pub(crate) const HIGH_START: u64 = 0x80000;
    /// Bytes of the second region.
    pub(crate) const HIGH: usize = 0x10000;
    const CANARY: usize = 0x10000;
    const CANARY_BYTE: u8 = 0xc5;

    /// Zeroed memory.
    pub(crate) fn new() -> Self {
        let host = memory(3 * Self::CANARY + Self::LOW + Self::HIGH);
        for start in Self::canaries() {
            host.write_slice(&[Self::CANARY_BYTE; Self::CANARY], GuestAddress(start)).unwrap();
        }
        let [_, second, last] = Self::canaries();
        let regions = [
            (second - Self::LOW as u64, Self::LOW, 0),
            (last - Self::HIGH as u64, Self::HIGH, Self::HIGH_START),
        ];
        let regions = regions.map(|(at, size, guest)| {
            let address = host.get_host_address(GuestAddress(at)).unwrap();
            // SAFETY: these bytes are part of the mapping of `host`, which lives as long as `memory`.
            let mapping = unsafe {
                MmapRegion::build_raw(address, size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE)
            };
            GuestRegionMmap::new(mapping.unwrap(), GuestAddress(guest)).unwrap()
        });
        Self { memory: GuestMemory::from_regions(regions.into()).unwrap(), host }
    }

    /// Whether no byte around the two regions was written.
    pub(crate) fn is_untouched_outside(&self) -> bool {
        Self::canaries().iter().all(|&start| {
            let mut bytes = [0; Self::CANARY];
            self.host.read_slice(&mut bytes, GuestAddress(start)).unwrap();
            bytes == [Self::CANARY_BYTE; Self::CANARY]
        })
    }

    /// Where the canaries begin in the host's mapping: before, between and after the regions.
    fn canaries() -> [u64; 3] {
        let second = Self::CANARY + Self::LOW;
        [0, second as u64, (second + Self::CANARY + Self::HIGH) as u64]
    }
}

/// A descriptor as the driver writes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    /// Guest-physical address.
    pub(crate) addr: u64,
    /// Bytes.
    pub(crate) len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub(crate) flags: u16,
    /// The next one with [`NEXT`].
    pub(crate) next: u16,
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Buf {
    /// The device reads `len` bytes at `addr`.
    Read {
        /// Guest-physical address.
        addr: u64,
        /// Bytes.
        len: u32,
    },
    /// The device writes `len` bytes at `addr`.
    Write {
        /// Guest-physical address.
        addr: u64,
        /// Bytes.
        len: u32,
    },
}

/// A queue from the driver's side. Rings live at the `base` given to [`DriverQueue::new`] and need `RING_BYTES` there.
pub(crate) struct DriverQueue {
    memory: GuestMemory,
    base: u64,
    size: u16,
    next_descriptor: u16,
    avail_idx: u16,
    used_idx: u16,
    /// What the driver's notifications signal.
    pub(crate) kick: Arc<EventFd>,
    /// Counts the device's interrupts.
    pub(crate) line: Arc<CountingLine>,
    /// The device's interrupt status.
    pub(crate) interrupt: DeviceInterrupt,
}

impl DriverQueue {
    /// Bytes a queue of up to 256 entries needs at its base.
    pub(crate) const RING_BYTES: u64 = 0x3000;

    /// A queue of `size` entries (a power of two, at most 256) whose rings are at `base` (4 KiB aligned, not 0).
    pub(crate) fn new(memory: &GuestMemory, base: u64, size: u16) -> Self {
        assert!(base != 0 && base.is_multiple_of(4096) && size <= 256);
        memory.write_slice(&vec![0; usize::try_from(Self::RING_BYTES).unwrap()], GuestAddress(base)).unwrap();
        let line = Arc::new(CountingLine::default());
        Self {
            memory: memory.clone(),
            base,
            size,
            next_descriptor: 0,
            avail_idx: 0,
            used_idx: 0,
            kick: Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
            interrupt: DeviceInterrupt::new(line.clone()),
            line,
        }
    }

    /// The same driver in `memory`, a copy of the memory it is in; its device has yet to be restored.
    pub(crate) fn in_copy(&self, memory: &GuestMemory) -> Self {
        let line = Arc::new(CountingLine::default());
        Self {
            memory: memory.clone(),
            kick: Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
            interrupt: DeviceInterrupt::new(line.clone()),
            line,
            ..*self
        }
    }

    /// Chains made available so far.
    pub(crate) fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// Whether a driver with EVENT_IDX notifies the device of what it made available after index `before`
    /// (specification 1.2, section 2.7.10).
    pub(crate) fn kicks_after(&self, before: u16) -> bool {
        let at = self.addresses().2 + 4 + 8 * u64::from(self.size);
        let wanted: u16 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let (index, old) = (self.avail_idx.wrapping_sub(wanted), self.avail_idx.wrapping_sub(before));
        index.wrapping_sub(1) < old
    }

    /// Guest-physical addresses of the descriptor table, the available and the used ring.
    pub(crate) fn addresses(&self) -> (u64, u64, u64) {
        (self.base, self.base + 0x1000, self.base + 0x2000)
    }

    /// The device's side, without EVENT_IDX.
    pub(crate) fn device_queue(&self) -> DeviceQueue {
        self.device_queue_with(false)
    }

    /// The device's side.
    pub(crate) fn device_queue_with(&self, event_idx: bool) -> DeviceQueue {
        let (desc, avail, used) = self.addresses();
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(desc)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(avail)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&self.memory));
        DeviceQueue::new(queue, self.kick.clone(), self.interrupt.clone())
    }

    /// Makes a chain of `buffers` available and returns its head.
    pub(crate) fn add(&mut self, buffers: &[Buf]) -> u16 {
        let head = self.next_descriptor;
        for (i, buffer) in buffers.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let last = i + 1 == buffers.len();
            self.write_descriptor(index, link(*buffer, last, self.next_descriptor));
        }
        self.make_available(head);
        head
    }

    /// Makes a chain of `buffers` available through an indirect table at `table` and returns its head.
    pub(crate) fn add_indirect(&mut self, table: u64, buffers: &[Buf]) -> u16 {
        for (i, buffer) in buffers.iter().enumerate() {
            let i = u16::try_from(i).unwrap();
            let last = usize::from(i) + 1 == buffers.len();
            self.write_table_entry(table, i, link(*buffer, last, i + 1));
        }
        let head = self.next_descriptor;
        self.next_descriptor = (head + 1) % self.size;
        let len = u32::try_from(buffers.len() * 16).unwrap();
        self.write_descriptor(head, Descriptor { addr: table, len, flags: INDIRECT, next: 0 });
        self.make_available(head);
        head
    }

    /// Writes descriptor `index` as it is, however wrong.
    pub(crate) fn write_descriptor(&self, index: u16, descriptor: Descriptor) {
        self.write_table_entry(self.base, index, descriptor);
    }

    /// Writes entry `index` of the table at `table`.
    pub(crate) fn write_table_entry(&self, table: u64, index: u16, descriptor: Descriptor) {
        let at = table + 16 * u64::from(index);
        let Descriptor { addr, len, flags, next } = descriptor;
        self.memory.write_obj(addr, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Puts `head`, however wrong, into the available ring.
    pub(crate) fn make_available(&mut self, head: u16) {
        let slot = self.addresses().1 + 4 + 2 * u64::from(self.avail_idx % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    /// Sets the available ring's index, however wrong.
    pub(crate) fn set_avail_idx(&mut self, index: u16) {
        self.avail_idx = index;
        self.memory.store(index, GuestAddress(self.addresses().1 + 2), Ordering::Release).unwrap();
    }

    /// Sets the available ring's flags (1: no interrupts please).
    pub(crate) fn set_avail_flags(&self, flags: u16) {
        self.memory.write_obj(flags, GuestAddress(self.addresses().1)).unwrap();
    }

    /// Sets `used_event`: with EVENT_IDX, interrupt after the used index passes it.
    pub(crate) fn set_used_event(&self, index: u16) {
        let at = self.addresses().1 + 4 + 2 * u64::from(self.size);
        self.memory.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// The next used chain: its head and the bytes the device says it wrote.
    pub(crate) fn used(&mut self) -> Option<(u16, u32)> {
        let ring = self.addresses().2;
        let device_idx: u16 = self.memory.load(GuestAddress(ring + 2), Ordering::Acquire).unwrap();
        if device_idx == self.used_idx {
            return None;
        }
        let slot = ring + 4 + 8 * u64::from(self.used_idx % self.size);
        self.used_idx = self.used_idx.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        Some((u16::try_from(head).unwrap(), len))
    }
}

fn link(buffer: Buf, last: bool, next: u16) -> Descriptor {
    let (addr, len, write) = match buffer {
        Buf::Read { addr, len } => (addr, len, 0),
        Buf::Write { addr, len } => (addr, len, WRITE),
    };
    if last {
        Descriptor { addr, len, flags: write, next: 0 }
    } else {
        Descriptor { addr, len, flags: write | NEXT, next }
    }
}

//! The port and memory buses: which device answers at an address.

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A device on a bus. Accesses come from any vCPU's thread, several at once.
pub trait BusDevice: Send + Sync {
    /// The guest reads `data.len()` bytes at `offset` from the start of the device's range; all of `data` is to be set.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset` from the start of the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A range that cannot be given to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Nothing in it, or past the end of the address space.
    #[error("no bus range has {len:#x} addresses from {start:#x}: give it at least one, below 2^64")]
    Range {
        /// First address.
        start: u64,
        /// Addresses.
        len: u64,
    },
    /// Another device is there.
    #[error("the bus range {start:#x}+{len:#x} overlaps the one at {other:#x}: choose another address")]
    Overlap {
        /// First address.
        start: u64,
        /// Addresses.
        len: u64,
        /// First address of the range that is there already.
        other: u64,
    },
}

/// One address space, of ports or of memory. Filled while the VM is put together, then shared by its vCPUs.
#[derive(Default)]
pub struct Bus {
    /// Sorted by `start`, disjoint.
    ranges: Vec<Range>,
    counters: Counters,
}

struct Range {
    start: u64,
    /// Last address, inclusive.
    last: u64,
    device: Arc<dyn BusDevice>,
}

#[derive(Default)]
struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    unclaimed_reads: AtomicU64,
    unclaimed_writes: AtomicU64,
}

impl Bus {
    /// A bus without devices.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives `len` addresses from `start` on to `device`.
    ///
    /// # Errors
    /// [`BusError`]: the range is empty, runs past the address space or overlaps another.
    pub fn insert(&mut self, start: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let last = len.checked_sub(1).and_then(|rest| start.checked_add(rest));
        let last = last.ok_or(BusError::Range { start, len })?;
        if let Some(other) = self.ranges.iter().find(|range| range.start <= last && start <= range.last) {
            return Err(BusError::Overlap { start, len, other: other.start });
        }
        let at = self.ranges.partition_point(|range| range.start < start);
        self.ranges.insert(at, Range { start, last, device });
        Ok(())
    }

    /// The guest reads at `address`. Where no device is, it reads all-ones, as on a PC.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        self.counters.reads.fetch_add(1, Ordering::Relaxed);
        match self.find(address, data.len()) {
            Some((offset, device)) => device.read(offset, data),
            None => {
                self.counters.unclaimed_reads.fetch_add(1, Ordering::Relaxed);
                data.fill(0xff);
            }
        }
    }

    /// The guest writes at `address`. Where no device is, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        self.counters.writes.fetch_add(1, Ordering::Relaxed);
        match self.find(address, data.len()) {
            Some((offset, device)) => device.write(offset, data),
            None => {
                self.counters.unclaimed_writes.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// How often the guest came here, and how often in vain.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("reads", self.counters.reads.load(Ordering::Relaxed)),
            ("writes", self.counters.writes.load(Ordering::Relaxed)),
            ("unclaimed_reads", self.counters.unclaimed_reads.load(Ordering::Relaxed)),
            ("unclaimed_writes", self.counters.unclaimed_writes.load(Ordering::Relaxed)),
        ]
    }

    /// The device that has all `len` bytes at `address`, and the offset in its range.
    fn find(&self, address: u64, len: usize) -> Option<(u64, &dyn BusDevice)> {
        let after = self.ranges.partition_point(|range| range.start <= address);
        let range = self.ranges.get(after.checked_sub(1)?)?;
        let rest = u64::try_from(len).ok()?.checked_sub(1)?;
        let last = address.checked_add(rest)?;
        let offset = address.checked_sub(range.start)?;
        (last <= range.last).then_some((offset, &*range.device))
    }
}

//! What the driver says about a queue, and the queue it becomes once that was checked.

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use crate::GuestMemory;

/// The registers of one queue, as the driver wrote them: nothing here is checked.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct QueueRegisters {
    pub(super) size: u32,
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
    pub(super) ready: bool,
}

/// Registers that no queue can be made from.
#[derive(Debug, thiserror::Error)]
pub(super) enum BadQueue {
    #[error("{0} entries are too many or not a power of two")]
    Size(u32),
    #[error("a ring's address is not aligned: {0}")]
    Alignment(virtio_queue::Error),
    #[error("a ring is not in guest memory")]
    Address,
}

impl QueueRegisters {
    /// A ready queue of at most `max_size` entries whose rings are in `memory`.
    pub(super) fn check(&self, max_size: u16, memory: &GuestMemory) -> Result<Queue, BadQueue> {
        let mut queue = Queue::new(max_size).map_err(|_| BadQueue::Size(max_size.into()))?;
        let size = u16::try_from(self.size).map_err(|_| BadQueue::Size(self.size))?;
        queue.try_set_size(size).map_err(|_| BadQueue::Size(self.size))?;
        queue.try_set_desc_table_address(GuestAddress(self.descriptors)).map_err(BadQueue::Alignment)?;
        queue.try_set_avail_ring_address(GuestAddress(self.driver)).map_err(BadQueue::Alignment)?;
        queue.try_set_used_ring_address(GuestAddress(self.device)).map_err(BadQueue::Alignment)?;
        queue.set_ready(true);
        // Address 0 is in memory, but virtio-queue takes an available ring there for a queue that was never set up.
        if self.driver == 0 || !queue.is_valid(memory) {
            return Err(BadQueue::Address);
        }
        Ok(queue)
    }

    /// A queue the driver does not use.
    pub(super) fn unused(max_size: u16) -> Result<Queue, BadQueue> {
        Queue::new(max_size).map_err(|_| BadQueue::Size(max_size.into()))
    }
}

/// `value` with its lower half replaced.
pub(super) const fn with_low(value: u64, low: u32) -> u64 {
    (value & 0xffff_ffff_0000_0000) | low as u64
}

/// `value` with its upper half replaced.
pub(super) const fn with_high(value: u64, high: u32) -> u64 {
    (value & 0xffff_ffff) | ((high as u64) << 32)
}

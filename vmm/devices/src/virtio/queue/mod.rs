//! One split virtqueue as a device sees it: pop chains, push results, interrupt once.
//!
//! The ring belongs to the guest and is hostile. A ring that cannot be true (more chains available than it has entries, a head
//! outside of the table, rings outside of memory) makes the queue *broken*: it yields nothing more, the transport shows
//! DEVICE_NEEDS_RESET, and only a device reset brings it back. A queue the driver never made ready behaves the same, silently.

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use serde::{Deserialize, Serialize};

use super::interrupt::DeviceInterrupt;
use crate::GuestMemory;

/// A descriptor chain over borrowed guest memory.
pub type Chain<'m> = DescriptorChain<&'m GuestMemory>;

/// Where a device stands in a queue.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct QueuePosition {
    /// Index of the available ring at which the device reads next.
    pub next_avail: u16,
    /// Index of the used ring at which the device writes next.
    pub next_used: u16,
    /// Chains were pushed of which the driver was not told.
    pub unannounced: bool,
    /// The driver broke the ring; the device waits for its reset.
    pub broken: bool,
}

/// A virtqueue the driver has made ready, with its kick and its device's interrupt.
pub struct DeviceQueue {
    queue: Queue,
    kick: Arc<EventFd>,
    interrupt: DeviceInterrupt,
    /// Chains were pushed since the last notify.
    pushed: bool,
    broken: bool,
}

impl DeviceQueue {
    /// `queue` is ready and was validated against guest memory; `kick` is signalled by the driver's notifications.
    #[must_use]
    pub fn new(queue: Queue, kick: Arc<EventFd>, interrupt: DeviceInterrupt) -> Self {
        Self { queue, kick, interrupt, pushed: false, broken: false }
    }

    /// Where it stands, for a snapshot.
    #[must_use]
    pub fn position(&self) -> QueuePosition {
        QueuePosition {
            next_avail: self.queue.next_avail(),
            next_used: self.queue.next_used(),
            unannounced: self.pushed,
            broken: self.broken,
        }
    }

    /// Goes on at `position`. A position that is not true breaks the queue at the next [`Self::pop`]. Chains that were not
    /// announced stay so: how many they were is not part of a position, so the transport interrupts whatever the driver wants.
    pub(crate) fn resume_at(&mut self, position: &QueuePosition) {
        self.queue.set_next_avail(position.next_avail);
        self.queue.set_next_used(position.next_used);
        self.broken = position.broken;
    }

    /// The next available chain. `None` when there is none and on a broken ring.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemory) -> Option<Chain<'m>> {
        if !self.is_ready() {
            return None;
        }
        let chain = match self.queue.iter(memory) {
            Ok(mut available) => available.next(),
            Err(_) => {
                self.set_broken();
                return None;
            }
        }?;
        if chain.head_index() >= self.queue.size() {
            self.set_broken();
            return None;
        }
        Some(chain)
    }

    /// Gives the chain that begins at `head` back to the driver; the device wrote `written` bytes to it. The driver hears
    /// of it at the next [`Self::notify`].
    pub fn push(&mut self, memory: &GuestMemory, head: u16, written: u32) {
        if !self.is_ready() {
            return;
        }
        match self.queue.add_used(memory, head, written) {
            Ok(()) => self.pushed = true,
            Err(_) => self.set_broken(),
        }
    }

    /// Takes the last [`Self::pop`] back: the next one yields the same chain. At most once after each pop.
    pub fn unpop(&mut self) {
        if self.is_ready() {
            self.queue.go_to_previous_position();
        }
    }

    /// Interrupts the driver when chains were pushed since the last call and it wants to hear of them.
    pub fn notify(&mut self, memory: &GuestMemory) {
        if !self.is_ready() || !std::mem::take(&mut self.pushed) {
            return;
        }
        match self.wants_interrupt(memory) {
            Ok(true) => self.interrupt.used_buffer(),
            Ok(false) => {}
            Err(_) => self.set_broken(),
        }
    }

    /// Asks the driver not to kick while the device is looking anyway.
    pub fn disable_notification(&mut self, memory: &GuestMemory) {
        if self.is_ready() && self.queue.disable_notification(memory).is_err() {
            self.set_broken();
        }
    }

    /// Asks the driver to kick again. True: chains arrived meanwhile for which no kick may come; look again.
    #[must_use]
    pub fn enable_notification(&mut self, memory: &GuestMemory) -> bool {
        if !self.is_ready() {
            return false;
        }
        self.queue.enable_notification(memory).unwrap_or_else(|_| {
            self.set_broken();
            false
        })
    }

    /// How far the driver has come in making chains available: the index behind the last one. `None` on a broken ring.
    pub fn avail_index(&mut self, memory: &GuestMemory) -> Option<u16> {
        if !self.is_ready() {
            return None;
        }
        match self.queue.avail_idx(memory, Ordering::Acquire) {
            Ok(index) => Some(index.0),
            Err(_) => {
                self.set_broken();
                None
            }
        }
    }

    /// Asks the driver to kick when it has made chains available up to `index`, whether or not there are some already, and
    /// returns how many are missing. 0 on a broken ring: it is of no use to wait for it.
    pub fn await_index(&mut self, memory: &GuestMemory, index: u16) -> u16 {
        if !self.is_ready() {
            return 0;
        }
        // With EVENT_IDX virtio-queue asks for a kick at the next chain to read, which may lie there already.
        let next = self.queue.next_avail();
        self.queue.set_next_avail(index.wrapping_sub(1));
        // Looks at the ring after the driver can see the wish, so that no kick is missed.
        let _ = self.enable_notification(memory);
        self.queue.set_next_avail(next);
        let missing = self.avail_index(memory).map_or(0, |now| index.wrapping_sub(now));
        // A driver is never ahead of the device by more than the ring holds: behind this it has passed the index.
        if missing <= self.size() { missing } else { 0 }
    }

    /// What the driver's notifications signal. A device that stops before the ring is empty writes to it to be called again.
    #[must_use]
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Entries of the ring: a power of two, at most 32768.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Whether the driver made it ready, broken since or not.
    #[must_use]
    pub fn is_set_up(&self) -> bool {
        self.queue.ready()
    }

    /// Whether the driver made it ready and has not broken it since.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.queue.ready() && !self.broken
    }

    /// VIRTIO_F_RING_EVENT_IDX is part of `needs_notification`; without it the driver's wish is a flag of the available
    /// ring (specification 1.2, section 2.7.7), which virtio-queue does not read.
    fn wants_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, virtio_queue::Error> {
        if self.queue.event_idx_enabled() {
            return self.queue.needs_notification(memory);
        }
        std::sync::atomic::fence(Ordering::SeqCst);
        let flags: u16 = memory
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    fn set_broken(&mut self) {
        self.broken = true;
        self.interrupt.device_needs_reset();
    }
}

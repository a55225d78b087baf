//! The virtio side: configuration space and the two data queues.

use std::os::fd::RawFd;
use std::path::Path;

use super::muxer::{Muxer, VsockError};
use super::restore::Reset;
use super::segments::{RxBuffer, TxPacket};
use crate::GuestMemory;
use crate::virtio::queue::DeviceQueue;
use crate::virtio::{ActivateError, DeviceState, RestoreError, VirtioDevice, read_config_bytes};

/// Device id (specification 1.2, section 5.10.1).
const DEVICE_ID: u32 = 19;

/// `VIRTIO_VSOCK_F_STREAM` (section 5.10.3).
const FEATURES: u64 = 1;

/// Queues (section 5.10.2): to the guest, from the guest, events. Linux keeps the first one full of 4 KiB buffers, so its
/// size is guest memory; the third carries nothing but the transport reset that follows a restore.
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];

/// Index of the queue of packets from the guest.
const FROM_GUEST: u16 = 1;

/// Packets of the guest that are taken before it is interrupted to hear of that.
///
/// All that the driver does then is to free memory, and an interrupt costs the guest more than the packet did. So it
/// hears of few packets at the next tick only, and most often not even then: any interrupt makes it look at all queues.
/// Small against the queue, so that the driver never waits for room in it: Linux needs two descriptors for a packet.
const COMPLETIONS: u16 = 32;

/// Chains handled before other devices of the VM have their turn.
const BUDGET: usize = 512;

/// A socket device whose host side is a Unix socket; see the [module's documentation](super).
pub struct Vsock {
    muxer: Muxer,
    active: Option<Active>,
    /// What the guest has to be told as soon as the device is active.
    reset: Option<Reset>,
}

impl Vsock {
    /// A device for the guest with context id `guest_cid` (3 to 4294967294) that listens on the Unix socket `uds_path`.
    ///
    /// The path must not exist and may have 96 bytes; it is removed when the device is dropped. Clients that connect
    /// before the guest's driver is ready wait.
    ///
    /// # Errors
    /// [`VsockError`]: a reserved context id, a path that cannot be listened on, no descriptors left.
    pub fn new(guest_cid: u32, uds_path: &Path) -> Result<Self, VsockError> {
        Ok(Self { muxer: Muxer::new(guest_cid, uds_path)?, active: None, reset: None })
    }

    /// As if it were `now`.
    #[cfg(test)]
    pub(super) fn expire_at(&mut self, now: std::time::Instant) {
        self.muxer.expire(now);
        if let Some(active) = &mut self.active {
            active.serve(&mut self.muxer);
        }
    }
}

impl VirtioDevice for Vsock {
    fn id(&self) -> u32 {
        DEVICE_ID
    }

    fn name(&self) -> &'static str {
        "vsock"
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&u64::from(self.muxer.guest_cid()).to_le_bytes(), offset, data);
    }

    fn activate(
        &mut self,
        memory: GuestMemory,
        queues: Vec<DeviceQueue>,
        _driver_features: u64,
    ) -> Result<(), ActivateError> {
        let Ok([to_guest, from_guest, events]) = <[DeviceQueue; 3]>::try_from(queues) else {
            let why = "the driver did not set up its three queues".to_owned();
            return Err(ActivateError { device: self.name().to_owned(), why });
        };
        let reset = self.reset.take();
        if reset.is_some() {
            self.muxer.hold();
        }
        self.active = Some(Active::new(memory, to_guest, from_guest, events, reset));
        self.muxer.start();
        Ok(())
    }

    fn queue_notified(&mut self, index: u16) {
        if let Some(active) = &mut self.active {
            active.look_at_guest |= index == FROM_GUEST;
            active.serve(&mut self.muxer);
        }
    }

    fn host_fd(&self) -> Option<RawFd> {
        Some(self.muxer.fd())
    }

    fn host_ready(&mut self) {
        let ticked = self.muxer.host_ready();
        if let Some(active) = &mut self.active {
            if ticked {
                active.announce_taken();
            }
            active.serve(&mut self.muxer);
        }
    }

    fn reset(&mut self) {
        self.active = None;
        self.reset = None;
        self.muxer.stop();
    }

    fn queues(&self) -> Vec<&DeviceQueue> {
        self.active.iter().flat_map(Active::queues).collect()
    }

    fn save(&self) -> DeviceState {
        let reset = self.active.as_ref().and_then(|active| active.reset);
        DeviceState::Vsock(self.muxer.save(reset.and_then(Reset::awaited)))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Vsock(state) = state else { return Err(RestoreError::OtherDevice) };
        self.muxer.restore(state)?;
        self.reset = Some(Reset::Owed { awaited: state.awaited });
        Ok(())
    }

    fn restored(&mut self) {
        if let Some(active) = &mut self.active {
            active.serve(&mut self.muxer);
        }
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.muxer.metrics().pairs();
        counters.push(("streams", u64::try_from(self.muxer.streams()).unwrap_or(u64::MAX)));
        counters
    }
}

/// What exists while a driver is there.
struct Active {
    memory: GuestMemory,
    to_guest: DeviceQueue,
    from_guest: DeviceQueue,
    events: DeviceQueue,
    /// The reset after a restore, until the guest has heard of it.
    reset: Option<Reset>,
    /// Packets of the guest may be waiting.
    look_at_guest: bool,
    /// The driver was asked to tell when it adds buffers for packets to it.
    starved: bool,
    /// Packets taken of which the driver was not told.
    taken: u16,
}

impl Active {
    fn new(
        memory: GuestMemory,
        mut to_guest: DeviceQueue,
        from_guest: DeviceQueue,
        events: DeviceQueue,
        reset: Option<Reset>,
    ) -> Self {
        // New buffers are of no interest until one is missing.
        to_guest.disable_notification(&memory);
        Self { memory, to_guest, from_guest, events, reset, look_at_guest: true, starved: false, taken: 0 }
    }

    fn queues(&self) -> [&DeviceQueue; 3] {
        [&self.to_guest, &self.from_guest, &self.events]
    }

    /// Takes what the guest sent, sends what it can be sent, and interrupts once for all that was sent.
    fn serve(&mut self, muxer: &mut Muxer) {
        if let Some(reset) = self.reset.take() {
            self.reset = reset.advance(&self.memory, &mut self.events);
            if self.reset.is_none() {
                muxer.release();
            }
        }
        let mut budget = BUDGET;
        loop {
            self.take_packets(muxer, &mut budget);
            let was_choked = muxer.is_choked();
            self.send_packets(muxer, &mut budget);
            // Packets wait for refusals to be sent; if that has happened they are next.
            if !was_choked || muxer.is_choked() || budget == 0 {
                break;
            }
        }
        self.to_guest.notify(&self.memory);
        if self.taken >= COMPLETIONS {
            self.announce_taken();
        } else if self.taken > 0 {
            muxer.start_ticking();
        }
    }

    fn announce_taken(&mut self) {
        self.taken = 0;
        self.from_guest.notify(&self.memory);
    }

    fn take_packets(&mut self, muxer: &mut Muxer, budget: &mut usize) {
        let Self { memory, from_guest: queue, look_at_guest, taken, .. } = self;
        while *look_at_guest {
            queue.disable_notification(memory);
            loop {
                if muxer.is_choked() {
                    return;
                }
                if *budget == 0 {
                    // Comes back after other devices. A full counter of the kick does so, too.
                    let _ = queue.kick().write(1);
                    return;
                }
                let Some(chain) = queue.pop(memory) else { break };
                *budget = budget.saturating_sub(1);
                let head = chain.head_index();
                muxer.take_packet(TxPacket::parse(memory, chain));
                queue.push(memory, head, 0);
                *taken = taken.saturating_add(1);
            }
            *look_at_guest = queue.enable_notification(memory);
        }
    }

    fn send_packets(&mut self, muxer: &mut Muxer, budget: &mut usize) {
        let Self { memory, to_guest: queue, starved, .. } = self;
        loop {
            let wanted = muxer.wanted_buffers();
            if wanted == 0 {
                return;
            }
            if *budget == 0 {
                // As above.
                let _ = queue.kick().write(1);
                return;
            }
            let mut buffers = pop_buffers(memory, queue, wanted, budget);
            if buffers.is_empty() {
                if *budget == 0 {
                    continue;
                }
                *starved = true;
                muxer.metrics_mut().starved.inc();
                if queue.enable_notification(memory) {
                    continue;
                }
                return;
            }
            if std::mem::take(starved) {
                queue.disable_notification(memory);
            }
            let used = muxer.deliver(&mut buffers);
            for buffer in buffers.iter().take(used) {
                queue.push(memory, buffer.head(), buffer.written());
            }
            for _ in buffers.iter().skip(used) {
                queue.unpop();
            }
        }
    }
}

/// Up to `wanted` buffers from consecutive chains, so that the last ones can be given back.
fn pop_buffers<'m>(
    memory: &'m GuestMemory,
    queue: &mut DeviceQueue,
    wanted: usize,
    budget: &mut usize,
) -> Vec<RxBuffer<'m>> {
    let mut buffers = Vec::with_capacity(wanted);
    while buffers.len() < wanted && *budget > 0 {
        let Some(chain) = queue.pop(memory) else { break };
        *budget = budget.saturating_sub(1);
        let head = chain.head_index();
        match RxBuffer::parse(memory, head, chain) {
            Ok(buffer) => buffers.push(buffer),
            // Useless to anyone: the driver has it back at once, unless chains before it may have to go back first.
            Err(_) if buffers.is_empty() => queue.push(memory, head, 0),
            Err(_) => {
                queue.unpop();
                break;
            }
        }
    }
    buffers
}

//! Virtio 1.x devices (Virtual I/O Device Version 1.2) behind the MMIO transport.

pub mod interrupt;
pub mod mmio;
pub mod queue;

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::GuestMemory;
use crate::vsock::VsockState;

/// What a virtio device is to its transport and to the event loop.
///
/// The transport owns feature negotiation, status and queue registers; it hands the device its queues once, when the
/// driver sets DRIVER_OK. All calls come with the device's lock held. Guest input reaches a device only through `queues`
/// and the config space: both hostile.
pub trait VirtioDevice: Send {
    /// Device id (section 5 of the specification): 2 block, 4 entropy, 19 socket.
    fn id(&self) -> u32;
    /// Name in metrics and messages: `block0`, `vsock`, `rng`.
    fn name(&self) -> &str;
    /// Features on top of the transport's VERSION_1, RING_INDIRECT_DESC and RING_EVENT_IDX.
    fn features(&self) -> u64;
    /// Largest size of each queue; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// Reads the device configuration; bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// The driver is ready: `driver_features` were agreed on.
    ///
    /// # Errors
    /// [`ActivateError`]; the transport then sets DEVICE_NEEDS_RESET.
    fn activate(
        &mut self,
        memory: GuestMemory,
        queues: Vec<queue::DeviceQueue>,
        driver_features: u64,
    ) -> Result<(), ActivateError>;
    /// The guest notified queue `index`.
    fn queue_notified(&mut self, index: u16);
    /// A descriptor to wait on besides the queues (readable), for devices with a host side.
    fn host_fd(&self) -> Option<RawFd> {
        None
    }
    /// [`Self::host_fd`] is readable.
    fn host_ready(&mut self) {}
    /// Back to the state before `activate`; the queues are dropped.
    fn reset(&mut self);
    /// The queues that `activate` gave it, in their order; none before that and after `reset`.
    fn queues(&self) -> Vec<&queue::DeviceQueue>;
    /// What a snapshot of an active device keeps besides its queues. Changes nothing: the device goes on.
    fn save(&self) -> DeviceState {
        DeviceState::Stateless
    }
    /// Comes right before the `activate` of a device that was active when `state` was saved. `state` is hostile.
    ///
    /// # Errors
    /// Why `state` is none of this device.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Stateless => Ok(()),
            DeviceState::Vsock(_) => Err(RestoreError::OtherDevice),
        }
    }
    /// The machine is restored and about to run, for the guest to be told what it has to know.
    fn restored(&mut self) {}
    /// Counters for the control socket.
    fn counters(&self) -> Vec<(&'static str, u64)>;
}

/// What a device keeps across a snapshot besides its queues, as long as a driver uses it.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// Nothing: all that matters is in its queues and on its host's side.
    Stateless,
    /// The socket device.
    Vsock(VsockState),
}

/// A device's state that is not one of this device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// It belongs to a device of another kind.
    #[error("it is the state of a device of another kind; the snapshot is damaged")]
    OtherDevice,
    /// The guest knows its context id, so it has to stay.
    #[error(
        "its context id is {saved}, this machine's {present}; give the machine the snapshot's context id"
    )]
    ContextId {
        /// In the snapshot.
        saved: u32,
        /// Of the device.
        present: u32,
    },
    /// More connections than a device has.
    #[error("it names {0} connections, more than there can be; the snapshot is damaged")]
    Connections(usize),
}

/// A device as its transport and the event loop share it.
pub type SharedDevice = Arc<Mutex<Box<dyn VirtioDevice>>>;

/// A device that could not be activated.
#[derive(Debug, thiserror::Error)]
#[error("{device} could not be activated: {why}")]
pub struct ActivateError {
    /// Its name.
    pub device: String,
    /// Why.
    pub why: String,
}

/// The queue of a device that has one and cannot do without.
pub(crate) fn only_queue(
    device: &str,
    queues: Vec<queue::DeviceQueue>,
) -> Result<queue::DeviceQueue, ActivateError> {
    let queue = queues.into_iter().next().filter(queue::DeviceQueue::is_set_up);
    queue.ok_or_else(|| ActivateError {
        device: device.to_owned(),
        why: "the driver did not set its queue up".to_owned(),
    })
}

/// Reads `data.len()` bytes at `offset` of a device's configuration; bytes past its end read as zero.
pub(crate) fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}

//! The transport in a snapshot: what the driver has set up, and where the device stands in its queues.
//!
//! A state comes from disk and is as hostile as a driver: it passes the same checks before anything of it is used. Saving
//! changes nothing, so the machine goes on afterwards; the event loop is paused and no vCPU runs while it happens.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::queue_registers::QueueRegisters;
use super::registers::{FEATURE_VERSION_1, STATUS_FAILED, STATUS_NEEDS_RESET};
use super::status::Phase;
use super::{MmioTransport, State, lock_device, signal};
use crate::virtio::interrupt::{INTERRUPT_CONFIG_CHANGE, INTERRUPT_USED_BUFFER};
use crate::virtio::queue::{DeviceQueue, QueuePosition};
use crate::virtio::{ActivateError, DeviceState, RestoreError};

/// A transport and its device, as a snapshot keeps them.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    /// `DeviceID` (specification 1.2, section 5).
    pub device_id: u32,
    /// `Status` as the driver reads it (section 2.1).
    pub status: u32,
    /// `DeviceFeaturesSel`.
    pub device_features_sel: u32,
    /// `DriverFeaturesSel`.
    pub driver_features_sel: u32,
    /// What the driver has written to `DriverFeatures`; agreed on from FEATURES_OK on.
    pub driver_features: u64,
    /// `QueueSel`.
    pub queue_sel: u32,
    /// The registers of each queue.
    pub queues: Vec<QueueState>,
    /// `InterruptStatus`.
    pub interrupt_status: u32,
    /// `ConfigGeneration`.
    pub config_generation: u32,
    /// The device, if a driver uses it: DRIVER_OK is set and the device could be activated.
    pub live: Option<LiveState>,
}

/// The registers of a queue.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// `QueueNum`, entries.
    pub size: u32,
    /// `QueueReady`.
    pub ready: bool,
    /// `QueueDesc`, guest-physical.
    pub descriptors: u64,
    /// `QueueDriver`: the available ring, guest-physical.
    pub driver: u64,
    /// `QueueDevice`: the used ring, guest-physical.
    pub device: u64,
}

/// A device that a driver uses.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct LiveState {
    /// Where it stands in each of its queues.
    pub positions: Vec<QueuePosition>,
    /// What else it keeps.
    pub device: DeviceState,
}

/// A transport that cannot be saved, or a state that does not go with the transport.
#[derive(Debug, thiserror::Error)]
pub enum PersistError {
    /// Only a new transport can be restored.
    #[error("virtio device {0} is in use already; restore into a new machine")]
    InUse(u32),
    /// The state of a device of another kind.
    #[error(
        "the snapshot has virtio device {saved} where this machine has {present}; restore with the snapshot's devices"
    )]
    OtherDevice {
        /// Device id in the snapshot.
        saved: u32,
        /// Device id of the transport.
        present: u32,
    },
    /// More or fewer queues than the device has.
    #[error(
        "the state of virtio device {device} is of {saved} queues, but it has {present}; the snapshot is damaged"
    )]
    QueueCount {
        /// Device id.
        device: u32,
        /// Queues in the snapshot.
        saved: usize,
        /// Queues of the device.
        present: usize,
    },
    /// No driver brings a device into this state.
    #[error(
        "the state of virtio device {device} has {what} {value:#x}, which cannot be; the snapshot is damaged"
    )]
    Impossible {
        /// Device id.
        device: u32,
        /// The register.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The driver counts on features that this device does not have.
    #[error(
        "the guest uses features {missing:#x} of virtio device {device} that it has not got here; restore with the snapshot's devices"
    )]
    Features {
        /// Device id.
        device: u32,
        /// The features missing.
        missing: u64,
    },
    /// A queue that no driver could have made ready.
    #[error("queue {queue} of virtio device {device} cannot be restored: {why}; the snapshot is damaged")]
    Queue {
        /// Device id.
        device: u32,
        /// Index of the queue.
        queue: usize,
        /// What is wrong with it.
        why: String,
    },
    /// The device refused its state.
    #[error("the state of virtio device {device} does not fit: {source}")]
    Device {
        /// Device id.
        device: u32,
        /// Why.
        source: RestoreError,
    },
    /// The device refused to go on.
    #[error(transparent)]
    Activate(#[from] ActivateError),
}

impl MmioTransport {
    /// The state now. Changes nothing.
    ///
    /// # Errors
    /// [`PersistError::QueueCount`]: the device is not what it told the transport it is.
    pub fn save(&self) -> Result<TransportState, PersistError> {
        let status = self.status();
        let state = self.state();
        let device = lock_device(&self.device);
        let positions: Vec<_> = device.queues().into_iter().map(DeviceQueue::position).collect();
        let live = match positions.len() {
            0 => None,
            n if n == self.queue_sizes.len() => Some(LiveState { positions, device: device.save() }),
            n => return Err(self.queue_count(n)),
        };
        Ok(TransportState {
            device_id: self.device_id,
            status,
            device_features_sel: state.device_features_sel,
            driver_features_sel: state.driver_features_sel,
            driver_features: state.driver_features,
            queue_sel: state.queue_sel,
            queues: state.queues.iter().map(QueueState::from).collect(),
            interrupt_status: self.interrupt.status(),
            config_generation: self.interrupt.config_generation(),
            live,
        })
    }

    /// Brings a new transport into `state`; an active device goes on where it stood, but hears of nothing before
    /// [`Self::wake`]. Guest memory must be restored before.
    ///
    /// # Errors
    /// [`PersistError`]; the transport is as before then.
    pub fn restore(&self, state: &TransportState) -> Result<(), PersistError> {
        let mut current = self.state();
        if current.phase != Phase::Reset {
            return Err(PersistError::InUse(self.device_id));
        }
        let new = self.check(state)?;
        let needs_reset = state.status & STATUS_NEEDS_RESET != 0;
        let unannounced =
            state.live.iter().flat_map(|live| &live.positions).any(|position| position.unannounced);
        let unannounced = if unannounced { INTERRUPT_USED_BUFFER } else { 0 };
        self.interrupt.restore(state.interrupt_status | unannounced, needs_reset, state.config_generation);
        if let Some(live) = &state.live
            && let Err(why) = self.restore_device(&new, live)
        {
            lock_device(&self.device).reset();
            self.interrupt.reset();
            return Err(why);
        }
        *current = new;
        Ok(())
    }

    /// The machine is restored, its interrupt controllers too, and about to run: the device tells the guest what it has to
    /// know, looks at every queue, for a notification on its way was not part of the state, and interrupts again where an
    /// interrupt may have been on its way.
    pub fn wake(&self) {
        lock_device(&self.device).restored();
        if self.state().phase == Phase::DriverOk {
            self.kicks.iter().for_each(|kick| signal(kick));
        }
        self.interrupt.raise_pending();
    }

    fn restore_device(&self, new: &State, live: &LiveState) -> Result<(), PersistError> {
        let mut device = lock_device(&self.device);
        let queues = self
            .build_queues(new)
            .map_err(|why| ActivateError { device: device.name().to_owned(), why: why.to_string() })?;
        let queues = queues.into_iter().zip(&live.positions).map(|(mut queue, position)| {
            queue.resume_at(position);
            queue
        });
        device
            .restore(&live.device)
            .map_err(|source| PersistError::Device { device: self.device_id, source })?;
        device.activate(self.memory.clone(), queues.collect(), new.driver_features)?;
        self.counters.activations.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The transport's own part of `saved`, if a driver could have brought this transport there.
    fn check(&self, saved: &TransportState) -> Result<State, PersistError> {
        if saved.device_id != self.device_id {
            return Err(PersistError::OtherDevice { saved: saved.device_id, present: self.device_id });
        }
        if saved.queues.len() != self.queue_sizes.len() {
            return Err(self.queue_count(saved.queues.len()));
        }
        let phase = Phase::from_bits(saved.status & !(STATUS_FAILED | STATUS_NEEDS_RESET))
            .ok_or_else(|| self.impossible("status", saved.status))?;
        if saved.interrupt_status & !(INTERRUPT_USED_BUFFER | INTERRUPT_CONFIG_CHANGE) != 0 {
            return Err(self.impossible("interrupt status", saved.interrupt_status));
        }
        self.check_features(saved.driver_features, phase)?;
        match &saved.live {
            Some(_) if phase != Phase::DriverOk => {
                return Err(self.impossible("a device at work at status", saved.status));
            }
            Some(live) if live.positions.len() != self.queue_sizes.len() => {
                return Err(self.queue_count(live.positions.len()));
            }
            // It could not be activated, and said so.
            None if phase == Phase::DriverOk && saved.status & STATUS_NEEDS_RESET == 0 => {
                return Err(self.impossible("no device at work at status", saved.status));
            }
            Some(_) | None => {}
        }
        let queues: Vec<_> = saved.queues.iter().map(QueueRegisters::from).collect();
        self.check_queues(&queues, phase)?;
        Ok(State {
            phase,
            failed: saved.status & STATUS_FAILED != 0,
            device_features_sel: saved.device_features_sel,
            driver_features_sel: saved.driver_features_sel,
            driver_features: saved.driver_features,
            queue_sel: saved.queue_sel,
            queues,
        })
    }

    fn check_features(&self, features: u64, phase: Phase) -> Result<(), PersistError> {
        // Before FEATURES_OK a driver may have written anything; it is looked at when the driver sets it.
        let agreed = phase >= Phase::FeaturesOk;
        let missing = features & !self.features;
        if agreed && missing != 0 {
            return Err(PersistError::Features { device: self.device_id, missing });
        }
        if agreed && features & FEATURE_VERSION_1 == 0 {
            let device = self.device_id;
            return Err(PersistError::Impossible { device, what: "features", value: features });
        }
        Ok(())
    }

    fn check_queues(&self, queues: &[QueueRegisters], phase: Phase) -> Result<(), PersistError> {
        for (index, (queue, &max_size)) in queues.iter().zip(&self.queue_sizes).enumerate() {
            let bad = |why| PersistError::Queue { device: self.device_id, queue: index, why };
            if queue.ready && phase < Phase::FeaturesOk {
                return Err(bad("it is ready before the features are agreed on".to_owned()));
            }
            if queue.ready {
                queue.check(max_size, &self.memory).map_err(|why| bad(why.to_string()))?;
            }
        }
        Ok(())
    }

    fn queue_count(&self, saved: usize) -> PersistError {
        PersistError::QueueCount { device: self.device_id, saved, present: self.queue_sizes.len() }
    }

    fn impossible(&self, what: &'static str, value: u32) -> PersistError {
        PersistError::Impossible { device: self.device_id, what, value: value.into() }
    }
}

impl From<&QueueRegisters> for QueueState {
    fn from(queue: &QueueRegisters) -> Self {
        let QueueRegisters { size, descriptors, driver, device, ready } = *queue;
        Self { size, ready, descriptors, driver, device }
    }
}

impl From<&QueueState> for QueueRegisters {
    fn from(queue: &QueueState) -> Self {
        let QueueState { size, ready, descriptors, driver, device } = *queue;
        Self { size, descriptors, driver, device, ready }
    }
}

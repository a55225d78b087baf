//! The virtio-mmio transport, version 2 (Virtual I/O Device Version 1.2, section 4.2).
//!
//! It owns status, feature negotiation and queue registers; the device sees queues that were checked. Whatever the driver
//! does out of turn is ignored and counted; what leaves the device unusable (rings outside of memory, a device that cannot be
//! activated) sets DEVICE_NEEDS_RESET. The device's own lock is taken only for its configuration, activation and reset:
//! interrupt status and notifications are atomics and event descriptors. Lock order: transport, then device.

mod persist;
mod queue_registers;
mod registers;
mod status;
#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use self::persist::{LiveState, PersistError, QueueState, TransportState};
use self::queue_registers::{BadQueue, QueueRegisters, with_high, with_low};
use self::registers::{
    CONFIG, CONFIG_GENERATION, DEVICE_FEATURES, DEVICE_FEATURES_SEL, DEVICE_ID, DRIVER_FEATURES,
    DRIVER_FEATURES_SEL, INTERRUPT_ACK, INTERRUPT_STATUS, MAGIC_VALUE, QUEUE_DESC_HIGH, QUEUE_DESC_LOW,
    QUEUE_DEVICE_HIGH, QUEUE_DEVICE_LOW, QUEUE_DRIVER_HIGH, QUEUE_DRIVER_LOW, QUEUE_NUM, QUEUE_NUM_MAX,
    QUEUE_READY, QUEUE_SEL, SHM_BASE_HIGH, SHM_LEN_LOW, STATUS, STATUS_FAILED, STATUS_NEEDS_RESET, VENDOR_ID,
    VERSION_REGISTER,
};
pub use self::registers::{
    FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, FEATURE_VERSION_1, MAGIC, QUEUE_NOTIFY, TRANSPORT_FEATURES,
    VENDOR, VERSION, WINDOW,
};
use self::status::{Phase, Step, step};
use super::interrupt::DeviceInterrupt;
use super::queue::DeviceQueue;
use super::{SharedDevice, VirtioDevice};
use crate::bus::BusDevice;
use crate::{GuestMemory, IrqLine};

/// A virtio device in its window of guest-physical addresses ([`WINDOW`] bytes).
pub struct MmioTransport {
    device: SharedDevice,
    memory: GuestMemory,
    interrupt: DeviceInterrupt,
    kicks: Vec<Arc<EventFd>>,
    device_id: u32,
    features: u64,
    queue_sizes: Vec<u16>,
    state: Mutex<State>,
    counters: Counters,
}

/// What the driver has written so far.
struct State {
    phase: Phase,
    failed: bool,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
}

#[derive(Default)]
struct Counters {
    notifications_by_exit: AtomicU64,
    ignored_accesses: AtomicU64,
    activations: AtomicU64,
    resets: AtomicU64,
    complained: AtomicBool,
}

impl State {
    fn new(queues: usize) -> Self {
        Self {
            phase: Phase::Reset,
            failed: false,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues: vec![QueueRegisters::default(); queues],
        }
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    fn selected_mut(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(usize::try_from(self.queue_sel).ok()?)
    }

    /// The selected queue while its registers may be written: between feature negotiation and DRIVER_OK, not ready.
    fn open_queue(&mut self) -> Option<&mut QueueRegisters> {
        if self.phase != Phase::FeaturesOk || self.failed {
            return None;
        }
        self.selected_mut().filter(|queue| !queue.ready)
    }
}

impl MmioTransport {
    /// Puts `device` behind a window; its interrupts go to `line`. `kicks` are its queues' notifications, in order, as far as
    /// they were made ahead, by [`Self::kick`]: those of further queues are made now, those of none are dropped.
    ///
    /// # Errors
    /// When the host has no event descriptor left for a queue's notifications.
    pub fn new(
        device: SharedDevice,
        memory: GuestMemory,
        line: IrqLine,
        mut kicks: Vec<Arc<EventFd>>,
    ) -> io::Result<Self> {
        let (device_id, features, queue_sizes) = {
            let device = lock_device(&device);
            (device.id(), device.features() | TRANSPORT_FEATURES, device.queue_sizes().to_vec())
        };
        kicks.truncate(queue_sizes.len());
        while kicks.len() < queue_sizes.len() {
            kicks.push(Self::kick()?);
        }
        Ok(Self {
            interrupt: DeviceInterrupt::new(line),
            state: Mutex::new(State::new(queue_sizes.len())),
            counters: Counters::default(),
            device,
            memory,
            kicks,
            device_id,
            features,
            queue_sizes,
        })
    }

    /// A descriptor for the notifications of one queue of some device.
    ///
    /// # Errors
    /// When the host has none left.
    pub fn kick() -> io::Result<Arc<EventFd>> {
        EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Arc::new)
    }

    /// The device, for the event loop.
    #[must_use]
    pub fn device(&self) -> &SharedDevice {
        &self.device
    }

    /// One descriptor per queue, signalled when the driver notifies it: for the event loop, and for ioeventfds at
    /// [`QUEUE_NOTIFY`] of the window with the queue's number as the 32-bit value to match.
    #[must_use]
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// Counters of the transport; the device has its own.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("interrupts", self.interrupt.raised()),
            ("interrupts_failed", self.interrupt.failed()),
            ("notifications_by_exit", self.counters.notifications_by_exit.load(Ordering::Relaxed)),
            ("ignored_accesses", self.counters.ignored_accesses.load(Ordering::Relaxed)),
            ("activations", self.counters.activations.load(Ordering::Relaxed)),
            ("resets", self.counters.resets.load(Ordering::Relaxed)),
        ]
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ignore(&self) {
        self.counters.ignored_accesses.fetch_add(1, Ordering::Relaxed);
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            INTERRUPT_STATUS => self.interrupt.status(),
            MAGIC_VALUE => MAGIC,
            VERSION_REGISTER => VERSION,
            DEVICE_ID => self.device_id,
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => half(self.features, self.state().device_features_sel),
            QUEUE_NUM_MAX => {
                let selected = usize::try_from(self.state().queue_sel).ok();
                selected.and_then(|i| self.queue_sizes.get(i)).copied().unwrap_or(0).into()
            }
            QUEUE_READY => self.state().selected().is_some_and(|queue| queue.ready).into(),
            STATUS => self.status(),
            SHM_LEN_LOW..=SHM_BASE_HIGH => u32::MAX,
            CONFIG_GENERATION => self.interrupt.config_generation(),
            _ => {
                self.ignore();
                0
            }
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            INTERRUPT_ACK => self.interrupt.acknowledge(value),
            QUEUE_NOTIFY => self.notify(value),
            STATUS => self.write_status(value),
            DEVICE_FEATURES_SEL => self.state().device_features_sel = value,
            DRIVER_FEATURES_SEL => self.state().driver_features_sel = value,
            QUEUE_SEL => self.state().queue_sel = value,
            DRIVER_FEATURES => self.write_driver_features(value),
            QUEUE_READY => self.write_queue_ready(value),
            QUEUE_NUM => self.write_queue(|queue| queue.size = value),
            QUEUE_DESC_LOW => self.write_queue(|q| q.descriptors = with_low(q.descriptors, value)),
            QUEUE_DESC_HIGH => self.write_queue(|q| q.descriptors = with_high(q.descriptors, value)),
            QUEUE_DRIVER_LOW => self.write_queue(|q| q.driver = with_low(q.driver, value)),
            QUEUE_DRIVER_HIGH => self.write_queue(|q| q.driver = with_high(q.driver, value)),
            QUEUE_DEVICE_LOW => self.write_queue(|q| q.device = with_low(q.device, value)),
            QUEUE_DEVICE_HIGH => self.write_queue(|q| q.device = with_high(q.device, value)),
            _ => self.ignore(),
        }
    }

    fn status(&self) -> u32 {
        let state = self.state();
        let failed = if state.failed { STATUS_FAILED } else { 0 };
        let needs_reset = if self.interrupt.needs_reset() { STATUS_NEEDS_RESET } else { 0 };
        state.phase.bits() | failed | needs_reset
    }

    fn notify(&self, queue: u32) {
        self.counters.notifications_by_exit.fetch_add(1, Ordering::Relaxed);
        match usize::try_from(queue).ok().and_then(|i| self.kicks.get(i)) {
            Some(kick) => signal(kick),
            None => self.ignore(),
        }
    }

    fn write_driver_features(&self, value: u32) {
        let mut state = self.state();
        if state.phase != Phase::Driver || state.failed {
            return self.ignore();
        }
        match state.driver_features_sel {
            0 => state.driver_features = with_low(state.driver_features, value),
            1 => state.driver_features = with_high(state.driver_features, value),
            _ => {}
        }
    }

    fn write_queue(&self, set: impl FnOnce(&mut QueueRegisters)) {
        match self.state().open_queue() {
            Some(queue) => set(queue),
            None => self.ignore(),
        }
    }

    fn write_queue_ready(&self, value: u32) {
        let mut state = self.state();
        let max_size = usize::try_from(state.queue_sel).ok().and_then(|i| self.queue_sizes.get(i)).copied();
        let (Some(max_size), Phase::FeaturesOk, false) = (max_size, state.phase, state.failed) else {
            return self.ignore();
        };
        let Some(queue) = state.selected_mut() else { return self.ignore() };
        match value {
            0 => queue.ready = false,
            1 => match queue.check(max_size, &self.memory) {
                Ok(_) => queue.ready = true,
                Err(why) => self.refuse(&why),
            },
            _ => self.ignore(),
        }
    }

    fn write_status(&self, value: u32) {
        let mut state = self.state();
        match step(state.phase, state.failed, value) {
            Step::Reset => self.reset(&mut state),
            Step::Fail => state.failed = true,
            Step::Same => {}
            Step::Illegal => self.ignore(),
            Step::To(Phase::FeaturesOk) => {
                // A driver whose wishes are refused finds FEATURES_OK clear when it reads the status back.
                let known = state.driver_features & !self.features == 0;
                if known && state.driver_features & FEATURE_VERSION_1 != 0 {
                    state.phase = Phase::FeaturesOk;
                } else {
                    self.ignore();
                }
            }
            Step::To(Phase::DriverOk) => {
                state.phase = Phase::DriverOk;
                self.activate(&state);
            }
            Step::To(next @ (Phase::Reset | Phase::Acknowledged | Phase::Driver)) => state.phase = next,
        }
    }

    fn activate(&self, state: &State) {
        let queues = match self.build_queues(state) {
            Ok(queues) => queues,
            Err(why) => return self.refuse(&why),
        };
        let result = lock_device(&self.device).activate(self.memory.clone(), queues, state.driver_features);
        match result {
            Ok(()) => {
                self.counters.activations.fetch_add(1, Ordering::Relaxed);
                // The driver may have filled its queues, and even kicked, before DRIVER_OK.
                self.kicks.iter().for_each(|kick| signal(kick));
            }
            Err(why) => self.refuse(&why),
        }
    }

    fn build_queues(&self, state: &State) -> Result<Vec<DeviceQueue>, BadQueue> {
        let event_idx = state.driver_features & FEATURE_EVENT_IDX != 0;
        let registers = state.queues.iter().zip(&self.queue_sizes).zip(&self.kicks);
        registers
            .map(|((queue, &max_size), kick)| {
                let mut queue = if queue.ready {
                    queue.check(max_size, &self.memory)?
                } else {
                    QueueRegisters::unused(max_size)?
                };
                queue.set_event_idx(event_idx);
                Ok(DeviceQueue::new(queue, Arc::clone(kick), self.interrupt.clone()))
            })
            .collect()
    }

    fn reset(&self, state: &mut State) {
        if state.phase == Phase::DriverOk {
            lock_device(&self.device).reset();
        }
        for kick in &self.kicks {
            // Not signalled is what is wanted: EAGAIN says that it is so already.
            let _ = kick.read();
        }
        self.interrupt.reset();
        self.counters.resets.fetch_add(1, Ordering::Relaxed);
        *state = State::new(self.queue_sizes.len());
    }

    /// The device cannot go on until it is reset. Said once per device on standard error: a guest could repeat it for ever.
    fn refuse(&self, why: &dyn std::error::Error) {
        if !self.counters.complained.swap(true, Ordering::Relaxed) {
            // Not `eprintln`: it panics where standard error is a full disk or a closed pipe, and a guest gets here at will.
            let _ =
                writeln!(io::stderr(), "virtio device {}: {why}; the guest must reset it", self.device_id);
        }
        self.interrupt.device_needs_reset();
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            return lock_device(&self.device).read_config(offset, data);
        }
        match <&mut [u8; 4]>::try_from(data) {
            Ok(word) if offset.is_multiple_of(4) => *word = self.read_register(offset).to_le_bytes(),
            Ok(_) | Err(_) => self.ignore(),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match <[u8; 4]>::try_from(data) {
            Ok(word) if offset < CONFIG && offset.is_multiple_of(4) => {
                self.write_register(offset, u32::from_le_bytes(word));
            }
            // No device here has a configuration the driver may write.
            Ok(_) | Err(_) => self.ignore(),
        }
    }
}

/// Lower (0) or upper (1) half of a feature word; there are no others.
fn half(features: u64, sel: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = features.to_le_bytes();
    match sel {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

fn signal(kick: &EventFd) {
    // Fails only when the counter is full: then it is signalled anyway.
    let _ = kick.write(1);
}

fn lock_device(device: &SharedDevice) -> MutexGuard<'_, Box<dyn VirtioDevice>> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

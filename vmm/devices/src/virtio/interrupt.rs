//! The interrupt of one virtio-mmio device: its status bits and its line.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::IrqLine;

/// `InterruptStatus` bit 0: a used buffer (specification 1.2, section 4.2.2, register 0x060).
pub const INTERRUPT_USED_BUFFER: u32 = 1;
/// `InterruptStatus` bit 1: the configuration or the device status changed.
pub const INTERRUPT_CONFIG_CHANGE: u32 = 2;

/// What the transport and the device's queues share to interrupt the driver.
///
/// The guest reads and acknowledges the status at every interrupt, so it lives in atomics that need no device lock.
#[derive(Clone)]
pub struct DeviceInterrupt {
    shared: Arc<Shared>,
}

struct Shared {
    line: IrqLine,
    status: AtomicU32,
    needs_reset: AtomicBool,
    config_generation: AtomicU32,
    raised: AtomicU64,
    failed: AtomicU64,
}

impl DeviceInterrupt {
    /// An interrupt on `line`, nothing pending.
    #[must_use]
    pub fn new(line: IrqLine) -> Self {
        Self {
            shared: Arc::new(Shared {
                line,
                status: AtomicU32::new(0),
                needs_reset: AtomicBool::new(false),
                config_generation: AtomicU32::new(0),
                raised: AtomicU64::new(0),
                failed: AtomicU64::new(0),
            }),
        }
    }

    /// Tells the driver that buffers were used.
    pub fn used_buffer(&self) {
        self.raise(INTERRUPT_USED_BUFFER);
    }

    /// Tells the driver that the configuration changed.
    pub fn config_changed(&self) {
        self.shared.config_generation.fetch_add(1, Ordering::AcqRel);
        self.raise(INTERRUPT_CONFIG_CHANGE);
    }

    /// Changes whenever the configuration did (`ConfigGeneration`).
    #[must_use]
    pub fn config_generation(&self) -> u32 {
        self.shared.config_generation.load(Ordering::Acquire)
    }

    /// The driver broke the protocol so that the device cannot go on: DEVICE_NEEDS_RESET appears in the status register
    /// and the driver gets a configuration change interrupt (section 2.1.2). Only the first call has an effect until
    /// [`Self::reset`].
    pub fn device_needs_reset(&self) {
        if !self.shared.needs_reset.swap(true, Ordering::AcqRel) {
            self.config_changed();
        }
    }

    /// Whether the device waits for a reset.
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.shared.needs_reset.load(Ordering::Acquire)
    }

    /// The pending causes: [`INTERRUPT_USED_BUFFER`] and [`INTERRUPT_CONFIG_CHANGE`].
    #[must_use]
    pub fn status(&self) -> u32 {
        self.shared.status.load(Ordering::SeqCst)
    }

    /// The driver has handled `causes`.
    pub fn acknowledge(&self, causes: u32) {
        self.shared.status.fetch_and(!causes, Ordering::SeqCst);
    }

    /// Nothing is pending any more and the device works again.
    pub fn reset(&self) {
        self.shared.status.store(0, Ordering::SeqCst);
        self.shared.needs_reset.store(false, Ordering::Release);
    }

    /// As it was when a snapshot was taken; raises nothing, see [`Self::raise_pending`].
    pub(crate) fn restore(&self, status: u32, needs_reset: bool, config_generation: u32) {
        self.shared.status.store(status, Ordering::SeqCst);
        self.shared.needs_reset.store(needs_reset, Ordering::Release);
        self.shared.config_generation.store(config_generation, Ordering::Release);
    }

    /// Raises the line once more when a cause is pending: whether the interrupt had reached the guest when the snapshot was
    /// taken is not known, and one too many does no harm.
    pub(crate) fn raise_pending(&self) {
        if self.status() != 0 {
            self.raise(0);
        }
    }

    /// Interrupts raised so far.
    #[must_use]
    pub fn raised(&self) -> u64 {
        self.shared.raised.load(Ordering::Relaxed)
    }

    /// Interrupts the host refused to raise so far.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.shared.failed.load(Ordering::Relaxed)
    }

    fn raise(&self, cause: u32) {
        self.shared.status.fetch_or(cause, Ordering::SeqCst);
        match self.shared.line.trigger() {
            Ok(()) => self.shared.raised.fetch_add(1, Ordering::Relaxed),
            // An eventfd write fails only when its counter is full, that is: when the line is already pending.
            Err(_) => self.shared.failed.fetch_add(1, Ordering::Relaxed),
        };
    }
}

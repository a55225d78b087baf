//! Device models over guest memory and an [`Interrupt`] trait; no KVM.
//!
//! One folder per device. [`virtio::mmio`] is the transport all virtio devices share, [`virtio::VirtioDevice`] what each
//! of them implements, [`event_loop`] the one thread that serves them.

// Guest input is hostile: nothing outside of tests may panic.
#![cfg_attr(
    not(test),
    deny(clippy::indexing_slicing, clippy::unwrap_used, clippy::expect_used, clippy::panic)
)]

pub mod block;
pub mod bus;
pub mod event_loop;
pub mod power;
pub mod rng;
pub mod serial;
pub mod virtio;
pub mod vsock;

use std::sync::Arc;

/// Raises a device's interrupt line; the VMM backs it with an irqfd, a test with a counter.
pub trait Interrupt: Send + Sync {
    /// Raises the line.
    ///
    /// # Errors
    /// What the kernel said.
    fn trigger(&self) -> std::io::Result<()>;
}

/// Guest memory as all devices see it.
pub type GuestMemory = vm_memory::GuestMemoryMmap;

/// A shared interrupt line.
pub type IrqLine = Arc<dyn Interrupt>;

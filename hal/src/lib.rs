//! The only code that knows KVM.
//!
//! [`Hypervisor`] makes a [`Vm`], which gets [`memory`] and makes [`Vcpu`]s; a [`Vcpu`] is booted, or restored from a
//! [`VcpuState`], and runs until it has an [`Exit`], which is data that the caller handles without knowing who made it. [`kvm`] is the real thing, [`fake`] follows a script so
//! that everything above is tested without `/dev/kvm`. [`probe`] tells whether this host's KVM can run guests at all.

pub mod fake;
pub mod kvm;
pub mod memory;
pub mod probe;
mod traits;

pub use kvm::{ForeignProcessor, Processor, VcpuState, VmState};
pub use traits::{Exit, HalError, Hypervisor, Kick, SystemEvent, Vcpu, VcpuEntry, Vm};

//! `ark-vmm hold`: keeps one empty VM for as long as it runs, so that KVM is never switched off and on. Says `held` once it does.
//!
//! The first VM of a host switches virtualisation and some of the kernel's static branches on, the last one to go switches
//! them off, each time by rewriting code that the other processors may be running. QEMU's multi-threaded software emulation
//! (seen with 7.2) now and then goes on running the old code, which then hangs the emulated host for good. With one VM held
//! the code is rewritten once, before the host's other processors are started. Real processors need none of this, and there a
//! held VM would keep other hypervisors out.

use std::convert::Infallible;
use std::io::Write as _;

use ark_hal::kvm::Kvm;
use ark_hal::memory::{self, HugePages, MemoryError};
use ark_hal::{HalError, Hypervisor, VcpuEntry};

/// Memory of the held VM, bytes: what a vCPU's set-up needs.
const MEMORY: u64 = 1 << 16;

/// A VM that could not be held.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// `/dev/kvm` cannot be used.
    #[error(transparent)]
    Open(#[from] ark_hal::kvm::OpenError),
    /// No memory for the guest.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM made no VM or vCPU.
    #[error(transparent)]
    Kvm(#[from] HalError),
}

/// Holds a VM until the process is killed; comes back only with what went wrong.
#[must_use]
pub fn run() -> HoldError {
    match hold() {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn hold() -> Result<Infallible, HoldError> {
    let vm = Kvm::open()?.create_vm()?;
    vm.set_memory(memory::create(MEMORY, HugePages::Never)?)?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.boot(1, VcpuEntry { rip: 0, boot_params: 0 })?;
    // Nobody may be left to read it.
    let _ = writeln!(std::io::stdout(), "held");
    loop {
        std::thread::park();
    }
}

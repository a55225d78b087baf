//! The seams: what a hypervisor, a VM and a vCPU can be asked, and what a vCPU's exit is.

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::{ForeignProcessor, Processor, VcpuState, VmState};

/// An operation of the hypervisor that failed.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct HalError {
    /// What was tried, for example `create the VM (KVM_CREATE_VM)`.
    pub what: &'static str,
    /// What the kernel said.
    pub source: std::io::Error,
}

/// Where a vCPU begins: a 64-bit Linux entry (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuEntry {
    /// First instruction, guest-physical.
    pub rip: u64,
    /// Guest-physical address of the zero page, for RSI.
    pub boot_params: u64,
}

/// A machine event KVM reports (`KVM_EXIT_SYSTEM_EVENT`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SystemEvent {
    /// Power off.
    Shutdown,
    /// Reset.
    Reset,
    /// The guest says that it crashed.
    Crash,
    /// Another type.
    Other(u32),
}

/// Why a vCPU came back. Buffers borrow the vCPU's shared page: fill `data` of the reads before the next run.
#[derive(Debug, PartialEq, Eq)]
pub enum Exit<'a> {
    /// The guest reads a port.
    IoIn {
        /// Port.
        port: u16,
        /// To be filled with what the guest reads.
        data: &'a mut [u8],
    },
    /// The guest writes a port.
    IoOut {
        /// Port.
        port: u16,
        /// What it writes.
        data: &'a [u8],
    },
    /// The guest reads memory that is not there.
    MmioRead {
        /// Guest-physical address.
        addr: u64,
        /// To be filled with what the guest reads.
        data: &'a mut [u8],
    },
    /// The guest writes memory that is not there.
    MmioWrite {
        /// Guest-physical address.
        addr: u64,
        /// What it writes.
        data: &'a [u8],
    },
    /// The run was interrupted by a signal or by `immediate_exit`: look around and run again.
    Interrupted,
    /// HLT with nothing to wake it (only without an in-kernel irqchip).
    Halt,
    /// Triple fault.
    Shutdown,
    /// A machine event.
    System(SystemEvent),
    /// The processor could not enter the guest (`KVM_EXIT_FAIL_ENTRY`).
    FailEntry {
        /// Hardware's reason.
        reason: u64,
    },
    /// KVM could not emulate or inject (`KVM_EXIT_INTERNAL_ERROR`).
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
    },
    /// An exit this VMM does not know.
    Unknown {
        /// `KVM_EXIT_*`.
        reason: u32,
    },
}

/// Makes VMs.
pub trait Hypervisor: Send + Sync {
    /// A VM with in-kernel irqchip (PIC, IOAPIC, PIT as Linux wants it) and clock, ready for vCPUs. It has no memory yet, so
    /// it can be made ahead of need.
    ///
    /// # Errors
    /// [`HalError`] names the step.
    fn create_vm(&self) -> Result<Arc<dyn Vm>, HalError>;

    /// Whether this host can go on with a vCPU that was saved elsewhere: its vendor and every feature that its guest was
    /// told of must be here, too. To be asked before [`Vcpu::restore`].
    ///
    /// # Errors
    /// [`ForeignProcessor`] names what is missing.
    fn check_processor(&self, vcpu: &VcpuState) -> Result<(), ForeignProcessor>;

    /// Which processor this host has.
    fn processor(&self) -> Processor;
}

/// One VM.
pub trait Vm: Send + Sync {
    /// Gives the VM its memory, in place of what it had, before any vCPU is booted or restored. The memory stays mapped as
    /// long as the VM or one of its vCPUs lives.
    ///
    /// # Errors
    /// [`HalError`]; one is that a vCPU was booted or restored.
    fn set_memory(&self, memory: GuestMemoryMmap) -> Result<(), HalError>;

    /// Processor `index`, counted from zero, with nothing set: [`Vcpu::boot`] or [`Vcpu::restore`] it before it runs. Needs
    /// no memory yet.
    ///
    /// # Errors
    /// [`HalError`] names the step.
    fn create_vcpu(&self, index: u8) -> Result<Box<dyn Vcpu>, HalError>;

    /// The state of interrupt controllers, timer and clock. No vCPU may run meanwhile.
    ///
    /// # Errors
    /// [`HalError`] names the step.
    fn save(&self) -> Result<VmState, HalError>;

    /// Brings interrupt controllers, timer and clock to a saved state; to be called after all vCPUs were restored. The
    /// guest's monotonic clock goes on where it was saved.
    ///
    /// # Errors
    /// [`HalError`] names the step.
    fn restore(&self, state: &VmState) -> Result<(), HalError>;

    /// Writes to `event` raise interrupt line `gsi` (edge).
    ///
    /// # Errors
    /// [`HalError`].
    fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), HalError>;

    /// A guest's 32-bit write of `value` to the guest-physical `address` signals `event` without an exit.
    ///
    /// # Errors
    /// [`HalError`].
    fn register_ioeventfd(&self, event: &EventFd, address: u64, value: u32) -> Result<(), HalError>;
}

/// One virtual processor; runs on the thread that owns it.
pub trait Vcpu: Send {
    /// Makes this processor one of `count` that are about to start: CPUID, MSRs and LAPIC are set. Index 0 is the boot
    /// processor and starts at `entry`, with page tables and GDT written to guest memory; the others wait for INIT and SIPI.
    ///
    /// # Errors
    /// [`HalError`] names the step; one is that the VM has no memory yet.
    fn boot(&mut self, count: u8, entry: VcpuEntry) -> Result<(), HalError>;

    /// Everything that [`Self::restore`] needs to go on from here. Completes a pending port or MMIO access first, without
    /// running guest code. Afterwards the next [`Self::run`] returns [`Exit::Interrupted`], as after a [`Kick::kick`].
    ///
    /// # Errors
    /// [`HalError`] names the step; one is that the pending access was only the first of several.
    fn save(&mut self) -> Result<VcpuState, HalError>;

    /// Makes this processor, which has neither been booted nor run, go on from a saved state of the same index. A state
    /// from a file is not trusted: an impossible one is an error, or else ends in a guest that fails.
    ///
    /// # Errors
    /// [`HalError`] names the step; one is that the VM has no memory yet.
    fn restore(&mut self, state: &VcpuState) -> Result<(), HalError>;

    /// Runs the guest until it needs something.
    ///
    /// # Errors
    /// [`HalError`] when the hypervisor fails; the guest's own faults are exits.
    fn run(&mut self) -> Result<Exit<'_>, HalError>;

    /// When set, the next [`Self::run`] completes a pending port or MMIO access and returns [`Exit::Interrupted`] without
    /// running guest code.
    fn set_immediate_exit(&mut self, on: bool);

    /// Tells a guest that uses the hypervisor's clock that its processor stood still for a while, so that its watchdogs
    /// do not take the time for a stall. Of no effect on guests that do not.
    fn note_pause(&mut self);

    /// A handle by which any other thread gets this vCPU out of [`Self::run`].
    fn kicker(&self) -> Arc<dyn Kick>;
}

/// Interrupts one vCPU from another thread.
///
/// The pattern without a race: the other thread stores its request, then kicks. The vCPU's thread, whenever it gets
/// [`Exit::Interrupted`], first calls [`Vcpu::set_immediate_exit`]`(false)` and then looks at the requests. A kick that
/// comes between that look and the next run makes the next run return at once, so none is lost.
pub trait Kick: Send + Sync {
    /// Makes the current run, or else the next one, return [`Exit::Interrupted`]; stays in force, as
    /// [`Vcpu::set_immediate_exit`]`(true)` does, until that is called with `false`. Harmless after the vCPU has gone.
    fn kick(&self);
}

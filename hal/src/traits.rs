//! The seams: what a hypervisor, a VM and a vCPU can be asked, and what a vCPU's exit is.

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

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
    /// A VM over `memory`, with in-kernel irqchip (PIC, IOAPIC, PIT as Linux wants it) and clock, ready for vCPUs.
    ///
    /// # Errors
    /// [`HalError`] names the step.
    fn create_vm(&self, memory: GuestMemoryMmap) -> Result<Arc<dyn Vm>, HalError>;
}

/// One VM.
pub trait Vm: Send + Sync {
    /// A vCPU with CPUID, MSRs and LAPIC set for processor `index` of `count`. Index 0 is the boot processor and starts at
    /// `entry`; the others wait for INIT and SIPI.
    ///
    /// # Errors
    /// [`HalError`] names the step.
    fn create_vcpu(&self, index: u8, count: u8, entry: VcpuEntry) -> Result<Box<dyn Vcpu>, HalError>;

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

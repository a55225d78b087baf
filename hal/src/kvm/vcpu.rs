//! One virtual processor.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_cpuid_entry2,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::kick::RunPage;
use super::vm::Inner;
use super::{boot, cpuid, failed, state};
use crate::{Exit, HalError, Kick, SystemEvent, Vcpu, VcpuEntry, VcpuState};

/// A vCPU made by KVM.
pub(super) struct KvmVcpu {
    index: u8,
    fd: VcpuFd,
    page: Arc<RunPage>,
    /// What the guest was told of the processor; nothing before it was booted or restored.
    cpuid: Vec<kvm_cpuid_entry2>,
    /// The memory must stay mapped while this vCPU can run.
    vm: Arc<Inner>,
}

impl KvmVcpu {
    pub(super) fn new(vm: Arc<Inner>, index: u8) -> Result<Self, HalError> {
        let fd = vm.fd.create_vcpu(index.into()).map_err(failed("create a processor (KVM_CREATE_VCPU)"))?;
        let page = Arc::new(RunPage::map(&fd).map_err(failed("map the processor's shared page"))?);
        Ok(Self { index, fd, page, cpuid: Vec::new(), vm })
    }

    /// Completes the access of the last exit, if it was one. KVM writes the answer into the guest's registers only when the
    /// processor runs again.
    fn complete_access(&mut self) -> Result<(), HalError> {
        let what = "complete an access (KVM_RUN)";
        self.page.set_immediate_exit(true);
        match self.fd.run() {
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Ok(()),
            Err(error) => Err(failed(what)(error)),
            Ok(VcpuExit::Intr) => Ok(()),
            Ok(_) => Err(HalError { what, source: io::Error::other("the guest wants another one first") }),
        }
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.page.leave();
    }
}

impl Vcpu for KvmVcpu {
    fn boot(&mut self, count: u8, entry: VcpuEntry) -> Result<(), HalError> {
        let memory = self.vm.use_memory()?;
        let host = &self.vm.host;
        let processor = cpuid::Processor { index: self.index, count };
        let entries = cpuid::for_processor(&host.cpuid, processor, host.tsc_deadline);
        let cpuid = state::cpuid(&entries)?;
        self.fd.set_cpuid2(&cpuid).map_err(failed("describe the processor (KVM_SET_CPUID2)"))?;
        boot::set_xcr0(&self.fd, &cpuid)?;
        boot::set_msrs(&self.fd)?;
        // Only the boot processor gets registers: the others are in the state KVM_MP_STATE_UNINITIALIZED, and INIT and
        // SIPI set theirs.
        if self.index == 0 {
            boot::set_registers(&self.fd, &memory, entry)?;
        }
        self.cpuid = entries;
        Ok(())
    }

    fn save(&mut self) -> Result<VcpuState, HalError> {
        if self.cpuid.is_empty() {
            let source = io::Error::other("it was neither booted nor restored");
            return Err(HalError { what: "save a processor", source });
        }
        self.complete_access()?;
        state::save_vcpu(&self.fd, self.index, &self.cpuid, &self.vm.host.msrs)
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), HalError> {
        // KVM looks for the guest's clock page when the clock's MSR is set.
        self.vm.use_memory()?;
        state::restore_vcpu(&self.fd, self.index, state)?;
        self.cpuid.clone_from(&state.cpuid);
        Ok(())
    }

    fn run(&mut self) -> Result<Exit<'_>, HalError> {
        self.page.enter();
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            // EINTR: a signal or immediate_exit. EAGAIN: an application processor was woken by INIT or SIPI.
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                return Ok(Exit::Interrupted);
            }
            Err(error) => return Err(failed("run the processor (KVM_RUN)")(error)),
        };
        Ok(match exit {
            VcpuExit::IoIn(port, data) => Exit::IoIn { port, data },
            VcpuExit::IoOut(port, data) => Exit::IoOut { port, data },
            VcpuExit::MmioRead(addr, data) => Exit::MmioRead { addr, data },
            VcpuExit::MmioWrite(addr, data) => Exit::MmioWrite { addr, data },
            VcpuExit::Intr => Exit::Interrupted,
            VcpuExit::Hlt => Exit::Halt,
            VcpuExit::Shutdown => Exit::Shutdown,
            VcpuExit::SystemEvent(event, _) => Exit::System(match event {
                KVM_SYSTEM_EVENT_SHUTDOWN => SystemEvent::Shutdown,
                KVM_SYSTEM_EVENT_RESET => SystemEvent::Reset,
                KVM_SYSTEM_EVENT_CRASH => SystemEvent::Crash,
                other => SystemEvent::Other(other),
            }),
            VcpuExit::FailEntry(reason, _) => Exit::FailEntry { reason },
            VcpuExit::InternalError => Exit::InternalError { suberror: self.page.internal_error() },
            VcpuExit::Unsupported(reason) => Exit::Unknown { reason },
            _ => Exit::Unknown { reason: self.page.exit_reason() },
        })
    }

    fn set_immediate_exit(&mut self, on: bool) {
        self.page.set_immediate_exit(on);
    }

    fn note_pause(&mut self) {
        // KVM_KVMCLOCK_CTRL fails only for a guest without that clock.
        let _ = self.fd.kvmclock_ctrl();
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::<RunPage>::clone(&self.page)
    }
}

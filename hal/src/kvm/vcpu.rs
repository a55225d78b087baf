//! One virtual processor.

use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::kick::RunPage;
use super::vm::Inner;
use super::{boot, failed};
use crate::{Exit, HalError, Kick, SystemEvent, Vcpu, VcpuEntry};

/// A vCPU made by KVM.
pub(super) struct KvmVcpu {
    fd: VcpuFd,
    page: Arc<RunPage>,
    /// The memory must stay mapped while this vCPU can run.
    _vm: Arc<Inner>,
}

impl KvmVcpu {
    pub(super) fn new(vm: Arc<Inner>, index: u8, cpuid: &CpuId, entry: VcpuEntry) -> Result<Self, HalError> {
        let fd = vm.fd.create_vcpu(index.into()).map_err(failed("create a processor (KVM_CREATE_VCPU)"))?;
        fd.set_cpuid2(cpuid).map_err(failed("describe the processor (KVM_SET_CPUID2)"))?;
        boot::set_xcr0(&fd, cpuid)?;
        boot::set_msrs(&fd)?;
        // Only the boot processor gets registers: the others are in the state KVM_MP_STATE_UNINITIALIZED, and INIT and
        // SIPI set theirs.
        if index == 0 {
            boot::set_registers(&fd, &vm.memory, entry)?;
        }
        let page = Arc::new(RunPage::map(&fd).map_err(failed("map the processor's shared page"))?);
        Ok(Self { fd, page, _vm: vm })
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.page.leave();
    }
}

impl Vcpu for KvmVcpu {
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

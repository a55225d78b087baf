//! One VM: memory slots, interrupt controllers, timer, eventfds.

use std::io;
use std::sync::{Arc, OnceLock};

use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_PIT_SPEAKER_DUMMY, KVM_PMU_CAP_DISABLE, kvm_enable_cap, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::vcpu::KvmVcpu;
use super::{Host, failed, state};
use crate::{HalError, Vcpu, Vm, VmState};

/// One page for the identity map and three for the task state segment that KVM needs on Intel processors which cannot run
/// real mode natively, just below the firmware's usual place and inside the MMIO gap.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
const TSS_ADDRESS: usize = 0xfffb_d000;

/// `KVM_CREATE_VM` ends early with EINTR when a signal is pending; so often it is tried again.
const CREATE_ATTEMPTS: u32 = 10;

/// What stays as long as the VM or one of its processors does: the kernel's handle and the memory behind the slots.
pub(super) struct Inner {
    pub(super) fd: VmFd,
    memory: OnceLock<GuestMemoryMmap>,
    pub(super) host: Arc<Host>,
}

impl Inner {
    /// The guest's memory, once it has some.
    pub(super) fn memory(&self) -> Result<&GuestMemoryMmap, HalError> {
        self.memory.get().ok_or_else(|| HalError {
            what: "set up a processor",
            source: io::Error::other("the VM has no memory yet"),
        })
    }
}

/// A VM made by KVM.
pub(super) struct KvmVm {
    inner: Arc<Inner>,
}

impl KvmVm {
    pub(super) fn new(kvm: &kvm_ioctls::Kvm, host: Arc<Host>) -> Result<Self, HalError> {
        let fd = create(kvm).map_err(failed("create the VM (KVM_CREATE_VM)"))?;
        turn_off_performance_counters(&fd)?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(failed("place the identity map (KVM_SET_IDENTITY_MAP_ADDR)"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(failed("place the task state segment (KVM_SET_TSS_ADDR)"))?;
        fd.create_irq_chip().map_err(failed("create the interrupt controllers (KVM_CREATE_IRQCHIP)"))?;
        // The dummy answers the speaker's port 0x61 in the kernel; Linux measures the TSC's speed with it.
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(failed("create the timer (KVM_CREATE_PIT2)"))?;
        Ok(Self { inner: Arc::new(Inner { fd, memory: OnceLock::new(), host }) })
    }
}

fn create(kvm: &kvm_ioctls::Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    let mut attempt = 1;
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR && attempt < CREATE_ATTEMPTS => attempt += 1,
            result => return result,
        }
    }
}

/// Guests are not trusted, and performance counters tell much about what else the processor does. Kernels before 5.18
/// cannot turn them off; there only CPUID denies them.
fn turn_off_performance_counters(fd: &VmFd) -> Result<(), HalError> {
    let possible = fd.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    if possible & KVM_PMU_CAP_DISABLE.cast_signed() == 0 {
        return Ok(());
    }
    let disable = kvm_enable_cap {
        cap: KVM_CAP_PMU_CAPABILITY,
        args: [KVM_PMU_CAP_DISABLE.into(), 0, 0, 0],
        ..Default::default()
    };
    fd.enable_cap(&disable).map_err(failed("turn off performance counters (KVM_CAP_PMU_CAPABILITY)"))
}

impl Vm for KvmVm {
    fn set_memory(&self, memory: GuestMemoryMmap) -> Result<(), HalError> {
        let what = "give the VM its memory (KVM_SET_USER_MEMORY_REGION)";
        self.inner
            .memory
            .set(memory)
            .map_err(|_| HalError { what, source: io::Error::other("it has some already") })?;
        for (slot, region) in (0..).zip(self.inner.memory()?.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the regions do not overlap (GuestMemoryMmap sees to that), and `Inner` keeps them mapped as long as
            // the VM or one of its vCPUs can run.
            unsafe { self.inner.fd.set_user_memory_region(slot) }.map_err(failed(what))?;
        }
        Ok(())
    }

    fn create_vcpu(&self, index: u8) -> Result<Box<dyn Vcpu>, HalError> {
        Ok(Box::new(KvmVcpu::new(Arc::clone(&self.inner), index)?))
    }

    fn save(&self) -> Result<VmState, HalError> {
        state::save_vm(&self.inner.fd)
    }

    fn restore(&self, state: &VmState) -> Result<(), HalError> {
        state::restore_vm(&self.inner.fd, state)
    }

    fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), HalError> {
        self.inner.fd.register_irqfd(event, gsi).map_err(failed("connect an interrupt line (KVM_IRQFD)"))
    }

    fn register_ioeventfd(&self, event: &EventFd, address: u64, value: u32) -> Result<(), HalError> {
        self.inner
            .fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(failed("connect a doorbell (KVM_IOEVENTFD)"))
    }
}

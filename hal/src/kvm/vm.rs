//! One VM: memory slots, interrupt controllers, timer, eventfds.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_PIT_SPEAKER_DUMMY, KVM_PMU_CAP_DISABLE, kvm_enable_cap, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use super::vcpu::KvmVcpu;
use super::{Host, failed, state};
use crate::{HalError, Vcpu, Vm, VmState};

/// One page for the identity map and three for the task state segment that KVM needs on Intel processors which cannot run
/// real mode natively, just below the firmware's usual place and inside the MMIO gap.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
const TSS_ADDRESS: usize = 0xfffb_d000;

const SET_MEMORY: &str = "give the VM its memory (KVM_SET_USER_MEMORY_REGION)";

/// `KVM_CREATE_VM` ends early with EINTR when a signal is pending; so often it is tried again.
const CREATE_ATTEMPTS: u32 = 10;

/// What stays as long as the VM or one of its processors does: the kernel's handle and the memory behind the slots.
pub(super) struct Inner {
    pub(super) fd: VmFd,
    memory: Mutex<Memory>,
    pub(super) host: Arc<Host>,
}

/// The memory behind the slots.
#[derive(Default)]
struct Memory {
    given: Option<GuestMemoryMmap>,
    /// A vCPU may know of it by now.
    is_in_use: bool,
}

impl Inner {
    fn lock_memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest's memory, which from now on cannot be replaced.
    pub(super) fn use_memory(&self) -> Result<GuestMemoryMmap, HalError> {
        let mut memory = self.lock_memory();
        let given = memory.given.clone().ok_or_else(|| HalError {
            what: "set up a processor",
            source: io::Error::other("the VM has no memory yet"),
        })?;
        memory.is_in_use = true;
        Ok(given)
    }

    /// Has slot `number` show `region`, or nothing where its size is 0.
    ///
    /// # Safety
    /// The region has to stay mapped until another is set in its place or the VM has gone.
    unsafe fn set_slot(&self, number: u32, region: &GuestRegionMmap, size: u64) -> Result<(), HalError> {
        let slot = kvm_userspace_memory_region {
            slot: number,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: size,
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the regions do not overlap (GuestMemoryMmap sees to that) and stay mapped, as the caller promises.
        unsafe { self.fd.set_user_memory_region(slot) }.map_err(failed(SET_MEMORY))
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
        Ok(Self { inner: Arc::new(Inner { fd, memory: Mutex::default(), host }) })
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
        let mut current = self.inner.lock_memory();
        if current.is_in_use {
            let source = io::Error::other("a processor knows what it has already");
            return Err(HalError { what: SET_MEMORY, source });
        }
        for (slot, region) in (0..).zip(current.given.iter().flat_map(GuestMemoryMmap::iter)) {
            // SAFETY: of a size of 0 nothing is shown.
            unsafe { self.inner.set_slot(slot, region, 0) }?;
        }
        // What was there is no longer shown, so it may be unmapped.
        let given = current.given.insert(memory);
        for (slot, region) in (0..).zip(given.iter()) {
            // SAFETY: `Inner` keeps it mapped as long as the VM or one of its vCPUs can run, or until it is replaced above.
            unsafe { self.inner.set_slot(slot, region, region.len()) }?;
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

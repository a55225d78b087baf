//! The real hypervisor: Linux KVM on x86-64.
//!
//! [`Kvm::open`] checks that the host has what a VM needs; [`Kvm`] then makes VMs (`vm`), these make processors
//! (`vcpu`) whose CPUID (`cpuid`), MSRs and first registers (`boot`) are set before they first run, or which go on from a
//! saved state (`state`) if this host's processor has all that the saved one had (`processor`).

mod boot;
mod cpuid;
mod kick;
pub(crate) mod processor;
mod state;
mod vcpu;
mod vm;

use std::io;
use std::path::Path;
use std::sync::Arc;

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::Cap;

use crate::{HalError, Hypervisor, Vm};

pub(crate) use boot::PAGE_TABLES;
pub use boot::{BOOT_AREA_END, BOOT_AREA_START};
pub use processor::{ForeignProcessor, Processor};
pub use state::{VcpuState, VmState};

/// Where KVM lives.
const DEVICE: &str = "/dev/kvm";

/// The only API version there ever was (Documentation/virt/kvm/api.rst, 4.1).
const API_VERSION: i32 = 12;

/// Why KVM cannot be used at all. Each message says what to do next.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The device file is not there.
    #[error(
        "{DEVICE} does not exist: load the module (modprobe kvm_intel or kvm_amd), turn on virtualisation in the \
         firmware, or in a cloud choose a machine type with nested virtualisation"
    )]
    Missing,
    /// The device file is there, the hardware or the module is not.
    #[error(
        "{DEVICE} exists but no hardware virtualisation is behind it: turn on VT-x or AMD-V in the firmware, or in a \
         cloud choose a machine type with nested virtualisation"
    )]
    NoHardware,
    /// Not allowed.
    #[error(
        "no permission to open {DEVICE}: add yourself to its group (sudo usermod -aG kvm $USER, then log in again)"
    )]
    Permission,
    /// Somebody has it for himself.
    #[error(
        "{DEVICE} is busy: another hypervisor (VirtualBox, VMware) uses the processor's virtualisation; end it"
    )]
    Busy,
    /// Something else has the name.
    #[error(
        "{DEVICE} is not KVM's device: remove it and load the module again (modprobe kvm_intel or kvm_amd)"
    )]
    NotKvm,
    /// Not the stable API.
    #[error("{DEVICE} speaks KVM API version {0}, not {API_VERSION}: update the host's kernel")]
    Version(i32),
    /// Something every VM needs is missing.
    #[error("this host's KVM has no {0}: update the host's kernel")]
    Lacks(&'static str),
    /// It does not say what it can give to guests.
    #[error("this host's KVM does not list its {what}: {source}; update the host's kernel")]
    Unlisted {
        /// What was asked for, with the ioctl's name.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Anything else.
    #[error("{DEVICE} cannot be opened: {0}; see the kernel's log (dmesg)")]
    Other(io::Error),
}

impl OpenError {
    fn from_errno(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOENT) => Self::Missing,
            Some(libc::ENODEV | libc::ENXIO) => Self::NoHardware,
            Some(libc::EACCES | libc::EPERM) => Self::Permission,
            Some(libc::EBUSY) => Self::Busy,
            _ => Self::Other(error),
        }
    }
}

/// What a VM cannot do without, by the name the user could look up.
const NEEDED: [(Cap, &str); 6] = [
    (Cap::Irqchip, "in-kernel interrupt controller (KVM_CAP_IRQCHIP)"),
    (Cap::UserMemory, "user memory regions (KVM_CAP_USER_MEMORY)"),
    (Cap::Pit2, "in-kernel timer (KVM_CAP_PIT2)"),
    (Cap::Irqfd, "irqfd (KVM_CAP_IRQFD)"),
    (Cap::Ioeventfd, "ioeventfd (KVM_CAP_IOEVENTFD)"),
    (Cap::ImmediateExit, "immediate exit (KVM_CAP_IMMEDIATE_EXIT)"),
];

/// What this host's KVM gives to guests; the same for all VMs.
#[derive(Debug)]
struct Host {
    /// `KVM_GET_SUPPORTED_CPUID`.
    cpuid: Vec<kvm_cpuid_entry2>,
    /// The in-kernel APIC has the TSC-deadline mode; old kernels do not say so in the list above.
    tsc_deadline: bool,
    /// The MSRs that make up a processor's state, [`state::msrs`].
    msrs: Vec<u32>,
}

impl Host {
    fn read(kvm: &kvm_ioctls::Kvm) -> Result<Self, OpenError> {
        let unlisted = |what| move |e: kvm_ioctls::Error| OpenError::Unlisted { what, source: e.into() };
        let cpuid = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(unlisted("processor's features (KVM_GET_SUPPORTED_CPUID)"))?;
        let listed = kvm.get_msr_index_list().map_err(unlisted("MSRs (KVM_GET_MSR_INDEX_LIST)"))?;
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            msrs: state::msrs(listed.as_slice()),
        })
    }
}

/// An open `/dev/kvm` with everything a VM needs.
#[derive(Debug)]
pub struct Kvm {
    kvm: kvm_ioctls::Kvm,
    host: Arc<Host>,
}

impl Kvm {
    /// Opens `/dev/kvm` and checks version and capabilities. That it can really run a guest only [`crate::probe`] knows.
    ///
    /// # Errors
    /// [`OpenError`], each with what to do.
    pub fn open() -> Result<Self, OpenError> {
        Self::open_at(Path::new(DEVICE))
    }

    fn open_at(path: &Path) -> Result<Self, OpenError> {
        let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())
            .map_err(|e| OpenError::Other(io::Error::other(e)))?;
        let kvm = kvm_ioctls::Kvm::new_with_path(path).map_err(|e| OpenError::from_errno(e.into()))?;
        match kvm.get_api_version() {
            API_VERSION => {}
            // The ioctl itself failed.
            -1 => return Err(OpenError::NotKvm),
            version => return Err(OpenError::Version(version)),
        }
        if let Some((_, name)) = NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(OpenError::Lacks(name));
        }
        kick::install_handler().map_err(OpenError::Other)?;
        let host = Arc::new(Host::read(&kvm)?);
        Ok(Self { kvm, host })
    }
}

impl Hypervisor for Kvm {
    fn create_vm(&self) -> Result<Arc<dyn Vm>, HalError> {
        Ok(Arc::new(vm::KvmVm::new(&self.kvm, Arc::clone(&self.host))?))
    }

    fn check_processor(&self, vcpu: &VcpuState) -> Result<(), ForeignProcessor> {
        processor::check(&vcpu.cpuid, &self.host.cpuid)
    }

    fn processor(&self) -> Processor {
        Processor::of(&self.host.cpuid)
    }
}

/// Names the step that failed.
fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> HalError {
    move |error| HalError { what, source: error.into() }
}

//! What `ark-vmm run` is told: one JSON object, from a file or standard input.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::agent::{MIN_MEMORY_MIB, VCPUS};

/// Most disks of a VM: with vsock and rng they fill the interrupt lines set aside for virtio.
pub const MAX_DISKS: usize = 8;
/// Most bytes of the kernel command line (`COMMAND_LINE_SIZE` of Linux on x86, less its NUL).
pub const MAX_CMDLINE: usize = 2047;

/// One microVM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// ELF kernel (`vmlinux`).
    pub kernel: PathBuf,
    /// Uncompressed cpio archive for the kernel's initial root file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Appended to the command line the VMM builds.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cmdline: String,
    /// Virtual processors, 1 to 32.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Block devices: `/dev/vda`, `/dev/vdb`, … in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// Socket device; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// File the serial console is appended to; dropped when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<PathBuf>,
    /// Unix socket the VMM listens on for [`super::ControlRequest`]s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control_socket: Option<PathBuf>,
    /// File that receives the [`super::ExitRecord`] (written beside and renamed, so never half there).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_file: Option<PathBuf>,
    /// Words that mean nothing to the VMM and go into the manifest of every snapshot of this VM.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// One block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Raw file or block device.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

/// The socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// Context id of the guest, 3 or more.
    pub guest_cid: u32,
    /// Unix socket the VMM listens on (`CONNECT <port>\n`); the guest's connections to host port `n` go to
    /// `<uds_path>_<n>`.
    pub uds_path: PathBuf,
}

/// A configuration that no VM can be made from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not the JSON of a [`VmConfig`].
    #[error("the configuration is not valid: {0}")]
    Json(String),
    /// Too few or too many processors.
    #[error("{0} vCPUs cannot be had: ask for 1 to 32")]
    Vcpus(u32),
    /// Too little memory.
    #[error("{0} MiB of memory is too little for a guest: ask for {MIN_MEMORY_MIB} or more")]
    MemoryTooSmall(u64),
    /// More memory than the host has.
    #[error("{asked} MiB of memory is more than this host's {host} MiB: ask for less")]
    MemoryTooLarge {
        /// MiB asked for.
        asked: u64,
        /// MiB the host has.
        host: u64,
    },
    /// Too many disks.
    #[error("{0} disks are too many: at most {MAX_DISKS}")]
    Disks(usize),
    /// A reserved context id.
    #[error("vsock context id {0} is reserved: use 3 or more")]
    GuestCid(u32),
    /// Command line too long or not printable ASCII.
    #[error("the kernel command line must be printable ASCII of at most {MAX_CMDLINE} bytes")]
    Cmdline,
}

impl VmConfig {
    /// Checks every bound that does not depend on files.
    ///
    /// # Errors
    /// [`ConfigError`] names the field.
    pub fn check(&self, host_memory_mib: u64) -> Result<(), ConfigError> {
        check_size(self.vcpus, self.memory_mib, host_memory_mib)?;
        if self.disks.len() > MAX_DISKS {
            return Err(ConfigError::Disks(self.disks.len()));
        }
        if let Some(vsock) = &self.vsock
            && (vsock.guest_cid < 3 || vsock.guest_cid == u32::MAX)
        {
            return Err(ConfigError::GuestCid(vsock.guest_cid));
        }
        let printable = self.cmdline.bytes().all(|b| (b' '..=b'~').contains(&b));
        if !printable || self.cmdline.len() > MAX_CMDLINE {
            return Err(ConfigError::Cmdline);
        }
        Ok(())
    }
}

/// Checks processors and memory alone: `arkd` asks before it starts a VMM.
///
/// # Errors
/// [`ConfigError`] names the value and its bounds.
pub fn check_size(vcpus: u32, memory_mib: u64, host_memory_mib: u64) -> Result<(), ConfigError> {
    if !VCPUS.contains(&vcpus) {
        return Err(ConfigError::Vcpus(vcpus));
    }
    if memory_mib < MIN_MEMORY_MIB {
        return Err(ConfigError::MemoryTooSmall(memory_mib));
    }
    if memory_mib > host_memory_mib {
        return Err(ConfigError::MemoryTooLarge { asked: memory_mib, host: host_memory_mib });
    }
    Ok(())
}

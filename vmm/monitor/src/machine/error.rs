//! Why a machine cannot be put together, parked or saved.

use std::io;
use std::path::PathBuf;

use ark_devices::block::DiskError;
use ark_devices::bus::BusError;
use ark_devices::event_loop::StillBusy;
use ark_devices::serial::RestoreSerialError;
use ark_devices::virtio::mmio::PersistError;
use ark_devices::vsock::VsockError;
use ark_hal::memory::MemoryError;
use ark_hal::{ForeignProcessor, HalError};

use crate::acpi;
use crate::boot::BootError;
use crate::snapshot::SnapshotError;
use crate::vcpus::{self, StillRunning};

/// A machine that could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A disk's file cannot be opened.
    #[error("the disk {path} cannot be opened: {source}; check the path and its permissions")]
    OpenDisk {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A disk's file is not one.
    #[error("the disk {path} cannot be used: {source}")]
    Disk {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: DiskError,
    },
    /// The console's file cannot be used.
    #[error("the console log {path} cannot be opened: {source}; its directory must exist and be writable")]
    Console {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The socket device cannot listen.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// No guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The hypervisor refused.
    #[error(transparent)]
    Hypervisor(#[from] HalError),
    /// Descriptors or threads ran out.
    #[error("{what}: {source}; raise the limits on open files and processes")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Two devices at one address.
    #[error("the devices do not fit together: {0}; this is a defect")]
    Bus(#[from] BusError),
    /// Too many tables.
    #[error(transparent)]
    Acpi(#[from] acpi::TooLarge),
    /// The snapshot cannot be mapped.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The state in a snapshot is not one of a machine.
    #[error("the snapshot's state cannot be used: {0}; take it again")]
    State(String),
    /// The processors in a snapshot are not like this host's.
    #[error("the snapshot cannot be used here: {0}")]
    Foreign(#[from] ForeignProcessor),
    /// The hypervisor does not take the state in a snapshot.
    #[error("the snapshot's state is refused: {0}; take it again, on this kind of host")]
    Refused(HalError),
    /// A device's state in a snapshot is not its own.
    #[error(transparent)]
    Device(#[from] PersistError),
    /// The serial port's state in a snapshot is none.
    #[error(transparent)]
    Serial(#[from] RestoreSerialError),
    /// More or fewer disks than the snapshot's.
    #[error(
        "the snapshot has {has} disks and {given} paths are given; give one path for each, in their order"
    )]
    DiskCount {
        /// The snapshot's.
        has: usize,
        /// Paths given.
        given: usize,
    },
    /// Another disk than the snapshot's.
    #[error(
        "the disk {path} has {found} sectors and the snapshot's has {wanted}; give a copy of the same image"
    )]
    OtherDisk {
        /// Its path.
        path: PathBuf,
        /// Sectors of 512 bytes that it has.
        found: u64,
        /// Sectors that it had.
        wanted: u64,
    },
    /// A socket too few or too many.
    #[error("{0}")]
    Socket(&'static str),
}

impl MachineError {
    pub(super) fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

/// A machine that does not stand still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParkError {
    /// A vCPU does not come back.
    #[error(transparent)]
    Vcpus(#[from] StillRunning),
    /// A device does not come back.
    #[error(transparent)]
    Devices(#[from] StillBusy),
}

/// A machine whose state could not be saved; it can go on.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// A vCPU's.
    #[error(transparent)]
    Vcpus(#[from] vcpus::SaveError),
    /// That of interrupt controllers and clock.
    #[error(transparent)]
    Vm(#[from] HalError),
    /// A device's.
    #[error(transparent)]
    Device(#[from] PersistError),
}

//! `arkd` ↔ `ark-vmm`: configuration, control socket, snapshots, end record.

mod config;
mod control;
mod exit;
mod snapshot;
mod state;

pub use config::{ConfigError, DiskConfig, MAX_CMDLINE, MAX_DISKS, VmConfig, VsockConfig, check_size};
pub use control::{ControlReply, ControlRequest, DeviceMetrics, MAX_CONTROL_LINE, VmMetrics};
pub use exit::{ExitReason, ExitRecord};
pub use snapshot::{
    BadHex, Generation, MAX_CHAIN, ProcessorModel, RestoreConfig, RunConfig, SNAPSHOT_VERSION, SnapshotBase,
    SnapshotId, SnapshotManifest, SnapshotReport,
};
pub use state::VmState;

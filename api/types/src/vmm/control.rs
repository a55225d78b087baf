//! The control socket: one JSON object per line each way, one reply per request, in order.

use serde::{Deserialize, Serialize};

use std::path::PathBuf;

use super::{SnapshotReport, VmState};

/// Most bytes of one line; a longer one is refused and the connection closed.
pub const MAX_CONTROL_LINE: usize = 64 << 10;

/// What a VMM can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "do")]
pub enum ControlRequest {
    /// Where the VM is in its life.
    State,
    /// Stop the vCPUs.
    Pause,
    /// Let them go on.
    Resume,
    /// Ask the guest to power off; after `grace_ms` end it. The reply says that it has begun.
    Stop {
        /// Time the guest has, milliseconds; 0 ends it at once.
        grace_ms: u64,
    },
    /// Counters.
    Metrics,
    /// Take a snapshot, of a running VM or a paused one, into the directory `dir`, which must not exist. A running VM stands
    /// still for a moment only; the reply comes when every byte is on disk. One at a time; one whose client hangs up is given up.
    Snapshot {
        /// Directory to make, absolute.
        dir: PathBuf,
    },
    /// Give the memory of a paused VM back to the host: from here on it is read from the snapshot in `dir`, which must have
    /// been taken since the VM was paused.
    Reclaim {
        /// Directory of the snapshot.
        dir: PathBuf,
    },
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum ControlReply {
    /// The state after the request took effect.
    State {
        /// Where the VM is in its life.
        state: VmState,
    },
    /// Counters.
    Metrics(VmMetrics),
    /// The snapshot is on disk.
    Snapshot(SnapshotReport),
    /// The request was not carried out.
    Refused {
        /// Why, as a sentence.
        why: String,
    },
}

/// Counters since the VM started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmMetrics {
    /// When this VMM first entered the guest, nanoseconds of its host's `CLOCK_MONOTONIC`; 0 before. Whoever started the
    /// VMM subtracts its own reading of that clock.
    pub first_run_ns: u64,
    /// VM exits handled in user space, all vCPUs.
    pub exits: u64,
    /// Bytes of guest memory that the host holds for this VM alone, in RAM or swap; what a restored VM shares with its
    /// snapshot's file is not counted.
    pub guest_resident_bytes: u64,
    /// One entry per device.
    pub devices: Vec<DeviceMetrics>,
}

/// Counters of one device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceMetrics {
    /// `block0`, `vsock`, `rng`, `serial`.
    pub name: String,
    /// Named counters, for example `read_bytes`.
    pub counters: std::collections::BTreeMap<String, u64>,
}

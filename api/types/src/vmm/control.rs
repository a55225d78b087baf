//! The control socket: one JSON object per line each way, one reply per request, in order.

use serde::{Deserialize, Serialize};

use super::VmState;

/// Most bytes of one line; a longer one is refused and the connection closed.
pub const MAX_CONTROL_LINE: usize = 64 << 10;

/// What a VMM can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// The request was not carried out.
    Refused {
        /// Why, as a sentence.
        why: String,
    },
}

/// Counters since the VM started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmMetrics {
    /// From the VMM's start to the first guest instruction, microseconds.
    pub start_us: u64,
    /// VM exits handled in user space, all vCPUs.
    pub exits: u64,
    /// Bytes of guest memory that is resident on the host.
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

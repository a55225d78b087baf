//! Health of a host: what runs, where, and whether its KVM is usable.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Reply of `GET /v1/health`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// `ok` when agents can be created.
    pub status: HealthStatus,
    /// Version of `arkd`.
    pub version: String,
    /// Process id of `arkd` on its host.
    pub pid: u32,
    /// Where agents run.
    pub host: HostKind,
    /// What the probe said when `arkd` started.
    pub kvm: ProbeReport,
    /// Processors of that host.
    pub cpus: u32,
    /// Memory of that host, MiB.
    pub memory_mib: u64,
    /// Living agents.
    pub agents: u32,
    /// Uptime of `arkd`, milliseconds.
    pub uptime_ms: u64,
    /// The log of events.
    #[serde(default)]
    pub log: LogHealth,
}

/// State of the log of events.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LogHealth {
    /// Whether it takes events in.
    pub state: LogState,
    /// Position of its newest event.
    pub newest: u64,
    /// Why it takes none in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// Whether the log of events takes events in. It recovers by itself as soon as it can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogState {
    /// It does.
    #[default]
    Writable,
    /// There is no room on its disk.
    Full,
    /// It cannot be written for another reason.
    Failing,
}

/// Whether agents can be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HealthStatus {
    /// They can.
    Ok,
    /// They cannot: see `kvm`.
    Degraded,
    /// Nothing can be created, changed or removed: see `log`.
    ReadOnly,
}

/// Where agents run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HostKind {
    /// On this machine's own KVM.
    Native,
    /// In the emulated host that `ark machine` started.
    Machine,
}

/// Answer of the host probe (`ark-vmm probe`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProbeReport {
    /// Whether a guest reached ring 3, came back by `SYSCALL` and wrote to a port.
    pub usable: bool,
    /// Why not, as a sentence, or what was shown.
    pub reason: String,
    /// How long the probe took, microseconds.
    pub duration_us: u64,
}

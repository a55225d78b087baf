//! What agents use: processors, memory, devices.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::{AgentName, AgentState};
use crate::image::ImageName;

/// Most agents whose use is told at a time: each costs the host a look into its memory.
pub const MAX_STATS: usize = 1000;

/// What one agent uses, as its host sees it. What cannot be told now is absent: of an agent without a VMM, all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AgentStats {
    /// The agent's id.
    pub id: String,
    /// The agent's name.
    pub name: AgentName,
    /// Image it, or what it was forked from, was booted from.
    pub image: ImageName,
    /// Where the agent is in its life.
    pub state: AgentState,
    /// When it was created, milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// Age of the guest's last heartbeat, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat_age_ms: Option<u64>,
    /// Memory the agent was promised, MiB.
    pub memory_mib: u64,
    /// Virtual processors.
    pub vcpus: u32,
    /// When the figures below were taken, milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
    /// Processor time that its VMM has used, guest included, microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_us: Option<u64>,
    /// Memory of its VMM, guest included, where each page counts by the part of it that is this VMM's (PSS), bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pss_bytes: Option<u64>,
    /// Memory of its VMM, guest included, shared pages counted whole (RSS), bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rss_bytes: Option<u64>,
    /// Guest memory that is this agent's alone, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_bytes: Option<u64>,
    /// VM exits that its VMM handled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exits: Option<u64>,
    /// Counters of its devices, by device and counter.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub devices: BTreeMap<String, BTreeMap<String, u64>>,
}

/// Reply of `GET /v1/stats`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StatsList {
    /// Living agents, oldest first, at most 1,000.
    pub agents: Vec<AgentStats>,
    /// Living agents beyond those.
    pub left_out: u32,
}

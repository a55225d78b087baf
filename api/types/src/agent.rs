//! Agents: a program's home, one microVM each.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::checkpoint::{Checkpoint, CheckpointPolicy};
use crate::healing::{AgentHealth, Continuity, RestartPolicy};
use crate::health_check::HealthCheck;
use crate::image::ImageName;
use crate::label::{Labels, Owner};
use crate::permission::Permission;
use crate::scheduling::Spread;
use crate::vmm::{ExitRecord, SnapshotId};

/// Fewest and most virtual processors of an agent.
pub const VCPUS: std::ops::RangeInclusive<u32> = 1..=32;
/// Least memory of an agent, in MiB: below this the guest kernel cannot reach user space.
pub const MIN_MEMORY_MIB: u64 = 64;
/// Virtual processors when a request names none.
pub const DEFAULT_VCPUS: u32 = 1;
/// Memory in MiB when a request names none.
pub const DEFAULT_MEMORY_MIB: u64 = 256;

/// Agents of one page at most, and when a request does not say how many.
pub const MAX_AGENTS: usize = 1000;

/// Name of an agent: 1 to 63 characters of `a-z`, `0-9` and `-`, first and last a letter or digit (RFC 1123 label, so
/// that it can serve as the guest's hostname).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", example = "a1")]
pub struct AgentName(String);

/// A text that cannot be an agent's or image's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a valid name: use 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit"
)]
pub struct InvalidName(pub(crate) String);

/// Whether `text` is an RFC 1123 label in lower case.
pub(crate) fn is_label(text: &str) -> bool {
    let inner = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(inner)
        && bytes.first() != Some(&b'-')
        && bytes.last() != Some(&b'-')
}

impl TryFrom<String> for AgentName {
    type Error = InvalidName;
    fn try_from(text: String) -> Result<Self, InvalidName> {
        if is_label(&text) { Ok(Self(text)) } else { Err(InvalidName(text)) }
    }
}

impl FromStr for AgentName {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        text.to_owned().try_into()
    }
}

impl From<AgentName> for String {
    fn from(name: AgentName) -> String {
        name.0
    }
}

impl AsRef<str> for AgentName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for AgentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Body of `POST /v1/agents`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateAgent {
    /// Name, unique among living agents; `arkd` makes one up when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<AgentName>,
    /// Image to boot. Without `cold`, an agent of default size is forked from the image's default template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageName>,
    /// Template to fork from, instead of `image`; processors and memory are the template's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<AgentName>,
    /// Boot, even where a template is at hand.
    #[serde(default)]
    pub cold: bool,
    /// Virtual processors, 1 to 32; 1 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// Memory in MiB, 64 or more, bounded by the host's; 256 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// Environment variables every program of the agent starts with.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Delete the agent when its first streamed exec ends, or when none begins within a minute (`ark run`).
    #[serde(default)]
    pub auto_remove: bool,
    /// Labels, to select agents by.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Who it belongs to: quotas and fairness go by owners.
    #[serde(default, skip_serializing_if = "Owner::is_default")]
    pub owner: Owner,
    /// What it may use of the platform; nothing when absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Permission>,
    /// Whether it stands still while its calls of models wait for an answer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub freeze_on_inference: bool,
    /// Among those that wait for room the highest goes first; -100 to 100.
    #[serde(default, skip_serializing_if = "is_normal")]
    pub priority: i32,
    /// How long to wait for room, milliseconds, at most 600000; 30000 when absent; 0 does not wait, neither for room nor
    /// for a template that has to be built first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_timeout_ms: Option<u64>,
    /// Agents of the same group are spread across hosts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anti_affinity: Option<AgentName>,
    /// How strictly that is done.
    #[serde(default, skip_serializing_if = "Spread::is_soft")]
    pub spread: Spread,
    /// Whether it begins anew when its VMM ends; `never` when absent.
    #[serde(default, skip_serializing_if = "RestartPolicy::is_never")]
    pub restart: RestartPolicy,
    /// Remove it this long after its creation, seconds, at most a year; never when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_s: Option<u64>,
    /// Remove it when nothing was asked of it for so long while it ran, seconds, at most a year; never when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout_s: Option<u64>,
    /// How often a checkpoint of it is taken, for its restart policy to restore it from; none is when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<CheckpointPolicy>,
    /// How it is checked while it runs, besides its guest's heartbeats; by nothing else when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
}

/// Whether a priority is that of a request that names none.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
const fn is_normal(priority: &i32) -> bool {
    *priority == 0
}

/// Where an agent comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "from")]
pub enum Origin {
    /// It was booted.
    Boot,
    /// It was forked from a template.
    Template {
        /// The template's name.
        name: AgentName,
    },
    /// It was restored from a snapshot, or rewound to it.
    Snapshot {
        /// The snapshot's name.
        name: AgentName,
    },
    /// It was forked from a living agent.
    Fork {
        /// That agent's name.
        name: AgentName,
        /// That agent's id.
        id: String,
    },
    /// It was restored from a checkpoint of itself: what an agent began anew from, never what it was made of.
    Checkpoint {
        /// The snapshot that it is.
        snapshot: SnapshotId,
        /// When the agent was as it is there, milliseconds since the Unix epoch.
        taken_unix_ms: u64,
    },
}

/// An agent as `arkd` reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Agent {
    /// Identifier: 16 hexadecimal digits, never used twice.
    pub id: String,
    /// Name; wherever a path has `{agent}` both name and id are accepted.
    pub name: AgentName,
    /// Who it belongs to.
    #[serde(default)]
    pub owner: Owner,
    /// What it may use of the platform; nothing when absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Permission>,
    /// Whether it stands still while its calls of models wait for an answer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub freeze_on_inference: bool,
    /// Labels.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Where it comes from.
    pub origin: Origin,
    /// Image it, or what it was forked from, was booted from.
    pub image: ImageName,
    /// Digest of that image (`sha256:` and 64 hexadecimal digits).
    pub image_digest: String,
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Where the agent is in its life.
    pub state: AgentState,
    /// Why the state is [`AgentState::Failed`] or [`AgentState::Stopped`], as a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How its VMM ended, once it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExitRecord>,
    /// Process id of its VMM on the host that runs `arkd`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_pid: Option<u32>,
    /// Creation time, milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// From the start of `ark-vmm` to the guest's hello; of a fork, from the request to the last check; milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_ms: Option<u64>,
    /// What the guest said last, seconds apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat: Option<AgentHeartbeat>,
    /// Whether it goes away with its first streamed exec.
    pub auto_remove: bool,
    /// Whether it begins anew when its VMM ends; `never` when absent.
    #[serde(default, skip_serializing_if = "RestartPolicy::is_never")]
    pub restart: RestartPolicy,
    /// Remove it this long after its creation, seconds, at most a year; never when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_s: Option<u64>,
    /// Remove it when nothing was asked of it for so long while it ran, seconds, at most a year; never when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout_s: Option<u64>,
    /// How often a checkpoint of it is taken; none is when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<CheckpointPolicy>,
    /// Checkpoints that it could begin anew from, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checkpoints: Vec<Checkpoint>,
    /// Why the last checkpoint that was due was not taken, as a sentence; absent when it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_failure: Option<String>,
    /// How it is checked while it runs, besides its guest's heartbeats; by nothing else when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
    /// Whether its guest is heard and its checks pass while it runs.
    #[serde(default, skip_serializing_if = "AgentHealth::is_healthy")]
    pub health: AgentHealth,
    /// What its restarts cost it; absent before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continuity: Option<Continuity>,
    /// It has ended and begins anew then, milliseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backoff_until_unix_ms: Option<u64>,
    /// When nothing of it was left on the host, milliseconds since the Unix epoch; from then on it is history.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removed_unix_ms: Option<u64>,
}

impl Agent {
    /// Has `checkpoint`, the newest, among its checkpoints, and no more of them than its policy keeps.
    pub fn keep_checkpoint(&mut self, checkpoint: Checkpoint) {
        self.checkpoint_failure = None;
        self.checkpoints.push(checkpoint);
        let keep = self.checkpoint.map_or(1, |policy| policy.keep);
        let excess = self.checkpoints.len().saturating_sub(usize::try_from(keep).unwrap_or(usize::MAX));
        self.checkpoints.drain(..excess);
    }
}

/// Last sign of life of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AgentHeartbeat {
    /// When `arkd` received it, milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
    /// Guest uptime, milliseconds (guest-reported).
    pub uptime_ms: u64,
    /// Memory the guest could still hand out, KiB (guest-reported).
    pub mem_available_kib: u64,
    /// One-minute load average times 100 (guest-reported).
    pub load1_x100: u32,
}

/// Life of an agent. Legal moves are in [`AgentState::may_become`].
///
/// ```text
///      ┌────────────── rewind ──────────────┐
///      ▼                                    │
///  creating ──► running ◄──► paused ────────┤
///      ▲  │        │            │           │
///      │  │        └──► stopping ◄┘──► stopped ──┐
///      │  └────────────────┴─────────► failed ───┤
///      └───── restart, as its policy says ───────┘
/// ```
///
/// An agent that has ended begins anew by nothing but its [`RestartPolicy`], and says until when it waits for that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AgentState {
    /// Its VMM was started; the guest has not said hello or, restored, not passed every check.
    Creating,
    /// The guest takes commands.
    Running,
    /// Its processors stand still. Its memory is on disk, so it outlasts its VMM and `arkd`.
    Paused,
    /// Shutting down on request.
    Stopping,
    /// Ended on request, or the guest powered itself off.
    Stopped,
    /// Ended without being asked: see `reason` and `exit`.
    Failed,
}

impl AgentState {
    /// Whether the move from `self` to `next` is legal.
    #[must_use]
    pub const fn may_become(self, next: Self) -> bool {
        match (self, next) {
            (Self::Creating, Self::Running | Self::Paused | Self::Stopping | Self::Failed)
            | (
                Self::Running,
                Self::Creating | Self::Paused | Self::Stopping | Self::Stopped | Self::Failed,
            )
            | (Self::Paused, Self::Creating | Self::Running | Self::Stopping | Self::Failed)
            | (Self::Stopping, Self::Stopped | Self::Failed)
            | (Self::Stopped | Self::Failed, Self::Creating) => true,
            (Self::Creating, Self::Creating | Self::Stopped)
            | (Self::Running, Self::Running)
            | (Self::Paused, Self::Paused | Self::Stopped)
            | (Self::Stopping, Self::Creating | Self::Running | Self::Paused | Self::Stopping)
            | (
                Self::Stopped | Self::Failed,
                Self::Running | Self::Paused | Self::Stopping | Self::Stopped | Self::Failed,
            ) => false,
        }
    }
}

impl fmt::Display for AgentState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Creating => "creating",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        })
    }
}

/// Reply of `GET /v1/agents`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AgentList {
    /// Agents, oldest first.
    pub agents: Vec<Agent>,
    /// What to ask for next, as `cursor`; none when there are no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

//! Snapshots that users take, and forks of living agents.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::{Agent, AgentName};
use crate::checkpoint::CheckpointPolicy;
use crate::healing::RestartPolicy;
use crate::health_check::HealthCheck;
use crate::image::ImageName;
use crate::permission::Permission;

/// Most forks that one request can ask for.
pub const MAX_FORKS: u32 = 256;

/// Body of `POST /v1/agents/{agent}/snapshots`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// Name, unique among snapshots.
    pub name: AgentName,
}

/// Whether a snapshot holds all of the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotKind {
    /// All of it.
    Full,
    /// What changed since its base.
    Diff,
}

/// A snapshot of an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// Name.
    pub name: AgentName,
    /// Identity: 32 hexadecimal digits.
    pub id: String,
    /// Whether it holds all of the memory.
    pub kind: SnapshotKind,
    /// What it is a diff over: `template <name>`, `snapshot <name>`, or the id of one without a name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Name of the agent that it was taken of.
    pub agent: AgentName,
    /// That agent's image.
    pub image: ImageName,
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Bytes of memory that it holds itself.
    pub bytes: u64,
    /// How long the agent stood still for it, microseconds.
    pub pause_us: u64,
    /// From the request until it was on disk, microseconds.
    pub durable_us: u64,
    /// When it was taken, milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// Snapshots that are diffs over it, directly.
    pub children: u32,
    /// Living agents that were restored from it, directly.
    pub agents: u32,
    /// Whether it is a checkpoint of the agent: `arkd` took it, its name is its id, and it goes by itself.
    #[serde(default, skip_serializing_if = "is_false")]
    pub is_checkpoint: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
const fn is_false(is: &bool) -> bool {
    !*is
}

/// Reply of `GET /v1/snapshots`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotList {
    /// Snapshots, oldest first.
    pub snapshots: Vec<Snapshot>,
}

/// Body of `POST /v1/snapshots/{snapshot}/restore`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreSnapshot {
    /// Name of the new agent; `arkd` makes one up when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<AgentName>,
    /// What it may use of the platform, whatever the agent might that the snapshot is of; nothing when absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Permission>,
    /// Whether it stands still while its calls of models wait for an answer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub freeze_on_inference: bool,
    /// Whether it begins anew when its VMM ends, whatever the agent did that the snapshot is of; `never` when absent.
    #[serde(default, skip_serializing_if = "RestartPolicy::is_never")]
    pub restart: RestartPolicy,
    /// How often a checkpoint of it is taken, for its restart policy to restore it from; none is when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<CheckpointPolicy>,
    /// How it is checked while it runs, besides its guest's heartbeats; by nothing else when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
}

/// Body of `POST /v1/agents/{agent}/rewind`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RewindAgent {
    /// Name of a snapshot that was taken of this agent.
    pub snapshot: AgentName,
}

/// Body of `POST /v1/agents/{agent}/fork`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkAgent {
    /// How many forks, 1 to 256. They are called `<agent>-1`, `<agent>-2` and so on; numbers in use are passed over.
    #[serde(default = "one")]
    pub count: u32,
    /// What each may use of the platform, whatever the agent may; nothing when absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Permission>,
    /// Whether it stands still while its calls of models wait for an answer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub freeze_on_inference: bool,
    /// Whether each begins anew when its VMM ends, whatever the agent does; `never` when absent.
    #[serde(default, skip_serializing_if = "RestartPolicy::is_never")]
    pub restart: RestartPolicy,
    /// How often a checkpoint of each is taken, for its restart policy to restore it from; none is when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<CheckpointPolicy>,
    /// How each is checked while it runs, besides its guest's heartbeats; by nothing else when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
}

impl Default for ForkAgent {
    /// One fork, without further wishes.
    fn default() -> Self {
        Self {
            count: one(),
            allow: Vec::new(),
            freeze_on_inference: false,
            restart: RestartPolicy::Never,
            checkpoint: None,
            health_check: None,
        }
    }
}

const fn one() -> u32 {
    1
}

/// Reply of `POST /v1/agents/{agent}/fork`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Forked {
    /// The forks that passed every check, in the order of their numbers.
    pub agents: Vec<Agent>,
    /// Those that did not, and are gone.
    pub failed: Vec<FailedFork>,
    /// How long the agent stood still, microseconds.
    pub pause_us: u64,
    /// From the request until the branch was on disk, microseconds.
    pub durable_us: u64,
}

/// A fork that did not come to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FailedFork {
    /// The name it would have had.
    pub name: AgentName,
    /// Why not, as a sentence.
    pub why: String,
}

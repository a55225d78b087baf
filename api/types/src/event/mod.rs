//! What happened, as the log of `arkd` keeps and streams it.
//!
//! An event belongs to a [`Stream`], one per thing that lives, and has two numbers: its position among all events, and its
//! version within its stream. Both grow from 1 and are never used twice. An event never holds a secret.

mod inference;
mod stream;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::{Agent, AgentName, AgentState, Origin};
use crate::checkpoint::{Checkpoint, CheckpointPolicy};
use crate::healing::{AgentHealth, Continuity, RestartPolicy};
use crate::health_check::HealthCheck;
use crate::idempotency::KeptReply;
use crate::image::ImageName;
use crate::label::{Labels, Owner};
use crate::permission::Permission;
use crate::pool::PoolPolicy;
use crate::scheduling::Quota;
use crate::service::ServiceSpec;
use crate::task::{AttemptEnd, TaskSpec};
use crate::vmm::{ExitRecord, SnapshotId};

pub use inference::InferenceCall;
pub use stream::{InvalidStream, Stream};

/// Most events of one page.
pub const MAX_EVENTS: usize = 1000;
/// Events of one page when a request does not say how many.
pub const DEFAULT_EVENTS: usize = 100;

/// An event in the log, durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Recorded {
    /// Position among all events.
    pub position: u64,
    /// When it was recorded, milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
    /// What it belongs to.
    pub stream: Stream,
    /// Position within that.
    pub version: u64,
    /// What happened.
    pub event: Event,
}

/// What is settled about an agent for all its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AgentSpec {
    /// Identifier.
    pub id: String,
    /// Name.
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
    /// Image.
    pub image: ImageName,
    /// Digest of the image.
    pub image_digest: String,
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Creation time, milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
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
    /// How it is checked while it runs, besides its guest's heartbeats; by nothing else when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    // In a box, as most agents have none and every event is as large as this one.
    pub health_check: Option<Box<HealthCheck>>,
}

impl From<&Agent> for AgentSpec {
    fn from(agent: &Agent) -> Self {
        Self {
            id: agent.id.clone(),
            name: agent.name.clone(),
            owner: agent.owner.clone(),
            allow: agent.allow.clone(),
            freeze_on_inference: agent.freeze_on_inference,
            labels: agent.labels.clone(),
            origin: agent.origin.clone(),
            image: agent.image.clone(),
            image_digest: agent.image_digest.clone(),
            vcpus: agent.vcpus,
            memory_mib: agent.memory_mib,
            created_unix_ms: agent.created_unix_ms,
            auto_remove: agent.auto_remove,
            restart: agent.restart,
            ttl_s: agent.ttl_s,
            idle_timeout_s: agent.idle_timeout_s,
            checkpoint: agent.checkpoint,
            health_check: agent.health_check.clone().map(Box::new),
        }
    }
}

impl AgentSpec {
    /// The agent at its creation.
    #[must_use]
    pub fn newborn(self) -> Agent {
        Agent {
            id: self.id,
            name: self.name,
            owner: self.owner,
            allow: self.allow,
            freeze_on_inference: self.freeze_on_inference,
            labels: self.labels,
            origin: self.origin,
            image: self.image,
            image_digest: self.image_digest,
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            state: AgentState::Creating,
            reason: None,
            exit: None,
            vmm_pid: None,
            created_unix_ms: self.created_unix_ms,
            boot_ms: None,
            heartbeat: None,
            auto_remove: self.auto_remove,
            restart: self.restart,
            ttl_s: self.ttl_s,
            idle_timeout_s: self.idle_timeout_s,
            checkpoint: self.checkpoint,
            checkpoints: Vec::new(),
            checkpoint_failure: None,
            health_check: self.health_check.map(|check| *check),
            health: AgentHealth::Healthy,
            continuity: None,
            backoff_until_unix_ms: None,
            removed_unix_ms: None,
        }
    }
}

/// How an agent ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// On request, or by its own power-off.
    Stopped,
    /// Without being asked.
    Failed,
}

impl From<Outcome> for AgentState {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Stopped => Self::Stopped,
            Outcome::Failed => Self::Failed,
        }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type")]
pub enum Event {
    /// An agent was asked for and begins.
    #[serde(rename = "agent.created")]
    AgentCreated {
        /// What is settled about it.
        agent: AgentSpec,
    },
    /// Its guest takes commands.
    #[serde(rename = "agent.ready")]
    AgentReady {
        /// Time that it took, milliseconds.
        boot_ms: u64,
    },
    /// It stands still, with its memory on disk.
    #[serde(rename = "agent.paused")]
    AgentPaused {
        /// The snapshot of its memory.
        snapshot: String,
    },
    /// It goes on.
    #[serde(rename = "agent.resumed")]
    AgentResumed {},
    /// It went back to a snapshot and runs.
    #[serde(rename = "agent.rewound")]
    AgentRewound {
        /// Where it comes from now.
        origin: Origin,
    },
    /// Its labels were changed.
    #[serde(rename = "agent.labelled")]
    AgentLabelled {
        /// All that it has now.
        labels: Labels,
    },
    /// Its end was asked for.
    #[serde(rename = "agent.stopping")]
    AgentStopping {},
    /// Its VMM is no more.
    #[serde(rename = "agent.ended")]
    AgentEnded {
        /// Whether it was meant to.
        outcome: Outcome,
        /// Why, as a sentence.
        reason: String,
        /// What the VMM said.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        exit: Option<ExitRecord>,
    },
    /// Its VMM ended, and it will begin anew.
    #[serde(rename = "agent.restarting")]
    AgentRestarting {
        /// Why, as a sentence.
        cause: String,
        /// Which restart that is since it last ran well, from 1.
        attempt: u32,
        /// How long it waits first, milliseconds.
        after_ms: u64,
    },
    /// It began anew, and its guest takes commands.
    #[serde(rename = "agent.restarted")]
    AgentRestarted {
        /// What that cost it.
        continuity: Continuity,
        /// Time that it took, milliseconds.
        boot_ms: u64,
    },
    /// While it runs, its guest fell silent, or its checks failed too often in a row; or it is well again.
    #[serde(rename = "agent.health")]
    AgentHealthChanged {
        /// How it is.
        health: AgentHealth,
    },
    /// A checkpoint of it is on disk; those that are more than its policy keeps go.
    #[serde(rename = "agent.checkpointed")]
    AgentCheckpointed {
        /// The checkpoint.
        checkpoint: Checkpoint,
    },
    /// A checkpoint was due and was not taken; those that there are stay.
    #[serde(rename = "agent.checkpoint_failed")]
    AgentCheckpointFailed {
        /// Why, as a sentence.
        reason: String,
    },
    /// It was to be restored from a checkpoint that it could not be restored from; an older one is tried.
    #[serde(rename = "agent.checkpoint_unusable")]
    AgentCheckpointUnusable {
        /// The snapshot that the checkpoint is.
        snapshot: SnapshotId,
        /// Why, as a sentence.
        reason: String,
    },
    /// It is removed because it was told to go by itself.
    #[serde(rename = "agent.expired")]
    AgentExpired {
        /// Which of its limits is over, as a sentence.
        reason: String,
    },
    /// Nothing of it is left on the host.
    #[serde(rename = "agent.removed")]
    AgentRemoved {},
    /// From now on an owner may have so much; one without any bound may have everything.
    #[serde(rename = "owner.quota_set")]
    OwnerQuotaSet {
        /// What it may have.
        quota: Quota,
    },
    /// A model was called on behalf of an owner, and an inference VM had to do with it.
    #[serde(rename = "inference.called")]
    InferenceCalled {
        /// What is known of that.
        call: Box<InferenceCall>,
    },
    /// From now on there are to be so many standbys of a template.
    #[serde(rename = "pool.set")]
    PoolSet {
        /// How many.
        policy: PoolPolicy,
    },
    /// From now on a template has the standbys that every one in use has.
    #[serde(rename = "pool.removed")]
    PoolRemoved {},
    /// From now on a service is to be so.
    #[serde(rename = "service.set")]
    ServiceSet {
        /// How, without the values of its environment.
        service: Box<ServiceSpec>,
        /// Names of the environment's variables.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        env: Vec<String>,
        /// Generation that its replicas are made as.
        generation: u64,
        /// The request with a key that made it, if one did.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        request: Option<String>,
    },
    /// A service is to be no more, and its replicas neither.
    #[serde(rename = "service.removed")]
    ServiceRemoved {},
    /// A task was asked for and waits for its turn.
    #[serde(rename = "task.created")]
    TaskCreated {
        /// What is settled about it.
        task: TaskSpec,
    },
    /// An attempt begins.
    #[serde(rename = "task.started")]
    TaskStarted {
        /// Its number, from 1.
        attempt: u32,
        /// Id of its agent; absent when none came up.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        agent: Option<String>,
    },
    /// An attempt ended, and the task is not done.
    #[serde(rename = "task.attempt_failed")]
    TaskAttemptFailed {
        /// Its number.
        attempt: u32,
        /// How it ended.
        end: AttemptEnd,
        /// When the next one is made at the earliest, milliseconds since the Unix epoch; absent when there is nothing to wait for.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        retry_unix_ms: Option<u64>,
    },
    /// It is done.
    #[serde(rename = "task.succeeded")]
    TaskSucceeded {
        /// Number of the attempt that did it.
        attempt: u32,
        /// How that ended.
        end: AttemptEnd,
    },
    /// It is not tried any more.
    #[serde(rename = "task.failed")]
    TaskFailed {
        /// Why, as a sentence.
        reason: String,
    },
    /// It was not wanted any more.
    #[serde(rename = "task.cancelled")]
    TaskCancelled {},
    /// It took too long.
    #[serde(rename = "task.timed_out")]
    TaskTimedOut {
        /// What did, as a sentence.
        reason: String,
    },
    /// Nothing of it is left.
    #[serde(rename = "task.removed")]
    TaskRemoved {},
    /// A request with an `Idempotency-Key` is about to make something, which nobody was told of yet.
    #[serde(rename = "request.made")]
    RequestMade {
        /// SHA-256 of the key, hexadecimal.
        key: String,
        /// SHA-256 of what was asked for, as in [`KeptReply::request`].
        request: String,
        /// What.
        made: Stream,
    },
    /// It was carried out: who sends its key again gets the same reply.
    #[serde(rename = "request.answered")]
    RequestAnswered {
        /// SHA-256 of the key, hexadecimal.
        key: String,
        /// The reply.
        reply: KeptReply,
    },
    /// It came to nothing, and nothing of what it made is left: its key is free.
    #[serde(rename = "request.dropped")]
    RequestDropped {},
}

impl Event {
    /// Its `type` on the wire.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::AgentCreated { .. } => "agent.created",
            Self::AgentReady { .. } => "agent.ready",
            Self::AgentPaused { .. } => "agent.paused",
            Self::AgentResumed {} => "agent.resumed",
            Self::AgentRewound { .. } => "agent.rewound",
            Self::AgentLabelled { .. } => "agent.labelled",
            Self::AgentStopping {} => "agent.stopping",
            Self::AgentEnded { .. } => "agent.ended",
            Self::AgentRestarting { .. } => "agent.restarting",
            Self::AgentRestarted { .. } => "agent.restarted",
            Self::AgentHealthChanged { .. } => "agent.health",
            Self::AgentCheckpointed { .. } => "agent.checkpointed",
            Self::AgentCheckpointFailed { .. } => "agent.checkpoint_failed",
            Self::AgentCheckpointUnusable { .. } => "agent.checkpoint_unusable",
            Self::AgentExpired { .. } => "agent.expired",
            Self::AgentRemoved {} => "agent.removed",
            Self::OwnerQuotaSet { .. } => "owner.quota_set",
            Self::InferenceCalled { .. } => "inference.called",
            Self::PoolSet { .. } => "pool.set",
            Self::PoolRemoved {} => "pool.removed",
            Self::ServiceSet { .. } => "service.set",
            Self::ServiceRemoved {} => "service.removed",
            Self::TaskCreated { .. } => "task.created",
            Self::TaskStarted { .. } => "task.started",
            Self::TaskAttemptFailed { .. } => "task.attempt_failed",
            Self::TaskSucceeded { .. } => "task.succeeded",
            Self::TaskFailed { .. } => "task.failed",
            Self::TaskCancelled {} => "task.cancelled",
            Self::TaskTimedOut { .. } => "task.timed_out",
            Self::TaskRemoved {} => "task.removed",
            Self::RequestMade { .. } => "request.made",
            Self::RequestAnswered { .. } => "request.answered",
            Self::RequestDropped {} => "request.dropped",
        }
    }

    /// Whether nothing may follow it in its stream.
    #[must_use]
    pub const fn is_last(&self) -> bool {
        match self {
            Self::AgentRemoved {}
            | Self::TaskRemoved {}
            | Self::RequestAnswered { .. }
            | Self::RequestDropped {} => true,
            Self::AgentCreated { .. }
            | Self::AgentReady { .. }
            | Self::AgentPaused { .. }
            | Self::AgentResumed {}
            | Self::AgentRewound { .. }
            | Self::AgentLabelled { .. }
            | Self::AgentStopping {}
            | Self::AgentEnded { .. }
            | Self::AgentRestarting { .. }
            | Self::AgentRestarted { .. }
            | Self::AgentHealthChanged { .. }
            | Self::AgentCheckpointed { .. }
            | Self::AgentCheckpointFailed { .. }
            | Self::AgentCheckpointUnusable { .. }
            | Self::AgentExpired { .. }
            | Self::OwnerQuotaSet { .. }
            | Self::InferenceCalled { .. }
            | Self::PoolSet { .. }
            | Self::PoolRemoved {}
            | Self::ServiceSet { .. }
            | Self::ServiceRemoved {}
            | Self::TaskCreated { .. }
            | Self::TaskStarted { .. }
            | Self::TaskAttemptFailed { .. }
            | Self::TaskSucceeded { .. }
            | Self::TaskFailed { .. }
            | Self::TaskCancelled {}
            | Self::TaskTimedOut { .. } => false,
            Self::RequestMade { .. } => false,
        }
    }
}

/// Reply of `GET /v1/events`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EventList {
    /// Events, oldest first.
    pub events: Vec<Recorded>,
    /// What to ask for next, as `after`: the position up to which this page tells everything that matches.
    pub next_after: u64,
    /// Position of the newest event of all.
    pub newest: u64,
}

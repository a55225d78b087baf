//! What is reserved on hosts, who waits for room, and what each owner may have.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::AgentName;
use crate::label::Owner;

/// Lowest and highest priority of a request.
pub const PRIORITIES: std::ops::RangeInclusive<i32> = -100..=100;
/// How long a request waits for room when it does not say.
pub const DEFAULT_QUEUE_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest that a request may wait for room.
pub const MAX_QUEUE_TIMEOUT: Duration = Duration::from_secs(600);

/// An amount of what hosts have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Resources {
    /// Agents with processors; those that stand still on disk are not counted.
    pub agents: u64,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Virtual processors.
    pub vcpus: u64,
}

impl Resources {
    /// Whether `self` is no more than `free` in anything.
    #[must_use]
    pub const fn is_within(&self, free: &Self) -> bool {
        self.agents <= free.agents && self.memory_mib <= free.memory_mib && self.vcpus <= free.vcpus
    }

    /// Both together; what is beyond any number stays there.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            agents: self.agents.saturating_add(other.agents),
            memory_mib: self.memory_mib.saturating_add(other.memory_mib),
            vcpus: self.vcpus.saturating_add(other.vcpus),
        }
    }

    /// What is left of `self` without `other`, at least nothing.
    #[must_use]
    pub const fn minus(self, other: Self) -> Self {
        Self {
            agents: self.agents.saturating_sub(other.agents),
            memory_mib: self.memory_mib.saturating_sub(other.memory_mib),
            vcpus: self.vcpus.saturating_sub(other.vcpus),
        }
    }

    /// `count` times as much.
    #[must_use]
    pub const fn times(self, count: u64) -> Self {
        Self {
            agents: self.agents.saturating_mul(count),
            memory_mib: self.memory_mib.saturating_mul(count),
            vcpus: self.vcpus.saturating_mul(count),
        }
    }
}

/// How strictly the agents of an anti-affinity group are kept apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Spread {
    /// On the host with the fewest of them.
    #[default]
    Soft,
    /// Never two on a host: the request waits, or is refused.
    Hard,
}

impl Spread {
    /// Whether it is what a request has that says nothing.
    #[must_use]
    pub const fn is_soft(&self) -> bool {
        matches!(self, Self::Soft)
    }
}

/// Most that an owner's agents may have reserved together; what is absent is not bounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Quota {
    /// Agents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agents: Option<u64>,
    /// Memory, MiB, as it is reserved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// Virtual processors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u64>,
}

/// What an owner may have and has, as `GET /v1/owners/{owner}` has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OwnerQuota {
    /// Name.
    pub owner: Owner,
    /// What it may have.
    pub quota: Quota,
    /// What its agents have reserved.
    pub reserved: Resources,
    /// What its requests wait for.
    pub waiting: Resources,
}

/// Reply of `GET /v1/owners`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OwnerList {
    /// Owners that have a quota, agents or requests, by name.
    pub owners: Vec<OwnerQuota>,
}

/// A request that waits for room.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WaitingRequest {
    /// Where it stands: 1 is next.
    pub position: u64,
    /// Name that its agent is to have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<AgentName>,
    /// Who asks.
    pub owner: Owner,
    /// Priority.
    pub priority: i32,
    /// What it asks for.
    pub needs: Resources,
    /// What is missing, as a sentence.
    pub missing: String,
    /// How long it has waited, milliseconds.
    pub waited_ms: u64,
    /// How long it waits at most, milliseconds.
    pub timeout_ms: u64,
}

/// Reply of `GET /v1/queue`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RequestQueue {
    /// Requests that may wait.
    pub capacity: u64,
    /// Those that do, next one first.
    pub waiting: Vec<WaitingRequest>,
}

/// How many times over a host's resources are given away.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Overcommit {
    /// Its memory.
    pub memory: f64,
    /// Its processors.
    pub cpu: f64,
    /// How many times smaller than its memory the reservation of a fork is: it shares most pages with what it was forked from.
    pub forks: f64,
}

/// A host that agents run on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// Name.
    pub name: String,
    /// What it has; of agents, what it may have.
    pub capacity: Resources,
    /// How many times over that is given away.
    pub overcommit: Overcommit,
    /// What may be reserved in all.
    pub limit: Resources,
    /// What is reserved.
    pub reserved: Resources,
    /// What can still be reserved.
    pub free: Resources,
    /// What standbys of pools have beside that; any request that needs it gets it.
    #[serde(default)]
    pub standbys: Resources,
    /// Templates of which it has standbys.
    #[serde(default)]
    pub warm: Vec<AgentName>,
    /// Memory that everything on it uses, MiB.
    pub used_memory_mib: u64,
}

/// Reply of `GET /v1/hosts`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HostList {
    /// Hosts.
    pub hosts: Vec<Host>,
}

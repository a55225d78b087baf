//! Pools: how many forks of a template stand ready, and what decides it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::AgentName;
use crate::scheduling::Resources;

/// Most standbys of one template.
pub const MAX_STANDBYS: u32 = 200;
/// Longest wait that a pool may aim for, milliseconds.
pub const MAX_TARGET_WAIT_MS: u64 = 600_000;
/// Most templates that have a policy at a time.
pub const MAX_POOLS: usize = 32;

/// How many standbys of a template there are to be: body of `PUT /v1/pools/{template}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolPolicy {
    /// Standbys that there always are to be.
    pub min: u32,
    /// Most standbys, whatever the demand; at least `min`, at most 200.
    pub max: u32,
    /// How long an agent may have to wait for its turn to be made when demand is as it was lately, milliseconds, at most
    /// 600000; 0 has a standby for each.
    pub target_wait_ms: u64,
}

/// Why a policy is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPolicy {
    /// More than there may be.
    #[error("a pool of up to {0} standbys is too large: give a max of at most {MAX_STANDBYS}")]
    Max(u32),
    /// More at least than at most.
    #[error(
        "a pool cannot have at least {min} and at most {max} standbys: give a min that is not above the max"
    )]
    Min {
        /// At least.
        min: u32,
        /// At most.
        max: u32,
    },
    /// Longer than anybody waits.
    #[error("a target wait of {0} ms is out of bounds: give at most {MAX_TARGET_WAIT_MS} ms")]
    TargetWait(u64),
}

impl PoolPolicy {
    /// Checks its bounds.
    ///
    /// # Errors
    /// [`InvalidPolicy`].
    pub const fn check(&self) -> Result<(), InvalidPolicy> {
        let Self { min, max, target_wait_ms } = *self;
        if max > MAX_STANDBYS {
            return Err(InvalidPolicy::Max(max));
        }
        if min > max {
            return Err(InvalidPolicy::Min { min, max });
        }
        if target_wait_ms > MAX_TARGET_WAIT_MS {
            return Err(InvalidPolicy::TargetWait(target_wait_ms));
        }
        Ok(())
    }
}

/// The pool of a template, as `GET /v1/pools/{template}` has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Pool {
    /// The template.
    pub template: AgentName,
    /// What was set for it; absent where the standbys are those that every template in use has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<PoolPolicy>,
    /// Standbys that wait.
    pub standbys: u32,
    /// Standbys that there are to be now.
    pub wanted: u32,
    /// What the standbys have reserved; any request that needs it gets it.
    pub reserved: Resources,
    /// Agents that were made of a standby, since `arkd` started.
    pub hits: u64,
    /// Agents for which there was none.
    pub misses: u64,
    /// Agents that are asked for, per second, as it was lately.
    pub demand_per_s: f64,
    /// Time that making one standby takes, milliseconds; absent until one was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub make_ms: Option<u64>,
    /// How long the last agents waited; absent until there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait: Option<PoolWait>,
    /// Why no standby could be made last, as a sentence; absent where one could.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

/// How long agents of a template waited: from their room to their first sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolWait {
    /// Agents that it is told of, the last ones.
    pub agents: u32,
    /// Half of them waited no longer, milliseconds.
    pub p50_ms: u64,
    /// Of a hundred, 99 waited no longer, milliseconds.
    pub p99_ms: u64,
}

/// Reply of `GET /v1/pools`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PoolList {
    /// Pools that have a policy or whose template is in use, by template.
    pub pools: Vec<Pool>,
}

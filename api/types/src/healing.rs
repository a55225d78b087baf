//! What becomes of an agent whose VMM ends, or that nobody uses: its policy, and what is told of it afterwards.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::Origin;
use crate::checkpoint::Checkpoint;

/// Bounds of `max_restarts`.
pub const MAX_RESTARTS: std::ops::RangeInclusive<u32> = 1..=10_000;
/// Bounds of `ttl_s` and `idle_timeout_s`, seconds: a second to a year.
pub const LIFETIME_S: std::ops::RangeInclusive<u64> = 1..=365 * 86_400;

/// Whether an agent begins anew when its VMM ends without having been asked to.
///
/// It begins as it was at the newest of its checkpoints that can be used, or else as what it was made of; what it did since is
/// lost, and [`Continuity`] says so. The first restart is at once. Before each further one it waits, 1 s at first and twice as
/// long each time, 60 s at most, until it ran for 10 minutes without ending.
///
/// A checkpoint that the agent was restored from and ended again within 10 s, or three times without having run for 10 minutes,
/// is not used again: the next older one is, and without any the agent begins as what it was made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "when", rename_all = "snake_case", deny_unknown_fields)]
pub enum RestartPolicy {
    /// It stays as it ended.
    #[default]
    Never,
    /// When it failed; not when its guest powered itself off.
    OnFailure {
        /// Restarts until it ran for 10 minutes without ending, 1 to 10000; when absent, at most 5 within 10 minutes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        max_restarts: Option<u32>,
    },
    /// However it ended.
    Always {
        /// As of `on_failure`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        max_restarts: Option<u32>,
    },
}

impl RestartPolicy {
    /// Whether it is the policy of a request that names none.
    #[must_use]
    pub const fn is_never(&self) -> bool {
        matches!(self, Self::Never)
    }

    /// Its bound on restarts, if it has one.
    #[must_use]
    pub const fn max_restarts(self) -> Option<u32> {
        match self {
            Self::Never => None,
            Self::OnFailure { max_restarts } | Self::Always { max_restarts } => max_restarts,
        }
    }
}

impl fmt::Display for RestartPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Never => "never",
            Self::OnFailure { .. } => "on-failure",
            Self::Always { .. } => "always",
        })?;
        match self.max_restarts() {
            Some(max) => write!(f, ":{max}"),
            None => Ok(()),
        }
    }
}

/// Whether a running agent is well.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum AgentHealth {
    /// Its guest is heard, and its checks do not fail.
    #[default]
    Healthy,
    /// No heartbeat came for longer than three of them take, though its VMM is there.
    Unresponsive {
        /// When it was heard last, milliseconds since the Unix epoch.
        since_unix_ms: u64,
    },
    /// Its checks failed too often in a row, though its guest is heard.
    Unhealthy {
        /// When that was so, milliseconds since the Unix epoch.
        since_unix_ms: u64,
        /// How the last one failed, as a sentence.
        why: String,
    },
}

impl AgentHealth {
    /// Whether it is well.
    #[must_use]
    pub const fn is_healthy(&self) -> bool {
        matches!(self, Self::Healthy)
    }
}

/// What an agent's restarts cost it. It never claims state that was lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Continuity {
    /// Restarts in its whole life.
    pub restarts: u32,
    /// Why the last one was due, as a sentence.
    pub cause: String,
    /// What it began as then: a checkpoint of it; or a template or a boot, neither of which holds anything that it did before.
    pub restored_from: Origin,
    /// What it did in this time before it ended is lost, milliseconds: since that checkpoint; or, without one, since it last
    /// began as what it is made of.
    pub lost_ms: u64,
    /// When it ran again, milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
}

impl Continuity {
    /// Takes out of `checkpoints`, oldest first, those that are of a life that was lost: all that are newer than the one that the
    /// agent began anew from.
    pub fn drop_newer(&self, checkpoints: &mut Vec<Checkpoint>) {
        let is_from = |checkpoint: &Checkpoint| matches!(&self.restored_from, Origin::Checkpoint { snapshot, .. } if *snapshot == checkpoint.snapshot);
        let kept = checkpoints.iter().position(is_from).map_or(0, |index| index.saturating_add(1));
        checkpoints.truncate(kept);
    }
}

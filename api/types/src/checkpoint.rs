//! Checkpoints: snapshots that `arkd` takes of an agent by itself, to restore it from when its VMM ends.

use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::vmm::SnapshotId;

/// Bounds of `every_s`, seconds: ten seconds to a day.
pub const CHECKPOINT_EVERY_S: RangeInclusive<u32> = 10..=86_400;
/// Bounds of `keep`.
pub const CHECKPOINTS_KEPT: RangeInclusive<u32> = 1..=10;
/// Checkpoints that are kept when a request does not say how many.
pub const DEFAULT_CHECKPOINTS_KEPT: u32 = 2;

/// How often a checkpoint is taken of an agent while it runs and is healthy, and how many are kept.
///
/// When its VMM ends and its restart policy says that it begins anew, it does so as it was at the newest checkpoint that can be
/// used; without one, as what it was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointPolicy {
    /// Seconds from one to the next, 10 to 86400.
    pub every_s: u32,
    /// How many are kept, the newest ones, 1 to 10; 2 when absent.
    #[serde(default = "keep")]
    pub keep: u32,
}

const fn keep() -> u32 {
    DEFAULT_CHECKPOINTS_KEPT
}

impl fmt::Display for CheckpointPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}s:{}", self.every_s, self.keep)
    }
}

/// A checkpoint that is on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Checkpoint {
    /// The snapshot that it is.
    pub snapshot: SnapshotId,
    /// When the agent was as it is there, milliseconds since the Unix epoch.
    pub taken_unix_ms: u64,
    /// How long the agent stood still for it, microseconds.
    pub pause_us: u64,
    /// From the request until it was on disk, microseconds.
    pub durable_us: u64,
    /// Bytes of memory that it holds itself.
    pub bytes: u64,
}

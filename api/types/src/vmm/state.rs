//! Life of a VM inside its VMM.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a VM is in its life. Legal moves are in [`VmState::may_become`].
///
/// ```text
///              ┌──────────┐
///  starting ──►│ running  │◄──► paused
///      │       └────┬─────┘       │
///      │            ▼             │
///      │        stopping ◄────────┤
///      │            │             │
///      └────────────┴──► ended ◄──┘      (running ──► ended too: the guest ends by itself)
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// The VM is being put together.
    Starting,
    /// vCPUs run.
    Running,
    /// vCPUs stand still.
    Paused,
    /// The guest was asked to power off.
    Stopping,
    /// No vCPU will run again.
    Ended,
}

impl VmState {
    /// Every state, for tests.
    pub const ALL: [Self; 5] = [Self::Starting, Self::Running, Self::Paused, Self::Stopping, Self::Ended];

    /// Whether the move from `self` to `next` is legal.
    #[must_use]
    pub const fn may_become(self, next: Self) -> bool {
        match (self, next) {
            (Self::Starting, Self::Running | Self::Ended)
            | (Self::Running, Self::Paused | Self::Stopping | Self::Ended)
            | (Self::Paused, Self::Running | Self::Stopping | Self::Ended)
            | (Self::Stopping, Self::Ended) => true,
            (Self::Starting, Self::Starting | Self::Paused | Self::Stopping)
            | (Self::Running, Self::Starting | Self::Running)
            | (Self::Paused, Self::Starting | Self::Paused)
            | (Self::Stopping, Self::Starting | Self::Running | Self::Paused | Self::Stopping)
            | (Self::Ended, _) => false,
        }
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Ended => "ended",
        })
    }
}

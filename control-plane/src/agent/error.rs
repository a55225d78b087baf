//! What can go wrong with an agent.

use std::path::PathBuf;
use std::time::Duration;

use ark_types::agent::{AgentName, AgentState};
use ark_types::plain::plain;
use ark_types::vmm::ExitRecord;

use super::renewal::FailedCheck;
use crate::guest::GuestFailure;
use crate::snapshots::SnapshotError;
use crate::store::AppendError;
use crate::supervisor::{ControlError, SpawnError};

/// Why an agent did not come up.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Its directory or sockets cannot be made.
    #[error(
        "the agent's directory {path} cannot be made: {}; free some space there or set ARK_RUN",
        plain(source)
    )]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Its VMM cannot be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// Its VMM ended first.
    #[error("the agent ended before its guest was up: {}{}", sentence(record), quote(words))]
    Ended {
        /// How it ended.
        record: ExitRecord,
        /// The console's last lines.
        words: String,
    },
    /// Its guest did not say hello in time.
    #[error("the agent's guest did not say hello within {} s{}", limit.as_secs(), quote(words))]
    Deadline {
        /// How long it was waited for.
        limit: Duration,
        /// The console's last lines.
        words: String,
    },
    /// Its guest stopped on the way.
    #[error("the agent's guest has stood still for {} s and not said hello{}", time.as_secs(), quote(words))]
    Standstill {
        /// For how long.
        time: Duration,
        /// The console's last lines.
        words: String,
    },
    /// Its guest said something else.
    #[error("the agent's guest did not say hello as it should: {0}")]
    Hello(#[source] GuestFailure),
    /// Its guest, restored, did not take its new identity.
    #[error("the restored guest did not take its new identity: {0}")]
    Renewal(#[source] GuestFailure),
    /// Its guest, restored, did not pass a check.
    #[error("the restored guest is not sound, so it was ended: {0}")]
    Check(#[from] FailedCheck),
    /// Its guest, restored, did not call the host.
    #[error("the restored guest did not call the host within {} s{}", limit.as_secs(), quote(words))]
    NoCall {
        /// How long it was waited for.
        limit: Duration,
        /// The console's last lines.
        words: String,
    },
    /// It was deleted, or whoever asked for it left.
    #[error("the agent was removed before its guest was up")]
    Removed,
    /// `arkd` ends.
    #[error("arkd ended before the agent's guest was up")]
    Ending,
    /// That it is there could not be recorded.
    #[error("the agent cannot be remembered, so it was ended: {0}")]
    Unrecorded(#[source] AppendError),
}

impl BootError {
    /// Whether a standby that failed so died or hung while it waited: that is no fault of its template, and another may do.
    pub(super) const fn is_of_a_standby(&self) -> bool {
        matches!(self, Self::Ended { .. } | Self::Renewal(_) | Self::NoCall { .. })
    }
}

/// The agent cannot be asked for this now.
#[derive(Debug, thiserror::Error)]
#[error("the agent {name} is {state}{}", more(*state, name, reason.as_deref()))]
pub struct NotRunning {
    /// The agent.
    pub name: AgentName,
    /// Its state.
    pub state: AgentState,
    /// Why it is in that.
    pub reason: Option<String>,
}

fn more(state: AgentState, name: &AgentName, reason: Option<&str>) -> String {
    match (state, reason) {
        (AgentState::Paused, _) => format!(": resume it with `ark resume {name}`"),
        (_, Some(reason)) => format!(": {reason}"),
        (_, None) => String::new(),
    }
}

/// Why an operation in an agent's guest did not work.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It does not run.
    #[error(transparent)]
    NotRunning(#[from] NotRunning),
    /// The agent ended meanwhile.
    #[error("the agent {name} ended while the request ran: {reason}")]
    Gone {
        /// The agent.
        name: AgentName,
        /// How it ended.
        reason: String,
    },
    /// The guest refused, failed or broke the protocol.
    #[error(transparent)]
    Guest(GuestFailure),
}

/// How a VMM ended, as a sentence without a full stop.
pub(crate) fn sentence(record: &ExitRecord) -> String {
    match &record.detail {
        Some(detail) => format!("{}: {detail}", record.reason),
        None => record.reason.to_string(),
    }
}

fn quote(words: &str) -> String {
    if words.is_empty() { String::new() } else { format!("; the console's last lines:\n{words}") }
}

/// Why no snapshot was taken of an agent.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotFailure {
    /// It neither runs nor is paused with a VMM.
    #[error(transparent)]
    NotRunning(#[from] NotRunning),
    /// It ended meanwhile.
    #[error(
        "the agent {name} ended before its snapshot was complete: {reason}; nothing of the snapshot is left"
    )]
    Gone {
        /// The agent.
        name: AgentName,
        /// How it ended.
        reason: String,
    },
    /// Its VMM did not do it.
    #[error("the VMM took no snapshot: {0}; nothing of it is left")]
    Refused(String),
    /// There is no room.
    #[error(
        "there is no room on disk for the snapshot: {0}; nothing of it is left, so remove snapshots or agents and try again"
    )]
    DiskFull(String),
    /// Its VMM could not be asked.
    #[error("the VMM could not be asked for a snapshot: {0}")]
    Control(#[from] ControlError),
    /// Its directory.
    #[error("{path} cannot be written: {}; nothing of the snapshot is left", plain(source))]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It was taken and is not sound.
    #[error(transparent)]
    Store(#[from] SnapshotError),
    /// `arkd` ends.
    #[error("arkd is shutting down: try again when it is back")]
    ShuttingDown,
}

/// Why an agent was not paused or resumed.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// It does not run.
    #[error(transparent)]
    NotRunning(#[from] NotRunning),
    /// It is paused already.
    #[error("the agent {0} is paused already")]
    Paused(AgentName),
    /// It is not paused.
    #[error("the agent {name} is not paused, it is {state}")]
    NotPaused {
        /// The agent.
        name: AgentName,
        /// Its state.
        state: AgentState,
    },
    /// Its memory could not be brought to disk.
    #[error("the agent was not paused and goes on: {0}")]
    Snapshot(#[from] SnapshotFailure),
    /// It ended before its memory was on disk.
    #[error(transparent)]
    Ended(SnapshotFailure),
    /// Its memory could not be brought to disk, and now it stands still.
    #[error("{failure}; the agent stands still ({error}): try `ark resume`, or remove it with `ark rm`")]
    Stuck {
        /// Why it could not.
        failure: SnapshotFailure,
        /// Why it does not go on.
        error: Box<Self>,
    },
    /// Its VMM did not do it.
    #[error("the VMM did not {what}: {why}; try again, or remove the agent with `ark rm`")]
    Vmm {
        /// `pause` or `resume`.
        what: &'static str,
        /// Why.
        why: String,
    },
    /// The log takes nothing in, so nothing was done.
    #[error(transparent)]
    ReadOnly(#[from] AppendError),
    /// It was done and is not recorded yet.
    #[error("the agent {name} is {state}, but that is not recorded yet: {error}")]
    Unrecorded {
        /// The agent.
        name: AgentName,
        /// Its state.
        state: AgentState,
        /// Why it is not.
        error: AppendError,
    },
}

//! What can go wrong with the log of events.

use std::path::PathBuf;

use ark_types::event::Stream;
use ark_types::plain::plain;
use rusqlite::ErrorCode;

use super::Condition;

/// Why events were not appended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// Somebody else appended to the stream.
    #[error(
        "{stream} is of version {actual} by now, and not of version {expected}: look at it again and decide anew"
    )]
    Conflict {
        /// The stream.
        stream: Stream,
        /// The version that was expected.
        expected: u64,
        /// The version it is of.
        actual: u64,
    },
    /// The stream's last event has come.
    #[error("{0} has ended: nothing can happen to it any more")]
    Ended(Stream),
    /// More is waiting than may.
    #[error("too much is waiting to be recorded: try again in a moment")]
    Busy,
    /// There is no room.
    #[error(
        "there is no room on disk for the log of events ({0}), so nothing that must be remembered can be done: make room on the disk of ARK_STATE; arkd goes on by itself then"
    )]
    Full(String),
    /// It cannot be written.
    #[error(
        "the log of events cannot be written ({0}), so nothing that must be remembered can be done: see to the disk of ARK_STATE; arkd goes on by itself as soon as it can write"
    )]
    Failing(String),
    /// The log is closed.
    #[error("arkd is shutting down: try again when it is back")]
    Closed,
}

/// Why events cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The log lets go of old events.
    #[error(
        "the events after {after} are no longer in the log, which begins after {floor}: go on with after={floor}, or list the agents as they are now"
    )]
    Compacted {
        /// What was asked for.
        after: u64,
        /// The position before the oldest event.
        floor: u64,
    },
    /// An event cannot be understood.
    #[error("the event at position {position} cannot be understood ({why}): the log of events is damaged")]
    Damaged {
        /// Its position.
        position: u64,
        /// What is wrong.
        why: String,
    },
    /// The database cannot be read.
    #[error("the log of events cannot be read ({0}): see to the disk of ARK_STATE")]
    Failing(String),
}

/// Why the log cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file.
    #[error(
        "the log of events {path} cannot be opened: {}; set ARK_STATE to a directory that can be used",
        plain(source)
    )]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is something else.
    #[error("{path} is not a log of events of arkd: move it away, or set ARK_STATE to another directory")]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// It is of a later release.
    #[error(
        "the log of events {path} is of form {found}, and this arkd knows forms up to {known}: use the arkd that wrote it, or set ARK_STATE to another directory"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its form.
        found: i64,
        /// The newest form that is known.
        known: i64,
    },
    /// It is damaged, or the disk is.
    #[error(
        "the log of events {path} cannot be used: {why}; bring back a copy of it, or move it away: arkd then knows nothing of earlier agents"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// What a database that failed says of the log.
pub(super) fn condition_of(error: &rusqlite::Error) -> Condition {
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => Condition::Full(error.to_string()),
        _ => Condition::Failing(error.to_string()),
    }
}

impl From<rusqlite::Error> for ReadError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Failing(error.to_string())
    }
}

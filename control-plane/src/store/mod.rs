//! The log of events: what `arkd` promised is in here, durable, before anybody hears of it.
//!
//! ```text
//!  append(stream, expected version, events) ──► bounded queue ──► writer thread ── one transaction, one fsync ──► durable
//!                        ▲                                             │  for everything that waits
//!                        └────────────── position, version ◄───────────┤
//!  read(after, limit) ◄── the last events in memory, older ones from disk
//!  subscribe() ◄───────── position of the last durable event ◄─────────┘
//! ```
//!
//! | file | what happens there |
//! |---|---|
//! | [`EventLog`] | what the rest of `arkd` knows of it, so that a distributed log can take its place |
//! | [`SqliteLog`], `writer`, `schema` | the log in an SQLite database |
//!
//! A log that cannot be written, for want of room or another reason, refuses appends and says so in [`Condition`]; nothing is
//! half written. It recovers by itself: every append is tried, and while there is none the log tries by itself.

mod error;
mod schema;
mod sqlite;
#[cfg(test)]
mod tests;
mod writer;

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use ark_types::event::{Event, Recorded, Stream};
use futures_util::future::BoxFuture;
use tokio::sync::watch;

pub use error::{AppendError, OpenError, ReadError};
pub use sqlite::SqliteLog;

/// An answer that comes later.
pub type Pending<T> = BoxFuture<'static, T>;

/// What a stream has to be like for an append to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Of this version: the number of events it has; 0 when it must not exist.
    Version(u64),
    /// Of any version: for who is a stream's only writer.
    Any,
}

/// Events that go to one stream, all or none.
#[derive(Clone, Debug)]
pub struct Append {
    /// The stream.
    pub stream: Stream,
    /// What it has to be like.
    pub expected: Expected,
    /// The events, oldest first; one or more.
    pub events: Vec<Event>,
}

impl Append {
    /// `event` to `stream`, whatever its version.
    #[must_use]
    pub fn new(stream: Stream, event: Event) -> Self {
        Self { stream, expected: Expected::Any, events: vec![event] }
    }

    /// Only if the stream is of `version`.
    #[must_use]
    pub fn at(mut self, version: u64) -> Self {
        self.expected = Expected::Version(version);
        self
    }
}

/// Where an append's last event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    /// Its position among all events.
    pub position: u64,
    /// The version of its stream by then.
    pub version: u64,
}

/// Whether the log takes events in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// It does.
    Writable,
    /// There is no room.
    Full(String),
    /// It cannot be written for another reason.
    Failing(String),
}

impl Condition {
    /// Why an append is refused at once; none when it is worth a try.
    #[must_use]
    pub fn refusal(&self) -> Option<AppendError> {
        match self {
            Self::Writable => None,
            Self::Full(why) => Some(AppendError::Full(why.clone())),
            Self::Failing(why) => Some(AppendError::Failing(why.clone())),
        }
    }
}

/// The projection of all events up to a position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// That position.
    pub position: u64,
    /// The projection, in a form of its own.
    pub data: Vec<u8>,
}

/// Which events are kept although a snapshot tells of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// How many of the newest.
    pub events: u64,
    /// How old at most.
    pub age: Duration,
}

impl Default for Retention {
    fn default() -> Self {
        Self { events: 100_000, age: Duration::from_secs(30 * 24 * 3600) }
    }
}

/// A log of events. Positions grow by one from 1, over all streams.
pub trait EventLog: Debug + Send + Sync {
    /// Appends. When this returns the append has its place, so appends take effect in the order of the calls; the answer comes
    /// when the events are durable. Dropping it takes nothing back.
    ///
    /// # Errors
    /// [`AppendError`]; nothing was appended then.
    fn append(&self, append: Append) -> Pending<Result<Appended, AppendError>>;

    /// Events after position `after`, oldest first, at most `limit`.
    ///
    /// # Errors
    /// [`ReadError`].
    fn read(&self, after: u64, limit: usize) -> Pending<Result<Vec<Arc<Recorded>>, ReadError>>;

    /// The position of the newest durable event, now and whenever it changes.
    fn subscribe(&self) -> watch::Receiver<u64>;

    /// Whether it takes events in, now and whenever that changes.
    fn condition(&self) -> watch::Receiver<Condition>;

    /// The newest snapshot of the projection, but for its past.
    ///
    /// # Errors
    /// [`ReadError`].
    fn snapshot(&self) -> Pending<Result<Option<Snapshot>, ReadError>>;

    /// The past of the newest snapshot: the part of it that nobody has to wait for. Empty when there is none.
    ///
    /// # Errors
    /// [`ReadError`].
    fn past(&self) -> Pending<Result<Vec<u8>, ReadError>>;

    /// Keeps `snapshot` and its `past` instead of the one before and, by and by, lets go of the events that it tells of and that `retention`
    /// does not keep.
    ///
    /// # Errors
    /// [`AppendError`]; the snapshot before is still there then.
    fn compact(
        &self,
        snapshot: Snapshot,
        past: Vec<u8>,
        retention: Retention,
    ) -> Pending<Result<(), AppendError>>;
}

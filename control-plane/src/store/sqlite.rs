//! The log in an SQLite database.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use ark_types::event::{Recorded, Stream};
use futures_util::FutureExt as _;
use rusqlite::{Connection, OptionalExtension as _, Row};
use tokio::sync::{Semaphore, oneshot, watch};

use super::writer::{Job, Writer};
use super::{
    Append, AppendError, Appended, Condition, EventLog, OpenError, Pending, ReadError, Retention, Snapshot,
    schema,
};

/// Appends that may wait; beyond it they are refused.
const QUEUE: usize = 4096;
/// Newest events that are kept in memory for who reads along.
const RECENT: usize = 1024;

/// A log in an SQLite database. Dropping it waits for what is being written.
#[derive(Debug)]
pub struct SqliteLog {
    /// None only while it is dropped.
    jobs: Option<SyncSender<Job>>,
    writer: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
    reader: Arc<Mutex<Connection>>,
    /// Whoever reads from disk waits here, and not on a thread that others need.
    turn: Arc<Semaphore>,
}

/// What the writer publishes.
#[derive(Debug)]
pub(super) struct Shared {
    tail: Mutex<Tail>,
    pub(super) newest: watch::Sender<u64>,
    pub(super) condition: watch::Sender<Condition>,
}

/// The end of the log, in memory.
#[derive(Debug, Default)]
struct Tail {
    floor: u64,
    /// Without gaps; the last is the newest of all.
    recent: VecDeque<Arc<Recorded>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Publishes events that are durable.
    pub(super) fn publish(&self, events: Vec<Recorded>) {
        let Some(newest) = events.last().map(|event| event.position) else { return };
        let mut tail = lock(&self.tail);
        tail.recent.extend(events.into_iter().map(Arc::new));
        let excess = tail.recent.len().saturating_sub(RECENT);
        tail.recent.drain(..excess);
        drop(tail);
        self.newest.send_replace(newest);
    }

    /// Events up to `floor` are gone.
    pub(super) fn raise_floor(&self, floor: u64) {
        lock(&self.tail).floor = floor;
    }

    /// Publishes whether the log can be written.
    pub(super) fn enter(&self, condition: Condition) {
        self.condition.send_if_modified(|now| {
            let changed = *now != condition;
            if changed && condition == Condition::Writable {
                tracing::info!("the log of events can be written again");
            } else if changed {
                tracing::error!(?condition, "the log of events cannot be written");
            }
            *now = condition;
            changed
        });
    }

    /// What memory alone can answer; none when the database has to be asked.
    fn recall(&self, after: u64, limit: usize) -> Option<Result<Vec<Arc<Recorded>>, ReadError>> {
        if after >= *self.newest.borrow() || limit == 0 {
            return Some(Ok(Vec::new()));
        }
        let tail = lock(&self.tail);
        if after < tail.floor {
            return Some(Err(ReadError::Compacted { after, floor: tail.floor }));
        }
        let first = tail.recent.front()?.position;
        let skip = usize::try_from((after + 1).checked_sub(first)?).ok()?;
        Some(Ok(tail.recent.iter().skip(skip).take(limit).cloned().collect()))
    }
}

impl SqliteLog {
    /// The log in the file `path`, made when it is not there.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let damaged =
            |error: rusqlite::Error| OpenError::Damaged { path: path.to_owned(), why: error.to_string() };
        let database = schema::open(path)?;
        let reader = schema::open_reader(path).map_err(damaged)?;
        let (newest, floor) = ends(&database).map_err(damaged)?;
        let shared = Arc::new(Shared {
            tail: Mutex::new(Tail { floor, recent: VecDeque::new() }),
            newest: watch::Sender::new(newest),
            condition: watch::Sender::new(Condition::Writable),
        });
        let (jobs, inbox) = sync_channel(QUEUE);
        let writer = Writer::new(database, inbox, Arc::clone(&shared), floor);
        let file = |source| OpenError::File { path: path.to_owned(), source };
        let writer = std::thread::Builder::new()
            .name("events".to_owned())
            .spawn(move || writer.run())
            .map_err(file)?;
        let (reader, turn) = (Arc::new(Mutex::new(reader)), Arc::new(Semaphore::new(1)));
        Ok(Self { jobs: Some(jobs), writer: Some(writer), shared, reader, turn })
    }

    fn give<T: Send + 'static>(
        &self,
        job: Job,
        answer: oneshot::Receiver<Result<T, AppendError>>,
    ) -> Pending<Result<T, AppendError>> {
        let given = match &self.jobs {
            Some(jobs) => jobs.try_send(job).map_err(|error| match error {
                TrySendError::Full(_) => AppendError::Busy,
                TrySendError::Disconnected(_) => AppendError::Closed,
            }),
            None => Err(AppendError::Closed),
        };
        async move {
            given?;
            answer.await.unwrap_or(Err(AppendError::Closed))
        }
        .boxed()
    }

    fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Connection) -> Result<T, ReadError> + Send + 'static,
    ) -> Pending<Result<T, ReadError>> {
        let (reader, turn) = (Arc::clone(&self.reader), Arc::clone(&self.turn));
        async move {
            // Closed never: an error cannot be.
            let turn = turn.acquire_owned().await;
            // Who asked may leave; what was begun keeps the turn to its end.
            let answer = move || {
                let _turn = turn;
                question(&lock(&reader))
            };
            let answer = tokio::task::spawn_blocking(answer).await;
            answer.unwrap_or_else(|_| Err(ReadError::Failing("arkd is shutting down".to_owned())))
        }
        .boxed()
    }
}

impl Drop for SqliteLog {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(writer) = self.writer.take() {
            // A writer that panicked has nothing left to write.
            let _ = writer.join();
        }
    }
}

impl EventLog for SqliteLog {
    fn append(&self, append: Append) -> Pending<Result<Appended, AppendError>> {
        let (tell, answer) = oneshot::channel();
        self.give(Job::Append(append, tell), answer)
    }

    fn read(&self, after: u64, limit: usize) -> Pending<Result<Vec<Arc<Recorded>>, ReadError>> {
        if let Some(answer) = self.shared.recall(after, limit) {
            return std::future::ready(answer).boxed();
        }
        let shared = Arc::clone(&self.shared);
        self.ask(move |database| {
            let events = select(database, after, limit)?;
            // What was let go of meanwhile is missing at the beginning.
            if events.first().is_none_or(|first| first.position != after + 1) {
                let floor = lock(&shared.tail).floor;
                return Err(ReadError::Compacted { after, floor });
            }
            Ok(events)
        })
    }

    fn subscribe(&self) -> watch::Receiver<u64> {
        self.shared.newest.subscribe()
    }

    fn condition(&self) -> watch::Receiver<Condition> {
        self.shared.condition.subscribe()
    }

    fn snapshot(&self) -> Pending<Result<Option<Snapshot>, ReadError>> {
        self.ask(|database| {
            let snapshot = database.query_row("SELECT position, data FROM snapshot", [], |row| {
                Ok(Snapshot { position: number(row, 0)?, data: row.get(1)? })
            });
            Ok(snapshot.optional()?)
        })
    }

    fn past(&self) -> Pending<Result<Vec<u8>, ReadError>> {
        self.ask(|database| {
            let past = database.query_row("SELECT past FROM snapshot", [], |row| row.get(0));
            Ok(past.optional()?.unwrap_or_default())
        })
    }

    fn compact(
        &self,
        snapshot: Snapshot,
        past: Vec<u8>,
        retention: Retention,
    ) -> Pending<Result<(), AppendError>> {
        let (tell, answer) = oneshot::channel();
        self.give(Job::Compact(snapshot, past, retention, tell), answer)
    }
}

/// Positions of the newest event there ever was, and of the newest that is gone.
fn ends(database: &Connection) -> rusqlite::Result<(u64, u64)> {
    let newest = "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'event'), 0)";
    let newest = database.query_row(newest, [], |row| number(row, 0))?;
    let floor = database.query_row("SELECT floor FROM log", [], |row| number(row, 0))?;
    Ok((newest, floor))
}

fn select(database: &Connection, after: u64, limit: usize) -> Result<Vec<Arc<Recorded>>, ReadError> {
    let mut events = Vec::new();
    let mut statement = database.prepare_cached(
        "SELECT position, at_unix_ms, stream, version, event FROM event WHERE position > ?1 ORDER BY position LIMIT ?2",
    )?;
    let mut rows = statement.query([signed(after), i64::try_from(limit).unwrap_or(i64::MAX)])?;
    while let Some(row) = rows.next()? {
        events.push(Arc::new(recorded(row)?));
    }
    Ok(events)
}

fn recorded(row: &Row<'_>) -> Result<Recorded, ReadError> {
    let position = number(row, 0)?;
    let damaged = |why: String| ReadError::Damaged { position, why };
    let (stream, event): (String, String) = (row.get(2)?, row.get(4)?);
    Ok(Recorded {
        position,
        at_unix_ms: number(row, 1)?,
        stream: Stream::try_from(stream).map_err(|error| damaged(error.to_string()))?,
        version: number(row, 3)?,
        event: serde_json::from_str(&event).map_err(|error| damaged(error.to_string()))?,
    })
}

/// A number that was written by [`signed`].
fn number(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    row.get::<_, i64>(column).map(i64::cast_unsigned)
}

/// A number as SQLite keeps it: its integers have a sign.
pub(super) const fn signed(number: u64) -> i64 {
    number.cast_signed()
}

//! The one thread that writes: what waits goes into one transaction.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use ark_types::event::{Event, Recorded};
use rusqlite::{Connection, OptionalExtension as _, Transaction, TransactionBehavior, params};
use tokio::sync::oneshot;

use super::error::condition_of;
use super::sqlite::{Shared, signed};
use super::{Append, AppendError, Appended, Condition, Expected, Retention, Snapshot};
use crate::host::unix_ms;

/// Most jobs of one transaction.
const BATCH: usize = 512;
/// Events that are let go of in one transaction, so that nobody waits for thousands to go.
const TRIM: u64 = 500;
/// How often a log that cannot be written is tried while nobody appends.
const RETRY: Duration = Duration::from_millis(500);

type Answer<T> = oneshot::Sender<Result<T, AppendError>>;

/// What the writer is asked to do.
#[derive(Debug)]
pub(super) enum Job {
    /// See [`super::EventLog::append`].
    Append(Append, Answer<Appended>),
    /// See [`super::EventLog::compact`].
    Compact(Snapshot, Vec<u8>, Retention, Answer<()>),
}

impl Job {
    fn refuse(self, error: AppendError) {
        // Nobody may wait any more.
        match self {
            Self::Append(_, answer) => drop(answer.send(Err(error))),
            Self::Compact(_, _, _, answer) => drop(answer.send(Err(error))),
        }
    }

    fn confirm(self, verdict: Verdict) {
        match (self, verdict) {
            (Self::Append(_, answer), Verdict::Append(appended)) => drop(answer.send(appended)),
            (Self::Compact(_, _, _, answer), _) => drop(answer.send(Ok(()))),
            (Self::Append(..), Verdict::Compact) => {}
        }
    }
}

/// What became of a job, once its transaction is durable.
enum Verdict {
    Append(Result<Appended, AppendError>),
    Compact,
}

/// See the module.
pub(super) struct Writer {
    database: Connection,
    inbox: Receiver<Job>,
    shared: Arc<Shared>,
    /// Events up to here are gone.
    floor: u64,
    /// Events up to here are to go.
    trim_to: u64,
}

impl Writer {
    pub(super) const fn new(
        database: Connection,
        inbox: Receiver<Job>,
        shared: Arc<Shared>,
        floor: u64,
    ) -> Self {
        Self { database, inbox, shared, floor, trim_to: floor }
    }

    /// Writes until nobody can ask for more.
    pub(super) fn run(mut self) {
        loop {
            let is_writable = *self.shared.condition.borrow() == Condition::Writable;
            let next = if !is_writable {
                self.inbox.recv_timeout(RETRY)
            } else if self.floor < self.trim_to {
                self.inbox.recv_timeout(Duration::ZERO)
            } else {
                self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected)
            };
            let mut batch = Vec::new();
            match next {
                Ok(job) => batch.push(job),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            batch.extend(self.inbox.try_iter().take(BATCH - batch.len()));
            self.commit(batch);
        }
        // The next start has nothing to recover then.
        if let Err(error) = self.database.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)") {
            tracing::debug!(%error, "the write-ahead log stays as it is");
        }
    }

    /// All of `batch` in one transaction, and then, when it is durable, the answers.
    fn commit(&mut self, batch: Vec<Job>) {
        match self.write(&batch) {
            Ok(Written { verdicts, events, floor, trim_to }) => {
                (self.floor, self.trim_to) = (floor, trim_to);
                self.shared.raise_floor(floor);
                self.shared.enter(Condition::Writable);
                self.shared.publish(events);
                for (job, verdict) in batch.into_iter().zip(verdicts) {
                    job.confirm(verdict);
                }
            }
            Err(error) => {
                let condition = condition_of(&error);
                self.shared.enter(condition.clone());
                let refusal = condition.refusal().unwrap_or(AppendError::Busy);
                batch.into_iter().for_each(|job| job.refuse(refusal.clone()));
            }
        }
    }

    fn write(&mut self, batch: &[Job]) -> rusqlite::Result<Written> {
        let is_writable = *self.shared.condition.borrow() == Condition::Writable;
        let transaction = self.database.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut written =
            Written { verdicts: Vec::new(), events: Vec::new(), floor: self.floor, trim_to: self.trim_to };
        for job in batch {
            let verdict = match job {
                Job::Append(append, _) => Verdict::Append(insert(&transaction, append, &mut written.events)?),
                Job::Compact(snapshot, past, retention, _) => {
                    let wanted = keep(&transaction, (snapshot, past), *retention)?;
                    written.trim_to = written.trim_to.max(wanted);
                    Verdict::Compact
                }
            };
            written.verdicts.push(verdict);
        }
        if written.floor < written.trim_to {
            written.floor = written.trim_to.min(written.floor + TRIM);
            trim(&transaction, written.floor)?;
        }
        if !is_writable {
            // Even if nothing else was: that can be told only by writing.
            transaction.execute("UPDATE log SET tries = tries + 1", [])?;
        }
        transaction.commit()?;
        Ok(written)
    }
}

/// What a transaction did.
struct Written {
    verdicts: Vec<Verdict>,
    events: Vec<Recorded>,
    floor: u64,
    trim_to: u64,
}

/// The events of `append` in their stream, or why not; an error only when the database failed.
fn insert(
    transaction: &Transaction<'_>,
    append: &Append,
    events: &mut Vec<Recorded>,
) -> rusqlite::Result<Result<Appended, AppendError>> {
    let Append { stream, expected, events: new } = append;
    let found = transaction
        .prepare_cached("SELECT version, ended FROM stream WHERE stream = ?1")?
        .query_row([stream.as_ref()], |row| {
            Ok((row.get::<_, i64>(0)?.cast_unsigned(), row.get::<_, bool>(1)?))
        })
        .optional()?;
    let (mut version, ended) = found.unwrap_or((0, false));
    if ended {
        return Ok(Err(AppendError::Ended(stream.clone())));
    }
    if let Expected::Version(expected) = *expected
        && expected != version
    {
        return Ok(Err(AppendError::Conflict { stream: stream.clone(), expected, actual: version }));
    }
    let at_unix_ms = unix_ms();
    let mut position = 0;
    let mut statement = transaction
        .prepare_cached("INSERT INTO event (at_unix_ms, stream, version, event) VALUES (?1, ?2, ?3, ?4)")?;
    for event in new {
        version += 1;
        let text =
            serde_json::to_string(event).map_err(|e| rusqlite::Error::ToSqlConversionFailure(e.into()))?;
        statement.execute(params![signed(at_unix_ms), stream.as_ref(), signed(version), text])?;
        position = transaction.last_insert_rowid().cast_unsigned();
        let (stream, event) = (stream.clone(), event.clone());
        events.push(Recorded { position, at_unix_ms, stream, version, event });
    }
    let is_last = new.iter().any(Event::is_last);
    transaction
        .prepare_cached(
            "INSERT INTO stream VALUES (?1, ?2, ?3, ?4) ON CONFLICT (stream) DO UPDATE SET
             version = ?2, position = ?3, ended = ?4",
        )?
        .execute(params![stream.as_ref(), signed(version), signed(position), is_last])?;
    Ok(Ok(Appended { position, version }))
}

/// Keeps `snapshot` and its past; up to where events are to go then.
fn keep(
    transaction: &Transaction<'_>,
    (snapshot, past): (&Snapshot, &[u8]),
    retention: Retention,
) -> rusqlite::Result<u64> {
    // Two may be under way, and the older one may come last: events that it needs could be gone.
    transaction.execute(
        "INSERT INTO snapshot (id, position, data, past) VALUES (1, ?1, ?2, ?3)
         ON CONFLICT (id) DO UPDATE SET position = ?1, data = ?2, past = ?3 WHERE position < ?1",
        params![signed(snapshot.position), snapshot.data, past],
    )?;
    let newest: i64 =
        transaction.query_row("SELECT coalesce(max(position), 0) FROM event", [], |row| row.get(0))?;
    let too_many = newest.cast_unsigned().saturating_sub(retention.events);
    let age = u64::try_from(retention.age.as_millis()).unwrap_or(u64::MAX);
    let oldest = signed(unix_ms().saturating_sub(age));
    // Up to the first that is young enough; when none is, all are too old.
    let young: Option<i64> = transaction
        .query_row(
            "SELECT position FROM event WHERE at_unix_ms >= ?1 ORDER BY position LIMIT 1",
            [oldest],
            |row| row.get(0),
        )
        .optional()?;
    let too_old = young.map_or(newest, |young| young - 1).cast_unsigned();
    Ok(too_many.max(too_old).min(snapshot.position))
}

/// Lets go of the events up to `floor`, and of the streams that ended by then.
fn trim(transaction: &Transaction<'_>, floor: u64) -> rusqlite::Result<()> {
    transaction.execute("DELETE FROM event WHERE position <= ?1", [signed(floor)])?;
    transaction.execute("DELETE FROM stream WHERE ended AND position <= ?1", [signed(floor)])?;
    transaction.execute("UPDATE log SET floor = ?1", [signed(floor)])?;
    Ok(())
}

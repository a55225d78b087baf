//! What `arkd` records, and what its records amount to.
//!
//! ```text
//!  record(stream, events) ─► in line behind what the stream still waits for ─► log ─► durable: whoever waits is told
//!                                       ▲                                      │
//!                                       └── again, as soon as it can be ◄──────┴── refused: whoever waits is told, and it stays owed
//!  log ─► follower ─► projection ─► queries          every so many events: a snapshot, and old events go
//!                         ▲
//!                         └── agents that had been removed by the last snapshot: read when somebody asks for them
//! ```
//!
//! Some things happen whether or not they can be recorded: a VMM ends. So what the log refuses for now is owed to it, in order,
//! and [`Ledger::settled`] says whether anything is; what is not recorded is not acknowledged.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use ark_types::agent::Agent;
use ark_types::event::{Event, Stream};
use tokio::sync::{Notify, OnceCell, oneshot, watch};

use crate::projection::{Projection, UnusableSnapshot, read_past};
use crate::store::{Append, AppendError, Condition, EventLog, Expected, ReadError, Retention};

/// Events that are read at a time.
const PAGE: usize = 1000;
/// How often what is owed is tried again, beside when the log recovers.
const RETRY: Duration = Duration::from_secs(1);
/// How long a query waits for events that are durable and not in the projection yet.
const CATCH_UP: Duration = Duration::from_secs(5);
/// Least time between two tries.
const PAUSE: Duration = Duration::from_millis(50);

/// How the log is kept from growing for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compaction {
    /// Events from one snapshot of the projection to the next.
    pub every: u64,
    /// What is kept behind a snapshot.
    pub retention: Retention,
}

impl Default for Compaction {
    fn default() -> Self {
        Self { every: 10_000, retention: Retention::default() }
    }
}

/// Why the ledger cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The log.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The snapshot that it begins with.
    #[error(transparent)]
    Snapshot(#[from] UnusableSnapshot),
}

/// See the module. Clones are the same ledger.
#[derive(Clone, Debug)]
pub struct Ledger(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    log: Arc<dyn EventLog>,
    owed: Mutex<HashMap<Stream, Line>>,
    projection: RwLock<Projection>,
    /// Position of the projection.
    position: watch::Sender<u64>,
    /// Position of the snapshot that it began with.
    began: u64,
    /// Set once that snapshot's past is in the projection, too.
    whole: OnceCell<()>,
    /// Told when the log refused something that stays owed.
    refused: Arc<Notify>,
}

/// What a stream waits for.
#[derive(Debug, Default)]
struct Line {
    /// In order.
    waiting: Vec<Waiting>,
    /// Whether somebody is at it.
    driven: bool,
}

#[derive(Debug)]
struct Waiting {
    append: Append,
    /// Told of the next try.
    tell: Option<oneshot::Sender<Result<(), AppendError>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ledger {
    /// The ledger over `log`: its state is what the log's snapshot and events amount to; agents that were removed by the time of the
    /// snapshot are in it from [`Self::whole`] on. Must be called within a runtime.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn open(log: Arc<dyn EventLog>, compaction: Compaction) -> Result<Self, LedgerError> {
        let mut projection = match log.snapshot().await? {
            Some(snapshot) => Projection::restore(&snapshot)?,
            None => Projection::default(),
        };
        let kept = projection.position();
        loop {
            let events = log.read(projection.position(), PAGE).await?;
            if events.is_empty() {
                break;
            }
            events.iter().for_each(|event| projection.apply(event));
        }
        let position = watch::Sender::new(projection.position());
        let inner = Inner {
            log,
            owed: Mutex::default(),
            projection: RwLock::new(projection),
            position,
            began: kept,
            whole: OnceCell::new(),
            refused: Arc::default(),
        };
        let ledger = Self(Arc::new(inner));
        ledger.follow(compaction, kept);
        ledger.retry();
        Ok(ledger)
    }

    /// What the events amount to.
    pub fn projection(&self) -> RwLockReadGuard<'_, Projection> {
        self.0.projection.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the projection tells of the agents, too, that had been removed by the time of the snapshot it began with. The first
    /// to ask has them read.
    ///
    /// # Errors
    /// [`LedgerError`]; the next to ask has it tried again.
    pub async fn whole(&self) -> Result<(), LedgerError> {
        if self.0.whole.initialized() {
            return Ok(());
        }
        let inner = Arc::clone(&self.0);
        // Whoever asked may leave; what was begun is of use to the next one.
        let read = tokio::spawn(async move { inner.whole.get_or_try_init(|| inner.absorb()).await.copied() });
        read.await.unwrap_or_else(|_| Err(ReadError::Failing("arkd is shutting down".to_owned()).into()))
    }

    /// What is recorded of the agent `id`, living or removed; history is read only for who is not found otherwise.
    ///
    /// # Errors
    /// As [`Self::whole`].
    pub async fn agent(&self, id: &str) -> Result<Option<Agent>, LedgerError> {
        let told = || self.projection().agents().get(id).cloned();
        if let Some(agent) = told() {
            return Ok(Some(agent));
        }
        self.whole().await?;
        Ok(told())
    }

    /// Whether the agent `id` is known to have been removed.
    pub async fn is_removed(&self, id: &str) -> bool {
        let agent =
            self.agent(id).await.inspect_err(|error| tracing::error!(%error, "history cannot be read"));
        agent.ok().flatten().is_some_and(|agent| agent.removed_unix_ms.is_some())
    }

    /// Waits until the projection tells of everything that is durable now; not for long, in case the log cannot be read.
    pub async fn caught_up(&self) {
        let newest = *self.0.log.subscribe().borrow();
        let mut position = self.0.position.subscribe();
        let _ = tokio::time::timeout(CATCH_UP, position.wait_for(|position| *position >= newest)).await;
    }

    /// Position up to which the projection tells of everything, now and whenever it changes.
    pub fn position(&self) -> watch::Receiver<u64> {
        self.0.position.subscribe()
    }

    /// Waits until the projection tells of the event at `position`, which is durable.
    pub async fn reached(&self, position: u64) {
        // The sender is `self`'s.
        let _ = self.position().wait_for(|now| *now >= position).await;
    }

    /// Whether it is worth beginning what will have to be recorded.
    ///
    /// # Errors
    /// Why the log takes nothing in.
    pub fn ready(&self) -> Result<(), AppendError> {
        self.0.log.condition().borrow().refusal().map_or(Ok(()), Err)
    }

    /// Whether everything that happened in `stream` is durable.
    ///
    /// # Errors
    /// Why it is not.
    pub fn settled(&self, stream: &Stream) -> Result<(), AppendError> {
        if lock(&self.0.owed).contains_key(stream) {
            return Err(self.0.log.condition().borrow().refusal().unwrap_or(AppendError::Busy));
        }
        Ok(())
    }

    /// Records `events`, which happened to `stream` after everything that was recorded of it before. They have their place when
    /// this returns; the answer comes when they are durable or the log refused them for now, and then they stay owed. Nothing
    /// takes a record back.
    ///
    /// # Errors
    /// Why they are not durable.
    pub fn record(
        &self,
        stream: Stream,
        events: Vec<Event>,
    ) -> impl Future<Output = Result<(), AppendError>> + use<> {
        self.put(Append { stream, expected: Expected::Any, events })
    }

    /// Records the first events of a stream; as [`Self::record`].
    pub fn begin(
        &self,
        stream: Stream,
        events: Vec<Event>,
    ) -> impl Future<Output = Result<(), AppendError>> + use<> {
        self.put(Append { stream, expected: Expected::Version(0), events })
    }

    fn put(&self, append: Append) -> impl Future<Output = Result<(), AppendError>> + use<> {
        let (tell, told) = oneshot::channel();
        let stream = append.stream.clone();
        let mut owed = lock(&self.0.owed);
        let line = owed.entry(stream.clone()).or_default();
        line.waiting.push(Waiting { append, tell: Some(tell) });
        if line.is_of_nobody() {
            line.settle();
            owed.remove(&stream);
        } else if !line.driven {
            line.driven = true;
            tokio::spawn(self.clone().drive(stream));
        }
        async move { told.await.unwrap_or(Err(AppendError::Closed)) }
    }

    /// Appends what `stream` waits for until nothing is left or the log refuses.
    async fn drive(self, stream: Stream) {
        while let Some((append, count)) = self.next(&stream) {
            let answer = self.0.log.append(append).await.map(|_| ());
            let mut owed = lock(&self.0.owed);
            let Some(line) = owed.get_mut(&stream) else { return };
            let is_settled = match &answer {
                Ok(()) => true,
                Err(AppendError::Conflict { .. } | AppendError::Ended(_)) => {
                    tracing::error!(%stream, ?answer, "what happened cannot be recorded");
                    true
                }
                Err(
                    AppendError::Busy | AppendError::Full(_) | AppendError::Failing(_) | AppendError::Closed,
                ) => false,
            };
            if is_settled {
                let done: Vec<Waiting> = line.waiting.drain(..count).collect();
                let is_over = line.waiting.is_empty();
                if is_over {
                    // Before anybody hears of it: who asks then whether something is owed is told the truth.
                    owed.remove(&stream);
                }
                done.into_iter().for_each(|waiting| waiting.answer(&answer));
                if is_over {
                    return;
                }
                continue;
            }
            line.driven = false;
            if line.is_of_nobody() {
                line.settle();
                owed.remove(&stream);
                return;
            }
            for waiting in &mut line.waiting {
                waiting.tell.take().into_iter().for_each(|tell| drop(tell.send(answer.clone())));
            }
            self.0.refused.notify_one();
            return;
        }
    }

    /// Everything that `stream` waits for as one append, and how many that are.
    fn next(&self, stream: &Stream) -> Option<(Append, usize)> {
        let owed = lock(&self.0.owed);
        let waiting = &owed.get(stream)?.waiting;
        let mut append = waiting.first()?.append.clone();
        append.events.extend(waiting.iter().skip(1).flat_map(|waiting| waiting.append.events.clone()));
        Some((append, waiting.len()))
    }

    /// Tries what was refused again when the log recovers, and every now and then.
    fn retry(&self) {
        let (inner, refused) = (Arc::downgrade(&self.0), Arc::clone(&self.0.refused));
        let mut condition = self.0.log.condition();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = refused.notified() => {}
                    changed = condition.changed() => match changed {
                        Ok(()) => continue,
                        // The log is gone, and the ledger with it.
                        Err(_) => return,
                    },
                }
                let recovered = condition.wait_for(|now| *now == Condition::Writable);
                let _ = tokio::time::timeout(RETRY, recovered).await;
                // What is refused for another reason than the log's condition is not tried without a pause.
                tokio::time::sleep(PAUSE).await;
                let Some(inner) = inner.upgrade() else { return };
                Self(inner).drive_all();
            }
        });
    }

    fn drive_all(&self) {
        for (stream, line) in lock(&self.0.owed).iter_mut().filter(|(_, line)| !line.driven) {
            line.driven = true;
            tokio::spawn(self.clone().drive(stream.clone()));
        }
    }

    /// Keeps the projection at the end of the log.
    fn follow(&self, compaction: Compaction, mut kept: u64) {
        let inner = Arc::downgrade(&self.0);
        let mut newest = self.0.log.subscribe();
        tokio::spawn(async move {
            while newest.changed().await.is_ok() {
                let Some(inner) = inner.upgrade() else { return };
                let position = match inner.catch_up().await {
                    Ok(position) => position,
                    Err(error) => {
                        tracing::error!(%error, "the log cannot be followed; lists are behind");
                        continue;
                    }
                };
                if position - kept >= compaction.every {
                    kept = position;
                    tokio::spawn(async move { inner.compact(compaction.retention).await });
                }
            }
        });
    }
}

impl Waiting {
    fn answer(self, answer: &Result<(), AppendError>) {
        // Nobody may wait any more.
        self.tell.into_iter().for_each(|tell| drop(tell.send(answer.clone())));
    }
}

impl Line {
    /// Ends it: nothing of it was ever durable, so there is nothing to tell.
    fn settle(&mut self) {
        self.waiting.drain(..).for_each(|waiting| waiting.answer(&Ok(())));
    }

    /// Whether it begins and ends something that the log has not heard of, and the log is not about to.
    fn is_of_nobody(&self) -> bool {
        let begins = |waiting: &Waiting| waiting.append.expected == Expected::Version(0);
        let ends = |waiting: &Waiting| waiting.append.events.last().is_some_and(Event::is_last);
        !self.driven && self.waiting.first().is_some_and(begins) && self.waiting.last().is_some_and(ends)
    }
}

impl Inner {
    async fn catch_up(&self) -> Result<u64, ReadError> {
        loop {
            let position = *self.position.borrow();
            let events = self.log.read(position, PAGE).await?;
            let Some(last) = events.last() else { return Ok(position) };
            {
                let mut projection = self.projection.write().unwrap_or_else(PoisonError::into_inner);
                events.iter().for_each(|event| projection.apply(event));
            }
            self.position.send_replace(last.position);
        }
    }

    async fn absorb(&self) -> Result<(), LedgerError> {
        let (began, past) = (self.began, self.log.past().await?);
        let past = tokio::task::spawn_blocking(move || read_past(began, &past)).await;
        let past = past.map_err(|_| ReadError::Failing("arkd is shutting down".to_owned()))??;
        self.projection.write().unwrap_or_else(PoisonError::into_inner).absorb(past);
        Ok(())
    }

    async fn compact(self: Arc<Self>, retention: Retention) {
        if let Err(error) = Ledger(Arc::clone(&self)).whole().await {
            // The snapshot that is there has what this one would lack.
            tracing::warn!(%error, "no snapshot of the projection can be made");
            return;
        }
        // Written without the lock: everybody who asks something waits for that.
        let still = self.projection.read().unwrap_or_else(PoisonError::into_inner).still();
        let written = tokio::task::spawn_blocking(move || still.snapshot()).await;
        let Ok((snapshot, past)) = written else { return };
        let position = snapshot.position;
        match self.log.compact(snapshot, past, retention).await {
            Ok(()) => tracing::debug!(position, "a snapshot of the projection is kept"),
            // The next one will do.
            Err(error) => tracing::warn!(position, %error, "a snapshot of the projection cannot be kept"),
        }
    }
}

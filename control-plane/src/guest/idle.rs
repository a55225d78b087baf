//! Connections kept for the next operation, and how long a guest has had none.
//!
//! A connection costs the guest an accept, a thread's wake-up and a close: as much as the operation itself where that is
//! small. guestd takes one operation after another on a connection, so one whose operation is complete is kept here.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Connection, Freezer};

/// Most connections kept for one guest; each holds a thread of guestd.
const MOST: usize = 4;
/// How long one is kept: half of what guestd waits for the next operation, so that it is not the guest who ends it.
const FRESH: Duration = Duration::from_secs(5);

/// Idle connections to one guest.
#[derive(Clone, Debug, Default)]
pub struct Idle {
    inner: Arc<Mutex<Inner>>,
    /// Whether the guest stands still: who has it do something waits until it runs.
    pub(crate) freezer: Freezer,
}

#[derive(Debug)]
struct Inner {
    kept: Vec<(Instant, Connection)>,
    /// Operations under way.
    running: usize,
    /// When the last one ended.
    used: Instant,
}

impl Default for Inner {
    fn default() -> Self {
        Self { kept: Vec::new(), running: 0, used: Instant::now() }
    }
}

/// An operation, while this lives.
#[derive(Debug)]
pub(super) struct InUse(Idle);

impl Drop for InUse {
    fn drop(&mut self) {
        let mut inner = self.0.lock();
        inner.running = inner.running.saturating_sub(1);
        inner.used = Instant::now();
    }
}

impl Idle {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An operation begins, once the guest runs.
    pub(super) async fn begin(&self) -> InUse {
        self.freezer.wake().await;
        self.lock().running += 1;
        InUse(self.clone())
    }

    /// How long there has been no operation; nothing while there is one.
    pub(crate) fn unused_for(&self) -> Duration {
        let inner = self.lock();
        if inner.running > 0 { Duration::ZERO } else { inner.used.elapsed() }
    }

    /// From now on there is none, as if one had just ended.
    pub(crate) fn touch(&self) {
        self.lock().used = Instant::now();
    }

    /// The connection used last, if one is still fresh.
    pub(super) async fn take(&self) -> Option<Connection> {
        self.freezer.wake().await;
        let mut inner = self.lock();
        inner.kept.retain(|(since, _)| since.elapsed() < FRESH);
        let (_, mut connection) = inner.kept.pop()?;
        inner.running += 1;
        connection.reader.in_use = Some(InUse(self.clone()));
        Some(connection)
    }

    /// Keeps a connection whose operation is complete: nothing is left to be read or written.
    pub(super) fn keep(&self, mut connection: Connection) {
        // It ends its operation without the lock.
        drop(connection.reader.in_use.take());
        let mut inner = self.lock();
        inner.kept.retain(|(since, _)| since.elapsed() < FRESH);
        if inner.kept.len() < MOST {
            inner.kept.push((Instant::now(), connection));
        }
    }
}

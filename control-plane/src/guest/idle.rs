//! Connections kept for the next operation.
//!
//! A connection costs the guest an accept, a thread's wake-up and a close: as much as the operation itself where that is
//! small. guestd takes one operation after another on a connection, so one whose operation is complete is kept here.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Connection;

/// Most connections kept for one guest; each holds a thread of guestd.
const MOST: usize = 4;
/// How long one is kept: half of what guestd waits for the next operation, so that it is not the guest who ends it.
const FRESH: Duration = Duration::from_secs(5);

/// Idle connections to one guest.
#[derive(Clone, Debug, Default)]
pub struct Idle(Arc<Mutex<Vec<(Instant, Connection)>>>);

impl Idle {
    /// The connection used last, if one is still fresh.
    pub(super) fn take(&self) -> Option<Connection> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|(since, _)| since.elapsed() < FRESH);
        kept.pop().map(|(_, connection)| connection)
    }

    /// Keeps a connection whose operation is complete: nothing is left to be read or written.
    pub(super) fn keep(&self, connection: Connection) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|(since, _)| since.elapsed() < FRESH);
        if kept.len() < MOST {
            kept.push((Instant::now(), connection));
        }
    }
}

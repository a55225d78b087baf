//! One at a time, for each thing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedMutexGuard;

type Lock = Arc<tokio::sync::Mutex<()>>;

/// Whose turn it is with each thing, by its id or path. Things that nobody has a turn with cost nothing.
#[derive(Debug, Default)]
pub struct Turns(Mutex<HashMap<String, Lock>>);

/// A turn with one thing, while this lives.
#[derive(Debug)]
pub struct Turn<'a> {
    turns: &'a Turns,
    thing: String,
    guard: Option<OwnedMutexGuard<()>>,
}

impl Turns {
    /// Waits for a turn with `thing`.
    pub async fn take(&self, thing: &str) -> Turn<'_> {
        let lock = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(locks.entry(thing.to_owned()).or_default())
        };
        let mut turn = Turn { turns: self, thing: thing.to_owned(), guard: None };
        turn.guard = Some(lock.lock_owned().await);
        turn
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut locks = self.turns.0.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.guard.take());
        // Nobody else waits: those who come make a new one.
        if locks.get(&self.thing).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            locks.remove(&self.thing);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn turns_are_one_at_a_time_for_each_thing_and_nothing_is_left() {
        let turns = Turns::default();
        let first = turns.take("/a").await;
        let other = turns.take("/b").await;
        {
            let second = turns.take("/a");
            tokio::pin!(second);
            assert!(futures_util::poll!(&mut second).is_pending());
            drop(first);
            drop(second.await);
        }
        // One that was given up while it waited leaves nothing either.
        {
            let waiting = turns.take("/b");
            tokio::pin!(waiting);
            assert!(futures_util::poll!(&mut waiting).is_pending());
        }
        drop(other);
        assert!(turns.0.lock().unwrap().is_empty());
    }
}

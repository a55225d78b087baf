//! Whether a guest may stand still: its programs wait for models, and nobody else wants anything of it.
//!
//! ```text
//!  a call begins ──► it waits for its answer ──► told of it, the guest runs again ──► the call ends
//!                      │                                   ▲
//!                      └── the host has the guest do something: it runs again, and does until a new call begins
//! ```
//!
//! Here is only what is wanted; [`crate::agent`] has the VMM do it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};

/// See the module. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Freezer(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    wants: Mutex<Wants>,
    /// Told when they change.
    changed: Notify,
    is_frozen: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Wants {
    /// Calls that wait for their answer.
    waiting: usize,
    /// Calls whose answer is on its way to the guest.
    answered: usize,
    /// The host had the guest do something since the last call began.
    is_used: bool,
    /// Somebody sees to it that the guest stands still.
    is_attended: bool,
}

impl Wants {
    const fn is_still(&self) -> bool {
        self.waiting > 0 && self.answered == 0 && !self.is_used
    }
}

/// A call of a guest's program, from its beginning to its end.
#[derive(Debug)]
pub(crate) struct Waiting {
    freezer: Freezer,
    is_answered: bool,
}

/// Whoever sees to it that a guest stands still. Dropped, the guest counts as running.
#[derive(Debug)]
pub(crate) struct Attendant {
    freezer: Freezer,
    /// Its time is over: there may be another one.
    is_over: bool,
}

impl Freezer {
    fn wants(&self) -> MutexGuard<'_, Wants> {
        self.0.wants.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, how: impl FnOnce(&mut Wants) -> T) -> T {
        let changed = how(&mut self.wants());
        self.0.changed.notify_waiters();
        changed
    }

    /// A call begins. Where nobody sees to the guest yet, the caller has to.
    pub(crate) fn wait(&self) -> (Waiting, Option<Attendant>) {
        let is_attended = self.change(|wants| {
            wants.waiting += 1;
            wants.is_used = false;
            std::mem::replace(&mut wants.is_attended, true)
        });
        let attendant = (!is_attended).then(|| Attendant { freezer: self.clone(), is_over: false });
        (Waiting { freezer: self.clone(), is_answered: false }, attendant)
    }

    /// Whether the guest stands still.
    pub(crate) fn is_frozen(&self) -> bool {
        *self.0.is_frozen.borrow()
    }

    /// The host is to have the guest do something: returns once it runs.
    pub(crate) async fn wake(&self) {
        self.change(|wants| wants.is_used = true);
        self.runs().await;
    }

    async fn runs(&self) {
        // The sender is here, so there is no error.
        let _ = self.0.is_frozen.subscribe().wait_for(|is_frozen| !is_frozen).await;
    }
}

impl Waiting {
    /// Its answer is there: returns once the guest can take it.
    pub(crate) async fn answer(&mut self) {
        if !std::mem::replace(&mut self.is_answered, true) {
            self.freezer.change(|wants| {
                wants.waiting -= 1;
                wants.answered += 1;
            });
        }
        self.freezer.runs().await;
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.freezer.change(|wants| {
            let count = if self.is_answered { &mut wants.answered } else { &mut wants.waiting };
            *count -= 1;
        });
    }
}

impl Attendant {
    /// Waits until the guest is to stand still, or is not to, as `is_still` says; false when there are no calls any more, and with
    /// that the attendant's time is over.
    pub(crate) async fn until(&mut self, is_still: bool) -> bool {
        loop {
            let changed = self.freezer.0.changed.notified();
            tokio::pin!(changed);
            // From here on no change is missed.
            changed.as_mut().enable();
            {
                let mut wants = self.freezer.wants();
                if wants.is_still() == is_still {
                    return true;
                }
                if wants.waiting + wants.answered == 0 {
                    wants.is_attended = false;
                    self.is_over = true;
                    return false;
                }
            }
            changed.await;
        }
    }

    /// Whether the guest is to stand still.
    pub(crate) fn is_wanted(&self) -> bool {
        self.freezer.wants().is_still()
    }

    /// The guest stands still from now on, or runs.
    pub(crate) fn set_frozen(&self, is_frozen: bool) {
        self.freezer.0.is_frozen.send_replace(is_frozen);
    }
}

impl Drop for Attendant {
    fn drop(&mut self) {
        if !self.is_over {
            self.freezer.change(|wants| wants.is_attended = false);
            self.set_frozen(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    async fn is_waiting(future: impl Future<Output = ()>) -> bool {
        tokio::time::timeout(Duration::from_millis(20), future).await.is_err()
    }

    #[tokio::test]
    async fn a_guest_stands_still_while_all_its_calls_wait() {
        let freezer = Freezer::default();
        let (mut first, attendant) = freezer.wait();
        let mut attendant = attendant.unwrap();
        assert!(attendant.until(true).await);
        let (second, other) = freezer.wait();
        assert!(other.is_none(), "one sees to it");
        attendant.set_frozen(true);
        assert!(freezer.is_frozen() && is_waiting(first.answer()).await);
        assert!(attendant.until(false).await, "an answer is there");
        attendant.set_frozen(false);
        first.answer().await;
        assert!(!attendant.is_wanted(), "it is being told");
        drop(first);
        assert!(attendant.until(true).await, "the other one waits still");
        drop(second);
        assert!(attendant.until(false).await);
        assert!(!attendant.until(true).await, "there are no calls");
        let (_third, next) = freezer.wait();
        assert!(next.is_some(), "the next call has its own attendant");
    }

    #[tokio::test]
    async fn who_uses_a_guest_has_it_run_until_its_next_call() {
        let freezer = Freezer::default();
        freezer.wake().await;
        let (_first, attendant) = freezer.wait();
        let mut attendant = attendant.unwrap();
        assert!(attendant.until(true).await);
        attendant.set_frozen(true);
        assert!(is_waiting(freezer.wake()).await);
        assert!(attendant.until(false).await);
        attendant.set_frozen(false);
        freezer.wake().await;
        assert!(!attendant.is_wanted());
        let (_second, _) = freezer.wait();
        assert!(attendant.is_wanted());
        attendant.set_frozen(true);
        drop(attendant);
        assert!(!freezer.is_frozen(), "nobody would wake it");
    }
}

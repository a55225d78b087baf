//! One call to whichever replica of a service has the fewest.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::table::{Outcome, UnderWay};
use super::{ServiceError, view};
use crate::agent::Handle;
use crate::core::Core;

/// A replica that a call is under way in; what came of it is counted when this goes.
#[derive(Debug)]
pub(crate) struct Picked {
    under_way: UnderWay,
    outcome: Tally,
}

/// Counts a call when it goes.
#[derive(Debug)]
struct Tally {
    core: Arc<Core>,
    service: String,
    outcome: Outcome,
}

impl Drop for Tally {
    fn drop(&mut self) {
        self.core.services.count(&self.service, self.outcome);
    }
}

impl Picked {
    /// The replica.
    pub(crate) const fn handle(&self) -> &Handle {
        &self.under_way.handle
    }

    /// The call came to an answer, or to none.
    pub(crate) fn end(mut self, is_answered: bool) {
        self.outcome.outcome = if is_answered { Outcome::Ok } else { Outcome::Failed };
    }
}

/// Begins a call in a replica of the service `name`, which is waited for for as long as `patience`.
///
/// # Errors
/// [`ServiceError::NotFound`], [`ServiceError::Unready`] or [`ServiceError::Closing`].
pub(crate) async fn begin(core: &Arc<Core>, name: &str, patience: Duration) -> Result<Picked, ServiceError> {
    let began = Instant::now();
    let mut looks = core.services.looks.subscribe();
    let mut outcome = Tally { core: Arc::clone(core), service: name.to_owned(), outcome: Outcome::Abandoned };
    let mut waiting = std::pin::pin!(tokio::time::sleep(patience));
    loop {
        looks.mark_unchanged();
        if let Some(under_way) = core.services.begin(core, name)? {
            return Ok(Picked { under_way, outcome });
        }
        tokio::select! {
            // The sender is the core's.
            _ = looks.changed() => {}
            () = core.services.closing.cancelled() => return Err(ServiceError::Closing),
            () = &mut waiting => {
                outcome.outcome = Outcome::Unready;
                return Err(view::why_unready(core, name, began.elapsed().min(patience)));
            }
        }
    }
}

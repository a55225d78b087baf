//! `Idempotency-Key`: a request that makes something is carried out once, however often it is sent. It follows the IETF draft
//! "The Idempotency-Key HTTP Header Field"; the statuses are its.
//!
//! ```text
//!  POST with a key ─► decide ─┬─ nobody knows the key ──► carried out, whether or not the client stays ──► recorded ──► reply
//!                       ▲     ├─ its reply is kept ─────► the same reply, `Idempotency-Replayed: true`
//!                       │     ├─ it is being carried out ─► waits for that reply; after a while 409
//!                       │     └─ it is another request's ─► 422
//!                       └── what is under way here, what the log of events tells
//! ```
//!
//! What a request makes is bound to it before that is recorded: `request.made` stands before `agent.created`, `task.created` and
//! the first `service.set` in the log, and the id of the request in that one and in the record of a snapshot. (An agent is in the
//! list a moment before.) What was acknowledged has `request.answered`, durable before the reply leaves. So what was cut off by the
//! end of `arkd` is known at its next start, in [`settle`]: agents that nobody was told of go; a snapshot that is whole, a task and
//! a service stay and the request counts as carried out; and the same request, sent again, does the rest.
//!
//! A request that is refused made nothing, so its key is free again: who is told to wait and try again may use the same one.
//!
//! There is one space of keys for one `arkd`: whoever knows the token, or may open the socket, may do everything. Replies are kept
//! for a day, within the bounds of [`ark_types::idempotency`]; they are in the log, so requests whose replies may hold
//! secrets or are without bound take no key: see [`KEYLESS`].

mod decide;
mod key;
mod layer;
mod settle;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ark_types::event::{Event, Stream};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::core::Core;
use crate::host::unix_ms;
use crate::ledger::Ledger;
use crate::store::AppendError;

pub use decide::{Decision, Table};
pub use key::{InvalidKey, KeyDigest, RequestDigest};
pub use layer::idempotent;
pub use settle::settle;

/// Last segments of routes that take no key: programs, code and models, whose outputs are not kept.
pub const KEYLESS: [&str; 5] = ["exec", "eval", "call", "completions", "embeddings"];

/// Requests with a key that are under way.
#[derive(Debug, Default)]
pub struct Requests(Mutex<Table<CancellationToken>>);

impl Requests {
    fn table(&self) -> MutexGuard<'_, Table<CancellationToken>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Table::decide`]; who is to wait does so until the token is cancelled.
    fn decide(&self, ledger: &Ledger, key: KeyDigest, request: RequestDigest) -> Decision<CancellationToken> {
        // The table first: what is no longer in there is in the projection by then.
        let mut table = self.table();
        let projection = ledger.projection();
        let kept = projection.requests().reply(&key.to_string(), unix_ms());
        table.decide(key, request, kept, CancellationToken::new)
    }
}

tokio::task_local! {
    /// The request with a key that the task carries out.
    static CURRENT: Arc<Bound>;
}

/// A request with a key that is carried out.
#[derive(Debug)]
struct Bound {
    /// Its own id, another one whenever it is carried out.
    id: String,
    key: KeyDigest,
    request: RequestDigest,
    /// Whether it made something.
    has_made: Mutex<bool>,
}

impl Bound {
    fn new(key: KeyDigest, request: RequestDigest) -> Self {
        let id = format!("{:016x}", rand::random::<u64>());
        Self { id, key, request, has_made: Mutex::new(false) }
    }

    fn stream(&self) -> Stream {
        Stream::request(&self.id)
    }

    fn has_made(&self) -> MutexGuard<'_, bool> {
        self.has_made.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Binds `made`, which is about to be, to the request that the task carries out, if that has a key. It has its place in the log
/// when this returns, before all that is recorded from then on; the answer comes when it is durable.
///
/// # Errors
/// Why it is not.
pub(crate) fn bind(core: &Core, made: Stream) -> impl Future<Output = Result<(), AppendError>> + use<> {
    let recording = CURRENT.try_with(|bound| {
        *bound.has_made() = true;
        let (key, request) = (bound.key.to_string(), bound.request.to_string());
        core.ledger.record(bound.stream(), vec![Event::RequestMade { key, request, made }])
    });
    async move {
        match recording {
            Ok(recording) => recording.await,
            Err(_) => Ok(()),
        }
    }
}

/// The id of the request with a key that the task carries out.
pub(crate) fn current_id() -> Option<String> {
    CURRENT.try_with(|bound| bound.id.clone()).ok()
}

/// As [`tokio::spawn`], for the request that this task carries out.
pub(crate) fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    match CURRENT.try_with(Arc::clone) {
        Ok(bound) => tokio::spawn(CURRENT.scope(bound, future)),
        Err(_) => tokio::spawn(future),
    }
}

//! What is to be done with a request that has a key. Nothing here waits, or does I/O.

use std::collections::HashMap;

use ark_types::idempotency::KeptReply;

use super::{KeyDigest, RequestDigest};

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision<T> {
    /// Carry it out: it is under way from now on, until [`Table::end`], and others wait for this.
    CarryOut(T),
    /// Wait for this: the same request is under way.
    Wait(T),
    /// Reply this: it was carried out.
    Replay(KeptReply),
    /// Refuse it: the key is another request's.
    Refuse,
}

/// Requests with a key that are under way, each with a `T` that those wait for who send it again meanwhile.
#[derive(Debug)]
pub struct Table<T>(HashMap<KeyDigest, (RequestDigest, T)>);

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T: Clone> Table<T> {
    /// What is to be done with `request`, which came with `key`; `kept` is the reply that is kept under it, and `turn` what others
    /// wait for if it is to be carried out.
    pub fn decide(
        &mut self,
        key: KeyDigest,
        request: RequestDigest,
        kept: Option<&KeptReply>,
        turn: impl FnOnce() -> T,
    ) -> Decision<T> {
        if let Some(reply) = kept {
            return if reply.request == request.to_string() {
                Decision::Replay(reply.clone())
            } else {
                Decision::Refuse
            };
        }
        match self.0.get(&key) {
            Some((under_way, turn)) if *under_way == request => Decision::Wait(turn.clone()),
            Some(_) => Decision::Refuse,
            None => {
                let turn = turn();
                self.0.insert(key, (request, turn.clone()));
                Decision::CarryOut(turn)
            }
        }
    }

    /// What was carried out under `key` is under way no more: its reply is kept, or it came to nothing.
    pub fn end(&mut self, key: KeyDigest) {
        self.0.remove(&key);
    }
}

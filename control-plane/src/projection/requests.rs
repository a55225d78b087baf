//! What became of requests that may be sent again, as the events tell of it.

use std::collections::{BTreeMap, HashMap};

use ark_types::event::{Event, Recorded, Stream};
use ark_types::idempotency::{KEPT_S, KeptReply, MAX_KEPT, MAX_KEPT_BYTES};
use serde::{Deserialize, Serialize};

/// How long a reply is kept, milliseconds.
const KEPT_MS: u64 = KEPT_S * 1000;

/// A request of which no end is told. At the start of `arkd` it was cut off by the end of the last one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut {
    /// Digest of its key.
    pub key: String,
    /// Digest of what it asks for.
    pub request: String,
    /// What it makes, whether or not that came to be.
    pub made: Vec<Stream>,
}

/// A reply that is given again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    key: String,
    at_unix_ms: u64,
    reply: KeptReply,
}

/// Requests under way that made something, and replies to those that were carried out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Stored", into = "Stored")]
pub struct Requests {
    under_way: BTreeMap<Stream, Cut>,
    /// By the position of their events, so oldest first.
    kept: BTreeMap<u64, Kept>,
    /// Positions by key.
    keys: HashMap<String, u64>,
    /// Bytes of all that is kept.
    bytes: usize,
}

/// What cannot be told from the rest.
#[derive(Serialize, Deserialize)]
struct Stored {
    under_way: BTreeMap<Stream, Cut>,
    kept: BTreeMap<u64, Kept>,
}

impl From<Stored> for Requests {
    fn from(Stored { under_way, kept }: Stored) -> Self {
        let keys = kept.iter().map(|(position, kept)| (kept.key.clone(), *position)).collect();
        let bytes = kept.values().map(|kept| kept.reply.body.len()).sum();
        Self { under_way, kept, keys, bytes }
    }
}

impl From<Requests> for Stored {
    fn from(requests: Requests) -> Self {
        Self { under_way: requests.under_way, kept: requests.kept }
    }
}

impl Requests {
    /// The reply to the request with the key of this digest, if it is kept at `now`, milliseconds since the Unix epoch.
    #[must_use]
    pub fn reply(&self, key: &str, now: u64) -> Option<&KeptReply> {
        let kept = self.kept.get(self.keys.get(key)?)?;
        (now < kept.at_unix_ms.saturating_add(KEPT_MS)).then_some(&kept.reply)
    }

    /// Requests of which no end is told, each with its stream.
    pub fn under_way(&self) -> impl Iterator<Item = (&Stream, &Cut)> {
        self.under_way.iter()
    }

    /// Takes in an event, if it is about a request.
    pub(super) fn apply(&mut self, recorded: &Recorded) {
        match &recorded.event {
            Event::RequestMade { key, request, made } => {
                let begun = || Cut { key: key.clone(), request: request.clone(), made: Vec::new() };
                let cut = self.under_way.entry(recorded.stream.clone()).or_insert_with(begun);
                cut.made.push(made.clone());
            }
            Event::RequestDropped {} => drop(self.under_way.remove(&recorded.stream)),
            Event::RequestAnswered { key, reply } => {
                self.under_way.remove(&recorded.stream);
                self.keep(recorded, key, reply);
            }
            _ => {}
        }
    }

    fn keep(&mut self, recorded: &Recorded, key: &str, reply: &KeptReply) {
        if let Some(earlier) = self.keys.get(key).copied() {
            self.forget(earlier);
        }
        self.bytes += reply.body.len();
        self.keys.insert(key.to_owned(), recorded.position);
        let kept = Kept { key: key.to_owned(), at_unix_ms: recorded.at_unix_ms, reply: reply.clone() };
        self.kept.insert(recorded.position, kept);
        while let Some((position, oldest)) = self.kept.first_key_value()
            && (self.kept.len() > MAX_KEPT
                || self.bytes > MAX_KEPT_BYTES
                || oldest.at_unix_ms.saturating_add(KEPT_MS) <= recorded.at_unix_ms)
        {
            self.forget(*position);
        }
    }

    fn forget(&mut self, position: u64) {
        let Some(kept) = self.kept.remove(&position) else { return };
        self.bytes -= kept.reply.body.len();
        self.keys.remove(&kept.key);
    }
}

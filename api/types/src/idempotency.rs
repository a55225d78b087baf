//! Requests that may be sent again: the header `Idempotency-Key`, and what is kept of a request that bore one.
//!
//! A `POST` with a key is carried out once. Whoever sends the same request with the same key again gets the reply that the
//! first one got, for [`KEPT_S`] seconds and across any end of `arkd`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Header of a request with its key, at most [`MAX_KEY`] printable ASCII characters, in quotes or without.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// Header of a reply that an earlier request with the key got already: `true`.
pub const IDEMPOTENCY_REPLAYED: &str = "idempotency-replayed";
/// Longest key, bytes.
pub const MAX_KEY: usize = 255;
/// How long a reply is kept, seconds.
pub const KEPT_S: u64 = 24 * 3600;
/// Most replies that are kept; beyond it the oldest go.
pub const MAX_KEPT: usize = 10_000;
/// Most bytes of all bodies that are kept; beyond it the oldest go.
pub const MAX_KEPT_BYTES: usize = 16 << 20;
/// Most bytes of the body of one reply that is kept.
pub const MAX_REPLY: usize = 1 << 20;

/// The reply to a request with a key, as it is given again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KeptReply {
    /// SHA-256 of what was asked for: method, path, query and body; hexadecimal.
    pub request: String,
    /// HTTP status code; a success.
    pub status: u16,
    /// Headers that tell something about what was made: `location`, `etag`, `content-type`.
    pub headers: BTreeMap<String, String>,
    /// The body; JSON, or nothing.
    pub body: String,
}

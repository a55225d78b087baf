//! How much memory serving a model takes, before any of it is taken.
//!
//! ```text
//! total   = weights + cache + compute + fixed
//! weights = the file                                            (mapped, all of it read in the end)
//! cache   = (sessions + 1) · context · layers · kv_heads · (key + value) · bytes of an element
//! compute = 4 · (batch + least(batch, 64)) · (vocabulary + 8·embedding + 4·feed_forward + 2·heads·context)
//!           + 4 · sessions · vocabulary                          (f32: logits, activations, attention scores)
//! fixed   = 48 MiB + 512 B · vocabulary                          (the program, the tokenizer, HTTP buffers)
//! ```
//! `context` is one session's, rounded up to 256 tokens as llama.cpp does; `batch` is what one step computes at most. The session
//! more and its smaller batch are for embeddings, which have a context of their own.
//! `compute` is an upper bound on what llama.cpp reserves. All arithmetic saturates: an absurd model is an absurdly large number.

use crate::Model;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheType {
    /// Half precision, 2 bytes.
    #[default]
    F16,
    /// Single precision, 4 bytes.
    F32,
}

impl CacheType {
    /// Bytes of an element.
    #[must_use]
    pub fn bytes(self) -> u64 {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// How a model is to be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serving {
    /// Longest prompt and reply together of one session, in tokens.
    pub context: u64,
    /// Sessions decoded at the same time.
    pub sessions: u64,
    /// Most tokens that one step computes.
    pub batch: u64,
    /// How keys and values are stored.
    pub cache: CacheType,
}

/// Memory by what it is for, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// The mapped file.
    pub weights: u64,
    /// Keys and values of all sessions, and of a text that is embedded.
    pub cache: u64,
    /// Buffers of one step.
    pub compute: u64,
    /// What does not depend on context or sessions.
    pub fixed: u64,
}

impl Memory {
    /// Their sum.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.cache).saturating_add(self.compute).saturating_add(self.fixed)
    }
}

/// Most tokens that one step of embedding computes.
pub const EMBEDDING_BATCH: u64 = 64;

const F32: u64 = 4;
const PROGRAM: u64 = 48 << 20;
const PER_TOKEN_OF_VOCABULARY: u64 = 512;

/// Memory that serving `model` takes; the formula is in this module's head.
#[must_use]
pub fn memory(model: &Model, serving: &Serving) -> Memory {
    let context = serving.context.checked_next_multiple_of(256).unwrap_or(u64::MAX);
    Memory {
        weights: model.file_bytes,
        cache: product(&[
            serving.sessions.saturating_add(1),
            context,
            model.layers,
            model.kv_heads,
            model.key.saturating_add(model.value),
            serving.cache.bytes(),
        ]),
        compute: product(&[
            F32,
            serving.batch.saturating_add(serving.batch.min(EMBEDDING_BATCH)),
            model
                .vocabulary
                .saturating_add(product(&[8, model.embedding]))
                .saturating_add(product(&[4, model.feed_forward]))
                .saturating_add(product(&[2, model.heads, context])),
        ])
        .saturating_add(product(&[F32, serving.sessions, model.vocabulary])),
        fixed: PROGRAM.saturating_add(product(&[PER_TOKEN_OF_VOCABULARY, model.vocabulary])),
    }
}

fn product(factors: &[u64]) -> u64 {
    factors.iter().fold(1, |product, factor| product.saturating_mul(*factor))
}

//! GGUF model files, read as hostile input: a file is whole, within bounds and of an architecture the engine knows before anything
//! maps it, and what it will need in memory is known before anything is reserved.
//!
//! ```text
//! file ── read ──► Header (metadata, tensors; every size checked against the file) ── try_from ──► Model ── memory ──► Memory
//! ```
//!
//! `arkd` uses this to accept and to size a model, the inference server to check it again before llama.cpp sees it. Neither
//! tokio nor llama.cpp is used here. Layout: the GGUF specification, versions 2 and 3, little-endian.

mod error;
mod header;
mod memory;
mod model;
mod reader;
#[cfg(feature = "synthetic")]
pub mod synthetic;
mod tensor;

pub use error::GgufError;
pub use header::{Header, MAX_METADATA, MAX_STRING, MAX_TENSORS, Value, ValueKind};
pub use memory::{CacheType, EMBEDDING_BATCH, Memory, Serving, memory};
pub use model::{ARCHITECTURES, Model};
pub use tensor::{Tensor, TensorKind};

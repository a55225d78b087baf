//! What is wrong with a model file, in a sentence that says what to do.

use std::io;

/// A file that is not a model this project serves.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The file cannot be read at all.
    #[error("the model file cannot be read: {0}")]
    Io(#[from] io::Error),
    /// The first four bytes are not `GGUF`.
    #[error(
        "this is not a GGUF file (it begins with {found:02x?}, a GGUF file with \"GGUF\"); convert the model to GGUF first"
    )]
    Magic {
        /// The first four bytes.
        found: [u8; 4],
    },
    /// A version of the format that is not read.
    #[error(
        "GGUF version {found} is not supported (2 and 3 are){hint}; convert the model again with a current converter"
    )]
    Version {
        /// The version the file states.
        found: u32,
        /// What the number looks like, when it looks like something.
        hint: &'static str,
    },
    /// The file ends before what its header promises.
    #[error(
        "the model file is truncated: {what} needs bytes up to {need}, the file has {have}; copy or download it again"
    )]
    Truncated {
        /// What was being read.
        what: String,
        /// Bytes the file would have to have.
        need: u64,
        /// Bytes it has.
        have: u64,
    },
    /// A number beyond what any model has.
    #[error("the model file is damaged or hostile: {what} is {found}, at most {limit} is accepted")]
    Absurd {
        /// What the number counts.
        what: String,
        /// The number in the file.
        found: u64,
        /// The largest accepted.
        limit: u64,
    },
    /// A contradiction within the file.
    #[error("the model file is damaged: {0}")]
    Damaged(String),
    /// A key that every model of its kind has.
    #[error("the model file has no usable metadata \"{0}\"; convert the model again")]
    Missing(String),
    /// A model, but not of a kind that is served.
    #[error("the model's architecture \"{found}\" is not supported; supported are {}", crate::ARCHITECTURES.join(", "))]
    Architecture {
        /// What the file states.
        found: String,
    },
    /// A tokenizer that is not one of those served.
    #[error("the model's tokenizer \"{found}\" is not supported (\"llama\" and \"gpt2\" are)")]
    Tokenizer {
        /// What the file states.
        found: String,
    },
}

//! Why a model cannot be had, added, removed or served.

use std::path::PathBuf;

use ark_gguf::GgufError;
use ark_types::model::{InvalidModelName, MAX_MODEL_BYTES, ModelName};
use ark_types::plain::plain;

use crate::guest::GuestFailure;

/// Why a model cannot be found, added or used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// No model of that name.
    #[error("there is no model {name:?}; {}", known(have))]
    NotFound {
        /// What was asked for.
        name: String,
        /// Models that exist.
        have: Vec<ModelName>,
    },
    /// No name.
    #[error(transparent)]
    Name(#[from] InvalidModelName),
    /// It comes with the release.
    #[error(
        "the model {0} comes with the release, so it is neither replaced nor removed: choose another name for yours"
    )]
    Bundled(ModelName),
    /// There is another one of that name.
    #[error(
        "there is another model {0} already: choose another name, or remove that one with `ark model rm {0}`"
    )]
    Taken(ModelName),
    /// Its file is none that can be served.
    #[error("the model {name} cannot be served: {source}")]
    Unusable {
        /// The model.
        name: ModelName,
        /// What is wrong with its file.
        source: GgufError,
    },
    /// Its file is not the one that was added.
    #[error(
        "the model {name} was changed or damaged on disk: {why}; remove it with `ark model rm {name}` and add it again"
    )]
    Changed {
        /// The model.
        name: ModelName,
        /// What is wrong.
        why: String,
    },
    /// The context that it is to be served with.
    #[error(
        "the model {name} cannot be served with a context of {asked} tokens: choose from {least} to {most}"
    )]
    Context {
        /// The model.
        name: ModelName,
        /// What was asked for.
        asked: u64,
        /// Fewest.
        least: u64,
        /// Most: what it was trained for.
        most: u64,
    },
    /// It takes more memory than there is.
    #[error(
        "the model {name} takes {asked_mib} MiB of memory ({parts}), and this host can give {most_mib} MiB to a VM: choose a \
         smaller context, or a model with fewer parameters or a stronger quantization"
    )]
    TooLarge {
        /// The model.
        name: ModelName,
        /// MiB.
        asked_mib: u64,
        /// What of it is what for.
        parts: String,
        /// MiB.
        most_mib: u64,
    },
    /// Its file is larger than any that is taken.
    #[error("the model's file has more than {} GiB, which is the most that is taken", MAX_MODEL_BYTES >> 30)]
    TooManyBytes,
    /// No room on disk.
    #[error(
        "there is no room for the model's file: {need_mib} MiB more are needed in {dir}, where {free_mib} MiB are free and \
         {kept_mib} MiB are kept for everything else; free some space, nothing of the model is left"
    )]
    NoRoom {
        /// Where.
        dir: PathBuf,
        /// MiB.
        need_mib: u64,
        /// MiB.
        free_mib: u64,
        /// MiB.
        kept_mib: u64,
    },
    /// Whoever sends it stopped.
    #[error("the upload broke off: {0}; nothing of it is left, send the file again")]
    BrokenOff(String),
    /// Living agents serve it that are not its service's.
    #[error("{agents} living agent{} go on from what serves the model {name}: end them first", if *.agents == 1 { "" } else { "s" })]
    InUse {
        /// The model.
        name: ModelName,
        /// How many.
        agents: usize,
    },
    /// A file cannot be read or written.
    #[error("{path} cannot be used: {}; see that the directory works, or set ARK_STATE", plain(.source))]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A service that is not the model's has its service's name.
    #[error(
        "the name {0} belongs to a service that is not the model's: remove that with `ark service rm {0}`"
    )]
    ServiceTaken(String),
}

fn known(have: &[ModelName]) -> String {
    if have.is_empty() {
        return "no model is there: add one with `ark model add FILE --name NAME`".to_owned();
    }
    let names: Vec<&str> = have.iter().map(AsRef::as_ref).collect();
    format!("there are: {}", names.join(", "))
}

/// Why a server of a model does not answer.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// It was not started.
    #[error("its server cannot be started: {0}")]
    Start(GuestFailure),
    /// Nobody knows whether it runs.
    #[error("its server is not known to run: {0}")]
    Lost(GuestFailure),
    /// It ended.
    #[error("its server ended{}", said(.0))]
    Ended(String),
    /// It did not answer in time.
    #[error("its server did not answer within {limit_s} s ({last}): give it more time with timeout_ms")]
    Late {
        /// How long it had, seconds.
        limit_s: u64,
        /// What the last try came to.
        last: String,
    },
    /// What it answered is no answer.
    #[error("its server answered wrongly: {0}")]
    Wrong(String),
}

fn said(words: &str) -> String {
    let words = words.trim();
    let skipped = words.chars().count().saturating_sub(600);
    let words: String = words.chars().skip(skipped).collect();
    if words.is_empty() { " without a word".to_owned() } else { format!("; it wrote last: {words}") }
}

//! Why a template cannot be had.

use std::path::PathBuf;

use ark_types::agent::AgentName;
use ark_types::image::ImageName;
use ark_types::model::ModelName;
use ark_types::template::MAX_WARM_UP_MS;

use crate::agent::CallError;
use crate::images::ImageError;
use crate::models::{ModelError, ServeError};
use crate::problems::Refusal;
use crate::snapshots::SnapshotError;
use crate::store::AppendError;

/// Why a template cannot be found, built or removed.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// No template of that name.
    #[error("there is no template {0:?}: `ark template ls` lists those there are")]
    NotFound(String),
    /// The name is for an image's own template.
    #[error(
        "the name {name} is for a template that an image or a model has by itself: choose one that begins neither with `default-` nor with `model-`"
    )]
    Reserved {
        /// The name.
        name: AgentName,
    },
    /// The warm-up's limit.
    #[error("a warm-up cannot have {asked_ms} ms: at least 1, at most {MAX_WARM_UP_MS}")]
    Timeout {
        /// What was asked for, milliseconds.
        asked_ms: u64,
    },
    /// It is not there yet.
    #[error("the template {0} is being built: try again when it is there")]
    Building(String),
    /// Agents need it.
    #[error("{agents} living agent{} go on from the template {name}: end them first", if *.agents == 1 { "" } else { "s" })]
    InUse {
        /// The template.
        name: String,
        /// How many.
        agents: u32,
    },
    /// Its image, or the guest's kernel or first root file system.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Its model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A template that serves a model has no other warm-up.
    #[error("a template is warmed up by code or serves a model, not both: leave out warm or model")]
    WarmAndModel,
    /// Its model did not come to be served.
    #[error("the model {model} is not served in the template: {why}")]
    Unserved {
        /// The model.
        model: ModelName,
        /// Why.
        why: ServeError,
    },
    /// Its agent cannot be had, did not start, or could not be snapshotted.
    #[error("the template cannot be built: {}", .0.0.detail)]
    Agent(Refusal),
    /// Why the build failed that this request waited for.
    #[error("{}", .0.0.detail)]
    Shared(Refusal),
    /// There is nothing that could run the warm-up.
    #[error(
        "the image {0} has no evaluator, so the template's warm-up cannot run: leave it out, or choose an image that has one"
    )]
    NoEvaluator(ImageName),
    /// The warm-up threw.
    #[error("the template's warm-up failed with {kind}: {message}{}", at(.last_line))]
    Raised {
        /// The exception's type.
        kind: String,
        /// What it says.
        message: String,
        /// Last line of its traceback.
        last_line: String,
    },
    /// The warm-up did not end.
    #[error(
        "the template's warm-up did not end within {limit_s} s: shorten it, or give it more time with timeout_ms"
    )]
    Endless {
        /// How long it had, seconds.
        limit_s: u64,
    },
    /// The warm-up ended its interpreter, or its guest failed meanwhile.
    #[error("the template's warm-up failed: {0}")]
    WarmUp(CallError),
    /// Its guest failed as its interpreter started.
    #[error("the template's guest failed: {0}")]
    Guest(CallError),
    /// Its snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Its record cannot be written.
    #[error("{path} cannot be written: {}; free some space there, or set ARK_STATE", ark_types::plain::plain(.source))]
    Record {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// That its pool goes with it cannot be recorded.
    #[error("the template has a pool, whose end cannot be recorded: {0}")]
    Pool(AppendError),
    /// It was removed while it was built, or `arkd` is ending.
    #[error("the template was removed before it could be used: try again")]
    Interrupted,
}

fn at(last_line: &str) -> String {
    if last_line.is_empty() { String::new() } else { format!(" ({last_line})") }
}

//! Snapshots on disk: which there are, who needs which, and proof that they are whole.
//!
//! ```text
//!  StateDir/snapshots/<id>/   manifest.json state sums memory [record.json]   named by users, or branch points of forks
//!  StateDir/templates/<..>/   manifest.json state sums memory  record.json    see crate::templates
//!  StateDir/paused/<id>/<..>/ manifest.json state sums memory                 see crate::agent
//!  StateDir/checkpoints/<id>/<..>/                as those                     see crate::agent
//!
//!  Store ── find, hold ──► Hold ── tenant ──► Tenant        a Hold keeps a snapshot and every base below it on disk;
//!    ▲                      │                               a Tenant is a Hold that counts as a living agent
//!    └── adopt (a new one) ─┴─ prove: `ark-vmm verify`, once per state of the files
//! ```
//!
//! One that is damaged stays where it is, listed by its name, refused with the reason, until it is deleted.
//! A snapshot without a name goes when nobody holds it and no diff is over it; a named one only on request. When `arkd` starts,
//! what the agents need that it adopts is held first, and only then what nobody needs is removed.

mod compact;
mod files;
mod hold;
mod owned;
mod proof;
mod store;
mod table;
#[cfg(test)]
mod tests;
mod view;

use std::path::PathBuf;

use ark_types::agent::AgentName;
use ark_types::image::ImageName;
use ark_types::model::ModelName;
use ark_types::plain::plain;
use serde::{Deserialize, Serialize};

use crate::images::ImageError;
use crate::models::ModelError;

pub use hold::{Hold, Tenant};
pub use store::{Draft, Reserved, Store};

pub(crate) use files::{MANIFEST, RECORD, read_record, remove_file, write_file};

/// Label of a VM, and so of its snapshots: the name of its image.
pub const LABEL_IMAGE: &str = "image";
/// Label of a VM, and so of its snapshots: the digest of its image.
pub const LABEL_IMAGE_DIGEST: &str = "image-digest";
/// Label of a VM that serves a model, and so of its snapshots: the name of the model.
pub const LABEL_MODEL: &str = "model";
/// Label of a VM that serves a model, and so of its snapshots: the digest of the model.
pub const LABEL_MODEL_DIGEST: &str = "model-digest";

/// What a named snapshot has beside its manifest: the file `record.json` in its directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Its name.
    pub name: AgentName,
    /// Id of the agent that it was taken of.
    pub agent_id: String,
    /// Name of that agent.
    pub agent: AgentName,
    /// That agent's image.
    pub image: ImageName,
    /// Digest of that image.
    pub image_digest: String,
    /// How long the agent stood still for it, microseconds.
    pub pause_us: u64,
    /// From the request until it was on disk, microseconds.
    pub durable_us: u64,
    /// Id of the request that it was taken for, if that had an `Idempotency-Key`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
}

/// Why a snapshot cannot be found, used, made or removed.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// No snapshot of that name.
    #[error("there is no snapshot {0:?}: `ark snapshot ls` lists those there are")]
    NotFound(String),
    /// The name is another snapshot's.
    #[error(
        "the name {0} belongs to a snapshot: choose another, or delete that one with `ark snapshot rm {0}`"
    )]
    NameTaken(AgentName),
    /// Living agents need it.
    #[error("{agents} living agent{} go on from the snapshot {name}: end them first", plural(*.agents))]
    Lived {
        /// The snapshot.
        name: String,
        /// How many.
        agents: u32,
    },
    /// Diffs need it.
    #[error(
        "{children} snapshot{} hold only what changed since the snapshot {name}: compact them first (`ark snapshot compact \
         NAME`), or lose them with `--orphans`", plural(*.children)
    )]
    Needed {
        /// The snapshot.
        name: String,
        /// How many.
        children: u32,
    },
    /// Damaged, of another release, or without its base.
    #[error("the snapshot in {dir} cannot be used: {why}")]
    Unusable {
        /// Its directory.
        dir: PathBuf,
        /// What is wrong, and what to do.
        why: String,
    },
    /// It cannot be read or merged now.
    #[error("the snapshot in {dir} cannot be read now: {why}; try again")]
    Unproved {
        /// Its directory.
        dir: PathBuf,
        /// What went wrong.
        why: String,
    },
    /// Its disk is not the one that it was taken with.
    #[error(
        "the snapshot needs the image {image} as it was when the snapshot was taken ({wanted}), but that is {found} now: put \
         the old image back, or take the snapshot again"
    )]
    OtherImage {
        /// The image.
        image: ImageName,
        /// Its digest then.
        wanted: String,
        /// Its digest now.
        found: String,
    },
    /// Its second disk is not the one that it was taken with.
    #[error(
        "the snapshot needs the model {model} as it was when the snapshot was taken ({wanted}), but that is {found} now: add \
         the old model again, or take the snapshot again"
    )]
    OtherModel {
        /// The model.
        model: ModelName,
        /// Its digest then.
        wanted: String,
        /// Its digest now.
        found: String,
    },
    /// Its model.
    #[error("the snapshot's model cannot be used: {0}")]
    Model(#[from] ModelError),
    /// Of another agent than the one that is to be put back.
    #[error(
        "the snapshot {snapshot} is not one of the agent {agent}, so {agent} cannot be put back to it: make a new agent of it \
         with `ark restore {snapshot}`"
    )]
    OfAnother {
        /// The snapshot.
        snapshot: AgentName,
        /// The agent.
        agent: AgentName,
    },
    /// Its image.
    #[error("the snapshot's image cannot be used: {0}")]
    Image(#[from] ImageError),
    /// No room.
    #[error("there is no room for a snapshot in {dir}: {why}; free some space there, nothing of it is left")]
    DiskFull {
        /// Where.
        dir: PathBuf,
        /// What was said.
        why: String,
    },
    /// A file of it cannot be read or written.
    #[error("{path} cannot be used: {}; see that the state directory works, or set ARK_STATE", plain(.source))]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// `ark-vmm` cannot be run.
    #[error("{program} cannot be run: {}; build it with `make`, or set ARK_ASSETS", plain(.source))]
    Tool {
        /// The program.
        program: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// `ark-vmm` took too long.
    #[error("{what} did not end within {limit_s} s: try again when the host is less busy")]
    Endless {
        /// What.
        what: String,
        /// How long it was given, seconds.
        limit_s: u64,
    },
}

const fn plural(n: u32) -> &'static str {
    if n == 1 { "" } else { "s" }
}

impl SnapshotError {
    /// An error about the file at `path`; one that tells of a full disk says so.
    #[must_use]
    pub fn file(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        let path = path.into();
        match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => {
                let dir = path.parent().map_or_else(|| path.clone(), std::path::Path::to_owned);
                Self::DiskFull { dir, why: plain(&source) }
            }
            _ => Self::File { path, source },
        }
    }
}

/// Whether `words` of `ark-vmm` tell of a full disk.
#[must_use]
pub fn tells_of_full_disk(words: &str) -> bool {
    ["os error 28)", "os error 122)", "No space left", "no space for"].iter().any(|mark| words.contains(mark))
}

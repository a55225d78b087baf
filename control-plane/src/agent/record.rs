//! What of an agent is on disk, and where: all it takes for a later `arkd` to list it and to go on with it.
//!
//! | file | of | lasts |
//! |---|---|---|
//! | `RunDir/agents/<id>/agent.json`: [`Known`] | every agent that somebody was told of, the ended ones too | as long as the host, like the VMM: not synced |
//! | `StateDir/paused/<id>/agent.json`: [`Paused`] | a paused one, beside its snapshot | for good |
//!
//! An agent is paused as long as the second one is there, whatever the first says. That is written last and removed first, so that it never
//! names a snapshot that is not whole. The first is written before anybody is told of the agent, and again before or when
//! what it says changes: a directory without one is nobody's. Both are written beside and renamed, so they are whole.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ark_types::agent::Agent;
use ark_types::layout::{AgentDir, StateDir};
use ark_types::receipt::Receipt;
use ark_types::vmm::SnapshotId;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::heal::Kept;
use super::wake_paused;
use crate::core::Core;
use crate::reconcile::Reading;
use crate::scheduler::Apart;
use crate::snapshots::{MANIFEST, remove_file, write_file};
use crate::supervisor::ProcessIdentity;

/// Name of either file.
const FILE: &str = "agent.json";
/// Largest record that is read: environments have their own bounds far below.
const MAX_RECORD: u64 = 32 << 20;

/// What is kept of any agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    /// What it was when this was written.
    pub(crate) agent: Agent,
    /// Variables its programs start with.
    pub(super) env: BTreeMap<String, String>,
    /// Its machine-id.
    pub(super) machine_id: String,
    /// How often its guest was renewed.
    pub(super) renewals: u64,
    /// Its last receipt.
    pub(super) receipt: Option<Receipt>,
    /// What is known of its health.
    #[serde(default)]
    pub(super) healing: Kept,
    /// What its clock is taken up with.
    #[serde(default)]
    pub(super) clock: Option<Reading>,
    /// The group that it is kept apart from.
    #[serde(default)]
    pub(super) apart: Option<Apart>,
}

/// An agent that somebody was told of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Known {
    #[serde(flatten)]
    pub(crate) record: Record,
    /// Its VMM; none once that ended.
    pub(crate) process: Option<ProcessIdentity>,
    /// What its memory is read from; none when it was booted.
    pub(crate) snapshot: Option<SnapshotId>,
}

/// An agent that stands still on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Paused {
    #[serde(flatten)]
    pub(super) record: Record,
    /// Its memory.
    pub(super) snapshot: SnapshotId,
}

impl Known {
    /// Writes it into the agent's directory: whole or not at all, as long as the host stays up.
    pub(super) fn write(&self, dir: &AgentDir) -> io::Result<()> {
        let (path, beside) = (dir.0.join(FILE), dir.0.join(format!("{FILE}.new")));
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        fs::rename(beside, path)
    }

    /// Reads what the agent's directory says; none when nobody was told of the agent.
    ///
    /// # Errors
    /// When the file cannot be read; `InvalidData` or `UnexpectedEof` when it is not the record of an agent with that directory.
    pub(crate) fn read(dir: &AgentDir) -> io::Result<Option<Self>> {
        let known: Self = match read(&dir.0) {
            Ok(known) => known,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        if dir.0.file_name().and_then(|name| name.to_str()) == Some(known.record.agent.id.as_str()) {
            Ok(Some(known))
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidData, "it is the record of another agent"))
        }
    }
}

/// Has the record of the agent in `dir` be in `other`, too, where there is none.
pub(super) fn link(dir: &AgentDir, other: &AgentDir) -> io::Result<()> {
    // Whichever is written anew is another file from then on.
    fs::hard_link(dir.0.join(FILE), other.0.join(FILE))
}

fn read<T: DeserializeOwned>(dir: &Path) -> io::Result<T> {
    let file = File::open(dir.join(FILE))?;
    let size = file.metadata()?.len().min(MAX_RECORD);
    // One more, so that its end is found by the first read.
    let mut text = Vec::with_capacity(usize::try_from(size + 1).unwrap_or_default());
    file.take(MAX_RECORD).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Whether the agent `id` is paused, on disk.
pub(crate) fn is_paused(state: &StateDir, id: &str) -> bool {
    state.paused().join(id).join(FILE).exists()
}

/// Directory of what the agent `id` has on disk while it is paused.
pub(super) fn dir(core: &Core, id: &str) -> PathBuf {
    core.config.state.paused().join(id)
}

impl Paused {
    /// Writes it for good: a crash leaves the whole record or none.
    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        write_file(&dir.join(FILE), &serde_json::to_vec_pretty(self)?)?;
        // The directory itself may be new.
        File::open(dir.parent().unwrap_or(dir))?.sync_all()
    }
}

/// The agent `id` is no longer paused: its record goes, and its snapshot as soon as nothing needs it.
pub(super) async fn forget(core: &Core, id: &str) {
    let dir = dir(core, id);
    if let Err(error) = remove_file(&dir.join(FILE)) {
        tracing::error!(%id, %error, "the record of an agent that is paused no more cannot be removed");
    }
    let dirs = dispose_all_but(core, &dir, None);
    core.snapshots.gone(&dirs).await;
    // Not empty while something in it is still needed.
    let _ = fs::remove_dir(&dir);
}

/// Lets every snapshot in `dir` but `kept` go; their directories, for [`crate::snapshots::Store::gone`]. Where none is kept,
/// what never became a snapshot goes, too.
fn dispose_all_but(core: &Core, dir: &Path, kept: Option<SnapshotId>) -> Vec<PathBuf> {
    // All are found before the first goes: a base goes with the diff over it.
    let mut holds = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        match core.snapshots.hold_dir(&path) {
            Ok(hold) if Some(hold.id()) != kept => holds.push(hold),
            // A pause or a removal that was cut off left it.
            Err(_) if kept.is_none() && !path.ends_with(FILE) && !path.join(MANIFEST).exists() => {
                let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                if let Err(error) = removed {
                    tracing::warn!(path = %path.display(), %error, "half a snapshot of a paused agent cannot be removed");
                }
            }
            _ => {}
        }
    }
    let dirs = holds.iter().map(|hold| hold.dir().to_owned()).collect();
    holds.iter().for_each(|hold| core.snapshots.dispose(hold.id()));
    drop(holds);
    // Not empty while something in it is still needed.
    let _ = fs::remove_dir(dir);
    dirs
}

/// Takes in the agents that an earlier `arkd` left paused. One that cannot be taken in stays on disk as it is.
pub(crate) async fn load(core: &Arc<Core>) {
    let entries = fs::read_dir(core.config.state.paused());
    for dir in entries.into_iter().flatten().flatten().map(|entry| entry.path()) {
        let paused = match read::<Paused>(&dir) {
            Ok(paused) => paused,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                dispose_all_but(core, &dir, None);
                continue;
            }
            Err(error) => {
                tracing::error!(path = %dir.display(), %error, "the record of a paused agent cannot be read");
                continue;
            }
        };
        let Paused { record, snapshot } = paused;
        let id = record.agent.id.clone();
        if dir.file_name().and_then(|name| name.to_str()) != Some(id.as_str()) {
            tracing::error!(path = %dir.display(), id, "the record of a paused agent is that of another");
            continue;
        }
        if core.ledger.is_removed(&id).await {
            // Its removal was recorded, and cut off before this went.
            if let Err(error) = remove_file(&dir.join(FILE)) {
                tracing::error!(id, %error, "the record of an agent that was removed cannot be removed");
            }
            dispose_all_but(core, &dir, None);
            continue;
        }
        dispose_all_but(core, &dir, Some(snapshot));
        let hold = match core.snapshots.hold(snapshot) {
            Ok(hold) => hold,
            Err(error) => {
                tracing::error!(id, %error, "a paused agent's snapshot cannot be used");
                continue;
            }
        };
        let name = record.agent.name.clone();
        match wake_paused(core, record, &hold) {
            Ok(()) => tracing::info!(id, %name, "a paused agent is back"),
            Err(error) => {
                tracing::error!(id, %name, %error, "a paused agent cannot be taken in");
            }
        }
    }
}

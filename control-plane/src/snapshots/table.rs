//! Who is whose base, who is held, and what may go.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ark_types::agent::AgentName;
use ark_types::vmm::{MAX_CHAIN, SnapshotId, SnapshotManifest};

use super::files::Stamp;
use super::{Record, SnapshotError};

/// What was proved of a snapshot's files. The lock makes those who need the same proof wait for one.
pub(super) type Proof = Arc<tokio::sync::Mutex<Option<Stamp>>>;

/// Whose directory a snapshot stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The store's own.
    Snapshots,
    /// The templates'.
    Templates,
    /// A paused agent's.
    Paused,
    /// A checkpointed agent's.
    Checkpoints,
}

/// Whether a snapshot that is not needed goes by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Doom {
    /// It stays until somebody says otherwise.
    Stays,
    /// It goes when it is not held and no diff is over it.
    Goes,
    /// It goes when it is not held, and diffs over it become unusable.
    Orphans,
}

/// One snapshot.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) dir: PathBuf,
    pub(super) place: Place,
    pub(super) manifest: Arc<SnapshotManifest>,
    /// Of a named one.
    pub(super) record: Option<Record>,
    /// How a diff over it calls it, where it has no name of its own: `template <name>`.
    pub(super) title: Option<String>,
    pub(super) doom: Doom,
    /// Guards that live.
    pub(super) holds: usize,
    /// Living agents that go on from it, directly.
    pub(super) tenants: u32,
    pub(super) proof: Proof,
}

/// One link of a chain, to make a guard of.
pub(super) struct Link {
    pub(super) id: SnapshotId,
    pub(super) dir: PathBuf,
    pub(super) manifest: Arc<SnapshotManifest>,
    pub(super) proof: Proof,
}

/// A named one that cannot be used.
#[derive(Debug)]
pub(super) struct Damaged {
    pub(super) dir: PathBuf,
    pub(super) record: Record,
    /// What is wrong, as a sentence without a full stop.
    pub(super) why: String,
}

/// All that are known.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) entries: HashMap<SnapshotId, Entry>,
    /// By name, those that were found damaged when arkd started, and still were when they were asked for last.
    pub(super) damaged: HashMap<String, Damaged>,
    /// Names of snapshots that are being taken.
    pub(super) reserved: HashSet<AgentName>,
    /// Whether everything stays from now on.
    pub(super) is_closed: bool,
}

impl Entry {
    pub(super) fn base(&self) -> Option<SnapshotId> {
        self.manifest.base.as_ref().map(|base| base.id)
    }

    pub(super) fn name(&self) -> Option<&AgentName> {
        self.record.as_ref().map(|record| &record.name)
    }
}

impl Table {
    pub(super) fn by_name(&self, name: &str) -> Option<(&SnapshotId, &Entry)> {
        self.entries.iter().find(|(_, entry)| entry.name().is_some_and(|is| is.as_ref() == name))
    }

    pub(super) fn by_dir(&self, dir: &Path) -> Option<SnapshotId> {
        self.entries.iter().find(|(_, entry)| entry.dir == dir).map(|(id, _)| *id)
    }

    /// The diffs directly over `id`.
    pub(super) fn children(&self, id: SnapshotId) -> impl Iterator<Item = (&SnapshotId, &Entry)> {
        self.entries.iter().filter(move |(_, entry)| entry.base() == Some(id))
    }

    /// Number of diffs directly over `id`.
    pub(super) fn children_count(&self, id: SnapshotId) -> u32 {
        u32::try_from(self.children(id).count()).unwrap_or(u32::MAX)
    }

    /// Living agents that go on from `id` or from a diff over it.
    pub(super) fn tenants_above(&self, id: SnapshotId) -> u32 {
        let mut seen = HashSet::from([id]);
        let mut todo = vec![id];
        let mut tenants = 0u32;
        while let Some(id) = todo.pop() {
            tenants = tenants.saturating_add(self.entries.get(&id).map_or(0, |entry| entry.tenants));
            todo.extend(self.children(id).map(|(child, _)| *child).filter(|child| seen.insert(*child)));
        }
        tenants
    }

    /// From `id` down to the full snapshot below it, topmost first.
    pub(super) fn chain(&self, id: SnapshotId) -> Result<Vec<Link>, SnapshotError> {
        let mut links: Vec<Link> = Vec::new();
        let mut next = Some(id);
        while let Some(id) = next {
            let top = links.first().map(|link| link.dir.clone());
            let Some(entry) = self.entries.get(&id) else {
                let Some(dir) = top else { return Err(SnapshotError::NotFound(id.to_string())) };
                let why = format!(
                    "the snapshot {id} below it was deleted or is damaged, and it holds only what changed since; take it again"
                );
                return Err(SnapshotError::Unusable { dir, why });
            };
            if links.len() == MAX_CHAIN {
                let why = format!("more than {MAX_CHAIN} snapshots are below it: compact one of them");
                return Err(SnapshotError::Unusable { dir: top.unwrap_or_else(|| entry.dir.clone()), why });
            }
            let (dir, manifest, proof) =
                (entry.dir.clone(), Arc::clone(&entry.manifest), Arc::clone(&entry.proof));
            links.push(Link { id, dir, manifest, proof });
            next = entry.base();
        }
        Ok(links)
    }

    /// Whether `id` goes as soon as the guards that are left are dropped; it and `depth` generations of diffs over it are looked at.
    pub(super) fn is_to_go(&self, id: SnapshotId, depth: usize) -> bool {
        let Some(entry) = self.entries.get(&id) else { return true };
        entry.tenants == 0
            && match entry.doom {
                Doom::Stays => false,
                Doom::Goes => {
                    depth > 0 && self.children(id).all(|(child, _)| self.is_to_go(*child, depth - 1))
                }
                Doom::Orphans => true,
            }
    }

    /// Takes out `id` when it may go, and then what below it was there for its sake only. What is returned has to be removed
    /// from disk.
    #[must_use]
    pub(super) fn collect(&mut self, id: SnapshotId) -> Vec<PathBuf> {
        let mut gone = Vec::new();
        let mut next = Some(id);
        while let Some(id) = next {
            let Some(entry) = self.entries.get(&id) else { break };
            let may_go = !self.is_closed
                && entry.holds == 0
                && match entry.doom {
                    Doom::Stays => false,
                    Doom::Goes => self.children(id).next().is_none(),
                    Doom::Orphans => true,
                };
            if !may_go {
                break;
            }
            next = entry.base();
            gone.extend(self.entries.remove(&id).map(|entry| entry.dir));
        }
        gone
    }

    /// As [`Self::collect`], of all.
    #[must_use]
    pub(super) fn collect_all(&mut self) -> Vec<PathBuf> {
        let ids: Vec<SnapshotId> = self.entries.keys().copied().collect();
        ids.into_iter().flat_map(|id| self.collect(id)).collect()
    }
}

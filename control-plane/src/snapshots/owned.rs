//! Snapshots that belong to something else, in a directory of its own: they are there as long as it says.

use std::fs;
use std::path::{Path, PathBuf};

use ark_types::vmm::SnapshotId;

use super::store::{Store, directories, remove};
use super::table::Doom;

impl Store {
    /// Whether `id` is known and everything that it is a diff over.
    #[must_use]
    pub fn has(&self, id: SnapshotId) -> bool {
        self.lock().chain(id).is_ok()
    }

    /// Lets the snapshots in `home` go, all but `kept`, as soon as nothing else needs them, and removes what is none. Nobody may be
    /// writing there. The directories that may go are returned, for [`Self::gone`].
    pub fn keep_only(&self, home: &Path, kept: &[SnapshotId]) -> Vec<PathBuf> {
        // One that is not there has nothing in it.
        let dirs = directories(home).unwrap_or_default();
        let (mut gone, mut may_go) = (Vec::new(), Vec::new());
        {
            let mut table = self.lock();
            if table.is_closed {
                return Vec::new();
            }
            // All are found before the first goes: a base goes with the diff over it.
            let found: Vec<_> = dirs.into_iter().map(|dir| (table.by_dir(&dir), dir)).collect();
            for (id, dir) in found {
                match id {
                    Some(id) if kept.contains(&id) => continue,
                    Some(id) => {
                        if let Some(entry) = table.entries.get_mut(&id) {
                            entry.doom = entry.doom.max(Doom::Goes);
                        }
                        gone.extend(table.collect(id));
                    }
                    None => gone.push(dir.clone()),
                }
                may_go.push(dir);
            }
        }
        remove(gone);
        // Not empty while there is something to be kept.
        let _ = fs::remove_dir(home);
        may_go
    }
}

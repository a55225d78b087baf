//! Compacting: a diff and all below it become one full snapshot.

use std::path::Path;

use ark_types::snapshot::Snapshot;

use super::proof::tool;
use super::store::Store;
use super::{SnapshotError, files};
use crate::agent::RENEWALS_FILE;

impl Store {
    /// Makes the snapshot called `name` a full one, with a new id. Who holds the old one keeps it, as do diffs over it. A full
    /// one stays as it is.
    ///
    /// # Errors
    /// [`SnapshotError`]; the snapshot is as before then.
    pub async fn compact(&self, name: &str) -> Result<Snapshot, SnapshotError> {
        let _turn = self.compacting().lock().await;
        let (hold, _) = self.find(name)?;
        if hold.base().is_none() {
            return self.describe(name);
        }
        hold.prove().await?;
        let draft = self.draft();
        tool(self.vmm(), &["compact".as_ref(), hold.dir().as_os_str(), draft.dir().as_os_str()], hold.dir())
            .await?;
        let unusable = |why| SnapshotError::Unusable { dir: draft.dir().to_owned(), why };
        let manifest = files::read_manifest(draft.dir()).map_err(unusable)?;
        if manifest.base.is_some() || manifest.id == hold.id() {
            return Err(unusable(
                "`ark-vmm compact` did not make it a full one with an id of its own".to_owned(),
            ));
        }
        copy_renewals(hold.dir(), draft.dir())?;
        self.replace(hold.id(), draft.dir(), manifest)?;
        self.describe(name)
    }
}

/// What `arkd` wrote beside the old one holds for the new one: it is the same moment of the same guest.
fn copy_renewals(from: &Path, to: &Path) -> Result<(), SnapshotError> {
    match std::fs::read(from.join(RENEWALS_FILE)) {
        Ok(text) => {
            let path = to.join(RENEWALS_FILE);
            files::write_file(&path, &text).map_err(|source| SnapshotError::file(path, source))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(SnapshotError::file(from.join(RENEWALS_FILE), source)),
    }
}

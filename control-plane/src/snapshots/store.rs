//! The table of snapshots and what changes it.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ark_types::agent::AgentName;
use ark_types::layout::StateDir;
use ark_types::vmm::{MAX_CHAIN, SnapshotId, SnapshotManifest};

use super::files::{self, RECORD, Stamp, remove_dir, remove_file, suffixed, write_file};
use super::hold::Hold;
use super::table::{Damaged, Doom, Entry, Place, Proof, Table};
use super::{Record, SnapshotError};
use crate::cleanup::make_private_dir;

/// How long the end of a directory is waited for: whoever holds it without an agent is about to let go.
const GONE_LIMIT: Duration = Duration::from_secs(5);
/// How often it is looked at.
const GONE_LOOK: Duration = Duration::from_millis(2);

/// Every snapshot on this host; clones are the same store.
#[derive(Clone, Debug)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: StateDir,
    /// `ark-vmm`, which proves and compacts.
    vmm: PathBuf,
    table: Mutex<Table>,
    /// Compacting reads and writes much, so one at a time.
    compacting: tokio::sync::Mutex<()>,
}

impl Store {
    /// The snapshots in `state`, after what killed writers left is gone. `vmm` is the program `ark-vmm`. Call it when of the VMMs
    /// of an earlier `arkd` only those run that are to be adopted; what those need is held before [`Self::sweep`].
    ///
    /// # Errors
    /// When a directory cannot be made or read.
    pub fn open(state: &StateDir, vmm: PathBuf) -> io::Result<Self> {
        let mut table = Table::default();
        for (dir, place) in [(state.snapshots(), Place::Snapshots), (state.templates(), Place::Templates)] {
            make_private_dir(&dir)?;
            scan(&dir, place, &mut table)?;
        }
        for (dir, place) in [(state.paused(), Place::Paused), (state.checkpoints(), Place::Checkpoints)] {
            make_private_dir(&dir)?;
            for agent in directories(&dir)? {
                scan(&agent, place, &mut table)?;
            }
        }
        keep_names_unique(&mut table);
        let inner =
            Inner { state: state.clone(), vmm, table: Mutex::new(table), compacting: Default::default() };
        Ok(Self(Arc::new(inner)))
    }

    /// Removes what an earlier `arkd` left and nobody needs any more.
    pub fn sweep(&self) {
        let gone = self.lock().collect_all();
        for dir in gone {
            tracing::info!(dir = %dir.display(), "a branch point that nobody needs any more is removed");
            remove_dir(&dir);
        }
    }

    /// Removes nothing any more for want of somebody who holds it: agents that outlive this `arkd` need it still.
    pub fn close(&self) {
        self.lock().is_closed = true;
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The program `ark-vmm`.
    pub(super) fn vmm(&self) -> &Path {
        &self.0.vmm
    }

    pub(super) fn compacting(&self) -> &tokio::sync::Mutex<()> {
        &self.0.compacting
    }

    /// Directory of the named snapshots and branch points.
    pub(super) fn dir(&self) -> PathBuf {
        self.0.state.snapshots()
    }

    /// A directory for a new snapshot, not made yet.
    #[must_use]
    pub fn fresh_dir(&self) -> PathBuf {
        self.dir().join(format!("{:032x}", rand::random::<u128>()))
    }

    /// [`Self::fresh_dir`], removed with the guard unless it was adopted by then.
    #[must_use]
    pub fn draft(&self) -> Draft {
        self.draft_at(self.fresh_dir())
    }

    /// A guard over `dir` as that of [`Self::draft`].
    #[must_use]
    pub fn draft_at(&self, dir: PathBuf) -> Draft {
        Draft { store: self.clone(), dir }
    }

    /// Takes in the snapshot that this host's own VMM has just written to `dir`, with a name when there is a `record`. What
    /// has no name goes with the last [`Hold`], in `StateDir::snapshots` only.
    ///
    /// # Errors
    /// [`SnapshotError`]; the directory is left as it is then.
    pub fn adopt(&self, dir: &Path, record: Option<Record>) -> Result<Hold, SnapshotError> {
        let unusable = |why| SnapshotError::Unusable { dir: dir.to_owned(), why };
        let stamp = Stamp::of(dir).map_err(|source| SnapshotError::file(dir, source))?;
        let manifest = files::read_manifest(dir).map_err(unusable)?;
        let id = manifest.id;
        if let Some(record) = &record {
            if self.lock().by_name(record.name.as_ref()).is_some() {
                return Err(SnapshotError::NameTaken(record.name.clone()));
            }
            write_record(dir, record)?;
        }
        let place = self.place_of(dir);
        let mut entry = entry(dir.to_owned(), place, manifest, record);
        entry.proof = Proof::new(tokio::sync::Mutex::new(Some(stamp)));
        {
            let mut table = self.lock();
            if table.entries.contains_key(&id) {
                return Err(unusable(format!("there is another snapshot with its id {id}; take it again")));
            }
            table.entries.insert(id, entry);
        }
        self.hold(id).inspect_err(|_| {
            // Its base is not there, so it is of no use.
            self.lock().entries.remove(&id);
        })
    }

    fn place_of(&self, dir: &Path) -> Place {
        if dir.starts_with(self.0.state.templates()) {
            Place::Templates
        } else if dir.starts_with(self.0.state.paused()) {
            Place::Paused
        } else if dir.starts_with(self.0.state.checkpoints()) {
            Place::Checkpoints
        } else {
            Place::Snapshots
        }
    }

    /// Keeps the snapshot `id` and its bases on disk while the guard lives.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`], or [`SnapshotError::Unusable`] when a base is not there.
    pub fn hold(&self, id: SnapshotId) -> Result<Hold, SnapshotError> {
        let links = {
            let mut table = self.lock();
            let links = table.chain(id)?;
            for link in &links {
                if let Some(entry) = table.entries.get_mut(&link.id) {
                    entry.holds += 1;
                }
            }
            links
        };
        // The lock is free again: should a guard be dropped in here, it locks by itself.
        Hold::of(self, links).ok_or_else(|| SnapshotError::NotFound(id.to_string()))
    }

    /// As [`Self::hold`], of the snapshot in `dir`.
    ///
    /// # Errors
    /// As [`Self::hold`].
    pub fn hold_dir(&self, dir: &Path) -> Result<Hold, SnapshotError> {
        let id = self.lock().by_dir(dir);
        self.hold(id.ok_or_else(|| SnapshotError::NotFound(dir.display().to_string()))?)
    }

    /// The snapshot called `name`.
    ///
    /// # Errors
    /// As [`Self::hold`].
    pub fn find(&self, name: &str) -> Result<(Hold, Record), SnapshotError> {
        let found = {
            let mut table = self.lock();
            table.look_again(name)?;
            table.by_name(name).and_then(|(id, entry)| Some((*id, entry.record.clone()?)))
        };
        let (id, record) = found.ok_or_else(|| SnapshotError::NotFound(name.to_owned()))?;
        Ok((self.hold(id)?, record))
    }

    /// Keeps `name` for a snapshot that is being taken.
    ///
    /// # Errors
    /// [`SnapshotError::NameTaken`].
    pub fn reserve(&self, name: &AgentName) -> Result<Reserved, SnapshotError> {
        let mut table = self.lock();
        let is_taken = table.by_name(name.as_ref()).is_some() || table.damaged.contains_key(name.as_ref());
        if is_taken || !table.reserved.insert(name.clone()) {
            return Err(SnapshotError::NameTaken(name.clone()));
        }
        Ok(Reserved { store: self.clone(), name: name.clone() })
    }

    /// Lets the snapshot `id` go as soon as nobody holds it and no diff is over it.
    pub fn dispose(&self, id: SnapshotId) {
        let gone = {
            let mut table = self.lock();
            if let Some(entry) = table.entries.get_mut(&id) {
                entry.doom = entry.doom.max(Doom::Goes);
            }
            table.collect(id)
        };
        remove(gone);
    }

    /// Keeps a snapshot that was to go: it is of use again.
    pub fn keep(&self, id: SnapshotId) {
        if let Some(entry) = self.lock().entries.get_mut(&id) {
            entry.doom = Doom::Stays;
        }
    }

    /// How a diff over `id` names its base, for example `template base`.
    pub fn entitle(&self, id: SnapshotId, title: String) {
        if let Some(entry) = self.lock().entries.get_mut(&id) {
            entry.title = Some(title);
        }
    }

    /// Id and directory of every template's snapshot.
    #[must_use]
    pub fn templates(&self) -> Vec<(SnapshotId, PathBuf)> {
        let table = self.lock();
        let templates = table.entries.iter().filter(|(_, entry)| entry.place == Place::Templates);
        templates.map(|(id, entry)| (*id, entry.dir.clone())).collect()
    }

    /// Living agents that go on from `id`, directly.
    #[must_use]
    pub fn tenants(&self, id: SnapshotId) -> u32 {
        self.lock().entries.get(&id).map_or(0, |entry| entry.tenants)
    }

    /// Deletes the snapshot called `name`; with `orphans` although diffs over it become unusable. The directories that may go
    /// with it are returned, for [`Self::gone`].
    ///
    /// # Errors
    /// [`SnapshotError`] when it is needed.
    pub fn remove(&self, name: &str, orphans: bool) -> Result<Vec<PathBuf>, SnapshotError> {
        let (gone, may_go) = {
            let mut table = self.lock();
            if let Some(damaged) = table.damaged.remove(name) {
                drop(table);
                remove(vec![damaged.dir.clone()]);
                return Ok(vec![damaged.dir]);
            }
            let found = table.by_name(name).map(|(id, entry)| (*id, entry.dir.clone(), entry.tenants));
            let (id, dir, agents) = found.ok_or_else(|| SnapshotError::NotFound(name.to_owned()))?;
            let name = name.to_owned();
            let children = table.children_count(id);
            let agents = if orphans { table.tenants_above(id) } else { agents };
            if agents > 0 {
                return Err(SnapshotError::Lived { name, agents });
            }
            if children > 0 && !orphans {
                return Err(SnapshotError::Needed { name, children });
            }
            // First, so that the next arkd does not find it either.
            remove_file(&dir.join(RECORD)).map_err(|source| SnapshotError::file(dir.join(RECORD), source))?;
            if let Some(entry) = table.entries.get_mut(&id) {
                entry.record = None;
                entry.doom = if orphans { Doom::Orphans } else { Doom::Goes };
            }
            let below = table.chain(id).unwrap_or_default();
            let may_go = below.into_iter().map(|link| link.dir).chain([dir]).collect();
            (table.collect(id), may_go)
        };
        remove(gone);
        Ok(may_go)
    }

    /// Waits until those of `dirs` that are to go are gone from disk; not for what agents or diffs still need.
    pub async fn gone(&self, dirs: &[PathBuf]) {
        let deadline = tokio::time::Instant::now() + GONE_LIMIT;
        for dir in dirs {
            while self.is_to_go(dir) && dir.exists() && tokio::time::Instant::now() < deadline {
                tokio::time::sleep(GONE_LOOK).await;
            }
            if !dir.exists() {
                // Whoever removes it may not have come to that yet.
                remove_empty_home(dir);
            }
        }
    }

    fn is_to_go(&self, dir: &Path) -> bool {
        let table = self.lock();
        !table.is_closed && table.by_dir(dir).is_none_or(|id| table.is_to_go(id, MAX_CHAIN))
    }

    /// Puts `manifest` in `dir` in the place of the snapshot `old`, with its name.
    pub(super) fn replace(
        &self,
        old: SnapshotId,
        dir: &Path,
        manifest: SnapshotManifest,
    ) -> Result<(), SnapshotError> {
        let gone = {
            let mut table = self.lock();
            let record =
                table.entries.get(&old).and_then(|entry| Some((entry.record.clone()?, entry.dir.clone())));
            let (record, old_dir) = record.ok_or_else(|| SnapshotError::NotFound(old.to_string()))?;
            write_record(dir, &record)?;
            if let Err(error) = remove_file(&old_dir.join(RECORD)) {
                // The next start lets the full one have the name.
                tracing::warn!(dir = %old_dir.display(), %error, "the record of a compacted snapshot cannot be removed");
            }
            if let Some(entry) = table.entries.get_mut(&old) {
                entry.record = None;
                entry.doom = Doom::Goes;
            }
            table
                .entries
                .insert(manifest.id, entry(dir.to_owned(), Place::Snapshots, manifest, Some(record)));
            table.collect(old)
        };
        remove(gone);
        Ok(())
    }

    /// A guard was dropped.
    pub(super) fn give_back(&self, id: SnapshotId) {
        let gone = {
            let mut table = self.lock();
            if let Some(entry) = table.entries.get_mut(&id) {
                entry.holds = entry.holds.saturating_sub(1);
            }
            table.collect(id)
        };
        remove(gone);
    }

    pub(super) fn count_tenant(&self, id: SnapshotId, comes: bool) {
        if let Some(entry) = self.lock().entries.get_mut(&id) {
            entry.tenants =
                if comes { entry.tenants.saturating_add(1) } else { entry.tenants.saturating_sub(1) };
        }
    }
}

/// Removes directories, beside the asynchronous runtime where there is one.
pub(super) fn remove(dirs: Vec<PathBuf>) {
    if dirs.is_empty() {
        return;
    }
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) => drop(runtime.spawn_blocking(move || dirs.iter().for_each(|dir| remove_one(dir)))),
        Err(_) => dirs.iter().for_each(|dir| remove_one(dir)),
    }
}

/// Removes a snapshot's directory; that of the agent whose it was goes with the last one in it.
fn remove_one(dir: &Path) {
    remove_dir(dir);
    remove_empty_home(dir);
}

/// Removes the directory of the agent that the snapshot in `dir` belonged to, once there is nothing in it any more.
fn remove_empty_home(dir: &Path) {
    if let Some(agent) = dir.parent()
        && let Some(homes) = agent.parent()
        && let Some(state) = homes.parent().map(|state| StateDir(state.to_owned()))
        && (state.paused() == homes || state.checkpoints() == homes)
    {
        // Not empty while the agent is paused, or another snapshot of it is needed.
        let _ = fs::remove_dir(agent);
    }
}

fn write_record(dir: &Path, record: &Record) -> Result<(), SnapshotError> {
    let path = dir.join(RECORD);
    let text = serde_json::to_vec(record).map_err(|e| SnapshotError::file(&path, e.into()))?;
    write_file(&path, &text).map_err(|source| SnapshotError::file(path, source))
}

fn entry(dir: PathBuf, place: Place, manifest: SnapshotManifest, record: Option<Record>) -> Entry {
    let doom = if place == Place::Snapshots && record.is_none() { Doom::Goes } else { Doom::Stays };
    let manifest = Arc::new(manifest);
    Entry { dir, place, manifest, record, title: None, doom, holds: 0, tenants: 0, proof: Proof::default() }
}

pub(super) fn directories(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Takes in the snapshots in `parent` and removes what their writers did not finish. What else is no snapshot goes, too, but
/// for that of paused agents: they may want it back.
fn scan(parent: &Path, place: Place, table: &mut Table) -> io::Result<()> {
    for dir in directories(parent)? {
        let is_half = dir.extension().is_some_and(|e| e == "tmp");
        if is_half || !(dir.join(files::MANIFEST).exists() || dir.join(RECORD).exists()) {
            if is_half || place != Place::Paused {
                tracing::info!(dir = %dir.display(), "a snapshot that was not finished is removed");
                remove_one(&dir);
            }
            continue;
        }
        match take_in(dir.clone(), place) {
            Ok(entry) => {
                if let Some(double) = table.entries.insert(entry.manifest.id, entry) {
                    tracing::warn!(dir = %double.dir.display(), "two snapshots have the same id; this one is not used");
                }
            }
            Err(why) => {
                tracing::warn!(dir = %dir.display(), why, "a damaged snapshot is left alone");
                if place == Place::Snapshots
                    && let Ok(Some(record)) = files::read_record::<Record>(&dir)
                {
                    table.damaged.insert(record.name.to_string(), Damaged { dir, record, why });
                }
            }
        }
    }
    Ok(())
}

fn take_in(dir: PathBuf, place: Place) -> Result<Entry, String> {
    let manifest = files::read_manifest(&dir)?;
    let record = if place == Place::Snapshots { files::read_record(&dir)? } else { None };
    Ok(entry(dir, place, manifest, record))
}

impl Table {
    /// Takes in the snapshot called `name` if it was found damaged and is whole now.
    ///
    /// # Errors
    /// [`SnapshotError::Unusable`] with what is wrong with it now.
    fn look_again(&mut self, name: &str) -> Result<(), SnapshotError> {
        let Some(damaged) = self.damaged.get_mut(name) else { return Ok(()) };
        let dir = damaged.dir.clone();
        match take_in(dir.clone(), Place::Snapshots) {
            Ok(entry) => {
                self.damaged.remove(name);
                self.entries.entry(entry.manifest.id).or_insert(entry);
                Ok(())
            }
            Err(why) => {
                damaged.why.clone_from(&why);
                Err(SnapshotError::Unusable { dir, why })
            }
        }
    }
}

/// A compaction that a killed `arkd` did not end leaves two snapshots of one name: the full, else the newer one has it.
fn keep_names_unique(table: &mut Table) {
    let mut best: HashMap<AgentName, (SnapshotId, (bool, u64))> = HashMap::new();
    let mut losers = Vec::new();
    for (id, entry) in &table.entries {
        let Some(name) = entry.name() else { continue };
        let rank = (entry.base().is_none(), entry.manifest.created_unix_ms);
        match best.get(name) {
            Some((_, other)) if *other >= rank => losers.push(*id),
            _ => losers.extend(best.insert(name.clone(), (*id, rank)).map(|(loser, _)| loser)),
        }
    }
    // One that can be used has the name before one that cannot.
    table.damaged.retain(|name, _| !best.keys().any(|is| is.as_ref() == name));
    for id in losers {
        if let Some(entry) = table.entries.get_mut(&id) {
            entry.record = None;
            entry.doom = Doom::Goes;
            if let Err(error) = remove_file(&entry.dir.join(RECORD)) {
                tracing::warn!(dir = %entry.dir.display(), %error, "the record of a compacted snapshot cannot be removed");
            }
        }
    }
}

/// A name that is kept while this lives.
#[derive(Debug)]
pub struct Reserved {
    store: Store,
    name: AgentName,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.store.lock().reserved.remove(&self.name);
    }
}

/// A directory that a snapshot is about to be written to. Dropped, it removes what is there, unless that was adopted.
#[derive(Debug)]
pub struct Draft {
    store: Store,
    dir: PathBuf,
}

impl Draft {
    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let adopted = self.store.lock().by_dir(&self.dir).is_some();
        if !adopted {
            remove(vec![self.dir.clone(), suffixed(&self.dir, ".tmp")]);
        }
    }
}

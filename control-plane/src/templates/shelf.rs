//! The templates that are there: `record.json` beside each one's snapshot, and who builds what.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ark_types::agent::AgentName;
use ark_types::layout::StateDir;
use ark_types::problem::Problem;
use ark_types::template::{CreateTemplate, Template};
use ark_types::vmm::SnapshotId;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::inputs::Inputs;
use super::{DEFAULT_PREFIX, Found, TemplateError, default_name};
use crate::host::unix_ms;
use crate::images::Images;
use crate::problems::Refusal;
use crate::snapshots::{Hold, RECORD, Store, read_record, remove_file, write_file};

/// Most templates; beyond it those that nobody has used for longest go.
const MAX_TEMPLATES: usize = 32;
/// A template that nobody has used for this long goes, milliseconds: 30 days.
const UNUSED_MS: u64 = 30 * 24 * 3_600_000;
/// How often the time of a template's last use is written down, at most, milliseconds: a create waits for the disk then.
const NOTE_MS: u64 = 3_600_000;

/// What is known of a template beside its snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    /// What it was asked for; its name is one of `names`.
    pub(super) request: CreateTemplate,
    /// Its names: whoever asks for the same under another name gets the same.
    pub(super) names: Vec<AgentName>,
    /// What it was built of.
    pub(super) digest: String,
    /// Time that the build took, milliseconds.
    pub(super) build_ms: u64,
    /// When it was built, milliseconds since the Unix epoch.
    pub(super) created_unix_ms: u64,
    /// When it was last used, milliseconds since the Unix epoch.
    pub(super) used_unix_ms: u64,
}

/// One that was just built.
pub(super) struct Built {
    pub(super) record: Record,
    /// Its snapshot, adopted by the store and to go with this guard.
    pub(super) hold: Hold,
}

#[derive(Debug)]
struct Kept {
    record: Record,
    id: SnapshotId,
    dir: PathBuf,
    bytes: u64,
    /// When its last use was written down, milliseconds since the Unix epoch.
    noted_unix_ms: u64,
}

/// Every template on this host.
#[derive(Debug)]
pub struct Templates {
    state: StateDir,
    store: Store,
    shelf: Mutex<HashMap<String, Kept>>,
    flights: Mutex<HashMap<String, Flying>>,
    /// No more builds.
    closing: CancellationToken,
}

/// Whose turn it is to build, and how the last build failed.
type Turn = Arc<tokio::sync::Mutex<Option<Problem>>>;

#[derive(Debug, Default)]
struct Flying {
    turn: Turn,
    /// Who is on it, one entry per request.
    names: Vec<AgentName>,
}

/// A place among those who want the template of one digest.
pub(super) struct Flight<'a> {
    templates: &'a Templates,
    digest: String,
    name: AgentName,
    turn: Turn,
}

impl Flight<'_> {
    /// Waits until nobody else builds it.
    pub(super) async fn turn(&self) -> tokio::sync::MutexGuard<'_, Option<Problem>> {
        self.turn.lock().await
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        let mut flights = self.templates.flights();
        if let Some(flying) = flights.get_mut(&self.digest) {
            if let Some(at) = flying.names.iter().position(|name| *name == self.name) {
                flying.names.swap_remove(at);
            }
            if flying.names.is_empty() {
                flights.remove(&self.digest);
            }
        }
    }
}

impl Templates {
    /// The templates in `state` whose snapshots `store` found. A snapshot without a sound record goes.
    #[must_use]
    pub fn open(state: &StateDir, store: &Store) -> Self {
        let mut shelf: HashMap<String, Kept> = HashMap::new();
        for (id, dir) in store.templates() {
            let record = read_record::<Record>(&dir);
            let Ok(Some(record)) = record else {
                let why = record.err().unwrap_or_default();
                tracing::warn!(dir = %dir.display(), why, "a template without a sound record is let go");
                store.dispose(id);
                continue;
            };
            let bytes = store.hold(id).map_or(0, |hold| hold.manifest().written_bytes);
            let kept = Kept { noted_unix_ms: record.used_unix_ms, record, id, dir, bytes };
            store.entitle(id, title(&kept.record));
            if let Some(double) = shelf.insert(kept.record.digest.clone(), kept) {
                store.dispose(double.id);
            }
        }
        Self {
            state: state.clone(),
            store: store.clone(),
            shelf: Mutex::new(shelf),
            flights: Mutex::default(),
            closing: CancellationToken::new(),
        }
    }

    fn shelf(&self) -> MutexGuard<'_, HashMap<String, Kept>> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flights(&self) -> MutexGuard<'_, HashMap<String, Flying>> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) const fn store(&self) -> &Store {
        &self.store
    }

    /// Joins those who want the template with this digest under `name`.
    pub(super) fn board(&self, digest: &str, name: &AgentName) -> Flight<'_> {
        let mut flights = self.flights();
        let flying = flights.entry(digest.to_owned()).or_default();
        flying.names.push(name.clone());
        let turn = Arc::clone(&flying.turn);
        Flight { templates: self, digest: digest.to_owned(), name: name.clone(), turn }
    }

    /// The template built of `inputs` under `name`: the one that is there, else what `building` gives. One builds, others wait
    /// for it. With it come the directories of templates that nobody can name any more.
    pub(super) async fn obtain(
        &self,
        name: &AgentName,
        inputs: &Inputs,
        building: impl Future<Output = Result<Built, TemplateError>>,
    ) -> Result<(Found, Vec<PathBuf>), TemplateError> {
        let flight = self.board(&inputs.digest, name);
        let mut failure = flight.turn().await;
        let building = async {
            tokio::select! {
                built = building => built,
                () = self.closing.cancelled() => Err(TemplateError::Interrupted),
            }
        };
        let is_there = self.shelf().contains_key(&inputs.digest);
        let retired = if is_there {
            self.give_name(name, &inputs.digest)
        } else if let Some(problem) = &*failure {
            // Who waited for the build that failed would only see it fail again.
            return Err(TemplateError::Shared(Refusal(problem.clone())));
        } else {
            let built = building.await.and_then(|built| self.put(built));
            built.map_err(|error| shared(error, &mut failure))?
        };
        let found = self.on_shelf(name, inputs)?.ok_or(TemplateError::Interrupted)?;
        Ok((found, retired))
    }

    /// Gives up what is being built, and builds no more.
    pub fn shut_down(&self) {
        self.closing.cancel();
    }

    /// Where the snapshot of a new template goes: a directory that does not exist.
    pub(super) fn dir_for(&self, digits: &str) -> PathBuf {
        let dir = self.state.templates().join(digits);
        if dir.exists() {
            // The same was there before, and diffs over it still are.
            return self.state.templates().join(format!("{digits}-{:08x}", rand::random::<u32>()));
        }
        dir
    }

    /// Templates, by name; one with two names twice.
    #[must_use]
    pub fn list(&self) -> Vec<Template> {
        let shelf = self.shelf();
        let mut all: Vec<Template> = shelf
            .values()
            .flat_map(|kept| kept.record.names.iter().map(|name| self.view(kept, name)))
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// The template called `name`, as it is now.
    ///
    /// # Errors
    /// [`TemplateError::NotFound`] or [`TemplateError::Building`].
    pub fn describe(&self, name: &str) -> Result<Template, TemplateError> {
        let shelf = self.shelf();
        let found = named(&shelf, name).map(|(kept, name)| self.view(kept, name));
        found.ok_or_else(|| self.not_there(name))
    }

    /// What the template called `name` was asked for.
    pub(super) fn request(&self, name: &AgentName) -> Result<CreateTemplate, TemplateError> {
        let shelf = self.shelf();
        let found = named(&shelf, name.as_ref());
        let request =
            found.map(|(kept, name)| CreateTemplate { name: name.clone(), ..kept.record.request.clone() });
        request.ok_or_else(|| self.not_there(name.as_ref()))
    }

    fn not_there(&self, name: &str) -> TemplateError {
        let is_building =
            self.flights().values().flat_map(|flying| &flying.names).any(|is| is.as_ref() == name);
        if is_building {
            TemplateError::Building(name.to_owned())
        } else {
            TemplateError::NotFound(name.to_owned())
        }
    }

    /// The template built of `inputs`, when it is there and called `name`.
    pub(super) fn on_shelf(&self, name: &AgentName, inputs: &Inputs) -> Result<Option<Found>, TemplateError> {
        let shelf = self.shelf();
        let kept = shelf.get(&inputs.digest).filter(|kept| kept.record.names.contains(name));
        let Some(kept) = kept else { return Ok(None) };
        let (template, id) = (self.view(kept, name), kept.id);
        drop(shelf);
        Ok(Some(Found { hold: self.store.hold(id)?, template, media: inputs.media.clone() }))
    }

    /// The snapshot of the template called `name`, if it is there: what it was built of may have changed since.
    pub(crate) fn current(&self, name: &AgentName) -> Option<Hold> {
        let shelf = self.shelf();
        let id = named(&shelf, name.as_ref()).map(|(kept, _)| kept.id)?;
        drop(shelf);
        self.store.hold(id).ok()
    }

    fn view(&self, kept: &Kept, name: &AgentName) -> Template {
        let Record { request, digest, build_ms, created_unix_ms, used_unix_ms, .. } = &kept.record;
        Template {
            name: name.clone(),
            image: request.image.clone(),
            digest: digest.clone(),
            vcpus: request.vcpus,
            memory_mib: request.memory_mib,
            warm: request.warm.clone(),
            model: request.model.clone(),
            bytes: kept.bytes,
            build_ms: *build_ms,
            created_unix_ms: *created_unix_ms,
            used_unix_ms: *used_unix_ms,
            agents: self.store.tenants(kept.id),
        }
    }

    /// Calls the template with `digest` by `name`, and no other one. Directories of templates that nobody can name any more are
    /// returned.
    pub(super) fn give_name(&self, name: &AgentName, digest: &str) -> Vec<PathBuf> {
        let mut shelf = self.shelf();
        if let Some(kept) = shelf.get_mut(digest)
            && !kept.record.names.contains(name)
        {
            kept.record.names.push(name.clone());
            self.write(kept);
        }
        let others: Vec<String> = shelf
            .iter()
            .filter(|(other, kept)| *other != digest && kept.record.names.contains(name))
            .map(|(other, _)| other.clone())
            .collect();
        others.into_iter().filter_map(|other| self.take_name(&mut shelf, &other, name)).collect()
    }

    /// Takes `name` from the template with `digest`, which goes when it was its last; its directory then.
    fn take_name(
        &self,
        shelf: &mut HashMap<String, Kept>,
        digest: &str,
        name: &AgentName,
    ) -> Option<PathBuf> {
        let kept = shelf.get_mut(digest)?;
        kept.record.names.retain(|is| is != name);
        if let Some(other) = kept.record.names.first() {
            kept.record.request.name = other.clone();
            self.write(kept);
            return None;
        }
        shelf.remove(digest).map(|kept| self.retire(kept))
    }

    /// Takes the template whose snapshot is `id` off the shelf, whatever its names; its directory then.
    pub(super) fn discard(&self, id: SnapshotId) -> Vec<PathBuf> {
        let mut shelf = self.shelf();
        let digest = shelf.iter().find(|(_, kept)| kept.id == id).map(|(digest, _)| digest.clone());
        digest.and_then(|digest| shelf.remove(&digest)).map(|kept| self.retire(kept)).into_iter().collect()
    }

    /// Lets the template go: at once, or with the last agent and diff that needs it.
    fn retire(&self, kept: Kept) -> PathBuf {
        // Without its record the next arkd lets it go, too.
        if let Err(error) = remove_file(&kept.dir.join(RECORD)) {
            tracing::warn!(dir = %kept.dir.display(), %error, "a template's record cannot be removed");
        }
        self.store.dispose(kept.id);
        kept.dir
    }

    /// Puts one that was just built on the shelf. What it replaces is returned.
    pub(super) fn put(&self, built: Built) -> Result<Vec<PathBuf>, TemplateError> {
        let Built { record, hold } = built;
        let (id, dir, bytes) = (hold.id(), hold.dir().to_owned(), hold.manifest().written_bytes);
        let path = dir.join(RECORD);
        let written = encode(&record).and_then(|text| write_file(&path, &text));
        if let Err(source) = written {
            // It goes with `hold`.
            return Err(TemplateError::Record { path, source });
        }
        self.store.keep(id);
        self.store.entitle(id, title(&record));
        let (name, digest) = (record.request.name.clone(), record.digest.clone());
        let kept = Kept { noted_unix_ms: record.used_unix_ms, record, id, dir, bytes };
        let double = self.shelf().insert(digest.clone(), kept);
        let mut retired: Vec<PathBuf> = double.map(|kept| self.retire(kept)).into_iter().collect();
        retired.extend(self.give_name(&name, &digest));
        Ok(retired)
    }

    /// Notes that an agent is forked from the template that `hold` holds.
    pub fn used(&self, hold: &Hold) {
        let now = unix_ms();
        let mut shelf = self.shelf();
        let Some(kept) = shelf.values_mut().find(|kept| kept.id == hold.id()) else { return };
        kept.record.used_unix_ms = now;
        if now.saturating_sub(kept.noted_unix_ms) >= NOTE_MS {
            kept.noted_unix_ms = now;
            self.write(kept);
        }
    }

    /// Writes the record; one that cannot be written costs no more than what changed since.
    fn write(&self, kept: &Kept) {
        self.store.entitle(kept.id, title(&kept.record));
        let path = kept.dir.join(RECORD);
        if let Err(error) = encode(&kept.record).and_then(|text| write_file(&path, &text)) {
            tracing::warn!(path = %path.display(), %error, "a template's record cannot be written");
        }
    }

    /// Takes the name `name` away; the directory of the template that goes with it is returned.
    ///
    /// # Errors
    /// [`TemplateError::NotFound`], [`TemplateError::Building`] or [`TemplateError::InUse`].
    pub(super) fn take_down(&self, name: &str) -> Result<Option<PathBuf>, TemplateError> {
        let mut shelf = self.shelf();
        let Some((kept, name)) = named(&shelf, name) else { return Err(self.not_there(name)) };
        let agents = self.store.tenants(kept.id);
        if agents > 0 && kept.record.names.len() == 1 {
            return Err(TemplateError::InUse { name: name.to_string(), agents });
        }
        let (digest, name) = (kept.record.digest.clone(), name.clone());
        Ok(self.take_name(&mut shelf, &digest, &name))
    }

    /// Lets go what nobody uses: templates of images that are gone, those unused for long, and those beyond the most there
    /// may be, unless one of their names is to be kept, as `is_kept` says. Their directories are returned.
    pub(super) fn sweep(&self, images: &Images, is_kept: impl Fn(&AgentName) -> bool) -> Vec<PathBuf> {
        let mut shelf = self.shelf();
        let now = unix_ms();
        let mut idle: Vec<(u64, String)> = shelf
            .iter()
            .filter(|(_, kept)| self.store.tenants(kept.id) == 0)
            .map(|(digest, kept)| (kept.record.used_unix_ms, digest.clone()))
            .collect();
        idle.sort();
        let mut excess = shelf.len().saturating_sub(MAX_TEMPLATES);
        let mut gone = Vec::new();
        for (used, digest) in idle {
            let Some(kept) = shelf.get(&digest) else { continue };
            let is_old = now.saturating_sub(used) > UNUSED_MS;
            let is_wanted = kept.record.names.iter().any(&is_kept);
            if (!is_wanted && (excess > 0 || is_old)) || lost_its_image(&kept.record, images) {
                excess = excess.saturating_sub(1);
                gone.extend(shelf.remove(&digest).map(|kept| self.retire(kept)));
            }
        }
        gone
    }

    /// As [`Self::sweep`], when `arkd` starts; what the agents need that it adopts has their tenants by then.
    pub fn sweep_at_start(&self, images: &Images, is_kept: impl Fn(&AgentName) -> bool) {
        for dir in self.sweep(images, is_kept) {
            tracing::info!(dir = %dir.display(), "a template that nobody uses is removed");
        }
    }
}

/// Leaves the failure to those who wait, unless it may be another one for them.
fn shared(error: TemplateError, failure: &mut Option<Problem>) -> TemplateError {
    if matches!(error, TemplateError::Endless { .. } | TemplateError::Interrupted) {
        return error;
    }
    let refusal = Refusal::from(error);
    *failure = Some(refusal.0.clone());
    TemplateError::Shared(refusal)
}

/// Whether it is nothing but the template of an image that was removed.
fn lost_its_image(record: &Record, images: &Images) -> bool {
    let own = default_name(&record.request.image);
    let only_own = record.names.iter().all(|name| *name == own && name.as_ref().starts_with(DEFAULT_PREFIX));
    let gone = matches!(
        images.manifest(record.request.image.as_ref()),
        Err(crate::images::ImageError::NotFound { .. })
    );
    only_own && gone
}

fn named<'a>(shelf: &'a HashMap<String, Kept>, name: &str) -> Option<(&'a Kept, &'a AgentName)> {
    shelf.values().find_map(|kept| {
        let name = kept.record.names.iter().find(|is| is.as_ref() == name)?;
        Some((kept, name))
    })
}

fn title(record: &Record) -> String {
    let name = record.names.first().unwrap_or(&record.request.name);
    format!("template {name}")
}

fn encode(record: &Record) -> std::io::Result<Vec<u8>> {
    Ok(serde_json::to_vec(record)?)
}

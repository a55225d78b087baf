//! The models that are there: those of users under the state directory, and those that came with the release.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ark_types::model::{DEFAULT_CONTEXT, ModelName};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use super::ModelError;
use super::served::Flights;
use crate::images::{ImageError, Images, Looks};

/// The model's own file in its directory.
pub(super) const FILE: &str = "model.gguf";
/// What is known of it beside that.
pub(super) const RECORD: &str = "model.json";
/// What the names of directories begin with that are no models: those that come, and those that go.
pub(super) const PASSING: &str = ".passing-";
/// Extension of the release's models.
const EXTENSION: &str = "gguf";
/// Version of the record that this release reads.
pub(super) const VERSION: u32 = 1;
/// Largest record that is read.
const MAX_RECORD: u64 = 1 << 16;
/// Models that are taken in at a time; more wait.
const UPLOADS_AT_ONCE: usize = 2;

/// `model.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    /// [`VERSION`].
    pub(super) version: u32,
    /// `sha256:` and 64 hexadecimal digits over the file.
    pub(super) digest: String,
    /// Size of the file.
    pub(super) bytes: u64,
    /// When the file was last written, seconds and nanoseconds: as long as that stays, so does the digest.
    pub(super) modified: (i64, i64),
    /// Context that it is served with, tokens.
    pub(super) context: u64,
    /// When it was added, seconds since the Unix epoch.
    pub(super) created_unix: u64,
}

/// A model that a VM can have as a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelFile {
    /// Its name.
    pub name: ModelName,
    /// Its file.
    pub path: PathBuf,
    /// `sha256:` and 64 hexadecimal digits over that.
    pub digest: String,
    /// Context that it is served with, tokens.
    pub context: u64,
}

/// What a file says of the model in it, as long as the file looks the same.
type Known = (Looks, Arc<ark_gguf::Model>);

/// See the module.
#[derive(Debug)]
pub struct Models {
    pub(super) dir: PathBuf,
    bundled: PathBuf,
    known: Mutex<HashMap<PathBuf, Known>>,
    pub(super) uploads: Semaphore,
    pub(super) flights: Flights,
}

/// Where a model is.
pub(super) struct Place {
    pub(super) path: PathBuf,
    pub(super) looks: Looks,
    /// None where it came with the release.
    pub(super) record: Option<Record>,
}

impl Models {
    /// Models in `dir` and in the release's `bundled`. What an upload or a removal left that was cut off goes.
    #[must_use]
    pub fn open(dir: PathBuf, bundled: PathBuf) -> Self {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let is_passing = entry.file_name().to_str().is_some_and(|name| name.starts_with(PASSING));
            if is_passing && let Err(error) = fs::remove_dir_all(entry.path()) {
                tracing::warn!(path = %entry.path().display(), %error, "what is left of a model cannot be removed");
            }
        }
        let uploads = Semaphore::new(UPLOADS_AT_ONCE);
        Self { dir, bundled, known: Mutex::default(), uploads, flights: Flights::default() }
    }

    /// Names of all that are there.
    ///
    /// # Errors
    /// [`ModelError::File`] when a directory cannot be read; one that does not exist is empty.
    pub(crate) fn names(&self) -> Result<BTreeSet<ModelName>, ModelError> {
        let mut names = BTreeSet::new();
        for path in entries(&self.dir)? {
            names.extend(path.file_name().and_then(|name| name.to_str()?.parse().ok()));
        }
        for path in entries(&self.bundled)? {
            let is_one = path.extension().is_some_and(|is| is == EXTENSION);
            names.extend(path.file_stem().filter(|_| is_one).and_then(|stem| stem.to_str()?.parse().ok()));
        }
        Ok(names)
    }

    /// The model called `name`.
    ///
    /// # Errors
    /// [`ModelError::NotFound`], of what is no name, too.
    pub(super) fn name(&self, name: &str) -> Result<ModelName, ModelError> {
        name.parse().map_err(|_| self.not_found(name))
    }

    fn not_found(&self, name: &str) -> ModelError {
        let have = self.names().unwrap_or_default().into_iter().collect();
        ModelError::NotFound { name: name.to_owned(), have }
    }

    /// Directory of the model `name` of a user.
    pub(super) fn dir_of(&self, name: &ModelName) -> PathBuf {
        self.dir.join(name.as_ref())
    }

    fn bundled_file(&self, name: &ModelName) -> PathBuf {
        self.bundled.join(format!("{name}.{EXTENSION}"))
    }

    /// Whether it came with the release.
    pub(super) fn is_bundled(&self, name: &ModelName) -> bool {
        !self.dir_of(name).exists() && self.bundled_file(name).exists()
    }

    /// Where the model `name` is. A user's is found before one of the release that came later.
    ///
    /// # Errors
    /// [`ModelError::NotFound`], [`ModelError::Changed`] or [`ModelError::File`].
    pub(super) fn find(&self, name: &ModelName) -> Result<Place, ModelError> {
        let own = self.dir_of(name);
        let (path, record) = match read_record(&own.join(RECORD), name)? {
            Some(record) => (own.join(FILE), Some(record)),
            None => (self.bundled_file(name), None),
        };
        let meta = match fs::metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && record.is_none() => {
                return Err(self.not_found(name.as_ref()));
            }
            other => other.map_err(|source| ModelError::File { path: path.clone(), source })?,
        };
        let looks = Looks::of(&meta);
        if let Some(record) = record.as_ref().filter(|record| record.bytes != looks.size) {
            let why = format!("its file has {} bytes and had {} when it was added", looks.size, record.bytes);
            return Err(ModelError::Changed { name: name.clone(), why });
        }
        Ok(Place { path, looks, record })
    }

    /// What the file of the model `name`, at `place`, says of it; read once per state of the file.
    ///
    /// # Errors
    /// [`ModelError::Unusable`].
    pub(super) fn facts(&self, name: &ModelName, place: &Place) -> Result<Arc<ark_gguf::Model>, ModelError> {
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, model)) = known().get(&place.path).filter(|(looks, _)| *looks == place.looks) {
            return Ok(Arc::clone(model));
        }
        let model = Arc::new(read_model(name, &place.path)?);
        known().insert(place.path.clone(), (place.looks, Arc::clone(&model)));
        Ok(model)
    }

    /// The model `name`: a user's is taken for whole while its file looks as it did when it was added, and read again otherwise.
    /// `images` remembers what was read.
    ///
    /// # Errors
    /// [`ModelError`].
    pub async fn open_file(&self, images: &Images, name: &ModelName) -> Result<ModelFile, ModelError> {
        let place = self.find(name)?;
        let (digest, context) = match &place.record {
            Some(record) if record.modified == place.looks.mtime => (record.digest.clone(), record.context),
            Some(record) => {
                let found = digest_of(images, &place.path).await?;
                if found != record.digest {
                    return Err(other_digest(name, &found, &record.digest));
                }
                (found, record.context)
            }
            None => {
                let context = self.facts(name, &place)?.context.min(DEFAULT_CONTEXT);
                (digest_of(images, &place.path).await?, context)
            }
        };
        Ok(ModelFile { name: name.clone(), path: place.path, digest, context })
    }

    /// Reads every byte of `model`, once per state of its file, and checks what it says of itself.
    ///
    /// # Errors
    /// [`ModelError`] when it is not what it was.
    pub(crate) async fn prove(&self, images: &Images, model: &ModelFile) -> Result<(), ModelError> {
        let found = digest_of(images, &model.path).await?;
        if found != model.digest {
            return Err(other_digest(&model.name, &found, &model.digest));
        }
        self.facts(&model.name, &self.find(&model.name)?).map(drop)
    }
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let unreadable = |source| ModelError::File { path: dir.to_owned(), source };
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(unreadable)?,
    };
    entries.map(|entry| Ok(entry.map_err(unreadable)?.path())).collect()
}

/// The record at `path` of the model `name`; none where there is no such file.
fn read_record(path: &Path, name: &ModelName) -> Result<Option<Record>, ModelError> {
    let mut text = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(MAX_RECORD).read_to_end(&mut text));
    match read {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => drop(other.map_err(|source| ModelError::File { path: path.to_owned(), source })?),
    }
    let changed = |why| ModelError::Changed { name: name.clone(), why };
    let record: Record =
        serde_json::from_slice(&text).map_err(|e| changed(format!("its {RECORD} is not valid: {e}")))?;
    if record.version != VERSION {
        let version = record.version;
        return Err(changed(format!("its {RECORD} has version {version}, this release reads {VERSION}")));
    }
    Ok(Some(record))
}

/// The model in the file at `path`, which is to be called `name`.
///
/// # Errors
/// [`ModelError::Unusable`].
pub(super) fn read_model(name: &ModelName, path: &Path) -> Result<ark_gguf::Model, ModelError> {
    let header = ark_gguf::Header::open(path);
    header
        .and_then(|header| ark_gguf::Model::try_from(&header))
        .map_err(|source| ModelError::Unusable { name: name.clone(), source })
}

async fn digest_of(images: &Images, path: &Path) -> Result<String, ModelError> {
    let file = |source| ModelError::File { path: path.to_owned(), source };
    images.digest_of(path).await.map_err(|error| match error {
        ImageError::Unreadable { source, .. } => file(source),
        other => file(io::Error::other(other)),
    })
}

fn other_digest(name: &ModelName, found: &str, wanted: &str) -> ModelError {
    let why = format!("its file has the digest {found} and had {wanted} when it was added");
    ModelError::Changed { name: name.clone(), why }
}

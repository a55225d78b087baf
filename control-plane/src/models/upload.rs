//! A model on its way in: written beside the others as it comes, checked, and put among them as a whole.
//!
//! What makes it unfit is told as soon as it is known: without its magic number after the first bytes, with a header that
//! no server takes, or for want of memory or disk, after the first few MiB.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ark_gguf::{GgufError, Header};
use ark_types::model::{MAX_MODEL_BYTES, ModelName};
use bytes::Bytes;
use nix::sys::statvfs::statvfs;
use sha2::{Digest as _, Sha256};
use tokio::sync::{SemaphorePermit, mpsc};
use tokio::task::JoinHandle;

use super::ModelError;
use super::size::Size;
use super::store::{FILE, PASSING, RECORD, Record, VERSION, read_model};
use crate::core::Core;
use crate::host::unix_ms;
use crate::images::Looks;
use crate::scheduler::SchedulerConfig;
use crate::snapshots::write_file;

/// Pieces of the file that wait to be written.
const WAITING: usize = 4;
/// Disk that a model leaves to everything else, bytes.
const KEPT: u64 = 256 << 20;
/// After so many bytes it is looked again whether there is room, and whether the header is there and sound.
const LOOK_EVERY: u64 = 4 << 20;
/// So often the header is looked for before the whole file is there.
const EARLY_LOOKS: u32 = 16;

/// What is known of a model before its file.
#[derive(Clone, Debug)]
pub(crate) struct Announced {
    /// Its name.
    pub(crate) name: ModelName,
    /// Context to serve it with, tokens.
    pub(crate) context: Option<u64>,
    /// Size of its file, bytes, where whoever sends it says so.
    pub(crate) bytes: Option<u64>,
}

/// A piece of the file.
enum Piece {
    Bytes(Bytes),
    /// All of it was sent.
    End,
}

/// See the module. Dropping it leaves nothing.
pub(crate) struct Upload<'a> {
    pieces: mpsc::Sender<Piece>,
    writing: JoinHandle<Result<bool, ModelError>>,
    _turn: SemaphorePermit<'a>,
}

/// A directory that goes with this guard.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.0.display(), %error, "half a model cannot be removed; the next arkd tries again");
        }
    }
}

/// Begins to take in a model, when fewer than two others are.
///
/// # Errors
/// [`ModelError`], where what was announced is not wanted; the file need not be sent then.
pub(crate) async fn begin(core: &Arc<Core>, announced: Announced) -> Result<Upload<'_>, ModelError> {
    let models = &core.models;
    if models.is_bundled(&announced.name) {
        return Err(ModelError::Bundled(announced.name));
    }
    if let Some(bytes) = announced.bytes {
        if bytes > MAX_MODEL_BYTES {
            return Err(ModelError::TooManyBytes);
        }
        // The same one may have been sent before.
        if models.find(&announced.name).is_ok_and(|there| there.looks.size != bytes) {
            return Err(ModelError::Taken(announced.name));
        }
    }
    // Closed never: an error cannot be.
    let turn = models.uploads.acquire().await.map_err(|e| ModelError::BrokenOff(e.to_string()))?;
    let file = |source| ModelError::File { path: models.dir.clone(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&models.dir).map_err(file)?;
    check_room(&models.dir, announced.bytes.unwrap_or_default())?;
    let draft = Draft(models.dir.join(format!("{PASSING}{:016x}", rand::random::<u64>())));
    fs::DirBuilder::new().mode(0o700).create(&draft.0).map_err(file)?;
    let (pieces, incoming) = mpsc::channel(WAITING);
    let (target, scheduler) = (models.dir_of(&announced.name), *core.scheduler.config());
    let arrival = Arrival { draft, target, announced, scheduler };
    let writing = tokio::task::spawn_blocking(move || arrival.receive(incoming));
    Ok(Upload { pieces, writing, _turn: turn })
}

impl Upload<'_> {
    /// Passes on the next bytes of the file. What is no more wanted is dropped: [`Self::refused`] tells.
    pub(crate) async fn send(&self, bytes: Bytes) {
        let _ = self.pieces.send(Piece::Bytes(bytes)).await;
    }

    /// Waits until no more of the file is wanted; [`Self::finish`] says why.
    pub(crate) async fn refused(&self) {
        self.pieces.closed().await;
    }

    /// All of the file was sent. Whether that made a model which was not there before.
    ///
    /// # Errors
    /// [`ModelError`]; nothing is left then.
    pub(crate) async fn finish(self) -> Result<bool, ModelError> {
        let Self { pieces, writing, _turn } = self;
        // Who does not take it has failed, and says why.
        let _ = pieces.send(Piece::End).await;
        ended(writing).await
    }

    /// The rest of the file does not come, because of `why`: waits until nothing of it is left. What was wrong with it before is
    /// told first.
    pub(crate) async fn give_up(self, why: String) -> ModelError {
        let Self { pieces, writing, _turn } = self;
        drop(pieces);
        match ended(writing).await {
            Ok(_) | Err(ModelError::BrokenOff(_)) => ModelError::BrokenOff(why),
            Err(error) => error,
        }
    }
}

async fn ended(writing: JoinHandle<Result<bool, ModelError>>) -> Result<bool, ModelError> {
    writing.await.unwrap_or_else(|e| Err(ModelError::BrokenOff(e.to_string())))
}

/// A model as it arrives.
struct Arrival {
    draft: Draft,
    target: PathBuf,
    announced: Announced,
    scheduler: SchedulerConfig,
}

impl Arrival {
    /// Writes the file as it comes, and puts the model where it belongs; whether it was not there before.
    fn receive(self, mut incoming: mpsc::Receiver<Piece>) -> Result<bool, ModelError> {
        let (path, models) =
            (self.draft.0.join(FILE), self.target.parent().unwrap_or(&self.target).to_owned());
        let failed = |source| ModelError::File { path: path.clone(), source };
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(failed)?;
        let (mut hasher, mut bytes, mut looked, mut looks) = (Sha256::new(), 0u64, 0u64, EARLY_LOOKS);
        loop {
            let piece = match incoming.blocking_recv() {
                Some(Piece::Bytes(piece)) => piece,
                Some(Piece::End) => break,
                None => return Err(ModelError::BrokenOff("the connection ended before the file".to_owned())),
            };
            let before = bytes;
            bytes = bytes.saturating_add(piece.len() as u64);
            if bytes > MAX_MODEL_BYTES {
                return Err(ModelError::TooManyBytes);
            }
            file.write_all(&piece).map_err(failed)?;
            hasher.update(&piece);
            if before == 0 || bytes - looked >= LOOK_EVERY {
                looked = bytes;
                check_room(
                    &models,
                    self.announced.bytes.map_or(LOOK_EVERY, |all| all.saturating_sub(bytes)),
                )?;
                if looks > 0 {
                    looks = if self.look_early(&path)? { 0 } else { looks - 1 };
                }
            }
        }
        file.sync_all().map_err(failed)?;
        let digits: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        let modified = Looks::of(&file.metadata().map_err(failed)?).mtime;
        self.settle(format!("sha256:{digits}"), bytes, modified)
    }

    /// Whether the header came already and can be served.
    fn look_early(&self, path: &Path) -> Result<bool, ModelError> {
        let Some(bytes) = self.announced.bytes else { return Ok(false) };
        let failed = |source| ModelError::File { path: path.to_owned(), source };
        let header = Header::read(BufReader::new(File::open(path).map_err(failed)?), bytes);
        match header.and_then(|header| ark_gguf::Model::try_from(&header)) {
            Ok(model) => self.size(&model).map(|_| true),
            // It needs bytes that are yet to come.
            Err(GgufError::Io(_)) => Ok(false),
            Err(GgufError::Truncated { have, .. }) if have < bytes => Ok(false),
            Err(source) => Err(self.unusable(source)),
        }
    }

    fn unusable(&self, source: GgufError) -> ModelError {
        ModelError::Unusable { name: self.announced.name.clone(), source }
    }

    fn size(&self, model: &ark_gguf::Model) -> Result<Size, ModelError> {
        let Announced { name, context, .. } = &self.announced;
        let size = Size::of(name, model, *context)?;
        size.check_fits(name, &self.scheduler)?;
        Ok(size)
    }

    /// Checks the whole file, and puts the model where it belongs.
    fn settle(self, digest: String, bytes: u64, modified: (i64, i64)) -> Result<bool, ModelError> {
        let name = &self.announced.name;
        let model = read_model(name, &self.draft.0.join(FILE))?;
        let context = self.size(&model)?.context;
        let record =
            Record { version: VERSION, digest, bytes, modified, context, created_unix: unix_ms() / 1000 };
        let path = self.draft.0.join(RECORD);
        let text = serde_json::to_vec_pretty(&record).map_err(io::Error::other);
        text.and_then(|text| write_file(&path, &text)).map_err(|source| ModelError::File { path, source })?;
        let failed = |source| ModelError::File { path: self.target.clone(), source };
        match fs::rename(&self.draft.0, &self.target) {
            Ok(()) => sync_parent(&self.target).map_err(failed)?,
            Err(e) if matches!(e.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) => {
                return self.is_the_one_there(&record);
            }
            Err(source) => return Err(failed(source)),
        }
        tracing::info!(model = %name, digest = record.digest, bytes, context, "a model was added");
        Ok(true)
    }

    /// It is fine where the one that is there is the same.
    fn is_the_one_there(&self, record: &Record) -> Result<bool, ModelError> {
        let text = fs::read(self.target.join(RECORD)).unwrap_or_default();
        let is_same = serde_json::from_slice::<Record>(&text)
            .is_ok_and(|there| (&there.digest, there.context) == (&record.digest, record.context));
        if is_same { Ok(false) } else { Err(ModelError::Taken(self.announced.name.clone())) }
    }
}

/// Waits until the names beside `path` are on disk.
pub(super) fn sync_parent(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(path))?.sync_all()
}

/// Refuses `bytes` more in `dir` where too little of the disk would be left.
fn check_room(dir: &Path, bytes: u64) -> Result<(), ModelError> {
    let stat = statvfs(dir).map_err(|e| ModelError::File { path: dir.to_owned(), source: e.into() })?;
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    if free >= bytes.saturating_add(KEPT) {
        return Ok(());
    }
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    Err(ModelError::NoRoom {
        dir: dir.to_owned(),
        need_mib: mib(bytes),
        free_mib: free >> 20,
        kept_mib: mib(KEPT),
    })
}

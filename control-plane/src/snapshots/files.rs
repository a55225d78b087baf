//! The files of one snapshot's directory.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use ark_types::plain::plain;
use ark_types::vmm::{SNAPSHOT_VERSION, SnapshotManifest};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// Written last by `ark-vmm`; a directory without it is no snapshot.
pub(crate) const MANIFEST: &str = "manifest.json";
/// What `arkd` writes beside it.
pub(crate) const RECORD: &str = "record.json";
/// Every file that a snapshot's use depends on.
const FILES: [&str; 4] = [MANIFEST, "state", "sums", "memory"];
/// Largest manifest or record that is read: far more than 32 disks' paths need.
const MAX_JSON: u64 = 1 << 20;

/// What the files of a snapshot look like from outside; while it stays, a proof of their content stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stamp([[i64; 6]; FILES.len()]);

impl Stamp {
    /// Looks at the files in `dir`.
    pub(super) fn of(dir: &Path) -> io::Result<Self> {
        let mut stamp = [[0; 6]; FILES.len()];
        for (slot, name) in stamp.iter_mut().zip(FILES) {
            let named = |e: io::Error| io::Error::new(e.kind(), format!("{name}: {}", plain(&e)));
            let meta = fs::symlink_metadata(dir.join(name)).map_err(named)?;
            let (ino, size) = (meta.ino().cast_signed(), meta.size().cast_signed());
            *slot = [ino, size, meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec()];
        }
        Ok(Self(stamp))
    }
}

/// A manifest as it stands in its file; its seal is `ark-vmm`'s to check.
#[derive(Deserialize)]
struct Sealed<T> {
    manifest: T,
}

/// The part of every release's manifest.
#[derive(Deserialize)]
struct Version {
    version: u64,
}

/// The manifest of the snapshot in `dir`; an error is a sentence without a full stop.
pub(super) fn read_manifest(dir: &Path) -> Result<SnapshotManifest, String> {
    let path = dir.join(MANIFEST);
    let text = read(&path).map_err(|e| {
        format!("{MANIFEST} cannot be read: {}; use another copy or take it again", plain(&e))
    })?;
    let damaged =
        |e| format!("{MANIFEST} is damaged ({e}): use another copy of the snapshot or take it again");
    let Sealed { manifest: Version { version } } = serde_json::from_slice(&text).map_err(damaged)?;
    if version != u64::from(SNAPSHOT_VERSION) {
        let (age, advice) = if version > u64::from(SNAPSHOT_VERSION) {
            ("a newer", "update")
        } else {
            ("an older", "take it again")
        };
        return Err(format!(
            "{MANIFEST} was written by {age} release (format {version}), this one reads {SNAPSHOT_VERSION}: {advice}"
        ));
    }
    serde_json::from_slice(&text).map(|Sealed { manifest }| manifest).map_err(damaged)
}

/// The record in `dir`; none when there is no such file.
pub(crate) fn read_record<T: DeserializeOwned>(dir: &Path) -> Result<Option<T>, String> {
    match read(&dir.join(RECORD)) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|e| format!("{RECORD} is damaged ({e})")),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(format!("{RECORD} cannot be read: {}", plain(&e))),
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    // A file that is a pipe must not stop arkd's start.
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let mut text = Vec::new();
    file.take(MAX_JSON).read_to_end(&mut text)?;
    Ok(text)
}

/// Writes `bytes` to `path`: whole and lasting, or not at all.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let beside = suffixed(path, ".new");
    let written = (|| {
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        sync_parent(path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written
}

/// Removes the file at `path` for good; one that is not there is fine.
pub(crate) fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
        Ok(()) => sync_parent(path),
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |dir| fs::File::open(dir)?.sync_all())
}

/// `path` with `suffix` at its end.
pub(super) fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Removes a snapshot's directory. Its record and manifest go first, so that what an `arkd` that is killed meanwhile leaves is known
/// for what it is by the next one.
pub(super) fn remove_dir(dir: &Path) {
    let removed = remove_file(&dir.join(RECORD)).and_then(|()| remove_file(&dir.join(MANIFEST)));
    let removed = removed.and_then(|()| fs::remove_dir_all(dir));
    if let Err(error) = removed
        && !matches!(error.kind(), io::ErrorKind::NotFound)
    {
        tracing::warn!(dir = %dir.display(), %error, "a snapshot's directory cannot be removed; the next start tries again");
    } else {
        // Without a manifest there may still be a directory.
        let _ = fs::remove_dir_all(dir);
    }
}

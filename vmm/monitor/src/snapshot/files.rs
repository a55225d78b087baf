//! Opening, reading and making files of a snapshot, none of which is trusted to be a file.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::SnapshotError;

/// Opens a regular file for reading. A FIFO does not block, a symbolic link is not followed.
pub(super) fn open(path: &Path) -> Result<File, SnapshotError> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|e| SnapshotError::reading("open", path, e))?;
    let kind = file.metadata().map_err(|e| SnapshotError::reading("look at", path, e))?;
    if !kind.is_file() {
        return Err(SnapshotError::foreign(path, "it is not a regular file"));
    }
    Ok(file)
}

/// Length of an open file, bytes.
pub(super) fn length(file: &File, path: &Path) -> Result<u64, SnapshotError> {
    Ok(file.metadata().map_err(|e| SnapshotError::reading("look at", path, e))?.len())
}

/// All of a regular file of at most `most` bytes.
pub(super) fn read_at_most(path: &Path, most: u64) -> Result<Vec<u8>, SnapshotError> {
    let file = open(path)?;
    let length = length(&file, path)?;
    if length > most {
        return Err(SnapshotError::damaged(
            path,
            format!("it has {length} bytes, at most {most} are possible"),
        ));
    }
    let mut bytes = Vec::new();
    // One more than its length, so that a file that grows is noticed by its checksum and never read without end.
    file.take(length + 1).read_to_end(&mut bytes).map_err(|e| SnapshotError::reading("read", path, e))?;
    Ok(bytes)
}

/// All of a file whose length and SHA-256 the manifest tells.
pub(super) fn read_sealed(path: &Path, length: u64, sha256: &str) -> Result<Vec<u8>, SnapshotError> {
    let bytes = read_at_most(path, length)?;
    if bytes.len() as u64 != length {
        let what = format!("it has {} bytes, its manifest says {length}", bytes.len());
        return Err(SnapshotError::damaged(path, what));
    }
    if digest(&bytes) != sha256 {
        return Err(SnapshotError::damaged(path, "its SHA-256 is not the one in its manifest"));
    }
    Ok(bytes)
}

/// Makes a file that was not there, writes `bytes` and waits until they are on disk.
pub(super) fn write(path: &Path, bytes: &[u8], written: u64) -> Result<(), SnapshotError> {
    let mut file = create(path)?;
    file.write_all(bytes).map_err(|e| SnapshotError::writing("write", path, written, e))?;
    file.sync_all().map_err(|e| SnapshotError::writing("sync", path, written, e))
}

/// Makes a file that was not there. Its mode says that nobody changes it: forks may have it mapped.
pub(super) fn create(path: &Path) -> Result<File, SnapshotError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o400)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(|e| SnapshotError::writing("create", path, 0, e))
}

/// Waits until the names in `dir` are on disk.
pub(super) fn sync_dir(dir: &Path, written: u64) -> Result<(), SnapshotError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|e| SnapshotError::writing("sync the directory", dir, written, e))
}

/// SHA-256, hexadecimal.
pub(super) fn digest(bytes: &[u8]) -> String {
    use std::fmt::Write;
    Sha256::digest(bytes).iter().fold(String::with_capacity(64), |mut hex, byte| {
        // Writing to a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

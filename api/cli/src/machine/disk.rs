//! The data disk: a sparse file with ext4, made once, kept until its owner removes it.

use ark_types::plain::plain;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::qemu::find_program;
use crate::dirs::make_private_dir;

/// Size when the user names none, MiB.
pub(crate) const DEFAULT_DISK_MIB: u64 = 8192;
/// Smallest size that is of use, MiB.
const MIN_DISK_MIB: u64 = 256;
/// Free space the host must have before a disk is made, bytes: ext4's metadata and a first few agents.
const MIN_FREE: u64 = 256 << 20;

/// The data disk cannot be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    /// Too small to be of use.
    #[error("a data disk of {0} MiB is too small: ask for {MIN_DISK_MIB} or more")]
    TooSmall(u64),
    /// The file system of the state directory is full.
    #[error("{} has only {free_mib} MiB free, too little for the machine's data disk: free some space, or set ARK_STATE to a directory elsewhere", .dir.display())]
    Full {
        /// The state directory.
        dir: PathBuf,
        /// What is left, MiB.
        free_mib: u64,
    },
    /// `mkfs.ext4` is missing.
    #[error("mkfs.ext4 is missing: install Debian's package e2fsprogs")]
    NoMkfs,
    /// `mkfs.ext4` failed.
    #[error("mkfs.ext4 could not prepare the machine's data disk: {0}")]
    Mkfs(String),
    /// A file operation failed.
    #[error("the machine's data disk {} cannot be made: {}", .path.display(), plain(source))]
    File {
        /// The disk.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Makes the disk at `path` unless it is there. Made beside and renamed, so that an interrupted attempt leaves none.
pub(crate) fn ensure(path: &Path, size_mib: Option<u64>) -> Result<(), DiskError> {
    if path.exists() {
        return Ok(());
    }
    let size_mib = size_mib.unwrap_or(DEFAULT_DISK_MIB);
    if size_mib < MIN_DISK_MIB {
        return Err(DiskError::TooSmall(size_mib));
    }
    let failed = |source| DiskError::File { path: path.to_owned(), source };
    let dir = path.parent().unwrap_or(Path::new("/"));
    make_private_dir(dir).map_err(failed)?;
    let free = free_bytes(dir).map_err(failed)?;
    if free < MIN_FREE {
        return Err(DiskError::Full { dir: dir.to_owned(), free_mib: free >> 20 });
    }
    let mkfs = find_program("mkfs.ext4").ok_or(DiskError::NoMkfs)?;
    let draft = tempfile::NamedTempFile::new_in(dir).map_err(failed)?;
    draft.as_file().set_len(size_mib << 20).map_err(failed)?;
    // No blocks reserved for root: the machine has no other user. Features stay Debian's, so its kernel knows them.
    let output = Command::new(mkfs)
        .args(["-q", "-F", "-m", "0", "-L", "ark-data"])
        .arg(draft.path())
        .stdin(Stdio::null())
        .output()
        .map_err(failed)?;
    if !output.status.success() {
        return Err(DiskError::Mkfs(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    draft.persist(path).map_err(|e| failed(e.error))?;
    File::open(dir).and_then(|d| d.sync_all()).map_err(failed)
}

/// Bytes this user may still write to the file system that holds `path`.
pub(crate) fn free_bytes(path: &Path) -> io::Result<u64> {
    let stat = nix::sys::statvfs::statvfs(path)?;
    Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

/// Free space where `path` is, or would be: of its nearest parent that exists.
pub(crate) fn free_near(path: &Path) -> io::Result<u64> {
    let there = path.ancestors().find(|p| fs::symlink_metadata(p).is_ok()).unwrap_or(Path::new("/"));
    free_bytes(there)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn the_disk_is_sparse_formatted_and_made_once() {
        if find_program("mkfs.ext4").is_none() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("machine/data.ext4");
        assert!(matches!(ensure(&path, Some(8)), Err(DiskError::TooSmall(8))));
        ensure(&path, Some(512)).unwrap();
        let meta = fs::metadata(&path).unwrap();
        assert_eq!(meta.len(), 512 << 20);
        assert!(meta.blocks() * 512 < 64 << 20, "{} blocks", meta.blocks());
        let mut magic = [0; 2];
        File::open(&path).unwrap().read_exact_at(&mut magic, 0x438).unwrap();
        assert_eq!(magic, [0x53, 0xef], "ext4's magic number");
        fs::write(&path, "kept").unwrap();
        ensure(&path, None).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"kept");
        assert_eq!(fs::read_dir(dir.path().join("machine")).unwrap().count(), 1, "no draft is left");
    }
}

//! Files of the guest: metadata, listings, streams.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ark_link::Connection;
use ark_types::files::{FileKind, FileStat};
use ark_types::guest::{ErrorCode, Frame, GuestError, Kind};
use ark_types::plain::plain;

use crate::failure::{Failure, failure, system_failure};

mod read;
mod write;

pub(crate) use read::read;
pub(crate) use write::write;

/// Most entries of a directory that is listed: each takes some hundred bytes of the guest's memory while it is.
const MAX_ENTRIES: usize = 200_000;
/// A listing is sent in pieces of about this many bytes, not entry by entry.
const LIST_PIECE: usize = 32 << 10;

/// The error of a file operation as the host is told it.
fn file_failure(doing: &str, path: &Path, error: &io::Error) -> GuestError {
    let what = format!("{} cannot be {doing}", path.display());
    let message = format!("{what}: {}", reason(error));
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => failure(ErrorCode::FileNotFound, message),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM) => system_failure(&what, error),
        _ => failure(ErrorCode::FileError, message),
    }
}

/// The error in words.
fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOSPC) => {
            "no space is left on the agent's disk, which lives in its memory; give it more memory".to_owned()
        }
        _ => plain(error),
    }
}

/// `text` as a path, which must be absolute.
fn absolute(text: &str) -> Result<PathBuf, GuestError> {
    if text.starts_with('/') && !text.contains('\0') {
        Ok(PathBuf::from(text))
    } else {
        Err(failure(ErrorCode::BadRequest, format!("{text:?} is not an absolute path")))
    }
}

/// `metadata` of the file `path` under the name `name`.
fn describe(name: String, path: &Path, metadata: &Metadata) -> FileStat {
    let file_type = metadata.file_type();
    let kind = if file_type.is_file() {
        FileKind::File
    } else if file_type.is_dir() {
        FileKind::Directory
    } else if file_type.is_symlink() {
        FileKind::Symlink
    } else {
        FileKind::Other
    };
    let target = file_type.is_symlink().then(|| fs::read_link(path).ok()).flatten();
    FileStat {
        name,
        kind,
        size: metadata.len(),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime_unix_ms: metadata
            .mtime()
            .saturating_mul(1000)
            .saturating_add(metadata.mtime_nsec() / 1_000_000),
        target: target.map(|t| t.to_string_lossy().into_owned()),
    }
}

/// Serves `FileStat`.
pub(crate) fn stat(connection: &mut Connection, path: &str) -> Result<(), Failure> {
    let file = absolute(path)?;
    let metadata = fs::symlink_metadata(&file).map_err(|e| file_failure("looked at", &file, &e))?;
    let info = describe(path.to_owned(), &file, &metadata);
    Ok(connection.send(&Frame::json(Kind::FileInfo, &info)?)?)
}

/// Serves `FileList`: entries by name.
pub(crate) fn list(connection: &mut Connection, path: &str) -> Result<(), Failure> {
    let dir = absolute(path)?;
    let failed = |e: io::Error| file_failure("listed", &dir, &e);
    let mut names = Vec::new();
    for entry in fs::read_dir(&dir).map_err(|e| match e.raw_os_error() {
        Some(libc::ENOTDIR) => failure(ErrorCode::FileError, format!("{} is not a directory", dir.display())),
        _ => failed(e),
    })? {
        if names.len() == MAX_ENTRIES {
            let message = format!("{} has more than {MAX_ENTRIES} entries", dir.display());
            return Err(failure(ErrorCode::Exhausted, message).into());
        }
        names.push(entry.map_err(failed)?.file_name());
    }
    names.sort_unstable();
    let mut piece = Vec::new();
    for name in names {
        let file = dir.join(&name);
        // What has gone since it was listed is not there.
        let Ok(metadata) = fs::symlink_metadata(&file) else { continue };
        let info = describe(name.to_string_lossy().into_owned(), &file, &metadata);
        piece.extend_from_slice(&Frame::json(Kind::FileInfo, &info)?.encode());
        if piece.len() >= LIST_PIECE {
            connection.send_encoded(&piece)?;
            piece.clear();
        }
    }
    piece.extend_from_slice(&Frame::empty(Kind::End).encode());
    Ok(connection.send_encoded(&piece)?)
}

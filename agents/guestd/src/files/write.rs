//! Receiving a file: into a temporary name beside its own, which it gets once it is complete.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use ark_link::{Connection, LinkError};
use ark_types::guest::{ErrorCode, FileWrite, Frame, GuestError, Kind};

use super::{absolute, file_failure};
use crate::failure::{Failure, failure};

/// A file in the making; dropped before [`Upload::complete`], it leaves nothing.
struct Upload {
    file: File,
    temporary: PathBuf,
    complete: bool,
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.complete {
            // Nobody is left to tell.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

impl Upload {
    /// A temporary file in the directory of `path`, which is made if it is missing.
    fn begin(path: &Path) -> io::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let parent = path.parent().unwrap_or(Path::new("/"));
        DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
        loop {
            let number = COUNT.fetch_add(1, Ordering::Relaxed);
            let name = OsString::from(format!(".ark-upload-{}-{number}", std::process::id()));
            let temporary = parent.join(name);
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary) {
                Ok(file) => return Ok(Self { file, temporary, complete: false }),
                // Left by a guestd that was killed, or made by a program: try the next name.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Gives it `mode`, the owner of the file it replaces, and its name.
    fn complete(mut self, path: &Path, mode: u32) -> io::Result<()> {
        if let Ok(old) = fs::metadata(path) {
            fchown(&self.file, Some(old.uid()), Some(old.gid()))?;
        }
        // After the owner: changing that clears set-user-id bits.
        self.file.set_permissions(Permissions::from_mode(mode & 0o7777))?;
        fs::rename(&self.temporary, path)?;
        self.complete = true;
        Ok(())
    }
}

/// Serves `FileWrite`.
pub(crate) fn write(connection: &mut Connection, request: &FileWrite) -> Result<(), Failure> {
    let path = destination(&absolute(&request.path)?)?;
    let failed = |e: io::Error| file_failure("written", &path, &e);
    let mut upload = Upload::begin(&path).map_err(failed)?;
    loop {
        let frame = connection.recv()?.ok_or(LinkError::CutShort)?;
        match frame.kind {
            Kind::Data => upload.file.write_all(&frame.payload).map_err(failed)?,
            Kind::End => {
                upload.complete(&path, request.mode).map_err(failed)?;
                return Ok(connection.send(&Frame::empty(Kind::Ok))?);
            }
            kind => {
                let message = format!("a {kind:?} frame has no place in an upload");
                return Err(failure(ErrorCode::BadRequest, message).into());
            }
        }
    }
}

/// Where a file for `path` goes: to the end of symbolic links, and nowhere but to a regular file's or a free name.
fn destination(path: &Path) -> Result<PathBuf, GuestError> {
    let refused = |what: &str| failure(ErrorCode::FileError, format!("{} {what}", path.display()));
    match fs::metadata(path) {
        Ok(m) if m.is_dir() => Err(refused("is a directory; name the file in it")),
        Ok(m) if !m.is_file() => Err(refused("is not a regular file")),
        Ok(_) => fs::canonicalize(path).map_err(|e| file_failure("written", path, &e)),
        Err(e) if e.kind() == io::ErrorKind::NotFound && path.file_name().is_some() => Ok(path.to_owned()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(refused("names no file")),
        Err(e) => Err(file_failure("written", path, &e)),
    }
}

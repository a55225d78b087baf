//! Why a snapshot cannot be used or taken.

use std::io;
use std::path::{Path, PathBuf};

use ark_hal::memory::MemoryError;
use ark_types::vmm::{ExitReason, MAX_CHAIN, SNAPSHOT_VERSION, SnapshotId};

/// A snapshot cannot be used or taken. [`SnapshotError::exit_reason`] tells faults of the snapshot from those of the host.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file is not what the checksums say.
    #[error("{} is damaged: {what}; use another copy of the snapshot or take it again", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Not a snapshot, or a part of it is something else than a file.
    #[error("{} cannot be part of a snapshot: {what}; name the directory of a snapshot", .path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        what: String,
    },
    /// A file is not there.
    #[error("{} does not exist: the snapshot is not there or not complete; name another or take it again", .path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// Of an earlier release.
    #[error(
        "{} was written by an older release (format {found}), this one reads {SNAPSHOT_VERSION}: take it again",
        .path.display()
    )]
    Older {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
    /// Of a later release.
    #[error(
        "{} was written by a newer release (format {found}), this one reads {SNAPSHOT_VERSION}: update",
        .path.display()
    )]
    Newer {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
    /// The base cannot be used.
    #[error("the snapshot {} is a diff over {id}, and that cannot be used: {source}", .dir.display())]
    Base {
        /// The diff.
        dir: PathBuf,
        /// Its base.
        id: SnapshotId,
        /// Why.
        source: Box<SnapshotError>,
    },
    /// Another snapshot stands where the base should be.
    #[error(
        "the snapshot {} is a diff over {wants}, but {} is {found}: put the base back there or take the diff again",
        .dir.display(), .path.display()
    )]
    OtherBase {
        /// The diff.
        dir: PathBuf,
        /// Where its base should be.
        path: PathBuf,
        /// The base's id.
        wants: SnapshotId,
        /// The id that was found.
        found: SnapshotId,
    },
    /// More bases than a chain may have, or a circle.
    #[error("the chain of bases below {} is longer than {MAX_CHAIN}: compact one of them", .dir.display())]
    TooLong {
        /// The topmost snapshot.
        dir: PathBuf,
    },
    /// The name cannot be given to a new snapshot.
    #[error("no snapshot can be made at {}: {what}", .dir.display())]
    Place {
        /// The directory.
        dir: PathBuf,
        /// Why, and what to do.
        what: String,
    },
    /// What was to be written is beyond the format's bounds.
    #[error("this VM cannot be snapshotted: {0}")]
    Bounds(String),
    /// No space, a quota or a limit on file sizes.
    #[error(
        "no space for {}: {source} after {bytes} bytes; free some on that file system and take the snapshot again",
        .path.display()
    )]
    Full {
        /// The file.
        path: PathBuf,
        /// Bytes of guest memory that were written before.
        bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused.
    #[error("{what} {}: {source}; see that the file system works and that this user may do it", .path.display())]
    Host {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused something that has no file.
    #[error("{what}: {source}; try again when the host is less busy")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Guest memory could not be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl SnapshotError {
    /// How a VMM ends for it: [`ExitReason::BadSnapshot`] when another try on a healthy host would fail alike.
    #[must_use]
    pub fn exit_reason(&self) -> ExitReason {
        match self {
            Self::Damaged { .. }
            | Self::Foreign { .. }
            | Self::Missing { .. }
            | Self::Older { .. }
            | Self::Newer { .. }
            | Self::OtherBase { .. }
            | Self::TooLong { .. }
            | Self::Memory(
                MemoryError::Length { .. } | MemoryError::Runs { .. } | MemoryError::TooManyRuns(_),
            ) => ExitReason::BadSnapshot,
            Self::Base { source, .. } => source.exit_reason(),
            Self::Place { .. }
            | Self::Bounds(_)
            | Self::Full { .. }
            | Self::Host { .. }
            | Self::Kernel { .. }
            | Self::Memory(_) => ExitReason::HostError,
        }
    }

    pub(super) fn damaged(path: &Path, what: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), what: what.into() }
    }

    pub(super) fn foreign(path: &Path, what: impl Into<String>) -> Self {
        Self::Foreign { path: path.to_owned(), what: what.into() }
    }

    pub(super) fn place(dir: &Path, what: impl Into<String>) -> Self {
        Self::Place { dir: dir.to_owned(), what: what.into() }
    }

    /// An error of opening or reading.
    pub(super) fn reading(what: &'static str, path: &Path, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ENOENT) => Self::Missing { path: path.to_owned() },
            Some(libc::ELOOP) => Self::foreign(path, "it is a symbolic link, or a circle of them"),
            Some(libc::ENOTDIR) => Self::foreign(path, "its directory is something else"),
            Some(libc::EISDIR) => Self::foreign(path, "it is a directory"),
            Some(libc::ENXIO) => Self::foreign(path, "it is a socket or a device"),
            Some(libc::ENAMETOOLONG) => Self::foreign(path, "its name is too long"),
            _ => Self::Host { what, path: path.to_owned(), source },
        }
    }

    /// An error of creating, writing or syncing, after `bytes` of guest memory.
    pub(super) fn writing(what: &'static str, path: &Path, bytes: u64, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => {
                Self::Full { path: path.to_owned(), bytes, source }
            }
            _ => Self::Host { what, path: path.to_owned(), source },
        }
    }
}

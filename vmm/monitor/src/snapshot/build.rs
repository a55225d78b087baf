//! Writing `memory`, chunk by chunk: what is hashed is what is written.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::sums::{self, Sums};
use super::{CHUNK_BYTES, CHUNK_PAGES, MEMORY, PAGE, PAGE_BYTES, SnapshotError, files, runs};

/// A `memory` file that grows.
pub(super) struct Builder {
    path: PathBuf,
    file: File,
    pages: u64,
    /// Of the chunks so far.
    sums: Sums,
    /// Bytes that are no hole so far.
    written: u64,
}

/// A `memory` file that is complete and on disk.
pub(super) struct Built {
    /// Bytes of `sums`.
    pub(super) sums: Vec<u8>,
    /// Bytes of `memory` that are no hole.
    pub(super) written: u64,
}

/// Which pages of a chunk go into the file.
#[derive(Clone, Copy)]
pub(super) enum Keep {
    /// Of those named the ones that are not all zero: a full snapshot, whose holes are zero.
    NonZero,
    /// All that are named, though zeroes become holes: a diff, whose pages hide those of its base.
    Named,
}

impl Builder {
    /// Makes the file in `dir` for so many pages of guest memory.
    pub(super) fn new(dir: &Path, pages: u64) -> Result<Self, SnapshotError> {
        let path = dir.join(MEMORY);
        let file = files::create(&path)?;
        file.set_len(pages * PAGE).map_err(|e| SnapshotError::writing("set the length of", &path, 0, e))?;
        Ok(Self { path, file, pages, sums: Sums::default(), written: 0 })
    }

    /// Adds a chunk after all those before it, of whose pages `mask` names some.
    pub(super) fn chunk(
        &mut self,
        chunk: u64,
        mask: u64,
        bytes: &[u8],
        keep: Keep,
    ) -> Result<(), SnapshotError> {
        let non_zero = mask & non_zero(bytes);
        let mask = match keep {
            Keep::NonZero => non_zero,
            Keep::Named => mask,
        };
        if mask == 0 {
            return Ok(());
        }
        for (first, count) in runs::stretches(non_zero) {
            let offset = (chunk * CHUNK_PAGES + u64::from(first)) * PAGE;
            self.file
                .write_all_at(sums::stretch(bytes, first, count), offset)
                .map_err(|e| SnapshotError::writing("write", &self.path, self.written, e))?;
            self.written += u64::from(count) * PAGE;
        }
        self.sums.push(chunk, mask, sums::checksum(bytes, mask));
        Ok(())
    }

    /// Waits until the file is on disk.
    pub(super) fn finish(self) -> Result<Built, SnapshotError> {
        self.file.sync_all().map_err(|e| SnapshotError::writing("sync", &self.path, self.written, e))?;
        Ok(Built { sums: self.sums.encode(self.pages), written: self.written })
    }
}

/// A bit for each page that has a byte other than zero.
fn non_zero(chunk: &[u8]) -> u64 {
    const ZEROES: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
    let pages = chunk.chunks(ZEROES.len()).enumerate();
    pages.fold(0, |mask, (page, bytes)| if ZEROES.starts_with(bytes) { mask } else { mask | 1 << page })
}

/// Room for one chunk.
pub(super) fn chunk_buffer() -> Vec<u8> {
    vec![0; CHUNK_BYTES]
}

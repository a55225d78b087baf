//! Comparing every page of a snapshot with its checksum.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use ark_hal::memory::Run;

use super::build::chunk_buffer;
use super::chain::{Chain, Link};
use super::{CHUNK_PAGES, MEMORY, PAGE, SnapshotError, runs, sums};

/// How far down [`verify`] goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The memory of this snapshot alone; of its bases what [`Chain::open`] checks.
    Top,
    /// The memory of its bases, too.
    WholeChain,
}

/// What was compared and found right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Snapshots whose memory was read.
    pub snapshots: usize,
    /// Bytes of memory that were read.
    pub bytes: u64,
}

/// Reads the memory of the snapshot in `dir` (256 KiB at a time) and compares it with its checksums.
///
/// # Errors
/// As [`Chain::open`]; [`SnapshotError::Damaged`] names the first place that is not as it was written.
pub fn verify(dir: &Path, scope: Scope) -> Result<Verified, SnapshotError> {
    let chain = Chain::open(dir)?;
    let snapshots = match scope {
        Scope::Top => 1,
        Scope::WholeChain => chain.links().len(),
    };
    let mut bytes = 0;
    for link in chain.links().iter().take(snapshots) {
        bytes += verify_link(link)?;
    }
    Ok(Verified { snapshots, bytes })
}

/// Returns how many bytes were read.
fn verify_link(link: &Link) -> Result<u64, SnapshotError> {
    let mut buffer = chunk_buffer();
    for (chunk, mask, sum) in link.sums.chunks() {
        read_chunk(link, chunk, mask, sum, &mut buffer)?;
    }
    let mut read = runs::pages(&link.sums.runs) * PAGE;
    // Of a full snapshot the whole file is mapped, so what no checksum covers has to be zero.
    if link.manifest.base.is_none() {
        let all = Run { first: 0, count: link.bytes() / PAGE };
        for hole in runs::subtract(&[all], &link.sums.runs) {
            read += check_hole(link, hole, &mut buffer)?;
        }
    }
    Ok(read)
}

/// Reads the pages of a chunk that `mask` names to their places in `buffer` and checks them.
pub(super) fn read_chunk(
    link: &Link,
    chunk: u64,
    mask: u64,
    sum: u128,
    buffer: &mut [u8],
) -> Result<(), SnapshotError> {
    let path = || link.dir.join(MEMORY);
    let start = chunk * CHUNK_PAGES * PAGE;
    for (first, count) in runs::stretches(mask) {
        let offset = start + u64::from(first) * PAGE;
        link.memory
            .read_exact_at(sums::stretch_mut(buffer, first, count), offset)
            .map_err(|e| reading(&path(), e))?;
    }
    if sums::checksum(buffer, mask) != sum {
        let end = start + CHUNK_PAGES * PAGE;
        let what = format!("the pages between bytes {start:#x} and {end:#x} are not those that were written");
        return Err(SnapshotError::damaged(&path(), what));
    }
    Ok(())
}

/// Reads what data there is where a hole should be, and returns how much.
fn check_hole(link: &Link, hole: Run, buffer: &mut [u8]) -> Result<u64, SnapshotError> {
    let path = || link.dir.join(MEMORY);
    let end = (hole.first + hole.count) * PAGE;
    let (mut at, mut read) = (hole.first * PAGE, 0);
    while let Some(data) = next_data(link, at)?.filter(|data| *data < end) {
        let length = (end - data).min(buffer.len() as u64);
        let piece =
            usize::try_from(length).ok().and_then(|length| buffer.get_mut(..length)).unwrap_or_default();
        link.memory.read_exact_at(piece, data).map_err(|e| reading(&path(), e))?;
        if let Some(byte) = piece.iter().position(|byte| *byte != 0) {
            let what = format!("byte {:#x} is not zero, and no checksum covers it", data + byte as u64);
            return Err(SnapshotError::damaged(&path(), what));
        }
        at = data + length;
        read += length;
    }
    Ok(read)
}

/// Where the next data is, at `from` or after it.
fn next_data(link: &Link, from: u64) -> Result<Option<u64>, SnapshotError> {
    let offset = libc::off_t::try_from(from).unwrap_or(libc::off_t::MAX);
    // SAFETY: lseek on an open descriptor touches no memory of ours; nothing else uses the file's position.
    let found = unsafe { libc::lseek(link.memory.as_raw_fd(), offset, libc::SEEK_DATA) };
    let error = std::io::Error::last_os_error();
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(_) => Err(reading(&link.dir.join(MEMORY), error)),
    }
}

fn reading(path: &Path, error: std::io::Error) -> SnapshotError {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => {
            SnapshotError::damaged(path, "it was cut short while it was read")
        }
        _ => SnapshotError::reading("read", path, error),
    }
}

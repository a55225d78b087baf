//! Guest memory: at most two regions around the MMIO gap, private to this process.
//!
//! The memory of a VM that boots is anonymous. The memory of a VM that goes on from a snapshot is the snapshot's file, mapped
//! `MAP_PRIVATE`: all VMs that go on from it share the page cache, and none ever writes to the file. In both cases what the
//! VM itself wrote are exactly its anonymous pages ([`written`]), and a snapshot of it is these pages.
//!
//! A memory file holds the regions one after the other, so that the region above the gap continues the one below. A snapshot
//! of a VM that went on from another is a file of the same length that holds only the pages written since, given as
//! [`Run`]s; the rest are holes.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

/// First guest-physical address of the hole below 4 GiB where devices, IOAPIC and LAPIC live instead of memory.
pub const MMIO_GAP_START: u64 = 0xc000_0000;
/// First guest-physical address after the hole; memory beyond 3 GiB goes on here.
pub const MMIO_GAP_END: u64 = 0x1_0000_0000;

/// Guest memory is a multiple of this many bytes.
pub const PAGE_SIZE: u64 = 4096;

/// A chain of snapshots may have so many runs. Each can split a mapping into three, and a process may have 65,530 of them
/// (`/proc/sys/vm/max_map_count`).
pub const MAX_RUNS: usize = 30_000;

/// Whether to ask the kernel for transparent huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePages {
    /// Use them where the kernel has them (`/sys/kernel/mm/transparent_hugepage/enabled` is `madvise` or `always`), else
    /// quietly 4 KiB pages. Fewer nested page faults, coarser memory use.
    WhenPossible,
    /// 4 KiB pages only, whatever the kernel's default is.
    Never,
}

/// Neighbouring pages of a memory file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The first one: offset in the file divided by [`PAGE_SIZE`].
    pub first: u64,
    /// How many; at least one.
    pub count: u64,
}

/// Pages that a snapshot has in place of those below it.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// Its memory file, as long as the memory.
    pub file: &'a File,
    /// Where it has pages: ascending, none twice.
    pub runs: &'a [Run],
}

/// Guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Zero, or not a multiple of the page size, or too large for an address.
    #[error("guest memory of {0} bytes is not possible: give a multiple of 4096 greater than zero")]
    Size(u64),
    /// The kernel refused the mapping.
    #[error(
        "map guest memory of {bytes} bytes: {reason}; give the VM less memory or raise the limit on address space"
    )]
    Map {
        /// The mapping's size.
        bytes: u64,
        /// What the kernel said.
        reason: String,
    },
    /// A memory file cannot be looked at.
    #[error("look at the memory file of snapshot {layer} of the chain: {source}; restore another snapshot")]
    File {
        /// 0 is the base.
        layer: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// A memory file is shorter or longer than the memory.
    #[error(
        "the memory file of snapshot {layer} of the chain has {found} bytes, not {wanted}: it is damaged or another VM's; \
         restore another snapshot"
    )]
    Length {
        /// 0 is the base.
        layer: usize,
        /// The file's length.
        found: u64,
        /// The memory's size.
        wanted: u64,
    },
    /// A list of pages that makes no sense.
    #[error(
        "the list of pages of snapshot {layer} of the chain is not ascending or not within the memory (at run {run}): it is \
         damaged; restore another snapshot"
    )]
    Runs {
        /// 1 is the first above the base.
        layer: usize,
        /// The run, counted from 0.
        run: usize,
    },
    /// Too many mappings.
    #[error(
        "the chain of snapshots has {0} runs of pages and at most {MAX_RUNS} can be mapped: compact it into one snapshot"
    )]
    TooManyRuns(usize),
}

/// The guest-physical regions that memory of `size` bytes occupies: `(start, length)`, ascending.
#[must_use]
pub fn layout(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(MMIO_GAP_START);
    let mut regions = vec![(0, low)];
    if size > low {
        regions.push((MMIO_GAP_END, size - low));
    }
    regions
}

/// Zeroed guest memory of `size` bytes (see also [`show`]); pages are taken from the host when they are first touched.
///
/// # Errors
/// [`MemoryError`] when the size is impossible or the kernel refuses.
pub fn create(size: u64, huge_pages: HugePages) -> Result<GuestMemoryMmap, MemoryError> {
    let memory = map(size)?;
    advise(&memory, huge_pages);
    Ok(memory)
}

/// Has `memory` show what a chain of snapshots left: the pages of `base`, over them those of each of `diffs` in turn. Only
/// mappings are made; pages are read when they are first touched, and the guest's writes stay in this process. What was written
/// before is given back to the host. A VM that has the memory sees the change at once, so none of its processors may run and
/// no device be at work. The files must not be made shorter as long as the memory lives: touching what is gone would end the
/// process by SIGBUS.
///
/// # Errors
/// [`MemoryError`] when a file or a list of runs does not fit the memory, or the kernel refuses. Of [`MemoryError::Map`] the
/// memory is not whole any more; all others change nothing.
pub fn show(
    memory: &GuestMemoryMmap,
    base: &File,
    diffs: &[Layer<'_>],
    huge_pages: HugePages,
) -> Result<(), MemoryError> {
    let size = size(memory);
    check_layers(size, base, diffs)?;
    overlay(memory, base, Run { first: 0, count: size / PAGE_SIZE })?;
    for diff in diffs {
        diff.runs.iter().try_for_each(|run| overlay(memory, diff.file, *run))?;
    }
    advise(memory, huge_pages);
    Ok(())
}

/// Bytes of `memory`.
#[must_use]
pub fn size(memory: &GuestMemoryMmap) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// Whether these files can be mapped as a memory of `size` bytes.
fn check_layers(size: u64, base: &File, diffs: &[Layer<'_>]) -> Result<(), MemoryError> {
    check_length(0, base, size)?;
    let runs = diffs.iter().map(|diff| diff.runs.len()).sum();
    if runs > MAX_RUNS {
        return Err(MemoryError::TooManyRuns(runs));
    }
    for (layer, diff) in (1..).zip(diffs) {
        check_length(layer, diff.file, size)?;
        check_runs(layer, diff.runs, size / PAGE_SIZE)?;
    }
    Ok(())
}

fn check_size(size: u64) -> Result<(), MemoryError> {
    if size == 0 || !size.is_multiple_of(PAGE_SIZE) || i64::try_from(size).is_err() {
        return Err(MemoryError::Size(size));
    }
    Ok(())
}

fn check_length(layer: usize, file: &File, wanted: u64) -> Result<(), MemoryError> {
    let found = file.metadata().map_err(|source| MemoryError::File { layer, source })?.len();
    if found == wanted { Ok(()) } else { Err(MemoryError::Length { layer, found, wanted }) }
}

fn check_runs(layer: usize, runs: &[Run], pages: u64) -> Result<(), MemoryError> {
    let mut free = 0;
    for (index, run) in runs.iter().enumerate() {
        let end = run.first.checked_add(run.count).filter(|end| *end <= pages);
        match end {
            Some(end) if run.count > 0 && run.first >= free => free = end,
            _ => return Err(MemoryError::Runs { layer, run: index }),
        }
    }
    Ok(())
}

/// Maps all regions.
fn map(size: u64) -> Result<GuestMemoryMmap, MemoryError> {
    check_size(size)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_ANONYMOUS;
    let mut regions = Vec::with_capacity(2);
    for (start, length) in layout(size) {
        let map_error = |reason: String| MemoryError::Map { bytes: length, reason };
        let bytes = usize::try_from(length).map_err(|_| MemoryError::Size(size))?;
        let mapping = MmapRegion::build(None, bytes, libc::PROT_READ | libc::PROT_WRITE, flags)
            .map_err(|e| map_error(e.to_string()))?;
        regions.push(GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(MemoryError::Size(size))?);
    }
    GuestMemoryMmap::from_regions(regions)
        .map_err(|e| MemoryError::Map { bytes: size, reason: e.to_string() })
}

/// A part of a run that lies in one region.
struct Part {
    /// Where it is in this process.
    host: *mut u8,
    /// Where it is in the memory file.
    offset: u64,
    /// Bytes.
    length: usize,
}

/// Splits a run at the gap. A run that is not within the memory gives parts only for what is.
fn parts(memory: &GuestMemoryMmap, run: Run) -> impl Iterator<Item = Part> {
    let first = run.first.saturating_mul(PAGE_SIZE);
    let last = run.first.saturating_add(run.count).saturating_mul(PAGE_SIZE);
    let mut region_start = 0;
    memory.iter().filter_map(move |region| {
        let start = region_start;
        region_start += region.len();
        let (from, to) = (first.max(start), last.min(region_start));
        let length = usize::try_from(to.checked_sub(from)?).ok().filter(|length| *length > 0)?;
        let inside = from - start;
        Some(Part { host: region.as_ptr().wrapping_add(usize::try_from(inside).ok()?), offset: from, length })
    })
}

/// Maps the pages of `run` from `file`, over what is there. The run must be within the memory.
fn overlay(memory: &GuestMemoryMmap, file: &File, run: Run) -> Result<(), MemoryError> {
    for part in parts(memory, run) {
        let map_error =
            |reason: io::Error| MemoryError::Map { bytes: part.length as u64, reason: reason.to_string() };
        let offset = libc::off_t::try_from(part.offset).map_err(|e| map_error(io::Error::other(e)))?;
        // SAFETY: the range lies in a region of guest memory, which no Rust reference points to: its bytes are the guest's, and
        // may change at any time. The region unmaps its whole range whatever is mapped there.
        let address = unsafe {
            libc::mmap(
                part.host.cast(),
                part.length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED,
                file.as_raw_fd(),
                offset,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(map_error(io::Error::last_os_error()));
        }
    }
    Ok(())
}

/// Tells the kernel about huge pages, and to leave guest memory out of core dumps. Both are hints: where the kernel was
/// built without them the VM runs all the same.
fn advise(memory: &GuestMemoryMmap, huge_pages: HugePages) {
    let huge = match huge_pages {
        HugePages::WhenPossible => libc::MADV_HUGEPAGE,
        HugePages::Never => libc::MADV_NOHUGEPAGE,
    };
    for region in memory.iter() {
        for advice in [huge, libc::MADV_DONTDUMP] {
            // SAFETY: the range is exactly the region, and neither advice changes what it contains.
            unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) };
        }
    }
}

/// Entries of `/proc/self/pagemap`, one per page (Documentation/admin-guide/mm/pagemap.rst): 8 bytes, of which these bits say
/// that the page is in RAM, in swap, and that it is a file's.
const PAGEMAP_ENTRY: u64 = 8;
const PAGEMAP_PRESENT: u64 = 1 << 63;
const PAGEMAP_SWAPPED: u64 = 1 << 62;
const PAGEMAP_FILE: u64 = 1 << 61;
/// Entries that are read at once.
const PAGEMAP_CHUNK: usize = 8192;

/// The pages that this process has written, ascending, neighbours merged (but not across the gap). Of anonymous memory, pages
/// that were only read may be among them: the kernel maps its page of zeroes there.
///
/// In a child made by fork(2) these are the pages its parent had written when it was made.
///
/// # Errors
/// When `/proc/self/pagemap` cannot be read.
pub fn written(memory: &GuestMemoryMmap) -> io::Result<Vec<Run>> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut runs = Vec::new();
    let mut buffer = vec![0; PAGEMAP_CHUNK * 8];
    let mut page = 0;
    for region in memory.iter() {
        let mut current: Option<Run> = None;
        let mut entry = region.as_ptr() as u64 / PAGE_SIZE;
        let mut left = region.len() / PAGE_SIZE;
        while left > 0 {
            let now = usize::try_from(left).unwrap_or(usize::MAX).min(PAGEMAP_CHUNK);
            let bytes = buffer.get_mut(..now * 8).unwrap_or_default();
            pagemap.read_exact_at(bytes, entry * PAGEMAP_ENTRY)?;
            for bits in bytes.chunks_exact(8) {
                let bits = u64::from_ne_bytes(bits.try_into().unwrap_or_default());
                let private = bits & (PAGEMAP_PRESENT | PAGEMAP_SWAPPED) != 0 && bits & PAGEMAP_FILE == 0;
                match &mut current {
                    Some(run) if private => run.count += 1,
                    None if private => current = Some(Run { first: page, count: 1 }),
                    _ => runs.extend(current.take()),
                }
                page += 1;
            }
            entry += now as u64;
            left -= now as u64;
        }
        runs.extend(current);
    }
    Ok(runs)
}

/// Joins runs over the shortest gaps between them until there are at most `most` (and at least one), so that a snapshot of them
/// can be mapped: see [`MAX_RUNS`]. The pages in between are then part of the snapshot, too, which does no harm.
#[must_use]
pub fn join_runs(runs: Vec<Run>, most: usize) -> Vec<Run> {
    let most = most.max(1);
    if runs.len() <= most {
        return runs;
    }
    let gap =
        |before: &Run, after: &Run| after.first.saturating_sub(before.first.saturating_add(before.count));
    let mut gaps: Vec<u64> = runs.iter().zip(runs.iter().skip(1)).map(|(a, b)| gap(a, b)).collect();
    // So many gaps must go, the shortest ones; others of the same length go with them.
    let surplus = runs.len() - most;
    let (_, longest, _) = gaps.select_nth_unstable(surplus - 1);
    let longest = *longest;
    let mut joined: Vec<Run> = Vec::with_capacity(most);
    for run in runs {
        match joined.last_mut() {
            Some(last) if gap(last, &run) <= longest => last.count = run.first + run.count - last.first,
            _ => joined.push(run),
        }
    }
    joined
}

/// How many bytes of the host's memory, in RAM or swap, are this VM's alone: those it has [`written`]. Pages of a snapshot that
/// it only read are the page cache's.
///
/// # Errors
/// As [`written`].
pub fn resident_bytes(memory: &GuestMemoryMmap) -> io::Result<u64> {
    Ok(written(memory)?.iter().map(|run| run.count * PAGE_SIZE).sum())
}

#[cfg(test)]
mod tests;

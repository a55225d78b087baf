//! `sums`: which pages `memory` holds, and a checksum of each chunk of 64 pages that has any of them.
//!
//! Little-endian: the magic, `u32` version, `u32` pages of a chunk, `u64` pages of guest memory, `u64` number of runs, `u64`
//! number of checksums; then of each run its first page and its length (`u32` each), ascending and not touching; then the
//! checksums (XXH3-128 over the contents of the chunk's named pages, one after the other; a hole counts as zeroes),
//! ascending by chunk.

use ark_hal::memory::Run;

use super::{CHUNK_PAGES, PAGE_BYTES, runs};

const MAGIC: [u8; 8] = *b"ARKsums\n";
const VERSION: u32 = 1;
const HEADER: u64 = 40;
/// Bytes of a run and of a checksum.
const RUN: usize = 8;
const SUM: usize = 16;

/// The parsed file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sums {
    /// Pages that `memory` holds.
    pub(super) runs: Vec<Run>,
    /// One of each chunk that has such pages, ascending.
    chunks: Vec<u128>,
}

/// Most bytes that the file can have for `pages` of guest memory.
pub(super) const fn most_bytes(pages: u64) -> u64 {
    // Every other page is a run of its own at worst.
    HEADER + pages.div_ceil(2) * RUN as u64 + pages.div_ceil(CHUNK_PAGES) * SUM as u64
}

/// Checksum of the pages of `chunk` (256 KiB) that `mask` names.
pub(super) fn checksum(chunk: &[u8], mask: u64) -> u128 {
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    for (first, count) in runs::stretches(mask) {
        hasher.update(stretch(chunk, first, count));
    }
    hasher.digest128()
}

/// Where `count` pages from `first` on are in a chunk.
fn range(first: u32, count: u32) -> std::ops::Range<usize> {
    let at = |page: u32| page as usize * PAGE_BYTES;
    at(first)..at(first + count)
}

/// The bytes of `count` pages from `first` on.
pub(super) fn stretch(chunk: &[u8], first: u32, count: u32) -> &[u8] {
    chunk.get(range(first, count)).unwrap_or_default()
}

/// As [`stretch`], to be filled.
pub(super) fn stretch_mut(chunk: &mut [u8], first: u32, count: u32) -> &mut [u8] {
    chunk.get_mut(range(first, count)).unwrap_or_default()
}

impl Sums {
    /// Adds the pages of a chunk after all those before it.
    pub(super) fn push(&mut self, chunk: u64, mask: u64, sum: u128) {
        for (first, count) in runs::stretches(mask) {
            runs::push(&mut self.runs, chunk * CHUNK_PAGES + u64::from(first), u64::from(count));
        }
        self.chunks.push(sum);
    }

    /// Each chunk that has pages: its number, a bit for each of its pages, their checksum.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (u64, u64, u128)> {
        runs::masks(&self.runs).zip(&self.chunks).map(|((chunk, mask), sum)| (chunk, mask, *sum))
    }

    /// The file's bytes, for `pages` of guest memory.
    pub(super) fn encode(&self, pages: u64) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        // The constants fit, and so do page numbers: memory is bounded by MAX_MEMORY_MIB.
        bytes.extend(u32::try_from(CHUNK_PAGES).unwrap_or_default().to_le_bytes());
        bytes.extend(pages.to_le_bytes());
        bytes.extend((self.runs.len() as u64).to_le_bytes());
        bytes.extend((self.chunks.len() as u64).to_le_bytes());
        for run in &self.runs {
            bytes.extend(u32::try_from(run.first).unwrap_or(u32::MAX).to_le_bytes());
            bytes.extend(u32::try_from(run.count).unwrap_or(u32::MAX).to_le_bytes());
        }
        bytes.extend(self.chunks.iter().flat_map(|sum| sum.to_le_bytes()));
        bytes
    }

    /// Parses bytes that may be anything.
    ///
    /// # Errors
    /// What is wrong with them.
    pub(super) fn decode(bytes: &[u8], pages: u64) -> Result<Self, &'static str> {
        let mut reader = Reader { rest: bytes };
        if reader.take() != Some(MAGIC) {
            return Err("it does not begin as such a file does");
        }
        let head = (reader.u32(), reader.u32().map(u64::from), reader.u64());
        if head != (Some(VERSION), Some(CHUNK_PAGES), Some(pages)) {
            return Err("its version, chunk size or memory size is another");
        }
        let (Some(run_count), Some(sum_count)) = (reader.u64(), reader.u64()) else {
            return Err("it ends in its header");
        };
        let needs = |count: u64, each: usize| count.checked_mul(each as u64);
        let length = needs(run_count, RUN).and_then(|runs| runs.checked_add(needs(sum_count, SUM)?));
        if length != Some(reader.rest.len() as u64) {
            return Err("its length does not fit its header");
        }
        let mut sums = Self::default();
        // The counts are bounded by the bytes that are there.
        let mut end = None;
        for _ in 0..run_count {
            let (Some(first), Some(count)) = (reader.u32(), reader.u32()) else {
                return Err("it ends in its runs");
            };
            let (first, count) = (u64::from(first), u64::from(count));
            if count == 0 || end.is_some_and(|end| first <= end) || first + count > pages {
                return Err("its runs are empty, out of order or beyond the memory");
            }
            end = Some(first + count);
            sums.runs.push(Run { first, count });
        }
        sums.chunks.extend(std::iter::from_fn(|| reader.take().map(u128::from_le_bytes)));
        if runs::masks(&sums.runs).count() != sums.chunks.len() {
            return Err("it has not one checksum for each chunk");
        }
        Ok(sums)
    }
}

/// Takes numbers off the front of bytes.
struct Reader<'a> {
    rest: &'a [u8],
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(*first)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

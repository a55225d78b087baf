//! Snapshots on disk: written so that one is whole or not there at all, and checked before a VM goes on from one.
//!
//! A snapshot is a directory of four files (their meaning: [`ark_types::vmm::SnapshotManifest`]) and nothing ever changes
//! one. Trust flows down a tree of checksums, so that a flipped bit anywhere is found:
//!
//! ```text
//! manifest.json   {"seal":"<SHA-256 of the manifest's text>","manifest":{...}}
//!   ├─ state      SHA-256 in the manifest
//!   └─ sums       SHA-256 in the manifest: the runs of pages that `memory` holds, XXH3-128 of each chunk of 64 pages
//!        └─ memory
//! ```
//!
//! | when | what is checked | why |
//! |---|---|---|
//! | a VM goes on ([`Chain::open`]) | seal, version, bounds, `state`, `sums`, kind and length of `memory`, ids along the chain | all that is parsed, in time proportional to kilobytes: a spawn cannot wait for gigabytes |
//! | once, beside ([`verify`]) | every page | bits that rot in `memory`, data where a hole has to be |
//! | chains are merged ([`compact`]) | every page that is read | damage must not get a new, valid checksum |
//!
//! Pages are numbered through guest memory without its MMIO gap, so page *n* stands at byte 4096 *n* of `memory`.
//! [`Draft`] writes into `DIR.tmp`, locked by its writer, makes all of it durable and renames it: a crash at any moment
//! leaves the snapshot or no directory of its name. What a killed writer left, the next one for the same name removes.

mod build;
mod chain;
mod compact;
mod draft;
mod error;
mod files;
mod manifest;
mod runs;
mod sums;
#[cfg(test)]
mod tests;
mod verify;

pub use chain::{Chain, Layers};
pub use compact::compact;
pub use draft::{About, Draft, MAX_MAPPINGS, Written};
pub use error::SnapshotError;
pub use verify::{Scope, Verified, verify};

/// Bytes of a page.
const PAGE: u64 = ark_hal::memory::PAGE_SIZE;
/// The same.
const PAGE_BYTES: usize = 4096;
/// Pages of a chunk, the unit of checksums: as many as a `u64` has bits.
const CHUNK_PAGES: u64 = 64;
/// Bytes of a chunk.
const CHUNK_BYTES: usize = 64 * PAGE_BYTES;
/// Most memory of a snapshot, MiB: 8 TiB, so that page numbers fit 32 bits.
const MAX_MEMORY_MIB: u64 = 8 << 20;
/// Most bytes of `manifest.json`.
const MAX_MANIFEST: u64 = 1 << 20;
/// Most bytes of `state`: 32 processors and all devices need a few hundred KiB.
const MAX_STATE: u64 = 64 << 20;

/// File of the manifest.
const MANIFEST: &str = "manifest.json";
/// File of the state.
const STATE: &str = "state";
/// File of the checksums of memory.
const SUMS: &str = "sums";
/// File of guest memory.
const MEMORY: &str = "memory";

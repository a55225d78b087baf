//! A snapshot and its bases, opened and checked.

use std::fs::File;
use std::path::{Path, PathBuf};

use ark_hal::memory::{self, HugePages, Layer, Run};
use ark_types::vmm::{MAX_CHAIN, SnapshotBase, SnapshotManifest};
use vm_memory::GuestMemoryMmap;

use super::sums::Sums;
use super::{MANIFEST, MEMORY, PAGE, STATE, SUMS, SnapshotError, files, manifest, runs};

/// A snapshot with all its bases: seals, versions, bounds, ids, `sums` and lengths of all, and the topmost's `state`, are
/// checked. (The state of a base says nothing about this snapshot and is not read.)
#[derive(Debug)]
pub struct Chain {
    links: Links,
    state: Vec<u8>,
    /// Which pages of each diff are seen through those above it, topmost first.
    visible: Vec<Vec<Run>>,
}

/// Files that guest memory is mapped from.
#[derive(Debug)]
pub struct Layers<'a> {
    /// Bytes of guest memory.
    pub size: u64,
    /// `memory` of the full snapshot.
    pub base: &'a File,
    /// Over it, lowest first; no page is in two of them.
    pub diffs: Vec<Layer<'a>>,
}

impl Chain {
    /// Opens the snapshot in `dir` and its bases.
    ///
    /// # Errors
    /// [`SnapshotError`] says which file is not as it has to be.
    pub fn open(dir: &Path) -> Result<Self, SnapshotError> {
        let links = Links::open(dir)?;
        let state = links.top.state()?;
        let visible = runs::visible(links.diffs().map(|link| link.sums.runs.as_slice()));
        Ok(Self { links, state, visible })
    }

    /// The snapshot's manifest.
    #[must_use]
    pub fn manifest(&self) -> &SnapshotManifest {
        &self.links.top.manifest
    }

    /// State of processors and devices.
    #[must_use]
    pub fn state(&self) -> &[u8] {
        &self.state
    }

    /// All its snapshots.
    pub(super) fn links(&self) -> &Links {
        &self.links
    }

    /// Files that guest memory is mapped from.
    #[must_use]
    pub fn layers(&self) -> Layers<'_> {
        let diffs =
            self.links.diffs().zip(&self.visible).map(|(link, runs)| Layer { file: &link.memory, runs });
        let mut diffs: Vec<_> = diffs.collect();
        diffs.reverse();
        Layers { size: self.links.top.bytes(), base: &self.links.full().memory, diffs }
    }

    /// Has `memory`, of the snapshot's size, show what the snapshot has, in place of all that was in it; what is written to it
    /// stays in this process. Nobody may be at work in it.
    ///
    /// # Errors
    /// [`SnapshotError::Memory`] when the kernel refuses; the memory is not to be relied on then.
    pub fn show(&self, memory: &GuestMemoryMmap, huge_pages: HugePages) -> Result<(), SnapshotError> {
        let layers = self.layers();
        Ok(memory::show(memory, layers.base, &layers.diffs, huge_pages)?)
    }
}

/// A snapshot and its bases, without any state.
#[derive(Debug)]
pub(super) struct Links {
    /// The snapshot itself.
    pub(super) top: Link,
    /// Its bases, the full one last; none when it is full itself.
    below: Vec<Link>,
}

impl Links {
    /// Opens and checks all of them.
    pub(super) fn open(dir: &Path) -> Result<Self, SnapshotError> {
        let mut links = Self { top: Link::open(dir)?, below: Vec::new() };
        // A circle ends at the bound, if not at an id that does not fit.
        while let Some(base) = links.full().manifest.base.clone() {
            if links.len() == MAX_CHAIN {
                return Err(SnapshotError::TooLong { dir: dir.to_owned() });
            }
            let above = links.full();
            let opened = Link::open(&base.path).map_err(|source| SnapshotError::Base {
                dir: above.dir.clone(),
                id: base.id,
                source: Box::new(source),
            })?;
            above.check_base(&opened, &base)?;
            links.below.push(opened);
        }
        Ok(links)
    }

    /// Topmost first.
    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = &Link> {
        std::iter::once(&self.top).chain(&self.below)
    }

    /// How many; at least one.
    pub(super) fn len(&self) -> usize {
        1 + self.below.len()
    }

    /// The lowest one.
    pub(super) fn full(&self) -> &Link {
        self.below.last().unwrap_or(&self.top)
    }

    /// All but the lowest one, topmost first.
    pub(super) fn diffs(&self) -> impl Iterator<Item = &Link> {
        self.iter().take(self.below.len())
    }
}

/// One snapshot of a chain.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) dir: PathBuf,
    pub(super) manifest: SnapshotManifest,
    pub(super) sums: Sums,
    pub(super) memory: File,
}

impl Link {
    /// Opens one snapshot and checks all but its state and the content of its memory.
    fn open(dir: &Path) -> Result<Self, SnapshotError> {
        let manifest = manifest::read(dir)?;
        let size = manifest.memory_mib << 20;
        let path = dir.join(SUMS);
        let bytes = files::read_sealed(&path, manifest.sums_bytes, &manifest.sums_sha256)?;
        let sums = Sums::decode(&bytes, size / PAGE).map_err(|what| SnapshotError::damaged(&path, what))?;
        let path = dir.join(MEMORY);
        let memory = files::open(&path)?;
        let length = files::length(&memory, &path)?;
        if length != size {
            let what = format!("it has {length} bytes, the guest's memory has {size}");
            return Err(SnapshotError::damaged(&path, what));
        }
        Ok(Self { dir: dir.to_owned(), manifest, sums, memory })
    }

    /// The state, checked.
    pub(super) fn state(&self) -> Result<Vec<u8>, SnapshotError> {
        let manifest = &self.manifest;
        files::read_sealed(&self.dir.join(STATE), manifest.state_bytes, &manifest.state_sha256)
    }

    /// Bytes of guest memory.
    pub(super) fn bytes(&self) -> u64 {
        self.manifest.memory_mib << 20
    }

    /// Whether what was found is the base that is meant.
    fn check_base(&self, found: &Self, base: &SnapshotBase) -> Result<(), SnapshotError> {
        let manifest = &found.manifest;
        if manifest.id != base.id {
            return Err(SnapshotError::OtherBase {
                dir: self.dir.clone(),
                path: base.path.clone(),
                wants: base.id,
                found: manifest.id,
            });
        }
        if (manifest.vcpus, manifest.memory_mib) != (self.manifest.vcpus, self.manifest.memory_mib) {
            let what = "it has another number of processors or size of memory than the diff over it";
            return Err(SnapshotError::damaged(&found.dir.join(MANIFEST), what));
        }
        Ok(())
    }
}

//! Writing a snapshot: beside its place, made durable, then renamed.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use ark_hal::memory::{self, MMIO_GAP_END, MMIO_GAP_START, Run};
use ark_types::vmm::{
    DiskConfig, MAX_CHAIN, ProcessorModel, SNAPSHOT_VERSION, SnapshotBase, SnapshotId, SnapshotManifest,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::build::{Builder, Keep, chunk_buffer};
use super::chain::Links;
use super::{CHUNK_PAGES, MANIFEST, PAGE, STATE, SUMS, SnapshotError, files, manifest, runs, sums};

/// Most runs of pages that the diffs of a chain may have together; beyond it a full snapshot is written. Each can cost two
/// of the 65,530 mappings that Linux gives a process (`vm.max_map_count`), and time when it is restored.
pub const MAX_MAPPINGS: usize = 20_000;
/// Runs of a diff with so few pages between them become one. A run costs 4 microseconds at each restore, a page more costs
/// about as much, once.
const BRIDGE: u64 = 3;
/// Most runs of one diff: those nearest to each other are joined until it has no more.
const MAX_RUNS: usize = 4_096;

/// What the manifest says of the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// As [`SnapshotManifest::vcpus`].
    pub vcpus: u32,
    /// As [`SnapshotManifest::processor`].
    pub processor: ProcessorModel,
    /// As [`SnapshotManifest::disks`].
    pub disks: Vec<DiskConfig>,
    /// As [`SnapshotManifest::guest_cid`].
    pub guest_cid: Option<u32>,
    /// As [`SnapshotManifest::labels`].
    pub labels: BTreeMap<String, String>,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// The snapshot's identity.
    pub id: SnapshotId,
    /// The snapshot that it is a diff over; none when it is full, be it because a diff would not do.
    pub base: Option<SnapshotId>,
    /// Bytes of memory that it holds.
    pub written_bytes: u64,
}

/// A snapshot to be written: its name is free and `DIR.tmp` is locked for it.
///
/// After fork(2) the child calls [`Draft::write`]. The parent may drop its draft, which leaves `DIR.tmp` alone, or keep it
/// until the child has ended and [`Draft::abandon`] it when that failed.
#[derive(Debug)]
pub struct Draft {
    dir: PathBuf,
    tmp: PathBuf,
    id: SnapshotId,
    created_unix_ms: u64,
    about: About,
    base: Option<SnapshotBase>,
    /// `DIR.tmp`, opened and locked (flock(2)) as long as any process has this open.
    _lock: File,
}

/// What goes into `memory`.
struct Plan {
    base: Option<SnapshotBase>,
    runs: Vec<Run>,
    keep: Keep,
}

impl Draft {
    /// Claims the name `dir` (absolute, not there yet, in a directory that is) for a snapshot of the VM that `about` tells of,
    /// which went on from `base`, or was booted.
    ///
    /// # Errors
    /// [`SnapshotError::Place`] when the name cannot be used or another writer is at it; [`SnapshotError::Full`] or
    /// [`SnapshotError::Host`] when the kernel refuses.
    pub fn begin(dir: &Path, about: About, base: Option<SnapshotBase>) -> Result<Self, SnapshotError> {
        let name = dir.file_name().filter(|_| dir.is_absolute());
        let Some(name) = name else {
            return Err(SnapshotError::place(dir, "give an absolute path that ends in a name"));
        };
        match fs::symlink_metadata(dir) {
            Ok(_) => {
                return Err(SnapshotError::place(dir, "it exists already; choose another name or remove it"));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(SnapshotError::writing("look at", dir, 0, e)),
        }
        let parent = dir.parent().unwrap_or(Path::new("/"));
        if !parent.is_dir() {
            return Err(SnapshotError::place(
                dir,
                "the directory it would be in does not exist; make that first",
            ));
        }
        let tmp = parent.join([name, ".tmp".as_ref()].into_iter().collect::<OsString>());
        let id = random_id()?;
        let lock = claim(dir, &tmp)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let created_unix_ms = u64::try_from(now).unwrap_or(u64::MAX);
        Ok(Self { dir: dir.to_owned(), tmp, id, created_unix_ms, about, base, _lock: lock })
    }

    /// Says when the guest stood as it will be written, milliseconds since the Unix epoch, when that is not now.
    pub(super) fn taken_at(self, created_unix_ms: u64) -> Self {
        Self { created_unix_ms, ..self }
    }

    /// The identity that it will have.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// Removes `DIR.tmp`: nothing will be written, or the writer has failed or was killed. One that had given the snapshot its
    /// name already, but could not tell anybody, has failed as well: nobody knows of that snapshot, so it goes, too.
    pub fn abandon(self) {
        if manifest::read(&self.dir).is_ok_and(|manifest| manifest.id == self.id) {
            // Under its name there is all of it or nothing.
            let _ = fs::rename(&self.dir, &self.tmp);
        }
        // What cannot be removed now, the next writer of this name tries to remove.
        let _ = fs::remove_dir_all(&self.tmp);
    }

    /// Writes all of it and waits until it is on disk; takes no lock and starts no thread, so that the child of a process
    /// with threads can call it. Nobody may write to `memory` meanwhile. Leaves nothing behind when it fails.
    ///
    /// Of a booted VM all pages that are not zero are written, of one that went on from a snapshot those it wrote since. A
    /// full snapshot is written in place of a diff when the base cannot be read any more, when the chain would have
    /// [`MAX_CHAIN`] links, or more than [`MAX_MAPPINGS`] runs.
    ///
    /// # Errors
    /// [`SnapshotError::Full`] when the disk is, [`SnapshotError::Host`] and [`SnapshotError::Kernel`] when the kernel
    /// refuses, [`SnapshotError::Bounds`] when the format cannot hold it.
    pub fn write(self, memory: &GuestMemoryMmap, state: &[u8]) -> Result<Written, SnapshotError> {
        let bytes: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
        let written = self.write_memory(memory, bytes);
        let written = written.and_then(|(builder, base)| self.finish(builder, state, base, bytes));
        if written.is_err() {
            self.abandon();
        }
        written
    }

    /// Writes what `fill` adds to `memory` (of `bytes` bytes) as a full snapshot; as [`Draft::write`] otherwise.
    pub(super) fn write_full(
        self,
        bytes: u64,
        state: &[u8],
        fill: impl FnOnce(&mut Builder) -> Result<(), SnapshotError>,
    ) -> Result<Written, SnapshotError> {
        let written = Builder::new(&self.tmp, bytes / PAGE).and_then(|mut builder| {
            fill(&mut builder)?;
            self.finish(builder, state, None, bytes)
        });
        if written.is_err() {
            self.abandon();
        }
        written
    }

    fn write_memory(
        &self,
        memory: &GuestMemoryMmap,
        bytes: u64,
    ) -> Result<(Builder, Option<SnapshotBase>), SnapshotError> {
        if bytes == 0 || !bytes.is_multiple_of(1 << 20) {
            return Err(SnapshotError::Bounds(format!("{bytes} bytes of memory are not whole MiB")));
        }
        let plan = self.plan(memory, bytes)?;
        let mut builder = Builder::new(&self.tmp, bytes / PAGE)?;
        let mut buffer = chunk_buffer();
        for (chunk, mask) in runs::masks(&plan.runs) {
            for (first, count) in runs::stretches(mask) {
                let offset = u64::from(first) * PAGE;
                let address = guest_address(chunk * CHUNK_PAGES * PAGE + offset);
                memory.read_slice(sums::stretch_mut(&mut buffer, first, count), address).map_err(|e| {
                    SnapshotError::Kernel { what: "read guest memory", source: io::Error::other(e) }
                })?;
            }
            builder.chunk(chunk, mask, &buffer, plan.keep)?;
        }
        Ok((builder, plan.base))
    }

    /// Decides between diff and full snapshot.
    fn plan(&self, memory: &GuestMemoryMmap, bytes: u64) -> Result<Plan, SnapshotError> {
        let written = memory::written(memory)
            .map_err(|source| SnapshotError::Kernel { what: "read which pages the guest wrote", source })?;
        let Some(base) = &self.base else {
            return Ok(Plan { base: None, runs: written, keep: Keep::NonZero });
        };
        let runs = memory::join_runs(runs::bridge(&written, BRIDGE), MAX_RUNS);
        if self.fits(base, &runs, bytes) {
            return Ok(Plan { base: Some(base.clone()), runs, keep: Keep::Named });
        }
        let all = vec![Run { first: 0, count: bytes / PAGE }];
        Ok(Plan { base: None, runs: all, keep: Keep::NonZero })
    }

    /// Whether a diff of these pages can be used by who restores it.
    pub(super) fn fits(&self, base: &SnapshotBase, runs: &[Run], bytes: u64) -> bool {
        let Ok(links) = Links::open(&base.path) else { return false };
        let layers = std::iter::once(runs).chain(links.diffs().map(|link| link.sums.runs.as_slice()));
        let mappings: usize = runs::visible(layers).iter().map(Vec::len).sum();
        let manifest = &links.top.manifest;
        (manifest.id, manifest.vcpus) == (base.id, self.about.vcpus)
            && links.top.bytes() == bytes
            && links.len() < MAX_CHAIN - 1
            && mappings <= MAX_MAPPINGS
    }

    /// Writes the files beside `memory`, makes all durable and gives the directory its name.
    fn finish(
        &self,
        builder: Builder,
        state: &[u8],
        base: Option<SnapshotBase>,
        bytes: u64,
    ) -> Result<Written, SnapshotError> {
        let built = builder.finish()?;
        let base_id = base.as_ref().map(|base| base.id);
        let about = self.about.clone();
        let manifest = SnapshotManifest {
            version: SNAPSHOT_VERSION,
            id: self.id,
            base,
            created_unix_ms: self.created_unix_ms,
            vcpus: about.vcpus,
            memory_mib: bytes >> 20,
            processor: about.processor,
            disks: about.disks,
            guest_cid: about.guest_cid,
            labels: about.labels,
            state_bytes: state.len() as u64,
            state_sha256: files::digest(state),
            sums_bytes: built.sums.len() as u64,
            sums_sha256: files::digest(&built.sums),
            written_bytes: built.written,
        };
        let manifest = manifest::encode(&manifest)?;
        files::write(&self.tmp.join(SUMS), &built.sums, built.written)?;
        files::write(&self.tmp.join(STATE), state, built.written)?;
        files::write(&self.tmp.join(MANIFEST), &manifest, built.written)?;
        files::sync_dir(&self.tmp, built.written)?;
        // An empty directory that was made meanwhile is replaced; anything else makes this fail.
        fs::rename(&self.tmp, &self.dir)
            .map_err(|e| SnapshotError::writing("give its name to", &self.dir, built.written, e))?;
        if let Some(parent) = self.dir.parent() {
            files::sync_dir(parent, built.written)?;
        }
        Ok(Written { id: self.id, base: base_id, written_bytes: built.written })
    }
}

/// Where a byte of the memory file is for the guest.
fn guest_address(offset: u64) -> GuestAddress {
    GuestAddress(if offset < MMIO_GAP_START { offset } else { offset - MMIO_GAP_START + MMIO_GAP_END })
}

/// Makes `tmp`, or takes it over from a writer that died, and locks it.
fn claim(dir: &Path, tmp: &Path) -> Result<File, SnapshotError> {
    let busy = || {
        SnapshotError::place(dir, "another one is being written there; wait for it or choose another name")
    };
    let fault = |e| SnapshotError::writing("make the directory", tmp, 0, e);
    match DirBuilder::new().mode(0o700).create(tmp) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(fault(e)),
        _ => {}
    }
    let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let lock = OpenOptions::new().read(true).custom_flags(flags).open(tmp).map_err(fault)?;
    // SAFETY: flock on an open descriptor touches no memory of ours.
    if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
        let error = io::Error::last_os_error();
        return Err(if error.kind() == io::ErrorKind::WouldBlock { busy() } else { fault(error) });
    }
    // Between opening and locking, its writer can have finished or another one can have cleared it away.
    let inode = |found: fs::Metadata| (found.dev(), found.ino());
    let locked = lock.metadata().map(inode).map_err(fault)?;
    if fs::symlink_metadata(tmp).map(inode).ok() != Some(locked) {
        return Err(busy());
    }
    for entry in fs::read_dir(tmp).map_err(fault)? {
        let entry = entry.map_err(fault)?;
        let directory = entry.file_type().map_err(fault)?.is_dir();
        if directory { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) }
            .map_err(fault)?;
    }
    fs::set_permissions(tmp, fs::Permissions::from_mode(0o700)).map_err(fault)?;
    Ok(lock)
}

/// An identity that no snapshot has yet.
fn random_id() -> Result<SnapshotId, SnapshotError> {
    let mut id = [0; 16];
    // SAFETY: the pointer and length are those of `id`. So few bytes come whole (getrandom(2)).
    let got = unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) };
    if usize::try_from(got) == Ok(id.len()) {
        Ok(SnapshotId(id))
    } else {
        Err(SnapshotError::Kernel { what: "get random bytes", source: io::Error::last_os_error() })
    }
}

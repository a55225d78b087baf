//! Snapshots are written, damaged, chained and read back.

mod chains;
mod damage;
mod sets;
mod writing;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ark_hal::memory::{self, HugePages};
use ark_types::vmm::{DiskConfig, ExitReason, ProcessorModel, SnapshotBase};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{About, Chain, Draft, SnapshotError, Written};

const MIB: u64 = 1 << 20;
const STATE_BYTES: &[u8] = b"processors, interrupt controllers, devices";

/// In memory where that is possible: the tests wait for the disk thousands of times otherwise.
fn scratch() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn about() -> About {
    About {
        vcpus: 2,
        processor: ProcessorModel {
            vendor: "AuthenticAMD".to_owned(),
            family: 25,
            model: 1,
            stepping: 1,
            brand: "a processor".to_owned(),
        },
        disks: vec![DiskConfig { path: PathBuf::from("/images/root"), read_only: true }],
        guest_cid: Some(3),
        labels: BTreeMap::from([("image".to_owned(), "base".to_owned())]),
    }
}

fn zeroed(bytes: u64) -> GuestMemoryMmap {
    memory::create(bytes, HugePages::Never).unwrap()
}

/// Writes a snapshot of `memory`, that of a VM which went on from `base`.
fn take(dir: &Path, memory: &GuestMemoryMmap, base: Option<(&Path, Written)>) -> Written {
    let base = base.map(|(path, written)| SnapshotBase { id: written.id, path: path.to_owned() });
    Draft::begin(dir, about(), base).unwrap().write(memory, STATE_BYTES).unwrap()
}

/// Maps the memory of a snapshot.
fn map(dir: &Path) -> GuestMemoryMmap {
    shown(&Chain::open(dir).unwrap())
}

/// New memory as the snapshot has it.
fn shown(chain: &Chain) -> GuestMemoryMmap {
    let memory = memory::create(chain.manifest().memory_mib << 20, HugePages::Never).unwrap();
    chain.show(&memory, HugePages::Never).unwrap();
    memory
}

/// All bytes below the gap.
fn content(memory: &GuestMemoryMmap, bytes: u64) -> Vec<u8> {
    let mut content = vec![0; usize::try_from(bytes).unwrap()];
    memory.read_slice(&mut content, GuestAddress(0)).unwrap();
    content
}

/// Puts other bytes in a file's place, whatever its mode.
fn replace(path: &Path, bytes: &[u8]) {
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

/// A full snapshot `full` of 2 MiB that has zero and other pages, and a diff `diff` over it.
fn chain_of_two(dir: &Path) -> (PathBuf, PathBuf) {
    let (full, diff) = (dir.join("full"), dir.join("diff"));
    let booted = zeroed(2 * MIB);
    booted.write_slice(&[7; 5 * 4096], GuestAddress(4096)).unwrap();
    booted.write_slice(&[8; 10], GuestAddress(MIB + 300_000)).unwrap();
    let written = take(&full, &booted, None);
    let forked = map(&full);
    forked.write_slice(&[9; 4096], GuestAddress(2 * 4096)).unwrap();
    forked.write_slice(&[0; 4096], GuestAddress(3 * 4096)).unwrap();
    forked.write_slice(&[1; 4096], GuestAddress(MIB)).unwrap();
    take(&diff, &forked, Some((&full, written)));
    (full, diff)
}

/// Opening is refused because of the snapshot, with a sentence that says what to do; returned.
fn refused(dir: &Path) -> SnapshotError {
    let error = Chain::open(dir).unwrap_err();
    assert_eq!(error.exit_reason(), ExitReason::BadSnapshot, "{error}");
    assert!(error.to_string().contains(':'), "{error}");
    error
}

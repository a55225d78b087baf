//! Guest memory: one sealed memfd, mapped in at most two regions around the MMIO gap.
//!
//! The mapping is `MAP_SHARED`, so the memfd *is* the guest's memory: what the guest wrote can be read from the file, and
//! another VM can map the same file `MAP_PRIVATE` and so begin as a copy-on-write clone of it. (A private mapping of a
//! fresh VM would keep the guest's writes in anonymous pages, out of the file's reach.) The file stays open as each
//! region's [`vm_memory::FileOffset`]. Its size is sealed: a file that shrinks under a mapping would end the VMM by SIGBUS.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

/// First guest-physical address of the hole below 4 GiB where devices, IOAPIC and LAPIC live instead of memory.
pub const MMIO_GAP_START: u64 = 0xc000_0000;
/// First guest-physical address after the hole; memory beyond 3 GiB goes on here.
pub const MMIO_GAP_END: u64 = 0x1_0000_0000;

/// Guest memory is a multiple of this many bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Whether to ask the kernel for transparent huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePages {
    /// Use them where the kernel lets memfds have them (`/sys/kernel/mm/transparent_hugepage/shmem_enabled` is `advise`,
    /// `within_size` or `always`), else quietly 4 KiB pages. Fewer nested page faults, coarser memory use.
    WhenPossible,
    /// 4 KiB pages only, whatever the kernel's default is.
    Never,
}

/// Guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Zero, or not a multiple of the page size, or too large for an address.
    #[error("guest memory of {0} bytes is not possible: give a multiple of 4096 greater than zero")]
    Size(u64),
    /// The kernel refused the memfd.
    #[error(
        "create guest memory of {bytes} bytes (memfd): {source}; give the VM less memory or free some on the host"
    )]
    Create {
        /// Its size.
        bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused the mapping.
    #[error(
        "map guest memory of {bytes} bytes: {reason}; give the VM less memory or raise the limit on address space"
    )]
    Map {
        /// The region's size.
        bytes: u64,
        /// What the kernel said.
        reason: String,
    },
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

/// Zeroed guest memory of `size` bytes; pages are taken from the host when they are first touched.
///
/// # Errors
/// [`MemoryError`] when the size is impossible or the kernel refuses.
pub fn create(size: u64, huge_pages: HugePages) -> Result<GuestMemoryMmap, MemoryError> {
    if size == 0 || !size.is_multiple_of(PAGE_SIZE) || i64::try_from(size).is_err() {
        return Err(MemoryError::Size(size));
    }
    let file = Arc::new(sealed_memfd(size).map_err(|source| MemoryError::Create { bytes: size, source })?);
    let mut regions = Vec::with_capacity(2);
    let mut offset = 0;
    for (start, length) in layout(size) {
        let map_error = |reason: String| MemoryError::Map { bytes: length, reason };
        let bytes = usize::try_from(length).map_err(|_| MemoryError::Size(size))?;
        let mapping = MmapRegion::from_file(FileOffset::from_arc(Arc::clone(&file), offset), bytes)
            .map_err(|e| map_error(e.to_string()))?;
        advise(&mapping, huge_pages);
        let region = GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(MemoryError::Size(size))?;
        regions.push(region);
        offset += length;
    }
    GuestMemoryMmap::from_regions(regions)
        .map_err(|e| MemoryError::Map { bytes: size, reason: e.to_string() })
}

/// How many bytes of the host's memory `memory`'s file occupies, in RAM or swap; pages nobody touched count nothing.
///
/// # Errors
/// What `fstat` said.
pub fn resident_bytes(memory: &GuestMemoryMmap) -> io::Result<u64> {
    // All regions share the one file.
    let Some(file) = memory.iter().find_map(GuestMemoryRegion::file_offset) else { return Ok(0) };
    // st_blocks counts units of 512 bytes whatever the file system (stat(2)).
    Ok(file.file().metadata()?.blocks() * 512)
}

/// A memfd of exactly `size` bytes that can neither grow nor shrink.
fn sealed_memfd(size: u64) -> io::Result<File> {
    let file = match memfd(libc::MFD_NOEXEC_SEAL) {
        // Kernels before 6.3 do not know the flag that says that nobody will execute this file.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => memfd(0)?,
        other => other?,
    };
    file.set_len(size)?;
    // Not F_SEAL_SEAL: a template's memory will be sealed against writing later.
    // SAFETY: fcntl on an open descriptor with integer arguments touches no memory of ours.
    let sealed =
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_GROW | libc::F_SEAL_SHRINK) };
    if sealed == 0 { Ok(file) } else { Err(io::Error::last_os_error()) }
}

fn memfd(extra_flags: libc::c_uint) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | extra_flags;
    // SAFETY: the name is a C string that lives for the program's life.
    let fd = unsafe { libc::memfd_create(c"guest-memory".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was made just now and nobody else owns it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Tells the kernel about huge pages, and to leave guest memory out of core dumps. Both are hints: where the kernel was
/// built without them the VM runs all the same.
fn advise(mapping: &MmapRegion, huge_pages: HugePages) {
    let huge = match huge_pages {
        HugePages::WhenPossible => libc::MADV_HUGEPAGE,
        HugePages::Never => libc::MADV_NOHUGEPAGE,
    };
    for advice in [huge, libc::MADV_DONTDUMP] {
        // SAFETY: the range is exactly the mapping, and neither advice changes what it contains.
        unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), advice) };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn memory_begins_zeroed_takes_what_is_touched_and_is_seen_through_its_file() {
        let memory = create(64 * MIB, HugePages::Never).unwrap();
        assert_eq!(resident_bytes(&memory).unwrap(), 0);
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1234)).unwrap(), 0);
        memory.write_slice(b"guest", GuestAddress(32 * MIB)).unwrap();
        let resident = resident_bytes(&memory).unwrap();
        assert!((4096..MIB).contains(&resident), "{resident}");

        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap();
        let mut bytes = [0; 5];
        std::os::unix::fs::FileExt::read_exact_at(file.file(), &mut bytes, 32 * MIB).unwrap();
        assert_eq!(&bytes, b"guest");
    }

    #[test]
    fn a_private_mapping_of_the_file_is_a_copy_on_write_clone() {
        let memory = create(4 * MIB, HugePages::Never).unwrap();
        memory.write_slice(b"parent", GuestAddress(0x5000)).unwrap();
        let file = memory.iter().next().unwrap().file_offset().unwrap().clone();
        let clone = MmapRegion::<()>::build(
            Some(file),
            4 << 20,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_NORESERVE,
        )
        .unwrap();
        let clone = GuestRegionMmap::new(clone, GuestAddress(0)).unwrap();
        let clone = GuestMemoryMmap::from_regions(vec![clone]).unwrap();
        clone.write_slice(b"child!", GuestAddress(0x5000)).unwrap();
        let mut bytes = [0; 6];
        memory.read_slice(&mut bytes, GuestAddress(0x5000)).unwrap();
        assert_eq!(&bytes, b"parent");
    }

    #[test]
    fn the_file_can_neither_shrink_nor_grow() {
        let memory = create(MIB, HugePages::WhenPossible).unwrap();
        let file = memory.iter().next().unwrap().file_offset().unwrap().clone();
        for size in [0, MIB - 4096, 2 * MIB] {
            let error = file.file().set_len(size).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{size}");
        }
    }

    #[test]
    fn impossible_sizes_are_refused_with_a_sentence() {
        for size in [0, 1, 4095, MIB + 1, u64::MAX, !4095] {
            let error = create(size, HugePages::Never).unwrap_err();
            assert!(matches!(error, MemoryError::Size(_)), "{size}: {error}");
        }
        let error = create(1 << 62, HugePages::Never).unwrap_err();
        assert!(error.to_string().contains("less memory"), "{error}");
    }

    #[test]
    fn memory_above_the_gap_continues_the_file() {
        // Nothing is touched, so this costs address space only.
        let memory = create(4 << 30, HugePages::Never).unwrap();
        let regions: Vec<_> =
            memory.iter().map(|r| (r.start_addr().0, r.len(), r.file_offset().unwrap().start())).collect();
        assert_eq!(regions, [(0, 3 << 30, 0), (4 << 30, 1 << 30, 3 << 30)]);
    }

    proptest! {
        #[test]
        fn the_layout_holds_all_memory_and_leaves_the_gap_free(pages in 1_u64..1 << 28) {
            let size = pages * PAGE_SIZE;
            let regions = layout(size);
            prop_assert_eq!(regions.iter().map(|(_, length)| length).sum::<u64>(), size);
            for (start, length) in regions {
                prop_assert!(length > 0);
                prop_assert!(start + length <= MMIO_GAP_START || start >= MMIO_GAP_END);
            }
        }
    }
}

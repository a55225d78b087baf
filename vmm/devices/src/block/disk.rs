//! The file behind a block device: vectored reads and writes between it and guest memory, flush, holes and zeroes.

use std::fs::{File, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt};

use libc::{FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, c_int, iovec, off_t};
use vm_memory::VolatileSlice;

/// Bytes of a sector, whatever the device's block size (specification 1.2, section 5.2.4).
pub(super) const SECTOR: u64 = 512;

/// A file that cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A directory, pipe, socket or the like.
    #[error("it is neither a file nor a block device: give the path of a raw image")]
    Kind,
    /// Less than one sector.
    #[error("it has {0} bytes, less than one sector of 512: give a raw image that is not empty")]
    Empty(u64),
    /// Somebody else would see this guest's writes, or this guest theirs.
    #[error("another VM has it, and one of the two writes to it: give each VM its own copy")]
    InUse,
    /// It could not be looked at.
    #[error("its size cannot be found: {0}")]
    Io(#[from] io::Error),
}

/// An open raw image, locked (flock) as long as it is: one writer or many readers. Ranges are in bytes and were checked
/// against its size.
pub(super) struct Disk {
    file: File,
    /// Size of the file when the device was made.
    bytes: u64,
    sectors: u64,
}

impl Disk {
    pub(super) fn new(file: File, read_only: bool) -> Result<Self, DiskError> {
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind);
        }
        let locked = if read_only { file.try_lock_shared() } else { file.try_lock() };
        // A file system without locks is no reason to refuse.
        if matches!(locked, Err(TryLockError::WouldBlock)) {
            return Err(DiskError::InUse);
        }
        // Seeking finds the size of block devices too; nothing else uses the position.
        let bytes = (&file).seek(SeekFrom::End(0))?;
        if bytes < SECTOR {
            return Err(DiskError::Empty(bytes));
        }
        // Nothing can be written behind the end of a file that is not to grow, and zeroes can be read there.
        let sectors = if read_only { bytes.div_ceil(SECTOR) } else { bytes / SECTOR };
        Ok(Self { file, bytes, sectors })
    }

    /// Sectors: where the guest may only read, the last one goes on with zeroes where the file ends; else bytes of the file past whole
    /// sectors are out of its reach.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// The bytes of `count` sectors from `first` on; `None` when they are not all on the disk.
    pub(super) fn range(&self, first: u64, count: u64) -> Option<Range<u64>> {
        let end = first.checked_add(count).filter(|end| *end <= self.sectors)?;
        Some(first.checked_mul(SECTOR)?..end.checked_mul(SECTOR)?)
    }

    /// Fills `buffers` with the bytes from `offset` on.
    pub(super) fn read(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let fd = self.file.as_raw_fd();
        transfer(offset, buffers, |vectors, count, offset| {
            // SAFETY: `transfer` gives vectors that describe guest memory, which is mapped for as long as `buffers` are
            // borrowed; the kernel writes to it as the guest itself may at any time, and no Rust reference to it exists.
            let done = unsafe { libc::preadv(fd, vectors, count, offset) };
            if done == 0 && u64::try_from(offset).is_ok_and(|offset| offset >= self.bytes) {
                // SAFETY: as above; `transfer` gives `count` vectors.
                return unsafe { zero(vectors, count) };
            }
            done
        })
    }

    /// Writes `buffers` to the bytes from `offset` on.
    pub(super) fn write(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let fd = self.file.as_raw_fd();
        transfer(offset, buffers, |vectors, count, offset| {
            // SAFETY: as for `read`; the kernel only reads from it.
            unsafe { libc::pwritev(fd, vectors, count, offset) }
        })
    }

    /// Returns when all that was written is on stable storage.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives the space of `range` back to the host; it reads as zeroes afterwards.
    pub(super) fn discard(&self, range: &Range<u64>) -> io::Result<()> {
        self.fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, range)
    }

    /// Makes `range` read as zeroes; `may_discard`: its space may be given back.
    pub(super) fn write_zeroes(&self, range: &Range<u64>, may_discard: bool) -> io::Result<()> {
        if may_discard && self.discard(range).is_ok() {
            return Ok(());
        }
        if self.fallocate(FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, range).is_ok() {
            return Ok(());
        }
        // tmpfs knows holes but not zero ranges.
        static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];
        let mut at = range.start;
        while let Some(rest) = range.end.checked_sub(at).filter(|rest| *rest > 0) {
            let len = usize::try_from(rest).unwrap_or(usize::MAX).min(ZEROES.len());
            let zeroes = ZEROES.get(..len).unwrap_or_default();
            self.file.write_all_at(zeroes, at)?;
            at = at.saturating_add(u64::try_from(len).map_err(io::Error::other)?);
        }
        Ok(())
    }

    fn fallocate(&self, mode: c_int, range: &Range<u64>) -> io::Result<()> {
        let offset = off_t::try_from(range.start).map_err(io::Error::other)?;
        let len = off_t::try_from(range.end.saturating_sub(range.start)).map_err(io::Error::other)?;
        loop {
            // SAFETY: the call takes no pointers and the descriptor is open.
            if unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, len) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

/// Fills `count` vectors with zeroes: what a read behind the end of a file gives. The number of bytes.
///
/// # Safety
/// There are `count` vectors, and what they describe may be written to.
unsafe fn zero(vectors: *const iovec, count: c_int) -> isize {
    // SAFETY: the caller's.
    let vectors = unsafe { std::slice::from_raw_parts(vectors, usize::try_from(count).unwrap_or_default()) };
    let mut done = 0_isize;
    for vector in vectors {
        // SAFETY: the caller's; the guest may read or write it meanwhile, and no Rust reference to it exists.
        unsafe { std::ptr::write_bytes(vector.iov_base.cast::<u8>(), 0, vector.iov_len) };
        done = done.saturating_add_unsigned(vector.iov_len);
    }
    done
}

/// Calls `call` (preadv or pwritev) until all of `buffers` was transferred. At most IOV_MAX (1024) buffers.
fn transfer(
    offset: u64,
    buffers: &[VolatileSlice<'_>],
    call: impl Fn(*const iovec, c_int, off_t) -> isize,
) -> io::Result<()> {
    let mut vectors: Vec<iovec> = buffers
        .iter()
        .map(|buffer| iovec { iov_base: buffer.ptr_guard_mut().as_ptr().cast(), iov_len: buffer.len() })
        .collect();
    let mut rest = vectors.as_mut_slice();
    let mut offset = off_t::try_from(offset).map_err(io::Error::other)?;
    while !rest.is_empty() {
        let count = c_int::try_from(rest.len()).map_err(io::Error::other)?;
        let done = call(rest.as_ptr(), count, offset);
        let Ok(done) = usize::try_from(done) else {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        };
        if done == 0 {
            // The file became shorter than it was when the device was made.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        offset = offset.saturating_add(off_t::try_from(done).map_err(io::Error::other)?);
        rest = advance(rest, done);
    }
    Ok(())
}

/// What is left of `vectors` after their first `done` bytes.
fn advance(vectors: &mut [iovec], mut done: usize) -> &mut [iovec] {
    let mut whole = 0_usize;
    for vector in vectors.iter() {
        let Some(left) = done.checked_sub(vector.iov_len) else { break };
        done = left;
        whole = whole.saturating_add(1);
    }
    let rest = vectors.get_mut(whole..).unwrap_or_default();
    if let Some(first) = rest.first_mut() {
        first.iov_base = first.iov_base.wrapping_byte_add(done);
        first.iov_len = first.iov_len.saturating_sub(done);
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lens(lens: &[usize], done: usize) -> Vec<(usize, usize)> {
        let mut vectors: Vec<iovec> =
            lens.iter().map(|&iov_len| iovec { iov_base: std::ptr::null_mut(), iov_len }).collect();
        advance(&mut vectors, done).iter().map(|v| (v.iov_base.addr(), v.iov_len)).collect()
    }

    #[test]
    fn a_partial_transfer_goes_on_where_it_ended() {
        assert_eq!(lens(&[4, 4], 0), [(0, 4), (0, 4)]);
        assert_eq!(lens(&[4, 4], 3), [(3, 1), (0, 4)]);
        assert_eq!(lens(&[4, 4], 4), [(0, 4)]);
        assert_eq!(lens(&[4, 0, 4], 5), [(1, 3)]);
        assert_eq!(lens(&[4, 4], 8), []);
        assert_eq!(lens(&[], 0), []);
    }

    #[test]
    fn only_files_and_block_devices_are_disks() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(Disk::new(File::open(directory.path()).unwrap(), true), Err(DiskError::Kind)));
        assert!(matches!(Disk::new(File::open("/dev/null").unwrap(), true), Err(DiskError::Kind)));
        let file = tempfile::tempfile().unwrap();
        file.set_len(511).unwrap();
        assert!(matches!(Disk::new(file, false), Err(DiskError::Empty(511))));
    }

    #[test]
    fn a_disk_has_one_writer_or_many_readers() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, [0; 512]).unwrap();
        let disk =
            |read_only| Disk::new(File::options().read(true).write(true).open(&path).unwrap(), read_only);
        let writer = disk(false).unwrap();
        assert!(matches!(disk(false), Err(DiskError::InUse)));
        assert!(matches!(disk(true), Err(DiskError::InUse)));
        drop(writer);
        let _readers = [disk(true).unwrap(), disk(true).unwrap()];
        assert!(matches!(disk(false), Err(DiskError::InUse)));
    }

    #[test]
    fn ranges_stay_on_the_disk() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10 * SECTOR + 7).unwrap();
        let disk = Disk::new(file, false).unwrap();
        assert_eq!(disk.sectors(), 10);
        let file = tempfile::tempfile().unwrap();
        file.set_len(10 * SECTOR + 7).unwrap();
        assert_eq!(
            Disk::new(file, true).unwrap().sectors(),
            11,
            "the rest of the last sector reads as zeroes"
        );
        assert_eq!(disk.range(0, 10), Some(0..5120));
        assert_eq!(disk.range(9, 1), Some(4608..5120));
        assert_eq!(disk.range(10, 0), Some(5120..5120));
        for (first, count) in [(9, 2), (10, 1), (11, 0), (u64::MAX, 1), (1, u64::MAX), (0, u64::MAX)] {
            assert_eq!(disk.range(first, count), None);
        }
    }

    #[test]
    fn the_last_sector_of_a_file_that_ends_within_it_goes_on_with_zeroes() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 1030], 0).unwrap();
        let disk = Disk::new(file.try_clone().unwrap(), true).unwrap();
        let mut bytes = [9_u8; 1536];
        let (first, rest) = bytes.split_at_mut(1027);
        disk.read(0, &[VolatileSlice::from(first), VolatileSlice::from(rest)]).unwrap();
        assert!(bytes[..1030].iter().all(|&b| b == 7) && bytes[1030..].iter().all(|&b| b == 0));
        // A file that became shorter is a fault.
        file.set_len(600).unwrap();
        let error = disk.read(0, &[VolatileSlice::from(&mut bytes[..])]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn zeroes_are_written_with_and_without_holes() {
        for may_discard in [false, true] {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&[7; 200 * 1024], 0).unwrap();
            let disk = Disk::new(file.try_clone().unwrap(), false).unwrap();
            disk.write_zeroes(&(1024..150 * 1024), may_discard).unwrap();
            let mut bytes = vec![0; 200 * 1024];
            file.read_exact_at(&mut bytes, 0).unwrap();
            assert!(bytes[..1024].iter().all(|&b| b == 7) && bytes[150 * 1024..].iter().all(|&b| b == 7));
            assert!(bytes[1024..150 * 1024].iter().all(|&b| b == 0));
        }
    }
}

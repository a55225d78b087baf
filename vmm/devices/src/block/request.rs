//! A request as the driver lays it out in a descriptor chain, checked.
//!
//! ```text
//! device-readable: type (le32), reserved (le32), sector (le64), data to write …
//! device-writable: … data to read, status (1 byte)
//! ```
//!
//! How that is cut into descriptors is the driver's choice (specification 1.2, section 2.7.4).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::GuestMemory;
use crate::virtio::queue::Chain;

/// Bytes of type, reserved and sector.
const HEADER: usize = 16;
/// Bytes of one range of a discard or write-zeroes request (`virtio_blk_discard_write_zeroes`).
const RANGE: usize = 16;
/// Most pieces of guest memory in one request: what preadv takes (IOV_MAX).
const MAX_PIECES: usize = 1024;
/// Most descriptors of a chain, empty ones included; indirect tables could have 65535.
const MAX_DESCRIPTORS: usize = 2 * MAX_PIECES;

/// Most ranges of one discard request.
pub(super) const MAX_DISCARD_RANGES: u16 = 64;
/// Most ranges of one write-zeroes request: one, as their bytes may have to be written.
pub(super) const MAX_ZEROES_RANGES: u16 = 1;

/// What the driver wants.
pub(super) enum Operation<'m> {
    /// Fill `buffers` from `sector` on.
    Read { sector: u64, buffers: Vec<VolatileSlice<'m>> },
    /// Write `buffers` from `sector` on.
    Write { sector: u64, buffers: Vec<VolatileSlice<'m>> },
    /// All writes so far to stable storage.
    Flush,
    /// Give back the space of ranges.
    Discard(Vec<SectorRange>),
    /// Make ranges read as zeroes.
    WriteZeroes(Vec<SectorRange>),
    /// Write the device's name to `buffers`.
    GetId { buffers: Vec<VolatileSlice<'m>> },
    /// Something this device does not know.
    Unknown,
}

/// One range of a discard or write-zeroes request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SectorRange {
    pub(super) sector: u64,
    pub(super) count: u32,
    /// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP` (bit 0), and reserved bits.
    pub(super) flags: u32,
}

/// A chain with a place for the status.
pub(super) struct Request<'m> {
    /// Where the status byte goes.
    pub(super) status: GuestAddress,
    /// `None`: the chain makes no sense as a request (no header, memory that is not there, too many pieces).
    pub(super) operation: Option<Operation<'m>>,
}

/// The two halves of a chain.
#[derive(Default)]
struct Pieces<'m> {
    readable: Vec<VolatileSlice<'m>>,
    writable: Vec<VolatileSlice<'m>>,
    /// Some of it cannot be used.
    bad: bool,
}

impl<'m> Request<'m> {
    /// Reads a chain. `None` when it has no byte for a status or more than [`MAX_DESCRIPTORS`].
    pub(super) fn parse(memory: &'m GuestMemory, chain: Chain<'m>) -> Option<Self> {
        let mut pieces = Pieces::default();
        let mut status = None;
        for (index, descriptor) in chain.enumerate() {
            if index >= MAX_DESCRIPTORS {
                return None;
            }
            let len = descriptor.len();
            if descriptor.is_write_only() {
                // An empty descriptor has no last byte; the status is then the last byte of the one before.
                if let Some(last) = len.checked_sub(1) {
                    status = descriptor.addr().checked_add(last.into());
                }
            } else if !pieces.writable.is_empty() {
                // "The driver MUST place any device-writable elements after any device-readable ones" (2.7.4.2).
                pieces.bad = true;
            }
            pieces.add(memory, descriptor.addr(), len, descriptor.is_write_only());
        }
        let status = status?;
        Some(Self { status, operation: pieces.operation() })
    }
}

impl<'m> Pieces<'m> {
    fn add(&mut self, memory: &'m GuestMemory, addr: GuestAddress, len: u32, writable: bool) {
        let Ok(len) = usize::try_from(len) else { return self.bad = true };
        let half = if writable { &mut self.writable } else { &mut self.readable };
        for piece in GuestMemoryBackend::get_slices(memory, addr, len) {
            match piece {
                Ok(piece) if half.len() < MAX_PIECES => half.push(piece),
                Ok(_) | Err(_) => return self.bad = true,
            }
        }
    }

    fn operation(mut self) -> Option<Operation<'m>> {
        if self.bad {
            return None;
        }
        drop_last_byte(&mut self.writable)?;
        let mut header = [0; HEADER];
        take_front(&mut self.readable, &mut header)?;
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        Some(match u32::from_le_bytes([a, b, c, d]) {
            VIRTIO_BLK_T_IN => Operation::Read { sector, buffers: self.writable },
            VIRTIO_BLK_T_OUT => Operation::Write { sector, buffers: self.readable },
            VIRTIO_BLK_T_FLUSH => Operation::Flush,
            VIRTIO_BLK_T_DISCARD => Operation::Discard(ranges(self.readable, MAX_DISCARD_RANGES)?),
            VIRTIO_BLK_T_WRITE_ZEROES => Operation::WriteZeroes(ranges(self.readable, MAX_ZEROES_RANGES)?),
            VIRTIO_BLK_T_GET_ID => Operation::GetId { buffers: self.writable },
            _ => Operation::Unknown,
        })
    }
}

/// Bytes of all `buffers`: a chain is at most 4 GiB, so this cannot overflow.
pub(super) fn total(buffers: &[VolatileSlice<'_>]) -> u64 {
    buffers.iter().fold(0, |sum, buffer| sum.saturating_add(u64::try_from(buffer.len()).unwrap_or(u64::MAX)))
}

/// Writes `bytes` to the beginning of `buffers`; false when they are too short.
pub(super) fn scatter(buffers: &[VolatileSlice<'_>], mut bytes: &[u8]) -> bool {
    for buffer in buffers {
        let written = buffer.write(bytes, 0).unwrap_or(0);
        bytes = bytes.get(written..).unwrap_or_default();
        if bytes.is_empty() {
            break;
        }
    }
    bytes.is_empty()
}

/// Moves the first bytes of `buffers` to `bytes`.
fn take_front(buffers: &mut Vec<VolatileSlice<'_>>, mut bytes: &mut [u8]) -> Option<()> {
    let mut used = 0_usize;
    for buffer in buffers.iter_mut() {
        let len = buffer.len().min(bytes.len());
        let (front, rest) = std::mem::take(&mut bytes).split_at_mut_checked(len)?;
        buffer.read_slice(front, 0).ok()?;
        bytes = rest;
        if len < buffer.len() {
            *buffer = buffer.offset(len).ok()?;
            break;
        }
        used = used.saturating_add(1);
    }
    buffers.drain(..used.min(buffers.len()));
    bytes.is_empty().then_some(())
}

/// Takes the status byte off the end.
fn drop_last_byte(buffers: &mut Vec<VolatileSlice<'_>>) -> Option<()> {
    let last = buffers.pop()?;
    match last.len().checked_sub(1)? {
        0 => {}
        len => buffers.push(last.subslice(0, len).ok()?),
    }
    Some(())
}

fn ranges(mut buffers: Vec<VolatileSlice<'_>>, max: u16) -> Option<Vec<SectorRange>> {
    let bytes = usize::try_from(total(&buffers)).ok()?;
    let count = bytes.checked_div(RANGE)?;
    if count == 0 || count > max.into() || !bytes.is_multiple_of(RANGE) {
        return None;
    }
    let mut ranges = Vec::with_capacity(count);
    for _ in 0..count {
        let mut raw = [0; RANGE];
        take_front(&mut buffers, &mut raw)?;
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = raw;
        ranges.push(SectorRange {
            sector: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
            count: u32::from_le_bytes([n0, n1, n2, n3]),
            flags: u32::from_le_bytes(flags),
        });
    }
    Some(ranges)
}

//! Guest memory of descriptor chains as the pieces of one scattered buffer, and socket calls straight from and into them.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use super::packet::{HEADER_LEN, HEADER_LEN_U32, Header};
use crate::GuestMemory;

/// Descriptors that a chain may have, and pieces of memory. Linux needs at most 18 (a header and a zero-copy packet of 17
/// pages).
const MAX_PIECES: usize = 64;

/// A chain that is no packet and has no room for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ChainError {
    /// A descriptor points outside of guest memory.
    #[error("a descriptor is not in guest memory")]
    OutsideMemory,
    /// More than [`MAX_PIECES`] descriptors, of either direction and whether empty or not.
    #[error("the chain has too many descriptors")]
    TooManyPieces,
    /// No complete header, or no room for one and a byte of data.
    #[error("the chain is too short")]
    TooShort,
}

/// A scattered buffer in guest memory.
pub(super) struct Segments<'m> {
    pieces: Vec<VolatileSlice<'m>>,
    len: usize,
}

impl<'m> Segments<'m> {
    /// The memory that `chain` describes, in order: its device-writable part or the other one.
    fn collect(
        memory: &'m GuestMemory,
        chain: impl Iterator<Item = Descriptor>,
        writable: bool,
    ) -> Result<Self, ChainError> {
        let mut pieces = Vec::with_capacity(2);
        let mut len = 0_usize;
        for (index, descriptor) in chain.enumerate() {
            if index >= MAX_PIECES {
                return Err(ChainError::TooManyPieces);
            }
            if descriptor.is_write_only() != writable {
                continue;
            }
            let bytes = usize::try_from(descriptor.len()).map_err(|_| ChainError::OutsideMemory)?;
            // A descriptor that crosses from one memory region to the next yields several slices, an empty one none.
            for slice in memory.get_slices(descriptor.addr(), bytes) {
                let slice = slice.map_err(|_| ChainError::OutsideMemory)?;
                if pieces.len() >= MAX_PIECES {
                    return Err(ChainError::TooManyPieces);
                }
                len = len.saturating_add(slice.len());
                pieces.push(slice);
            }
        }
        Ok(Self { pieces, len })
    }

    /// Bytes in total.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Copies from `offset` on into `target` and returns how much there was to copy.
    pub(super) fn copy_to(&self, offset: usize, target: &mut [u8]) -> usize {
        let mut rest = target;
        let mut done = 0_usize;
        for piece in self.window(offset, self.len) {
            let n = piece.copy_to(rest);
            done = done.saturating_add(n);
            rest = rest.get_mut(n..).unwrap_or_default();
            if rest.is_empty() {
                break;
            }
        }
        done
    }

    /// Copies `source` to the front; what does not fit is left out.
    fn copy_from(&self, source: &[u8]) {
        let mut rest = source;
        for piece in &self.pieces {
            let (now, later) = rest.split_at(rest.len().min(piece.len()));
            piece.copy_from(now);
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
    }

    /// The pieces of the bytes from `offset` on, `len` of them or as many as there are.
    fn window(&self, offset: usize, len: usize) -> impl Iterator<Item = VolatileSlice<'m>> + '_ {
        let (mut skip, mut left) = (offset, len);
        self.pieces.iter().filter_map(move |piece| {
            let start = skip.min(piece.len());
            skip = skip.saturating_sub(start);
            let n = piece.len().saturating_sub(start).min(left);
            left = left.saturating_sub(n);
            if n == 0 { None } else { piece.subslice(start, n).ok() }
        })
    }
}

/// A packet that the guest sent: its header and the memory that holds its data.
pub(super) struct TxPacket<'m> {
    /// As the guest wrote it; only `len` was compared with the chain.
    pub(super) header: Header,
    segments: Segments<'m>,
}

impl<'m> TxPacket<'m> {
    /// Reads the header from the device-readable part of a chain.
    ///
    /// # Errors
    /// [`ChainError`]: the chain holds no packet. A header that claims more data than there is comes with `Ok(Err)`, for
    /// its connection has to end.
    pub(super) fn parse(
        memory: &'m GuestMemory,
        chain: impl Iterator<Item = Descriptor>,
    ) -> Result<Result<Self, Header>, ChainError> {
        let segments = Segments::collect(memory, chain, false)?;
        let mut bytes = [0; HEADER_LEN];
        if segments.copy_to(0, &mut bytes) < HEADER_LEN {
            return Err(ChainError::TooShort);
        }
        let header = Header::from_bytes(&bytes);
        let room = segments.len().saturating_sub(HEADER_LEN);
        if usize::try_from(header.len).is_ok_and(|len| len <= room) {
            Ok(Ok(Self { header, segments }))
        } else {
            Ok(Err(header))
        }
    }

    /// Bytes of data.
    pub(super) fn data_len(&self) -> usize {
        // It is at most `segments.len()`, see `parse`.
        usize::try_from(self.header.len).unwrap_or(0)
    }

    /// Copies the data from `offset` on into `target` and returns how much there was to copy.
    pub(super) fn copy_data(&self, offset: usize, target: &mut [u8]) -> usize {
        self.segments.copy_to(offset.saturating_add(HEADER_LEN), target)
    }

    /// Sends the data to `socket` without waiting and returns how much it took.
    ///
    /// # Errors
    /// What the kernel said; `WouldBlock` when the socket takes nothing now.
    pub(super) fn send_data(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut vectors: Vec<libc::iovec> =
            self.segments.window(HEADER_LEN, self.data_len()).map(|piece| vector(&piece)).collect();
        message(socket, &mut vectors, Direction::Send).map(|(n, _)| n)
    }
}

/// A buffer of the guest for one packet to it.
pub(super) struct RxBuffer<'m> {
    head: u16,
    segments: Segments<'m>,
    /// Bytes written: header and data.
    written: u32,
}

impl<'m> RxBuffer<'m> {
    /// Takes the device-writable part of the chain that begins at `head`.
    ///
    /// # Errors
    /// [`ChainError`]: there is no room for a packet.
    pub(super) fn parse(
        memory: &'m GuestMemory,
        head: u16,
        chain: impl Iterator<Item = Descriptor>,
    ) -> Result<Self, ChainError> {
        let segments = Segments::collect(memory, chain, true)?;
        if segments.len() <= HEADER_LEN {
            return Err(ChainError::TooShort);
        }
        Ok(Self { head, segments, written: 0 })
    }

    /// Room for data.
    pub(super) fn room(&self) -> usize {
        self.segments.len().saturating_sub(HEADER_LEN)
    }

    /// Puts the header before the data, which completes the packet.
    pub(super) fn finish(&mut self, header: &Header) {
        self.segments.copy_from(&header.to_bytes());
        self.written = header.len.saturating_add(HEADER_LEN_U32);
    }

    /// Its chain.
    pub(super) fn head(&self) -> u16 {
        self.head
    }

    /// Bytes written: header and data.
    pub(super) fn written(&self) -> u32 {
        self.written
    }

    /// Bytes of data written.
    pub(super) fn data_written(&self) -> u64 {
        u64::from(self.written.saturating_sub(HEADER_LEN_U32))
    }
}

/// Reads from `socket` into the data parts of `buffers`, one after the other, without waiting: `limit` bytes at most.
/// The second value tells that more may be there although the buffers were not filled.
///
/// # Errors
/// What the kernel said; `WouldBlock` when there is nothing now.
pub(super) fn receive_data(
    socket: BorrowedFd<'_>,
    buffers: &[RxBuffer<'_>],
    limit: usize,
) -> io::Result<(usize, bool)> {
    let mut vectors = Vec::with_capacity(buffers.len());
    let mut left = limit;
    for buffer in buffers {
        let room = buffer.room().min(left);
        vectors.extend(buffer.segments.window(HEADER_LEN, room).map(|piece| vector(&piece)));
        left = left.saturating_sub(room);
    }
    message(socket, &mut vectors, Direction::Receive)
}

fn vector(piece: &VolatileSlice<'_>) -> libc::iovec {
    libc::iovec { iov_base: piece.ptr_guard_mut().as_ptr().cast(), iov_len: piece.len() }
}

enum Direction {
    Send,
    Receive,
}

/// One `sendmsg` or `recvmsg`. The flag of a received message says that the kernel stopped early because a descriptor came
/// along (which is dropped).
fn message(
    socket: BorrowedFd<'_>,
    vectors: &mut [libc::iovec],
    direction: Direction,
) -> io::Result<(usize, bool)> {
    // The kernel takes 1,024 vectors (UIO_MAXIOV): 16 buffers, a connection's largest batch, of MAX_PIECES each.
    // SAFETY: a msghdr of zeroes is valid: no address, no vectors, no control data.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = vectors.as_mut_ptr();
    header.msg_iovlen = vectors.len();
    let n = match direction {
        // SAFETY: the vectors lie in mapped guest memory that the borrowed `Segments` keep alive.
        Direction::Send => unsafe {
            libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
        },
        // SAFETY: as above; guest memory has no Rust references into it, so the kernel may write to it.
        Direction::Receive => unsafe {
            libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC)
        },
    };
    let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    Ok((n, header.msg_flags & libc::MSG_CTRUNC != 0))
}

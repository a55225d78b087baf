//! The packet header: hostile bytes in, a [`Header`] with typed fields out.
//!
//! Layout and codes: Virtio 1.2, section 5.10.6 ("Device Operation"), `struct virtio_vsock_hdr`, little-endian, packed.

/// Bytes of a header.
pub(super) const HEADER_LEN: usize = 44;
/// The same as it appears in the used ring.
pub(super) const HEADER_LEN_U32: u32 = 44;

/// The host's context id (section 5.10.4).
pub(super) const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`, the only socket type offered.
pub(super) const TYPE_STREAM: u16 = 1;

/// What a packet does: `enum virtio_vsock_op`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// Asks for a connection.
    Request,
    /// Accepts it.
    Response,
    /// Ends or refuses it.
    Rst,
    /// Will not receive or not send any more: see [`Shutdown`].
    Shutdown,
    /// Carries data.
    Rw,
    /// Only tells the credit fields.
    CreditUpdate,
    /// Asks for a [`Op::CreditUpdate`].
    CreditRequest,
}

impl Op {
    /// The code on the wire.
    pub(super) const fn code(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Rst => 3,
            Self::Shutdown => 4,
            Self::Rw => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }

    /// `None` for a code that the specification does not know.
    pub(super) const fn from_code(code: u16) -> Option<Self> {
        Some(match code {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Rst,
            4 => Self::Shutdown,
            5 => Self::Rw,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// The flags of a [`Op::Shutdown`] packet: what its sender will not do any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Shutdown {
    /// It will not receive (bit 0).
    pub(super) receive: bool,
    /// It will not send (bit 1).
    pub(super) send: bool,
}

impl Shutdown {
    /// Bits that the specification does not know are ignored.
    pub(super) const fn from_flags(flags: u32) -> Self {
        Self { receive: flags & 1 != 0, send: flags & 2 != 0 }
    }

    /// As on the wire.
    pub(super) const fn flags(self) -> u32 {
        (self.receive as u32) | ((self.send as u32) << 1)
    }

    /// Both of them: the sender has closed.
    pub(super) const fn both(self) -> bool {
        self.receive && self.send
    }

    /// What either says; a shutdown is never taken back.
    pub(super) const fn or(self, other: Self) -> Self {
        Self { receive: self.receive || other.receive, send: self.send || other.send }
    }
}

/// A connection's ports; the context ids are the same for all of a device's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    /// On the host's side.
    pub(super) host: u32,
    /// On the guest's side.
    pub(super) guest: u32,
}

/// A header. Codes are kept as they came: the receiver decides what it makes of unknown ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Context id of the sender.
    pub(super) src_cid: u64,
    /// Context id of the receiver.
    pub(super) dst_cid: u64,
    /// Port of the sender.
    pub(super) src_port: u32,
    /// Port of the receiver.
    pub(super) dst_port: u32,
    /// Bytes of data that follow.
    pub(super) len: u32,
    /// Socket type.
    pub(super) kind: u16,
    /// See [`Op`].
    pub(super) op: u16,
    /// See [`Shutdown`]; 0 for all other operations.
    pub(super) flags: u32,
    /// Bytes of buffer that the sender has for this connection.
    pub(super) buf_alloc: u32,
    /// Bytes that the sender's user has taken out of that buffer so far, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Takes the fields apart.
    pub(super) fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// As on the wire.
    pub(super) fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut rest = bytes.as_mut_slice();
        put(&mut rest, self.src_cid.to_le_bytes());
        put(&mut rest, self.dst_cid.to_le_bytes());
        put(&mut rest, self.src_port.to_le_bytes());
        put(&mut rest, self.dst_port.to_le_bytes());
        put(&mut rest, self.len.to_le_bytes());
        put(&mut rest, self.kind.to_le_bytes());
        put(&mut rest, self.op.to_le_bytes());
        put(&mut rest, self.flags.to_le_bytes());
        put(&mut rest, self.buf_alloc.to_le_bytes());
        put(&mut rest, self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The refusal of this packet, which belongs to no connection.
    pub(super) fn refusal(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            len: 0,
            kind: self.kind,
            op: Op::Rst.code(),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// Ends a connection of the guest that the device knows nothing of.
    pub(super) const fn reset(guest_cid: u64, ports: Ports) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            len: 0,
            kind: TYPE_STREAM,
            op: Op::Rst.code(),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// The ports of a packet that the guest sent.
    pub(super) const fn ports_from_guest(&self) -> Ports {
        Ports { host: self.dst_port, guest: self.src_port }
    }
}

/// The first `N` bytes of `rest`, which moves past them. The callers' sizes add up to what they were given.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let Some((field, tail)) = rest.split_first_chunk() else { return [0; N] };
    *rest = tail;
    *field
}

/// The counterpart of [`take`].
fn put<const N: usize>(rest: &mut &mut [u8], field: [u8; N]) {
    if let Some((place, tail)) = std::mem::take(rest).split_first_chunk_mut() {
        *place = field;
        *rest = tail;
    }
}

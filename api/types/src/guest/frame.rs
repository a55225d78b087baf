//! The frame: an 8-byte header and a payload.
//!
//! ```text
//!  0       4      5         6          8
//!  ┌───────┬──────┬─────────┬──────────┬───────────────┐
//!  │ len   │ kind │ version │ reserved │ payload (len) │
//!  └───────┴──────┴─────────┴──────────┴───────────────┘
//!   u32 LE   u8     u8 = 1    2 × 0
//! ```

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Version of the protocol; both sides refuse any other.
pub const PROTOCOL_VERSION: u8 = 1;
/// Bytes of a frame before its payload.
pub const HEADER_LEN: usize = 8;
/// Most bytes of a payload.
pub const MAX_PAYLOAD: usize = 256 << 10;
/// Most characters of an error that quotes a payload.
const MAX_QUOTE: usize = 300;

macro_rules! kinds {
    ($($(#[$doc:meta])* $variant:ident = $code:literal,)*) => {
        /// What a frame means. Codes are part of the wire format.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Kind { $($(#[$doc])* $variant = $code,)* }

        impl Kind {
            /// Every kind, in the order of the codes.
            pub const ALL: &[Self] = &[$(Self::$variant),*];
        }

        impl TryFrom<u8> for Kind {
            type Error = FrameError;
            fn try_from(code: u8) -> Result<Self, FrameError> {
                match code { $($code => Ok(Self::$variant),)* _ => Err(FrameError::UnknownKind(code)) }
            }
        }
    };
}

kinds! {
    /// Guest → host: [`super::Hello`].
    Hello = 0x01,
    /// Guest → host: [`super::Heartbeat`].
    Heartbeat = 0x02,
    /// Host → guest: [`crate::exec::ExecRequest`].
    Exec = 0x10,
    /// Guest → host: [`super::Started`].
    Started = 0x11,
    /// Host → guest: bytes for the program's standard input.
    Stdin = 0x12,
    /// Host → guest: no more input.
    StdinClose = 0x13,
    /// Guest → host: bytes of standard output (or of the terminal).
    Stdout = 0x14,
    /// Guest → host: bytes of standard error.
    Stderr = 0x15,
    /// Host → guest: [`super::SignalRequest`] for the program's process group.
    Signal = 0x16,
    /// Host → guest: [`crate::exec::TtySize`].
    Resize = 0x17,
    /// Guest → host: [`crate::exec::ExecEnd`].
    Exited = 0x18,
    /// `arkd` → client, never in a guest: [`crate::exec::ExecSession`].
    Session = 0x19,
    /// Between `arkd` and client, never in a guest: [`crate::exec::ExecAck`].
    Ack = 0x1a,
    /// Host → guest: [`super::PathRequest`].
    FileRead = 0x20,
    /// Host → guest: [`super::FileWrite`].
    FileWrite = 0x21,
    /// Host → guest: [`super::PathRequest`].
    FileStat = 0x22,
    /// Host → guest: [`super::PathRequest`].
    FileList = 0x23,
    /// Guest → host: [`crate::files::FileStat`].
    FileInfo = 0x24,
    /// Either way: bytes of a file.
    Data = 0x30,
    /// Either way: the stream or list is complete.
    End = 0x31,
    /// Either way: [`super::ClockSet`].
    ClockSet = 0x40,
    /// Host → guest: sync and power off.
    PowerOff = 0x41,
    /// Guest → host: done.
    Ok = 0x42,
    /// Host → guest: [`super::Renew`].
    Renew = 0x43,
    /// Guest → host: [`super::Renewed`].
    Renewed = 0x44,
    /// Host → guest: [`crate::eval::EvalRequest`].
    Eval = 0x50,
    /// Guest → host: [`crate::eval::EvalEnd`].
    Evaluated = 0x51,
    /// Host → guest: [`super::DialRequest`].
    Dial = 0x60,
    /// Guest → host: [`super::GuestError`].
    Error = 0x7f,
}

/// Bytes that are not a frame of this protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The kind's code is not in [`Kind`].
    #[error("unknown frame kind {0:#04x}")]
    UnknownKind(u8),
    /// The other side speaks another version.
    #[error(
        "protocol version {0} is not {PROTOCOL_VERSION}: host and guest are of different releases; rebuild the guest"
    )]
    Version(u8),
    /// A reserved byte is not zero.
    #[error("reserved header bytes are not zero")]
    Reserved,
    /// The payload is longer than [`MAX_PAYLOAD`].
    #[error("payload of {0} bytes is over the limit of {MAX_PAYLOAD}")]
    TooLong(usize),
    /// A whole message was expected, and the bytes end early or run on.
    #[error("frame of {0} bytes has a wrong length")]
    Length(usize),
    /// The payload is not the JSON its kind calls for.
    #[error("payload of a {kind:?} frame is not valid: {why}")]
    Payload {
        /// Kind of the frame.
        kind: Kind,
        /// What the JSON parser said.
        why: String,
    },
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it means.
    pub kind: Kind,
    /// Its content: JSON or raw bytes, as the kind says.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame with raw bytes.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] above [`MAX_PAYLOAD`].
    pub fn raw(kind: Kind, payload: impl Into<Vec<u8>>) -> Result<Self, FrameError> {
        let payload = payload.into();
        if payload.len() > MAX_PAYLOAD {
            return Err(FrameError::TooLong(payload.len()));
        }
        Ok(Self { kind, payload })
    }

    /// A frame without content.
    #[must_use]
    pub const fn empty(kind: Kind) -> Self {
        Self { kind, payload: Vec::new() }
    }

    /// A frame whose content is `message` as JSON.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] above [`MAX_PAYLOAD`], [`FrameError::Payload`] when `message` has no JSON form.
    pub fn json(kind: Kind, message: &impl Serialize) -> Result<Self, FrameError> {
        let payload =
            serde_json::to_vec(message).map_err(|e| FrameError::Payload { kind, why: e.to_string() })?;
        Self::raw(kind, payload)
    }

    /// The content as `T`.
    ///
    /// # Errors
    /// [`FrameError::Payload`] when it is not the JSON of a `T`.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, FrameError> {
        parse_payload(self.kind, &self.payload)
    }

    /// The header that announces this frame.
    #[must_use]
    pub fn header(&self) -> [u8; HEADER_LEN] {
        header(self.kind, self.payload.len())
    }

    /// The frame as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.payload.len());
        bytes.extend_from_slice(&self.header());
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    /// The one frame that `bytes` is (a WebSocket message, say).
    ///
    /// # Errors
    /// [`FrameError`] when it is not exactly one frame.
    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let wrong = FrameError::Length(bytes.len());
        let (head, payload) = bytes.split_first_chunk::<HEADER_LEN>().ok_or(wrong.clone())?;
        let (kind, len) = parse_header(*head)?;
        if payload.len() == len { Ok(Self { kind, payload: payload.to_vec() }) } else { Err(wrong) }
    }
}

/// `payload` of a frame of `kind` as `T`. What the parser quotes of it is shortened: it can be as long as a payload.
pub(super) fn parse_payload<T: DeserializeOwned>(kind: Kind, payload: &[u8]) -> Result<T, FrameError> {
    serde_json::from_slice(payload)
        .map_err(|e| FrameError::Payload { kind, why: e.to_string().chars().take(MAX_QUOTE).collect() })
}

/// The header of a frame of `kind` with `len` bytes of payload, at most [`MAX_PAYLOAD`].
#[must_use]
pub fn header(kind: Kind, len: usize) -> [u8; HEADER_LEN] {
    debug_assert!(len <= MAX_PAYLOAD);
    let [a, b, c, d] = u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes();
    [a, b, c, d, kind as u8, PROTOCOL_VERSION, 0, 0]
}

/// Kind and payload length that a header announces.
pub(super) fn parse_header(head: [u8; HEADER_LEN]) -> Result<(Kind, usize), FrameError> {
    let [a, b, c, d, kind, version, r0, r1] = head;
    if version != PROTOCOL_VERSION {
        return Err(FrameError::Version(version));
    }
    if (r0, r1) != (0, 0) {
        return Err(FrameError::Reserved);
    }
    let len = u32::from_le_bytes([a, b, c, d]) as usize;
    if len > MAX_PAYLOAD {
        return Err(FrameError::TooLong(len));
    }
    Ok((Kind::try_from(kind)?, len))
}

/// Turns a byte stream into frames, whatever the reads' boundaries. Holds at most one frame and one read.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes at the front of `buffer` that frames already returned took.
    taken: usize,
}

impl Decoder {
    /// An empty decoder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in `bytes`; call [`Self::next`] until it says `None` before feeding more.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, if it has arrived.
    ///
    /// # Errors
    /// [`FrameError`] when the bytes are no frame; the stream is then of no more use.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator would stop at None; this goes on after feed"
    )]
    pub fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        let rest = self.buffer.get(self.taken..).unwrap_or_default();
        let Some((head, after)) = rest.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let (kind, len) = parse_header(*head)?;
        let Some(payload) = after.get(..len) else { return Ok(None) };
        let frame = Frame { kind, payload: payload.to_vec() };
        self.taken += HEADER_LEN + len;
        Ok(Some(frame))
    }

    /// Whether the stream may end here: no frame is half arrived.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.taken == self.buffer.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_frame() -> impl Strategy<Value = Frame> {
        (prop::sample::select(Kind::ALL), prop::collection::vec(any::<u8>(), 0..2000))
            .prop_map(|(kind, payload)| Frame { kind, payload })
    }

    proptest! {
        #[test]
        fn frames_survive_any_split_of_the_stream(
            frames in prop::collection::vec(any_frame(), 0..6), step in 1usize..700,
        ) {
            let bytes: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
            let mut decoder = Decoder::new();
            let mut seen = Vec::new();
            for chunk in bytes.chunks(step) {
                decoder.feed(chunk);
                while let Some(frame) = decoder.next().unwrap() {
                    seen.push(frame);
                }
            }
            prop_assert_eq!(seen, frames);
            prop_assert!(decoder.is_empty());
        }

        #[test]
        fn no_bytes_make_the_decoder_panic_or_hoard(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut decoder = Decoder::new();
            decoder.feed(&bytes);
            while let Ok(Some(_)) = decoder.next() {}
            let _ = Frame::decode(&bytes);
        }
    }

    #[test]
    fn a_header_is_refused_for_its_version_its_length_and_its_reserved_bytes() {
        let good = Frame::empty(Kind::Ok).encode();
        assert_eq!(Frame::decode(&good), Ok(Frame::empty(Kind::Ok)));
        for (at, value, error) in [
            (5, 9, FrameError::Version(9)),
            (6, 1, FrameError::Reserved),
            (3, 1, FrameError::TooLong(1 << 24)),
            (4, 0xee, FrameError::UnknownKind(0xee)),
            (0, 1, FrameError::Length(8)),
        ] {
            let mut bad = good.clone();
            bad[at] = value;
            assert_eq!(Frame::decode(&bad), Err(error));
        }
        assert_eq!(
            Frame::raw(Kind::Data, vec![0; MAX_PAYLOAD + 1]),
            Err(FrameError::TooLong(MAX_PAYLOAD + 1))
        );
    }
}

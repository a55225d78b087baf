//! A frame that is passed on as it came.

use bytes::{Bytes, BytesMut};
use serde::de::DeserializeOwned;

use super::frame::{FrameError, HEADER_LEN, Kind, parse_header, parse_payload};

/// One frame as it travels, header and payload in one piece of shared memory: receiving it, looking into it and passing it
/// on copy nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedFrame {
    kind: Kind,
    bytes: Bytes,
}

impl EncodedFrame {
    /// Takes the whole frame that `buffer` begins with; `None` while some of it is missing.
    ///
    /// # Errors
    /// [`FrameError`] when the bytes are no frame; the stream is then of no more use.
    pub fn take_from(buffer: &mut BytesMut) -> Result<Option<Self>, FrameError> {
        let Some(head) = buffer.first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let (kind, len) = parse_header(*head)?;
        let whole = HEADER_LEN + len;
        if buffer.len() < whole {
            return Ok(None);
        }
        Ok(Some(Self { kind, bytes: buffer.split_to(whole).freeze() }))
    }

    /// What it means.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Its content.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        self.bytes.get(HEADER_LEN..).unwrap_or_default()
    }

    /// Its content, without a copy.
    #[must_use]
    pub fn into_payload(mut self) -> Bytes {
        self.bytes.split_off(HEADER_LEN)
    }

    /// Header and content, as they came.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        self.bytes
    }

    /// The content as `T`.
    ///
    /// # Errors
    /// [`FrameError::Payload`] when it is not the JSON of a `T`.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, FrameError> {
        parse_payload(self.kind, self.payload())
    }
}

impl TryFrom<Bytes> for EncodedFrame {
    type Error = FrameError;

    /// The one frame that `bytes` is (a WebSocket message, say).
    fn try_from(bytes: Bytes) -> Result<Self, FrameError> {
        let head = bytes.first_chunk::<HEADER_LEN>().ok_or(FrameError::Length(bytes.len()))?;
        let (kind, len) = parse_header(*head)?;
        if bytes.len() == HEADER_LEN + len {
            Ok(Self { kind, bytes })
        } else {
            Err(FrameError::Length(bytes.len()))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::guest::{Decoder, Frame};

    proptest! {
        #[test]
        fn any_stream_gives_the_frames_that_the_decoder_gives(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..5),
            garbage in prop::collection::vec(any::<u8>(), 0..20),
        ) {
            let mut bytes: Vec<u8> = payloads
                .into_iter()
                .flat_map(|payload| Frame { kind: Kind::Data, payload }.encode())
                .collect();
            bytes.extend(garbage);
            let (mut decoder, mut buffer) = (Decoder::new(), BytesMut::from(bytes.as_slice()));
            decoder.feed(&bytes);
            loop {
                let taken = EncodedFrame::take_from(&mut buffer);
                let expected = decoder.next();
                let done = !matches!(expected, Ok(Some(_)));
                prop_assert_eq!(
                    taken.clone().map(|t| t.map(|f| Frame { kind: f.kind(), payload: f.payload().to_vec() })),
                    expected
                );
                if let Ok(Some(frame)) = taken {
                    let payload = frame.payload().to_vec();
                    prop_assert_eq!(EncodedFrame::try_from(frame.clone().into_bytes()), Ok(frame.clone()));
                    prop_assert_eq!(frame.into_payload(), payload);
                }
                if done {
                    break;
                }
            }
        }

        #[test]
        fn a_message_is_a_frame_where_the_codec_says_so(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let message = EncodedFrame::try_from(Bytes::from(bytes.clone()));
            prop_assert_eq!(message.map(|f| f.kind()), Frame::decode(&bytes).map(|f| f.kind));
        }
    }
}

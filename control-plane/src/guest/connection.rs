//! One operation's connection: handshake, then frames each way.

use std::io;
use std::time::Duration;

use ark_types::guest::{DialRequest, EncodedFrame, Frame, GuestError, Kind, MAX_PAYLOAD, header};
use bytes::BytesMut;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::idle::InUse;
use super::{Address, GuestFailure};

/// Bytes asked of the socket at a time, to begin with: little memory for the many small operations.
const READ_FIRST: usize = 8 << 10;
/// Bytes asked of the socket at a time where much comes: few system calls for bulk.
const READ_MUCH: usize = 256 << 10;
/// Most characters of a guest's error message that are told.
const MAX_MESSAGE: usize = 2000;
/// How long a guest may take to connect with one of its programs; on an emulated host it is slow.
const DIAL_LIMIT: Duration = Duration::from_secs(20);
/// Longest line a VMM answers `CONNECT` with (`OK 4294967295\n` has 14 bytes).
const MAX_HANDSHAKE: usize = 32;

/// A connection to a guest. Dropping it ends the operation: guestd kills the program or discards the upload.
#[derive(Debug)]
pub struct Connection {
    /// From the guest.
    pub reader: FrameReader,
    /// To the guest.
    pub writer: FrameWriter,
}

impl Connection {
    /// Connects to `address` and sends `first`: the encoded frame that names the operation and any that follow at once.
    ///
    /// # Errors
    /// [`GuestFailure::Unreachable`], [`GuestFailure::Closed`] or [`GuestFailure::Broken`].
    pub async fn open(address: &Address, first: &[u8]) -> Result<Self, GuestFailure> {
        let stream = UnixStream::connect(&address.socket).await.map_err(GuestFailure::Unreachable)?;
        let (reader, writer) = stream.into_split();
        let (mut reader, mut writer) = (FrameReader::new(reader), FrameWriter { socket: writer });
        reader.in_use = Some(address.idle.begin().await);
        // The VMM leaves what comes behind its line to the guest, so both go out at once: the frame is on its way as soon
        // as the guest accepts, without a round trip through here.
        let line = address.port.map(|port| format!("CONNECT {port}\n")).unwrap_or_default();
        match writer.send_encoded(&[line.as_bytes(), first].concat()).await {
            // A guest or VMM that refused and closed may have said why: the reader finds it.
            Err(GuestFailure::Broken(e)) if e.kind() == io::ErrorKind::BrokenPipe => {}
            other => other?,
        }
        if address.port.is_some() {
            reader.take_greeting().await?;
        }
        Ok(Self { reader, writer })
    }

    /// Asks one question whose answer is one frame of kind `answer`.
    ///
    /// # Errors
    /// [`GuestFailure`].
    pub async fn ask(
        address: &Address,
        question: &Frame,
        answer: Kind,
    ) -> Result<EncodedFrame, GuestFailure> {
        let mut connection = Self::open(address, &question.encode()).await?;
        connection.reader.expect(answer).await
    }

    /// The connection without frames.
    fn into_dialled(self) -> Result<Dialled, GuestFailure> {
        let Self { reader: FrameReader { socket, buffer, in_use, .. }, writer } = self;
        let stream = socket.reunite(writer.socket).map_err(|e| GuestFailure::Broken(io::Error::other(e)))?;
        Ok(Dialled { stream, first: buffer, _in_use: in_use })
    }
}

/// A connection to a program in a guest, without frames.
#[derive(Debug)]
pub(crate) struct Dialled {
    /// The connection.
    pub(crate) stream: UnixStream,
    /// What the program sent already.
    pub(crate) first: BytesMut,
    /// Has the guest count as used.
    _in_use: Option<InUse>,
}

/// Connects with what listens on vsock `port` in the guest at `address`.
///
/// # Errors
/// [`GuestFailure`].
pub(crate) async fn connect(address: &Address, port: u32) -> Result<Dialled, GuestFailure> {
    let address = Address { port: Some(port), ..address.clone() };
    let connecting = Connection::open(&address, b"");
    let connection =
        tokio::time::timeout(DIAL_LIMIT, connecting).await.map_err(|_| GuestFailure::Late(DIAL_LIMIT))??;
    connection.into_dialled()
}

/// Connects with the program that listens on TCP `port` in the guest at `address`.
///
/// # Errors
/// [`GuestFailure`].
pub(crate) async fn dial(address: &Address, port: u16) -> Result<Dialled, GuestFailure> {
    let request = Frame::json(Kind::Dial, &DialRequest { port })?;
    let dialling = async {
        let mut connection = Connection::open(address, &request.encode()).await?;
        connection.reader.expect(Kind::Ok).await?;
        Ok::<_, GuestFailure>(connection)
    };
    let connection =
        tokio::time::timeout(DIAL_LIMIT, dialling).await.map_err(|_| GuestFailure::Late(DIAL_LIMIT))??;
    connection.into_dialled()
}

/// Frames from a guest.
#[derive(Debug)]
pub struct FrameReader {
    socket: OwnedReadHalf,
    /// What came and was not taken yet. Frames share its memory.
    buffer: BytesMut,
    /// Bytes to ask for next.
    room: usize,
    /// Has the guest count as used while an operation runs here.
    pub(super) in_use: Option<InUse>,
}

impl FrameReader {
    /// Reads frames from `socket`.
    #[must_use]
    pub fn new(socket: OwnedReadHalf) -> Self {
        Self { socket, buffer: BytesMut::new(), room: READ_FIRST, in_use: None }
    }

    /// Reads once; the number of bytes, 0 at the end of the stream. Cancel-safe.
    async fn fill(&mut self) -> io::Result<usize> {
        self.buffer.reserve(self.room);
        let n = self.socket.read_buf(&mut self.buffer).await?;
        if n >= self.room {
            self.room = READ_MUCH;
        }
        Ok(n)
    }

    /// Takes the VMM's `OK <port>\n` off the front; a refused connection is closed without a word.
    async fn take_greeting(&mut self) -> Result<(), GuestFailure> {
        loop {
            let n = self.fill().await.map_err(GuestFailure::Broken)?;
            let end = self.buffer.iter().take(MAX_HANDSHAKE).position(|byte| *byte == b'\n');
            match end.map(|end| self.buffer.split_to(end + 1)) {
                Some(line) if line.starts_with(b"OK ") => return Ok(()),
                None if n > 0 && self.buffer.len() < MAX_HANDSHAKE => {}
                Some(_) | None => return Err(GuestFailure::Closed),
            }
        }
    }

    /// The next frame; an [`Kind::Error`] frame is returned as [`GuestFailure::Said`]. Cancel-safe.
    ///
    /// # Errors
    /// [`GuestFailure::Closed`] at the end of the stream, and the others.
    pub async fn next(&mut self) -> Result<EncodedFrame, GuestFailure> {
        loop {
            if let Some(frame) = self.buffered()? {
                return Ok(frame);
            }
            if self.fill().await.map_err(GuestFailure::Broken)? == 0 {
                return Err(GuestFailure::Closed);
            }
        }
    }

    /// Waits for the first bytes of an answer; whether there are any before the stream ends.
    pub(super) async fn is_answered(&mut self) -> bool {
        self.fill().await.is_ok_and(|n| n > 0)
    }

    /// The next frame if it has arrived already.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub fn buffered(&mut self) -> Result<Option<EncodedFrame>, GuestFailure> {
        match EncodedFrame::take_from(&mut self.buffer)? {
            Some(frame) if frame.kind() == Kind::Error => {
                let GuestError { code, message } = frame.parse()?;
                Err(GuestError { code, message: message.chars().take(MAX_MESSAGE).collect() }.into())
            }
            other => Ok(other),
        }
    }

    /// The next frame, which has to be of `kind`.
    ///
    /// # Errors
    /// [`GuestFailure::Unexpected`] for another kind, and as [`Self::next`].
    pub async fn expect(&mut self, kind: Kind) -> Result<EncodedFrame, GuestFailure> {
        let frame = self.next().await?;
        if frame.kind() == kind { Ok(frame) } else { Err(GuestFailure::Unexpected(frame.kind())) }
    }
}

/// Frames to a guest.
#[derive(Debug)]
pub struct FrameWriter {
    socket: OwnedWriteHalf,
}

impl FrameWriter {
    /// Sends `frame`.
    ///
    /// # Errors
    /// [`GuestFailure::Broken`].
    pub async fn send(&mut self, frame: &Frame) -> Result<(), GuestFailure> {
        self.send_bytes(frame.kind, &frame.payload).await
    }

    /// Sends `bytes` as frames of `kind`, split where a payload's limit demands it.
    ///
    /// # Errors
    /// [`GuestFailure::Broken`].
    pub async fn send_bytes(&mut self, kind: Kind, bytes: &[u8]) -> Result<(), GuestFailure> {
        if bytes.is_empty() {
            return self.send_encoded(&Frame::empty(kind).header()).await;
        }
        for payload in bytes.chunks(MAX_PAYLOAD) {
            let header = header(kind, payload.len());
            let mut parts = bytes::Buf::chain(header.as_slice(), payload);
            self.socket.write_all_buf(&mut parts).await.map_err(GuestFailure::Broken)?;
        }
        Ok(())
    }

    /// Sends frames that are bytes already.
    ///
    /// # Errors
    /// [`GuestFailure::Broken`].
    pub async fn send_encoded(&mut self, frames: &[u8]) -> Result<(), GuestFailure> {
        self.socket.write_all(frames).await.map_err(GuestFailure::Broken)
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::super::Idle;
    use super::*;

    /// A VMM's vsock socket whose one connection gets `answer` after its first line, and whatever is sent is returned.
    async fn vmm_that_answers(answer: &'static [u8]) -> (tempfile::TempDir, Address) {
        let dir = tempfile::tempdir().unwrap();
        let address = Address { socket: dir.path().join("v.sock"), port: Some(1025), idle: Idle::default() };
        let listener = UnixListener::bind(&address.socket).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut line = [0; 13];
            stream.read_exact(&mut line).await.unwrap();
            assert_eq!(&line, b"CONNECT 1025\n");
            stream.write_all(answer).await.unwrap();
        });
        (dir, address)
    }

    #[tokio::test]
    async fn an_answer_that_comes_with_the_handshake_is_not_lost() {
        let (_dir, address) = vmm_that_answers(b"OK 77\n\0\0\0\0\x42\x01\0\0").await;
        let answer = Connection::ask(&address, &Frame::empty(Kind::PowerOff), Kind::Ok).await;
        assert_eq!(answer.unwrap().into_bytes(), Frame::empty(Kind::Ok).encode());
    }

    #[tokio::test]
    async fn a_handshake_without_an_end_is_given_up() {
        let (_dir, address) = vmm_that_answers(&[b'O'; 100]).await;
        assert!(matches!(Connection::open(&address, b"").await, Err(GuestFailure::Closed)));
    }

    #[tokio::test]
    async fn a_refused_handshake_and_a_missing_socket_are_disconnects() {
        let (_dir, address) = vmm_that_answers(b"").await;
        let refused = Connection::open(&address, b"").await.unwrap_err();
        assert!(matches!(refused, GuestFailure::Closed), "{refused:?}");
        let nowhere = Address { socket: "/nonexistent/v.sock".into(), port: None, idle: Idle::default() };
        assert!(Connection::open(&nowhere, b"").await.unwrap_err().is_disconnect());
    }
}

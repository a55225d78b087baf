//! Whole frames over a stream.

use std::io::{self, IoSlice, Read, Write};
use std::time::{Duration, Instant};

use ark_types::guest::{Decoder, Frame, FrameError, HEADER_LEN};
use ark_types::plain::plain;

use crate::socket::Stream;

/// Bytes taken from the socket at once, to begin with.
const READ_SIZE: usize = 16 << 10;
/// Bytes taken from the socket at once where much comes.
const READ_MUCH: usize = 256 << 10;

/// Why a connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The socket failed, or a bounded read took too long (`WouldBlock`).
    #[error("the connection failed: {}", plain(.0))]
    Io(#[from] io::Error),
    /// What came is not a frame.
    #[error("what arrived is not a frame: {0}")]
    Frame(#[from] FrameError),
    /// The other side closed in the middle of a frame.
    #[error("the connection ended in the middle of a frame")]
    CutShort,
}

/// What one look at the socket brought.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// A frame.
    Frame(Frame),
    /// No whole frame yet.
    Nothing,
    /// The other side closed, between frames.
    Closed,
}

/// A stream that carries frames both ways.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    decoder: Decoder,
    scratch: Vec<u8>,
}

impl Connection {
    /// Frames over `stream`.
    #[must_use]
    pub fn new(stream: Stream) -> Self {
        Self { stream, decoder: Decoder::new(), scratch: vec![0; READ_SIZE] }
    }

    /// The socket below.
    #[must_use]
    pub const fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Waits for the next frame; `None` when the other side closed between frames.
    ///
    /// # Errors
    /// [`LinkError`]; a read timeout set on the stream shows as [`LinkError::Io`] with `WouldBlock`.
    pub fn recv(&mut self) -> Result<Option<Frame>, LinkError> {
        loop {
            if let Some(frame) = self.decoder.next()? {
                return Ok(Some(frame));
            }
            if self.fill()? == 0 {
                return if self.decoder.is_empty() { Ok(None) } else { Err(LinkError::CutShort) };
            }
        }
    }

    /// The next frame, waiting up to `patience` for each part of it; none at the end of the stream.
    ///
    /// # Errors
    /// [`LinkError`]; [`LinkError::Io`] also when the patience ends.
    pub fn recv_within(&mut self, patience: Duration) -> Result<Option<Frame>, LinkError> {
        self.stream.set_read_timeout(Some(patience))?;
        let frame = self.recv();
        self.stream.set_read_timeout(None)?;
        frame
    }

    /// The next frame if it is here; reads the (non-blocking) socket at most once. Call until it says
    /// [`Received::Nothing`]: frames that came with one read wait inside, where poll(2) does not see them.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn try_recv(&mut self) -> Result<Received, LinkError> {
        if let Some(frame) = self.decoder.next()? {
            return Ok(Received::Frame(frame));
        }
        match self.fill() {
            Ok(0) if self.decoder.is_empty() => Ok(Received::Closed),
            Ok(0) => Err(LinkError::CutShort),
            Ok(_) => Ok(self.decoder.next()?.map_or(Received::Nothing, Received::Frame)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Received::Nothing),
            Err(e) => Err(e.into()),
        }
    }

    /// Sends one frame, waiting for room (the stream must be blocking).
    ///
    /// # Errors
    /// [`LinkError::Io`].
    pub fn send(&mut self, frame: &Frame) -> Result<(), LinkError> {
        let header = frame.header();
        let mut sent = 0;
        while sent < HEADER_LEN + frame.payload.len() {
            sent += write_from(&self.stream, &header, &frame.payload, sent)?;
        }
        Ok(())
    }

    /// Sends frames that are encoded already.
    ///
    /// # Errors
    /// [`LinkError::Io`].
    pub fn send_encoded(&mut self, frames: &[u8]) -> Result<(), LinkError> {
        Ok((&self.stream).write_all(frames)?)
    }

    /// Reads and drops what still comes until the other side closes, is silent for `silence`, or `most` has passed. Closing
    /// while it still sends could cost it the frames it has not read yet, or show it a broken pipe instead of them.
    ///
    /// # Errors
    /// [`LinkError`] when the connection breaks; nothing is left to do then.
    pub fn drain(&mut self, silence: Duration, most: Duration) -> Result<(), LinkError> {
        let end = Instant::now() + most;
        self.stream.set_read_timeout(Some(silence))?;
        while Instant::now() < end {
            if self.recv()?.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// Reads once into the decoder; the number of bytes, 0 at the end.
    fn fill(&mut self) -> io::Result<usize> {
        loop {
            match (&self.stream).read(&mut self.scratch) {
                Ok(n) => {
                    self.decoder.feed(self.scratch.get(..n).unwrap_or_default());
                    if n == self.scratch.len() && n < READ_MUCH {
                        self.scratch.resize(READ_MUCH, 0);
                    }
                    return Ok(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// Writes the bytes from `at` on of header and payload with one system call.
fn write_from(mut stream: &Stream, header: &[u8], payload: &[u8], at: usize) -> io::Result<usize> {
    let head = header.get(at..).unwrap_or_default();
    let body = payload.get(at.saturating_sub(header.len())..).unwrap_or_default();
    loop {
        match stream.write_vectored(&[IoSlice::new(head), IoSlice::new(body)]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// At most one outgoing frame of a non-blocking stream, small ones held back to leave with it, and how much of that has
/// left.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Held frames, then the header of the frame that was put.
    head: Vec<u8>,
    /// Payload of the frame that was put; empty, it lends its room to the next.
    payload: Vec<u8>,
    sent: usize,
    /// Whether there is something to send now.
    due: bool,
}

impl Outbox {
    /// Whether the next frame may be put.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        !self.due
    }

    /// Whether frames are held back.
    #[must_use]
    pub const fn is_holding(&self) -> bool {
        !self.due && !self.head.is_empty()
    }

    /// An empty buffer, with the room of an earlier frame if there was one.
    #[must_use]
    pub fn buffer(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.payload)
    }

    /// Keeps `frame` back until the next one is put or [`Self::release`] is called: one packet instead of two.
    ///
    /// # Panics
    /// When a frame is being sent: a defect of the caller.
    pub fn hold(&mut self, frame: &Frame) {
        assert!(!self.due, "the outbox is sending");
        self.head.extend_from_slice(&frame.encode());
    }

    /// Makes what is held back due.
    pub const fn release(&mut self) {
        self.due = !self.head.is_empty();
    }

    /// Takes `frame` for [`Self::flush`].
    ///
    /// # Panics
    /// When another frame is still in: a defect of the caller, who would lose it.
    pub fn put(&mut self, frame: Frame) {
        assert!(!self.due, "the outbox holds a frame already");
        self.head.extend_from_slice(&frame.header());
        self.payload = frame.payload;
        self.due = true;
    }

    /// Writes what is due and the socket takes; whether nothing is due then.
    ///
    /// # Errors
    /// What sendmsg(2) says; `WouldBlock` is no error.
    pub fn flush(&mut self, stream: &Stream) -> io::Result<bool> {
        while self.due {
            match write_from(stream, &self.head, &self.payload, self.sent) {
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
            if self.sent == self.head.len() + self.payload.len() {
                self.head.clear();
                self.payload.clear();
                self.sent = 0;
                self.due = false;
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::thread;

    use ark_types::guest::{Kind, MAX_PAYLOAD};
    use proptest::prelude::*;

    use super::*;

    fn pair() -> (Connection, Connection) {
        let (a, b) = UnixStream::pair().unwrap();
        let connection = |s| Connection::new(Stream::from(OwnedFd::from(s)));
        (connection(a), connection(b))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn frames_of_any_size_arrive_as_they_were_sent(sizes in prop::collection::vec(0usize..MAX_PAYLOAD, 0..5)) {
            let frames: Vec<Frame> =
                sizes.iter().map(|&n| Frame::raw(Kind::Data, vec![u8::try_from(n % 251).unwrap(); n]).unwrap()).collect();
            let (mut a, mut b) = pair();
            let expected = frames.clone();
            let sender = thread::spawn(move || frames.iter().for_each(|f| a.send(f).unwrap()));
            for frame in expected {
                prop_assert_eq!(b.recv().unwrap(), Some(frame));
            }
            sender.join().unwrap();
            prop_assert_eq!(b.recv().unwrap(), None);
        }
    }

    #[test]
    fn an_outbox_sends_what_fits_and_goes_on_later() {
        let (a, mut b) = pair();
        a.stream().set_nonblocking(true).unwrap();
        let big = Frame::raw(Kind::Stdout, vec![7; MAX_PAYLOAD]).unwrap();
        let mut outbox = Outbox::default();
        let mut put = 0;
        while outbox.flush(a.stream()).unwrap() {
            outbox.put(big.clone());
            put += 1;
            assert!(put < 1000, "a socket takes only so much");
        }
        let reader = thread::spawn(move || {
            for _ in 0..put {
                assert_eq!(b.recv().unwrap().unwrap().payload.len(), MAX_PAYLOAD);
            }
        });
        while !outbox.flush(a.stream()).unwrap() {
            thread::yield_now();
        }
        reader.join().unwrap();
    }

    #[test]
    fn held_frames_leave_with_the_next_one_or_when_released() {
        let (a, mut b) = pair();
        b.stream().set_nonblocking(true).unwrap();
        let (held, put) = (Frame::empty(Kind::Ok), Frame::raw(Kind::Stdout, *b"x").unwrap());
        let mut outbox = Outbox::default();
        for frames in [vec![held.clone(), put.clone()], vec![held.clone()]] {
            outbox.hold(&held);
            assert!(outbox.flush(a.stream()).unwrap() && outbox.is_holding());
            assert_eq!(b.try_recv().unwrap(), Received::Nothing);
            if frames.len() == 2 {
                outbox.put(put.clone());
            } else {
                outbox.release();
            }
            assert!(outbox.flush(a.stream()).unwrap() && !outbox.is_holding());
            for frame in frames {
                assert_eq!(b.try_recv().unwrap(), Received::Frame(frame));
            }
        }
    }

    #[test]
    fn a_look_without_data_says_nothing_and_an_end_says_closed() {
        let (mut a, mut b) = pair();
        b.stream().set_nonblocking(true).unwrap();
        assert_eq!(b.try_recv().unwrap(), Received::Nothing);
        let two = [Frame::empty(Kind::Ok), Frame::empty(Kind::End)];
        a.send_encoded(&two.iter().flat_map(Frame::encode).collect::<Vec<_>>()).unwrap();
        drop(a);
        for frame in two {
            assert_eq!(b.try_recv().unwrap(), Received::Frame(frame));
        }
        assert_eq!(b.try_recv().unwrap(), Received::Closed);
    }

    #[test]
    fn an_end_inside_a_frame_is_told_from_an_end_between_frames() {
        let (mut a, mut b) = pair();
        a.send_encoded(&Frame::empty(Kind::Ok).encode()[..5]).unwrap();
        drop(a);
        assert!(matches!(b.recv(), Err(LinkError::CutShort)));
    }
}

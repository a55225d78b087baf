//! Data of the guest that the host's socket did not take yet.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;

use super::segments::TxPacket;

/// A queue of bytes in one piece, bounded by the credit that the guest was given. Holds no memory while it is empty.
#[derive(Default)]
pub(super) struct Backlog {
    bytes: Vec<u8>,
    /// Bytes at the front that were sent already.
    sent: usize,
}

impl Backlog {
    /// Whether everything was sent.
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Forgets everything and returns how many bytes that were.
    pub(super) fn clear(&mut self) -> usize {
        let left = self.bytes.len().saturating_sub(self.sent);
        *self = Self::default();
        left
    }

    /// Keeps the data of `packet` from `offset` on.
    pub(super) fn push(&mut self, packet: &TxPacket<'_>, offset: usize) {
        if self.sent > 0 {
            self.bytes.drain(..self.sent.min(self.bytes.len()));
            self.sent = 0;
        }
        let start = self.bytes.len();
        let more = packet.data_len().saturating_sub(offset);
        self.bytes.resize(start.saturating_add(more), 0);
        if let Some(place) = self.bytes.get_mut(start..) {
            packet.copy_data(offset, place);
        }
    }

    /// Sends what `socket` takes now and returns how much it took.
    ///
    /// # Errors
    /// What the kernel said, but never `WouldBlock`.
    pub(super) fn flush(&mut self, mut socket: &UnixStream) -> io::Result<usize> {
        let mut done = 0_usize;
        while let Some(rest) = self.bytes.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match socket.write(rest) {
                Ok(0) => break,
                Ok(n) => {
                    self.sent = self.sent.saturating_add(n);
                    done = done.saturating_add(n);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(done),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        *self = Self::default();
        Ok(done)
    }
}

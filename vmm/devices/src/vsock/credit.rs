//! Credit accounting of one connection (Virtio 1.2, section 5.10.6.3 "Buffer Space Management").
//!
//! Each side announces the size of its buffer (`buf_alloc`) and how much its user has taken out so far (`fwd_cnt`); the
//! other never has more in flight than fits. All counters run modulo 2^32, as on the wire.

use std::num::Wrapping;

/// Buffer announced to the guest per connection, and the bound of what is kept for a Unix socket that takes nothing.
///
/// Four of the largest packets that Linux sends (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`, 64 KiB): two travel while two are
/// acknowledged. With all streams of the table stuck on the host's side that makes 256 MiB.
pub(super) const WINDOW: u32 = 256 * 1024;

/// The guest is told of freed space once this much has gathered. At half of the window a sender never waits for an update
/// that is already due, and updates cost one packet per half window.
const UPDATE_AFTER: u32 = WINDOW / 2;

/// Both directions of one connection.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Credit {
    /// Bytes received from the guest.
    received: Wrapping<u32>,
    /// Of these, bytes given to the host's socket or discarded.
    forwarded: Wrapping<u32>,
    /// The value of `forwarded` that the guest was last told.
    announced: Wrapping<u32>,
    /// Bytes sent to the guest.
    sent: Wrapping<u32>,
    /// The guest's `buf_alloc`.
    peer_window: u32,
    /// The guest's `fwd_cnt`.
    peer_forwarded: Wrapping<u32>,
}

impl Credit {
    /// Every packet of the guest carries these.
    pub(super) fn peer_says(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_window = buf_alloc;
        self.peer_forwarded = Wrapping(fwd_cnt);
    }

    /// How many bytes may be sent to the guest now. A guest that claims to have taken more than it was sent gets nothing.
    pub(super) fn sendable(&self) -> u32 {
        self.peer_window.saturating_sub((self.sent - self.peer_forwarded).0)
    }

    /// `bytes`, at most [`Self::sendable`], were sent to the guest.
    pub(super) fn note_sent(&mut self, bytes: u32) {
        self.sent += bytes;
    }

    /// `bytes` came from the guest. False: it sent more than it had credit for.
    #[must_use]
    pub(super) fn accept(&mut self, bytes: u32) -> bool {
        let kept = (self.received - self.forwarded).0;
        if bytes > WINDOW.saturating_sub(kept) {
            return false;
        }
        self.received += bytes;
        true
    }

    /// `bytes` of what was accepted have left the buffer.
    pub(super) fn note_forwarded(&mut self, bytes: u32) {
        self.forwarded += bytes;
    }

    /// Whether enough space was freed since the guest last heard of it.
    pub(super) fn update_due(&self) -> bool {
        (self.forwarded - self.announced).0 >= UPDATE_AFTER
    }

    /// `buf_alloc` and `fwd_cnt` for a packet that goes to the guest now.
    pub(super) fn announce(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        (WINDOW, self.announced.0)
    }

    /// Lets all counters begin at `value`, to come to their wrap sooner.
    #[cfg(test)]
    pub(super) fn start_at(&mut self, value: u32) {
        let value = Wrapping(value);
        self.received = value;
        self.forwarded = value;
        self.announced = value;
        self.sent = value;
        self.peer_forwarded = value;
    }
}

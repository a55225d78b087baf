//! The device in a snapshot, and the transport reset that the guest hears of after a restore.
//!
//! The host's ends of the connections are not in a snapshot, so after a restore they are gone. The guest learns it from
//! VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (specification 1.2, section 5.10.6.6), upon which its driver resets every connection it
//! has, then makes the event's buffer available again. A connection opened in between would be reset with the old ones.
//!
//! ```text
//!             the event queue                       the buffer, or another
//!             has a buffer: filled                  in its place, is back
//!     Owed ────────────────────────► Told { until } ─────────────────────► over: connections are opened
//!       └──── the queue was never set up, or is broken: nobody to tell ───────▲
//! ```

use serde::{Deserialize, Serialize};
use vm_memory::Bytes;

use crate::GuestMemory;
use crate::virtio::queue::{Chain, DeviceQueue};

/// `struct virtio_vsock_event` with `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` in it: a little-endian 0.
const TRANSPORT_RESET: [u8; 4] = [0; 4];
/// Its length as it appears in the used ring. Linux ignores events of any other.
const EVENT_LEN: u32 = 4;

/// What the socket device keeps across a snapshot. Its connections are lost, but for their names.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    /// The guest's context id.
    pub guest_cid: u32,
    /// The host port of the next connection: packets of old ones may still come, so their ports are not used again.
    pub next_host_port: u32,
    /// Host and guest ports of its connections. Each gets a RST after the event: the guest's driver does not count one among
    /// those to reset whose acceptance it has yet to read, and whoever waits for data there would wait for ever.
    pub gone: Vec<(u32, u32)>,
    /// Until where the driver has to fill the event queue again to have handled the events that it was sent before, as an
    /// index of its available ring.
    pub awaited: Option<u16>,
}

/// A transport reset that the guest has not yet handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reset {
    /// It has to be sent.
    Owed {
        /// See [`VsockState::awaited`].
        awaited: Option<u16>,
    },
    /// It lies in the used ring.
    Told {
        /// Index of the available ring up to which the driver has filled it once it has handled the event.
        until: u16,
    },
}

impl Reset {
    /// For [`VsockState::awaited`].
    pub(super) fn awaited(self) -> Option<u16> {
        match self {
            Self::Owed { awaited } => awaited,
            Self::Told { until } => Some(until),
        }
    }

    /// Goes as far as possible now; the driver's next notification of `events` is worth another try. `None`: it is over.
    pub(super) fn advance(self, memory: &GuestMemory, events: &mut DeviceQueue) -> Option<Self> {
        let until = match self {
            Self::Told { until } => until,
            Self::Owed { awaited } => match tell(memory, events, awaited) {
                Some(until) => until,
                None => {
                    if events.enable_notification(memory) {
                        // Others came meanwhile. A full counter of the kick brings the device back, too.
                        let _ = events.kick().write(1);
                    }
                    return events.is_ready().then_some(self);
                }
            },
        };
        (events.await_index(memory, until) > 0).then_some(Self::Told { until })
    }
}

/// Sends the event and returns the index to wait for; `None` when there is no buffer that takes it.
fn tell(memory: &GuestMemory, events: &mut DeviceQueue, awaited: Option<u16>) -> Option<u16> {
    // A ringful, for a driver that adds useless buffers as fast as they are returned.
    for _ in 0..events.size() {
        let chain = events.pop(memory)?;
        let head = chain.head_index();
        let written = if write_event(memory, chain) { EVENT_LEN } else { 0 };
        // Before the driver can know of the event.
        let now = events.avail_index(memory)?;
        events.push(memory, head, written);
        events.notify(memory);
        if written > 0 {
            // Events sent before and not yet handled come first.
            let open = awaited.map_or(0, |index| index.wrapping_sub(now));
            let open = if open <= events.size() { open } else { 0 };
            return events.is_ready().then(|| now.wrapping_add(open).wrapping_add(1));
        }
    }
    None
}

/// Writes the event into the first buffer of `chain` that takes it.
fn write_event(memory: &GuestMemory, chain: Chain<'_>) -> bool {
    let mut buffers = chain.writable().filter(|buffer| buffer.len() >= EVENT_LEN);
    buffers.next().is_some_and(|buffer| memory.write_slice(&TRANSPORT_RESET, buffer.addr()).is_ok())
}

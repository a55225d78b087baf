//! Socket device (Virtio 1.2, section 5.10) with a hybrid host side: the guest speaks `AF_VSOCK`, the host Unix sockets.
//!
//! ```text
//!   host                                                     │ guest (CID n)
//!                                                            │
//!   client ── connect v.sock, "CONNECT 1025\n" ──► REQUEST ──┼─► listens on port 1025
//!          ◄─ "OK 1073741824\n" ◄───────────────── RESPONSE ─┼─
//!          ◄────────────── bytes both ways ──────────────────┼─►
//!                                                            │
//!   service listens on v.sock_1024 ◄────────────── REQUEST ──┼── connects to CID 2, port 1024
//!                                                            │
//!      metrics     what is counted                           │
//!      host        listener, CONNECT line, services          │
//!      muxer       sockets ⇄ packets, timeouts               │
//!      table       all streams, bounded; whose turn it is    │
//!      connection  one stream: states, half closes           │
//!      credit      who may send how much                     │
//!      backlog     what the host did not take yet            │
//!      segments    guest memory as iovecs, header ⇄ chain    │
//!      packet      the header                                │
//!      restore     snapshots; the reset that follows them    │
//!      device      queues, configuration space               │
//! ```
//!
//! * A client that the guest refuses is disconnected without a word; a request of the guest for a port where nobody
//!   listens is answered with RST.
//! * Data is copied once, by the kernel: `sendmsg` from the guest's packet, `recvmsg` into the guest's buffers, up to 16
//!   of them at a time. Only what a Unix socket does not take is kept, at most 256 KiB per stream, which is what the
//!   guest was given credit for.
//! * Streams with something for the guest take turns. When the guest has no buffers left they wait in their round, and
//!   their data in their sockets, until it has.
//! * `shutdown(SHUT_WR)` of either side reaches the other as a half close, after the data before it.
//! * At most 1,024 streams at a time. The guest's requests beyond that are answered with RST, clients are disconnected.
//! * After a restore every connection of before is gone. The guest is told so with an event, and packets of both sides
//!   that open connections wait until it has read that: its sockets of before are not mistaken for those that come after.
//! * A guest that does not answer a request for 10 s, or a close for 5 s, gets RST.

mod backlog;
mod connection;
mod credit;
mod device;
mod host;
mod metrics;
mod muxer;
mod packet;
mod restore;
mod segments;
mod table;
#[cfg(test)]
mod tests;

pub use device::Vsock;
pub use host::ListenError;
pub use muxer::VsockError;
pub use restore::VsockState;

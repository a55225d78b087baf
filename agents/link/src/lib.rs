//! The guest's side of the wire: sockets, frames and the sign of life.
//!
//! | module | what |
//! |---|---|
//! | [`socket`] | vsock and Unix stream sockets behind one type |
//! | [`framed`] | whole frames over such a socket, blocking or from a poll loop; memory is bounded by one frame and one read |
//! | [`hello`] | the connection on which a guest says hello and then sends heartbeats |
//! | [`vitals`] | the figures those carry, from the kernel |
//!
//! There is no runtime here: the guest's PID 1 uses threads and poll(2).

pub mod framed;
pub mod hello;
pub mod socket;
pub mod vitals;

pub use framed::{Connection, LinkError, Outbox, Received};
pub use socket::{Address, Listener, Stream};

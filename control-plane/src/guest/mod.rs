//! Speaking with a guest: frames over the VMM's vsock socket, and the guest's own hello.
//!
//! Everything a guest sends is hostile until checked: frames are bounded by the codec, their kinds are checked against
//! what the operation allows, and what piles up (captured output, listings) has a limit of its own.

mod connection;
mod eval;
mod exec;
mod files;
mod freezer;
mod hello;
mod idle;
mod keep;
mod renew;

use std::path::PathBuf;
use std::time::Duration;

use ark_types::guest::{FrameError, GuestError, Kind};
use ark_types::plain::plain;

pub use connection::{Connection, FrameReader, FrameWriter};
pub(crate) use connection::{Dialled, connect, dial};
pub use eval::{Evaluated, evaluate, evaluate_to};
pub use exec::{Captured, Sink, capture, capture_to};
pub use files::{Download, MAX_ENTRIES, Upload, list, stat};
pub(crate) use freezer::{Attendant, Freezer, Waiting};
pub use hello::{Event, Greeter};
pub use idle::Idle;
pub(crate) use keep::{Keeping, KeptEnd, keep, kept_output};
pub(crate) use renew::max_error_ns;
pub use renew::{Renewal, renew, set_clock};

/// Where a guest (or the host's own guestd) takes operations.
#[derive(Clone, Debug)]
pub struct Address {
    /// Unix socket to connect to.
    pub socket: PathBuf,
    /// Port to ask the VMM's vsock device for; none when guestd itself listens on the socket.
    pub port: Option<u32>,
    /// Connections that wait for the next operation.
    pub idle: Idle,
}

/// Why an operation in a guest did not work.
#[derive(Debug, thiserror::Error)]
pub enum GuestFailure {
    /// The guest answered that it could not.
    #[error("{0}")]
    Said(#[from] GuestError),
    /// The connection could not be made.
    #[error("the agent cannot be reached: {}", plain(.0))]
    Unreachable(#[source] std::io::Error),
    /// The connection broke.
    #[error("the connection to the agent broke: {}", plain(.0))]
    Broken(#[source] std::io::Error),
    /// The connection ended before the operation was complete.
    #[error("the agent closed the connection early")]
    Closed,
    /// Bytes that are no frame, or a payload that is not what its kind says.
    #[error("the agent sent a bad frame: {0}")]
    Frame(#[from] FrameError),
    /// A frame that does not belong here.
    #[error("the agent sent a frame of kind {0:?}, which does not belong here")]
    Unexpected(Kind),
    /// No answer in time.
    #[error("the agent did not answer within {} s", .0.as_secs())]
    Late(Duration),
    /// More than the host is ready to hold.
    #[error("the agent's answer is over the limit: {0}")]
    TooMuch(String),
}

impl GuestFailure {
    /// Whether the cause may be that the guest is no more.
    #[must_use]
    pub const fn is_disconnect(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Broken(_) | Self::Closed)
    }
}

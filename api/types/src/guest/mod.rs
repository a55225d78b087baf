//! Host ↔ guest: frames over vsock.
//!
//! Three ports are in use. The guest connects to [`HELLO_PORT`] of the host (CID 2), sends one [`Kind::Hello`] and then a
//! [`Kind::Heartbeat`] every [`HEARTBEAT_INTERVAL_MS`]. The host connects to [`CONTROL_PORT`] of the guest, and
//! its first frame says which operation is wanted:
//!
//! | first frame, host → guest | then, host → guest | guest → host |
//! |---|---|---|
//! | `Exec` ([`crate::exec::ExecRequest`]) | `Stdin`*, `StdinClose`, `Signal`*, `Resize`* | `Started`, (`Stdout` or `Stderr`)*, `Exited`; or `Error` |
//! | `Keep` ([`crate::exec::ExecRequest`] or null) | | `Started`, and once it has ended (`Stdout`)*, `Exited`; or `Error` |
//! | `KeptOutput` | | (`Data`)*, `End`; or `Error` |
//! | `FileRead` ([`PathRequest`]) | | `FileInfo`, `Data`*, `End`; or `Error` at any point |
//! | `FileWrite` ([`FileWrite`]) | `Data`*, `End` | `Ok` after `End`; or `Error` at any point |
//! | `FileStat` ([`PathRequest`]) | | `FileInfo`; or `Error` |
//! | `FileList` ([`PathRequest`]) | | `FileInfo`*, `End`; or `Error` |
//! | `ClockSet` ([`ClockSet`]) | | `ClockSet` with the guest's clock after it was set; or `Error` |
//! | `Renew` ([`Renew`]) | | `Renewed` ([`Renewed`]); or `Error` |
//! | `Eval` ([`crate::eval::EvalRequest`]) | | (`Stdout` or `Stderr`)*, `Evaluated` ([`crate::eval::EvalEnd`]); or `Error` |
//! | `Dial` ([`DialRequest`]) | after `Ok`: whatever the program reads | `Ok`, then whatever the program writes; or `Error` |
//! | `PowerOff` | | `Ok`, then the guest shuts down |
//!
//! A connection carries one operation at a time. After an operation's last frame the host may name the next one within ten
//! seconds; after an `Error` it may not, and from the `Ok` of a `Dial` on there are no frames any more: the connection is the program's. When the host's side closes before `Exited`, the guest kills the program's process group. A written file appears under
//! its name only after `End`: an upload that breaks leaves nothing behind. The exec WebSocket of the REST API carries the
//! same frames, one per binary message, and `Session` and `Ack` besides where it can be taken up again ([`crate::replay`]).
//!
//! A guest keeps one program, if the host asks for it: it runs without input and whoever is connected, and its output is kept,
//! the last [`MAX_KEPT_OUTPUT`] bytes of it. The first `Keep` starts it. Each further one tells of that program, whatever it
//! names, also when it has ended already: a host that begins anew cannot start it twice. With null it is only told of, and
//! [`ErrorCode::NothingKept`] where there is none. How it ended comes with what it wrote last.
//!
//! Any program in the guest may connect to [`SERVICES_PORT`] of the host. What is said there is in [`crate::service`]. Where
//! the agent is allowed inference ([`crate::permission`]), so it may to [`MCP_PORT`] and [`OPENAI_PORT`]; to the latter through
//! [`OPENAI_SOCKET`], too.

mod encoded;
mod frame;
mod messages;
mod renew;

pub use encoded::EncodedFrame;
pub use frame::{Decoder, Frame, FrameError, HEADER_LEN, Kind, MAX_PAYLOAD, PROTOCOL_VERSION, header};
pub use messages::{
    ClockSet, DialRequest, ErrorCode, FileWrite, GuestError, Heartbeat, Hello, PathRequest, SignalRequest,
    Started,
};
pub use renew::{Renew, Renewed};

/// Host port (CID 2) the guest says hello on.
pub const HELLO_PORT: u32 = 1024;
/// Guest port that takes operations.
pub const CONTROL_PORT: u32 = 1025;
/// Host port (CID 2) where programs of the guest find services.
pub const SERVICES_PORT: u32 = 1026;
/// Host port (CID 2) where programs of the guest have models say something, as MCP: one JSON-RPC message a line.
pub const MCP_PORT: u32 = 1031;
/// Host port (CID 2) where they do so as HTTP, in the form of OpenAI's API.
pub const OPENAI_PORT: u32 = 1032;
/// Where programs of the guest find [`OPENAI_PORT`] as a Unix socket.
pub const OPENAI_SOCKET: &str = "/run/ark/openai.sock";
/// Most bytes of a kept program's output that the guest holds.
pub const MAX_KEPT_OUTPUT: usize = 64 << 10;
/// Guest port where an inference VM speaks MCP: one JSON-RPC message a line.
pub const INFERENCE_PORT: u32 = 1030;
/// Time between heartbeats, milliseconds. Hundreds of idle agents share a host: each wakes it this often.
pub const HEARTBEAT_INTERVAL_MS: u64 = 5000;

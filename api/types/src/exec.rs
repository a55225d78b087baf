//! Running programs in an agent.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Most bytes of each output stream that a JSON exec reply carries; the rest is read and dropped, and `truncated` says so.
pub const MAX_CAPTURE: usize = 4 << 20;
/// Most arguments and environment variables of a request, each.
pub const MAX_ARGS: usize = 4096;

/// What to run and how: the body of `POST /v1/agents/{agent}/exec`, the first message of the exec WebSocket, and the
/// payload of the guest's `Exec` frame.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// Program and arguments; the program is looked up in the `PATH` of `env` when it has no slash.
    pub argv: Vec<String>,
    /// Environment on top of the guest's and the agent's own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Working directory; `/root` (or `/` where it is missing) by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// User name or numeric id, with `:group` if wanted; root by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Kill the program (TERM, then KILL after 2 s) when it runs longer than this, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Give the program a terminal of this size; stdout and stderr are then one stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty: Option<TtySize>,
    /// Standard input of a JSON exec, encoded as `encoding` says; streams send theirs as frames.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// Encoding of `stdin` in the request and of `stdout` and `stderr` in the reply.
    #[serde(default)]
    pub encoding: Encoding,
    /// Of the exec WebSocket alone: the program outlasts a connection that breaks, and can be taken up again by the id in its
    /// [`ExecSession`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub resumable: bool,
}

/// First message of an exec WebSocket that can be taken up again (the payload of its `Session` frame), and of each WebSocket that
/// takes it up.
///
/// Frames are counted, apart for each direction: the client's from its `Exec` frame on, the server's from its `Session` frame on,
/// both without these and without `Ack` frames. What counts is in order and whole, so a number says exactly what arrived.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecSession {
    /// What to take it up by; whoever knows it can.
    pub id: String,
    /// Frames of the client that were passed on to the program: it goes on with the next one.
    pub received: u64,
    /// How long the program lives without a client, milliseconds.
    pub grace_ms: u64,
}

/// Payload of an `Ack` frame, either way: what the other side need not keep any longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecAck {
    /// Frames that arrived in all (at the server: that were passed on to the program).
    pub received: u64,
}

/// Code with which an exec WebSocket is closed when another client took its program up.
pub const CLOSE_TAKEN_UP: u16 = 4001;

/// How bytes are written in JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Encoding {
    /// As text; what is not UTF-8 becomes U+FFFD.
    #[default]
    Utf8,
    /// Base64 with padding (RFC 4648, section 4).
    Base64,
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TtySize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "how")]
pub enum ExitStatus {
    /// It returned `code`.
    Exited {
        /// Exit code, 0 to 255.
        code: u8,
    },
    /// Signal `signal` ended it.
    Signaled {
        /// Signal number.
        signal: u8,
    },
    /// It ran longer than `timeout_ms` and was killed.
    TimedOut,
}

impl ExitStatus {
    /// Exit code a shell or Docker would show: the program's own, 128 + signal, or 124 for a timeout.
    #[must_use]
    pub const fn shell_code(self) -> u8 {
        match self {
            Self::Exited { code } => code,
            Self::Signaled { signal } => 128u8.saturating_add(signal),
            Self::TimedOut => 124,
        }
    }
}

/// The guest's account of a finished program: the payload of the `Exited` frame and part of [`ExecReply`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExecEnd {
    /// How it ended.
    pub status: ExitStatus,
    /// From before fork to after wait, microseconds, measured in the guest.
    pub duration_us: u64,
}

/// Reply of `POST /v1/agents/{agent}/exec`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExecReply {
    /// How the program ended.
    pub status: ExitStatus,
    /// The same as one number: see [`ExitStatus::shell_code`].
    pub exit_code: u8,
    /// Standard output, the first [`MAX_CAPTURE`] bytes.
    pub stdout: String,
    /// Standard error, the first [`MAX_CAPTURE`] bytes.
    pub stderr: String,
    /// Whether output was dropped.
    pub truncated: bool,
    /// Run time in the guest, microseconds.
    pub duration_us: u64,
}

//! JSON payloads of the frames.

use serde::{Deserialize, Serialize};

/// First words of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Version of `ark-guestd`.
    pub guestd: String,
    /// Kernel release (`uname -r`).
    pub kernel: String,
    /// Time since the kernel started, milliseconds.
    pub uptime_ms: u64,
    /// Processors that are online.
    pub cpus: u32,
}

/// Sign of life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// 1, 2, 3, …
    pub sequence: u64,
    /// Time since the kernel started, milliseconds.
    pub uptime_ms: u64,
    /// `MemAvailable` of `/proc/meminfo`, KiB.
    pub mem_available_kib: u64,
    /// One-minute load average times 100.
    pub load1_x100: u32,
}

/// The program runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// Its process id in the guest.
    pub pid: u32,
}

/// A signal for the program's process group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalRequest {
    /// Signal number, 1 to 64.
    pub signal: u8,
}

/// A path to read, stat or list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathRequest {
    /// Absolute path.
    pub path: String,
}

/// A file to write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileWrite {
    /// Absolute path; an existing directory is an error, missing parents are made.
    pub path: String,
    /// Permission bits, for example 0o644.
    pub mode: u32,
}

/// The time it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockSet {
    /// Nanoseconds since the Unix epoch.
    pub unix_ns: u64,
}

/// A program in the guest to be connected with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DialRequest {
    /// TCP port that it listens on at 127.0.0.1.
    pub port: u16,
}

/// Why the guest could not do it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct GuestError {
    /// Stable kind.
    pub code: ErrorCode,
    /// What failed and why, as a sentence without a full stop.
    pub message: String,
}

/// Kinds of [`GuestError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request breaks the protocol or its bounds.
    BadRequest,
    /// No such program.
    ProgramNotFound,
    /// The program cannot be run.
    ProgramNotExecutable,
    /// The working directory cannot be entered.
    BadWorkingDirectory,
    /// No such user or group.
    UnknownUser,
    /// No such file.
    FileNotFound,
    /// Another error of the file system.
    FileError,
    /// The image has no evaluator of that language.
    NoEvaluator,
    /// No program listens on the port.
    NotListening,
    /// The guest keeps no program.
    NothingKept,
    /// The guest lacks memory, processes or descriptors.
    Exhausted,
    /// What was asked for took longer than it was given.
    DeadlinePassed,
    /// A defect of guestd or a system call that should not fail.
    Internal,
}

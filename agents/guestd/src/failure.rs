//! Why an operation ended early: the guest could not do it, or the connection broke.

use std::io;

use ark_link::LinkError;
use ark_types::guest::{ErrorCode, FrameError, GuestError};
use ark_types::plain::plain;

/// An operation's early end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The host is told.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// Nobody is left to tell.
    #[error(transparent)]
    Link(#[from] LinkError),
}

impl From<FrameError> for Failure {
    /// A payload that its kind does not call for is the host's mistake, and the host can still be told.
    fn from(error: FrameError) -> Self {
        failure(ErrorCode::BadRequest, error.to_string()).into()
    }
}

/// A [`GuestError`] of kind `code`.
pub(crate) fn failure(code: ErrorCode, message: impl Into<String>) -> GuestError {
    GuestError { code, message: message.into() }
}

/// The [`GuestError`] for a system call that should not fail: out of something, or a defect.
pub(crate) fn system_failure(what: &str, error: &io::Error) -> GuestError {
    let exhausted = matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EAGAIN | libc::ENOSPC | libc::ENOBUFS)
    );
    let code = if exhausted { ErrorCode::Exhausted } else { ErrorCode::Internal };
    failure(code, format!("{what}: {}", plain(error)))
}

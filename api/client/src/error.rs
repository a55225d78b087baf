//! What can go wrong between a client and `arkd`.

use std::io;

use ark_types::guest::{FrameError, GuestError};
use ark_types::plain::plain;
use ark_types::problem::Problem;

use crate::connect::Endpoint;

/// A request that did not succeed; the message is a sentence for the user.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `arkd` understood the request and refused it, or could not carry it out.
    #[error(transparent)]
    Problem(#[from] Problem),
    /// A model broke off, as its stream says.
    #[error("{0}")]
    Model(String),
    /// No connection could be made.
    #[error("arkd cannot be reached at {endpoint}: {hint}")]
    Connect {
        /// Address that was tried.
        endpoint: String,
        /// Why, and what to do.
        hint: String,
        /// The failed system call.
        source: io::Error,
    },
    /// The connection ended inside a request.
    #[error("the connection to arkd at {endpoint} broke: {why}")]
    Broken {
        /// Address in use.
        endpoint: String,
        /// What the transport said.
        why: String,
    },
    /// The answer is not one of this API.
    #[error(
        "{endpoint} gave an answer that is not arkd's (HTTP status {status}: {excerpt}); does another program listen there?"
    )]
    Answer {
        /// Address that answered.
        endpoint: String,
        /// HTTP status code.
        status: u16,
        /// First characters of the body, or what is wrong with it.
        excerpt: String,
    },
    /// The request has no form on the wire: a path or header value with characters that are not allowed.
    #[error("the request cannot be written down: {0}")]
    Request(String),
    /// The guest refused the operation of a stream.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The stream carries something that is no frame of the protocol.
    #[error("the stream from the agent cannot be understood: {0}")]
    Frame(#[from] FrameError),
    /// The stream ended before the program did.
    #[error("the stream ended before the program did: its agent, or arkd, ended ({0})")]
    Ended(String),
    /// Another client took the program's stream up.
    #[error("the stream ended here: another client took the program up")]
    TakenUp,
    /// The local source of an upload could not be read.
    #[error("the data to send cannot be read: {}", plain(.0))]
    Source(#[source] io::Error),
}

impl Error {
    /// The problem `arkd` told, if it told one.
    #[must_use]
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Problem(problem) => Some(problem),
            _ => None,
        }
    }

    /// A failed connection attempt, with the next step.
    pub(crate) fn connect(endpoint: &Endpoint, source: io::Error) -> Self {
        let hint = match source.kind() {
            io::ErrorKind::NotFound => {
                "there is no such socket; `ark doctor` says what is missing".to_owned()
            }
            io::ErrorKind::ConnectionRefused => {
                "nothing listens there; any `ark` command starts it, `ark doctor` says what is wrong"
                    .to_owned()
            }
            io::ErrorKind::PermissionDenied => {
                "this user may not open it; use the account that started arkd".to_owned()
            }
            io::ErrorKind::TimedOut => "it does not answer".to_owned(),
            _ => plain(&source),
        };
        Self::Connect { endpoint: endpoint.to_string(), hint, source }
    }

    /// A connection that broke, with the innermost reason.
    pub(crate) fn broken(endpoint: &Endpoint, error: &(dyn std::error::Error + 'static)) -> Self {
        let mut innermost = error;
        while let Some(source) = innermost.source() {
            innermost = source;
        }
        Self::Broken { endpoint: endpoint.to_string(), why: plain(innermost) }
    }
}

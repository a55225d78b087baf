//! What can go wrong with a service.

use std::io;
use std::time::Duration;

use ark_types::agent::AgentName;
use ark_types::plain::plain;
use ark_types::service::{MAX_REPLICAS, MAX_SERVICE_NAME, MAX_SERVICES};

/// Why something cannot be done with a service.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// There is none of that name.
    #[error("there is no service {0:?}: `ark service ls` lists those there are")]
    NotFound(String),
    /// It has no such replica.
    #[error(
        "the service {service} has no replica {agent:?}: `ark service show {service}` lists those it has"
    )]
    NoReplica {
        /// The service.
        service: AgentName,
        /// What was asked for.
        agent: String,
    },
    /// There is one of that name.
    #[error(
        "there is a service {0} already: choose another name, or change that one with `ark service set {0}`"
    )]
    Exists(AgentName),
    /// The one before it of that name is not gone yet.
    #[error("the service {0} is being removed and its last replicas are not gone yet: try again in a moment")]
    Leaving(AgentName),
    /// No more may be made.
    #[error("there are {MAX_SERVICES} services already, and no more may be: remove one")]
    TooMany,
    /// A value of the spec.
    #[error("{0}")]
    Invalid(String),
    /// Its environment cannot be kept.
    #[error("the environment of the service cannot be written: {}", plain(.0))]
    Environment(#[source] io::Error),
    /// No replica took the call in time.
    #[error("no replica of the service {service} was ready within {} ms: {why}", waited.as_millis())]
    Unready {
        /// The service.
        service: AgentName,
        /// How long the call waited.
        waited: Duration,
        /// What is the matter with it.
        why: String,
    },
    /// What was waited for takes longer than it may.
    #[error(
        "it is not done after {} s and goes on: the last calls do not end, or what they run in does not; `ark service ls` and `ark ps` show what is left",
        .0.as_secs()
    )]
    Late(Duration),
    /// `arkd` ends.
    #[error("arkd ends and does nothing more for services: what is recorded is done by the next one")]
    Closing,
    /// The change was cut off.
    #[error("the change of the service was interrupted: try again")]
    Interrupted,
}

impl ServiceError {
    pub(super) fn replicas(count: u32) -> Self {
        Self::Invalid(format!("{count} replicas are out of bounds: choose 0 to {MAX_REPLICAS}"))
    }

    pub(super) fn long_name(name: &AgentName) -> Self {
        Self::Invalid(format!(
            "the name {name} is too long for a service, whose replicas' names have nine characters more: use at most {MAX_SERVICE_NAME}"
        ))
    }
}

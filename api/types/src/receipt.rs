//! Receipts: what a fork was asked, what it answered, and what the host made of it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::AgentName;
use crate::vmm::Generation;

/// How far a fork's clock may be from the host's, milliseconds.
pub const MAX_CLOCK_ERROR_MS: u64 = 50;

/// What is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CheckKind {
    /// Fresh output of the kernel's random generator is nobody else's.
    Random,
    /// Fresh output of the evaluator's random generator is nobody else's.
    EvaluatorRandom,
    /// The clock is right.
    Clock,
    /// The machine-id is the one it was given, and nobody else's.
    MachineId,
    /// The host name is the one it was given, and nobody else's.
    Hostname,
    /// A connection from the host works.
    VsockToGuest,
    /// A connection from the guest works.
    VsockToHost,
    /// The guest counts one renewal more.
    Renewals,
    /// The parent's secrets are gone.
    Secrets,
}

/// Who vouches for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Evidence {
    /// The host saw it itself.
    HostObserved,
    /// The guest says so, and could say so falsely.
    GuestReported,
}

/// One check of a fork.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Check {
    /// What was checked.
    pub check: CheckKind,
    /// Who vouches for it.
    pub evidence: Evidence,
    /// The answer; of a random number only what tells it from others is kept: its hash.
    pub answer: String,
    /// SHA-256 over nonce and answer, hexadecimal.
    pub sha256: String,
    /// Whether it holds.
    pub passed: bool,
}

/// Reply of `GET /v1/agents/{agent}/receipt`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Receipt {
    /// Id of the agent.
    pub agent_id: String,
    /// Its name at that time.
    pub name: AgentName,
    /// Id of the snapshot that it was restored from.
    pub snapshot: String,
    /// Its VM generation id.
    pub generation: Generation,
    /// The challenge.
    pub nonce: String,
    /// When it was checked, milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
    /// From the restored VMM's start to the last check, milliseconds.
    pub took_ms: u64,
    /// The checks, all of them passed.
    pub checks: Vec<Check>,
    /// SHA-256 over all of the above, hexadecimal.
    pub sha256: String,
}

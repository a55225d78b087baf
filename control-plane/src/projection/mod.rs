//! What the events amount to: the state that queries are answered from. Nothing here does I/O.

mod agents;
mod quotas;
mod requests;
#[cfg(test)]
mod tests;

use ark_types::agent::Agent;
use ark_types::event::Recorded;
use serde::{Deserialize, Serialize};

use crate::store::Snapshot;

pub use agents::{AgentFilter, Agents, Place, place};
pub use quotas::Quotas;
pub use requests::{Cut, Requests};

/// Form of the projection's snapshots.
const FORM: u32 = 1;

/// Why a snapshot of the projection cannot be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "the snapshot at position {position} of the log of events cannot be used: {why}; bring back a copy of the log, or use the arkd that wrote it"
)]
pub struct UnusableSnapshot {
    position: u64,
    why: String,
}

/// The state that all events up to a position amount to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Projection {
    position: u64,
    agents: Agents,
    quotas: Quotas,
    requests: Requests,
}

/// The projection on disk: what cannot be told from the rest.
#[derive(Serialize, Deserialize)]
struct Stored<T> {
    form: u32,
    agents: T,
    /// Absent in what was written before there were any.
    #[serde(default)]
    quotas: Quotas,
    /// Likewise.
    #[serde(default)]
    requests: Requests,
}

impl Projection {
    /// Position of the last event that it tells of.
    #[must_use]
    pub const fn position(&self) -> u64 {
        self.position
    }

    /// Agents, living and ended.
    #[must_use]
    pub const fn agents(&self) -> &Agents {
        &self.agents
    }

    /// What owners may have.
    #[must_use]
    pub const fn quotas(&self) -> &Quotas {
        &self.quotas
    }

    /// Requests that may be sent again.
    #[must_use]
    pub const fn requests(&self) -> &Requests {
        &self.requests
    }

    /// Takes in the event after the last one.
    pub fn apply(&mut self, recorded: &Recorded) {
        debug_assert_eq!(recorded.position, self.position + 1, "events come in order, without gaps");
        self.position = recorded.position;
        self.agents.apply(recorded);
        self.quotas.apply(recorded);
        self.requests.apply(recorded);
    }

    /// It, as the log keeps it.
    ///
    /// # Panics
    /// Never: every part of it can be written as JSON.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let agents: Vec<&Agent> = self.agents.iter().collect();
        let (quotas, requests) = (self.quotas.clone(), self.requests.clone());
        let data = serde_json::to_vec(&Stored { form: FORM, agents, quotas, requests });
        Snapshot { position: self.position, data: data.expect("strings, numbers, lists and maps of strings") }
    }

    /// The projection that `snapshot` is of.
    ///
    /// # Errors
    /// [`UnusableSnapshot`].
    pub fn restore(snapshot: &Snapshot) -> Result<Self, UnusableSnapshot> {
        let unusable = |why| UnusableSnapshot { position: snapshot.position, why };
        let stored: Stored<Vec<Agent>> =
            serde_json::from_slice(&snapshot.data).map_err(|error| unusable(error.to_string()))?;
        if stored.form != FORM {
            return Err(unusable(format!("it is of form {}, and this arkd knows {FORM}", stored.form)));
        }
        let agents = stored.agents.into_iter().collect();
        Ok(Self { position: snapshot.position, agents, quotas: stored.quotas, requests: stored.requests })
    }
}

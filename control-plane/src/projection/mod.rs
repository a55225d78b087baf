//! What the events amount to: the state that queries are answered from. Nothing here does I/O.

mod agents;
mod pools;
mod quotas;
mod requests;
mod services;
mod tasks;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use ark_types::agent::Agent;
use ark_types::event::Recorded;
use ark_types::task::Task;
use serde::{Deserialize, Serialize};

use crate::store::Snapshot;

pub use agents::{AgentFilter, Agents, Place, place};
pub use pools::Pools;
pub use quotas::Quotas;
pub use requests::{Cut, Requests};
pub use services::{WantedService, WantedServices};
pub use tasks::{TaskFilter, Tasks, task_place};

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
    tasks: Tasks,
    rest: Rest,
}

/// What there is little of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Rest {
    quotas: Quotas,
    pools: Pools,
    services: WantedServices,
    requests: Requests,
}

/// The projection on disk: what cannot be told from the rest. Whatever is not agents is absent in what was written before there
/// was any. Agents that were removed are in the snapshot's past, or here in what was written before it had one.
#[derive(Serialize, Deserialize)]
struct Stored<T, U> {
    form: u32,
    agents: T,
    #[serde(default)]
    tasks: U,
    #[serde(default)]
    quotas: Quotas,
    #[serde(default)]
    pools: Pools,
    #[serde(default)]
    services: WantedServices,
    #[serde(default)]
    requests: Requests,
}

/// Agents that had been removed by the time of the snapshot at `position`, whose past is `data`.
///
/// # Errors
/// [`UnusableSnapshot`].
pub fn read_past(position: u64, data: &[u8]) -> Result<Agents, UnusableSnapshot> {
    if data.is_empty() {
        // Written before snapshots had one.
        return Ok(Agents::default());
    }
    let removed: Vec<Agent> = serde_json::from_slice(data)
        .map_err(|error| UnusableSnapshot { position, why: format!("its past: {error}") })?;
    Ok(removed.into_iter().collect())
}

/// The projection as it was, to be written at leisure.
#[derive(Debug)]
pub struct Still {
    position: u64,
    agents: Vec<Arc<Agent>>,
    tasks: Vec<Arc<Task>>,
    rest: Rest,
}

impl Still {
    /// It, as the log keeps it, and its past: most of the agents, and needed only by who asks for history.
    ///
    /// # Panics
    /// Never: every part of it can be written as JSON.
    #[must_use]
    pub fn snapshot(self) -> (Snapshot, Vec<u8>) {
        let agents = self.agents.iter().map(AsRef::as_ref);
        let is_removed = |agent: &&Agent| agent.removed_unix_ms.is_some();
        let (removed, agents): (Vec<&Agent>, Vec<&Agent>) = agents.partition(is_removed);
        let tasks: Vec<&Task> = self.tasks.iter().map(AsRef::as_ref).collect();
        let Rest { quotas, pools, services, requests } = self.rest;
        let stored = Stored { form: FORM, agents, tasks, quotas, pools, services, requests };
        let written =
            |json: serde_json::Result<Vec<u8>>| json.expect("strings, numbers, lists and maps of strings");
        let (data, past) = (written(serde_json::to_vec(&stored)), written(serde_json::to_vec(&removed)));
        (Snapshot { position: self.position, data }, past)
    }
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
        &self.rest.quotas
    }

    /// Which pools templates are to have.
    #[must_use]
    pub const fn pools(&self) -> &Pools {
        &self.rest.pools
    }

    /// What services are to be.
    #[must_use]
    pub const fn services(&self) -> &WantedServices {
        &self.rest.services
    }

    /// Tasks that were not removed.
    #[must_use]
    pub const fn tasks(&self) -> &Tasks {
        &self.tasks
    }

    /// Requests that may be sent again.
    #[must_use]
    pub const fn requests(&self) -> &Requests {
        &self.rest.requests
    }

    /// Takes in the event after the last one.
    pub fn apply(&mut self, recorded: &Recorded) {
        debug_assert_eq!(recorded.position, self.position + 1, "events come in order, without gaps");
        self.position = recorded.position;
        self.agents.apply(recorded);
        self.tasks.apply(recorded);
        let Rest { quotas, pools, services, requests } = &mut self.rest;
        quotas.apply(recorded);
        pools.apply(recorded);
        services.apply(recorded);
        requests.apply(recorded);
    }

    /// It as it is now.
    #[must_use]
    pub fn still(&self) -> Still {
        let (agents, tasks) = (self.agents.all(), self.tasks.all());
        Still { position: self.position, agents, tasks, rest: self.rest.clone() }
    }

    /// The projection that `snapshot` is of, but for its past.
    ///
    /// # Errors
    /// [`UnusableSnapshot`].
    pub fn restore(snapshot: &Snapshot) -> Result<Self, UnusableSnapshot> {
        let unusable = |why| UnusableSnapshot { position: snapshot.position, why };
        let stored: Stored<Vec<Agent>, Vec<Task>> =
            serde_json::from_slice(&snapshot.data).map_err(|error| unusable(error.to_string()))?;
        let Stored { form, agents, tasks, quotas, pools, services, requests } = stored;
        if form != FORM {
            return Err(unusable(format!("it is of form {form}, and this arkd knows {FORM}")));
        }
        let (agents, tasks) = (agents.into_iter().collect(), tasks.into_iter().collect());
        let rest = Rest { quotas, pools, services, requests };
        Ok(Self { position: snapshot.position, agents, tasks, rest })
    }

    /// Takes in the agents that had been removed by the time of the snapshot that this began with. Nothing happened to them since:
    /// a removal is the last event of a stream.
    pub fn absorb(&mut self, past: Agents) {
        self.agents.follow(past);
    }
}

//! Which pools templates are to have, as the events tell of it.

use std::collections::BTreeMap;

use ark_types::agent::AgentName;
use ark_types::event::{Event, Recorded};
use ark_types::pool::PoolPolicy;
use serde::{Deserialize, Serialize};

/// Policies, by template. Templates that have the standbys of every one in use are not kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Pools(BTreeMap<AgentName, PoolPolicy>);

impl Pools {
    /// Templates that have a policy, and that, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&AgentName, PoolPolicy)> {
        self.0.iter().map(|(template, policy)| (template, *policy))
    }

    /// What was set for `template`.
    #[must_use]
    pub fn of(&self, template: &AgentName) -> Option<PoolPolicy> {
        self.0.get(template).copied()
    }

    /// Takes in an event, if it is about a pool.
    pub(super) fn apply(&mut self, recorded: &Recorded) {
        let Some(template) = recorded.stream.pool_template() else { return };
        match recorded.event {
            Event::PoolSet { policy } => {
                self.0.insert(template, policy);
            }
            Event::PoolRemoved {} => {
                self.0.remove(&template);
            }
            _ => {}
        }
    }
}

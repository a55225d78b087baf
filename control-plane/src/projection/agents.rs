//! Agents as the events tell of them, and the ways to find some among thousands.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;

use ark_types::agent::{Agent, AgentName, AgentState, Origin};
use ark_types::event::{Event, Recorded};
use ark_types::healing::AgentHealth;
use ark_types::image::ImageName;
use ark_types::label::{Labels, Owner, Requirement, Selector};

/// Removed agents that stay known; beyond it the oldest go.
pub(super) const MAX_HISTORY: usize = 20_000;

/// Where an agent is in a list: creation time and id.
pub type Place = (u64, String);

/// Which agents are asked for; the default is all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AgentFilter {
    /// In this state.
    pub state: Option<AgentState>,
    /// Of this image.
    pub image: Option<ImageName>,
    /// Forked from this template.
    pub template: Option<AgentName>,
    /// Belonging to this owner.
    pub owner: Option<Owner>,
    /// With these labels.
    pub labels: Selector,
}

impl AgentFilter {
    /// Whether it lets `agent` through.
    #[must_use]
    pub fn lets(&self, agent: &Agent) -> bool {
        let template = match &agent.origin {
            Origin::Template { name } => Some(name),
            Origin::Boot | Origin::Snapshot { .. } | Origin::Fork { .. } | Origin::Checkpoint { .. } => None,
        };
        self.state.is_none_or(|state| state == agent.state)
            && self.image.as_ref().is_none_or(|image| *image == agent.image)
            && self.template.as_ref().is_none_or(|wanted| template == Some(wanted))
            && self.owner.as_ref().is_none_or(|owner| *owner == agent.owner)
            && self.labels.selects(&agent.labels)
    }
}

/// Where `agent` is in a list.
#[must_use]
pub fn place(agent: &Agent) -> Place {
    (agent.created_unix_ms, agent.id.clone())
}

/// Agents, living and ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Agents {
    /// Oldest first.
    agents: BTreeMap<Place, Arc<Agent>>,
    places: HashMap<String, Place>,
    /// By key, then by value.
    labels: HashMap<String, BTreeMap<String, BTreeSet<Place>>>,
    removed: BTreeSet<Place>,
}

impl FromIterator<Agent> for Agents {
    fn from_iter<T: IntoIterator<Item = Agent>>(agents: T) -> Self {
        let mut all = Self::default();
        agents.into_iter().for_each(|agent| all.insert(agent));
        all
    }
}

impl Agents {
    /// The agent `id`.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<&Agent> {
        self.agents.get(self.places.get(id)?).map(AsRef::as_ref)
    }

    /// Every agent, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Agent> {
        self.agents.values().map(AsRef::as_ref)
    }

    /// Every agent as it is now, oldest first.
    pub(super) fn all(&self) -> Vec<Arc<Agent>> {
        self.agents.values().cloned().collect()
    }

    /// Agents after `after` that `filter` lets through, oldest first.
    pub fn select<'a>(
        &'a self,
        filter: &'a AgentFilter,
        after: Option<&Place>,
    ) -> Box<dyn Iterator<Item = &'a Agent> + 'a> {
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        match self.fewest(&filter.labels) {
            Some(sets) => {
                let mut places: Vec<&Place> = sets
                    .into_iter()
                    .flat_map(|set| set.range::<Place, _>((start, Bound::Unbounded)))
                    .collect();
                places.sort_unstable();
                let agents = places.into_iter().filter_map(|place| self.agents.get(place)).map(AsRef::as_ref);
                Box::new(agents.filter(|agent| filter.lets(agent)))
            }
            None => {
                let agents =
                    self.agents.range::<Place, _>((start, Bound::Unbounded)).map(|(_, agent)| agent.as_ref());
                Box::new(agents.filter(|agent| filter.lets(agent)))
            }
        }
    }

    /// Of the conditions that name what must be there, the one that the fewest agents meet: their places. None when no
    /// condition does.
    fn fewest(&self, selector: &Selector) -> Option<Vec<&BTreeSet<Place>>> {
        let sets = |requirement: &Requirement| match requirement {
            Requirement::In(key, values) => Some(self.labels.get(key).map_or(Vec::new(), |known| {
                let values: BTreeSet<&String> = values.iter().collect();
                values.into_iter().filter_map(|value| known.get(value)).collect()
            })),
            Requirement::Exists(key) => {
                Some(self.labels.get(key).map_or(Vec::new(), |known| known.values().collect()))
            }
            Requirement::NotIn(..) | Requirement::Absent(_) => None,
        };
        let size = |sets: &Vec<&BTreeSet<Place>>| sets.iter().map(|set| set.len()).sum::<usize>();
        selector.requirements().iter().filter_map(sets).min_by_key(size)
    }

    /// Takes in an event, if it is about an agent.
    pub(super) fn apply(&mut self, recorded: &Recorded) {
        if let Event::AgentCreated { agent } = &recorded.event {
            return self.insert(agent.clone().newborn());
        }
        let Some(place) = recorded.stream.agent_id().and_then(|id| self.places.get(id)) else { return };
        if let Event::AgentLabelled { labels } = &recorded.event {
            let place = place.clone();
            return self.relabel(&place, labels);
        }
        let Some(agent) = self.agents.get_mut(place).map(Arc::make_mut) else { return };
        let has_ended = matches!(agent.state, AgentState::Stopped | AgentState::Failed);
        match &recorded.event {
            Event::AgentRemoved {} => {
                if !has_ended {
                    agent.state = AgentState::Stopped;
                }
                agent.removed_unix_ms = Some(recorded.at_unix_ms);
                agent.checkpoints.clear();
                self.removed.insert(place.clone());
                self.forget_the_oldest();
            }
            _ if agent.removed_unix_ms.is_some() => {}
            Event::AgentEnded { outcome, reason, exit } => {
                agent.state = (*outcome).into();
                agent.reason = Some(reason.clone());
                agent.exit.clone_from(exit);
                agent.health = AgentHealth::Healthy;
            }
            Event::AgentRestarted { continuity, boot_ms } => {
                (agent.state, agent.boot_ms) = (AgentState::Running, Some(*boot_ms));
                (agent.reason, agent.exit) = (None, None);
                // What it is made of stays the same when it goes on from a checkpoint of itself.
                if !matches!(continuity.restored_from, Origin::Checkpoint { .. }) {
                    agent.origin = continuity.restored_from.clone();
                }
                continuity.drop_newer(&mut agent.checkpoints);
                agent.continuity = Some(continuity.clone());
            }
            Event::AgentHealthChanged { health } if !has_ended => agent.health = health.clone(),
            // Told by an agent that has ended as well: of a checkpoint that was complete before, or is of no use.
            Event::AgentCheckpointed { checkpoint } => agent.keep_checkpoint(checkpoint.clone()),
            Event::AgentCheckpointFailed { reason } => agent.checkpoint_failure = Some(reason.clone()),
            Event::AgentCheckpointUnusable { snapshot, .. } => {
                agent.checkpoints.retain(|checkpoint| checkpoint.snapshot != *snapshot);
            }
            // A pause and the end of what is being paused are told by different tasks: the end is what counts.
            _ if has_ended => {}
            Event::AgentCreated { .. } | Event::AgentLabelled { .. } | Event::AgentHealthChanged { .. } => {}
            Event::AgentReady { boot_ms } => {
                agent.state = AgentState::Running;
                agent.boot_ms = Some(*boot_ms);
            }
            Event::AgentPaused { .. } => {
                (agent.state, agent.health) = (AgentState::Paused, AgentHealth::Healthy);
            }
            Event::AgentResumed {} => agent.state = AgentState::Running,
            Event::AgentRewound { origin } => {
                (agent.state, agent.health) = (AgentState::Running, AgentHealth::Healthy);
                agent.origin = origin.clone();
                agent.checkpoints.clear();
            }
            Event::AgentStopping {} => agent.state = AgentState::Stopping,
            // Until it runs again it has ended; what its limits lead to is told by what follows.
            Event::AgentRestarting { .. } | Event::AgentExpired { .. } => {}
            // Of something else.
            Event::OwnerQuotaSet { .. }
            | Event::InferenceCalled { .. }
            | Event::PoolSet { .. }
            | Event::PoolRemoved {}
            | Event::ServiceSet { .. }
            | Event::ServiceRemoved {}
            | Event::TaskCreated { .. }
            | Event::TaskStarted { .. }
            | Event::TaskAttemptFailed { .. }
            | Event::TaskSucceeded { .. }
            | Event::TaskFailed { .. }
            | Event::TaskCancelled {}
            | Event::TaskTimedOut { .. }
            | Event::TaskRemoved {}
            | Event::RequestMade { .. }
            | Event::RequestAnswered { .. }
            | Event::RequestDropped {} => {}
        }
    }

    /// Takes in `past`, which was before.
    pub(super) fn follow(&mut self, past: Self) {
        let now = std::mem::replace(self, past);
        now.agents.into_values().for_each(|agent| self.insert(Arc::unwrap_or_clone(agent)));
        self.forget_the_oldest();
    }

    fn insert(&mut self, agent: Agent) {
        let place = place(&agent);
        if let Some(known) = self.agents.get(&place).map(|known| known.labels.clone()) {
            self.unindex(&place, &known);
        }
        self.places.insert(agent.id.clone(), place.clone());
        self.index(&place, &agent.labels);
        if agent.removed_unix_ms.is_some() {
            self.removed.insert(place.clone());
        } else {
            self.removed.remove(&place);
        }
        self.agents.insert(place, Arc::new(agent));
    }

    fn forget_the_oldest(&mut self) {
        while self.removed.len() > MAX_HISTORY {
            let Some(place) = self.removed.pop_first() else { return };
            self.places.remove(&place.1);
            let Some(agent) = self.agents.remove(&place) else { continue };
            self.unindex(&place, &agent.labels);
        }
    }

    /// The agent at `place`, unless it was removed, has `labels` from now on.
    fn relabel(&mut self, place: &Place, labels: &Labels) {
        let Some(agent) = self.agents.get_mut(place).filter(|agent| agent.removed_unix_ms.is_none()) else {
            return;
        };
        let old = std::mem::replace(&mut Arc::make_mut(agent).labels, labels.clone());
        self.unindex(place, &old);
        self.index(place, labels);
    }

    fn index(&mut self, place: &Place, labels: &Labels) {
        for (key, value) in labels {
            let values = self.labels.entry(key.clone()).or_default();
            values.entry(value.clone()).or_default().insert(place.clone());
        }
    }

    fn unindex(&mut self, place: &Place, labels: &Labels) {
        for (key, value) in labels {
            let Some(values) = self.labels.get_mut(key) else { continue };
            let Some(places) = values.get_mut(value) else { continue };
            places.remove(place);
            if places.is_empty() {
                values.remove(value);
            }
            if values.is_empty() {
                self.labels.remove(key);
            }
        }
    }
}

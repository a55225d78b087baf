//! What of an agent's life is recorded, and what an earlier `arkd` recorded of agents that are no more.
//!
//! The owner records what happens to its agent; a pause, a resume and a rewind are recorded by who asked the owner for them. What
//! has no entry in the registry, such as a standby, is no agent, and nothing of it is recorded.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use ark_types::agent::{Agent, AgentState};
use ark_types::event::{AgentSpec, Event, Outcome, Stream};
use futures_util::future::join_all;

use super::birth::{Begun, begin};
use super::owner::Owner;
use super::record::Record;
use super::request::Request;
use super::{BootError, Handle, is_ended, is_paused};
use crate::core::Core;
use crate::registry::MAX_ENDED;
use crate::snapshots::Hold;
use crate::store::AppendError;

/// Why an agent is no more of which an earlier `arkd` left nothing but its record.
const LOST: &str = "it was lost while arkd was away: the host was started anew, or the agent's directory was damaged or removed";
/// Why an agent ended whose VMM was not there to say so.
pub(super) const ON_REQUEST: &str = "it was stopped on request";

/// The first events of an agent: that it was created, and `next`. Its environment, which may hold secrets, is in none.
fn begin_record(
    core: &Core,
    agent: &Agent,
    next: Option<Event>,
) -> impl Future<Output = Result<(), AppendError>> + use<> {
    let created = Event::AgentCreated { agent: AgentSpec::from(agent) };
    core.ledger.begin(Stream::agent(&agent.id), [created].into_iter().chain(next).collect())
}

impl Handle {
    /// Its stream of events.
    #[must_use]
    pub fn stream(&self) -> Stream {
        Stream::agent(self.id())
    }

    /// Records what happened to it.
    pub(super) fn record(
        &self,
        core: &Core,
        event: Event,
    ) -> impl Future<Output = Result<(), AppendError>> + use<> {
        core.ledger.record(self.stream(), vec![event])
    }
}

impl Owner {
    /// Records that its agent begins, and `next`, if it is one.
    pub(super) fn record_birth(
        &self,
        next: Option<Event>,
    ) -> impl Future<Output = Result<(), AppendError>> + use<> {
        let recording = self.known.then(|| begin_record(&self.core, &self.state.borrow(), next));
        settled(recording)
    }

    /// Records what happened to its agent, if it is one.
    pub(super) fn record(&self, events: Vec<Event>) -> impl Future<Output = Result<(), AppendError>> + use<> {
        let stream = Stream::agent(&self.state.borrow().id);
        let recording = self.known.then(|| self.core.ledger.record(stream, events));
        settled(recording)
    }

    /// Records that nothing is left of its agent, after `last`, and waits until that is durable or owed.
    pub(super) async fn record_removal(&self, last: Vec<Event>) {
        let mut events = last;
        events.push(Event::AgentRemoved {});
        // Who asked for it looks whether anything is owed.
        let _ = self.record(events).await;
    }

    /// The life of an agent that ended under an earlier `arkd`: it waits to be removed.
    async fn rest(mut self) {
        let _seat = self.seat();
        loop {
            match self.requests.recv().await {
                Some(Request::Remove { for_good: true, .. }) => return self.record_removal(Vec::new()).await,
                // The log knows it, and so will the next arkd.
                Some(Request::Remove { for_good: false, .. } | Request::Leave) | None => return,
                // Nothing else can be had of it; dropping it tells who asked.
                Some(_) => {}
            }
        }
    }
}

async fn settled(
    recording: Option<impl Future<Output = Result<(), AppendError>>>,
) -> Result<(), AppendError> {
    match recording {
        Some(recording) => recording.await,
        None => Ok(()),
    }
}

/// The end of an agent that never came up.
pub(super) fn stillborn(error: &BootError) -> Event {
    let exit = match error {
        BootError::Ended { record, .. } => Some(record.clone()),
        _ => None,
    };
    Event::AgentEnded { outcome: Outcome::Failed, reason: error.to_string(), exit }
}

/// Records what the log does not know yet of an agent that was found paused on disk.
pub(super) fn record_paused(core: &Core, agent: &Agent, hold: &Hold) {
    let known = core.ledger.projection().agents().get(&agent.id).map(|agent| agent.state);
    if known.is_none() {
        drop(begin_record(core, agent, None));
    }
    if known != Some(AgentState::Paused) {
        let paused = Event::AgentPaused { snapshot: hold.id().to_string() };
        drop(core.ledger.record(Stream::agent(&agent.id), vec![paused]));
    }
}

/// Records what the log does not know yet of an agent that an earlier `arkd` left in the run directory.
pub(super) fn record_survivor(core: &Core, record: &Record) {
    let agent = &record.agent;
    let told =
        core.ledger.projection().agents().get(&agent.id).map(|known| (known.state, known.origin.clone()));
    if told.is_none() {
        drop(begin_record(core, agent, None));
    }
    let is_rewound = told.as_ref().is_some_and(|(_, origin)| *origin != agent.origin);
    let news = match (told.map(|(state, _)| state), agent.state) {
        (Some(AgentState::Stopped | AgentState::Failed), _) => None,
        (_, AgentState::Stopped) => Some(ended(agent, Outcome::Stopped)),
        (_, AgentState::Failed) => Some(ended(agent, Outcome::Failed)),
        (None | Some(AgentState::Creating), _) => {
            Some(Event::AgentReady { boot_ms: agent.boot_ms.unwrap_or_default() })
        }
        _ if is_rewound => Some(Event::AgentRewound { origin: agent.origin.clone() }),
        // Its pause or its removal was cut off.
        (Some(AgentState::Paused | AgentState::Stopping), _) => Some(Event::AgentResumed {}),
        (Some(AgentState::Running), _) => None,
    };
    if let Some(event) = news {
        let restarting = is_ended(agent.state).then(|| record.restarting()).flatten();
        let events = [event].into_iter().chain(restarting).collect();
        drop(core.ledger.record(Stream::agent(&agent.id), events));
    }
}

/// The end of an agent, as it tells it itself.
fn ended(agent: &Agent, outcome: Outcome) -> Event {
    Event::AgentEnded { outcome, reason: agent.reason.clone().unwrap_or_default(), exit: agent.exit.clone() }
}

/// Closes the books on agents that an earlier `arkd` had: those that lived and are no more have ended, and those that ended
/// wait to be removed, the newest of them. Nobody was told of those that are `untold`. Call it when every agent that still lives
/// is in the registry.
pub(crate) async fn settle(core: &Arc<Core>, untold: &HashSet<String>) {
    let (mut ended, mut recordings) = (Vec::new(), Vec::new());
    for agent in left_behind(core, untold) {
        let stream = Stream::agent(&agent.id);
        if is_ended(agent.state) {
            ended.push(agent);
            continue;
        }
        tracing::warn!(id = agent.id, name = %agent.name, "an agent of an earlier arkd is no more");
        let end = Event::AgentEnded { outcome: Outcome::Failed, reason: LOST.to_owned(), exit: None };
        // Nobody was told of one that was still coming up either.
        if agent.auto_remove || agent.state == AgentState::Creating || untold.contains(&agent.id) {
            recordings.push(core.ledger.record(stream, vec![end, Event::AgentRemoved {}]));
        } else if agent.state == AgentState::Stopping {
            // Its removal was asked for, and cut off when all but the last word on it was done.
            let end =
                Event::AgentEnded { outcome: Outcome::Stopped, reason: ON_REQUEST.to_owned(), exit: None };
            recordings.push(core.ledger.record(stream, vec![end, Event::AgentRemoved {}]));
        } else {
            recordings.push(core.ledger.record(stream, vec![end]));
            ended.push(Agent { state: AgentState::Failed, reason: Some(LOST.to_owned()), ..agent });
        }
    }
    let excess = ended.len().saturating_sub(MAX_ENDED);
    for agent in ended.drain(..excess) {
        recordings.push(core.ledger.record(Stream::agent(&agent.id), vec![Event::AgentRemoved {}]));
    }
    // What the log does not take in now stays owed to it.
    join_all(recordings).await;
    for agent in ended {
        let (handle, mut owner) = begin(core, agent, BTreeMap::new(), None, Begun::Earlier, None);
        owner.known = true;
        core.registry.take_in(handle);
        tokio::spawn(owner.rest());
    }
}

/// Agents that the log knows, that were not removed and that are not here, oldest first. One that could not be looked at or taken
/// in still has its directory, or is paused on disk, so that an `arkd` that can will; the directories of those that are `untold`
/// say nothing.
fn left_behind(core: &Core, untold: &HashSet<String>) -> Vec<Agent> {
    let here: HashSet<String> = core.registry.all().iter().map(|handle| handle.id().to_owned()).collect();
    let projection = core.ledger.projection();
    let is_on_disk = |id: &str| {
        let has_directory = core.config.run.agent(id).0.exists() && !untold.contains(id);
        // Snapshots of one that is not paused any more may stay, as long as others need them.
        has_directory || is_paused(&core.config.state, id)
    };
    let is_left = |agent: &&Agent| {
        agent.removed_unix_ms.is_none() && !here.contains(&agent.id) && !is_on_disk(&agent.id)
    };
    projection.agents().iter().filter(is_left).cloned().collect()
}

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
    let told = core.ledger.projection().agents().get(&agent.id).cloned();
    if told.is_none() {
        drop(begin_record(core, agent, None));
    }
    let mut events = unrecorded(told.as_ref(), agent);
    if matches!(events.last(), Some(Event::AgentEnded { .. })) {
        events.extend(record.restarting());
    }
    if !events.is_empty() {
        drop(core.ledger.record(Stream::agent(&agent.id), events));
    }
}

/// What happened since the log, which knows an agent as `told`, was told of it: it is `now`.
fn unrecorded(told: Option<&Agent>, now: &Agent) -> Vec<Event> {
    let restarts = |agent: &Agent| agent.continuity.as_ref().map_or(0, |continuity| continuity.restarts);
    let mut events = Vec::new();
    let mut state = told.map(|told| told.state);
    if let Some(continuity) = now.continuity.clone().filter(|_| told.map_or(0, restarts) < restarts(now)) {
        if !state.is_some_and(is_ended) {
            let (outcome, reason) = (Outcome::Failed, continuity.cause.clone());
            events.push(Event::AgentEnded { outcome, reason, exit: None });
        }
        events.push(Event::AgentRestarted { continuity, boot_ms: now.boot_ms.unwrap_or_default() });
        state = Some(AgentState::Running);
    }
    // What a restart makes of it is told with that.
    let is_rewound = events.is_empty() && told.is_some_and(|told| told.origin != now.origin);
    events.extend(match (state, now.state) {
        (Some(AgentState::Stopped | AgentState::Failed), _) => None,
        (_, AgentState::Stopped) => Some(ended(now, Outcome::Stopped)),
        (_, AgentState::Failed) => Some(ended(now, Outcome::Failed)),
        (None | Some(AgentState::Creating), _) => {
            Some(Event::AgentReady { boot_ms: now.boot_ms.unwrap_or_default() })
        }
        _ if is_rewound => Some(Event::AgentRewound { origin: now.origin.clone() }),
        // Its pause or its removal was cut off.
        (Some(AgentState::Paused | AgentState::Stopping), _) => Some(Event::AgentResumed {}),
        (Some(AgentState::Running), _) => None,
    });
    events
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
            ended.push(Agent { checkpoints: Vec::new(), ..agent });
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
            let (state, reason, checkpoints) = (AgentState::Failed, Some(LOST.to_owned()), Vec::new());
            ended.push(Agent { state, reason, checkpoints, ..agent });
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

#[cfg(test)]
mod tests {
    use ark_types::agent::Origin;
    use ark_types::event::Recorded;
    use ark_types::healing::Continuity;
    use proptest::prelude::*;

    use super::*;
    use crate::projection::Projection;

    const STATES: [AgentState; 6] = [
        AgentState::Creating,
        AgentState::Running,
        AgentState::Paused,
        AgentState::Stopping,
        AgentState::Stopped,
        AgentState::Failed,
    ];

    fn agent() -> impl Strategy<Value = Agent> {
        let origin = prop::sample::select(vec![
            Origin::Boot,
            Origin::Snapshot { name: "s1".parse().unwrap() },
            Origin::Snapshot { name: "s2".parse().unwrap() },
        ]);
        (prop::sample::select(STATES.to_vec()), origin, 0u32..3).prop_map(|(state, origin, restarts)| {
            let continuity = Continuity {
                restarts,
                cause: "it was killed".to_owned(),
                restored_from: origin.clone(),
                lost_ms: 1,
                at_unix_ms: 1,
            };
            let json = serde_json::json!({
                "id": "0123456789abcdef", "name": "a1", "origin": origin, "image": "base", "image_digest": "sha256:0",
                "vcpus": 1, "memory_mib": 64, "state": state, "created_unix_ms": 0, "auto_remove": false,
            });
            let agent: Agent = serde_json::from_value(json).unwrap();
            Agent { continuity: (restarts > 0).then_some(continuity), ..agent }
        })
    }

    /// What `events` make of the agent that `told` is all about.
    fn after(told: Agent, events: Vec<Event>) -> Agent {
        let snapshot = serde_json::json!({ "form": 1, "agents": [told] });
        let data = serde_json::to_vec(&snapshot).unwrap();
        let mut projection = Projection::restore(&crate::store::Snapshot { position: 0, data }).unwrap();
        for (position, event) in (1..).zip(events) {
            let stream = Stream::agent("0123456789abcdef");
            projection.apply(&Recorded { position, at_unix_ms: 1, stream, version: position, event });
        }
        projection.agents().get("0123456789abcdef").unwrap().clone()
    }

    proptest! {
        #[test]
        fn what_was_not_recorded_is_and_a_restart_is_never_told_as_a_rewind(told in agent(), now in agent()) {
            let count = |agent: &Agent| agent.continuity.as_ref().map_or(0, |continuity| continuity.restarts);
            // A survivor runs or has ended, and nothing that was told is taken back.
            prop_assume!(now.state == AgentState::Running || is_ended(now.state));
            prop_assume!(count(&now) >= count(&told) && (count(&now) > count(&told) || !is_ended(told.state)));
            let events = unrecorded(Some(&told), &now);
            let is_restarted = count(&now) > count(&told);
            let tells = |kind: &str| events.iter().any(|event| event.kind() == kind);
            prop_assert_eq!(tells("agent.restarted"), is_restarted);
            prop_assert!(!(is_restarted && tells("agent.rewound")));
            let known = after(told, events);
            prop_assert_eq!((known.state, count(&known)), (now.state, count(&now)));
            if is_restarted {
                prop_assert_eq!(known.origin, now.origin);
            }
        }
    }
}

//! What clients are told of services.

use std::time::{Duration, Instant};

use ark_types::agent::AgentName;
use ark_types::label::Owner;
use ark_types::service::{FoundService, Replica, ReplicaState, Service, ServiceList};

use super::ServiceError;
use super::entry::{Calls, Entry, Wanted};
use super::table::Services;
use crate::core::Core;
use crate::projection::WantedService;

/// Every service that is to be.
pub(crate) fn all(core: &Core) -> ServiceList {
    let names = core.services.names();
    ServiceList { services: names.iter().filter_map(|name| one(core, name.as_ref()).ok()).collect() }
}

/// The service `name`.
///
/// # Errors
/// [`ServiceError::NotFound`].
pub(crate) fn one(core: &Core, name: &str) -> Result<Service, ServiceError> {
    let seen =
        core.services.with(name, |_, entry| entry.wanted.as_ref().map(|wanted| describe(entry, wanted)))?;
    seen.ok_or_else(|| ServiceError::NotFound(name.to_owned()))
}

/// The service `name`, if the request `id` made it.
pub(crate) fn made_by(core: &Core, name: &AgentName, id: &str) -> Option<Service> {
    let seen = core.services.with(name.as_ref(), |_, entry| {
        let wanted = entry.wanted.as_ref().filter(|wanted| wanted.service.request.as_deref() == Some(id))?;
        Some(describe(entry, wanted))
    });
    seen.ok().flatten()
}

/// The services of `owner`, as its agents find them, by name.
pub(super) fn found(core: &Core, owner: &Owner) -> Vec<FoundService> {
    let entries = core.services.lock();
    let wanted = entries.values().filter_map(|entry| Some((entry, &entry.wanted.as_ref()?.service.spec)));
    let found = wanted.filter(|(_, spec)| spec.owner == *owner).map(|(entry, spec)| {
        let ready = entry.replicas.values().filter(|replica| replica.state() == ReplicaState::Ready).count();
        let ready = u32::try_from(ready).unwrap_or(u32::MAX);
        FoundService { name: spec.name.clone(), ready, connectable: spec.port.is_some() }
    });
    found.collect()
}

fn describe(entry: &Entry, wanted: &Wanted) -> Service {
    let WantedService { spec, env, generation, .. } = wanted.service.clone();
    let mut replicas: Vec<(u64, Replica)> = entry
        .replicas
        .iter()
        .map(|(id, replica)| {
            let agent = replica.handle.agent();
            let state = replica.state_of(&agent);
            let told = Replica {
                agent: agent.name,
                id: id.clone(),
                generation: replica.generation,
                state,
                agent_state: agent.state,
                health: agent.health,
                reason: replica.reason(),
                load: replica.load,
            };
            (agent.created_unix_ms, told)
        })
        .collect();
    replicas.sort_by(|(at, a), (other, b)| (at, &a.id).cmp(&(other, &b.id)));
    let replicas: Vec<Replica> = replicas.into_iter().map(|(_, replica)| replica).collect();
    let ready = || replicas.iter().filter(|replica| replica.state == ReplicaState::Ready);
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    let updated = count(ready().filter(|replica| replica.generation == generation).count());
    let ready = count(ready().count());
    let conditions = conditions(entry, wanted, ready, updated);
    let is_stopped = entry.is_stopped();
    let last_failure = entry.last_failure.as_ref().map(|(failure, _)| failure.clone());
    Service { spec, env, generation, ready, updated, replicas, is_stopped, last_failure, conditions }
}

/// What keeps the service from being as it is to be.
fn conditions(entry: &Entry, wanted: &Wanted, ready: u32, updated: u32) -> Vec<String> {
    let WantedService { spec, generation, .. } = &wanted.service;
    let mut conditions = Vec::new();
    if ready < spec.replicas {
        conditions.push(format!("{ready} of {} replicas are ready", spec.replicas));
    }
    let waits = |replica: &super::entry::Replica| match replica.state() {
        ReplicaState::Starting => replica.reason().map(|why| (replica.handle.name().clone(), why)),
        _ => None,
    };
    if let Some((name, why)) = entry.replicas.values().find_map(waits) {
        conditions.push(format!("the replica {name}: {why}"));
    }
    let is_of_old = entry.replicas.values().any(|replica| replica.generation != *generation);
    if is_of_old && updated < spec.replicas {
        conditions.push(format!(
            "generation {generation} takes the place of the one before: {updated} of {} replicas are ready",
            spec.replicas
        ));
    }
    if let Err(why) = &wanted.env {
        conditions.push(format!(
            "no replica can be made, as the environment cannot be read ({why}): set the service again"
        ));
    }
    let failed = entry.attempts.last();
    let ended = entry.attempts.last_end().filter(|_| ready < spec.replicas || entry.is_stopped());
    if let Some((why, failures)) = failed.filter(|_| entry.is_update_stopped()) {
        conditions.push(format!(
            "the update to generation {generation} is stopped after {failures} failures, and the replicas before it stay: {why}; set the service again when that is mended"
        ));
    } else if let Some((why, ends)) = ended.filter(|_| entry.is_stopped()) {
        conditions.push(format!(
            "the command ended {ends} times in a row and no more replicas are made: {why}; set the service again when that is mended"
        ));
    } else if let Some((why, failures)) = ended.or(failed) {
        let wait = entry.attempts.wait(Instant::now()).map_or(0, |wait| wait.as_secs() + 1);
        let next = if wait == 0 { "now".to_owned() } else { format!("within {wait} s") };
        let times = if failures == 1 { String::new() } else { format!(" ({failures} times in a row)") };
        conditions.push(format!("{why}{times}; another one is tried {next}"));
    }
    conditions
}

/// Numbers of one service, for metrics.
#[derive(Debug)]
pub(crate) struct Numbers {
    /// Its name.
    pub(crate) service: String,
    /// Replicas by state.
    pub(crate) replicas: Vec<(ReplicaState, usize)>,
    /// Calls by outcome.
    pub(crate) calls: [(&'static str, u64); 4],
}

/// Numbers of every service.
pub(crate) fn numbers(services: &Services) -> Vec<Numbers> {
    let entries = services.lock();
    let of = |(name, entry): (_, &Entry)| {
        let in_state = |state| entry.replicas.values().filter(|replica| replica.state() == state).count();
        let Calls { ok, failed, unready, abandoned } = entry.calls;
        Numbers {
            service: ToString::to_string(name),
            replicas: ReplicaState::ALL
                .into_iter()
                .map(|state| {
                    let made = if state == ReplicaState::Starting { entry.spawning.len() } else { 0 };
                    (state, in_state(state) + made)
                })
                .collect(),
            calls: [("ok", ok), ("failed", failed), ("unready", unready), ("abandoned", abandoned)],
        }
    };
    entries.iter().map(of).collect()
}

/// Why no replica of the service `name` is ready, as far as can be told.
pub(super) fn why_unready(core: &Core, name: &str, waited: Duration) -> ServiceError {
    match one(core, name) {
        Ok(service) => {
            let why = match service.conditions.as_slice() {
                _ if service.spec.replicas == 0 => "it is to have none: `ark service scale` it up".to_owned(),
                [] => "they come and go: try again in a moment".to_owned(),
                conditions => conditions.join("; "),
            };
            ServiceError::Unready { service: service.spec.name, waited, why }
        }
        Err(gone) => gone,
    }
}

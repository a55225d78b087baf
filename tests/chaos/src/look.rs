//! What `arkd` tells, against the model; what was in doubt is settled by it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::client::{Client, Said};
use crate::history::History;
use crate::host;
use crate::model::{Content, Known, Life, Pending, restarts};
use crate::operations::ask_content;
use crate::{habits, services, tasks};

/// Between two looks at what is under way.
const AGAIN: Duration = Duration::from_millis(20);
/// What is reserved for an agent that stands still, MiB, while the `arkd` lives that it was paused by.
const PAUSED_MIB: u64 = 4;

/// Looks at everything that `arkd` (process `pid`) tells.
///
/// # Panics
/// When a promise was broken.
pub fn look(client: &mut Client<'_>, history: &mut History, pid: u32) {
    habits::look(client);
    tasks::look(client);
    services::look(client);
    let mut listed = settled(client);
    // Theirs are looked after with them.
    listed.retain(|agent| {
        agent["labels"][tasks::LABEL].is_null() && agent["labels"][services::LABEL].is_null()
    });
    for agent in &listed {
        let id = agent["id"].as_str().unwrap_or_default().to_owned();
        let known = client.known().agents.get(&id).cloned();
        let known = match known {
            Some(known) => settle(client, &known, agent),
            None => settle(client, &newcomer(client, agent), agent),
        };
        client.known().agents.insert(id, known);
    }
    missing(client, &listed);
    points(client);
    quotas(client);
    let templates = templates(client);
    eventually(client, "the host has what is told", |client| {
        host::check(client.stage, pid, &list(client), templates)
    });
    eventually(client, "what is reserved is what the living need", room);
    eventually(client, "the events amount to what is told", |client| {
        history.read(client);
        let listed = list(client);
        history.check(&listed, &client.model.lock().unwrap_or_else(PoisonError::into_inner))
    });
}

/// Asks again and again until there is nothing wrong.
pub(crate) fn eventually(
    client: &mut Client<'_>,
    what: &str,
    mut check: impl FnMut(&mut Client<'_>) -> Result<(), String>,
) {
    let end = Instant::now() + client.stage.patience;
    while let Err(wrong) = check(client) {
        if Instant::now() > end {
            let ids: Vec<&str> =
                wrong.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| w.len() == 16).collect();
            panic!("it did not come about that {what}: {wrong}{}", client.known().story_of(&ids));
        }
        std::thread::sleep(AGAIN);
    }
}

/// Every agent.
pub(crate) fn list(client: &mut Client<'_>) -> Vec<Value> {
    match client.call("GET", "/v1/agents?limit=1000", &Value::Null) {
        Said::Yes(list) => list["agents"].as_array().cloned().unwrap_or_default(),
        other => panic!("agents are to be listed: {other:?}"),
    }
}

/// Every agent, once none of them is on its way to something.
fn settled(client: &mut Client<'_>) -> Vec<Value> {
    let mut listed = Vec::new();
    eventually(client, "every agent is settled", |client| {
        listed = list(client);
        let is_under_way = |agent: &&Value| {
            let state = agent["state"].as_str().unwrap_or_default();
            ["creating", "stopping"].contains(&state) || !agent["backoff_until_unix_ms"].is_null()
        };
        listed.iter().find(is_under_way).map_or(Ok(()), |agent| Err(agent.to_string()))
    });
    listed
}

/// An agent that nobody was told of: somebody must have asked for it.
fn newcomer(client: &Client<'_>, agent: &Value) -> Known {
    let mut model = client.known();
    let (id, name) = (agent["id"].as_str().unwrap_or_default(), agent["name"].as_str().unwrap_or_default());
    let story = model.story_of(&[id, name]);
    assert!(!model.removed.contains(id), "the acknowledged removal of {id} is undone: {agent}{story}");
    let parent = agent["origin"]["id"].as_str();
    let fork =
        |pending: &&Pending| matches!(pending, Pending::ForkOf { id, .. } if Some(id.as_str()) == parent);
    let content: BTreeSet<Content> = match model.pending.remove(name) {
        Some(Pending::Named { content }) => content,
        _ => model
            .pending
            .values()
            .filter(fork)
            .flat_map(|pending| match pending {
                Pending::Named { content } | Pending::ForkOf { content, .. } => content.clone(),
            })
            .collect(),
    };
    assert!(!content.is_empty(), "nobody asked for {agent}{story}");
    Known::running(agent, content)
}

/// The agent as it is told to be, which has to be one of the ways that it can be.
fn settle(client: &mut Client<'_>, known: &Known, agent: &Value) -> Known {
    let story = client.known().story_of(&[&known.told.id, &known.told.name]);
    assert_eq!(crate::model::Told::of(agent), known.told, "what is told of an agent stays");
    let life = match agent["state"].as_str().unwrap_or_default() {
        "running" => Life::Running,
        "paused" => Life::Paused,
        _ => Life::Ended,
    };
    assert!(known.life.contains(&life), "{agent}\n is not {known:?}{story}");
    assert!(known.labels.contains(&agent["labels"]), "{agent}\n is not {known:?}{story}");
    let has_reason = agent["reason"].as_str().is_some_and(|reason| !reason.is_empty());
    assert_eq!(life == Life::Ended, has_reason, "who ended says why, nobody else does: {agent}{story}");
    let again = restarts(agent);
    if life == Life::Running {
        let is_honest =
            (again > known.restarts) == known.was_killed || known.may_have_ended && known.restarts_itself;
        assert!(is_honest, "it began anew {again} times, before that {}: {agent}{story}", known.restarts);
    }
    let mut content = known.content.clone();
    if life == Life::Running {
        let found = match ask_content(client, &known.told.id) {
            Ok(found) => found,
            Err(said) => panic!("{agent}\n says that it runs, and {said:?}{story}"),
        };
        assert!(content.contains(&found), "it holds {found:?}: {known:?}{story}");
        content = BTreeSet::from([found]);
    }
    let mut past = known.past.clone();
    let origin = &agent["continuity"]["restored_from"]["from"];
    if let Some(past) = past.as_mut().filter(|_| again > known.restarts && origin != "checkpoint") {
        // What was before is nothing that it could go back to.
        past.clone_from(&content);
        past.insert(None);
    }
    Known {
        life: BTreeSet::from([life]),
        past,
        content,
        labels: vec![agent["labels"].clone()],
        restarts: again,
        may_be_gone: false,
        was_killed: false,
        may_have_ended: false,
        is_taken: false,
        ..known.clone()
    }
}

/// What is not listed was removed, or never came to be.
fn missing(client: &Client<'_>, listed: &[Value]) {
    let ids: BTreeSet<&str> = listed.iter().filter_map(|agent| agent["id"].as_str()).collect();
    let names: BTreeSet<&str> = listed.iter().filter_map(|agent| agent["name"].as_str()).collect();
    let mut model = client.known();
    let gone: Vec<Known> =
        model.agents.values().filter(|known| !ids.contains(known.told.id.as_str())).cloned().collect();
    for known in gone {
        let story = model.story_of(&[&known.told.id, &known.told.name]);
        assert!(known.may_be_gone, "an acknowledged agent is lost: {known:?}{story}");
        model.agents.remove(&known.told.id);
        model.removed.insert(known.told.id);
    }
    let refused = model.refused.iter().find(|name| names.contains(name.as_str()));
    assert!(refused.is_none(), "{refused:?} was refused and is there");
    model.pending.clear();
}

/// Names of what `path` lists under `key`.
fn names_of(client: &mut Client<'_>, path: &str, key: &str) -> BTreeSet<String> {
    match client.call("GET", path, &Value::Null) {
        Said::Yes(list) => list[key]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|one| one["name"].as_str().map(str::to_owned))
            .collect(),
        other => panic!("{path} is to be had: {other:?}"),
    }
}

fn points(client: &mut Client<'_>) {
    let there = names_of(client, "/v1/snapshots", "snapshots");
    let mut model = client.known();
    let stranger = there.iter().find(|name| !model.points.contains_key(*name));
    if let Some(name) = stranger {
        panic!("the snapshot {name} was removed or never asked for{}", model.story_of(&[name]));
    }
    for (name, point) in &mut model.points {
        let is_there = there.contains(name);
        assert!(is_there || !point.is_certain || point.may_be_gone, "the snapshot {name} is lost: {point:?}");
        (point.is_certain, point.may_be_gone, point.is_taken) = (true, false, false);
    }
    model.points.retain(|name, _| there.contains(name));
}

/// How many templates there are; one of two names is one.
fn templates(client: &mut Client<'_>) -> usize {
    let there = names_of(client, "/v1/templates", "templates");
    let Said::Yes(list) = client.call("GET", "/v1/templates", &Value::Null) else {
        panic!("templates are to be had");
    };
    let digests: BTreeSet<&str> =
        list["templates"].as_array().into_iter().flatten().filter_map(|one| one["digest"].as_str()).collect();
    let mut model = client.known();
    let stranger =
        there.iter().find(|name| !name.starts_with("default-") && !model.templates.contains_key(*name));
    assert!(stranger.is_none(), "the template {stranger:?} was removed or never asked for");
    let lost = model.templates.iter().find(|(name, is_certain)| **is_certain && !there.contains(*name));
    assert!(lost.is_none(), "the template {lost:?} is lost");
    model.templates =
        there.iter().filter(|name| !name.starts_with("default-")).map(|name| (name.clone(), true)).collect();
    digests.len()
}

fn quotas(client: &mut Client<'_>) {
    let quotas: BTreeMap<String, Vec<Option<u64>>> = client.known().quotas.clone();
    for (owner, possible) in quotas {
        let Said::Yes(told) = client.call("GET", &format!("/v1/owners/{owner}"), &Value::Null) else {
            panic!("{owner} is to be had");
        };
        let told = told["quota"]["agents"].as_u64();
        assert!(possible.contains(&told), "{owner} may have {told:?}, expected one of {possible:?}");
        client.known().quotas.insert(owner, vec![told]);
    }
}

/// What is reserved, against what those who live need.
fn room(client: &mut Client<'_>) -> Result<(), String> {
    let listed = list(client);
    let Said::Yes(told) = client.call("GET", "/v1/hosts", &Value::Null) else {
        return Err("hosts are to be had".to_owned());
    };
    let host = &told["hosts"][0];
    let forks = host["overcommit"]["forks"].as_f64().unwrap_or(1.0);
    let number = |value: &Value| value.as_u64().unwrap_or_default();
    let (mut agents, mut least, mut most, mut vcpus) = (0, 0, 0, 0);
    for agent in &listed {
        match agent["state"].as_str().unwrap_or_default() {
            "paused" => most += PAUSED_MIB,
            "stopped" | "failed" => {}
            _ => {
                let size = number(&agent["memory_mib"]);
                (agents, vcpus) = (agents + 1, vcpus + number(&agent["vcpus"]));
                least += share(size, forks);
                // One that was booted goes on from its own snapshot once it was paused to disk.
                most += if agent["origin"]["from"] == "boot" { size } else { share(size, forks) };
            }
        }
    }
    let reserved = &host["reserved"];
    let told = [number(&reserved["agents"]), number(&reserved["vcpus"]), number(&reserved["memory_mib"])];
    if told[0] == agents && told[1] == vcpus && (least..=most).contains(&told[2]) {
        return Ok(());
    }
    Err(format!(
        "agents, processors and MiB reserved: {told:?}, expected {agents}, {vcpus} and {least} to {most}"
    ))
}

/// What is reserved of a fork's memory.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "sizes are far below 2^53"
)]
fn share(size: u64, forks: f64) -> u64 {
    ((size as f64 / forks).round() as u64).max(1)
}

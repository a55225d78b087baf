//! The table of what clients do.
//!
//! An operation says to the model what may come of it before it asks, asks, and settles what it was told. What it is not told stays
//! in doubt until the next look.

use std::collections::BTreeSet;
use std::time::Duration;

use rand::RngExt as _;
use serde_json::{Value, json};

use crate::Memory;
use crate::client::{Client, Said};
use crate::host;
use crate::model::{Content, Known, Life, Pending, Point, restarts};
use crate::{habits, points, services, tasks};

/// One kind of thing that clients do.
#[derive(Clone, Copy)]
pub struct Operation {
    /// What it is called.
    pub name: &'static str,
    /// How often it is done, against the sum of all.
    pub weight: u32,
    /// Does it once.
    pub run: fn(&mut Client<'_>),
}

const fn operation(name: &'static str, weight: u32, run: fn(&mut Client<'_>)) -> Operation {
    Operation { name, weight, run }
}

/// Everything that clients do.
pub const OPERATIONS: &[Operation] = &[
    operation("create", 10, |client| create(client, false)),
    operation("boot", 1, |client| create(client, true)),
    operation("fork", 7, fork),
    operation("write", 10, write),
    operation("read", 6, read),
    operation("exec", 6, exec),
    operation("pause", 5, pause),
    operation("resume", 5, resume),
    operation("delete", 9, delete),
    operation("kill a VMM", 3, kill_vmm),
    operation("create and vanish", 2, vanish_in_create),
    operation("fork and vanish", 2, vanish_in_fork),
    operation("snapshot", 3, points::snapshot),
    operation("rewind", 2, points::rewind),
    operation("restore", 2, points::restore),
    operation("delete a snapshot", 2, points::delete),
    operation("build a template", 1, points::build_template),
    operation("delete a template", 1, points::delete_template),
    operation("set a quota", 4, set_quota),
    operation("submit a task", 4, tasks::submit),
    operation("wait for a task", 4, tasks::wait),
    operation("cancel a task", 1, tasks::cancel),
    operation("delete a task", 2, tasks::delete),
    operation("kill the VMM of a task", 1, tasks::kill_vmm),
    operation("label", 4, habits::label),
    operation("create with a key", 3, habits::create),
    operation("create a service", 1, services::create),
    operation("scale a service", 1, services::scale),
    operation("delete a service", 1, services::delete),
    operation("kill the VMM of a replica", 1, services::kill_vmm),
    operation("set the pool", 1, services::set_pool),
    operation("list", 3, list),
    operation("follow and never read", 1, follow),
];

/// Does one of `operations`.
pub fn one_of(operations: &[Operation], client: &mut Client<'_>) {
    let sum = operations.iter().map(|operation| operation.weight).sum();
    let mut roll = client.dice.random_range(0..sum);
    for operation in operations {
        match roll.checked_sub(operation.weight) {
            Some(rest) => roll = rest,
            None => return (operation.run)(client),
        }
    }
}

/// Whether no more agents are wanted; one goes instead.
pub(crate) fn is_crowded(client: &mut Client<'_>) -> bool {
    let crowded = client.known().agents.len() >= client.stage.most_agents;
    if crowded {
        delete(client);
    }
    crowded
}

/// Name and body of an agent that may be asked for.
pub(crate) fn wanted(client: &mut Client<'_>, booted: bool) -> (String, Value) {
    let name = format!("c{}", client.known().number());
    let restart = match client.dice.random_range(0..4) {
        0 => json!({ "when": "always" }),
        1 => json!({ "when": "on_failure", "max_restarts": 3 }),
        _ => json!({ "when": "never" }),
    };
    let mut body = json!({
        "name": name, "image": "base", "restart": restart,
        "labels": { "by": format!("client-{}", client.number) }, "owner": format!("team-{}", client.number % 3),
    });
    if body["restart"]["when"] != "never" && client.dice.random() {
        body["checkpoint"] = json!({ "every_s": 10, "keep": 2 });
    }
    if booted {
        body["memory_mib"] = client.stage.booted_mib.into();
    }
    (name, body)
}

fn create(client: &mut Client<'_>, booted: bool) {
    if is_crowded(client) {
        return;
    }
    let (name, body) = wanted(client, booted);
    born(client, &name, "/v1/agents", &body, BTreeSet::from([None]));
}

/// Asks for an agent called `name` that holds `content`.
pub(crate) fn born(
    client: &mut Client<'_>,
    name: &str,
    path: &str,
    body: &Value,
    content: BTreeSet<Content>,
) {
    client.known().pending.insert(name.to_owned(), Pending::Named { content: content.clone() });
    let said = client.call("POST", path, body);
    let mut model = client.known();
    match &said {
        Said::Yes(agent) => {
            assert_eq!((&agent["name"], &agent["state"]), (&json!(name), &json!("running")), "{agent}");
            model.pending.remove(name);
            let known = Known::running(agent, content);
            model.agents.insert(known.told.id.clone(), known);
        }
        Said::No(..) => {
            model.pending.remove(name);
            model.refused.insert(name.to_owned());
        }
        Said::Lost => {}
    }
    drop(model);
    if let Said::No(_, problem) = &said {
        client.bear_if_ending(name, problem);
    }
}

fn fork(client: &mut Client<'_>) {
    if is_crowded(client) {
        return;
    }
    let Some(parent) = client.take(|known| !known.may_be_gone && !known.life.contains(&Life::Ended)) else {
        return;
    };
    let (key, path, body) = begin_fork(client, &parent);
    let said = client.call("POST", &path, &body);
    if let Said::Yes(forked) = &said {
        let mut model = client.known();
        model.pending.remove(&key);
        for agent in forked["agents"].as_array().into_iter().flatten() {
            let known = Known::running(agent, parent.content.clone());
            model.agents.insert(known.told.id.clone(), known);
        }
        let failed = &forked["failed"];
        assert!(model.is_ending || *failed == json!([]), "{}: {failed}", parent.told.id);
    }
    if let Said::No(..) = &said {
        client.known().pending.remove(&key);
    }
    client.bear(&parent, &[Life::Running, Life::Paused], &said);
    client.give(&parent, |_| {});
}

/// The key of what may come of it, path and body.
fn begin_fork(client: &mut Client<'_>, parent: &Known) -> (String, String, Value) {
    let count = client.dice.random_range(1..=2);
    let mut model = client.known();
    let key = format!("forks-{}", model.number());
    let pending = Pending::ForkOf { id: parent.told.id.clone(), content: parent.content.clone() };
    model.pending.insert(key.clone(), pending);
    (key, format!("/v1/agents/{}/fork", parent.told.id), json!({ "count": count }))
}

/// Path and body of what leaves `value` in the agent `id`, or of what asks for what was left.
fn memory(client: &Client<'_>, id: &str, value: Content) -> (String, Value) {
    match (client.stage.memory, value) {
        (Memory::Evaluator, Some(value)) => {
            (format!("/v1/agents/{id}/eval"), json!({ "code": format!("x={value}") }))
        }
        (Memory::Evaluator, None) => (format!("/v1/agents/{id}/eval"), json!({ "code": "x" })),
        (Memory::File, value) => {
            let line = match value {
                Some(value) => format!("echo {value} > /root/x"),
                None => "cat /root/x 2>/dev/null || true".to_owned(),
            };
            (format!("/v1/agents/{id}/exec"), json!({ "argv": ["sh", "-c", line] }))
        }
    }
}

/// What `reply` to a question for it says was left.
fn left(reply: &Value) -> Content {
    let text = reply["value"].as_str().or_else(|| reply["stdout"].as_str());
    text.and_then(|text| text.trim().parse().ok())
}

/// Asks the agent `id` for what was left in it.
pub(crate) fn ask_content(client: &mut Client<'_>, id: &str) -> Result<Content, Said> {
    let (path, body) = memory(client, id, None);
    match client.call("POST", &path, &body) {
        Said::Yes(reply) => Ok(left(&reply)),
        other => Err(other),
    }
}

/// Whether an agent takes commands, as far as anybody knows.
pub(crate) fn may_run(known: &Known) -> bool {
    !known.may_be_gone && known.life.contains(&Life::Running)
}

fn write(client: &mut Client<'_>) {
    let Some(agent) = client.take(may_run) else { return };
    let value = client.known().number();
    let (path, body) = memory(client, &agent.told.id, Some(value));
    let said = client.call("POST", &path, &body);
    client.bear(&agent, &[Life::Running], &said);
    client.give(&agent, |known| {
        if let Said::Yes(_) = said {
            known.content.clear();
        }
        known.hold([Some(value)]);
    });
}

fn read(client: &mut Client<'_>) {
    let Some(agent) = client.take(may_run) else { return };
    match ask_content(client, &agent.told.id) {
        Ok(content) => {
            let story = || client.known().story_of(&[&agent.told.id, &agent.told.name]);
            assert!(agent.content.contains(&content), "{agent:?} holds {content:?}{}", story());
        }
        Err(said) => client.bear(&agent, &[Life::Running], &said),
    }
    client.give(&agent, |_| {});
}

fn exec(client: &mut Client<'_>) {
    let Some(agent) = client.take(may_run) else { return };
    let path = format!("/v1/agents/{}/exec", agent.told.id);
    let said = client.call("POST", &path, &json!({ "argv": ["true"] }));
    if let Said::Yes(reply) = &said {
        assert_eq!(reply["exit_code"], 0, "{reply}");
    }
    client.bear(&agent, &[Life::Running], &said);
    client.give(&agent, |_| {});
}

fn pause(client: &mut Client<'_>) {
    let Some(agent) = client.take(may_run) else { return };
    go(client, &agent, "pause", (Life::Running, Life::Paused));
}

fn resume(client: &mut Client<'_>) {
    let Some(agent) = client.take(|known| !known.may_be_gone && known.life.contains(&Life::Paused)) else {
        return;
    };
    go(client, &agent, "resume", (Life::Paused, Life::Running));
}

fn go(client: &mut Client<'_>, agent: &Known, verb: &str, (from, to): (Life, Life)) {
    let said = client.call("POST", &format!("/v1/agents/{}/{verb}", agent.told.id), &json!({}));
    client.bear(agent, &[from], &said);
    client.give(agent, |known| match &said {
        Said::Yes(agent) => {
            known.life = BTreeSet::from([to]);
            // It was killed before, if at all, and goes on all the same.
            known.was_killed = false;
            known.restarts = restarts(agent);
        }
        Said::No(..) | Said::Lost => drop(known.life.insert(to)),
    });
}

fn delete(client: &mut Client<'_>) {
    let Some(agent) = client.take(|known| !known.may_be_gone) else { return };
    let grace = [0, 0, 200][client.dice.random_range(0..3)];
    let said = client.call("DELETE", &format!("/v1/agents/{}?grace_ms={grace}", agent.told.id), &Value::Null);
    if let Said::Yes(_) = said {
        let mut model = client.known();
        model.agents.remove(&agent.told.id);
        model.removed.insert(agent.told.id);
        return;
    }
    client.bear(&agent, &[Life::Running, Life::Paused, Life::Ended], &said);
    client.give(&agent, |known| {
        known.may_be_gone = true;
        known.doubt_vmm();
    });
}

fn kill_vmm(client: &mut Client<'_>) {
    let Some(agent) = client.take(|known| known.is_certain(Life::Running)) else { return };
    let mut was_killed = false;
    if let Said::Yes(told) = client.call("GET", &format!("/v1/agents/{}", agent.told.id), &Value::Null)
        && let Some(pid) = told["vmm_pid"].as_i64().and_then(|pid| i32::try_from(pid).ok())
    {
        was_killed = host::kill_vmm(client.stage, pid);
        client.known().note(format!("client {} killed pid {pid} of {}", client.number, agent.told.id));
    }
    client.give(&agent, |known| {
        if was_killed {
            known.lose_vmm();
        }
    });
}

/// How long a client that vanishes waits.
fn a_moment(client: &mut Client<'_>) {
    let us = 1_u64 << client.dice.random_range(0..17);
    std::thread::sleep(Duration::from_micros(us));
}

fn vanish_in_create(client: &mut Client<'_>) {
    if is_crowded(client) {
        return;
    }
    let (name, body) = wanted(client, false);
    client.known().pending.insert(name, Pending::Named { content: BTreeSet::from([None]) });
    vanish(client, "/v1/agents", &body);
}

fn vanish_in_fork(client: &mut Client<'_>) {
    if is_crowded(client) {
        return;
    }
    let Some(parent) = client.take(may_run) else { return };
    let (_, path, body) = begin_fork(client, &parent);
    vanish(client, &path, &body);
    client.give(&parent, |_| {});
}

fn vanish(client: &mut Client<'_>, path: &str, body: &Value) {
    let Some(mut connection) = client.connect() else { return };
    let _ = connection.send("POST", path, &body.to_string());
    a_moment(client);
    let line = format!("client {} vanished from POST {path} {body}", client.number);
    client.known().note(line);
}

fn set_quota(client: &mut Client<'_>) {
    let (owner, agents) = (format!("idle-{}", client.number), client.dice.random_range(1..1_000_000));
    client.known().quotas.entry(owner.clone()).or_insert_with(|| vec![None]).push(Some(agents));
    let said = client.call("PUT", &format!("/v1/owners/{owner}"), &json!({ "agents": agents }));
    match said {
        Said::Yes(_) => drop(client.known().quotas.insert(owner, vec![Some(agents)])),
        Said::No(_, problem) => client.bear_if_ending(&owner, &problem),
        Said::Lost => {}
    }
}

fn list(client: &mut Client<'_>) {
    let removed = client.known().removed.clone();
    let Said::Yes(list) = client.call("GET", "/v1/agents?limit=1000", &Value::Null) else { return };
    for agent in list["agents"].as_array().into_iter().flatten() {
        let id = agent["id"].as_str().unwrap_or_default();
        assert!(!removed.contains(id), "{id} was removed and is listed");
    }
}

/// Follows the events and never reads one.
fn follow(client: &mut Client<'_>) {
    if let Some(mut connection) = client.connect()
        && connection.follow("/v1/events?after=0").is_ok()
    {
        client.held.push(connection);
    }
}

/// A snapshot that may be used, which is nobody else's until it is given back.
pub(crate) fn take_point(client: &mut Client<'_>, fits: impl Fn(&Point) -> bool) -> Option<(String, Point)> {
    use rand::seq::IndexedRandom as _;
    let mut model = client.known();
    let free = model.points.iter().filter(|(_, point)| !point.is_taken && !point.may_be_gone && fits(point));
    let names: Vec<String> = free.map(|(name, _)| name.clone()).collect();
    let name = names.choose(&mut client.dice)?.clone();
    let point = model.points.get_mut(&name)?;
    point.is_taken = true;
    Some((name, point.clone()))
}

//! Operations on snapshots and templates.

use serde_json::{Value, json};

use crate::client::{Client, Said};
use crate::model::{Life, Point, restarts};
use crate::operations::{born, may_run, take_point};

/// Takes a snapshot of an agent.
pub(crate) fn snapshot(client: &mut Client<'_>) {
    let Some(agent) = client.take(may_run) else { return };
    let name = format!("s{}", client.known().number());
    let point = Point {
        agent: agent.told.id.clone(),
        content: agent.content.clone(),
        is_certain: false,
        may_be_gone: false,
        is_taken: true,
    };
    client.known().points.insert(name.clone(), point);
    let path = format!("/v1/agents/{}/snapshots", agent.told.id);
    let said = client.call("POST", &path, &json!({ "name": name }));
    match &said {
        Said::Yes(_) => {
            if let Some(point) = client.known().points.get_mut(&name) {
                (point.is_certain, point.is_taken) = (true, false);
            }
        }
        Said::No(..) => drop(client.known().points.remove(&name)),
        Said::Lost => {}
    }
    client.bear(&agent, &[Life::Running], &said);
    client.give(&agent, |_| {});
}

fn give_point(client: &Client<'_>, name: &str) {
    if let Some(point) = client.known().points.get_mut(name) {
        point.is_taken = false;
    }
}

/// Puts an agent back to one of its snapshots.
pub(crate) fn rewind(client: &mut Client<'_>) {
    let Some((name, point)) = take_point(client, |point| point.is_certain) else { return };
    let of = |id: &str| id == point.agent;
    if let Some(agent) = client.take(|known| {
        of(&known.told.id) && !known.may_be_gone && !known.was_killed && !known.life.contains(&Life::Ended)
    }) {
        let path = format!("/v1/agents/{}/rewind", agent.told.id);
        let said = client.call("POST", &path, &json!({ "snapshot": name }));
        client.bear(&agent, &[Life::Running, Life::Paused], &said);
        client.give(&agent, |known| match &said {
            Said::Yes(agent) => {
                known.life = [Life::Running].into();
                known.go_back(&point.content);
                known.restarts = restarts(agent);
            }
            Said::No(..) => {}
            Said::Lost => {
                known.life.insert(Life::Running);
                known.hold(point.content.clone());
                known.doubt_vmm();
            }
        });
    }
    give_point(client, &name);
}

/// Makes an agent of a snapshot.
pub(crate) fn restore(client: &mut Client<'_>) {
    if client.known().agents.len() >= client.stage.most_agents {
        return;
    }
    let Some((snapshot, point)) = take_point(client, |point| point.is_certain) else { return };
    let name = format!("r{}", client.known().number());
    let path = format!("/v1/snapshots/{snapshot}/restore");
    born(client, &name, &path, &json!({ "name": name }), point.content);
    give_point(client, &snapshot);
}

/// Deletes a snapshot, unless something needs it.
pub(crate) fn delete(client: &mut Client<'_>) {
    let Some((name, point)) = take_point(client, |_| true) else { return };
    match client.call("DELETE", &format!("/v1/snapshots/{name}"), &Value::Null) {
        Said::Yes(_) => drop(client.known().points.remove(&name)),
        Said::No(409, _) => give_point(client, &name),
        Said::No(404, _) if !point.is_certain => drop(client.known().points.remove(&name)),
        Said::No(_, problem) => client.bear_if_ending(&name, &problem),
        Said::Lost => {
            if let Some(point) = client.known().points.get_mut(&name) {
                (point.may_be_gone, point.is_taken) = (true, false);
            }
        }
    }
}

/// Builds a template.
pub(crate) fn build_template(client: &mut Client<'_>) {
    let number = client.known().number();
    let name = format!("t{number}");
    client.known().templates.insert(name.clone(), false);
    // Each of another size, so that no two are the same on disk.
    let body = json!({ "name": name, "image": "base", "memory_mib": client.stage.booted_mib + 1 + number });
    match client.call("POST", "/v1/templates", &body) {
        Said::Yes(_) => drop(client.known().templates.insert(name, true)),
        Said::No(_, problem) => client.bear_if_ending(&name, &problem),
        Said::Lost => {}
    }
}

/// Deletes a template.
pub(crate) fn delete_template(client: &mut Client<'_>) {
    let Some(name) =
        client.known().templates.iter().find(|(_, certain)| **certain).map(|(name, _)| name.clone())
    else {
        return;
    };
    client.known().templates.insert(name.clone(), false);
    match client.call("DELETE", &format!("/v1/templates/{name}"), &Value::Null) {
        Said::Yes(_) => drop(client.known().templates.remove(&name)),
        // Agents may have been forked from it.
        Said::No(409, _) => drop(client.known().templates.insert(name, true)),
        Said::No(_, problem) => client.bear_if_ending(&name, &problem),
        Said::Lost => {}
    }
}

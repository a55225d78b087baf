//! Operations that use what every part of the API has: tags and keys.

use std::collections::BTreeSet;

use rand::RngExt as _;
use serde_json::{Value, json};

use crate::client::{Client, Said};
use crate::model::{Keyed, Known, Life, Pending};
use crate::operations::{is_crowded, may_run, wanted};

/// Requests with a key that are remembered, the newest ones.
const REMEMBERED: usize = 6;

/// Changes the labels of an agent, if it still is as it was seen.
pub(crate) fn label(client: &mut Client<'_>) {
    let Some(agent) = client.take(may_run) else { return };
    let path = format!("/v1/agents/{}", agent.told.id);
    let number = client.known().number().to_string();
    let (said, reply) = client.call_with("GET", &path, None, &Value::Null);
    let (Said::Yes(seen), Some(tag)) = (&said, reply.and_then(|reply| reply.etag)) else {
        client.bear(&agent, &[Life::Running], &said);
        return client.give(&agent, |_| {});
    };
    let mut labels = seen["labels"].clone();
    labels["n"] = number.clone().into();
    client.change(&agent, |known| known.labels.push(labels.clone()));
    let patch = json!({ "labels": { "n": number } });
    let (said, _) = client.call_with("PATCH", &path, Some(("if-match", &tag)), &patch);
    // It changed by itself meanwhile.
    let is_refused = matches!(said, Said::No(412, _));
    if !is_refused {
        client.bear(&agent, &[Life::Running], &said);
    }
    client.give(&agent, |known| match &said {
        Said::Yes(agent) => {
            assert_eq!(agent["labels"], labels, "{agent}");
            known.labels = vec![labels];
        }
        Said::No(..) => drop(known.labels.pop()),
        Said::Lost => {}
    });
}

/// Asks for an agent with a key, sometimes twice.
pub(crate) fn create(client: &mut Client<'_>) {
    if is_crowded(client) {
        return;
    }
    let (name, body) = wanted(client, false);
    let keyed = Keyed { key: format!("key-{name}"), name: name.clone(), body, reply: None };
    let content = BTreeSet::from([None]);
    client.known().pending.insert(name.clone(), Pending::Named { content });
    let known = send(client, keyed);
    if let Some(known) = known.filter(|known| known.reply.is_some() && client.dice.random()) {
        send(client, known);
    }
}

/// Sends a request with its key, for the first time or again, and remembers it; none when it was refused.
fn send(client: &mut Client<'_>, mut keyed: Keyed) -> Option<Keyed> {
    client.known().keyed.retain(|other| other.key != keyed.key);
    let header = Some(("idempotency-key", keyed.key.as_str()));
    let (said, reply) = client.call_with("POST", "/v1/agents", header, &keyed.body);
    let story = client.known().story_of(&[&keyed.name]);
    match (&said, reply) {
        (Said::Yes(agent), Some(reply)) => {
            assert_eq!((&agent["name"], &agent["state"]), (&json!(keyed.name), &json!("running")), "{agent}");
            if let Some(before) = &keyed.reply {
                assert!(
                    reply.is_replayed && *before == reply.body,
                    "{keyed:?} got another reply: {agent}{story}"
                );
            } else {
                let mut model = client.known();
                model.pending.remove(&keyed.name);
                let known = Known::running(agent, BTreeSet::from([None]));
                model.agents.insert(known.told.id.clone(), known);
            }
            keyed.reply = Some(reply.body);
        }
        (Said::No(_, problem), _) => {
            assert!(
                keyed.reply.is_none() || client.known().is_ending,
                "{keyed:?} is refused: {problem}{story}"
            );
            client.bear_if_ending(&keyed.name, problem);
            let mut model = client.known();
            if keyed.reply.is_none() && model.pending.remove(&keyed.name).is_some() {
                model.refused.insert(keyed.name);
                return None;
            }
        }
        _ => {}
    }
    let mut model = client.known();
    model.keyed.push(keyed.clone());
    let surplus = model.keyed.len().saturating_sub(REMEMBERED);
    // What nobody was told of is asked for again in any case.
    let mut left = surplus;
    model.keyed.retain(|one| {
        let goes = left > 0 && one.reply.is_some();
        left -= usize::from(goes);
        !goes
    });
    Some(keyed)
}

/// Sends every request with a key again: what came back comes back again, and what did not is carried out once.
///
/// # Panics
/// When it is not.
pub(crate) fn look(client: &mut Client<'_>) {
    let all = client.known().keyed.clone();
    for keyed in all {
        let is_new = keyed.reply.is_none();
        let sent = send(client, keyed);
        if let Some(sent) = sent.filter(|_| is_new) {
            send(client, sent);
        }
    }
}

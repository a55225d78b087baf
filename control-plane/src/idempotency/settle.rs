//! What the end of an earlier `arkd` cut off of requests that had a key.

use std::sync::Arc;
use std::time::Duration;

use ark_types::event::{Event, Stream};
use ark_types::idempotency::KeptReply;
use axum::http::header;
use serde::Serialize;

use crate::core::Core;
use crate::projection::Cut;
use crate::services::view;

/// Ends what is under way of requests that an earlier `arkd` had: nobody was told of the agents that they made, so those go,
/// and a snapshot that is whole, or a task or a service that is durable, is what was asked for. Call it when every agent that still lives is in the registry, and before
/// anybody is served.
pub async fn settle(core: &Arc<Core>) {
    let under_way = |core: &Core| -> Vec<(Stream, Cut)> {
        let projection = core.ledger.projection();
        projection.requests().under_way().map(|(stream, cut)| (stream.clone(), cut.clone())).collect()
    };
    for (stream, cut) in under_way(core) {
        tracing::warn!(%stream, made = ?cut.made, "a request was cut off by the end of an earlier arkd");
        let event = conclude(core, &stream, cut).await;
        // What the log does not take in now stays owed to it.
        let _ = core.ledger.record(stream, vec![event]).await;
    }
    // Whoever sends one of them again finds what is said of it here.
    core.ledger.caught_up().await;
}

async fn conclude(core: &Core, request: &Stream, cut: Cut) -> Event {
    for made in &cut.made {
        if let Some(id) = made.agent_id() {
            remove_agent(core, id).await;
        }
        let reply = snapshot_reply(core, request, &cut.request, made);
        let reply = reply.or_else(|| task_reply(core, &cut.request, made));
        if let Some(reply) = reply.or_else(|| service_reply(core, request, &cut.request, made)) {
            return Event::RequestAnswered { key: cut.key, reply };
        }
    }
    Event::RequestDropped {}
}

async fn remove_agent(core: &Core, id: &str) {
    // By its id alone: a name may be that of another.
    if let Ok(agent) = core.registry.find(id)
        && agent.id() == id
    {
        agent.remove(Duration::ZERO).await;
        core.consoles.forget(id);
    }
}

/// The reply that tells of the task `made`, if it is durable: then it is done, whether or not anybody was told of it.
fn task_reply(core: &Core, asked: &str, made: &Stream) -> Option<KeptReply> {
    let id = made.task_id()?;
    let spec = core.ledger.projection().tasks().get(id)?.spec.clone();
    created(asked, format!("/v1/tasks/{id}"), &spec.newborn())
}

/// The reply that tells of the service `made`, if it is to be and that `request` made it.
fn service_reply(core: &Core, request: &Stream, asked: &str, made: &Stream) -> Option<KeptReply> {
    let name = made.service_name()?;
    let service = view::made_by(core, &name, request.request_id()?)?;
    created(asked, format!("/v1/services/{name}"), &service)
}

/// The reply of what is at `location` now.
fn created(asked: &str, location: String, thing: &impl Serialize) -> Option<KeptReply> {
    let headers = [(header::CONTENT_TYPE, "application/json".to_owned()), (header::LOCATION, location)];
    Some(KeptReply {
        request: asked.to_owned(),
        status: 201,
        headers: headers.map(|(name, value)| (name.to_string(), value)).into(),
        body: serde_json::to_string(thing).ok()?,
    })
}

/// The reply that tells of the snapshot `made`, if it is there and that `request` made it.
fn snapshot_reply(core: &Core, request: &Stream, asked: &str, made: &Stream) -> Option<KeptReply> {
    let name = made.snapshot_name()?;
    let (_, record) = core.snapshots.find(name).ok()?;
    if record.request.as_deref() != request.request_id() {
        return None;
    }
    let snapshot = core.snapshots.describe(name).ok()?;
    created(asked, format!("/v1/snapshots/{name}"), &snapshot)
}

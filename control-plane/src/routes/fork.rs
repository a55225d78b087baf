//! `/v1/agents/{agent}/fork`, `pause`, `resume`, `receipt`: many from one, stillness, and proof of who is who.

use ark_types::agent::Agent;
use ark_types::problem::ProblemKind;
use ark_types::receipt::Receipt;
use ark_types::snapshot::{ForkAgent, Forked};
use axum::Json;
use axum::extract::{Path, State};

use super::Shared;
use crate::agent;
use crate::problems::Refusal;
use crate::telemetry::Source;

/// Forks a living agent, which goes on meanwhile and keeps its connections.
///
/// Every fork is told apart and checked before it is in the reply; one that fails a check is ended and listed with the
/// reason. Environment and secrets of the agent are not inherited, nor are its permissions, restart policy, limits, checkpoints
/// and health check: a fork has those that the request names.
#[utoipa::path(
    post, path = "/agents/{agent}/fork", tag = "agents",
    params(("agent" = String, Path, description = "Name or id of the agent")),
    request_body = ForkAgent,
    responses((status = OK, body = Forked, description = "At least one fork came to be")),
)]
pub(super) async fn fork_agent(
    State(core): State<Shared>,
    Path(agent): Path<String>,
    Json(request): Json<ForkAgent>,
) -> Result<Json<Forked>, Refusal> {
    let handle = core.registry.find(&agent)?;
    let attempt = core.telemetry.attempt(Source::Fork);
    let forked = agent::fork(&core, &handle, request).await;
    match &forked {
        Ok(Forked { agents, failed, .. }) => attempt.end_with(agents.len(), failed.len()),
        Err(_) => attempt.end(&forked),
    }
    Ok(Json(forked?))
}

/// Stands an agent still and brings its memory to disk: it outlasts its VMM and `arkd`.
#[utoipa::path(
    post, path = "/agents/{agent}/pause", tag = "agents",
    params(("agent" = String, Path, description = "Name or id of the agent")),
    responses((status = OK, body = Agent, description = "It is paused, durably")),
)]
pub(super) async fn pause_agent(
    State(core): State<Shared>,
    Path(agent): Path<String>,
) -> Result<Json<Agent>, Refusal> {
    let _busy = core.pool.busy();
    let handle = core.registry.find(&agent)?;
    Ok(Json(agent::pause(&core, &handle).await?))
}

/// Lets a paused agent go on, with the right time; one that outlasted its VMM is restored and checked like a fork.
#[utoipa::path(
    post, path = "/agents/{agent}/resume", tag = "agents",
    params(("agent" = String, Path, description = "Name or id of the agent")),
    responses((status = OK, body = Agent, description = "It runs")),
)]
pub(super) async fn resume_agent(
    State(core): State<Shared>,
    Path(agent): Path<String>,
) -> Result<Json<Agent>, Refusal> {
    let handle = core.registry.find(&agent)?;
    Ok(Json(agent::resume(&core, &handle).await?))
}

/// What a restored agent was asked, what it answered, and what the host made of it.
#[utoipa::path(
    get, path = "/agents/{agent}/receipt", tag = "agents",
    params(("agent" = String, Path, description = "Name or id of the agent")),
    responses((status = OK, body = Receipt, description = "The receipt of its last restore")),
)]
pub(super) async fn receipt(
    State(core): State<Shared>,
    Path(agent): Path<String>,
) -> Result<Json<Receipt>, Refusal> {
    let handle = core.registry.find(&agent)?;
    handle.receipt().map(Json).ok_or_else(|| {
        let detail = format!("the agent {} was booted, not forked, so nothing was checked", handle.name());
        Refusal::new(ProblemKind::NoReceipt, detail)
    })
}

//! `/v1/agents`: create, list, inspect, delete.

use std::collections::HashSet;
use std::time::Duration;

use ark_types::agent::{Agent, AgentList, AgentName, AgentState, CreateAgent, MAX_AGENTS};
use ark_types::image::ImageName;
use ark_types::label::{LabelPatch, Owner};
use ark_types::problem::ProblemKind;
use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{AppendHeaders, IntoResponse};
use serde::Deserialize;
use utoipa::IntoParams;

use super::Shared;
use super::paging::{Paging, selector};
use crate::agent;
use crate::problems::Refusal;
use crate::projection::{AgentFilter, place};
use crate::services::{refuse_own_keys, refuse_own_labels};
use crate::spawn::spawn;

/// Grace of a deletion that names none.
const DEFAULT_GRACE_MS: u64 = 2000;
/// Longest grace.
const MAX_GRACE_MS: u64 = 600_000;

/// Creates an agent and waits until its guest takes commands.
///
/// It is forked from the template that is named, or from the image's own one when it is of default size and not `cold`;
/// else it is booted.
///
/// Where there is no room for it the request waits, as long as it says; `GET /v1/queue` shows where it stands.
///
/// A client that disconnects before the reply takes its request back: the agent is removed.
#[utoipa::path(
    post, path = "/agents", tag = "agents",
    request_body = CreateAgent,
    responses((
        status = CREATED, body = Agent, description = "It runs",
        headers(("location" = String, description = "Where it is")),
    )),
)]
pub(super) async fn create_agent(
    State(core): State<Shared>,
    Json(request): Json<CreateAgent>,
) -> Result<impl IntoResponse, Refusal> {
    refuse_own_labels(&request.labels)?;
    let agent = spawn(&core, request).await?;
    let location = format!("/v1/agents/{}", agent.id);
    Ok((StatusCode::CREATED, AppendHeaders([(header::LOCATION, location)]), Json(agent)))
}

/// Which agents.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Listing {
    /// Also those that were removed, as far as they are remembered; false when absent.
    #[serde(default)]
    all: bool,
    /// In this state.
    state: Option<AgentState>,
    /// Of this image.
    #[param(value_type = Option<String>)]
    image: Option<ImageName>,
    /// Forked from this template.
    #[param(value_type = Option<String>)]
    template: Option<AgentName>,
    /// Belonging to this owner.
    #[param(value_type = Option<String>)]
    owner: Option<Owner>,
    /// With these labels: `app=x,tier!=db,env in (a,b),key,!key`, as in Kubernetes.
    labels: Option<String>,
    /// At most so many, 1 to 1000; 1000 when absent.
    limit: Option<usize>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

/// Agents, oldest first: the living ones, and those that ended by themselves and were not deleted yet.
#[utoipa::path(
    get, path = "/agents", tag = "agents", params(Listing),
    responses((status = OK, body = AgentList, description = "Agents")),
)]
pub(super) async fn list_agents(
    State(core): State<Shared>,
    Query(listing): Query<Listing>,
) -> Result<Json<AgentList>, Refusal> {
    let Listing { all, state, image, template, owner, labels, limit, cursor } = listing;
    let paging = Paging::new(limit, cursor.as_deref(), MAX_AGENTS, "agents")?;
    let filter = AgentFilter { state, image, template, owner, labels: selector(labels)? };
    let after = paging.after.as_ref();
    let here = core.registry.all();
    let agents = here.iter().map(agent::Handle::agent);
    let mut agents: Vec<Agent> = agents
        .filter(|agent| filter.lets(agent) && after.is_none_or(|after| place(agent) > *after))
        .collect();
    if all {
        core.ledger.whole().await?;
        core.ledger.caught_up().await;
        let here: HashSet<&str> = here.iter().map(agent::Handle::id).collect();
        let projection = core.ledger.projection();
        let known = projection.agents().select(&filter, after);
        agents.extend(known.filter(|agent| !here.contains(agent.id.as_str())).take(paging.reach()).cloned());
    }
    agents.sort_by_cached_key(place);
    let (agents, next_cursor) = paging.page(agents, place);
    Ok(Json(AgentList { agents, next_cursor }))
}

/// One agent. One that was removed is remembered for a while, by its id.
#[utoipa::path(
    get, path = "/agents/{agent}", tag = "agents",
    params(("agent" = String, Path, description = "Name or id of the agent")),
    responses((status = OK, body = Agent, description = "The agent")),
)]
pub(super) async fn inspect_agent(
    State(core): State<Shared>,
    Path(agent): Path<String>,
) -> Result<Json<Agent>, Refusal> {
    match core.registry.find(&agent) {
        Ok(handle) => Ok(Json(handle.agent())),
        Err(error) => {
            core.ledger.caught_up().await;
            // Its name may be another's by now, so what was removed is known by its id alone.
            core.ledger.agent(&agent).await?.map(Json).ok_or_else(|| error.into())
        }
    }
}

/// Changes an agent's labels, for good: a JSON merge patch.
#[utoipa::path(
    patch, path = "/agents/{agent}", tag = "agents",
    params(("agent" = String, Path, description = "Name or id of the agent")),
    request_body(content((LabelPatch = "application/merge-patch+json"), (LabelPatch = "application/json"))),
    responses((status = OK, body = Agent, description = "The agent, with its labels")),
)]
pub(super) async fn label_agent(
    State(core): State<Shared>,
    Path(agent): Path<String>,
    Json(patch): Json<LabelPatch>,
) -> Result<Json<Agent>, Refusal> {
    refuse_own_keys(patch.labels.keys())?;
    let handle = core.registry.find(&agent)?;
    // Whoever asked may leave: what is durable counts.
    let labelling = tokio::spawn(async move { handle.label(&core, &patch).await });
    let interrupted =
        |_| Refusal::new(ProblemKind::Internal, "the change of the labels was interrupted: try again");
    Ok(Json(labelling.await.map_err(interrupted)??))
}

/// How to delete.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Deletion {
    /// Time the guest has to power off, milliseconds, at most 600000; 2000 when absent; 0 kills it at once.
    grace_ms: Option<u64>,
}

/// Ends an agent, whatever its state, and removes everything it had on the host.
#[utoipa::path(
    delete, path = "/agents/{agent}", tag = "agents",
    params(("agent" = String, Path, description = "Name or id of the agent"), Deletion),
    responses((status = NO_CONTENT, description = "It is gone")),
)]
pub(super) async fn delete_agent(
    State(core): State<Shared>,
    Path(agent): Path<String>,
    Query(Deletion { grace_ms }): Query<Deletion>,
) -> Result<StatusCode, Refusal> {
    let grace_ms = grace_ms.unwrap_or(DEFAULT_GRACE_MS);
    if grace_ms > MAX_GRACE_MS {
        let detail = format!("a grace of {grace_ms} ms is too long: at most {MAX_GRACE_MS}");
        return Err(Refusal::new(ProblemKind::InvalidValue, detail));
    }
    let handle = core.registry.find(&agent)?;
    handle.remove(Duration::from_millis(grace_ms)).await;
    core.consoles.forget(handle.id());
    core.ledger.settled(&handle.stream()).map_err(|error| {
        let Refusal(mut problem) = error.into();
        problem.detail = format!(
            "the agent {} is removed, but that is not recorded yet: {}",
            handle.name(),
            problem.detail
        );
        Refusal(problem)
    })?;
    Ok(StatusCode::NO_CONTENT)
}

//! `/v1/agents`: create, list, inspect, delete.

use std::time::Duration;

use ark_types::agent::{Agent, AgentList, CreateAgent, DEFAULT_MEMORY_MIB, DEFAULT_VCPUS, Origin};
use ark_types::problem::ProblemKind;
use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{AppendHeaders, IntoResponse};
use serde::Deserialize;
use utoipa::IntoParams;

use super::Shared;
use crate::admission::{self, Source, admit};
use crate::agent::{self, Birth};
use crate::images::Image;
use crate::problems::Refusal;
use crate::templates::{self, Found, TemplateError};

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
    let _busy = core.pool.busy();
    let agent = match admit(&core, &request).await? {
        Source::Image(image) => boot(&core, request, image).await?,
        Source::Template(name) => {
            let found = templates::by_name(&core, &name).await?;
            fork_of(&core, request, found).await?
        }
        Source::Default(image) => match templates::default_for(&core, &image.manifest.name).await {
            Ok(found) => fork_of(&core, request, found).await?,
            // For want of room there is no boot either.
            Err(TemplateError::Agent(refusal)) if refusal.0.kind.retry_after_s().is_some() => {
                return Err(refusal);
            }
            // An agent that can be had by a boot is not refused for want of a template.
            Err(error) => {
                tracing::warn!(image = %image.manifest.name, %error, "the image's template cannot be built; the agent is booted");
                boot(&core, request, image).await?
            }
        },
    };
    let location = format!("/v1/agents/{}", agent.id);
    Ok((StatusCode::CREATED, AppendHeaders([(header::LOCATION, location)]), Json(agent)))
}

async fn boot(core: &Shared, request: CreateAgent, image: Image) -> Result<Agent, Refusal> {
    let size = (request.vcpus.unwrap_or(DEFAULT_VCPUS), request.memory_mib.unwrap_or(DEFAULT_MEMORY_MIB));
    let ask = admission::ask(&request, core.scheduler.config().booted(size));
    let grant = admission::room_to_boot(core, ask, size).await?;
    Ok(agent::create(core, request, image, grant).await??)
}

async fn fork_of(core: &Shared, request: CreateAgent, found: Found) -> Result<Agent, Refusal> {
    let Found { hold, template, .. } = found;
    let size = (hold.manifest().vcpus, hold.manifest().memory_mib);
    let ask = admission::ask(&request, core.scheduler.config().forked(size));
    let grant = core.scheduler.admit(ask).await?;
    core.templates.used(&hold);
    core.pool.used(&hold);
    let CreateAgent { name, env, auto_remove, owner, .. } = request;
    let origin = Origin::Template { name: template.name };
    agent::from_template(core, Birth { hold, origin, name, env, auto_remove, owner, grant }).await
}

/// Agents, oldest first: the living ones, and those that ended by themselves and were not deleted yet.
#[utoipa::path(get, path = "/agents", tag = "agents", responses((status = OK, body = AgentList, description = "Agents")))]
pub(super) async fn list_agents(State(core): State<Shared>) -> Json<AgentList> {
    Json(AgentList { agents: core.registry.all().iter().map(agent::Handle::agent).collect() })
}

/// One agent.
#[utoipa::path(
    get, path = "/agents/{agent}", tag = "agents",
    params(("agent" = String, Path, description = "Name or id of the agent")),
    responses((status = OK, body = Agent, description = "The agent")),
)]
pub(super) async fn inspect_agent(
    State(core): State<Shared>,
    Path(agent): Path<String>,
) -> Result<Json<Agent>, Refusal> {
    Ok(Json(core.registry.find(&agent)?.agent()))
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
    core.registry.find(&agent)?.remove(Duration::from_millis(grace_ms)).await;
    Ok(StatusCode::NO_CONTENT)
}

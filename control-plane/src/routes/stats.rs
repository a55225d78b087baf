//! `/v1/stats`, `/v1/agents/{agent}/stats` and `/metrics`: what agents and `arkd` use, and what happened.

use ark_types::problem::ProblemKind;
use ark_types::stats::{AgentStats, StatsList};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::header;
use axum::response::IntoResponse;

use super::Shared;
use crate::problems::Refusal;
use crate::stats::{self, FRESH};
use crate::telemetry::{CONTENT_TYPE, scrape};

/// What the living agents use: processor time, memory, devices. Looked at no longer than half a second ago.
#[utoipa::path(
    get, path = "/stats", tag = "host",
    responses((status = OK, body = StatsList, description = "Oldest agent first, at most 1,000")),
)]
pub(super) async fn all_stats(State(core): State<Shared>) -> Json<StatsList> {
    Json(StatsList::clone(&*core.stats.all(&core.registry, FRESH).await))
}

/// What one agent uses now.
#[utoipa::path(
    get, path = "/agents/{agent}/stats", tag = "agents",
    params(("agent" = String, Path, description = "Name or id of the agent")),
    responses((status = OK, body = AgentStats, description = "What it uses")),
)]
pub(super) async fn agent_stats(
    State(core): State<Shared>,
    Path(agent): Path<String>,
) -> Result<Json<AgentStats>, Refusal> {
    let agent = core.registry.find(&agent)?;
    Ok(Json(stats::of(&agent).await))
}

/// Everything that is measured, for Prometheus.
pub(super) async fn metrics(State(core): State<Shared>) -> Result<impl IntoResponse, Refusal> {
    let text = scrape(&core).await.map_err(|e| {
        Refusal::new(ProblemKind::Internal, format!("the metrics cannot be written: {e}; report this"))
    })?;
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], text))
}

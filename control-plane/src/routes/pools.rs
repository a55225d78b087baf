//! `/v1/pools`: how many forks of each template stand ready.

use ark_types::agent::AgentName;
use ark_types::pool::{Pool, PoolList, PoolPolicy};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;

use super::Shared;
use crate::pool::policy;
use crate::problems::Refusal;
use crate::templates::TemplateError;

/// Pools that have a policy or whose template is in use, by template.
#[utoipa::path(
    get, path = "/pools", tag = "pools",
    responses((status = OK, body = PoolList, description = "Pools")),
)]
pub(super) async fn list_pools(State(core): State<Shared>) -> Json<PoolList> {
    Json(PoolList { pools: core.pool.list() })
}

/// The pool of one template.
#[utoipa::path(
    get, path = "/pools/{template}", tag = "pools",
    params(("template" = String, Path, description = "Name of the template")),
    responses((status = OK, body = Pool, description = "The pool")),
)]
pub(super) async fn inspect_pool(
    State(core): State<Shared>,
    Path(template): Path<String>,
) -> Result<Json<Pool>, Refusal> {
    Ok(Json(core.pool.describe(&known(&core, &template)?)))
}

/// Sets how many standbys of a template there are to be, for good, in place of what was set before.
///
/// Their number follows the demand: it grows at once, and shrinks slowly when it is calm. What standbys have reserved any
/// request gets that needs it. With its template the policy goes, too.
#[utoipa::path(
    put, path = "/pools/{template}", tag = "pools",
    params(("template" = String, Path, description = "Name of the template")),
    request_body = PoolPolicy,
    responses((status = OK, body = Pool, description = "The pool")),
)]
pub(super) async fn set_pool(
    State(core): State<Shared>,
    Path(template): Path<String>,
    Json(wanted): Json<PoolPolicy>,
) -> Result<Json<Pool>, Refusal> {
    let template = named(&template)?;
    policy::set(&core, &template, wanted).await?;
    Ok(Json(core.pool.describe(&template)))
}

/// Lets a template have the standbys again that every one in use has.
#[utoipa::path(
    delete, path = "/pools/{template}", tag = "pools",
    params(("template" = String, Path, description = "Name of the template")),
    responses((status = NO_CONTENT, description = "It has no policy")),
)]
pub(super) async fn delete_pool(
    State(core): State<Shared>,
    Path(template): Path<String>,
) -> Result<StatusCode, Refusal> {
    policy::remove(&core, &known(&core, &template)?).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn named(template: &str) -> Result<AgentName, TemplateError> {
    template.parse().map_err(|_| TemplateError::NotFound(template.to_owned()))
}

/// The name of a template that is there or has a policy.
fn known(core: &Shared, template: &str) -> Result<AgentName, TemplateError> {
    let name = named(template)?;
    if !core.pool.has_policy(&name) {
        core.templates.describe(template)?;
    }
    Ok(name)
}

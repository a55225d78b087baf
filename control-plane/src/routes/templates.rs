//! `/v1/templates`: build, list, inspect, delete.

use ark_types::template::{CreateTemplate, Template, TemplateList};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{AppendHeaders, IntoResponse};

use super::Shared;
use crate::problems::Refusal;
use crate::templates;

/// Builds a template and waits until it is on disk. One that is there already, unchanged, costs nothing.
///
/// A client that disconnects before the reply takes its request back.
#[utoipa::path(
    post, path = "/templates", tag = "templates",
    request_body = CreateTemplate,
    responses((
        status = CREATED, body = Template, description = "Agents can be forked from it",
        headers(("location" = String, description = "Where it is")),
    )),
)]
pub(super) async fn create_template(
    State(core): State<Shared>,
    Json(request): Json<CreateTemplate>,
) -> Result<impl IntoResponse, Refusal> {
    let template = templates::build(&core, request).await?;
    let location = format!("/v1/templates/{}", template.name);
    Ok((StatusCode::CREATED, AppendHeaders([(header::LOCATION, location)]), Json(template)))
}

/// Templates, by name.
#[utoipa::path(
    get, path = "/templates", tag = "templates",
    responses((status = OK, body = TemplateList, description = "Templates")),
)]
pub(super) async fn list_templates(State(core): State<Shared>) -> Json<TemplateList> {
    Json(TemplateList { templates: core.templates.list() })
}

/// One template.
#[utoipa::path(
    get, path = "/templates/{template}", tag = "templates",
    params(("template" = String, Path, description = "Name of the template")),
    responses((status = OK, body = Template, description = "The template")),
)]
pub(super) async fn inspect_template(
    State(core): State<Shared>,
    Path(template): Path<String>,
) -> Result<Json<Template>, Refusal> {
    Ok(Json(core.templates.describe(&template)?))
}

/// Deletes a template that no living agent was forked from. Snapshots that are diffs over it stay usable: its memory is kept
/// until they are gone.
#[utoipa::path(
    delete, path = "/templates/{template}", tag = "templates",
    params(("template" = String, Path, description = "Name of the template")),
    responses((status = NO_CONTENT, description = "It is gone")),
)]
pub(super) async fn delete_template(
    State(core): State<Shared>,
    Path(template): Path<String>,
) -> Result<StatusCode, Refusal> {
    templates::remove(&core, &template).await?;
    Ok(StatusCode::NO_CONTENT)
}

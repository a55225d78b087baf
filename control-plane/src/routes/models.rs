//! `/v1/models`: list, inspect, add, load, remove.

use std::time::Duration;

use ark_types::model::{Model, ModelList, ModelName};
use ark_types::plain::plain;
use axum::Json;
use axum::body::{Body, BodyDataStream};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use futures_util::StreamExt as _;
use serde::Deserialize;
use tokio::time::timeout;
use utoipa::IntoParams;

use super::Shared;
use crate::models::{self, Announced, ModelError, Upload};
use crate::problems::Refusal;

/// How long the next bytes of an upload may be awaited.
const STALL: Duration = Duration::from_secs(60);
/// How long the rest of an upload that failed is read, so that the client gets to read why.
const DRAIN: Duration = Duration::from_secs(5);

/// How a model is to be served.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Serving {
    /// Longest prompt and reply together, tokens; what it was trained for when absent, at most 4096.
    context: Option<u64>,
}

/// Models, by name, in the form that `OpenAI` clients read.
#[utoipa::path(
    get, path = "/models", tag = "models",
    responses((status = OK, body = ModelList, description = "Models")),
)]
pub(super) async fn list_models(State(core): State<Shared>) -> Result<Json<ModelList>, Refusal> {
    Ok(Json(models::list(&core).await?))
}

/// One model.
#[utoipa::path(
    get, path = "/models/{model}", tag = "models",
    params(("model" = String, Path, description = "Name of the model")),
    responses((status = OK, body = Model, description = "What is known of it")),
)]
pub(super) async fn inspect_model(
    State(core): State<Shared>,
    Path(model): Path<String>,
) -> Result<Json<Model>, Refusal> {
    Ok(Json(models::describe(&core, &model).await?))
}

/// Adds a model: the body is its GGUF file. It is there once it was checked as a whole; an upload that breaks leaves nothing.
///
/// The same file again changes nothing. Another one in its place has to wait until that was removed.
#[utoipa::path(
    put, path = "/models/{model}", tag = "models",
    params(("model" = String, Path, description = "Name of the model"), Serving),
    request_body(content = Vec<u8>, content_type = "application/octet-stream", description = "The file"),
    responses(
        (status = CREATED, body = Model, description = "It was added"),
        (status = OK, body = Model, description = "It was there already"),
    ),
)]
pub(super) async fn add_model(
    State(core): State<Shared>,
    Path(model): Path<String>,
    Query(Serving { context }): Query<Serving>,
    headers: HeaderMap,
    body: Body,
) -> Result<(StatusCode, Json<Model>), Refusal> {
    let name: ModelName = model.parse().map_err(ModelError::Name)?;
    let length = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    let mut body = body.into_data_stream();
    let announced = Announced { name, context, bytes: length };
    let added = match models::begin(&core, announced).await {
        Ok(upload) => pass_on(upload, &mut body).await,
        Err(error) => Err(error),
    };
    match added {
        Ok(is_new) => {
            let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
            Ok((status, Json(models::describe(&core, &model).await?)))
        }
        Err(error) => {
            let _ = timeout(DRAIN, async { while let Some(Ok(_)) = body.next().await {} }).await;
            Err(error.into())
        }
    }
}

/// Passes on the file; whether that made a model which was not there before.
async fn pass_on(upload: Upload<'_>, body: &mut BodyDataStream) -> Result<bool, ModelError> {
    let why = loop {
        let next = tokio::select! {
            next = timeout(STALL, body.next()) => next,
            () = upload.refused() => return upload.finish().await,
        };
        match next {
            Ok(None) => return upload.finish().await,
            Ok(Some(Ok(bytes))) => upload.send(bytes).await,
            Ok(Some(Err(error))) => break plain(&error),
            Err(_) => break format!("nothing came for {} s", STALL.as_secs()),
        }
    };
    Err(upload.give_up(why).await)
}

/// Has a model be served, as its first call would: makes its template and its service, `model-<name>`, unless they are there.
///
/// Loading goes on when the client leaves.
#[utoipa::path(
    post, path = "/models/{model}/load", tag = "models",
    params(("model" = String, Path, description = "Name of the model")),
    responses((status = OK, body = Model, description = "Its service is there; replicas of it come up or are ready")),
)]
pub(super) async fn load_model(
    State(core): State<Shared>,
    Path(model): Path<String>,
) -> Result<Json<Model>, Refusal> {
    let known = models::describe(&core, &model).await?;
    models::ensure_served(&core, &known.id).await?;
    Ok(Json(models::describe(&core, &model).await?))
}

/// Removes a model, its service and its template. One that comes with the release stays, and so does one that agents need that
/// are not its service's.
#[utoipa::path(
    delete, path = "/models/{model}", tag = "models",
    params(("model" = String, Path, description = "Name of the model")),
    responses((status = NO_CONTENT, description = "It is gone")),
)]
pub(super) async fn delete_model(
    State(core): State<Shared>,
    Path(model): Path<String>,
) -> Result<StatusCode, Refusal> {
    models::remove(&core, &model).await?;
    Ok(StatusCode::NO_CONTENT)
}

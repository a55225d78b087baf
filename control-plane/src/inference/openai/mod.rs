//! The routes that `OpenAI` clients know, for the host's API and for agents.

mod ask;
mod reply;

use std::sync::Arc;

use ark_types::label::Owner;
use ark_types::model::{Model, ModelList};
use ark_types::openai::{
    ARK_OWNER, ARK_PRIORITY, ChatRequest, Completion, CompletionRequest, EmbeddingList, EmbeddingRequest,
    MAX_REQUEST,
};
use ark_types::problem::ProblemKind;
use ark_types::scheduling::PRIORITIES;
use axum::body::{Body, to_bytes};
use axum::extract::{FromRequestParts, Path, State};
use axum::http::HeaderMap;
use axum::http::request::Parts;
use axum::middleware::from_fn;
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use serde::de::DeserializeOwned;

use super::call::{Call, Telling};
use super::{Caller, Failure};
use crate::core::Core;
use crate::problems::translate;
use ask::Asking;

type Shared = Arc<Core>;

/// The routes for `caller`, wherever its requests come from.
pub(crate) fn router(core: Arc<Core>, caller: Caller) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(completions))
        .route("/v1/embeddings", post(embeddings))
        .route("/v1/models", get(models))
        .route("/v1/models/{model}", get(model))
        .layer(Extension(caller))
        .layer(from_fn(translate))
        .with_state(core)
}

/// Whom a route serves: who the connection is of, or a client of the host, which says for which owner.
impl FromRequestParts<Shared> for Caller {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _core: &Shared) -> Result<Self, Failure> {
        match parts.extensions.get::<Self>() {
            Some(caller) => Ok(caller.clone()),
            None => host(&parts.headers),
        }
    }
}

fn host(headers: &HeaderMap) -> Result<Caller, Failure> {
    let bad = |detail: String| Failure::refused(ProblemKind::BadRequest, detail);
    let owner = match headers.get(ARK_OWNER) {
        None => Owner::default(),
        Some(value) => {
            let text = value.to_str().unwrap_or_default();
            text.parse().map_err(|error| bad(format!("the header {ARK_OWNER}: {error}")))?
        }
    };
    let priority = match headers.get(ARK_PRIORITY) {
        None => 0,
        Some(value) => value
            .to_str()
            .ok()
            .and_then(|text| text.parse().ok())
            .filter(|priority| PRIORITIES.contains(priority))
            .ok_or_else(|| {
                let (least, most) = (PRIORITIES.start(), PRIORITIES.end());
                bad(format!("the header {ARK_PRIORITY} is no priority: send a number from {least} to {most}"))
            })?,
    };
    Ok(Caller::host(owner, priority))
}

/// What a request asks for.
async fn read<T: DeserializeOwned>(body: Body) -> Result<T, Failure> {
    let bytes = to_bytes(body, MAX_REQUEST).await.map_err(|_| {
        let detail = format!("the body has more than {MAX_REQUEST} bytes, or broke off: send less");
        Failure::refused(ProblemKind::TooLarge, detail)
    })?;
    serde_json::from_slice(&bytes).map_err(|error| {
        Failure::refused(ProblemKind::BadRequest, format!("the body is not what this takes: {error}"))
    })
}

/// Has a model reply to a conversation.
///
/// With `stream`, the reply comes as it is said, as server-sent events of `chat.completion.chunk`, the last one `[DONE]`. What
/// fails then is told in an event with an `error`. Names that are not known here are ignored.
#[utoipa::path(
    post, path = "/chat/completions", tag = "inference",
    request_body = ChatRequest,
    responses((
        status = OK, description = "The reply",
        content((Completion = "application/json"), (String = "text/event-stream")),
    )),
)]
pub(crate) async fn chat_completions(
    State(core): State<Shared>,
    caller: Caller,
    body: Body,
) -> Result<Response, Failure> {
    let asking = Asking::chat(read::<ChatRequest>(body).await?)?;
    say(&core, &caller, asking).await
}

/// Has a model go on with a text; streams as chats do.
#[utoipa::path(
    post, path = "/completions", tag = "inference",
    request_body = CompletionRequest,
    responses((
        status = OK, description = "The reply",
        content((Completion = "application/json"), (String = "text/event-stream")),
    )),
)]
pub(crate) async fn completions(
    State(core): State<Shared>,
    caller: Caller,
    body: Body,
) -> Result<Response, Failure> {
    let asking = Asking::completion(read::<CompletionRequest>(body).await?)?;
    say(&core, &caller, asking).await
}

async fn say(core: &Shared, caller: &Caller, asking: Asking) -> Result<Response, Failure> {
    let Asking { tool, arguments, form } = asking;
    let telling = if form.is_stream { Telling::Streamed } else { Telling::Whole };
    let call = Call::begin(core, caller, tool, arguments, telling).await?;
    if form.is_stream { reply::streamed(call, form).await } else { reply::whole(call, form).await }
}

/// Has a model give vectors to texts.
#[utoipa::path(
    post, path = "/embeddings", tag = "inference",
    request_body = EmbeddingRequest,
    responses((status = OK, body = EmbeddingList, description = "A vector for each text")),
)]
pub(crate) async fn embeddings(
    State(core): State<Shared>,
    caller: Caller,
    body: Body,
) -> Result<Json<EmbeddingList>, Failure> {
    let request: EmbeddingRequest = read(body).await?;
    let (format, dimensions) = (ask::vectors(request.encoding_format.as_deref())?, request.dimensions);
    let (tool, arguments) = ask::embedding(request);
    let call = Call::begin(&core, &caller, tool, arguments, Telling::Whole).await?;
    Ok(Json(reply::embedded(call, format, dimensions).await?))
}

/// One of the models that the caller may use.
async fn model(
    State(core): State<Shared>,
    caller: Caller,
    Path(name): Path<String>,
) -> Result<Json<Model>, Failure> {
    let found = caller.models(&core).await?.into_iter().find(|model| model.id.as_ref() == name);
    found.map(Json).ok_or_else(|| {
        let shown: String = name.chars().take(64).collect();
        let detail = format!("there is no model {shown:?} that may be used here: GET /v1/models lists them");
        Failure::refused(ProblemKind::ModelNotFound, detail)
    })
}

/// The models that the caller may use.
async fn models(State(core): State<Shared>, caller: Caller) -> Result<Json<ModelList>, Failure> {
    Ok(Json(ModelList::new(caller.models(&core).await?)))
}

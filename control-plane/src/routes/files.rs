//! `/v1/agents/{agent}/files`: a guest's files, streamed.

use std::time::Duration;

use ark_types::files::{FileList, FileStat};
use ark_types::plain::plain;
use ark_types::problem::ProblemKind;
use axum::Json;
use axum::body::{Body, BodyDataStream};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use futures_util::{StreamExt as _, stream};
use serde::Deserialize;
use utoipa::IntoParams;

use super::Shared;
use crate::guest::{self, Download, GuestFailure, Upload};
use crate::problems::Refusal;
use crate::validate::{check_path, parse_mode};

/// Header of a download that carries the file's permission bits, octal.
const MODE_HEADER: &str = "x-ark-mode";
/// Mode of an upload that names none.
const DEFAULT_MODE: u32 = 0o644;
/// How long the rest of an upload that failed is read, so that the client gets to read why.
const DRAIN: Duration = Duration::from_secs(5);

/// Which file.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Which {
    /// Absolute path in the agent.
    path: String,
}

/// Which file, and its mode.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Target {
    /// Absolute path in the agent; missing parents are made.
    path: String,
    /// Permission bits, octal digits; 644 when absent.
    mode: Option<String>,
}

/// Downloads a file.
#[utoipa::path(
    get, path = "/agents/{agent}/files", tag = "files",
    params(("agent" = String, Path, description = "Name or id of the agent"), Which),
    responses((
        status = OK, body = Vec<u8>, content_type = "application/octet-stream", description = "Its content",
        headers(
            ("content-length" = u64, description = "Its size; absent for files whose size the kernel does not know"),
            ("x-ark-mode" = String, description = "Permission bits, octal"),
        ),
    )),
)]
pub(super) async fn read_file(
    State(core): State<Shared>,
    Path(agent): Path<String>,
    Query(Which { path }): Query<Which>,
) -> Result<Response, Refusal> {
    check_path(&path)?;
    let agent = core.registry.find(&agent)?;
    let download = match Download::open(agent.guest()?, &path).await {
        Ok(download) => download,
        Err(failure) => return Err(agent.explain(failure).await.into()),
    };
    let (mode, length) = (download.info().mode & 0o7777, download.length());
    let content = stream::try_unfold(download, |mut download| async {
        // A failure now can only be told by breaking the connection off: the headers are out.
        let bytes =
            download.next().await.inspect_err(|error| tracing::warn!(%error, "a download broke off"))?;
        Ok::<_, GuestFailure>(bytes.map(|bytes| (bytes, download)))
    });
    let mut response = Response::new(Body::from_stream(content));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    if let Some(length) = length {
        headers.insert(header::CONTENT_LENGTH, length.into());
    }
    if let Ok(mode) = HeaderValue::from_str(&format!("{mode:o}")) {
        headers.insert(MODE_HEADER, mode);
    }
    Ok(response)
}

/// Uploads a file. It appears under its name once it is complete; an upload that breaks leaves nothing.
#[utoipa::path(
    put, path = "/agents/{agent}/files", tag = "files",
    params(("agent" = String, Path, description = "Name or id of the agent"), Target),
    request_body(content = Vec<u8>, content_type = "application/octet-stream", description = "The content"),
    responses((status = NO_CONTENT, description = "It is there")),
)]
pub(super) async fn write_file(
    State(core): State<Shared>,
    Path(agent): Path<String>,
    Query(Target { path, mode }): Query<Target>,
    body: Body,
) -> Result<StatusCode, Refusal> {
    check_path(&path)?;
    let mode = mode.as_deref().map_or(Ok(DEFAULT_MODE), parse_mode)?;
    let agent = core.registry.find(&agent)?;
    let address = agent.guest()?;
    let mut body = body.into_data_stream();
    let uploaded = match Upload::open(address, &path, mode).await {
        Ok(upload) => pass_on(upload, &mut body).await,
        Err(failure) => Err(Interrupted::Guest(failure)),
    };
    match uploaded {
        Ok(()) => Ok(StatusCode::NO_CONTENT),
        Err(Interrupted::Client(error)) => {
            Err(Refusal::new(ProblemKind::BadRequest, format!("the upload broke off: {}", plain(&error))))
        }
        Err(Interrupted::Guest(failure)) => {
            let _ = tokio::time::timeout(DRAIN, async { while let Some(Ok(_)) = body.next().await {} }).await;
            Err(agent.explain(failure).await.into())
        }
    }
}

/// Who ended an upload early.
enum Interrupted {
    Client(axum::Error),
    Guest(GuestFailure),
}

async fn pass_on(mut upload: Upload, body: &mut BodyDataStream) -> Result<(), Interrupted> {
    while let Some(chunk) = body.next().await {
        let chunk = chunk.map_err(Interrupted::Client)?;
        if !chunk.is_empty() {
            upload.send(&chunk).await.map_err(Interrupted::Guest)?;
        }
    }
    upload.finish().await.map_err(Interrupted::Guest)
}

/// Describes a file; a symbolic link is not followed.
#[utoipa::path(
    get, path = "/agents/{agent}/files/stat", tag = "files",
    params(("agent" = String, Path, description = "Name or id of the agent"), Which),
    responses((status = OK, body = FileStat, description = "What it is")),
)]
pub(super) async fn stat_file(
    State(core): State<Shared>,
    Path(agent): Path<String>,
    Query(Which { path }): Query<Which>,
) -> Result<Json<FileStat>, Refusal> {
    check_path(&path)?;
    let agent = core.registry.find(&agent)?;
    match guest::stat(agent.guest()?, &path).await {
        Ok(stat) => Ok(Json(stat)),
        Err(failure) => Err(agent.explain(failure).await.into()),
    }
}

/// Lists a directory.
#[utoipa::path(
    get, path = "/agents/{agent}/files/list", tag = "files",
    params(("agent" = String, Path, description = "Name or id of the agent"), Which),
    responses((status = OK, body = FileList, description = "What is in it")),
)]
pub(super) async fn list_files(
    State(core): State<Shared>,
    Path(agent): Path<String>,
    Query(Which { path }): Query<Which>,
) -> Result<Json<FileList>, Refusal> {
    check_path(&path)?;
    let agent = core.registry.find(&agent)?;
    match guest::list(agent.guest()?, &path).await {
        Ok(entries) => Ok(Json(FileList { entries })),
        Err(failure) => Err(agent.explain(failure).await.into()),
    }
}

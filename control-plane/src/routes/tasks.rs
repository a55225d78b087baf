//! `/v1/tasks`: ask for work, look what became of it, cancel and remove it.

use std::io;
use std::time::Duration;

use ark_types::label::{InvalidSelector, Owner};
use ark_types::problem::ProblemKind;
use ark_types::task::{CreateTask, MAX_TASKS, MAX_WAIT_MS, OutputStream, Task, TaskList, TaskState};
use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{AppendHeaders, IntoResponse};
use futures_util::stream;
use serde::Deserialize;
use tracing::Span;
use utoipa::IntoParams;

use super::Shared;
use super::agents::{from_cursor, to_cursor};
use crate::problems::Refusal;
use crate::projection::{TaskFilter, task_place};
use crate::tasks::{self, Created, Wanted};
use crate::traces::lasting;

/// How long a cancellation waits for the end of what is under way.
const CANCEL_PATIENCE: Duration = Duration::from_secs(60);

/// Asks for a task, which is durable when this replies, and goes on whatever becomes of who asked.
///
/// It is done at least once: what is under way when `arkd` ends is begun again. The program finds `ARK_TASK_ID` and, from 1,
/// `ARK_TASK_ATTEMPT` in its environment; for code they are in the interpreter's environment (`os.environ`).
#[utoipa::path(
    post, path = "/tasks", tag = "tasks",
    request_body = CreateTask,
    responses(
        (status = CREATED, body = Task, description = "It waits for its turn", headers(("location" = String, description = "Where it is"))),
        (status = OK, body = Task, description = "There was one with that key and that body"),
    ),
)]
pub(super) async fn create_task(
    State(core): State<Shared>,
    headers: HeaderMap,
    Json(request): Json<CreateTask>,
) -> Result<impl IntoResponse, Refusal> {
    let traceparent = lasting(&Span::current(), &headers);
    let (status, task) = match tasks::create(&core, request, traceparent).await? {
        Created::New(task) => (StatusCode::CREATED, task),
        Created::Known(task) => (StatusCode::OK, task),
    };
    let location = format!("/v1/tasks/{}", task.spec.id);
    Ok((status, AppendHeaders([(header::LOCATION, location)]), Json(task)))
}

/// Which tasks.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Listing {
    /// In this state.
    state: Option<TaskState>,
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

/// Tasks, oldest first: those that have not ended, and those that ended as far as they are kept.
#[utoipa::path(
    get, path = "/tasks", tag = "tasks", params(Listing),
    responses((status = OK, body = TaskList, description = "Tasks, without their results")),
)]
pub(super) async fn list_tasks(
    State(core): State<Shared>,
    Query(listing): Query<Listing>,
) -> Result<Json<TaskList>, Refusal> {
    let Listing { state, owner, labels, limit, cursor } = listing;
    let invalid = |detail: String| Refusal::new(ProblemKind::InvalidValue, detail);
    let limit = limit.unwrap_or(MAX_TASKS);
    if !(1..=MAX_TASKS).contains(&limit) {
        return Err(invalid(format!("{limit} tasks are no page: ask for 1 to {MAX_TASKS}")));
    }
    let labels = labels.unwrap_or_default().parse().map_err(|e: InvalidSelector| invalid(e.to_string()))?;
    let filter = TaskFilter { state, owner, labels };
    let after = cursor.as_deref().map(from_cursor).transpose()?;
    core.ledger.caught_up().await;
    let mut tasks: Vec<Task> =
        core.ledger.projection().tasks().select(&filter, after.as_ref()).take(limit + 1).cloned().collect();
    let more = tasks.len() > limit;
    tasks.truncate(limit);
    let next_cursor = tasks.last().filter(|_| more).map(|task| to_cursor(&task_place(&task.spec)));
    Ok(Json(TaskList { tasks, next_cursor }))
}

/// How to look at a task.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Look {
    /// Wait so long for its end before replying, milliseconds, at most 60000; 0 when absent.
    wait_ms: Option<u64>,
}

/// One task, with what came of it.
#[utoipa::path(
    get, path = "/tasks/{task}", tag = "tasks",
    params(("task" = String, Path, description = "Id of the task"), Look),
    responses((status = OK, body = Task, description = "The task, ended or not")),
)]
pub(super) async fn inspect_task(
    State(core): State<Shared>,
    Path(task): Path<String>,
    Query(Look { wait_ms }): Query<Look>,
) -> Result<Json<Task>, Refusal> {
    let wait_ms = wait_ms.unwrap_or_default();
    if wait_ms > MAX_WAIT_MS {
        let detail = format!("wait_ms of {wait_ms} is too long: at most {MAX_WAIT_MS}, and then ask again");
        return Err(Refusal::new(ProblemKind::InvalidValue, detail));
    }
    let mut task = tasks::wait(&core, &task, Duration::from_millis(wait_ms)).await?;
    task.result = tasks::result(&core, &task).await?;
    Ok(Json(task))
}

/// Which part of the output.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Part {
    /// Standard output or standard error; standard output when absent.
    #[serde(default)]
    #[param(inline)]
    stream: OutputStream,
    /// Number of the attempt, from 1; when absent, the newest that runs or whose output is kept.
    attempt: Option<u32>,
    /// Begin after so many bytes: who was cut off goes on where it was.
    #[serde(default)]
    from: u64,
    /// Go on until the attempt has ended; one that has not begun is waited for until the task has ended.
    #[serde(default)]
    follow: bool,
}

/// What an attempt wrote, the first MiB of each stream. It is kept of the newest 16 attempts, also of those that were cut off,
/// timed out or stopped, until the task is removed.
#[utoipa::path(
    get, path = "/tasks/{task}/logs", tag = "tasks",
    params(("task" = String, Path, description = "Id of the task"), Part),
    responses((status = OK, body = String, content_type = "text/plain", description = "The output, byte for byte")),
)]
pub(super) async fn task_logs(
    State(core): State<Shared>,
    Path(task): Path<String>,
    Query(Part { stream, attempt, from, follow }): Query<Part>,
) -> Result<impl IntoResponse, Refusal> {
    let log = tasks::log(&core, &task, Wanted { attempt, stream, from, follow }).await?;
    let body = stream::try_unfold(log, |mut log| async {
        let chunk = log.next().await?;
        Ok::<_, io::Error>(chunk.map(|chunk| (chunk, log)))
    });
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], Body::from_stream(body)))
}

/// Ends a task that has not ended, with what it runs. It may have done part of its work.
#[utoipa::path(
    post, path = "/tasks/{task}/cancel", tag = "tasks",
    params(("task" = String, Path, description = "Id of the task")),
    responses((status = OK, body = Task, description = "It is cancelled, or was")),
)]
pub(super) async fn cancel_task(
    State(core): State<Shared>,
    Path(task): Path<String>,
) -> Result<Json<Task>, Refusal> {
    Ok(Json(tasks::cancel(&core, &task, CANCEL_PATIENCE).await?))
}

/// Removes a task that has ended, with its output and its key.
#[utoipa::path(
    delete, path = "/tasks/{task}", tag = "tasks",
    params(("task" = String, Path, description = "Id of the task")),
    responses((status = NO_CONTENT, description = "It is gone")),
)]
pub(super) async fn delete_task(
    State(core): State<Shared>,
    Path(task): Path<String>,
) -> Result<StatusCode, Refusal> {
    tasks::remove(&core, &task).await?;
    Ok(StatusCode::NO_CONTENT)
}

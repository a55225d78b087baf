//! `/v1/snapshots`: take, list, inspect, restore, rewind, compact, delete.

use ark_types::agent::Agent;
use ark_types::event::Stream;
use ark_types::problem::ProblemKind;
use ark_types::snapshot::{CreateSnapshot, RestoreSnapshot, RewindAgent, Snapshot, SnapshotList};
use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{AppendHeaders, IntoResponse};
use serde::Deserialize;
use utoipa::IntoParams;

use super::Shared;
use crate::agent::{self, Birth, Handle, Upkeep, Wishes};
use crate::core::Core;
use crate::idempotency;
use crate::problems::Refusal;
use crate::scheduler::Ask;
use crate::snapshots::{Record, SnapshotError};
use crate::telemetry::Source;
use crate::upkeep;
use crate::validate::check_allow;
use ark_types::agent::{AgentName, Origin};

/// Takes a snapshot of a living agent, which goes on at once, and waits until it is on disk.
///
/// A client that disconnects before the reply finds the snapshot there all the same.
#[utoipa::path(
    post, path = "/agents/{agent}/snapshots", tag = "snapshots",
    params(("agent" = String, Path, description = "Name or id of the agent")),
    request_body = CreateSnapshot,
    responses((
        status = CREATED, body = Snapshot, description = "It is on disk",
        headers(("location" = String, description = "Where it is")),
    )),
)]
pub(super) async fn create_snapshot(
    State(core): State<Shared>,
    Path(agent): Path<String>,
    Json(CreateSnapshot { name }): Json<CreateSnapshot>,
) -> Result<impl IntoResponse, Refusal> {
    let busy = core.pool.busy();
    let handle = core.registry.find(&agent)?;
    // On its own: half a snapshot helps nobody.
    let taking = idempotency::spawn(async move {
        let _busy = busy;
        take(&core, &handle, name).await
    });
    let interrupted = |_| Refusal::new(ProblemKind::Internal, "the snapshot was interrupted: try again");
    let snapshot = taking.await.map_err(interrupted)??;
    let location = format!("/v1/snapshots/{}", snapshot.name);
    Ok((StatusCode::CREATED, AppendHeaders([(header::LOCATION, location)]), Json(snapshot)))
}

async fn take(core: &Core, handle: &Handle, name: AgentName) -> Result<Snapshot, Refusal> {
    let _reserved = core.snapshots.reserve(&name)?;
    idempotency::bind(core, Stream::snapshot(&name)).await?;
    let draft = core.snapshots.draft();
    let taken = handle.snapshot(draft.dir()).await?;
    let record = Record {
        name: name.clone(),
        agent_id: taken.agent.id,
        agent: taken.agent.name,
        image: taken.agent.image,
        image_digest: taken.agent.image_digest,
        pause_us: taken.report.pause_us,
        durable_us: taken.report.durable_us,
        request: idempotency::current_id(),
    };
    let _hold = core.snapshots.adopt(draft.dir(), Some(record))?;
    Ok(core.snapshots.describe(name.as_ref())?)
}

/// Which snapshots.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Listing {
    /// Also the checkpoints of agents, named by their ids; false when absent.
    #[serde(default)]
    all: bool,
}

/// Named snapshots, oldest first.
#[utoipa::path(
    get, path = "/snapshots", tag = "snapshots", params(Listing),
    responses((status = OK, body = SnapshotList, description = "Snapshots")),
)]
pub(super) async fn list_snapshots(
    State(core): State<Shared>,
    Query(Listing { all }): Query<Listing>,
) -> Json<SnapshotList> {
    let mut snapshots = core.snapshots.list();
    if all {
        let agents: Vec<Agent> = core.registry.all().iter().map(Handle::agent).collect();
        let checkpoints =
            agents.iter().flat_map(|agent| agent.checkpoints.iter().map(move |one| (agent, one)));
        snapshots
            .extend(checkpoints.filter_map(|(agent, one)| core.snapshots.describe_checkpoint(agent, one)));
        snapshots.sort_by_key(|snapshot| snapshot.created_unix_ms);
    }
    Json(SnapshotList { snapshots })
}

/// One snapshot.
#[utoipa::path(
    get, path = "/snapshots/{snapshot}", tag = "snapshots",
    params(("snapshot" = String, Path, description = "Name of the snapshot")),
    responses((status = OK, body = Snapshot, description = "The snapshot")),
)]
pub(super) async fn inspect_snapshot(
    State(core): State<Shared>,
    Path(snapshot): Path<String>,
) -> Result<Json<Snapshot>, Refusal> {
    Ok(Json(core.snapshots.describe(&snapshot)?))
}

/// How to delete.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Deletion {
    /// Delete it although snapshots that hold only what changed since become unusable; false when absent.
    #[serde(default)]
    orphans: bool,
}

/// Deletes a snapshot. One that living agents go on from stays, as does, unless `orphans` is true, one that others are
/// diffs over.
#[utoipa::path(
    delete, path = "/snapshots/{snapshot}", tag = "snapshots",
    params(("snapshot" = String, Path, description = "Name of the snapshot"), Deletion),
    responses((status = NO_CONTENT, description = "It is gone")),
)]
pub(super) async fn delete_snapshot(
    State(core): State<Shared>,
    Path(snapshot): Path<String>,
    Query(Deletion { orphans }): Query<Deletion>,
) -> Result<StatusCode, Refusal> {
    let dirs = core.snapshots.remove(&snapshot, orphans)?;
    core.snapshots.gone(&dirs).await;
    Ok(StatusCode::NO_CONTENT)
}

/// Makes a diff a full snapshot that needs no other. A full one stays as it is.
#[utoipa::path(
    post, path = "/snapshots/{snapshot}/compact", tag = "snapshots",
    params(("snapshot" = String, Path, description = "Name of the snapshot")),
    responses((status = OK, body = Snapshot, description = "The snapshot, full and with a new id")),
)]
pub(super) async fn compact_snapshot(
    State(core): State<Shared>,
    Path(snapshot): Path<String>,
) -> Result<Json<Snapshot>, Refusal> {
    Ok(Json(core.snapshots.compact(&snapshot).await?))
}

/// Makes a new agent that goes on from a snapshot, with an identity of its own, and waits until it passed every check.
#[utoipa::path(
    post, path = "/snapshots/{snapshot}/restore", tag = "snapshots",
    params(("snapshot" = String, Path, description = "Name of the snapshot")),
    request_body = RestoreSnapshot,
    responses((
        status = CREATED, body = Agent, description = "It runs",
        headers(("location" = String, description = "Where it is")),
    )),
)]
pub(super) async fn restore_snapshot(
    State(core): State<Shared>,
    Path(snapshot): Path<String>,
    Json(request): Json<RestoreSnapshot>,
) -> Result<impl IntoResponse, Refusal> {
    let attempt = core.telemetry.attempt(Source::Snapshot);
    let restored = restore(&core, &snapshot, request).await;
    attempt.end(&restored);
    let agent = restored?;
    let location = format!("/v1/agents/{}", agent.id);
    Ok((StatusCode::CREATED, AppendHeaders([(header::LOCATION, location)]), Json(agent)))
}

/// An agent from the snapshot `snapshot`. It belongs to whom the agent belonged that the snapshot was taken of.
async fn restore(core: &Shared, snapshot: &str, request: RestoreSnapshot) -> Result<Agent, Refusal> {
    let RestoreSnapshot { name, allow, freeze_on_inference, restart, checkpoint, health_check } = request;
    let upkeep = Upkeep { restart, checkpoint, health_check, ..Upkeep::default() };
    upkeep::check(&upkeep, false)?;
    check_allow(&allow)?;
    let (hold, record) = core.snapshots.find(snapshot)?;
    core.ledger.ready()?;
    let owner = core.ledger.agent(&record.agent_id).await?.map(|agent| agent.owner);
    let owner = owner.unwrap_or_default();
    let wishes = Wishes { name, owner, allow, freeze_on_inference, upkeep, ..Wishes::default() };
    let needs = core.scheduler.config().forked((hold.manifest().vcpus, hold.manifest().memory_mib));
    let ask = Ask { name: wishes.name.clone(), ..Ask::new(wishes.owner.clone(), needs) };
    let grant = core.admit(ask).await?;
    let _busy = core.pool.busy();
    let origin = Origin::Snapshot { name: record.name };
    agent::restore(core, Birth { hold, origin, wishes, grant }).await
}

/// Puts an agent back to where it was at a snapshot of itself; what happened since is lost.
#[utoipa::path(
    post, path = "/agents/{agent}/rewind", tag = "snapshots",
    params(("agent" = String, Path, description = "Name or id of the agent")),
    request_body = RewindAgent,
    responses((status = OK, body = Agent, description = "It runs")),
)]
pub(super) async fn rewind_agent(
    State(core): State<Shared>,
    Path(agent): Path<String>,
    Json(RewindAgent { snapshot }): Json<RewindAgent>,
) -> Result<Json<Agent>, Refusal> {
    let handle = core.registry.find(&agent)?;
    let (hold, record) = core.snapshots.find(snapshot.as_ref())?;
    if record.agent_id != handle.id() {
        let error = SnapshotError::OfAnother { snapshot, agent: handle.name().clone() };
        return Err(error.into());
    }
    Ok(Json(handle.rewind(&core, hold, Origin::Snapshot { name: record.name }).await?))
}

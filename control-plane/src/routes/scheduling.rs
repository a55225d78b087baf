//! `/v1/queue`, `/v1/hosts`, `/v1/owners`: who waits for room, where room is, and what each owner may have.

use ark_types::event::{Event, Stream};
use ark_types::label::Owner;
use ark_types::problem::ProblemKind;
use ark_types::scheduling::{Host, HostList, OwnerList, OwnerQuota, Quota, RequestQueue, Resources};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;

use super::Shared;
use crate::host::{self, Memory};
use crate::problems::Refusal;
use crate::store::Append;

/// Requests that wait for room, the next one first.
#[utoipa::path(
    get, path = "/queue", tag = "scheduling",
    responses((status = OK, body = RequestQueue, description = "The queue")),
)]
pub(super) async fn list_waiting(State(core): State<Shared>) -> Json<RequestQueue> {
    Json(core.scheduler.waiting())
}

/// Hosts, and what is reserved on them.
#[utoipa::path(
    get, path = "/hosts", tag = "scheduling",
    responses((status = OK, body = HostList, description = "Hosts; today one")),
)]
pub(super) async fn list_hosts(State(core): State<Shared>) -> Result<Json<HostList>, Refusal> {
    let memory = Memory::read().map_err(|error| {
        Refusal::new(ProblemKind::HostUnable, format!("this host's memory cannot be told: {error}"))
    })?;
    let (limit, reserved) = core.scheduler.limit_and_reserved();
    let capacity =
        Resources { agents: limit.agents, memory_mib: memory.total_mib, vcpus: host::cpus().into() };
    let here = Host {
        name: "local".to_owned(),
        capacity,
        overcommit: core.scheduler.config().overcommit(),
        limit,
        reserved,
        free: limit.minus(reserved),
        standbys: core.scheduler.spared(),
        warm: core.scheduler.warm(),
        used_memory_mib: memory.total_mib.saturating_sub(memory.available_mib),
    };
    Ok(Json(HostList { hosts: vec![here] }))
}

/// Owners that have a quota, agents or requests, by name.
#[utoipa::path(
    get, path = "/owners", tag = "scheduling",
    responses((status = OK, body = OwnerList, description = "Owners")),
)]
pub(super) async fn list_owners(State(core): State<Shared>) -> Json<OwnerList> {
    Json(OwnerList { owners: core.scheduler.owners() })
}

/// One owner. One that nobody has heard of may have everything and has nothing.
#[utoipa::path(
    get, path = "/owners/{owner}", tag = "scheduling",
    params(("owner" = String, Path, description = "Name of the owner")),
    responses((status = OK, body = OwnerQuota, description = "The owner")),
)]
pub(super) async fn inspect_owner(
    State(core): State<Shared>,
    Path(owner): Path<String>,
) -> Result<Json<OwnerQuota>, Refusal> {
    Ok(Json(core.scheduler.owner(&named(&owner)?)))
}

/// Sets what an owner may have, for good, in place of what it might have before. Agents that it has beyond that go on.
#[utoipa::path(
    put, path = "/owners/{owner}", tag = "scheduling",
    params(("owner" = String, Path, description = "Name of the owner")),
    request_body = Quota,
    responses((status = OK, body = OwnerQuota, description = "The owner")),
)]
pub(super) async fn set_quota(
    State(core): State<Shared>,
    Path(owner): Path<String>,
    Json(quota): Json<Quota>,
) -> Result<Json<OwnerQuota>, Refusal> {
    Ok(Json(limit(core, named(&owner)?, quota).await?))
}

/// Lets an owner have everything again.
#[utoipa::path(
    delete, path = "/owners/{owner}", tag = "scheduling",
    params(("owner" = String, Path, description = "Name of the owner")),
    responses((status = NO_CONTENT, description = "It has no quota")),
)]
pub(super) async fn delete_quota(
    State(core): State<Shared>,
    Path(owner): Path<String>,
) -> Result<StatusCode, Refusal> {
    limit(core, named(&owner)?, Quota::default()).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Records what `owner` may have from now on, and then lets it be so. Whoever asked may leave: what is durable counts.
async fn limit(core: Shared, owner: Owner, quota: Quota) -> Result<OwnerQuota, Refusal> {
    let limiting = tokio::spawn(async move {
        if core.scheduler.owner(&owner).quota != quota {
            let event = Event::OwnerQuotaSet { quota };
            core.log.append(Append::new(Stream::owner(&owner), event)).await?;
            core.ledger.caught_up().await;
            // Of those who set it at once, what was recorded last counts. The projection does not move on in between.
            let projection = core.ledger.projection();
            core.scheduler.set_quota(&owner, projection.quotas().of(&owner));
        }
        Ok(core.scheduler.owner(&owner))
    });
    let interrupted =
        |_| Refusal::new(ProblemKind::Internal, "the change of the quota was interrupted: try again");
    limiting.await.map_err(interrupted)?
}

fn named(owner: &str) -> Result<Owner, Refusal> {
    owner.parse().map_err(|error| Refusal::new(ProblemKind::InvalidValue, format!("{error}")))
}

//! `/v1/services`: names with replicas behind them, and calls to whichever is free.

use std::time::Duration;

use ark_types::problem::ProblemKind;
use ark_types::service::{
    CallResult, DEFAULT_CALL_WAIT_MS, DrainReplica, MAX_CALL_WAIT_MS, ScaleService, Service, ServiceCall,
    ServiceList, ServiceReply, ServiceSpec,
};
use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{AppendHeaders, IntoResponse};
use serde::Deserialize;
use utoipa::IntoParams;

use super::Shared;
use super::{eval, exec};
use crate::problems::Refusal;
use crate::services::call::{self, Picked};
use crate::services::change::{self, DRAIN_GRACE, Set};
use crate::services::{logs, view};
use crate::validate::check_eval;

/// Longest grace of a drain.
const MAX_GRACE_MS: u64 = 600_000;

/// Has a service be from now on, for good. Its replicas come up by and by; the reply does not wait for them.
#[utoipa::path(
    post, path = "/services", tag = "services",
    request_body = ServiceSpec,
    responses((
        status = CREATED, body = Service, description = "It is to be",
        headers(("location" = String, description = "Where it is")),
    )),
)]
pub(super) async fn create_service(
    State(core): State<Shared>,
    Json(spec): Json<ServiceSpec>,
) -> Result<impl IntoResponse, Refusal> {
    let (service, _) = change::set(&core, spec, Set::Create).await?;
    let location = format!("/v1/services/{}", service.spec.name);
    Ok((StatusCode::CREATED, AppendHeaders([(header::LOCATION, location)]), Json(service)))
}

/// Services, by name.
#[utoipa::path(
    get, path = "/services", tag = "services",
    responses((status = OK, body = ServiceList, description = "Services")),
)]
pub(super) async fn list_services(State(core): State<Shared>) -> Json<ServiceList> {
    Json(view::all(&core))
}

/// One service, its replicas, and what keeps it from being as it is to be.
#[utoipa::path(
    get, path = "/services/{service}", tag = "services",
    params(("service" = String, Path, description = "Name of the service")),
    responses((status = OK, body = Service, description = "The service")),
)]
pub(super) async fn inspect_service(
    State(core): State<Shared>,
    Path(service): Path<String>,
) -> Result<Json<Service>, Refusal> {
    Ok(Json(view::one(&core, &service)?))
}

/// Has a service be so from now on, for good, in place of what it was to be before. A change of what its replicas are made as
/// is rolled out by and by: one that fails stops, and the replicas before it stay.
#[utoipa::path(
    put, path = "/services/{service}", tag = "services",
    params(("service" = String, Path, description = "Name of the service")),
    request_body = ServiceSpec,
    responses(
        (status = OK, body = Service, description = "It is to be so"),
        (status = CREATED, body = Service, description = "It is new"),
    ),
)]
pub(super) async fn set_service(
    State(core): State<Shared>,
    Path(service): Path<String>,
    Json(spec): Json<ServiceSpec>,
) -> Result<impl IntoResponse, Refusal> {
    if spec.name.as_ref() != service {
        let detail = format!("the path names the service {service:?} and the body {}: name one", spec.name);
        return Err(Refusal::new(ProblemKind::InvalidValue, detail));
    }
    let (service, is_new) = change::set(&core, spec, Set::Replace).await?;
    Ok((if is_new { StatusCode::CREATED } else { StatusCode::OK }, Json(service)))
}

/// Has a service have so many replicas from now on, for good.
#[utoipa::path(
    patch, path = "/services/{service}", tag = "services",
    params(("service" = String, Path, description = "Name of the service")),
    request_body = ScaleService,
    responses((status = OK, body = Service, description = "It is to have so many")),
)]
pub(super) async fn scale_service(
    State(core): State<Shared>,
    Path(service): Path<String>,
    Json(ScaleService { replicas }): Json<ScaleService>,
) -> Result<Json<Service>, Refusal> {
    Ok(Json(change::scale(&core, &service, replicas, DRAIN_GRACE).await?))
}

/// How long what is under way may take.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Draining {
    /// Time that calls under way may take, milliseconds, at most 600000; 30000 when absent.
    grace_ms: Option<u64>,
}

impl Draining {
    fn grace(&self) -> Duration {
        self.grace_ms.map_or(DRAIN_GRACE, |ms| Duration::from_millis(ms.min(MAX_GRACE_MS)))
    }
}

/// Removes a service: its replicas finish what is under way in them and go. Replies when they are gone.
#[utoipa::path(
    delete, path = "/services/{service}", tag = "services",
    params(("service" = String, Path, description = "Name of the service"), Draining),
    responses((status = NO_CONTENT, description = "Nothing is left of it")),
)]
pub(super) async fn delete_service(
    State(core): State<Shared>,
    Path(service): Path<String>,
    Query(draining): Query<Draining>,
) -> Result<StatusCode, Refusal> {
    change::remove(&core, &service, draining.grace()).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Gives a replica no new calls, lets it finish those under way, and removes it; another takes its place. Replies when it is
/// gone.
#[utoipa::path(
    post, path = "/services/{service}/drain", tag = "services",
    params(("service" = String, Path, description = "Name of the service"), Draining),
    request_body = DrainReplica,
    responses((status = OK, body = Service, description = "The service, without it")),
)]
pub(super) async fn drain_replica(
    State(core): State<Shared>,
    Path(service): Path<String>,
    Query(draining): Query<Draining>,
    Json(DrainReplica { agent }): Json<DrainReplica>,
) -> Result<Json<Service>, Refusal> {
    Ok(Json(change::drain(&core, &service, &agent, draining.grace()).await?))
}

/// How long a call waits.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Waiting {
    /// How long to wait for a replica that is ready, milliseconds, at most 600000; 10000 when absent; 0 does not wait.
    wait_ms: Option<u64>,
}

/// Has the replica that is ready and has the fewest calls under way run a program or code, and says which it was. A call is
/// made once: when its replica ends meanwhile, the reply says so.
#[utoipa::path(
    post, path = "/services/{service}/call", tag = "services",
    params(("service" = String, Path, description = "Name of the service"), Waiting),
    request_body = ServiceCall,
    responses((status = OK, body = ServiceReply, description = "A replica answered")),
)]
pub(super) async fn call_service(
    State(core): State<Shared>,
    Path(service): Path<String>,
    Query(Waiting { wait_ms }): Query<Waiting>,
    headers: HeaderMap,
    Json(call): Json<ServiceCall>,
) -> Result<Json<ServiceReply>, Refusal> {
    if let ServiceCall::Eval(request) = &call {
        check_eval(request)?;
    }
    let patience = Duration::from_millis(wait_ms.unwrap_or(DEFAULT_CALL_WAIT_MS).min(MAX_CALL_WAIT_MS));
    let picked = call::begin(&core, &service, patience).await?;
    let answer = answer(&core, &picked, &headers, call).await;
    let (agent, id) = (picked.handle().name().clone(), picked.handle().id().to_owned());
    picked.end(answer.is_ok());
    match answer {
        Ok(result) => Ok(Json(ServiceReply { agent, id, result })),
        Err(Refusal(mut problem)) => {
            problem.detail = format!("the replica {agent}: {}", problem.detail);
            Err(Refusal(problem))
        }
    }
}

/// Whose output.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Whose {
    /// Name or id of the replica, or of the last one whose command ended.
    replica: String,
}

/// What the command of a replica wrote last, to standard output and standard error: at most 64 KiB.
#[utoipa::path(
    get, path = "/services/{service}/logs", tag = "services",
    params(("service" = String, Path, description = "Name of the service"), Whose),
    responses((status = OK, body = String, content_type = "text/plain", description = "The output, byte for byte")),
)]
pub(super) async fn service_logs(
    State(core): State<Shared>,
    Path(service): Path<String>,
    Query(Whose { replica }): Query<Whose>,
) -> Result<impl IntoResponse, Refusal> {
    let log = logs::read(&core, &service, &replica).await?;
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], log))
}

async fn answer(
    core: &Shared,
    picked: &Picked,
    headers: &HeaderMap,
    call: ServiceCall,
) -> Result<CallResult, Refusal> {
    let agent = picked.handle();
    Ok(match call {
        ServiceCall::Exec(request) => CallResult::Exec(exec::run(core, agent, headers, request).await?),
        ServiceCall::Eval(request) => CallResult::Eval(eval::run(core, agent, &request).await?),
    })
}

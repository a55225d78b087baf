//! How errors reach a client: every one as `application/problem+json`.
//!
//! Rooms have error types of their own; here, and only here, each becomes a [`Problem`]. What axum itself refuses (a body
//! that does not parse, an unknown route, a wrong method) is turned into one on its way out by [`translate`].

use ark_types::problem::{PROBLEM_JSON, Problem, ProblemKind};
use ark_types::vmm::{ConfigError, ExitReason};
use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::agent::{BootError, CallError, LabelError, NotRunning, PauseError, SnapshotFailure};
use crate::guest::GuestFailure;
use crate::images::ImageError;
use crate::ledger::LedgerError;
use crate::models::ModelError;
use crate::pool::policy::PolicyError;
use crate::registry::{AdmitError, NoSuchAgent};
use crate::scheduler::Denied;
use crate::services::ServiceError;
use crate::snapshots::SnapshotError;
use crate::store::{AppendError, ReadError};
use crate::templates::TemplateError;

/// Most bytes of a refusal by axum that are read for their text.
const MAX_REFUSAL: usize = 4096;

/// A problem as a handler's error.
#[derive(Debug)]
pub struct Refusal(pub Problem);

impl Refusal {
    /// A refusal of `kind` that says `detail`.
    #[must_use]
    pub fn new(kind: ProblemKind, detail: impl Into<String>) -> Self {
        Self(Problem::new(kind, detail))
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&self.0).unwrap_or_default();
        let mut response = (status, [(header::CONTENT_TYPE, PROBLEM_JSON)], body).into_response();
        if let Some(seconds) = self.0.kind.retry_after_s() {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// Turns every error that is not a problem yet into one.
pub async fn translate(request: Request, next: Next) -> Response {
    let what = format!("{} {}", request.method(), request.uri().path());
    let response = next.run(request).await;
    let is_error = response.status().is_client_error() || response.status().is_server_error();
    if !is_error || is_problem(&response) {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    let said = to_bytes(body, MAX_REFUSAL).await.unwrap_or_default();
    let Refusal(problem) = refusal_for(parts.status, &what, &String::from_utf8_lossy(&said));
    // Headers such as `allow` stay; those of the old body do not.
    parts.status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    parts.headers.remove(header::CONTENT_LENGTH);
    parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
    Response::from_parts(parts, Body::from(serde_json::to_vec(&problem).unwrap_or_default()))
}

fn is_problem(response: &Response) -> bool {
    response.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind == PROBLEM_JSON)
}

fn refusal_for(status: StatusCode, what: &str, said: &str) -> Refusal {
    match status {
        StatusCode::NOT_FOUND => {
            let detail = format!("there is nothing at {what}: GET /v1/openapi.json lists what there is");
            Refusal::new(ProblemKind::NoRoute, detail)
        }
        StatusCode::METHOD_NOT_ALLOWED => {
            let detail = format!("{what} is not allowed: the `allow` header names the methods that are");
            Refusal::new(ProblemKind::MethodNotAllowed, detail)
        }
        StatusCode::PAYLOAD_TOO_LARGE => {
            Refusal::new(ProblemKind::TooLarge, format!("{what}: the body is too large: {said}"))
        }
        StatusCode::UNPROCESSABLE_ENTITY => Refusal::new(ProblemKind::InvalidValue, said),
        status if status.is_client_error() => Refusal::new(ProblemKind::BadRequest, said),
        _ => {
            tracing::error!(what, said, "a request failed inside arkd");
            Refusal::new(ProblemKind::Internal, "arkd failed; its log says how")
        }
    }
}

impl From<ImageError> for Refusal {
    fn from(error: ImageError) -> Self {
        let kind = match error {
            ImageError::NotFound { .. } => ProblemKind::ImageNotFound,
            ImageError::Corrupt { .. } => ProblemKind::ImageCorrupt,
            ImageError::Unreadable { .. } => ProblemKind::HostUnable,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<ModelError> for Refusal {
    fn from(error: ModelError) -> Self {
        let kind = match &error {
            ModelError::NotFound { .. } => ProblemKind::ModelNotFound,
            ModelError::Name(_) | ModelError::Context { .. } => ProblemKind::InvalidValue,
            ModelError::Bundled(_) => ProblemKind::ModelBundled,
            ModelError::InUse { .. } => ProblemKind::InUse,
            ModelError::Taken(_) | ModelError::ServiceTaken(_) => ProblemKind::NameTaken,
            ModelError::Unusable { .. } | ModelError::Changed { .. } => ProblemKind::ModelUnusable,
            ModelError::TooLarge { .. } => ProblemKind::ModelTooLarge,
            ModelError::TooManyBytes => ProblemKind::TooLarge,
            ModelError::NoRoom { .. } => ProblemKind::DiskFull,
            ModelError::BrokenOff(_) => ProblemKind::BadRequest,
            ModelError::File { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                ProblemKind::DiskFull
            }
            ModelError::File { .. } => ProblemKind::HostUnable,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<SnapshotError> for Refusal {
    fn from(error: SnapshotError) -> Self {
        let kind = match error {
            SnapshotError::Image(error) => return error.into(),
            SnapshotError::Model(error) => return error.into(),
            SnapshotError::NotFound(_) => ProblemKind::SnapshotNotFound,
            SnapshotError::NameTaken(_) => ProblemKind::NameTaken,
            SnapshotError::Lived { .. } | SnapshotError::Needed { .. } => ProblemKind::InUse,
            SnapshotError::Unusable { .. }
            | SnapshotError::OtherImage { .. }
            | SnapshotError::OtherModel { .. } => ProblemKind::SnapshotUnusable,
            SnapshotError::OfAnother { .. } => ProblemKind::InvalidValue,
            SnapshotError::DiskFull { .. } => ProblemKind::DiskFull,
            SnapshotError::Unproved { .. } | SnapshotError::File { .. } | SnapshotError::Tool { .. } => {
                ProblemKind::HostUnable
            }
            SnapshotError::Endless { .. } => ProblemKind::DeadlinePassed,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<TemplateError> for Refusal {
    fn from(error: TemplateError) -> Self {
        let kind = match error {
            // These have words and kinds of their own.
            TemplateError::Image(error) => return error.into(),
            TemplateError::Model(error) => return error.into(),
            TemplateError::Snapshot(error) => return error.into(),
            TemplateError::NotFound(_) => ProblemKind::TemplateNotFound,
            TemplateError::Reserved { .. } | TemplateError::Timeout { .. } | TemplateError::WarmAndModel => {
                ProblemKind::InvalidValue
            }
            TemplateError::Building(_) | TemplateError::InUse { .. } => ProblemKind::InUse,
            TemplateError::NoEvaluator(_) => ProblemKind::NoEvaluator,
            TemplateError::Shared(refusal) => return refusal,
            TemplateError::Agent(Self(ref problem)) => problem.kind,
            TemplateError::Raised { .. }
            | TemplateError::Endless { .. }
            | TemplateError::Unserved { .. }
            | TemplateError::WarmUp(_)
            | TemplateError::Guest(_) => ProblemKind::TemplateFailed,
            TemplateError::Record { .. } => ProblemKind::DiskFull,
            TemplateError::Pool(ref error) => kind_of_refused(error),
            TemplateError::Interrupted => ProblemKind::HostUnable,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<PolicyError> for Refusal {
    fn from(error: PolicyError) -> Self {
        let kind = match error {
            PolicyError::Template(error) => return error.into(),
            PolicyError::Log(error) => return error.into(),
            PolicyError::Invalid(_) | PolicyError::TooMany => ProblemKind::InvalidValue,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<ConfigError> for Refusal {
    fn from(error: ConfigError) -> Self {
        Self::new(ProblemKind::InvalidValue, error.to_string())
    }
}

impl From<AdmitError> for Refusal {
    fn from(error: AdmitError) -> Self {
        let kind = match error {
            AdmitError::NameTaken(_) => ProblemKind::NameTaken,
            AdmitError::ShuttingDown => ProblemKind::HostUnable,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<Denied> for Refusal {
    fn from(denied: Denied) -> Self {
        let kind = match denied {
            Denied::HostFull(_) => ProblemKind::HostFull,
            Denied::QueueFull { .. } => ProblemKind::QueueFull,
            Denied::Timeout { .. } => ProblemKind::QueueTimeout,
            Denied::Quota(_) => ProblemKind::QuotaExceeded,
        };
        Self::new(kind, denied.to_string())
    }
}

impl From<ServiceError> for Refusal {
    fn from(error: ServiceError) -> Self {
        let kind = match error {
            ServiceError::NotFound(_) | ServiceError::NoReplica { .. } => ProblemKind::ServiceNotFound,
            ServiceError::Exists(_) => ProblemKind::NameTaken,
            ServiceError::Leaving(_) | ServiceError::TooMany => ProblemKind::InUse,
            ServiceError::Invalid(_) => ProblemKind::InvalidValue,
            ServiceError::Environment(ref source)
                if matches!(source.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) =>
            {
                ProblemKind::DiskFull
            }
            ServiceError::Environment(_) | ServiceError::Closing => ProblemKind::HostUnable,
            ServiceError::Late(_) => ProblemKind::DeadlinePassed,
            ServiceError::Unready { .. } => ProblemKind::ServiceUnready,
            ServiceError::Interrupted => ProblemKind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<NoSuchAgent> for Refusal {
    fn from(error: NoSuchAgent) -> Self {
        Self::new(ProblemKind::AgentNotFound, error.to_string())
    }
}

impl From<NotRunning> for Refusal {
    fn from(error: NotRunning) -> Self {
        Self::new(ProblemKind::AgentNotRunning, error.to_string())
    }
}

impl From<SnapshotFailure> for Refusal {
    fn from(failure: SnapshotFailure) -> Self {
        let kind = match failure {
            SnapshotFailure::NotRunning(error) => return error.into(),
            SnapshotFailure::Store(error) => return error.into(),
            SnapshotFailure::Gone { .. } => ProblemKind::AgentGone,
            SnapshotFailure::DiskFull(_) => ProblemKind::DiskFull,
            SnapshotFailure::File { ref source, .. }
                if matches!(source.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) =>
            {
                ProblemKind::DiskFull
            }
            SnapshotFailure::File { .. } | SnapshotFailure::ShuttingDown => ProblemKind::HostUnable,
            SnapshotFailure::Refused(_) | SnapshotFailure::Control(_) => ProblemKind::ForkFailed,
        };
        Self::new(kind, failure.to_string())
    }
}

impl From<PauseError> for Refusal {
    fn from(error: PauseError) -> Self {
        let words = error.to_string();
        let kind = match error {
            PauseError::NotRunning(error) => return error.into(),
            PauseError::Paused(_) | PauseError::NotPaused { .. } => ProblemKind::AgentNotRunning,
            PauseError::Vmm { .. } => ProblemKind::HostUnable,
            PauseError::ReadOnly(ref error) | PauseError::Unrecorded { ref error, .. } => {
                kind_of_refused(error)
            }
            // The kind is the cause's, the words say what became of the agent.
            PauseError::Snapshot(failure)
            | PauseError::Ended(failure)
            | PauseError::Stuck { failure, .. } => Self::from(failure).0.kind,
        };
        Self::new(kind, words)
    }
}

impl From<BootError> for Refusal {
    fn from(error: BootError) -> Self {
        let kind = match &error {
            BootError::Ended { record, .. } if record.reason == ExitReason::BadSnapshot => {
                ProblemKind::SnapshotUnusable
            }
            BootError::Renewal(_) | BootError::Check(_) | BootError::NoCall { .. } => ProblemKind::ForkFailed,
            BootError::Directory { .. } | BootError::Spawn(_) | BootError::Ending => ProblemKind::HostUnable,
            BootError::Unrecorded(error) => kind_of_refused(error),
            BootError::Ended { record, .. } if record.reason == ExitReason::HostError => {
                ProblemKind::HostUnable
            }
            BootError::Ended { .. }
            | BootError::Deadline { .. }
            | BootError::Standstill { .. }
            | BootError::Hello(_)
            | BootError::Removed => ProblemKind::BootFailed,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<CallError> for Refusal {
    fn from(error: CallError) -> Self {
        let kind = match &error {
            CallError::NotRunning(_) => ProblemKind::AgentNotRunning,
            CallError::Gone { .. } => ProblemKind::AgentGone,
            CallError::Guest(failure) => kind_of(failure),
        };
        Self::new(kind, error.to_string())
    }
}

impl From<LabelError> for Refusal {
    fn from(error: LabelError) -> Self {
        let kind = match &error {
            LabelError::Invalid(_) => ProblemKind::InvalidValue,
            LabelError::Unrecorded(refused) => kind_of_refused(refused),
        };
        Self::new(kind, error.to_string())
    }
}

impl From<AppendError> for Refusal {
    fn from(error: AppendError) -> Self {
        Self::new(kind_of_refused(&error), error.to_string())
    }
}

impl From<LedgerError> for Refusal {
    fn from(error: LedgerError) -> Self {
        match error {
            LedgerError::Read(error) => error.into(),
            LedgerError::Snapshot(error) => Self::new(ProblemKind::Internal, error.to_string()),
        }
    }
}

impl From<ReadError> for Refusal {
    fn from(error: ReadError) -> Self {
        let kind = match error {
            ReadError::Compacted { .. } => ProblemKind::EventsCompacted,
            ReadError::Damaged { .. } => ProblemKind::Internal,
            ReadError::Failing(_) => ProblemKind::LogUnavailable,
        };
        Self::new(kind, error.to_string())
    }
}

/// The kind of problem that it is when something cannot be recorded.
const fn kind_of_refused(error: &AppendError) -> ProblemKind {
    match error {
        AppendError::Conflict { .. } | AppendError::Ended(_) => ProblemKind::InUse,
        AppendError::Busy | AppendError::Failing(_) => ProblemKind::LogUnavailable,
        AppendError::Full(_) => ProblemKind::LogFull,
        AppendError::Closed => ProblemKind::HostUnable,
    }
}

/// The kind of problem that a failed operation in a guest is.
#[must_use]
pub fn kind_of(failure: &GuestFailure) -> ProblemKind {
    match failure {
        GuestFailure::Said(error) => error.code.into(),
        GuestFailure::TooMuch(_) => ProblemKind::FileError,
        GuestFailure::Late(_) => ProblemKind::DeadlinePassed,
        GuestFailure::Unreachable(_) | GuestFailure::Broken(_) | GuestFailure::Closed => {
            ProblemKind::AgentGone
        }
        GuestFailure::Frame(_) | GuestFailure::Unexpected(_) => ProblemKind::GuestMisbehaved,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_sent_with_its_own_status() {
        for kind in ProblemKind::ALL {
            let response = Refusal::new(*kind, "why").into_response();
            assert_eq!(response.status().as_u16(), kind.status());
            assert_eq!(response.headers().contains_key(header::RETRY_AFTER), kind.retry_after_s().is_some());
            assert!(is_problem(&response));
        }
    }

    #[test]
    fn what_axum_refuses_becomes_the_problem_of_its_status() {
        for (status, kind) in [
            (404, ProblemKind::NoRoute),
            (405, ProblemKind::MethodNotAllowed),
            (413, ProblemKind::TooLarge),
            (422, ProblemKind::InvalidValue),
            (400, ProblemKind::BadRequest),
            (415, ProblemKind::BadRequest),
            (426, ProblemKind::BadRequest),
            (500, ProblemKind::Internal),
        ] {
            let refusal = refusal_for(StatusCode::from_u16(status).unwrap(), "GET /x", "because");
            assert_eq!(refusal.0.kind, kind);
        }
    }
}

//! What can go wrong with a call, as each kind of client is told it.

use std::time::Duration;

use ark_mcp::code;
use ark_types::agent::AgentName;
use ark_types::openai::ApiError;
use ark_types::problem::{PROBLEM_JSON, Problem, ProblemKind};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use rmcp::model::{ErrorCode, ErrorData};
use serde::Serialize;
use serde_json::{Value, json};

use super::replica::RpcError;
use crate::problems::Refusal;

/// Most characters of what a VM says that are told.
const MAX_MESSAGE: usize = 2000;

/// Why a call has no result, or not the whole of it.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It was not begun.
    Refused(Box<Problem>),
    /// The budget is used up.
    Spent {
        /// Whose, and which.
        what: String,
        /// When there is some again.
        wait: Duration,
    },
    /// The VM answered so.
    Said(Box<RpcError>),
    /// The VM ended.
    Gone {
        /// Which.
        replica: AgentName,
        /// What was there of the reply.
        text: String,
    },
    /// It took too long.
    Late {
        /// How long it was allowed to take.
        limit: Duration,
        /// What was there of the reply.
        text: String,
    },
}

impl From<Refusal> for Failure {
    fn from(Refusal(problem): Refusal) -> Self {
        Self::Refused(Box::new(problem))
    }
}

impl Failure {
    /// A refusal of `kind` that says `detail`.
    pub(super) fn refused(kind: ProblemKind, detail: impl Into<String>) -> Self {
        Refusal::new(kind, detail).into()
    }

    /// What was there of the reply.
    fn partial(&self) -> Option<&str> {
        match self {
            Self::Refused(_) | Self::Spent { .. } => None,
            Self::Said(error) => error.data.as_ref()?.get("text")?.as_str(),
            Self::Gone { text, .. } | Self::Late { text, .. } => Some(text),
        }
    }

    /// A word for programs.
    fn reason(&self) -> String {
        match self {
            Self::Refused(problem) => word_of(problem.kind),
            Self::Spent { .. } => "budget_used".to_owned(),
            Self::Said(error) => {
                let reason = error.data.as_ref().and_then(|data| data.get("reason")).and_then(Value::as_str);
                reason.unwrap_or("failed").chars().take(64).collect()
            }
            Self::Gone { .. } => "replica_gone".to_owned(),
            Self::Late { .. } => "deadline".to_owned(),
        }
    }

    /// Whether the VM says that another one, or a later try, may do.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Said(error) => {
                matches!(ErrorCode(error.code), code::OVERLOADED | code::STOPPING | code::CANCELLED)
            }
            Self::Gone { .. } => true,
            Self::Refused(_) | Self::Spent { .. } | Self::Late { .. } => false,
        }
    }

    /// It as a problem.
    pub(super) fn problem(&self) -> Problem {
        match self {
            Self::Refused(problem) => (**problem).clone(),
            Self::Spent { what, wait } => {
                let detail = format!("{what}; try again in {} s", wait.as_secs() + 1);
                Problem::new(ProblemKind::BudgetUsed, detail)
            }
            Self::Said(error) => {
                let kind = match (ErrorCode(error.code), self.reason().as_str()) {
                    (_, "too_large") => ProblemKind::TooLarge,
                    (_, "unknown_model") => ProblemKind::ModelNotFound,
                    (ErrorCode::INVALID_PARAMS | ErrorCode::INVALID_REQUEST, _) => ProblemKind::BadRequest,
                    (code::OVERLOADED, _) => ProblemKind::QueueFull,
                    (code::DEADLINE, _) => ProblemKind::DeadlinePassed,
                    (code::STOPPING, _) => ProblemKind::ServiceUnready,
                    _ => ProblemKind::InferenceFailed,
                };
                Problem::new(kind, error.message.chars().take(MAX_MESSAGE).collect::<String>())
            }
            Self::Gone { replica, text } => {
                let detail = format!(
                    "the inference VM {replica} ended while it replied; {} bytes of the reply were there, and another VM takes its place: try again",
                    text.len()
                );
                Problem::new(ProblemKind::AgentGone, detail)
            }
            Self::Late { limit, text } => {
                let detail = format!(
                    "the call was not done after {} ms; {} bytes of the reply were there: allow it more time, or ask for fewer tokens",
                    limit.as_millis(),
                    text.len()
                );
                Problem::new(ProblemKind::DeadlinePassed, detail)
            }
        }
    }

    /// It as an MCP error.
    pub(super) fn rpc(&self) -> ErrorData {
        let problem = self.problem();
        if let Self::Said(error) = self {
            return ErrorData::new(ErrorCode(error.code), problem.detail, error.data.clone());
        }
        let code = match problem.status {
            429 | 503 | 507 => code::OVERLOADED,
            504 => code::DEADLINE,
            400..=499 => ErrorCode::INVALID_PARAMS,
            _ => code::FAILED,
        };
        let mut data = json!({ "reason": self.reason(), "problem": problem.kind });
        if let (Some(text), Some(data)) = (self.partial(), data.as_object_mut()) {
            data.insert("text".to_owned(), text.into());
        }
        if let (Self::Spent { wait, .. }, Some(data)) = (self, data.as_object_mut()) {
            data.insert("retry_after_s".to_owned(), (wait.as_secs() + 1).into());
        }
        ErrorData::new(code, problem.detail, Some(data))
    }

    /// It as the error that `OpenAI` clients read.
    pub(super) fn api_error(&self) -> ApiError {
        let problem = self.problem();
        let kind = match problem.status {
            403 => "permission_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        };
        let code = match self.reason() {
            reason if reason == "context_overflow" => "context_length_exceeded".to_owned(),
            reason => reason,
        };
        ApiError {
            message: problem.detail,
            kind: kind.to_owned(),
            param: None,
            code: Some(code),
            partial: self.partial().map(str::to_owned),
        }
    }
}

/// The last part of a kind's address, as clients of this form write words: `model_not_found`.
fn word_of(kind: ProblemKind) -> String {
    let address = serde_json::to_value(kind).unwrap_or_default();
    let word = address.as_str().and_then(|address| address.rsplit('/').next()).unwrap_or("failed");
    word.replace('-', "_")
}

/// A problem with the same in the form that `OpenAI` clients read.
#[derive(Serialize)]
struct Both {
    #[serde(flatten)]
    problem: Problem,
    error: ApiError,
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let (problem, error) = (self.problem(), self.api_error());
        let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let wait = match &self {
            Self::Spent { wait, .. } => Some(wait.as_secs() + 1),
            _ => problem.kind.retry_after_s().map(u64::from),
        };
        let body = serde_json::to_vec(&Both { problem, error }).unwrap_or_default();
        let mut response = (status, [(header::CONTENT_TYPE, PROBLEM_JSON)], body).into_response();
        if let Some(seconds) = wait {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

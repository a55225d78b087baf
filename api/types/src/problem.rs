//! Errors of the REST API: `application/problem+json` (RFC 9457).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::guest::ErrorCode;

/// Media type of [`Problem`].
pub const PROBLEM_JSON: &str = "application/problem+json";

/// One error, told to a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{detail}")]
pub struct Problem {
    /// Stable kind; a URI reference on the wire: `/problems/name-taken`.
    #[serde(rename = "type")]
    pub kind: ProblemKind,
    /// HTTP status code.
    pub status: u16,
    /// The kind in words.
    pub title: String,
    /// What failed, why, and what to do next.
    pub detail: String,
}

macro_rules! problem_kinds {
    ($($(#[$doc:meta])* $variant:ident = $slug:tt, $status:literal, $title:literal;)*) => {
        /// Stable kinds of problems; a client may match on them.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
        pub enum ProblemKind {
            $($(#[$doc])* #[serde(rename = $slug)] $variant,)*
        }

        impl ProblemKind {
            /// Every kind, for documentation and tests.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// HTTP status code it is sent with.
            #[must_use]
            pub const fn status(self) -> u16 {
                match self { $(Self::$variant => $status,)* }
            }

            /// The kind in words.
            #[must_use]
            pub const fn title(self) -> &'static str {
                match self { $(Self::$variant => $title,)* }
            }
        }
    };
}

problem_kinds! {
    /// The request's body, path or query could not be understood.
    BadRequest = "/problems/bad-request", 400, "The request could not be understood";
    /// No bearer token, or a wrong one.
    Unauthorized = "/problems/unauthorized", 401, "A valid bearer token is needed";
    /// The agent is not allowed to use what it asks for.
    NotAllowed = "/problems/not-allowed", 403, "The agent is not allowed to do this";
    /// No such route.
    NoRoute = "/problems/no-route", 404, "There is nothing at this address";
    /// No agent of that name or id.
    AgentNotFound = "/problems/agent-not-found", 404, "No such agent";
    /// No image of that name.
    ImageNotFound = "/problems/image-not-found", 404, "No such image";
    /// No model of that name.
    ModelNotFound = "/problems/model-not-found", 404, "No such model";
    /// No template of that name.
    TemplateNotFound = "/problems/template-not-found", 404, "No such template";
    /// No service of that name, or no replica of that name in it.
    ServiceNotFound = "/problems/service-not-found", 404, "No such service";
    /// No snapshot of that name.
    SnapshotNotFound = "/problems/snapshot-not-found", 404, "No such snapshot";
    /// No task of that id.
    TaskNotFound = "/problems/task-not-found", 404, "No such task";
    /// No exec of that id that can be taken up again.
    ExecNotFound = "/problems/exec-not-found", 404, "No such exec";
    /// The agent was booted, so nothing was checked.
    NoReceipt = "/problems/no-receipt", 404, "The agent has no receipt";
    /// No such file in the agent.
    FileNotFound = "/problems/file-not-found", 404, "No such file in the agent";
    /// The route exists with another method.
    MethodNotAllowed = "/problems/method-not-allowed", 405, "The method is not allowed here";
    /// The name belongs to a living agent.
    NameTaken = "/problems/name-taken", 409, "The name is taken";
    /// The agent is not running.
    AgentNotRunning = "/problems/agent-not-running", 409, "The agent is not running";
    /// The task has ended.
    TaskEnded = "/problems/task-ended", 409, "The task has ended";
    /// The task has not ended.
    TaskNotEnded = "/problems/task-not-ended", 409, "The task has not ended";
    /// The key belongs to a task of the owner with another body.
    TaskKeyTaken = "/problems/task-key-taken", 409, "The key belongs to another task";
    /// The model comes with the release, so it is neither replaced nor removed.
    ModelBundled = "/problems/model-bundled", 409, "The model comes with the release";
    /// Agents or snapshots need it.
    InUse = "/problems/in-use", 409, "It is in use";
    /// A request with the same idempotency key is still being carried out.
    IdempotencyUnderWay = "/problems/idempotency-under-way", 409, "The same request is under way";
    /// Events that were asked for are no longer in the log.
    EventsCompacted = "/problems/events-compacted", 410, "The events are no longer there";
    /// Output that was asked for was acknowledged before, and is no longer kept.
    ExecOutputGone = "/problems/exec-output-gone", 410, "The output is no longer there";
    /// A condition of the request, such as `If-Match`, does not hold.
    PreconditionFailed = "/problems/precondition-failed", 412, "The condition does not hold";
    /// The body is larger than allowed.
    TooLarge = "/problems/too-large", 413, "The request is too large";
    /// A field has a value outside its bounds.
    InvalidValue = "/problems/invalid-value", 422, "A value is outside its bounds";
    /// The idempotency key was sent with another request.
    IdempotencyKeyReused = "/problems/idempotency-key-reused", 422, "The idempotency key is another request's";
    /// The image file is corrupt or does not match its manifest.
    ImageCorrupt = "/problems/image-corrupt", 422, "The image is corrupt";
    /// The model's file is not one that can be served, or was changed.
    ModelUnusable = "/problems/model-unusable", 422, "The model cannot be served";
    /// Serving the model takes more memory than the host has.
    ModelTooLarge = "/problems/model-too-large", 422, "The model is too large for this host";
    /// The snapshot is damaged, of another release or of another kind of processor.
    SnapshotUnusable = "/problems/snapshot-unusable", 422, "The snapshot cannot be used";
    /// The template's guest or warm-up failed.
    TemplateFailed = "/problems/template-failed", 422, "The template cannot be built";
    /// The image has no evaluator of that language.
    NoEvaluator = "/problems/no-evaluator", 422, "The image has no evaluator";
    /// The program to run does not exist in the agent.
    ProgramNotFound = "/problems/program-not-found", 422, "No such program in the agent";
    /// The program exists but cannot be run.
    ProgramNotExecutable = "/problems/program-not-executable", 422, "The program cannot be run";
    /// The working directory does not exist.
    BadWorkingDirectory = "/problems/bad-working-directory", 422, "The working directory cannot be entered";
    /// The user does not exist in the agent.
    UnknownUser = "/problems/unknown-user", 422, "No such user in the agent";
    /// A file operation failed in the guest.
    FileError = "/problems/file-error", 422, "The file operation failed in the agent";
    /// The owner has as much as it may have.
    QuotaExceeded = "/problems/quota-exceeded", 429, "The owner's quota is used up";
    /// The agent or its owner has made as many calls of models, or used as many tokens, as it may for now.
    BudgetUsed = "/problems/budget-used", 429, "The budget is used up for now";
    /// A model could not go on.
    InferenceFailed = "/problems/inference-failed", 502, "The model could not go on";
    /// The agent's guest ended, or its connection broke, while the request ran.
    AgentGone = "/problems/agent-gone", 502, "The agent ended while the request ran";
    /// The agent did not come up.
    BootFailed = "/problems/boot-failed", 502, "The agent did not start";
    /// A fork did not pass a check, or a snapshot could not be taken, and nothing of it is left.
    ForkFailed = "/problems/fork-failed", 502, "The fork did not come to be";
    /// The guest did something the protocol does not allow.
    GuestMisbehaved = "/problems/guest-misbehaved", 502, "The agent's answer could not be understood";
    /// The host has too little memory or disk, or cannot run VMs.
    HostUnable = "/problems/host-unable", 503, "The host cannot do this now";
    /// The log of events takes nothing in, so nothing that must be remembered can be done.
    LogUnavailable = "/problems/log-unavailable", 503, "The log of events cannot be written";
    /// No host has room, and the request does not wait for it.
    HostFull = "/problems/host-full", 503, "No host has room";
    /// No host has room, and as many requests as may wait for it do.
    QueueFull = "/problems/queue-full", 503, "Too many requests wait for room";
    /// No host had room for as long as the request waited.
    QueueTimeout = "/problems/queue-timeout", 503, "No host had room in time";
    /// No replica of the service took calls for as long as the call waited.
    ServiceUnready = "/problems/service-unready", 503, "No replica of the service is ready";
    /// A deadline of `arkd` passed.
    DeadlinePassed = "/problems/deadline-passed", 504, "The deadline passed";
    /// No room on disk.
    DiskFull = "/problems/disk-full", 507, "There is no room on disk";
    /// No room on disk for the log of events, so nothing that must be remembered can be done.
    LogFull = "/problems/log-full", 507, "There is no room for the log of events";
    /// A defect of `arkd`.
    Internal = "/problems/internal", 500, "arkd failed";
}

impl ProblemKind {
    /// After how many seconds the same request may find room (`Retry-After`); none where waiting alone does not help.
    #[must_use]
    pub const fn retry_after_s(self) -> Option<u32> {
        match self {
            Self::QuotaExceeded | Self::HostFull | Self::QueueFull | Self::BudgetUsed => Some(5),
            // It has waited already.
            Self::QueueTimeout | Self::IdempotencyUnderWay | Self::ServiceUnready => Some(1),
            _ => None,
        }
    }
}

impl From<ErrorCode> for ProblemKind {
    /// The problem that a guest's refusal amounts to.
    fn from(code: ErrorCode) -> Self {
        match code {
            ErrorCode::BadRequest => Self::InvalidValue,
            ErrorCode::ProgramNotFound => Self::ProgramNotFound,
            ErrorCode::ProgramNotExecutable => Self::ProgramNotExecutable,
            ErrorCode::BadWorkingDirectory => Self::BadWorkingDirectory,
            ErrorCode::UnknownUser => Self::UnknownUser,
            ErrorCode::FileNotFound => Self::FileNotFound,
            ErrorCode::FileError => Self::FileError,
            ErrorCode::NoEvaluator => Self::NoEvaluator,
            ErrorCode::NotListening | ErrorCode::NothingKept => Self::ServiceUnready,
            ErrorCode::Exhausted => Self::HostUnable,
            ErrorCode::DeadlinePassed => Self::DeadlinePassed,
            ErrorCode::Internal => Self::GuestMisbehaved,
        }
    }
}

impl Problem {
    /// A problem of `kind` with `detail` for the client.
    #[must_use]
    pub fn new(kind: ProblemKind, detail: impl Into<String>) -> Self {
        Self { kind, status: kind.status(), title: kind.title().to_owned(), detail: detail.into() }
    }
}

//! Code for the interpreter that an agent keeps warm.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Most bytes of a request's code.
pub const MAX_CODE: usize = 64 << 10;
/// Most bytes of a value's or an exception's text; the rest is cut off.
pub const MAX_VALUE: usize = 16 << 10;

/// Languages with an evaluator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Language {
    /// CPython 3.
    #[default]
    Python,
}

/// Body of `POST /v1/agents/{agent}/eval`, and the payload of the guest's `Eval` frame. Names that the code binds stay for
/// the agent's next request; one request is evaluated at a time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EvalRequest {
    /// Statements; when the last one is an expression, its value is the reply's.
    pub code: String,
    /// Language of the code.
    #[serde(default)]
    pub language: Language,
    /// Interrupt the code when it runs longer than this, milliseconds. Code that does not end then is ended with its
    /// interpreter, and the next request begins with a new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// An exception that the code did not catch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EvalException {
    /// Its type: `ZeroDivisionError`.
    pub kind: String,
    /// What it says.
    pub message: String,
    /// Traceback as the language prints it.
    pub traceback: String,
}

/// Payload of the guest's `Evaluated` frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvalEnd {
    /// `repr` of the last expression's value; none when there is none, or it is `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// The exception that ended the code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exception: Option<EvalException>,
    /// Time in the interpreter, microseconds.
    pub duration_us: u64,
}

/// Reply of `POST /v1/agents/{agent}/eval`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EvalReply {
    /// What it wrote to standard output; what is not UTF-8 becomes U+FFFD.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
    /// `repr` of the last expression's value; none when there is none, or it is `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// The exception that ended the code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exception: Option<EvalException>,
    /// Whether output beyond [`crate::exec::MAX_CAPTURE`] was dropped.
    pub truncated: bool,
    /// Time in the interpreter, microseconds.
    pub duration_us: u64,
}

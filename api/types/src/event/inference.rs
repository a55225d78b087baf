//! Calls of models, as they are audited.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::AgentName;

/// A call of a model: who, what and how much, with hashes of the texts, and the texts only where the operator wants them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InferenceCall {
    /// Id of the agent that called; absent for a client of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    /// `chat`, `generate`, `embed` or `tokenize`.
    pub tool: String,
    /// Name of the model.
    pub model: String,
    /// The inference VM that it went to last.
    pub replica: AgentName,
    /// `ok`, `refused`, `failed`, `late` or `abandoned`.
    pub outcome: String,
    /// Bytes of what was asked: messages and several inputs as JSON.
    pub prompt_bytes: u64,
    /// SHA-256 of that, hexadecimal.
    pub prompt_sha256: String,
    /// Bytes of what was said; of vectors and tokens the whole result as JSON.
    pub reply_bytes: u64,
    /// SHA-256 of that, hexadecimal.
    pub reply_sha256: String,
    /// Tokens of the prompt; 0 where the VM did not say.
    pub prompt_tokens: u32,
    /// Of those, the ones that had been computed for an earlier call.
    pub cached_tokens: u32,
    /// Tokens of the reply.
    pub completion_tokens: u32,
    /// Time until it was at the VM, milliseconds.
    pub queued_ms: u64,
    /// Time until the first text, milliseconds; absent when none came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_token_ms: Option<u64>,
    /// Time that it took as a whole, milliseconds.
    pub total_ms: u64,
    /// What was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// What was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply: Option<String>,
}

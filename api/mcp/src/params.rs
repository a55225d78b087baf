//! What the tools take and give; their JSON schemas are made from these types.

use rmcp::schemars::{self, JsonSchema};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How tokens are chosen.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SamplingParams {
    /// 0 takes the likeliest token; larger values spread the choice.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub temperature: Option<f32>,
    /// Only the likeliest tokens that together have this probability.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub top_p: Option<f32>,
    /// Only this many of the likeliest tokens; 0 is all.
    pub top_k: Option<u32>,
    /// Only tokens at least this likely, as a part of the likeliest one's probability.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_p: Option<f32>,
    /// The same seed and prompt give the same text.
    pub seed: Option<u32>,
    /// A GBNF grammar with a rule root that the text must match.
    pub grammar: Option<String>,
    /// A JSON schema that the text must match; not together with grammar.
    pub json_schema: Option<Value>,
}

/// A role in a conversation.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// What holds for the whole conversation.
    System,
    /// Who asks.
    User,
    /// The model.
    Assistant,
    /// A tool that the model called.
    Tool,
}

/// A message of a conversation.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Whose it is.
    pub role: Role,
    /// Its text.
    #[serde(default)]
    pub content: String,
    /// Tool calls of an assistant's message.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// The call that a tool's message answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// Name of the tool or participant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A call of a tool by the model.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq)]
pub struct ToolCall {
    /// Tells the calls of a message apart.
    pub id: String,
    /// Always "function".
    #[serde(rename = "type")]
    pub kind: String,
    /// Which, and with what.
    pub function: FunctionCall,
}

/// A function and its arguments.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq)]
pub struct FunctionCall {
    /// Its name.
    pub name: String,
    /// Its arguments, an object.
    pub arguments: Value,
}

/// Parameters of `chat`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ChatParams {
    /// Name of the model; the server's first when not given.
    pub model: Option<String>,
    /// The conversation so far.
    pub messages: Vec<Message>,
    /// Functions the model may call, as JSON objects in the form of OpenAI's API; only for models whose template has tools.
    #[serde(default)]
    #[schemars(with = "Vec<serde_json::Map<String, Value>>")]
    pub tools: Vec<Value>,
    /// Most tokens of the reply; all that fit the context when not given.
    #[schemars(range(min = 1))]
    pub max_tokens: Option<u32>,
    /// Texts that end the reply, themselves left out; at most 16.
    #[serde(default)]
    pub stop: Vec<String>,
    /// The call fails after this many milliseconds, with what there is by then. At most an hour; ten minutes when not given.
    #[schemars(range(min = 1, max = 3_600_000))]
    pub timeout_ms: Option<u64>,
    /// How tokens are chosen.
    #[serde(default)]
    pub sampling: SamplingParams,
}

/// Parameters of `generate`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GenerateParams {
    /// Name of the model; the server's first when not given.
    pub model: Option<String>,
    /// The text to go on with, as it is.
    pub prompt: String,
    /// Most tokens of the reply; all that fit the context when not given.
    #[schemars(range(min = 1))]
    pub max_tokens: Option<u32>,
    /// Texts that end the reply, themselves left out; at most 16.
    #[serde(default)]
    pub stop: Vec<String>,
    /// The call fails after this many milliseconds, with what there is by then. At most an hour; ten minutes when not given.
    #[schemars(range(min = 1, max = 3_600_000))]
    pub timeout_ms: Option<u64>,
    /// How tokens are chosen.
    #[serde(default)]
    pub sampling: SamplingParams,
}

/// Parameters of `embed`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EmbedParams {
    /// Name of the model; the server's first when not given.
    pub model: Option<String>,
    /// Texts, each of which gets a vector; at most 64.
    pub input: Vec<String>,
    /// The call fails after this many milliseconds. At most an hour; ten minutes when not given.
    #[schemars(range(min = 1, max = 3_600_000))]
    pub timeout_ms: Option<u64>,
}

/// Parameters of `tokenize`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenizeParams {
    /// Name of the model; the server's first when not given.
    pub model: Option<String>,
    /// The text.
    pub text: String,
    /// Adds the tokens that the model wants around a text.
    #[serde(default)]
    pub add_special: bool,
    /// Takes names of control tokens in the text as those tokens.
    #[serde(default)]
    pub parse_special: bool,
}

/// Tokens that a call took.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema)]
pub struct UsageResult {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of those, the ones that had been computed for an earlier call.
    pub cached_tokens: u32,
    /// Tokens of the reply.
    pub completion_tokens: u32,
    /// Prompt and reply.
    pub total_tokens: u32,
}

/// Time that a call took, in milliseconds.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema)]
pub struct Timings {
    /// Until there was room.
    pub queue_ms: f64,
    /// From the call to the first token of the reply.
    pub first_token_ms: f64,
    /// From the call to the end.
    pub total_ms: f64,
    /// Tokens of the reply per second after the first.
    pub tokens_per_second: f64,
}

/// Why a reply ended.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended it, or a stop text came.
    Stop,
    /// It has as many tokens as were asked for.
    Length,
    /// The model calls tools.
    ToolCalls,
}

/// Result of `chat`.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
pub struct ChatResult {
    /// Name of the model.
    pub model: String,
    /// The reply.
    pub message: Message,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens it took.
    pub usage: UsageResult,
    /// Time it took.
    pub timings: Timings,
}

/// Result of `generate`.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
pub struct GenerateResult {
    /// Name of the model.
    pub model: String,
    /// The text that follows the prompt.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens it took.
    pub usage: UsageResult,
    /// Time it took.
    pub timings: Timings,
}

/// Result of `embed`.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
pub struct EmbedResult {
    /// Name of the model.
    pub model: String,
    /// A vector of length 1 for each text.
    pub embeddings: Vec<Vec<f32>>,
    /// Tokens it took.
    pub usage: UsageResult,
}

/// Result of `tokenize`.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
pub struct TokenizeResult {
    /// Name of the model.
    pub model: String,
    /// How many tokens there are.
    pub count: usize,
    /// Their numbers.
    pub tokens: Vec<i32>,
    /// Their texts.
    pub pieces: Vec<String>,
}

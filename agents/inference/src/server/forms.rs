//! The engine's words and the wire's, each in terms of the other.

use ark_mcp::params::{FinishReason, SamplingParams, Timings, UsageResult};

use crate::engine::{Constraint, Finish, Sampling, Usage};

/// The engine's form of `params`; `None` when both a grammar and a schema are given.
pub(super) fn sampling(params: &SamplingParams) -> Option<Sampling> {
    let default = Sampling::default();
    let constraint = match (&params.grammar, &params.json_schema) {
        (Some(_), Some(_)) => return None,
        (Some(grammar), None) => Some(Constraint::Gbnf(grammar.clone())),
        (None, Some(schema)) => Some(Constraint::JsonSchema(schema.to_string())),
        (None, None) => None,
    };
    Some(Sampling {
        temperature: params.temperature.unwrap_or(default.temperature),
        top_p: params.top_p.unwrap_or(default.top_p),
        top_k: params.top_k.unwrap_or(default.top_k),
        min_p: params.min_p.unwrap_or(default.min_p),
        seed: params.seed,
        constraint,
    })
}

impl From<Usage> for UsageResult {
    fn from(usage: Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            cached_tokens: usage.cached_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
        }
    }
}

impl From<Usage> for Timings {
    fn from(usage: Usage) -> Self {
        let speaking = usage.total.saturating_sub(usage.first_token).as_secs_f64();
        let after_first = f64::from(usage.completion_tokens.saturating_sub(1));
        Self {
            queue_ms: usage.queued.as_secs_f64() * 1e3,
            first_token_ms: usage.first_token.as_secs_f64() * 1e3,
            total_ms: usage.total.as_secs_f64() * 1e3,
            tokens_per_second: if speaking > 0.0 { after_first / speaking } else { 0.0 },
        }
    }
}

impl From<Finish> for FinishReason {
    fn from(finish: Finish) -> Self {
        match finish {
            Finish::Length => Self::Length,
            Finish::Stop | Finish::Deadline | Finish::Failed => Self::Stop,
        }
    }
}

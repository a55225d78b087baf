//! The choice of the next token.

use std::io::Read;

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;

use super::{Constraint, RequestError, Sampling};

/// Chooses tokens for one session.
#[derive(Debug)]
pub(super) struct Sampler {
    grammar: Option<LlamaSampler>,
    chain: LlamaSampler,
}

impl Sampler {
    /// # Errors
    /// A grammar or schema that cannot be used.
    pub(super) fn new(model: &LlamaModel, sampling: &Sampling) -> Result<Self, RequestError> {
        let grammar = match &sampling.constraint {
            None => None,
            Some(Constraint::Gbnf(text)) => Some(grammar(model, text)?),
            Some(Constraint::JsonSchema(schema)) => {
                let text = llama_cpp_2::json_schema_to_grammar(schema).map_err(|_| RequestError::Schema)?;
                Some(grammar(model, &text).map_err(|_| RequestError::Schema)?)
            }
        };
        let chain = if sampling.temperature == 0.0 {
            LlamaSampler::greedy()
        } else {
            let top_k = i32::try_from(sampling.top_k).unwrap_or(i32::MAX);
            LlamaSampler::chain(
                [
                    LlamaSampler::top_k(top_k),
                    LlamaSampler::top_p(sampling.top_p, 1),
                    LlamaSampler::min_p(sampling.min_p, 1),
                    LlamaSampler::temp(sampling.temperature),
                    LlamaSampler::dist(sampling.seed.unwrap_or_else(fresh_seed)),
                ],
                true,
            )
        };
        Ok(Self { grammar, chain })
    }

    /// The token after output `index` of the last step; `None` when the grammar allows none.
    pub(super) fn next(&mut self, context: &LlamaContext<'_>, index: i32) -> Option<LlamaToken> {
        let mut candidates = context.token_data_array_ith(index);
        if let Some(grammar) = &mut self.grammar {
            candidates.apply_sampler(grammar);
            // What is forbidden is infinitely unlikely; were all of it, any token would be a lie.
            if !candidates.data.iter().any(|c| c.logit() > f32::NEG_INFINITY) {
                return None;
            }
        }
        candidates.apply_sampler(&mut self.chain);
        let token = candidates.selected_token()?;
        if let Some(grammar) = &mut self.grammar {
            grammar.try_accept(token).ok()?;
        }
        self.chain.accept(token);
        Some(token)
    }
}

fn grammar(model: &LlamaModel, text: &str) -> Result<LlamaSampler, RequestError> {
    LlamaSampler::grammar(model, text, "root").map_err(|_| RequestError::Grammar)
}

/// From the kernel, each time: what a program keeps of randomness is the same in all forks of its VM.
fn fresh_seed() -> u32 {
    let mut bytes = [0; 4];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes));
    if let Err(error) = read {
        tracing::warn!("no randomness from the kernel ({error}); sampling with a fixed seed");
    }
    u32::from_le_bytes(bytes)
}

//! Embeddings, in a context of their own: there every token is an output, of which generating needs only a few, and no text that
//! is embedded takes the place of keys and values that others may come back to.

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::token::LlamaToken;

use super::Config;
use super::worker::{Error, parameters, signed};

/// Reads one text at a time.
pub(super) struct Embedder<'a> {
    context: LlamaContext<'a>,
    batch: LlamaBatch<'a>,
    capacity: usize,
}

impl<'a> Embedder<'a> {
    /// Over a context of these parameters.
    pub(super) fn new(context: LlamaContext<'a>) -> Self {
        let capacity = context.n_batch() as usize;
        Self { context, batch: LlamaBatch::new(capacity, 1), capacity }
    }

    /// A context for one text at a time.
    pub(super) fn parameters(config: &Config) -> LlamaContextParams {
        let batch = config.batch.min(u32::try_from(ark_gguf::EMBEDDING_BATCH).unwrap_or(u32::MAX));
        parameters(&Config { sessions: 1, batch, ..*config }).with_embeddings(true)
    }

    /// Reads on in `text`, of which `read` tokens are read, and adds the last hidden states of what it reads to `sum`; how many
    /// tokens that were.
    pub(super) fn read(
        &mut self,
        text: &[LlamaToken],
        read: usize,
        sum: &mut Vec<f32>,
    ) -> Result<usize, Error> {
        if read == 0 {
            self.context.clear_kv_cache();
        }
        self.batch.clear();
        for (at, token) in text.iter().enumerate().skip(read).take(self.capacity) {
            self.batch.add(*token, signed(at), &[0], true)?;
        }
        self.context.decode(&mut self.batch)?;
        for index in 0..self.batch.n_tokens() {
            let state = self.context.embeddings_ith(index)?;
            sum.resize(state.len(), 0.0);
            sum.iter_mut().zip(state).for_each(|(s, x)| *s += x);
        }
        Ok(self.batch.n_tokens() as usize)
    }
}

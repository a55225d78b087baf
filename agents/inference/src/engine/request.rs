//! What a session asks for and what it gets.

use std::time::{Duration, Instant};

use llama_cpp_2::token::LlamaToken;

use super::Full;

/// How the next token is chosen.
#[derive(Clone, Debug)]
pub struct Sampling {
    /// 0 takes the likeliest token; larger values spread the choice. 0 to 10.
    pub temperature: f32,
    /// Only the likeliest tokens that together have this probability. Above 0, to 1.
    pub top_p: f32,
    /// Only this many of the likeliest tokens; 0 is all.
    pub top_k: u32,
    /// Only tokens at least this likely, as a part of the likeliest one's probability. 0 to 1.
    pub min_p: f32,
    /// The same seed and prompt give the same text; without one each session draws its own.
    pub seed: Option<u32>,
    /// What the text must be.
    pub constraint: Option<Constraint>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.8, top_p: 0.95, top_k: 40, min_p: 0.05, seed: None, constraint: None }
    }
}

/// A form that the text is held to.
#[derive(Clone, Debug)]
pub enum Constraint {
    /// A grammar in llama.cpp's GBNF, with a rule `root`.
    Gbnf(String),
    /// A JSON schema.
    JsonSchema(String),
}

/// What is to be done with a prompt.
#[derive(Clone, Debug)]
pub enum Work {
    /// Go on with it.
    Generate {
        /// How.
        sampling: Sampling,
        /// Most tokens of the reply; all that fit the context when not given.
        max_tokens: Option<u32>,
        /// Texts that end the reply, themselves left out.
        stop: Vec<String>,
    },
    /// The mean of its tokens' last hidden states, of length 1.
    Embed,
}

/// One session.
#[derive(Clone, Debug)]
pub struct Request {
    /// Whose it is: owners take turns.
    pub owner: String,
    /// What the model reads.
    pub prompt: Vec<LlamaToken>,
    /// What is to be done.
    pub work: Work,
    /// When it must have ended.
    pub deadline: Option<Instant>,
}

/// Most texts that end a reply, and their length in bytes.
const MAX_STOPS: usize = 16;
const MAX_STOP: usize = 256;
/// Longest grammar or schema, in bytes.
const MAX_GRAMMAR: usize = 64 << 10;

impl Request {
    /// Checks all that does not need the model; the most tokens of the reply.
    pub(super) fn check(&self, context: u32) -> Result<u32, RequestError> {
        let prompt = u32::try_from(self.prompt.len()).unwrap_or(u32::MAX);
        if prompt == 0 {
            return Err(RequestError::Empty);
        }
        let Work::Generate { sampling, max_tokens, stop } = &self.work else {
            return if prompt > context {
                Err(RequestError::Context { prompt, reply: 0, context })
            } else {
                Ok(0)
            };
        };
        range("temperature", sampling.temperature, 0.0, 10.0)?;
        range("top_p", sampling.top_p, f32::MIN_POSITIVE, 1.0)?;
        range("min_p", sampling.min_p, 0.0, 1.0)?;
        if stop.len() > MAX_STOPS || stop.iter().any(|s| s.is_empty() || s.len() > MAX_STOP) {
            return Err(RequestError::Stops);
        }
        if let Some(Constraint::Gbnf(text) | Constraint::JsonSchema(text)) = &sampling.constraint
            && text.len() > MAX_GRAMMAR
        {
            return Err(RequestError::GrammarSize { bytes: text.len(), limit: MAX_GRAMMAR });
        }
        if *max_tokens == Some(0) {
            return Err(RequestError::NoReply);
        }
        let reply = max_tokens.unwrap_or_else(|| context.saturating_sub(prompt)).max(1);
        if prompt.saturating_add(reply) > context {
            return Err(RequestError::Context { prompt, reply, context });
        }
        Ok(reply)
    }
}

fn range(name: &'static str, found: f32, least: f32, most: f32) -> Result<(), RequestError> {
    // Not a number is in no range.
    if (least..=most).contains(&found) {
        Ok(())
    } else {
        Err(RequestError::Range { name, found, least, most })
    }
}

/// Why a session is refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// A number out of its range.
    #[error("{name} is {found}, but must be from {least} to {most}")]
    Range {
        /// Which.
        name: &'static str,
        /// What was given.
        found: f32,
        /// The least allowed.
        least: f32,
        /// The most allowed.
        most: f32,
    },
    /// Too many, too long or empty stop texts.
    #[error("stop takes at most {MAX_STOPS} texts of 1 to {MAX_STOP} bytes")]
    Stops,
    /// No token to read.
    #[error("the prompt is empty")]
    Empty,
    /// No token to write.
    #[error("max_tokens is 0, but must be at least 1")]
    NoReply,
    /// A text that is too long before it is tokens.
    #[error("the text has {bytes} bytes, but at most {limit} are taken")]
    TooLarge {
        /// Its length.
        bytes: usize,
        /// The most allowed.
        limit: usize,
    },
    /// Prompt and reply do not fit together. Nothing is ever cut off.
    #[error(
        "{prompt} tokens of prompt and {reply} of reply do not fit the context of {context} tokens; shorten the prompt or lower \
         max_tokens"
    )]
    Context {
        /// Tokens of the prompt.
        prompt: u32,
        /// Tokens asked for.
        reply: u32,
        /// Tokens that fit.
        context: u32,
    },
    /// A grammar that is too long.
    #[error("the grammar or schema has {bytes} bytes, but at most {limit} are taken")]
    GrammarSize {
        /// Its length.
        bytes: usize,
        /// The most allowed.
        limit: usize,
    },
    /// A grammar that is none.
    #[error("the grammar cannot be read: it must be GBNF with a rule named root, without left recursion")]
    Grammar,
    /// A schema that cannot be made a grammar.
    #[error("the JSON schema cannot be made a grammar; it may use features that are not supported")]
    Schema,
    /// Too many sessions wait.
    #[error(transparent)]
    Overloaded(#[from] Full),
    /// The engine is going down.
    #[error("the inference server is stopping; try another")]
    Stopped,
}

/// Why a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it, a stop text came, or the grammar was complete.
    Stop,
    /// It has as many tokens as were asked for.
    Length,
    /// Its deadline passed.
    Deadline,
    /// llama.cpp could not go on; the text so far is good.
    Failed,
}

/// What a session took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of those, the ones whose keys and values were there already.
    pub cached_tokens: u32,
    /// Tokens of the reply.
    pub completion_tokens: u32,
    /// Until a slot was free.
    pub queued: Duration,
    /// From submission to the first token of the reply.
    pub first_token: Duration,
    /// From submission to the end.
    pub total: Duration,
}

/// The end of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Why it ended.
    pub finish: Finish,
    /// What it took.
    pub usage: Usage,
}

/// What a session gives, in order; the last is [`Event::Done`].
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// More of the reply: whole characters, stop texts left out.
    Text(String),
    /// What [`Work::Embed`] asked for.
    Embedding(Vec<f32>),
    /// It is over.
    Done(Done),
}

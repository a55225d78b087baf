//! One call: from parameters to a session, its text as progress, its end as a result or an error with numbers.

use std::time::{Duration, Instant};

use ark_mcp::params::{SamplingParams, UsageResult};
use ark_mcp::{MAX_TIMEOUT_MS, OWNER, code};
use llama_cpp_2::token::LlamaToken;
use rmcp::RoleServer;
use rmcp::model::{ErrorCode, ErrorData, ProgressNotificationParam};
use rmcp::service::RequestContext;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::forms::sampling;
use super::template::TemplateError;
use crate::engine::{Done, Engine, Event, Finish, Reply, Request, RequestError, Work};

/// Longest name of an owner, in bytes.
const MAX_OWNER: usize = 128;

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(600);

/// What all calls of sessions have in common.
pub(super) struct Call<'a> {
    pub(super) engine: &'a Engine,
    pub(super) context: &'a RequestContext<RoleServer>,
    pub(super) gone: &'a CancellationToken,
    pub(super) timeout_ms: Option<u64>,
}

/// The text of a session that ended as it should.
pub(super) struct Text {
    pub(super) text: String,
    pub(super) done: Done,
}

/// The parameters of a session that says something.
pub(super) struct Saying<'a> {
    pub(super) sampling: &'a SamplingParams,
    pub(super) max_tokens: Option<u32>,
    pub(super) stop: &'a [String],
}

impl Call<'_> {
    /// Runs a session to its end.
    pub(super) async fn say(&self, prompt: Vec<LlamaToken>, saying: Saying<'_>) -> Result<Text, ErrorData> {
        let sampling = sampling(saying.sampling)
            .ok_or_else(|| invalid("both", "grammar and json_schema cannot both be given; leave one out"))?;
        let work = Work::Generate { sampling, max_tokens: saying.max_tokens, stop: saying.stop.to_vec() };
        let mut reply = self.submit(prompt, work)?;
        let mut text = String::new();
        let done = loop {
            match self.next(&mut reply).await? {
                Event::Text(mut more) => {
                    let mut end = None;
                    // What has come meanwhile goes in the same message.
                    while end.is_none() {
                        match reply.try_next() {
                            Some(Event::Text(next)) => more.push_str(&next),
                            Some(Event::Done(done)) => end = Some(done),
                            Some(Event::Embedding(_)) => {}
                            None => break,
                        }
                    }
                    text.push_str(&more);
                    self.progress(text.len(), more).await?;
                    if let Some(done) = end {
                        break done;
                    }
                }
                Event::Done(done) => break done,
                Event::Embedding(_) => {}
            }
        };
        match done.finish {
            Finish::Stop | Finish::Length => Ok(Text { text, done }),
            Finish::Deadline => {
                Err(unfinished(code::DEADLINE, "deadline", "the call's time is over", &text, &done))
            }
            Finish::Failed => Err(unfinished(
                code::FAILED,
                "failed",
                "the model could not go on (a grammar that allows nothing?)",
                &text,
                &done,
            )),
        }
    }

    /// The embedding of a text, and what it took.
    pub(super) async fn embed(&self, prompt: Vec<LlamaToken>) -> Result<(Vec<f32>, Done), ErrorData> {
        let mut reply = self.submit(prompt, Work::Embed)?;
        let mut embedding = None;
        loop {
            match self.next(&mut reply).await? {
                Event::Embedding(vector) => embedding = Some(vector),
                Event::Text(_) => {}
                Event::Done(done) => {
                    return match (embedding, done.finish) {
                        (Some(vector), _) => Ok((vector, done)),
                        (None, Finish::Deadline) => {
                            Err(unfinished(code::DEADLINE, "deadline", "the call's time is over", "", &done))
                        }
                        (None, _) => {
                            Err(unfinished(code::FAILED, "failed", "the model gave no embedding", "", &done))
                        }
                    };
                }
            }
        }
    }

    fn submit(&self, prompt: Vec<LlamaToken>, work: Work) -> Result<Reply, ErrorData> {
        let timeout = match self.timeout_ms {
            None => DEFAULT_TIMEOUT,
            Some(ms @ 1..=MAX_TIMEOUT_MS) => Duration::from_millis(ms),
            Some(ms) => {
                return Err(invalid(
                    "timeout_ms",
                    &format!("timeout_ms is {ms}, but must be from 1 to {MAX_TIMEOUT_MS}"),
                ));
            }
        };
        let owner = self.context.meta.get(OWNER).and_then(Value::as_str).unwrap_or_default();
        if owner.len() > MAX_OWNER {
            return Err(invalid(
                "owner",
                &format!("the owner's name has {} bytes, at most {MAX_OWNER} are taken", owner.len()),
            ));
        }
        let deadline = Instant::now().checked_add(timeout);
        self.engine.submit(Request { owner: owner.to_owned(), prompt, work, deadline }).map_err(refused)
    }

    async fn next(&self, reply: &mut Reply) -> Result<Event, ErrorData> {
        tokio::select! {
            event = reply.next() => event.ok_or_else(|| refused(RequestError::Stopped)),
            () = self.context.ct.cancelled() => Err(cancelled()),
            () = self.gone.cancelled() => Err(cancelled()),
        }
    }

    /// Gives the caller more of the text, if it asked for progress.
    async fn progress(&self, bytes: usize, more: String) -> Result<(), ErrorData> {
        let Some(token) = self.context.meta.get_progress_token() else { return Ok(()) };
        #[expect(clippy::cast_precision_loss, reason = "a reply is far below 2^52 bytes")]
        let param = ProgressNotificationParam::new(token, bytes as f64).with_message(more);
        tokio::select! {
            sent = self.context.peer.notify_progress(param) => sent.map_err(|_| cancelled()),
            () = self.context.ct.cancelled() => Err(cancelled()),
            () = self.gone.cancelled() => Err(cancelled()),
        }
    }
}

fn cancelled() -> ErrorData {
    ErrorData::new(code::CANCELLED, "the call was cancelled", Some(json!({"reason": "cancelled"})))
}

fn unfinished(code: ErrorCode, reason: &str, what: &str, text: &str, done: &Done) -> ErrorData {
    let usage = UsageResult::from(done.usage);
    let message = format!("{what}; {} tokens of the reply were there", usage.completion_tokens);
    ErrorData::new(code, message, Some(json!({"reason": reason, "text": text, "usage": usage})))
}

/// A parameter that is wrong, with a word for programs and a sentence for people.
pub(super) fn invalid(reason: &str, message: &str) -> ErrorData {
    ErrorData::invalid_params(message.to_owned(), Some(json!({"reason": reason})))
}

/// A session that was refused.
pub(super) fn refused(error: RequestError) -> ErrorData {
    let message = error.to_string();
    match error {
        RequestError::Context { prompt, reply, context } => ErrorData::invalid_params(
            message,
            Some(
                json!({"reason": "context_overflow", "prompt_tokens": prompt, "max_tokens": reply, "context": context}),
            ),
        ),
        RequestError::TooLarge { bytes, limit } => ErrorData::invalid_params(
            message,
            Some(json!({"reason": "too_large", "bytes": bytes, "limit": limit})),
        ),
        RequestError::Overloaded(full) => ErrorData::new(
            code::OVERLOADED,
            message,
            Some(json!({"reason": "overloaded", "waiting": full.waiting})),
        ),
        RequestError::Stopped => ErrorData::new(code::STOPPING, message, Some(json!({"reason": "stopping"}))),
        RequestError::Range { name, .. } => invalid(name, &message),
        RequestError::Stops => invalid("stop", &message),
        RequestError::Empty => invalid("empty", &message),
        RequestError::NoReply => invalid("max_tokens", &message),
        RequestError::Grammar | RequestError::GrammarSize { .. } => invalid("grammar", &message),
        RequestError::Schema => invalid("json_schema", &message),
    }
}

/// A conversation that has no prompt.
pub(super) fn untemplated(error: &TemplateError) -> ErrorData {
    let reason = match error {
        TemplateError::None => "no_chat_template",
        TemplateError::Template(_) => "bad_chat_template",
        TemplateError::Messages(_) => "messages",
        TemplateError::Tools => "tools",
    };
    invalid(reason, &error.to_string())
}

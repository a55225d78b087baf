//! What the inference VMs answer, as `OpenAI` clients read it.

use std::convert::Infallible;
use std::time::Duration;

use ark_mcp::params::{ChatResult, EmbedResult, FinishReason, GenerateResult, UsageResult};
use ark_types::openai::{
    Choice, Completion, Embedding, EmbeddingList, FunctionCall, PromptTokens, ReplyMessage, ToolCall, Usage,
    Vector,
};
use ark_types::problem::ProblemKind;
use axum::Json;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::stream;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::super::Failure;
use super::super::call::{Call, Step};
use super::ask::{Form, VectorFormat};
use crate::host::unix_ms;

/// How often a stream without text shows that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// What ends a stream that came to its end.
const DONE: &str = "[DONE]";

/// A reply that is the same in every chunk.
#[derive(Clone, Debug)]
struct Head {
    id: String,
    created: u64,
    form: Form,
}

impl Head {
    fn new(form: Form) -> Self {
        let kind = if form.is_chat { "chatcmpl" } else { "cmpl" };
        Self { id: format!("{kind}-{:032x}", rand::random::<u128>()), created: unix_ms() / 1000, form }
    }

    fn completion(&self, model: &str, choices: Vec<Choice>, usage: Option<Usage>) -> Completion {
        let object = match self.form {
            Form { is_chat: true, is_stream: true, .. } => "chat.completion.chunk",
            Form { is_chat: true, .. } => "chat.completion",
            Form { .. } => "text_completion",
        };
        Completion {
            id: self.id.clone(),
            object: object.to_owned(),
            created: self.created,
            model: model.to_owned(),
            choices,
            usage,
        }
    }
}

/// The end of a reply.
struct End {
    model: String,
    message: ReplyMessage,
    finish_reason: String,
    usage: Usage,
}

impl End {
    fn of(result: Value, form: Form) -> Result<Self, Failure> {
        if form.is_chat {
            let ChatResult { model, message, finish_reason, usage, .. } = parsed(result)?;
            let calls: Vec<ToolCall> = message
                .tool_calls
                .into_iter()
                .zip(0..)
                .map(|(call, index)| ToolCall {
                    index: form.is_stream.then_some(index),
                    id: call.id,
                    kind: call.kind,
                    function: FunctionCall {
                        name: call.function.name,
                        arguments: call.function.arguments.to_string(),
                    },
                })
                .collect();
            let tool_calls = (!calls.is_empty()).then_some(calls);
            // Beside tool calls there need not be a text.
            let content = Some(message.content).filter(|text| tool_calls.is_none() || !text.is_empty());
            let message = ReplyMessage { role: Some("assistant".to_owned()), content, tool_calls };
            Ok(Self { model, message, finish_reason: word(finish_reason), usage: told(usage) })
        } else {
            let GenerateResult { model, text, finish_reason, usage, .. } = parsed(result)?;
            let message = ReplyMessage { role: None, content: Some(text), tool_calls: None };
            Ok(Self { model, message, finish_reason: word(finish_reason), usage: told(usage) })
        }
    }
}

fn parsed<T: DeserializeOwned>(result: Value) -> Result<T, Failure> {
    serde_json::from_value(result).map_err(|error| {
        let detail = format!("the inference VM's answer cannot be understood: {error}");
        Failure::refused(ProblemKind::GuestMisbehaved, detail)
    })
}

fn word(reason: FinishReason) -> String {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::ToolCalls => "tool_calls",
    }
    .to_owned()
}

fn told(usage: UsageResult) -> Usage {
    Usage {
        prompt_tokens: usage.prompt_tokens.into(),
        completion_tokens: usage.completion_tokens.into(),
        total_tokens: usage.total_tokens.into(),
        prompt_tokens_details: PromptTokens { cached_tokens: usage.cached_tokens.into() },
    }
}

/// The result of a call.
async fn result(call: &mut Call) -> Result<Value, Failure> {
    loop {
        if let Step::Done(result) = call.next().await? {
            return Ok(result);
        }
    }
}

/// The reply as a whole.
///
/// # Errors
/// [`Failure`].
pub(super) async fn whole(mut call: Call, form: Form) -> Result<Response, Failure> {
    let head = Head::new(form);
    let end = End::of(result(&mut call).await?, form)?;
    let finish_reason = Some(end.finish_reason);
    let choice = if form.is_chat {
        Choice { message: Some(end.message), finish_reason, ..Choice::default() }
    } else {
        Choice { text: end.message.content, finish_reason, ..Choice::default() }
    };
    Ok(Json(head.completion(&end.model, vec![choice], Some(end.usage))).into_response())
}

/// A stream under way.
struct Streaming {
    call: Call,
    head: Head,
    model: String,
    /// Something of the text was told.
    has_begun: bool,
    /// What is told next; with `is_over` the last of it.
    ahead: std::collections::VecDeque<Event>,
    is_over: bool,
}

/// The reply as it is said. It begins with the first text: what fails before has a status of its own.
///
/// # Errors
/// [`Failure`].
pub(super) async fn streamed(mut call: Call, form: Form) -> Result<Response, Failure> {
    let first = call.next().await?;
    let model = call.model();
    let mut streaming = Streaming {
        call,
        head: Head::new(form),
        model,
        has_begun: false,
        ahead: std::collections::VecDeque::new(),
        is_over: false,
    };
    streaming.take(Ok(first));
    let events = stream::unfold(streaming, |mut streaming| async move {
        let event = streaming.next().await?;
        Some((Ok::<_, Infallible>(event), streaming))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response())
}

impl Streaming {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ahead.pop_front() {
                return Some(event);
            }
            if self.is_over {
                return None;
            }
            let step = self.call.next().await;
            self.take(step);
        }
    }

    fn tell(&mut self, choices: Vec<Choice>, usage: Option<Usage>) {
        let chunk = self.head.completion(&self.model, choices, usage);
        // Of strings and numbers there is always a JSON form.
        self.ahead.push_back(Event::default().json_data(chunk).unwrap_or_default());
    }

    /// Tells more of the text.
    fn say(&mut self, text: String) {
        let choice = if self.head.form.is_chat {
            let role = (!self.has_begun).then(|| "assistant".to_owned());
            let delta = ReplyMessage { role, content: Some(text), tool_calls: None };
            Choice { delta: Some(delta), ..Choice::default() }
        } else {
            Choice { text: Some(text), ..Choice::default() }
        };
        self.has_begun = true;
        self.tell(vec![choice], None);
    }

    fn take(&mut self, step: Result<Step, Failure>) {
        let end = match step {
            // A text with tool calls in it is taken apart when it is whole.
            Ok(Step::Text(_)) if self.head.form.has_tools => return,
            Ok(Step::Text(text)) => return self.say(text),
            Ok(Step::Done(result)) => End::of(result, self.head.form),
            Err(failure) => Err(failure),
        };
        self.is_over = true;
        match end {
            Ok(end) => self.end(end),
            Err(failure) => {
                let error = json!({ "error": failure.api_error() });
                self.ahead.push_back(Event::default().json_data(error).unwrap_or_default());
            }
        }
    }

    fn end(&mut self, end: End) {
        let End { message, finish_reason, usage, .. } = end;
        // What was said is told, unless none of it was.
        if !self.has_begun {
            self.say(message.content.unwrap_or_default());
        }
        let last = if self.head.form.is_chat {
            let delta = ReplyMessage { tool_calls: message.tool_calls, ..ReplyMessage::default() };
            Choice { delta: Some(delta), ..Choice::default() }
        } else {
            Choice { text: Some(String::new()), ..Choice::default() }
        };
        self.tell(vec![Choice { finish_reason: Some(finish_reason), ..last }], None);
        if self.head.form.tells_usage {
            self.tell(Vec::new(), Some(usage));
        }
        self.ahead.push_back(Event::default().data(DONE));
    }
}

/// The vectors that a call gives.
///
/// # Errors
/// [`Failure`]; also when they are not as long as was asked for.
pub(super) async fn embedded(
    mut call: Call,
    format: VectorFormat,
    dimensions: Option<usize>,
) -> Result<EmbeddingList, Failure> {
    let EmbedResult { model, embeddings, usage } = parsed(result(&mut call).await?)?;
    let has = embeddings.first().map(Vec::len);
    if let (Some(wanted), Some(has)) = (dimensions, has)
        && wanted != has
    {
        let detail = format!("the model's vectors have {has} dimensions, not {wanted}: leave dimensions out");
        return Err(Failure::refused(ProblemKind::BadRequest, detail));
    }
    let vector = |numbers: Vec<f32>| match format {
        VectorFormat::Numbers => Vector::Numbers(numbers),
        VectorFormat::Base64 => {
            let bytes: Vec<u8> = numbers.into_iter().flat_map(f32::to_le_bytes).collect();
            Vector::Base64(STANDARD.encode(bytes))
        }
    };
    let told_as =
        |(index, numbers)| Embedding { object: "embedding".to_owned(), index, embedding: vector(numbers) };
    let data = embeddings.into_iter().enumerate().map(told_as).collect();
    Ok(EmbeddingList { object: "list".to_owned(), data, model, usage: told(usage) })
}

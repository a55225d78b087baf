//! One call, from its beginning to its end.
//!
//! ```text
//!  begin: budget, log ─► model served? ─► turn ─► VM ─► text … ─► result
//!                              ▲                   │ it fails before any text: another one
//!                              └───────────────────┘
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use ark_mcp::{MAX_TIMEOUT_MS, OWNER};
use ark_types::agent::AgentName;
use ark_types::model::ModelName;
use ark_types::problem::ProblemKind;
use serde_json::{Map, Value};
use tokio::time::{Instant as Deadline, timeout_at};
use tracing::{Instrument as _, Span};

use super::Caller;
use super::error::Failure;
use super::fleet::settle;
use super::queue::Turn;
use super::replica::{Asked, Piece, RpcError};
use super::tally::{Tally, Usage};
use crate::core::Core;
use crate::guest::Waiting;
use crate::models;
use crate::problems::Refusal;
use crate::services::call::Picked;
use crate::telemetry::InferenceOutcome as Outcome;
use crate::traces;

/// How often a call goes to a VM.
const TRIES: u32 = 3;
/// How much later than its deadline a VM's own word of that is waited for: it knows what it had generated, and how many tokens.
const GRACE: Duration = Duration::from_secs(2);

/// What a VM can be asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tool {
    /// Replies to a conversation.
    Chat,
    /// Goes on with a text.
    Generate,
    /// Gives vectors to texts.
    Embed,
    /// Tells the tokens of a text.
    Tokenize,
}

impl Tool {
    /// Every one.
    pub(super) const ALL: [Self; 4] = [Self::Chat, Self::Generate, Self::Embed, Self::Tokenize];

    /// Its name on the wire.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Generate => "generate",
            Self::Embed => "embed",
            Self::Tokenize => "tokenize",
        }
    }

    /// The argument that is the prompt.
    const fn prompt(self) -> &'static str {
        match self {
            Self::Chat => "messages",
            Self::Generate => "prompt",
            Self::Embed => "input",
            Self::Tokenize => "text",
        }
    }
}

/// When an answer is told to whoever asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Telling {
    /// As it comes.
    Streamed,
    /// Once it is whole.
    Whole,
}

/// What comes of a call.
#[derive(Debug)]
pub(super) enum Step {
    /// More of the text.
    Text(String),
    /// The result, and with it the end.
    Done(Value),
}

/// A call that is under way in a VM.
#[derive(Debug)]
struct UnderWay {
    // Taken back before the replica counts as free.
    asked: Asked,
    picked: Picked,
}

/// A call. Dropped before its end, it is cancelled wherever it is.
#[derive(Debug)]
pub(super) struct Call {
    core: Arc<Core>,
    caller: Caller,
    tool: Tool,
    arguments: Map<String, Value>,
    model: ModelName,
    limit: Duration,
    deadline: Deadline,
    tries: u32,
    under_way: Option<UnderWay>,
    turn: Option<Turn>,
    telling: Telling,
    /// The agent that asks may stand still.
    waiting: Option<Waiting>,
    tally: Tally,
    span: Span,
}

impl Call {
    /// Begins a call of `tool` with `arguments`, as the VM takes them. An agent that stands still meanwhile runs again when
    /// there is something to tell it.
    ///
    /// # Errors
    /// [`Failure`]: what is wrong with it, or the budget is used up.
    pub(super) async fn begin(
        core: &Arc<Core>,
        caller: &Caller,
        tool: Tool,
        arguments: Map<String, Value>,
        telling: Telling,
    ) -> Result<Self, Failure> {
        let prompt = match arguments.get(tool.prompt()) {
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
            None => String::new(),
        };
        let mut tally = Tally::new(core, caller, tool, prompt);
        let (limit, model) = match check(core, caller, &arguments).await {
            Ok(checked) => checked,
            Err(failure) => {
                tally.outcome = Outcome::Refused;
                return Err(failure);
            }
        };
        Ok(Self {
            core: Arc::clone(core),
            caller: caller.clone(),
            tool,
            arguments,
            model,
            limit,
            deadline: Deadline::now() + limit,
            tries: 0,
            under_way: None,
            turn: None,
            telling,
            waiting: caller.agent_in(core).and_then(|agent| agent.waits_for_a_model(core)),
            tally,
            span: traces::step("inference"),
        })
    }

    /// Name of the model.
    pub(super) fn model(&self) -> String {
        self.model.to_string()
    }

    /// What comes next. After [`Step::Done`] and after a failure nothing does.
    ///
    /// # Errors
    /// [`Failure`].
    pub(super) async fn next(&mut self) -> Result<Step, Failure> {
        let span = self.span.clone();
        let step = self.advance().instrument(span).await;
        match &step {
            Ok(Step::Text(_)) => {}
            Ok(Step::Done(_)) => self.leave(true),
            Err(failure) => {
                self.tally.outcome = match failure {
                    Failure::Refused(_) | Failure::Spent { .. } => Outcome::Refused,
                    Failure::Late { .. } => Outcome::Late,
                    Failure::Said(_) | Failure::Gone { .. } => Outcome::Failed,
                };
                if let Failure::Said(error) = failure {
                    self.tally.usage = error.data.as_ref().and_then(Usage::of);
                }
                self.leave(false);
            }
        }
        let is_told = self.telling == Telling::Streamed || !matches!(step, Ok(Step::Text(_)));
        if let Some(waiting) = self.waiting.as_mut().filter(|_| is_told) {
            waiting.answer().await;
        }
        step
    }

    /// Lets go of the VM and the turn.
    fn leave(&mut self, is_answered: bool) {
        if let Some(UnderWay { asked, picked }) = self.under_way.take() {
            drop(asked);
            picked.end(is_answered);
        }
        self.turn = None;
    }

    async fn advance(&mut self) -> Result<Step, Failure> {
        loop {
            let failure = match self.listen().await {
                Ok(step) => return Ok(step),
                Err(failure) => failure,
            };
            let may_try = failure.is_passing() && self.tally.reply().is_empty() && self.tries < TRIES;
            if !may_try {
                return Err(failure);
            }
            let Some(UnderWay { asked, picked }) = self.under_way.take() else { return Err(failure) };
            drop(asked);
            let handle = picked.handle().clone();
            picked.end(false);
            // Of one that ended the services know in a moment.
            if matches!(failure, Failure::Gone { .. }) {
                settle(&self.core, &handle).await;
            }
        }
    }

    /// What comes next of the VM, which is asked first if none was.
    async fn listen(&mut self) -> Result<Step, Failure> {
        if self.under_way.is_none() {
            let asking = timeout_at(self.deadline, self.ask()).await;
            self.under_way = Some(asking.unwrap_or_else(|_| Err(self.late()))?);
        }
        let Some(UnderWay { asked, picked }) = &mut self.under_way else {
            return Err(Failure::refused(ProblemKind::Internal, "a call went to no VM"));
        };
        match timeout_at(self.deadline + GRACE, asked.next()).await {
            Err(_) => Err(self.late()),
            Ok(None) => {
                let (replica, text) = (picked.handle().name().clone(), self.tally.reply().to_owned());
                Err(Failure::Gone { replica, text })
            }
            Ok(Some(Piece::Text(text))) => {
                self.tally.said(&text);
                Ok(Step::Text(text))
            }
            Ok(Some(Piece::End(answer))) => {
                let result = answer.and_then(structured).map_err(|error| Failure::Said(Box::new(error)))?;
                self.tally.done(&result);
                Ok(Step::Done(result))
            }
        }
    }

    fn late(&self) -> Failure {
        Failure::Late { limit: self.limit, text: self.tally.reply().to_owned() }
    }

    /// Has a VM asked, once it is this call's turn.
    async fn ask(&mut self) -> Result<UnderWay, Failure> {
        let service = self.served().await?;
        if self.turn.is_none() {
            let waiting =
                self.core.inference.turns.wait(&self.core, &service, &self.caller, self.tally.prompt_bytes());
            self.turn = Some(waiting.instrument(traces::step("queue")).await?);
        }
        let patience = Duration::from_secs(self.core.inference.settings.wait_s.get());
        loop {
            let fleet = &self.core.inference.fleet;
            let (picked, replica) = fleet.pick(&self.core, &service, patience, self.deadline).await?;
            self.tries += 1;
            self.tally.queued.get_or_insert(self.tally.elapsed());
            self.tally.replica = Some(picked.handle().name().clone());
            let left = self.deadline.saturating_duration_since(Deadline::now());
            let left = crate::host::millis(left).clamp(1, MAX_TIMEOUT_MS);
            if self.tool != Tool::Tokenize {
                self.arguments.insert("timeout_ms".to_owned(), left.into());
            }
            if let Some(asked) = replica.call(self.tool.name(), &self.arguments, self.meta()).await {
                return Ok(UnderWay { asked, picked });
            }
            let handle = picked.handle().clone();
            picked.end(false);
            if self.tries >= TRIES {
                return Err(Failure::Gone { replica: handle.name().clone(), text: String::new() });
            }
            settle(&self.core, &handle).await;
        }
    }

    /// The service of the call's model.
    async fn served(&mut self) -> Result<AgentName, Refusal> {
        let service = models::ensure_served(&self.core, &self.model).await?;
        self.arguments.insert("model".to_owned(), self.model.as_ref().into());
        self.tally.model = Some(self.model.clone());
        Ok(service)
    }

    fn meta(&self) -> Map<String, Value> {
        let mut meta = Map::new();
        meta.insert(OWNER.to_owned(), self.caller.owner.to_string().into());
        if let Some(traceparent) = traces::going_on(&self.span, None) {
            meta.insert("traceparent".to_owned(), traceparent.into());
        }
        meta
    }
}

/// Whether a call may begin; how long it may take, and its model.
async fn check(
    core: &Core,
    caller: &Caller,
    arguments: &Map<String, Value>,
) -> Result<(Duration, ModelName), Failure> {
    // A call that cannot be recorded would be one that nobody knows of.
    core.ledger.ready().map_err(Refusal::from)?;
    let name = arguments.get("model").filter(|name| !name.is_null());
    let name = name.map(|name| {
        name.as_str()
            .ok_or_else(|| Failure::refused(ProblemKind::BadRequest, "the model's name is no string"))
    });
    let model = caller.model(core, name.transpose()?).await?;
    let usual = Duration::from_secs(core.inference.settings.deadline_s.get());
    let limit = match arguments.get("timeout_ms") {
        None | Some(Value::Null) => usual,
        Some(limit) => match limit.as_u64() {
            Some(ms @ 1..=MAX_TIMEOUT_MS) => Duration::from_millis(ms),
            _ => {
                let detail = format!("timeout_ms is {limit}, but must be from 1 to {MAX_TIMEOUT_MS}");
                return Err(Failure::refused(ProblemKind::BadRequest, detail));
            }
        },
    };
    core.inference.budgets.take(caller, Instant::now())?;
    Ok((limit, model))
}

/// The structured part of a tool's result.
fn structured(mut result: Value) -> Result<Value, RpcError> {
    let failed = |message: String| RpcError { code: ark_mcp::code::FAILED.0, message, data: None };
    if result.get("isError").and_then(Value::as_bool).unwrap_or(false) {
        let text = result.pointer("/content/0/text").and_then(Value::as_str);
        return Err(failed(text.unwrap_or("the inference VM failed and did not say why").to_owned()));
    }
    match result.get_mut("structuredContent").map(Value::take) {
        Some(content @ Value::Object(_)) => Ok(content),
        _ => Err(failed("the inference VM's answer has no result".to_owned())),
    }
}

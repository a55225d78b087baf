//! What is told of a call when it is over: numbers to metrics and budgets, an event to the owner's stream.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ark_types::agent::AgentName;
use ark_types::event::{Event, InferenceCall, Stream};
use ark_types::model::ModelName;
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::call::Tool;
use super::{Caller, Who};
use crate::core::Core;
use crate::host::millis;
use crate::telemetry::InferenceOutcome as Outcome;

/// Bytes of text that count as a token where the VM did not say how many there were.
const BYTES_PER_TOKEN: usize = 4;

/// Tokens that a call took, as the VM says.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Usage {
    pub(super) prompt_tokens: u32,
    pub(super) cached_tokens: u32,
    pub(super) completion_tokens: u32,
}

impl Usage {
    pub(super) fn of(result: &Value) -> Option<Self> {
        Self::deserialize(result.get("usage")?).ok()
    }

    fn total(self) -> u64 {
        u64::from(self.prompt_tokens) + u64::from(self.completion_tokens)
    }
}

/// What is known of a call so far; told when this goes.
#[derive(Debug)]
pub(super) struct Tally {
    core: Arc<Core>,
    caller: Caller,
    tool: Tool,
    /// What is asked, as it is hashed.
    prompt: String,
    began: Instant,
    pub(super) model: Option<ModelName>,
    /// The VM that it went to last.
    pub(super) replica: Option<AgentName>,
    /// How long it waited until it went there.
    pub(super) queued: Option<Duration>,
    first_token: Option<Duration>,
    /// Text of the reply, or the reply where that is no text.
    reply: String,
    pub(super) usage: Option<Usage>,
    pub(super) outcome: Outcome,
}

impl Tally {
    pub(super) fn new(core: &Arc<Core>, caller: &Caller, tool: Tool, prompt: String) -> Self {
        Self {
            core: Arc::clone(core),
            caller: caller.clone(),
            tool,
            prompt,
            began: Instant::now(),
            model: None,
            replica: None,
            queued: None,
            first_token: None,
            reply: String::new(),
            usage: None,
            outcome: Outcome::Abandoned,
        }
    }

    /// Bytes of the prompt.
    pub(super) fn prompt_bytes(&self) -> usize {
        self.prompt.len()
    }

    /// How long the call has taken so far.
    pub(super) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// More of the reply came.
    pub(super) fn said(&mut self, text: &str) {
        self.first_token.get_or_insert(self.began.elapsed());
        self.reply.push_str(text);
    }

    /// What there is of the reply.
    pub(super) fn reply(&self) -> &str {
        &self.reply
    }

    /// The call has a result.
    pub(super) fn done(&mut self, result: &Value) {
        self.usage = Usage::of(result);
        self.outcome = Outcome::Ok;
        if matches!(self.tool, Tool::Embed | Tool::Tokenize) {
            self.reply = result.to_string();
        }
    }

    /// Its tokens, as the VM says or else as its bytes suggest.
    fn tokens(&self) -> u64 {
        if let Some(usage) = self.usage {
            return usage.total();
        }
        let guess = (self.prompt.len() + self.reply.len()).div_ceil(BYTES_PER_TOKEN);
        u64::try_from(guess).unwrap_or(u64::MAX)
    }

    fn record(&self, replica: &AgentName) {
        let usage = self.usage.unwrap_or_default();
        let texts = self.core.inference.settings.texts;
        let call = InferenceCall {
            agent: match &self.caller.who {
                Who::Agent(id) => Some(id.clone()),
                Who::Host => None,
            },
            tool: self.tool.name().to_owned(),
            model: self.model.as_ref().map(ToString::to_string).unwrap_or_default(),
            replica: replica.clone(),
            outcome: self.outcome.label().to_owned(),
            prompt_bytes: u64::try_from(self.prompt.len()).unwrap_or(u64::MAX),
            prompt_sha256: digest(&self.prompt),
            reply_bytes: u64::try_from(self.reply.len()).unwrap_or(u64::MAX),
            reply_sha256: digest(&self.reply),
            prompt_tokens: usage.prompt_tokens,
            cached_tokens: usage.cached_tokens,
            completion_tokens: usage.completion_tokens,
            queued_ms: self.queued.map(millis).unwrap_or_default(),
            first_token_ms: self.first_token.map(millis),
            total_ms: millis(self.elapsed()),
            prompt: texts.then(|| self.prompt.clone()),
            reply: texts.then(|| self.reply.clone()),
        };
        let event = Event::InferenceCalled { call: Box::new(call) };
        // It has its place in the log; the reply does not wait for the disk.
        drop(self.core.ledger.record(Stream::owner(&self.caller.owner), vec![event]));
    }
}

fn digest(text: &str) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Drop for Tally {
    fn drop(&mut self) {
        let inference = &self.core.telemetry.inference;
        let model = self.model.as_ref().map(AsRef::as_ref);
        inference.ended(model, self.tool.name(), self.outcome);
        let Some(replica) = self.replica.take() else { return };
        // Only what went to a VM took anything.
        let tokens = self.tokens();
        self.core.inference.budgets.charge(&self.caller, tokens, Instant::now());
        let model = model.unwrap_or_default();
        inference.times(model, self.queued.unwrap_or_default(), self.first_token, self.elapsed());
        if let Some(usage) = self.usage {
            inference.tokens(model, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens);
            if let Some(first) = self.first_token {
                inference.rate(model, usage.completion_tokens, self.elapsed().saturating_sub(first));
            }
        }
        inference.owner_tokens(&self.caller.owner, tokens);
        self.record(&replica);
    }
}

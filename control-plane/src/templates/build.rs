//! Building one: a hidden agent boots, warms up, is frozen and ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ark_types::eval::{EvalException, EvalReply, EvalRequest};
use ark_types::guest::ErrorCode;
use ark_types::template::CreateTemplate;

use super::TemplateError;
use super::inputs::Inputs;
use super::shelf::{Built, Record};
use crate::admission::admit_size;
use crate::agent::{self, CallError, Handle, HiddenSpec};
use crate::core::Core;
use crate::guest::GuestFailure;
use crate::host::{millis, unix_ms};

/// Time that starting the interpreter may take where there is no warm-up, milliseconds.
const START_MS: u64 = 120_000;
/// How much later than its own limit a warm-up's end may be told, before the guest counts as hung.
const SLACK: Duration = Duration::from_secs(60);

/// The agent that becomes a template; ended with this guard.
struct Hidden(Handle);

impl Drop for Hidden {
    fn drop(&mut self) {
        self.0.ask_removal(Duration::ZERO);
    }
}

/// Builds it. On failure, and when the caller stops waiting, nothing is left.
pub(super) async fn build(
    core: &Arc<Core>,
    request: &CreateTemplate,
    inputs: &Inputs,
) -> Result<Built, TemplateError> {
    let started = Instant::now();
    let CreateTemplate { name, vcpus, memory_mib, .. } = request;
    tracing::info!(%name, digest = inputs.digest, "a template is built");
    admit_size(core, *vcpus, *memory_mib).await.map_err(TemplateError::Agent)?;
    // Before the agent, so that it is dropped after it.
    let draft = core.templates.store().draft_at(core.templates.dir_for(inputs.digits()));
    let spec = HiddenSpec { image: inputs.image.clone(), vcpus: *vcpus, memory_mib: *memory_mib };
    let hidden = agent::boot_hidden(core, spec).await.map_err(|error| TemplateError::Agent(error.into()))?;
    let hidden = Hidden(hidden);
    warm_up(&hidden.0, request).await?;
    hidden.0.snapshot(draft.dir()).await.map_err(|error| TemplateError::Agent(error.into()))?;
    let hold = core.templates.store().adopt(draft.dir(), None)?;
    hidden.0.remove(Duration::ZERO).await;
    let now = unix_ms();
    let record = Record {
        request: request.clone(),
        names: vec![name.clone()],
        digest: inputs.digest.clone(),
        build_ms: millis(started.elapsed()),
        created_unix_ms: now,
        used_unix_ms: now,
    };
    tracing::info!(%name, build_ms = record.build_ms, bytes = hold.manifest().written_bytes, "the template is there");
    Ok(Built { record, hold })
}

/// Starts the interpreter where there is one, and runs the warm-up in it.
async fn warm_up(agent: &Handle, request: &CreateTemplate) -> Result<(), TemplateError> {
    let limit_ms = if request.warm.is_some() { request.timeout_ms } else { START_MS };
    let code = request.warm.clone().unwrap_or_default();
    let eval = EvalRequest { code, timeout_ms: Some(limit_ms), ..EvalRequest::default() };
    let limit = Duration::from_millis(limit_ms);
    let endless = TemplateError::Endless { limit_s: limit_ms.div_ceil(1000) };
    let Ok(reply) = tokio::time::timeout(limit + SLACK, agent.eval(&eval)).await else { return Err(endless) };
    match reply {
        Ok(EvalReply { exception: None, .. }) => Ok(()),
        Ok(EvalReply { exception: Some(exception), duration_us, .. }) => {
            // The interruption of an endless warm-up reaches it as an exception.
            let is_late = duration_us / 1000 >= limit_ms;
            Err(if is_late { endless } else { raised(exception) })
        }
        Err(CallError::Guest(GuestFailure::Said(error))) if error.code == ErrorCode::NoEvaluator => {
            // An image without one makes a template all the same, unless there is something to run in it.
            if request.warm.is_some() {
                Err(TemplateError::NoEvaluator(request.image.clone()))
            } else {
                Ok(())
            }
        }
        Err(CallError::Guest(GuestFailure::Said(error))) if error.code == ErrorCode::DeadlinePassed => {
            Err(endless)
        }
        Err(CallError::Guest(GuestFailure::Late(_))) => Err(endless),
        Err(error) => Err(TemplateError::Guest(error)),
    }
}

/// The exception, with the last line of its traceback that says more than itself.
fn raised(exception: EvalException) -> TemplateError {
    let EvalException { kind, message, traceback } = exception;
    let own = format!("{kind}: {message}");
    let mut lines =
        traceback.lines().map(str::trim).filter(|line| !line.is_empty() && *line != own && *line != kind);
    let last_line = lines.next_back().unwrap_or_default().to_owned();
    TemplateError::Raised { kind, message, last_line }
}

//! Building one: a hidden agent boots, warms up, is frozen and ends.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ark_types::eval::{EvalException, EvalReply, EvalRequest};
use ark_types::exec::ExecRequest;
use ark_types::guest::{ErrorCode, Frame, Kind};
use ark_types::template::CreateTemplate;

use super::TemplateError;
use super::inputs::Inputs;
use super::shelf::{Built, Record};
use crate::admission::{check_size_here, room_to_boot};
use crate::agent::{self, CallError, Handle, HiddenSpec};
use crate::core::Core;
use crate::guest::{GuestFailure, capture};
use crate::host::{millis, unix_ms};
use crate::models::{self, ModelFile};
use crate::scheduler::Ask;
use crate::snapshots::{Draft, Hold};

/// Time that starting the interpreter may take where there is no warm-up, milliseconds.
const START_MS: u64 = 120_000;
/// Time that a program which does nothing may take.
const PROGRAM: Duration = Duration::from_secs(60);

/// The agent that becomes a template, ended with this guard, and then where its snapshot goes.
struct Hidden {
    agent: Handle,
    draft: Option<Draft>,
}

impl Hidden {
    /// Ends the agent and waits for it.
    async fn end(mut self) {
        self.agent.remove(Duration::ZERO).await;
        self.draft = None;
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let (agent, draft) = (self.agent.clone(), self.draft.take());
        agent.ask_removal(Duration::ZERO);
        // Its VMM may write until it is gone.
        if let (Some(draft), Ok(runtime)) = (draft, tokio::runtime::Handle::try_current()) {
            runtime.spawn(async move {
                agent.remove(Duration::ZERO).await;
                drop(draft);
            });
        }
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
    let size = (*vcpus, *memory_mib);
    check_size_here(size).map_err(TemplateError::Agent)?;
    let ask = Ask { name: Some(name.clone()), ..Ask::system(core.scheduler.config().booted(size)) };
    let grant = room_to_boot(core, ask, size).await.map_err(TemplateError::Agent)?;
    let _busy = core.pool.busy();
    if let Some(model) = &inputs.media.model {
        core.models.prove(&core.images, model).await?;
    }
    let spec = HiddenSpec { media: inputs.media.clone(), vcpus: *vcpus, memory_mib: *memory_mib, grant };
    let agent = agent::boot_hidden(core, spec).await.map_err(|error| TemplateError::Agent(error.into()))?;
    let dir = core.templates.dir_for(inputs.digits());
    let draft = core.templates.store().draft_at(dir.clone());
    let hidden = Hidden { agent, draft: Some(draft) };
    let frozen = freeze(core, &hidden.agent, (request, inputs), &dir).await;
    hidden.end().await;
    let hold = frozen?;
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

/// Warms `agent` up and takes its snapshot, which goes with the guard until somebody keeps it.
async fn freeze(
    core: &Core,
    agent: &Handle,
    (request, inputs): (&CreateTemplate, &Inputs),
    dir: &Path,
) -> Result<Hold, TemplateError> {
    match &inputs.media.model {
        Some(model) => serve(agent, model, Duration::from_millis(request.timeout_ms)).await?,
        // A guest that does not keep the time hangs.
        None => warm_up(agent, request, core.config.timing.exec_slack).await?,
    }
    start_a_program(agent).await;
    agent.snapshot(dir).await.map_err(|error| TemplateError::Agent(error.into()))?;
    let store = core.templates.store();
    let hold = store.adopt(dir, None)?;
    store.dispose(hold.id());
    Ok(hold)
}

/// Has `agent` serve `model`.
async fn serve(agent: &Handle, model: &ModelFile, limit: Duration) -> Result<(), TemplateError> {
    let address = agent.guest().map_err(|error| TemplateError::Guest(error.into()))?;
    let unserved = |why| TemplateError::Unserved { model: model.name.clone(), why };
    models::load(address, model, limit).await.map_err(unserved)
}

/// Starts a program, so that forks find what that takes in memory. One that cannot be started says nothing about the template.
async fn start_a_program(agent: &Handle) {
    let request = ExecRequest { argv: vec!["/bin/true".to_owned()], ..ExecRequest::default() };
    let (Ok(guest), Ok(frame)) = (agent.guest(), Frame::json(Kind::Exec, &request)) else { return };
    match tokio::time::timeout(PROGRAM, capture(guest, &frame, &[])).await {
        Ok(Ok(_)) => {}
        Ok(Err(failure)) => tracing::debug!(%failure, "a template's first program did not run"),
        Err(_) => tracing::warn!("a template's first program did not end"),
    }
}

/// Starts the interpreter where there is one, and runs the warm-up in it.
async fn warm_up(agent: &Handle, request: &CreateTemplate, slack: Duration) -> Result<(), TemplateError> {
    let limit_ms = if request.warm.is_some() { request.timeout_ms } else { START_MS };
    let code = request.warm.clone().unwrap_or_default();
    let eval = EvalRequest { code, timeout_ms: Some(limit_ms), ..EvalRequest::default() };
    let limit = Duration::from_millis(limit_ms);
    let endless = TemplateError::Endless { limit_s: limit_ms.div_ceil(1000) };
    let Ok(reply) = tokio::time::timeout(limit + slack, agent.eval(&eval)).await else { return Err(endless) };
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
        Err(CallError::Guest(GuestFailure::Said(error)))
            if error.code == ErrorCode::DeadlinePassed && request.warm.is_some() =>
        {
            Err(endless)
        }
        Err(CallError::Guest(GuestFailure::Late(_))) => Err(endless),
        Err(error) if request.warm.is_some() => Err(TemplateError::WarmUp(error)),
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

//! `/v1/agents/{agent}/eval`: code for the interpreter that the agent keeps warm.

use std::time::{Duration, Instant};

use ark_types::eval::{EvalReply, EvalRequest};
use ark_types::problem::ProblemKind;
use axum::Json;
use axum::extract::{Path, State};
use tracing::Instrument as _;

use super::Shared;
use crate::agent::Handle;
use crate::core::Core;
use crate::problems::Refusal;
use crate::telemetry::Phase;
use crate::traces::step;
use crate::validate::check_eval;

/// Runs code in the agent's evaluator, whose names stay for the next request. A client that disconnects interrupts it.
#[utoipa::path(
    post, path = "/agents/{agent}/eval", tag = "exec",
    params(("agent" = String, Path, description = "Name or id of the agent")),
    request_body = EvalRequest,
    responses((status = OK, body = EvalReply, description = "It ended, well or with an exception")),
)]
pub(super) async fn eval(
    State(core): State<Shared>,
    Path(agent): Path<String>,
    Json(request): Json<EvalRequest>,
) -> Result<Json<EvalReply>, Refusal> {
    check_eval(&request)?;
    let agent = core.registry.find(&agent)?;
    Ok(Json(run(&core, &agent, &request).await?))
}

/// Runs code, which was checked, in the evaluator of `agent`.
pub(super) async fn run(core: &Core, agent: &Handle, request: &EvalRequest) -> Result<EvalReply, Refusal> {
    let _first = agent.use_it().then(|| core.pool.busy_at_first());
    let began = Instant::now();
    let run = agent.eval(request).instrument(step("eval"));
    let reply = match request.timeout_ms {
        None => run.await,
        Some(ms) => {
            // The guest keeps the code's time; this only notices a guest that does not.
            let limit = Duration::from_millis(ms).saturating_add(core.config.timing.exec_slack);
            tokio::time::timeout(limit, run).await.map_err(|_| {
                let detail = format!("the agent {} did not end the code after its {ms} ms", agent.name());
                Refusal::new(ProblemKind::DeadlinePassed, format!("{detail}: it may hang, see `ark logs`"))
            })?
        }
    };
    let reply = reply?;
    core.telemetry.phase(Phase::Eval, began.elapsed());
    Ok(reply)
}

//! `/v1/agents/{agent}/exec`: run a program, as one request or as a stream.

use std::time::{Duration, Instant};

use ark_types::exec::{ExecReply, ExecRequest};
use ark_types::problem::ProblemKind;
use axum::Json;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::{Path, Query, State};
use axum::http::HeaderMap;
use axum::response::Response;
use serde::Deserialize;
use tracing::{Instrument as _, Span};
use utoipa::IntoParams;

use super::Shared;
use super::stream::{Peer, accept, take_up};
use crate::agent::Handle;
use crate::core::Core;
use crate::guest::capture;
use crate::problems::Refusal;
use crate::telemetry::Phase;
use crate::traces::{pass_on, step, traceparent};
use crate::validate::{encode, prepare_exec};

/// Runs a program to its end and replies with its output. A client that disconnects kills the program.
#[utoipa::path(
    post, path = "/agents/{agent}/exec", tag = "exec",
    params(("agent" = String, Path, description = "Name or id of the agent")),
    request_body = ExecRequest,
    responses((status = OK, body = ExecReply, description = "It ended, well or not: see `exit_code`")),
)]
pub(super) async fn exec(
    State(core): State<Shared>,
    Path(agent): Path<String>,
    headers: HeaderMap,
    Json(request): Json<ExecRequest>,
) -> Result<Json<ExecReply>, Refusal> {
    let agent = core.registry.find(&agent)?;
    Ok(Json(run(&core, &agent, &headers, request).await?))
}

/// Runs a program to its end in `agent`.
pub(super) async fn run(
    core: &Core,
    agent: &Handle,
    headers: &HeaderMap,
    mut request: ExecRequest,
) -> Result<ExecReply, Refusal> {
    let address = agent.guest()?;
    let (encoding, timeout_ms) = (request.encoding, request.timeout_ms);
    let step = step("exec");
    pass_on(&mut request, traceparent(&step, headers));
    let (frame, stdin) = prepare_exec(request, agent.env())?;
    let began = Instant::now();
    let run = capture(address, &frame, &stdin).instrument(step);
    let captured = match timeout_ms {
        None => run.await,
        Some(ms) => {
            // The guest keeps the program's time; this only notices a guest that does not.
            let limit = Duration::from_millis(ms).saturating_add(core.config.timing.exec_slack);
            tokio::time::timeout(limit, run).await.map_err(|_| {
                let detail = format!("the agent {} did not end the program after its {ms} ms", agent.name());
                Refusal::new(ProblemKind::DeadlinePassed, format!("{detail}: it may hang, see `ark logs`"))
            })?
        }
    };
    let captured = match captured {
        Ok(captured) => {
            core.telemetry.phase(Phase::Exec, began.elapsed());
            captured
        }
        Err(failure) => return Err(agent.explain(failure).await.into()),
    };
    Ok(ExecReply {
        status: captured.end.status,
        exit_code: captured.end.status.shell_code(),
        stdout: encode(&captured.stdout, encoding),
        stderr: encode(&captured.stderr, encoding),
        truncated: captured.truncated,
        duration_us: captured.end.duration_us,
    })
}

/// Runs a program with its input, output, signals and terminal size as a WebSocket.
///
/// Every binary message is one frame: 8 bytes of header (payload length as u32 little-endian, kind, version 1, two zero
/// bytes) and the payload. The client's first is `Exec` (0x10, an `ExecRequest` as JSON without `stdin`); then it may send
/// `Stdin` 0x12, `StdinClose` 0x13, `Signal` 0x16, `Resize` 0x17. It receives `Started` 0x11, `Stdout` 0x14, `Stderr` 0x15
/// and at last `Exited` 0x18 or `Error` 0x7f. A client that disconnects kills the program.
///
/// With `resumable` in the `ExecRequest` the first message received is `Session` 0x19 (an `ExecSession` as JSON), and the program
/// outlasts a connection that breaks (not one that is closed in order) by `grace_ms`: `/agents/{agent}/exec/stream/{exec}` takes
/// it up. Each side counts the frames that it receives, apart from `Exec`, `Session` and `Ack`, and acknowledges them with `Ack`
/// 0x1a (an `ExecAck` as JSON) at least every 128 KiB, each frame counted as its length and 64 bytes. Either side keeps what
/// was not acknowledged, to send it again; it holds back what would make that more than 1 MiB and one frame.
#[utoipa::path(
    get, path = "/agents/{agent}/exec/stream", tag = "exec",
    params(("agent" = String, Path, description = "Name or id of the agent")),
    responses((status = SWITCHING_PROTOCOLS, description = "The WebSocket")),
)]
pub(super) async fn exec_stream(
    State(core): State<Shared>,
    Path(agent): Path<String>,
    headers: HeaderMap,
    upgrade: WebSocketUpgrade,
) -> Result<Response, Refusal> {
    let agent = core.registry.find(&agent)?;
    agent.guest()?;
    Ok(accept(core, upgrade, Peer::Agent(agent), traceparent(&Span::current(), &headers)))
}

/// From where a program's stream is taken up.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct TakenUpFrom {
    /// How many of the program's frames arrived.
    from: u64,
}

/// Takes a program's stream up whose WebSocket broke.
///
/// The first message received is `Session` again. Its `received` says from which frame on the client sends its input again;
/// what the program says follows from frame `from` on. A client that still has the stream loses it to the newer one, closed with code 4001.
#[utoipa::path(
    get, path = "/agents/{agent}/exec/stream/{exec}", tag = "exec",
    params(
        ("agent" = String, Path, description = "Name or id of the agent"),
        ("exec" = String, Path, description = "`id` of the `ExecSession`"),
        TakenUpFrom,
    ),
    responses((status = SWITCHING_PROTOCOLS, description = "The WebSocket")),
)]
pub(super) async fn resume_exec_stream(
    State(core): State<Shared>,
    Path((agent, exec)): Path<(String, String)>,
    Query(TakenUpFrom { from }): Query<TakenUpFrom>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Refusal> {
    let session = core.execs.find(&agent, &exec, from)?;
    let upgrade = upgrade.map_err(|e| Refusal::new(ProblemKind::BadRequest, e.body_text()))?;
    Ok(take_up(upgrade, session, from))
}

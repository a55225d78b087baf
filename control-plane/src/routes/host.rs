//! `/v1/host`: programs on the host itself, where that is allowed.

use ark_types::problem::ProblemKind;
use axum::extract::State;
use axum::extract::ws::WebSocketUpgrade;
use axum::response::Response;

use super::Shared;
use super::stream::{Peer, accept};
use crate::guest::{Address, Idle};
use crate::problems::Refusal;

/// Runs a program on the emulated host, as a WebSocket like that of an agent's exec stream.
///
/// Only where `arkd` was started with `--host-shell`.
#[utoipa::path(
    get, path = "/host/exec/stream", tag = "host",
    responses((status = SWITCHING_PROTOCOLS, description = "The WebSocket")),
)]
pub(super) async fn host_exec_stream(
    State(core): State<Shared>,
    upgrade: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
) -> Result<Response, Refusal> {
    let Some(socket) = core.config.host_shell.clone() else {
        let detail = "this arkd gives no shell on its host: only that of `ark machine` does";
        return Err(Refusal::new(ProblemKind::NoRoute, detail));
    };
    let upgrade = upgrade.map_err(|e| Refusal::new(ProblemKind::BadRequest, e.body_text()))?;
    let peer = Peer::Host(Address { socket, port: None, idle: Idle::default() });
    Ok(accept(core, upgrade, peer, None))
}

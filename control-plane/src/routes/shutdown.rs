//! `POST /v1/shutdown`.

use ark_types::shutdown::Shutdown;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::Shared;

/// Ends `arkd`, with its agents unless they are to be kept.
///
/// The reply says that it has begun; the end of `arkd` is the end of its process, and that of its sockets.
#[utoipa::path(
    post, path = "/shutdown", tag = "host",
    request_body = Shutdown,
    responses((status = ACCEPTED, description = "It ends")),
)]
pub(super) async fn shut_down(
    State(core): State<Shared>,
    Json(Shutdown { agents }): Json<Shutdown>,
) -> StatusCode {
    tracing::info!(?agents, "a client asks arkd to end");
    core.ask_to_end(agents);
    StatusCode::ACCEPTED
}

//! Inference: who asks, and where that is answered.

use std::sync::Arc;

use ark_types::label::Owner;
use ark_types::problem::ProblemKind;
use axum::Router;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::core::Core;
use crate::problems::Refusal;

/// Models that a caller may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Allowed {
    /// Every one.
    All,
    /// Those of these names.
    Only(Vec<String>),
}

/// Who asks.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    id: String,
    owner: Owner,
    models: Allowed,
}

impl Caller {
    /// The agent `id` of `owner`, which may use `models`.
    pub(crate) const fn agent(id: String, owner: Owner, models: Allowed) -> Self {
        Self { id, owner, models }
    }
}

/// Serves MCP lines of `caller` on `stream`.
pub(crate) async fn serve_mcp<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    _core: Arc<Core>,
    caller: Caller,
    stream: S,
) {
    tracing::debug!(?caller, "no inference yet");
    drop(stream);
}

/// The OpenAI API as `caller` has it.
pub(crate) fn http_router(_core: Arc<Core>, caller: Caller) -> Router {
    let Caller { id, owner, models } = caller;
    let detail = format!("there is no inference yet for {id} of {owner}: {models:?}");
    Router::new().fallback(async move || Refusal::new(ProblemKind::HostUnable, detail))
}

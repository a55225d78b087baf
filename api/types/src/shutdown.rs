//! The end of `arkd` on request.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What becomes of the agents when `arkd` ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AgentsFate {
    /// Each ends in order, and nothing of it stays but what paused ones have on disk.
    #[default]
    End,
    /// They run on, and the next `arkd` goes on with them. Those that go away with their first streamed exec end.
    Keep,
}

/// Body of `POST /v1/shutdown`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Shutdown {
    /// What becomes of the agents.
    #[serde(default)]
    pub agents: AgentsFate,
}

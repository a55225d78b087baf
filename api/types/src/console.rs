//! Consoles of agents that are gone.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::AgentName;
use crate::image::ImageName;

/// The console of an agent that did not start or ended by itself, kept within the operator's limits; `GET
/// /v1/agents/{agent}/logs` serves it by the agent's id or name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KeptConsole {
    /// The agent's id.
    pub id: String,
    /// The agent's name; a later agent may have it, too.
    pub name: AgentName,
    /// The agent's image.
    pub image: ImageName,
    /// When the agent ended, milliseconds since the Unix epoch.
    pub ended_unix_ms: u64,
    /// Why it ended, as a sentence.
    pub reason: String,
    /// Size of the console, bytes.
    pub bytes: u64,
}

/// Reply of `GET /v1/consoles`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KeptConsoleList {
    /// Oldest first.
    pub consoles: Vec<KeptConsole>,
}

//! Where one agent's programs reach the host: sockets that its VMM connects to for them.
//!
//! | port of the host | who answers |
//! |---|---|
//! | [`SERVICES_PORT`](ark_types::guest::SERVICES_PORT) | [`crate::services`]: services are found, and replicas connected with |
//! | [`MCP_PORT`], [`OPENAI_PORT`] | [`crate::inference`], if the agent is allowed to have models say something ([`inference`]) |
//!
//! Everything an agent sends is hostile until checked: what it sends first is bounded in length and time, and its connections in
//! number. They all end with its VMM.

mod inference;
mod port;

use std::io;
use std::sync::Arc;

use ark_types::guest::{MCP_PORT, OPENAI_PORT};
use ark_types::layout::AgentDir;

pub(crate) use port::{Port, part};

use crate::agent::Handle;
use crate::core::Core;
use crate::services;

/// The ports of one agent. Dropping it ends everything that its programs have there.
#[derive(Debug)]
pub(crate) struct Ports {
    /// Held for their end.
    _ports: [Port; 3],
}

impl Ports {
    /// Listens for the agent `id`, whose directory is `dir`, in place of who did before; call it before the VMM starts.
    ///
    /// # Errors
    /// When a socket cannot be made.
    pub(crate) fn listen(core: &Arc<Core>, dir: &AgentDir, id: &str) -> io::Result<Self> {
        Ok(Self {
            _ports: [
                services::listen(core, dir, id)?,
                inference::listen(core, dir, id, MCP_PORT)?,
                inference::listen(core, dir, id, OPENAI_PORT)?,
            ],
        })
    }
}

/// The agent `id`, unless it is none yet, or no more.
pub(crate) fn caller(core: &Core, id: &str) -> Option<Handle> {
    // One that is in no list may have the name of one that is.
    core.registry.find(id).ok().filter(|agent| agent.id() == id)
}

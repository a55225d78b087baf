//! What operators ask: what agents use, and what those that are gone left.

use ark_types::console::KeptConsoleList;
use ark_types::stats::{AgentStats, StatsList};

use crate::error::Error;
use crate::rest::Client;
use crate::uri;

impl Client {
    /// `GET /v1/stats`: what the living agents use.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn stats(&self) -> Result<StatsList, Error> {
        self.get("/v1/stats").await
    }

    /// `GET /v1/agents/{agent}/stats`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn agent_stats(&self, agent: &str) -> Result<AgentStats, Error> {
        self.get(&uri::agent(agent, "/stats")).await
    }

    /// `GET /v1/consoles`: consoles of agents that did not start or ended by themselves.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn consoles(&self) -> Result<KeptConsoleList, Error> {
        self.get("/v1/consoles").await
    }
}

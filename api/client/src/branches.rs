//! The routes of templates, snapshots and forks, and of what an agent is asked besides programs and files.

use ark_types::agent::Agent;
use ark_types::eval::{EvalReply, EvalRequest};
use ark_types::receipt::Receipt;
use ark_types::snapshot::{
    CreateSnapshot, ForkAgent, Forked, RestoreSnapshot, RewindAgent, Snapshot, SnapshotList,
};
use ark_types::template::{CreateTemplate, Template, TemplateList};
use hyper::Method;

use crate::error::Error;
use crate::rest::{Client, empty};
use crate::uri;

impl Client {
    /// `POST /v1/agents/{agent}/eval`: runs code in the interpreter that the agent keeps warm.
    ///
    /// # Errors
    /// See [`Error`]; an exception that the code did not catch is not an error.
    pub async fn eval(&self, agent: &str, request: &EvalRequest) -> Result<EvalReply, Error> {
        self.post(&uri::agent(agent, "/eval"), request).await
    }

    /// `POST /v1/agents/{agent}/fork`: branches a living agent, which goes on; returns when every fork passed its checks
    /// or is gone.
    ///
    /// # Errors
    /// See [`Error`]; forks that failed are in the reply, as long as the branch itself was made.
    pub async fn fork(&self, agent: &str, request: &ForkAgent) -> Result<Forked, Error> {
        self.make(&uri::agent(agent, "/fork"), request).await
    }

    /// `POST /v1/agents/{agent}/pause`: its processors stand still and its memory is on disk.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn pause(&self, agent: &str) -> Result<Agent, Error> {
        self.order(&uri::agent(agent, "/pause")).await
    }

    /// `POST /v1/agents/{agent}/resume`: a paused agent runs again.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn resume(&self, agent: &str) -> Result<Agent, Error> {
        self.order(&uri::agent(agent, "/resume")).await
    }

    /// `POST /v1/agents/{agent}/rewind`: the agent goes on from a snapshot that was taken of it; what happened since is
    /// lost.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn rewind(&self, agent: &str, request: &RewindAgent) -> Result<Agent, Error> {
        self.post(&uri::agent(agent, "/rewind"), request).await
    }

    /// `GET /v1/agents/{agent}/receipt`: what a fork was asked, and what it answered.
    ///
    /// # Errors
    /// See [`Error`]; an agent that was booted has none.
    pub async fn receipt(&self, agent: &str) -> Result<Receipt, Error> {
        self.get(&uri::agent(agent, "/receipt")).await
    }

    /// `POST /v1/agents/{agent}/snapshots`: returns when every byte is on disk; the agent stands still for a moment only.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn take_snapshot(&self, agent: &str, request: &CreateSnapshot) -> Result<Snapshot, Error> {
        self.make(&uri::agent(agent, "/snapshots"), request).await
    }

    /// `GET /v1/snapshots`; with `all` the checkpoints of agents, too.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn snapshots(&self, all: bool) -> Result<SnapshotList, Error> {
        self.get(if all { "/v1/snapshots?all=true" } else { "/v1/snapshots" }).await
    }

    /// `GET /v1/snapshots/{snapshot}`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn snapshot(&self, snapshot: &str) -> Result<Snapshot, Error> {
        self.get(&uri::snapshot(snapshot, "")).await
    }

    /// `DELETE /v1/snapshots/{snapshot}`; with `orphans` even where snapshots that are diffs over it become useless.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn delete_snapshot(&self, snapshot: &str, orphans: bool) -> Result<(), Error> {
        let query = if orphans { "?orphans=true" } else { "" };
        self.send(Method::DELETE, &uri::snapshot(snapshot, query), &[], empty()).await?;
        Ok(())
    }

    /// `POST /v1/snapshots/{snapshot}/compact`: merges the chain below a diff into it, so that it needs no other.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn compact(&self, snapshot: &str) -> Result<Snapshot, Error> {
        self.order(&uri::snapshot(snapshot, "/compact")).await
    }

    /// `POST /v1/snapshots/{snapshot}/restore`: a new agent that goes on from it; returns when it passed every check.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn restore(&self, snapshot: &str, request: &RestoreSnapshot) -> Result<Agent, Error> {
        self.make(&uri::snapshot(snapshot, "/restore"), request).await
    }

    /// `POST /v1/templates`: returns when the template is built, at once where it is there already, unchanged.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn build_template(&self, request: &CreateTemplate) -> Result<Template, Error> {
        self.make("/v1/templates", request).await
    }

    /// `GET /v1/templates`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn templates(&self) -> Result<TemplateList, Error> {
        self.get("/v1/templates").await
    }

    /// `GET /v1/templates/{template}`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn template(&self, template: &str) -> Result<Template, Error> {
        self.get(&uri::template(template)).await
    }

    /// `DELETE /v1/templates/{template}`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn delete_template(&self, template: &str) -> Result<(), Error> {
        self.send(Method::DELETE, &uri::template(template), &[], empty()).await?;
        Ok(())
    }
}

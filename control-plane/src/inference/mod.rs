//! Inference: calls of models, from agents and from clients of the host, on their way to the VMs that models run in.
//!
//! ```text
//!  agent ─ vsock 2:1031, MCP ──┐                  ┌ who may, budgets ┐
//!  agent ─ vsock 2:1032, HTTP ─┼─► Call ─► checks ┤                  ├─► queue ─► fleet ─► replica ─ vsock 1030, MCP ─► VM
//!  host  ─ /v1/…, /mcp ────────┘     │            └ which model      ┘   (turns)   (least calls)
//!                                    └─► text as it comes, the result or what went wrong ─► metrics, budgets, audit event
//! ```
//!
//! | file | what happens there |
//! |---|---|
//! | `call` | one call from its beginning to its end, whichever way it came |
//! | `queue`, `budget` | whose turn it is; how much agents and owners may have |
//! | `fleet`, `replica` | the VMs of a model, and the connection to each |
//! | `scale` | how many VMs each model has, between the bounds of the settings |
//! | `tally` | what is told of a call when it is over |
//! | `mcp`, [`openai`] | the two forms that calls come in |
//! | `error` | what went wrong, in each of them |
//!
//! A call belongs to whoever waits for it: when that is dropped, because a client left or an agent died, the VM is told that nobody
//! wants the answer, and the turn is given back. It goes to another VM when one fails, unless text was there already.

mod budget;
mod call;
mod error;
mod fleet;
mod mcp;
pub(crate) mod openai;
mod queue;
mod replica;
mod scale;
mod tally;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use ark_types::agent::AgentName;
use ark_types::label::Owner;
use ark_types::model::{Model, ModelName};
use ark_types::problem::ProblemKind;

use crate::agent::Handle;
use crate::core::Core;
use crate::models;
use crate::problems::Refusal;
use crate::settings;

pub(crate) use error::Failure;
pub(crate) use mcp::http_service as mcp_service;
pub(crate) use mcp::serve as serve_mcp;
pub(crate) use openai::router as http_router;

/// Model that is taken where a call names none and there are several.
const USUAL: &str = "router";

/// What is shared by all calls.
#[derive(Debug)]
pub struct Inference {
    turns: queue::Turns,
    budgets: budget::Budgets,
    fleet: fleet::Fleet,
    settings: settings::Inference,
}

impl Inference {
    /// As `settings` say.
    #[must_use]
    pub fn new(settings: settings::Inference) -> Self {
        Self {
            turns: queue::Turns::new(settings.queue.count(), settings.sessions.get()),
            budgets: budget::Budgets::new(&settings),
            fleet: fleet::Fleet::default(),
            settings,
        }
    }

    /// Scales the VMs of models from now on.
    pub(crate) fn start(&self, core: &Arc<Core>) {
        tokio::spawn(scale::scale(Arc::downgrade(core), scale::Policy::from(&self.settings)));
    }

    /// How many VMs a model that is used has at least and at most.
    pub(crate) fn bounds(&self) -> (u32, u32) {
        let scale::Policy { min, max, .. } = scale::Policy::from(&self.settings);
        (min, max)
    }

    /// Calls that wait and that are under way, by service.
    pub(crate) fn levels(&self) -> Vec<(AgentName, usize, u64)> {
        self.turns.levels()
    }
}

/// Who makes a call.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Who {
    /// A client of the host.
    Host,
    /// The agent of this id.
    Agent(String),
}

/// Which models somebody may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Allowed {
    /// Every one.
    All,
    /// Those of these names.
    Only(Vec<String>),
}

/// Who makes calls, and which; made by whoever accepts the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    who: Who,
    owner: Owner,
    models: Allowed,
    /// Among calls that wait the highest goes first.
    priority: i32,
}

impl Caller {
    /// A client of the host, on behalf of `owner`.
    pub(crate) const fn host(owner: Owner, priority: i32) -> Self {
        Self { who: Who::Host, owner, models: Allowed::All, priority }
    }

    /// The agent `id` of `owner`.
    pub(crate) const fn agent(id: String, owner: Owner, models: Allowed) -> Self {
        Self { who: Who::Agent(id), owner, models, priority: 0 }
    }

    /// The agent that it is, if it is one still.
    fn agent_in(&self, core: &Core) -> Option<Handle> {
        match &self.who {
            Who::Host => None,
            Who::Agent(id) => crate::ports::caller(core, id),
        }
    }

    fn may_use(&self, model: &str) -> bool {
        match &self.models {
            Allowed::All => true,
            Allowed::Only(names) => names.iter().any(|name| name == model),
        }
    }

    /// The models that it may use, by name.
    ///
    /// # Errors
    /// Why they cannot be told.
    async fn models(&self, core: &Core) -> Result<Vec<Model>, Refusal> {
        let mut models = models::list(core).await?.data;
        models.retain(|model| self.may_use(model.id.as_ref()));
        Ok(models)
    }

    /// The model `name`, or the usual one where none is named.
    ///
    /// # Errors
    /// [`Failure::Refused`]: there is none, or it may not use it.
    async fn model(&self, core: &Core, name: Option<&str>) -> Result<ModelName, Failure> {
        let Some(name) = name else { return self.usual_model(core) };
        if !self.may_use(name) {
            let shown: String = name.chars().take(64).collect();
            let detail = format!(
                "the agent may not use the model {shown:?}: make it with `--allow inference={shown}`, or name one that it may use"
            );
            return Err(Failure::refused(ProblemKind::NotAllowed, detail));
        }
        name.parse().map_err(|error: ark_types::model::InvalidModelName| {
            Failure::refused(ProblemKind::ModelNotFound, format!("there is no such model: {error}"))
        })
    }

    fn usual_model(&self, core: &Core) -> Result<ModelName, Failure> {
        let models = core.models.names().map_err(Refusal::from)?;
        let models: Vec<_> = models.into_iter().filter(|model| self.may_use(model.as_ref())).collect();
        if let Some(usual) = models.iter().find(|model| model.as_ref() == USUAL) {
            return Ok(usual.clone());
        }
        match models.as_slice() {
            [one] => Ok(one.clone()),
            [] => {
                let detail = "there is no model: add one with `ark model add`";
                Err(Failure::refused(ProblemKind::ModelNotFound, detail))
            }
            several => {
                let names: Vec<_> = several.iter().take(20).map(AsRef::as_ref).collect();
                let detail = format!("the call names no model, and there are several: {}", names.join(", "));
                Err(Failure::refused(ProblemKind::BadRequest, detail))
            }
        }
    }
}

//! Models: a stand-in that takes every service `model-<name>` for one. Its place is taken by the store of models.

use std::sync::Arc;

use ark_types::agent::AgentName;
use ark_types::model::{MODEL_PREFIX, Model, ModelList, ModelName, ModelState};
use ark_types::problem::ProblemKind;

use crate::core::Core;
use crate::problems::Refusal;
use crate::services::view;

/// The service that serves `model`.
#[allow(clippy::unused_async, reason = "the real one builds a template")]
pub(crate) async fn ensure_served(core: &Arc<Core>, model: &ModelName) -> Result<AgentName, Refusal> {
    let missing = || Refusal::new(ProblemKind::ModelNotFound, format!("there is no model \"{model}\""));
    let service = view::one(core, &format!("{MODEL_PREFIX}{model}")).map_err(|_| missing())?;
    Ok(service.spec.name)
}

/// Models, by name.
#[allow(clippy::unused_async, reason = "the real one reads files")]
pub(crate) async fn list(core: &Core) -> Result<ModelList, Refusal> {
    let named = |name: AgentName| name.as_ref().strip_prefix(MODEL_PREFIX)?.parse().ok();
    let services = view::all(core).services.into_iter().map(|service| service.spec.name);
    Ok(ModelList::new(services.filter_map(named).map(model).collect()))
}

fn model(id: ModelName) -> Model {
    Model {
        id,
        object: "model".to_owned(),
        created: 0,
        owned_by: "user".to_owned(),
        bytes: 0,
        digest: String::new(),
        architecture: "llama".to_owned(),
        parameters: 0,
        context: 0,
        memory_mib: 0,
        bundled: false,
        state: ModelState::Ready,
    }
}

//! What services are to be, as the events tell of it.

use std::collections::BTreeMap;

use ark_types::agent::AgentName;
use ark_types::event::{Event, Recorded};
use ark_types::service::ServiceSpec;
use serde::{Deserialize, Serialize};

/// What a service is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WantedService {
    /// Without the values of its environment.
    pub spec: ServiceSpec,
    /// Names of the environment's variables.
    #[serde(default)]
    pub env: Vec<String>,
    /// Generation that its replicas are made as.
    pub generation: u64,
    /// The request with a key that made it, if one did.
    #[serde(default)]
    pub request: Option<String>,
}

/// Services, by name. Those that were removed are not kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WantedServices(BTreeMap<AgentName, WantedService>);

impl WantedServices {
    /// Services, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&AgentName, &WantedService)> {
        self.0.iter()
    }

    /// Takes in an event, if it is about a service.
    pub(super) fn apply(&mut self, recorded: &Recorded) {
        let Some(name) = recorded.stream.service_name() else { return };
        match &recorded.event {
            Event::ServiceSet { service, env, generation, request } => {
                let (spec, env, request) = (service.as_ref().clone(), env.clone(), request.clone());
                self.0.insert(name, WantedService { spec, env, generation: *generation, request });
            }
            Event::ServiceRemoved {} => drop(self.0.remove(&name)),
            _ => {}
        }
    }
}

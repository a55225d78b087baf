//! The log of events: no gap, and it amounts to what is told.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::client::{Client, Said};
use crate::model::Model;

/// What the events so far amount to.
#[derive(Debug, Default)]
pub struct History {
    /// Position of the last event.
    position: u64,
    /// Versions of streams.
    versions: BTreeMap<String, u64>,
    /// States of agents by id, and whether they were removed.
    agents: BTreeMap<String, (String, bool)>,
}

impl History {
    /// Reads on.
    ///
    /// # Panics
    /// When there is a gap, or something follows what should be the last.
    pub fn read(&mut self, client: &mut Client<'_>) {
        loop {
            let path = format!("/v1/events?after={}&limit=1000", self.position);
            let Said::Yes(page) = client.call("GET", &path, &Value::Null) else {
                panic!("events are to be had");
            };
            for recorded in page["events"].as_array().into_iter().flatten() {
                self.apply(recorded);
            }
            if page["newest"].as_u64() <= Some(self.position) {
                return;
            }
        }
    }

    fn apply(&mut self, recorded: &Value) {
        self.position += 1;
        assert_eq!(recorded["position"], self.position, "no position is left out");
        let stream = recorded["stream"].as_str().unwrap_or_default();
        let version = self.versions.entry(stream.to_owned()).or_default();
        *version += 1;
        assert_eq!(recorded["version"], *version, "no version of {stream} is left out");
        let Some(id) = stream.strip_prefix("agent/") else { return };
        let event = &recorded["event"];
        let (state, removed) = self.agents.entry(id.to_owned()).or_default();
        assert!(!*removed, "{recorded} follows the removal of {id}");
        let ended = ["stopped", "failed"].contains(&state.as_str());
        match event["type"].as_str().unwrap_or_default() {
            "agent.created" => "creating".clone_into(state),
            "agent.ended" => event["outcome"].as_str().unwrap_or_default().clone_into(state),
            "agent.restarted" => "running".clone_into(state),
            "agent.removed" => *removed = true,
            // A pause and the end of what is being paused are told by different tasks: the end is what counts.
            _ if ended => {}
            "agent.ready" | "agent.resumed" | "agent.rewound" => "running".clone_into(state),
            "agent.paused" => "paused".clone_into(state),
            "agent.stopping" => "stopping".clone_into(state),
            _ => {}
        }
    }

    /// Compares what the events amount to with what is listed, and with what was acknowledged.
    ///
    /// # Errors
    /// The first difference. An event may be on its way: read on and ask again.
    pub fn check(&self, listed: &[Value], model: &Model) -> Result<(), String> {
        let told: BTreeMap<&str, &str> = listed
            .iter()
            .filter_map(|agent| Some((agent["id"].as_str()?, agent["state"].as_str()?)))
            .collect();
        for (id, (state, removed)) in &self.agents {
            match told.get(id.as_str()) {
                None if *removed => {}
                Some(told) if !*removed && told == state => {}
                told => {
                    return Err(format!(
                        "{id} is {told:?}; by its events it is {state}, and that it is removed is {removed}"
                    ));
                }
            }
        }
        if let Some(id) = told.keys().find(|id| !self.agents.contains_key(**id)) {
            return Err(format!("{id} is listed and no event tells of it"));
        }
        let is_removed = |id: &str| self.agents.get(id).is_some_and(|(_, removed)| *removed);
        match model.removed.iter().find(|id| !is_removed(id)) {
            Some(id) => Err(format!("the removal of {id} is in no event")),
            None => Ok(()),
        }
    }
}

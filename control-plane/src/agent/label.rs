//! Labels, changed while the agent lives.

use ark_types::agent::Agent;
use ark_types::event::Event;
use ark_types::label::{InvalidLabel, LabelPatch};

use super::Handle;
use crate::core::Core;
use crate::store::{Append, AppendError};

/// Why an agent's labels stay as they were.
#[derive(Debug, thiserror::Error)]
pub enum LabelError {
    /// They would be none that a thing may have.
    #[error(transparent)]
    Invalid(#[from] InvalidLabel),
    /// They cannot be recorded.
    #[error("the labels stay as they were: {0}")]
    Unrecorded(#[from] AppendError),
}

impl Handle {
    /// Changes its labels, for good. Let nobody drop this while it is waited for.
    ///
    /// # Errors
    /// [`LabelError`]; nothing is changed then.
    pub async fn label(&self, core: &Core, patch: &LabelPatch) -> Result<Agent, LabelError> {
        // One after the other: each begins with what the last one left.
        let _turn = self.0.body.labelling.lock().await;
        let agent = self.agent();
        let labels = agent.labels.patched(patch)?;
        if labels == agent.labels {
            return Ok(agent);
        }
        core.ledger.settled(&self.stream())?;
        // One that is just being claimed is not in the log yet, and its stream has to begin with its creation.
        core.ledger.caught_up().await;
        if core.ledger.projection().agents().get(self.id()).is_none() {
            return Err(AppendError::Busy.into());
        }
        let event = Event::AgentLabelled { labels: labels.clone() };
        core.log.append(Append::new(self.stream(), event)).await?;
        self.0.body.set_labels(labels);
        Ok(self.agent())
    }
}

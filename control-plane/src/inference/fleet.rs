//! The inference VMs that calls go to: replicas of the services that serve models, each with one connection.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ark_types::agent::{AgentName, AgentState};
use tokio::time::{Instant, timeout};

use super::error::Failure;
use super::replica::Replica;
use crate::agent::Handle;
use crate::core::Core;
use crate::problems::Refusal;
use crate::services::call::{self, Picked};

/// How long a VM that cannot be spoken to is waited for to be known as ended, before another one is picked.
const PAUSE: Duration = Duration::from_secs(1);
/// How long the services are waited for to have noticed that.
const LOOK: Duration = Duration::from_millis(250);
/// How often another VM is picked.
const TRIES: u32 = 4;

/// Where the connection to one VM is, and who makes it.
type Slot = tokio::sync::Mutex<Option<Arc<Replica>>>;

/// Connections, by the id of the agent that the VM is.
#[derive(Debug, Default)]
pub(super) struct Fleet(Mutex<HashMap<String, Arc<Slot>>>);

impl Fleet {
    /// The VM of `service` with the fewest calls, and the connection to it. One is waited for until `deadline`, at most for
    /// `patience`.
    ///
    /// # Errors
    /// [`Failure::Refused`].
    pub(super) async fn pick(
        &self,
        core: &Arc<Core>,
        service: &AgentName,
        patience: Duration,
        deadline: Instant,
    ) -> Result<(Picked, Arc<Replica>), Failure> {
        let mut tries = 0;
        loop {
            let patience = patience.min(deadline.saturating_duration_since(Instant::now()));
            let picked = call::begin(core, service.as_ref(), patience).await.map_err(Refusal::from)?;
            let error = match self.connection(picked.handle()).await {
                Ok(replica) => return Ok((picked, replica)),
                Err(error) => error,
            };
            let handle = picked.handle().clone();
            picked.end(false);
            tries += 1;
            if tries == TRIES {
                return Err(error.into());
            }
            settle(core, &handle).await;
        }
    }

    async fn connection(&self, handle: &Handle) -> Result<Arc<Replica>, Refusal> {
        let address = handle.guest()?;
        let slot = {
            let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // What is neither used nor of any use.
            slots.retain(|_, slot| {
                Arc::strong_count(slot) > 1
                    || slot.try_lock().is_ok_and(|slot| slot.as_ref().is_some_and(|r| !r.is_broken()))
            });
            Arc::clone(slots.entry(handle.id().to_owned()).or_default())
        };
        let mut slot = slot.lock().await;
        if let Some(replica) = slot.as_ref().filter(|replica| !replica.is_broken()) {
            return Ok(Arc::clone(replica));
        }
        match Replica::connect(address).await {
            Ok(replica) => Ok(Arc::clone(slot.insert(replica))),
            Err(failure) => Err(handle.explain(failure).await.into()),
        }
    }
}

/// Waits a moment for what has to be known by then of a VM that broke its connection: it ended, and its service does not count on
/// it any more.
pub(super) async fn settle(core: &Core, handle: &Handle) {
    let _ = timeout(PAUSE, handle.until(|agent| agent.state != AgentState::Running)).await;
    core.services.looked(LOOK).await;
}

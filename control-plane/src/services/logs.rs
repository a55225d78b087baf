//! What the command of a replica wrote last, as the guest keeps it; of the last replica whose command ended, as it was told then.

use std::sync::Arc;

use super::keeper::Ended;
use crate::agent::Handle;
use crate::core::Core;
use crate::guest::{Address, Idle, kept_output};
use crate::problems::Refusal;

/// Whose output is asked for.
enum Found {
    /// A replica that is there.
    Here(Handle),
    /// The last one whose command ended.
    Failed(Arc<Ended>),
}

/// What the command of the replica `agent`, by name or id, of the service `name` wrote last: at most
/// [`ark_types::guest::MAX_KEPT_OUTPUT`] bytes.
///
/// # Errors
/// A [`Refusal`]: there is no such service or replica, or its guest does not say.
pub(crate) async fn read(core: &Arc<Core>, name: &str, agent: &str) -> Result<Vec<u8>, Refusal> {
    let found = core.services.with(name, |name, entry| {
        let failed = entry.last_failure.as_ref();
        let failed = failed.filter(|(failure, _)| failure.id == agent || failure.agent.as_ref() == agent);
        match failed {
            Some((_, ended)) => Ok(Found::Failed(Arc::clone(ended))),
            None => entry.find(name, agent).map(|replica| Found::Here(replica.handle.clone())),
        }
    })?;
    let replica = match found? {
        Found::Here(replica) => replica,
        Found::Failed(ended) => return Ok(ended.output.clone()),
    };
    let guest = replica.guest()?;
    // A connection of its own: a look is no use of the agent.
    let guest = Address { idle: Idle::default(), ..guest.clone() };
    match kept_output(&guest).await {
        Ok(output) => Ok(output),
        Err(failure) => Err(replica.explain(failure).await.into()),
    }
}

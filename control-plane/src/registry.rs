//! The agents that are known: the living ones, and the last of those that ended by themselves.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ark_types::agent::AgentName;
use futures_util::future::join_all;

use crate::agent::Handle;
use crate::names;

/// Ended agents that stay known until somebody deletes them; beyond it the oldest go.
pub(crate) const MAX_ENDED: usize = 100;

/// Why no agent was begun.
#[derive(Debug, thiserror::Error)]
pub enum AdmitError {
    /// The name belongs to a living agent.
    #[error("the name {0} belongs to a living agent: choose another, or end it with `ark rm {0}`")]
    NameTaken(AgentName),
    /// `arkd` is about to end.
    #[error("arkd is shutting down: try again when it is back")]
    ShuttingDown,
}

/// No agent of that name or id.
#[derive(Debug, thiserror::Error)]
#[error("there is no agent {0:?}: `ark ps` lists those there are")]
pub struct NoSuchAgent(String);

/// The agents that are known.
#[derive(Debug, Default)]
pub struct Registry {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Oldest first.
    agents: Vec<Handle>,
    shutting_down: bool,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives out an id (that of what was made ahead, or a new one) and a name (`wanted`, or a pleasant one) and takes in the agent that `make` makes with them.
    ///
    /// # Errors
    /// [`AdmitError`]; nothing was made then.
    pub fn admit<T>(
        &self,
        wanted: Option<AgentName>,
        id: Option<String>,
        make: impl FnOnce(String, AgentName) -> (Handle, T),
    ) -> Result<(Handle, T), AdmitError> {
        let mut inner = self.lock();
        if inner.shutting_down {
            return Err(AdmitError::ShuttingDown);
        }
        let taken = |name: &AgentName| inner.agents.iter().any(|a| a.name() == name && !a.has_ended());
        let name = match wanted {
            Some(name) if taken(&name) => return Err(AdmitError::NameTaken(name)),
            Some(name) => name,
            None => loop {
                let name = names::from_dice(rand::random());
                if !taken(&name) {
                    break name;
                }
            },
        };
        let id = id.unwrap_or_else(|| format!("{:016x}", rand::random::<u64>()));
        let (handle, rest) = make(id, name);
        inner.agents.push(handle.clone());
        inner.forget_the_oldest();
        Ok((handle, rest))
    }

    /// Takes in an agent that has ended; its name is free for others.
    pub(crate) fn take_in(&self, ended: Handle) {
        self.lock().agents.push(ended);
    }

    /// The agent with the id `key`, or the living or else newest one of that name.
    ///
    /// # Errors
    /// [`NoSuchAgent`].
    pub fn find(&self, key: &str) -> Result<Handle, NoSuchAgent> {
        let inner = self.lock();
        let named = || inner.agents.iter().rev().filter(|agent| agent.name().as_ref() == key);
        inner
            .agents
            .iter()
            .find(|agent| agent.id() == key)
            .or_else(|| named().find(|agent| !agent.has_ended()))
            .or_else(|| named().next())
            .cloned()
            .ok_or_else(|| NoSuchAgent(key.to_owned()))
    }

    /// Every agent, oldest first.
    #[must_use]
    pub fn all(&self) -> Vec<Handle> {
        self.lock().agents.clone()
    }

    /// Number of living agents.
    #[must_use]
    pub fn living(&self) -> u32 {
        let living = self.lock().agents.iter().filter(|agent| !agent.has_ended()).count();
        u32::try_from(living).unwrap_or(u32::MAX)
    }

    /// Forgets the agent with this id: its owner's last act.
    pub fn forget(&self, id: &str) {
        self.lock().agents.retain(|agent| agent.id() != id);
    }

    /// Takes in no more agents and removes all there are, each given `grace` to end in order; paused
    /// ones stay on disk.
    pub async fn shut_down(&self, grace: Duration) {
        let agents = {
            let mut inner = self.lock();
            inner.shutting_down = true;
            inner.agents.clone()
        };
        join_all(agents.iter().map(|agent| agent.shut_down(grace))).await;
    }

    /// Takes in no more agents and leaves all there are to the next `arkd`; those that came up only halfway end. How many
    /// run on.
    pub async fn leave(&self) -> usize {
        let agents = {
            let mut inner = self.lock();
            inner.shutting_down = true;
            inner.agents.clone()
        };
        let left = join_all(agents.iter().map(Handle::leave)).await;
        left.into_iter().filter(|runs_on| *runs_on).count()
    }
}

impl Inner {
    fn forget_the_oldest(&self) {
        let ended: Vec<&Handle> = self.agents.iter().filter(|agent| agent.has_ended()).collect();
        let excess = ended.len().saturating_sub(MAX_ENDED);
        for agent in ended.into_iter().take(excess) {
            agent.ask_removal(Duration::ZERO);
        }
    }
}

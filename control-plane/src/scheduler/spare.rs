//! What standbys of the pool have: room that nobody has reserved, and only as long as nobody does.
//!
//! | | |
//! |---|---|
//! | a standby is made | only where it fits beside everything that is reserved and every other standby |
//! | a request looks for room | as if there were no standbys: none is ever the reason that one waits or is refused |
//! | what was granted and the standbys are more than the host may give | the pool ends standbys until they are not |

use std::sync::Arc;

use ark_types::agent::AgentName;
use ark_types::scheduling::Resources;

use super::{HERE, Scheduler};

/// What a standby has, given back when dropped.
#[derive(Debug)]
pub struct Spare {
    scheduler: Arc<Scheduler>,
    needs: Resources,
}

impl Spare {
    /// What it is.
    #[must_use]
    pub const fn needs(&self) -> Resources {
        self.needs
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        let mut inner = self.scheduler.lock();
        inner.spare = inner.spare.minus(self.needs);
        drop(inner);
        self.scheduler.spare_changed.notify_one();
    }
}

impl Scheduler {
    /// Takes `needs` for a standby, if nobody has it. Those that wait for room lose nothing by that: they get it as well.
    #[must_use]
    pub fn spare(self: &Arc<Self>, needs: Resources) -> Option<Spare> {
        let mut inner = self.lock();
        let spare = inner.spare.plus(needs);
        let fits = inner.hosts.used(HERE).plus(spare).is_within(&inner.hosts.limit(HERE));
        if !fits {
            return None;
        }
        inner.spare = spare;
        drop(inner);
        Some(Spare { scheduler: Arc::clone(self), needs })
    }

    /// What all standbys have.
    #[must_use]
    pub fn spared(&self) -> Resources {
        self.lock().spare
    }

    /// What standbys have that others were promised.
    #[must_use]
    pub fn overdrawn(&self) -> Resources {
        let inner = self.lock();
        let (used, limit) = (inner.hosts.used(HERE), inner.hosts.limit(HERE));
        let excess = used.plus(inner.spare).minus(limit);
        // What agents that were there before have beyond the limit is not for standbys to give back.
        Resources {
            agents: excess.agents.min(inner.spare.agents),
            memory_mib: excess.memory_mib.min(inner.spare.memory_mib),
            vcpus: excess.vcpus.min(inner.spare.vcpus),
        }
    }

    /// Waits until what standbys may have may be something else.
    pub async fn spare_changed(&self) {
        self.spare_changed.notified().await;
    }

    /// Notes whether there are standbys of `template` here.
    pub fn set_warm(&self, template: &AgentName, is_warm: bool) {
        self.lock().hosts.set_warm(HERE, template, is_warm);
    }

    /// Templates of which there are standbys here, by name.
    #[must_use]
    pub fn warm(&self) -> Vec<AgentName> {
        self.lock().hosts.warm(HERE)
    }
}

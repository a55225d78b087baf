//! What is reserved for an agent, for as long as somebody has the grant.

use std::sync::Arc;

use ark_types::label::Owner;
use ark_types::scheduling::Resources;

use super::placement::{HostId, Request};
use super::{Apart, Scheduler};

/// Memory that the VMM of an agent has when the guest's own is on disk, MiB.
const ON_DISK_MIB: u64 = 4;

/// A reservation. Clones are the same one; it ends with the last of them.
#[derive(Clone, Debug)]
pub struct Grant(Arc<Lease>);

#[derive(Debug)]
pub(super) struct Lease {
    pub(super) scheduler: Arc<Scheduler>,
    pub(super) owner: Owner,
    pub(super) host: HostId,
    pub(super) request: Request,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.scheduler.release(&self.owner, self.host, &self.request);
    }
}

impl Grant {
    /// The grant of what is reserved already.
    pub(super) fn of(lease: Lease) -> Self {
        Self(Arc::new(lease))
    }

    /// What is reserved.
    #[must_use]
    pub fn needs(&self) -> Resources {
        self.0.request.needs
    }

    /// The group whose agents it is kept apart from.
    #[must_use]
    pub fn apart(&self) -> Option<Apart> {
        self.0.request.apart.clone()
    }

    /// What an agent keeps while it stands still with its memory on disk: its VMM, but no processor, and no place among the
    /// agents nor in a group that is kept apart. To go on it needs a grant like that of a fork.
    #[must_use]
    pub fn on_disk(&self) -> Self {
        let needs = Resources { agents: 0, memory_mib: ON_DISK_MIB, vcpus: 0 };
        self.0.scheduler.claim(&self.0.owner, needs, None)
    }
}

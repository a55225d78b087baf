//! What each owner may have, as the events tell of it.

use std::collections::BTreeMap;

use ark_types::event::{Event, Recorded};
use ark_types::label::Owner;
use ark_types::scheduling::Quota;
use serde::{Deserialize, Serialize};

/// Quotas, by owner. Owners that may have everything are not kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Quotas(BTreeMap<Owner, Quota>);

impl Quotas {
    /// Owners that have a quota, and that, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&Owner, Quota)> {
        self.0.iter().map(|(owner, quota)| (owner, *quota))
    }

    /// What `owner` may have.
    #[must_use]
    pub fn of(&self, owner: &Owner) -> Quota {
        self.0.get(owner).copied().unwrap_or_default()
    }

    /// Takes in an event, if it is about a quota.
    pub(super) fn apply(&mut self, recorded: &Recorded) {
        let Event::OwnerQuotaSet { quota } = recorded.event else { return };
        let Some(owner) = recorded.stream.owner_name() else { return };
        if quota == Quota::default() {
            self.0.remove(&owner);
        } else {
            self.0.insert(owner, quota);
        }
    }
}

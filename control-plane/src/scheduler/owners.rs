//! What each owner may have, has, and waits for.

use std::collections::BTreeMap;

use ark_types::label::Owner;
use ark_types::scheduling::{OwnerQuota, Quota, Resources};

use super::denied::OverQuota;
use super::placement::Lack;

#[derive(Clone, Debug, Default, PartialEq)]
struct Account {
    quota: Quota,
    reserved: Resources,
    waiting: Resources,
}

/// See the module. Owners of whom there is nothing to say are not kept.
#[derive(Debug, Default)]
pub(super) struct Owners {
    accounts: BTreeMap<Owner, Account>,
}

impl Owners {
    fn change(&mut self, owner: &Owner, change: impl FnOnce(&mut Account)) {
        let account = self.accounts.entry(owner.clone()).or_default();
        change(account);
        if *account == Account::default() {
            self.accounts.remove(owner);
        }
    }

    pub(super) fn takes(&mut self, owner: &Owner, needs: Resources) {
        self.change(owner, |account| account.reserved = account.reserved.plus(needs));
    }

    pub(super) fn gives(&mut self, owner: &Owner, needs: Resources) {
        self.change(owner, |account| account.reserved = account.reserved.minus(needs));
    }

    pub(super) fn waits(&mut self, owner: &Owner, needs: Resources) {
        self.change(owner, |account| account.waiting = account.waiting.plus(needs));
    }

    pub(super) fn waits_no_more(&mut self, owner: &Owner, needs: Resources) {
        self.change(owner, |account| account.waiting = account.waiting.minus(needs));
    }

    pub(super) fn set_quota(&mut self, owner: &Owner, quota: Quota) {
        self.change(owner, |account| account.quota = quota);
    }

    pub(super) fn used(&self, owner: &Owner) -> Resources {
        self.accounts.get(owner).map(|account| account.reserved).unwrap_or_default()
    }

    /// Whether `owner` may ask for `needs` besides all that it has and waits for.
    pub(super) fn check(&self, owner: &Owner, needs: Resources) -> Result<(), OverQuota> {
        let Some(account) = self.accounts.get(owner) else { return Ok(()) };
        account.check(owner, account.reserved.plus(account.waiting), needs)
    }

    /// Whether `owner` may have `needs` besides all that it has.
    pub(super) fn check_without_waiting(&self, owner: &Owner, needs: Resources) -> Result<(), OverQuota> {
        let Some(account) = self.accounts.get(owner) else { return Ok(()) };
        account.check(owner, account.reserved, needs)
    }

    pub(super) fn describe(&self, owner: &Owner) -> OwnerQuota {
        let Account { quota, reserved, waiting } = self.accounts.get(owner).cloned().unwrap_or_default();
        OwnerQuota { owner: owner.clone(), quota, reserved, waiting }
    }

    pub(super) fn all(&self) -> Vec<OwnerQuota> {
        self.accounts.keys().map(|owner| self.describe(owner)).collect()
    }
}

impl Account {
    fn check(&self, owner: &Owner, has: Resources, needs: Resources) -> Result<(), OverQuota> {
        let Quota { agents, memory_mib, vcpus } = self.quota;
        let limit = Resources {
            agents: agents.unwrap_or(u64::MAX),
            memory_mib: memory_mib.unwrap_or(u64::MAX),
            vcpus: vcpus.unwrap_or(u64::MAX),
        };
        match Lack::first(needs, limit.minus(has), limit) {
            Some(lack) => Err(OverQuota { owner: owner.clone(), lack }),
            None => Ok(()),
        }
    }
}

//! Whether there is room for an agent, and who gets it next.
//!
//! ```text
//!  admit ──► quota of the owner? ──► queue ──► first that fits ([`queue`], [`placement`]) ──► Grant ──► agent's life
//!               no: refused            │ full, or waited for too long: refused with what is missing      │
//!                                      └── who stops waiting leaves it                 ◄── room ── dropped ┘
//! ```
//!
//! | what | reserves |
//! |---|---|
//! | an agent that boots | its memory and its processors |
//! | one that goes on from a snapshot (fork, restore, resume) | its processors, and its memory divided by `overcommit_forks` |
//! | a paused one, on disk | what its VMM has without the guest's memory; it leaves the group that is kept apart, and joins it again to go on |
//! | a rewound one | what it had |
//! | a template while it is built | as one that boots, for the owner [`SYSTEM`] |
//! | a standby of the pool | as a fork, but only what nobody has: see [`Spare`] |
//! | a VMM that the pool prepared | nothing: it has no guest yet, and is the first to go when memory is short |
//!
//! A reservation is a promise about a number. What is really left of the host's memory is asked for besides, when the grant is
//! there: see [`crate::admission`].

mod config;
mod denied;
mod grant;
mod owners;
pub mod placement;
pub mod queue;
mod spare;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ark_types::agent::AgentName;
use ark_types::label::Owner;
use ark_types::scheduling::{
    DEFAULT_QUEUE_TIMEOUT, OwnerQuota, Quota, RequestQueue, Resources, Spread, WaitingRequest,
};
use tokio::sync::{Notify, oneshot};

pub use config::SchedulerConfig;
pub use denied::{Denied, Missing, OverQuota};
pub use grant::Grant;
pub use spare::Spare;

use crate::host::millis;
use grant::Lease;
use owners::Owners;
use placement::{HostId, Hosts, Misfit, Request};
use queue::{Entry, Fit, Now, Queue, Ticket};

/// Owner of what is not any client's: templates that are being built.
pub const SYSTEM: &str = "system";
/// The one host.
const HERE: HostId = HostId(0);

/// A group whose agents are kept apart, and how strictly.
pub type Apart = (AgentName, Spread);

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Who asks.
    pub owner: Owner,
    /// Among those that wait the highest goes first.
    pub priority: i32,
    /// Longest wait for room; nothing is no wait.
    pub patience: Duration,
    /// Name that the agent is to have, as far as it is known.
    pub name: Option<AgentName>,
    /// What one agent needs.
    pub needs: Resources,
    /// Group whose agents are kept apart.
    pub apart: Option<Apart>,
    /// Template that it is forked from, which is better found warm.
    pub template: Option<AgentName>,
}

impl Ask {
    /// An ask of `owner` without wishes, for one that needs `needs`.
    #[must_use]
    pub const fn new(owner: Owner, needs: Resources) -> Self {
        let (patience, priority) = (DEFAULT_QUEUE_TIMEOUT, 0);
        Self { owner, priority, patience, name: None, needs, apart: None, template: None }
    }

    /// As [`Self::new`], for the owner [`SYSTEM`].
    ///
    /// # Panics
    /// Never: it is a name.
    #[must_use]
    pub fn system(needs: Resources) -> Self {
        Self::new(SYSTEM.parse().expect("a label"), needs)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    started: Instant,
    inner: Mutex<Inner>,
    /// Told when standbys have too much, or may have more.
    spare_changed: Notify,
}

#[derive(Debug)]
struct Inner {
    hosts: Hosts,
    /// What standbys have beside what is reserved.
    spare: Resources,
    owners: Owners,
    queue: Queue<Waiter>,
}

/// A request in the queue.
#[derive(Debug)]
struct Waiter {
    request: Request,
    /// How many agents it is for, each with the same part of what it needs.
    count: u32,
    name: Option<AgentName>,
    patience: Duration,
    answer: oneshot::Sender<Result<Vec<Grant>, Denied>>,
}

/// Where the answer to a request comes.
type Answer = oneshot::Receiver<Result<Vec<Grant>, Denied>>;

/// A place in the queue, given up with this.
struct Place {
    scheduler: Arc<Scheduler>,
    ticket: Ticket,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inner = self.scheduler.lock();
        if let Some(entry) = inner.queue.remove(self.ticket) {
            inner.owners.waits_no_more(&entry.owner, entry.needs);
            // Others may have waited for it.
            self.scheduler.settle(inner);
        }
    }
}

impl Scheduler {
    /// The scheduler of this host, which has `memory_mib` MiB and `vcpus` processors; nothing is reserved.
    #[must_use]
    pub fn new(config: SchedulerConfig, memory_mib: u64, vcpus: u32) -> Arc<Self> {
        let hosts = Hosts::new(&[config.limit(memory_mib, vcpus)]);
        let (spare, queue) = (Resources::default(), Queue::new(config.queue.get().into()));
        let inner = Mutex::new(Inner { hosts, spare, owners: Owners::default(), queue });
        Arc::new(Self { config, started: Instant::now(), inner, spare_changed: Notify::new() })
    }

    /// What the operator decided.
    #[must_use]
    pub const fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        millis(self.started.elapsed())
    }

    /// Reserves what `ask` needs, and waits for room as long as it says. Who stops waiting has asked for nothing.
    ///
    /// # Errors
    /// [`Denied`]; nothing is reserved then.
    pub async fn admit(self: &Arc<Self>, ask: Ask) -> Result<Grant, Denied> {
        let grants = self.admit_many(ask, 1).await?;
        // One was asked for, so there is one.
        Ok(grants.into_iter().next().unwrap_or_else(|| unreachable!("as many grants as were asked for")))
    }

    /// As [`Self::admit`], for `count` agents on one host, which all need the same: all of them or none.
    ///
    /// # Errors
    /// [`Denied`]; nothing is reserved then.
    pub async fn admit_many(self: &Arc<Self>, ask: Ask, count: u32) -> Result<Vec<Grant>, Denied> {
        let patience = ask.patience;
        let (place, mut answer) = self.stand_in_line(ask, count)?;
        let answered = if patience.is_zero() {
            None
        } else {
            tokio::time::timeout(patience, &mut answer).await.ok().and_then(Result::ok)
        };
        // What came just now counts.
        match answered.or_else(|| answer.try_recv().ok()) {
            Some(answer) => answer,
            None => Err(self.too_late(&place, patience)),
        }
    }

    /// The first half of [`Self::admit_many`]: who fits has the answer by then.
    fn stand_in_line(self: &Arc<Self>, ask: Ask, count: u32) -> Result<(Place, Answer), Denied> {
        let Ask { owner, priority, patience, name, needs, apart, template } = ask;
        let needs = needs.times(count.into());
        let request = Request { needs, apart, template };
        let mut inner = self.lock();
        inner.owners.check(&owner, needs).map_err(Denied::Quota)?;
        let missing = self.missing(&inner, &request);
        if let Some(Misfit::Never(_)) = missing.misfit {
            return Err(Denied::HostFull(missing));
        }
        let (tell, answer) = oneshot::channel();
        let waiter = Waiter { request, count, name, patience, answer: tell };
        let ticket = inner
            .queue
            .push(self.now_ms(), (owner.clone(), priority), needs, waiter)
            .map_err(|full| Denied::QueueFull { waiting: full.0, missing })?;
        inner.owners.waits(&owner, needs);
        self.settle(inner);
        Ok((Place { scheduler: Arc::clone(self), ticket }, answer))
    }

    /// Reserves `needs` for an agent that is there already, even beyond what is free.
    #[must_use]
    pub fn claim(self: &Arc<Self>, owner: &Owner, needs: Resources, apart: Option<Apart>) -> Grant {
        let request = Request { needs, apart, template: None };
        let mut inner = self.lock();
        inner.owners.takes(owner, needs);
        inner.hosts.take(HERE, &request);
        drop(inner);
        Grant::of(Lease { scheduler: Arc::clone(self), owner: owner.clone(), host: HERE, request })
    }

    /// Takes back what a grant had.
    fn release(self: &Arc<Self>, owner: &Owner, host: HostId, request: &Request) {
        let mut inner = self.lock();
        inner.hosts.give(host, request);
        inner.owners.gives(owner, request.needs);
        self.settle(inner);
    }

    /// Gives what is free to those whose turn it is, and tells them.
    fn settle(self: &Arc<Self>, mut inner: MutexGuard<'_, Inner>) {
        let mut deliveries = Vec::new();
        while let Some(entry) = inner.next(self.now_ms()) {
            let Entry { owner, needs, what: waiter, .. } = entry;
            inner.owners.waits_no_more(&owner, needs);
            let answer = inner.seat(&owner, &waiter).map(|host| self.grants(&owner, host, &waiter));
            deliveries.push((waiter.answer, answer));
        }
        drop(inner);
        self.spare_changed.notify_one();
        for (waiter, answer) in deliveries {
            // Who left in this moment is not told, and the grants in the answer end here.
            let _ = waiter.send(answer);
        }
    }

    fn grants(self: &Arc<Self>, owner: &Owner, host: HostId, waiter: &Waiter) -> Vec<Grant> {
        let grant = |request| {
            let scheduler = Arc::clone(self);
            Grant::of(Lease { scheduler, owner: owner.clone(), host, request })
        };
        (0..waiter.count).map(|_| grant(waiter.each())).collect()
    }

    fn too_late(&self, place: &Place, waited: Duration) -> Denied {
        let inner = self.lock();
        let waiter = inner.queue.get(place.ticket).map(|entry| &entry.what.request);
        let missing = match waiter {
            Some(request) => self.missing(&inner, request),
            None => Missing { misfit: None, overcommit: self.config.overcommit() },
        };
        if waited.is_zero() { Denied::HostFull(missing) } else { Denied::Timeout { waited, missing } }
    }

    fn missing(&self, inner: &Inner, request: &Request) -> Missing {
        let misfit = placement::place(&inner.hosts, request).err();
        Missing { misfit, overcommit: self.config.overcommit() }
    }

    /// Sets what `owner` may have; nothing that it has is taken away.
    pub fn set_quota(self: &Arc<Self>, owner: &Owner, quota: Quota) {
        let mut inner = self.lock();
        inner.owners.set_quota(owner, quota);
        // What an owner that may have less now waits for is refused when its turn comes, so turns may come now.
        self.settle(inner);
    }

    /// What `owner` may have and has.
    #[must_use]
    pub fn owner(&self, owner: &Owner) -> OwnerQuota {
        self.lock().owners.describe(owner)
    }

    /// Owners that have a quota, agents or requests, by name.
    #[must_use]
    pub fn owners(&self) -> Vec<OwnerQuota> {
        self.lock().owners.all()
    }

    /// What may be reserved here in all, and what is.
    #[must_use]
    pub fn limit_and_reserved(&self) -> (Resources, Resources) {
        let inner = self.lock();
        (inner.hosts.limit(HERE), inner.hosts.used(HERE))
    }

    /// Who waits, the next one first.
    #[must_use]
    pub fn waiting(&self) -> RequestQueue {
        let inner = self.lock();
        let at_ms = self.now_ms();
        let tell = |(position, entry): (u64, &Entry<Waiter>)| WaitingRequest {
            position,
            name: entry.what.name.clone(),
            owner: entry.owner.clone(),
            priority: entry.priority,
            needs: entry.needs,
            missing: self.missing(&inner, &entry.what.request).to_string(),
            waited_ms: at_ms.saturating_sub(entry.since_ms),
            timeout_ms: millis(entry.what.patience),
        };
        let used = |owner: &Owner| inner.owners.used(owner);
        let now = Now { at_ms, used: &used, total: inner.hosts.limit(HERE) };
        let waiting = (1..).zip(inner.queue.order(&now)).map(tell).collect();
        RequestQueue { capacity: self.config.queue.get().into(), waiting }
    }
}

impl Inner {
    /// Takes the next one that fits out of the queue.
    fn next(&mut self, at_ms: u64) -> Option<Entry<Waiter>> {
        let Self { hosts, owners, queue, spare: _ } = self;
        let used = |owner: &Owner| owners.used(owner);
        let now = Now { at_ms, used: &used, total: hosts.limit(HERE) };
        queue.next(&now, |entry| match placement::place(hosts, &entry.what.request) {
            Ok(_) => Fit::Now,
            Err(Misfit::Apart(_)) => Fit::Aside,
            Err(Misfit::Never(_) | Misfit::Full(_) | Misfit::Scattered) => Fit::NotYet,
        })
    }

    /// Reserves what the one whose turn it is needs, unless its owner may have less by now.
    fn seat(&mut self, owner: &Owner, waiter: &Waiter) -> Result<HostId, Denied> {
        let request = &waiter.request;
        self.owners.check_without_waiting(owner, request.needs).map_err(Denied::Quota)?;
        // It was found to fit a moment ago, with the lock held since.
        let host = placement::place(&self.hosts, request).unwrap_or(HERE);
        self.hosts.take(host, request);
        self.owners.takes(owner, request.needs);
        Ok(host)
    }
}

impl Waiter {
    /// What is reserved for each of its agents.
    fn each(&self) -> Request {
        let all = &self.request.needs;
        let count = u64::from(self.count.max(1));
        let needs = Resources {
            agents: all.agents / count,
            memory_mib: all.memory_mib / count,
            vcpus: all.vcpus / count,
        };
        Request { needs, ..self.request.clone() }
    }
}

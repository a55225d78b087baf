//! What is made ahead of need, so that a create does not wait for it.
//!
//! | kind | what it is | what a claim still costs |
//! |---|---|---|
//! | [`Den`] | an `ark-vmm` with a VM and processors, waiting for its configuration | restore, renewal, every check |
//! | [`Standby`] | a fork of a template, restored, renewed, warm | renewal as the agent, every check |
//!
//! An agent that begins anew takes them as one that is created does: see [`crate::agent`].
//!
//! ```text
//!  request with its grant ──► asked ──► demand ([`autoscale`]) ──► how many there are to be ([`line`])
//!        │                                                                   │ fewer: made, one at a time ([`refill`])
//!        └──► take_standby: one that lives, else a fork (a miss)             │ more, dead, of an old template: ended
//!                                                                            ▼
//!                    scheduler: what standbys have is anybody's who needs it ([`crate::scheduler::Spare`])
//! ```
//!
//! A template without a policy has a fixed number of standbys while it is in use; with one, as many as [`autoscale`] says. They
//! are made while no request is at work that wants the processors (see [`Pool::busy`]; an agent's first program counts as one); what a policy asks for is made all the
//! same when it lacked for [`PATIENCE`]. Their directories and identity files are those of agents without a record, so what a killed `arkd` leaves of
//! them is ended by the next.

mod autoscale;
mod line;
mod lines;
pub mod policy;
mod refill;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ark_types::agent::AgentName;
use ark_types::pool::{Pool as View, PoolPolicy};
use futures_util::future::join_all;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::agent::Standby;
use crate::cleanup::Home;
use crate::config::PoolSizes;
use crate::core::Core;
use crate::scheduler::Scheduler;
use crate::supervisor::Vmm;

use line::Rest;
use lines::Lines;
use refill::refill;

/// Processors of a prepared VMM: those of an agent that asks for no number.
pub(crate) const DEN_VCPUS: u32 = ark_types::agent::DEFAULT_VCPUS;
/// How long after the last request's end something is made.
const CALM: Duration = Duration::from_millis(50);
/// What a policy asks for and lacks for so long is made although requests are under way.
const PATIENCE: Duration = Duration::from_secs(1);

/// An agent's first program belongs to its creation for so long at most.
const FIRST_USE: Duration = Duration::from_millis(500);

/// A prepared VMM and its directory.
#[derive(Debug)]
pub(crate) struct Den {
    pub(crate) id: String,
    pub(crate) vmm: Vmm,
    pub(crate) home: Home,
}

impl Den {
    /// Id of the agent that will live there.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }
}

/// See the module.
#[derive(Debug)]
pub struct Pool {
    inner: Mutex<Inner>,
    scheduler: Arc<Scheduler>,
    started: Instant,
    /// Something to do.
    wake: Notify,
    /// Nothing is made any more. Cancelled with `inner` locked.
    closing: CancellationToken,
    refill: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Inner {
    /// VMMs to be prepared.
    prepared: usize,
    dens: Vec<Den>,
    lines: Lines,
    /// Requests under way that have their grants.
    busy: usize,
    /// When the last one ended.
    calm_since: Instant,
    /// When something was last made, or nothing lacked.
    content_since: Instant,
    /// Since when standbys have what others were promised.
    overdrawn_since: Option<Instant>,
}

/// A request is under way that should not have to share the processors with what is made ahead.
#[derive(Debug)]
pub struct Busy(Arc<Pool>);

impl Drop for Busy {
    fn drop(&mut self) {
        {
            let mut inner = self.0.lock();
            inner.busy = inner.busy.saturating_sub(1);
            inner.calm_since = Instant::now();
        }
        self.0.wake.notify_one();
    }
}

impl Pool {
    /// A pool of `sizes` on the host of `scheduler`. Of the demand for a template half is forgotten after each `half_life`.
    pub(crate) fn new(sizes: PoolSizes, half_life: Duration, scheduler: Arc<Scheduler>) -> Arc<Self> {
        let now = Instant::now();
        let inner = Inner {
            prepared: sizes.prepared,
            dens: Vec::new(),
            lines: Lines::new(sizes.standbys, half_life),
            busy: 0,
            calm_since: now,
            content_since: now,
            overdrawn_since: None,
        };
        let (inner, refill) = (Mutex::new(inner), Mutex::default());
        let closing = CancellationToken::new();
        Arc::new(Self { inner, scheduler, started: now, wake: Notify::new(), closing, refill })
    }

    /// Begins to make things ahead for `core`.
    pub(crate) fn start(self: &Arc<Self>, core: &Arc<Core>) {
        let task = tokio::spawn(refill(Arc::clone(self), Arc::downgrade(core)));
        *self.refill.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes which standbys there are, and lets the scheduler know which templates have some.
    fn change<T>(&self, work: impl FnOnce(&mut Lines) -> T) -> T {
        let mut inner = self.lock();
        let done = work(&mut inner.lines);
        self.tell(&mut inner);
        done
    }

    fn tell(&self, inner: &mut Inner) {
        for (template, is_warm) in inner.lines.newly_warm_or_cold() {
            self.scheduler.set_warm(&template, is_warm);
        }
    }

    /// What is wanted, and what there is.
    pub(crate) fn levels(&self) -> (PoolSizes, PoolSizes) {
        let inner = self.lock();
        let wanted = PoolSizes { prepared: inner.prepared, standbys: inner.lines.default };
        (wanted, PoolSizes { prepared: inner.dens.len(), standbys: inner.lines.count() })
    }

    /// Has other sizes from now on: what is too much ends soon, what lacks is made as always.
    pub(crate) fn resize(&self, sizes: PoolSizes) {
        let mut inner = self.lock();
        inner.prepared = sizes.prepared;
        inner.lines.default = sizes.standbys;
        drop(inner);
        self.wake.notify_one();
    }

    /// Has `policy` for `template` from now on; without one, what every template in use has.
    pub(crate) fn set_policy(&self, template: &AgentName, policy: Option<PoolPolicy>) {
        self.lock().lines.set_policy(template, policy);
        self.wake.notify_one();
    }

    /// Whether something was set for `template`.
    pub(crate) fn has_policy(&self, template: &AgentName) -> bool {
        self.lock().lines.has_policy(template)
    }

    /// The pool of `template`, as it is now.
    pub(crate) fn describe(&self, template: &AgentName) -> View {
        let at = self.started.elapsed();
        self.lock().lines.view(template, at)
    }

    /// Pools that have a policy or whose template is in use, by template.
    pub(crate) fn list(&self) -> Vec<View> {
        let at = self.started.elapsed();
        self.lock().lines.views(at)
    }

    /// Looks again soon: a standby may have ended.
    pub(crate) fn look(&self) {
        self.wake.notify_one();
    }

    /// Says that a request has its grant and is at work; until the guard is dropped little is made ahead.
    #[must_use]
    pub fn busy(self: &Arc<Self>) -> Busy {
        self.lock().busy += 1;
        Busy(Arc::clone(self))
    }

    /// As [`Self::busy`], for an agent's first program: who asks for an agent waits for what it says first. What takes long is no
    /// reason to make nothing.
    #[must_use]
    pub(crate) fn busy_at_first(self: &Arc<Self>) -> oneshot::Sender<()> {
        let (guard, dropped) = oneshot::channel();
        let busy = self.busy();
        tokio::spawn(async move {
            let _busy = busy;
            // Either way it is over.
            let _ = tokio::time::timeout(FIRST_USE, dropped).await;
        });
        guard
    }

    /// Whether a request is under way that said so by [`Self::busy`].
    pub(crate) fn is_busy(&self) -> bool {
        self.lock().busy > 0
    }

    /// A prepared VMM with `vcpus` processors, if there is one that still lives.
    pub(crate) fn take_den(&self, vcpus: u32) -> Option<Den> {
        if vcpus != DEN_VCPUS {
            return None;
        }
        let mut dead = Vec::new();
        let found = {
            let mut inner = self.lock();
            loop {
                let Some(mut den) = inner.dens.pop() else { break None };
                if !den.vmm.has_ended() {
                    break Some(den);
                }
                dead.push(den);
            }
        };
        for den in dead {
            tracing::warn!(id = den.id, "a prepared VMM ended by itself");
        }
        found
    }

    /// A standby of `template`, or of another name of it, that is of the snapshot in `dir` and still lives.
    pub(crate) fn take_standby(&self, template: &AgentName, dir: &Path) -> Option<Standby> {
        self.change(|lines| lines.take(template, dir))
    }

    /// Takes a prepared VMM back that became nobody's; ends it when the pool is closed.
    pub(crate) fn return_den(&self, den: Den) {
        let mut inner = self.lock();
        if !self.closing.is_cancelled() {
            inner.dens.push(den);
        }
    }

    /// As [`Self::return_den`], a standby of `template`.
    pub(crate) fn return_standby(&self, template: &AgentName, standby: Standby) {
        let mut inner = self.lock();
        if !self.closing.is_cancelled() {
            inner.lines.get(template).standbys.push_front(standby);
            self.tell(&mut inner);
        }
    }

    /// An agent of `template` is asked for, or begins anew: it can be made of a standby.
    pub(crate) fn asked(&self, template: &AgentName) {
        let at = self.started.elapsed();
        self.lock().lines.asked(template, at);
    }

    /// Whether there was a standby of `template` for an agent.
    pub(crate) fn claimed(&self, template: &AgentName, hit: bool) {
        self.lock().lines.if_known(template, |line| line.claimed(hit));
    }

    /// An agent of `template` is there, `elapsed` after it had its room.
    pub(crate) fn waited(&self, template: &AgentName, elapsed: Duration) {
        self.lock().lines.if_known(template, |line| line.waited(elapsed));
    }

    /// Ends every standby of the template whose snapshot is in `dir`.
    pub async fn forget(&self, dir: &Path) {
        let gone = self.change(|lines| lines.keep(|_, one| !one.is_of(dir)));
        end(gone, Vec::new()).await;
    }

    /// The template called `template` is the one whose snapshot is in `dir`: its standbys that are of another one end.
    pub(crate) async fn renewed(&self, template: &AgentName, dir: &Path) {
        let gone = self.change(|lines| {
            lines.if_known(template, |line| line.rest = Rest::None);
            lines.keep(|name, one| name != template || one.is_of(dir))
        });
        end(gone, Vec::new()).await;
        self.wake.notify_one();
    }

    /// Ends a standby for the memory that it takes, and waits for its end. False when there is none.
    pub(crate) async fn give_one_up(&self) -> bool {
        let Some(given) = self.change(Lines::give_one_up) else { return false };
        given.end().await;
        true
    }

    /// Ends all that was made ahead, and makes no more.
    pub(crate) async fn shut_down(&self) {
        {
            let _inner = self.lock();
            self.closing.cancel();
        }
        let refill = self.refill.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(refill) = refill {
            // It ends by itself, and soon; one that panicked has ended, too.
            let _ = refill.await;
        }
        let standbys = self.change(|lines| lines.keep(|_, _| false));
        let dens = std::mem::take(&mut self.lock().dens);
        end(standbys, dens).await;
    }
}

/// Ends what was made ahead and waits for its end.
async fn end(standbys: Vec<Standby>, dens: Vec<Den>) {
    join_all(standbys.into_iter().map(Standby::end)).await;
    join_all(dens.into_iter().map(|mut den| async move {
        den.vmm.kill();
        den.vmm.wait().await;
    }))
    .await;
}

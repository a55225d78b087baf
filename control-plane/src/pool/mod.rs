//! What is made ahead of need, so that a create does not wait for it.
//!
//! | kind | what it is | what a claim still costs |
//! |---|---|---|
//! | [`Den`] | an `ark-vmm` with a VM and processors, waiting for its configuration | restore, renewal, every check |
//! | [`Standby`] | a fork of a template in use, restored, renewed, warm | renewal as the agent, every check |
//!
//! Both are made one at a time, and only while no request is under way that wants the processors: see [`Pool::busy`].
//! Their directories and identity files are those of agents, so what a killed `arkd` leaves of them is found by the next.

mod refill;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::agent::Standby;
use crate::cleanup::Home;
use crate::config::PoolSizes;
use crate::core::Core;
use crate::snapshots::Hold;
use crate::supervisor::Vmm;

use refill::refill;

/// Processors of a prepared VMM: those of an agent that asks for no number.
pub(crate) const DEN_VCPUS: u32 = ark_types::agent::DEFAULT_VCPUS;
/// How long after its last use a template has standbys.
const IN_USE: Duration = Duration::from_secs(600);
/// How many templates have standbys at a time.
const MAX_IN_USE: usize = 2;
/// How long after the last request's end something is made.
const CALM: Duration = Duration::from_millis(50);

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
    /// Something to do.
    wake: Notify,
    /// Nothing is made any more. Cancelled with `inner` locked.
    closing: CancellationToken,
    refill: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Inner {
    sizes: PoolSizes,
    dens: Vec<Den>,
    standbys: Vec<Standby>,
    /// Templates in use, the last one used first.
    in_use: Vec<(Hold, Instant)>,
    /// Requests under way.
    busy: usize,
    /// When the last one ended.
    calm_since: Instant,
}

/// What is to be made next.
#[derive(Debug)]
enum Want {
    Den,
    Standby(Hold),
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
    pub(crate) fn new(sizes: PoolSizes) -> Arc<Self> {
        let inner = Inner {
            sizes,
            dens: Vec::new(),
            standbys: Vec::new(),
            in_use: Vec::new(),
            busy: 0,
            calm_since: Instant::now(),
        };
        let (inner, refill) = (Mutex::new(inner), Mutex::default());
        Arc::new(Self { inner, wake: Notify::new(), closing: CancellationToken::new(), refill })
    }

    /// Begins to make things ahead for `core`.
    pub(crate) fn start(self: &Arc<Self>, core: &Arc<Core>) {
        let task = tokio::spawn(refill(Arc::clone(self), Arc::downgrade(core)));
        *self.refill.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is wanted, and what there is.
    pub(crate) fn levels(&self) -> (PoolSizes, PoolSizes) {
        let inner = self.lock();
        (inner.sizes, PoolSizes { prepared: inner.dens.len(), standbys: inner.standbys.len() })
    }

    /// Has other sizes from now on: what is too much ends soon, what lacks is made as always.
    pub(crate) fn resize(&self, sizes: PoolSizes) {
        self.lock().sizes = sizes;
        self.wake.notify_one();
    }

    /// Says that a request is under way; nothing is begun until the guard is dropped.
    #[must_use]
    pub fn busy(self: &Arc<Self>) -> Busy {
        self.lock().busy += 1;
        Busy(Arc::clone(self))
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

    /// A standby of the snapshot in `dir`, if there is one that still lives.
    pub(crate) fn take_standby(&self, dir: &Path) -> Option<Standby> {
        let mut inner = self.lock();
        inner.standbys.retain(|standby| !standby.has_ended());
        let at = inner.standbys.iter().position(|standby| standby.is_of(dir))?;
        Some(inner.standbys.swap_remove(at))
    }

    /// Takes a prepared VMM back that became nobody's; ends it when the pool is closed.
    pub(crate) fn return_den(&self, den: Den) {
        let mut inner = self.lock();
        if !self.closing.is_cancelled() {
            inner.dens.push(den);
        }
    }

    /// As [`Self::return_den`], a standby.
    pub(crate) fn return_standby(&self, standby: Standby) {
        let mut inner = self.lock();
        if !self.closing.is_cancelled() {
            inner.standbys.push(standby);
        }
    }

    /// An agent is forked from the template `hold`, so others may follow.
    pub(crate) fn used(&self, hold: &Hold) {
        let mut inner = self.lock();
        if inner.sizes.standbys == 0 || self.closing.is_cancelled() {
            return;
        }
        let mut gone: Vec<_> = std::mem::take(&mut inner.in_use);
        inner.in_use.push((hold.clone(), Instant::now()));
        for (other, since) in std::mem::take(&mut gone) {
            let is_kept =
                other.dir() != hold.dir() && since.elapsed() < IN_USE && inner.in_use.len() < MAX_IN_USE;
            if is_kept { inner.in_use.push((other, since)) } else { gone.push((other, since)) }
        }
        drop(inner);
        // The last hold of a snapshot removes files, which is done without the lock.
        drop(gone);
    }

    /// Ends every standby of the template whose snapshot is in `dir`, and makes no more.
    pub async fn forget(&self, dir: &Path) {
        let (standbys, holds) = {
            let mut inner = self.lock();
            let (holds, in_use): (Vec<_>, _) =
                std::mem::take(&mut inner.in_use).into_iter().partition(|(hold, _)| hold.dir() == dir);
            inner.in_use = in_use;
            let (standbys, others): (Vec<_>, _) =
                std::mem::take(&mut inner.standbys).into_iter().partition(|standby| standby.is_of(dir));
            inner.standbys = others;
            (standbys, holds)
        };
        drop(holds);
        join_all(standbys.into_iter().map(Standby::end)).await;
    }

    /// Ends all that was made ahead, and makes no more.
    pub(crate) async fn shut_down(&self) {
        let (standbys, dens, holds) = {
            let mut inner = self.lock();
            self.closing.cancel();
            (
                std::mem::take(&mut inner.standbys),
                std::mem::take(&mut inner.dens),
                std::mem::take(&mut inner.in_use),
            )
        };
        drop(holds);
        let refill = self.refill.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(refill) = refill {
            // It ends by itself, and soon; one that panicked has ended, too.
            let _ = refill.await;
        }
        end(standbys, dens).await;
    }
}

/// Ends what was made ahead and waits for its end.
async fn end(standbys: Vec<Standby>, dens: Vec<Den>) {
    join_all(standbys.into_iter().map(Standby::end)).await;
    join_all(dens.into_iter().map(async |mut den| {
        den.vmm.kill();
        den.vmm.wait().await;
    }))
    .await;
}

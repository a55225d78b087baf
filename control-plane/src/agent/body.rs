//! What an agent's owner and its handles share beside the published state.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ark_types::label::Labels;
use ark_types::receipt::Receipt;
use ark_types::scheduling::Resources;

use crate::reconcile::Clock;
use crate::scheduler::{Apart, Grant};
use crate::snapshots::{Hold, Tenant};

/// The snapshot that an agent's memory is read from, kept on disk while this lives.
#[derive(Clone, Debug)]
pub(super) enum Base {
    /// It was booted.
    None,
    /// A standby: nobody lives there yet.
    Held(Hold),
    /// An agent lives there.
    Tenanted(Arc<Tenant>),
}

impl Base {
    /// `hold` with an agent on it.
    pub(super) fn lived_in(hold: &Hold) -> Self {
        Self::Tenanted(Arc::new(hold.tenant()))
    }

    pub(super) fn hold(&self) -> Option<Hold> {
        match self {
            Self::None => None,
            Self::Held(hold) => Some(hold.clone()),
            Self::Tenanted(tenant) => Some(tenant.hold().clone()),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Body {
    base: Mutex<Base>,
    machine_id: Mutex<String>,
    receipt: Mutex<Option<Receipt>>,
    /// Its labels, once they were changed.
    labels: Mutex<Option<Labels>>,
    /// Held by who changes them.
    pub(super) labelling: tokio::sync::Mutex<()>,
    /// What is reserved for it; none when it has no VMM, or is a standby.
    grant: Mutex<Option<Grant>>,
    /// The group that it is kept apart from, whether or not something is reserved for it now.
    apart: Mutex<Option<Apart>>,
    /// What its times are on.
    clock: Mutex<Clock>,
    /// How often its guest was renewed, parents included.
    renewals: AtomicU64,
    /// Whether somebody had it run something.
    used: AtomicBool,
    /// Whether the paused agent is on disk whole, so that it outlasts its VMM.
    recorded: AtomicBool,
    /// Held by the one snapshot, pause, resume or rewind that is under way.
    pub(super) turn: tokio::sync::Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Body {
    pub(super) fn new(machine_id: String) -> Self {
        Self {
            base: Mutex::new(Base::None),
            machine_id: Mutex::new(machine_id),
            receipt: Mutex::default(),
            labels: Mutex::default(),
            labelling: tokio::sync::Mutex::default(),
            grant: Mutex::default(),
            apart: Mutex::default(),
            clock: Mutex::new(Clock::new()),
            renewals: AtomicU64::new(0),
            used: AtomicBool::new(false),
            recorded: AtomicBool::new(false),
            turn: tokio::sync::Mutex::default(),
        }
    }

    pub(super) fn base(&self) -> Base {
        lock(&self.base).clone()
    }

    /// Lets go of the old base.
    pub(super) fn set_base(&self, base: Base) {
        // What letting go leads to happens without the lock.
        let old = std::mem::replace(&mut *lock(&self.base), base);
        drop(old);
    }

    pub(super) fn clock(&self) -> Clock {
        *lock(&self.clock)
    }

    pub(super) fn set_clock(&self, clock: Clock) {
        *lock(&self.clock) = clock;
    }

    pub(super) fn machine_id(&self) -> String {
        lock(&self.machine_id).clone()
    }

    pub(super) fn set_machine_id(&self, id: String) {
        *lock(&self.machine_id) = id;
    }

    pub(super) fn receipt(&self) -> Option<Receipt> {
        lock(&self.receipt).clone()
    }

    pub(super) fn set_receipt(&self, receipt: Option<Receipt>) {
        *lock(&self.receipt) = receipt;
    }

    pub(super) fn labels(&self) -> Option<Labels> {
        lock(&self.labels).clone()
    }

    pub(super) fn set_labels(&self, labels: Labels) {
        *lock(&self.labels) = Some(labels);
    }

    /// Keeps `grant` from now on instead of what was kept.
    pub(super) fn set_grant(&self, grant: Option<Grant>) {
        if let Some(apart) = grant.as_ref().and_then(Grant::apart) {
            self.set_apart(Some(apart));
        }
        // What is free then goes to others without the lock.
        let old = std::mem::replace(&mut *lock(&self.grant), grant);
        drop(old);
    }

    pub(super) fn apart(&self) -> Option<Apart> {
        lock(&self.apart).clone()
    }

    pub(super) fn set_apart(&self, apart: Option<Apart>) {
        *lock(&self.apart) = apart;
    }

    /// What is reserved for it.
    pub(super) fn reserved(&self) -> Option<Resources> {
        lock(&self.grant).as_ref().map(Grant::needs)
    }

    /// The agent's memory is on disk: the rest of what was reserved for it is given back.
    pub(super) fn keep_what_is_needed_on_disk(&self) {
        let mut grant = lock(&self.grant);
        let old = grant.as_ref().map(Grant::on_disk).and_then(|kept| grant.replace(kept));
        drop(grant);
        drop(old);
    }

    pub(super) fn renewals(&self) -> u64 {
        self.renewals.load(Ordering::Acquire)
    }

    pub(super) fn set_renewals(&self, count: u64) {
        self.renewals.store(count, Ordering::Release);
    }

    /// Says that it is used; whether that is the first time.
    pub(super) fn use_it(&self) -> bool {
        !self.used.swap(true, Ordering::Relaxed)
    }

    pub(super) fn is_recorded(&self) -> bool {
        self.recorded.load(Ordering::Acquire)
    }

    pub(super) fn set_recorded(&self, recorded: bool) {
        self.recorded.store(recorded, Ordering::Release);
    }
}

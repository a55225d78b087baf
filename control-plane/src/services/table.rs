//! Every service that is known, and the calls under way in its replicas.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ark_types::agent::AgentName;
use ark_types::layout::StateDir;
use ark_types::plain::plain;
use ark_types::service::{ReplicaState, SERVICE_LABEL, ServiceSpec};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::attempts::Attempts;
use super::entry::{Calls, Entry, Order, Wanted};
use super::pick::pick;
use super::{ServiceError, environment, look};
use crate::agent::Handle;
use crate::core::Core;
use crate::problems::Refusal;
use crate::projection::WantedServices;

/// See the module.
#[derive(Debug, Default)]
pub struct Services {
    entries: Mutex<BTreeMap<AgentName, Entry>>,
    /// Held by the one change that is under way of what services are to be.
    pub(super) changing: tokio::sync::Mutex<()>,
    /// Told when a service may need something.
    pub(super) wake: Arc<Notify>,
    /// Counts looks: whoever waits for something looks again when one was had.
    pub(super) looks: watch::Sender<u64>,
    /// Cancelled when nothing is to be done for services any more: `arkd` ends.
    pub(super) closing: CancellationToken,
}

/// What came of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// A replica answered.
    Ok,
    /// A replica was picked and did not answer well.
    Failed,
    /// None was ready.
    Unready,
    /// Who asked left before.
    Abandoned,
}

/// A call under way in a replica, while this lives.
#[derive(Debug)]
pub(super) struct UnderWay {
    core: Arc<Core>,
    service: AgentName,
    pub(super) handle: Handle,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let services = &self.core.services;
        if let Some(entry) = services.lock().get_mut(&self.service)
            && let Some(replica) = entry.replicas.get_mut(self.handle.id())
        {
            replica.load = replica.load.saturating_sub(1);
        }
        services.wake.notify_one();
    }
}

impl Services {
    /// What the log says services are to be, with their environments. Call it once, before [`Self::start`].
    #[must_use]
    pub(crate) fn open(state: &StateDir, wanted: &WantedServices) -> Self {
        environment::sweep(state, wanted);
        let entries = wanted.iter().map(|(name, service)| {
            let env = environment::read(state, name, service.generation, &service.env).map_err(|error| {
                tracing::error!(service = %name, %error, "the environment of a service cannot be read");
                plain(&error).to_string()
            });
            (name.clone(), Entry::new(Some(Wanted { service: service.clone(), env })))
        });
        Self { entries: Mutex::new(entries.collect()), ..Self::default() }
    }

    /// Looks after services from now on.
    pub(crate) fn start(&self, core: &Arc<Core>) {
        tokio::spawn(look::look_after(Arc::downgrade(core), self.closing.clone()));
    }

    /// Does nothing more for services: `arkd` ends, and what it does with agents is not to be undone. Whoever waits for something
    /// is told that it does not come.
    pub(crate) fn close(&self) {
        self.closing.cancel();
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, BTreeMap<AgentName, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `see` makes of the service `name`.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`], of one that is being removed, too.
    pub(super) fn with<T>(
        &self,
        name: &str,
        see: impl FnOnce(&AgentName, &mut Entry) -> T,
    ) -> Result<T, ServiceError> {
        let missing = || ServiceError::NotFound(name.to_owned());
        let key: AgentName = name.parse().map_err(|_| missing())?;
        let mut entries = self.lock();
        let entry = entries.get_mut(&key).filter(|entry| entry.wanted.is_some()).ok_or_else(missing)?;
        Ok(see(&key, entry))
    }

    /// Has the service `name` be so from now on.
    pub(super) fn set(&self, name: AgentName, wanted: Wanted) {
        let mut entries = self.lock();
        let entry = entries.entry(name).or_insert_with(|| Entry::new(None));
        entry.wanted = Some(wanted);
        // What failed before may be mended.
        entry.attempts = Attempts::default();
        drop(entries);
        self.wake.notify_one();
    }

    /// Waits until `holds`, for as long as `most`; it is looked at after each look at the services.
    ///
    /// # Errors
    /// [`ServiceError::Late`], and [`ServiceError::Closing`] once there are no more looks.
    pub(super) async fn until(
        &self,
        most: Duration,
        holds: impl Fn(&BTreeMap<AgentName, Entry>) -> bool,
    ) -> Result<(), ServiceError> {
        let mut looks = self.looks.subscribe();
        let mut waiting = std::pin::pin!(tokio::time::sleep(most));
        while !holds(&self.lock()) {
            tokio::select! {
                // The sender is `self`'s.
                _ = looks.changed() => {}
                () = self.closing.cancelled() => return Err(ServiceError::Closing),
                () = &mut waiting => return Err(ServiceError::Late(most)),
            }
        }
        Ok(())
    }

    /// The names of services that are to be.
    pub(super) fn names(&self) -> Vec<AgentName> {
        let entries = self.lock();
        entries.iter().filter(|(_, entry)| entry.wanted.is_some()).map(|(name, _)| name.clone()).collect()
    }

    /// Looks at every service, and says what is to be done outside; whether there is any.
    pub(super) fn attend(&self, core: &Arc<Core>) -> (Vec<(AgentName, Order)>, bool) {
        let mut found: BTreeMap<AgentName, Vec<Handle>> = BTreeMap::new();
        for handle in core.registry.all() {
            let service =
                handle.look(|agent| agent.labels.get(SERVICE_LABEL).and_then(|name| name.parse().ok()));
            service.into_iter().for_each(|name| found.entry(name).or_default().push(handle.clone()));
        }
        let now = Instant::now();
        let mut entries = self.lock();
        for name in found.keys() {
            // One that was removed under an earlier arkd.
            entries.entry(name.clone()).or_insert_with(|| Entry::new(None));
        }
        let mut orders = Vec::new();
        for (name, entry) in entries.iter_mut() {
            entry.take_in(core, found.remove(name).unwrap_or_default());
            orders.extend(entry.attend(now).into_iter().map(|order| (name.clone(), order)));
        }
        entries.retain(|_, entry| !entry.is_over());
        (orders, !entries.is_empty())
    }

    /// A replica came to be, or not.
    pub(super) fn made(
        &self,
        service: &AgentName,
        name: &AgentName,
        generation: u64,
        made: Result<(), Refusal>,
    ) {
        if let Some(entry) = self.lock().get_mut(service) {
            entry.made(name, generation, made, Instant::now());
        }
        self.wake.notify_one();
    }

    /// How many replicas of the service `name` take calls.
    pub(crate) fn ready(&self, name: &str) -> usize {
        let is_ready = |replica: &&super::entry::Replica| replica.state() == ReplicaState::Ready;
        self.with(name, |_, entry| entry.replicas.values().filter(is_ready).count()).unwrap_or(0)
    }

    /// Of the services whose spec is as `is_meant` says: the name, how many replicas it is to have, and how many take calls.
    pub(crate) fn replicas(&self, is_meant: impl Fn(&ServiceSpec) -> bool) -> Vec<(AgentName, u32, u32)> {
        let entries = self.lock();
        let meant = entries.iter().filter_map(|(name, entry)| {
            let spec = &entry.wanted.as_ref()?.service.spec;
            is_meant(spec).then_some((name, spec.replicas, entry))
        });
        let counted = meant.map(|(name, wanted, entry)| {
            let ready = entry.replicas.values().filter(|replica| replica.state() == ReplicaState::Ready);
            (name.clone(), wanted, u32::try_from(ready.count()).unwrap_or(u32::MAX))
        });
        counted.collect()
    }

    /// Told after each look at the services.
    pub(crate) fn looks(&self) -> watch::Receiver<u64> {
        self.looks.subscribe()
    }

    /// Waits until all services were looked at once more, for as long as `most`.
    pub(crate) async fn looked(&self, most: Duration) {
        let mut looks = self.looks.subscribe();
        // The sender is `self`'s.
        let _ = tokio::time::timeout(most, looks.changed()).await;
    }

    /// Begins a call in the replica of `service` that is ready and has the fewest; none when none is.
    pub(super) fn begin(&self, core: &Arc<Core>, service: &str) -> Result<Option<UnderWay>, ServiceError> {
        self.with(service, |name, entry| {
            let mut ready: Vec<_> = entry
                .replicas
                .values_mut()
                .filter(|replica| replica.state() == ReplicaState::Ready)
                .collect();
            let loads: Vec<u32> = ready.iter().map(|replica| replica.load).collect();
            let picked = ready.get_mut(pick(&loads, entry.turn)?)?;
            picked.load = picked.load.saturating_add(1);
            entry.turn = entry.turn.wrapping_add(1);
            Some(UnderWay { core: Arc::clone(core), service: name.clone(), handle: picked.handle.clone() })
        })
    }

    pub(super) fn count(&self, service: &str, outcome: Outcome) {
        // One that is gone by now is not told of any more.
        let _ = self.with(service, |_, Entry { calls, .. }| {
            let Calls { ok, failed, unready, abandoned } = calls;
            *match outcome {
                Outcome::Ok => ok,
                Outcome::Failed => failed,
                Outcome::Unready => unready,
                Outcome::Abandoned => abandoned,
            } += 1;
        });
    }
}

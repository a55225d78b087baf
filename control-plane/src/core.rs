//! What every route and every agent shares.

use std::sync::Arc;
use std::time::Instant;

use ark_types::health::ProbeReport;
use ark_types::shutdown::AgentsFate;
use ark_types::vmm::SnapshotId;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::agent::Seen;
use crate::config::Config;
use crate::consoles::Consoles;
use crate::execs::Execs;
use crate::host;
use crate::idempotency::Requests;
use crate::images::Images;
use crate::inference::Inference;
use crate::ledger::Ledger;
use crate::models::Models;
use crate::pool::Pool;
use crate::registry::Registry;
use crate::scheduler::{Ask, Denied, Grant, Scheduler};
use crate::services::Services;
use crate::snapshots::{Store, Tenant};
use crate::stats::Stats;
use crate::store::EventLog;
use crate::tasks::Tasks;
use crate::telemetry::{Phase, Telemetry};
use crate::templates::Templates;
use crate::traces::step;

/// Guests that are restored at a time, per processor: one computes while another waits for its files.
const RESTORES_PER_CPU: usize = 2;
/// Agents of an earlier `arkd` whose directories are taken over at a time.
const HOMECOMINGS_AT_ONCE: usize = 1;
/// Checkpoints that are taken at a time.
const CHECKPOINTS_AT_ONCE: usize = 1;
/// Health checks that run at a time, per processor: most of them wait.
const CHECKS_PER_CPU: usize = 8;
/// Clients that read events along at a time.
pub const MAX_FOLLOWERS: usize = 256;

/// Shared by every route and every agent.
#[derive(Debug)]
pub struct Core {
    /// Where things are and how long they may take.
    pub config: Config,
    /// Images.
    pub images: Images,
    /// Language models.
    pub models: Models,
    /// The log of events.
    pub log: Arc<dyn EventLog>,
    /// What is recorded of agents, and what it amounts to.
    pub ledger: Ledger,
    /// Agents.
    pub registry: Registry,
    /// Requests under way that may be sent again.
    pub requests: Requests,
    /// Room for agents, and who gets it.
    pub scheduler: Arc<Scheduler>,
    /// Services, and calls under way in their replicas.
    pub services: Services,
    /// Snapshots.
    pub snapshots: Store,
    /// Templates.
    pub templates: Templates,
    /// Consoles of agents that are gone.
    pub consoles: Consoles,
    /// Programs whose streams can be taken up again.
    pub execs: Execs,
    /// Tasks.
    pub tasks: Tasks,
    /// Calls of models.
    pub inference: Inference,
    /// What agents use.
    pub stats: Stats,
    /// What happened, how often, how long it took.
    pub telemetry: Telemetry,
    /// What is made ahead of need.
    pub pool: Arc<Pool>,
    /// Random answers that guests gave.
    pub seen: Seen,
    /// Bounds the guests that are restored at a time: beyond it a burst of forks only gets in its own way.
    pub restores: Semaphore,
    /// Bounds the agents of an earlier `arkd` that settle in at a time: whoever asks for something meanwhile does not wait for all.
    pub homecomings: Semaphore,
    /// Bounds the checkpoints that are taken at a time: they are to disturb nobody.
    pub checkpoints: Semaphore,
    /// Bounds the health checks that run at a time.
    pub checks: Semaphore,
    /// Bounds the clients that read along as events are recorded: each costs memory and descriptors for as long as it likes.
    pub followers: Arc<Semaphore>,
    /// Cancelled once those who follow something without an end are to be let go: `arkd` ends.
    pub closing: CancellationToken,
    /// When this `arkd` started.
    pub started: Instant,
    probe: watch::Receiver<Option<ProbeReport>>,
    /// What a client wants to become of the agents when `arkd` ends, once one wants it to.
    end: watch::Sender<Option<AgentsFate>>,
}

impl Core {
    /// Everything shared; the host probe starts in the background, once. What the snapshots `needed` are is kept on disk for
    /// the guards' time, before anything that nobody needs goes.
    ///
    /// # Errors
    /// When the state directory cannot be made or read, or the host's memory cannot be told.
    pub fn new(
        config: Config,
        needed: &[SnapshotId],
        log: Arc<dyn EventLog>,
        ledger: Ledger,
    ) -> std::io::Result<(Arc<Self>, Vec<Tenant>)> {
        let snapshots = Store::open(&config.state, config.assets.program("ark-vmm"))?;
        // Whoever goes on from one that is not there says so when it is taken in.
        let held = needed.iter().filter_map(|id| Some(snapshots.hold(*id).ok()?.tenant())).collect();
        snapshots.sweep();
        let templates = Templates::open(&config.state, &snapshots);
        let consoles = Consoles::open(config.state.consoles(), config.consoles)?;
        let tasks = Tasks::open(config.state.tasks(), ledger.projection().tasks(), config.tasks)?;
        let (answer, probe) = watch::channel(None);
        let (vmm, limit) = (config.assets.program("ark-vmm"), config.timing.probe);
        tokio::spawn(async move {
            let report = host::probe(&vmm, limit).await;
            tracing::info!(usable = report.usable, reason = report.reason, "the host was probed");
            answer.send_replace(Some(report));
        });
        let memory = host::Memory::read()?.total_mib;
        let scheduler = Scheduler::new(config.scheduler, memory, host::cpus());
        ledger.projection().quotas().iter().for_each(|(owner, quota)| scheduler.set_quota(owner, quota));
        let services = Services::open(&config.state, ledger.projection().services());
        let images = Images::new(config.assets.images());
        let models = Models::open(config.state.models(), config.assets.models());
        templates.sweep_at_start(&images, |template| ledger.projection().pools().of(template).is_some());
        let (registry, started) = (Registry::default(), Instant::now());
        let pool = Pool::new(config.pool, config.timing.demand, Arc::clone(&scheduler));
        ledger
            .projection()
            .pools()
            .iter()
            .for_each(|(template, policy)| pool.set_policy(template, Some(policy)));
        let (stats, telemetry) = (Stats::default(), Telemetry::new(config.telemetry.clone()));
        let inference = Inference::new(config.inference);
        let seen = Seen::default();
        let restores = Semaphore::new(host::cpus() as usize * RESTORES_PER_CPU);
        let end = watch::Sender::new(None);
        let core = Self {
            config,
            images,
            models,
            log,
            ledger,
            registry,
            requests: Requests::default(),
            scheduler,
            services,
            snapshots,
            templates,
            consoles,
            execs: Execs::default(),
            tasks,
            inference,
            stats,
            telemetry,
            pool,
            seen,
            restores,
            homecomings: Semaphore::new(HOMECOMINGS_AT_ONCE),
            checkpoints: Semaphore::new(CHECKPOINTS_AT_ONCE),
            checks: Semaphore::new(host::cpus() as usize * CHECKS_PER_CPU),
            followers: Arc::new(Semaphore::new(MAX_FOLLOWERS)),
            closing: CancellationToken::new(),
            started,
            probe,
            end,
        };
        Ok((Arc::new(core), held))
    }

    /// Asks for the end of `arkd`, and for what becomes of its agents then.
    pub fn ask_to_end(&self, agents: AgentsFate) {
        self.end.send_replace(Some(agents));
    }

    /// Waits until somebody asks for the end of `arkd`.
    pub async fn asked_to_end(&self) -> AgentsFate {
        let mut end = self.end.subscribe();
        match end.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(agents)) => *agents,
            // The sender is `self`'s.
            _ => std::future::pending().await,
        }
    }

    /// As [`Scheduler::admit`]; how long it took is measured.
    ///
    /// # Errors
    /// [`Denied`]; nothing is reserved then.
    pub async fn admit(&self, ask: Ask) -> Result<Grant, Denied> {
        self.in_queue(self.scheduler.admit(ask)).await
    }

    /// As [`Scheduler::admit_many`]; how long it took is measured.
    ///
    /// # Errors
    /// [`Denied`]; nothing is reserved then.
    pub async fn admit_many(&self, ask: Ask, count: u32) -> Result<Vec<Grant>, Denied> {
        self.in_queue(self.scheduler.admit_many(ask, count)).await
    }

    async fn in_queue<T>(&self, admission: impl Future<Output = T>) -> T {
        let began = Instant::now();
        let answer = admission.instrument(step("queue")).await;
        self.telemetry.phase(Phase::Queue, began.elapsed());
        answer
    }

    /// What the probe said; waits while it runs.
    pub async fn probe(&self) -> ProbeReport {
        let mut probe = self.probe.clone();
        match probe.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(report)) => report.clone(),
            _ => ProbeReport { usable: false, reason: "the probe did not end".into(), duration_us: 0 },
        }
    }
}

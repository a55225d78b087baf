//! What every route and every agent shares.

use std::sync::Arc;
use std::time::Instant;

use ark_types::health::ProbeReport;
use tokio::sync::{Semaphore, watch};

use crate::agent::Seen;
use crate::config::Config;
use crate::host;
use crate::images::Images;
use crate::pool::Pool;
use crate::registry::Registry;
use crate::scheduler::Scheduler;
use crate::snapshots::Store;
use crate::templates::Templates;

/// Guests that are restored at a time, per processor: one computes while another waits for its files.
const RESTORES_PER_CPU: usize = 2;

/// Shared by every route and every agent.
#[derive(Debug)]
pub struct Core {
    /// Where things are and how long they may take.
    pub config: Config,
    /// Images.
    pub images: Images,
    /// Agents.
    pub registry: Registry,
    /// Room for agents, and who gets it.
    pub scheduler: Arc<Scheduler>,
    /// Snapshots.
    pub snapshots: Store,
    /// Templates.
    pub templates: Templates,
    /// What is made ahead of need.
    pub pool: Arc<Pool>,
    /// Random answers that guests gave.
    pub seen: Seen,
    /// Bounds the guests that are restored at a time: beyond it a burst of forks only gets in its own way.
    pub restores: Semaphore,
    /// When this `arkd` started.
    pub started: Instant,
    probe: watch::Receiver<Option<ProbeReport>>,
}

impl Core {
    /// Everything shared; the host probe starts in the background, once.
    ///
    /// # Errors
    /// When the state directory cannot be made or read, or the host's memory cannot be told.
    pub fn new(config: Config) -> std::io::Result<Arc<Self>> {
        let snapshots = Store::open(&config.state, config.assets.program("ark-vmm"))?;
        let templates = Templates::open(&config.state, &snapshots);
        let (answer, probe) = watch::channel(None);
        let (vmm, limit) = (config.assets.program("ark-vmm"), config.timing.probe);
        tokio::spawn(async move {
            let report = host::probe(&vmm, limit).await;
            tracing::info!(usable = report.usable, reason = report.reason, "the host was probed");
            answer.send_replace(Some(report));
        });
        let memory = host::Memory::read()?.total_mib;
        let scheduler = Scheduler::new(config.scheduler, memory, host::cpus());
        let images = Images::new(config.assets.images());
        templates.sweep_at_start(&images);
        let (registry, started) = (Registry::default(), Instant::now());
        let pool = Pool::new(config.pool);
        let seen = Seen::default();
        let restores = Semaphore::new(host::cpus() as usize * RESTORES_PER_CPU);
        let core = Self {
            config,
            images,
            registry,
            scheduler,
            snapshots,
            templates,
            pool,
            seen,
            restores,
            started,
            probe,
        };
        Ok(Arc::new(core))
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

//! What the flags and the environment resolve to.

use std::net::SocketAddr;
use std::path::{PathBuf, absolute};
use std::time::Duration;

use ark_types::guest::HEARTBEAT_INTERVAL_MS;
use ark_types::health::HostKind;
use ark_types::layout::{Assets, RunDir, StateDir};

use crate::args::Args;
use crate::host;
use crate::ledger::Compaction;
use crate::scheduler::SchedulerConfig;
use crate::settings::{self, Settings, TimeLimits};

/// Everything a [`crate::daemon::Daemon`] is started with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Programs, guest kernel, images.
    pub assets: Assets,
    /// Sockets and the agents' directories.
    pub run: RunDir,
    /// Templates, snapshots, paused agents: what lasts.
    pub state: StateDir,
    /// Bearer token of TCP clients; read (or made) only when `listen` is set.
    pub token_file: PathBuf,
    /// TCP address to listen on besides the Unix socket.
    pub listen: Option<SocketAddr>,
    /// What this host is.
    pub host_kind: HostKind,
    /// Unix socket of `ark-guestd serve` on this host.
    pub host_shell: Option<PathBuf>,
    /// Time limits.
    pub timing: Timing,
    /// What is made ahead of need.
    pub pool: PoolSizes,
    /// Consoles that are kept when their agents are gone.
    pub consoles: ConsoleLimits,
    /// What is measured.
    pub telemetry: settings::Telemetry,
    /// How the log of events is kept from growing for ever.
    pub compaction: Compaction,
    /// How much of this host is given away.
    pub scheduler: SchedulerConfig,
    /// Attempts of tasks, and what is kept of those that ended.
    pub tasks: TaskLimits,
    /// Calls of models.
    pub inference: settings::Inference,
}

/// Bounds of tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskLimits {
    /// Attempts under way at a time.
    pub at_once: usize,
    /// Tasks that have not ended.
    pub open: usize,
    /// Ended tasks that are kept.
    pub keep: usize,
    /// Bytes of their output.
    pub keep_bytes: u64,
}

impl From<settings::Tasks> for TaskLimits {
    fn from(tasks: settings::Tasks) -> Self {
        let by_itself = 2 * usize::try_from(host::cpus()).unwrap_or(1);
        Self {
            at_once: if tasks.at_once.get() == 0 { by_itself } else { tasks.at_once.count() },
            open: tasks.open.count(),
            keep: tasks.keep.count(),
            keep_bytes: tasks.keep_mib.get() << 20,
        }
    }
}

/// How much is made ahead of need; 0 is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolSizes {
    /// VMMs that wait for a snapshot to restore.
    pub prepared: usize,
    /// Forks of each template in use that wait for an agent to become.
    pub standbys: usize,
}

impl From<settings::Pool> for PoolSizes {
    fn from(pool: settings::Pool) -> Self {
        Self { prepared: pool.prepared.into(), standbys: pool.standby.into() }
    }
}

/// How much of the consoles of agents that are gone is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConsoleLimits {
    /// Agents, the newest ones.
    pub agents: usize,
    /// Bytes of all together.
    pub bytes: u64,
}

impl From<&settings::Log> for ConsoleLimits {
    fn from(log: &settings::Log) -> Self {
        Self { agents: log.consoles_keep.count(), bytes: log.consoles_max_mib.get() << 20 }
    }
}

/// How long things may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// From the start of `ark-vmm` to the guest's hello.
    pub boot: Duration,
    /// `ark-vmm probe`.
    pub probe: Duration,
    /// How long an agent with `auto_remove` waits for its first streamed exec.
    pub first_stream: Duration,
    /// How long an exec's reply may be late after its own `timeout_ms` before the guest counts as hung.
    pub exec_slack: Duration,
    /// How long a resumable stream's program lives without a client.
    pub exec_grace: Duration,
    /// From a restored guest's challenge to its last answer.
    pub renewal: Duration,
    /// How long a running guest may not be heard before it counts as unresponsive: three heartbeats, twelve where it is
    /// emulated.
    pub silence: Duration,
    /// After how long half of the demand for a template's agents is forgotten.
    pub demand: Duration,
    /// What a second of a checkpoint policy is: a second, but in tests.
    pub checkpoint_second: Duration,
}

impl Timing {
    /// Limits for a host of `kind`: an emulated one is 10 to 100 times slower, so what waits for a guest waits longer.
    #[must_use]
    pub const fn of(kind: HostKind) -> Self {
        let (boot, probe, exec_slack, renewal, heartbeats) = match kind {
            HostKind::Native => (60, 10, 10, 30, 3),
            HostKind::Machine => (240, 60, 60, 120, 12),
        };
        Self {
            boot: Duration::from_secs(boot),
            probe: Duration::from_secs(probe),
            first_stream: Duration::from_secs(60),
            exec_slack: Duration::from_secs(exec_slack),
            exec_grace: Duration::from_secs(30),
            renewal: Duration::from_secs(renewal),
            silence: Duration::from_millis(heartbeats * HEARTBEAT_INTERVAL_MS),
            demand: Duration::from_secs(60),
            checkpoint_second: Duration::from_secs(1),
        }
    }

    /// These limits with those of `chosen` put over them.
    #[must_use]
    pub fn with(self, chosen: &TimeLimits) -> Self {
        let or = |seconds: Option<settings::Seconds>, limit| {
            seconds.map_or(limit, |seconds| Duration::from_secs(seconds.get()))
        };
        Self {
            boot: or(chosen.boot_s, self.boot),
            probe: self.probe,
            first_stream: or(chosen.first_stream_s, self.first_stream),
            exec_slack: or(chosen.exec_slack_s, self.exec_slack),
            exec_grace: or(chosen.exec_grace_s, self.exec_grace),
            renewal: or(chosen.renewal_s, self.renewal),
            silence: self.silence,
            demand: self.demand,
            checkpoint_second: self.checkpoint_second,
        }
    }
}

impl Config {
    /// The configuration that `args`, `settings` and the environment (`ARK_ASSETS`, `ARK_STATE`, `ARK_RUN`) ask for.
    ///
    /// # Errors
    /// When the running program's own path, or the working directory, cannot be told.
    pub fn new(args: &Args, settings: &Settings) -> std::io::Result<Self> {
        let is_root = nix::unistd::geteuid().is_root();
        // VMMs have working directories of their own.
        let state = StateDir(absolute(StateDir::locate(is_root).0)?);
        let token_file = settings.listen.token_file.clone().map_or_else(|| state.token(), PathBuf::from);
        let host_kind = args.host_kind.into();
        Ok(Self {
            assets: Assets(absolute(Assets::locate()?.0)?),
            run: RunDir(absolute(RunDir::locate(is_root).0)?),
            state,
            token_file,
            listen: settings.listen.tcp,
            host_kind,
            host_shell: args.host_shell.clone(),
            timing: Timing::of(host_kind).with(&settings.timing),
            pool: settings.pool.into(),
            consoles: ConsoleLimits::from(&settings.log),
            telemetry: settings.telemetry.clone(),
            compaction: Compaction::default(),
            scheduler: settings.scheduler,
            tasks: settings.tasks.into(),
            inference: settings.inference,
        })
    }
}

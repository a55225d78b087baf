//! What the flags and the environment resolve to.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ark_types::health::HostKind;
use ark_types::layout::{Assets, RunDir, StateDir};

use crate::args::Args;
use crate::scheduler::SchedulerConfig;

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
    /// How much of this host is given away.
    pub scheduler: SchedulerConfig,
}

/// How much is made ahead of need; 0 is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolSizes {
    /// VMMs that wait for a snapshot to restore.
    pub prepared: usize,
    /// Forks of each template in use that wait for an agent to become.
    pub standbys: usize,
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
    /// From a restored guest's challenge to its last answer.
    pub renewal: Duration,
}

impl Timing {
    /// Limits for a host of `kind`: an emulated one is 10 to 100 times slower, so what waits for a guest waits longer.
    #[must_use]
    pub const fn of(kind: HostKind) -> Self {
        let (boot, probe, exec_slack, renewal) = match kind {
            HostKind::Native => (60, 10, 10, 30),
            HostKind::Machine => (240, 60, 60, 120),
        };
        Self {
            boot: Duration::from_secs(boot),
            probe: Duration::from_secs(probe),
            first_stream: Duration::from_secs(60),
            exec_slack: Duration::from_secs(exec_slack),
            renewal: Duration::from_secs(renewal),
        }
    }
}

impl Config {
    /// The configuration that `args` and the environment (`ARK_ASSETS`, `ARK_STATE`, `ARK_RUN`) ask for.
    ///
    /// # Errors
    /// When the running program's own path cannot be told.
    pub fn from_args(args: &Args) -> std::io::Result<Self> {
        let is_root = nix::unistd::geteuid().is_root();
        let state = StateDir::locate(is_root);
        let token_file = args.token_file.clone().unwrap_or_else(|| state.token());
        let host_kind = args.host_kind.into();
        Ok(Self {
            assets: Assets::locate()?,
            run: RunDir::locate(is_root),
            state,
            token_file,
            listen: args.listen,
            host_kind,
            host_shell: args.host_shell.clone(),
            timing: Timing::of(host_kind),
            pool: PoolSizes { prepared: args.pool.into(), standbys: args.standby.into() },
            scheduler: args.scheduler,
        })
    }
}

//! Command line of `arkd`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use ark_types::health::HostKind;

use crate::scheduler::SchedulerConfig;

/// The control plane of NOA ARK: serves agents over REST.
///
/// It always listens on the Unix socket of its run directory (ARK_RUN), and on TCP when told to. ARK_ASSETS and ARK_STATE
/// say where programs and images, and what lasts, are.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Args {
    /// Also listen on this TCP address; its clients need the bearer token.
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<SocketAddr>,

    /// What this host is: a real one, or the emulated one that `ark machine` starts.
    #[arg(long, value_name = "KIND", default_value = "native")]
    pub host_kind: HostKindArg,

    /// Unix socket of `ark-guestd serve`: lets clients run programs on this host itself.
    #[arg(long, value_name = "PATH")]
    pub host_shell: Option<PathBuf>,

    /// File of the bearer token, made when missing [default: `token` in the state directory].
    #[arg(long, value_name = "PATH")]
    pub token_file: Option<PathBuf>,

    /// How many VMMs are prepared ahead of need, for snapshots to be restored in; 0 for none.
    #[arg(long, value_name = "COUNT", env = "ARK_POOL", default_value_t = 2)]
    pub pool: u8,

    /// How many forks of each template in use are kept ready ahead of need; 0 for none.
    #[arg(long, value_name = "COUNT", env = "ARK_STANDBY", default_value_t = 2)]
    pub standby: u8,

    /// How much of this host is given away.
    #[command(flatten)]
    pub scheduler: SchedulerConfig,

    /// How messages on standard error look.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// [`HostKind`] as a flag's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum HostKindArg {
    /// A host with its own KVM.
    Native,
    /// The emulated host.
    Machine,
}

impl From<HostKindArg> for HostKind {
    fn from(arg: HostKindArg) -> Self {
        match arg {
            HostKindArg::Native => Self::Native,
            HostKindArg::Machine => Self::Machine,
        }
    }
}

/// Format of log messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object per line.
    Json,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
        assert_eq!(Args::parse_from(["arkd"]).scheduler, SchedulerConfig::default());
        let args = Args::parse_from(["arkd", "--overcommit-memory", "1.5", "--max-agents", "7"]);
        assert_eq!((args.scheduler.overcommit_memory, args.scheduler.max_agents), (1.5, 7));
    }
}

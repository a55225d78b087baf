//! Command line of `arkd`.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use ark_types::health::HostKind;

use crate::settings::{Factor, LogFormat};

/// The control plane of NOA ARK: serves agents over REST.
///
/// It always listens on the Unix socket of its run directory (ARK_RUN), and on TCP when told to. ARK_ASSETS and ARK_STATE
/// say where programs and images, and what lasts, are. Everything else is in a file, see --print-default-config; variables
/// ARK_<SECTION>_<KEY> go over it, and flags over both.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Args {
    /// Configuration file [default: /etc/ark/arkd.toml for root, $XDG_CONFIG_HOME/ark/arkd.toml for others, if it is there].
    #[arg(long, value_name = "PATH", env = "ARK_CONFIG")]
    pub config: Option<PathBuf>,

    /// Print the configuration that would be in effect, or say what is wrong with it, and end.
    #[arg(long, conflicts_with = "print_default_config")]
    pub check_config: bool,

    /// Print a configuration file that explains every key and says its default, and end.
    #[arg(long)]
    pub print_default_config: bool,

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

    /// How many VMMs are prepared ahead of need, for snapshots to be restored in; 0 for none [default: 2].
    #[arg(long, value_name = "COUNT")]
    pub pool: Option<u8>,

    /// How many forks of each template in use are kept ready ahead of need; 0 for none [default: 2].
    #[arg(long, value_name = "COUNT")]
    pub standby: Option<u8>,

    /// How much of this host is given away.
    #[command(flatten)]
    pub scheduler: SchedulerArgs,

    /// How messages look [default: json in a configured log file, text elsewhere].
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,

    /// Log file where none is configured: whoever starts arkd in the background says so.
    #[arg(long, value_name = "PATH", hide = true)]
    pub fallback_log_file: Option<PathBuf>,
}

/// How much of the host is given away: flags over the section `[scheduler]`.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct SchedulerArgs {
    /// How many times over the host's memory is given to agents, 0.01 to 10000; what is really left is asked for besides
    /// [default: 2].
    #[arg(long, value_name = "RATIO")]
    pub overcommit_memory: Option<Factor<1>>,

    /// How many times over the host's processors are given to agents, 0.01 to 10000 [default: 512].
    #[arg(long, value_name = "RATIO")]
    pub overcommit_cpu: Option<Factor<1>>,

    /// A fork shares most pages with what it was forked from, so its memory is reserved divided by this, 1 to 10000
    /// [default: 8].
    #[arg(long, value_name = "RATIO")]
    pub overcommit_forks: Option<Factor<100>>,

    /// Most agents at a time; those that are paused to disk are not counted [default: 1000].
    #[arg(long, value_name = "COUNT")]
    pub max_agents: Option<u32>,

    /// Most requests that wait for room at a time, at least 1 [default: 256].
    #[arg(long, value_name = "COUNT")]
    pub queue: Option<NonZeroU16>,
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

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
        let args = Args::parse_from(["arkd", "--overcommit-memory", "1.5", "--max-agents", "7"]);
        let ratio = args.scheduler.overcommit_memory.map(Factor::get);
        assert_eq!((ratio, args.scheduler.max_agents, args.scheduler.queue), (Some(1.5), Some(7), None));
        let wrong = Args::try_parse_from(["arkd", "--overcommit-forks", "0.5"]).unwrap_err().to_string();
        assert!(wrong.contains("0.5 is no ratio: choose a number from 1 to 10000"), "{wrong}");
    }
}

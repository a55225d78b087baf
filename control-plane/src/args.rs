//! Command line of `arkd`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use ark_types::health::HostKind;

use crate::settings::LogFormat;

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

    /// How messages look [default: json in a configured log file, text elsewhere].
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,

    /// Log file where none is configured: whoever starts arkd in the background says so.
    #[arg(long, value_name = "PATH", hide = true)]
    pub fallback_log_file: Option<PathBuf>,
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
    }
}

//! The command line of `ark-vmm`.

use std::ffi::OsString;
use std::path::PathBuf;

/// What is printed for `--help`.
pub const USAGE: &str = "\
ark-vmm: one microVM per process

usage:
  ark-vmm run --config FILE|-   run the VM that FILE (or standard input) describes, as JSON
  ark-vmm probe [--json]        find out whether this host's KVM can run guests
  ark-vmm --help | --version

`run` prints one line of JSON when the VM has ended and exits with
  0 powered off or stopped   10 reset   11 panic   12 crash   13 stop deadline   14 signal
  20 bad configuration   21 the host could not make the VM   22 internal error
";

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Run a VM.
    Run {
        /// The configuration's file, or `-`.
        config: PathBuf,
    },
    /// Find out whether KVM works.
    Probe {
        /// Whether to answer in JSON.
        json: bool,
    },
    /// Print [`USAGE`].
    Help,
    /// Print the version.
    Version,
}

/// A command line that says nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}; `ark-vmm --help` shows what there is")]
pub struct BadArgs(String);

/// Understands the words after the program's name.
///
/// # Errors
/// [`BadArgs`] with a sentence.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, BadArgs> {
    let mut args = args.into_iter();
    let verb = args.next().unwrap_or_default();
    let command = match verb.to_str() {
        Some("run") => {
            let flag = args.next().unwrap_or_default();
            match (flag.to_str(), args.next()) {
                (Some("--config"), Some(config)) => Command::Run { config: config.into() },
                (Some("--config" | ""), None) => return Err(BadArgs("run needs --config FILE".into())),
                _ => return Err(BadArgs(format!("run does not know {}", flag.display()))),
            }
        }
        Some("probe") => match args.next() {
            None => Command::Probe { json: false },
            Some(flag) if flag == "--json" => Command::Probe { json: true },
            Some(flag) => return Err(BadArgs(format!("probe does not know {}", flag.display()))),
        },
        Some("--help" | "-h" | "help") => Command::Help,
        Some("--version" | "-V") => Command::Version,
        Some("") => return Err(BadArgs("nothing to do".into())),
        _ => return Err(BadArgs(format!("{} is not a command", verb.display()))),
    };
    match args.next() {
        None => Ok(command),
        Some(extra) => Err(BadArgs(format!("{} is one word too many", extra.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Result<Command, BadArgs> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn every_command_is_understood() {
        assert_eq!(of("run --config vm.json"), Ok(Command::Run { config: "vm.json".into() }));
        assert_eq!(of("run --config -"), Ok(Command::Run { config: "-".into() }));
        assert_eq!(of("probe"), Ok(Command::Probe { json: false }));
        assert_eq!(of("probe --json"), Ok(Command::Probe { json: true }));
        assert_eq!(of("--help"), Ok(Command::Help));
        assert_eq!(of("--version"), Ok(Command::Version));
    }

    #[test]
    fn anything_else_is_refused_with_a_hint() {
        for line in ["", "walk", "run", "run --config", "run --fast x", "run --config a b", "probe --xml"] {
            assert!(of(line).unwrap_err().to_string().contains("--help"), "{line}");
        }
    }
}

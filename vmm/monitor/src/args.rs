//! The command line of `ark-vmm`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use ark_hal::probe::TIME_LIMIT;

/// What is printed for `--help`.
pub const USAGE: &str = "\
ark-vmm: one microVM per process

usage:
  ark-vmm run --config FILE|-   run the VM that FILE (or standard input) describes, as JSON
  ark-vmm probe [--json] [--limit-ms N]
                                find out whether this host's KVM can run guests, within 900 or N ms
  ark-vmm hold                  keep one empty VM, so that KVM stays switched on (emulated hosts)
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
        /// How long a slow host may take.
        limit: Duration,
    },
    /// Keep one VM, see [`crate::hold`].
    Hold,
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
        Some("probe") => return parse_probe(args),
        Some("hold") => Command::Hold,
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

/// The flags of `probe`, in any order; the last of a kind counts.
fn parse_probe(mut args: impl Iterator<Item = OsString>) -> Result<Command, BadArgs> {
    let (mut json, mut limit) = (false, TIME_LIMIT);
    while let Some(flag) = args.next() {
        match flag.to_str() {
            Some("--json") => json = true,
            Some("--limit-ms") => {
                let value = args.next().unwrap_or_default();
                let ms = value.to_str().and_then(|v| v.parse().ok()).filter(|ms| (1..=600_000).contains(ms));
                limit = ms
                    .map(Duration::from_millis)
                    .ok_or_else(|| BadArgs("--limit-ms needs a number from 1 to 600000".into()))?;
            }
            _ => return Err(BadArgs(format!("probe does not know {}", flag.display()))),
        }
    }
    Ok(Command::Probe { json, limit })
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
        assert_eq!(of("probe"), Ok(Command::Probe { json: false, limit: TIME_LIMIT }));
        let patient = Command::Probe { json: true, limit: Duration::from_secs(5) };
        assert_eq!(of("probe --json --limit-ms 5000"), Ok(patient));
        assert_eq!(of("hold"), Ok(Command::Hold));
        assert_eq!(of("--help"), Ok(Command::Help));
        assert_eq!(of("--version"), Ok(Command::Version));
    }

    #[test]
    fn anything_else_is_refused_with_a_hint() {
        for line in [
            "",
            "walk",
            "run",
            "run --config",
            "run --fast x",
            "run --config a b",
            "probe --xml",
            "probe --limit-ms x",
            "hold on",
        ] {
            assert!(of(line).unwrap_err().to_string().contains("--help"), "{line}");
        }
    }
}

//! The command line of `ark-vmm`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use ark_hal::probe::TIME_LIMIT;
use ark_types::agent::VCPUS;

/// What is printed for `--help`.
pub const USAGE: &str = "\
ark-vmm: one microVM per process

usage:
  ark-vmm run [--prepared VCPUS] --config FILE|-
                                run the VM that FILE (or standard input) describes, as JSON: boot it or go on from
                                a snapshot; with --prepared, make a VM with that many vCPUs before reading FILE
  ark-vmm verify DIR [--chain]  check every byte of the snapshot DIR; with --chain, of its bases, too
  ark-vmm compact DIR OUT       make of the snapshot DIR and its bases one full snapshot OUT, and print its id as JSON
  ark-vmm probe [--json] [--limit-ms N]
                                find out whether this host's KVM can run guests, within 900 or N ms
  ark-vmm hold                  keep one empty VM, so that KVM stays switched on (emulated hosts)
  ark-vmm --help | --version

`run` prints one line of JSON when the VM has ended; it, `verify` and `compact` exit with
  0 powered off or stopped   10 reset   11 panic   12 crash   13 stop deadline   14 signal
  20 bad configuration   21 the host could not make the VM   22 internal error
  23 the snapshot cannot be used
";

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Run a VM.
    Run {
        /// The configuration's file, or `-`.
        config: PathBuf,
        /// vCPUs to make before the configuration is read.
        prepared: Option<u8>,
    },
    /// Check a snapshot.
    Verify {
        /// Its directory.
        dir: PathBuf,
        /// Whether to check its bases, too.
        chain: bool,
    },
    /// Make one full snapshot of a chain.
    Compact {
        /// Directory of the topmost one.
        dir: PathBuf,
        /// Directory to make.
        out: PathBuf,
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
        Some("run") => parse_run(&mut args)?,
        Some("verify") => return parse_verify(args),
        Some("compact") => match (args.next(), args.next()) {
            (Some(dir), Some(out)) => Command::Compact { dir: dir.into(), out: out.into() },
            _ => return Err(BadArgs("compact needs a snapshot's directory and one to make".into())),
        },
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

/// The flags of `run`: `--config` comes last.
fn parse_run(args: &mut dyn Iterator<Item = OsString>) -> Result<Command, BadArgs> {
    let mut prepared = None;
    loop {
        let flag = args.next().unwrap_or_default();
        match (flag.to_str(), args.next()) {
            (Some("--config"), Some(config)) => return Ok(Command::Run { config: config.into(), prepared }),
            (Some("--config" | ""), None) => return Err(BadArgs("run needs --config FILE".into())),
            (Some("--prepared"), vcpus) => {
                let count = vcpus.as_ref().and_then(|v| v.to_str()?.parse().ok());
                let possible = count.filter(|count| VCPUS.contains(&u32::from(*count)));
                prepared =
                    Some(possible.ok_or_else(|| BadArgs("--prepared needs a number from 1 to 32".into()))?);
            }
            _ => return Err(BadArgs(format!("run does not know {}", flag.display()))),
        }
    }
}

/// The directory and the flag of `verify`, in any order.
fn parse_verify(args: impl Iterator<Item = OsString>) -> Result<Command, BadArgs> {
    let (mut dir, mut chain) = (None, false);
    for word in args {
        if word == "--chain" {
            chain = true;
        } else if dir.is_none() && !word.as_encoded_bytes().starts_with(b"-") {
            dir = Some(word.into());
        } else {
            return Err(BadArgs(format!("verify does not know {}", word.display())));
        }
    }
    let dir = dir.ok_or_else(|| BadArgs("verify needs a snapshot's directory".into()))?;
    Ok(Command::Verify { dir, chain })
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
        let run = |config: &str, prepared| Ok(Command::Run { config: config.into(), prepared });
        assert_eq!(of("run --config vm.json"), run("vm.json", None));
        assert_eq!(of("run --config -"), run("-", None));
        assert_eq!(of("run --prepared 32 --config -"), run("-", Some(32)));
        let verify = |chain| Ok(Command::Verify { dir: "s".into(), chain });
        assert_eq!(of("verify s"), verify(false));
        assert_eq!(of("verify s --chain"), verify(true));
        assert_eq!(of("verify --chain s"), verify(true));
        assert_eq!(of("compact s t"), Ok(Command::Compact { dir: "s".into(), out: "t".into() }));
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
            "run --prepared",
            "run --prepared 2",
            "run --prepared 0 --config -",
            "run --prepared 33 --config -",
            "run --prepared --config -",
            "verify",
            "verify a b",
            "verify --deep a",
            "compact a",
            "compact a b c",
            "probe --xml",
            "probe --limit-ms x",
            "hold on",
        ] {
            assert!(of(line).unwrap_err().to_string().contains("--help"), "{line}");
        }
    }
}

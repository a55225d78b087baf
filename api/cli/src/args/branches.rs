//! The verbs about templates, snapshots and forks, and `ark eval`.

use std::path::PathBuf;
use std::time::Duration;

use ark_types::agent::{AgentName, DEFAULT_MEMORY_MIB, DEFAULT_VCPUS};
use ark_types::image::ImageName;
use ark_types::permission::Permission;
use clap::{ArgGroup, Args, Subcommand};

use super::UpkeepArgs;
use crate::parse;

/// `ark template …`.
#[derive(Debug, Subcommand)]
pub(crate) enum TemplateAction {
    /// Boot an image once, warm it up, and freeze it for agents to be forked from
    Build(BuildArgs),
    /// List templates
    Ls,
    /// Remove templates
    Rm {
        /// Names
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
}

/// `ark template build`.
#[derive(Debug, Args)]
#[command(after_help = "\
A template that is there already, unchanged, is not built again. One whose kernel, image, warm-up, processors or memory \
changed is, and takes the old one's place.")]
pub(crate) struct BuildArgs {
    /// Name of the template
    pub(crate) name: AgentName,
    /// Image to boot
    #[arg(long)]
    pub(crate) image: ImageName,
    /// Code that the image's evaluator runs before the template is frozen, for example imports
    #[arg(long, value_name = "CODE", conflicts_with = "warm_file")]
    pub(crate) warm: Option<String>,
    /// The same from a file, or from standard input when it is `-`
    #[arg(long, value_name = "FILE")]
    pub(crate) warm_file: Option<PathBuf>,
    /// Virtual processors, 1 to 32
    #[arg(long, default_value_t = DEFAULT_VCPUS, value_name = "N")]
    pub(crate) vcpus: u32,
    /// Memory, MiB (or with a unit: 512M, 2G)
    #[arg(long, short, default_value_t = DEFAULT_MEMORY_MIB, value_parser = parse::memory_mib, value_name = "MIB")]
    pub(crate) memory: u64,
    /// Time the warm-up has: seconds, or with a unit (500ms, 2m, 1h) [default: 2m]
    #[arg(long, value_parser = parse::duration, value_name = "TIME")]
    pub(crate) timeout: Option<Duration>,
}

/// `ark eval`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("place").required(true).args(["agent", "template", "image"])), after_help = "\
What the code writes is written as it is; then comes the value of its last statement, where that is an expression whose \
value is not None.
Names that it binds stay for the agent's next `ark eval`.
Exit codes: 0; 1 an exception, whose traceback goes to standard error; 124 --timeout passed; 125 ark failed.")]
pub(crate) struct EvalArgs {
    /// Agent whose interpreter runs the code: name or id
    #[arg(long, short, value_name = "AGENT")]
    pub(crate) agent: Option<String>,
    /// Template to fork an agent from, which is removed afterwards
    #[arg(long, value_name = "TEMPLATE")]
    pub(crate) template: Option<AgentName>,
    /// Image to make an agent of, which is removed afterwards
    #[arg(long, value_name = "IMAGE")]
    pub(crate) image: Option<ImageName>,
    /// Interrupt the code after this time: seconds, or with a unit (500ms, 2m, 1h)
    #[arg(long, value_parser = parse::duration, value_name = "TIME")]
    pub(crate) timeout: Option<Duration>,
    /// Code, or `-` to read it from standard input; after `--` it may begin with a dash
    pub(crate) code: String,
}

/// `ark fork`.
#[derive(Debug, Args)]
#[command(after_help = "\
The agent goes on. The forks are called AGENT-1, AGENT-2 and so on; numbers in use are passed over.
Each was checked to be its own before its name is written: `ark receipt` shows how.
Exit code 125 when one of them did not come to be.")]
pub(crate) struct ForkArgs {
    /// Name or id
    pub(crate) agent: String,
    /// How many forks, 1 to 256
    #[arg(short = 'n', long, default_value_t = 1, value_parser = parse::forks, value_name = "N")]
    pub(crate) count: u32,
    /// What it may use of the platform: inference, or inference=MODEL for one model alone
    #[arg(long, value_name = "PERMISSION")]
    pub(crate) allow: Vec<Permission>,
    /// Have it stand still while it waits for a model: no processor time, its memory given back
    #[arg(long)]
    pub(crate) freeze_on_inference: bool,
    #[command(flatten)]
    pub(crate) upkeep: UpkeepArgs,
}

/// `ark snapshot`: takes one, or does what its subcommand says.
#[derive(Debug, Args)]
#[command(
    subcommand_negates_reqs = true,
    override_usage = "\
ark snapshot [OPTIONS] <AGENT> <NAME>
       ark snapshot [OPTIONS] --agent <AGENT> <NAME>
       ark snapshot [OPTIONS] <COMMAND>",
    after_help = "\
`ark snapshot a1 before-edit` takes a snapshot of a1 while it runs. Where the agent is called like one of the \
commands, give it as --agent."
)]
pub(crate) struct SnapshotArgs {
    /// Agent to take a snapshot of: name or id
    #[arg(long, short, value_name = "AGENT")]
    pub(crate) agent: Option<String>,
    /// Agent, and the name of the new snapshot
    #[arg(required = true, num_args = 1..=2, value_names = ["AGENT", "NAME"])]
    pub(crate) words: Vec<String>,
    #[command(subcommand)]
    pub(crate) action: Option<SnapshotAction>,
}

/// `ark snapshot …`.
#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotAction {
    /// List snapshots
    Ls(SnapshotsArgs),
    /// Remove snapshots
    Rm {
        /// Also where snapshots that hold only what changed since one of these become useless, and go with it
        #[arg(long)]
        orphans: bool,
        /// Names
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Merge everything that a snapshot builds upon into it, so that it needs no other
    Compact {
        /// Name
        name: String,
    },
}

/// `ark snapshots`, `ark snapshot ls`.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct SnapshotsArgs {
    /// Also the checkpoints of agents, which go by themselves
    #[arg(long, short)]
    pub(crate) all: bool,
}

/// `ark restore`.
#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// Name of the new agent; made up when absent
    #[arg(long)]
    pub(crate) name: Option<AgentName>,
    /// Name of the snapshot
    pub(crate) snapshot: String,
    /// What it may use of the platform: inference, or inference=MODEL for one model alone
    #[arg(long, value_name = "PERMISSION")]
    pub(crate) allow: Vec<Permission>,
    /// Have it stand still while it waits for a model: no processor time, its memory given back
    #[arg(long)]
    pub(crate) freeze_on_inference: bool,
    #[command(flatten)]
    pub(crate) upkeep: UpkeepArgs,
}

/// `ark rewind`.
#[derive(Debug, Args)]
pub(crate) struct RewindArgs {
    /// Name or id
    pub(crate) agent: String,
    /// Name of a snapshot that was taken of this agent
    pub(crate) snapshot: AgentName,
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use crate::args::{Cli, Verb};

    use super::*;

    fn verb(line: &[&str]) -> Result<Verb, String> {
        Cli::try_parse_from([&["ark"], line].concat()).map(|cli| cli.verb).map_err(|e| e.to_string())
    }

    #[test]
    fn the_definition_of_the_command_line_holds() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_first_word_after_snapshot_is_a_command_or_an_agent() {
        let taken = |line: &[&str]| match verb(line) {
            Ok(Verb::Snapshot(SnapshotArgs { agent, words, action: None })) => (agent, words.join(" ")),
            other => panic!("{line:?}: {other:?}"),
        };
        assert_eq!(taken(&["snapshot", "a1", "before-edit"]), (None, "a1 before-edit".to_owned()));
        assert_eq!(taken(&["snapshot", "--json", "a1", "ls"]), (None, "a1 ls".to_owned()));
        let by_option = (Some("rm".to_owned()), "x".to_owned());
        assert_eq!(taken(&["snapshot", "--agent", "rm", "x"]), by_option);
        assert_eq!(taken(&["snapshot", "x", "--agent", "rm"]), by_option);
        for line in [&["snapshot", "ls"][..], &["snapshot", "--json", "ls"], &["--json", "snapshot", "ls"]] {
            let listed = verb(line);
            assert!(
                matches!(
                    listed,
                    Ok(Verb::Snapshot(SnapshotArgs { action: Some(SnapshotAction::Ls(_)), .. }))
                ),
                "{line:?}: {listed:?}"
            );
        }
        let Ok(Verb::Snapshot(args)) = verb(&["snapshot", "rm", "s1", "s2", "--orphans"]) else {
            panic!("it removes")
        };
        assert!(
            matches!(&args.action, Some(SnapshotAction::Rm { orphans: true, names }) if names == &["s1", "s2"])
        );
        assert!(verb(&["snapshot", "compact", "s1"]).is_ok());
        for line in [&["snapshot"][..], &["snapshot", "a", "b", "c"], &["snapshot", "rm"]] {
            assert!(verb(line).is_err(), "{line:?}");
        }
    }

    #[test]
    fn code_is_evaluated_in_exactly_one_place() {
        assert!(matches!(
            verb(&["eval", "--template", "py", "import numpy; numpy.arange(3).sum()"]),
            Ok(Verb::Eval(args)) if args.template.is_some() && args.code.starts_with("import")
        ));
        assert!(matches!(
            verb(&["eval", "--agent", "a1", "--timeout", "1.5", "--", "-1"]),
            Ok(Verb::Eval(args)) if args.timeout == Some(Duration::from_millis(1500)) && args.code == "-1"
        ));
        assert!(
            matches!(verb(&["eval", "--image", "python", "-"]), Ok(Verb::Eval(args)) if args.code == "-")
        );
        assert!(verb(&["eval", "6*7"]).unwrap_err().contains("--agent"));
        assert!(
            verb(&["eval", "--agent", "a1", "--image", "python", "6*7"])
                .unwrap_err()
                .contains("cannot be used")
        );
        assert!(verb(&["eval", "--agent", "a1"]).unwrap_err().contains("<CODE>"));
    }

    #[test]
    fn forks_are_counted_within_the_limit() {
        let count = |line: &[&str]| match verb(line) {
            Ok(Verb::Fork(args)) => Ok(args.count),
            Ok(other) => panic!("{other:?}"),
            Err(e) => Err(e),
        };
        assert_eq!(count(&["fork", "a1"]), Ok(1));
        assert_eq!(count(&["fork", "a1", "-n", "10"]), Ok(10));
        assert_eq!(count(&["fork", "-n", "256", "a1"]), Ok(256));
        for wrong in ["0", "10000", "-1", "x"] {
            let error = count(&["fork", "a1", "-n", wrong]).unwrap_err();
            assert!(error.contains("1 to 256") || error.contains("unexpected argument"), "{error}");
        }
    }

    #[test]
    fn templates_are_built_of_an_image_and_at_most_one_warm_up() {
        let line = ["template", "build", "py", "--image", "python", "--warm", "import numpy, json, asyncio"];
        let Ok(Verb::Template { action: TemplateAction::Build(args) }) = verb(&line) else {
            panic!("it builds")
        };
        assert_eq!((args.vcpus, args.memory, args.timeout), (1, 256, None));
        assert_eq!(args.warm.as_deref(), Some("import numpy, json, asyncio"));
        assert!(verb(&[&line[..], &["--warm-file", "x"]].concat()).unwrap_err().contains("cannot be used"));
        assert!(verb(&["template", "build", "py"]).unwrap_err().contains("--image"));
        assert!(verb(&["template", "build", "Py", "--image", "python"]).unwrap_err().contains("use 1 to 63"));
        assert!(verb(&["template", "rm"]).is_err());
        assert!(verb(&["run", "--template", "py", "--image", "python", "--", "true"]).is_err());
    }

    #[test]
    fn the_other_verbs_take_their_names() {
        for line in [
            &["templates"][..],
            &["template", "ls"],
            &["snapshots"],
            &["snapshots", "--all"],
            &["snapshot", "ls", "-a"],
            &["pause", "a1", "a2"],
            &["resume", "a1"],
            &["restore", "before-edit"],
            &["restore", "before-edit", "--name", "a2"],
            &["rewind", "a1", "before-edit"],
            &["receipt", "a1-3"],
            &["create", "--cold", "--image", "base"],
        ] {
            assert!(verb(line).is_ok(), "{line:?}");
        }
        for line in [&["pause"][..], &["resume"], &["restore"], &["rewind", "a1"], &["receipt"]] {
            assert!(verb(line).is_err(), "{line:?}");
        }
    }
}

//! The command line, as clap reads it.

mod branches;
mod chat;
mod models;
mod pools;
mod scheduling;
mod services;
mod tasks;
mod upkeep;

use std::collections::BTreeMap;
use std::time::Duration;

use ark_types::agent::{AgentName, AgentState};
use ark_types::event::Stream;
use ark_types::image::ImageName;
use ark_types::label::{InvalidLabel, Labels, Selector};
use ark_types::permission::Permission;
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::commands::cp::Place;
use crate::failure::Failure;
use crate::parse;

pub(crate) use branches::{
    BuildArgs, EvalArgs, ForkArgs, RestoreArgs, RewindArgs, SnapshotAction, SnapshotArgs, SnapshotsArgs,
    TemplateAction,
};
pub(crate) use chat::ChatArgs;
pub(crate) use models::{ModelAction, ModelAddArgs};
pub(crate) use pools::{PoolAction, PoolSetArgs};
pub(crate) use scheduling::{QuotaArgs, RoomArgs};
pub(crate) use services::{ServiceAction, ServiceCallArgs, ServiceSpecArgs};
pub(crate) use tasks::{TaskAction, TaskArgs, TaskListArgs, TaskLogsArgs, TaskRunArgs};
pub(crate) use upkeep::{HealthArgs, UpkeepArgs};

/// Disposable microVM agents on machines you control.
#[derive(Debug, Parser)]
#[command(name = "ark", version, propagate_version = false, disable_help_subcommand = true, after_help = AFTER_HELP)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

const AFTER_HELP: &str = "\
Exit codes: the program's own; 124 --timeout passed, 125 ark failed, 126 the program cannot be run, 127 there is no such
program, 128+n signal n ended it.
Files: ARK_ASSETS (programs, kernel, images), ARK_STATE (token, machine's disk, logs), ARK_RUN (sockets).
Try: ark run --image python -- python3 -c 'print(6*7)'";

/// Said once about Ctrl-C for the verbs that run a program.
const INTERRUPT_HELP: &str = "\
Ctrl-C, SIGTERM, SIGHUP and SIGQUIT go to the program. If it ignores them, Ctrl-C three times within two seconds kills
it; with -t, where Ctrl-C is a key for the program's terminal, Ctrl-] three times within two seconds does.
Standard input goes to the program with -i, or when it is a pipe or file.";

/// Options of every verb.
#[derive(Clone, Debug, Args)]
pub(crate) struct Global {
    /// Where agents run: on this machine's KVM, in the emulated host, or where the probe says it works
    #[arg(long, global = true, env = "ARK_HOST", value_enum, default_value_t = HostChoice::Auto, value_name = "HOST")]
    pub(crate) host: HostChoice,
    /// Port of the emulated host's REST API on 127.0.0.1 [default: 7070]
    #[arg(long, global = true, env = "ARK_PORT", value_parser = clap::value_parser!(u16).range(1..), value_name = "PORT")]
    pub(crate) port: Option<u16>,
    /// Write JSON for machines: results on standard output, errors (problem+json) on standard error
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

/// Where agents run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum HostChoice {
    /// Natively when the probe says that KVM is usable, else in the emulated host
    Auto,
    /// On this machine's KVM, whatever the probe says
    Native,
    /// In the emulated host (QEMU, software)
    Machine,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Run a program in a new agent and remove the agent afterwards
    #[command(after_help = INTERRUPT_HELP)]
    Run(RunArgs),
    /// Create an agent that stays until it is removed
    Create(CreateArgs),
    /// Run a program in an agent
    #[command(after_help = INTERRUPT_HELP)]
    Exec(ExecArgs),
    /// Run code in the interpreter that an agent keeps warm
    Eval(EvalArgs),
    /// Ask a model something
    Chat(ChatArgs),
    /// Branch a running agent: forks of it begin where it stands, and it goes on
    Fork(ForkArgs),
    /// Let agents stand still, their memory on disk
    Pause {
        /// Names or ids
        #[arg(required = true, value_name = "AGENT")]
        agents: Vec<String>,
    },
    /// Let paused agents go on
    Resume {
        /// Names or ids
        #[arg(required = true, value_name = "AGENT")]
        agents: Vec<String>,
    },
    /// Take a snapshot of an agent; list, remove and compact them
    Snapshot(SnapshotArgs),
    /// List snapshots
    Snapshots(SnapshotsArgs),
    /// Make a new agent that goes on from a snapshot
    Restore(RestoreArgs),
    /// Take an agent back to a snapshot of it; what happened since is lost
    Rewind(RewindArgs),
    /// Show what a fork was asked to prove that it is its own, and what it answered
    Receipt {
        /// Name or id
        agent: String,
    },
    /// Copy files between this machine and an agent
    Cp(CpArgs),
    /// Show an agent's serial console
    Logs(LogsArgs),
    /// List agents
    Ps(PsArgs),
    /// Show live what agents use; q ends it
    Top(TopArgs),
    /// Show what happened to agents, oldest first
    Events(EventsArgs),
    /// Show everything about an agent
    Inspect {
        /// Name or id
        agent: String,
    },
    /// Stop and remove agents
    Rm(RmArgs),
    /// Set and remove labels of an agent
    Label(LabelArgs),
    /// List images
    Images,
    /// Models: language models in GGUF files, served by VMs of their own
    Model {
        #[command(subcommand)]
        action: ModelAction,
    },
    /// List models
    Models,
    /// Templates: agents that were booted and warmed once, to be forked from
    Template {
        #[command(subcommand)]
        action: TemplateAction,
    },
    /// List templates
    Templates,
    /// How many forks of each template stand ready
    Pool {
        #[command(subcommand)]
        action: PoolAction,
    },
    /// Services: names with a number of agents behind them, one of which takes each call
    Service {
        #[command(subcommand)]
        action: ServiceAction,
    },
    /// Work that is done in agents made for it, as often as it takes, whatever dies meanwhile
    Task {
        #[command(subcommand)]
        action: TaskAction,
    },
    /// Show who waits for room, and where each stands
    Queue,
    /// Show hosts, and what is reserved on them
    Hosts,
    /// Show owners of agents, and set what they may have
    Quota(QuotaArgs),
    /// Check what this machine needs to run agents, and say what to do about what is missing
    Doctor,
    /// Stop everything: agents, arkd, and the emulated host
    Stop,
    /// The emulated host, for machines without usable KVM
    Machine {
        #[command(subcommand)]
        action: MachineAction,
    },
    /// Print a shell's completion script
    Completions {
        /// Shell to complete for
        shell: Shell,
    },
    /// Print the version
    Version,
}

/// Size and shape of a new agent.
#[derive(Clone, Debug, Args)]
pub(crate) struct AgentArgs {
    /// Image to make it of
    #[arg(long, default_value = "base")]
    pub(crate) image: ImageName,
    /// Template to fork it from, instead of an image
    #[arg(long, conflicts_with = "image")]
    pub(crate) template: Option<AgentName>,
    /// Boot the image, even where a template of it is at hand
    #[arg(long)]
    pub(crate) cold: bool,
    /// Name of the agent; made up when absent
    #[arg(long)]
    pub(crate) name: Option<AgentName>,
    /// Virtual processors, 1 to 32 [default: 1, or the template's]
    #[arg(long, value_name = "N")]
    pub(crate) vcpus: Option<u32>,
    /// Memory, MiB (or with a unit: 512M, 2G) [default: 256, or the template's]
    #[arg(long, short, value_parser = parse::memory_mib, value_name = "MIB")]
    pub(crate) memory: Option<u64>,
    /// Environment variable; without a value, this shell's
    #[arg(long, short, value_parser = parse::environment, value_name = "KEY[=VALUE]")]
    pub(crate) env: Vec<(String, String)>,
    /// Label, to select agents by
    #[arg(long = "label", short, value_parser = parse::label, value_name = "KEY=VALUE")]
    pub(crate) label: Vec<(String, String)>,
    /// Remove it this long after its creation (90s, 30m, 1h)
    #[arg(long, value_parser = parse::lifetime, value_name = "TIME")]
    pub(crate) ttl: Option<u64>,
    /// Remove it when nothing was asked of it for so long while it ran (90s, 10m)
    #[arg(long, value_parser = parse::lifetime, value_name = "TIME")]
    pub(crate) idle_timeout: Option<u64>,
    /// What it may use of the platform: inference, or inference=MODEL for one model alone
    #[arg(long, value_name = "PERMISSION")]
    pub(crate) allow: Vec<Permission>,
    /// Have it stand still while it waits for a model: no processor time, its memory given back
    #[arg(long)]
    pub(crate) freeze_on_inference: bool,
    #[command(flatten)]
    pub(crate) upkeep: UpkeepArgs,
    #[command(flatten)]
    pub(crate) room: RoomArgs,
}

impl AgentArgs {
    /// The labels.
    ///
    /// # Errors
    /// A key, value or number that no label may have.
    pub(crate) fn labels(&self) -> Result<Labels, Failure> {
        let labels: BTreeMap<String, String> = self.label.iter().cloned().collect();
        labels.try_into().map_err(|error: InvalidLabel| Failure::Usage(error.to_string()))
    }
}

/// How a program runs.
#[derive(Clone, Debug, Args)]
pub(crate) struct ProgramArgs {
    /// Send standard input to the program even when it is a terminal
    #[arg(long, short)]
    pub(crate) interactive: bool,
    /// Give the program a terminal
    #[arg(long, short, conflicts_with = "json")]
    pub(crate) tty: bool,
    /// Working directory of the program
    #[arg(long, short, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User (and group) the program runs as: name or number, USER[:GROUP]
    #[arg(long, short)]
    pub(crate) user: Option<String>,
    /// Kill the program after this time (30s, 500ms, 2m, 1h) and exit with 124
    #[arg(long, value_parser = parse::duration, value_name = "TIME")]
    pub(crate) timeout: Option<Duration>,
}

/// `ark run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) agent: AgentArgs,
    #[command(flatten)]
    pub(crate) program: ProgramArgs,
    /// Remove the agent when the program ends: the default, accepted out of habit
    #[arg(long, conflicts_with = "keep")]
    pub(crate) rm: bool,
    /// Keep the agent when the program ends
    #[arg(long)]
    pub(crate) keep: bool,
    /// Program and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

/// `ark create`.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    pub(crate) agent: AgentArgs,
}

/// `ark exec`.
#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    #[command(flatten)]
    pub(crate) program: ProgramArgs,
    /// Environment variable; without a value, this shell's
    #[arg(long, short, value_parser = parse::environment, value_name = "KEY[=VALUE]")]
    pub(crate) env: Vec<(String, String)>,
    /// Name or id
    pub(crate) agent: String,
    /// Program and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

/// `ark label`.
#[derive(Debug, Args)]
pub(crate) struct LabelArgs {
    /// Name or id
    pub(crate) agent: String,
    /// Label to set, or with a dash at its end to remove
    #[arg(required = true, value_parser = parse::label_change, value_name = "KEY=VALUE|KEY-")]
    pub(crate) changes: Vec<(String, Option<String>)>,
}

/// `ark cp`.
#[derive(Debug, Args)]
#[command(after_help = "\
One of SRC and DST is in an agent: AGENT:/path. The other is on this machine: a path (./a:b if it has a colon), or `-`
for standard input or output. Directories are copied with everything in them; symbolic links and special files in
them are skipped and named.")]
pub(crate) struct CpArgs {
    /// What to copy
    #[arg(value_parser = parse::place, value_name = "SRC")]
    pub(crate) source: Place,
    /// Where to: a new name, or a directory
    #[arg(value_parser = parse::place, value_name = "DST")]
    pub(crate) target: Place,
}

/// `ark top`.
#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// Look once instead of each second
    #[arg(long)]
    pub(crate) once: bool,
}

/// `ark logs`.
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// List the consoles that were kept of agents that did not start or ended by themselves
    #[arg(long, conflicts_with_all = ["follow", "tail", "agent"])]
    pub(crate) kept: bool,
    /// Go on until the agent ends
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Only the last lines
    #[arg(long, value_name = "N")]
    pub(crate) tail: Option<u64>,
    /// Name or id, also of an agent that is gone while its console is kept
    #[arg(required_unless_present = "kept")]
    pub(crate) agent: Option<String>,
}

/// `ark ps`.
#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Also agents that have ended, and those that were removed and are remembered
    #[arg(long, short)]
    pub(crate) all: bool,
    /// Only agents with these labels: app=x,tier!=db,env in (a,b),key,!key
    #[arg(long = "selector", short = 'l', value_name = "SELECTOR")]
    pub(crate) selector: Option<Selector>,
    /// Only agents in this state: creating, running, paused, stopping, stopped, failed
    #[arg(long, value_parser = parse::state, value_name = "STATE")]
    pub(crate) state: Option<AgentState>,
}

/// `ark events`.
#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Go on with what happens from now on, until interrupted
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Only what happened after this position [default: everything that is kept]
    #[arg(long, value_name = "POSITION")]
    pub(crate) after: Option<u64>,
    /// Only what happened to this: agent/ID
    #[arg(long, value_name = "STREAM")]
    pub(crate) stream: Option<Stream>,
}

/// `ark rm`.
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Do not wait for a shutdown, and do not mind agents that do not exist
    #[arg(long, short)]
    pub(crate) force: bool,
    /// Names or ids
    #[arg(required = true, value_name = "AGENT")]
    pub(crate) agents: Vec<String>,
}

/// `ark machine …`.
#[derive(Debug, Subcommand)]
pub(crate) enum MachineAction {
    /// Start it, if it does not run
    Start(MachineSize),
    /// Stop it and everything in it
    Stop,
    /// Say whether it runs
    Status,
    /// A shell in it, or one program
    Shell {
        /// Program and its arguments; a login shell on your terminal when absent
        #[arg(trailing_var_arg = true, value_name = "CMD")]
        command: Vec<String>,
    },
    /// Show its console
    Logs {
        /// Go on until the machine ends
        #[arg(long, short)]
        follow: bool,
    },
}

/// What a machine is made of.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct MachineSize {
    /// Memory, MiB (or with a unit: 4G) [default: half of this machine's, at most 6 GiB]
    #[arg(long, short, value_parser = parse::memory_mib, value_name = "MIB")]
    pub(crate) memory: Option<u64>,
    /// Processors [default: as many as this machine has, at most 8]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=32), value_name = "N")]
    pub(crate) cpus: Option<u32>,
    /// Size of the data disk when it is made, MiB (or with a unit: 16G) [default: 8G]
    #[arg(long, value_parser = parse::memory_mib, value_name = "MIB")]
    pub(crate) disk: Option<u64>,
    /// Another disk, read-only, with the serial number `test`
    #[arg(long, value_name = "FILE")]
    pub(crate) attach: Option<std::path::PathBuf>,
}

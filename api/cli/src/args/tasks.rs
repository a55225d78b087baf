//! `ark task`.

use std::time::Duration;

use ark_types::agent::AgentName;
use ark_types::image::ImageName;
use ark_types::label::{Owner, Selector};
use ark_types::permission::Permission;
use ark_types::task::{TaskKey, TaskState};
use clap::{Args, Subcommand};

use crate::parse;

/// Said once about the verbs that ask for a task.
const TASK_HELP: &str = "\
The task goes on whatever becomes of this command: Ctrl-C only ends the waiting. It is done at least once: what is under way
when arkd or the host dies is begun again. The program finds ARK_TASK_ID and, from 1, ARK_TASK_ATTEMPT in its environment.
Exit code: the program's own; 124 when it took too long, 125 when it was cancelled or could not be run.";

/// `ark task …`.
#[derive(Debug, Subcommand)]
pub(crate) enum TaskAction {
    /// Have a program run in an agent made for it, and wait for its end
    #[command(after_help = TASK_HELP)]
    Run(TaskRunArgs),
    /// Have code evaluated in an agent made for it, and wait for its end
    #[command(after_help = TASK_HELP)]
    Eval(TaskEvalArgs),
    /// List tasks, oldest first
    Ls(TaskListArgs),
    /// Show everything about a task
    Show {
        /// Id
        task: String,
    },
    /// Show what an attempt of a task wrote
    Logs(TaskLogsArgs),
    /// End tasks that have not ended
    Cancel {
        /// Ids
        #[arg(required = true, value_name = "TASK")]
        tasks: Vec<String>,
    },
    /// Remove tasks that have ended, with what is kept of them
    Rm {
        /// Ids
        #[arg(required = true, value_name = "TASK")]
        tasks: Vec<String>,
    },
}

/// What a task is made in, and how often it is tried.
#[derive(Clone, Debug, Args)]
pub(crate) struct TaskArgs {
    /// Image to make its agents of
    #[arg(long, default_value = "base")]
    pub(crate) image: ImageName,
    /// Template to fork its agents from, instead of an image
    #[arg(long, conflicts_with_all = ["image", "vcpus", "memory"])]
    pub(crate) template: Option<AgentName>,
    /// Virtual processors, 1 to 32 [default: 1, or the template's]
    #[arg(long, value_name = "N")]
    pub(crate) vcpus: Option<u32>,
    /// Memory, MiB (or with a unit: 512M, 2G) [default: 256, or the template's]
    #[arg(long, short, value_parser = parse::memory_mib, value_name = "MIB")]
    pub(crate) memory: Option<u64>,
    /// Name of the task, for people
    #[arg(long)]
    pub(crate) name: Option<AgentName>,
    /// Label, to select tasks by
    #[arg(long = "label", short, value_parser = parse::label, value_name = "KEY=VALUE")]
    pub(crate) label: Vec<(String, String)>,
    /// Owner of the task: quotas and fairness go by owners [default: default]
    #[arg(long, env = "ARK_OWNER", value_name = "OWNER")]
    pub(crate) owner: Option<Owner>,
    /// What its agents may use of the platform: inference, or inference=MODEL for one model alone
    #[arg(long, value_name = "PERMISSION")]
    pub(crate) allow: Vec<Permission>,
    /// Have each stand still while each waits for a model: no processor time, its memory given back
    #[arg(long)]
    pub(crate) freeze_on_inference: bool,
    /// Among tasks that wait the highest goes first: -100 to 100
    #[arg(long, default_value_t = 0, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-100..=100), value_name = "N")]
    pub(crate) priority: i32,
    /// Environment variable; without a value, this shell's
    #[arg(long, short, value_parser = parse::environment, value_name = "KEY[=VALUE]")]
    pub(crate) env: Vec<(String, String)>,
    /// Try it so often again when it fails
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=99), value_name = "N")]
    pub(crate) retries: u32,
    /// Wait so long after the first failure, and twice as long after each further one, up to a minute [default: 1s]
    #[arg(long, value_parser = parse::duration, value_name = "TIME")]
    pub(crate) backoff: Option<Duration>,
    /// Longest time of an attempt (30s, 500ms, 2m, 1h)
    #[arg(long, value_parser = parse::duration, value_name = "TIME")]
    pub(crate) timeout: Option<Duration>,
    /// Longest time of the whole
    #[arg(long, value_parser = parse::duration, value_name = "TIME")]
    pub(crate) deadline: Option<Duration>,
    /// What you call it: asking again with the same key is about the same task
    #[arg(long, value_name = "KEY")]
    pub(crate) key: Option<TaskKey>,
    /// Do not wait: write the task's id
    #[arg(long, short)]
    pub(crate) detach: bool,
}

/// `ark task run`.
#[derive(Debug, Args)]
pub(crate) struct TaskRunArgs {
    #[command(flatten)]
    pub(crate) task: TaskArgs,
    /// Read standard input to its end and give it to the program
    #[arg(long, short)]
    pub(crate) interactive: bool,
    /// Working directory of the program
    #[arg(long, short, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User (and group) the program runs as: name or number, USER[:GROUP]
    #[arg(long, short)]
    pub(crate) user: Option<String>,
    /// Program and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

/// `ark task eval`.
#[derive(Debug, Args)]
pub(crate) struct TaskEvalArgs {
    #[command(flatten)]
    pub(crate) task: TaskArgs,
    /// Code, or `-` to read it from standard input; after `--` it may begin with a dash
    pub(crate) code: String,
}

/// `ark task logs`.
#[derive(Debug, Args)]
pub(crate) struct TaskLogsArgs {
    /// Id
    pub(crate) task: String,
    /// Number of the attempt, from 1 [default: the newest that runs or whose output is kept]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    pub(crate) attempt: Option<u32>,
    /// Go on until the attempt has ended; without --attempt, from one to the next until the task has
    #[arg(long, short)]
    pub(crate) follow: bool,
}

/// `ark task ls`.
#[derive(Debug, Args)]
pub(crate) struct TaskListArgs {
    /// Only tasks with these labels: app=x,tier!=db,env in (a,b),key,!key
    #[arg(long = "selector", short = 'l', value_name = "SELECTOR")]
    pub(crate) selector: Option<Selector>,
    /// Only tasks in this state: queued, running, waiting, succeeded, failed, cancelled, timed_out
    #[arg(long, value_parser = parse::task_state, value_name = "STATE")]
    pub(crate) state: Option<TaskState>,
    /// Only tasks of this owner
    #[arg(long, value_name = "OWNER")]
    pub(crate) owner: Option<Owner>,
}

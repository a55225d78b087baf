//! Tasks: work that `arkd` gets done in agents made for it, as often as it takes.
//!
//! A task is done at least once: what is under way when `arkd` or the host dies is begun again. Each beginning is an attempt with a
//! number of its own, from 1, that the guest is told in [`ATTEMPT_VARIABLE`]; no two programs are ever told the same one.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::AgentName;
use crate::eval::{EvalException, Language};
use crate::exec::Encoding;
use crate::image::ImageName;
use crate::label::{Labels, Owner};
use crate::permission::Permission;

/// Environment variable that holds the id of the task.
pub const ID_VARIABLE: &str = "ARK_TASK_ID";
/// Environment variable that holds the number of the attempt.
pub const ATTEMPT_VARIABLE: &str = "ARK_TASK_ATTEMPT";
/// Label of the agent that an attempt is made in; its value is the id of the task.
pub const AGENT_LABEL: &str = "ark.task";

/// Tasks of one page at most, and when a request does not say how many.
pub const MAX_TASKS: usize = 1000;
/// Fewest and most attempts of a task that fail by themselves.
pub const ATTEMPTS: std::ops::RangeInclusive<u32> = 1..=100;
/// Shortest and longest time limit of a task, milliseconds; a year.
pub const TASK_TIME_MS: std::ops::RangeInclusive<u64> = 1..=31_536_000_000;
/// Longest wait between two attempts, milliseconds; a day.
pub const MAX_BACKOFF_MS: u64 = 86_400_000;
/// Most bytes of a task's standard input.
pub const MAX_STDIN: usize = 1 << 20;
/// Most bytes that are kept of each output stream of an attempt; the first ones.
pub const MAX_KEPT_OUTPUT: usize = 1 << 20;
/// Attempts of a task whose output is kept, the newest ones.
pub const MAX_KEPT_ATTEMPTS: u32 = 16;
/// Most bytes of each output stream in [`TaskResult`]; `GET /v1/tasks/{task}/logs` has all that is kept.
pub const MAX_SHOWN_OUTPUT: usize = 64 << 10;
/// Longest that a request waits for the end of a task, milliseconds.
pub const MAX_WAIT_MS: u64 = 60_000;
/// Attempts that a task tells of, the newest ones.
pub const MAX_TOLD_ATTEMPTS: usize = 100;
/// Longest idempotency key, bytes.
const MAX_KEY: usize = 255;

/// What a client calls a task, so that asking again does not make another: 1 to 255 printable ASCII characters without blanks.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^[!-~]{1,255}$", example = "nightly-2026-01-31")]
pub struct TaskKey(String);

/// A text that is no key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a task's key: use 1 to {MAX_KEY} printable ASCII characters without blanks")]
pub struct InvalidKey(String);

impl TryFrom<String> for TaskKey {
    type Error = InvalidKey;
    fn try_from(text: String) -> Result<Self, InvalidKey> {
        let is_valid = (1..=MAX_KEY).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
        if is_valid { Ok(Self(text)) } else { Err(InvalidKey(text)) }
    }
}

impl FromStr for TaskKey {
    type Err = InvalidKey;
    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        text.to_owned().try_into()
    }
}

impl From<TaskKey> for String {
    fn from(key: TaskKey) -> Self {
        key.0
    }
}

impl AsRef<str> for TaskKey {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TaskKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Body of `POST /v1/tasks`. It names exactly one of `image` and `template`, and exactly one of `command` and `eval`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateTask {
    /// Name, for people; several tasks may have the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<AgentName>,
    /// Who it belongs to: quotas and fairness go by owners.
    #[serde(default, skip_serializing_if = "Owner::is_default")]
    pub owner: Owner,
    /// What its agents may use of the platform; nothing when absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Permission>,
    /// Whether it stands still while its calls of models wait for an answer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub freeze_on_inference: bool,
    /// Labels, to select tasks by.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Image that its agents are made of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageName>,
    /// Template that its agents are forked from; processors and memory are the template's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<AgentName>,
    /// Virtual processors, 1 to 32; 1 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// Memory in MiB, 64 or more, bounded by the host's; 256 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// A program to run; the task succeeds when it exits with 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<TaskCommand>,
    /// Code to evaluate; the task succeeds when no exception leaves it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval: Option<TaskEval>,
    /// Among tasks that wait the highest goes first; -100 to 100.
    #[serde(default, skip_serializing_if = "is_normal")]
    pub priority: i32,
    /// What becomes of it when an attempt fails.
    #[serde(default)]
    pub retry: Retry,
    /// Longest that the program or the code of one attempt may run, milliseconds, at most a year; no limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Longest from its creation to its end, milliseconds, at most a year; no limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Unique among the tasks of the owner: asking again with the same key and the same body answers with the task there is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<TaskKey>,
}

/// Whether a priority is that of a request that names none.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
const fn is_normal(priority: &i32) -> bool {
    *priority == 0
}

/// A program that a task runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TaskCommand {
    /// Program and arguments; the program is looked up in the `PATH` of `env` when it has no slash.
    pub argv: Vec<String>,
    /// Environment on top of the guest's own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Working directory; `/root` (or `/` where it is missing) by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// User name or numeric id, with `:group` if wanted; root by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Standard input, at most 1 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// Encoding of `stdin`.
    #[serde(default)]
    pub encoding: Encoding,
}

/// Code that a task evaluates.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TaskEval {
    /// Statements; when the last one is an expression, its value is the task's.
    pub code: String,
    /// Language of the code.
    #[serde(default)]
    pub language: Language,
    /// Variables that are in the interpreter's environment when the code begins.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
}

/// What becomes of a task when an attempt fails. The wait before the next one is `backoff_ms` after the first failure and twice as
/// long after each further one, up to `max_backoff_ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Retry {
    /// Attempts that may fail, 1 to 100; those that `arkd` itself cut off are not counted. 1 when absent.
    pub max_attempts: u32,
    /// First wait, milliseconds, at most a day; 1000 when absent.
    pub backoff_ms: u64,
    /// Longest wait, milliseconds, at most a day; 60000 when absent.
    pub max_backoff_ms: u64,
}

impl Default for Retry {
    fn default() -> Self {
        Self { max_attempts: 1, backoff_ms: 1000, max_backoff_ms: 60_000 }
    }
}

/// What a task does, as far as it is no secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum TaskWork {
    /// It runs a program.
    Command {
        /// The program, without its arguments.
        program: String,
    },
    /// It evaluates code.
    Eval {
        /// Language of the code.
        language: Language,
    },
}

/// What is settled about a task for all its life. What may be a secret is not told: arguments, environment, input and code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TaskSpec {
    /// Identifier: 16 hexadecimal digits, never used twice.
    pub id: String,
    /// Name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<AgentName>,
    /// Who it belongs to.
    #[serde(default)]
    pub owner: Owner,
    /// Labels.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Its key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<TaskKey>,
    /// Image of its agents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageName>,
    /// Template of its agents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<AgentName>,
    /// What it does.
    pub work: TaskWork,
    /// Priority.
    #[serde(default)]
    pub priority: i32,
    /// What becomes of it when an attempt fails.
    #[serde(default)]
    pub retry: Retry,
    /// Time limit of an attempt, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Time limit of the whole, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// W3C trace context that its attempts are part of: that of the request that made it, or one of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// Creation time, milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
}

impl TaskSpec {
    /// The task at its creation.
    #[must_use]
    pub const fn newborn(self) -> Task {
        Task {
            spec: self,
            state: TaskState::Queued,
            reason: None,
            attempts: Vec::new(),
            failures: 0,
            retry_unix_ms: None,
            ended_unix_ms: None,
            output: None,
            result: None,
        }
    }
}

/// Life of a task.
///
/// ```text
///  queued ⇄ running ⇄ waiting        cancelled, timed_out: from any of them
///    │         └──► succeeded
///    └──────► failed ◄── running
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TaskState {
    /// It waits for its turn, or for room.
    Queued,
    /// An attempt is under way.
    Running,
    /// An attempt failed, and the next one has its time.
    Waiting,
    /// It is done.
    Succeeded,
    /// It is not done and not tried any more.
    Failed,
    /// Somebody did not want it any more.
    Cancelled,
    /// Its last attempt, or all of it, took too long.
    TimedOut,
}

impl TaskState {
    /// Every state.
    pub const ALL: [Self; 7] = [
        Self::Queued,
        Self::Running,
        Self::Waiting,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
        Self::TimedOut,
    ];

    /// Whether nothing more happens to it.
    #[must_use]
    pub const fn is_ended(self) -> bool {
        match self {
            Self::Queued | Self::Running | Self::Waiting => false,
            Self::Succeeded | Self::Failed | Self::Cancelled | Self::TimedOut => true,
        }
    }

    /// The word that is on the wire.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Waiting => "waiting",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::TimedOut => "timed_out",
        }
    }
}

impl fmt::Display for TaskState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AttemptOutcome {
    /// The work is done.
    Succeeded,
    /// The program did not exit with 0, or an exception left the code.
    Failed,
    /// It took longer than `timeout_ms`.
    TimedOut,
    /// Its agent did not come up, or ended meanwhile.
    Lost,
    /// Its agent cannot do this at all: there is no such program, user or directory. It is not tried again.
    Refused,
    /// `arkd` ended meanwhile. It does not count against `max_attempts`.
    CutOff,
    /// The task was cancelled, or its deadline passed.
    Stopped,
}

impl AttemptOutcome {
    /// The word that is on the wire.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
            Self::Lost => "lost",
            Self::Refused => "refused",
            Self::CutOff => "cut_off",
            Self::Stopped => "stopped",
        }
    }

    /// Whether it counts against `max_attempts`.
    #[must_use]
    pub const fn is_failure(self) -> bool {
        match self {
            Self::Failed | Self::TimedOut | Self::Lost | Self::Refused => true,
            Self::Succeeded | Self::CutOff | Self::Stopped => false,
        }
    }
}

/// The end of an attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AttemptEnd {
    /// How it ended.
    pub outcome: AttemptOutcome,
    /// Why, as a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Exit code of the program as a shell would show it: its own, 128 + signal, or 124 for a timeout; of code 0, or 1 after an
    /// exception. Absent when neither ended by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<u8>,
    /// What is kept of its output; absent when nothing is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<KeptOutput>,
}

/// How much of an output is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KeptOutput {
    /// Bytes of standard output.
    pub stdout_bytes: u64,
    /// Bytes of standard error.
    pub stderr_bytes: u64,
    /// Whether there was more.
    pub truncated: bool,
}

impl KeptOutput {
    /// Bytes of both.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.stdout_bytes.saturating_add(self.stderr_bytes)
    }
}

/// One attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TaskAttempt {
    /// Its number, from 1.
    pub number: u32,
    /// Id of its agent, which is gone when the attempt has ended; absent when none came up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    /// When it began, milliseconds since the Unix epoch.
    pub started_unix_ms: u64,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_unix_ms: Option<u64>,
    /// How it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<AttemptEnd>,
}

/// What came of the last attempt whose output is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TaskResult {
    /// Number of the attempt.
    pub attempt: u32,
    /// See [`AttemptEnd::exit_code`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<u8>,
    /// Standard output, its first 64 KiB; what is not UTF-8 becomes U+FFFD.
    pub stdout: String,
    /// Standard error, its first 64 KiB.
    pub stderr: String,
    /// Whether there was more of either than is shown here.
    pub truncated: bool,
    /// `repr` of the value of the code's last expression; none when there is none, or it is `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// The exception that ended the code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exception: Option<EvalException>,
    /// Run time in the guest, microseconds.
    pub duration_us: u64,
}

/// A task as `arkd` reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Task {
    /// What is settled about it.
    #[serde(flatten)]
    pub spec: TaskSpec,
    /// Where it is in its life.
    pub state: TaskState,
    /// Why it is in that, as a sentence; of a queued one, what it lacks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Attempts, oldest first; of more than 100 the newest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attempts: Vec<TaskAttempt>,
    /// Attempts that count against `max_attempts`.
    #[serde(default)]
    pub failures: u32,
    /// When the next attempt is made at the earliest, while it is waiting; milliseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_unix_ms: Option<u64>,
    /// When it ended, milliseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_unix_ms: Option<u64>,
    /// What is kept of the output of the last attempt that has any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<KeptOutput>,
    /// What came of it; only in the reply about a single task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<TaskResult>,
}

impl Task {
    /// Number of the last attempt; 0 before the first.
    #[must_use]
    pub fn last_attempt(&self) -> u32 {
        self.attempts.last().map_or(0, |attempt| attempt.number)
    }

    /// What is kept of the output of its attempts, with their numbers, oldest first.
    pub fn outputs(&self) -> impl DoubleEndedIterator<Item = (u32, KeptOutput)> {
        self.attempts.iter().filter_map(|attempt| Some((attempt.number, attempt.end.as_ref()?.output?)))
    }

    /// Bytes that are kept of the output of its attempts.
    #[must_use]
    pub fn kept_bytes(&self) -> u64 {
        self.outputs().fold(0, |sum, (_, kept)| sum.saturating_add(kept.bytes()))
    }
}

/// Reply of `GET /v1/tasks`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TaskList {
    /// Tasks, oldest first.
    pub tasks: Vec<Task>,
    /// Send it as `cursor` for the next page; absent on the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

/// Which output stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OutputStream {
    /// Standard output.
    #[default]
    Stdout,
    /// Standard error.
    Stderr,
}

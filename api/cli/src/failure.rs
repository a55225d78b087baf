//! Everything that makes `ark` fail, its exit code, and its form as a problem.

use std::io;

use ark_types::plain::plain;
use ark_types::problem::{Problem, ProblemKind};

use crate::commands::cp::CopyError;
use crate::daemon::DaemonError;
use crate::machine::MachineError;
use crate::output::{Ui, print_error};
use crate::probe::ProbeError;

/// Exit code when ark itself failed.
pub(crate) const ARK_FAILED: u8 = 125;
/// Exit code when the program exists but cannot be run.
const CANNOT_RUN: u8 = 126;
/// Exit code when there is no such program.
const NOT_FOUND: u8 = 127;
/// Exit code when `--timeout` passed.
pub(crate) const TIMED_OUT: u8 = 124;
/// Exit code of a program that wrote to a closed pipe: 128 + SIGPIPE.
pub(crate) const BROKEN_PIPE: u8 = 141;

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// `arkd`, the way to it, or the guest.
    #[error(transparent)]
    Api(#[from] ark_client::Error),
    /// The same, with what the user can do about it.
    #[error("{error}; {hint}")]
    Hinted {
        /// What failed.
        error: ark_client::Error,
        /// What to do.
        hint: String,
    },
    /// Code ran longer than its `--timeout`.
    #[error(transparent)]
    Expired(ark_client::Error),
    /// The host probe could not be run.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// `arkd` could not be started.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// The emulated host could not be started or stopped.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A copy failed on this machine's side.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// Options that do not go together, or with this terminal.
    #[error("{0}")]
    Usage(String),
    /// Standard output does not take what is written to it.
    #[error("cannot write to standard output: {}", plain(.0))]
    Output(#[source] io::Error),
    /// The program's deadline passed and the guest did not say that it ended.
    #[error("the program did not end within --timeout, and its agent does not answer")]
    Timeout,
    /// Some of several things failed, each already reported.
    #[error("{0}")]
    Partly(String),
    /// This process lacks something basic.
    #[error("{what}: {}", plain(source))]
    System {
        /// What could not be done.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// What becomes of failures of several things of which each was tried: none is fine, one speaks for itself, and more are
/// reported here and counted. `what` says what `total` things had to do: `agents were not removed`.
pub(crate) fn summed_up(ui: Ui, mut failures: Vec<Failure>, total: usize, what: &str) -> Result<(), Failure> {
    if failures.len() < 2 {
        return failures.pop().map_or(Ok(()), Err);
    }
    let all: Vec<String> = failures.iter().map(ToString::to_string).collect();
    if !ui.json {
        all.iter().for_each(|message| print_error(message));
    }
    let details = if ui.json { format!(": {}", all.join("; ")) } else { String::new() };
    Err(Failure::Partly(format!("{} of {total} {what}{details}", all.len())))
}

impl Failure {
    /// Exit code of `ark`.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Output(e) if e.kind() == io::ErrorKind::BrokenPipe => BROKEN_PIPE,
            Self::Timeout | Self::Expired(_) => TIMED_OUT,
            Self::Api(error) | Self::Hinted { error, .. } => api_code(error),
            _ => ARK_FAILED,
        }
    }

    /// Whether there is nothing worth saying: the reader of our output went away.
    pub(crate) fn is_silent(&self) -> bool {
        matches!(self, Self::Output(e) if e.kind() == io::ErrorKind::BrokenPipe)
    }

    /// The problem that `--json` writes to standard error: `arkd`'s own, or one of the same form.
    pub(crate) fn problem(&self) -> Problem {
        let kind = match self {
            Self::Api(error) | Self::Hinted { error, .. } | Self::Expired(error) => match error {
                ark_client::Error::Problem(problem) => problem.kind,
                ark_client::Error::Guest(e) => ProblemKind::from(e.code),
                ark_client::Error::Connect { .. } => ProblemKind::HostUnable,
                ark_client::Error::Broken { .. }
                | ark_client::Error::Ended(_)
                | ark_client::Error::Model(_) => ProblemKind::AgentGone,
                ark_client::Error::TakenUp => ProblemKind::InUse,
                ark_client::Error::Frame(_) => ProblemKind::GuestMisbehaved,
                ark_client::Error::Answer { .. } => ProblemKind::Internal,
                ark_client::Error::Request(_) | ark_client::Error::Source(_) => ProblemKind::BadRequest,
            },
            Self::Probe(_) | Self::Daemon(_) | Self::Machine(_) => ProblemKind::HostUnable,
            Self::Copy(_) | Self::Usage(_) => ProblemKind::BadRequest,
            Self::Timeout => ProblemKind::DeadlinePassed,
            Self::Output(_) | Self::Partly(_) | Self::System { .. } => ProblemKind::Internal,
        };
        Problem::new(kind, self.to_string())
    }
}

fn api_code(error: &ark_client::Error) -> u8 {
    let kind = match error {
        ark_client::Error::Problem(problem) => problem.kind,
        ark_client::Error::Guest(error) => ProblemKind::from(error.code),
        _ => return ARK_FAILED,
    };
    match kind {
        ProblemKind::ProgramNotFound => NOT_FOUND,
        ProblemKind::ProgramNotExecutable | ProblemKind::BadWorkingDirectory => CANNOT_RUN,
        _ => ARK_FAILED,
    }
}

#[cfg(test)]
mod tests {
    use ark_types::guest::{ErrorCode, GuestError};

    use super::*;

    #[test]
    fn exit_codes_follow_dockers_habit_whichever_way_the_error_came() {
        let guest = |code| Failure::Api(GuestError { code, message: String::new() }.into());
        let problem = |kind| Failure::Api(Problem::new(kind, "").into());
        for (failure, code) in [
            (guest(ErrorCode::ProgramNotFound), 127),
            (guest(ErrorCode::ProgramNotExecutable), 126),
            (guest(ErrorCode::BadWorkingDirectory), 126),
            (guest(ErrorCode::UnknownUser), 125),
            (problem(ProblemKind::ProgramNotFound), 127),
            (problem(ProblemKind::BadWorkingDirectory), 126),
            (problem(ProblemKind::NameTaken), 125),
            (Failure::Timeout, 124),
            (Failure::Expired(Problem::new(ProblemKind::DeadlinePassed, "").into()), 124),
            (Failure::Output(io::ErrorKind::BrokenPipe.into()), 141),
            (Failure::Output(io::ErrorKind::StorageFull.into()), 125),
            (Failure::Usage(String::new()), 125),
        ] {
            assert_eq!(failure.exit_code(), code, "{failure:?}");
        }
    }

    #[test]
    fn a_problem_keeps_its_kind_and_gains_the_hint() {
        let error = Problem::new(ProblemKind::ImageNotFound, "no image x").into();
        let failure = Failure::Hinted { error, hint: "there are: base".to_owned() };
        let problem = failure.problem();
        assert_eq!((problem.kind, problem.status), (ProblemKind::ImageNotFound, 404));
        assert_eq!(problem.detail, "no image x; there are: base");
    }
}

//! `arkd` on this machine: found on its Unix socket, or started.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use ark_client::{Client, Endpoint};
use ark_types::health::Health;
use ark_types::plain::plain;
use ark_types::shutdown::AgentsFate;
use nix::sys::signal::Signal;

use crate::dirs::{Dirs, make_private_dir, open_log};
use crate::identity::Identity;
use crate::output::tail;

/// Longest wait for a started `arkd`; it cleans up after an earlier one first.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// Longest wait for one answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);
/// Longest wait for `arkd` to end its agents and itself.
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// Pause between two questions.
const POLL: Duration = Duration::from_millis(10);
/// Lines of the log an error quotes.
const LOG_LINES: usize = 8;

/// `arkd` cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonError {
    /// The program is missing.
    #[error("{} is missing: say `make` in the project's directory, or set ARK_ASSETS to where it was built", .0.display())]
    Missing(PathBuf),
    /// Directories or the process could not be made.
    #[error("arkd cannot be started: {what}: {}", plain(source))]
    Start {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// It ended before it answered.
    #[error("arkd ended at once ({status}); the end of {}:{quote}", .log.display())]
    Died {
        /// How it ended.
        status: ExitStatus,
        /// Its log.
        log: PathBuf,
        /// The log's last lines.
        quote: String,
    },
    /// It runs but does not answer.
    #[error(
        "arkd does not answer on {} within {} s; see {}", .socket.display(), START_DEADLINE.as_secs(), .log.display()
    )]
    Silent {
        /// Its socket.
        socket: PathBuf,
        /// Its log.
        log: PathBuf,
    },
    /// It does not end.
    #[error("arkd (pid {0}) cannot be ended, not even by SIGKILL")]
    Unkillable(u32),
    /// Something answers, but not with health.
    #[error("arkd on {} is not well: {source}", .socket.display())]
    Unwell {
        /// Its socket.
        socket: PathBuf,
        /// What it answered.
        source: ark_client::Error,
    },
}

/// The client of this machine's `arkd`, and its health if it answers now.
pub(crate) async fn look(dirs: &Dirs) -> (Client, Option<Health>) {
    let client = Client::new(Endpoint::Unix(dirs.run.api_socket()));
    let health = tokio::time::timeout(ANSWER_DEADLINE, client.health()).await;
    (client, health.ok().and_then(Result::ok))
}

/// A client of this machine's `arkd`, which is started when none answers.
pub(crate) async fn ensure(dirs: &Dirs) -> Result<Client, DaemonError> {
    let socket = dirs.run.api_socket();
    let client = Client::new(Endpoint::Unix(socket.clone()));
    match tokio::time::timeout(ANSWER_DEADLINE, client.health()).await {
        Ok(Ok(_)) => return Ok(client),
        Ok(Err(ark_client::Error::Connect { source, .. })) if nobody_listens(&source) => {}
        Ok(Err(source)) => return Err(DaemonError::Unwell { socket, source }),
        Err(_) => return Err(DaemonError::Silent { socket, log: dirs.state.daemon_log() }),
    }
    let log = dirs.state.daemon_log();
    let log_start = fs::metadata(&log).map_or(0, |m| m.len());
    let mut child = spawn(dirs, &log)?;
    let deadline = Instant::now() + START_DEADLINE;
    let mut died = None;
    while Instant::now() < deadline {
        if let Ok(Ok(_)) = tokio::time::timeout(ANSWER_DEADLINE, client.health()).await {
            return Ok(client);
        }
        // When another command starts one at the same moment, ours ends and the other's answers soon: look once more.
        if let Some((status, since)) = died {
            if Instant::now().duration_since(since) > Duration::from_secs(2) {
                let quote = tail(&read_from(&log, log_start), LOG_LINES);
                return Err(DaemonError::Died { status, log, quote });
            }
        } else if let Ok(Some(status)) = child.try_wait() {
            died = Some((status, Instant::now()));
        }
        tokio::time::sleep(POLL).await;
    }
    Err(DaemonError::Silent { socket, log })
}

/// Stops this machine's `arkd` and every agent; says whether anything ran. An `arkd` that does not follow is killed. Agents whose
/// `arkd` was killed or ended without them are ended by one that is started for it.
pub(crate) async fn stop(dirs: &Dirs) -> Result<bool, DaemonError> {
    let did_run = match running(dirs).await {
        Some(identity) => {
            end(dirs, &identity).await?;
            true
        }
        None => false,
    };
    if !agents_are_left(dirs) {
        return Ok(did_run);
    }
    ensure(dirs).await?;
    if let Some(identity) = running(dirs).await {
        end(dirs, &identity).await?;
    }
    Ok(true)
}

/// Has the `arkd` with this identity end its agents and itself; after a deadline it is killed.
async fn end(dirs: &Dirs, identity: &Identity) -> Result<(), DaemonError> {
    let client = Client::new(Endpoint::Unix(dirs.run.api_socket()));
    let asked = tokio::time::timeout(ANSWER_DEADLINE, client.shut_down(AgentsFate::End)).await;
    if matches!(asked, Ok(Ok(()))) && identity.gone_within(STOP_DEADLINE).await {
        return Ok(());
    }
    identity.signal(Signal::SIGKILL).map_err(|_| DaemonError::Unkillable(identity.pid))?;
    if identity.gone_within(ANSWER_DEADLINE).await {
        Ok(())
    } else {
        Err(DaemonError::Unkillable(identity.pid))
    }
}

/// Whether an `arkd` that is no more left agents.
fn agents_are_left(dirs: &Dirs) -> bool {
    fs::read_dir(dirs.run.agents()).is_ok_and(|mut agents| agents.next().is_some())
}

/// The process of this machine's `arkd`: as it says, or, when it is silent, as its lock file says.
async fn running(dirs: &Dirs) -> Option<Identity> {
    if let (_, Some(health)) = look(dirs).await {
        return Identity::of(health.pid).ok();
    }
    let pid = fs::read_to_string(dirs.run.lock()).ok()?.trim().parse().ok()?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    // The file outlives a killed arkd, and its pid may be another program's by now.
    (name.trim() == "arkd").then(|| Identity::of(pid).ok()).flatten()
}

fn nobody_listens(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

fn spawn(dirs: &Dirs, log: &Path) -> Result<Child, DaemonError> {
    let failed = |what: String| move |source| DaemonError::Start { what, source };
    let program = dirs.assets.program("arkd");
    for dir in [&dirs.run.0, &dirs.state.0] {
        make_private_dir(dir).map_err(failed(format!("making {}", dir.display())))?;
    }
    let output = open_log(log).map_err(failed(format!("opening {}", log.display())))?;
    let errors = output.try_clone().map_err(failed("duplicating the log".to_owned()))?;
    let mut command = Command::new(&program);
    // Where the operator chose no file, this one is rotated by arkd, which has standard error follow it.
    command.arg("--fallback-log-file").arg(log);
    command.envs(dirs.environment()).current_dir("/").stdin(Stdio::null()).stdout(output).stderr(errors);
    detach(&mut command);
    command.spawn().map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => DaemonError::Missing(program.clone()),
        _ => DaemonError::Start { what: format!("running {}", program.display()), source },
    })
}

/// Makes the command's process the leader of its own session: no terminal's Ctrl-C or hang-up reaches it.
pub(crate) fn detach(command: &mut Command) {
    // SAFETY: between fork and exec only setsid(2) runs, which is async-signal-safe and allocates nothing.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(io::Error::from));
    }
}

/// What a log has gained since it was `start` bytes long; one that was rotated meanwhile is all new.
fn read_from(log: &Path, start: u64) -> String {
    let all = fs::read(log).unwrap_or_default();
    let start = usize::try_from(start).unwrap_or(usize::MAX);
    String::from_utf8_lossy(all.get(start..).unwrap_or(&all)).into_owned()
}

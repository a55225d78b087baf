//! What makes one replica ready: its command runs, and its health check has passed.
//!
//! ```text
//!  replica runs ─► Keep: started unless it runs ─► checked until that passes ─► serves ─► the command ends: the replica has failed
//!       ▲                                                     │ the connection breaks
//!       └─────────────────────────────────────────────────────┘
//! ```
//!
//! The guest knows whether it started the command, and how that ended; nothing of it is remembered here. So whoever is told of a
//! replica, a later `arkd` too, asks the same question. Of a generation before the last one a later `arkd` does not know the
//! command: it only asks for it then.

use std::sync::{Arc, Weak};
use std::time::Duration;

use ark_types::agent::AgentState;
use ark_types::exec::{ExecRequest, ExitStatus};
use ark_types::guest::ErrorCode;
use ark_types::health_check::{DEFAULT_CHECK_TIMEOUT_S, HealthCheck, Probe};
use ark_types::service::COMMAND_LABEL;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::entry::Wanted;
use crate::agent::{Handle, check};
use crate::core::Core;
use crate::guest::{Address, GuestFailure, Idle, Keeping, KeptEnd, keep};

/// Between two checks of a replica that is not ready yet, and before a guest that could not be asked is asked again.
const PAUSE: Duration = Duration::from_millis(300);
/// Most characters of what a command wrote last that its end is told with.
const MAX_WORDS: usize = 300;

/// Where a replica stands.
#[derive(Clone, Debug)]
pub(super) enum Standing {
    /// It was not asked yet, or did not answer yet.
    Unknown,
    /// It is not ready, for this reason.
    Awaited(String),
    /// It serves.
    Serves,
    /// Its command ended.
    Ended(Arc<Ended>),
}

/// The end of a command.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ended {
    /// How, as a sentence.
    pub(super) reason: String,
    /// What it wrote last.
    pub(super) output: Vec<u8>,
}

/// Sees to the command of one replica, while this lives.
#[derive(Debug)]
pub(super) struct Keeper {
    standing: watch::Receiver<Standing>,
    task: JoinHandle<()>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What is to be kept, of whom, and who is told.
struct Task {
    core: Weak<Core>,
    replica: Handle,
    has_command: bool,
    /// What is to be started; none where that is not known any more.
    program: Option<ExecRequest>,
    check: Option<HealthCheck>,
    told: watch::Sender<Standing>,
    wake: Arc<Notify>,
}

impl Keeper {
    /// Sees to `replica`, which is made as `wanted` says where that is of its `generation`; none where it is ready as it is.
    pub(super) fn of(core: &Arc<Core>, replica: &Handle, wanted: Option<&Wanted>) -> Option<Self> {
        let look = |agent: &ark_types::agent::Agent| {
            (agent.labels.get(COMMAND_LABEL).is_some(), agent.health_check.clone())
        };
        let (has_command, check) = replica.look(look);
        if !has_command && check.is_none() {
            return None;
        }
        let spec = wanted.map(|wanted| &wanted.service.spec);
        let command = spec.and_then(|spec| spec.command.as_ref()).filter(|_| has_command);
        let program = command.map(|command| ExecRequest { env: replica.env().clone(), ..command.exec() });
        let port = spec.and_then(|spec| spec.port).filter(|_| has_command);
        let (told, standing) = watch::channel(Standing::Unknown);
        let task = Task {
            core: Arc::downgrade(core),
            replica: replica.clone(),
            has_command,
            program,
            check: check.or_else(|| port.map(listens)),
            told,
            wake: Arc::clone(&core.services.wake),
        };
        Some(Self { standing, task: tokio::spawn(task.run()) })
    }

    /// Where it stands.
    pub(super) fn standing(&self) -> Standing {
        self.standing.borrow().clone()
    }
}

/// The check of a command that is to listen at `port`.
const fn listens(port: u16) -> HealthCheck {
    HealthCheck {
        probe: Probe::Tcp { port },
        interval_s: 1,
        timeout_s: DEFAULT_CHECK_TIMEOUT_S,
        failures: 1,
        start_period_s: 0,
    }
}

impl Task {
    fn tell(&self, standing: Standing) {
        self.told.send_replace(standing);
        self.wake.notify_one();
    }

    /// Runs until the command has ended, or the replica is gone.
    async fn run(self) {
        while self.replica.until(|agent| agent.state == AgentState::Running).await {
            match self.one_life().await {
                Ok(ended) => {
                    tracing::warn!(replica = %self.replica.name(), reason = ended.reason, "the command of a replica ended");
                    return self.tell(Standing::Ended(Arc::new(ended)));
                }
                Err(why) => {
                    self.tell(Standing::Awaited(why));
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// From when the replica runs until its command ends; or why that is not known.
    async fn one_life(&self) -> Result<Ended, String> {
        let guest = self.replica.guest().map_err(|why| why.to_string())?;
        // Connections of their own: this is no use of the agent.
        let guest = Address { idle: Idle::default(), ..guest.clone() };
        let keeping = match self.keep(&guest).await? {
            Ok(keeping) => keeping,
            Err(ended) => return Ok(ended),
        };
        let ended = async {
            match keeping {
                Some(keeping) => keeping.ended().await.map(told).map_err(|failure| failure.to_string()),
                None => {
                    self.replica.until(|agent| agent.state != AgentState::Running).await;
                    Err("it does not run".to_owned())
                }
            }
        };
        let mut ended = std::pin::pin!(ended);
        tokio::select! {
            ended = &mut ended => return ended,
            () = self.pass_check(&guest) => {}
        }
        self.tell(Standing::Serves);
        ended.await
    }

    /// Has the guest keep the command: what it cannot start has ended. None where there is no command.
    async fn keep(&self, guest: &Address) -> Result<Result<Option<Keeping>, Ended>, String> {
        if !self.has_command {
            return Ok(Ok(None));
        }
        let never = |why: String| Ok(Err(Ended { reason: why, output: Vec::new() }));
        match keep(guest, self.program.as_ref()).await {
            Ok(keeping) => Ok(Ok(Some(keeping))),
            Err(GuestFailure::Said(error)) => match error.code {
                ErrorCode::NothingKept => {
                    never("its command was not started, and is not known any more".to_owned())
                }
                ErrorCode::Exhausted | ErrorCode::Internal => Err(error.to_string()),
                _ => never(format!("its command cannot be started: {error}")),
            },
            Err(failure) => Err(format!("its command is not known to run: {failure}")),
        }
    }

    /// Checks until that passes.
    async fn pass_check(&self, guest: &Address) {
        let Some(how) = &self.check else { return };
        loop {
            let Some(core) = self.core.upgrade() else { return std::future::pending().await };
            let checked = check(core, guest.clone(), self.replica.env().clone(), how.clone());
            let Err(why) = checked.await else { return };
            self.tell(Standing::Awaited(format!("it is not ready yet: {why}")));
            sleep(PAUSE).await;
        }
    }
}

/// What is told of an end.
fn told(end: KeptEnd) -> Ended {
    let KeptEnd { status, output } = end;
    let how = match status {
        ExitStatus::Exited { code } => format!("its command ended with {code}"),
        ExitStatus::Signaled { signal } => format!("its command was ended by signal {signal}"),
        ExitStatus::TimedOut => "its command took too long".to_owned(),
    };
    let said = String::from_utf8_lossy(&output);
    let said = said.trim();
    let skipped = said.chars().count().saturating_sub(MAX_WORDS);
    let words: String = said.chars().skip(skipped).collect();
    let reason = if words.is_empty() { how } else { format!("{how}; it wrote last: {words}") };
    Ended { reason, output }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_with_the_last_words() {
        let end = |status, output: &str| told(KeptEnd { status, output: output.into() }).reason;
        assert_eq!(end(ExitStatus::Exited { code: 0 }, " \n"), "its command ended with 0");
        let killed = end(ExitStatus::Signaled { signal: 9 }, "a\nb\n");
        assert_eq!(killed, "its command was ended by signal 9; it wrote last: a\nb");
        let long = end(ExitStatus::Exited { code: 1 }, &format!("{}end", "ü".repeat(9000)));
        assert!(long.ends_with("üend") && long.chars().count() < MAX_WORDS + 60, "{long}");
    }
}

//! An agent's own health check: run while it runs, one at a time.
//!
//! ```text
//!  owner: one is due ──► Checking: waits for a place on this host ──► a program, or a connection, in the guest
//!    ▲                                                                    │ passed, failed with a reason, or too late
//!    └── counted; what that means is decided by crate::reconcile ◄────────┘
//! ```
//!
//! It is no use of the agent, so its idle timeout goes on; and one that was under way when the agent stood still says nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ark_types::agent::AgentState;
use ark_types::exec::{ExecRequest, ExitStatus};
use ark_types::health_check::{HealthCheck, Probe};
use tokio::task::JoinHandle;

use super::heal::Healing;
use super::owner::Owner;
use crate::core::Core;
use crate::guest::{Address, Captured, Idle, capture, dial};
use crate::host::millis;
use crate::reconcile::{Checked, Tally};
use crate::validate::prepare_exec;

/// Most characters of what a failed check wrote that are told.
const MAX_WORDS: usize = 200;

/// What came of a check: why it failed.
pub(crate) type Verdict = Result<(), String>;

/// The checks of one agent since it came up.
#[derive(Debug)]
pub(super) struct Checks {
    tally: Tally,
    /// Why the last one failed.
    why: String,
    /// The one that is under way; dropping it gives it up.
    under_way: Option<Checking>,
    /// When the last one ended, or the agent came up or went on.
    ended: Instant,
    /// When the agent came up.
    up: Instant,
}

#[derive(Debug)]
pub(super) struct Checking(JoinHandle<Verdict>);

impl Drop for Checking {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Checks {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self { tally: Tally::default(), why: String::new(), under_way: None, ended: now, up: now }
    }

    /// The agent stands still, or goes on: what is under way says nothing.
    pub(super) fn interrupt(&mut self) {
        (self.under_way, self.ended) = (None, Instant::now());
    }

    /// Why the last one failed.
    pub(super) fn why(&self) -> &str {
        &self.why
    }

    pub(super) fn checked(&self) -> Checked {
        let idle_ms = self.under_way.is_none().then(|| millis(self.ended.elapsed()));
        Checked { tally: self.tally, idle_ms }
    }

    /// What comes of the one under way; waits for ever when there is none. Cancel-safe.
    pub(super) async fn verdict(&mut self) -> Verdict {
        match &mut self.under_way {
            Some(Checking(task)) => task.await.unwrap_or_else(|_| Err("the check broke".to_owned())),
            None => std::future::pending().await,
        }
    }

    fn count(&mut self, verdict: Verdict, start: Duration) {
        match verdict {
            Ok(()) => self.tally.passed(),
            Err(why) => {
                self.tally.failed(self.up.elapsed() < start);
                self.why = why;
            }
        }
    }
}

/// Checks the guest at `guest` once, as soon as there is a place for a check on this host; its programs have `env`.
pub(crate) async fn check(
    core: Arc<Core>,
    guest: Address,
    env: std::collections::BTreeMap<String, String>,
    how: HealthCheck,
) -> Verdict {
    // Closed never: an error cannot be.
    let _place = core.checks.acquire().await;
    let limit = Duration::from_secs(how.timeout_s.into());
    let probed = async {
        match &how.probe {
            Probe::Tcp { port } => dial(&guest, *port).await.map(drop).map_err(|failure| failure.to_string()),
            Probe::Exec { command } => {
                let (argv, timeout_ms) = (command.clone(), Some(millis(limit)));
                let request = ExecRequest { argv, timeout_ms, ..ExecRequest::default() };
                let (frame, _) = prepare_exec(request, &env).map_err(|refusal| refusal.0.detail)?;
                let ran = capture(&guest, &frame, b"").await.map_err(|failure| failure.to_string())?;
                ended_well(&ran)
            }
        }
    };
    // The guest may not keep to it.
    tokio::time::timeout(limit, probed)
        .await
        .unwrap_or_else(|_| Err(format!("it did not end within {} s", limit.as_secs())))
}

fn ended_well(ran: &Captured) -> Verdict {
    let how = match ran.end.status {
        ExitStatus::Exited { code: 0 } => return Ok(()),
        ExitStatus::Exited { code } => format!("its command ended with {code}"),
        ExitStatus::Signaled { signal } => format!("its command was ended by signal {signal}"),
        ExitStatus::TimedOut => "its command took too long".to_owned(),
    };
    let said = if ran.stderr.is_empty() { &ran.stdout } else { &ran.stderr };
    let words: String = String::from_utf8_lossy(said).trim().chars().take(MAX_WORDS).collect();
    Err(if words.is_empty() { how } else { format!("{how}: {words}") })
}

impl Owner {
    /// Begins to check the agent.
    pub(super) fn begin_check(&mut self) {
        let Some(how) = self.state.borrow().health_check.clone() else { return };
        // Connections of their own: a check is no use.
        let guest = Address { idle: Idle::default(), ..self.guest.clone() };
        let checking = check(Arc::clone(&self.core), guest, self.env.clone(), how);
        self.healing.checks.under_way = Some(Checking(tokio::spawn(checking)));
    }

    /// Counts what came of a check.
    pub(super) fn note_check(&mut self, verdict: Verdict) {
        let Healing { checks, .. } = &mut self.healing;
        checks.interrupt();
        let agent = self.state.borrow();
        if agent.state != AgentState::Running {
            return;
        }
        let start = agent.health_check.as_ref().map_or(0, |how| how.start_period_s);
        if let Err(why) = &verdict {
            tracing::debug!(id = agent.id, name = %agent.name, why, "a health check failed");
        }
        checks.count(verdict, Duration::from_secs(start.into()));
        // That is looked at at once.
        self.healing.look_soon();
    }
}

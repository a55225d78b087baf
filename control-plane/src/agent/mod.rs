//! An agent as others see it: a handle to watch it, to ask its owner for something, and to reach its guest.
//!
//! ```text
//!  routes ── Request ──► owner task (alone changes the state, alone holds the VMM)
//!     ▲                      │
//!     └──────── watch ◄──────┘
//! ```

mod boot;
mod owner;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ark_types::agent::{Agent, AgentName, AgentState, CreateAgent};
use ark_types::guest::CONTROL_PORT;
use ark_types::plain::plain;
use ark_types::vmm::ExitRecord;
use tokio::sync::{mpsc, oneshot, watch};

use crate::core::Core;
use crate::guest::{Address, GuestFailure, Idle};
use crate::host::unix_ms;
use crate::images::Image;
use crate::registry::AdmitError;
use crate::supervisor::SpawnError;

use owner::{Owner, Request};

/// How long the reason of a broken connection is waited for: the VMM's end and the guest's sockets' end race.
const REASON_PATIENCE: Duration = Duration::from_secs(1);

/// Why an agent did not come up.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Its directory or sockets cannot be made.
    #[error(
        "the agent's directory {path} cannot be made: {}; free some space there or set ARK_RUN",
        plain(source)
    )]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Its VMM cannot be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// Its VMM ended first.
    #[error("the agent ended before its guest said hello: {}{}", sentence(record), quote(words))]
    Ended {
        /// How it ended.
        record: ExitRecord,
        /// The console's last lines.
        words: String,
    },
    /// Its guest did not say hello in time.
    #[error("the agent's guest did not say hello within {} s{}", limit.as_secs(), quote(words))]
    Deadline {
        /// How long it was waited for.
        limit: Duration,
        /// The console's last lines.
        words: String,
    },
    /// Its guest stopped on the way.
    #[error("the agent's guest has stood still for {} s and not said hello{}", time.as_secs(), quote(words))]
    Standstill {
        /// For how long.
        time: Duration,
        /// The console's last lines.
        words: String,
    },
    /// Its guest said something else.
    #[error("the agent's guest did not say hello as it should: {0}")]
    Hello(#[source] GuestFailure),
    /// It was deleted, or whoever asked for it left.
    #[error("the agent was removed before its guest said hello")]
    Removed,
}

/// The agent cannot be asked for this now.
#[derive(Debug, thiserror::Error)]
#[error("the agent {name} is {state}{}", reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default())]
pub struct NotRunning {
    name: AgentName,
    state: AgentState,
    reason: Option<String>,
}

/// Why an operation in an agent's guest did not work.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The agent ended meanwhile.
    #[error("the agent {name} ended while the request ran: {reason}")]
    Gone {
        /// The agent.
        name: AgentName,
        /// How it ended.
        reason: String,
    },
    /// The guest refused, failed or broke the protocol.
    #[error(transparent)]
    Guest(GuestFailure),
}

/// How a VMM ended, as a sentence without a full stop.
fn sentence(record: &ExitRecord) -> String {
    match &record.detail {
        Some(detail) => format!("{}: {detail}", record.reason),
        None => record.reason.to_string(),
    }
}

fn quote(words: &str) -> String {
    if words.is_empty() { String::new() } else { format!("; the console's last lines:\n{words}") }
}

/// A way to one agent; clones are the same agent.
#[derive(Clone, Debug)]
pub struct Handle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    id: String,
    name: AgentName,
    env: BTreeMap<String, String>,
    guest: Address,
    console: PathBuf,
    state: watch::Receiver<Agent>,
    requests: mpsc::UnboundedSender<Request>,
}

/// Begins an agent and waits until its guest said hello. When the caller stops waiting, the agent is removed.
///
/// # Errors
/// [`AdmitError`], or [`BootError`] within; nothing is left then.
pub async fn create(
    core: &Arc<Core>,
    request: CreateAgent,
    image: Image,
) -> Result<Result<Agent, BootError>, AdmitError> {
    let (up, came_up) = oneshot::channel();
    let (_, owner) = core.registry.admit(request.name.clone(), |id, name| {
        let agent = Agent {
            id,
            name,
            image: request.image.clone(),
            image_digest: image.manifest.digest.clone(),
            vcpus: request.vcpus,
            memory_mib: request.memory_mib,
            state: AgentState::Creating,
            reason: None,
            exit: None,
            vmm_pid: None,
            created_unix_ms: unix_ms(),
            boot_ms: None,
            heartbeat: None,
            auto_remove: request.auto_remove,
        };
        begin(Arc::clone(core), agent, request.env, image)
    })?;
    tokio::spawn(owner.live(up));
    Ok(came_up.await.unwrap_or(Err(BootError::Removed)))
}

fn begin(core: Arc<Core>, agent: Agent, env: BTreeMap<String, String>, image: Image) -> (Handle, Owner) {
    let dir = core.config.run.agent(&agent.id);
    let (requests, inbox) = mpsc::unbounded_channel();
    let (id, name) = (agent.id.clone(), agent.name.clone());
    let (publish, state) = watch::channel(agent);
    let guest = Address { socket: dir.vsock(), port: Some(CONTROL_PORT), idle: Idle::default() };
    let shared = Shared { id, name, env, guest, console: dir.console(), state, requests };
    (Handle(Arc::new(shared)), Owner::new(core, dir, image, publish, inbox))
}

const fn is_ended(state: AgentState) -> bool {
    matches!(state, AgentState::Stopped | AgentState::Failed)
}

impl Handle {
    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &AgentName {
        &self.0.name
    }

    /// Variables its programs start with.
    #[must_use]
    pub fn env(&self) -> &BTreeMap<String, String> {
        &self.0.env
    }

    /// File of its console.
    #[must_use]
    pub fn console(&self) -> &PathBuf {
        &self.0.console
    }

    /// What it is now.
    #[must_use]
    pub fn agent(&self) -> Agent {
        self.0.state.borrow().clone()
    }

    /// Whether its VMM is no more.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        is_ended(self.0.state.borrow().state)
    }

    /// Where its guest takes operations.
    ///
    /// # Errors
    /// [`NotRunning`] unless it is running.
    pub fn guest(&self) -> Result<&Address, NotRunning> {
        let agent = self.0.state.borrow();
        if agent.state == AgentState::Running {
            return Ok(&self.0.guest);
        }
        Err(NotRunning { name: agent.name.clone(), state: agent.state, reason: agent.reason.clone() })
    }

    /// What a failed operation means: when the guest was lost, the reason of its end is awaited for a moment.
    pub async fn explain(&self, failure: GuestFailure) -> CallError {
        if !failure.is_disconnect() {
            return CallError::Guest(failure);
        }
        let mut state = self.0.state.clone();
        // While it is being stopped its end is a matter of time, and the reason is known.
        let ending = |agent: &Agent| is_ended(agent.state) || agent.state == AgentState::Stopping;
        match tokio::time::timeout(REASON_PATIENCE, state.wait_for(ending)).await {
            Ok(Ok(agent)) => {
                let reason = agent.reason.clone().unwrap_or_else(|| "it was stopped on request".to_owned());
                CallError::Gone { name: self.0.name.clone(), reason }
            }
            Ok(Err(_)) | Err(_) => CallError::Guest(failure),
        }
    }

    /// Waits until its VMM is no more.
    pub async fn ended(&self) {
        // An error means that the owner is gone, and the VMM with it.
        let _ = self.0.state.clone().wait_for(|agent| is_ended(agent.state)).await;
    }

    /// Asks its owner to remove it, given `grace` to end in order, and does not wait.
    pub fn ask_removal(&self, grace: Duration) {
        // Without an owner it is removed already.
        let _ = self.0.requests.send(Request::Remove { grace });
    }

    /// Removes it: process, directory, sockets, name.
    pub async fn remove(&self, grace: Duration) {
        self.ask_removal(grace);
        let mut state = self.0.state.clone();
        while state.changed().await.is_ok() {}
    }

    /// Tells its owner that a streamed exec begins, and by the guard's end that it ended.
    #[must_use]
    pub fn streaming(&self) -> Streaming {
        let _ = self.0.requests.send(Request::StreamBegan);
        Streaming(self.clone())
    }
}

/// A streamed exec, while this lives.
#[derive(Debug)]
pub struct Streaming(Handle);

impl Drop for Streaming {
    fn drop(&mut self) {
        let _ = self.0.0.requests.send(Request::StreamEnded);
    }
}

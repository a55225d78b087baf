//! An agent as others see it: a handle to watch it, to ask its owner for something, and to reach its guest.
//!
//! ```text
//!  routes ── Request ──► owner task (alone changes the state, alone holds the VMM)
//!     ▲                      │
//!     └──────── watch ◄──────┘
//! ```
//!
//! | file | what happens there |
//! |---|---|
//! | [`birth`] | an agent begins: booted, restored, claimed from the pool, or taken over from an earlier `arkd` |
//! | [`owner`], [`request`], [`start`], [`boot`] | its life, and what may be asked of it; how its VMM and guest come up |
//! | [`renewal`] | what a restored guest has to prove, and the receipt |
//! | [`heal`], [`anew`], [`ready`] | it begins anew, is ended or removed, as its policy says |
//! | [`check`] | its own health checks |
//! | [`checkpoint`] | snapshots of it that it begins anew from |
//! | [`pause`] | snapshots of it, pausing it |
//! | [`freeze`] | it stands still while a model thinks for it |
//! | [`steps`] | its guest follows the host's clock |
//! | [`record`] | what of it is on disk, for a later `arkd` |
//! | [`fork`] | many from one |
//! | [`history`] | what is recorded of all that |

mod anew;
mod birth;
mod body;
mod boot;
mod check;
mod checkpoint;
mod error;
mod fork;
mod freeze;
mod heal;
mod history;
mod identity;
mod label;
mod owner;
mod pause;
mod ready;
mod record;
mod renewal;
mod request;
mod start;
mod steps;
mod stop;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ark_types::agent::{Agent, AgentName, AgentState};
use ark_types::eval::{EvalReply, EvalRequest};
use ark_types::healing::AgentHealth;
use ark_types::layout::AgentDir;
use ark_types::receipt::Receipt;
use tokio::sync::{mpsc, oneshot, watch};

use crate::guest::{Address, GuestFailure, evaluate};
use crate::snapshots::Hold;

pub use birth::{Birth, HiddenSpec, Upkeep, Wishes, boot_hidden, create, from_template, restore};
pub(crate) use birth::{Standby, stand_by, take_in, wake_paused};
pub(crate) use check::check;
pub(crate) use checkpoint::sweep_checkpoints;
pub(crate) use error::sentence;
pub use error::{BootError, CallError, NotRunning, PauseError, SnapshotFailure};
pub use fork::fork;
pub(crate) use history::settle;
pub use label::LabelError;
pub use pause::{Taken, pause, resume};
pub(crate) use record::{Known, is_paused, load as load_paused};
pub use renewal::{FailedCheck, RENEWALS_FILE, Seen};
pub(crate) use steps::follow_steps;

use body::{Base, Body};
use request::Request;

/// How long the reason of a broken connection is waited for: the VMM's end and the guest's sockets' end race.
const REASON_PATIENCE: Duration = Duration::from_secs(1);
/// How long the end of `arkd` waits for an agent that is just being paused or rewound: 512 MiB at 64 MiB/s, and a moment.
const PAUSE_PATIENCE: Duration = Duration::from_secs(10);

/// A way to one agent; clones are the same agent.
#[derive(Clone, Debug)]
pub struct Handle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    id: String,
    name: AgentName,
    env: BTreeMap<String, String>,
    guest: Address,
    dir: AgentDir,
    console: PathBuf,
    state: watch::Receiver<Agent>,
    requests: mpsc::UnboundedSender<Request>,
    body: Arc<Body>,
    /// Whether a streamed exec began in it.
    streamed: AtomicBool,
}

const fn is_ended(state: AgentState) -> bool {
    matches!(state, AgentState::Stopped | AgentState::Failed)
}

/// Whether an agent has ended and does not begin anew.
const fn is_over(agent: &Agent) -> bool {
    is_ended(agent.state) && agent.backoff_until_unix_ms.is_none()
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

    /// Its VMM's control socket.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.0.dir.control_socket()
    }

    /// What it is now.
    #[must_use]
    pub fn agent(&self) -> Agent {
        // A standby that is just being claimed is published under its old name a moment longer.
        let agent = Agent { name: self.0.name.clone(), ..self.0.state.borrow().clone() };
        match self.0.body.labels() {
            Some(labels) => Agent { labels, ..agent },
            None => agent,
        }
    }

    /// What `see` makes of what it is now, without a copy of that.
    pub(crate) fn look<T>(&self, see: impl FnOnce(&Agent) -> T) -> T {
        see(&self.0.state.borrow())
    }

    /// What it had to prove when it was restored; none when it was booted.
    #[must_use]
    pub fn receipt(&self) -> Option<Receipt> {
        self.0.body.receipt()
    }

    /// Its machine-id.
    #[must_use]
    pub fn machine_id(&self) -> String {
        self.0.body.machine_id()
    }

    /// The snapshot that its memory is read from; none when it was booted.
    #[must_use]
    pub fn base(&self) -> Option<Hold> {
        self.0.body.base().hold()
    }

    /// Whether it has ended, and not to begin anew.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        is_over(&self.0.state.borrow())
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
        drop(agent);
        Err(self.not_running())
    }

    /// Says that it is to run something; whether that is the first time, under this `arkd`.
    #[must_use]
    pub(crate) fn use_it(&self) -> bool {
        self.0.body.use_it()
    }

    fn not_running(&self) -> NotRunning {
        let agent = self.agent();
        NotRunning { name: agent.name, state: agent.state, reason: agent.reason }
    }

    /// Has its evaluator run the code of `request`.
    ///
    /// # Errors
    /// [`CallError`]; an exception of the code is none.
    pub async fn eval(&self, request: &EvalRequest) -> Result<EvalReply, CallError> {
        let evaluated = match evaluate(self.guest()?, request).await {
            Ok(evaluated) => evaluated,
            Err(failure) => return Err(self.explain(failure).await),
        };
        Ok(EvalReply {
            stdout: String::from_utf8_lossy(&evaluated.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&evaluated.stderr).into_owned(),
            value: evaluated.end.value,
            exception: evaluated.end.exception,
            truncated: evaluated.truncated,
            duration_us: evaluated.end.duration_us,
        })
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

    /// Waits until `holds` of it; false when it is gone before.
    pub(crate) async fn until(&self, holds: impl FnMut(&Agent) -> bool) -> bool {
        self.0.state.clone().wait_for(holds).await.is_ok()
    }

    /// Waits until it has ended, and not to begin anew.
    pub async fn ended(&self) {
        // An error means that the owner is gone, and the VMM with it.
        let _ = self.0.state.clone().wait_for(is_over).await;
    }

    /// Waits until its guest hangs: it counts as unresponsive for all of `patience`. Never of one that ends.
    pub(crate) async fn hangs(&self, patience: Duration) {
        let is_silent = |agent: &Agent| matches!(agent.health, AgentHealth::Unresponsive { .. });
        let mut state = self.0.state.clone();
        while state.wait_for(is_silent).await.is_ok() {
            match tokio::time::timeout(patience, state.wait_for(|agent| !is_silent(agent))).await {
                Ok(Ok(_)) => {}
                // Its owner is gone, and it with that.
                Ok(Err(_)) => break,
                Err(_) => return,
            }
        }
        std::future::pending::<()>().await;
    }

    /// Asks its owner to remove it, given `grace` to end in order, and does not wait.
    pub fn ask_removal(&self, grace: Duration) {
        // Without an owner it is removed already.
        let _ = self.0.requests.send(Request::Remove { grace, for_good: true });
    }

    /// Removes it: process, directory, sockets, name, and what a paused one has on disk.
    pub async fn remove(&self, grace: Duration) {
        self.ask_removal(grace);
        self.gone().await;
    }

    /// Removes it as [`Self::remove`] does, but leaves a paused one on disk for the next `arkd`.
    pub async fn shut_down(&self, grace: Duration) {
        if self.0.state.borrow().state == AgentState::Paused && !self.0.body.is_recorded() {
            // Ended before its memory is on disk it would be lost; what takes longer is.
            let _ = tokio::time::timeout(PAUSE_PATIENCE, self.0.body.turn.lock()).await;
        }
        let _ = self.0.requests.send(Request::Remove { grace, for_good: false });
        self.gone().await;
    }

    async fn gone(&self) {
        let mut state = self.0.state.clone();
        while state.changed().await.is_ok() {}
    }

    /// Leaves it running for the next `arkd` once what is under way with it is done, or ends it where nobody could go on with
    /// it. Whether it runs on.
    pub async fn leave(&self) -> bool {
        // A pause or a rewind; what takes longer is undone, or told as failed, by the next arkd.
        let quiet = async {
            drop(self.0.body.turn.lock().await);
            // The calls that it stands still for end with this arkd.
            self.0.guest.idle.freezer.wake().await;
        };
        let _ = tokio::time::timeout(PAUSE_PATIENCE, quiet).await;
        let _ = self.0.requests.send(Request::Leave);
        self.gone().await;
        self.0.state.borrow().vmm_pid.is_some() && !self.has_ended()
    }

    /// Has its owner let go of the old base and note the new one, on disk, too.
    async fn move_to(&self, base: Base) {
        let (done, is_done) = oneshot::channel();
        let _ = self.0.requests.send(Request::Move { base, done });
        // An owner that is gone has no base any more.
        let _ = is_done.await;
    }

    /// Asks the owner to publish `state`; whether it did.
    async fn enter(&self, state: AgentState) -> bool {
        let (done, is_done) = oneshot::channel();
        let _ = self.0.requests.send(Request::Enter { state, done });
        is_done.await.is_ok()
    }

    /// Notes that a streamed exec begins, and by the guard's end that it ended. Its owner is told of the first one only: an agent
    /// that goes with its client goes with the stream that it was made for. None begins unless it is running.
    #[must_use]
    pub fn streaming(&self) -> Option<Streaming> {
        self.guest().ok()?;
        let is_first = !self.0.streamed.swap(true, Ordering::AcqRel);
        if is_first {
            let _ = self.0.requests.send(Request::StreamBegan);
        }
        Some(Streaming(is_first.then(|| self.clone())))
    }
}

/// A streamed exec, while this lives; of the first one its agent.
#[derive(Debug)]
pub struct Streaming(Option<Handle>);

impl Drop for Streaming {
    fn drop(&mut self) {
        if let Some(agent) = &self.0 {
            let _ = agent.0.requests.send(Request::StreamEnded);
        }
    }
}

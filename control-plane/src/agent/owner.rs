//! The one task that owns an agent: it alone holds the VMM and changes the state.
//!
//! ```text
//!                    hello, or every check                     Remove, or the first stream ended (auto_remove)
//!  live: come_up() ────────────────────────► serve() ──────────────────────────────────────► stop() ──► gone
//!     │                                        │  ▲ heartbeats, pause, resume, rewind          ▲
//!     │ neither (1)                            └──┘ VMM ended: Stopped or Failed, or paused ───┘
//!     ▼                                         ▲                still known until removed
//!   gone (directory, sockets, process           │
//!   and registry entry go with the              ├── claimed ◄── stand_by: a fork that waits in the pool
//!   guards of `Life`)                           └────────────── sleep: paused by an earlier `arkd`
//! ```
//!
//! (1) On an emulated processor a guest that it spoiled is booted again first: see [`super::boot`].

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ark_types::agent::{Agent, AgentHeartbeat, AgentName, AgentState, Origin};
use ark_types::exec::ExecRequest;
use ark_types::guest::{Frame, Heartbeat, Kind};
use ark_types::layout::AgentDir;
use ark_types::vmm::{ControlReply, ControlRequest, ExitReason, ExitRecord};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, sleep_until};

use super::birth::Begun;
use super::body::{Base, Body};
use super::error::sentence;
use super::start::{Life, Seat, ended};
use super::{BootError, identity, record};
use crate::core::Core;
use crate::guest::{Address, Event, capture};
use crate::host::{millis, unix_ms};
use crate::images::Image;
use crate::scheduler::Grant;
use crate::snapshots::Hold;
use crate::supervisor::{self, Vmm};

/// Time a VMM has beyond the guest's grace to end itself before it is killed.
const STOP_SLACK: Duration = Duration::from_secs(1);
/// Time a standby's first program has.
const WARM_UP: Duration = Duration::from_secs(10);

/// Who waits for an agent; who no longer does has given it up.
pub(super) type Up = oneshot::Sender<Result<Agent, BootError>>;

/// What others may ask of an agent's owner.
#[derive(Debug)]
pub(super) enum Request {
    /// End it and leave nothing.
    Remove {
        /// Time the guest has to end in order.
        grace: Duration,
        /// Whether what a paused agent has on disk goes too.
        for_good: bool,
    },
    /// A streamed exec began.
    StreamBegan,
    /// A streamed exec ended.
    StreamEnded,
    /// Publish a state that the VMM is in by now: running or paused.
    Enter {
        /// The state.
        state: AgentState,
        /// Told when it is; dropped when it cannot be.
        done: oneshot::Sender<()>,
    },
    /// Go on from a snapshot, with a new VMM.
    Restart {
        /// The snapshot.
        hold: Hold,
        /// Its image.
        image: Image,
        /// What is told of the agent from then on; unchanged when absent.
        origin: Option<Origin>,
        /// Told when it runs, or why it does not.
        up: Up,
    },
    /// Be somebody: only of a standby.
    Claim {
        /// Name.
        name: AgentName,
        /// Where it comes from.
        origin: Origin,
        /// Whether it goes away with its first streamed exec.
        auto_remove: bool,
        /// Who it belongs to.
        owner: Option<AgentName>,
        /// The snapshot, lived in.
        base: Base,
        /// What is reserved for it.
        grant: Grant,
        /// Told when it runs, or why it does not.
        up: Up,
    },
}

/// How an agent is to end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Removal {
    grace: Duration,
    for_good: bool,
}

impl Removal {
    /// At once.
    pub(super) const NOW: Self = Self { grace: Duration::ZERO, for_good: true };
}

/// The owner, before and while its agent lives.
pub(super) struct Owner {
    pub(super) core: Arc<Core>,
    pub(super) dir: AgentDir,
    /// Its image's file; none while it waits on disk.
    pub(super) disk: Option<PathBuf>,
    pub(super) guest: Address,
    pub(super) body: Arc<Body>,
    /// How it begins; none once it has begun.
    pub(super) begun: Option<Begun>,
    /// When it was asked for.
    pub(super) since: Instant,
    pub(super) state: watch::Sender<Agent>,
    pub(super) requests: mpsc::UnboundedReceiver<Request>,
    /// A removal that was asked for while something else was waited for.
    pub(super) removal: Option<Removal>,
}

impl Owner {
    /// The agent's whole life. The first word on it goes to `up`.
    pub(super) async fn live(mut self, mut up: Up) {
        match self.come_up(&mut up).await {
            Ok(life) => self.go_on(life, up).await,
            Err(error) => self.give_up(error, up),
        }
    }

    /// A standby's life: it comes up, runs one program, and waits to be claimed.
    pub(super) async fn stand_by(mut self, mut ready: oneshot::Sender<Result<(), BootError>>) {
        let mut life = match self.come_up(&mut ready).await {
            Ok(life) => life,
            Err(error) => {
                let _ = ready.send(Err(error));
                return;
            }
        };
        tokio::select! {
            () = self.warm_up() => {}
            () = ready.closed() => {}
            _ = ended(&mut life.vmm) => return,
        }
        if ready.send(Ok(())).is_err() {
            return;
        }
        loop {
            tokio::select! {
                biased;
                _ = ended(&mut life.vmm) => return,
                request = self.requests.recv() => match request {
                    Some(Request::Claim { name, origin, auto_remove, owner, base, grant, up }) => {
                        self.state.send_modify(|agent| {
                            (agent.name, agent.origin, agent.auto_remove) = (name, origin, auto_remove);
                            (agent.owner, agent.created_unix_ms) = (owner, unix_ms());
                        });
                        self.body.set_base(base);
                        self.body.set_grant(Some(grant));
                        return self.be_claimed(life, up).await;
                    }
                    Some(Request::Remove { .. }) | None => return,
                    // Nobody has a handle to ask for more.
                    Some(_) => {}
                },
                event = life.greeter.next() => {
                    life.note(&event);
                    self.hear(event);
                }
            }
        }
    }

    async fn be_claimed(mut self, mut life: Life, mut up: Up) {
        self.since = Instant::now();
        self.body.set_machine_id(identity::machine_id());
        match self.renew(&mut life, self.since, up.closed()).await {
            Ok(()) => self.go_on(life, up).await,
            Err(error) => {
                life.kill().await;
                drop(life);
                self.give_up(error, up);
            }
        }
    }

    /// The life of an agent that an earlier `arkd` left paused.
    pub(super) async fn sleep(self) {
        let (id, name) = self.who();
        match Life::home(&self.core, &self.dir, id.clone()) {
            Ok(life) => self.serve_and_end(life).await,
            Err(error) => {
                tracing::error!(%id, %name, %error, "the paused agent cannot be taken in; it stays on disk");
                self.enter(AgentState::Failed, Some(error.to_string()), None);
                self.core.registry.forget(&id);
            }
        }
    }

    fn who(&self) -> (String, AgentName) {
        let agent = self.state.borrow();
        (agent.id.clone(), agent.name.clone())
    }

    fn give_up(&self, error: BootError, up: Up) {
        let (id, name) = self.who();
        tracing::warn!(%id, %name, %error, "the agent did not start");
        self.enter(AgentState::Failed, Some(error.to_string()), None);
        self.body.set_grant(None);
        // By now every guard has run, so who is told finds nothing left.
        let _ = up.send(Err(error));
    }

    /// The agent is up: it is served until it is removed.
    async fn go_on(mut self, life: Life, up: Up) {
        self.enter(AgentState::Running, None, Some(millis(self.since.elapsed())));
        let agent = self.state.borrow().clone();
        tracing::info!(id = agent.id, name = %agent.name, boot_ms = agent.boot_ms, pid = agent.vmm_pid, "the agent runs");
        if up.send(Ok(agent)).is_err() {
            self.removal = Some(Removal::NOW);
        }
        self.serve_and_end(life).await;
    }

    async fn serve_and_end(mut self, mut life: Life) {
        let Removal { grace, for_good } = self.serve(&mut life).await;
        let dirs = self.body.base().hold().as_ref().map(chain).unwrap_or_default();
        if let Some(mut vmm) = life.vmm.take() {
            let record = self.stop(&mut vmm, grace).await;
            self.conclude(record, true);
        }
        let (id, name) = self.who();
        self.body.set_base(Base::None);
        // Who waits for the agent's end finds nothing of it on disk, but for what others need.
        self.core.snapshots.gone(&dirs).await;
        if for_good || !self.body.is_recorded() {
            record::forget(&self.core, &id).await;
        }
        tracing::info!(%id, %name, "the agent is removed");
    }

    /// Lets the guest run its first program, which is slower than any later one.
    async fn warm_up(&self) {
        let request = ExecRequest { argv: vec!["/bin/true".to_owned()], ..ExecRequest::default() };
        let Ok(frame) = Frame::json(Kind::Exec, &request) else { return };
        match tokio::time::timeout(WARM_UP, capture(&self.guest, &frame, b"")).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::debug!(%error, "a standby is not warm"),
            Err(_) => tracing::debug!("a standby's first program takes long"),
        }
    }

    /// Looks after the agent until it is to be removed.
    async fn serve(&mut self, life: &mut Life) -> Removal {
        let auto_remove = self.state.borrow().auto_remove;
        let limit = self.core.config.timing.first_stream;
        let first_stream = sleep(limit);
        tokio::pin!(first_stream);
        let mut streamed = false;
        loop {
            if let Some(removal) = self.removal.take() {
                return removal;
            }
            // Nobody can begin one while it stands still.
            let waits = auto_remove && !streamed && self.state.borrow().state != AgentState::Paused;
            tokio::select! {
                biased;
                record = ended(&mut life.vmm) => {
                    life.vmm = None;
                    self.lose_vmm(record);
                }
                request = self.requests.recv() => match request {
                    Some(Request::Remove { grace, for_good }) => return Removal { grace, for_good },
                    Some(Request::StreamBegan) => streamed = true,
                    Some(Request::StreamEnded) if auto_remove => return Removal::NOW,
                    Some(Request::StreamEnded) => {}
                    Some(Request::Enter { state, done }) => {
                        self.enter_if_legal(state, done);
                        first_stream.as_mut().reset(tokio::time::Instant::now() + limit);
                    }
                    Some(Request::Restart { hold, image, origin, up }) => {
                        self.restart(life, (hold, image, origin), up).await;
                        first_stream.as_mut().reset(tokio::time::Instant::now() + limit);
                    }
                    // Dropping it tells who asked.
                    Some(Request::Claim { .. }) => {}
                    None => return Removal::NOW,
                },
                event = life.greeter.next() => self.hear(event),
                () = &mut first_stream, if waits => {
                    tracing::info!("no streamed exec began in time");
                    return Removal::NOW;
                }
            }
        }
    }

    /// The VMM ended by itself. A paused agent that is on disk outlasts it.
    fn lose_vmm(&self, record: ExitRecord) {
        if self.state.borrow().state == AgentState::Paused && self.body.is_recorded() {
            tracing::warn!(
                reason = sentence(&record),
                "the VMM of a paused agent ended; its memory is on disk"
            );
            self.body.set_grant(None);
            self.state.send_modify(|agent| agent.vmm_pid = None);
        } else {
            self.conclude(record, false);
        }
    }

    fn enter_if_legal(&self, state: AgentState, done: oneshot::Sender<()>) {
        let now = self.state.borrow().state;
        if now == state
            || !matches!(state, AgentState::Running | AgentState::Paused)
            || !now.may_become(state)
        {
            return;
        }
        self.enter(state, None, None);
        let _ = done.send(());
    }

    /// Ends the VMM, if there is one, and goes on from `hold` with a new one: to rewind, or to wake from disk.
    async fn restart(&mut self, life: &mut Life, from: (Hold, Image, Option<Origin>), up: Up) {
        let (hold, image, origin) = from;
        let was = self.state.borrow().state;
        if !was.may_become(AgentState::Creating) {
            return;
        }
        // What is on disk stays whole, so it can be tried again; what a running agent was is lost with its VMM.
        let is_on_disk = was == AgentState::Paused && self.body.is_recorded();
        let before = self.body.base();
        self.since = Instant::now();
        self.enter(AgentState::Creating, None, None);
        life.kill().await;
        self.disk = Some(image.path);
        self.body.set_base(Base::lived_in(&hold));
        // Who asked may leave: an agent that is half rewound is of no use to anybody else.
        match self.restore_again(life, &hold).await {
            Ok(()) => {
                drop(before);
                self.state.send_modify(|agent| agent.origin = origin.unwrap_or(agent.origin.clone()));
                self.enter(AgentState::Running, None, Some(millis(self.since.elapsed())));
                let agent = self.state.borrow().clone();
                let _ = up.send(Ok(agent));
            }
            Err(error) => {
                life.kill().await;
                self.body.set_grant(None);
                self.state.send_modify(|agent| agent.vmm_pid = None);
                let (next, why, base) = if is_on_disk {
                    (AgentState::Paused, None, before)
                } else {
                    (AgentState::Failed, Some(error.to_string()), Base::None)
                };
                self.body.set_base(base);
                self.enter(next, why, None);
                let _ = up.send(Err(error));
            }
        }
    }

    pub(super) fn hear(&self, event: Event) {
        match event {
            Event::Heartbeat(Heartbeat { uptime_ms, mem_available_kib, load1_x100, .. }) => {
                let heartbeat =
                    AgentHeartbeat { at_unix_ms: unix_ms(), uptime_ms, mem_available_kib, load1_x100 };
                self.state.send_modify(|agent| agent.heartbeat = Some(heartbeat));
            }
            Event::Hello(hello) => tracing::debug!(?hello, "hello again"),
            Event::Misbehaved(failure) => tracing::debug!(%failure, "the guest's heartbeat broke"),
        }
    }

    /// Ends the VMM: asks it, waits for `grace` (or less, when a later removal gives less), then kills it.
    async fn stop(&mut self, vmm: &mut Vmm, grace: Duration) -> ExitRecord {
        let is_paused = self.state.borrow().state == AgentState::Paused;
        self.enter(AgentState::Stopping, None, None);
        // A paused guest cannot follow.
        if !grace.is_zero() && !is_paused && self.ask_to_stop(grace).await {
            let mut deadline = tokio::time::Instant::now() + grace + STOP_SLACK;
            loop {
                tokio::select! {
                    record = vmm.wait() => return record,
                    () = sleep_until(deadline) => break,
                    request = self.requests.recv() => match request {
                        Some(Request::Remove { grace, .. }) => {
                            deadline = deadline.min(tokio::time::Instant::now() + grace);
                        }
                        Some(_) => {}
                        None => break,
                    },
                }
            }
        }
        vmm.kill();
        vmm.wait().await
    }

    async fn ask_to_stop(&self, grace: Duration) -> bool {
        let request = ControlRequest::Stop { grace_ms: millis(grace) };
        match supervisor::ask(&self.dir.control_socket(), request).await {
            Ok(ControlReply::State { .. }) => true,
            Ok(reply) => {
                tracing::warn!(?reply, "the VMM does not stop its guest; it is killed");
                false
            }
            Err(error) => {
                tracing::warn!(%error, "the VMM cannot be asked to stop; it is killed");
                false
            }
        }
    }

    /// Publishes the VMM's end.
    fn conclude(&self, record: ExitRecord, on_request: bool) {
        let by_itself = matches!(record.reason, ExitReason::GuestPoweroff);
        let was_paused = self.state.borrow().state == AgentState::Paused;
        let (state, reason) = match (on_request, by_itself && !was_paused) {
            (true, _) => (AgentState::Stopped, "it was stopped on request".to_owned()),
            (false, true) => (AgentState::Stopped, sentence(&record)),
            (false, false) => (AgentState::Failed, sentence(&record)),
        };
        if state == AgentState::Failed {
            let agent = self.state.borrow();
            tracing::warn!(id = agent.id, name = %agent.name, reason, "the agent ended");
        }
        self.state.send_modify(|agent| agent.exit = Some(record));
        // Its memory is no more, and with it the need for what that was read from.
        self.body.set_base(Base::None);
        self.body.set_grant(None);
        self.enter(state, Some(reason), None);
    }

    /// Moves to `next`, with its reason or, on the way to running, the time that it took.
    pub(super) fn enter(&self, next: AgentState, reason: Option<String>, boot_ms: Option<u64>) {
        self.state.send_modify(|agent| {
            debug_assert!(agent.state.may_become(next), "{} may not become {next}", agent.state);
            agent.state = next;
            agent.reason = reason.or_else(|| agent.reason.take());
            agent.boot_ms = boot_ms.or(agent.boot_ms);
            if super::is_ended(next) {
                agent.vmm_pid = None;
            }
        });
    }

    /// The agent's entry in the registry, to be forgotten with its life.
    pub(super) fn seat(&self) -> Seat {
        Seat::new(Arc::clone(&self.core), self.state.borrow().id.clone())
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // Handles may outlive the agent; what was reserved for it does not. Its VMM is gone by now.
        self.body.set_grant(None);
    }
}

/// Directories of `hold` and of everything that it is over.
fn chain(hold: &Hold) -> Vec<PathBuf> {
    std::iter::successors(Some(hold), |hold| hold.base()).map(|hold| hold.dir().to_owned()).collect()
}

impl Request {
    /// What a removal among the requests that come while the guest comes up asks for; anything else has to wait for the next
    /// try, which dropping it tells who asked.
    pub(super) const fn removal(request: Option<&Self>) -> Option<Removal> {
        match request {
            None => Some(Removal::NOW),
            Some(Self::Remove { grace, for_good }) => Some(Removal { grace: *grace, for_good: *for_good }),
            Some(_) => None,
        }
    }
}

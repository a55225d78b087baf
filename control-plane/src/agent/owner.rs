//! The one task that owns an agent: it alone holds the VMM and changes the state.
//!
//! ```text
//!                    hello, or every check                     Remove, or the first stream ended (auto_remove)
//!  live: come_up() ────────────────────────► serve() ──────────────────────────────────────► stop() ──► gone
//!     │                                        │  ▲ heartbeats, pause, resume, rewind          ▲
//!     │                                        │  │ VMM ended: begun anew (super::heal)        │
//!     │ neither (1)                            └──┘ VMM ended: Stopped or Failed, or paused ───┘
//!     ▼                                         ▲                still known until removed
//!   gone (directory, sockets, process           │
//!   and registry entry go with the              ├── claimed ◄── stand_by: a fork that waits in the pool
//!   guards of `Life`)                           ├────────────── sleep: paused by an earlier `arkd`
//!                                               └────────────── come_back: left running, or ended, by an earlier `arkd`
//! ```
//!
//! When `arkd` ends and its agents are to go on, `serve` ends with `leave`: the process, its directory and its record stay.
//!
//! (1) On an emulated processor a guest that it spoiled is booted again first: see [`super::boot`].

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ark_types::agent::{Agent, AgentHeartbeat, AgentName, AgentState, Origin};
use ark_types::event::{Event, Outcome};
use ark_types::exec::ExecRequest;
use ark_types::guest::{Frame, Heartbeat, Kind};
use ark_types::healing::AgentHealth;
use ark_types::layout::AgentDir;
use ark_types::vmm::{ExitReason, ExitRecord};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep;
use tracing::{Instrument as _, Span};

use super::birth::Begun;
use super::body::{Base, Body};
use super::checkpoint::taken;
use super::heal::{Healing, after};
use super::history::{ON_REQUEST, stillborn};
use super::ready::StoodBy;
use super::record::{self, Known, Record};
use super::request::{Parting, Removal, Request, Up};
use super::start::{Life, Seat, ended};
use super::{BootError, identity};
use crate::core::Core;
use crate::guest::{Address, Event as Sign, capture};
use crate::host::{millis, unix_ms};
use crate::media::Media;
use crate::reconcile::Clock;
use crate::snapshots::Hold;
use crate::store::AppendError;
use crate::supervisor::Vmm;
use crate::telemetry::Phase;
use crate::traces::step_of;

/// Time a standby's first program has.
const WARM_UP: Duration = Duration::from_secs(10);

/// The owner, before and while its agent lives.
pub(super) struct Owner {
    pub(super) core: Arc<Core>,
    pub(super) dir: AgentDir,
    /// Variables its programs start with.
    pub(super) env: BTreeMap<String, String>,
    /// Its disks; none where this `arkd` has not started a VMM for it.
    pub(super) media: Option<Media>,
    pub(super) guest: Address,
    pub(super) body: Arc<Body>,
    /// Whether it is an agent in the registry, of which everything is recorded.
    pub(super) known: bool,
    /// How it begins; none once it has begun.
    pub(super) begun: Option<Begun>,
    /// When it was asked for.
    pub(super) since: Instant,
    /// What asked for it, while it comes up.
    pub(super) cause: Span,
    pub(super) state: watch::Sender<Agent>,
    pub(super) requests: mpsc::UnboundedReceiver<Request>,
    /// What was asked for while something else was waited for.
    pub(super) parting: Option<Parting>,
    pub(super) healing: Healing,
}

impl Owner {
    /// The agent's whole life. The first word on it goes to `up`.
    pub(super) async fn live(mut self, mut up: Up) {
        // Durable at about the time that the guest is up.
        let born = self.record_birth(None);
        match self.come_up(&mut up).await {
            Ok(life) => {
                let (boot_ms, ready) = self.ready();
                let ready = self.record(vec![ready]);
                self.go_on(life, boot_ms, async { born.await.and(ready.await) }, up).await;
            }
            Err(error) => self.give_up(error, up).await,
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
            return life.kill().await;
        }
        let patience = self.core.config.timing.silence;
        self.healing.heard();
        loop {
            tokio::select! {
                biased;
                _ = ended(&mut life.vmm) => return,
                request = self.requests.recv() => match request {
                    Some(Request::Claim { spec, env, base, grant, cause, up }) => {
                        self.state.send_modify(|agent| {
                            let vmm_pid = agent.vmm_pid;
                            *agent = Agent { vmm_pid, ..spec.newborn() };
                        });
                        self.body.set_base(base);
                        self.body.set_grant(Some(grant));
                        // Its age is counted from now.
                        self.body.set_clock(Clock::new());
                        (self.env, self.known, self.cause) = (env, true, cause);
                        return self.be_claimed(life, up).await;
                    }
                    Some(Request::GiveUp { to }) => {
                        // Who asked may have left, and then it ends.
                        drop(to.send(StoodBy { life, renewals: self.body.renewals() }));
                        return;
                    }
                    // Who asked for it waits until the VMM is gone.
                    Some(Request::Remove { .. } | Request::Leave) | None => return life.kill().await,
                    // Nobody has a handle to ask for more.
                    Some(_) => {}
                },
                event = life.greeter.next() => {
                    life.note(&event);
                    self.hear(event);
                }
                () = sleep(patience / 2) => if self.healing.count(patience / 2) >= patience {
                    tracing::warn!(silence_s = patience.as_secs(), "a standby was not heard, so it is replaced");
                    return life.kill().await;
                }
            }
        }
    }

    async fn be_claimed(mut self, mut life: Life, mut up: Up) {
        self.since = Instant::now();
        self.body.set_machine_id(identity::machine_id());
        let step = step_of(&std::mem::replace(&mut self.cause, Span::none()), "renewal");
        match self.renew(&mut life, self.since, up.closed()).instrument(step).await {
            Ok(()) => {
                // At once: nobody is told of it in between, and each append waits for the disk.
                let (boot_ms, ready) = self.ready();
                let recorded = self.record_birth(Some(ready));
                self.go_on(life, boot_ms, recorded, up).await;
            }
            Err(error) => {
                drop(self.record_birth(None));
                life.kill().await;
                self.keep_console(&error.to_string());
                drop(life);
                self.give_up(error, up).await;
            }
        }
    }

    /// The life of an agent that an earlier `arkd` left paused.
    pub(super) async fn sleep(self) {
        let (id, name) = self.who();
        let core = Arc::clone(&self.core);
        // Closed never: an error cannot be.
        let turn = core.homecomings.acquire().await;
        match Life::home(&self.core, &self.dir, id.clone()) {
            Ok(life) => {
                self.take_over_checkpoints();
                drop(turn);
                self.serve_and_end(life).await;
            }
            Err(error) => {
                tracing::error!(%id, %name, %error, "the paused agent cannot be taken in; it stays on disk");
                self.enter(AgentState::Failed, Some(error.to_string()), None);
                self.core.registry.forget(&id);
            }
        }
    }

    /// The life of an agent that an earlier `arkd` left: with its VMM, or ended.
    pub(super) async fn come_back(self, vmm: Option<Vmm>) {
        let (id, name) = self.who();
        let core = Arc::clone(&self.core);
        // Closed never: an error cannot be.
        let turn = core.homecomings.acquire().await;
        match Life::home(&self.core, &self.dir, id.clone()) {
            Ok(mut life) => {
                life.vmm = vmm;
                self.take_over_checkpoints();
                self.note(&life);
                drop(turn);
                self.serve_and_end(life).await;
            }
            Err(error) => {
                tracing::error!(%id, %name, %error, "the agent cannot be taken in; it is left to a later arkd");
                vmm.into_iter().for_each(Vmm::leave);
                // What it takes up and what its memory is read from are held here.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Writes down what a later `arkd` needs to go on with the agent.
    fn remember(&self, life: &Life) -> Result<(), BootError> {
        if !self.known {
            return Ok(());
        }
        let record = Record {
            agent: self.state.borrow().clone(),
            env: self.env.clone(),
            machine_id: self.body.machine_id(),
            renewals: self.body.renewals(),
            receipt: self.body.receipt(),
            healing: self.healing.kept.clone(),
            clock: self.body.clock().reading(),
            apart: self.body.apart(),
        };
        let process = life.vmm.as_ref().map(|vmm| vmm.identity().clone());
        let snapshot = self.body.base().hold().map(|hold| hold.id());
        let known = Known { record, process, snapshot };
        known.write(&self.dir).map_err(|source| BootError::Directory { path: self.dir.0.clone(), source })
    }

    /// As [`Self::remember`], of an agent that goes on even so.
    pub(super) fn note(&self, life: &Life) {
        if let Err(error) = self.remember(life) {
            let (id, name) = self.who();
            tracing::error!(%id, %name, %error, "the agent's record cannot be written: should arkd be killed, the next one may lose it");
        }
    }

    pub(super) fn who(&self) -> (String, AgentName) {
        let agent = self.state.borrow();
        (agent.id.clone(), agent.name.clone())
    }

    async fn give_up(&self, error: BootError, up: Up) {
        let (id, name) = self.who();
        tracing::warn!(%id, %name, %error, "the agent did not start");
        self.enter(AgentState::Failed, Some(error.to_string()), None);
        self.body.set_grant(None);
        self.record_removal(vec![stillborn(&error)]).await;
        // By now every guard has run, so who is told finds nothing left.
        let _ = up.send(Err(error));
    }

    /// Its guest takes commands: how long that took, milliseconds, and what to record of it.
    fn ready(&self) -> (u64, Event) {
        let took = self.since.elapsed();
        self.core.telemetry.phase(Phase::Ready, took);
        let boot_ms = millis(took);
        (boot_ms, Event::AgentReady { boot_ms })
    }

    /// The agent is up: it is served until it is removed.
    async fn go_on(
        mut self,
        mut life: Life,
        boot_ms: u64,
        recorded: impl Future<Output = Result<(), AppendError>>,
        up: Up,
    ) {
        let mut kept = recorded.await.map_err(BootError::Unrecorded);
        if kept.is_ok() {
            self.enter(AgentState::Running, None, Some(boot_ms));
            self.healing.begins();
            // Before anybody is told of it: what was acknowledged outlives this arkd.
            kept = self.remember(&life);
        }
        if let Err(error) = kept {
            life.kill().await;
            drop(life);
            return self.give_up(error, up).await;
        }
        let agent = self.state.borrow().clone();
        tracing::info!(id = agent.id, name = %agent.name, boot_ms = agent.boot_ms, pid = agent.vmm_pid, "the agent runs");
        if up.send(Ok(agent)).is_err() {
            self.parting = Some(Parting::Removal(Removal::NOW));
        }
        self.serve_and_end(life).await;
    }

    async fn serve_and_end(mut self, mut life: Life) {
        let (id, name) = self.who();
        let Removal { grace, for_good } = match self.serve(&mut life).await {
            Parting::Removal(removal) => removal,
            Parting::Leave => {
                tracing::info!(%id, %name, "the agent is left to the next arkd");
                return life.leave();
            }
        };
        let dirs = self.body.base().hold().as_ref().map(chain).unwrap_or_default();
        let is_over = super::is_over(&self.state.borrow());
        // One that stays on disk has not ended, and one that had ended is known until it is deleted.
        let goes = for_good || !(self.body.is_recorded() || is_over);
        let stopping = (goes && !is_over).then(|| self.record(vec![Event::AgentStopping {}]));
        let mut last = Vec::new();
        if let Some(mut vmm) = life.vmm.take() {
            let record = self.stop(&mut vmm, grace).await;
            last.push(self.conclude(record));
        } else if !is_over {
            let (outcome, reason) = (Outcome::Stopped, ON_REQUEST.to_owned());
            last.push(Event::AgentEnded { outcome, reason, exit: None });
        }
        if let Some(stopping) = stopping {
            // Before anything of it goes: should arkd be killed meanwhile, the next one knows what became of the rest. What cannot
            // be recorded now is owed.
            let _ = stopping.await;
        }
        self.body.set_base(Base::None);
        // Who waits for the agent's end finds nothing of it on disk, but for what others need.
        self.core.snapshots.gone(&dirs).await;
        if for_good || !self.body.is_recorded() {
            record::forget(&self.core, &id).await;
            self.forget_checkpoints().await;
        }
        if goes {
            self.record_removal(last).await;
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

    /// Looks after the agent until it is to be removed, or left.
    async fn serve(&mut self, life: &mut Life) -> Parting {
        let auto_remove = self.state.borrow().auto_remove;
        let limit = self.core.config.timing.first_stream;
        let first_stream = sleep(limit);
        tokio::pin!(first_stream);
        let mut streamed = false;
        loop {
            if let Some(parting) = self.parting.take() {
                return parting;
            }
            let look = self.next_look();
            // Nobody can begin one while it stands still.
            let waits = auto_remove && !streamed && self.state.borrow().state != AgentState::Paused;
            tokio::select! {
                biased;
                record = ended(&mut life.vmm) => {
                    life.vmm = None;
                    self.lose_vmm(record).await;
                    self.end_checkpoint(life).await;
                    self.note(life);
                }
                request = self.requests.recv() => {
                    match &request {
                        Some(Request::StreamBegan) => streamed = true,
                        Some(Request::Enter { .. } | Request::Restart { .. }) => {
                            first_stream.as_mut().reset(tokio::time::Instant::now() + limit);
                        }
                        _ => {}
                    }
                    if let Some(parting) = self.heed(life, request).await {
                        return parting;
                    }
                }
                event = life.greeter.next() => self.hear(event),
                outcome = taken(&mut self.healing.taking) => self.note_checkpoint(life, outcome).await,
                verdict = self.healing.checks.verdict() => self.note_check(verdict),
                () = after(look) => {
                    if let Some(parting) = self.look(life).await {
                        return parting;
                    }
                }
                () = &mut first_stream, if waits => {
                    tracing::info!("no streamed exec began in time");
                    return Parting::Removal(Removal::NOW);
                }
            }
        }
    }

    /// Does what is asked of an agent that is up.
    async fn heed(&mut self, life: &mut Life, request: Option<Request>) -> Option<Parting> {
        let auto_remove = self.state.borrow().auto_remove;
        match request {
            Some(Request::Remove { grace, for_good }) => {
                return Some(Parting::Removal(Removal { grace, for_good }));
            }
            Some(Request::Leave) => return Some(self.part()),
            Some(Request::StreamEnded) if auto_remove => return Some(Parting::Removal(Removal::NOW)),
            Some(Request::StreamBegan | Request::StreamEnded) => {}
            Some(Request::Enter { state, done }) => {
                self.healing.checks.interrupt();
                // While it stood still it could say nothing.
                self.healing.heard();
                self.enter_if_legal(life, state, done);
            }
            Some(Request::Move { base, done }) => {
                // One that has ended needs none.
                if life.vmm.is_some() {
                    self.body.set_base(base);
                    self.note(life);
                }
                let _ = done.send(());
            }
            Some(Request::Healing { told }) => drop(told.send(self.healing.kept.clone())),
            Some(Request::Restart { hold, media, origin, up }) => {
                self.restart(life, (hold, media, origin), up).await;
            }
            // Dropping it tells who asked.
            Some(Request::Claim { .. } | Request::GiveUp { .. }) => {}
            None => return Some(Parting::Removal(Removal::NOW)),
        }
        None
    }

    /// How the agent and an `arkd` that ends part.
    fn part(&self) -> Parting {
        let agent = self.state.borrow();
        if agent.auto_remove {
            // Its one client goes with this arkd.
            Parting::Removal(Removal::NOW)
        } else if agent.state == AgentState::Paused && self.body.is_recorded() {
            Parting::Removal(Removal { grace: Duration::ZERO, for_good: false })
        } else {
            Parting::Leave
        }
    }

    fn enter_if_legal(&self, life: &mut Life, state: AgentState, done: oneshot::Sender<()>) {
        let now = self.state.borrow().state;
        if now == state
            || !matches!(state, AgentState::Running | AgentState::Paused)
            || !now.may_become(state)
            // It ended while it was asked to go on.
            || state == AgentState::Running && life.vmm.as_mut().is_none_or(Vmm::has_ended)
        {
            return;
        }
        self.enter(state, None, None);
        // Paused it is once that is on disk: what an arkd that is killed before leaves standing still, the next one lets go on.
        if state == AgentState::Running {
            self.note(life);
        }
        let _ = done.send(());
    }

    /// Ends the VMM, if there is one, and goes on from `hold` with a new one: to rewind, or to wake from disk.
    async fn restart(&mut self, life: &mut Life, from: (Hold, Media, Option<Origin>), up: Up) {
        let (hold, media, origin) = from;
        // Whoever asks has the turn, so none is under way.
        (self.healing.taking, self.healing.killed) = (None, None);
        self.healing.checks.interrupt();
        let was = self.state.borrow().state;
        if super::is_ended(was) || !was.may_become(AgentState::Creating) {
            return;
        }
        // What is on disk stays whole, so it can be tried again; what a running agent was is lost with its VMM.
        let is_on_disk = was == AgentState::Paused && self.body.is_recorded();
        let before = self.body.base();
        self.since = Instant::now();
        self.enter(AgentState::Creating, None, None);
        // An arkd that is killed meanwhile leaves half an agent.
        self.note(life);
        life.kill().await;
        self.media = Some(media);
        self.body.set_base(Base::lived_in(&hold));
        // Who asked may leave: an agent that is half rewound is of no use to anybody else.
        match self.restore_again(life, &hold).await {
            Ok(()) => {
                drop(before);
                self.healing.heard();
                if let Some(origin) = origin {
                    // It is a fork from here on. What one needs that was on disk has whoever asked.
                    if !is_on_disk {
                        self.reserve(false);
                    }
                    self.rewound(origin);
                }
                self.enter(AgentState::Running, None, Some(millis(self.since.elapsed())));
                self.note(life);
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
                if let Some(why) = &why {
                    self.keep_console(why);
                }
                self.enter(next, why, None);
                if next == AgentState::Failed {
                    let _ = self.record(vec![stillborn(&error)]).await;
                }
                self.note(life);
                let _ = up.send(Err(error));
            }
        }
    }

    pub(super) fn hear(&mut self, event: Sign) {
        match event {
            Sign::Heartbeat(Heartbeat { uptime_ms, mem_available_kib, load1_x100, .. }) => {
                let heartbeat =
                    AgentHeartbeat { at_unix_ms: unix_ms(), uptime_ms, mem_available_kib, load1_x100 };
                self.healing.heard();
                self.state.send_modify(|agent| agent.heartbeat = Some(heartbeat));
            }
            Sign::Hello(hello) => tracing::debug!(?hello, "hello again"),
            Sign::Misbehaved(failure) => tracing::debug!(%failure, "the guest's heartbeat broke"),
        }
    }

    /// Has the console outlast the agent's directory: it ended, or did not come up, because of `reason`.
    pub(super) fn keep_console(&self, reason: &str) {
        let agent = self.state.borrow().clone();
        self.core.consoles.keep(&agent, &self.dir.console(), reason);
    }

    /// Moves to `next`, with its reason or, on the way to running, the time that it took.
    pub(super) fn enter(&self, next: AgentState, reason: Option<String>, boot_ms: Option<u64>) {
        self.state.send_modify(|agent| {
            debug_assert!(agent.state.may_become(next), "{} may not become {next}", agent.state);
            (agent.state, agent.health) = (next, AgentHealth::Healthy);
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
        // Handles may outlive the agent; what was reserved for it does not. Its VMM is gone by now, or another arkd's.
        self.body.set_grant(None);
    }
}

/// What became of a running agent whose VMM ended with `record`, which this `arkd` did not ask it to.
pub(crate) const fn outcome_of(record: &ExitRecord) -> Outcome {
    match record.reason {
        // An earlier arkd may have asked.
        ExitReason::GuestPoweroff | ExitReason::Stopped | ExitReason::StopDeadline => Outcome::Stopped,
        ExitReason::GuestReboot
        | ExitReason::GuestPanic
        | ExitReason::GuestCrash
        | ExitReason::Signal
        | ExitReason::Killed
        | ExitReason::BadConfig
        | ExitReason::BadSnapshot
        | ExitReason::HostError
        | ExitReason::Internal => Outcome::Failed,
    }
}

/// Directories of `hold` and of everything that it is over.
fn chain(hold: &Hold) -> Vec<PathBuf> {
    std::iter::successors(Some(hold), |hold| hold.base()).map(|hold| hold.dir().to_owned()).collect()
}

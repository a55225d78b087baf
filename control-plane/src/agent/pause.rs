//! Snapshots of an agent, pausing it to disk, and resuming it.
//!
//! ```text
//!  pause:   VMM pauses ──► Paused ──► snapshot, durable ──► memory given back ──► record written
//!              └──────────────────────── any failure: VMM goes on ──► Running, nothing is left
//!  resume:  VMM there? yes: it goes on, its clock is set ──┐
//!                      no:  restored from the snapshot ────┴──► Running ──► record removed
//! ```
//!
//! After the memory was given back it is read from the snapshot, which therefore stays as long as the agent lives.
//! Each of these runs to its end even when who asked for it leaves, and only one at a time.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ark_types::agent::{Agent, AgentState, Origin};
use ark_types::event::Event;
use ark_types::scheduling::DEFAULT_QUEUE_TIMEOUT;
use ark_types::vmm::{ControlReply, ControlRequest, SnapshotId, SnapshotReport};
use tokio::sync::oneshot;

use super::body::Base;
use super::error::sentence;
use super::record::{self, Paused, Record};
use super::request::Request;
use super::{
    BootError, Handle, PauseError, REASON_PATIENCE, RENEWALS_FILE, SnapshotFailure, birth, identity, is_ended,
};
use crate::cleanup::make_private_dir;
use crate::core::Core;
use crate::guest::{Address, Idle, set_clock};
use crate::media::Media;
use crate::problems::Refusal;
use crate::scheduler::{Ask, Grant};
use crate::snapshots::{Hold, tells_of_full_disk};
use crate::supervisor::{ControlError, ask_for, set_going};

/// Time a VMM has to bring a guest's memory to disk: 64 GiB at 64 MiB/s.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(1024);
/// Time a VMM has to stop its processors and devices, or to let them go on, on a busy host.
pub(super) const STAND_STILL: Duration = Duration::from_secs(10);
/// Time between two tries to set a VMM going that does not answer.
const SET_GOING_AGAIN: Duration = Duration::from_secs(1);
/// Time a resumed guest has to take the time.
const SET_CLOCK: Duration = Duration::from_secs(10);

/// A snapshot that was taken of an agent.
#[derive(Debug)]
pub struct Taken {
    /// What the VMM says of it.
    pub report: SnapshotReport,
    /// The agent at that time.
    pub agent: Agent,
    /// Keeps what it is a diff over.
    pub base: Option<Hold>,
}

impl Handle {
    /// Takes a snapshot of it into `dir`, which must not exist.
    ///
    /// # Errors
    /// [`SnapshotFailure`]; of `dir` nothing is left then.
    pub async fn snapshot(&self, dir: &Path) -> Result<Taken, SnapshotFailure> {
        let (handle, dir) = (self.clone(), dir.to_owned());
        let (tell, told) = oneshot::channel();
        tokio::spawn(async move {
            let taken = {
                let _turn = handle.0.body.turn.lock().await;
                take(&handle, &dir).await
            };
            if tell.send(taken).is_err() {
                clear(&dir);
            }
        });
        told.await.unwrap_or(Err(SnapshotFailure::ShuttingDown))
    }

    /// Goes back to the snapshot `hold`, which has to be one of this very agent: a new VMM takes the place of the old one.
    ///
    /// # Errors
    /// A [`Refusal`]; when the snapshot could not be restored the agent has failed with that reason.
    pub async fn rewind(&self, core: &Arc<Core>, hold: Hold, origin: Origin) -> Result<Agent, Refusal> {
        let grant = room_to_go_on(core, self).await?;
        let busy = core.pool.busy();
        let (core, handle) = (Arc::clone(core), self.clone());
        in_full(async move {
            let _busy = busy;
            let _turn = handle.0.body.turn.lock().await;
            if is_ended(handle.agent().state) || handle.agent().state == AgentState::Stopping {
                return Err(handle.not_running().into());
            }
            core.ledger.ready()?;
            let grant = needed(&core, &handle, grant).await?;
            let media = birth::prove(&core, &hold).await?;
            let agent = restart(&handle, hold, media, Some(origin.clone())).await?;
            keep(&handle, grant);
            let recorded = remember(&core, &handle, Event::AgentRewound { origin }).await;
            forget_record(&core, &handle).await;
            Ok(recorded.map(|()| agent)?)
        })
        .await?
    }
}

/// Runs `job` to its end, whoever leaves.
async fn in_full<T: Send + 'static>(
    job: impl Future<Output = T> + Send + 'static,
) -> Result<T, SnapshotFailure> {
    tokio::spawn(job).await.map_err(|_| SnapshotFailure::ShuttingDown)
}

/// The turn is the caller's.
pub(super) async fn take(handle: &Handle, dir: &Path) -> Result<Taken, SnapshotFailure> {
    let agent = handle.agent();
    if !matches!(agent.state, AgentState::Running | AgentState::Paused) || agent.vmm_pid.is_none() {
        return Err(handle.not_running().into());
    }
    let base = handle.base();
    let taken = match ask_for_snapshot(handle, dir).await {
        Ok(report) => {
            let path = dir.join(RENEWALS_FILE);
            let written = std::fs::write(&path, format!("{}\n", handle.0.body.renewals()));
            written.map(|()| report).map_err(|source| SnapshotFailure::File { path, source })
        }
        Err(failure) => Err(failure),
    };
    if taken.is_err() {
        clear(dir);
    }
    Ok(Taken { report: taken?, agent, base })
}

async fn ask_for_snapshot(handle: &Handle, dir: &Path) -> Result<SnapshotReport, SnapshotFailure> {
    let socket = handle.0.dir.control_socket();
    let request = ControlRequest::Snapshot { dir: dir.to_owned() };
    match ask_for(&socket, request, SNAPSHOT_PATIENCE).await {
        Ok(ControlReply::Snapshot(report)) => Ok(report),
        Ok(ControlReply::Refused { why }) if tells_of_full_disk(&why) => Err(SnapshotFailure::DiskFull(why)),
        Ok(ControlReply::Refused { why }) => Err(SnapshotFailure::Refused(why)),
        Ok(other) => Err(SnapshotFailure::Refused(format!("it answered {other:?}"))),
        Err(error) => Err(why_silent(handle, error).await),
    }
}

/// A VMM that ended says more than its broken socket.
async fn why_silent(handle: &Handle, error: ControlError) -> SnapshotFailure {
    let mut state = handle.0.state.clone();
    let ending = |agent: &Agent| is_ended(agent.state) || agent.state == AgentState::Stopping;
    match tokio::time::timeout(REASON_PATIENCE, state.wait_for(ending)).await {
        Ok(Ok(agent)) => {
            let reason = match (&agent.reason, &agent.exit) {
                (Some(reason), _) => reason.clone(),
                (None, Some(exit)) => sentence(exit),
                (None, None) => "it was stopped on request".to_owned(),
            };
            SnapshotFailure::Gone { name: handle.name().clone(), reason }
        }
        _ => SnapshotFailure::Control(error),
    }
}

/// Removes a snapshot that is of no use, half written or whole.
fn clear(dir: &Path) {
    let mut beside = dir.as_os_str().to_owned();
    beside.push(".tmp");
    for path in [dir.to_owned(), PathBuf::from(beside)] {
        if let Err(error) = std::fs::remove_dir_all(&path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "a useless snapshot cannot be removed");
        }
    }
}

/// Stands the agent still, with its memory on disk.
///
/// # Errors
/// [`PauseError`], which says whether the agent goes on then.
pub async fn pause(core: &Arc<Core>, handle: &Handle) -> Result<Agent, PauseError> {
    let (core, handle) = (Arc::clone(core), handle.clone());
    in_full(async move {
        let _turn = handle.0.body.turn.lock().await;
        match handle.agent().state {
            AgentState::Running => {}
            AgentState::Paused => return Err(PauseError::Paused(handle.name().clone())),
            _ => return Err(handle.not_running().into()),
        }
        core.ledger.ready()?;
        if let Err(error) = ask_state(&handle, ControlRequest::Pause, "pause").await {
            // It may have stopped all the same, just too late.
            let _ = ask_state(&handle, ControlRequest::Resume, "resume").await;
            return Err(error);
        }
        if !handle.enter(AgentState::Paused).await {
            return Err(handle.not_running().into());
        }
        let failure = match to_disk(&core, &handle).await {
            Ok(snapshot) => {
                let snapshot = snapshot.to_string();
                remember(&core, &handle, Event::AgentPaused { snapshot }).await?;
                return Ok(handle.agent());
            }
            Err(failure) => failure,
        };
        Err(match go_on(&handle).await {
            Ok(()) => failure.into(),
            Err(_) if matches!(failure, SnapshotFailure::Gone { .. }) => PauseError::Ended(failure),
            Err(error) => PauseError::Stuck { failure, error: Box::new(error) },
        })
    })
    .await?
}

/// The VMM is paused; its memory goes to disk, durably, and then back to the host.
async fn to_disk(core: &Arc<Core>, handle: &Handle) -> Result<SnapshotId, SnapshotFailure> {
    let home = record::dir(core, handle.id());
    let file = |path: &Path| {
        let path = path.to_owned();
        move |source| SnapshotFailure::File { path, source }
    };
    let result = async {
        let hold = give_memory_back(core, handle, &home).await?;
        let written = async { record_of(handle, &hold).await?.write(&home).map_err(file(&home)) };
        if let Err(failure) = written.await {
            core.snapshots.dispose(hold.id());
            return Err(failure);
        }
        handle.0.body.set_recorded(true);
        handle.0.body.keep_what_is_needed_on_disk();
        Ok(hold.id())
    };
    let result = result.await;
    // A removal that overtook this has nobody left to undo it.
    if result.is_err() || handle.0.requests.is_closed() {
        handle.0.body.set_recorded(false);
        record::forget(core, handle.id()).await;
    }
    result
}

/// The memory of an agent that stands still goes to disk, into `home`, durably, and then back to the host: from then on it is read
/// from there. The turn is the caller's.
pub(super) async fn give_memory_back(
    core: &Core,
    handle: &Handle,
    home: &Path,
) -> Result<Hold, SnapshotFailure> {
    make_private_dir(home).map_err(|source| SnapshotFailure::File { path: home.to_owned(), source })?;
    let draft = core.snapshots.draft_at(home.join(identity::dice::<8>()));
    take(handle, draft.dir()).await?;
    let hold = core.snapshots.adopt(draft.dir(), None)?;
    // Before: should arkd be killed meanwhile, the next one knows that the memory may be read from there.
    let before = handle.0.body.base();
    handle.move_to(Base::lived_in(&hold)).await;
    let request = ControlRequest::Reclaim { dir: hold.dir().to_owned() };
    let failure = match ask_for(&handle.0.dir.control_socket(), request, SNAPSHOT_PATIENCE).await {
        Ok(ControlReply::State { .. }) => return Ok(hold),
        Ok(ControlReply::Refused { why }) => {
            handle.move_to(before).await;
            SnapshotFailure::Refused(why)
        }
        Ok(other) => SnapshotFailure::Refused(format!("it answered {other:?}")),
        Err(error) => why_silent(handle, error).await,
    };
    core.snapshots.dispose(hold.id());
    Err(failure)
}

async fn record_of(handle: &Handle, hold: &Hold) -> Result<Paused, SnapshotFailure> {
    let (told, healing) = oneshot::channel();
    let _ = handle.0.requests.send(Request::Healing { told });
    let healing = healing.await.map_err(|_| handle.not_running())?;
    let body = &handle.0.body;
    let record = Record {
        agent: handle.agent(),
        env: handle.env().clone(),
        machine_id: body.machine_id(),
        renewals: body.renewals(),
        receipt: body.receipt(),
        healing,
        clock: body.clock().reading(),
        apart: body.apart(),
    };
    Ok(Paused { record, snapshot: hold.id() })
}

/// Lets a paused agent go on.
///
/// # Errors
/// A [`Refusal`]; the agent stays paused then.
pub async fn resume(core: &Arc<Core>, handle: &Handle) -> Result<Agent, Refusal> {
    let grant = room_to_go_on(core, handle).await?;
    let busy = core.pool.busy();
    let (core, handle) = (Arc::clone(core), handle.clone());
    in_full(async move {
        let _busy = busy;
        let _turn = handle.0.body.turn.lock().await;
        let agent = handle.agent();
        core.ledger.ready()?;
        match agent.state {
            AgentState::Paused => {}
            state if is_ended(state) => return Err(handle.not_running().into()),
            state => return Err(PauseError::NotPaused { name: agent.name, state }.into()),
        }
        let grant = needed(&core, &handle, grant).await?;
        if agent.vmm_pid.is_some() {
            go_on(&handle).await?;
        } else {
            let Some(hold) = handle.base() else { return Err(handle.not_running().into()) };
            let media = birth::prove(&core, &hold).await?;
            restart(&handle, hold, media, None).await?;
        }
        keep(&handle, grant);
        let recorded = remember(&core, &handle, Event::AgentResumed {}).await;
        forget_record(&core, &handle).await;
        recorded?;
        Ok(handle.agent())
    })
    .await?
}

impl Handle {
    /// Sets the clock of an agent, in whose time the host's clock was set.
    pub(crate) fn catch_up_clock(&self) {
        if self.0.body.clock().is_off() {
            self.set_clock_soon();
        }
    }

    /// Sets the clock of an agent whose VMM was just set going again.
    pub fn set_clock_soon(&self) {
        let handle = self.clone();
        tokio::spawn(async move { set_clock_of(&handle).await });
    }

    /// Asks the VMM of an agent that runs until it says that it goes on.
    pub(crate) fn set_going_soon(&self) {
        let handle = self.clone();
        tokio::spawn(async move {
            loop {
                {
                    // A pause that somebody asks for meanwhile is not undone.
                    let _turn = handle.0.body.turn.lock().await;
                    if handle.0.requests.is_closed() || handle.agent().state != AgentState::Running {
                        return;
                    }
                    match set_going(&handle.control_socket(), STAND_STILL).await {
                        Ok(true) => return set_clock_of(&handle).await,
                        Ok(false) => return,
                        Err(error) => {
                            tracing::debug!(name = %handle.name(), %error, "an agent may yet stand still");
                        }
                    }
                }
                tokio::time::sleep(SET_GOING_AGAIN).await;
            }
        });
    }
}

/// What an agent that stands still on disk needs besides, to go on; one that does not has all that it needs. Waited for without
/// the turn, by who asks: who leaves waits no longer.
async fn room_to_go_on(core: &Core, handle: &Handle) -> Result<Option<Grant>, Refusal> {
    core.ledger.ready()?;
    if !handle.0.body.is_recorded() {
        return Ok(None);
    }
    room(core, handle, DEFAULT_QUEUE_TIMEOUT).await.map(Some)
}

async fn room(core: &Core, handle: &Handle, patience: Duration) -> Result<Grant, Refusal> {
    let agent = handle.agent();
    let needs = birth::needs(core, &agent);
    let ask = Ask {
        name: Some(agent.name),
        patience,
        apart: handle.0.body.apart(),
        ..Ask::new(agent.owner, needs)
    };
    Ok(core.admit(ask).await?)
}

/// The grant to go on with, now that it is this one's turn.
async fn needed(core: &Core, handle: &Handle, grant: Option<Grant>) -> Result<Option<Grant>, Refusal> {
    if !handle.0.body.is_recorded() {
        return Ok(None);
    }
    // It came to disk only meanwhile and gave its room back. Nobody waits for room with the turn.
    match grant {
        None => room(core, handle, Duration::ZERO).await.map(Some),
        grant => Ok(grant),
    }
}

/// The agent goes on: what it needs for that is its own.
fn keep(handle: &Handle, grant: Option<Grant>) {
    if grant.is_some() {
        handle.0.body.set_grant(grant);
        // Its owner, too, gives back what it has by then.
        if handle.has_ended() {
            handle.0.body.set_grant(None);
        }
    }
}

/// The paused VMM goes on, and its clock with the host's.
async fn go_on(handle: &Handle) -> Result<(), PauseError> {
    ask_state(handle, ControlRequest::Resume, "resume").await?;
    set_clock_of(handle).await;
    handle.0.guest.idle.touch();
    if handle.enter(AgentState::Running).await { Ok(()) } else { Err(handle.not_running().into()) }
}

/// Sets the clock of an agent that runs to the host's.
pub(super) async fn set_clock_of(handle: &Handle) {
    // That is no use of the agent: its idle timeout goes on.
    let guest = Address { idle: Idle::default(), ..handle.0.guest.clone() };
    match set_clock(&guest, SET_CLOCK).await {
        Ok(error_ns) => tracing::debug!(error_ns, "the clock of an agent is set"),
        // It runs all the same; guestd sets its clock by itself when the guest was only slow.
        Err(error) => {
            tracing::warn!(name = %handle.name(), %error, "the clock of an agent could not be set");
        }
    }
}

async fn ask_state(handle: &Handle, request: ControlRequest, what: &'static str) -> Result<(), PauseError> {
    match ask_for(&handle.0.dir.control_socket(), request, STAND_STILL).await {
        Ok(ControlReply::State { .. }) => Ok(()),
        Ok(ControlReply::Refused { why }) => Err(PauseError::Vmm { what, why }),
        Ok(other) => Err(PauseError::Vmm { what, why: format!("it answered {other:?}") }),
        Err(error) => match why_silent(handle, error).await {
            SnapshotFailure::Control(error) => Err(PauseError::Vmm { what, why: error.to_string() }),
            gone => Err(gone.into()),
        },
    }
}

async fn restart(
    handle: &Handle,
    hold: Hold,
    media: Media,
    origin: Option<Origin>,
) -> Result<Agent, BootError> {
    let (up, came_up) = oneshot::channel();
    let _ = handle.0.requests.send(Request::Restart { hold, media, origin, up });
    came_up.await.unwrap_or(Err(BootError::Removed))
}

/// Records what was done with the agent.
async fn remember(core: &Core, handle: &Handle, event: Event) -> Result<(), PauseError> {
    handle.record(core, event).await.map_err(|error| {
        let Agent { name, state, .. } = handle.agent();
        PauseError::Unrecorded { name, state, error }
    })
}

async fn forget_record(core: &Core, handle: &Handle) {
    if handle.0.body.is_recorded() {
        handle.0.body.set_recorded(false);
        record::forget(core, handle.id()).await;
    }
}

//! Checkpoints of an agent: taken while it runs, kept as its policy says, gone with it.
//!
//! ```text
//!  owner: one is due ──► Taking: waits for its turn on this host, and for a calm moment ──► live snapshot, durable
//!    ▲                                                                                          │
//!    └── recorded, published; what is more than the policy keeps is let go ◄────────────────────┘
//! ```
//!
//! Each is a diff over what the agent's memory is read from, where it was restored, else a full snapshot; how long a chain gets is
//! bounded by `ark-vmm`, which then writes a full one. They are in `StateDir/checkpoints/<agent id>/`, are not among the snapshots that
//! users named, and what somebody else needs of them stays as long as that. Which there are is what the log says; anything else in that
//! directory was left by an `arkd` that was killed, and goes.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ark_types::agent::{AgentState, Origin};
use ark_types::checkpoint::Checkpoint;
use ark_types::event::Event;
use ark_types::vmm::SnapshotId;
use tokio::task::JoinHandle;

use super::owner::Owner;
use super::start::Life;
use super::{Handle, SnapshotFailure, identity, pause};
use crate::cleanup::make_private_dir;
use crate::core::Core;
use crate::reconcile::Clock;

/// How long a checkpoint waits for a moment without requests; then it is taken all the same.
const CALM_PATIENCE: Duration = Duration::from_secs(5);
/// How often it looks.
const CALM_LOOK: Duration = Duration::from_millis(20);
/// How long one that is under way when the agent's VMM ends may take to come to its end.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What came of a checkpoint that was due.
#[derive(Debug)]
pub(super) enum Outcome {
    /// It is on disk.
    Taken(Checkpoint),
    /// The agent did not run any more.
    Skipped,
    /// It was not taken, for this reason.
    Failed(String),
}

/// A checkpoint that is being taken; dropping it gives it up.
#[derive(Debug)]
pub(super) struct Taking(JoinHandle<Outcome>);

impl Drop for Taking {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What comes of `taking`; waits for ever when there is none. Cancel-safe.
pub(super) async fn taken(taking: &mut Option<Taking>) -> Outcome {
    match taking {
        // One that panicked took none.
        Some(Taking(task)) => task.await.unwrap_or(Outcome::Skipped),
        None => std::future::pending().await,
    }
}

/// Directory of the checkpoints of the agent `id`.
fn home(core: &Core, id: &str) -> PathBuf {
    core.config.state.checkpoints().join(id)
}

async fn take(core: Arc<Core>, handle: Handle, clock: Clock) -> Outcome {
    let mut state = handle.0.state.clone();
    let place = tokio::select! {
        place = core.checkpoints.acquire() => place,
        _ = state.wait_for(|agent| agent.state != AgentState::Running) => return Outcome::Skipped,
    };
    let since = Instant::now();
    let runs = || handle.agent().state == AgentState::Running;
    while core.pool.is_busy() && since.elapsed() < CALM_PATIENCE && runs() {
        tokio::time::sleep(CALM_LOOK).await;
    }
    // Others wait for the place: one that does not answer any more does not keep it.
    let ill = async { drop(state.wait_for(|agent| !agent.health.is_healthy()).await) };
    let work = async {
        let _turn = handle.0.body.turn.lock().await;
        if !runs() {
            return Ok(None);
        }
        let _busy = core.pool.busy();
        core.ledger.ready().map_err(|error| error.to_string())?;
        Ok(Some(snapshot(&core, &handle, clock).await))
    };
    let taken: Result<_, String> = tokio::select! {
        taken = work => taken,
        () = ill => return Outcome::Skipped,
    };
    drop(place);
    let taken = match taken {
        Ok(Some(taken)) => taken,
        Ok(None) => return Outcome::Skipped,
        Err(why) => return Outcome::Failed(why),
    };
    match taken {
        Ok(checkpoint) => Outcome::Taken(checkpoint),
        Err(SnapshotFailure::NotRunning(_) | SnapshotFailure::Gone { .. }) => Outcome::Skipped,
        Err(failure) => Outcome::Failed(failure.to_string()),
    }
}

/// The turn is the caller's.
async fn snapshot(core: &Core, handle: &Handle, clock: Clock) -> Result<Checkpoint, SnapshotFailure> {
    let home = home(core, handle.id());
    make_private_dir(&home).map_err(|source| SnapshotFailure::File { path: home.clone(), source })?;
    let draft = core.snapshots.draft_at(home.join(identity::dice::<8>()));
    let report = pause::take(handle, draft.dir()).await?.report;
    // The VMM began with it when it was asked.
    let taken_unix_ms = clock.now().saturating_sub(report.durable_us / 1000);
    core.snapshots.adopt(draft.dir(), None)?;
    Ok(Checkpoint {
        snapshot: report.id,
        taken_unix_ms,
        pause_us: report.pause_us,
        durable_us: report.durable_us,
        bytes: report.written_bytes,
    })
}

impl Owner {
    /// Begins to take a checkpoint.
    pub(super) fn begin_checkpoint(&mut self) {
        self.healing.saved = Some(Instant::now());
        let (id, _) = self.who();
        let Ok(handle) = self.core.registry.find(&id) else { return };
        let taking = take(Arc::clone(&self.core), handle, self.body.clock());
        self.healing.taking = Some(Taking(tokio::spawn(taking)));
    }

    /// Records and publishes what came of the checkpoint that was due.
    pub(super) async fn note_checkpoint(&mut self, life: &Life, outcome: Outcome) {
        self.healing.taking = None;
        let (id, name) = self.who();
        match outcome {
            Outcome::Skipped => return,
            Outcome::Taken(checkpoint) => {
                let event = Event::AgentCheckpointed { checkpoint: checkpoint.clone() };
                if let Err(error) = self.record(vec![event]).await {
                    tracing::error!(%id, %name, %error, "an agent's checkpoint is not recorded yet");
                }
                self.state.send_modify(|agent| agent.keep_checkpoint(checkpoint));
                self.note(life);
            }
            Outcome::Failed(reason) => {
                tracing::warn!(%id, %name, reason, "no checkpoint of the agent was taken");
                let is_told = self.state.borrow().checkpoint_failure.as_ref() == Some(&reason);
                // What goes on failing for one reason is one event.
                if !is_told {
                    drop(self.record(vec![Event::AgentCheckpointFailed { reason: reason.clone() }]));
                    self.state.send_modify(|agent| agent.checkpoint_failure = Some(reason));
                }
            }
        }
        self.let_checkpoints_go();
    }

    /// The VMM is no more, or is about to be: a checkpoint that was taken before that counts.
    pub(super) async fn end_checkpoint(&mut self, life: &Life) {
        if self.healing.taking.is_some() {
            let last = tokio::time::timeout(LAST_WORDS, taken(&mut self.healing.taking)).await;
            self.note_checkpoint(life, last.unwrap_or(Outcome::Skipped)).await;
        }
    }

    /// Tells that the agent cannot be restored from its checkpoint `id`, which is none of it from here on.
    pub(super) fn tell_unusable(&self, id: SnapshotId, reason: String) {
        let (agent, name) = self.who();
        tracing::warn!(id = agent, %name, checkpoint = %id, reason, "an agent's checkpoint cannot be used");
        drop(self.record(vec![Event::AgentCheckpointUnusable { snapshot: id, reason }]));
        self.state.send_modify(|agent| agent.checkpoints.retain(|known| known.snapshot != id));
    }

    /// Of the checkpoints that an earlier `arkd` left, those that are damaged are told, and those that the agent does not know go.
    pub(super) fn take_over_checkpoints(&self) {
        let known: Vec<SnapshotId> =
            self.state.borrow().checkpoints.iter().map(|checkpoint| checkpoint.snapshot).collect();
        for id in known.into_iter().filter(|id| !self.core.snapshots.has(*id)) {
            self.tell_unusable(id, "its manifest is damaged, or it was removed from disk".to_owned());
        }
        self.let_checkpoints_go();
    }

    /// Lets every checkpoint go that the agent does not have any more.
    pub(super) fn let_checkpoints_go(&self) {
        let agent = self.state.borrow();
        let kept: Vec<SnapshotId> = agent.checkpoints.iter().map(|checkpoint| checkpoint.snapshot).collect();
        self.core.snapshots.keep_only(&home(&self.core, &agent.id), &kept);
    }

    /// The agent went back to a snapshot that a user took: its checkpoints are of what it gave up by that.
    pub(super) fn rewound(&mut self, origin: Origin) {
        self.state.send_modify(|agent| {
            agent.origin = origin;
            agent.checkpoints.clear();
        });
        self.healing.kept.lineage.rewound(self.body.clock().now());
        self.healing.saved = None;
        self.healing.checks = super::check::Checks::new();
        self.let_checkpoints_go();
    }

    /// The agent goes, and its checkpoints with it.
    pub(super) async fn forget_checkpoints(&mut self) {
        if let Some(Taking(task)) = &mut self.healing.taking {
            task.abort();
            let _ = task.await;
        }
        self.healing.taking = None;
        let (id, _) = self.who();
        let dirs = self.core.snapshots.keep_only(&home(&self.core, &id), &[]);
        self.core.snapshots.gone(&dirs).await;
    }
}

/// Removes the checkpoints of agents that are no more. Call it when every agent that still lives is in the registry; one that
/// could not be looked at or taken in has its directory, and keeps what it has.
pub(crate) fn sweep_checkpoints(core: &Core) {
    for dir in fs::read_dir(core.config.state.checkpoints()).into_iter().flatten().flatten() {
        let name = dir.file_name();
        let Some(id) = name.to_str() else { continue };
        let is_on_disk =
            || core.config.run.agent(id).0.exists() || core.config.state.paused().join(id).exists();
        let is_needed = match core.registry.all().iter().find(|handle| handle.id() == id) {
            Some(handle) => !(handle.has_ended() && handle.agent().checkpoints.is_empty()),
            None => is_on_disk(),
        };
        if !is_needed {
            core.snapshots.keep_only(&dir.path(), &[]);
        }
    }
}

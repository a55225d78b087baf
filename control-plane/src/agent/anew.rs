//! An agent begins anew: from the newest of its checkpoints that can be used, or else as what it is made of.
//!
//! ```text
//!  checkpoints, newest first ── proved, restored, every check passed ──► runs: what came after that checkpoint is lost
//!        │ none is left, each that failed is told
//!        ▼
//!  template, else image ──────────────────────────────────────────────► runs: all that it did is lost
//! ```
//!
//! Checkpoints newer than the one that it goes on from are of a life that is no more: they go.

use std::sync::Arc;
use std::time::Instant;

use ark_types::agent::{Agent, AgentName, AgentState, Origin};
use ark_types::checkpoint::Checkpoint;
use ark_types::event::{Event, Outcome};
use ark_types::healing::Continuity;
use ark_types::vmm::{ExitReason, SnapshotId};
use futures_util::future::BoxFuture;
use tokio::sync::oneshot;

use super::body::Base;
use super::heal::{End, Lost};
use super::owner::Owner;
use super::start::Life;
use super::{BootError, birth, is_ended};
use crate::admission::check_host;
use crate::core::Core;
use crate::host::millis;
use crate::media::Media;
use crate::problems::Refusal;
use crate::snapshots::{Hold, SnapshotError};
use crate::templates::{self, Found};

/// Why an agent did not begin anew.
#[derive(Debug, thiserror::Error)]
enum NotAnew {
    /// It did not come up.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// What it is made of, or the host that it needs.
    #[error("what the agent is made of cannot be had: {0}")]
    Source(String),
    /// Its checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] SnapshotError),
}

impl From<Refusal> for NotAnew {
    fn from(Refusal(problem): Refusal) -> Self {
        Self::Source(problem.detail)
    }
}

impl NotAnew {
    /// Whether somebody wants the agent to end, or `arkd` does.
    const fn is_over(&self) -> bool {
        matches!(self, Self::Boot(BootError::Removed | BootError::Ending))
    }

    /// Whether another host, or this one at another time, might well have done it.
    const fn is_of_the_host(&self) -> bool {
        match self {
            Self::Source(_) => true,
            Self::Checkpoint(error) => matches!(
                error,
                SnapshotError::Unproved { .. }
                    | SnapshotError::File { .. }
                    | SnapshotError::Tool { .. }
                    | SnapshotError::Endless { .. }
                    | SnapshotError::DiskFull { .. }
            ),
            Self::Boot(BootError::Ended { record, .. }) => {
                matches!(record.reason, ExitReason::HostError | ExitReason::Killed | ExitReason::Signal)
            }
            Self::Boot(error) => {
                matches!(error, BootError::Directory { .. } | BootError::Spawn(_) | BootError::Unrecorded(_))
            }
        }
    }

    /// Of what the host is to blame for, whether it may be so with one checkpoint and not with the rest.
    const fn may_be_lasting(&self) -> bool {
        match self {
            Self::Source(_) => false,
            Self::Checkpoint(error) => matches!(
                error,
                SnapshotError::Unproved { .. } | SnapshotError::File { .. } | SnapshotError::Endless { .. }
            ),
            Self::Boot(error) => matches!(error, BootError::Ended { .. }),
        }
    }
}

/// What an agent is made of.
enum Source {
    Fork { template: AgentName, hold: Hold, media: Media },
    Boot(Media),
}

/// What an agent began anew as.
enum Begun {
    Checkpoint(Checkpoint),
    Fresh(Origin),
}

impl Owner {
    /// Has the agent begin anew: from the first of the checkpoints `from` that can be used, or else as what it is made of.
    pub(super) async fn begin_anew(&mut self, life: &mut Life, from: &[SnapshotId]) {
        self.since = Instant::now();
        let _busy = self.core.pool.busy();
        self.state.send_modify(|agent| {
            debug_assert!(is_ended(agent.state), "{} is not over", agent.state);
            (agent.state, agent.backoff_until_unix_ms) = (AgentState::Creating, None);
            agent.heartbeat = None;
        });
        self.note(life);
        match self.come_up_anew(life, from).await {
            Ok(begun) => self.tell_continuity(begun).await,
            Err(error) => {
                life.kill().await;
                self.body.set_base(Base::None);
                if self.parting.is_some() {
                    // Whoever goes on with it restarts it then.
                    self.state.send_modify(|agent| {
                        (agent.state, agent.vmm_pid) = (AgentState::Failed, None);
                        agent.backoff_until_unix_ms = Some(self.body.clock().now());
                    });
                } else {
                    let exit = match &error {
                        NotAnew::Boot(BootError::Ended { record, .. }) => Some(record.clone()),
                        NotAnew::Boot(_) | NotAnew::Source(_) | NotAnew::Checkpoint(_) => None,
                    };
                    let reason = error.to_string();
                    let (outcome, is_of_the_host) = (Outcome::Failed, error.is_of_the_host());
                    self.end(End { outcome, reason, exit, ran_ms: None, is_of_the_host }).await;
                }
            }
        }
        self.note(life);
    }

    /// What it began as comes back.
    async fn come_up_anew(&mut self, life: &mut Life, from: &[SnapshotId]) -> Result<Begun, NotAnew> {
        let core = Arc::clone(&self.core);
        self.unless_unwanted(check_host(&core)).await??;
        for id in from {
            let found = self.state.borrow().checkpoints.iter().find(|known| known.snapshot == *id).cloned();
            let Some(checkpoint) = found else { continue };
            match self.restore_checkpoint(life, *id).await {
                Ok(()) => return Ok(Begun::Checkpoint(checkpoint)),
                Err(error) if error.is_over() => return Err(error),
                // What the host lacks is no fault of a checkpoint: it is tried again, though not for ever.
                Err(error) if error.is_of_the_host() => {
                    let lineage = &mut self.healing.kept.lineage;
                    let Some(times) = error.may_be_lasting().then(|| lineage.failed(*id)).flatten() else {
                        return Err(error);
                    };
                    self.tell_unusable(*id, format!("{error}; that was tried {times} times"));
                }
                Err(error) => self.tell_unusable(*id, error.to_string()),
            }
            life.kill().await;
            self.body.set_base(Base::None);
        }
        Ok(Begun::Fresh(self.come_up_fresh(life).await?))
    }

    /// Restores the agent from its checkpoint `id`, with every check that a fork has to pass.
    async fn restore_checkpoint(&mut self, life: &mut Life, id: SnapshotId) -> Result<(), NotAnew> {
        let hold = self.core.snapshots.hold(id)?;
        let core = Arc::clone(&self.core);
        let media = self.unless_unwanted(birth::prove(&core, &hold)).await??;
        self.prepare_fork(&hold, media);
        Ok(self.restore_again(life, &hold).await?)
    }

    async fn come_up_fresh(&mut self, life: &mut Life) -> Result<Origin, NotAnew> {
        let agent = self.state.borrow().clone();
        let source = find_source(Arc::clone(&self.core), agent.clone());
        match self.unless_unwanted(source).await?? {
            Source::Fork { template, hold, media } => {
                self.prepare_fork(&hold, media);
                if !self.become_standby(life, &template, &hold).await? {
                    self.restore_again(life, &hold).await?;
                }
                Ok(agent.origin)
            }
            Source::Boot(media) => {
                self.reserve(true);
                self.use_media(media);
                self.body.set_receipt(None);
                self.body.set_renewals(0);
                // Nobody waits for it but its owner.
                let (mut up, _nobody) = oneshot::channel::<()>();
                self.boot_again(life, &mut up).await?;
                Ok(Origin::Boot)
            }
        }
    }

    fn prepare_fork(&mut self, hold: &Hold, media: Media) {
        self.reserve(false);
        self.use_media(media);
        self.body.set_base(Base::lived_in(hold));
    }

    /// Does `work` unless the agent is to end before it is done.
    pub(super) async fn unless_unwanted<T>(&mut self, work: impl Future<Output = T>) -> Result<T, BootError> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                request = self.requests.recv() => self.unless_removed(request.as_ref())?,
            }
        }
    }

    /// Reserves what the agent needs to be booted, or as a fork. Like one that is adopted it has been promised its place already.
    pub(super) fn reserve(&self, is_booted: bool) {
        let (size, owner) = {
            let agent = self.state.borrow();
            ((agent.vcpus, agent.memory_mib), agent.owner.clone())
        };
        let config = self.core.scheduler.config();
        let needs = if is_booted { config.booted(size) } else { config.forked(size) };
        if self.body.reserved() != Some(needs) {
            self.body.set_grant(Some(self.core.scheduler.claim(&owner, needs, self.body.apart())));
        }
    }

    fn use_media(&mut self, media: Media) {
        let digest = media.image.manifest.digest.clone();
        self.media = Some(media);
        self.state.send_modify(|agent| agent.image_digest = digest);
    }

    /// The agent runs again: what that cost it is recorded and then published.
    async fn tell_continuity(&mut self, begun: Begun) {
        let mut agent = self.state.borrow().clone();
        let (boot_ms, now) = (millis(self.since.elapsed()), self.body.clock().now());
        let kept = &mut self.healing.kept;
        let lost = kept.lost.take();
        let ended_ms = lost.as_ref().map_or(now, |lost| lost.ended_unix_ms);
        let at_ms = match &begun {
            Begun::Checkpoint(checkpoint) => Some(checkpoint.taken_unix_ms),
            Begun::Fresh(_) => None,
        };
        let lost_ms = kept.lineage.lost_ms(ended_ms, at_ms);
        let restored_from = match begun {
            Begun::Checkpoint(Checkpoint { snapshot, taken_unix_ms, .. }) => {
                Origin::Checkpoint { snapshot, taken_unix_ms }
            }
            Begun::Fresh(origin) => {
                agent.origin = origin.clone();
                origin
            }
        };
        let restarts = agent.continuity.as_ref().map_or(0, |before| before.restarts).saturating_add(1);
        let cause = lost.map(|Lost { cause, .. }| cause).unwrap_or_default();
        let continuity = Continuity { restarts, cause, restored_from, lost_ms, at_unix_ms: now };
        let event = Event::AgentRestarted { continuity: continuity.clone(), boot_ms };
        if let Err(error) = self.record(vec![event]).await {
            tracing::error!(id = agent.id, name = %agent.name, %error, "the agent's restart is not recorded yet");
        }
        let from = &continuity.restored_from;
        tracing::info!(id = agent.id, name = %agent.name, restarts, boot_ms, ?from, lost_ms, "the agent runs again");
        continuity.drop_newer(&mut agent.checkpoints);
        let left: Vec<SnapshotId> = agent.checkpoints.iter().map(|checkpoint| checkpoint.snapshot).collect();
        let lineage = &mut self.healing.kept.lineage;
        if left.is_empty() {
            lineage.began_fresh(now);
        } else {
            lineage.restored(&left);
        }
        (agent.state, agent.boot_ms) = (AgentState::Running, Some(boot_ms));
        (agent.reason, agent.exit, agent.continuity) = (None, None, Some(continuity));
        self.healing.begins();
        self.guest.idle.touch();
        self.state.send_replace(agent);
        self.let_checkpoints_go();
    }
}

/// What `agent` is made of: its template, while that is there and of its size, else its image. Boxed, as a template that is built
/// has an owner of its own: this future would contain itself.
fn find_source(core: Arc<Core>, agent: Agent) -> BoxFuture<'static, Result<Source, NotAnew>> {
    Box::pin(async move {
        let name = match &agent.origin {
            Origin::Template { name } => Some(name),
            Origin::Boot | Origin::Snapshot { .. } | Origin::Fork { .. } | Origin::Checkpoint { .. } => None,
        };
        if let Some(name) = name
            && let Some(found) = find_template(&core, &agent, name).await
        {
            return Ok(Source::Fork { template: name.clone(), hold: found.hold, media: found.media });
        }
        let image = core.images.open(&agent.image).await.map_err(Refusal::from)?;
        Ok(Source::Boot(image.into()))
    })
}

/// The template `name`, if it can be had and is of the size of `agent`.
async fn find_template(core: &Arc<Core>, agent: &Agent, name: &AgentName) -> Option<Found> {
    match templates::by_name(core, name).await {
        Ok(found) if (found.template.vcpus, found.template.memory_mib) == (agent.vcpus, agent.memory_mib) => {
            core.templates.used(&found.hold);
            core.pool.asked(name);
            Some(found)
        }
        Ok(_) => {
            tracing::warn!(id = agent.id, template = %name, "the template is of another size by now; the agent is booted");
            None
        }
        Err(error) => {
            tracing::warn!(id = agent.id, template = %name, %error, "the template cannot be had; the agent is booted");
            None
        }
    }
}

//! An agent's owner does what [`crate::reconcile`] decides: it waits and begins the agent anew, ends what hangs, removes what is over.
//!
//! ```text
//!  running ── VMM ended ──► failed or stopped, until … ──► creating ──► running, with its continuity
//!                                 ▲                            │
//!                                 └──── it did not come up ◄───┘
//! ```
//!
//! An agent keeps its id, name, environment, labels, owner, machine-id and what is reserved for it. Its memory and files are
//! those of what it is made of: nothing that it did survives, and nothing claims that it did.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ark_types::agent::{Agent, AgentName, AgentState, Origin};
use ark_types::event::{Event, Outcome};
use ark_types::healing::{AgentHealth, Continuity};
use ark_types::vmm::ExitRecord;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::body::Base;
use super::owner::{Owner, outcome_of};
use super::record::Record;
use super::request::{Parting, Removal};
use super::start::Life;
use super::{BootError, is_ended, sentence};
use crate::admission::check_host;
use crate::core::Core;
use crate::host::{millis, unix_ms};
use crate::images::Image;
use crate::problems::Refusal;
use crate::reconcile::{Action, Clock, Condition, Desired, History, LONGEST_WAIT_MS, Observed, decide};
use crate::snapshots::Hold;
use crate::templates::{self, Found};

/// Time a guest has to end in order when its agent is over.
const GRACE: Duration = Duration::from_secs(2);
/// Longest time between two looks at a running agent.
const LOOK: Duration = Duration::from_secs(1);
/// How often an agent is looked at, at least, before its guest counts as unresponsive.
const LOOKS: u32 = 6;

/// What of an agent's healing outlasts `arkd`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Kept {
    history: History,
    /// What it lost by its end, until that is told with its restart.
    lost: Option<Lost>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Lost {
    cause: String,
    ms: u64,
}

/// What an owner knows of its agent's health.
#[derive(Debug)]
pub(super) struct Healing {
    pub(super) kept: Kept,
    clock: Clock,
    /// How long the guest was not heard while somebody listened.
    silent: Duration,
    /// Up to when that is counted.
    counted: Instant,
    /// When the agent was last looked at.
    looked: Instant,
    /// Why its VMM is being ended, while it is.
    killed: Option<String>,
}

impl Healing {
    pub(super) fn new(kept: Kept) -> Self {
        let (clock, now) = (Clock::new(), Instant::now());
        Self { kept, clock, silent: Duration::ZERO, counted: now, looked: now, killed: None }
    }

    /// The guest said something, or cannot say anything now.
    pub(super) fn heard(&mut self) {
        (self.silent, self.counted) = (Duration::ZERO, Instant::now());
    }

    /// Counts what has passed since the last look, which was due after `look`. An `arkd` that stood still itself could not hear
    /// anything meanwhile, so not much more than that is counted.
    fn count(&mut self, look: Duration) {
        self.silent += self.counted.elapsed().min(look + LOOK);
        self.counted = Instant::now();
    }
}

/// Why an agent did not begin anew.
#[derive(Debug, thiserror::Error)]
enum NotAnew {
    /// It did not come up.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// What it is made of, or the host that it needs.
    #[error("what the agent is made of cannot be had: {0}")]
    Source(String),
}

impl From<Refusal> for NotAnew {
    fn from(Refusal(problem): Refusal) -> Self {
        Self::Source(problem.detail)
    }
}

/// What an agent begins anew as.
enum Source {
    Fork(Hold, Image),
    Boot(Image),
}

/// How an agent's VMM ended, or that it did not come up.
struct End {
    outcome: Outcome,
    reason: String,
    exit: Option<ExitRecord>,
    /// How long the agent ran, milliseconds; none when it did not come up.
    ran_ms: Option<u64>,
}

fn desired(agent: &Agent, is_removal_asked: bool) -> Desired {
    let ms = |seconds: u64| seconds.saturating_mul(1000);
    Desired {
        restart: agent.restart,
        ttl_ms: agent.ttl_s.map(ms),
        idle_timeout_ms: agent.idle_timeout_s.map(ms),
        is_removal_asked,
    }
}

/// How long `agent`, which ran until `now`, did so since it first came up or was last restarted, milliseconds.
fn ran_ms(agent: &Agent, now: u64) -> u64 {
    let first = agent.created_unix_ms.saturating_add(agent.boot_ms.unwrap_or_default());
    now.saturating_sub(agent.continuity.as_ref().map_or(first, |continuity| continuity.at_unix_ms))
}

/// Decides what becomes of `agent`, which ended at `now`: its state and reason, and until when it waits. The events that tell
/// of it come back.
fn end(agent: &mut Agent, kept: &mut Kept, end: End, is_removal_asked: bool, now: u64) -> Vec<Event> {
    let End { outcome, mut reason, exit, ran_ms } = end;
    let condition = Condition::Ended { outcome, ran_ms, history: kept.history.clone() };
    let observed = Observed { created_ms: agent.created_unix_ms, condition };
    let (mut until, mut restarting) = (None, None);
    for action in decide(&desired(agent, is_removal_asked), &observed, now) {
        match action {
            Action::Wait { attempt, after_ms } => {
                kept.history.note(ran_ms, now);
                let cause = reason.clone();
                kept.lost.get_or_insert(Lost { cause: cause.clone(), ms: ran_ms.unwrap_or_default() });
                until = Some(now.saturating_add(after_ms));
                restarting = Some(Event::AgentRestarting { cause, attempt, after_ms });
            }
            Action::Stay { why: Some(why) } => reason = format!("{reason}; {why}"),
            // A limit that is over is looked after once the end is told.
            Action::Stay { why: None }
            | Action::Remove { .. }
            | Action::Restart
            | Action::Unresponsive
            | Action::Recovered
            | Action::Kill { .. } => {}
        }
    }
    (agent.state, agent.reason) = (outcome.into(), Some(reason.clone()));
    agent.exit.clone_from(&exit);
    (agent.vmm_pid, agent.health, agent.backoff_until_unix_ms) = (None, AgentHealth::Healthy, until);
    [Event::AgentEnded { outcome, reason, exit }].into_iter().chain(restarting).collect()
}

impl Record {
    /// Takes note that its agent ended with `exit` while no `arkd` was there, and decides what becomes of it.
    pub(crate) fn ended(&mut self, exit: ExitRecord) {
        let now = unix_ms();
        let end_of = End {
            outcome: outcome_of(&exit),
            reason: sentence(&exit),
            ran_ms: Some(ran_ms(&self.agent, now)),
            exit: Some(exit),
        };
        end(&mut self.agent, &mut self.healing, end_of, false, now);
    }

    /// Has its agent, which an earlier `arkd` was just restarting, wait for that again; whether it was.
    pub(crate) fn wait_again(&mut self) -> bool {
        let is_restarting = self.healing.lost.is_some();
        if is_restarting {
            self.agent.state = AgentState::Failed;
            (self.agent.vmm_pid, self.agent.backoff_until_unix_ms) = (None, Some(unix_ms()));
        }
        is_restarting
    }

    /// Has its agent wait no longer than any does: the host's clock may have been set back since that was decided.
    pub(super) fn bound_wait(&mut self) {
        let latest = unix_ms().saturating_add(LONGEST_WAIT_MS);
        self.agent.backoff_until_unix_ms = self.agent.backoff_until_unix_ms.map(|until| until.min(latest));
    }

    /// The event that its agent waits for a restart, if it does.
    pub(super) fn restarting(&self) -> Option<Event> {
        let after_ms = self.agent.backoff_until_unix_ms?.saturating_sub(unix_ms());
        let cause = self.healing.lost.as_ref()?.cause.clone();
        Some(Event::AgentRestarting { cause, attempt: self.healing.history.streak, after_ms })
    }
}

impl Owner {
    /// How long until the agent is to be looked at again; none when there is nothing to look for.
    pub(super) fn next_look(&self) -> Option<Duration> {
        let agent = self.state.borrow();
        let is_watched = agent.state == AgentState::Running || agent.ttl_s.is_some();
        match agent.backoff_until_unix_ms {
            Some(until) => Some(self.healing.clock.until(until).min(LOOK)),
            None => is_watched.then(|| self.look_every(&agent).saturating_sub(self.healing.looked.elapsed())),
        }
    }

    fn look_every(&self, agent: &Agent) -> Duration {
        let patience = self.core.config.timing.silence;
        let has_limit = agent.ttl_s.is_some() || agent.idle_timeout_s.is_some();
        if agent.health.is_healthy() && !has_limit && self.healing.silent < patience / 2 {
            // Hundreds of agents that are heard need no look; one that falls silent is seen in time even so.
            return patience / 2;
        }
        (patience / LOOKS).min(LOOK)
    }

    /// Does what the agent needs now.
    pub(super) async fn look(&mut self, life: &mut Life) -> Option<Parting> {
        self.healing.looked = Instant::now();
        let now = self.healing.clock.now();
        let (desired, observed) = self.observe();
        for action in decide(&desired, &observed, now) {
            match action {
                Action::Unresponsive => {
                    let since_unix_ms = now.saturating_sub(millis(self.healing.silent));
                    self.tell_health(AgentHealth::Unresponsive { since_unix_ms });
                }
                Action::Recovered => self.tell_health(AgentHealth::Healthy),
                Action::Kill { silent_ms } => {
                    let why = format!("the guest was not heard for {} s", silent_ms.div_ceil(1000));
                    self.healing.killed = Some(why);
                    life.vmm.iter_mut().for_each(crate::supervisor::Vmm::kill);
                }
                Action::Restart => self.begin_anew(life).await,
                Action::Remove { why } => {
                    let (id, name) = self.who();
                    tracing::info!(%id, %name, why, "the agent goes by itself");
                    drop(self.record(vec![Event::AgentExpired { reason: why }]));
                    return Some(Parting::Removal(Removal { grace: GRACE, for_good: true }));
                }
                // Only of an end.
                Action::Wait { .. } | Action::Stay { .. } => {}
            }
        }
        None
    }

    fn observe(&mut self) -> (Desired, Observed) {
        let agent = self.state.borrow().clone();
        let look = self.look_every(&agent);
        // Whoever pauses it or takes its snapshot may have it stand still for a moment, but not for as long as they wait for that.
        let is_worked_on = self.body.turn.try_lock().is_err();
        let patience = self.core.config.timing.silence * if is_worked_on { 2 } else { 1 };
        if agent.state == AgentState::Running {
            self.healing.count(look);
        } else {
            self.healing.heard();
        }
        let condition = match agent.state {
            AgentState::Creating => Condition::ComingUp,
            AgentState::Running if self.healing.killed.is_some() => Condition::Ending,
            AgentState::Running => Condition::Running {
                silent_ms: millis(self.healing.silent),
                patience_ms: millis(patience),
                is_told: !agent.health.is_healthy(),
                unused_ms: millis(self.guest.idle.unused_for()),
            },
            AgentState::Paused => Condition::Paused,
            AgentState::Stopping => Condition::Ending,
            AgentState::Stopped | AgentState::Failed => match agent.backoff_until_unix_ms {
                Some(until_ms) => Condition::Waiting { until_ms },
                None => Condition::Over,
            },
        };
        let observed = Observed { created_ms: agent.created_unix_ms, condition };
        (desired(&agent, self.parting.is_some()), observed)
    }

    fn tell_health(&self, health: AgentHealth) {
        let (id, name) = self.who();
        tracing::warn!(%id, %name, ?health, "the guest's health changed");
        self.state.send_modify(|agent| agent.health = health);
    }

    /// The VMM ended by itself, or because its guest hung. A paused agent that is on disk outlasts it.
    pub(super) async fn lose_vmm(&mut self, record: ExitRecord) {
        self.core.telemetry.vmm_ended(record.reason);
        let unheard = self.healing.killed.take();
        let is_paused = self.state.borrow().state == AgentState::Paused;
        if is_paused && self.body.is_recorded() {
            tracing::warn!(
                reason = sentence(&record),
                "the VMM of a paused agent ended; its memory is on disk"
            );
            self.body.set_grant(None);
            self.state.send_modify(|agent| agent.vmm_pid = None);
            return;
        }
        let outcome = if is_paused || unheard.is_some() { Outcome::Failed } else { outcome_of(&record) };
        let ran_ms = ran_ms(&self.state.borrow(), self.healing.clock.now());
        let reason = unheard.unwrap_or_else(|| sentence(&record));
        self.end(End { outcome, reason, exit: Some(record), ran_ms: Some(ran_ms) }).await;
    }

    /// The agent ended, or did not come up again: that is recorded, with what becomes of it, and then published.
    async fn end(&mut self, how: End) {
        let (now, is_removal_asked) = (self.healing.clock.now(), self.parting.is_some());
        let mut agent = self.state.borrow().clone();
        debug_assert!(agent.state.may_become(how.outcome.into()), "{} ended", agent.state);
        let events = end(&mut agent, &mut self.healing.kept, how, is_removal_asked, now);
        let (reason, until) = (agent.reason.clone().unwrap_or_default(), agent.backoff_until_unix_ms);
        tracing::warn!(id = agent.id, name = %agent.name, state = %agent.state, reason, will_restart = until.is_some(), "the agent ended");
        if let Err(error) = self.record(events).await {
            tracing::error!(id = agent.id, name = %agent.name, %error, "the agent's end is not recorded yet");
        }
        self.keep_console(&reason);
        // Its memory is no more, and with it the need for what that was read from.
        self.body.set_base(Base::None);
        if until.is_none() {
            self.body.set_grant(None);
        }
        self.state.send_replace(agent);
    }

    /// Has the agent begin anew as what it is made of.
    async fn begin_anew(&mut self, life: &mut Life) {
        self.since = Instant::now();
        self.state.send_modify(|agent| {
            debug_assert!(is_ended(agent.state), "{} is not over", agent.state);
            (agent.state, agent.backoff_until_unix_ms) = (AgentState::Creating, None);
            agent.heartbeat = None;
        });
        self.note(life);
        match self.come_up_anew(life).await {
            Ok(origin) => self.tell_continuity(origin).await,
            Err(error) => {
                life.kill().await;
                self.body.set_base(Base::None);
                if self.parting.is_some() {
                    // Whoever goes on with it restarts it then.
                    self.state.send_modify(|agent| {
                        (agent.state, agent.vmm_pid) = (AgentState::Failed, None);
                        agent.backoff_until_unix_ms = Some(self.healing.clock.now());
                    });
                } else {
                    let exit = match &error {
                        NotAnew::Boot(BootError::Ended { record, .. }) => Some(record.clone()),
                        NotAnew::Boot(_) | NotAnew::Source(_) => None,
                    };
                    let reason = error.to_string();
                    self.end(End { outcome: Outcome::Failed, reason, exit, ran_ms: None }).await;
                }
            }
        }
        self.note(life);
    }

    /// What it began as comes back.
    async fn come_up_anew(&mut self, life: &mut Life) -> Result<Origin, NotAnew> {
        let agent = self.state.borrow().clone();
        let mut finding = find_source(Arc::clone(&self.core), agent.clone());
        let source = loop {
            tokio::select! {
                source = &mut finding => break source?,
                request = self.requests.recv() => self.unless_removed(request.as_ref())?,
            }
        };
        let (size, config) = ((agent.vcpus, agent.memory_mib), self.core.scheduler.config());
        let (needs, origin) = match &source {
            Source::Fork(..) => (config.forked(size), agent.origin),
            Source::Boot(_) => (config.booted(size), Origin::Boot),
        };
        if self.body.reserved() != Some(needs) {
            // Like one that is adopted it has been promised its place already.
            self.body.set_grant(Some(self.core.scheduler.claim(&agent.owner, needs)));
        }
        match source {
            Source::Fork(hold, image) => {
                self.use_image(image);
                self.body.set_base(Base::lived_in(&hold));
                self.restore_again(life, &hold).await?;
            }
            Source::Boot(image) => {
                self.use_image(image);
                self.body.set_receipt(None);
                self.body.set_renewals(0);
                // Nobody waits for it but its owner.
                let (mut up, _nobody) = oneshot::channel::<()>();
                self.boot_again(life, &mut up).await?;
            }
        }
        Ok(origin)
    }

    fn use_image(&mut self, image: Image) {
        self.disk = Some(image.path);
        let digest = image.manifest.digest;
        self.state.send_modify(|agent| agent.image_digest = digest);
    }

    /// The agent runs again: what that cost it is recorded and then published.
    async fn tell_continuity(&mut self, origin: Origin) {
        let mut agent = self.state.borrow().clone();
        let boot_ms = millis(self.since.elapsed());
        let Lost { cause, ms } =
            self.healing.kept.lost.take().unwrap_or_else(|| Lost { cause: String::new(), ms: 0 });
        let restarts = agent.continuity.as_ref().map_or(0, |before| before.restarts).saturating_add(1);
        let continuity = Continuity {
            restarts,
            cause,
            restored_from: origin.clone(),
            lost_ms: ms,
            at_unix_ms: self.healing.clock.now(),
        };
        let event = Event::AgentRestarted { continuity: continuity.clone(), boot_ms };
        if let Err(error) = self.record(vec![event]).await {
            tracing::error!(id = agent.id, name = %agent.name, %error, "the agent's restart is not recorded yet");
        }
        tracing::info!(id = agent.id, name = %agent.name, restarts, boot_ms, "the agent runs again");
        (agent.state, agent.origin, agent.boot_ms) = (AgentState::Running, origin, Some(boot_ms));
        (agent.reason, agent.exit, agent.continuity) = (None, None, Some(continuity));
        self.healing.heard();
        self.guest.idle.touch();
        self.state.send_replace(agent);
    }
}

/// Waits for `time`; for ever when there is none.
pub(super) async fn after(time: Option<Duration>) {
    match time {
        Some(time) => tokio::time::sleep(time).await,
        None => std::future::pending().await,
    }
}

/// What `agent` is made of: its template, while that is there and of its size, else its image. Boxed, as a template that is built
/// has an owner of its own: this future would contain itself.
fn find_source(core: Arc<Core>, agent: Agent) -> BoxFuture<'static, Result<Source, NotAnew>> {
    Box::pin(async move {
        check_host(&core).await?;
        let name = match &agent.origin {
            Origin::Template { name } => Some(name),
            Origin::Boot | Origin::Snapshot { .. } | Origin::Fork { .. } => None,
        };
        if let Some(name) = name
            && let Some(found) = find_template(&core, &agent, name).await
        {
            return Ok(Source::Fork(found.hold, found.image));
        }
        let image = core.images.open(&agent.image).await.map_err(Refusal::from)?;
        Ok(Source::Boot(image))
    })
}

/// The template `name`, if it can be had and is of the size of `agent`.
async fn find_template(core: &Arc<Core>, agent: &Agent, name: &AgentName) -> Option<Found> {
    match templates::by_name(core, name).await {
        Ok(found) if (found.template.vcpus, found.template.memory_mib) == (agent.vcpus, agent.memory_mib) => {
            core.templates.used(&found.hold);
            core.pool.used(name);
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

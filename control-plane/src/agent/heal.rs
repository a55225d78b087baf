//! An agent's owner does what [`crate::reconcile`] decides: it takes checkpoints, begins the agent anew, ends what hangs, removes
//! what is over.
//!
//! ```text
//!  running ── VMM ended ──► failed or stopped, until … ──► creating ──► running, with its continuity
//!                                 ▲                            │
//!                                 └──── it did not come up ◄───┘
//! ```
//!
//! An agent keeps its id, name, environment, labels, owner, machine-id and what is reserved for it. Its memory and files are
//! those of its newest checkpoint, or else of what it is made of: see [`super::anew`]. Nothing claims more than that.

use std::time::{Duration, Instant};

use ark_types::agent::{Agent, AgentState};
use ark_types::event::{Event, Outcome};
use ark_types::healing::AgentHealth;
use ark_types::vmm::ExitRecord;
use serde::{Deserialize, Serialize};

use super::body::Base;
use super::check::Checks;
use super::checkpoint::Taking;
use super::owner::{Owner, outcome_of};
use super::record::Record;
use super::request::{Parting, Removal};
use super::sentence;
use super::start::Life;
use crate::host::{millis, unix_ms};
use crate::reconcile::{
    Action, Check, Clock, Condition, Desired, Health, History, LONGEST_WAIT_MS, Lineage, Observed, Running,
    decide,
};

/// Time a guest has to end in order when its agent is over.
const GRACE: Duration = Duration::from_secs(2);
/// Longest time between two looks at a running agent.
const LOOK: Duration = Duration::from_secs(1);
/// How often an agent is looked at, at least, before its guest counts as unresponsive.
const LOOKS: u32 = 6;

/// What of an agent's healing outlasts `arkd`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Kept {
    pub(super) history: History,
    /// What its state goes back to.
    #[serde(default)]
    pub(super) lineage: Lineage,
    /// Its end, until what that cost is told with its restart.
    pub(super) lost: Option<Lost>,
}

/// The end of an agent that begins anew.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Lost {
    pub(super) cause: String,
    /// When that was seen.
    #[serde(default = "unix_ms")]
    pub(super) ended_unix_ms: u64,
}

/// What an owner knows of its agent's health.
#[derive(Debug)]
pub(super) struct Healing {
    pub(super) kept: Kept,
    /// How long the guest was not heard while somebody listened.
    silent: Duration,
    /// Whether an earlier `arkd` missed the guest, and this one did not hear it yet.
    pub(super) is_unheard: bool,
    /// Up to when that is counted.
    counted: Instant,
    /// When the agent was last looked at; none when it is to be at once.
    looked: Option<Instant>,
    /// Why its VMM is being ended, while it is.
    pub(super) killed: Option<String>,
    /// The checkpoint that is being taken.
    pub(super) taking: Option<Taking>,
    /// When the last one was begun, or the agent came up; none when one is due at once.
    pub(super) saved: Option<Instant>,
    /// Its own health checks.
    pub(super) checks: Checks,
}

impl Kept {
    /// Whether a checkpoint of that time may be gone back to.
    pub(super) fn is_of_this_life(&self, taken_unix_ms: u64) -> bool {
        self.lineage.is_of_this_life(taken_unix_ms)
    }
}

impl Healing {
    pub(super) fn new(kept: Kept) -> Self {
        let now = Instant::now();
        let (silent, is_unheard, killed, taking) = (Duration::ZERO, false, None, None);
        let (counted, looked, saved, checks) = (now, Some(now), Some(now), Checks::new());
        Self { kept, silent, is_unheard, counted, looked, killed, taking, saved, checks }
    }

    /// Of an agent that an earlier `arkd` left: what has passed since its last checkpoint counts.
    pub(super) fn taken_up(kept: Kept, agent: &Agent, clock: Clock) -> Self {
        let now = clock.now();
        let taken = agent.checkpoints.last().map(|checkpoint| now.saturating_sub(checkpoint.taken_unix_ms));
        let unsaved = Duration::from_millis(taken.unwrap_or(u64::MAX).min(ran_ms(agent, now)));
        let new = Self::new(kept);
        // One that is due at once where the host was not up as long.
        Self { saved: Instant::now().checked_sub(unsaved), ..new }
    }

    /// Has the agent be looked at at once.
    pub(super) fn look_soon(&mut self) {
        self.looked = None;
    }

    /// The agent runs again.
    pub(super) fn begins(&mut self) {
        self.heard();
        self.saved = Some(Instant::now());
        self.checks = Checks::new();
    }

    /// The guest said something, or cannot say anything now.
    pub(super) fn heard(&mut self) {
        (self.silent, self.is_unheard, self.counted) = (Duration::ZERO, false, Instant::now());
    }

    /// How long ago a checkpoint was last begun, milliseconds; none while one is being taken.
    fn unsaved_ms(&self) -> Option<u64> {
        let since = self.saved.map_or(u64::MAX, |saved| millis(saved.elapsed()));
        self.taking.is_none().then_some(since)
    }

    /// Counts what has passed since the last look, which was due after `look`. An `arkd` that stood still itself could not hear
    /// anything meanwhile, so not much more than that is counted.
    /// What it is by then comes back.
    pub(super) fn count(&mut self, look: Duration) -> Duration {
        self.silent += self.counted.elapsed().min(look + LOOK);
        self.counted = Instant::now();
        self.silent
    }
}

/// How an agent's VMM ended, or that it did not come up.
pub(super) struct End {
    pub(super) outcome: Outcome,
    pub(super) reason: String,
    pub(super) exit: Option<ExitRecord>,
    /// How long the agent ran, milliseconds; none when it did not come up.
    pub(super) ran_ms: Option<u64>,
    /// Whether it did not come up because of the host.
    pub(super) is_of_the_host: bool,
}

/// `second` is what a checkpoint policy's seconds are.
fn desired(agent: &Agent, second: Duration, is_removal_asked: bool) -> Desired {
    let ms = |seconds: u64| seconds.saturating_mul(1000);
    Desired {
        restart: agent.restart,
        ttl_ms: agent.ttl_s.map(ms),
        idle_timeout_ms: agent.idle_timeout_s.map(ms),
        check: agent
            .health_check
            .as_ref()
            .map(|how| Check { interval_ms: ms(how.interval_s.into()), failures: how.failures }),
        checkpoint_ms: agent.checkpoint.map(|policy| millis(second * policy.every_s)),
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
    let End { outcome, mut reason, exit, ran_ms, is_of_the_host } = end;
    let condition = Condition::Ended { outcome, ran_ms, is_of_the_host, history: kept.history.clone() };
    let observed = Observed { created_ms: agent.created_unix_ms, condition };
    let (mut until, mut restarting) = (None, None);
    // No checkpoint is taken of it now.
    for action in decide(&desired(agent, Duration::ZERO, is_removal_asked), &observed, now) {
        match action {
            Action::Wait { attempt, after_ms } => {
                if is_of_the_host {
                    kept.history.note_fault();
                } else {
                    kept.history.note(ran_ms, now);
                    kept.lineage.ended(ran_ms, now);
                }
                let cause = reason.clone();
                kept.lost.get_or_insert(Lost { cause: cause.clone(), ended_unix_ms: now });
                until = Some(now.saturating_add(after_ms));
                restarting = Some(Event::AgentRestarting { cause, attempt, after_ms });
            }
            Action::Stay { why: Some(why) } => reason = format!("{reason}; {why}"),
            // A limit that is over is looked after once the end is told.
            Action::Stay { why: None }
            | Action::Remove { .. }
            | Action::Restart { .. }
            | Action::Checkpoint
            | Action::Check
            | Action::Tell(_)
            | Action::Kill { .. } => {}
        }
    }
    (agent.state, agent.reason) = (outcome.into(), Some(reason.clone()));
    agent.exit.clone_from(&exit);
    (agent.vmm_pid, agent.health, agent.backoff_until_unix_ms) = (None, AgentHealth::Healthy, until);
    [Event::AgentEnded { outcome, reason, exit }].into_iter().chain(restarting).collect()
}

impl Record {
    /// The clock that its agent's times are on.
    pub(super) fn clock(&self) -> Clock {
        Clock::taken_up(self.clock.as_ref())
    }

    /// Takes note that its agent ended with `exit` while no `arkd` was there, and decides what becomes of it.
    pub(crate) fn ended(&mut self, exit: ExitRecord) {
        let clock = self.clock();
        let (now, ended) = (clock.now(), clock.at(exit.at_unix_ms));
        let end_of = End {
            outcome: outcome_of(&exit),
            reason: sentence(&exit),
            ran_ms: Some(ran_ms(&self.agent, ended)),
            exit: Some(exit),
            is_of_the_host: false,
        };
        end(&mut self.agent, &mut self.healing, end_of, false, now);
    }

    /// Has its agent, which an earlier `arkd` was just restarting, wait for that again; whether it was.
    pub(crate) fn wait_again(&mut self) -> bool {
        let is_restarting = self.healing.lost.is_some();
        if is_restarting {
            self.agent.state = AgentState::Failed;
            (self.agent.vmm_pid, self.agent.backoff_until_unix_ms) = (None, Some(self.clock().now()));
        }
        is_restarting
    }

    /// Has its agent wait no longer than any does: the host's clock may have been set back since that was decided.
    pub(super) fn bound_wait(&mut self) {
        let latest = self.clock().now().saturating_add(LONGEST_WAIT_MS);
        self.agent.backoff_until_unix_ms = self.agent.backoff_until_unix_ms.map(|until| until.min(latest));
    }

    /// The event that its agent waits for a restart, if it does.
    pub(super) fn restarting(&self) -> Option<Event> {
        let after_ms = self.agent.backoff_until_unix_ms?.saturating_sub(self.clock().now());
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
            Some(until) => Some(self.body.clock().until(until).min(LOOK)),
            None => is_watched.then(|| self.look_in(&agent)),
        }
    }

    fn look_in(&self, agent: &Agent) -> Duration {
        let looked = self.healing.looked;
        looked.map_or(Duration::ZERO, |looked| self.look_every(agent).saturating_sub(looked.elapsed()))
    }

    fn look_every(&self, agent: &Agent) -> Duration {
        let patience = self.core.config.timing.silence;
        let is_plain = agent.ttl_s.is_none()
            && agent.idle_timeout_s.is_none()
            && agent.checkpoint.is_none()
            && agent.health_check.is_none();
        if agent.health.is_healthy() && is_plain && self.healing.silent < patience / 2 {
            // Hundreds of agents that are heard need no look; one that falls silent is seen in time even so.
            return patience / 2;
        }
        (patience / LOOKS).min(LOOK)
    }

    /// Does what the agent needs now.
    pub(super) async fn look(&mut self, life: &mut Life) -> Option<Parting> {
        self.healing.looked = Some(Instant::now());
        let now = self.body.clock().now();
        let (desired, observed) = self.observe();
        for action in decide(&desired, &observed, now) {
            match action {
                Action::Tell(health) => self.tell_health(health, now),
                Action::Check => self.begin_check(),
                Action::Kill { health } => {
                    self.healing.killed = Some(self.what_is_wrong(health));
                    life.vmm.iter_mut().for_each(crate::supervisor::Vmm::kill);
                }
                Action::Restart { from } => {
                    self.begin_anew(life, &from).await;
                }
                Action::Checkpoint => self.begin_checkpoint(),
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
        // A checkpoint has it stand still for milliseconds only.
        let is_worked_on = self.healing.taking.is_none() && self.body.turn.try_lock().is_err();
        let patience = self.core.config.timing.silence * if is_worked_on { 2 } else { 1 };
        let is_frozen = self.guest.idle.freezer.is_frozen();
        if agent.state == AgentState::Running && !is_frozen {
            let _ = self.healing.count(look);
        } else {
            self.healing.heard();
        }
        let condition = match agent.state {
            AgentState::Creating => Condition::ComingUp,
            AgentState::Running if self.healing.killed.is_some() => Condition::Ending,
            AgentState::Running if is_frozen => Condition::Paused,
            AgentState::Running => Condition::Running(Running {
                silent_ms: millis(self.healing.silent),
                patience_ms: millis(patience),
                is_unheard: self.healing.is_unheard,
                told: match agent.health {
                    AgentHealth::Healthy => Health::Well,
                    AgentHealth::Unresponsive { .. } => Health::Silent,
                    AgentHealth::Unhealthy { .. } => Health::Failing,
                },
                unused_ms: millis(self.guest.idle.unused_for()),
                unsaved_ms: self.healing.unsaved_ms(),
                checked: self.healing.checks.checked(),
            }),
            AgentState::Paused => Condition::Paused,
            AgentState::Stopping => Condition::Ending,
            AgentState::Stopped | AgentState::Failed => match agent.backoff_until_unix_ms {
                Some(until_ms) => Condition::Waiting {
                    until_ms,
                    checkpoints: agent.checkpoints.iter().map(|checkpoint| checkpoint.snapshot).collect(),
                    lineage: self.healing.kept.lineage.clone(),
                },
                None => Condition::Over,
            },
        };
        let observed = Observed { created_ms: agent.created_unix_ms, condition };
        let second = self.core.config.timing.checkpoint_second;
        (desired(&agent, second, self.parting.is_some()), observed)
    }

    fn tell_health(&self, health: Health, now: u64) {
        let (id, name) = self.who();
        let health = match health {
            Health::Well => AgentHealth::Healthy,
            Health::Silent => {
                AgentHealth::Unresponsive { since_unix_ms: now.saturating_sub(millis(self.healing.silent)) }
            }
            Health::Failing => {
                AgentHealth::Unhealthy { since_unix_ms: now, why: self.healing.checks.why().to_owned() }
            }
        };
        tracing::warn!(%id, %name, ?health, "the agent's health changed");
        drop(self.record(vec![Event::AgentHealthChanged { health: health.clone() }]));
        self.state.send_modify(|agent| agent.health = health);
    }

    /// Why an agent with this health is ended, as a sentence.
    fn what_is_wrong(&self, health: Health) -> String {
        match health {
            Health::Well | Health::Silent => {
                format!("the guest was not heard for {} s", millis(self.healing.silent).div_ceil(1000))
            }
            Health::Failing => format!("its health check failed: {}", self.healing.checks.why()),
        }
    }

    /// The VMM ended by itself, or because its guest hung. A paused agent that is on disk outlasts it.
    pub(super) async fn lose_vmm(&mut self, record: ExitRecord) {
        self.core.telemetry.vmm_ended(record.reason);
        self.healing.checks.interrupt();
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
        let mut ran_ms = ran_ms(&self.state.borrow(), self.body.clock().now());
        if unheard.is_some() {
            // While it hung it did not run.
            ran_ms = ran_ms.saturating_sub(millis(self.healing.silent));
        }
        let reason = unheard.unwrap_or_else(|| sentence(&record));
        let (exit, ran_ms, is_of_the_host) = (Some(record), Some(ran_ms), false);
        self.end(End { outcome, reason, exit, ran_ms, is_of_the_host }).await;
    }

    /// The agent ended, or did not come up again: that is recorded, with what becomes of it, and then published.
    pub(super) async fn end(&mut self, how: End) {
        let (now, is_removal_asked) = (self.body.clock().now(), self.parting.is_some());
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
}

/// Waits for `time`; for ever when there is none.
pub(super) async fn after(time: Option<Duration>) {
    match time {
        Some(time) => tokio::time::sleep(time).await,
        None => std::future::pending().await,
    }
}

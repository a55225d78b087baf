//! What is known of one service now.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ark_types::agent::{Agent, AgentName, AgentState, CreateAgent};
use ark_types::label::InvalidLabel;
use ark_types::scheduling::Spread;
use ark_types::service::{GENERATION_LABEL, ReplicaFailure, ReplicaState, ServiceSpec};

use super::ServiceError;
use super::attempts::Attempts;
use super::environment::Environment;
use super::keeper::{Ended, Keeper, Standing};
use super::reconcile::{Action, Desired, Making, Member, reconcile};
use super::replica_labels;
use crate::agent::Handle;
use crate::core::Core;
use crate::host::unix_ms;
use crate::problems::Refusal;
use crate::projection::WantedService;

/// How long a replica has to be ready until it is relied on.
const PROOF: Duration = Duration::from_secs(1);
/// How long a drained replica may finish what is under way where nobody says.
pub(crate) const DRAIN_GRACE: Duration = Duration::from_secs(30);
/// How long a replica that was just found may take to say whether it serves until something is decided without it.
const FIRST_LOOK: Duration = Duration::from_secs(10);
/// Time that a replica's guest has to end in order.
const END_GRACE: Duration = Duration::from_secs(2);

/// What a service is to be, with its secrets.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) service: WantedService,
    /// The values of its environment, or why they are not known.
    pub(super) env: Result<Environment, String>,
}

impl Wanted {
    pub(super) const fn generation(&self) -> u64 {
        self.service.generation
    }
}

/// The request for one more replica, a name for it included, of a service that is to be as `spec` says.
///
/// # Errors
/// Too many labels.
pub(super) fn request(
    spec: &ServiceSpec,
    env: Environment,
    generation: u64,
) -> Result<CreateAgent, InvalidLabel> {
    Ok(CreateAgent {
        // Always a name: that of the service, which is short enough, a dash and hexadecimal digits.
        name: format!("{}-{:08x}", spec.name, rand::random::<u32>()).parse().ok(),
        image: spec.image.clone(),
        template: spec.template.clone(),
        cold: false,
        vcpus: spec.vcpus,
        memory_mib: spec.memory_mib,
        env,
        auto_remove: false,
        labels: replica_labels(spec, generation)?,
        owner: spec.owner.clone(),
        allow: spec.allow.clone(),
        // A replica is there for calls.
        freeze_on_inference: false,
        priority: 0,
        queue_timeout_ms: None,
        // Where there are several hosts, one that fails does not take the service with it.
        anti_affinity: Some(spec.name.clone()),
        spread: Spread::Soft,
        restart: spec.restart,
        ttl_s: None,
        idle_timeout_s: None,
        checkpoint: None,
        health_check: spec.health_check.clone(),
    })
}

/// What came of calls.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Calls {
    pub(super) ok: u64,
    pub(super) failed: u64,
    pub(super) unready: u64,
    pub(super) abandoned: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Entry {
    /// None once it is removed; it is known until its last replica is gone.
    pub(super) wanted: Option<Wanted>,
    /// Replicas by the ids of their agents.
    pub(super) replicas: BTreeMap<String, Replica>,
    /// Names of those that are made.
    pub(super) spawning: BTreeSet<AgentName>,
    pub(super) attempts: Attempts,
    pub(super) calls: Calls,
    /// Calls picked so far.
    pub(super) turn: u64,
    /// How long replicas that are drained for an update, or with the service, may finish what is under way.
    pub(super) grace: Duration,
    /// The last replica whose command ended, and what that wrote last.
    pub(super) last_failure: Option<(ReplicaFailure, Arc<Ended>)>,
}

/// A replica, as far as its agent does not know it.
#[derive(Debug)]
pub(super) struct Replica {
    pub(super) handle: Handle,
    pub(super) generation: u64,
    /// Calls under way.
    pub(super) load: u32,
    /// It takes no new calls, and goes then at the latest.
    pub(super) drained_until: Option<Instant>,
    /// Its removal was asked for.
    is_going: bool,
    ready_since: Option<Instant>,
    /// Whether it was taken note of that it proved itself.
    is_proved: bool,
    /// Whether it was taken note of that it ended.
    is_over: bool,
    /// Sees to its command and its first checks, if it has any.
    keeper: Option<Keeper>,
    /// When it was found.
    found: Instant,
}

/// What is to be done outside the table.
#[derive(Debug)]
pub(super) enum Order {
    /// Make an agent.
    Make { request: Box<CreateAgent>, generation: u64 },
    /// Remove an agent, with this grace.
    Remove(Handle, Duration),
}

impl Replica {
    fn new(handle: Handle, generation: u64, keeper: Option<Keeper>) -> Self {
        Self {
            handle,
            generation,
            load: 0,
            drained_until: None,
            is_going: false,
            ready_since: None,
            is_proved: false,
            is_over: false,
            keeper,
            found: Instant::now(),
        }
    }

    /// Whether it was found a moment ago and is not known to serve or not to: to an `arkd` that has just started, all that there
    /// are look as if none served, and none may go for that.
    fn is_new(&self, now: Instant) -> bool {
        now.duration_since(self.found) < FIRST_LOOK
            && matches!(self.standing(), Standing::Unknown)
            && self.handle.look(|agent| agent.state == AgentState::Running)
    }

    fn standing(&self) -> Standing {
        self.keeper.as_ref().map_or(Standing::Serves, Keeper::standing)
    }

    /// What it waits for to be ready, or how its command ended.
    pub(super) fn reason(&self) -> Option<String> {
        match self.standing() {
            Standing::Awaited(why) => Some(why),
            Standing::Unknown | Standing::Serves => None,
            Standing::Ended(ended) => Some(ended.reason.clone()),
        }
    }

    pub(super) fn state(&self) -> ReplicaState {
        self.handle.look(|agent| self.state_of(agent))
    }

    pub(super) fn state_of(&self, agent: &Agent) -> ReplicaState {
        let standing = self.standing();
        match agent.state {
            AgentState::Stopping => ReplicaState::Ended,
            AgentState::Stopped | AgentState::Failed if agent.backoff_until_unix_ms.is_none() => {
                ReplicaState::Ended
            }
            _ if matches!(standing, Standing::Ended(_)) => ReplicaState::Ended,
            _ if self.drained_until.is_some() => ReplicaState::Draining,
            AgentState::Creating | AgentState::Stopped | AgentState::Failed => ReplicaState::Starting,
            AgentState::Paused => ReplicaState::Unready,
            AgentState::Running if !agent.health.is_healthy() => ReplicaState::Unready,
            AgentState::Running if !matches!(standing, Standing::Serves) => ReplicaState::Starting,
            AgentState::Running => ReplicaState::Ready,
        }
    }

    /// Looks at it, at `now`.
    fn observe(&mut self, id: &str, generation: Option<u64>, now: Instant) -> Member {
        let state = self.state();
        if state != ReplicaState::Ready {
            self.ready_since = None;
        }
        let since = (state == ReplicaState::Ready).then(|| *self.ready_since.get_or_insert(now));
        let is_over = self.drained_until.is_some_and(|until| self.load == 0 || now >= until);
        Member {
            id: id.to_owned(),
            is_current: generation == Some(self.generation),
            state,
            is_proved: since.is_some_and(|since| now.duration_since(since) >= PROOF),
            load: self.load,
            is_drained: is_over,
            is_going: self.is_going || self.handle.look(|agent| agent.state == AgentState::Stopping),
        }
    }
}

impl Entry {
    pub(super) fn new(wanted: Option<Wanted>) -> Self {
        Self {
            wanted,
            replicas: BTreeMap::new(),
            spawning: BTreeSet::new(),
            attempts: Attempts::default(),
            calls: Calls::default(),
            turn: 0,
            grace: DRAIN_GRACE,
            last_failure: None,
        }
    }

    pub(super) fn generation(&self) -> Option<u64> {
        self.wanted.as_ref().map(Wanted::generation)
    }

    /// Takes in the agents that bear its label, which are all there are of it. Those that are still made are not known before
    /// whoever makes them says so.
    pub(super) fn take_in(&mut self, core: &Arc<Core>, handles: Vec<Handle>) {
        let found: BTreeMap<String, Handle> = handles
            .into_iter()
            .filter(|handle| !self.spawning.contains(handle.name()))
            .map(|handle| (handle.id().to_owned(), handle))
            .collect();
        self.replicas.retain(|id, _| found.contains_key(id));
        for (id, handle) in found {
            let generation =
                || handle.look(|agent| agent.labels.get(GENERATION_LABEL).and_then(|text| text.parse().ok()));
            let generation = generation().unwrap_or_default();
            let wanted = self.wanted.as_ref().filter(|wanted| wanted.generation() == generation);
            self.replicas.entry(id).or_insert_with(|| {
                let keeper = Keeper::of(core, &handle, wanted);
                Replica::new(handle, generation, keeper)
            });
        }
    }

    /// Whether nothing is left of it.
    pub(super) fn is_over(&self) -> bool {
        self.wanted.is_none() && self.replicas.is_empty() && self.spawning.is_empty()
    }

    /// Whether no more replicas are made: its last generation failed while there are replicas before it, or its command ends
    /// again and again.
    pub(super) fn is_stopped(&self) -> bool {
        self.is_update_stopped() || self.is_loop_stopped()
    }

    /// Whether its last generation failed while there are replicas before it.
    pub(super) fn is_update_stopped(&self) -> bool {
        let generation = self.generation();
        self.attempts.is_hopeless()
            && self.replicas.values().any(|replica| Some(replica.generation) != generation)
    }

    fn is_loop_stopped(&self) -> bool {
        self.wanted.as_ref().is_some_and(|wanted| self.attempts.is_loop(&wanted.service.spec))
    }

    /// Looks at its replicas and decides what is to be done at `now`. What concerns only the table is done.
    pub(super) fn attend(&mut self, now: Instant) -> Vec<Order> {
        let generation = self.generation();
        let members: Vec<Member> =
            self.replicas.iter_mut().map(|(id, replica)| replica.observe(id, generation, now)).collect();
        self.judge(&members, now);
        if self.wanted.is_some() && self.replicas.values().any(|replica| replica.is_new(now)) {
            return Vec::new();
        }
        let making = match &self.wanted {
            None => Making::Removed,
            Some(_) if self.is_stopped() => Making::Stopped,
            Some(wanted) if wanted.env.is_err() || self.attempts.wait(now).is_some() => Making::Waits,
            Some(_) => Making::Goes,
        };
        let spec = self.wanted.as_ref().map(|wanted| &wanted.service.spec);
        let desired = Desired {
            replicas: spec.map_or(0, |spec| spec.replicas),
            update: spec.map(|spec| spec.update).unwrap_or_default(),
            making,
        };
        let spawning = u32::try_from(self.spawning.len()).unwrap_or(u32::MAX);
        let mut orders = Vec::new();
        for action in reconcile(desired, &members, spawning) {
            match action {
                Action::Spawn { count } => {
                    orders.extend((0..count).filter_map(|_| self.order()));
                }
                Action::Drain { id } => self.drain(&id, now, self.grace),
                Action::Remove { id } => orders.extend(self.remove(&id)),
            }
        }
        orders
    }

    /// Takes note of replicas of the last generation that proved themselves, and of those that ended.
    fn judge(&mut self, members: &[Member], now: Instant) {
        for member in members {
            let Some(replica) = self.replicas.get_mut(&member.id) else { continue };
            if member.is_current && member.is_proved && !replica.is_proved {
                replica.is_proved = true;
                self.attempts.succeed();
            }
            if member.state != ReplicaState::Ended || std::mem::replace(&mut replica.is_over, true) {
                continue;
            }
            // One that somebody ends is no failure.
            if member.is_going || replica.drained_until.is_some() {
                continue;
            }
            let name = replica.handle.name().clone();
            let agents_reason = || replica.handle.look(|agent| agent.reason.clone()).unwrap_or_default();
            let why = format!("the replica {name} ended: {}", replica.reason().unwrap_or_else(agents_reason));
            if let Standing::Ended(ended) = replica.standing() {
                let (id, reason) = (member.id.clone(), ended.reason.clone());
                let failure = ReplicaFailure { agent: name, id, reason, at_unix_ms: unix_ms() };
                self.last_failure = Some((failure, ended));
                if member.is_current {
                    self.attempts.command_ended(why.clone(), now);
                }
            }
            if member.is_current && !replica.is_proved {
                self.attempts.note(why, true, now);
            }
        }
    }

    /// The replica `agent`, by name or id, of this service, which is called `service`.
    ///
    /// # Errors
    /// [`ServiceError::NoReplica`].
    pub(super) fn find(&self, service: &AgentName, agent: &str) -> Result<&Replica, ServiceError> {
        let is_meant =
            |replica: &&Replica| replica.handle.id() == agent || replica.handle.name().as_ref() == agent;
        let missing = || ServiceError::NoReplica { service: service.clone(), agent: agent.to_owned() };
        self.replicas.values().find(is_meant).ok_or_else(missing)
    }

    /// Begins to drain the replica `id`, if it is there and is not drained yet.
    pub(super) fn drain(&mut self, id: &str, now: Instant, grace: Duration) {
        if let Some(replica) = self.replicas.get_mut(id) {
            replica.drained_until.get_or_insert(now + grace);
        }
    }

    /// It is to be no more, and its replicas may finish what is under way for as long as `grace`: so may those that are drained
    /// already and were given longer.
    pub(super) fn leave(&mut self, now: Instant, grace: Duration) {
        (self.wanted, self.grace) = (None, grace);
        for until in self.replicas.values_mut().filter_map(|replica| replica.drained_until.as_mut()) {
            *until = (*until).min(now + grace);
        }
    }

    fn remove(&mut self, id: &str) -> Option<Order> {
        let replica = self.replicas.get_mut(id)?;
        replica.is_going = true;
        Some(Order::Remove(replica.handle.clone(), END_GRACE))
    }

    /// The order to make one more replica, which counts as being made from now on.
    fn order(&mut self) -> Option<Order> {
        let wanted = self.wanted.as_ref()?;
        let generation = wanted.generation();
        let request = request(&wanted.service.spec, wanted.env.clone().ok()?, generation).ok()?;
        self.spawning.insert(request.name.clone()?);
        Some(Order::Make { request: Box::new(request), generation })
    }

    /// A replica called `name` of `generation` came to be, or not, at `now`.
    pub(super) fn made(
        &mut self,
        name: &AgentName,
        generation: u64,
        made: Result<(), Refusal>,
        now: Instant,
    ) {
        self.spawning.remove(name);
        if let Err(Refusal(problem)) = made
            && self.generation() == Some(generation)
        {
            // For want of room, memory or a log nothing can be made, however it is to be.
            let is_fault = !matches!(problem.status, 429 | 503 | 507);
            let why = format!("a replica did not start: {}", problem.detail);
            self.attempts.note(why, is_fault, now);
        }
    }
}

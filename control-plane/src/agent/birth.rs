//! An agent begins: booted, restored, claimed from the pool, or taken over from an earlier `arkd`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use ark_types::agent::{
    Agent, AgentName, AgentState, CreateAgent, DEFAULT_MEMORY_MIB, DEFAULT_VCPUS, Origin,
};
use ark_types::checkpoint::CheckpointPolicy;
use ark_types::event::AgentSpec;
use ark_types::guest::CONTROL_PORT;
use ark_types::healing::{AgentHealth, RestartPolicy};
use ark_types::health_check::HealthCheck;
use ark_types::label::Labels;
use ark_types::permission::Permission;
use ark_types::scheduling::Resources;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{Instrument as _, Span};

use super::body::{Base, Body};
use super::heal::{Healing, Kept};
use super::history::{record_paused, record_survivor};
use super::owner::Owner;
use super::record::Record;
use super::request::Request;
use super::{BootError, Handle, Shared, identity};
use crate::admission::check_host;
use crate::core::Core;
use crate::guest::{Address, Idle};
use crate::host::unix_ms;
use crate::idempotency;
use crate::media::Media;
use crate::pool::Den;
use crate::problems::Refusal;
use crate::registry::AdmitError;
use crate::scheduler::{Grant, Spare};
use crate::snapshots::{Hold, SnapshotError};
use crate::supervisor::Vmm;
use crate::telemetry::{Ahead, Phase};
use crate::traces::step;

/// An agent that is to come from a snapshot.
#[derive(Debug)]
pub struct Birth {
    /// The snapshot.
    pub hold: Hold,
    /// What is told of it.
    pub origin: Origin,
    /// What its creator says of it.
    pub wishes: Wishes,
    /// What is reserved for it.
    pub grant: Grant,
}

/// What its creator says of an agent, beside what it is made of.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    /// Name; made up when absent.
    pub name: Option<AgentName>,
    /// Variables its programs start with. Those of the snapshot's agent are not inherited: they may be secrets.
    pub env: BTreeMap<String, String>,
    /// Delete it with its first streamed exec.
    pub auto_remove: bool,
    /// Labels.
    pub labels: Labels,
    /// Who it belongs to.
    pub owner: ark_types::label::Owner,
    /// What it may use of the platform. That of the snapshot's agent is not inherited: it was given to that one alone.
    pub allow: Vec<Permission>,
    /// Whether it stands still while its calls of models wait for an answer.
    pub freeze_on_inference: bool,
    /// What becomes of it when it ends, or when nobody uses it.
    pub upkeep: Upkeep,
}

/// What becomes of an agent when it ends, or when nobody uses it.
#[derive(Clone, Debug, Default)]
pub struct Upkeep {
    /// Whether it begins anew.
    pub restart: RestartPolicy,
    /// Seconds from its creation to its removal.
    pub ttl_s: Option<u64>,
    /// Seconds without use to its removal.
    pub idle_timeout_s: Option<u64>,
    /// How often a checkpoint of it is taken.
    pub checkpoint: Option<CheckpointPolicy>,
    /// How it is checked.
    pub health_check: Option<HealthCheck>,
}

impl From<&CreateAgent> for Upkeep {
    fn from(request: &CreateAgent) -> Self {
        Self {
            restart: request.restart,
            ttl_s: request.ttl_s,
            idle_timeout_s: request.idle_timeout_s,
            checkpoint: request.checkpoint,
            health_check: request.health_check.clone(),
        }
    }
}

impl From<CreateAgent> for Wishes {
    fn from(request: CreateAgent) -> Self {
        let upkeep = Upkeep::from(&request);
        let CreateAgent { name, env, auto_remove, labels, owner, allow, freeze_on_inference, .. } = request;
        Self { name, env, auto_remove, labels, owner, allow, freeze_on_inference, upkeep }
    }
}

/// An agent that no list shows.
#[derive(Clone, Debug)]
pub struct HiddenSpec {
    /// What it boots.
    pub media: Media,
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// What is reserved for it.
    pub grant: Grant,
}

/// A fork that is restored, renewed and warm, and waits to become somebody. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Standby {
    handle: Handle,
    /// What it has, as long as nobody else needs it.
    spare: Spare,
}

impl Standby {
    /// Whether its VMM is no more.
    pub(crate) fn has_ended(&self) -> bool {
        self.handle.0.requests.is_closed() || self.handle.has_ended()
    }

    /// Whether it was restored from the snapshot in `dir`.
    pub(crate) fn is_of(&self, dir: &Path) -> bool {
        self.handle.base().is_some_and(|hold| hold.dir() == dir)
    }

    /// What it has reserved.
    pub(crate) const fn needs(&self) -> Resources {
        self.spare.needs()
    }

    /// The way to it, and what it has as long as nobody else needs it.
    pub(super) fn into_parts(self) -> (Handle, Spare) {
        (self.handle, self.spare)
    }

    /// Ends it and waits for its end.
    pub(crate) async fn end(self) {
        self.handle.remove(std::time::Duration::ZERO).await;
    }
}

/// Begins an agent for which `grant` is reserved, and waits until its guest said hello. When the caller stops waiting, the agent is removed.
///
/// # Errors
/// [`AdmitError`], or [`BootError`] within; nothing is left then.
pub async fn create(
    core: &Arc<Core>,
    request: CreateAgent,
    media: Media,
    grant: Grant,
) -> Result<Result<Agent, BootError>, AdmitError> {
    let (up, came_up) = oneshot::channel();
    let vcpus = request.vcpus.unwrap_or(DEFAULT_VCPUS);
    let memory_mib = request.memory_mib.unwrap_or(DEFAULT_MEMORY_MIB);
    let wishes = Wishes::from(request);
    let (handle, mut owner) = core.registry.admit(wishes.name.clone(), None, |id, name| {
        let agent = newborn((id, name), Origin::Boot, &media, (vcpus, memory_mib), &wishes);
        begin(core, agent, wishes.env, Some(media), Begun::Boot, Some(grant))
    })?;
    owner.known = true;
    drop(idempotency::bind(core, handle.stream()));
    tokio::spawn(owner.live(up));
    Ok(came_up.await.unwrap_or(Err(BootError::Removed)))
}

/// Boots an agent that is in no list and lives as long as somebody has a [`Handle`] to it.
///
/// # Errors
/// [`BootError`]; nothing is left then.
pub async fn boot_hidden(core: &Arc<Core>, spec: HiddenSpec) -> Result<Handle, BootError> {
    let (up, came_up) = oneshot::channel();
    let (id, name) = hidden('t')?;
    let HiddenSpec { media, vcpus, memory_mib, grant } = spec;
    let agent = newborn((id, name), Origin::Boot, &media, (vcpus, memory_mib), &Wishes::default());
    let (handle, owner) = begin(core, agent, BTreeMap::new(), Some(media), Begun::Boot, Some(grant));
    tokio::spawn(owner.live(up));
    came_up.await.unwrap_or(Err(BootError::Removed)).map(|_| handle)
}

/// Restores an agent from a snapshot and waits until it passed every check. When the caller stops waiting, it is removed.
///
/// # Errors
/// A [`Refusal`] that says what failed; nothing is left then.
pub async fn restore(core: &Arc<Core>, birth: Birth) -> Result<Agent, Refusal> {
    core.ledger.ready()?;
    check_host(core).await?;
    let media = prove(core, &birth.hold).await?;
    Ok(begin_restore(core, birth, media)?.await?)
}

/// The disks of the snapshot, once it and they are known to be sound.
pub(super) async fn prove(core: &Core, hold: &Hold) -> Result<Media, SnapshotError> {
    hold.prove().await?;
    hold.open_media(&core.images, &core.models).await
}

/// The first half of [`restore`]: the name is taken, the VMM starts while the future is waited for, and dropping that removes
/// the agent.
pub(super) fn begin_restore(
    core: &Arc<Core>,
    birth: Birth,
    media: Media,
) -> Result<impl Future<Output = Result<Agent, BootError>> + use<>, AdmitError> {
    let Birth { hold, origin, wishes, grant } = birth;
    let size = (hold.manifest().vcpus, hold.manifest().memory_mib);
    let mut den = core.pool.take_den(size.0);
    core.telemetry.claimed(Ahead::Prepared, den.is_some());
    let id = den.as_ref().map(|den| den.id().to_owned());
    let (up, came_up) = oneshot::channel();
    let admitted = core.registry.admit(wishes.name.clone(), id, |id, name| {
        let agent = newborn((id, name), origin, &media, size, &wishes);
        let begun = Begun::Restore(Base::lived_in(&hold), den.take().map(Box::new));
        begin(core, agent, wishes.env, Some(media), begun, Some(grant))
    });
    // Of use to the next one.
    den.into_iter().for_each(|den| core.pool.return_den(den));
    let (handle, mut owner) = admitted?;
    owner.known = true;
    drop(idempotency::bind(core, handle.stream()));
    tokio::spawn(owner.live(up));
    Ok(async move { came_up.await.unwrap_or(Err(BootError::Removed)) })
}

/// An agent from `template`, whose snapshot is `birth.hold`: one of the pool's standbys where there is one, else a fresh fork.
///
/// # Errors
/// As [`restore`].
pub async fn from_template(core: &Arc<Core>, template: &AgentName, birth: Birth) -> Result<Agent, Refusal> {
    let began = Instant::now();
    let agent = claim_or_fork(core, template, birth).await?;
    core.pool.waited(template, began.elapsed());
    Ok(agent)
}

async fn claim_or_fork(core: &Arc<Core>, template: &AgentName, birth: Birth) -> Result<Agent, Refusal> {
    while let Some(standby) = core.pool.take_standby(template, birth.hold.dir()) {
        core.telemetry.claimed(Ahead::Standby, true);
        let began = Instant::now();
        match claim(core, template, standby, &birth).instrument(step("claim")).await? {
            Some(Ok(agent)) => {
                core.telemetry.phase(Phase::Claim, began.elapsed());
                core.pool.claimed(template, true);
                return Ok(agent);
            }
            // It died while it waited, or under the claim: that is no fault of the template, and another can be had.
            None => tracing::warn!("a standby ended before it was claimed"),
            Some(Err(error)) if error.is_of_a_standby() => {
                tracing::warn!(%error, "a standby is of no use");
            }
            Some(Err(error)) => return Err(error.into()),
        }
    }
    core.telemetry.claimed(Ahead::Standby, false);
    core.pool.claimed(template, false);
    restore(core, birth).await
}

/// Makes a standby the agent of `birth`: it is renewed once more, as that agent, and every check runs again. None when it
/// ended without hearing of the claim.
async fn claim(
    core: &Arc<Core>,
    template: &AgentName,
    standby: Standby,
    birth: &Birth,
) -> Result<Option<Result<Agent, BootError>>, AdmitError> {
    let shared = Arc::clone(&standby.handle.0);
    let (up, came_up) = oneshot::channel();
    let Wishes { name, env, auto_remove, labels, owner, allow, freeze_on_inference, upkeep } =
        birth.wishes.clone();
    let admitted = core
        .registry
        .admit(name, Some(shared.id.clone()), |id, name| (standby.handle.renamed(id, name, env.clone()), ()));
    let handle = match admitted {
        Ok((handle, ())) => handle,
        Err(error) => {
            // Of use to the next one.
            core.pool.return_standby(template, standby);
            return Err(error);
        }
    };
    // The agent has its own grant.
    let Standby { handle: _waiting, spare } = standby;
    drop(spare);
    drop(idempotency::bind(core, handle.stream()));
    let spec = AgentSpec {
        origin: birth.origin.clone(),
        auto_remove,
        labels,
        owner,
        allow,
        freeze_on_inference,
        created_unix_ms: unix_ms(),
        restart: upkeep.restart,
        ttl_s: upkeep.ttl_s,
        idle_timeout_s: upkeep.idle_timeout_s,
        checkpoint: upkeep.checkpoint,
        health_check: upkeep.health_check.map(Box::new),
        ..AgentSpec::from(&handle.agent())
    };
    let base = Base::lived_in(&birth.hold);
    let (grant, cause) = (birth.grant.clone(), Span::current());
    let claim = Request::Claim { spec: Box::new(spec), env, base, grant, cause, up };
    let _ = shared.requests.send(claim);
    let agent = came_up.await.ok();
    if agent.is_none() {
        // Its owner may have been gone before it was in the registry.
        core.registry.forget(handle.id());
    }
    Ok(agent)
}

/// A standby of the snapshot `hold`, restored, renewed and warm, that has `spare`. The pool is told of its end.
///
/// # Errors
/// A [`Refusal`]; nothing is left then.
pub(crate) async fn stand_by(core: &Arc<Core>, hold: Hold, spare: Spare) -> Result<Standby, Refusal> {
    let media = prove(core, &hold).await?;
    let (id, name) = hidden('s')?;
    let size = (hold.manifest().vcpus, hold.manifest().memory_mib);
    let agent = newborn((id, name), Origin::Boot, &media, size, &Wishes::default());
    let begun = Begun::Restore(Base::Held(hold), None);
    let (handle, owner) = begin(core, agent, BTreeMap::new(), Some(media), begun, None);
    let (ready, is_ready) = oneshot::channel();
    let pool = Arc::clone(&core.pool);
    tokio::spawn(async move {
        owner.stand_by(ready).await;
        pool.look();
    });
    is_ready.await.unwrap_or(Err(BootError::Removed))?;
    Ok(Standby { handle, spare })
}

/// Takes in an agent that an earlier `arkd` left paused.
///
/// # Errors
/// [`AdmitError`].
pub(crate) fn wake_paused(core: &Arc<Core>, record: Record, hold: &Hold) -> Result<(), AdmitError> {
    let Record { mut agent, .. } = record.clone();
    agent.state = AgentState::Paused;
    (agent.vmm_pid, agent.heartbeat) = (None, None);
    let record = Record { agent, ..record };
    record_paused(core, &record.agent, hold);
    // It has no VMM, so nothing is reserved for it.
    let (_, owner) = known(core, record, Base::lived_in(hold), true, None)?;
    tokio::spawn(owner.sleep());
    Ok(())
}

/// Takes in an agent that an earlier `arkd` left, with its VMM unless that ended, on the snapshot that its memory is read from.
///
/// # Errors
/// [`AdmitError`]; the VMM is ended then.
pub(crate) fn take_in(
    core: &Arc<Core>,
    mut record: Record,
    mut vmm: Option<Vmm>,
    hold: Option<&Hold>,
) -> Result<Handle, AdmitError> {
    vmm.iter_mut().for_each(Vmm::bind);
    record.agent.vmm_pid = vmm.as_ref().map(Vmm::pid);
    // What it said to another is no sign of life.
    record.agent.heartbeat = None;
    record.bound_wait();
    record_survivor(core, &record);
    let grant = vmm.is_some().then(|| claim_for(core, &record));
    let base = hold.map_or(Base::None, Base::lived_in);
    let (handle, owner) = known(core, record, base, false, grant)?;
    tokio::spawn(owner.come_back(vmm));
    Ok(handle)
}

/// What an agent needs to run: as one that was booted, or as a fork.
pub(super) fn needs(core: &Core, agent: &Agent) -> Resources {
    let size = (agent.vcpus, agent.memory_mib);
    let config = core.scheduler.config();
    // Where it began anew as it was booted, that is its origin by now, and so is a snapshot that it was taken back to since.
    let is_of_checkpoint = agent
        .continuity
        .as_ref()
        .is_some_and(|continuity| matches!(continuity.restored_from, Origin::Checkpoint { .. }));
    if agent.origin == Origin::Boot && !is_of_checkpoint { config.booted(size) } else { config.forked(size) }
}

/// What an agent that runs already needs, whether or not there is room for it.
fn claim_for(core: &Core, record: &Record) -> Grant {
    let agent = &record.agent;
    core.scheduler.claim(&agent.owner, needs(core, agent), record.apart.clone())
}

/// An agent that began with an earlier `arkd`, in the registry.
fn known(
    core: &Arc<Core>,
    record: Record,
    base: Base,
    is_recorded: bool,
    grant: Option<Grant>,
) -> Result<(Handle, Owner), AdmitError> {
    let clock = record.clock();
    let Record { mut agent, env, machine_id, receipt, renewals, healing, apart, .. } = record;
    if let Some(known) = core.ledger.projection().agents().get(&agent.id) {
        // Its record is not written anew with each of these.
        agent.labels.clone_from(&known.labels);
        agent.checkpoints.clone_from(&known.checkpoints);
        if known.state == agent.state && known.continuity == agent.continuity {
            agent.health.clone_from(&known.health);
        }
    }
    agent.checkpoints.retain(|checkpoint| healing.is_of_this_life(checkpoint.taken_unix_ms));
    let is_missed = matches!(agent.health, AgentHealth::Unresponsive { .. });
    // What its guest answered once no other may answer.
    core.seen.remember(receipt.as_ref());
    let healing = Healing::taken_up(healing, &agent, clock);
    core.registry.admit(Some(agent.name.clone()), Some(agent.id.clone()), |_, _| {
        let (handle, mut owner) = begin(core, agent, env, None, Begun::Earlier, grant);
        owner.known = true;
        owner.healing = healing;
        owner.healing.is_unheard = is_missed;
        let body = &handle.0.body;
        body.set_clock(clock);
        body.set_machine_id(machine_id);
        body.set_receipt(receipt);
        body.set_renewals(renewals);
        body.set_apart(apart);
        body.set_base(base);
        body.set_recorded(is_recorded);
        (handle, owner)
    })
}

/// How an agent begins.
pub(super) enum Begun {
    /// Its guest boots.
    Boot,
    /// Its guest is restored, in a VMM of the pool where there is one.
    Restore(Base, Option<Box<Den>>),
    /// It did with an earlier `arkd`.
    Earlier,
}

/// Id and name of an agent that no list shows.
fn hidden(what: char) -> Result<(String, AgentName), BootError> {
    let id = format!("{:016x}", rand::random::<u64>());
    // The name always is one: a letter, a dash and hexadecimal digits.
    identity::hidden_name(what, &id).map(|name| (id, name)).ok_or(BootError::Removed)
}

fn newborn(
    (id, name): (String, AgentName),
    origin: Origin,
    media: &Media,
    (vcpus, memory_mib): (u32, u64),
    wishes: &Wishes,
) -> Agent {
    Agent {
        id,
        name,
        origin,
        image: media.image.manifest.name.clone(),
        image_digest: media.image.manifest.digest.clone(),
        vcpus,
        memory_mib,
        state: AgentState::Creating,
        reason: None,
        exit: None,
        vmm_pid: None,
        created_unix_ms: unix_ms(),
        boot_ms: None,
        heartbeat: None,
        auto_remove: wishes.auto_remove,
        labels: wishes.labels.clone(),
        owner: wishes.owner.clone(),
        allow: wishes.allow.clone(),
        freeze_on_inference: wishes.freeze_on_inference,
        restart: wishes.upkeep.restart,
        ttl_s: wishes.upkeep.ttl_s,
        idle_timeout_s: wishes.upkeep.idle_timeout_s,
        checkpoint: wishes.upkeep.checkpoint,
        checkpoints: Vec::new(),
        checkpoint_failure: None,
        health_check: wishes.upkeep.health_check.clone(),
        health: AgentHealth::Healthy,
        continuity: None,
        backoff_until_unix_ms: None,
        removed_unix_ms: None,
    }
}

pub(super) fn begin(
    core: &Arc<Core>,
    agent: Agent,
    env: BTreeMap<String, String>,
    media: Option<Media>,
    begun: Begun,
    grant: Option<Grant>,
) -> (Handle, Owner) {
    let dir = core.config.run.agent(&agent.id);
    let (requests, inbox) = mpsc::unbounded_channel();
    let (id, name) = (agent.id.clone(), agent.name.clone());
    let (publish, state) = watch::channel(agent);
    let guest = Address { socket: dir.vsock(), port: Some(CONTROL_PORT), idle: Idle::default() };
    let body = Arc::new(Body::new(identity::machine_id()));
    body.set_grant(grant);
    let shared = Shared {
        id,
        name,
        env: env.clone(),
        guest: guest.clone(),
        dir: dir.clone(),
        console: dir.console(),
        state,
        requests,
        body: Arc::clone(&body),
        streamed: AtomicBool::new(false),
    };
    let owner = Owner {
        core: Arc::clone(core),
        dir,
        media,
        guest,
        body,
        begun: Some(begun),
        env,
        known: false,
        since: Instant::now(),
        cause: Span::current(),
        state: publish,
        requests: inbox,
        parting: None,
        healing: Healing::new(Kept::default()),
    };
    (Handle(Arc::new(shared)), owner)
}

impl Handle {
    /// The same agent under another name.
    fn renamed(&self, id: String, name: AgentName, env: BTreeMap<String, String>) -> Self {
        let shared = &self.0;
        Self(Arc::new(Shared {
            id,
            name,
            env,
            guest: shared.guest.clone(),
            dir: shared.dir.clone(),
            console: shared.console.clone(),
            state: shared.state.clone(),
            requests: shared.requests.clone(),
            body: Arc::clone(&shared.body),
            streamed: AtomicBool::new(false),
        }))
    }
}

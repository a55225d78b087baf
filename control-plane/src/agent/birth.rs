//! An agent begins: booted, restored, claimed from the pool, or known from an earlier `arkd`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use ark_types::agent::{
    Agent, AgentName, AgentState, CreateAgent, DEFAULT_MEMORY_MIB, DEFAULT_VCPUS, Origin,
};
use ark_types::guest::CONTROL_PORT;
use tokio::sync::{mpsc, oneshot, watch};

use super::body::{Base, Body};
use super::owner::{Owner, Request};
use super::record::Record;
use super::{BootError, Handle, Shared, identity};
use crate::admission::check_host;
use crate::core::Core;
use crate::guest::{Address, Idle};
use crate::host::unix_ms;
use crate::images::Image;
use crate::pool::Den;
use crate::problems::Refusal;
use crate::registry::AdmitError;
use crate::scheduler::Grant;
use crate::snapshots::{Hold, SnapshotError};

/// An agent that is to come from a snapshot.
#[derive(Debug)]
pub struct Birth {
    /// The snapshot.
    pub hold: Hold,
    /// What is told of it.
    pub origin: Origin,
    /// Name; made up when absent.
    pub name: Option<AgentName>,
    /// Variables its programs start with. Those of the snapshot's agent are not inherited: they may be secrets.
    pub env: BTreeMap<String, String>,
    /// Delete it with its first streamed exec.
    pub auto_remove: bool,
    /// Who it belongs to.
    pub owner: Option<AgentName>,
    /// What is reserved for it.
    pub grant: Grant,
}

/// An agent that no list shows.
#[derive(Clone, Debug)]
pub struct HiddenSpec {
    /// Image to boot.
    pub image: Image,
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
    image: Image,
    grant: Grant,
) -> Result<Result<Agent, BootError>, AdmitError> {
    let (up, came_up) = oneshot::channel();
    let vcpus = request.vcpus.unwrap_or(DEFAULT_VCPUS);
    let memory_mib = request.memory_mib.unwrap_or(DEFAULT_MEMORY_MIB);
    let (_, owner) = core.registry.admit(request.name.clone(), None, |id, name| {
        let size = (vcpus, memory_mib);
        let agent = newborn((id, name), Origin::Boot, &image, size, request.auto_remove, request.owner);
        begin(core, agent, request.env, Some(image.path), Begun::Boot, Some(grant))
    })?;
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
    let HiddenSpec { image, vcpus, memory_mib, grant } = spec;
    let agent = newborn((id, name), Origin::Boot, &image, (vcpus, memory_mib), false, None);
    let (handle, owner) = begin(core, agent, BTreeMap::new(), Some(image.path), Begun::Boot, Some(grant));
    tokio::spawn(owner.live(up));
    came_up.await.unwrap_or(Err(BootError::Removed)).map(|_| handle)
}

/// Restores an agent from a snapshot and waits until it passed every check. When the caller stops waiting, it is removed.
///
/// # Errors
/// A [`Refusal`] that says what failed; nothing is left then.
pub async fn restore(core: &Arc<Core>, birth: Birth) -> Result<Agent, Refusal> {
    check_host(core).await?;
    let image = prove(core, &birth.hold).await?;
    Ok(begin_restore(core, birth, image)?.await?)
}

/// The image of the snapshot, once both are known to be sound.
pub(super) async fn prove(core: &Core, hold: &Hold) -> Result<Image, SnapshotError> {
    hold.prove().await?;
    hold.open_image(&core.images).await
}

/// The first half of [`restore`]: the name is taken, the VMM starts while the future is waited for, and dropping that removes
/// the agent.
pub(super) fn begin_restore(
    core: &Arc<Core>,
    birth: Birth,
    image: Image,
) -> Result<impl Future<Output = Result<Agent, BootError>> + use<>, AdmitError> {
    let Birth { hold, origin, name, env, auto_remove, owner, grant } = birth;
    let size = (hold.manifest().vcpus, hold.manifest().memory_mib);
    let mut den = core.pool.take_den(size.0);
    let id = den.as_ref().map(|den| den.id().to_owned());
    let (up, came_up) = oneshot::channel();
    let admitted = core.registry.admit(name, id, |id, name| {
        let agent = newborn((id, name), origin, &image, size, auto_remove, owner);
        let begun = Begun::Restore(Base::lived_in(&hold), den.take().map(Box::new));
        begin(core, agent, env, Some(image.path), begun, Some(grant))
    });
    // Of use to the next one.
    den.into_iter().for_each(|den| core.pool.return_den(den));
    let (_, owner) = admitted?;
    tokio::spawn(owner.live(up));
    Ok(async move { came_up.await.unwrap_or(Err(BootError::Removed)) })
}

/// An agent from the template whose snapshot is `birth.hold`: one of the pool's standbys where there is one, else a fresh
/// fork.
///
/// # Errors
/// As [`restore`].
pub async fn from_template(core: &Arc<Core>, birth: Birth) -> Result<Agent, Refusal> {
    while let Some(standby) = core.pool.take_standby(birth.hold.dir()) {
        match claim(core, standby, &birth).await? {
            Some(Ok(agent)) => return Ok(agent),
            // It died while it waited, or under the claim: that is no fault of the template, and another can be had.
            None => tracing::warn!("a standby ended before it was claimed"),
            Some(Err(
                error @ (BootError::Ended { .. } | BootError::Renewal(_) | BootError::NoCall { .. }),
            )) => {
                tracing::warn!(%error, "a standby is of no use");
            }
            Some(Err(error)) => return Err(error.into()),
        }
    }
    restore(core, birth).await
}

/// Makes a standby the agent of `birth`: it is renewed once more, as that agent, and every check runs again. None when it
/// ended without hearing of the claim.
async fn claim(
    core: &Arc<Core>,
    standby: Standby,
    birth: &Birth,
) -> Result<Option<Result<Agent, BootError>>, AdmitError> {
    let shared = &standby.handle.0;
    let (up, came_up) = oneshot::channel();
    let admitted = core.registry.admit(birth.name.clone(), Some(shared.id.clone()), |id, name| {
        (standby.handle.renamed(id, name, birth.env.clone()), ())
    });
    let handle = match admitted {
        Ok((handle, ())) => handle,
        Err(error) => {
            // Of use to the next one.
            core.pool.return_standby(standby);
            return Err(error);
        }
    };
    let claim = Request::Claim {
        name: handle.name().clone(),
        origin: birth.origin.clone(),
        auto_remove: birth.auto_remove,
        owner: birth.owner.clone(),
        grant: birth.grant.clone(),
        base: Base::lived_in(&birth.hold),
        up,
    };
    let _ = shared.requests.send(claim);
    let agent = came_up.await.ok();
    if agent.is_none() {
        // Its owner may have been gone before it was in the registry.
        core.registry.forget(handle.id());
    }
    Ok(agent)
}

/// A standby of the snapshot `hold`, restored, renewed and warm.
///
/// # Errors
/// A [`Refusal`]; nothing is left then.
pub(crate) async fn stand_by(core: &Arc<Core>, hold: Hold) -> Result<Standby, Refusal> {
    let image = prove(core, &hold).await?;
    let (id, name) = hidden('s')?;
    let size = (hold.manifest().vcpus, hold.manifest().memory_mib);
    let agent = newborn((id, name), Origin::Boot, &image, size, false, None);
    let begun = Begun::Restore(Base::Held(hold), None);
    let (handle, owner) = begin(core, agent, BTreeMap::new(), Some(image.path), begun, None);
    let (ready, is_ready) = oneshot::channel();
    tokio::spawn(owner.stand_by(ready));
    is_ready.await.unwrap_or(Err(BootError::Removed))?;
    Ok(Standby { handle })
}

/// Takes in an agent that an earlier `arkd` left paused.
///
/// # Errors
/// [`AdmitError`].
pub(crate) fn wake_paused(core: &Arc<Core>, record: Record, hold: &Hold) -> Result<(), AdmitError> {
    let Record { mut agent, env, machine_id, receipt, renewals, .. } = record;
    agent.state = AgentState::Paused;
    (agent.vmm_pid, agent.heartbeat) = (None, None);
    let (_, owner) = core.registry.admit(Some(agent.name.clone()), Some(agent.id.clone()), |_, _| {
        let (handle, owner) = begin(core, agent, env, None, Begun::Paused, None);
        let body = &handle.0.body;
        body.set_machine_id(machine_id);
        body.set_receipt(receipt);
        body.set_renewals(renewals);
        body.set_base(Base::lived_in(hold));
        body.set_recorded(true);
        (handle, owner)
    })?;
    tokio::spawn(owner.sleep());
    Ok(())
}

/// How an agent begins.
pub(super) enum Begun {
    /// Its guest boots.
    Boot,
    /// Its guest is restored, in a VMM of the pool where there is one.
    Restore(Base, Option<Box<Den>>),
    /// It waits on disk.
    Paused,
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
    image: &Image,
    (vcpus, memory_mib): (u32, u64),
    auto_remove: bool,
    owner: Option<AgentName>,
) -> Agent {
    Agent {
        id,
        name,
        origin,
        image: image.manifest.name.clone(),
        image_digest: image.manifest.digest.clone(),
        vcpus,
        memory_mib,
        state: AgentState::Creating,
        reason: None,
        exit: None,
        vmm_pid: None,
        created_unix_ms: unix_ms(),
        boot_ms: None,
        heartbeat: None,
        auto_remove,
        owner,
    }
}

fn begin(
    core: &Arc<Core>,
    agent: Agent,
    env: BTreeMap<String, String>,
    disk: Option<PathBuf>,
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
        env,
        guest: guest.clone(),
        dir: dir.clone(),
        console: dir.console(),
        state,
        requests,
        body: Arc::clone(&body),
    };
    let owner = Owner {
        core: Arc::clone(core),
        dir,
        disk,
        guest,
        body,
        begun: Some(begun),
        since: Instant::now(),
        state: publish,
        requests: inbox,
        removal: None,
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
        }))
    }
}

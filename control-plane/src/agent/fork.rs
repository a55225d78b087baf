//! Many from one: a branch point on disk, and forks restored from it.

use std::sync::Arc;

use ark_types::agent::{Agent, AgentName, AgentState, Origin};
use ark_types::problem::ProblemKind;
use ark_types::snapshot::{FailedFork, ForkAgent, Forked, MAX_FORKS};
use futures_util::future::join_all;

use super::{Birth, BootError, Handle, SnapshotFailure, Upkeep, Wishes, birth};
use crate::admission::check_host;
use crate::core::Core;
use crate::media::Media;
use crate::problems::Refusal;
use crate::registry::AdmitError;
use crate::scheduler::{Ask, Grant};
use crate::services::without_own_labels;
use crate::snapshots::Hold;
use crate::upkeep;
use crate::validate::check_allow;

/// Where an agent branches.
struct Branch {
    hold: Hold,
    pause_us: u64,
    durable_us: u64,
}

/// Makes the forks of `handle`'s agent that `request` asks for, which goes on meanwhile. When the caller stops waiting, they are removed.
///
/// # Errors
/// A [`Refusal`] when the count is out of bounds, the agent cannot branch, or not a single fork came to be.
pub async fn fork(core: &Arc<Core>, handle: &Handle, request: ForkAgent) -> Result<Forked, Refusal> {
    let ForkAgent { count, allow, freeze_on_inference, restart, checkpoint, health_check } = request;
    let upkeep = Upkeep { restart, checkpoint, health_check, ..Upkeep::default() };
    upkeep::check(&upkeep, false)?;
    check_allow(&allow)?;
    // The parent's policy, limits and permissions are wishes for the parent alone, and its variables may be secrets.
    let wishes = Wishes { allow, freeze_on_inference, upkeep, ..Wishes::default() };
    if !(1..=MAX_FORKS).contains(&count) {
        let detail = format!("{count} forks cannot be had at once: ask for 1 to {MAX_FORKS}");
        return Err(Refusal::new(ProblemKind::InvalidValue, detail));
    }
    // Every name is tried before the agent stands still for it.
    let longest = format!("{}-{}", handle.name(), u64::from(count) * 2);
    if longest.parse::<AgentName>().is_err() {
        let detail = format!(
            "the forks of {} would have names that are too long, such as {longest}: fork an agent of a shorter name",
            handle.name()
        );
        return Err(Refusal::new(ProblemKind::InvalidValue, detail));
    }
    core.ledger.ready()?;
    let grants = room_for(core, handle, count).await?;
    let _busy = core.pool.busy();
    check_host(core).await?;
    let branch = branch(core, handle).await?;
    let media = birth::prove(core, &branch.hold).await?;
    let mut forks = Vec::new();
    let mut number = 0;
    for grant in grants {
        let (name, fork) = begin(core, handle, (&branch.hold, &media, &wishes), &mut number, &grant)?;
        forks.push(async move { (name, fork.await) });
    }
    let mut forked = Forked {
        agents: Vec::new(),
        failed: Vec::new(),
        pause_us: branch.pause_us,
        durable_us: branch.durable_us,
    };
    let mut last = None;
    for (name, agent) in join_all(forks).await {
        match agent {
            Ok(agent) => forked.agents.push(agent),
            Err(error) => {
                forked.failed.push(FailedFork { name, why: error.to_string() });
                last = Some(error);
            }
        }
    }
    // When not a single fork lives there, nothing of the branch is left either.
    let dir = branch.hold.dir().to_owned();
    drop(branch);
    core.snapshots.gone(&[dir]).await;
    match last {
        Some(error) if forked.agents.is_empty() => Err(none_came_to_be(count, &error)),
        _ => Ok(forked),
    }
}

/// What the forks need, for who the agent belongs to: for all of them, before the agent stands still.
async fn room_for(core: &Core, handle: &Handle, count: u32) -> Result<Vec<Grant>, Refusal> {
    let agent = handle.agent();
    let needs = core.scheduler.config().forked((agent.vcpus, agent.memory_mib));
    let ask = Ask { name: Some(agent.name), ..Ask::new(agent.owner, needs) };
    Ok(core.admit_many(ask, count).await?)
}

fn none_came_to_be(count: u32, error: &BootError) -> Refusal {
    let which = if count == 1 { "the fork".to_owned() } else { format!("none of {count} forks") };
    let not = if count == 1 { "did not come to be" } else { "came to be" };
    Refusal::new(ProblemKind::ForkFailed, format!("{which} {not}: {error}"))
}

/// A point on disk to go on from: a paused agent is there already.
async fn branch(core: &Arc<Core>, handle: &Handle) -> Result<Branch, Refusal> {
    if handle.agent().state == AgentState::Paused
        && handle.0.body.is_recorded()
        && let Some(hold) = handle.base()
    {
        return Ok(Branch { hold, pause_us: 0, durable_us: 0 });
    }
    let draft = core.snapshots.draft();
    let taken = handle.snapshot(draft.dir()).await?;
    let hold = core.snapshots.adopt(draft.dir(), None).map_err(SnapshotFailure::Store)?;
    Ok(Branch { hold, pause_us: taken.report.pause_us, durable_us: taken.report.durable_us })
}

/// Begins the fork with the next free number after `number`.
fn begin(
    core: &Arc<Core>,
    handle: &Handle,
    (hold, media, wishes): (&Hold, &Media, &Wishes),
    number: &mut u64,
    grant: &Grant,
) -> Result<(AgentName, impl Future<Output = Result<Agent, BootError>> + use<>), Refusal> {
    let parent = handle.agent();
    loop {
        *number += 1;
        let text = format!("{}-{number}", handle.name());
        let name: AgentName =
            text.parse().map_err(|e| Refusal::new(ProblemKind::InvalidValue, format!("{e}")))?;
        let birth = Birth {
            hold: hold.clone(),
            origin: Origin::Fork { name: handle.name().clone(), id: handle.id().to_owned() },
            wishes: Wishes {
                name: Some(name.clone()),
                // A fork of a service's replica is none.
                labels: without_own_labels(&parent.labels),
                owner: parent.owner.clone(),
                ..wishes.clone()
            },
            grant: grant.clone(),
        };
        match birth::begin_restore(core, birth, media.clone()) {
            Ok(fork) => return Ok((name, fork)),
            Err(AdmitError::NameTaken(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

//! The task that makes what the pool lacks, one thing at a time, while nobody waits for anything else.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use ark_types::agent::AgentName;
use ark_types::scheduling::Resources;
use tokio::time::{sleep, timeout};

use super::line::Rest;
use super::{CALM, DEN_VCPUS, Den, Inner, PATIENCE, Pool, end};
use crate::agent::{self, Standby};
use crate::cleanup::Home;
use crate::core::Core;
use crate::host::Memory;
use crate::supervisor::Vmm;

/// How often it is looked whether memory is short, a template fell out of use or demand faded.
const LOOK: Duration = Duration::from_secs(5);
/// How long after a failure the next thing of its kind is made.
const BACK_OFF: Duration = Duration::from_secs(10);
/// How long standbys may have what others were promised: whoever was promised it may be about to claim one of them.
const OVERDRAWN: Duration = Duration::from_millis(100);
/// Of so many parts of the host's memory one has to be available for standbys to be kept.
const LEAST_AVAILABLE: u64 = 8;
/// And this many thirty-seconds of it for one more to be made.
const ENOUGH_AVAILABLE: u64 = 5;

/// Refills the pool of `core` until that goes or the pool is closed.
pub(crate) async fn refill(pool: Arc<Pool>, core: Weak<Core>) {
    // What is being made ends with its future.
    tokio::select! {
        () = pool.closing.cancelled() => {}
        () = fill(&pool, core) => {}
    }
}

async fn fill(pool: &Pool, core: Weak<Core>) {
    match core.upgrade() {
        Some(core) if core.probe().await.usable => {}
        // Where no VM can run there is nothing to make.
        _ => return,
    }
    let look = core.upgrade().map_or(LOOK, |core| LOOK.min(core.config.timing.demand / 4));
    loop {
        match pool.next(look) {
            Next::End => return,
            Next::Wait(limit) => pool.wait(limit).await,
            Next::Drop(standbys, dens) => end(standbys, dens).await,
            Next::Make(want) => {
                let Some(core) = core.upgrade() else { return };
                make(pool, core, want).await;
            }
        }
    }
}

enum Next {
    End,
    Wait(Duration),
    Drop(Vec<Standby>, Vec<Den>),
    Make(Want),
}

/// What is to be made next.
#[derive(Debug)]
enum Want {
    Den,
    Standby(AgentName),
}

impl Pool {
    /// What is to be done next; when it is nothing, it is looked again after `look` at the latest.
    fn next(&self, look: Duration) -> Next {
        let memory = Room::now();
        let overdrawn = self.scheduler.overdrawn();
        let at = self.started.elapsed();
        let mut inner = self.lock();
        if self.closing.is_cancelled() {
            return Next::End;
        }
        let mut gone = inner.lines.sort_out(at, memory == Room::Short);
        let is_overdrawn = inner.is_overdrawn_for(overdrawn);
        if is_overdrawn >= OVERDRAWN {
            let left = gone.iter().fold(overdrawn, |left, one| left.minus(one.needs()));
            gone.extend(inner.lines.give_up(left));
        }
        let kept = inner.dens.len().min(inner.prepared);
        let surplus = inner.dens.split_off(kept);
        let next = if !gone.is_empty() || !surplus.is_empty() {
            Next::Drop(gone, surplus)
        } else {
            inner.lines.mind_memory(memory == Room::Enough);
            // What is overdrawn may be claimed in a moment, or has to be given up.
            let look = if is_overdrawn.is_zero() { look } else { look.min(OVERDRAWN) };
            inner.make_or_wait(look, is_overdrawn.is_zero())
        };
        self.tell(&mut inner);
        inner.lines.forget_unused();
        next
    }

    /// Waits for a reason to look again, for up to `limit`.
    async fn wait(&self, limit: Duration) {
        tokio::select! {
            () = self.wake.notified() => return,
            () = self.scheduler.spare_changed() => {}
            () = sleep(limit) => {}
        }
        self.lock().lines.look_for_room();
    }
}

impl Inner {
    /// How long standbys have had what others were promised, which is `overdrawn`.
    fn is_overdrawn_for(&mut self, overdrawn: Resources) -> Duration {
        if overdrawn == Resources::default() {
            self.overdrawn_since = None;
            return Duration::ZERO;
        }
        let since = *self.overdrawn_since.get_or_insert_with(Instant::now);
        // It just began, which is longer than not at all.
        since.elapsed().max(Duration::from_nanos(1))
    }

    fn make_or_wait(&mut self, look: Duration, may_stand_by: bool) -> Next {
        let lacking = self.lines.next().filter(|_| may_stand_by);
        let was_set = lacking.as_ref().is_some_and(|(_, was_set)| *was_set);
        let standby = lacking.map(|(template, _)| Want::Standby(template));
        if standby.is_none() {
            self.content_since = Instant::now();
        }
        let lacked = self.content_since.elapsed();
        let calm = self.calm_since.elapsed();
        let den = (self.dens.len() < self.prepared).then_some(Want::Den);
        match (standby, den) {
            (Some(standby), _) if was_set && lacked >= PATIENCE => Next::Make(standby),
            (None, None) => Next::Wait(look),
            _ if self.busy > 0 && was_set => Next::Wait(look.min(PATIENCE.saturating_sub(lacked))),
            _ if self.busy > 0 => Next::Wait(look),
            _ if calm < CALM => Next::Wait(look.min(CALM - calm)),
            (_, Some(den)) => Next::Make(den),
            (Some(standby), None) => Next::Make(standby),
        }
    }
}

/// How much of the host's memory is there for standbys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Room {
    /// None: those that are there have to go.
    Short,
    /// Enough for those that are there.
    Tight,
    /// Enough for more.
    Enough,
}

impl Room {
    fn now() -> Self {
        Memory::read().map_or(Self::Enough, |memory| Self::of(&memory))
    }

    const fn of(memory: &Memory) -> Self {
        let Memory { total_mib, available_mib } = *memory;
        if available_mib < total_mib / LEAST_AVAILABLE {
            Self::Short
        } else if available_mib < total_mib * ENOUGH_AVAILABLE / 32 {
            Self::Tight
        } else {
            Self::Enough
        }
    }
}

async fn make(pool: &Pool, core: Arc<Core>, want: Want) {
    match want {
        Want::Den => match prepare(&core) {
            Ok(den) => pool.return_den(den),
            Err(why) => {
                tracing::warn!(why, "no VMM can be prepared");
                drop(core);
                // Without VMMs there are no standbys either.
                let _ = timeout(BACK_OFF, pool.closing.cancelled()).await;
            }
        },
        Want::Standby(template) => match stand_by(pool, &core, &template).await {
            Ok(()) => {}
            Err(rest) => pool.lock().lines.if_known(&template, |line| {
                if let Rest::Failed { why, .. } = &rest
                    && line.rest.why() != Some(why)
                {
                    tracing::warn!(%template, why, "no standby can be made");
                }
                line.rest = rest;
            }),
        },
    }
    pool.lock().content_since = Instant::now();
}

/// Makes a standby of `template`.
async fn stand_by(pool: &Pool, core: &Arc<Core>, template: &AgentName) -> Result<(), Rest> {
    let failed = |why| Rest::Failed { why, until: Instant::now() + BACK_OFF };
    let Some(hold) = core.templates.current(template) else {
        pool.lock().lines.if_known(template, |line| line.used = None);
        return Err(failed(format!("there is no template {template} now: build it, or remove the pool")));
    };
    let dir = hold.dir().to_owned();
    let needs = core.scheduler.config().forked((hold.manifest().vcpus, hold.manifest().memory_mib));
    let spare = core.scheduler.spare(needs).ok_or(Rest::NoRoom)?;
    let began = Instant::now();
    let made = agent::stand_by(core, hold, spare).await;
    let standby = made.map_err(|refusal| failed(refusal.0.detail))?;
    pool.change(|lines| lines.get(template).made(standby, began.elapsed()));
    // Built again or removed before the line had it, the template did not know of it.
    match core.templates.current(template) {
        Some(hold) if hold.dir() == dir => {}
        _ => pool.forget(&dir).await,
    }
    Ok(())
}

fn prepare(core: &Core) -> Result<Den, String> {
    let id = format!("{:016x}", rand::random::<u64>());
    let dir = core.config.run.agent(&id);
    let home = Home::make(dir.clone()).map_err(|error| error.to_string())?;
    let program = core.config.assets.program("ark-vmm");
    let vmm = Vmm::prepare(&program, DEN_VCPUS, &dir).map_err(|error| error.to_string())?;
    Ok(Den { id, vmm, home })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_up_for_want_of_memory_is_not_made_again_at_once() {
        let room = |available_mib| Room::of(&Memory { total_mib: 3200, available_mib });
        assert_eq!((room(399), room(400)), (Room::Short, Room::Tight));
        assert_eq!((room(499), room(500)), (Room::Tight, Room::Enough));
    }
}

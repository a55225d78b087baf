//! The task that makes what the pool lacks, one thing at a time, while nobody waits for anything else.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::{CALM, DEN_VCPUS, Den, IN_USE, Pool, Want, end};
use crate::agent::{self, Standby};
use crate::cleanup::Home;
use crate::core::Core;
use crate::host::Memory;
use crate::snapshots::Hold;
use crate::supervisor::Vmm;

/// How often it is looked whether memory is short or a template fell out of use.
const LOOK: Duration = Duration::from_secs(5);
/// How long after a failure the next thing is made.
const BACK_OFF: Duration = Duration::from_secs(10);
/// Standbys are kept while this part of the host's memory is available.
const LEAST_AVAILABLE: u64 = 8;

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
    loop {
        match pool.next() {
            Next::End => return,
            Next::Wait(limit) => {
                // A notice or the limit: either way it is looked again.
                let _ = timeout(limit, pool.wake.notified()).await;
            }
            Next::Drop(standbys, dens) => end(standbys, dens).await,
            Next::Make(want) => {
                let Some(core) = core.upgrade() else { return };
                if let Err(why) = make(pool, &core, want).await {
                    tracing::warn!(why, "the pool cannot be filled");
                    drop(core);
                    sleep(BACK_OFF).await;
                }
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

impl Pool {
    fn next(&self) -> Next {
        let is_short = memory_is_short();
        let mut inner = self.lock();
        if self.closing.is_cancelled() {
            return Next::End;
        }
        let (in_use, unused): (Vec<_>, Vec<_>) =
            std::mem::take(&mut inner.in_use).into_iter().partition(|(_, since)| since.elapsed() < IN_USE);
        inner.in_use = in_use;
        let holds: Vec<Hold> = inner.in_use.iter().map(|(hold, _)| hold.clone()).collect();
        let sizes = inner.sizes;
        let mut gone = Vec::new();
        for one in std::mem::take(&mut inner.standbys) {
            let hold = holds.iter().find(|hold| one.is_of(hold.dir()));
            let has_place = hold.is_some_and(|hold| count(&inner.standbys, hold) < sizes.standbys);
            if !is_short && !one.has_ended() && has_place { inner.standbys.push(one) } else { gone.push(one) }
        }
        let kept = inner.dens.len().min(sizes.prepared);
        let surplus = inner.dens.split_off(kept);
        let calm = inner.calm_since.elapsed();
        let next = if !gone.is_empty() || !surplus.is_empty() {
            Next::Drop(gone, surplus)
        } else if inner.busy > 0 {
            Next::Wait(LOOK)
        } else if calm < CALM {
            Next::Wait(CALM - calm)
        } else if inner.dens.len() < sizes.prepared {
            Next::Make(Want::Den)
        } else {
            let lacks = |hold: &&Hold| count(&inner.standbys, hold) < sizes.standbys;
            match holds.iter().find(lacks) {
                Some(hold) if !is_short => Next::Make(Want::Standby(hold.clone())),
                _ => Next::Wait(LOOK),
            }
        };
        drop(inner);
        // Letting go of a snapshot may remove files, which is done without the lock.
        drop(unused);
        next
    }
}

/// How many of `standbys` are of the snapshot `hold`.
fn count(standbys: &[Standby], hold: &Hold) -> usize {
    standbys.iter().filter(|one| one.is_of(hold.dir())).count()
}

fn memory_is_short() -> bool {
    Memory::read().is_ok_and(|memory| memory.available_mib < memory.total_mib / LEAST_AVAILABLE)
}

async fn make(pool: &Pool, core: &Arc<Core>, want: Want) -> Result<(), String> {
    match want {
        Want::Den => {
            pool.return_den(prepare(core)?);
        }
        Want::Standby(hold) => {
            let standby = agent::stand_by(core, hold).await.map_err(|refusal| refusal.0.detail)?;
            let surplus = {
                let mut inner = pool.lock();
                let is_wanted = inner.in_use.iter().any(|(hold, _)| standby.is_of(hold.dir()));
                if pool.closing.is_cancelled() || !is_wanted {
                    Some(standby)
                } else {
                    inner.standbys.push(standby);
                    None
                }
            };
            if let Some(standby) = surplus {
                standby.end().await;
            }
        }
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

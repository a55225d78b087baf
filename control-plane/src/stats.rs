//! What agents use, seen from the host: processor time and memory of their VMMs, and the VMMs' own counters.
//!
//! Looking costs: the kernel walks a VMM's page tables for its PSS. So it is looked when somebody asks, once for all who ask at
//! the same time, at no more than [`MAX_STATS`] agents, and what was seen serves for a while.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ark_types::agent::Agent;
use ark_types::stats::{AgentStats, MAX_STATS, StatsList};
use ark_types::vmm::{ControlReply, ControlRequest, VmMetrics};
use futures_util::StreamExt as _;
use futures_util::stream;
use tokio::sync::Mutex;

use crate::agent::Handle;
use crate::host::unix_ms;
use crate::registry::Registry;
use crate::supervisor;

/// VMMs that are asked at a time.
const AT_A_TIME: usize = 16;
/// How long one VMM has to answer: a stopped one must not hold up the others.
const PATIENCE: Duration = Duration::from_millis(300);
/// How long all together have.
const PATIENCE_FOR_ALL: Duration = Duration::from_secs(3);
/// How long what was seen serves a client that shows it each second.
pub const FRESH: Duration = Duration::from_millis(500);
/// How long it serves a scrape.
pub const FRESH_ENOUGH: Duration = Duration::from_secs(5);

/// The last look.
#[derive(Debug, Default)]
pub struct Stats(Mutex<Option<(Instant, Arc<StatsList>)>>);

impl Stats {
    /// What the living agents of `registry` use, looked at no longer than `age` ago.
    pub async fn all(&self, registry: &Registry, age: Duration) -> Arc<StatsList> {
        // Held while it is looked: who comes meanwhile has the same answer.
        let mut last = self.0.lock().await;
        if let Some((at, list)) = &*last
            && at.elapsed() < age
        {
            return Arc::clone(list);
        }
        let living: Vec<Handle> = registry.all().into_iter().filter(|agent| !agent.has_ended()).collect();
        let left_out = u32::try_from(living.len().saturating_sub(MAX_STATS)).unwrap_or(u32::MAX);
        let agents = look(living.into_iter().take(MAX_STATS).collect()).await;
        let list = Arc::new(StatsList { agents, left_out });
        *last = Some((Instant::now(), Arc::clone(&list)));
        list
    }
}

/// What one agent uses now.
pub async fn of(agent: &Handle) -> AgentStats {
    let mut one = look(vec![agent.clone()]).await;
    one.pop().unwrap_or_else(|| nothing_known(&agent.agent()))
}

async fn look(agents: Vec<Handle>) -> Vec<AgentStats> {
    let deadline = tokio::time::Instant::now() + PATIENCE_FOR_ALL;
    let ask = |handle: Handle| async move {
        let agent = handle.agent();
        let Some(pid) = agent.vmm_pid else { return (agent, None) };
        let socket = handle.control_socket();
        let question = supervisor::ask_for(&socket, ControlRequest::Metrics, PATIENCE);
        let metrics = match tokio::time::timeout_at(deadline, question).await {
            Ok(Ok(ControlReply::Metrics(metrics))) => Some(metrics),
            _ => None,
        };
        (agent, Some((pid, metrics)))
    };
    let asked: Vec<_> = stream::iter(agents).map(ask).buffered(AT_A_TIME).collect().await;
    // The kernel's answers take no patience, but processor time: not that of those who serve requests.
    let read = tokio::task::spawn_blocking(move || {
        asked.into_iter().map(|(agent, vmm)| read(&agent, vmm)).collect()
    });
    read.await.unwrap_or_default()
}

fn nothing_known(agent: &Agent) -> AgentStats {
    AgentStats {
        id: agent.id.clone(),
        name: agent.name.clone(),
        image: agent.image.clone(),
        state: agent.state,
        created_unix_ms: agent.created_unix_ms,
        heartbeat_age_ms: agent.heartbeat.as_ref().map(|beat| unix_ms().saturating_sub(beat.at_unix_ms)),
        memory_mib: agent.memory_mib,
        vcpus: agent.vcpus,
        at_unix_ms: unix_ms(),
        cpu_us: None,
        pss_bytes: None,
        rss_bytes: None,
        guest_bytes: None,
        exits: None,
        devices: BTreeMap::new(),
    }
}

fn read(agent: &Agent, vmm: Option<(u32, Option<VmMetrics>)>) -> AgentStats {
    let mut stats = nothing_known(agent);
    let Some((pid, metrics)) = vmm else { return stats };
    let proc = Path::new("/proc").join(pid.to_string());
    stats.cpu_us = cpu_us(&proc);
    let memory = fs::read_to_string(proc.join("smaps_rollup")).unwrap_or_default();
    (stats.pss_bytes, stats.rss_bytes) = (bytes(&memory, "Pss"), bytes(&memory, "Rss"));
    if let Some(metrics) = metrics {
        stats.guest_bytes = Some(metrics.guest_resident_bytes);
        stats.exits = Some(metrics.exits);
        stats.devices = metrics.devices.into_iter().map(|device| (device.name, device.counters)).collect();
    }
    stats
}

/// User and system time of the process whose directory is `proc`, microseconds.
pub(crate) fn cpu_us(proc: &Path) -> Option<u64> {
    let stat = fs::read_to_string(proc.join("stat")).ok()?;
    ticks(&stat).map(|ticks| ticks.saturating_mul(1_000_000) / ticks_per_second())
}

/// Fields 14 and 15 of proc_pid_stat(5); the second, the program's name, may contain anything.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ').skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    user.checked_add(system)
}

pub(crate) fn ticks_per_second() -> u64 {
    let known = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten();
    known.and_then(|ticks| u64::try_from(ticks).ok()).filter(|ticks| *ticks > 0).unwrap_or(100)
}

/// The line `name:  12 kB` of smaps_rollup, bytes.
fn bytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_kernels_words_are_understood() {
        let stat = "77 (a) b) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20 0 1 0 5";
        assert_eq!(ticks(stat), Some(300));
        let rollup = "55d0-7ffc ---p 0 00:00 0   [rollup]\nRss:    12 kB\nPss:   10 kB\nPss_Anon: 5 kB\n";
        assert_eq!((bytes(rollup, "Pss"), bytes(rollup, "Rss")), (Some(10 << 10), Some(12 << 10)));
        assert_eq!(bytes(rollup, "Swap"), None);
        let this = Path::new("/proc/self");
        let before = cpu_us(this).unwrap();
        while cpu_us(this).unwrap() == before {
            std::hint::black_box((0..100_000).sum::<u64>());
        }
        assert!(bytes(&fs::read_to_string("/proc/self/smaps_rollup").unwrap(), "Pss").unwrap() > 0);
    }

    proptest! {
        #[test]
        fn no_text_makes_the_readers_panic(text: String) {
            let _ = (ticks(&text), bytes(&text, "Pss"));
        }
    }
}

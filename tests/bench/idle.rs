//! What an `arkd` takes that has nothing to do but to listen to agents that have nothing to do either.

use std::time::{Duration, Instant};

use ark_tests::{Rest, World, processor_is_emulated, processor_s, pss_mib};

use crate::crowd::{at_once, create};
use crate::peers::Bench;
use crate::report::{Must, Report};

/// Agents.
const AGENTS: usize = 20;
/// Time that each sample takes.
const WINDOW: Duration = Duration::from_secs(20);
/// Time for what was begun before to be done.
const SETTLE: Duration = Duration::from_secs(10);

/// Resident memory, MiB.
fn resident_mib(pid: i32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a resident size");
    line.trim().trim_end_matches(" kB").trim().parse::<f64>().expect("KiB") / 1024.0
}

pub(crate) fn measure(bench: &Bench, report: &mut Report) {
    let world = World::new().with_pool(2, 2);
    world.create_fork("base", "first");
    at_once(&world, 1..AGENTS, |rest, number| create(rest, "base", number));
    drop(Rest::connect(&world));
    std::thread::sleep(SETTLE);
    let pid = world.daemon_pid().expect("arkd runs").as_raw();
    let share: Vec<f64> = (0..bench.samples(5))
        .map(|_| {
            let (begin, before) = (Instant::now(), processor_s(pid));
            std::thread::sleep(WINDOW);
            100.0 * (processor_s(pid) - before) / begin.elapsed().as_secs_f64()
        })
        .collect();
    // An emulated processor is many times slower.
    let must = if processor_is_emulated() { Must::Shown } else { Must::AtMost(1.0) };
    let name = format!("idle arkd with {AGENTS} idle agents, of a core");
    report.alone(&name, "%", &share, must);
    report.alone("the same, resident memory", "MiB", &[resident_mib(pid)], Must::Shown);
    report.alone("the same, PSS", "MiB", &[pss_mib(pid)], Must::Shown);
    world.end();
}

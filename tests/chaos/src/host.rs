//! Processes, directories, sockets and descriptors of one `arkd`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::Stage;
pub use crate::procs::{Proc, processes_mentioning};

/// Descriptors that an `arkd` without agents has at most: its runtime, log, database, sockets, and clients that left just now.
const DESCRIPTORS: usize = 64;
/// Descriptors of each agent at most.
pub(crate) const DESCRIPTORS_OF_AN_AGENT: usize = 12;
/// How long a killed process may take to be gone.
const GONE: Duration = Duration::from_secs(10);

/// Processes of `stage`.
#[must_use]
pub fn processes(stage: &Stage<'_>) -> Vec<Proc> {
    processes_mentioning(&stage.dir.to_string_lossy())
}

/// Process ids of its VMMs.
#[must_use]
pub fn vmms(stage: &Stage<'_>) -> BTreeSet<i32> {
    processes(stage).into_iter().filter(|p| p.command.contains("ark-vmm run")).map(|p| p.pid).collect()
}

/// Kills the VMM `pid` and waits for its end; whether there was such a VMM.
pub fn kill_vmm(stage: &Stage<'_>, pid: i32) -> bool {
    if !vmms(stage).contains(&pid) || kill(Pid::from_raw(pid), Signal::SIGKILL).is_err() {
        return false;
    }
    let end = Instant::now() + GONE;
    while vmms(stage).contains(&pid) && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

/// Names in `dir`; none when there is no such directory.
#[must_use]
pub fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Open descriptors of the process `pid`.
#[must_use]
pub fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// What the host has against what `arkd` (process `pid`) tells of `agents`, `templates` many templates there being.
///
/// # Errors
/// The first thing that is too much or missing. Something may be under way: ask again.
pub fn check(stage: &Stage<'_>, pid: u32, agents: &[Value], templates: usize) -> Result<(), String> {
    let ids: BTreeSet<String> =
        agents.iter().filter_map(|agent| agent["id"].as_str().map(str::to_owned)).collect();
    check_vmms(stage, agents, &ids)?;
    let paused: BTreeSet<String> = agents
        .iter()
        .filter(|agent| agent["state"] == "paused")
        .filter_map(|agent| agent["id"].as_str().map(str::to_owned))
        .collect();
    // Others are there as long as somebody's memory is read from them.
    let mut recorded = names(&stage.state.paused());
    recorded.retain(|id| stage.state.paused().join(id).join("agent.json").exists());
    same("paused agents on disk", &recorded, &paused)?;
    let stray: Vec<String> =
        names(&stage.state.snapshots()).into_iter().filter(|name| name.contains("tmp")).collect();
    same("half snapshots", &stray, &Vec::new())?;
    same("templates on disk", &names(&stage.state.templates()).len(), &templates)?;
    let known = ["agents", "arkd.sock", "arkd.lock", "probe.json"];
    let stray: Vec<String> =
        names(&stage.run.0).into_iter().filter(|name| !known.contains(&name.as_str())).collect();
    same("strangers in the run directory", &stray, &Vec::new())?;
    let (open, most) = (descriptors(pid), DESCRIPTORS + DESCRIPTORS_OF_AN_AGENT * agents.len());
    if open > most {
        Err(format!("arkd has {open} descriptors open, at most {most} expected"))
    } else {
        Ok(())
    }
}

/// Every VMM is an agent's or waits in the pool, and so is every directory.
fn check_vmms(stage: &Stage<'_>, agents: &[Value], ids: &BTreeSet<String>) -> Result<(), String> {
    let pid_of = |value: &Value| value.as_i64().and_then(|pid| i32::try_from(pid).ok());
    let told: BTreeSet<i32> = agents.iter().filter_map(|agent| pid_of(&agent["vmm_pid"])).collect();
    let run = vmms(stage);
    if let Some(pid) = told.difference(&run).next() {
        return Err(format!("an agent has the VMM {pid}, which does not run"));
    }
    let spare: BTreeSet<i32> = run.difference(&told).copied().collect();
    let nameless: BTreeSet<String> = names(&stage.run.agents()).difference(ids).cloned().collect();
    if !stage.has_pool {
        same("VMMs of nobody", &spare, &BTreeSet::new())?;
        return same("directories of nobody", &nameless, &BTreeSet::new());
    }
    let of_nameless: BTreeSet<i32> = nameless
        .iter()
        .filter_map(|id| fs::read(stage.run.agent(id).identity()).ok())
        .filter_map(|text| pid_of(&serde_json::from_slice::<Value>(&text).ok()?["pid"]))
        .collect();
    same("VMMs of nobody, and those that wait in the pool,", &spare, &of_nameless)?;
    same("directories of the pool", &nameless.len(), &of_nameless.len())
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, there: &T, expected: &T) -> Result<(), String> {
    if there == expected { Ok(()) } else { Err(format!("{what}: {there:?}, expected {expected:?}")) }
}

//! What an earlier `arkd` left in the run directory, and what becomes of it.
//!
//! | record (`agent.json`) | VMM | what becomes of them |
//! |---|---|---|
//! | none: nobody was told of the agent | any | ended, removed |
//! | cannot be read, or is another agent's, which was about to go on there or did so before | any | ended, removed, with an error in the log |
//! | any, but the agent is paused, on disk | any | ended, removed; the agent is taken in from there |
//! | it goes with its first streamed exec | any | ended, removed: its one client left with the earlier `arkd` |
//! | it runs | the very same process | adopted |
//! | it runs | gone, or its id is another process's by now | stopped or failed, as its exit file says, and restarted if its policy says so |
//! | half restored | any | ended; failed |
//! | half restarted, or it waits for that | any | ended; it waits, and is restarted |
//! | it ended | none | kept as it is, until somebody deletes it |
//!
//! A process is known by its id, start time and boot, and held by a descriptor before anything is done to it: an id that another
//! process has by now is never touched. A VMM that does not answer is adopted all the same: it may be stopped, busy or about to end,
//! and ending it would lose what its agent was promised to keep. It is asked until it says that it goes on.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::time::Duration;

use ark_types::agent::AgentState;
use ark_types::layout::{AgentDir, RunDir, StateDir};
use ark_types::vmm::{ExitReason, ExitRecord, SnapshotId};
use futures_util::StreamExt as _;
use futures_util::stream;

use crate::agent::{Known, is_paused};
use crate::cleanup::remove_agent_dir;
use crate::host::unix_ms;
use crate::supervisor::{self, ProcessIdentity, Terminated, Vmm, record_left_in};

/// How long a killed VMM may take to be gone: the kernel has its memory to give back.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// How long a VMM may take to answer before it counts as silent.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// VMMs that are asked at a time: each costs a descriptor.
const ASKED_AT_ONCE: usize = 16;

/// What was found.
#[derive(Debug, Default)]
pub struct Survivors {
    /// Agents that go on or are known as ended, oldest first.
    pub(crate) agents: Vec<Survivor>,
    /// Ids of agents that nobody was told of. Nothing of them runs; their directories are to go once the log says so, too: until
    /// then they are all that tells the next `arkd`, should this one be killed, that nobody knows of them.
    pub(crate) untold: HashSet<String>,
    /// VMMs that still ran and were ended.
    pub vmms_ended: usize,
    /// Directories that were removed, or are to be.
    pub directories_removed: usize,
}

/// An agent that an earlier `arkd` acknowledged.
#[derive(Debug)]
pub(crate) struct Survivor {
    pub(crate) known: Known,
    /// Its VMM, adopted; none when that has ended, as the record then says.
    pub(crate) vmm: Option<Vmm>,
    pub(crate) stance: Stance,
}

/// Whether the VMM of an agent that nobody was told to be paused goes on. An answer also proves that no snapshot is written any
/// more for an `arkd` that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stance {
    /// It does, or there is none.
    Goes,
    /// It stood still in the middle of a pause, and was set going again.
    SetGoing,
    /// It does not say: it may yet stand still.
    Silent,
}

impl Survivors {
    /// The snapshots that the memory of those who go on is read from.
    pub(crate) fn needed(&self) -> Vec<SnapshotId> {
        let alive = self.agents.iter().filter(|survivor| survivor.vmm.is_some());
        alive.filter_map(|survivor| survivor.known.snapshot).collect()
    }
}

/// What an agent's record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// There is none.
    Nothing,
    /// It cannot be read.
    Garbage,
    /// It is one.
    Agent { state: AgentState, auto_remove: bool },
}

/// What is there of the process that a record names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// It is that process.
    Same,
    /// It is gone; its id may be another's.
    Gone,
    /// Another VMM was started in its place meanwhile.
    Replaced,
}

/// What becomes of a directory and its VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// The agent goes on.
    Adopt,
    /// The agent is known as ended from here on, as its exit file says.
    Conclude,
    /// The agent failed: what was made of it is incomplete.
    Abandon,
    /// The agent ended before.
    Keep,
    /// Nothing is left.
    Remove,
}

/// The table in the module's documentation.
const fn verdict(told: Told, is_paused: bool, seen: Seen) -> Verdict {
    let (state, auto_remove) = match told {
        Told::Nothing | Told::Garbage => return Verdict::Remove,
        Told::Agent { state, auto_remove } => (state, auto_remove),
    };
    if is_paused || auto_remove {
        return Verdict::Remove;
    }
    match (state, seen) {
        (AgentState::Creating, Seen::Same | Seen::Gone | Seen::Replaced) => Verdict::Abandon,
        (AgentState::Running | AgentState::Paused | AgentState::Stopping, Seen::Same) => Verdict::Adopt,
        (AgentState::Running | AgentState::Paused | AgentState::Stopping, Seen::Gone) => Verdict::Conclude,
        (AgentState::Running | AgentState::Paused | AgentState::Stopping, Seen::Replaced) => Verdict::Abandon,
        (AgentState::Stopped | AgentState::Failed, Seen::Same | Seen::Gone | Seen::Replaced) => Verdict::Keep,
    }
}

/// Looks at every agent's directory in `run`, ends and removes what nobody was promised, and adopts the rest. Call it with both
/// locks held, and before what is in `state` is read: a VMM may still write there.
///
/// # Errors
/// When the directory of agents cannot be read.
pub async fn look(run: &RunDir, state: &StateDir) -> io::Result<Survivors> {
    let mut survivors = Survivors::default();
    let entries = match fs::read_dir(run.agents()) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(survivors),
        other => other?,
    };
    let mut dirs = Vec::new();
    for entry in entries {
        let entry = entry?;
        if let Some(id) = entry.file_name().to_str().filter(|name| is_id(name)) {
            dirs.push((id.to_owned(), AgentDir(entry.path()), is_paused(state, id)));
        }
    }
    // Each as a task: they are many, and more than one processor can look.
    let examined = dirs.into_iter().map(|(id, dir, is_paused)| {
        let place = dir.clone();
        let examined = tokio::spawn(async move { examine(&place, is_paused).await });
        async move { ((id, dir, is_paused), examined.await.unwrap_or_else(|e| Err(io::Error::other(e)))) }
    });
    let mut examined = stream::iter(examined).buffer_unordered(ASKED_AT_ONCE);
    while let Some(((id, dir, is_paused), examined)) = examined.next().await {
        match examined {
            Ok(Examined { told, survivor, vmms_ended }) => {
                survivors.vmms_ended += vmms_ended;
                match survivor {
                    Some(survivor) => survivors.agents.push(*survivor),
                    None => {
                        survivors.directories_removed += 1;
                        if told == Told::Nothing && !is_paused {
                            survivors.untold.insert(id);
                        } else {
                            remove_agent_dir(&dir.0);
                        }
                    }
                }
            }
            // Its directory stays, so that the next start finds it again.
            Err(error) => {
                tracing::error!(path = %dir.0.display(), %error, "a VMM of an earlier arkd can be neither adopted nor ended");
            }
        }
    }
    survivors.agents.sort_by_key(|survivor| survivor.known.record.agent.created_unix_ms);
    Ok(survivors)
}

/// What came of one directory.
struct Examined {
    told: Told,
    /// None when the directory is to go.
    survivor: Option<Box<Survivor>>,
    vmms_ended: usize,
}

async fn examine(dir: &AgentDir, is_paused: bool) -> io::Result<Examined> {
    let (told, known) = read(dir)?;
    let named = known.as_ref().and_then(|known| known.process.clone());
    let started = ProcessIdentity::read(&dir.identity()).ok();
    let pinned = named.as_ref().map(ProcessIdentity::pin).transpose()?.flatten();
    let is_replaced = named.is_some() && started.is_some() && named != started;
    let seen = match &pinned {
        _ if is_replaced => Seen::Replaced,
        Some(_) => Seen::Same,
        None => Seen::Gone,
    };
    let verdict = verdict(told, is_paused, seen);
    let mut vmms_ended = 0;
    let survivor = match (verdict, known, &named, pinned) {
        (Verdict::Adopt, Some(mut known), Some(named), Some(pinned)) => {
            // What it was about to be nobody was told.
            known.record.agent.state = AgentState::Running;
            let vmm = Vmm::adopt(named.clone(), pinned, dir.clone())?;
            let stance = set_going(dir, &known).await;
            Some(Survivor { known, vmm: Some(vmm), stance })
        }
        (verdict, known, named, _) => {
            let is_another = started != *named;
            for process in [started, named.clone().filter(|_| is_another)].into_iter().flatten() {
                vmms_ended += end(process).await?;
            }
            known.and_then(|known| match verdict {
                Verdict::Keep => Some(ended_before(known)),
                Verdict::Conclude | Verdict::Adopt => {
                    Some(conclude(known, ended_meanwhile(dir, named.as_ref())))
                }
                Verdict::Abandon => Some(abandon(known)),
                Verdict::Remove => None,
            })
        }
    };
    Ok(Examined { told, survivor: survivor.map(Box::new), vmms_ended })
}

/// What the record in `dir` says. One that cannot be read now is an error: whoever it is of, nothing is done to them.
fn read(dir: &AgentDir) -> io::Result<(Told, Option<Known>)> {
    match Known::read(dir) {
        Ok(Some(known)) => {
            let agent = &known.record.agent;
            Ok((Told::Agent { state: agent.state, auto_remove: agent.auto_remove }, Some(known)))
        }
        Ok(None) => Ok((Told::Nothing, None)),
        Err(error) if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) => {
            tracing::error!(path = %dir.0.display(), %error, "the record of an agent is none; its VMM is ended");
            Ok((Told::Garbage, None))
        }
        Err(error) => Err(error),
    }
}

/// Sets the VMM in `dir` going again when it stands still in the middle of a pause, as its agent was never said to be paused.
async fn set_going(dir: &AgentDir, known: &Known) -> Stance {
    match supervisor::set_going(&dir.control_socket(), ANSWER_LIMIT).await {
        Ok(true) => Stance::SetGoing,
        Ok(false) => Stance::Goes,
        Err(error) => {
            let name = &known.record.agent.name;
            tracing::warn!(%name, %error, "the VMM of an agent does not say that it goes on; the agent is adopted as it is");
            Stance::Silent
        }
    }
}

/// Ends `process`, if it is that process still; how many were ended.
async fn end(process: ProcessIdentity) -> io::Result<usize> {
    let ended = tokio::task::spawn_blocking(move || process.terminate(KILL_LIMIT)).await;
    Ok(usize::from(ended.map_err(io::Error::other)?? == Terminated::Killed))
}

fn ended_before(known: Known) -> Survivor {
    Survivor { known, vmm: None, stance: Stance::Goes }
}

/// The agent, ended by `record`.
fn conclude(mut known: Known, record: ExitRecord) -> Survivor {
    known.record.ended(record);
    let agent = &known.record.agent;
    tracing::warn!(id = agent.id, name = %agent.name, reason = agent.reason, "an agent ended while arkd was away");
    (known.process, known.snapshot) = (None, None);
    ended_before(known)
}

/// The agent, of which only half is there: one that was being restarted is restarted again, any other has failed.
fn abandon(mut known: Known) -> Survivor {
    if !known.record.wait_again() {
        return conclude(known, half_restored());
    }
    (known.process, known.snapshot) = (None, None);
    ended_before(known)
}

/// How a VMM ended that is no more.
fn ended_meanwhile(dir: &AgentDir, process: Option<&ProcessIdentity>) -> ExitRecord {
    if process.is_some_and(|process| !process.is_of_this_boot()) {
        let detail = "the host was started anew while arkd was away; what the agent held in memory is lost";
        return ExitRecord { reason: ExitReason::Killed, detail: Some(detail.into()), at_unix_ms: unix_ms() };
    }
    record_left_in(dir, "it ended while arkd was away")
}

fn half_restored() -> ExitRecord {
    let detail = "arkd was killed while the agent was put back to a snapshot: make a new agent of that with `ark restore`";
    ExitRecord { reason: ExitReason::Killed, detail: Some(detail.into()), at_unix_ms: unix_ms() }
}

/// Whether `name` is an agent's id: nothing else in the directory is touched.
fn is_id(name: &str) -> bool {
    name.len() == 16 && name.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;
    use crate::cleanup::make_private_dir;

    const STATES: [AgentState; 6] = [
        AgentState::Creating,
        AgentState::Running,
        AgentState::Paused,
        AgentState::Stopping,
        AgentState::Stopped,
        AgentState::Failed,
    ];

    fn told() -> impl Strategy<Value = Told> {
        let agent = (prop::sample::select(STATES.to_vec()), any::<bool>())
            .prop_map(|(state, auto_remove)| Told::Agent { state, auto_remove });
        prop_oneof![Just(Told::Nothing), Just(Told::Garbage), agent]
    }

    fn seen() -> impl Strategy<Value = Seen> {
        prop::sample::select(vec![Seen::Same, Seen::Gone, Seen::Replaced])
    }

    proptest! {
        #[test]
        fn only_an_acknowledged_agent_in_the_same_process_goes_on(told in told(), paused: bool, seen in seen()) {
            if verdict(told, paused, seen) == Verdict::Adopt {
                let is_acknowledged = matches!(told, Told::Agent { state, auto_remove: false }
                    if !matches!(state, AgentState::Creating | AgentState::Stopped | AgentState::Failed));
                prop_assert!(is_acknowledged && !paused && seen == Seen::Same);
            }
        }

        #[test]
        fn an_acknowledged_agent_is_never_silently_gone(told in told(), paused: bool, seen in seen()) {
            if verdict(told, paused, seen) == Verdict::Remove {
                let is_nobodys = matches!(told, Told::Nothing | Told::Garbage);
                let goes_with_its_client = matches!(told, Told::Agent { auto_remove: true, .. });
                prop_assert!(paused || is_nobodys || goes_with_its_client);
            }
        }

        #[test]
        fn what_ended_stays_ended(paused: bool, seen in seen(), failed: bool) {
            let state = if failed { AgentState::Failed } else { AgentState::Stopped };
            let verdict = verdict(Told::Agent { state, auto_remove: false }, paused, seen);
            prop_assert_eq!(verdict, if paused { Verdict::Remove } else { Verdict::Keep });
        }
    }

    #[tokio::test]
    async fn what_nobody_was_told_of_is_ended_and_is_to_go_and_nothing_else_is_touched() {
        let dir = tempfile::tempdir().unwrap();
        let (run, state) = (RunDir(dir.path().to_owned()), StateDir(dir.path().join("state")));
        assert!(look(&run, &state).await.unwrap().agents.is_empty());

        let mut vmm = Command::new("sleep").arg("1000").spawn().unwrap();
        let mut stranger = Command::new("sleep").arg("1000").spawn().unwrap();
        let alive = run.agent("0000000000000001");
        let reused = run.agent("0000000000000002");
        let unborn = run.agent("0000000000000003");
        let torn = run.agent("0000000000000004");
        for agent in [&alive, &reused, &unborn, &torn] {
            make_private_dir(&agent.0).unwrap();
        }
        ProcessIdentity::of(vmm.id()).unwrap().write(&alive.identity()).unwrap();
        let mut other = ProcessIdentity::of(stranger.id()).unwrap();
        other.start_ticks += 1;
        other.write(&reused.identity()).unwrap();
        fs::write(torn.identity(), "{\"pid\":").unwrap();
        fs::create_dir(run.agents().join("mine")).unwrap();

        let survivors = look(&run, &state).await.unwrap();
        assert_eq!((survivors.vmms_ended, survivors.directories_removed), (1, 4));
        assert!(survivors.agents.is_empty());
        vmm.wait().unwrap();
        assert!(stranger.try_wait().unwrap().is_none());
        stranger.kill().unwrap();
        stranger.wait().unwrap();
        // They go once the log says so; until then they are found again.
        assert_eq!(survivors.untold.len(), 4);
        let again = look(&run, &state).await.unwrap();
        assert_eq!((again.vmms_ended, again.untold), (0, survivors.untold));
    }
}

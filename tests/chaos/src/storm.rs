//! Rounds: load, kill, start again, look; and an end that leaves nothing.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ark_types::layout::StateDir;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Value, json};

use crate::Stage;
use crate::client::{Client, Said};
use crate::history::History;
use crate::host;
use crate::http::Connection;
use crate::look::look;
use crate::model::{Life, Model};
use crate::operations::{OPERATIONS, Operation, one_of};
use crate::{services, tasks};

/// Between two looks whether an `arkd` listens.
const AGAIN: Duration = Duration::from_millis(2);
/// Longest time that an `arkd` has to start before it is killed once more.
const HALF_STARTED_MS: u64 = 120;

/// How a storm goes.
#[derive(Clone, Copy, Debug)]
pub struct Storm {
    /// What the dice begin with.
    pub seed: u64,
    /// How often `arkd` is killed under load.
    pub rounds: usize,
    /// Clients at once.
    pub clients: usize,
}

impl Storm {
    /// The storm that `ARK_CHAOS_SEED` and `ARK_CHAOS_ROUNDS` ask for; a seed of the clock's and `rounds` where they do not.
    ///
    /// # Panics
    /// When either is no number.
    #[must_use]
    pub fn from_env(rounds: usize, clients: usize) -> Self {
        let number = |name: &str| {
            let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
            Some(text.parse::<u64>().unwrap_or_else(|_| panic!("{name}={text} is no number")))
        };
        let now = || std::time::UNIX_EPOCH.elapsed().map_or(0, |since| u64::from(since.subsec_nanos()));
        let rounds = number("ARK_CHAOS_ROUNDS").and_then(|n| usize::try_from(n).ok()).unwrap_or(rounds);
        Self { seed: number("ARK_CHAOS_SEED").unwrap_or_else(now), rounds, clients }
    }

    fn dice(&self, round: usize, thrower: usize) -> StdRng {
        let place = (round as u64) << 16 | thrower as u64;
        StdRng::seed_from_u64(self.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ place)
    }
}

/// Names the seed when a round ends in a panic.
struct Announced(Storm, usize);

impl Drop for Announced {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "chaos: in round {} of {}; again with ARK_CHAOS_SEED={} ARK_CHAOS_ROUNDS={}",
                self.1, self.0.rounds, self.0.seed, self.0.rounds
            );
        }
    }
}

/// An `arkd` of the storm. With it end its VMMs, whatever becomes of the storm.
struct Arkd<'a> {
    stage: &'a Stage<'a>,
    child: Child,
}

impl<'a> Arkd<'a> {
    fn spawn(stage: &'a Stage<'a>) -> Self {
        let log =
            OpenOptions::new().create(true).append(true).open(stage.dir.join("arkd.log")).expect("a log");
        let child = (stage.arkd)()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("arkd can be started");
        Self { stage, child }
    }

    /// Waits until it answers. That somebody can connect says less: a program that the killed one was just about to start may hold
    /// its socket a moment longer.
    fn ready(mut self) -> Self {
        let end = Instant::now() + self.stage.patience;
        let answers = || {
            Connection::open(&self.stage.run.api_socket(), self.stage.patience)?.call("GET", "/v1/health", "")
        };
        while answers().is_err() {
            let ended = self.child.try_wait().expect("arkd can be waited for");
            assert!(ended.is_none() && Instant::now() < end, "arkd does not serve: {ended:?}{}", self.said());
            std::thread::sleep(AGAIN);
        }
        self
    }

    /// The end of its log.
    fn said(&self) -> String {
        let text = fs::read_to_string(self.stage.dir.join("arkd.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(30).collect();
        lines.into_iter().rev().map(|line| format!("\n  {line}")).collect()
    }

    /// Nothing in it panicked, not even what nobody waits for.
    fn check_log(&self) {
        let text = fs::read_to_string(self.stage.dir.join("arkd.log")).unwrap_or_default();
        let panic = text.lines().find(|line| line.contains("panicked at"));
        assert!(panic.is_none(), "arkd panicked: {panic:?}");
    }

    fn end(&mut self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("a pid is an i32");
        kill(Pid::from_raw(pid), signal).expect("arkd is there");
        self.wait();
    }

    fn wait(&mut self) {
        let end = Instant::now() + self.stage.patience;
        while self.child.try_wait().expect("arkd can be waited for").is_none() {
            assert!(Instant::now() < end, "arkd was asked to end and does not{}", self.said());
            std::thread::sleep(AGAIN);
        }
    }
}

impl Drop for Arkd<'_> {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            let kept = std::env::temp_dir().join(format!("ark-chaos-{}.log", self.child.id()));
            let _ = fs::copy(self.stage.dir.join("arkd.log"), &kept);
            eprintln!("chaos: arkd's log is kept as {}", kept.display());
            for vmm in host::vmms(self.stage) {
                let _ = kill(Pid::from_raw(vmm), Signal::SIGKILL);
            }
        }
    }
}

/// A storm of [`OPERATIONS`] on `stage`, and the calm after it.
///
/// # Panics
/// When a promise was broken, with what is known of it and the seed.
pub fn storm(stage: &Stage<'_>, plan: Storm) {
    storm_of(stage, plan, OPERATIONS);
}

/// The same with other operations.
///
/// # Panics
/// As [`storm`].
pub fn storm_of(stage: &Stage<'_>, plan: Storm, operations: &[Operation]) {
    eprintln!("chaos: ARK_CHAOS_SEED={} ARK_CHAOS_ROUNDS={}", plan.seed, plan.rounds);
    let model = Mutex::new(Model::default());
    let began = Instant::now();
    let mut history = History::default();
    let mounts = mounts(stage);
    let mut arkd = Arkd::spawn(stage).ready();
    make_template(&mut Client::new(stage, &model, 0, plan.dice(0, 0)));
    for round in 1..=plan.rounds {
        let _announced = Announced(plan, round);
        eprintln!("chaos: {} s, round {round}", began.elapsed().as_secs());
        let mut dice = plan.dice(round, 0);
        model.lock().expect("nobody failed").note(format!("round {round}"));
        load(stage, &model, plan, round, operations, || {
            std::thread::sleep(short_or_long(stage.load, &mut dice));
            let signal = if dice.random_range(0..6) == 0 { Signal::SIGTERM } else { Signal::SIGKILL };
            model.lock().unwrap_or_else(PoisonError::into_inner).is_ending = signal == Signal::SIGTERM;
            arkd.end(signal);
        });
        model.lock().expect("nobody failed").is_ending = false;
        arkd = again(stage, &model, &mut dice);
        look(&mut Client::new(stage, &model, 0, dice), &mut history, arkd.child.id());
        arkd.check_log();
    }
    let _announced = Announced(plan, plan.rounds + 1);
    calm(stage, &model, plan, operations, (arkd, &mut history));
    assert_eq!(self::mounts(stage), mounts, "no mount is left");
}

/// The image's own template, so that no round waits for it.
fn make_template(client: &mut Client<'_>) {
    match client.call("POST", "/v1/agents", &json!({ "name": "first", "image": "base" })) {
        Said::Yes(agent) => {
            let id = agent["id"].as_str().unwrap_or_default().to_owned();
            assert!(matches!(
                client.call("DELETE", "/v1/agents/first?grace_ms=0", &Value::Null),
                Said::Yes(_)
            ));
            client.known().removed.insert(id);
        }
        other => panic!("an agent can be had: {other:?}"),
    }
}

/// Clients do what they do until `arkd` is gone, or `until` is over.
fn load(
    stage: &Stage<'_>,
    model: &Mutex<Model>,
    plan: Storm,
    round: usize,
    operations: &[Operation],
    until: impl FnOnce(),
) {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (1..=plan.clients)
            .map(|number| {
                let mut client = Client::new(stage, model, number, plan.dice(round, number));
                let is_over = &is_over;
                scope.spawn(move || {
                    let _announced = Announced(plan, round);
                    while !client.is_lost && !is_over.load(Ordering::Relaxed) {
                        one_of(operations, &mut client);
                    }
                })
            })
            .collect();
        until();
        is_over.store(true, Ordering::Relaxed);
        for client in clients {
            if let Err(panic) = client.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
}

/// A time of at most `longest`: as often a very short one as one of about that.
fn short_or_long(longest: Duration, dice: &mut StdRng) -> Duration {
    longest.mul_f64(2_f64.powf(dice.random_range(-8.0..0.0)))
}

/// Starts `arkd` again: VMMs may die while it is away, and it may be killed as it starts.
fn again<'a>(stage: &'a Stage<'a>, model: &Mutex<Model>, dice: &mut StdRng) -> Arkd<'a> {
    if dice.random_range(0..3) == 0 {
        kill_one(stage, &mut model.lock().expect("nobody failed"), dice);
    }
    for _ in 0..[0, 0, 0, 1, 2][dice.random_range(0..5)] {
        let mut half = Arkd::spawn(stage);
        std::thread::sleep(Duration::from_millis(dice.random_range(0..HALF_STARTED_MS)));
        half.end(Signal::SIGKILL);
    }
    Arkd::spawn(stage).ready()
}

/// Kills the VMM of an agent that runs, as far as anybody knows.
fn kill_one(stage: &Stage<'_>, model: &mut Model, dice: &mut StdRng) {
    let ids: Vec<String> =
        model.agents.values().filter(|k| k.is_certain(Life::Running)).map(|k| k.told.id.clone()).collect();
    let Some(id) = ids.choose(dice) else { return };
    let Some(known) = model.agents.get_mut(id) else { return };
    let identity = fs::read(stage.run.agent(id).identity()).ok();
    let pid = identity.and_then(|text| serde_json::from_slice::<Value>(&text).ok()?["pid"].as_i64());
    if let Some(pid) = pid.and_then(|pid| i32::try_from(pid).ok())
        && host::kill_vmm(stage, pid)
    {
        known.lose_vmm();
        model.note(format!("killed pid {pid} of {id} while arkd was away"));
    }
}

/// A load that ends in peace, after which everything is deleted: nothing is left of it.
fn calm(
    stage: &Stage<'_>,
    model: &Mutex<Model>,
    plan: Storm,
    operations: &[Operation],
    (mut arkd, history): (Arkd<'_>, &mut History),
) {
    let pid = arkd.child.id();
    let mut client = Client::new(stage, model, 0, plan.dice(plan.rounds + 1, 0));
    delete_everything(&mut client);
    look(&mut client, history, pid);
    let before = (host::descriptors(pid), stored(stage));
    load(stage, model, plan, plan.rounds + 1, operations, || std::thread::sleep(stage.load * 2));
    look(&mut client, history, pid);
    delete_everything(&mut client);
    look(&mut client, history, pid);
    let end = Instant::now() + stage.patience;
    loop {
        let now = (host::descriptors(pid), stored(stage));
        // A connection or two may be closing, and a fork of a template that is used by now may wait in the pool.
        if now.0 <= before.0 + 2 + usize::from(stage.has_pool) * host::DESCRIPTORS_OF_AN_AGENT
            && now.1 == before.1
        {
            break;
        }
        assert!(Instant::now() < end, "descriptors and files before and after: {before:?}, {now:?}");
        std::thread::sleep(AGAIN);
    }
    arkd.check_log();
    assert!(matches!(client.call("POST", "/v1/shutdown", &json!({ "agents": "end" })), Said::Yes(_)));
    drop(client);
    arkd.wait();
    let left = (host::processes(stage), host::names(&stage.run.0));
    assert_eq!(left, (Vec::new(), BTreeSet::new()), "nothing is left of it");
}

/// Deletes agents, services, tasks, snapshots and templates.
fn delete_everything(client: &mut Client<'_>) {
    client.known().keyed.clear();
    services::delete_all(client);
    tasks::delete_all(client);
    let ids: Vec<String> = client.known().agents.keys().cloned().collect();
    for id in ids {
        let said = client.call("DELETE", &format!("/v1/agents/{id}?grace_ms=0"), &Value::Null);
        assert!(matches!(said, Said::Yes(_)), "{id} can be deleted: {said:?}");
        let mut model = client.known();
        model.agents.remove(&id);
        model.removed.insert(id);
    }
    let points: Vec<String> = client.known().points.keys().cloned().collect();
    delete_all(client, "snapshots", points);
    let templates: Vec<String> = client.known().templates.keys().cloned().collect();
    delete_all(client, "templates", templates);
    let mut model = client.known();
    model.points.clear();
    model.templates.clear();
}

/// Deletes what is called `names`, what others need after those.
fn delete_all(client: &mut Client<'_>, kind: &str, mut names: Vec<String>) {
    while !names.is_empty() {
        let before = names.len();
        names.retain(|name| {
            let said = client.call("DELETE", &format!("/v1/{kind}/{name}"), &Value::Null);
            matches!(said, Said::No(409, _))
        });
        assert!(names.len() < before, "{kind} that nobody needs can be deleted: {names:?}");
    }
}

/// Everything in the state directory that agents, snapshots, tasks and services leave there.
fn stored(stage: &Stage<'_>) -> Vec<BTreeSet<String>> {
    let StateDir(state) = &stage.state;
    let dirs = [
        stage.state.snapshots(),
        stage.state.paused(),
        stage.state.templates(),
        stage.state.checkpoints(),
        stage.state.tasks(),
        stage.state.services(),
        state.clone(),
    ];
    dirs.iter().map(|dir| host::names(dir)).collect()
}

/// Mounts below the directory of `stage`.
fn mounts(stage: &Stage<'_>) -> usize {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines().filter(|line| line.contains(&*stage.dir.to_string_lossy())).count()
}

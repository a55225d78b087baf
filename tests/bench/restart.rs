//! A killed `arkd` with a long history and living agents is started again.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ark_tests::{Rest, World};
use nix::sys::signal::Signal;

use crate::crowd::{at_once, create};
use crate::history;
use crate::peers::Bench;
use crate::report::{Must, Report};

/// Agents that live.
const ALIVE: usize = 50;
/// Longest wait for an `arkd` to serve.
const LIMIT: Duration = Duration::from_secs(120);

pub(crate) fn measure(bench: &Bench, report: &mut Report) {
    let samples = bench.samples(10);
    let empty = World::new();
    let _ = empty.ark(["ps"]).ok();
    let fresh = restarts(empty, samples, 0);

    let world = World::new();
    history::write(&world);
    world.create_fork("base", "first");
    at_once(&world, 1..ALIVE, |rest, number| create(rest, "base", number));
    let full = restarts(world, samples, ALIVE);
    let name = format!("restart with {} agents in history, {ALIVE} alive", history::AGENTS);
    report.against(&name, "ms", &full, ("empty history", &fresh), Must::AtMost(5.0));
}

/// Kills the `arkd` of `world` time and again: from the start of the next one to its first reply, which tells of `alive` agents
/// that run; milliseconds.
fn restarts(world: World, samples: usize, alive: usize) -> Vec<f64> {
    world.end_daemon(Signal::SIGKILL);
    let mut times = Vec::with_capacity(samples);
    for number in 1..=samples {
        let begin = Instant::now();
        let mut arkd = command(&world).spawn().expect("arkd starts");
        times.push(first_reply(&world, begin, alive));
        if number == samples {
            world.stop();
        } else {
            arkd.kill().expect("arkd can be killed");
        }
        arkd.wait().expect("arkd ends");
    }
    world.end();
    times
}

fn first_reply(world: &World, begin: Instant, alive: usize) -> f64 {
    let mut rest = loop {
        assert!(begin.elapsed() < LIMIT, "arkd does not listen");
        match Rest::try_connect(world) {
            Some(rest) => break rest,
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    let (list, _) = rest.call("GET", "/v1/agents?state=running&limit=1000", "");
    let ms = begin.elapsed().as_secs_f64() * 1e3;
    assert_eq!(list["agents"].as_array().map(Vec::len), Some(alive), "all are adopted");
    ms
}

fn command(world: &World) -> Command {
    let mut command = world.command("arkd");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

//! What `arkd` costs on top of the engine: an agent from a template over REST, against the same snapshot claimed by hand in a VMM
//! that was prepared likewise. Both until the reply to a first program, one at a time and many at once.
//!
//! A claim is what makes a fork somebody: the restore, and the renewal of its guest (random numbers, clock, host name, machine-id).
//! Without the renewal two forks are one and the same, so that is shown, and no agent is made so.

use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ark_tests::{Rest, World, eventually};
use ark_types::guest::Renew;
use ark_types::vmm::Generation;

use crate::peers::Bench;
use crate::report::{Must, Report};

/// Image of the template.
const IMAGE: &str = "base";
/// How many at once, how often, and what the ratio of the p50s must be.
const CROWDS: [(usize, usize, Must); 3] =
    [(1, 30, Must::AtMost(1.3)), (10, 10, Must::Shown), (50, 4, Must::Shown)];
/// At so many at once the slowest is compared with the median.
const SPREAD_AT: usize = 10;
/// Longest time until as many VMMs wait as are wanted.
const LIMIT: Duration = Duration::from_secs(120);

/// Waits until the pool of `world` is as it was before anything was asked of it: making what it lacks takes processors.
fn wait_for_pool(world: &World, count: usize) {
    eventually("VMMs wait", LIMIT, || world.vmms().len() == count);
    // What was prepared last settles.
    std::thread::sleep(Duration::from_millis(500));
}

/// Over REST: each client on a connection of its own.
fn over_rest(world: &World, count: usize) -> Vec<f64> {
    wait_for_pool(world, count);
    let start = Barrier::new(count);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..count)
            .map(|number| {
                let start = &start;
                scope.spawn(move || {
                    let mut rest = Rest::connect(world);
                    let name = format!("cost-{number}");
                    start.wait();
                    let ms = rest.create_and_exec(&name, &format!("\"image\":\"{IMAGE}\""));
                    start.wait();
                    rest.delete(&name);
                    ms
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().expect("it is served")).collect()
    })
}

/// What is claimed by hand.
#[derive(Clone, Copy)]
enum Engine {
    /// A guest with an identity of its own.
    Claim,
    /// One that is as its snapshot was.
    Restore,
}

/// Who the guest with this number is from now on.
fn order(number: usize) -> Renew {
    let digits = |count: usize| format!("{number:0count$x}");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970");
    Renew {
        generation: Generation([0; 16]),
        nonce: digits(32),
        hostname: format!("cost-{number}"),
        machine_id: digits(32),
        seed: digits(64),
        unix_ns: u64::try_from(now.as_nanos()).expect("it is before 2554"),
    }
}

/// By hand, while the `arkd` of `world` has nothing to do.
fn alone(bench: &Bench, world: &World, snapshot: &Path, count: usize, engine: Engine) -> Vec<f64> {
    let prepared: Vec<_> = (0..count).map(|_| bench.prepare()).collect();
    Bench::let_prepare();
    std::thread::sleep(Duration::from_millis(20) * u32::try_from(count).expect("few"));
    wait_for_pool(world, count);
    let start = Barrier::new(count);
    std::thread::scope(|scope| {
        let guests: Vec<_> = prepared
            .into_iter()
            .enumerate()
            .map(|(number, prepared)| {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    let begin = Instant::now();
                    let guest = prepared.claim(snapshot, IMAGE);
                    if let Engine::Claim = engine {
                        guest.address.renew(&order(number));
                    }
                    guest.address.exec(&["/bin/true"]);
                    let ms = begin.elapsed().as_secs_f64() * 1e3;
                    start.wait();
                    ms
                })
            })
            .collect();
        guests.into_iter().map(|guest| guest.join().expect("it answers")).collect()
    })
}

pub(crate) fn measure(bench: &Bench, report: &mut Report) {
    for (count, rounds, must) in CROWDS {
        // As many VMMs are prepared as will be asked for, and no fork: the engine has the same work to do.
        let world = World::new().with_pool(u32::try_from(count).expect("few"), 0);
        world.create_fork(IMAGE, "first");
        let _ = world.ark(["rm", "first"]).ok();
        let snapshot = world.stored("templates").pop().expect("the image's own template");
        let (mut rest, mut claims, mut restores) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..bench.samples(rounds) {
            rest.extend(over_rest(&world, count));
            claims.extend(alone(bench, &world, &snapshot, count, Engine::Claim));
            if count == 1 {
                restores.extend(alone(bench, &world, &snapshot, count, Engine::Restore));
            }
        }
        let name = format!("create to first reply over REST, {count} at once");
        report.against(&name, "ms", &rest, ("claim by hand", &claims), must);
        if count == 1 {
            let name = "the same against a guest nobody renewed";
            report.against(name, "ms", &rest, ("restore by hand", &restores), Must::Shown);
        }
        if count == SPREAD_AT {
            report.spread(
                &format!("p99 to p50 of the same, {count} at once"),
                "ms",
                &rest,
                Must::AtMost(4.0),
            );
        }
        world.end();
    }
}

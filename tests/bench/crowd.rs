//! Many forks of one template: all of them answering, what each holds, and what one more costs then.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use ark_tests::{Rest, World, pss_mib};

use crate::peers::Bench;
use crate::report::{Must, Report};

/// Forks that all answer an exec.
const CROWD: usize = 100;
/// Forks that live when one more is timed.
const MOST: usize = 200;
/// Requests under way at once.
const AT_ONCE: usize = 8;
const IMAGE: &str = "python";

/// Runs `work` for every number of `range`, [`AT_ONCE`] at a time.
pub(crate) fn at_once(world: &World, range: std::ops::Range<usize>, work: impl Fn(&mut Rest, usize) + Sync) {
    let next = AtomicUsize::new(range.start);
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                let mut rest = Rest::connect(world);
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= range.end {
                        return;
                    }
                    work(&mut rest, i);
                }
            });
        }
    });
}

/// Creates one of them from the default template of `image`.
pub(crate) fn create(rest: &mut Rest, image: &str, i: usize) {
    rest.call("POST", "/v1/agents", &format!("{{\"name\":\"crowd-{i}\",{}}}", of(image)));
}

fn of(image: &str) -> String {
    format!("\"image\":\"{image}\"")
}

fn pss(world: &World) -> Vec<f64> {
    world.vmms().iter().map(|p| pss_mib(p.pid)).collect()
}

/// One at a time, created and deleted again.
fn singles(rest: &mut Rest, samples: usize) -> Vec<f64> {
    let mut all = Vec::with_capacity(samples);
    for _ in 0..samples {
        all.push(rest.create_and_exec("single", &of(IMAGE)));
        rest.delete("single");
    }
    all
}

pub(crate) fn measure(bench: &Bench, report: &mut Report) {
    // Without a pool, so that every VMM is an agent's and what is timed is the work itself.
    let world = World::new();
    world.create_fork(IMAGE, "first");
    let mut rest = Rest::connect(&world);
    let alone = singles(&mut rest, bench.samples(20));
    rest.delete("first");

    let begin = Instant::now();
    at_once(&world, 0..CROWD, |rest, i| create(rest, IMAGE, i));
    let created = begin.elapsed().as_secs_f64() * 1e3;
    let before = pss(&world);
    let replies = Mutex::new(Vec::new());
    let again = Instant::now();
    at_once(&world, 0..CROWD, |rest, i| {
        let ms = rest.exec_true(&format!("crowd-{i}"));
        replies.lock().expect("no thread failed").push(ms);
    });
    let total = created + again.elapsed().as_secs_f64() * 1e3;
    let after = pss(&world);
    assert_eq!((before.len(), after.len()), (CROWD, CROWD));
    report.alone("100 forks of one template, all answered an exec", "ms", &[total], Must::Shown);
    report.alone("PSS of each, before its first exec", "MiB", &before, Must::Shown);
    report.alone("PSS of each, after its first exec", "MiB", &after, Must::AtMost(12.0));

    at_once(&world, CROWD..MOST, |rest, i| create(rest, IMAGE, i));
    let crowded = singles(&mut rest, bench.samples(20));
    let name = "create to first exec reply among 200 forks";
    report.against(name, "ms", &crowded, ("alone", &alone), Must::AtMost(1.5));
    drop(rest);
    world.end();
}

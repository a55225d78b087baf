//! An agent from a template, REST call to the reply of its first exec, against one that is booted.

use std::time::Duration;

use ark_tests::{Rest, World};

use crate::peers::Bench;
use crate::report::{Must, Report};

/// Time the pool has between two creates to fill up again.
const BREATH: Duration = Duration::from_millis(2500);

/// Times `samples` creates of `what`, each deleted before the next and with `breath` in between.
fn times(world: &World, what: &str, samples: usize, breath: Duration) -> Vec<f64> {
    let mut rest = Rest::connect(world);
    let mut all = Vec::with_capacity(samples);
    // The first builds the template where there is none yet, and lets the pool know of it.
    for i in 0..=samples {
        let ms = rest.create_and_exec("bench", what);
        rest.delete("bench");
        if i > 0 {
            all.push(ms);
        }
        std::thread::sleep(breath);
    }
    all
}

pub(crate) fn measure(bench: &Bench, report: &mut Report) {
    let from_template = "\"image\":\"python\"";
    let cold = "\"image\":\"python\",\"cold\":true";
    let (mut warm, mut empty, mut boots) = (Vec::new(), Vec::new(), Vec::new());
    let pooled = World::new().with_pool(2, 2);
    let without = World::new().with_pool(0, 0);
    for world in [&pooled, &without] {
        let _ = world.ark(["ps"]).ok();
    }
    for _ in 0..4 {
        warm.extend(times(&pooled, from_template, bench.samples(8), BREATH));
        boots.extend(times(&without, cold, bench.samples(4), Duration::ZERO));
        empty.extend(times(&without, from_template, bench.samples(8), Duration::ZERO));
    }
    let name = "create from template to first exec reply";
    report.against(name, "ms", &warm, ("cold boot", &boots), Must::AtMost(0.15));
    report.against(&format!("{name}, pool empty"), "ms", &empty, ("cold boot", &boots), Must::Shown);
    for world in [pooled, without] {
        world.end();
    }
}

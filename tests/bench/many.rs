//! Twenty agents created at once: until all said hello, and what each holds.

use std::time::Instant;

use ark_tests::{World, pss_mib};

use crate::peers::Bench;
use crate::report::{Must, Report};

pub(crate) fn measure(_: &Bench, report: &mut Report) {
    let world = World::new();
    let _ = world.ark(["ps"]).ok();
    let one = Instant::now();
    world.create("alone");
    let one = one.elapsed().as_secs_f64() * 1e3;
    let _ = world.ark(["rm", "alone"]).ok();
    let names: Vec<String> = (0..20).map(|i| format!("many-{i}")).collect();
    let begin = Instant::now();
    let creating: Vec<_> = names
        .iter()
        .map(|n| world.start(["create", "--image", "base", "--name", n, "--memory", "128"]))
        .collect();
    for one in creating {
        let _ = one.wait().ok();
    }
    let total = begin.elapsed().as_secs_f64() * 1e3;
    let pss: Vec<f64> = world.vmms().iter().map(|p| pss_mib(p.pid)).collect();
    assert_eq!(pss.len(), 20);
    report.against(
        "20 agents created at once, all said hello",
        "ms",
        &[total],
        ("one alone", &[one]),
        Must::Shown,
    );
    report.alone("PSS of each of the 20 VMMs, guest memory included", "MiB", &pss, Must::Shown);
    world.end();
}

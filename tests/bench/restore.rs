//! The engine alone: a snapshot restored by `ark-vmm`, prepared ahead or not, and by QEMU from a file.

use std::time::{Duration, Instant};

use ark_tests::{Rest, World};

use crate::control::Control;
use crate::peers::{Bench, Vmm};
use crate::report::{Must, Report};

pub(crate) fn measure(bench: &Bench, report: &mut Report) {
    let guest = bench.boot(Vmm::Ark, "base", 256, &[]);
    guest.address.exec(&["true"]);
    let dir = bench.scratch().join("restore");
    Control::connect(&guest.control_socket()).snapshot(&dir);
    drop(guest);
    let stream = bench.scratch().join("qemu.migration");
    bench.save_qemu("base", 256, &stream);

    let (mut claimed, mut unprepared) = (Vec::new(), Vec::new());
    let (mut ours, mut pooled, mut qemu) = (Vec::new(), Vec::new(), Vec::new());
    let world = World::new().with_pool(2, 2);
    world.create_fork("base", "first");
    let _ = world.ark(["rm", "first"]).ok();
    let mut rest = Rest::connect(&world);
    for _ in 0..bench.samples(20) {
        let begin = Instant::now();
        let (child, spawned) = bench.restore(&dir, "base");
        child.address.exec(&["true"]);
        ours.push(begin.elapsed().as_secs_f64() * 1e3);
        unprepared.push(spawned.ms_to_first_run(&child));
        drop(child);
        let (child, configured) = bench.restore_prepared(&dir, "base");
        claimed.push(configured.ms_to_first_run(&child));
        drop(child);
        qemu.push(bench.restore_qemu("base", 256, &stream));
        std::thread::sleep(Duration::from_secs(2));
        pooled.push(rest.create_and_exec("bench", "\"image\":\"base\""));
        rest.delete("bench");
    }
    let name = "claim of a prepared VMM to first instruction";
    report.against(name, "ms", &claimed, ("not prepared", &unprepared), Must::AtMost(0.3));
    let other = ("QEMU -incoming", qemu.as_slice());
    report.against("create from template to first reply", "ms", &pooled, other, Must::AtMost(0.1));
    report.against("ark-vmm restore alone, start to first reply", "ms", &ours, other, Must::Shown);
    drop(rest);
    world.end();
}

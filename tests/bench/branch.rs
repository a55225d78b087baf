//! A live branch of a busy guest: how long it stands still, how long until the child is durable, and how large that is.

use std::path::Path;
use std::time::Instant;

use ark_types::vmm::ControlRequest;

use crate::control::Control;
use crate::peers::{Bench, Vmm};
use crate::report::{Must, Report};

/// Writes to 50 MiB/s of 300 MiB, page by page, as far as the processor can; says how much it did each second.
const DIRTY: &str = "
import time
page, size, rate = 4096, 300 << 20, 50 << 20
memory, at, begin, done = bytearray(size), 0, time.monotonic(), 0
while True:
    for _ in range(rate // page // 50):
        memory[at] = (memory[at] + 1) & 255
        at = (at + page) % size
    done += 1
    time.sleep(max(0, begin + done / 50 - time.monotonic()))
";

pub(crate) fn measure(bench: &Bench, report: &mut Report) {
    let guest = bench.boot(Vmm::Ark, "python", 512, &[]);
    let mut control = Control::connect(&guest.control_socket());
    let address = guest.address.clone();
    std::thread::spawn(move || address.try_exec(&["python3", "-c", DIRTY]));
    std::thread::sleep(std::time::Duration::from_secs(10));
    let (mut pause, mut durable, mut copy) = (Vec::new(), Vec::new(), Vec::new());
    let (mut full, mut bytes) = (Vec::new(), Vec::new());
    let dir = bench.scratch().join("branch");
    for _ in 0..bench.samples(10) {
        let live = control.snapshot(&dir);
        remove(&dir);
        pause.push(us(live.pause_us));
        durable.push(us(live.durable_us));
        full.push(us(live.durable_us));
        bytes.push(mib(live.written_bytes));
        let begin = Instant::now();
        control.ask(&ControlRequest::Pause);
        control.snapshot(&dir);
        control.ask(&ControlRequest::Resume);
        copy.push(begin.elapsed().as_secs_f64() * 1e3);
        remove(&dir);
    }
    let other = ("stop and copy", copy.as_slice());
    report.against("pause of a live branch, 512 MiB, busy", "ms", &pause, other, Must::AtMost(0.2));
    report.against("the same until the child is durable", "ms", &durable, other, Must::Shown);
    report.alone("size of that full snapshot", "MiB", &bytes, Must::Shown);
    drop(control);
    drop(guest);
    diffs(bench, report);
}

/// Diffs: of a guest that was restored and has done a little since.
fn diffs(bench: &Bench, report: &mut Report) {
    let guest = bench.boot(Vmm::Ark, "base", 256, &[]);
    let base = bench.scratch().join("base");
    let mut control = Control::connect(&guest.control_socket());
    let first = control.snapshot(&base);
    drop(control);
    drop(guest);
    let (mut time, mut size) = (Vec::new(), Vec::new());
    let dir = bench.scratch().join("diff");
    for _ in 0..bench.samples(10) {
        let (child, _) = bench.restore(&base, "base");
        child.address.exec(&["true"]);
        let taken = Control::connect(&child.control_socket()).snapshot(&dir);
        assert_eq!(taken.base, Some(first.id));
        time.push(us(taken.durable_us));
        size.push(mib(taken.written_bytes));
        drop(child);
        remove(&dir);
    }
    let (full_time, full_size) = (us(first.durable_us), mib(first.written_bytes));
    report.against("diff snapshot after one exec, time", "ms", &time, ("full", &[full_time]), Must::Shown);
    report.against("diff snapshot after one exec, size", "MiB", &size, ("full", &[full_size]), Must::Shown);
    remove(&base);
}

#[expect(clippy::cast_precision_loss, reason = "times and sizes are far below 2^52")]
fn us(us: u64) -> f64 {
    us as f64 / 1e3
}

#[expect(clippy::cast_precision_loss, reason = "times and sizes are far below 2^52")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn remove(dir: &Path) {
    std::fs::remove_dir_all(dir).expect("the snapshot is there");
}

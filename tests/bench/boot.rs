//! Cold boot: from the start of the VMM's process to guestd's hello.

use crate::peers::{Bench, Vmm};
use crate::report::{Must, Report};

pub(crate) fn measure(bench: &Bench, report: &mut Report) {
    let (mut ours, mut qemu, mut bare) = (Vec::new(), Vec::new(), Vec::new());
    let ms = |vmm| bench.boot(vmm, "base", 128, &[]).boot.as_secs_f64() * 1e3;
    // One of each first: the page cache is then equally warm for all.
    for vmm in [Vmm::Ark, Vmm::Qemu, Vmm::QemuBare] {
        ms(vmm);
    }
    for _ in 0..bench.samples(20) {
        ours.push(ms(Vmm::Ark));
        qemu.push(ms(Vmm::Qemu));
        bare.push(ms(Vmm::QemuBare));
    }
    let name = "cold boot, VMM start to guest's hello";
    report.against(name, "ms", &ours, ("QEMU microvm", &qemu), Must::AtMost(0.65));
    report.against(&format!("{name} (QEMU stripped)"), "ms", &ours, ("QEMU bare", &bare), Must::Shown);
}

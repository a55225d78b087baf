//! Memory of a VMM's process beyond the guest's own.

use crate::peers::{Bench, Vmm};
use crate::report::{Must, Report};

/// Private memory of `pid` in MiB, mappings of guest memory left out.
///
/// Guest memory is the one mapping of a memfd in our process, and the one anonymous mapping of its exact size in QEMU's.
fn private_mib(pid: u32, guest_mib: u64) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("smaps is readable");
    let (mut total, mut skip) = (0u64, false);
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let kib = || value.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
        if key.contains('-') {
            skip = line.contains("memfd:");
        } else if key == "Size" && kib() == guest_mib * 1024 {
            skip = true;
        } else if (key == "Private_Clean" || key == "Private_Dirty") && !skip {
            total += kib();
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "a few thousand KiB")]
    let kib = total as f64;
    kib / 1024.0
}

pub(crate) fn measure(bench: &Bench, report: &mut Report) {
    let (mut ours, mut qemu) = (Vec::new(), Vec::new());
    for _ in 0..bench.samples(5) {
        for (vmm, samples) in [(Vmm::Ark, &mut ours), (Vmm::Qemu, &mut qemu)] {
            let guest = bench.boot(vmm, "base", 128, &[]);
            guest.address.exec(&["true"]);
            samples.push(private_mib(guest.pid(), 128));
        }
    }
    report.alone("private memory of ark-vmm beyond the guest's", "MiB", &ours, Must::AtMost(3.0));
    report.against("the same, against QEMU", "MiB", &ours, ("QEMU microvm", &qemu), Must::Shown);
}

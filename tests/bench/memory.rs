//! Memory of a VMM's process beyond the guest's own.

use crate::peers::{Bench, Vmm};
use crate::report::{Must, Report};

/// Private and resident memory of `pid` in MiB, mappings of guest memory left out.
///
/// Guest memory is the one anonymous mapping of its exact size, in our process as in QEMU's.
fn beyond_guest_mib(pid: u32, guest_mib: u64) -> (f64, f64) {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("smaps is readable");
    let (mut private, mut resident, mut skip) = (0u32, 0u32, false);
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let kib = || value.trim().trim_end_matches(" kB").parse::<u32>().unwrap_or(0);
        if key.contains('-') {
            skip = false;
        } else if key == "Size" && u64::from(kib()) == guest_mib * 1024 {
            skip = true;
        } else if (key == "Private_Clean" || key == "Private_Dirty") && !skip {
            private += kib();
        } else if key == "Rss" && !skip {
            resident += kib();
        }
    }
    (f64::from(private) / 1024.0, f64::from(resident) / 1024.0)
}

pub(crate) fn measure(bench: &Bench, report: &mut Report) {
    let mut ours = (Vec::new(), Vec::new());
    let mut qemu = (Vec::new(), Vec::new());
    for _ in 0..bench.samples(5) {
        for (vmm, samples) in [(Vmm::Ark, &mut ours), (Vmm::Qemu, &mut qemu)] {
            let guest = bench.boot(vmm, "base", 128, &[]);
            guest.address.exec(&["true"]);
            let (private, resident) = beyond_guest_mib(guest.pid(), 128);
            samples.0.push(private);
            samples.1.push(resident);
        }
    }
    report.alone("private memory of ark-vmm beyond the guest's", "MiB", &ours.0, Must::AtMost(3.0));
    report.against("the same, against QEMU", "MiB", &ours.0, ("QEMU microvm", &qemu.0), Must::Shown);
    // Programs' code counts here even where another process has it mapped too.
    report.against(
        "resident memory beyond the guest's",
        "MiB",
        &ours.1,
        ("QEMU microvm", &qemu.1),
        Must::Shown,
    );
}

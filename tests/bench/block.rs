//! Block reads in the guest: sequential and random, ours against QEMU's virtio-blk on the same file.

use crate::peers::{Bench, Vmm};
use crate::report::{Must, Report};

/// Size of the disk, MiB.
const DISK_MIB: usize = 256;

/// Prints MiB/s of sequential 1 MiB reads, then 4 KiB random reads per second, past the guest's page cache.
const READER: &str = "
import mmap, os, random, time
fd = os.open('/dev/vdb', os.O_RDONLY | os.O_DIRECT)
size = os.lseek(fd, 0, os.SEEK_END); big = mmap.mmap(-1, 1 << 20); small = mmap.mmap(-1, 4096)
a = time.perf_counter()
for at in range(0, size, 1 << 20): assert os.preadv(fd, [big], at) == 1 << 20
print(size / (1 << 20) / (time.perf_counter() - a))
random.seed(1); n = 2000
a = time.perf_counter()
for _ in range(n): os.preadv(fd, [small], random.randrange(size // 4096) * 4096)
print(n / (time.perf_counter() - a))
";

pub(crate) fn measure(bench: &Bench, report: &mut Report) {
    let disk = bench.scratch().join("disk");
    std::fs::write(&disk, vec![0x5a; DISK_MIB << 20]).expect("room for the disk");
    let mut sequential = [Vec::new(), Vec::new()];
    let mut random = [Vec::new(), Vec::new()];
    for _ in 0..bench.samples(5) {
        for (i, vmm) in [Vmm::Ark, Vmm::Qemu].into_iter().enumerate() {
            let guest = bench.boot(vmm, "python", 256, &[&disk]);
            for _ in 0..2 {
                let said = guest.address.exec(&["python3", "-c", READER]);
                let mut figures = said.lines().map(|l| l.parse::<f64>().expect("a figure"));
                sequential[i].push(figures.next().expect("sequential"));
                random[i].push(figures.next().expect("random"));
            }
        }
    }
    let qemu = "QEMU virtio-blk";
    let [ours, theirs] = sequential;
    report.against("block, sequential reads", "MiB/s", &ours, (qemu, &theirs), Must::AtLeast(1.0));
    let [ours, theirs] = random;
    report.against("block, random 4 KiB reads", "IOPS", &ours, (qemu, &theirs), Must::AtLeast(1.0));
}

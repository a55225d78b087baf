//! The emulated host: until its user space is there, against the same kernel with an empty init.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ark_tests::{Running, assets};

use crate::report::{Must, Report};

/// Printed by both inits when their user space is there.
const READY: &str = "ark: machine ready";

/// A QEMU that is killed with its guard.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Milliseconds until `log` has [`READY`]; None when it has not within two minutes.
fn until_ready(log: &Path, begin: Instant) -> Option<f64> {
    while begin.elapsed() < Duration::from_secs(120) {
        if std::fs::read(log).is_ok_and(|text| String::from_utf8_lossy(&text).contains(READY)) {
            return Some(begin.elapsed().as_secs_f64() * 1e3);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    None
}

/// The machine's kernel, on one processor as in the machine, with an init that only says that it is there.
fn empty_init(scratch: &Path, initramfs: &Path) -> f64 {
    let log = scratch.join("empty.log");
    let _ = std::fs::remove_file(&log);
    let begin = Instant::now();
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2048"]);
    command.args([
        "-nodefaults",
        "-nographic",
        "-no-reboot",
        "-append",
        "console=ttyS0 quiet panic=-1 no_timer_check tsc=reliable maxcpus=1",
    ]);
    command.arg("-kernel").arg(assets().machine().join("vmlinuz")).arg("-initrd").arg(initramfs);
    command.arg("-serial").arg(format!("file:{}", log.display()));
    let _qemu = Qemu(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("QEMU starts"));
    until_ready(&log, begin).expect("the same kernel with an empty init comes up")
}

/// Our emulated host, by its own command, console watched from outside.
fn machine(scratch: &Path) -> (f64, f64) {
    let state = scratch.join("state");
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = free.local_addr().expect("an address").port().to_string();
    drop(free);
    let ark = |args: &[&str]| {
        let mut command = Command::new(assets().program("ark"));
        command.args(args).env("ARK_STATE", &state).env("ARK_RUN", scratch.join("run"));
        command.env("ARK_ASSETS", assets().0).env("ARK_HOST", "machine").env("ARK_PORT", &port);
        Running::start(command, Duration::from_secs(180))
    };
    let log = state.join("machine/console.log");
    // An earlier start's last words must not count for this one.
    let _ = std::fs::remove_file(&log);
    let begin = Instant::now();
    let starting = ark(&["machine", "start", "--memory", "2048", "--cpus", "2"]);
    let ready = until_ready(&log, begin);
    let started = starting.wait();
    let rest = begin.elapsed().as_secs_f64() * 1e3;
    let _ = ark(&["machine", "stop"]).wait().ok();
    let _ = started.ok();
    (ready.expect("its console says that its user space is there"), rest)
}

/// An initramfs whose `/init` prints [`READY`] and waits.
fn build_empty(scratch: &Path) -> std::path::PathBuf {
    let tree = scratch.join("tree");
    std::fs::create_dir_all(tree.join("bin")).expect("mkdir");
    std::fs::create_dir_all(tree.join("dev")).expect("mkdir");
    std::fs::copy("/bin/busybox", tree.join("bin/busybox")).expect("busybox-static is installed");
    let init = format!(
        "#!/bin/busybox sh\n/bin/busybox echo '{READY}' > /dev/console\nwhile :; do /bin/busybox sleep 1000; done\n"
    );
    std::fs::write(tree.join("init"), init).expect("write");
    let line = "chmod +x init && mknod dev/console c 5 1 2>/dev/null; find . | cpio -o -H newc --quiet > ../empty.cpio";
    let made = Command::new("sh").args(["-c", line]).current_dir(&tree).status().expect("sh runs");
    assert!(made.success(), "cpio is installed");
    scratch.join("empty.cpio")
}

pub(crate) fn measure(report: &mut Report) {
    let scratch = tempfile::Builder::new().prefix("ark-bench-").tempdir().expect("a directory");
    let initramfs = build_empty(scratch.path());
    let (mut ours, mut rest, mut empty) = (Vec::new(), Vec::new(), Vec::new());
    // The first start makes the data disk.
    machine(scratch.path());
    for _ in 0..5 {
        empty.push(empty_init(scratch.path(), &initramfs));
        let (ready, answered) = machine(scratch.path());
        ours.push(ready);
        rest.push(answered);
    }
    let name = "emulated host, start to its user space";
    report.against(name, "ms", &ours, ("empty init", &empty), Must::AtMost(2.0));
    report.against("emulated host, start to REST answers", "ms", &rest, ("empty init", &empty), Must::Shown);
}

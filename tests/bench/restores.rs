//! Snapshots put back by `ark-vmm`, and migration streams by QEMU.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ark_tests::assets;
use ark_types::vmm::{Generation, RestoreConfig};
use nix::time::{ClockId, clock_gettime};
use serde_json::Value;

use crate::control::Control;
use crate::guest::Address;
use crate::peers::{Bench, Guest, Vmm};

/// Time a VMM has to prepare itself before it is claimed.
const PREPARATION: Duration = Duration::from_millis(500);
/// How long QEMU's restored guest is given to answer at first before it is asked again; twice as long each time, so that one
/// that is only slow is not given up over and over.
const QEMU_PATIENCE: Duration = Duration::from_millis(100);
/// Longest wait for QEMU.
const LIMIT: Duration = Duration::from_secs(120);

impl Bench {
    fn restore_config(dir: &Path, snapshot: &Path, image: &str) -> RestoreConfig {
        let mut random = [0; 16];
        let mut source = std::fs::File::open("/dev/urandom").expect("random numbers");
        std::io::Read::read_exact(&mut source, &mut random).expect("random numbers");
        RestoreConfig {
            snapshot: snapshot.to_owned(),
            generation: Generation(random),
            disks: vec![assets().images().join(format!("{image}.erofs"))],
            uds_path: Some(dir.join("v.sock")),
            console: Some(dir.join("console.log")),
            control_socket: Some(dir.join("vmm.sock")),
            exit_file: None,
        }
    }

    fn vmm(&self, arguments: &[&str]) -> (PathBuf, Child) {
        let dir =
            tempfile::Builder::new().prefix("r").tempdir_in(self.scratch()).expect("a directory").keep();
        let child = Command::new(assets().program("ark-vmm"))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("ark-vmm starts");
        (dir, child)
    }

    /// Starts an `ark-vmm` that prepares itself for whatever it will be told to restore.
    pub(crate) fn prepare(&self) -> Prepared {
        let (dir, child) = self.vmm(&["run", "--prepared", "1", "--config", "-"]);
        Prepared { dir, child }
    }

    /// Waits until those that were started before are prepared.
    pub(crate) fn let_prepare() {
        std::thread::sleep(PREPARATION);
    }

    /// Starts `ark-vmm` with the snapshot in `snapshot`; the guest, which may not listen yet, and when the VMM's process
    /// was about to be spawned.
    pub(crate) fn restore(&self, snapshot: &Path, image: &str) -> (Guest, Begin) {
        let begin = Begin::now();
        let (dir, mut child) = self.vmm(&["run", "--config", "-"]);
        configure(&mut child, &Self::restore_config(&dir, snapshot, image));
        (guest(dir, child), begin)
    }

    /// The same with a VMM that was prepared ahead, and when it was about to be given its configuration.
    pub(crate) fn restore_prepared(&self, snapshot: &Path, image: &str) -> (Guest, Begin) {
        let prepared = self.prepare();
        Self::let_prepare();
        let begin = Begin::now();
        (prepared.claim(snapshot, image), begin)
    }

    /// Boots a guest under QEMU and saves it to the file `stream`.
    pub(crate) fn save_qemu(&self, image: &str, memory_mib: u64, stream: &Path) {
        let image = assets().images().join(format!("{image}.erofs"));
        let dir = tempfile::Builder::new().prefix("q").tempdir_in(self.scratch()).expect("a directory");
        let socket = dir.path().join("qmp.sock");
        let listener = crate::peers::listen_for_hello();
        let mut command = self.qemu_guest(Vmm::Qemu, dir.path(), &image, memory_mib, &[]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        let mut child = command.stdout(Stdio::null()).spawn().expect("QEMU starts");
        crate::peers::wait_readable(std::os::fd::AsRawFd::as_raw_fd(&listener), dir.path());
        std::thread::sleep(Duration::from_secs(2));
        Address::Kernel { cid: crate::peers::QEMU_CID }.exec(&["true"]);
        let mut monitor = BufReader::new(UnixStream::connect(&socket).expect("QEMU's monitor"));
        let uri = format!("exec:cat >{}", stream.display());
        qmp(&mut monitor, "{\"execute\":\"qmp_capabilities\"}");
        qmp(&mut monitor, &format!("{{\"execute\":\"migrate\",\"arguments\":{{\"uri\":\"{uri}\"}}}}"));
        let end = Instant::now() + LIMIT;
        while qmp(&mut monitor, "{\"execute\":\"query-migrate\"}")["status"] != "completed" {
            assert!(Instant::now() < end, "QEMU does not save its guest");
            std::thread::sleep(Duration::from_millis(100));
        }
        let _ = child.kill();
        let _ = child.wait();
    }

    /// From the start of QEMU with `-incoming` to the reply of the first exec, milliseconds.
    pub(crate) fn restore_qemu(&self, image: &str, memory_mib: u64, stream: &Path) -> f64 {
        let image = assets().images().join(format!("{image}.erofs"));
        let dir = tempfile::Builder::new().prefix("q").tempdir_in(self.scratch()).expect("a directory");
        let mut command = self.qemu_guest(Vmm::Qemu, dir.path(), &image, memory_mib, &[]);
        command.arg("-incoming").arg(format!("exec:cat {}", stream.display()));
        let address = Address::Kernel { cid: crate::peers::QEMU_CID };
        let begin = Instant::now();
        let mut child = command.stdout(Stdio::null()).spawn().expect("QEMU starts");
        let mut patience = QEMU_PATIENCE;
        while let Err(error) = address.exec_within(patience, &["true"]) {
            assert!(begin.elapsed() < LIMIT, "QEMU's restored guest does not answer");
            // Anything else says that QEMU has not come so far yet.
            if error.kind() == std::io::ErrorKind::WouldBlock {
                patience *= 2;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let ms = begin.elapsed().as_secs_f64() * 1e3;
        let _ = child.kill();
        let _ = child.wait();
        ms
    }
}

/// An `ark-vmm` that waits to be told what to restore.
pub(crate) struct Prepared {
    dir: PathBuf,
    child: Child,
}

impl Prepared {
    /// Has it restore the snapshot in `snapshot`; the guest, which may not listen yet.
    pub(crate) fn claim(mut self, snapshot: &Path, image: &str) -> Guest {
        configure(&mut self.child, &Bench::restore_config(&self.dir, snapshot, image));
        guest(self.dir, self.child)
    }
}

/// A moment on the clock that VMMs tell their first instruction by.
pub(crate) struct Begin(Duration);

impl Begin {
    fn now() -> Self {
        Self(clock_gettime(ClockId::CLOCK_MONOTONIC).expect("a clock").into())
    }

    /// From here to the first instruction of `guest` under our VMM, milliseconds.
    pub(crate) fn ms_to_first_run(&self, guest: &Guest) -> f64 {
        let mut control = Control::connect(&guest.control_socket());
        let end = Instant::now() + LIMIT;
        loop {
            let first_run = Duration::from_nanos(control.metrics().first_run_ns);
            if !first_run.is_zero() {
                return first_run.checked_sub(self.0).expect("it ran after its start").as_secs_f64() * 1e3;
            }
            assert!(Instant::now() < end, "{} does not run", guest.dir.display());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Hands a VMM its configuration.
fn configure(child: &mut Child, config: &RestoreConfig) {
    let mut stdin = child.stdin.take().expect("a pipe");
    let text = serde_json::to_string(config).expect("JSON");
    stdin.write_all(text.as_bytes()).expect("ark-vmm reads");
}

/// A guest that listens, or soon will.
fn guest(dir: PathBuf, child: Child) -> Guest {
    drop(Control::connect(&dir.join("vmm.sock")));
    let end = Instant::now() + LIMIT;
    while UnixStream::connect(dir.join("v.sock")).is_err() {
        assert!(Instant::now() < end, "the socket device of {} is not there", dir.display());
        std::thread::sleep(Duration::from_millis(1));
    }
    let address = Address::Hybrid(dir.join("v.sock"));
    Guest { child, dir, boot: Duration::ZERO, address }
}

/// One command of QEMU's monitor protocol; its answer, events passed over.
fn qmp(monitor: &mut BufReader<UnixStream>, command: &str) -> Value {
    writeln!(monitor.get_mut(), "{command}").expect("QEMU reads");
    loop {
        let mut line = String::new();
        monitor.read_line(&mut line).expect("QEMU answers");
        let said: Value = serde_json::from_str(&line).expect("JSON");
        assert!(said.get("error").is_none(), "{command}: {line}");
        if let Some(answer) = said.get("return") {
            return answer.clone();
        }
    }
}

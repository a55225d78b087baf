//! Snapshots of running and paused VMs, what goes on meanwhile, and what goes on from them.

use std::path::PathBuf;

use ark_hal::fake::{SharedLog, VENDOR};
use ark_types::vmm::{DiskConfig, RestoreConfig, SnapshotReport, VsockConfig};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::snapshot::Chain;

/// Where the tests leave marks, away from what a boot writes.
const MARK: GuestAddress = GuestAddress(0x200_0000);

/// A register of the serial port that means nothing to it.
const SCRATCH: u16 = map::COM1 + 7;

/// A guest that makes three exits and then keeps both of its processors busy. Once it was made to stand still, it reads from
/// the serial port what it has left there.
fn guest() -> FakeHypervisor {
    let steps = [out(0x80, 1), out(0x80, 2), out(SCRATCH, 0x5a), Script::Busy];
    let steps = steps.into_iter().chain([Script::IoIn { port: SCRATCH, size: 1 }]);
    FakeHypervisor::new().script(0, steps).script(1, [Script::Busy])
}

/// A copy of the image that all VMs here have.
fn image(dir: &Path) -> PathBuf {
    let path = dir.join("image");
    std::fs::write(&path, vec![7; 8192]).unwrap();
    path
}

/// A VM with an image and a socket device.
fn full(dir: &Path) -> VmConfig {
    VmConfig {
        disks: vec![DiskConfig { path: image(dir), read_only: true }],
        vsock: Some(VsockConfig { guest_cid: 5, uds_path: dir.join("v.sock") }),
        ..config(dir, 2)
    }
}

fn snapshot(dir: &Path) -> ControlRequest {
    ControlRequest::Snapshot { dir: dir.to_owned() }
}

impl Vm {
    /// One that has made its exits.
    fn settled(hypervisor: &FakeHypervisor) -> Self {
        let mut vm = Self::boot(hypervisor, full);
        while !matches!(vm.ask(ControlRequest::Metrics), ControlReply::Metrics(metrics) if metrics.exits == 3)
        {
        }
        vm
    }

    fn snapshot(&mut self, name: &str) -> (PathBuf, SnapshotReport) {
        let dir = self.dir.path().join(name);
        match self.ask(snapshot(&dir)) {
            ControlReply::Snapshot(report) => (dir, report),
            other => panic!("{other:?}"),
        }
    }

    fn refused(&mut self, request: ControlRequest) -> String {
        match self.ask(request) {
            ControlReply::Refused { why } => why,
            other => panic!("{other:?}"),
        }
    }

    /// A second client.
    fn client(&self) -> BufReader<UnixStream> {
        let stream = UnixStream::connect(self.dir.path().join("vmm.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        BufReader::new(stream)
    }

    /// Goes on from the snapshot in `from`.
    fn restored(from: &Path, hypervisor: &FakeHypervisor) -> Self {
        Self::launch(|dir, mailbox| {
            let image = image(dir);
            let config = RestoreConfig {
                snapshot: from.to_owned(),
                generation: Generation([9; 16]),
                disks: vec![image],
                uds_path: Some(dir.join("v.sock")),
                console: Some(dir.join("console.log")),
                control_socket: None,
                exit_file: None,
            };
            let makers = Makers { hypervisor, prepared: None, mailbox };
            Machine::restore(&Chain::open(from).unwrap(), &config, makers).unwrap()
        })
    }

    fn end(mut self) -> tempfile::TempDir {
        self.state_after(ControlRequest::Stop { grace_ms: 0 });
        self.end.join().unwrap();
        self.dir
    }
}

fn mark(log: &SharedLog, text: &[u8]) {
    log.lock().memories[0].write_slice(text, MARK).unwrap();
}

fn marked(log: &SharedLog) -> [u8; 4] {
    log.lock().memories[0].read_obj(MARK).unwrap()
}

/// Makes all memory above the boot data take long to write.
fn fill(log: &SharedLog) {
    log.lock().memories[0].write_slice(&vec![0xa5; 30 << 20], MARK).unwrap();
}

/// Names in `dir` that begin with `prefix`.
fn names(dir: &Path, prefix: &str) -> Vec<String> {
    let names =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with(prefix)).collect()
}

#[test]
fn a_vm_goes_on_from_a_snapshot_of_a_running_one_where_it_was() {
    let hypervisor = guest();
    let log = hypervisor.log();
    let mut vm = Vm::settled(&hypervisor);
    mark(&log, b"then");
    let (dir, report) = vm.snapshot("s");
    assert_eq!(report.base, None);
    assert!(report.pause_us > 0 && report.durable_us >= report.pause_us && report.written_bytes > 0);
    assert_eq!(vm.state_after(ControlRequest::State), VmState::Running);
    mark(&log, b"now!");

    let chain = Chain::open(&dir).unwrap();
    let manifest = chain.manifest();
    assert_eq!((manifest.id, manifest.vcpus, manifest.memory_mib), (report.id, 2, 64));
    assert_eq!((manifest.guest_cid, manifest.processor.vendor.as_str()), (Some(5), VENDOR));
    assert_eq!(manifest.labels["kernel"], "k1");

    let again = guest();
    let seen = again.log();
    let mut copy = Vm::restored(&dir, &again);
    assert_eq!(copy.state_after(ControlRequest::State), VmState::Running);
    assert_eq!(&marked(&seen), b"then");
    assert_eq!(&marked(&log), b"now!");
    {
        let (log, seen) = (log.lock(), seen.lock());
        let mut saved = log.saves.clone();
        saved.sort_by_key(ark_hal::VcpuState::index);
        assert!(seen.restores == saved, "the processors went on elsewhere");
        assert_eq!(seen.vm_restores.len(), 1);
        let generation: [u8; 16] = seen.memories[0].read_obj(GuestAddress(map::GENERATION)).unwrap();
        assert_eq!(generation, [9; 16]);
        let booted: [u8; 16] = log.memories[0].read_obj(GuestAddress(map::GENERATION)).unwrap();
        assert_eq!(booted, [1; 16]);
        let told = |log: &ark_hal::fake::Log| {
            let (_, line) = log.irqfds.iter().find(|(gsi, _)| *gsi == map::GENERATION_GSI).unwrap();
            line.read().ok()
        };
        assert_eq!((told(&log), told(&seen)), (None, Some(1)));
    }

    // Its devices go on, too.
    while seen.lock().answers.is_empty() {
        std::thread::yield_now();
    }
    assert_eq!(seen.lock().answers, [(0, vec![0x5a])]);

    // The next snapshot holds only what was written since.
    mark(&seen, b"next");
    let (second, diff) = copy.snapshot("t");
    assert_eq!(diff.base, Some(report.id));
    assert!(diff.written_bytes < report.written_bytes);
    let third = guest();
    let seen = third.log();
    let last = Vm::restored(&second, &third);
    assert_eq!(&marked(&seen), b"next");
    last.end();
    copy.end();
    vm.end();
}

#[test]
fn others_are_served_while_a_snapshot_is_written_and_a_second_one_is_refused() {
    let hypervisor = guest();
    let mut vm = Vm::settled(&hypervisor);
    fill(&hypervisor.log());
    let mut other = vm.client();
    let dir = vm.dir.path().join("s");
    vm.send(&snapshot(&dir));
    vm.send(&ControlRequest::Pause);
    while !dir.with_extension("tmp").exists() && !dir.exists() {
        std::thread::yield_now();
    }
    let mut line = serde_json::to_string(&snapshot(&vm.dir.path().join("second"))).unwrap();
    line.push('\n');
    other.get_mut().write_all(line.as_bytes()).unwrap();
    let mut reply = String::new();
    other.read_line(&mut reply).unwrap();
    assert!(reply.contains("refused") && reply.contains("is being written"), "{reply}");
    // Replies stay in order.
    assert!(matches!(vm.reply(), ControlReply::Snapshot(_)));
    assert!(matches!(vm.reply(), ControlReply::State { state: VmState::Paused }));
    vm.snapshot("third");
    let dir = vm.end();
    assert_eq!(names(dir.path(), "second").len(), 0);
}

#[test]
fn what_cannot_be_snapshotted_is_refused_and_leaves_nothing() {
    let hypervisor = guest();
    let mut vm = Vm::settled(&hypervisor);
    let (dir, _) = vm.snapshot("s");
    assert!(vm.refused(snapshot(&dir)).contains("exists already"));
    assert!(vm.refused(snapshot(Path::new("relative"))).contains("absolute"));
    let nowhere = vm.dir.path().join("no/s");
    assert!(vm.refused(snapshot(&nowhere)).contains("does not exist"));
    let dir = vm.end();
    assert_eq!(names(dir.path(), "s"), ["s"]);

    let hypervisor = guest();
    let writable = |dir: &Path| {
        let mut config = full(dir);
        config.disks[0].read_only = false;
        config
    };
    let mut vm = Vm::boot(&hypervisor, writable);
    let dir = vm.dir.path().join("w");
    assert!(vm.refused(snapshot(&dir)).contains("read-only"));
    assert_eq!(names(vm.end().path(), "w").len(), 0);
}

#[test]
fn a_processor_that_cannot_be_saved_refuses_the_snapshot_and_the_vm_goes_on() {
    let hypervisor = guest().failing(ark_hal::fake::Step::SaveVcpu(1), libc::EIO);
    let mut vm = Vm::settled(&hypervisor);
    let dir = vm.dir.path().join("s");
    assert!(vm.refused(snapshot(&dir)).contains("processor 1 cannot be saved"));
    assert_eq!(vm.state_after(ControlRequest::State), VmState::Running);
    assert_eq!(names(vm.end().path(), "s").len(), 0);
}

/// The writer that has the files of the snapshot in `dir` open.
fn writer_of(dir: &Path) -> libc::pid_t {
    let tmp = dir.with_extension("tmp").into_os_string().into_string().unwrap();
    loop {
        for process in std::fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
            let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            let fds =
                std::fs::read_dir(process.path().join("fd")).into_iter().flatten().filter_map(Result::ok);
            let mut files = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok());
            if pid != std::process::id()
                && files.any(|file| file.to_string_lossy() == format!("{tmp}/memory"))
            {
                return libc::pid_t::try_from(pid).unwrap();
            }
        }
        assert!(!dir.exists(), "it was written before it was found");
    }
}

#[test]
fn a_writer_that_is_killed_or_loses_its_files_leaves_nothing_behind() {
    let hypervisor = guest();
    let mut vm = Vm::settled(&hypervisor);
    fill(&hypervisor.log());
    let dir = vm.dir.path().join("s");
    vm.send(&snapshot(&dir));
    let writer = writer_of(&dir);
    // SAFETY: kill touches no memory; the process is this test's own child.
    unsafe { libc::kill(writer, libc::SIGKILL) };
    assert!(matches!(vm.reply(), ControlReply::Refused { why } if why.contains("killed by signal 9")));
    assert_eq!(names(vm.dir.path(), "s").len(), 0);
    // The name is free again.
    vm.send(&snapshot(&dir));
    writer_of(&dir);
    std::fs::rename(dir.with_extension("tmp"), vm.dir.path().join("elsewhere")).unwrap();
    assert!(matches!(vm.reply(), ControlReply::Refused { .. }));
    assert_eq!(names(vm.dir.path(), "s").len(), 0);
    vm.snapshot("s");
    vm.end();
}

#[test]
fn a_snapshot_whose_client_hangs_up_is_given_up_and_the_vm_goes_on() {
    let hypervisor = guest();
    let mut vm = Vm::settled(&hypervisor);
    fill(&hypervisor.log());
    let dir = vm.dir.path().join("s");
    let mut client = vm.client();
    let line = serde_json::to_string(&snapshot(&dir)).unwrap();
    client.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
    let writer = writer_of(&dir);
    drop(client);
    while Path::new(&format!("/proc/{writer}")).exists() {
        std::thread::yield_now();
    }
    assert_eq!(vm.state_after(ControlRequest::State), VmState::Running);
    assert_eq!(names(vm.dir.path(), "s").len(), 0);
    vm.snapshot("s");
    vm.end();
}

#[test]
fn a_vm_that_ends_takes_its_writer_with_it() {
    let hypervisor = guest();
    let mut vm = Vm::settled(&hypervisor);
    fill(&hypervisor.log());
    let mut other = vm.client();
    let dir = vm.dir.path().join("s");
    vm.send(&snapshot(&dir));
    let writer = writer_of(&dir);
    other.get_mut().write_all(b"{\"do\":\"stop\",\"grace_ms\":0}\n").unwrap();
    assert!(matches!(vm.reply(), ControlReply::Refused { why } if why.contains("ended before")));
    assert_eq!(vm.end.join().unwrap().reason, ExitReason::StopDeadline);
    assert!(!Path::new(&format!("/proc/{writer}")).exists());
    assert_eq!(names(vm.dir.path(), "s").len(), 0);
}

#[test]
fn a_paused_vm_gives_its_memory_back_and_goes_on() {
    let hypervisor = guest();
    let log = hypervisor.log();
    let mut vm = Vm::settled(&hypervisor);
    mark(&log, b"then");
    let reclaim = |dir: &Path| ControlRequest::Reclaim { dir: dir.to_owned() };
    let (early, _) = vm.snapshot("early");
    assert!(vm.refused(reclaim(&early)).contains("running"));
    vm.state_after(ControlRequest::Pause);
    assert!(vm.refused(reclaim(&early)).contains("since the VM was paused"));
    let (dir, report) = vm.snapshot("s");
    assert_eq!(report.pause_us, 0);
    assert!(vm.refused(reclaim(&vm.dir.path().join("nothing"))).contains("does not exist"));
    assert_eq!(vm.state_after(reclaim(&dir)), VmState::Paused);
    let resident = |vm: &mut Vm| match vm.ask(ControlRequest::Metrics) {
        ControlReply::Metrics(metrics) => metrics.guest_resident_bytes,
        other => panic!("{other:?}"),
    };
    assert_eq!(resident(&mut vm), 0);
    assert_eq!(&marked(&log), b"then");
    assert_eq!(vm.state_after(ControlRequest::Resume), VmState::Running);
    mark(&log, b"now!");
    assert_eq!(resident(&mut vm), 4096);

    // It has a base now.
    let (diff, second) = vm.snapshot("t");
    assert_eq!((second.base, second.written_bytes), (Some(report.id), 4096));
    for (dir, mark) in [(&dir, b"then"), (&diff, b"now!")] {
        let again = guest();
        let seen = again.log();
        let copy = Vm::restored(dir, &again);
        assert_eq!(&marked(&seen), mark);
        copy.end();
    }
    vm.state_after(ControlRequest::Pause);
    assert!(vm.refused(reclaim(&dir)).contains("since the VM was paused"));
    vm.end();
}

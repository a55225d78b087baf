//! Whole VMs on a scripted hypervisor: what the guest does, and how the VM then ends.

mod snapshots;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::JoinHandle;

use ark_hal::SystemEvent;
use ark_hal::fake::{FakeHypervisor, Script};
use ark_types::vmm::{ExitReason, Generation, VmConfig, VmState};

use super::*;
use crate::boot::{Payload, testing};
use crate::machine::Makers;
use crate::map;

/// A VM that runs in a thread, with its control socket.
struct Vm {
    dir: tempfile::TempDir,
    end: JoinHandle<End>,
    control: BufReader<UnixStream>,
}

/// A VM of 64 MiB with a console.
fn config(dir: &Path, vcpus: u32) -> VmConfig {
    VmConfig {
        kernel: testing::kernel(dir),
        initrd: None,
        cmdline: String::new(),
        vcpus,
        memory_mib: 64,
        disks: vec![],
        vsock: None,
        console: Some(dir.join("console.log")),
        control_socket: None,
        exit_file: None,
        labels: [("kernel".to_owned(), "k1".to_owned())].into(),
    }
}

impl Vm {
    fn start(vcpus: u32, hypervisor: FakeHypervisor) -> Self {
        Self::boot(&hypervisor, |dir| config(dir, vcpus))
    }

    fn boot(hypervisor: &FakeHypervisor, config: impl FnOnce(&Path) -> VmConfig) -> Self {
        Self::launch(|dir, mailbox| {
            let config = config(dir);
            let payload = Payload::open(&config).unwrap();
            let makers = Makers { hypervisor, prepared: None, mailbox };
            Machine::build(&config, payload, Generation([1; 16]), makers).unwrap()
        })
    }

    fn launch(make: impl FnOnce(&Path, &Mailbox) -> Machine) -> Self {
        // In memory where that is possible: the tests wait for the disk otherwise.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let mailbox = Mailbox::new().unwrap();
        let machine = make(dir.path(), &mailbox);
        let socket = dir.path().join("vmm.sock");
        let control = Some(Server::bind(&socket).unwrap());
        // Before the VM runs: it may end at once, and its socket with it.
        let stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let inputs = Inputs { mailbox, signals: None, control, vsock: None };
        let end = std::thread::spawn(move || run(machine, inputs));
        Self { dir, end, control: BufReader::new(stream) }
    }

    fn send(&mut self, request: &ControlRequest) {
        let mut line = serde_json::to_string(request).unwrap();
        line.push('\n');
        self.control.get_mut().write_all(line.as_bytes()).unwrap();
    }

    fn reply(&mut self) -> ControlReply {
        let mut reply = String::new();
        self.control.read_line(&mut reply).unwrap();
        serde_json::from_str(&reply).unwrap()
    }

    fn ask(&mut self, request: ControlRequest) -> ControlReply {
        self.send(&request);
        self.reply()
    }

    fn state_after(&mut self, request: ControlRequest) -> VmState {
        match self.ask(request) {
            ControlReply::State { state } => state,
            other => panic!("{other:?}"),
        }
    }

    fn ends(self) -> (End, String) {
        let end = self.end.join().unwrap();
        assert!(!self.dir.path().join("vmm.sock").exists(), "the control socket is left behind");
        let console = std::fs::read(self.dir.path().join("console.log")).unwrap();
        (end, String::from_utf8_lossy(&console).into_owned())
    }
}

fn out(port: u16, byte: u8) -> Script {
    Script::IoOut { port, data: vec![byte] }
}

/// The reason for which a guest of one processor that does `steps` ends.
fn reason(steps: impl IntoIterator<Item = Script>) -> ExitReason {
    Vm::start(1, FakeHypervisor::new().script(0, steps)).ends().0.reason
}

#[test]
fn a_guest_that_writes_the_sleep_register_has_powered_off() {
    assert_eq!(reason([out(map::POWER, 0x34)]), ExitReason::GuestPoweroff);
    assert_eq!(reason([Script::System(SystemEvent::Shutdown)]), ExitReason::GuestPoweroff);
}

#[test]
fn a_guest_that_writes_the_reset_register_has_rebooted() {
    assert_eq!(reason([out(map::POWER + 2, 1)]), ExitReason::GuestReboot);
    assert_eq!(reason([Script::System(SystemEvent::Reset)]), ExitReason::GuestReboot);
}

#[test]
fn a_panic_is_a_panic_whatever_follows() {
    let panic = || out(map::PVPANIC, 1);
    assert_eq!(reason([panic(), out(map::POWER + 2, 1)]), ExitReason::GuestPanic);
    assert_eq!(reason([panic(), Script::Shutdown]), ExitReason::GuestPanic);
    assert_eq!(reason([panic(), Script::Busy]), ExitReason::GuestPanic);
}

#[test]
fn a_processor_that_cannot_go_on_is_a_crash_and_says_how() {
    for (exit, word) in [
        (Script::Shutdown, "triple fault"),
        (Script::Halt, "halted"),
        (Script::FailEntry { reason: 0x21 }, "0x21"),
        (Script::InternalError { suberror: 1 }, "suberror 1"),
        (Script::Unknown { reason: 77 }, "77"),
        (Script::System(SystemEvent::Other(9)), "machine event 9"),
    ] {
        let (end, _) = Vm::start(2, FakeHypervisor::new().script(1, [exit])).ends();
        assert_eq!(end.reason, ExitReason::GuestCrash);
        assert!(end.detail.unwrap().contains(word), "{word}");
    }
}

#[test]
fn a_hypervisor_that_fails_is_not_the_guests_fault() {
    let (end, _) = Vm::start(1, FakeHypervisor::new().script(0, [Script::Fail(libc::EFAULT)])).ends();
    assert_eq!(end.reason, ExitReason::Internal);
}

#[test]
fn garbage_on_every_bus_hurts_nobody() {
    let mut steps = vec![];
    for port in (0..=u16::MAX).step_by(7).filter(|port| !(0x600..0x608).contains(port)) {
        steps.push(Script::IoIn { port, size: 4 });
        steps.push(Script::IoOut { port, data: vec![0xff; 2] });
    }
    for addr in (0xcfff_fff0..0xd000_2000).step_by(3) {
        steps.push(Script::MmioRead { addr, size: 8 });
        steps.push(Script::MmioWrite { addr, data: vec![0xa5; 3] });
    }
    steps.retain(|step| !matches!(step, Script::IoOut { port: map::PVPANIC, .. }));
    steps.push(out(map::POWER, 0x34));
    assert_eq!(reason(steps), ExitReason::GuestPoweroff);
}

#[test]
fn what_the_guest_prints_is_in_the_console_log() {
    let hello = b"hello\n\xff\0".iter().map(|byte| out(map::COM1, *byte));
    let steps = hello.chain([out(map::POWER, 0x34)]);
    let (_, console) = Vm::start(1, FakeHypervisor::new().script(0, steps)).ends();
    assert!(console.starts_with("hello\n"), "{console:?}");
}

#[test]
fn pause_resume_and_stop_go_through_their_states() {
    let mut vm = Vm::start(3, FakeHypervisor::new().script(1, [Script::Busy]));
    assert_eq!(vm.state_after(ControlRequest::State), VmState::Running);
    for _ in 0..20 {
        assert_eq!(vm.state_after(ControlRequest::Pause), VmState::Paused);
        assert!(matches!(vm.ask(ControlRequest::Pause), ControlReply::Refused { .. }));
        assert_eq!(vm.state_after(ControlRequest::Resume), VmState::Running);
    }
    vm.state_after(ControlRequest::Stop { grace_ms: 0 });
    assert_eq!(vm.ends().0.reason, ExitReason::StopDeadline);
}

#[test]
fn a_paused_guest_is_told_that_its_processors_stood_still() {
    let hypervisor = (0..3).fold(FakeHypervisor::new(), |all, index| all.script(index, [out(0x80, 0)]));
    let log = hypervisor.log();
    let mut vm = Vm::start(3, hypervisor);
    while !matches!(vm.ask(ControlRequest::Metrics), ControlReply::Metrics(metrics) if metrics.exits == 3) {}
    vm.state_after(ControlRequest::Pause);
    let mut told = log.lock().pauses.clone();
    told.sort_unstable();
    assert_eq!(told, [0, 1, 2]);
    vm.state_after(ControlRequest::Stop { grace_ms: 0 });
    vm.ends();
}

#[test]
fn a_guest_without_vsock_cannot_be_asked_and_ends_at_once() {
    let mut vm = Vm::start(1, FakeHypervisor::new());
    let before = Instant::now();
    assert_eq!(vm.state_after(ControlRequest::Stop { grace_ms: 60_000 }), VmState::Stopping);
    let (end, _) = vm.ends();
    assert_eq!(end.reason, ExitReason::StopDeadline);
    assert!(end.detail.unwrap().contains("no vsock"));
    assert!(before.elapsed() < Duration::from_secs(30));
}

#[test]
fn metrics_count_exits_and_memory() {
    let mut vm = Vm::start(1, FakeHypervisor::new().script(0, vec![out(0x80, 0); 10]));
    let metrics = loop {
        let ControlReply::Metrics(metrics) = vm.ask(ControlRequest::Metrics) else { panic!("no metrics") };
        if metrics.exits == 10 {
            break metrics;
        }
    };
    assert!(metrics.first_run_ns > 0);
    assert!(metrics.guest_resident_bytes > 0);
    let ports = metrics.devices.iter().find(|d| d.name == "ports").unwrap();
    assert_eq!(ports.counters["unclaimed_writes"], 10);
    vm.state_after(ControlRequest::Stop { grace_ms: 0 });
    vm.ends();
}

//! The emulated host, on any host: started, used, stopped from outside, refused for a reason.

mod peers;

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use ark_tests::{Output, Running, assets, eventually, processes_mentioning};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Time for a command that starts the machine on a busy 2-core host.
const LIMIT: Duration = Duration::from_secs(240);

/// One emulated host of a test's own, not yet started.
struct Machine {
    dir: tempfile::TempDir,
    port: u16,
}

impl Machine {
    fn new() -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = free.local_addr().expect("an address").port();
        Self { dir: tempfile::Builder::new().prefix("ark-m-").tempdir().expect("a directory"), port }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(assets().program("ark"));
        command
            .env("ARK_ASSETS", assets().0)
            .env("ARK_RUN", self.dir.path().join("run"))
            .env("ARK_STATE", self.dir.path().join("state"))
            .env("ARK_HOST", "machine")
            .env("ARK_PORT", self.port.to_string());
        command
    }

    fn ark<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Output {
        let mut command = self.command();
        command.args(args);
        Running::start(command, LIMIT).wait()
    }

    fn start(&self) {
        let said = self.ark(["machine", "start", "--memory", "2048"]);
        let stuck =
            std::fs::read_to_string(self.dir.path().join("state/machine/stuck.log")).unwrap_or_default();
        assert_eq!(said.code, 0, "{}{stuck}", said.stderr);
    }

    fn status(&self) -> String {
        let said = self.ark(["machine", "status", "--json"]).json();
        said["state"].as_str().expect("a state").to_owned()
    }

    fn qemu(&self) -> Vec<Pid> {
        processes_mentioning(self.dir.path().to_str().expect("text"))
            .into_iter()
            .filter(|p| p.command.contains("qemu"))
            .map(|p| Pid::from_raw(p.pid))
            .collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for pid in self.qemu() {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

#[test]
fn the_first_run_starts_the_machine_and_says_why() {
    let machine = Machine::new();
    assert_eq!(machine.status(), "stopped");
    let said = machine.ark(["run", "--image", "python", "--", "python3", "-c", "print(6*7)"]).ok();
    assert_eq!(said.stdout, "42\n");
    assert!(said.stderr.contains("emulat"), "one line says that emulation is in use: {:?}", said.stderr);
    assert_eq!(machine.status(), "running");
    let inside = machine.ark(["machine", "shell", "--", "sh", "-c", "ls /dev/kvm; exit 3"]).exits(3);
    assert_eq!(inside.stdout.trim(), "/dev/kvm");
    assert!(!machine.ark(["machine", "logs"]).ok().stdout.is_empty());
    let _ = machine.ark(["machine", "stop"]).ok();
    assert_eq!(machine.status(), "stopped");
    assert_eq!(machine.qemu(), []);
}

/// Why: `HOUSEKEEPING_CPUS` in `api/cli/src/machine/qemu.rs`.
#[test]
fn no_program_and_so_no_guest_runs_on_the_first_processor() {
    let machine = Machine::new();
    let _ = machine.ark(["machine", "start", "--memory", "2048", "--cpus", "2"]).ok();
    let _ = machine.ark(["create", "--image", "base", "--name", "a1"]).ok();
    let look = "cat /sys/devices/system/cpu/online; nproc; pidof ark-vmm >/dev/null || echo no VMM
        for pid in 1 $(pidof arkd ark-vmm); do cat /proc/$pid/task/*/status; done | grep ^Cpus_allowed_list | sort -u";
    let said = machine.ark(["machine", "shell", "--", "sh", "-c", look]).ok();
    assert_eq!(said.stdout, "0-2\n2\nCpus_allowed_list:\t1-2\n");
    let _ = machine.ark(["machine", "stop"]).ok();
}

#[test]
fn a_machine_that_gets_stuck_is_started_once_more() {
    let machine = Machine::new();
    let bin = machine.dir.path().join("bin");
    let program = "#!/bin/sh\n[ -e \"$0.ran\" ] && PATH=${PATH#*:} exec qemu-system-x86_64 \"$@\"\n: >\"$0.ran\"\nexec tail -f \"$0\"\n";
    std::fs::create_dir(&bin).expect("a directory");
    std::fs::write(bin.join("qemu-system-x86_64"), program).expect("a program");
    std::fs::set_permissions(bin.join("qemu-system-x86_64"), PermissionsExt::from_mode(0o755))
        .expect("its mode");
    let mut command = machine.command();
    let path = std::env::var("PATH").expect("a PATH");
    command.args(["machine", "start", "--memory", "2048"]).env("PATH", format!("{}:{path}", bin.display()));
    let said = Running::start(command, LIMIT).wait().ok();
    assert!(said.stderr.contains("it is started once more"), "{:?}", said.stderr);
    assert_eq!(processes_mentioning(bin.to_str().expect("text")), [], "the first one is gone");
    assert!(machine.dir.path().join("state/machine/stuck.log").is_file(), "what its processors did is kept");
    assert_eq!(machine.status(), "running");
    let _ = machine.ark(["machine", "stop"]).ok();
}

#[test]
fn the_data_disk_lasts() {
    let machine = Machine::new();
    machine.start();
    let _ = machine.ark(["machine", "shell", "--", "sh", "-c", "echo kept > /var/lib/ark/note; sync"]).ok();
    let _ = machine.ark(["machine", "stop"]).ok();
    machine.start();
    assert_eq!(machine.ark(["machine", "shell", "--", "cat", "/var/lib/ark/note"]).ok().stdout, "kept\n");
    let _ = machine.ark(["machine", "stop"]).ok();
}

#[test]
fn a_machine_stopped_from_outside_is_noticed_and_started_again() {
    let machine = Machine::new();
    machine.start();
    kill(machine.qemu()[0], Signal::SIGKILL).expect("QEMU is there");
    // A process that gives its memory back has no environment any more, and is not gone before it has.
    eventually("QEMU is gone", Duration::from_secs(10), || machine.qemu().is_empty());
    eventually("that is noticed", Duration::from_secs(10), || machine.status() != "running");
    let said = machine.ark(["run", "--image", "base", "--", "echo", "again"]).ok();
    assert_eq!(said.stdout, "again\n");
    let _ = machine.ark(["machine", "stop"]).ok();
}

#[test]
fn a_daemon_killed_in_the_machine_comes_back_to_its_agents_and_they_end_with_the_machine() {
    let machine = Machine::new();
    machine.start();
    let _ = machine.ark(["create", "--image", "base", "--name", "a1"]).ok();
    let _ = machine.ark(["exec", "a1", "--", "sh", "-c", "echo kept > /root/f"]).ok();
    let vmm = || machine.ark(["inspect", "a1", "--json"]).ok().json()["vmm_pid"].clone();
    let before = vmm();
    let _ = machine.ark(["machine", "shell", "--", "killall", "-9", "arkd"]);
    eventually("arkd answers again", LIMIT, || machine.ark(["ps", "--json"]).code == 0);
    assert_eq!(machine.ark(["exec", "a1", "--", "cat", "/root/f"]).ok().stdout, "kept\n");
    assert_eq!(vmm(), before);
    let _ = machine.ark(["machine", "stop"]).ok();
    let console = machine.ark(["machine", "logs"]).ok().stdout;
    assert!(console.contains("an agent is adopted") && console.contains("agents are stopped"), "{console}");
    assert!(!console.contains("run on"), "none is left to an arkd that never comes: {console}");
}

#[test]
fn a_taken_port_is_a_sentence() {
    let machine = Machine::new();
    let _taken = std::net::TcpListener::bind(("127.0.0.1", machine.port)).expect("the port was free");
    let said = machine.ark(["machine", "start"]).exits(125);
    said.complains_about(&[&machine.port.to_string()]);
    assert_eq!(machine.qemu(), []);
}

#[test]
fn no_qemu_and_no_kvm_is_a_sentence() {
    let machine = Machine::new();
    let mut command = machine.command();
    command.args(["run", "--image", "base", "--", "true"]).env("PATH", "/nonexistent");
    Running::start(command, LIMIT).wait().exits(125).complains_about(&["qemu-system-x86"]);
}

/// Runs `line` (with `$1` a directory that is a file system of `size`) in a mount namespace of its own.
fn on_small_disk(size: &str, line: &str) -> Output {
    let dir = tempfile::Builder::new().prefix("ark-full-").tempdir().expect("a directory");
    let script = format!("mount -t tmpfs -o size={size} tmpfs \"$1\" || exit 99; {line}");
    let mut command = Command::new("unshare");
    let namespaces = if nix::unistd::geteuid().is_root() { "-m" } else { "-rm" };
    command.args([namespaces, "sh", "-c", &script, "sh"]).arg(dir.path());
    command.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    Running::start(command, LIMIT).wait()
}

#[test]
fn a_full_disk_while_building_is_a_sentence_and_leaves_nothing() {
    // The image's own program is there, and takes no room.
    let line = format!(
        "mkdir $1/bin; ln -s {} $1/bin/; ARK_BUILD=$1 guest-images/image.sh base; code=$?; find $1 -name '*.erofs*'; exit $code",
        assets().program("ark-ai").display()
    );
    let said = on_small_disk("2m", &line).exits(1);
    said.complains_about(&["free", "space"]);
    assert_eq!(said.stdout, "");
}

#[test]
fn a_full_disk_when_the_machine_starts_is_a_sentence_and_leaves_nothing() {
    let ark = assets().program("ark");
    let line = format!(
        "ARK_ASSETS={} ARK_STATE=$1/s ARK_RUN=$1/r ARK_HOST=machine ARK_PORT=1 {} machine start; code=$?; \
         find $1 -size +64k; exit $code",
        assets().0.display(),
        ark.display()
    );
    let said = on_small_disk("1m", &line).exits(125);
    said.complains_about(&["space"]);
    assert_eq!(said.stdout, "", "nothing large stays on the full disk");
}

#[test]
fn a_wrong_token_is_refused() {
    let machine = Machine::new();
    machine.start();
    let token: PathBuf = machine.dir.path().join("state/token");
    let right = std::fs::read(&token).expect("the token");
    std::fs::write(&token, "0".repeat(64)).expect("writable");
    machine.ark(["ps"]).exits(125).complains_about(&["token"]);
    std::fs::write(&token, right).expect("writable");
    let _ = machine.ark(["ps"]).ok();
    let _ = machine.ark(["machine", "stop"]).ok();
}

#[test]
fn the_probe_answers_with_a_reason_on_any_host() {
    let mut probe = Command::new(assets().program("ark-vmm"));
    probe.args(["probe", "--json"]);
    let said = Running::start(probe, Duration::from_secs(20)).wait();
    let report = said.json();
    assert_eq!(report["usable"].as_bool(), Some(said.code == 0));
    assert!(report["reason"].as_str().is_some_and(|r| r.len() > 20), "{report}");
    assert!(report["duration_us"].as_u64().is_some_and(|us| us < 2_000_000), "{report}");
}

//! `ark-vmm` on its own: configuration, control socket, how it ends.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use ark_tests::{Running, World, assets, eventually};
use ark_types::guest::HEARTBEAT_INTERVAL_MS;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// One VMM without an `arkd`.
struct Vmm {
    dir: tempfile::TempDir,
    running: Running,
}

impl Vmm {
    fn start() -> Self {
        ark_tests::require_kvm();
        let dir = tempfile::Builder::new().prefix("ark-vmm-").tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name);
        let config = json!({
            "kernel": assets().kernel(), "initrd": assets().initrd(), "vcpus": 1, "memory_mib": 128,
            "disks": [{"path": assets().images().join("base.erofs"), "read_only": true}],
            "vsock": {"guest_cid": 3, "uds_path": at("v.sock")},
            "console": at("console.log"), "control_socket": at("vmm.sock"), "exit_file": at("exit.json"),
        });
        let mut command = Command::new(assets().program("ark-vmm"));
        command.args(["run", "--config", "-"]);
        let mut running = Running::start(command, Duration::from_secs(120));
        running.write(config.to_string().as_bytes());
        running.close_stdin();
        let vmm = Self { dir, running };
        let guest_answers = || {
            let Ok(mut stream) = UnixStream::connect(vmm.path("v.sock")) else { return false };
            stream.set_read_timeout(Some(Duration::from_secs(2))).expect("a timeout");
            let mut line = String::new();
            writeln!(stream, "CONNECT 1025").is_ok()
                && BufReader::new(stream).read_line(&mut line).is_ok()
                && line.starts_with("OK ")
        };
        eventually("the guest answers on vsock", Duration::from_secs(60), guest_answers);
        vmm
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn ask(&self, request: &Value) -> Value {
        let mut stream = UnixStream::connect(self.path("vmm.sock")).expect("the control socket is there");
        writeln!(stream, "{request}").expect("it reads");
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).expect("it answers");
        serde_json::from_str(&line).expect("JSON")
    }

    /// Waits for the end; what the exit file and standard output say must agree, and no socket may be left.
    fn ends_with(self, reason: &str, code: i32) {
        let Self { dir, running } = self;
        let said = running.wait().exits(code);
        assert_eq!(said.json()["reason"], reason);
        let file = std::fs::read_to_string(dir.path().join("exit.json")).expect("the exit file");
        assert_eq!(serde_json::from_str::<Value>(&file).expect("JSON"), said.json());
        for socket in ["v.sock", "vmm.sock"] {
            assert!(!dir.path().join(socket).exists(), "{socket} is left behind");
        }
    }
}

#[test]
fn the_control_socket_tells_state_and_metrics() {
    let vmm = Vmm::start();
    assert_eq!(vmm.ask(&json!({"do": "state"})), json!({"is": "state", "state": "running"}));
    let metrics = vmm.ask(&json!({"do": "metrics"}));
    assert!(metrics["exits"].as_u64() > Some(0), "{metrics}");
    let resident = metrics["guest_resident_bytes"].as_u64().expect("a number");
    assert!((1 << 20..=128 << 20).contains(&resident), "{resident}");
    let names: Vec<_> =
        metrics["devices"].as_array().expect("devices").iter().map(|d| d["name"].clone()).collect();
    for name in ["block0", "vsock", "rng"] {
        assert!(names.contains(&json!(name)), "{name} in {names:?}");
    }
    assert_eq!(vmm.ask(&json!({"do": "dance"}))["is"], "refused");
    assert_eq!(vmm.ask(&json!({"do": "stop", "grace_ms": 10_000}))["is"], "state");
    vmm.ends_with("stopped", 0);
}

#[test]
fn a_paused_guest_stands_still_and_goes_on() {
    let vmm = Vmm::start();
    assert_eq!(vmm.ask(&json!({"do": "pause"}))["state"], "paused");
    let exits = || vmm.ask(&json!({"do": "metrics"}))["exits"].as_u64().expect("a number");
    let before = exits();
    std::thread::sleep(Duration::from_millis(HEARTBEAT_INTERVAL_MS + 1000));
    assert_eq!(exits(), before, "a paused guest makes no exits, though its heartbeat is due");
    assert_eq!(vmm.ask(&json!({"do": "resume"}))["state"], "running");
    eventually("the guest goes on", Duration::from_secs(20), || exits() > before);
    assert_eq!(vmm.ask(&json!({"do": "resume"}))["is"], "refused");
    assert_eq!(vmm.ask(&json!({"do": "stop", "grace_ms": 0}))["is"], "state");
    vmm.ends_with("stop_deadline", 13);
}

#[test]
fn a_termination_signal_ends_the_vmm_with_its_reason() {
    let vmm = Vmm::start();
    vmm.running.signal(Signal::SIGTERM);
    vmm.ends_with("signal", 14);
}

#[test]
fn a_configuration_that_cannot_be_used_is_told_before_anything_runs() {
    let world = World::new();
    for (config, word) in [
        ("", "configuration"),
        ("{\"kernel\":\"/k\",\"vcpus\":0,\"memory_mib\":128}", "vCPUs"),
        ("{\"kernel\":\"/k\",\"vcpus\":1,\"memory_mib\":1}", "memory"),
        ("{\"kernel\":\"/nothing/here\",\"vcpus\":1,\"memory_mib\":128}", "/nothing/here"),
        ("{\"kernel\":\"/etc/passwd\",\"vcpus\":1,\"memory_mib\":128}", "/etc/passwd"),
        ("{\"kernel\":\"/k\",\"vcpus\":1,\"memory_mib\":128,\"surprise\":1}", "surprise"),
    ] {
        let mut command = world.command("ark-vmm");
        command.args(["run", "--config", "-"]);
        let mut running = Running::start(command, Duration::from_secs(20));
        running.write(config.as_bytes());
        let said = running.wait().exits(20);
        assert_eq!(said.json()["reason"], "bad_config");
        said.complains_about(&[word]);
    }
    world.end();
}

//! The wire formats of agents, programs, files, guests and VMMs, frozen.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::frozen::{Frozen, check_text, digest};
use ark_types::agent::{Agent, AgentHeartbeat, AgentList, AgentState, CreateAgent, Origin};
use ark_types::checkpoint::CheckpointPolicy;
use ark_types::exec::{Encoding, ExecAck, ExecEnd, ExecReply, ExecRequest, ExecSession, ExitStatus, TtySize};
use ark_types::files::{FileKind, FileList, FileStat};
use ark_types::guest::{
    ClockSet, DialRequest, ErrorCode, FileWrite, Frame, GuestError, Heartbeat, Hello, Kind, PathRequest,
    Renew, Renewed, SignalRequest, Started,
};
use ark_types::healing::{AgentHealth, Continuity, RestartPolicy};
use ark_types::health::{Health, HealthStatus, HostKind, LogHealth, LogState, ProbeReport};
use ark_types::health_check::{HealthCheck, Probe};
use ark_types::label::{Labels, Owner};
use ark_types::permission::Permission;
use ark_types::problem::{Problem, ProblemKind};
use ark_types::scheduling::{
    Host, HostList, Overcommit, OwnerList, OwnerQuota, Quota, RequestQueue, Resources, Spread, WaitingRequest,
};
use ark_types::shutdown::{AgentsFate, Shutdown};
use ark_types::vmm::{
    ControlReply, ControlRequest, DeviceMetrics, DiskConfig, ExitReason, ExitRecord, Generation, SnapshotId,
    SnapshotReport, VmConfig, VmMetrics, VmState, VsockConfig,
};

fn variables() -> BTreeMap<String, String> {
    BTreeMap::from([("LANG".to_owned(), "C.UTF-8".to_owned())])
}

fn labels() -> Labels {
    BTreeMap::from([("app".to_owned(), "shop".to_owned())]).try_into().unwrap()
}

fn exit_record() -> ExitRecord {
    ExitRecord {
        reason: ExitReason::GuestPanic,
        detail: Some("the console tells".to_owned()),
        at_unix_ms: 1_700_000,
    }
}

#[test]
fn vm_config() {
    let least = VmConfig {
        kernel: "/k/vmlinux".into(),
        initrd: None,
        cmdline: String::new(),
        vcpus: 1,
        memory_mib: 128,
        disks: Vec::new(),
        vsock: None,
        console: None,
        control_socket: None,
        exit_file: None,
        labels: BTreeMap::new(),
    };
    let most = VmConfig {
        initrd: Some("/k/guestd.cpio".into()),
        cmdline: "quiet".to_owned(),
        disks: vec![
            DiskConfig { path: "/i/base.erofs".into(), read_only: true },
            DiskConfig { path: "/d/data.img".into(), read_only: false },
        ],
        vsock: Some(VsockConfig { guest_cid: 3, uds_path: "/r/v.sock".into() }),
        console: Some("/r/console.log".into()),
        control_socket: Some("/r/vmm.sock".into()),
        exit_file: Some("/r/exit.json".into()),
        labels: BTreeMap::from([("image".to_owned(), digest())]),
        ..least.clone()
    };
    Frozen::default().with("least", &least).with("most", &most).check("vm-config");
}

#[test]
fn control_socket() {
    let device = DeviceMetrics {
        name: "block0".to_owned(),
        counters: BTreeMap::from([("read_bytes".to_owned(), 4096), ("reads".to_owned(), 1)]),
    };
    let metrics = VmMetrics {
        first_run_ns: 7_040_000_000,
        exits: 1000,
        guest_resident_bytes: 30 << 20,
        devices: vec![device],
    };
    let full = SnapshotReport {
        id: snapshot_id(),
        base: None,
        pause_us: 900,
        durable_us: 120_000,
        written_bytes: 60 << 20,
    };
    let diff = SnapshotReport { base: Some(snapshot_id()), ..full.clone() };
    let mut frozen = Frozen::default()
        .with("request state", &ControlRequest::State)
        .with("request pause", &ControlRequest::Pause)
        .with("request resume", &ControlRequest::Resume)
        .with("request stop", &ControlRequest::Stop { grace_ms: 5000 })
        .with("request metrics", &ControlRequest::Metrics)
        .with("request snapshot", &ControlRequest::Snapshot { dir: "/s/x".into() })
        .with("request reclaim", &ControlRequest::Reclaim { dir: "/s/x".into() })
        .with("reply metrics", &ControlReply::Metrics(metrics))
        .with("reply snapshot full", &ControlReply::Snapshot(full))
        .with("reply snapshot diff", &ControlReply::Snapshot(diff))
        .with("reply refused", &ControlReply::Refused { why: "the VM has ended".to_owned() });
    for state in VmState::ALL {
        frozen = frozen.with(&format!("reply {state}"), &ControlReply::State { state });
    }
    frozen.check("control");
}

/// Every reason. The match has no `_` arm: a new reason does not compile before it is added to the list.
fn exit_reasons() -> [ExitReason; 12] {
    use ExitReason::{
        BadConfig, BadSnapshot, GuestCrash, GuestPanic, GuestPoweroff, GuestReboot, HostError, Internal,
        Killed, Signal, StopDeadline, Stopped,
    };
    match GuestPoweroff {
        GuestPoweroff | GuestReboot | GuestPanic | GuestCrash | Stopped | StopDeadline | Signal | Killed
        | BadConfig | BadSnapshot | HostError | Internal => {}
    }
    [
        GuestPoweroff,
        GuestReboot,
        GuestPanic,
        GuestCrash,
        Stopped,
        StopDeadline,
        Signal,
        Killed,
        BadConfig,
        BadSnapshot,
        HostError,
        Internal,
    ]
}

#[test]
fn exit_records_and_codes() {
    let mut frozen = Frozen::default();
    let mut codes = String::new();
    for reason in exit_reasons() {
        let record = ExitRecord { reason, detail: None, at_unix_ms: 1_700_000_000_000 };
        frozen = frozen.with(&format!("{reason:?}"), &record);
        writeln!(codes, "{:>3} {reason:?}: {reason}", reason.exit_code()).unwrap();
    }
    frozen.with("with detail", &exit_record()).check("exit-record");
    check_text("exit-codes.txt", &codes);
}

fn generation() -> Generation {
    "00112233445566778899aabbccddeeff".parse().unwrap()
}

fn snapshot_id() -> SnapshotId {
    "ffeeddccbbaa99887766554433221100".parse().unwrap()
}

#[test]
fn guest_messages() {
    let renew = Renew {
        generation: generation(),
        nonce: "ab".repeat(16),
        hostname: "a1-3".to_owned(),
        machine_id: "cd".repeat(16),
        seed: "ef".repeat(32),
        unix_ns: 1_700_000_000_000_000_000,
    };
    let renewed = Renewed {
        nonce: renew.nonce.clone(),
        renewals: 2,
        random: "01".repeat(32),
        evaluator_random: Some("23".repeat(16)),
        hostname: renew.hostname.clone(),
        machine_id: renew.machine_id.clone(),
        boot_id: "5e0b1c9e-4a3d-4f7e-9a55-0d1b8f8f3c11".to_owned(),
        dropped_secrets: 1,
        unix_ns: 1_700_000_000_001_000_000,
    };
    let mut frozen = Frozen::default()
        .with("hello", &Hello { guestd: "0.1.0".into(), kernel: "6.12.117".into(), uptime_ms: 800, cpus: 2 })
        .with(
            "heartbeat",
            &Heartbeat { sequence: 1, uptime_ms: 2800, mem_available_kib: 90_000, load1_x100: 7 },
        )
        .with("started", &Started { pid: 42 })
        .with("signal", &SignalRequest { signal: 15 })
        .with("path", &PathRequest { path: "/tmp/x".to_owned() })
        .with("file write", &FileWrite { path: "/tmp/x".to_owned(), mode: 0o644 })
        .with("renew", &renew)
        .with("renewed", &renewed)
        .with("renewed without an evaluator", &Renewed { evaluator_random: None, ..renewed.clone() })
        .with("dial", &DialRequest { port: 8080 })
        .with("clock set", &ClockSet { unix_ns: 1_700_000_000_000_000_000 });
    for code in [
        ErrorCode::BadRequest,
        ErrorCode::ProgramNotFound,
        ErrorCode::ProgramNotExecutable,
        ErrorCode::BadWorkingDirectory,
        ErrorCode::UnknownUser,
        ErrorCode::FileNotFound,
        ErrorCode::FileError,
        ErrorCode::NoEvaluator,
        ErrorCode::NotListening,
        ErrorCode::NothingKept,
        ErrorCode::DeadlinePassed,
        ErrorCode::Exhausted,
        ErrorCode::Internal,
    ] {
        let error = GuestError { code, message: "why".to_owned() };
        frozen = frozen.with(&format!("error {code:?}"), &error);
    }
    frozen.check("guest-messages");
}

/// The bytes of a frame of every kind, without and with content.
#[test]
fn frames() {
    let mut text = String::from("# kind: bytes of an empty frame | bytes of a frame that holds `ark`\n");
    for &kind in Kind::ALL {
        let hex = |frame: Frame| frame.encode().iter().map(|b| format!("{b:02x}")).collect::<String>();
        let (empty, full) = (hex(Frame::empty(kind)), hex(Frame::raw(kind, *b"ark").unwrap()));
        writeln!(text, "{kind:?}: {empty} | {full}").unwrap();
    }
    check_text("frames.txt", &text);
}

#[test]
fn exec() {
    let least = ExecRequest { argv: vec!["true".to_owned()], ..ExecRequest::default() };
    let most = ExecRequest {
        argv: vec!["sh".to_owned(), "-c".to_owned(), "cat".to_owned()],
        env: variables(),
        cwd: Some("/tmp".to_owned()),
        user: Some("nobody:nogroup".to_owned()),
        timeout_ms: Some(30_000),
        tty: Some(TtySize { rows: 24, cols: 80 }),
        stdin: Some("aGk=".to_owned()),
        encoding: Encoding::Base64,
        resumable: true,
    };
    let session =
        ExecSession { id: "0123456789abcdef0123456789abcdef".to_owned(), received: 3, grace_ms: 30_000 };
    let reply = |status: ExitStatus| ExecReply {
        status,
        exit_code: status.shell_code(),
        stdout: "42\n".to_owned(),
        stderr: String::new(),
        truncated: false,
        duration_us: 12_000,
    };
    Frozen::default()
        .with("least", &least)
        .with("most", &most)
        .with("session", &session)
        .with("ack", &ExecAck { received: 3 })
        .with("end", &ExecEnd { status: ExitStatus::Exited { code: 0 }, duration_us: 12_000 })
        .with("reply exited", &reply(ExitStatus::Exited { code: 3 }))
        .with("reply signaled", &reply(ExitStatus::Signaled { signal: 9 }))
        .with("reply timed out", &reply(ExitStatus::TimedOut))
        .check("exec");
}

#[test]
fn problems() {
    let mut frozen = Frozen::default();
    for &kind in ProblemKind::ALL {
        frozen = frozen.with(&format!("{kind:?}"), &Problem::new(kind, "what failed, why, what next"));
    }
    frozen.check("problems");
}

/// Every state. The match has no `_` arm: a new state does not compile before it is added to the list.
fn agent_states() -> [AgentState; 6] {
    match AgentState::Creating {
        AgentState::Creating
        | AgentState::Running
        | AgentState::Paused
        | AgentState::Stopping
        | AgentState::Stopped
        | AgentState::Failed => {}
    }
    [
        AgentState::Creating,
        AgentState::Running,
        AgentState::Paused,
        AgentState::Stopping,
        AgentState::Stopped,
        AgentState::Failed,
    ]
}

fn health_check() -> HealthCheck {
    let probe = Probe::Tcp { port: 8080 };
    HealthCheck { probe, interval_s: 30, timeout_s: 10, failures: 3, start_period_s: 0 }
}

fn permissions() -> Vec<Permission> {
    vec![Permission::Inference(None), Permission::Inference("router".parse().ok())]
}

/// A request for an agent that says nothing.
fn create_least() -> CreateAgent {
    CreateAgent {
        name: None,
        image: None,
        template: None,
        cold: false,
        vcpus: None,
        memory_mib: None,
        env: BTreeMap::new(),
        auto_remove: false,
        labels: Labels::default(),
        owner: Owner::default(),
        allow: Vec::new(),
        freeze_on_inference: false,
        priority: 0,
        queue_timeout_ms: None,
        anti_affinity: None,
        spread: Spread::Soft,
        restart: RestartPolicy::Never,
        ttl_s: None,
        idle_timeout_s: None,
        checkpoint: None,
        health_check: None,
    }
}

fn newborn() -> Agent {
    Agent {
        id: "0123456789abcdef".to_owned(),
        name: "a1".parse().unwrap(),
        origin: Origin::Boot,
        image: "base".parse().unwrap(),
        image_digest: digest(),
        vcpus: 2,
        memory_mib: 256,
        state: AgentState::Creating,
        reason: None,
        exit: None,
        vmm_pid: None,
        created_unix_ms: 1_700_000_000_000,
        boot_ms: None,
        heartbeat: None,
        auto_remove: false,
        labels: Labels::default(),
        owner: Owner::default(),
        allow: Vec::new(),
        freeze_on_inference: false,
        restart: RestartPolicy::Never,
        ttl_s: None,
        idle_timeout_s: None,
        checkpoint: None,
        checkpoints: Vec::new(),
        checkpoint_failure: None,
        health_check: None,
        health: AgentHealth::Healthy,
        continuity: None,
        backoff_until_unix_ms: None,
        removed_unix_ms: None,
    }
}

#[test]
fn agents() {
    let create = create_least();
    let booted = CreateAgent {
        name: Some("a1".parse().unwrap()),
        image: Some("base".parse().unwrap()),
        cold: true,
        vcpus: Some(2),
        memory_mib: Some(512),
        env: variables(),
        auto_remove: true,
        labels: labels(),
        owner: "shop".parse().unwrap(),
        ..create.clone()
    };
    let forked = CreateAgent { template: Some("py".parse().unwrap()), ..create.clone() };
    let queued = CreateAgent {
        owner: "team".parse().unwrap(),
        allow: permissions(),
        freeze_on_inference: true,
        priority: -5,
        queue_timeout_ms: Some(0),
        anti_affinity: Some("web".parse().unwrap()),
        spread: Spread::Hard,
        restart: RestartPolicy::Always { max_restarts: Some(3) },
        ttl_s: Some(3600),
        idle_timeout_s: Some(600),
        checkpoint: Some(CheckpointPolicy { every_s: 60, keep: 3 }),
        health_check: Some(health_check()),
        ..booted.clone()
    };
    let agent = newborn();
    let beat = AgentHeartbeat {
        at_unix_ms: 1_700_000_002_000,
        uptime_ms: 2000,
        mem_available_kib: 90_000,
        load1_x100: 7,
    };
    let mut frozen = Frozen::default()
        .with("create least", &create)
        .with("create booted", &booted)
        .with("create from a template", &forked)
        .with("create with wishes for its room", &queued)
        .with("list", &AgentList { agents: vec![agent.clone()], next_cursor: None })
        .with(
            "page",
            &AgentList {
                agents: vec![agent.clone()],
                next_cursor: Some("1700000000000-0123456789abcdef".to_owned()),
            },
        );
    for state in agent_states() {
        let full = Agent {
            state,
            reason: Some("the guest's kernel panicked".to_owned()),
            exit: Some(exit_record()),
            vmm_pid: Some(4242),
            boot_ms: Some(870),
            heartbeat: Some(beat.clone()),
            labels: labels(),
            allow: permissions(),
            freeze_on_inference: true,
            restart: RestartPolicy::OnFailure { max_restarts: None },
            ttl_s: Some(3600),
            idle_timeout_s: Some(600),
            checkpoint: Some(CheckpointPolicy { every_s: 60, keep: 3 }),
            checkpoint_failure: Some("there is no room on disk".to_owned()),
            health_check: Some(health_check()),
            health: AgentHealth::Unresponsive { since_unix_ms: 1_700_000_002_000 },
            continuity: Some(Continuity {
                restarts: 1,
                cause: "the guest's kernel panicked".to_owned(),
                restored_from: Origin::Boot,
                lost_ms: 60_000,
                at_unix_ms: 1_700_000_001_000,
            }),
            backoff_until_unix_ms: Some(1_700_000_010_000),
            removed_unix_ms: Some(1_700_000_009_000),
            ..agent.clone()
        };
        frozen = frozen.with(&format!("agent {state}"), &full);
    }
    let name = || "x".parse().unwrap();
    for (from, origin) in [
        ("a template", Origin::Template { name: name() }),
        ("a snapshot", Origin::Snapshot { name: name() }),
        ("an agent", Origin::Fork { name: name(), id: "fedcba9876543210".to_owned() }),
    ] {
        frozen = frozen.with(&format!("agent from {from}"), &Agent { origin, ..agent.clone() });
    }
    frozen.check("agents");
    // What a caller may leave out has the documented default.
    let short: CreateAgent = serde_json::from_str("{}").unwrap();
    assert_eq!(short, create);
    assert!(
        serde_json::from_str::<CreateAgent>(r#"{"image":"base","colour":"red"}"#).is_err(),
        "unknown fields are refused"
    );
}

#[test]
fn files() {
    let stat = |kind, target: Option<&str>| FileStat {
        name: "x".to_owned(),
        kind,
        size: 5,
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime_unix_ms: -1,
        target: target.map(str::to_owned),
    };
    Frozen::default()
        .with("file", &stat(FileKind::File, None))
        .with("directory", &stat(FileKind::Directory, None))
        .with("symlink", &stat(FileKind::Symlink, Some("/y")))
        .with("other", &stat(FileKind::Other, None))
        .with("list", &FileList { entries: vec![stat(FileKind::File, None)] })
        .check("files");
}

#[test]
fn health() {
    let health = Health {
        status: HealthStatus::Ok,
        version: "0.1.0".to_owned(),
        pid: 7,
        host: HostKind::Native,
        kvm: ProbeReport { usable: true, reason: "a guest ran".to_owned(), duration_us: 20_000 },
        cpus: 2,
        memory_mib: 24_000,
        agents: 3,
        uptime_ms: 60_000,
        log: LogHealth { state: LogState::Writable, newest: 42, why: None },
    };
    let kvm = ProbeReport { usable: false, reason: "no /dev/kvm".to_owned(), duration_us: 3 };
    let degraded = Health { status: HealthStatus::Degraded, host: HostKind::Machine, kvm, ..health.clone() };
    let log = |state| LogHealth { state, newest: 42, why: Some("database or disk is full".to_owned()) };
    let read_only = Health { status: HealthStatus::ReadOnly, log: log(LogState::Full), ..health.clone() };
    let failing = Health { log: log(LogState::Failing), ..read_only.clone() };
    Frozen::default()
        .with("ok", &health)
        .with("degraded", &degraded)
        .with("log full", &read_only)
        .with("log failing", &failing)
        .check("health");
}

#[test]
fn shutdown() {
    let end: Shutdown = serde_json::from_str("{}").unwrap();
    assert_eq!(end, Shutdown { agents: AgentsFate::End }, "what is not said");
    let keep = Shutdown { agents: AgentsFate::Keep };
    Frozen::default().with("end", &end).with("keep", &keep).check("shutdown");
}

/// The transition tables, as a matrix: row may become column.
#[test]
fn transitions() {
    let mut text = String::new();
    matrix(&mut text, "agent", &agent_states(), AgentState::may_become);
    matrix(&mut text, "VM", &VmState::ALL, VmState::may_become);
    check_text("transitions.txt", &text);
}

fn matrix<S: Copy + std::fmt::Display>(
    text: &mut String,
    title: &str,
    states: &[S],
    may: impl Fn(S, S) -> bool,
) {
    let mut line = |first: &str, cells: &[String]| {
        let cells: String = cells.iter().map(|cell| format!("{cell:<10}")).collect();
        writeln!(text, "{}", format!("{first:<10}{cells}").trim_end()).unwrap();
    };
    line(title, &states.iter().map(ToString::to_string).collect::<Vec<_>>());
    for from in states {
        let cell = |to: &S| if may(*from, *to) { "yes".to_owned() } else { "-".to_owned() };
        line(&from.to_string(), &states.iter().map(cell).collect::<Vec<_>>());
    }
}

/// Some of everything.
const SOME: Resources = Resources { agents: 1, memory_mib: 256, vcpus: 2 };

#[test]
fn scheduling() {
    let request = WaitingRequest {
        position: 1,
        name: None,
        owner: "default".parse().unwrap(),
        priority: 0,
        needs: SOME,
        missing: "1 agent is asked for and 0 of 9 may still be had".to_owned(),
        waited_ms: 1500,
        timeout_ms: 30_000,
    };
    let named = WaitingRequest { position: 2, name: Some("a1".parse().unwrap()), ..request.clone() };
    let host = Host {
        name: "local".to_owned(),
        capacity: SOME.times(4),
        overcommit: Overcommit { memory: 2.0, cpu: 512.0, forks: 8.0 },
        limit: SOME.times(8),
        reserved: SOME,
        free: SOME.times(7),
        standbys: SOME,
        warm: vec!["py".parse().unwrap()],
        used_memory_mib: 500,
    };
    let quota = Quota { agents: Some(9), memory_mib: Some(4096), vcpus: Some(0) };
    let owner =
        OwnerQuota { owner: "team".parse().unwrap(), quota, reserved: SOME, waiting: Resources::default() };
    Frozen::default()
        .with("queue", &RequestQueue { capacity: 256, waiting: vec![request, named] })
        .with("hosts", &HostList { hosts: vec![host] })
        .with("quota", &quota)
        .with("no quota", &Quota::default())
        .with("owners", &OwnerList { owners: vec![owner] })
        .check("scheduling");
    assert!(serde_json::from_str::<Quota>(r#"{"agent":1}"#).is_err(), "unknown fields are refused");
}

//! The wire formats of snapshots, templates, pools, forks, evaluation, receipts and of what operators ask, frozen.

use std::collections::BTreeMap;

use crate::frozen::{Frozen, digest};
use ark_types::agent::{Agent, AgentName, AgentState, Origin};
use ark_types::checkpoint::CheckpointPolicy;
use ark_types::console::{ConsoleEnd, ConsoleGap, ConsolePiece, KeptConsole, KeptConsoleList};
use ark_types::eval::{EvalEnd, EvalException, EvalReply, EvalRequest, Language};
use ark_types::exec::Encoding;
use ark_types::healing::{AgentHealth, RestartPolicy};
use ark_types::health_check::{HealthCheck, Probe};
use ark_types::label::{Labels, Owner};
use ark_types::pool::{InvalidPolicy, Pool, PoolList, PoolPolicy, PoolWait};
use ark_types::receipt::{Check, CheckKind, Evidence, Receipt};
use ark_types::scheduling::Resources;
use ark_types::snapshot::{
    CreateSnapshot, FailedFork, ForkAgent, Forked, RestoreSnapshot, RewindAgent, Snapshot, SnapshotKind,
    SnapshotList,
};
use ark_types::stats::{AgentStats, StatsList};
use ark_types::template::{CreateTemplate, DEFAULT_WARM_UP_MS, Template, TemplateList};
use ark_types::vmm::{
    DiskConfig, Generation, ProcessorModel, RestoreConfig, RunConfig, SNAPSHOT_VERSION, SnapshotBase,
    SnapshotId, SnapshotManifest,
};

fn name(text: &str) -> AgentName {
    text.parse().unwrap()
}

fn id(digits: &str) -> SnapshotId {
    digits.repeat(16).parse().unwrap()
}

fn generation() -> Generation {
    "00112233445566778899aabbccddeeff".parse().unwrap()
}

fn sha256() -> String {
    "0123456789abcdef".repeat(4)
}

#[test]
fn snapshot_manifests() {
    let full = SnapshotManifest {
        version: SNAPSHOT_VERSION,
        id: id("a1"),
        base: None,
        created_unix_ms: 1_700_000_000_000,
        vcpus: 2,
        memory_mib: 512,
        processor: ProcessorModel {
            vendor: "AuthenticAMD".to_owned(),
            family: 25,
            model: 1,
            stepping: 1,
            brand: "AMD EPYC 7R13 Processor".to_owned(),
        },
        disks: vec![DiskConfig { path: "/i/python.erofs".into(), read_only: true }],
        guest_cid: Some(3),
        labels: BTreeMap::from([("image".to_owned(), digest())]),
        state_bytes: 20_000,
        state_sha256: sha256(),
        sums_bytes: 4096,
        sums_sha256: sha256(),
        written_bytes: 60 << 20,
    };
    let base = SnapshotBase { id: id("a1"), path: "/s/a1".into() };
    let diff = SnapshotManifest { id: id("b2"), base: Some(base), guest_cid: None, ..full.clone() };
    Frozen::default().with("full", &full).with("diff", &diff).check("snapshot-manifest");
    // A manifest that says more than this release understands is not half understood.
    let mut newer = serde_json::to_value(&full).unwrap();
    newer["encrypted"] = true.into();
    assert!(serde_json::from_value::<SnapshotManifest>(newer).unwrap_err().to_string().contains("encrypted"));
}

#[test]
fn restore_config() {
    let least = RestoreConfig {
        snapshot: "/s/a1".into(),
        generation: generation(),
        disks: Vec::new(),
        uds_path: None,
        console: None,
        control_socket: None,
        exit_file: None,
    };
    let most = RestoreConfig {
        disks: vec!["/i/python.erofs".into()],
        uds_path: Some("/r/v.sock".into()),
        console: Some("/r/console.log".into()),
        control_socket: Some("/r/vmm.sock".into()),
        exit_file: Some("/r/exit.json".into()),
        ..least.clone()
    };
    assert_eq!(RunConfig::Restore(most.clone()).exit_file(), most.exit_file.as_ref());
    Frozen::default()
        .with("least", &RunConfig::Restore(least))
        .with("most", &RunConfig::Restore(most))
        .check("restore-config");
}

fn snapshot() -> Snapshot {
    Snapshot {
        name: name("before-edit"),
        id: id("b2").to_string(),
        kind: SnapshotKind::Diff,
        base: Some("template py".to_owned()),
        agent: name("a1"),
        image: "python".parse().unwrap(),
        vcpus: 1,
        memory_mib: 256,
        bytes: 9 << 20,
        pause_us: 900,
        durable_us: 40_000,
        created_unix_ms: 1_700_000_000_000,
        children: 1,
        agents: 2,
        is_checkpoint: false,
    }
}

#[test]
fn snapshots() {
    let full = Snapshot { kind: SnapshotKind::Full, base: None, ..snapshot() };
    let restore = RestoreSnapshot {
        name: Some(name("a2")),
        allow: vec!["inference".parse().unwrap()],
        freeze_on_inference: false,
        restart: RestartPolicy::Always { max_restarts: None },
        checkpoint: Some(CheckpointPolicy { every_s: 60, keep: 2 }),
        health_check: Some(health_check()),
    };
    let checkpoint = Snapshot { name: name(&"b2".repeat(16)), is_checkpoint: true, ..snapshot() };
    Frozen::default()
        .with("checkpoint", &checkpoint)
        .with("create", &CreateSnapshot { name: name("before-edit") })
        .with("diff", &snapshot())
        .with("full", &full)
        .with("list", &SnapshotList { snapshots: vec![snapshot()] })
        .with("restore least", &RestoreSnapshot::default())
        .with("restore most", &restore)
        .with("rewind", &RewindAgent { snapshot: name("before-edit") })
        .check("snapshots");
}

fn health_check() -> HealthCheck {
    let probe = Probe::Tcp { port: 8080 };
    HealthCheck { probe, interval_s: 30, timeout_s: 10, failures: 3, start_period_s: 0 }
}

#[test]
fn forks() {
    let agent = Agent {
        id: "0123456789abcdef".to_owned(),
        name: name("a1-1"),
        origin: Origin::Fork { name: name("a1"), id: "fedcba9876543210".to_owned() },
        image: "python".parse().unwrap(),
        image_digest: digest(),
        vcpus: 1,
        memory_mib: 256,
        state: AgentState::Running,
        reason: None,
        exit: None,
        vmm_pid: Some(4242),
        created_unix_ms: 1_700_000_000_000,
        boot_ms: Some(40),
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
    };
    let forked = Forked {
        agents: vec![agent],
        failed: vec![FailedFork { name: name("a1-2"), why: "its clock is 80 ms off".to_owned() }],
        pause_us: 900,
        durable_us: 40_000,
    };
    let wishes = ForkAgent {
        count: 2,
        allow: vec!["inference".parse().unwrap()],
        freeze_on_inference: false,
        restart: RestartPolicy::OnFailure { max_restarts: Some(3) },
        checkpoint: Some(CheckpointPolicy { every_s: 60, keep: 2 }),
        health_check: Some(health_check()),
    };
    Frozen::default()
        .with("request", &ForkAgent { count: 2, ..ForkAgent::default() })
        .with("request with wishes", &wishes)
        .with("reply", &forked)
        .check("forks");
    // What a caller may leave out has the documented default.
    assert_eq!(serde_json::from_str::<ForkAgent>("{}").unwrap(), ForkAgent::default());
    assert!(serde_json::from_str::<ForkAgent>(r#"{"n":10}"#).is_err(), "unknown fields are refused");
}

#[test]
fn templates() {
    let least: CreateTemplate = serde_json::from_str(r#"{"name":"py","image":"python"}"#).unwrap();
    assert_eq!(
        (least.vcpus, least.memory_mib, least.timeout_ms, least.warm.as_deref()),
        (1, 256, DEFAULT_WARM_UP_MS, None)
    );
    let most = CreateTemplate { warm: Some("import numpy".to_owned()), vcpus: 2, ..least.clone() };
    let plain = Template {
        name: name("default-python"),
        image: "python".parse().unwrap(),
        digest: digest(),
        vcpus: 1,
        memory_mib: 256,
        warm: None,
        model: None,
        bytes: 60 << 20,
        build_ms: 2500,
        created_unix_ms: 1_700_000_000_000,
        used_unix_ms: 1_700_000_060_000,
        agents: 3,
    };
    let warm = Template { name: name("py"), warm: most.warm.clone(), ..plain.clone() };
    let model = CreateTemplate { model: Some("router".parse().unwrap()), ..least.clone() };
    let serves = Template { name: name("model-router"), model: model.model.clone(), ..plain.clone() };
    Frozen::default()
        .with("create least", &least)
        .with("create most", &most)
        .with("create with a model", &model)
        .with("template with a model", &serves)
        .with("template plain", &plain)
        .with("template warm", &warm)
        .with("list", &TemplateList { templates: vec![plain] })
        .check("templates");
}

#[test]
fn evaluation() {
    let least = EvalRequest { code: "6*7".to_owned(), ..EvalRequest::default() };
    assert_eq!(serde_json::from_str::<EvalRequest>(r#"{"code":"6*7"}"#).unwrap(), least);
    let most = EvalRequest { language: Language::Python, timeout_ms: Some(30_000), ..least.clone() };
    let exception = EvalException {
        kind: "ZeroDivisionError".to_owned(),
        message: "division by zero".to_owned(),
        traceback: "Traceback (most recent call last):\n…".to_owned(),
    };
    let value = EvalEnd { value: Some("42".to_owned()), exception: None, duration_us: 12 };
    let raised = EvalEnd { value: None, exception: Some(exception.clone()), duration_us: 12 };
    let reply = EvalReply {
        stdout: "hello\n".to_owned(),
        stderr: String::new(),
        value: value.value.clone(),
        exception: None,
        truncated: false,
        duration_us: 12,
    };
    let failed = EvalReply { value: None, exception: Some(exception), truncated: true, ..reply.clone() };
    Frozen::default()
        .with("least", &least)
        .with("most", &most)
        .with("end with a value", &value)
        .with("end with an exception", &raised)
        .with("reply with a value", &reply)
        .with("reply with an exception", &failed)
        .check("eval");
}

/// Every check. The match has no `_` arm: a new one does not compile before it is added to the list.
fn check_kinds() -> [CheckKind; 9] {
    use CheckKind::{
        Clock, EvaluatorRandom, Hostname, MachineId, Random, Renewals, Secrets, VsockToGuest, VsockToHost,
    };
    match Random {
        Random | EvaluatorRandom | Clock | MachineId | Hostname | VsockToGuest | VsockToHost | Renewals
        | Secrets => {}
    }
    [Random, EvaluatorRandom, Clock, MachineId, Hostname, VsockToGuest, VsockToHost, Renewals, Secrets]
}

#[test]
fn receipts() {
    let check = |(at, check): (usize, CheckKind)| Check {
        check,
        evidence: if at % 2 == 0 { Evidence::HostObserved } else { Evidence::GuestReported },
        answer: "what it said".to_owned(),
        sha256: sha256(),
        passed: true,
    };
    let receipt = Receipt {
        agent_id: "0123456789abcdef".to_owned(),
        name: name("a1-3"),
        snapshot: id("b2").to_string(),
        generation: generation(),
        nonce: "ab".repeat(16),
        at_unix_ms: 1_700_000_000_000,
        took_ms: 40,
        checks: check_kinds().into_iter().enumerate().map(check).collect(),
        sha256: sha256(),
    };
    Frozen::default().with("receipt", &receipt).check("receipts");
}

#[test]
fn consoles() {
    let kept = KeptConsole {
        id: "0123456789abcdef".to_owned(),
        name: "a1".parse().unwrap(),
        image: "base".parse().unwrap(),
        ended_unix_ms: 1_700_000_000_000,
        reason: "the guest's kernel panicked".to_owned(),
        bytes: 4096,
    };
    let piece = |data: &str, encoding| ConsolePiece { offset: 7, data: data.to_owned(), encoding };
    Frozen::default()
        .with("list", &KeptConsoleList { consoles: vec![kept] })
        .with("piece text", &piece("[    0.0] Linux\n", Encoding::Utf8))
        .with("piece bytes", &piece("/w==", Encoding::Base64))
        .with("gap", &ConsoleGap { offset: 262_144, bytes: 524_288 })
        .with("end", &ConsoleEnd { offset: 4096 })
        .check("consoles");
}

#[test]
fn stats() {
    let least = AgentStats {
        id: "0123456789abcdef".to_owned(),
        name: "a1".parse().unwrap(),
        image: "base".parse().unwrap(),
        state: AgentState::Paused,
        created_unix_ms: 1_700_000_000_000,
        heartbeat_age_ms: None,
        memory_mib: 256,
        vcpus: 1,
        at_unix_ms: 1_700_000_001_000,
        cpu_us: None,
        pss_bytes: None,
        rss_bytes: None,
        guest_bytes: None,
        exits: None,
        devices: BTreeMap::new(),
    };
    let counters = BTreeMap::from([("read_bytes".to_owned(), 512)]);
    let most = AgentStats {
        state: AgentState::Running,
        heartbeat_age_ms: Some(900),
        cpu_us: Some(1_000_000),
        pss_bytes: Some(2 << 20),
        rss_bytes: Some(3 << 20),
        guest_bytes: Some(1 << 20),
        exits: Some(77),
        devices: BTreeMap::from([("block0".to_owned(), counters)]),
        ..least.clone()
    };
    let list = StatsList { agents: vec![most.clone()], left_out: 1 };
    Frozen::default().with("least", &least).with("most", &most).with("list", &list).check("stats");
}

/// A policy of a pool.
const POLICY: PoolPolicy = PoolPolicy { min: 2, max: 20, target_wait_ms: 50 };

#[test]
fn pools() {
    let least = Pool {
        template: "default-base".parse().unwrap(),
        policy: None,
        standbys: 0,
        wanted: 2,
        reserved: Resources::default(),
        hits: 0,
        misses: 0,
        demand_per_s: 0.0,
        make_ms: None,
        wait: None,
        failure: None,
    };
    let most = Pool {
        template: "py".parse().unwrap(),
        policy: Some(POLICY),
        standbys: 3,
        reserved: Resources { agents: 3, memory_mib: 96, vcpus: 3 },
        hits: 17,
        misses: 1,
        demand_per_s: 1.5,
        make_ms: Some(120),
        wait: Some(PoolWait { agents: 18, p50_ms: 9, p99_ms: 130 }),
        failure: Some("the guest did not say hello".to_owned()),
        ..least.clone()
    };
    Frozen::default()
        .with("policy", &POLICY)
        .with("list", &PoolList { pools: vec![least, most] })
        .check("pools");
    assert!(serde_json::from_str::<PoolPolicy>(r#"{"min":1,"max":2}"#).is_err(), "each bound is given");
}

#[test]
fn a_policy_has_bounds_and_says_which() {
    POLICY.check().unwrap();
    PoolPolicy { min: 0, max: 0, target_wait_ms: 0 }.check().unwrap();
    PoolPolicy { min: 200, max: 200, target_wait_ms: 600_000 }.check().unwrap();
    for (policy, why, words) in [
        (PoolPolicy { max: 201, ..POLICY }, InvalidPolicy::Max(201), "at most 200"),
        (PoolPolicy { min: 21, ..POLICY }, InvalidPolicy::Min { min: 21, max: 20 }, "not above the max"),
        (
            PoolPolicy { target_wait_ms: 600_001, ..POLICY },
            InvalidPolicy::TargetWait(600_001),
            "at most 600000 ms",
        ),
    ] {
        assert_eq!(policy.check(), Err(why));
        assert!(why.to_string().contains(words), "{why}");
    }
}

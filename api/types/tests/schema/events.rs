//! The wire formats of events, frozen.

use std::collections::BTreeMap;

use crate::frozen::{Frozen, digest};
use ark_types::agent::{Agent, AgentName, AgentState, Origin};
use ark_types::checkpoint::{Checkpoint, CheckpointPolicy};
use ark_types::event::{AgentSpec, Event, EventList, InferenceCall, Outcome, Recorded, Stream};
use ark_types::healing::{AgentHealth, Continuity, RestartPolicy};
use ark_types::health_check::{HealthCheck, Probe};
use ark_types::idempotency::KeptReply;
use ark_types::label::{LabelPatch, Labels, Owner};
use ark_types::pool::PoolPolicy;
use ark_types::scheduling::Quota;
use ark_types::service::ServiceSpec;
use ark_types::task::{AttemptEnd, AttemptOutcome, KeptOutput, TaskSpec, TaskWork};
use ark_types::vmm::{ExitReason, ExitRecord, SnapshotId};

fn name(text: &str) -> AgentName {
    text.parse().unwrap()
}

fn spec() -> AgentSpec {
    let labels = BTreeMap::from([("app".to_owned(), "shop".to_owned())]);
    AgentSpec {
        id: "0123456789abcdef".to_owned(),
        name: name("a1"),
        owner: "shop".parse().unwrap(),
        allow: vec!["inference=router".parse().unwrap()],
        freeze_on_inference: false,
        labels: labels.try_into().unwrap(),
        origin: Origin::Template { name: name("py") },
        image: "python".parse().unwrap(),
        image_digest: digest(),
        vcpus: 1,
        memory_mib: 256,
        created_unix_ms: 1_700_000_000_000,
        auto_remove: true,
        restart: RestartPolicy::OnFailure { max_restarts: Some(3) },
        ttl_s: Some(3600),
        idle_timeout_s: Some(600),
        checkpoint: Some(CheckpointPolicy { every_s: 60, keep: 2 }),
        health_check: Some(Box::new(health_check())),
    }
}

fn task_spec() -> TaskSpec {
    TaskSpec {
        id: "0123456789abcdef".to_owned(),
        name: Some(name("nightly")),
        owner: "shop".parse().unwrap(),
        labels: Labels::default(),
        key: Some("nightly-1".parse().unwrap()),
        image: Some("base".parse().unwrap()),
        template: None,
        work: TaskWork::Command { program: "make".to_owned() },
        priority: 5,
        retry: ark_types::task::Retry::default(),
        timeout_ms: Some(60_000),
        deadline_ms: None,
        traceparent: None,
        created_unix_ms: 1_700_000_000_000,
    }
}

fn attempt_end(outcome: AttemptOutcome, code: u8) -> AttemptEnd {
    let reason = (code != 0).then(|| format!("the program exited with code {code}"));
    let output = Some(KeptOutput { stdout_bytes: 6, stderr_bytes: 0, truncated: false });
    AttemptEnd { outcome, reason, exit_code: Some(code), output }
}

fn health_check() -> HealthCheck {
    let command = vec!["sh".to_owned(), "-c".to_owned(), "test -e /tmp/ok".to_owned()];
    let probe = Probe::Exec { command };
    HealthCheck { probe, interval_s: 5, timeout_s: 2, failures: 1, start_period_s: 60 }
}

fn continuity() -> Continuity {
    Continuity {
        restarts: 2,
        cause: "it was killed".to_owned(),
        restored_from: Origin::Template { name: name("py") },
        lost_ms: 90_000,
        at_unix_ms: 1_700_000_090_000,
    }
}

fn service() -> ServiceSpec {
    serde_json::from_str(r#"{ "name": "web", "replicas": 3, "template": "py", "owner": "shop" }"#).unwrap()
}

fn reply() -> KeptReply {
    KeptReply {
        request: "d4".repeat(32),
        status: 201,
        headers: [("location".to_owned(), "/v1/agents/0123456789abcdef".to_owned())].into(),
        body: "{}".to_owned(),
    }
}

fn service_set() -> Event {
    let (env, request) = (vec!["LANG".to_owned()], Some("fedcba9876543210".to_owned()));
    Event::ServiceSet { service: Box::new(service()), env, generation: 2, request }
}

/// Every event. The match has no `_` arm: a new one does not compile before it is added to the list.
fn events() -> [Event; 33] {
    match (Event::AgentResumed {}) {
        Event::AgentCreated { .. }
        | Event::AgentReady { .. }
        | Event::AgentPaused { .. }
        | Event::AgentResumed {}
        | Event::AgentRewound { .. }
        | Event::AgentLabelled { .. }
        | Event::AgentStopping {}
        | Event::AgentEnded { .. }
        | Event::AgentRestarting { .. }
        | Event::AgentRestarted { .. }
        | Event::AgentHealthChanged { .. }
        | Event::AgentCheckpointed { .. }
        | Event::AgentCheckpointFailed { .. }
        | Event::AgentCheckpointUnusable { .. }
        | Event::AgentExpired { .. }
        | Event::AgentRemoved {}
        | Event::OwnerQuotaSet { .. }
        | Event::InferenceCalled { .. }
        | Event::PoolSet { .. }
        | Event::PoolRemoved {}
        | Event::ServiceSet { .. }
        | Event::ServiceRemoved {}
        | Event::TaskCreated { .. }
        | Event::TaskStarted { .. }
        | Event::TaskAttemptFailed { .. }
        | Event::TaskSucceeded { .. }
        | Event::TaskFailed { .. }
        | Event::TaskCancelled {}
        | Event::TaskTimedOut { .. }
        | Event::TaskRemoved {}
        | Event::RequestMade { .. }
        | Event::RequestAnswered { .. }
        | Event::RequestDropped {} => {}
    }
    let exit = ExitRecord { reason: ExitReason::GuestPanic, detail: None, at_unix_ms: 1_700_000_000_000 };
    [
        Event::AgentCreated { agent: spec() },
        Event::AgentReady { boot_ms: 40 },
        Event::AgentPaused { snapshot: "b2".repeat(16) },
        Event::AgentResumed {},
        Event::AgentRewound { origin: Origin::Snapshot { name: name("before-edit") } },
        Event::AgentLabelled { labels: spec().labels },
        Event::AgentStopping {},
        Event::AgentEnded {
            outcome: Outcome::Failed,
            reason: "the guest's kernel panicked".to_owned(),
            exit: Some(exit),
        },
        Event::AgentRestarting { cause: "it was killed".to_owned(), attempt: 2, after_ms: 2000 },
        Event::AgentRestarted { continuity: continuity(), boot_ms: 40 },
        Event::AgentHealthChanged {
            health: AgentHealth::Unhealthy {
                since_unix_ms: 1_700_000_050_000,
                why: "its command ended with 1".to_owned(),
            },
        },
        Event::AgentCheckpointed {
            checkpoint: Checkpoint {
                snapshot: SnapshotId([0xb2; 16]),
                taken_unix_ms: 1_700_000_060_000,
                pause_us: 900,
                durable_us: 40_000,
                bytes: 4 << 20,
            },
        },
        Event::AgentCheckpointFailed { reason: "there is no room on disk".to_owned() },
        Event::AgentCheckpointUnusable {
            snapshot: SnapshotId([0xb2; 16]),
            reason: "memory is damaged in its first chunk".to_owned(),
        },
        Event::AgentExpired { reason: "it lived for its ttl of 3600 s".to_owned() },
        Event::AgentRemoved {},
        Event::OwnerQuotaSet { quota: Quota { agents: Some(9), memory_mib: Some(4096), vcpus: None } },
        inference_called(),
        Event::PoolSet { policy: PoolPolicy { min: 2, max: 20, target_wait_ms: 50 } },
        Event::PoolRemoved {},
        service_set(),
        Event::ServiceRemoved {},
        Event::TaskCreated { task: task_spec() },
        Event::TaskStarted { attempt: 1, agent: Some("fedcba9876543210".to_owned()) },
        Event::TaskAttemptFailed {
            attempt: 1,
            end: attempt_end(AttemptOutcome::Failed, 3),
            retry_unix_ms: Some(1_700_000_001_000),
        },
        Event::TaskSucceeded { attempt: 2, end: attempt_end(AttemptOutcome::Succeeded, 0) },
        Event::TaskFailed { reason: "the program exited with code 3".to_owned() },
        Event::TaskCancelled {},
        Event::TaskTimedOut { reason: "its deadline is over".to_owned() },
        Event::TaskRemoved {},
        Event::RequestMade {
            key: "c3".repeat(32),
            request: "d4".repeat(32),
            made: Stream::agent("0123456789abcdef"),
        },
        Event::RequestAnswered { key: "c3".repeat(32), reply: reply() },
        Event::RequestDropped {},
    ]
}

#[test]
fn every_event() {
    let mut frozen = Frozen::default();
    let mut list = EventList { events: Vec::new(), next_after: 9, newest: 10 };
    for (position, event) in (1..).zip(events()) {
        let kind = event.kind();
        let stream = match event {
            _ if kind.starts_with("task.") => Stream::task("0123456789abcdef"),
            Event::OwnerQuotaSet { .. } | Event::InferenceCalled { .. } => {
                Stream::owner(&"shop".parse().unwrap())
            }
            Event::PoolSet { .. } | Event::PoolRemoved {} => Stream::pool(&name("py")),
            Event::ServiceSet { .. } | Event::ServiceRemoved {} => Stream::service(&name("web")),
            Event::RequestMade { .. } | Event::RequestAnswered { .. } | Event::RequestDropped {} => {
                Stream::request("fedcba9876543210")
            }
            _ => Stream::agent("0123456789abcdef"),
        };
        let recorded = Recorded { position, at_unix_ms: 1_700_000_000_000, stream, version: position, event };
        assert_eq!(serde_json::to_value(&recorded).unwrap()["event"]["type"], kind);
        frozen = frozen.with(kind, &recorded);
        list.events.push(recorded);
    }
    let stopped =
        Event::AgentEnded { outcome: Outcome::Stopped, reason: "on request".to_owned(), exit: None };
    frozen.with("agent.ended on request", &stopped).with("list", &list).check("events");
    assert_eq!(events().iter().filter(|event| event.is_last()).count(), 4);
}

#[test]
fn changes_of_labels() {
    let labels = [("tier".to_owned(), Some("web".to_owned())), ("old".to_owned(), None)].into();
    let patch = LabelPatch { labels };
    let before = BTreeMap::from(["old", "app"].map(|key| (key.to_owned(), "shop".to_owned())));
    let after = Labels::try_from(before).unwrap().patched(&patch).unwrap();
    assert_eq!(serde_json::to_string(&after).unwrap(), r#"{"app":"shop","tier":"web"}"#);
    let bad = LabelPatch { labels: [("_".to_owned(), Some(String::new()))].into() };
    assert!(after.patched(&bad).is_err());
    Frozen::default().with("patch", &patch).check("labels");
}

#[test]
fn a_spec_is_all_of_a_newborn_agent_and_older_specs_are_read() {
    let newborn: Agent = spec().newborn();
    assert_eq!((newborn.state, AgentSpec::from(&newborn)), (AgentState::Creating, spec()));
    let mut older = serde_json::to_value(spec()).unwrap();
    older.as_object_mut().unwrap().retain(|key, _| {
        !["owner", "allow", "labels", "restart", "ttl_s", "idle_timeout_s", "checkpoint", "health_check"]
            .contains(&key.as_str())
    });
    let older: AgentSpec = serde_json::from_value(older).unwrap();
    assert_eq!((older.owner, older.allow, older.labels), (Owner::default(), Vec::new(), Labels::default()));
    assert_eq!((older.checkpoint, older.health_check), (None, None));
    assert_eq!((older.restart, older.ttl_s, older.idle_timeout_s), (RestartPolicy::Never, None, None));
}

fn inference_called() -> Event {
    let call = InferenceCall {
        agent: Some("0123456789abcdef".to_owned()),
        tool: "chat".to_owned(),
        model: "router".to_owned(),
        replica: name("model-router-1a2b3c4d"),
        outcome: "ok".to_owned(),
        prompt_bytes: 40,
        prompt_sha256: "a".repeat(64),
        reply_bytes: 9,
        reply_sha256: "b".repeat(64),
        prompt_tokens: 20,
        cached_tokens: 12,
        completion_tokens: 5,
        queued_ms: 1,
        first_token_ms: Some(14),
        total_ms: 30,
        prompt: None,
        reply: None,
    };
    Event::InferenceCalled { call: Box::new(call) }
}

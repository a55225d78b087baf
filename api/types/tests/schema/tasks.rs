//! The wire formats of tasks, frozen.

use std::collections::BTreeMap;

use crate::frozen::{Frozen, digest};
use ark_types::agent::AgentName;
use ark_types::eval::{EvalException, Language};
use ark_types::exec::Encoding;
use ark_types::task::{
    AttemptEnd, AttemptOutcome, CreateTask, KeptOutput, Retry, Task, TaskAttempt, TaskCommand, TaskEval,
    TaskKey, TaskList, TaskResult, TaskSpec, TaskState, TaskWork,
};

fn variables() -> BTreeMap<String, String> {
    BTreeMap::from([("LANG".to_owned(), "C.UTF-8".to_owned())])
}

fn name(text: &str) -> AgentName {
    text.parse().unwrap()
}

fn create() -> CreateTask {
    let labels = BTreeMap::from([("app".to_owned(), "shop".to_owned())]);
    CreateTask {
        name: Some(name("nightly")),
        owner: "shop".parse().unwrap(),
        allow: vec!["inference=router".parse().unwrap()],
        freeze_on_inference: false,
        labels: labels.try_into().unwrap(),
        image: Some("base".parse().unwrap()),
        template: None,
        vcpus: Some(2),
        memory_mib: Some(512),
        command: Some(TaskCommand {
            argv: vec!["make".to_owned(), "all".to_owned()],
            env: variables(),
            cwd: Some("/src".to_owned()),
            user: Some("nobody".to_owned()),
            stdin: Some("aGk=".to_owned()),
            encoding: Encoding::Base64,
        }),
        eval: None,
        priority: 5,
        retry: Retry { max_attempts: 3, backoff_ms: 100, max_backoff_ms: 1000 },
        timeout_ms: Some(60_000),
        deadline_ms: Some(3_600_000),
        key: Some("nightly-1".parse().unwrap()),
    }
}

fn ended() -> Task {
    let output = Some(KeptOutput { stdout_bytes: 6, stderr_bytes: 0, truncated: false });
    let spec = TaskSpec {
        id: "0123456789abcdef".to_owned(),
        name: None,
        owner: "shop".parse().unwrap(),
        labels: create().labels,
        key: None,
        image: None,
        template: Some(name("py")),
        work: TaskWork::Eval { language: Language::Python },
        priority: 0,
        retry: Retry::default(),
        timeout_ms: None,
        deadline_ms: None,
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned()),
        created_unix_ms: 1_700_000_000_000,
    };
    let end = |outcome, exit_code| AttemptEnd {
        outcome,
        reason: Some("the code raised ZeroDivisionError".to_owned()),
        exit_code,
        output,
    };
    let attempt = |number, agent: Option<&str>, end| TaskAttempt {
        number,
        agent: agent.map(str::to_owned),
        started_unix_ms: 1_700_000_000_100,
        ended_unix_ms: Some(1_700_000_000_200),
        end: Some(end),
    };
    let exception = EvalException {
        kind: "ZeroDivisionError".to_owned(),
        message: "division by zero".to_owned(),
        traceback: "Traceback".to_owned(),
    };
    Task {
        state: TaskState::Failed,
        reason: Some("the code raised ZeroDivisionError".to_owned()),
        attempts: vec![
            attempt(1, None, end(AttemptOutcome::CutOff, None)),
            attempt(2, Some("fedcba9876543210"), end(AttemptOutcome::Failed, Some(1))),
        ],
        failures: 1,
        retry_unix_ms: None,
        ended_unix_ms: Some(1_700_000_000_200),
        output,
        result: Some(TaskResult {
            attempt: 2,
            exit_code: Some(1),
            stdout: "begin\n".to_owned(),
            stderr: String::new(),
            truncated: false,
            value: Some("42".to_owned()),
            exception: Some(exception),
            duration_us: 900,
        }),
        ..spec.newborn()
    }
}

#[test]
fn tasks() {
    let eval = TaskEval { code: "6*7".to_owned(), language: Language::Python, env: variables() };
    let coded = CreateTask { template: Some(name("py")), eval: Some(eval), ..CreateTask::default() };
    let waiting = Task {
        state: TaskState::Waiting,
        retry_unix_ms: Some(1_700_000_001_000),
        ended_unix_ms: None,
        result: None,
        ..ended()
    };
    let all: Vec<TaskState> = TaskState::ALL.into();
    let outcomes = vec![
        AttemptOutcome::Succeeded,
        AttemptOutcome::Failed,
        AttemptOutcome::TimedOut,
        AttemptOutcome::Lost,
        AttemptOutcome::Refused,
        AttemptOutcome::CutOff,
        AttemptOutcome::Stopped,
    ];
    let newborn = TaskSpec { id: digest(), ..ended().spec }.newborn();
    Frozen::default()
        .with("create", &create())
        .with("create of code", &coded)
        .with("newborn", &newborn)
        .with("ended", &ended())
        .with("states", &all)
        .with("outcomes", &outcomes)
        .with("list", &TaskList { tasks: vec![waiting], next_cursor: Some("1-2".to_owned()) })
        .check("tasks");
    for state in TaskState::ALL {
        assert_eq!(serde_json::to_value(state).unwrap(), state.word());
    }
}

#[test]
fn what_is_left_out_has_a_default_and_what_is_unknown_is_refused() {
    let least: CreateTask = serde_json::from_str(r#"{"image":"base","eval":{"code":"1"}}"#).unwrap();
    let (retry, expected) =
        (least.retry, Retry { max_attempts: 1, backoff_ms: 1000, max_backoff_ms: 60_000 });
    assert_eq!((retry, least.priority, least.key), (expected, 0, None));
    for unknown in [r#"{"imgae":"base"}"#, r#"{"retry":{"tries":2}}"#, r#"{"eval":{"code":"1","argv":[]}}"#] {
        assert!(serde_json::from_str::<CreateTask>(unknown).is_err(), "{unknown}");
    }
    for key in ["", "a b", "\u{e9}", "a\n", &"x".repeat(256)] {
        assert!(key.parse::<TaskKey>().is_err(), "{key:?}");
    }
    assert_eq!("a/b:1".parse::<TaskKey>().unwrap().as_ref(), "a/b:1");
}

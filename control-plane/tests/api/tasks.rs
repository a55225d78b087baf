//! Tasks: done at least once, tried again, timed out, cancelled, and none lost when `arkd` is killed.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ark_types::agent::AgentList;
use ark_types::event::{Event, EventList, Recorded};
use ark_types::problem::ProblemKind;
use ark_types::task::{AttemptOutcome, Task, TaskList, TaskState};
use arkd::config::TaskLimits;
use arkd::daemon::Daemon;
use arkd::store::{Condition, EventLog};
use hyper::{Method, StatusCode};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::events::Brittle;
use crate::harness::{Ark, Client, Place, eventually, runs, signal, started};

/// A task that runs `line` in a shell.
pub(crate) fn shell(line: &str, more: &Value) -> Value {
    let mut body = json!({ "image": "base", "memory_mib": 64, "command": { "argv": ["sh", "-c", line] } });
    body.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
    body
}

pub(crate) async fn create(client: &Client, body: &Value) -> Task {
    let reply = client.post("/v1/tasks", body).await;
    assert_eq!(reply.status(), StatusCode::CREATED, "{:?}", reply.body);
    let task: Task = reply.json();
    assert_eq!(reply.response.headers()["location"], format!("/v1/tasks/{}", task.spec.id));
    task
}

pub(crate) async fn show(client: &Client, id: &str) -> Task {
    client.get(&format!("/v1/tasks/{id}")).await.json()
}

/// The task when it has ended.
pub(crate) async fn ended(client: &Client, task: &Task) -> Task {
    for _ in 0..20 {
        let task: Task = client.get(&format!("/v1/tasks/{}?wait_ms=10000", task.spec.id)).await.json();
        if task.state.is_ended() {
            return task;
        }
    }
    panic!("it does not end: {:?}", show(client, &task.spec.id).await);
}

pub(crate) async fn done(client: &Client, body: &Value) -> Task {
    let task = create(client, body).await;
    ended(client, &task).await
}

pub(crate) async fn running(client: &Client, task: &Task) -> Task {
    let is_running = async || show(client, &task.spec.id).await.state == TaskState::Running;
    eventually("it runs", is_running).await;
    show(client, &task.spec.id).await
}

pub(crate) async fn living(client: &Client) -> usize {
    client.get("/v1/agents").await.json::<AgentList>().agents.len()
}

/// Every event of the log.
async fn events(client: &Client) -> Vec<Recorded> {
    let (mut all, mut after) = (Vec::new(), 0);
    loop {
        let page: EventList = client.get(&format!("/v1/events?limit=1000&after={after}")).await.json();
        if page.events.is_empty() {
            return all;
        }
        after = page.next_after;
        all.extend(page.events);
    }
}

async fn kinds(client: &Client, task: &Task) -> Vec<&'static str> {
    let stream = format!("task/{}", task.spec.id);
    let events = events(client).await.into_iter().filter(|event| event.stream.as_ref() == stream);
    events.map(|event| event.event.kind()).collect()
}

#[tokio::test]
async fn a_task_runs_in_an_agent_of_its_own_and_keeps_what_came_of_it() {
    let place = Place::new();
    let Ark { daemon, client } = place.start().await;
    let client = &client;
    let command = json!({
        "argv": ["sh", "-c", "cat; echo $SECRET $ARK_TASK_ID $ARK_TASK_ATTEMPT >&2"], "env": { "SECRET": "hidden" },
        "stdin": "aW5wdXQ=", "encoding": "base64",
    });
    let more = json!({ "command": command, "labels": { "app": "shop" }, "name": "nightly", "owner": "team" });
    let task = create(client, &shell("", &more)).await;
    assert_eq!((task.state, task.attempts.len()), (TaskState::Queued, 0));
    let task = ended(client, &task).await;
    assert_eq!(task.state, TaskState::Succeeded, "{task:?}");
    let (id, result) = (&task.spec.id, task.result.as_ref().unwrap());
    assert_eq!((result.exit_code, result.stdout.as_str(), result.truncated), (Some(0), "input", false));
    assert_eq!(result.stderr, format!("hidden {id} 1\n"));
    let log = client.get(&format!("/v1/tasks/{id}/logs?stream=stderr")).await;
    assert_eq!(log.body, result.stderr.as_bytes());
    assert_eq!(task.attempts[0].end.as_ref().unwrap().outcome, AttemptOutcome::Succeeded);
    eventually("its agent is gone", async || living(client).await == 0 && place.agent_dirs() == 0).await;
    assert_eq!(kinds(client, &task).await, ["task.created", "task.started", "task.succeeded"]);

    let told = serde_json::to_string(&events(client).await).unwrap();
    assert!(!told.contains("hidden") && !told.contains("aW5wdXQ="), "no secret is in the log");
    let agent = events(client).await.into_iter().find_map(|event| match event.event {
        Event::AgentCreated { agent } => Some(agent),
        _ => None,
    });
    let agent = agent.unwrap();
    assert_eq!((agent.labels.get("ark.task"), agent.owner.as_ref()), (Some(id.as_str()), "team"));
    assert_eq!(task.attempts[0].agent.as_ref(), Some(&agent.id));
    let kept = |what: &str| place.path(&format!("state/tasks/{id}.{what}"));
    eventually("what it was to do is forgotten", async || !kept("request").exists()).await;
    assert!(kept("1.stdout").exists() && kept("1.stderr").exists());

    assert_eq!(client.delete(&format!("/v1/tasks/{id}")).await.status(), StatusCode::NO_CONTENT);
    client.get(&format!("/v1/tasks/{id}")).await.problem(ProblemKind::TaskNotFound);
    client.delete(&format!("/v1/tasks/{id}")).await.problem(ProblemKind::TaskNotFound);
    assert_eq!(std::fs::read_dir(place.path("state/tasks")).unwrap().count(), 0);
    daemon.shut_down().await;
}

#[tokio::test]
async fn code_is_evaluated_with_its_environment() {
    let place = Place::new();
    let Ark { daemon, client } = place.start().await;
    let eval = |code: &str| json!({ "image": "base", "memory_mib": 64, "eval": { "code": code, "env": { "A": "x" } } });
    for (code, value) in [("ARK_TASK_ATTEMPT", "1"), ("A", "x")] {
        let task = done(&client, &eval(code)).await;
        let result = task.result.unwrap();
        assert_eq!((task.state, result.value.as_deref()), (TaskState::Succeeded, Some(value)));
        assert_eq!((result.stdout.as_str(), result.exit_code), ("out\n", Some(0)));
    }
    let task = done(&client, &eval("raise")).await;
    assert_eq!((task.state, task.reason.as_deref()), (TaskState::Failed, Some("the code raised Error")));
    assert_eq!(task.result.unwrap().exception.unwrap().message, "raised");
    daemon.shut_down().await;
}

#[tokio::test]
async fn a_task_is_tried_again_until_it_succeeds_or_may_not_fail_any_more() {
    let place = Place::new();
    let Ark { daemon, client } = place.start().await;
    let client = &client;
    let retry = json!({ "retry": { "max_attempts": 4, "backoff_ms": 20, "max_backoff_ms": 30 } });
    let task = done(client, &shell("echo $ARK_TASK_ATTEMPT; exit $((3 - $ARK_TASK_ATTEMPT))", &retry)).await;
    assert_eq!((task.state, task.failures, task.attempts.len()), (TaskState::Succeeded, 2, 3), "{task:?}");
    assert_eq!(task.result.unwrap().stdout, "3\n");
    let codes: Vec<_> = task.attempts.iter().map(|attempt| attempt.end.as_ref().unwrap().exit_code).collect();
    assert_eq!(codes, [Some(2), Some(1), Some(0)]);
    let agents: std::collections::HashSet<_> = task.attempts.iter().map(|attempt| &attempt.agent).collect();
    assert_eq!(agents.len(), 3, "each attempt has an agent of its own");

    let task = done(client, &shell("exit 7", &retry)).await;
    assert_eq!((task.state, task.failures), (TaskState::Failed, 4));
    let reason = task.reason.unwrap();
    assert_eq!(reason, "the program exited with code 7; it is not tried again after 4 attempts");
    let task = done(client, &shell("exit 7", &json!({}))).await;
    assert_eq!((task.state, task.failures, task.result.unwrap().exit_code), (TaskState::Failed, 1, Some(7)));

    // What no agent can do is not tried again; one that dies or does not come up is.
    let task =
        done(client, &shell("", &json!({ "retry": retry["retry"], "command": { "argv": ["/no/such"] } })))
            .await;
    assert_eq!((task.state, task.attempts.len()), (TaskState::Failed, 1), "{task:?}");
    assert_eq!(task.attempts[0].end.as_ref().unwrap().outcome, AttemptOutcome::Refused);
    let twice = json!({ "retry": { "max_attempts": 2, "backoff_ms": 1 }, "image": "dies-in-exec" });
    for image in ["dies-in-exec", "panics"] {
        let mut body = shell("true", &twice);
        body["image"] = image.into();
        let task = done(client, &body).await;
        assert_eq!((task.state, task.failures, task.attempts.len()), (TaskState::Failed, 2, 2), "{task:?}");
        assert_eq!(task.attempts[1].end.as_ref().unwrap().outcome, AttemptOutcome::Lost);
    }
    eventually("no agent is left", async || living(client).await == 0).await;
    daemon.shut_down().await;
}

#[tokio::test]
async fn attempts_and_tasks_are_timed_out() {
    let place = Place::new();
    let Ark { daemon, client } = place.start().await;
    let client = &client;
    // The fake guest does not keep the program's time: it counts as hung.
    let task = done(client, &shell("sleep 100", &json!({ "timeout_ms": 200 }))).await;
    assert_eq!(task.state, TaskState::TimedOut, "{task:?}");
    assert_eq!(task.attempts[0].end.as_ref().unwrap().outcome, AttemptOutcome::TimedOut);

    let task = done(client, &shell("sleep 100", &json!({ "deadline_ms": 1500 }))).await;
    assert_eq!((task.state, task.reason.as_deref()), (TaskState::TimedOut, Some("its deadline is over")));
    assert_eq!(task.failures, 0);
    let later = json!({ "deadline_ms": 1500, "retry": { "max_attempts": 9, "backoff_ms": 80_000_000, "max_backoff_ms": 80_000_000 } });
    let task = done(client, &shell("false", &later)).await;
    assert_eq!((task.state, task.failures), (TaskState::TimedOut, 1));
    eventually("no agent is left", async || living(client).await == 0).await;
    daemon.shut_down().await;
}

#[tokio::test]
async fn a_task_is_cancelled_wherever_it_is() {
    let place = Place::new();
    let mut config = place.config();
    config.tasks = TaskLimits { at_once: 1, ..config.tasks };
    let Ark { daemon, client } = place.start_with(config).await;
    let client = &client;
    let cancel =
        async |task: &Task| client.post(&format!("/v1/tasks/{}/cancel", task.spec.id), &json!({})).await;
    let first = create(client, &shell("sleep 1000", &json!({}))).await;
    let first = running(client, &first).await;
    let second = create(client, &shell("true", &json!({}))).await;
    client.delete(&format!("/v1/tasks/{}", second.spec.id)).await.problem(ProblemKind::TaskNotEnded);
    let agents: AgentList = client.get("/v1/agents").await.json();
    let [agent] = agents.agents.as_slice() else { panic!("{agents:?}") };
    let pid = agent.vmm_pid.unwrap();

    let cancelled: Task = cancel(&second).await.json();
    assert_eq!((cancelled.state, cancelled.attempts.len()), (TaskState::Cancelled, 0));
    let cancelled: Task = cancel(&first).await.json();
    assert_eq!((cancelled.state, runs(pid), living(client).await), (TaskState::Cancelled, false, 0));
    assert_eq!(cancelled.attempts[0].end.as_ref().unwrap().outcome, AttemptOutcome::Stopped);
    assert_eq!(cancel(&first).await.json::<Task>().state, TaskState::Cancelled, "once is as good as twice");
    let long =
        json!({ "retry": { "max_attempts": 9, "backoff_ms": 80_000_000, "max_backoff_ms": 80_000_000 } });
    let third = create(client, &shell("false", &long)).await;
    let waits = async || show(client, &third.spec.id).await.state == TaskState::Waiting;
    eventually("it waits for its time", waits).await;
    assert!(show(client, &third.spec.id).await.retry_unix_ms.is_some());
    assert_eq!(cancel(&third).await.json::<Task>().state, TaskState::Cancelled);
    let fourth = done(client, &shell("true", &json!({}))).await;
    cancel(&fourth).await.problem(ProblemKind::TaskEnded);
    client.post("/v1/tasks/00/cancel", &json!({})).await.problem(ProblemKind::TaskNotFound);
    daemon.shut_down().await;
}

#[tokio::test]
async fn a_key_makes_one_task_of_many_requests() {
    let place = Place::new();
    let Ark { daemon, client } = place.start().await;
    let client = &client;
    let body = shell("echo once", &json!({ "key": "nightly-1" }));
    let asked = (0..8).map(|_| client.post("/v1/tasks", &body));
    let replies = futures_util::future::join_all(asked).await;
    let ids: std::collections::HashSet<_> =
        replies.iter().map(|reply| reply.json::<Task>().spec.id).collect();
    let made = replies.iter().filter(|reply| reply.status() == StatusCode::CREATED).count();
    assert_eq!((ids.len(), made), (1, 1));
    let other = shell("echo twice", &json!({ "key": "nightly-1" }));
    let problem = client.post("/v1/tasks", &other).await.problem(ProblemKind::TaskKeyTaken);
    assert!(problem.detail.contains("nightly-1"), "{problem:?}");
    // Another owner's keys are its own.
    let others = create(client, &shell("echo twice", &json!({ "key": "nightly-1", "owner": "other" }))).await;
    let task = ended(client, &replies[0].json()).await;
    assert_eq!(client.post("/v1/tasks", &body).await.json::<Task>().spec, task.spec, "ended, too");
    assert_eq!(client.delete(&format!("/v1/tasks/{}", task.spec.id)).await.status(), StatusCode::NO_CONTENT);
    create(client, &other).await;
    ended(client, &others).await;
    daemon.shut_down().await;
}

#[tokio::test]
async fn tasks_are_listed_by_state_owner_and_label_page_by_page() {
    let place = Place::new();
    let Ark { daemon, client } = place.start().await;
    let client = &client;
    let mut ids = Vec::new();
    for n in 0..5 {
        let more = json!({ "labels": { "n": n.to_string() }, "owner": format!("o{}", n % 2) });
        ids.push(create(client, &shell(&format!("exit {}", n % 2), &more)).await);
    }
    for task in &ids {
        ended(client, task).await;
    }
    let list = async |query: &str| {
        let list: TaskList = client.get(&format!("/v1/tasks?{query}")).await.json();
        let ids: Vec<String> = list.tasks.into_iter().map(|task| task.spec.id).collect();
        (ids, list.next_cursor)
    };
    let all: Vec<String> = list("").await.0;
    assert_eq!(all.len(), 5);
    let (first, cursor) = list("limit=3").await;
    let (second, over) = list(&format!("limit=3&cursor={}", cursor.unwrap())).await;
    assert_eq!(([first, second].concat(), over), (all.clone(), None));
    assert_eq!(list("state=failed").await.0, list("owner=o1").await.0);
    assert_eq!(list("labels=n%20in%20(0,3)").await.0.len(), 2);
    assert_eq!(list("labels=n%3D3&state=succeeded").await.0.len(), 0);
    for query in ["limit=0", "state=happy", "cursor=x", "labels=a+b", "no=1"] {
        let status = client.get(&format!("/v1/tasks?{query}")).await.status();
        assert!(status.is_client_error(), "{query}: {status}");
    }
    daemon.shut_down().await;
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_and_leaves_nothing() {
    let place = Place::new();
    let Ark { daemon, client } = place.start().await;
    let client = &client;
    for (more, said) in [
        (json!({ "eval": { "code": "1" } }), "exclude each other"),
        (json!({ "template": "py" }), "exclude each other"),
        (json!({ "command": { "argv": [] } }), "argv is empty"),
        (
            json!({ "command": { "argv": ["a"], "env": { "A=B": "" } } }),
            "cannot name an environment variable",
        ),
        (
            json!({ "command": { "argv": ["a"], "stdin": "x".repeat((1 << 20) + 1) } }),
            "stdin has 1048577 bytes",
        ),
        (json!({ "priority": 101 }), "a priority of 101"),
        (json!({ "retry": { "max_attempts": 0 } }), "retry.max_attempts of 0"),
        (json!({ "timeout_ms": 0 }), "timeout_ms of 0"),
        (json!({ "vcpus": 0 }), "0"),
    ] {
        let problem =
            client.post("/v1/tasks", &shell("true", &more)).await.problem(ProblemKind::InvalidValue);
        assert!(problem.detail.contains(said), "{problem:?}");
    }
    client.post("/v1/tasks", &json!({ "image": "base" })).await.problem(ProblemKind::InvalidValue);
    client
        .post("/v1/tasks", &json!({ "command": { "argv": ["true"] } }))
        .await
        .problem(ProblemKind::InvalidValue);
    let unknown = client.post("/v1/tasks", &shell("true", &json!({ "image": "none" }))).await;
    unknown.problem(ProblemKind::ImageNotFound);
    let unknown = json!({ "template": "none", "command": { "argv": ["true"] } });
    client.post("/v1/tasks", &unknown).await.problem(ProblemKind::TemplateNotFound);
    let long = client.get("/v1/tasks/0?wait_ms=60001").await;
    long.problem(ProblemKind::InvalidValue);
    assert_eq!(std::fs::read_dir(place.path("state/tasks")).unwrap().count(), 0);

    // What was there when it was asked for and is not any more fails the task at once.
    let rotten = json!({ "image": "rotten", "retry": { "max_attempts": 9 } });
    let task = done(client, &shell("true", &rotten)).await;
    assert_eq!((task.state, task.attempts.len()), (TaskState::Failed, 0), "{task:?}");
    assert!(task.reason.unwrap().contains("rotten"));
    daemon.shut_down().await;
}

#[tokio::test]
async fn without_room_a_task_waits_and_that_is_no_attempt() {
    let place = Place::new();
    let Ark { daemon, client } = place.start().await;
    let client = &client;
    let none = json!({ "agents": 0 });
    assert_eq!(client.ask(Method::PUT, "/v1/owners/poor", none.to_string()).await.status(), StatusCode::OK);
    let poor = create(client, &shell("true", &json!({ "owner": "poor" }))).await;
    done(client, &shell("true", &json!({ "owner": "rich" }))).await;
    let now = show(client, &poor.spec.id).await;
    assert_eq!((now.state, now.attempts.len()), (TaskState::Queued, 0));
    let lacks =
        async || show(client, &poor.spec.id).await.reason.is_some_and(|why| why.contains("poor may have"));
    eventually("it says what it lacks", lacks).await;
    client.delete("/v1/owners/poor").await;
    assert_eq!(ended(client, &poor).await.attempts.len(), 1);
    daemon.shut_down().await;
}

#[tokio::test]
async fn as_many_ended_tasks_are_kept_as_may_be_and_no_more_wait_than_may() {
    let place = Place::new();
    let mut config = place.config();
    config.tasks = TaskLimits { at_once: 1, open: 2, keep: 2, ..config.tasks };
    let Ark { daemon, client } = place.start_with(config).await;
    let client = &client;
    let mut tasks = Vec::new();
    for _ in 0..4 {
        tasks.push(done(client, &shell("echo kept", &json!({}))).await.spec.id);
    }
    let kept = async || {
        let list: TaskList = client.get("/v1/tasks").await.json();
        list.tasks.into_iter().map(|task| task.spec.id).collect::<Vec<_>>()
    };
    eventually("the oldest are removed", async || kept().await == tasks[2..]).await;
    let files = || std::fs::read_dir(place.path("state/tasks")).unwrap().count();
    // Of each what it wrote, and how it ended.
    eventually("and their output", async || files() == 4).await;
    let running = [0, 1].map(|_| shell("sleep 1000", &json!({})));
    for body in &running {
        create(client, body).await;
    }
    client.post("/v1/tasks", &running[0]).await.problem(ProblemKind::QueueFull);
    daemon.shut_down().await;
}

#[tokio::test]
async fn what_runs_when_arkd_is_killed_or_ends_is_begun_again_with_the_next_number() {
    let place = Place::new();
    let (first, client) = started(&place, &[]).await;
    // With a process ends what it left, so all stay until the end of the test.
    let mut arkds = vec![first];
    let line = "echo $ARK_TASK_ATTEMPT; [ $ARK_TASK_ATTEMPT -gt 2 ] || sleep 1000";
    let task = create(&client, &shell(line, &json!({ "key": "k" }))).await;
    let mut agents = Vec::new();
    for (number, with) in [(1, Signal::SIGKILL), (2, Signal::SIGTERM)] {
        let client = place_client(&place);
        let is_running = async || {
            let task = show(&client, &task.spec.id).await;
            (task.state, task.last_attempt()) == (TaskState::Running, number)
        };
        eventually("the attempt runs", is_running).await;
        agents.push(show(&client, &task.spec.id).await.attempts.last().unwrap().agent.clone());
        arkds.last_mut().unwrap().end(with);
        arkds.push(started(&place, &[]).await.0);
    }
    let client = place_client(&place);
    let ended = ended(&client, &task).await;
    assert_eq!(
        (ended.state, ended.failures, ended.last_attempt()),
        (TaskState::Succeeded, 0, 3),
        "{ended:?}"
    );
    assert_eq!(ended.result.unwrap().stdout, "3\n");
    for (attempt, agent) in ended.attempts.iter().zip(agents) {
        let end = attempt.end.as_ref().unwrap();
        assert_eq!((end.outcome, &attempt.agent), (AttemptOutcome::CutOff, &agent));
    }
    eventually("no agent is left", async || living(&client).await == 0 && place.agent_dirs() == 0).await;
    let again = client.post("/v1/tasks", &shell(line, &json!({ "key": "k" }))).await;
    assert_eq!((again.status(), again.json::<Task>().spec.id), (StatusCode::OK, task.spec.id));
    assert!(arkds.last_mut().unwrap().end(Signal::SIGTERM));
}

#[tokio::test]
async fn without_room_for_the_log_no_task_is_acknowledged_or_begun_and_what_ended_is_recorded_later() {
    let place = Place::new();
    let condition = watch::Sender::new(Condition::Writable);
    let brittle = |log| Arc::new(Brittle { log, condition: condition.clone() }) as Arc<dyn EventLog>;
    let daemon = Daemon::start_on(place.config(), brittle).await.unwrap();
    let client = &Client::unix(&place.run().api_socket());
    let flag = place.path("flag");
    let line = format!("until [ -e {} ]; do sleep 0.05; done; echo ran", flag.display());
    let first = create(client, &shell(&line, &json!({}))).await;
    running(client, &first).await;
    condition.send_replace(Condition::Full("database or disk is full".to_owned()));
    let files = || std::fs::read_dir(place.path("state/tasks")).unwrap().count();
    assert_eq!(files(), 1);
    client.post("/v1/tasks", &shell("true", &json!({ "key": "k" }))).await.problem(ProblemKind::LogFull);
    let refused = client.post(&format!("/v1/tasks/{}/cancel", first.spec.id), &json!({})).await;
    refused.problem(ProblemKind::LogFull);
    assert_eq!(files(), 1, "nothing is left of what is not to be");
    std::fs::write(&flag, "").unwrap();
    eventually("its agent is gone", async || living(client).await == 0).await;
    assert_eq!(
        show(client, &first.spec.id).await.state,
        TaskState::Running,
        "what is not recorded is not told"
    );

    condition.send_replace(Condition::Writable);
    assert_eq!(ended(client, &first).await.state, TaskState::Succeeded);
    assert_eq!(kinds(client, &first).await, ["task.created", "task.started", "task.succeeded"]);
    let later = done(client, &shell("true", &json!({ "key": "k" }))).await;
    assert_eq!(later.state, TaskState::Succeeded);
    daemon.shut_down().await;
}

pub(crate) fn place_client(place: &Place) -> Client {
    Client::unix(&place.run().api_socket())
}

#[tokio::test]
async fn a_thousand_tasks_outlive_a_killed_arkd_and_each_succeeds_once() {
    const TASKS: usize = 1000;
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let mut ids = Vec::new();
    let bodies: Vec<Value> =
        (0..TASKS).map(|n| shell("true", &json!({ "owner": format!("o{}", n % 3) }))).collect();
    for bodies in bodies.chunks(50) {
        let replies = futures_util::future::join_all(bodies.iter().map(|body| create(&client, body))).await;
        ids.extend(replies.into_iter().map(|task| task.spec.id));
    }
    signal(first.child.id(), Signal::SIGKILL);
    let _ = first.wait();
    let (mut second, client) = started(&place, &[]).await;
    let left = async || {
        let mut open = 0;
        for state in ["queued", "running", "waiting"] {
            let list: TaskList = client.get(&format!("/v1/tasks?state={state}")).await.json();
            open += list.tasks.len();
        }
        open
    };
    // However slow this host is: as long as some are done now and then.
    let (mut open, mut since) = (usize::MAX, tokio::time::Instant::now());
    while open > 0 {
        let now = left().await;
        if now < open {
            (open, since) = (now, tokio::time::Instant::now());
        }
        assert!(since.elapsed() < Duration::from_secs(60), "{open} tasks do not end");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let mut succeeded: HashMap<String, u32> = HashMap::new();
    for event in events(&client).await {
        match event.event {
            Event::TaskSucceeded { .. } => {
                *succeeded.entry(event.stream.task_id().unwrap().to_owned()).or_default() += 1;
            }
            Event::TaskFailed { .. } | Event::TaskTimedOut { .. } | Event::TaskCancelled {} => {
                panic!("{event:?}")
            }
            _ => {}
        }
    }
    assert_eq!(succeeded.len(), TASKS);
    assert!(ids.iter().all(|id| succeeded.get(id) == Some(&1)), "each once");
    eventually("no agent is left", async || place.agent_dirs() == 0).await;
    second.end(Signal::SIGTERM);
}

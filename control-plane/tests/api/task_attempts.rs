//! Attempts of tasks: those that hang, those that somebody looks into, what each of them writes; and who cancels in between.

use std::time::Duration;

use ark_types::agent::{Agent, AgentList};
use ark_types::guest::Kind;
use ark_types::problem::ProblemKind;
use ark_types::task::{AttemptOutcome, Task, TaskList, TaskState};
use arkd::config::TaskLimits;
use bytes::Bytes;
use futures_util::future::join_all;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::{Method, StatusCode};
use nix::sys::signal::Signal;
use serde_json::json;
use tokio::io::AsyncWriteExt as _;
use tokio::time::timeout;

use crate::harness::{Ark, Client, Place, eventually, signal, started};
use crate::streams::open;
use crate::tasks::{create, done, ended, living, place_client, running, shell, show};

/// Longest time that anything here may take.
const LIMIT: Duration = Duration::from_secs(60);

/// What is there of an attempt's output, as `query`.
async fn log(client: &Client, task: &Task, query: &str) -> String {
    let reply = client.get(&format!("/v1/tasks/{}/logs?{query}", task.spec.id)).await;
    assert_eq!(reply.status(), StatusCode::OK, "{query}: {:?}", reply.body);
    String::from_utf8(reply.body.to_vec()).unwrap()
}

/// The same, as it comes.
async fn followed(client: &Client, task: &Task, query: &str) -> Incoming {
    let path = format!("/v1/tasks/{}/logs?follow=true&{query}", task.spec.id);
    let response = client.send(client.request(Method::GET, &path, "")).await;
    assert_eq!(response.status(), StatusCode::OK);
    response.into_body()
}

async fn next(body: &mut Incoming) -> Bytes {
    let frame = timeout(LIMIT, body.frame()).await.expect("it does not come").unwrap().unwrap();
    frame.into_data().unwrap()
}

/// A shell's loop until there is a file called `name` in `place`.
fn until(place: &Place, name: &str) -> String {
    format!("until [ -e {} ]; do sleep 0.05; done", place.path(name).display())
}

#[tokio::test]
async fn an_attempt_whose_guest_hangs_is_over_and_tried_again() {
    let place = Place::new();
    let Ark { daemon, client } = place.start().await;
    let client = &client;
    let retry = json!({ "retry": { "max_attempts": 2, "backoff_ms": 1 } });
    let line = "echo attempt $ARK_TASK_ATTEMPT; [ $ARK_TASK_ATTEMPT -gt 1 ] || sleep 1000";
    let task = create(client, &shell(line, &retry)).await;
    running(client, &task).await;
    eventually("it wrote", async || !log(client, &task, "").await.is_empty()).await;
    let agents: AgentList = client.get("/v1/agents").await.json();
    signal(agents.agents[0].vmm_pid.unwrap(), Signal::SIGSTOP);
    let task = ended(client, &task).await;
    assert_eq!((task.state, task.failures), (TaskState::Succeeded, 1), "{task:?}");
    let first = task.attempts[0].end.as_ref().unwrap();
    assert_eq!(first.outcome, AttemptOutcome::Lost);
    let reason = first.reason.as_deref().unwrap();
    assert!(reason.contains("hangs: it was not heard for 4 s"), "{reason}");
    assert_eq!(log(client, &task, "attempt=1").await, "attempt 1\n", "what it wrote until then is kept");
    assert_eq!(task.result.unwrap().stdout, "attempt 2\n");
    eventually("no agent is left", async || living(client).await == 0 && place.agent_dirs() == 0).await;
    daemon.shut_down().await;
}

#[tokio::test]
async fn who_looks_into_an_attempts_agent_does_not_end_it() {
    let place = Place::new();
    let Ark { daemon, client } = place.start().await;
    let client = &client;
    let task = create(client, &shell(&format!("{}; echo done", until(&place, "flag")), &json!({}))).await;
    let agent = running(client, &task).await.attempts[0].agent.clone().unwrap();
    for _ in 0..2 {
        let mut socket = open(client, &format!("/v1/agents/{agent}/exec/stream")).await.unwrap();
        socket.exec(json!({ "argv": ["true"] })).await;
        socket.expect(Kind::Started).await;
        socket.expect(Kind::Exited).await;
    }
    // One that vanishes.
    let mut socket = open(client, &format!("/v1/agents/{agent}/exec/stream")).await.unwrap();
    socket.exec(json!({ "argv": ["sleep", "1000"] })).await;
    socket.expect(Kind::Started).await;
    drop(socket);
    let exec = client.exec(&agent, &json!({ "argv": ["true"] })).await;
    assert_eq!(exec.status(), StatusCode::OK, "it is there: {:?}", exec.body);
    std::fs::write(place.path("flag"), "").unwrap();
    let task = ended(client, &task).await;
    assert_eq!((task.state, task.attempts.len()), (TaskState::Succeeded, 1), "{task:?}");
    eventually("its agent is gone", async || living(client).await == 0).await;
    daemon.shut_down().await;
}

/// An `arkd` whose one place for attempts is taken.
async fn busy(place: &Place) -> Ark {
    let mut config = place.config();
    config.tasks = TaskLimits { at_once: 1, ..config.tasks };
    let ark = place.start_with(config).await;
    let first = create(&ark.client, &shell("sleep 1000", &json!({}))).await;
    running(&ark.client, &first).await;
    ark
}

#[tokio::test]
async fn a_cancellation_that_is_acknowledged_is_one_whenever_it_comes() {
    let place = Place::new();
    let Ark { daemon, client } = busy(&place).await;
    let client = &client;
    let cancel = async |id: &str| {
        let reply = client.post(&format!("/v1/tasks/{id}/cancel"), &json!({})).await;
        assert_eq!(reply.status(), StatusCode::OK, "{:?}", reply.body);
        assert_eq!(reply.json::<Task>().state, TaskState::Cancelled);
    };
    for n in 0..20 {
        let body = shell("true", &json!({ "labels": { "n": n.to_string() } }));
        let making = create(client, &body);
        // As soon as anybody can know of it, by several at a time.
        let seeing = async {
            loop {
                let list: TaskList = client.get(&format!("/v1/tasks?labels=n%3D{n}")).await.json();
                if let Some(task) = list.tasks.first() {
                    join_all((0..4).map(|_| cancel(&task.spec.id))).await;
                    return task.spec.id.clone();
                }
            }
        };
        let (made, seen) = tokio::join!(making, seeing);
        assert_eq!(made.spec.id, seen);
        let task = show(client, &seen).await;
        assert_eq!((task.state, task.attempts.len()), (TaskState::Cancelled, 0), "{task:?}");
    }
    let requests = || {
        let files = std::fs::read_dir(place.path("state/tasks")).unwrap();
        files
            .filter(|file| file.as_ref().unwrap().path().extension().is_some_and(|kind| kind == "request"))
            .count()
    };
    eventually("only what runs has a request", async || requests() == 1).await;

    // Who asks for it and leaves at once.
    let task = create(client, &shell("true", &json!({}))).await;
    let is_cancelled = async || {
        let request = format!(
            "POST /v1/tasks/{}/cancel HTTP/1.1\r\nhost: ark\r\ncontent-length: 0\r\n\r\n",
            task.spec.id
        );
        let _ = client.connect().await.write_all(request.as_bytes()).await;
        show(client, &task.spec.id).await.state == TaskState::Cancelled
    };
    eventually("it is cancelled", is_cancelled).await;
    eventually("what it was to do goes without it", async || requests() == 1).await;
    daemon.shut_down().await;
}

#[tokio::test]
async fn what_every_attempt_writes_is_kept_and_read_by_its_offset() {
    let place = Place::new();
    let Ark { daemon, client } = place.start().await;
    let client = &client;
    let line = "echo out $ARK_TASK_ATTEMPT; echo err >&2; [ $ARK_TASK_ATTEMPT -ge 3 ]";
    let retry = json!({ "retry": { "max_attempts": 3, "backoff_ms": 1 } });
    let task = done(client, &shell(line, &retry)).await;
    assert_eq!(task.state, TaskState::Succeeded, "{task:?}");
    for attempt in 1..=3 {
        assert_eq!(log(client, &task, &format!("attempt={attempt}")).await, format!("out {attempt}\n"));
        assert_eq!(log(client, &task, &format!("attempt={attempt}&stream=stderr&from=1")).await, "rr\n");
    }
    assert_eq!(log(client, &task, "").await, "out 3\n", "the newest when none is named");
    assert_eq!(log(client, &task, "from=4&follow=true").await, "3\n");
    assert_eq!(log(client, &task, "from=1000").await, "");
    for (query, said) in [
        ("attempt=0", "from 1"),
        ("attempt=4", "no attempt 4"),
        ("attempt=x", "attempt"),
        ("from=-1", "from"),
    ] {
        let reply = client.get(&format!("/v1/tasks/{}/logs?{query}", task.spec.id)).await;
        assert!(reply.status().is_client_error(), "{query}: {:?}", reply.body);
        assert!(String::from_utf8_lossy(&reply.body).contains(said), "{query}: {:?}", reply.body);
    }
    assert_eq!(client.delete(&format!("/v1/tasks/{}", task.spec.id)).await.status(), StatusCode::NO_CONTENT);
    assert_eq!(std::fs::read_dir(place.path("state/tasks")).unwrap().count(), 0, "it goes with the task");

    // Of many attempts the newest, and their bytes are what is counted.
    let many = json!({ "retry": { "max_attempts": 18, "backoff_ms": 0 } });
    let task = done(client, &shell("echo $ARK_TASK_ATTEMPT; false", &many)).await;
    assert_eq!((task.failures, task.outputs().count(), task.kept_bytes()), (18, 16, 7 * 2 + 9 * 3));
    let old = client.get(&format!("/v1/tasks/{}/logs?attempt=2", task.spec.id)).await;
    assert!(old.problem(ProblemKind::InvalidValue).detail.contains("not kept any more"));
    assert_eq!(log(client, &task, "attempt=3").await, "3\n");
    let files = || std::fs::read_dir(place.path("state/tasks")).unwrap().count();
    eventually("of each there is what it wrote and how it ended", async || files() == 32).await;

    // What ends half-way has written what it has.
    let task = done(client, &shell("echo begun; sleep 1000", &json!({ "timeout_ms": 5000 }))).await;
    assert_eq!(
        (task.state, log(client, &task, "").await.as_str()),
        (TaskState::TimedOut, "begun\n"),
        "{task:?}"
    );
    assert_eq!(task.result.unwrap().exit_code, None);
    let task = create(client, &shell("echo begun; sleep 1000", &json!({}))).await;
    eventually("it wrote", async || log(client, &task, "").await == "begun\n").await;
    client.post(&format!("/v1/tasks/{}/cancel", task.spec.id), &json!({})).await;
    let task = show(client, &task.spec.id).await;
    assert_eq!(
        (task.state, log(client, &task, "").await.as_str()),
        (TaskState::Cancelled, "begun\n"),
        "{task:?}"
    );
    let eval = json!({ "image": "base", "memory_mib": 64, "eval": { "code": "x=1" } });
    let task = done(client, &eval).await;
    assert_eq!(log(client, &task, "stream=stderr&attempt=1").await, "err\n");
    daemon.shut_down().await;
}

#[tokio::test]
async fn an_attempt_is_followed_as_it_writes_and_taken_up_again_where_it_was() {
    let place = Place::new();
    let Ark { daemon, client } = place.start().await;
    let client = &client;
    let line = format!(
        "[ $ARK_TASK_ATTEMPT -gt 1 ] && exec echo second; echo one; {}; echo two; {}; echo three; false",
        until(&place, "a"),
        until(&place, "b")
    );
    let retry = json!({ "retry": { "max_attempts": 2, "backoff_ms": 1 } });
    let task = create(client, &shell(&line, &retry)).await;
    // Before it began, and the next one, too.
    let mut first = followed(client, &task, "").await;
    let mut second = followed(client, &task, "attempt=2").await;
    assert_eq!(next(&mut first).await, "one\n");
    drop(first);
    std::fs::write(place.path("a"), "").unwrap();
    let mut first = followed(client, &task, "attempt=1&from=4").await;
    assert_eq!(next(&mut first).await, "two\n");
    std::fs::write(place.path("b"), "").unwrap();
    let rest = timeout(LIMIT, first.collect()).await.expect("it ends with the attempt").unwrap().to_bytes();
    assert_eq!(rest, "three\n");
    assert_eq!(next(&mut second).await, "second\n");
    assert_eq!(timeout(LIMIT, second.collect()).await.unwrap().unwrap().to_bytes(), "");
    assert_eq!(ended(client, &task).await.state, TaskState::Succeeded);
    // One that never comes.
    let never = followed(client, &task, "attempt=1").await;
    assert_eq!(timeout(LIMIT, never.collect()).await.unwrap().unwrap().to_bytes(), "one\ntwo\nthree\n");
    let waits = create(client, &shell(&until(&place, "c"), &json!({}))).await;
    let never = followed(client, &waits, "attempt=7").await;
    std::fs::write(place.path("c"), "").unwrap();
    assert_eq!(timeout(LIMIT, never.collect()).await.unwrap().unwrap().to_bytes(), "");
    daemon.shut_down().await;
}

#[tokio::test]
async fn what_an_attempt_wrote_outlives_the_arkd_that_is_killed_under_it() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let line = "echo begun $ARK_TASK_ATTEMPT; [ $ARK_TASK_ATTEMPT -gt 2 ] || sleep 1000";
    let task = create(&client, &shell(line, &json!({}))).await;
    let mut arkds = Vec::new();
    for (attempt, with) in [(1, Signal::SIGKILL), (2, Signal::SIGTERM)] {
        let client = place_client(&place);
        let wrote = async || {
            let reply = client.get(&format!("/v1/tasks/{}/logs?attempt={attempt}", task.spec.id)).await;
            reply.body == format!("begun {attempt}\n")
        };
        eventually("it wrote", wrote).await;
        first.end(with);
        arkds.push(std::mem::replace(&mut first, started(&place, &[]).await.0));
    }
    let client = place_client(&place);
    let task = ended(&client, &task).await;
    assert_eq!((task.state, task.last_attempt()), (TaskState::Succeeded, 3), "{task:?}");
    for (attempt, told) in (1..=3).zip(&task.attempts) {
        assert_eq!(log(&client, &task, &format!("attempt={attempt}")).await, format!("begun {attempt}\n"));
        assert_eq!(told.end.as_ref().unwrap().output.unwrap().stdout_bytes, 8, "{told:?}");
    }
    let agents: Vec<Agent> = client.get("/v1/agents").await.json::<AgentList>().agents;
    assert!(agents.is_empty(), "{agents:?}");
    assert!(first.end(Signal::SIGTERM));
}

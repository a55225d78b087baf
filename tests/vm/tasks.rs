//! Tasks in real guests: tried again until they are done, also when `arkd` is killed meanwhile.

use std::collections::HashSet;
use std::time::Duration;

use ark_tests::{Rest, World, eventually};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::Value;

/// How long a task may take where the processor is emulated.
const LIMIT: Duration = Duration::from_secs(300);

fn show(world: &World, task: &str) -> Value {
    world.ark(["task", "show", task, "--json"]).ok().json()
}

#[test]
fn a_task_is_done_at_the_third_attempt_and_its_agents_are_gone() {
    let world = World::new();
    let line = "echo attempt $ARK_TASK_ATTEMPT; [ $ARK_TASK_ATTEMPT -ge 3 ]";
    let run = [
        "task",
        "run",
        "--image",
        "base",
        "--retries",
        "3",
        "--backoff",
        "100ms",
        "--key",
        "k",
        "--",
        "sh",
        "-c",
        line,
    ];
    assert_eq!(world.ark(run).ok().stdout, "attempt 3\n");
    // Asked for again it is the same one, done already.
    assert_eq!(world.ark(run).ok().stdout, "attempt 3\n");
    let list = world.ark(["task", "ls", "--json"]).ok().json();
    let tasks = list["tasks"].as_array().expect("tasks");
    assert_eq!((tasks.len(), &tasks[0]["state"], &tasks[0]["failures"]), (1, &"succeeded".into(), &2.into()));

    // What each attempt wrote is kept.
    let id = tasks[0]["id"].as_str().expect("an id");
    for attempt in ["1", "2", "3"] {
        let said = world.ark(["task", "logs", id, "--attempt", attempt]).ok().stdout;
        assert_eq!(said, format!("attempt {attempt}\n"));
    }
    assert_eq!(world.ark(["task", "logs", id, "-f", "--attempt", "2"]).ok().stdout, "attempt 2\n");
    // One whose guest stands still is over, and tried again.
    let line = "echo at $ARK_TASK_ATTEMPT; [ $ARK_TASK_ATTEMPT -ge 2 ] || sleep 1000";
    let run = [
        "task",
        "run",
        "--detach",
        "--image",
        "base",
        "--retries",
        "3",
        "--backoff",
        "1ms",
        "--",
        "sh",
        "-c",
        line,
    ];
    let hung = world.ark(run).ok().stdout.trim().to_owned();
    let wrote = || world.ark(["task", "logs", &hung, "--attempt", "1"]).stdout == "at 1\n";
    eventually("it runs", LIMIT, wrote);
    let vmms = world.vmms();
    assert_eq!(vmms.len(), 1, "its own: {vmms:?}");
    nix::sys::signal::kill(Pid::from_raw(vmms[0].pid), Signal::SIGSTOP).expect("it can be stopped");
    eventually("it is done", LIMIT, || show(&world, &hung)["state"] == "succeeded");
    let first = show(&world, &hung)["attempts"][0]["end"].clone();
    assert!(first["reason"].as_str().expect("a reason").contains("hangs"), "{first}");
    assert_eq!(world.ark(["task", "logs", &hung, "--attempt", "1"]).ok().stdout, "at 1\n");

    let failed = world.ark(["task", "run", "--image", "base", "--", "sh", "-c", "echo no >&2; exit 7"]);
    failed.exits(7).complains_about(&["no", "failed"]);
    let code = "import os\nint(os.environ['ARK_TASK_ATTEMPT']) + 41";
    assert_eq!(world.ark(["task", "eval", "--image", "python", code]).ok().stdout, "42\n");
    eventually("no VMM is left", LIMIT, || world.vmms().is_empty());
    world.end();
}

#[test]
fn a_task_that_runs_when_the_daemon_is_killed_ends_after_its_restart() {
    let world = World::new();
    let line = "[ $ARK_TASK_ATTEMPT -ge 2 ] || sleep 1000; echo done at $ARK_TASK_ATTEMPT";
    let run = ["task", "run", "--detach", "--image", "base", "--", "sh", "-c", line];
    let task = world.ark(run).ok().stdout.trim().to_owned();
    let queued =
        world.ark(["task", "run", "--detach", "--image", "base", "--", "echo", "queued"]).ok().stdout;
    eventually("it runs", LIMIT, || show(&world, &task)["state"] == "running");
    let agent = show(&world, &task)["attempts"][0]["agent"].clone();
    // Who looks into its agent does not end it.
    let name = agent.as_str().expect("an agent");
    assert_eq!(world.ark(["exec", name, "--", "echo", "hello"]).ok().stdout, "hello\n");
    assert_eq!(world.ark(["exec", name, "--", "echo", "again"]).ok().stdout, "again\n");
    world.end_daemon(Signal::SIGKILL);
    for (task, said) in [(task.as_str(), "done at 2\n"), (queued.trim(), "queued\n")] {
        eventually("it is done", LIMIT, || show(&world, task)["state"] == "succeeded");
        assert_eq!(world.ark(["task", "logs", task]).ok().stdout, said);
    }
    let ended = show(&world, &task);
    assert_eq!((&ended["failures"], &ended["attempts"][0]["end"]["outcome"]), (&0.into(), &"cut_off".into()));
    assert_ne!(ended["attempts"][1]["agent"], agent);
    eventually("no VMM is left", LIMIT, || world.vmms().is_empty());
    world.end();
}

/// Tasks that are asked for; as many as are done before and after the daemon is killed, at least; the rest is cancelled, so that
/// an emulated host ends this in minutes.
const QUEUED: usize = 1000;
const DONE: usize = 8;

/// Ids of the tasks in `state`.
fn in_state(rest: &mut Rest, state: &str) -> Vec<String> {
    let (list, _) = rest.call("GET", &format!("/v1/tasks?state={state}"), "");
    let tasks = list["tasks"].as_array().expect("tasks").iter();
    tasks.map(|task| task["id"].as_str().expect("an id").to_owned()).collect()
}

#[test]
fn a_thousand_queued_tasks_outlive_a_killed_daemon_and_each_ends_as_was_acknowledged() {
    let world = World::new();
    let _ = world.ark(["ps"]).ok();
    let mut rest = Rest::connect(&world);
    let body = r#"{"image":"base","command":{"argv":["sh","-c","echo $ARK_TASK_ID"]}}"#;
    let ids: Vec<String> = (0..QUEUED)
        .map(|_| rest.call("POST", "/v1/tasks", body).0["id"].as_str().expect("an id").to_owned())
        .collect();
    eventually("some are done", LIMIT, || in_state(&mut rest, "succeeded").len() >= DONE);
    world.end_daemon(Signal::SIGKILL);

    let _ = world.ark(["ps"]).ok();
    let mut rest = Rest::connect(&world);
    let before = in_state(&mut rest, "succeeded");
    assert!(before.len() >= DONE, "what was done stays done");
    eventually("more are done", LIMIT, || in_state(&mut rest, "succeeded").len() >= before.len() + DONE);
    // What becomes of each is what the cancellation says.
    let mut cancelled = HashSet::new();
    for id in ids.iter().rev() {
        match rest.ask("POST", &format!("/v1/tasks/{id}/cancel"), "") {
            (200, task) => {
                assert_eq!(task["state"], "cancelled", "{task}");
                cancelled.insert(id.as_str());
            }
            (409, problem) => assert_eq!(problem["type"], "/problems/task-ended", "{problem}"),
            other => panic!("{other:?}"),
        }
    }
    for state in ["queued", "running", "waiting", "failed", "timed_out"] {
        assert_eq!(in_state(&mut rest, state), Vec::<String>::new(), "{state}");
    }
    for id in &ids {
        let (task, _) = rest.call("GET", &format!("/v1/tasks/{id}"), "");
        if cancelled.contains(id.as_str()) {
            assert_eq!(task["state"], "cancelled", "{task}");
            continue;
        }
        assert_eq!((&task["state"], &task["failures"]), (&"succeeded".into(), &0.into()), "{task}");
        assert_eq!(task["result"]["stdout"], format!("{id}\n"));
        // Only the killed daemon cut one off, and the next attempt has the next number.
        let attempts = task["attempts"].as_array().expect("attempts");
        let told: Vec<_> = attempts.iter().map(|a| (&a["number"], &a["end"]["outcome"])).collect();
        let (first, second): (Value, Value) = (1.into(), 2.into());
        let (done, cut_off): (Value, Value) = ("succeeded".into(), "cut_off".into());
        assert!(told == [(&first, &done)] || told == [(&first, &cut_off), (&second, &done)], "{task}");
    }
    assert!(cancelled.len() + 2 * DONE <= QUEUED && !cancelled.is_empty(), "{}", cancelled.len());
    assert!(before.iter().all(|id| !cancelled.contains(id.as_str())));
    eventually("no VMM is left", LIMIT, || world.vmms().is_empty());
    world.end();
}

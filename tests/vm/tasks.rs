//! Tasks in real guests: tried again until they are done, also when `arkd` is killed meanwhile.

use std::time::Duration;

use ark_tests::{World, eventually};
use nix::sys::signal::Signal;
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

//! Operations on tasks, and what is told of them against the model.

use std::collections::BTreeSet;

use rand::RngExt as _;
use rand::seq::IndexedRandom as _;
use serde_json::{Value, json};

use crate::client::{Client, Said};
use crate::host;
use crate::look::eventually;
use crate::model::Task;

/// How long a client waits for the end of a task, milliseconds.
const WAIT_MS: u64 = 200;
/// Label of the agents of attempts.
pub(crate) const LABEL: &str = "ark.task";

/// Asks for a task, as often as not under a key; sometimes twice.
pub(crate) fn submit(client: &mut Client<'_>) {
    let name = format!("k{}", client.known().number());
    let (line, end, attempts) = match client.dice.random_range(0..4) {
        0 => ("exit 3".to_owned(), "failed", 2),
        _ => (format!("echo {name}"), "succeeded", 100),
    };
    let mut body = json!({
        "name": name, "image": "base", "command": { "argv": ["sh", "-c", line] },
        "retry": { "max_attempts": attempts, "backoff_ms": 10, "max_backoff_ms": 50 },
    });
    if client.dice.random() {
        body["key"] = format!("key-{name}").into();
    }
    let task = Task {
        body: body.clone(),
        id: None,
        end: Some(end),
        ended: None,
        may_be_gone: false,
        is_taken: true,
    };
    client.known().tasks.insert(name.clone(), task);
    let said = client.call("POST", "/v1/tasks", &body);
    give(client, &name, |task| {
        if let Said::Yes(told) = &said {
            task.id = told["id"].as_str().map(str::to_owned);
        }
    });
    if let Said::No(_, problem) = &said {
        client.known().tasks.remove(&name);
        client.bear_if_ending(&name, problem);
    }
    if matches!(said, Said::Yes(_)) && !body["key"].is_null() && client.dice.random() {
        send_again(client, &name);
    }
}

/// Asks for the task `name` once more, which has a key: there is one, whoever asked how often.
fn send_again(client: &mut Client<'_>, name: &str) {
    let Some(known) = client.known().tasks.get(name).cloned() else { return };
    match client.call("POST", "/v1/tasks", &known.body) {
        Said::Yes(told) => {
            let id = told["id"].as_str().map(str::to_owned);
            let story = client.known().story_of(&[name]);
            let is_same = known.id.is_none() || known.id == id || known.may_be_gone;
            assert!(is_same, "the key of {known:?} makes another task: {told}{story}");
            give(client, name, |task| task.id = id);
        }
        Said::No(_, problem) => client.bear_if_ending(name, &problem),
        Said::Lost => {}
    }
}

/// Takes one of the tasks that somebody was told of and that fit.
fn take(client: &mut Client<'_>, fits: impl Fn(&Task) -> bool) -> Option<(String, String, Task)> {
    let mut model = client.known();
    let free = model.tasks.iter().filter(|(_, task)| !task.is_taken && !task.may_be_gone && fits(task));
    let names: Vec<String> =
        free.filter(|(_, task)| task.id.is_some()).map(|(name, _)| name.clone()).collect();
    let name = names.choose(&mut client.dice)?.clone();
    let task = model.tasks.get_mut(&name)?;
    task.is_taken = true;
    let id = task.id.clone()?;
    Some((name, id, task.clone()))
}

fn give(client: &Client<'_>, name: &str, change: impl FnOnce(&mut Task)) {
    if let Some(task) = client.known().tasks.get_mut(name) {
        task.is_taken = false;
        change(task);
    }
}

/// Waits a moment for the end of a task.
pub(crate) fn wait(client: &mut Client<'_>) {
    let Some((name, id, task)) = take(client, |_| true) else { return };
    match client.call("GET", &format!("/v1/tasks/{id}?wait_ms={WAIT_MS}"), &Value::Null) {
        Said::Yes(told) => {
            let ended = check(client, &task, &told);
            give(client, &name, |task| task.ended = ended);
        }
        Said::No(_, problem) => {
            client.bear_if_ending(&name, &problem);
            give(client, &name, |_| {});
        }
        Said::Lost => give(client, &name, |_| {}),
    }
}

/// How `told` ended; none when it did not yet.
fn check(client: &Client<'_>, task: &Task, told: &Value) -> Option<String> {
    let story = || client.known().story_of(&[told["id"].as_str().unwrap_or_default()]);
    let state = told["state"].as_str().unwrap_or_default();
    let is_open = ["queued", "running", "waiting"].contains(&state);
    if is_open {
        assert_eq!(task.ended, None, "the end of a task is undone: {told}{}", story());
        return None;
    }
    let is_cancelled = state == "cancelled" && task.end.is_none();
    let wanted = if task.body["retry"]["max_attempts"] == 2 { "failed" } else { "succeeded" };
    assert!(is_cancelled || state == wanted, "{task:?} ended as {told}{}", story());
    assert!(
        task.ended.as_deref().is_none_or(|before| before == state),
        "{task:?} ended as {told}{}",
        story()
    );
    let numbers: Vec<u64> =
        told["attempts"].as_array().into_iter().flatten().filter_map(|one| one["number"].as_u64()).collect();
    assert!(numbers.is_sorted_by(|a, b| a < b), "a number was told twice: {told}{}", story());
    if state == "succeeded" && !told["result"].is_null() {
        assert_eq!(told["result"]["stdout"].as_str().map(str::trim), task.body["name"].as_str(), "{told}");
    }
    Some(state.to_owned())
}

/// Cancels a task.
pub(crate) fn cancel(client: &mut Client<'_>) {
    let Some((name, id, task)) = take(client, |task| task.ended.is_none()) else { return };
    let said = client.call("POST", &format!("/v1/tasks/{id}/cancel"), &Value::Null);
    give(client, &name, |known| match &said {
        Said::Yes(told) => {
            (known.end, known.ended) = (None, told["state"].as_str().map(str::to_owned));
        }
        // It had ended already.
        Said::No(409, _) => known.end = task.end,
        Said::No(..) | Said::Lost => known.end = None,
    });
    if let Said::No(status, problem) = &said
        && *status != 409
    {
        client.bear_if_ending(&name, problem);
    }
}

/// Removes a task that has ended.
pub(crate) fn delete(client: &mut Client<'_>) {
    let Some((name, id, _)) = take(client, |task| task.ended.is_some()) else { return };
    match client.call("DELETE", &format!("/v1/tasks/{id}"), &Value::Null) {
        Said::Yes(_) => drop(client.known().tasks.remove(&name)),
        Said::No(_, problem) => {
            client.bear_if_ending(&name, &problem);
            give(client, &name, |task| task.may_be_gone = true);
        }
        Said::Lost => give(client, &name, |task| task.may_be_gone = true),
    }
}

/// Kills the VMM that some attempt is made in.
pub(crate) fn kill_vmm(client: &mut Client<'_>) {
    let path = format!("/v1/agents?labels={LABEL}");
    let Said::Yes(list) = client.call("GET", &path, &Value::Null) else { return };
    let pids: Vec<i64> =
        list["agents"].as_array().into_iter().flatten().filter_map(|one| one["vmm_pid"].as_i64()).collect();
    if let Some(pid) = pids.choose(&mut client.dice).and_then(|pid| i32::try_from(*pid).ok())
        && host::kill_vmm(client.stage, pid)
    {
        client.known().note(format!("client {} killed pid {pid} of a task", client.number));
    }
}

fn list(client: &mut Client<'_>) -> Vec<Value> {
    match client.call("GET", "/v1/tasks", &Value::Null) {
        Said::Yes(list) => list["tasks"].as_array().cloned().unwrap_or_default(),
        other => panic!("tasks are to be listed: {other:?}"),
    }
}

/// Looks at every task, once all have ended.
///
/// # Panics
/// When a promise was broken.
pub(crate) fn look(client: &mut Client<'_>) {
    let in_doubt = |task: &Task| task.id.is_none() && !task.body["key"].is_null();
    let again: Vec<String> = {
        let model = client.known();
        model.tasks.iter().filter(|(_, task)| in_doubt(task)).map(|(name, _)| name.clone()).collect()
    };
    for name in again {
        send_again(client, &name);
    }
    let mut listed = Vec::new();
    eventually(client, "every task ends", |client| {
        listed = list(client);
        let open = listed.iter().find(|task| task["ended_unix_ms"].is_null());
        open.map_or(Ok(()), |task| Err(task.to_string()))
    });
    let mut seen = BTreeSet::new();
    for told in listed {
        let (name, id) = (told["name"].as_str().unwrap_or_default(), told["id"].as_str().unwrap_or_default());
        let story = client.known().story_of(&[name, id]);
        let known = client.known().tasks.get(name).cloned();
        let Some(known) = known else { panic!("a task was removed or never asked for: {told}{story}") };
        assert!(seen.insert(name.to_owned()), "one request made two tasks: {told}{story}");
        assert!(known.id.as_deref().is_none_or(|before| before == id), "{known:?} became {told}{story}");
        let Said::Yes(told) = client.call("GET", &format!("/v1/tasks/{id}"), &Value::Null) else {
            panic!("{told} is to be had{story}");
        };
        let ended = check(client, &known, &told);
        give(client, name, |task| {
            (task.id, task.ended, task.may_be_gone) = (Some(id.to_owned()), ended, false);
        });
    }
    let mut model = client.known();
    let lost = model
        .tasks
        .iter()
        .find(|(name, task)| !seen.contains(*name) && task.id.is_some() && !task.may_be_gone);
    if let Some((name, task)) = lost {
        panic!("an acknowledged task is lost: {task:?}{}", model.story_of(&[name]));
    }
    model.tasks.retain(|name, _| seen.contains(name));
}

/// Removes every task, whatever it is at.
///
/// # Panics
/// When one cannot be removed.
pub(crate) fn delete_all(client: &mut Client<'_>) {
    for told in list(client) {
        let id = told["id"].as_str().unwrap_or_default();
        if told["ended_unix_ms"].is_null() {
            // It may end by itself before.
            let _ = client.call("POST", &format!("/v1/tasks/{id}/cancel"), &Value::Null);
        }
        let said = client.call("DELETE", &format!("/v1/tasks/{id}"), &Value::Null);
        assert!(matches!(said, Said::Yes(_)), "{told} can be deleted: {said:?}");
    }
    client.known().tasks.clear();
}

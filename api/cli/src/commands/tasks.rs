//! `ark task`: work that goes on whoever asked for it.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write};
use std::time::Duration;

use ark_client::{Client, TaskLogQuery, TaskQuery};
use ark_types::eval::EvalException;
use ark_types::exec::Encoding;
use ark_types::label::{InvalidLabel, Labels};
use ark_types::task::{
    CreateTask, MAX_KEPT_OUTPUT, MAX_STDIN, OutputStream, Retry, Task, TaskAttempt, TaskCommand, TaskEval,
    TaskList, TaskState, TaskWork,
};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::agents::REASON_WIDTH;
use super::code;
use super::program::interrupted;
use crate::args::{TaskAction, TaskArgs, TaskListArgs, TaskLogsArgs, TaskRunArgs};
use crate::failure::{ARK_FAILED, Failure, TIMED_OUT, summed_up};
use crate::host::Context;
use crate::output::{Colour, Ui, age, micros, now_unix_ms, printable, size, span, table};
use crate::signals::Signals;

/// How long one request waits for the end of a task.
const WAIT: Duration = Duration::from_secs(30);

/// Does what the user asked; the number is ark's exit code.
pub(crate) async fn perform(context: &Context, action: TaskAction) -> Result<u8, Failure> {
    match action {
        TaskAction::Run(args) => {
            let command = Some(command(&args)?);
            ask(context, &args.task, CreateTask { command, ..common(&args.task)? }).await
        }
        TaskAction::Eval(args) => {
            let code = code::from_argument(&args.code)?;
            let eval = TaskEval { code, env: args.task.env.iter().cloned().collect(), ..TaskEval::default() };
            ask(context, &args.task, CreateTask { eval: Some(eval), ..common(&args.task)? }).await
        }
        TaskAction::Ls(args) => ls(context, args).await.map(|()| 0),
        TaskAction::Show { task } => {
            let task = context.client().await?.task(&task, Duration::ZERO).await?;
            context.ui.show(&task, |task| details(context.ui, task)).map(|()| 0)
        }
        TaskAction::Logs(TaskLogsArgs { task, attempt, follow }) => {
            let client = context.client().await?;
            if follow {
                super::task_logs::follow(&client, &task, attempt).await.map(|()| 0)
            } else {
                show_output(&client, &task, attempt).await.map(|()| 0)
            }
        }
        TaskAction::Cancel { tasks } => cancel(context, &tasks).await.map(|()| 0),
        TaskAction::Rm { tasks } => rm(context, &tasks).await.map(|()| 0),
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The request that options stand for, without what is to be done.
fn common(args: &TaskArgs) -> Result<CreateTask, Failure> {
    let labels: BTreeMap<String, String> = args.label.iter().cloned().collect();
    let labels = Labels::try_from(labels).map_err(|error: InvalidLabel| Failure::Usage(error.to_string()))?;
    let standard = Retry::default();
    let backoff_ms = args.backoff.map_or(standard.backoff_ms, millis);
    Ok(CreateTask {
        name: args.name.clone(),
        owner: args.owner.clone().unwrap_or_default(),
        allow: args.allow.clone(),
        freeze_on_inference: args.freeze_on_inference,
        labels,
        image: args.template.is_none().then(|| args.image.clone()),
        template: args.template.clone(),
        vcpus: args.vcpus,
        memory_mib: args.memory,
        command: None,
        eval: None,
        priority: args.priority,
        retry: Retry {
            max_attempts: args.retries + 1,
            backoff_ms,
            max_backoff_ms: standard.max_backoff_ms.max(backoff_ms),
        },
        timeout_ms: args.timeout.map(millis),
        deadline_ms: args.deadline.map(millis),
        key: args.key.clone(),
    })
}

fn command(args: &TaskRunArgs) -> Result<TaskCommand, Failure> {
    let stdin = if args.interactive { Some(standard_input()?) } else { None };
    Ok(TaskCommand {
        argv: args.command.clone(),
        env: args.task.env.iter().cloned().collect(),
        cwd: args.workdir.clone(),
        user: args.user.clone(),
        encoding: if stdin.is_some() { Encoding::Base64 } else { Encoding::Utf8 },
        stdin,
    })
}

/// All of standard input, as base64.
fn standard_input() -> Result<String, Failure> {
    let mut bytes = Vec::new();
    let most = u64::try_from(MAX_STDIN).unwrap_or(u64::MAX);
    let read = io::stdin().lock().take(most + 1).read_to_end(&mut bytes);
    read.map_err(|source| Failure::System { what: "cannot read standard input", source })?;
    if bytes.len() > MAX_STDIN {
        let most = size(most);
        return Err(Failure::Usage(format!("standard input is longer than the {most} that a task may have")));
    }
    Ok(STANDARD.encode(bytes))
}

/// Asks for a task and waits for its end, unless told not to.
async fn ask(context: &Context, args: &TaskArgs, request: CreateTask) -> Result<u8, Failure> {
    let client = context.client_to_boot().await?;
    let task = client.create_task(&request).await?;
    if args.detach {
        return context.ui.show(&task, |task| task.spec.id.clone()).map(|()| 0);
    }
    let mut signals = Signals::listen()?;
    let id = task.spec.id;
    let ended = tokio::select! {
        ended = end_of(&client, &id) => ended?,
        signal = signals.next() => {
            context.ui.note(&format!("the task {id} goes on: see `ark task show {id}`, or end it with `ark task cancel {id}`"));
            return Ok(interrupted(signal));
        }
    };
    if context.ui.json {
        context.ui.show(&ended, |_| String::new())?;
    } else {
        show_output(&client, &id, None).await?;
        if let Some(result) = &ended.result {
            show_value(result.value.as_deref(), result.exception.as_ref()).map_err(Failure::Output)?;
        }
    }
    if let Some(reason) = &ended.reason {
        context.ui.note(&format!("the task {id} is {}: {}", ended.state, printable(reason)));
    }
    if ended.output.is_some_and(|output| output.truncated) {
        context.ui.note("the task wrote more than is kept: the rest of its output is lost");
    }
    Ok(exit_code(&ended))
}

async fn end_of(client: &Client, id: &str) -> Result<Task, Failure> {
    loop {
        let task = client.task(id, WAIT).await?;
        if task.state.is_ended() {
            return Ok(task);
        }
    }
}

fn exit_code(task: &Task) -> u8 {
    match task.state {
        TaskState::Succeeded => 0,
        TaskState::TimedOut => TIMED_OUT,
        TaskState::Failed => {
            let last = task.attempts.last().and_then(|attempt| attempt.end.as_ref());
            last.and_then(|end| end.exit_code).filter(|code| *code != 0).unwrap_or(ARK_FAILED)
        }
        TaskState::Queued | TaskState::Running | TaskState::Waiting | TaskState::Cancelled => ARK_FAILED,
    }
}

/// Copies what is kept of both streams to ours.
async fn show_output(client: &Client, id: &str, attempt: Option<u32>) -> Result<(), Failure> {
    let all = async |stream| {
        let query = TaskLogQuery { stream, attempt, ..TaskLogQuery::default() };
        client.task_log(id, query).await?.collect(MAX_KEPT_OUTPUT).await
    };
    let (stdout, stderr) = (all(OutputStream::Stdout).await?, all(OutputStream::Stderr).await?);
    let mut out = io::stdout().lock();
    out.write_all(&stdout).and_then(|()| out.flush()).map_err(Failure::Output)?;
    // Nobody reads our standard error: that is no reason to fail.
    let _ = io::stderr().lock().write_all(&stderr);
    Ok(())
}

/// The value on a line of its own, or the traceback.
fn show_value(value: Option<&str>, exception: Option<&EvalException>) -> io::Result<()> {
    if let Some(value) = value {
        writeln!(io::stdout().lock(), "{value}")?;
    }
    if let Some(exception) = exception {
        let traceback = exception.traceback.trim_end();
        let _ = writeln!(io::stderr().lock(), "{traceback}");
    }
    Ok(())
}

async fn ls(context: &Context, args: TaskListArgs) -> Result<(), Failure> {
    let labels = args.selector.as_ref().map(ToString::to_string);
    let query = TaskQuery { state: args.state, owner: args.owner, labels };
    let list = context.client().await?.tasks_where(&query).await?;
    context.ui.show(&list, |list| task_table(context.ui, list))
}

/// Every task is tried; what fails is told for each.
async fn cancel(context: &Context, tasks: &[String]) -> Result<(), Failure> {
    let client = context.client().await?;
    let (mut cancelled, mut failures) = (Vec::new(), Vec::new());
    for task in tasks {
        match client.cancel_task(task).await {
            Ok(task) => cancelled.push(task),
            Err(error) => failures.push(error.into()),
        }
    }
    let list = TaskList { tasks: cancelled, next_cursor: None };
    context.ui.show(&list, |list| list.tasks.iter().map(|task| format!("{}\n", task.spec.id)).collect())?;
    summed_up(context.ui, failures, tasks.len(), "tasks were not cancelled")
}

/// Every task is tried; what fails is told for each.
async fn rm(context: &Context, tasks: &[String]) -> Result<(), Failure> {
    let client = context.client().await?;
    let (mut removed, mut failures) = (Vec::new(), Vec::new());
    for task in tasks {
        match client.delete_task(task).await {
            Ok(()) => removed.push(task),
            Err(error) => failures.push(error.into()),
        }
    }
    context.ui.show_removed(&removed)?;
    summed_up(context.ui, failures, tasks.len(), "tasks were not removed")
}

const fn colour(state: TaskState) -> Colour {
    match state {
        TaskState::Succeeded | TaskState::Running => Colour::Green,
        TaskState::Failed | TaskState::TimedOut => Colour::Red,
        TaskState::Queued | TaskState::Waiting | TaskState::Cancelled => Colour::Yellow,
    }
}

fn work(task: &Task) -> String {
    match &task.spec.work {
        TaskWork::Command { program } => printable(program).replace('\n', " "),
        TaskWork::Eval { .. } => "(code)".to_owned(),
    }
}

fn reason(task: &Task) -> String {
    let text = printable(task.reason.as_deref().unwrap_or_default()).replace('\n', " ");
    text.chars().take(REASON_WIDTH).collect()
}

fn task_table(ui: Ui, list: &TaskList) -> String {
    let row = |task: &Task| {
        [
            task.spec.id.clone(),
            task.spec.name.as_ref().map(ToString::to_string).unwrap_or_default(),
            task.spec.owner.to_string(),
            ui.paint(colour(task.state), task.state.word()),
            task.last_attempt().to_string(),
            age(task.spec.created_unix_ms),
            work(task),
            reason(task),
        ]
    };
    let rows: Vec<_> = list.tasks.iter().map(row).collect();
    table(["ID", "NAME", "OWNER", "STATE", "ATTEMPTS", "AGE", "WORK", "REASON"], &rows)
}

fn details(ui: Ui, task: &Task) -> String {
    let spec = &task.spec;
    let mut rows = vec![("id", spec.id.clone()), ("state", ui.paint(colour(task.state), task.state.word()))];
    let mut add = |key, value: Option<String>| rows.extend(value.map(|value| (key, value)));
    add("reason", task.reason.as_deref().map(printable));
    add("name", spec.name.as_ref().map(ToString::to_string));
    add("owner", Some(spec.owner.to_string()));
    let labels: Vec<String> = spec.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    add("labels", (!labels.is_empty()).then(|| labels.join(",")));
    add("key", spec.key.as_ref().map(ToString::to_string));
    add("image", spec.image.as_ref().map(ToString::to_string));
    add("template", spec.template.as_ref().map(ToString::to_string));
    add("work", Some(work(task)));
    add("created", Some(format!("{} ago", age(spec.created_unix_ms))));
    add("failures", Some(format!("{} of {}", task.failures, spec.retry.max_attempts)));
    add("trace", spec.traceparent.clone());
    add("timeout", spec.timeout_ms.map(span));
    add("deadline", spec.deadline_ms.map(|ms| format!("{} after its creation", span(ms))));
    add("next", task.retry_unix_ms.map(|at| format!("in {}", span(at.saturating_sub(now_unix_ms())))));
    add("ended", task.ended_unix_ms.map(|at| format!("{} ago", age(at))));
    if let Some(result) = &task.result {
        add("exit code", result.exit_code.map(|code| code.to_string()));
        add("value", result.value.as_deref().map(printable));
        add("took", Some(micros(result.duration_us)));
    }
    add("output", task.output.map(|kept| format!("{}; see `ark task logs {}`", size(kept.bytes()), spec.id)));
    let rows = rows.iter().map(|(key, value)| format!("{key:<10} {value}\n"));
    rows.chain(task.attempts.iter().map(attempt)).collect()
}

fn attempt(attempt: &TaskAttempt) -> String {
    let how = match &attempt.end {
        None => "is under way".to_owned(),
        Some(end) => printable(end.reason.as_deref().unwrap_or("succeeded")).replace('\n', " "),
    };
    let agent = attempt.agent.as_deref().map(|agent| format!(" in agent {agent}")).unwrap_or_default();
    let number = attempt.number;
    format!("{:<10} {} ago{agent}: {how}\n", format!("attempt {number}"), age(attempt.started_unix_ms))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn task(state: &str, exit_code: u8) -> Task {
        let end = json!({ "outcome": "failed", "reason": "it\u{1b}[2J\nbroke", "exit_code": exit_code });
        let json = json!({
            "id": "0a", "name": "nightly", "work": { "kind": "command", "program": "make" }, "created_unix_ms": 0,
            "state": state, "reason": "it\u{1b}[2J broke", "failures": 1, "ended_unix_ms": 0,
            "attempts": [{ "number": 4, "agent": "0b", "started_unix_ms": 0, "end": end }],
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn the_exit_code_is_the_programs_where_that_says_it() {
        for (state, code, exit) in [
            ("succeeded", 0, 0),
            ("failed", 7, 7),
            ("failed", 0, 125),
            ("timed_out", 1, 124),
            ("cancelled", 1, 125),
        ] {
            assert_eq!(exit_code(&task(state, code)), exit, "{state}");
        }
    }

    #[test]
    fn tasks_are_listed_and_told_and_move_no_cursor() {
        let ui = Ui::new(true);
        let years = age(0);
        let list = TaskList { tasks: vec![task("failed", 7)], next_cursor: None };
        assert_eq!(
            task_table(ui, &list),
            format!(
                "ID  NAME     OWNER    STATE   ATTEMPTS  AGE{}  WORK  REASON\n\
                 0a  nightly  default  failed  4         {years}  make  it\\u{{1b}}[2J broke\n",
                " ".repeat(years.len().saturating_sub(3))
            )
        );
        let told = details(ui, &list.tasks[0]);
        assert!(told.contains("failures   1 of 1\n"), "{told}");
        assert!(
            told.ends_with(&format!("attempt 4  {years} ago in agent 0b: it\\u{{1b}}[2J broke\n")),
            "{told}"
        );
    }
}

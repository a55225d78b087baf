//! A task is asked for: checked, written down, acknowledged.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash as _, Hasher as _};
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;

use ark_types::agent::{DEFAULT_MEMORY_MIB, DEFAULT_VCPUS};
use ark_types::event::{Event, Stream};
use ark_types::plain::plain;
use ark_types::problem::ProblemKind;
use ark_types::scheduling::PRIORITIES;
use ark_types::task::{
    ATTEMPTS, CreateTask, MAX_BACKOFF_MS, MAX_STDIN, TASK_TIME_MS, Task, TaskKey, TaskSpec, TaskWork,
};

use super::attempt::{self, Which};
use super::blocking;
use super::runner::put_back;
use crate::admission::check_size_here;
use crate::core::Core;
use crate::host::unix_ms;
use crate::idempotency;
use crate::problems::Refusal;
use crate::store::{Append, AppendError};
use crate::validate::check_allow;

/// As long as what a guest is told of an attempt can be.
const LARGEST: Which<'static> = Which {
    task: "0123456789abcdef",
    attempt: u32::MAX,
    trace: Some("00-0123456789abcdef0123456789abcdef-0123456789abcdef-00"),
};

/// What a request for a task came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Created {
    /// It is a new one.
    New(Task),
    /// It was there: its key says so.
    Known(Task),
}

fn invalid(detail: impl Into<String>) -> Refusal {
    Refusal::new(ProblemKind::InvalidValue, detail)
}

/// Makes the task that `request` asks for, whose attempts are part of the trace `traceparent`: it is durable when this returns, whether who asked is still there or not. One that the
/// owner calls the same already is answered with.
///
/// # Errors
/// A [`Refusal`] that names the value, or why nothing can be kept; there is no task then.
pub async fn create(core: &Arc<Core>, request: CreateTask, traceparent: String) -> Result<Created, Refusal> {
    let work = check(core, &request)?;
    core.ledger.ready()?;
    let core = Arc::clone(core);
    let creation = idempotency::spawn(async move {
        let _turn = match request.key.as_ref().and_then(|key| core.tasks.keys.get(place(&request, key))) {
            Some(lock) => Some(lock.lock().await),
            None => None,
        };
        if let Some(known) = known(&core, &request).await? {
            return Ok(Created::Known(known));
        }
        let spec = spec_of(&request, work, traceparent);
        make(&core, request, spec.newborn()).await.map(Created::New)
    });
    let interrupted =
        |_| Refusal::new(ProblemKind::Internal, "the creation of the task was interrupted: try again");
    creation.await.map_err(interrupted)?
}

/// Which lock creations with `key` take.
fn place(request: &CreateTask, key: &TaskKey) -> usize {
    let mut hasher = DefaultHasher::new();
    (&request.owner, key).hash(&mut hasher);
    usize::try_from(hasher.finish() % super::KEY_LOCKS as u64).unwrap_or_default()
}

/// The task that the owner calls so already.
async fn known(core: &Core, request: &CreateTask) -> Result<Option<Task>, Refusal> {
    let Some(key) = &request.key else { return Ok(None) };
    core.ledger.caught_up().await;
    let Some(task) = core.ledger.projection().tasks().with_key(&request.owner, key).cloned() else {
        return Ok(None);
    };
    let (files, id, asked) = (core.tasks.files.clone(), task.spec.id.clone(), request.clone());
    let is_same = blocking(move || files.is_of(&id, &asked)).await.map_err(|error| {
        let detail =
            format!("what the task {} was asked for with cannot be read: {}", task.spec.id, plain(&error));
        Refusal::new(ProblemKind::HostUnable, detail)
    })?;
    if is_same {
        return Ok(Some(task));
    }
    let detail = format!(
        "the key {key} belongs to the task {} of {}, which was asked for with another body: send that one, or choose another key",
        task.spec.id, request.owner
    );
    Err(Refusal::new(ProblemKind::TaskKeyTaken, detail))
}

async fn make(core: &Arc<Core>, request: CreateTask, task: Task) -> Result<Task, Refusal> {
    core.tasks.hold(&task)?;
    let id = &task.spec.id;
    let (files, name) = (core.tasks.files.clone(), id.clone());
    if let Err(error) = blocking(move || files.write_request(&name, &request)).await {
        discard(core, &task).await;
        return Err(unwritable(&error));
    }
    if let Err(error) = idempotency::bind(core, Stream::task(id)).await {
        discard(core, &task).await;
        return Err(error.into());
    }
    let created = Append::new(Stream::task(id), Event::TaskCreated { task: task.spec.clone() }).at(0);
    let appended = match core.log.append(created).await {
        Ok(appended) => appended,
        // What the log holds is not known then: the next start removes what belongs to nothing.
        Err(AppendError::Closed) => {
            core.tasks.let_go(id);
            return Err(AppendError::Closed.into());
        }
        Err(error) => {
            discard(core, &task).await;
            return Err(error.into());
        }
    };
    // Whoever asks with the same key finds it from here on. Who cancelled it meanwhile is heeded.
    core.ledger.reached(appended.position).await;
    put_back(core, id, |board, now| board.put_back(id, (0, 0), now)).await;
    Ok(task)
}

/// Removes what was written down of a task that is not to be.
async fn discard(core: &Core, task: &Task) {
    core.tasks.let_go(&task.spec.id);
    let (files, removed) = (core.tasks.files.clone(), task.clone());
    if let Err(error) = blocking(move || files.remove(&removed)).await {
        tracing::warn!(id = task.spec.id, %error, "the files of a task that is not to be cannot be removed");
    }
}

fn unwritable(error: &io::Error) -> Refusal {
    let is_full = matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT));
    let kind = if is_full { ProblemKind::DiskFull } else { ProblemKind::HostUnable };
    Refusal::new(
        kind,
        format!("the task cannot be kept: {}; see that the state directory works", plain(error)),
    )
}

fn spec_of(request: &CreateTask, work: TaskWork, traceparent: String) -> TaskSpec {
    TaskSpec {
        id: format!("{:016x}", rand::random::<u64>()),
        name: request.name.clone(),
        owner: request.owner.clone(),
        labels: request.labels.clone(),
        key: request.key.clone(),
        image: request.image.clone(),
        template: request.template.clone(),
        work,
        priority: request.priority,
        retry: request.retry,
        timeout_ms: request.timeout_ms,
        deadline_ms: request.deadline_ms,
        traceparent: Some(traceparent),
        created_unix_ms: unix_ms(),
    }
}

/// Checks `request`, and says what it asks for.
fn check(core: &Core, request: &CreateTask) -> Result<TaskWork, Refusal> {
    if !PRIORITIES.contains(&request.priority) {
        let (least, most) = (PRIORITIES.start(), PRIORITIES.end());
        let given = request.priority;
        return Err(invalid(format!(
            "a priority of {given} is out of bounds: give one from {least} to {most}"
        )));
    }
    check_allow(&request.allow)?;
    check_times(request)?;
    check_place(core, request)?;
    match (&request.command, &request.eval) {
        (Some(command), None) => {
            let (_, stdin) = attempt::program(command, LARGEST, request.timeout_ms)?;
            if stdin.len() > MAX_STDIN {
                return Err(invalid(format!("stdin has {} bytes: at most {MAX_STDIN}", stdin.len())));
            }
            let program =
                command.argv.first().map_or_else(String::new, |program| attempt::shortened(program));
            Ok(TaskWork::Command { program })
        }
        (None, Some(eval)) => {
            attempt::code(eval, LARGEST, request.timeout_ms)?;
            Ok(TaskWork::Eval { language: eval.language })
        }
        (Some(_), Some(_)) => {
            Err(invalid("command and eval exclude each other: name the one that is to be done"))
        }
        (None, None) => Err(invalid("neither command nor eval is named: name the one that is to be done")),
    }
}

fn check_times(request: &CreateTask) -> Result<(), Refusal> {
    let bound = |what: &str, value: u64, bounds: &RangeInclusive<u64>| {
        if bounds.contains(&value) {
            return Ok(());
        }
        let (least, most) = (bounds.start(), bounds.end());
        Err(invalid(format!("{what} of {value} is out of bounds: give {least} to {most}, or leave it out")))
    };
    let retry = request.retry;
    let attempts = u64::from(*ATTEMPTS.start())..=u64::from(*ATTEMPTS.end());
    bound("retry.max_attempts", retry.max_attempts.into(), &attempts)?;
    bound("retry.backoff_ms", retry.backoff_ms, &(0..=MAX_BACKOFF_MS))?;
    bound("retry.max_backoff_ms", retry.max_backoff_ms, &(0..=MAX_BACKOFF_MS))?;
    bound("timeout_ms", request.timeout_ms.unwrap_or(1), &TASK_TIME_MS)?;
    bound("deadline_ms", request.deadline_ms.unwrap_or(1), &TASK_TIME_MS)
}

/// Checks what the agents are to be made of. Later it may be gone: the task fails then.
fn check_place(core: &Core, request: &CreateTask) -> Result<(), Refusal> {
    match (&request.image, &request.template) {
        (Some(image), None) => {
            let vcpus = request.vcpus.unwrap_or(DEFAULT_VCPUS);
            check_size_here((vcpus, request.memory_mib.unwrap_or(DEFAULT_MEMORY_MIB)))?;
            core.images.manifest(image.as_ref())?;
            Ok(())
        }
        (None, Some(_)) if request.vcpus.is_some() || request.memory_mib.is_some() => Err(invalid(
            "vcpus and memory_mib cannot be chosen for forks: processors and memory are the template's",
        )),
        (None, Some(template)) => {
            core.templates.describe(template.as_ref())?;
            Ok(())
        }
        (Some(_), Some(_)) => Err(invalid(
            "image and template exclude each other: name the one that the agents are to be made of",
        )),
        (None, None) => Err(invalid(
            "neither image nor template is named: name the one that the agents are to be made of",
        )),
    }
}

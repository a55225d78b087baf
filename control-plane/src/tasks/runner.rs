//! Attempts under way: begun when it is a task's turn and there is a place, and brought to their end.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use ark_types::event::{Event, Stream};
use ark_types::plain::plain;
use ark_types::task::{AttemptEnd, AttemptOutcome, CreateTask, Task, TaskState};
use futures_util::future::join_all;
use tokio::sync::watch;
use tracing::Instrument as _;

use super::attempt::{Attempted, Progress, Which, attempt, lost, shortened};
use super::board::{Board, Open};
use super::decide::{Refused, Verdict, after};
use super::files::Head;
use super::output::{Spool, Written};
use super::{Halt, Halted, blocking};
use crate::core::Core;
use crate::host::unix_ms;
use crate::problems::Refusal;
use crate::traces;

/// How long a task waits that found no room, or no log to record its attempt in.
const PAUSE: Duration = Duration::from_secs(1);

/// Puts what earlier `arkd`s acknowledged on the board. What they had under way is cut off: its agents are gone by now.
pub(super) fn resume(core: &Arc<Core>) {
    let is_open = |task: &&Task| !task.state.is_ended();
    let open: Vec<Task> = core.ledger.projection().tasks().iter().filter(is_open).cloned().collect();
    for task in open {
        if task.state == TaskState::Running {
            let attempt = task.last_attempt();
            let end = AttemptEnd {
                outcome: AttemptOutcome::CutOff,
                reason: Some("arkd ended while the attempt was under way".to_owned()),
                exit_code: None,
                output: core.tasks.files.kept(&task.spec.id, attempt),
            };
            let cut_off = Event::TaskAttemptFailed { attempt, end, retry_unix_ms: None };
            // What the log does not take in now stays owed to it, before anything else of the task.
            drop(core.ledger.record(Stream::task(&task.spec.id), vec![cut_off]));
        }
        core.tasks.admit(&task);
    }
}

/// Begins attempts as their turns come, until `arkd` ends.
pub(super) async fn run(core: Arc<Core>) {
    let _ = core.tasks.ending.run_until_cancelled(rounds(&core)).await;
}

async fn rounds(core: &Arc<Core>) {
    let tasks = &core.tasks;
    loop {
        end_late_ones(core).await;
        begin(core);
        remove_surplus(core).await;
        let now = tasks.now();
        let next = tasks.lock().board.next_time(now);
        let nap = next.map_or(Duration::MAX, |next| next.saturating_sub(now));
        tokio::select! {
            () = tasks.changed.notified() => {}
            () = tokio::time::sleep(nap) => {}
        }
    }
}

/// Begins as many attempts as there are places and turns.
fn begin(core: &Arc<Core>) {
    let tasks = &core.tasks;
    loop {
        let (id, open, halt) = {
            let mut inner = tasks.lock();
            if inner.board.under_way() >= tasks.limits.at_once {
                return;
            }
            let Some((id, open)) = inner.board.begin(tasks.now()) else { return };
            let (tell, halt) = watch::channel(None);
            inner.halts.insert(id.clone(), tell);
            (id, open, halt)
        };
        tasks.under_way.spawn(drive(Arc::clone(core), id, open, halt));
    }
}

/// Ends tasks whose deadline is over.
async fn end_late_ones(core: &Core) {
    let late = core.tasks.lock().board.overdue(core.tasks.now());
    let waited = late.into_iter().filter(|id| matches!(core.tasks.halt(id, Halt::Late), Halted::Taken));
    let endings: Vec<_> =
        waited.map(|id| async move { finish(core, &id, vec![Halt::Late.event()]).await }).collect();
    // What is not recorded now is owed to the log.
    drop(join_all(endings).await);
}

impl Halt {
    /// The last event of a task that ends by it.
    fn event(self) -> Event {
        match self {
            Self::Cancelled => Event::TaskCancelled {},
            Self::Late => Event::TaskTimedOut { reason: "its deadline is over".to_owned() },
        }
    }
}

/// Removes ended tasks that are more than are kept, those that ended first.
async fn remove_surplus(core: &Arc<Core>) {
    let limits = &core.tasks.limits;
    let surplus = core.ledger.projection().tasks().surplus(limits.keep, limits.keep_bytes);
    for id in surplus {
        if let Err(Refusal(problem)) = super::remove(core, &id).await {
            tracing::debug!(id, why = problem.detail, "a task that is to go cannot be removed now");
            return;
        }
    }
}

/// How an attempt came to its end.
enum Fate {
    /// By itself.
    Attempted(Box<Attempted>),
    /// Somebody wanted it to.
    Halted(Halt),
    /// `arkd` ends.
    Left,
}

/// Makes one attempt of the task `id`, and does what follows from it.
async fn drive(core: Arc<Core>, id: String, open: Open, mut halt: watch::Receiver<Option<Halt>>) {
    let tasks = &core.tasks;
    let (files, copy) = (tasks.files.clone(), id.clone());
    let request = match blocking(move || files.read_request(&copy)).await {
        Ok(request) => request,
        // The host lacks something for now: it is there all the same.
        Err(error) if !is_gone(&error) => {
            let why = format!("what it is to do cannot be read now: {}", plain(&error));
            return rest(&core, &id, why).await;
        }
        Err(error) => {
            let reason = format!("what it is to do cannot be read: {}", plain(&error));
            let _ = finish(&core, &id, vec![Event::TaskFailed { reason }]).await;
            return;
        }
    };
    let trace = core.ledger.projection().tasks().get(&id).and_then(|task| task.spec.traceparent.clone());
    let which = Which { task: &id, attempt: open.attempts + 1, trace: trace.as_deref() };
    let progress = Progress::default();
    let span = traces::attempt(&id, which.attempt, which.trace);
    let (spool, inlet) = Spool::begin(&core, which);
    let halted = async {
        let told = halt.wait_for(Option::is_some).await.ok().and_then(|halt| *halt);
        match told {
            Some(halt) => halt,
            // Nobody can any more.
            None => std::future::pending().await,
        }
    };
    let attempt =
        attempt(&core, &request, which, open.created_unix_ms, &progress, inlet).instrument(span.clone());
    let fate = tokio::select! {
        biased;
        () = tasks.ending.cancelled() => Fate::Left,
        halt = halted => Fate::Halted(halt),
        attempted = attempt => Fate::Attempted(Box::new(attempted)),
    };
    if let Some(agent) = progress.agent() {
        agent.remove(Duration::ZERO).await;
    }
    let written = spool.end(&core, which).await;
    let (outcome, is_failure) = fate.told();
    traces::attempted(&span, outcome, is_failure);
    drop(span);
    conclude(&core, &request, which, &open, &progress, fate, written).await;
}

impl Fate {
    /// What a trace is told of it, and whether something is wrong.
    const fn told(&self) -> (&'static str, bool) {
        match self {
            Self::Left => ("cut_off", false),
            Self::Halted(_) => ("stopped", false),
            Self::Attempted(attempted) => match &**attempted {
                Attempted::NoAgent(Refusal(problem)) => match Refused::of(problem.kind) {
                    Refused::NoRoom => ("no_room", false),
                    Refused::Never | Refused::Lost => ("no_agent", true),
                },
                Attempted::Ended(end, _) => (end.outcome.word(), end.outcome.is_failure()),
            },
        }
    }
}

/// Records what `fate` means for the task, and lets go of it.
async fn conclude(
    core: &Core,
    request: &CreateTask,
    which: Which<'_>,
    open: &Open,
    progress: &Progress,
    fate: Fate,
    written: Written,
) {
    let attempted = match fate {
        // The next arkd cuts it off and begins it again.
        Fate::Left => return,
        Fate::Halted(halt) => return stop(core, which, progress, halt, written).await,
        Fate::Attempted(attempted) => *attempted,
    };
    let (end, head) = match attempted {
        Attempted::Ended(end, head) => (end, head),
        Attempted::NoAgent(Refusal(problem)) => match Refused::of(problem.kind) {
            Refused::NoRoom => {
                tracing::debug!(id = which.task, why = problem.detail, "a task waits for room");
                return rest(core, which.task, problem.detail).await;
            }
            Refused::Never => {
                let _ =
                    finish(core, which.task, vec![Event::TaskFailed { reason: shortened(&problem.detail) }])
                        .await;
                return;
            }
            Refused::Lost => (lost(&problem.detail), None),
        },
    };
    let end = keep(core, which, end, head, written).await;
    let failures = open.failures + u32::from(end.outcome.is_failure());
    let Verdict { events, again } = after(&request.retry, open.failures, which.attempt, end, unix_ms());
    let began = (!progress.is_told()).then_some(Event::TaskStarted { attempt: which.attempt, agent: None });
    let events = began.into_iter().chain(events).collect();
    let Some(wait) = again else { return drop(finish(core, which.task, events).await) };
    // What the log does not take in now is owed to it, before the next attempt.
    let is_durable = core.ledger.record(Stream::task(which.task), events).await.is_ok();
    let wait = if is_durable { wait } else { wait.max(PAUSE) };
    put_back(core, which.task, |board, now| {
        board.put_back(which.task, (which.attempt, failures), now.saturating_add(wait));
    })
    .await;
}

/// The attempt was given up.
async fn stop(core: &Core, which: Which<'_>, progress: &Progress, halt: Halt, written: Written) {
    let reason = match halt {
        Halt::Cancelled => "the task was cancelled",
        Halt::Late => "the task's deadline is over",
    };
    let end = AttemptEnd {
        outcome: AttemptOutcome::Stopped,
        reason: Some(reason.to_owned()),
        exit_code: None,
        output: None,
    };
    let end = keep(core, which, end, None, written).await;
    let attempt = which.attempt;
    let stopped =
        progress.is_told().then_some(Event::TaskAttemptFailed { attempt, end, retry_unix_ms: None });
    let _ = finish(core, which.task, stopped.into_iter().chain([halt.event()]).collect()).await;
}

/// Keeps what came of an attempt, and says so in its end. What is done is done, even where that cannot be kept.
async fn keep(
    core: &Core,
    which: Which<'_>,
    mut end: AttemptEnd,
    head: Option<Head>,
    written: Written,
) -> AttemptEnd {
    let Written { kept, error } = written;
    if head.is_none() && kept.bytes() == 0 && error.is_none() {
        return end;
    }
    let (files, task, attempt) = (core.tasks.files.clone(), which.task.to_owned(), which.attempt);
    let concluded = blocking(move || files.conclude(&task, attempt, &head.unwrap_or_default())).await;
    end.output = Some(kept);
    if let Some(error) = error.or(concluded.err()) {
        tracing::warn!(id = which.task, %error, "the output of a task cannot be kept");
        let lost = format!("its output cannot be kept: {}", plain(&error));
        end.reason = Some(end.reason.map_or_else(|| lost.clone(), |reason| format!("{reason}; {lost}")));
    }
    end
}

/// Whether what a task is to do is there no more, or damaged.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
    )
}

/// The host lacked something that the task needs: it has its place again, and its owner's tasks rest a while.
async fn rest(core: &Core, id: &str, why: String) {
    put_back(core, id, |board, now| board.rest(id, now.saturating_add(PAUSE), why)).await;
}

/// Has `put` put a task back on the board, unless somebody wanted it to end meanwhile.
pub(super) async fn put_back(core: &Core, id: &str, put: impl FnOnce(&mut Board, Duration)) {
    let halted = {
        let mut inner = core.tasks.lock();
        let halted = inner.halts.remove(id).and_then(|halt| *halt.borrow());
        if halted.is_none() {
            put(&mut inner.board, core.tasks.now());
        }
        halted
    };
    match halted {
        None => core.tasks.changed.notify_one(),
        Some(halt) => drop(finish(core, id, vec![halt.event()]).await),
    }
}

/// Records the end of a task with its last `events`, and takes it off the board.
///
/// # Errors
/// When it is not recorded yet: it is owed to the log then.
pub(super) async fn finish(core: &Core, id: &str, events: Vec<Event>) -> Result<(), Refusal> {
    let state = match events.last() {
        Some(Event::TaskSucceeded { .. }) => TaskState::Succeeded,
        Some(Event::TaskCancelled {}) => TaskState::Cancelled,
        Some(Event::TaskTimedOut { .. }) => TaskState::TimedOut,
        _ => TaskState::Failed,
    };
    let recorded = core.ledger.record(Stream::task(id), events).await;
    core.tasks.let_go(id);
    core.telemetry.task_ended(state);
    core.tasks.changed.notify_one();
    recorded?;
    // Until its end is durable another arkd may need to do it again.
    let (files, task) = (core.tasks.files.clone(), id.to_owned());
    if let Err(error) = blocking(move || files.forget_request(&task)).await {
        tracing::warn!(id, %error, "what a task that has ended was to do cannot be removed; the next start does it");
    }
    Ok(())
}

//! Tasks: work that gets done in agents made for it, at least once, whatever dies meanwhile.
//!
//! ```text
//!  POST /v1/tasks ─► request on disk ─► task.created durable ─► acknowledged
//!                                             │
//!          ┌──────────────► board ────────────┘        who is next: priority, fair among owners
//!          │ wait, no room    │ a place is free (`at_once`)
//!          │                  ▼
//!          │   attempt: agent ─► task.started durable ─► program or code ─► agent removed ─► output on disk
//!          └──────────────────┤
//!                             ▼
//!        task.succeeded · task.failed · task.cancelled · task.timed_out ─► request forgotten ─► removed, or too many: task.removed
//! ```
//!
//! | file | what it knows |
//! |---|---|
//! | `board` | which tasks have not ended, and which is next |
//! | `decide` | what becomes of a task when an attempt ends |
//! | `create` | what is asked for, checked; keys |
//! | `runner`, `attempt` | attempts under way; one of them |
//! | `output` | what attempts write, kept as it comes; who follows it |
//! | `files` | what is too secret or too large for the log |
//!
//! The number of an attempt is durable before its program is begun, so no two programs are told the same one. An `arkd` that dies
//! leaves attempts cut off: the next one ends their agents (they go with their clients, see [`crate::survivors`]) before it begins
//! the next attempt. One that ends in order does not wait for attempts either: the next one begins them again.
//!
//! Each task is driven by one party at a time, which the board decides: who is running it, else whoever takes it off the board.

mod attempt;
mod board;
mod create;
mod decide;
mod files;
mod output;
mod runner;

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ark_types::event::{Event, Stream};
use ark_types::plain::plain;
use ark_types::problem::ProblemKind;
use ark_types::task::{Task, TaskResult, TaskState};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::TaskLimits;
use crate::core::Core;
use crate::host::unix_ms;
use crate::idempotency;
use crate::problems::Refusal;
use crate::projection;
use crate::store::Append;

use board::{Board, Open};
use files::Files;
use output::Live;

pub use create::{Created, create};
pub use output::{Reader, Wanted, log};

/// Locks that creations with keys share: each key has one, so that two creations with the same do not pass each other.
const KEY_LOCKS: usize = 64;

/// Why an attempt is to end that would go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Halt {
    /// Somebody cancelled the task.
    Cancelled,
    /// Its deadline is over.
    Late,
}

/// What became of a wish to end a task.
#[derive(Debug)]
enum Halted {
    /// It is not on the board: there is none, or it has ended, even if that is still to be recorded.
    Gone,
    /// Whoever is at it knows, and ends it.
    Told,
    /// It waited, and is held on the board: who asked has to record its end.
    Taken,
}

/// See the module.
#[derive(Debug)]
pub struct Tasks {
    limits: TaskLimits,
    files: Files,
    began: Instant,
    inner: Mutex<Inner>,
    /// Told when there may be something to do.
    changed: Notify,
    /// No attempt is begun any more, and those under way are left.
    ending: CancellationToken,
    under_way: TaskTracker,
    keys: [tokio::sync::Mutex<()>; KEY_LOCKS],
    /// One is removed at a time.
    removing: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Inner {
    board: Board,
    /// How whoever is at a task is told that it is to end.
    halts: HashMap<String, watch::Sender<Option<Halt>>>,
    live: Live,
}

impl Tasks {
    /// Those that `known` tells of, with what is on disk of them. None is begun before [`Self::start`].
    ///
    /// # Errors
    /// When their directory cannot be made or read.
    pub fn open(dir: std::path::PathBuf, known: &projection::Tasks, limits: TaskLimits) -> io::Result<Self> {
        Ok(Self {
            limits,
            files: Files::open(dir, known)?,
            began: Instant::now(),
            inner: Mutex::default(),
            changed: Notify::new(),
            ending: CancellationToken::new(),
            under_way: TaskTracker::new(),
            keys: std::array::from_fn(|_| tokio::sync::Mutex::default()),
            removing: tokio::sync::Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Time since the board's beginning.
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Tasks that wait, and tasks with an attempt under way.
    #[must_use]
    pub fn levels(&self) -> (usize, usize) {
        let Inner { board, .. } = &*self.lock();
        (board.len() - board.under_way(), board.under_way())
    }

    /// Goes on with what earlier `arkd`s acknowledged, and begins to take up what comes.
    pub(crate) fn start(&self, core: &Arc<Core>) {
        runner::resume(core);
        self.under_way.spawn(runner::run(Arc::clone(core)));
    }

    /// Begins nothing more, and leaves what is under way to the next `arkd`; waits until the agents of that are gone.
    pub(crate) async fn stop(&self) {
        self.ending.cancel();
        self.under_way.close();
        self.under_way.wait().await;
    }

    /// Puts a task on the board that has not ended.
    fn admit(&self, task: &Task) {
        let (open, not_before) = self.on_board(task);
        self.lock().board.insert(&task.spec.id, open, not_before);
        self.changed.notify_one();
    }

    /// Holds a place on the board for a task that is being made, before anybody can know of it.
    ///
    /// # Errors
    /// When as many have not ended as may.
    fn hold(&self, task: &Task) -> Result<(), Refusal> {
        let (open, _) = self.on_board(task);
        let (count, most) = {
            let mut inner = self.lock();
            let count = inner.board.len();
            if count < self.limits.open {
                inner.board.insert_held(&task.spec.id, open);
                inner.halts.insert(task.spec.id.clone(), watch::Sender::new(None));
                return Ok(());
            }
            (count, self.limits.open)
        };
        let detail = format!(
            "{count} tasks have not ended, and no more than {most} may wait: try again later, or raise `tasks.open`"
        );
        Err(Refusal::new(ProblemKind::QueueFull, detail))
    }

    /// Takes the task `id` off the board.
    fn let_go(&self, id: &str) {
        let mut inner = self.lock();
        inner.halts.remove(id);
        inner.board.remove(id);
    }

    /// What the board knows of `task`, and when it may be tried at the earliest.
    fn on_board(&self, task: &Task) -> (Open, Duration) {
        let (wait, left) = decide::times(task, unix_ms());
        let now = self.now();
        let open = Open {
            owner: task.spec.owner.clone(),
            priority: task.spec.priority,
            created_unix_ms: task.spec.created_unix_ms,
            attempts: task.last_attempt(),
            failures: task.failures,
            deadline: left.map(|left| now.saturating_add(left)),
        };
        (open, now.saturating_add(wait))
    }

    fn halt(&self, id: &str, why: Halt) -> Halted {
        let mut inner = self.lock();
        match inner.board.is_taken(id) {
            None => Halted::Gone,
            Some(true) => {
                if let Some(halt) = inner.halts.get(id) {
                    halt.send_replace(Some(why));
                }
                Halted::Told
            }
            Some(false) => {
                inner.board.hold(id);
                Halted::Taken
            }
        }
    }
}

/// No task of that id.
fn not_found(id: &str) -> Refusal {
    Refusal::new(
        ProblemKind::TaskNotFound,
        format!("there is no task {id:?}: `ark task ls` lists those there are"),
    )
}

fn unreadable(id: &str, error: &io::Error) -> Refusal {
    Refusal::new(
        ProblemKind::HostUnable,
        format!("the output of the task {id} cannot be read: {}", plain(error)),
    )
}

/// Does what blocks elsewhere.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// The task `id`, as far as it is recorded; of one that waits for its turn also what it lacks.
///
/// # Errors
/// When there is none.
pub async fn find(core: &Core, id: &str) -> Result<Task, Refusal> {
    core.ledger.caught_up().await;
    let task = core.ledger.projection().tasks().get(id).cloned();
    let mut task = task.ok_or_else(|| not_found(id))?;
    if task.state == TaskState::Queued {
        task.reason = core.tasks.lock().board.obstacle(&task.spec.owner).or(task.reason);
    }
    Ok(task)
}

/// The task `id` when it has ended, or as it is after `limit`.
///
/// # Errors
/// When there is none.
pub async fn wait(core: &Core, id: &str, limit: Duration) -> Result<Task, Refusal> {
    let mut position = core.ledger.position();
    let ended = async {
        loop {
            // Before it is looked at: what happens after that wakes again.
            position.borrow_and_update();
            let is_open = core.ledger.projection().tasks().get(id).is_some_and(|task| !task.state.is_ended());
            if !is_open || position.changed().await.is_err() {
                return;
            }
        }
    };
    let _ = core.closing.run_until_cancelled(tokio::time::timeout(limit, ended)).await;
    find(core, id).await
}

/// What came of `task`; none when nothing is kept.
///
/// # Errors
/// When it cannot be read.
pub async fn result(core: &Core, task: &Task) -> Result<Option<TaskResult>, Refusal> {
    let (files, copy) = (core.tasks.files.clone(), task.clone());
    blocking(move || files.result(&copy)).await.map_err(|error| unreadable(&task.spec.id, &error))
}

/// Ends the task `id`, and what it runs; it is recorded when this returns, and goes on when who asked leaves.
///
/// # Errors
/// When there is none, it has ended, or its end cannot be recorded.
pub async fn cancel(core: &Arc<Core>, id: &str, limit: Duration) -> Result<Task, Refusal> {
    core.ledger.ready()?;
    match core.tasks.halt(id, Halt::Cancelled) {
        // Of one that has ended it is over at once; else its end is owed to the log.
        Halted::Gone | Halted::Told => drop(wait(core, id, limit).await?),
        Halted::Taken => {
            let (core, id) = (Arc::clone(core), id.to_owned());
            let end = async move { runner::finish(&core, &id, vec![Event::TaskCancelled {}]).await };
            idempotency::spawn(end).await.map_err(|_| interrupted())??;
        }
    }
    let task = find(core, id).await?;
    match task.state {
        TaskState::Cancelled => Ok(task),
        state if state.is_ended() => {
            Err(Refusal::new(ProblemKind::TaskEnded, format!("the task {id} has ended: it is {state}")))
        }
        state => {
            let detail = format!(
                "the task {id} is being cancelled and still {state}: look again with `ark task show {id}`"
            );
            Err(Refusal::new(ProblemKind::DeadlinePassed, detail))
        }
    }
}

/// Removes the task `id`, which has ended, and everything that is kept of it, whether or not who asked stays.
///
/// # Errors
/// When there is none, it has not ended, or its removal cannot be recorded.
pub async fn remove(core: &Arc<Core>, id: &str) -> Result<(), Refusal> {
    let (core, id) = (Arc::clone(core), id.to_owned());
    let removal = idempotency::spawn(async move { take_away(&core, &id).await });
    removal.await.map_err(|_| interrupted())?
}

fn interrupted() -> Refusal {
    Refusal::new(ProblemKind::Internal, "what was asked of the task was interrupted: try again")
}

async fn take_away(core: &Core, id: &str) -> Result<(), Refusal> {
    let _turn = core.tasks.removing.lock().await;
    let task = find(core, id).await?;
    if !task.state.is_ended() {
        let state = task.state;
        let detail = format!("the task {id} is {state}: cancel it first, with `ark task cancel {id}`");
        return Err(Refusal::new(ProblemKind::TaskNotEnded, detail));
    }
    let appended = core.log.append(Append::new(Stream::task(id), Event::TaskRemoved {})).await?;
    core.ledger.reached(appended.position).await;
    let files = core.tasks.files.clone();
    // The next start removes what is left.
    if let Err(error) = blocking(move || files.remove(&task)).await {
        tracing::warn!(id, %error, "what is kept of a task that is removed cannot be removed");
    }
    Ok(())
}

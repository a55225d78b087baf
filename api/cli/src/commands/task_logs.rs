//! `ark task logs --follow`: what attempts write, as they write it, also across the end of `arkd`.

use std::io::{self, Write as _};
use std::time::{Duration, Instant};

use ark_client::{Client, Error, TaskLogQuery};
use ark_types::task::{OutputStream, Task};

use crate::failure::Failure;

/// How long `arkd` may be away.
const PATIENCE: Duration = Duration::from_secs(60);
/// Time between two tries.
const PAUSE: Duration = Duration::from_millis(200);

/// Why copying ended early.
enum Broken {
    /// The connection, or what `arkd` says.
    Client(Error),
    /// Nobody takes what is written.
    Output(io::Error),
}

impl From<Error> for Broken {
    fn from(error: Error) -> Self {
        Self::Client(error)
    }
}

impl From<Broken> for Failure {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Client(error) => error.into(),
            Broken::Output(error) => Self::Output(error),
        }
    }
}

/// An attempt that is followed.
struct Followed<'a> {
    client: &'a Client,
    task: &'a str,
    attempt: u32,
    /// What is copied of each stream.
    stdout: u64,
    stderr: u64,
    /// Since when `arkd` is away.
    away: Option<Instant>,
}

/// Copies what `attempt` of the task `id` writes until it has ended; when none is named, what all do from the newest on, until the
/// task has.
pub(crate) async fn follow(client: &Client, id: &str, attempt: Option<u32>) -> Result<(), Failure> {
    let first = match attempt {
        Some(attempt) => attempt,
        None => client.task(id, Duration::ZERO).await?.last_attempt().max(1),
    };
    let mut followed = Followed { client, task: id, attempt: first, stdout: 0, stderr: 0, away: None };
    loop {
        let task = followed.follow_to_end().await?;
        if attempt.is_some() || task.state.is_ended() && followed.attempt >= task.last_attempt() {
            return Ok(());
        }
        followed = Followed { attempt: followed.attempt + 1, stdout: 0, stderr: 0, ..followed };
    }
}

impl Followed<'_> {
    /// Copies until the attempt has ended: the task as it is then.
    async fn follow_to_end(&mut self) -> Result<Task, Failure> {
        loop {
            let round = match self.copy().await {
                Ok(()) => self.client.task(self.task, Duration::ZERO).await.map_err(Broken::Client),
                Err(broken) => Err(broken),
            };
            match round {
                Ok(task) if is_over(&task, self.attempt) => return Ok(task),
                // An arkd that ends lets its followers go; the next one goes on.
                Ok(_) => self.away = None,
                Err(Broken::Client(Error::Connect { .. } | Error::Broken { .. })) if self.is_patient() => {}
                Err(broken) => return Err(broken.into()),
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    fn is_patient(&mut self) -> bool {
        self.away.get_or_insert_with(Instant::now).elapsed() < PATIENCE
    }

    /// Copies both streams from where they are, until `arkd` ends them.
    async fn copy(&mut self) -> Result<(), Broken> {
        let Self { client, task, attempt, stdout, stderr, .. } = self;
        tokio::try_join!(
            copy(client, task, *attempt, OutputStream::Stdout, stdout),
            copy(client, task, *attempt, OutputStream::Stderr, stderr),
        )?;
        Ok(())
    }
}

/// Whether `attempt` has ended, or never will begin.
fn is_over(task: &Task, attempt: u32) -> bool {
    let told = task.attempts.iter().find(|told| told.number == attempt);
    told.map_or(task.state.is_ended() || task.last_attempt() > attempt, |told| told.end.is_some())
}

async fn copy(
    client: &Client,
    task: &str,
    attempt: u32,
    stream: OutputStream,
    from: &mut u64,
) -> Result<(), Broken> {
    let query = TaskLogQuery { stream, attempt: Some(attempt), from: *from, follow: true };
    let mut log = client.task_log(task, query).await?;
    while let Some(bytes) = log.next().await? {
        match stream {
            OutputStream::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(&bytes).and_then(|()| out.flush()).map_err(Broken::Output)?;
            }
            // Nobody reads our standard error: that is no reason to fail.
            OutputStream::Stderr => drop(io::stderr().lock().write_all(&bytes)),
        }
        *from += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    }
    Ok(())
}

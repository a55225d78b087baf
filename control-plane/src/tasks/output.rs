//! What attempts write: kept as it comes, and read while it grows.
//!
//! ```text
//!  guest ─► attempt ─► Inlet ─► one writer per attempt ─► file, its first MiB ─► Reader: by offset, until the attempt has ended
//! ```

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use ark_types::problem::ProblemKind;
use ark_types::task::{KeptOutput, MAX_KEPT_ATTEMPTS, MAX_KEPT_OUTPUT, OutputStream, Task};
use tokio::fs::File;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::attempt::Which;
use super::files::{Files, is_kept};
use super::{blocking, find};
use crate::core::Core;
use crate::guest::Sink;
use crate::problems::Refusal;

/// Pieces that wait to be written; a guest that is faster waits.
const PIECES: usize = 16;
/// Bytes that are read at a time.
const CHUNK: u64 = 64 << 10;

/// Attempts whose output is being written, by task, and who is told that there is more of it.
pub(super) type Live = HashMap<String, (u32, Arc<watch::Sender<()>>)>;

/// Where an attempt's output goes in.
#[derive(Debug)]
pub(super) struct Inlet(mpsc::Sender<(OutputStream, Vec<u8>)>);

impl Sink for Inlet {
    async fn take(&mut self, stream: OutputStream, bytes: &[u8]) {
        // The writer is there until every way in is closed.
        let _ = self.0.send((stream, bytes.to_vec())).await;
    }
}

/// What there is of an attempt's output.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// How much.
    pub(super) kept: KeptOutput,
    /// Why not all that was to be kept is.
    pub(super) error: Option<io::Error>,
}

/// The output of an attempt on its way to disk.
#[derive(Debug)]
pub(super) struct Spool {
    writer: JoinHandle<Written>,
}

impl Spool {
    /// Begins to keep what the attempt `which` writes.
    pub(super) fn begin(core: &Core, which: Which<'_>) -> (Self, Inlet) {
        let (inlet, pieces) = mpsc::channel(PIECES);
        let grown = Arc::new(watch::Sender::new(()));
        core.tasks.lock().live.insert(which.task.to_owned(), (which.attempt, Arc::clone(&grown)));
        let parts = Parts::new(&core.tasks.files, which);
        (Self { writer: tokio::spawn(write(parts, pieces, grown)) }, Inlet(inlet))
    }

    /// What there is when all of it is lasting. Its way in has to be closed.
    pub(super) async fn end(self, core: &Core, which: Which<'_>) -> Written {
        let written = self.writer.await.unwrap_or_else(|error| Written {
            kept: KeptOutput::default(),
            error: Some(io::Error::other(error)),
        });
        core.tasks.lock().live.remove(which.task);
        written
    }
}

/// One stream's file.
#[derive(Debug)]
struct Part {
    path: std::path::PathBuf,
    /// Once something came.
    file: Option<File>,
    len: usize,
}

impl Part {
    /// Adds `bytes` as far as there is room for them; whether all of them fit.
    async fn add(&mut self, bytes: &[u8]) -> io::Result<bool> {
        let room = MAX_KEPT_OUTPUT.saturating_sub(self.len);
        let fits = bytes.get(..room).unwrap_or(bytes);
        if !fits.is_empty() {
            let file = match &mut self.file {
                Some(file) => file,
                none => none.insert(create(&self.path).await?),
            };
            file.write_all(fits).await?;
            // Who follows it sees it from here on.
            file.flush().await?;
            self.len += fits.len();
        }
        Ok(fits.len() == bytes.len())
    }

    async fn settle(&self) -> io::Result<u64> {
        if let Some(file) = &self.file {
            file.sync_all().await?;
        }
        Ok(u64::try_from(self.len).unwrap_or(u64::MAX))
    }
}

async fn create(path: &Path) -> io::Result<File> {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    tokio::fs::OpenOptions::from(options).open(path).await
}

#[derive(Debug)]
struct Parts {
    stdout: Part,
    stderr: Part,
    truncated: bool,
}

impl Parts {
    fn new(files: &Files, which: Which<'_>) -> Self {
        let part = |stream| {
            let path = files.output(which.task, which.attempt, stream);
            Part { path, file: None, len: 0 }
        };
        Self { stdout: part(OutputStream::Stdout), stderr: part(OutputStream::Stderr), truncated: false }
    }

    async fn add(&mut self, stream: OutputStream, bytes: &[u8]) -> io::Result<()> {
        let part = match stream {
            OutputStream::Stdout => &mut self.stdout,
            OutputStream::Stderr => &mut self.stderr,
        };
        let is_all = part.add(bytes).await?;
        self.truncated |= !is_all;
        Ok(())
    }

    async fn settle(&self) -> io::Result<KeptOutput> {
        let (stdout_bytes, stderr_bytes) = (self.stdout.settle().await?, self.stderr.settle().await?);
        Ok(KeptOutput { stdout_bytes, stderr_bytes, truncated: self.truncated })
    }
}

/// Writes what comes until nothing can come any more.
async fn write(
    mut parts: Parts,
    mut pieces: mpsc::Receiver<(OutputStream, Vec<u8>)>,
    grown: Arc<watch::Sender<()>>,
) -> Written {
    let mut error = None;
    while let Some((stream, bytes)) = pieces.recv().await {
        // What cannot be written ends the keeping, not the attempt.
        if error.is_none()
            && let Err(why) = parts.add(stream, &bytes).await
        {
            error = Some(why);
        }
        grown.send_replace(());
    }
    match parts.settle().await {
        Ok(kept) => {
            Written { kept: KeptOutput { truncated: kept.truncated || error.is_some(), ..kept }, error }
        }
        Err(why) => Written { kept: KeptOutput::default(), error: error.or(Some(why)) },
    }
}

/// Which output is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Of this attempt; when absent, of the newest one that runs or whose output is kept.
    pub attempt: Option<u32>,
    /// Which stream.
    pub stream: OutputStream,
    /// Without so many bytes at its beginning.
    pub from: u64,
    /// Also what the attempt writes from then on, until it has ended; one that has not begun is waited for.
    pub follow: bool,
}

/// Output being read.
#[derive(Debug)]
pub struct Reader {
    core: Arc<Core>,
    task: String,
    attempt: u32,
    stream: OutputStream,
    from: u64,
    follow: bool,
}

/// What the task `id` wrote, as `wanted`.
///
/// # Errors
/// When there is no such task or attempt, or its output is not kept any more.
pub async fn log(core: &Arc<Core>, id: &str, wanted: Wanted) -> Result<Reader, Refusal> {
    let task = find(core, id).await?;
    let Wanted { attempt, stream, from, follow } = wanted;
    let follow = follow && !task.state.is_ended();
    let attempt = match attempt {
        Some(attempt) => check(&task, attempt, follow)?,
        None => newest(&task, follow),
    };
    Ok(Reader { core: Arc::clone(core), task: task.spec.id, attempt, stream, from, follow })
}

/// The newest attempt that runs or whose output is kept; else the one that comes, or number 0, which there is none of.
fn newest(task: &Task, follow: bool) -> u32 {
    let running = task.attempts.last().filter(|attempt| attempt.end.is_none()).map(|attempt| attempt.number);
    let kept = || task.outputs().next_back().map(|(attempt, _)| attempt);
    running.or_else(kept).unwrap_or_else(|| if follow { task.last_attempt() + 1 } else { 0 })
}

fn check(task: &Task, attempt: u32, follow: bool) -> Result<u32, Refusal> {
    let (id, last) = (&task.spec.id, task.last_attempt());
    let detail = if attempt == 0 {
        "attempts are numbered from 1".to_owned()
    } else if attempt > last && !follow {
        format!("the task {id} had {last} attempts: there is no attempt {attempt}")
    } else if attempt <= last && !is_kept(task, attempt) {
        format!(
            "the output of attempt {attempt} of the task {id} is not kept any more: that of the newest {MAX_KEPT_ATTEMPTS} is"
        )
    } else {
        return Ok(attempt);
    };
    Err(Refusal::new(ProblemKind::InvalidValue, detail))
}

impl Reader {
    /// What comes next; none at the end.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut position = self.core.ledger.position();
        loop {
            // Before anything is looked at: what happens after that wakes again.
            position.borrow_and_update();
            let mut growing = self.growing();
            let (files, task) = (self.core.tasks.files.clone(), self.task.clone());
            let (attempt, stream, from) = (self.attempt, self.stream, self.from);
            let chunk = blocking(move || files.read(&task, attempt, stream, from, CHUNK)).await?;
            if !chunk.is_empty() {
                self.from = self.from.saturating_add(u64::try_from(chunk.len()).unwrap_or(u64::MAX));
                return Ok(Some(chunk));
            }
            if !self.follow || growing.is_none() && self.is_over() {
                return Ok(None);
            }
            let news = async {
                match &mut growing {
                    // An error: it is written to its end.
                    Some(growing) => drop(growing.changed().await),
                    None => drop(position.changed().await),
                }
            };
            if self.core.closing.run_until_cancelled(news).await.is_none() {
                return Ok(None);
            }
        }
    }

    /// Who tells that there is more, while it is written.
    fn growing(&self) -> Option<watch::Receiver<()>> {
        let inner = self.core.tasks.lock();
        inner
            .live
            .get(&self.task)
            .filter(|(attempt, _)| *attempt == self.attempt)
            .map(|(_, grown)| grown.subscribe())
    }

    /// Whether the attempt was begun, or never will be.
    fn is_over(&self) -> bool {
        let projection = self.core.ledger.projection();
        let task = projection.tasks().get(&self.task);
        task.is_none_or(|task| task.state.is_ended() || task.last_attempt() >= self.attempt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::projection::Tasks;

    #[tokio::test]
    async fn what_is_written_is_kept_in_bounds_and_said_to_be_short() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::open(dir.path().join("tasks"), &Tasks::default()).unwrap();
        let which = Which { task: "1", attempt: 2, trace: None };
        let (sender, pieces) = mpsc::channel(PIECES);
        let grown = Arc::new(watch::Sender::new(()));
        let writer = tokio::spawn(write(Parts::new(&files, which), pieces, grown));
        let mut inlet = Inlet(sender);
        inlet.take(OutputStream::Stdout, b"on").await;
        inlet.take(OutputStream::Stderr, &vec![b'x'; MAX_KEPT_OUTPUT - 1]).await;
        inlet.take(OutputStream::Stdout, b"e").await;
        inlet.take(OutputStream::Stderr, b"yz").await;
        drop(inlet);
        let Written { kept, error } = writer.await.unwrap();
        let most = u64::try_from(MAX_KEPT_OUTPUT).unwrap();
        assert!(error.is_none(), "{error:?}");
        assert_eq!((kept.stdout_bytes, kept.stderr_bytes, kept.truncated), (3, most, true));
        assert_eq!(files.read("1", 2, OutputStream::Stdout, 0, CHUNK).unwrap(), b"one");
        assert_eq!(files.read("1", 2, OutputStream::Stderr, most - 2, CHUNK).unwrap(), b"xy");
        assert_eq!(files.kept("1", 2).map(|kept| kept.bytes()), Some(3 + most));
    }
}

//! What of tasks is on disk beside the log: what may be a secret, and what is too large for it.
//!
//! ```text
//!  StateDir/tasks/<id>.request      what is to be done, with arguments, environment and input; until the task has ended
//!  StateDir/tasks/<id>.digest       SHA-256 over that, of a task with a key; until the task is removed
//!  StateDir/tasks/<id>.<n>.stdout   what attempt n wrote to its standard output, as it came: its first MiB
//!  StateDir/tasks/<id>.<n>.stderr   the same of its standard error
//!  StateDir/tasks/<id>.<n>.end      what else came of attempt n, as JSON; of one whose end was seen
//! ```
//!
//! Every file is the owner's alone. The request is whole and lasting before the task is acknowledged, what an attempt wrote before
//! its end is told; of an attempt that is cut off there is what it wrote until then. What attempts wrote is kept of the newest
//! [`MAX_KEPT_ATTEMPTS`] of a task, until the task is removed. What belongs to no task goes when `arkd` starts: its creation was
//! never acknowledged, or its removal was cut off.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use ark_types::eval::EvalException;
use ark_types::task::{
    CreateTask, KeptOutput, MAX_KEPT_ATTEMPTS, MAX_KEPT_OUTPUT, MAX_SHOWN_OUTPUT, OutputStream, Task,
    TaskResult,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::cleanup::make_private_dir;
use crate::projection::Tasks;
use crate::snapshots::{remove_file, write_file};

const REQUEST: &str = "request";
const DIGEST: &str = "digest";
const STDOUT: &str = "stdout";
const STDERR: &str = "stderr";
const END: &str = "end";
/// What there may be of each attempt.
const OF_ATTEMPT: [&str; 3] = [STDOUT, STDERR, END];

/// What came of an attempt beside what it wrote.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    /// Exit code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) exit_code: Option<u8>,
    /// Value of code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) value: Option<String>,
    /// Exception of code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) exception: Option<EvalException>,
    /// Run time in the guest, microseconds; 0 of what did not end by itself.
    #[serde(default)]
    pub(super) duration_us: u64,
}

/// The directory. Its methods block.
#[derive(Clone, Debug)]
pub(super) struct Files(PathBuf);

/// SHA-256 over what a request says, as hexadecimal digits.
fn digest(request: &CreateTask) -> io::Result<String> {
    let hash = Sha256::digest(serde_json::to_vec(request)?);
    Ok(hash.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What a stream's file is called.
const fn word(stream: OutputStream) -> &'static str {
    match stream {
        OutputStream::Stdout => STDOUT,
        OutputStream::Stderr => STDERR,
    }
}

/// Whether the file called `name` belongs to one of `tasks` that still needs it.
fn is_needed(name: &str, tasks: &Tasks) -> bool {
    let mut parts = name.split('.');
    let Some(task) = parts.next().and_then(|id| tasks.get(id)) else { return false };
    match (parts.next(), parts.next(), parts.next()) {
        (Some(REQUEST), None, None) => !task.state.is_ended(),
        (Some(DIGEST), None, None) => true,
        (Some(attempt), Some(what), None) if OF_ATTEMPT.contains(&what) => {
            attempt.parse().is_ok_and(|attempt| is_kept(task, attempt))
        }
        _ => false,
    }
}

/// Whether what `attempt` of `task` wrote is kept.
pub(super) fn is_kept(task: &Task, attempt: u32) -> bool {
    task.last_attempt().checked_sub(attempt).is_some_and(|since| since < MAX_KEPT_ATTEMPTS)
}

impl Files {
    /// Those in `dir`, which is made where it is missing. Nothing of tasks that are not among `tasks`, and nothing that those no longer
    /// need, is left.
    pub(super) fn open(dir: PathBuf, tasks: &Tasks) -> io::Result<Self> {
        make_private_dir(&dir)?;
        for path in fs::read_dir(&dir)?.flatten().map(|entry| entry.path()) {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if !is_needed(name, tasks)
                && let Err(error) = fs::remove_file(&path)
            {
                tracing::warn!(path = %path.display(), %error, "a file of no task cannot be removed");
            }
        }
        Ok(Self(dir))
    }

    fn path(&self, id: &str, what: &str) -> PathBuf {
        self.0.join(format!("{id}.{what}"))
    }

    fn path_of(&self, id: &str, attempt: u32, what: &str) -> PathBuf {
        self.0.join(format!("{id}.{attempt}.{what}"))
    }

    /// Where what `attempt` of the task `id` writes to `stream` goes.
    pub(super) fn output(&self, id: &str, attempt: u32, stream: OutputStream) -> PathBuf {
        self.path_of(id, attempt, word(stream))
    }

    /// Keeps what the task `id` is to do, for good.
    pub(super) fn write_request(&self, id: &str, request: &CreateTask) -> io::Result<()> {
        if request.key.is_some() {
            write_file(&self.path(id, DIGEST), digest(request)?.as_bytes())?;
        }
        write_file(&self.path(id, REQUEST), &serde_json::to_vec(request)?)
    }

    /// What the task `id` is to do.
    pub(super) fn read_request(&self, id: &str) -> io::Result<CreateTask> {
        Ok(serde_json::from_slice(&fs::read(self.path(id, REQUEST))?)?)
    }

    /// Whether `request` is what the task `id` was asked for with.
    pub(super) fn is_of(&self, id: &str, request: &CreateTask) -> io::Result<bool> {
        Ok(fs::read_to_string(self.path(id, DIGEST))? == digest(request)?)
    }

    /// The task `id` has ended: what it was to do is not needed any more.
    pub(super) fn forget_request(&self, id: &str) -> io::Result<()> {
        remove_file(&self.path(id, REQUEST))
    }

    /// Removes everything of `task`.
    pub(super) fn remove(&self, task: &Task) -> io::Result<()> {
        let id = &task.spec.id;
        [REQUEST, DIGEST].iter().try_for_each(|what| remove_file(&self.path(id, what)))?;
        let last = task.last_attempt();
        (last.saturating_sub(MAX_KEPT_ATTEMPTS)..=last)
            .try_for_each(|attempt| self.remove_attempt(id, attempt))
    }

    fn remove_attempt(&self, id: &str, attempt: u32) -> io::Result<()> {
        OF_ATTEMPT.iter().try_for_each(|what| remove_file(&self.path_of(id, attempt, what)))
    }

    /// Keeps what came of `attempt` of the task `id`, for good; what it wrote is. The attempt that is one too many by that goes.
    pub(super) fn conclude(&self, id: &str, attempt: u32, head: &Head) -> io::Result<()> {
        write_file(&self.path_of(id, attempt, END), &serde_json::to_vec(head)?)?;
        attempt.checked_sub(MAX_KEPT_ATTEMPTS).map_or(Ok(()), |old| self.remove_attempt(id, old))
    }

    /// How much there is of what `attempt` of the task `id` wrote; none when it wrote nothing.
    pub(super) fn kept(&self, id: &str, attempt: u32) -> Option<KeptOutput> {
        let length = |stream| fs::metadata(self.output(id, attempt, stream)).map_or(0, |file| file.len());
        let (stdout_bytes, stderr_bytes) = (length(OutputStream::Stdout), length(OutputStream::Stderr));
        let most = u64::try_from(MAX_KEPT_OUTPUT).unwrap_or(u64::MAX);
        let truncated = stdout_bytes.max(stderr_bytes) >= most;
        let kept = KeptOutput { stdout_bytes, stderr_bytes, truncated };
        (kept.bytes() > 0).then_some(kept)
    }

    /// What `attempt` of the task `id` wrote to `stream`, `most` bytes of it after the first `from`; nothing at its end so far.
    pub(super) fn read(
        &self,
        id: &str,
        attempt: u32,
        stream: OutputStream,
        from: u64,
        most: u64,
    ) -> io::Result<Vec<u8>> {
        read_part(&self.output(id, attempt, stream), from, most)
    }

    /// What came of the last attempt of `task` whose output is kept, shortened.
    pub(super) fn result(&self, task: &Task) -> io::Result<Option<TaskResult>> {
        let Some((attempt, kept)) = task.outputs().next_back() else { return Ok(None) };
        let id = &task.spec.id;
        let head: Head = match fs::read(self.path_of(id, attempt, END)) {
            Ok(json) => serde_json::from_slice(&json)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Head::default(),
            Err(e) => return Err(e),
        };
        let most = u64::try_from(MAX_SHOWN_OUTPUT).unwrap_or(u64::MAX);
        let shown = |stream| {
            let bytes = self.read(id, attempt, stream, 0, most)?;
            Ok::<_, io::Error>(String::from_utf8_lossy(&bytes).into_owned())
        };
        Ok(Some(TaskResult {
            attempt,
            exit_code: head.exit_code,
            stdout: shown(OutputStream::Stdout)?,
            stderr: shown(OutputStream::Stderr)?,
            truncated: kept.truncated || kept.stdout_bytes.max(kept.stderr_bytes) > most,
            value: head.value,
            exception: head.exception,
            duration_us: head.duration_us,
        }))
    }
}

/// At most `most` bytes of the file at `path`, after its first `from`; nothing where there is none.
fn read_part(path: &Path, from: u64, most: u64) -> io::Result<Vec<u8>> {
    let mut file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        file => file?,
    };
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use ark_types::task::{TaskCommand, TaskState};
    use serde_json::json;

    use super::*;

    /// A task that has had so many attempts, the last of which has `kept` output.
    fn task(id: &str, state: TaskState, attempts: u32, kept: Option<KeptOutput>) -> Task {
        let end = kept.map(|kept| json!({ "outcome": "failed", "output": kept }));
        let attempts = match attempts {
            0 => vec![],
            number => vec![json!({ "number": number, "started_unix_ms": 1, "end": end })],
        };
        let json = json!({
            "id": id, "work": { "kind": "command", "program": "true" }, "created_unix_ms": 1, "state": state,
            "attempts": attempts,
        });
        serde_json::from_value(json).unwrap()
    }

    fn request(argument: &str) -> CreateTask {
        let command =
            TaskCommand { argv: vec!["true".to_owned(), argument.to_owned()], ..TaskCommand::default() };
        CreateTask { command: Some(command), key: Some("k".parse().unwrap()), ..CreateTask::default() }
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_a_task_is_to_do_is_its_owners_alone_and_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("tasks");
        let files = Files::open(place.clone(), &Tasks::default()).unwrap();
        files.write_request("1", &request("a")).unwrap();
        for entry in fs::read_dir(&place).unwrap() {
            assert_eq!(entry.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(files.read_request("1").unwrap(), request("a"));
        assert!(files.is_of("1", &request("a")).unwrap() && !files.is_of("1", &request("b")).unwrap());
        files.forget_request("1").unwrap();
        assert!(files.read_request("1").is_err() && files.is_of("1", &request("a")).unwrap());

        for id in ["2", "3", "4"] {
            files.write_request(id, &request(id)).unwrap();
            files.conclude(id, 1, &Head::default()).unwrap();
            fs::write(files.output(id, 17, OutputStream::Stderr), "x").unwrap();
        }
        fs::write(place.join("2.request.new"), "half").unwrap();
        fs::write(place.join("2.x.stdout"), "no attempt").unwrap();
        let tasks = [task("2", TaskState::Running, 17, None), task("3", TaskState::Succeeded, 17, None)];
        let files = Files::open(place.clone(), &tasks.iter().cloned().collect()).unwrap();
        let left = ["2.17.stderr", "2.digest", "2.request", "3.17.stderr", "3.digest"];
        assert_eq!(names(&place), left, "the 16 newest attempts are 2 to 17");
        tasks.iter().for_each(|task| files.remove(task).unwrap());
        assert_eq!(names(&place), Vec::<String>::new());
    }

    #[test]
    fn what_attempts_wrote_is_read_by_its_offset_and_shown_in_narrow_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("tasks");
        let files = Files::open(place.clone(), &Tasks::default()).unwrap();
        assert_eq!(files.kept("1", 3), None);
        assert_eq!(files.result(&task("1", TaskState::Running, 3, None)).unwrap(), None);
        assert_eq!(files.read("1", 3, OutputStream::Stdout, 0, 9).unwrap(), b"");

        let long = MAX_SHOWN_OUTPUT + 1;
        fs::write(files.output("1", 3, OutputStream::Stdout), b"out\n\xff").unwrap();
        fs::write(files.output("1", 3, OutputStream::Stderr), vec![b'x'; long]).unwrap();
        let kept = files.kept("1", 3).unwrap();
        assert_eq!((kept.stdout_bytes, kept.bytes(), kept.truncated), (5, 5 + long as u64, false));
        let task = task("1", TaskState::Failed, 3, Some(kept));
        let cut_off = files.result(&task).unwrap().unwrap();
        assert_eq!((cut_off.attempt, cut_off.exit_code, cut_off.stdout.as_str()), (3, None, "out\n\u{fffd}"));
        let head = Head { value: Some("4\n2".to_owned()), exit_code: Some(1), ..Head::default() };
        files.conclude("1", 3, &head).unwrap();
        let result = files.result(&task).unwrap().unwrap();
        assert_eq!((result.value.as_deref(), result.exit_code), (Some("4\n2"), Some(1)));
        assert_eq!((result.stderr.len(), result.truncated), (MAX_SHOWN_OUTPUT, true));
        let part = |from, most| files.read("1", 3, OutputStream::Stdout, from, most).unwrap();
        assert_eq!((part(1, 2), part(4, 9), part(9, 9)), (b"ut".to_vec(), b"\xff".to_vec(), vec![]));

        files.conclude("1", 3 + MAX_KEPT_ATTEMPTS, &Head::default()).unwrap();
        assert_eq!(names(&place), ["1.19.end"]);
    }
}

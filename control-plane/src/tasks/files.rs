//! What of tasks is on disk beside the log: what may be a secret, and what is too large for it.
//!
//! ```text
//!  StateDir/tasks/<id>.request   what is to be done, with arguments, environment and input; until the task has ended
//!  StateDir/tasks/<id>.digest    SHA-256 over that, of a task with a key; until the task is removed
//!  StateDir/tasks/<id>.output    what came of the last attempt: a line of JSON, then standard output, then standard error
//! ```
//!
//! Every file is the owner's alone, and whole and lasting when it is written. The request is there before the task is acknowledged.
//! What belongs to no task goes when `arkd` starts: its creation was never acknowledged, or its removal was cut off.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::path::PathBuf;

use ark_types::eval::EvalException;
use ark_types::task::{
    CreateTask, KeptOutput, MAX_KEPT_OUTPUT, MAX_SHOWN_OUTPUT, OutputStream, Task, TaskResult,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::cleanup::make_private_dir;
use crate::projection::Tasks;
use crate::snapshots::{remove_file, write_file};

const REQUEST: &str = "request";
const DIGEST: &str = "digest";
const OUTPUT: &str = "output";

/// Longest first line of an output that is read: values and exceptions have bounds far below.
const MAX_HEAD: u64 = 1 << 20;

/// What an attempt left behind.
#[derive(Clone, Debug, Default)]
pub(super) struct Output {
    /// What is told of it beside its streams.
    pub(super) head: Head,
    /// Standard output.
    pub(super) stdout: Vec<u8>,
    /// Standard error.
    pub(super) stderr: Vec<u8>,
}

/// What is told of an attempt beside its streams.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Head {
    /// Number of the attempt.
    pub(super) attempt: u32,
    /// Exit code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) exit_code: Option<u8>,
    /// Value of code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) value: Option<String>,
    /// Exception of code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) exception: Option<EvalException>,
    /// Run time in the guest, microseconds.
    pub(super) duration_us: u64,
    /// Whether there was more of either stream.
    pub(super) truncated: bool,
}

/// The first line of an output.
#[derive(Serialize, Deserialize)]
struct FirstLine {
    #[serde(flatten)]
    head: Head,
    /// Bytes of standard output.
    stdout: u64,
    /// Bytes of standard error.
    stderr: u64,
}

/// The directory. Its methods block.
#[derive(Clone, Debug)]
pub(super) struct Files(PathBuf);

/// SHA-256 over what a request says, as hexadecimal digits.
fn digest(request: &CreateTask) -> io::Result<String> {
    let hash = Sha256::digest(serde_json::to_vec(request)?);
    Ok(hash.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

impl Files {
    /// Those in `dir`, which is made where it is missing. Nothing of tasks that are not among `tasks`, and nothing that those no longer
    /// need, is left.
    pub(super) fn open(dir: PathBuf, tasks: &Tasks) -> io::Result<Self> {
        make_private_dir(&dir)?;
        for path in fs::read_dir(&dir)?.flatten().map(|entry| entry.path()) {
            let part = |part: Option<&std::ffi::OsStr>| {
                part.and_then(|part| part.to_str()).unwrap_or_default().to_owned()
            };
            let (id, what) = (part(path.file_stem()), part(path.extension()));
            let is_needed = tasks.get(&id).is_some_and(|task| match what.as_str() {
                REQUEST => !task.state.is_ended(),
                DIGEST | OUTPUT => true,
                _ => false,
            });
            if !is_needed && let Err(error) = fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "a file of no task cannot be removed");
            }
        }
        Ok(Self(dir))
    }

    fn path(&self, id: &str, what: &str) -> PathBuf {
        self.0.join(format!("{id}.{what}"))
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

    /// Removes everything of the task `id`.
    pub(super) fn remove(&self, id: &str) -> io::Result<()> {
        [REQUEST, DIGEST, OUTPUT].iter().try_for_each(|what| remove_file(&self.path(id, what)))
    }

    /// Keeps `output`, in bounds, in place of that of an earlier attempt; how much of it.
    pub(super) fn write_output(&self, id: &str, output: Output) -> io::Result<KeptOutput> {
        let Output { mut head, mut stdout, mut stderr } = output;
        for stream in [&mut stdout, &mut stderr] {
            head.truncated |= stream.len() > MAX_KEPT_OUTPUT;
            stream.truncate(MAX_KEPT_OUTPUT);
        }
        let truncated = head.truncated;
        let (stdout_bytes, stderr_bytes) = (length(&stdout), length(&stderr));
        let mut bytes = serde_json::to_vec(&FirstLine { head, stdout: stdout_bytes, stderr: stderr_bytes })?;
        bytes.push(b'\n');
        bytes.append(&mut stdout);
        bytes.append(&mut stderr);
        write_file(&self.path(id, OUTPUT), &bytes)?;
        Ok(KeptOutput { stdout_bytes, stderr_bytes, truncated })
    }

    /// What is kept of the task's last attempt; none when nothing is.
    fn read_output(&self, id: &str) -> io::Result<Option<Output>> {
        let mut reader = match File::open(self.path(id, OUTPUT)) {
            Ok(file) => BufReader::new(file),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let mut line = String::new();
        (&mut reader).take(MAX_HEAD).read_line(&mut line)?;
        let first: FirstLine = serde_json::from_str(&line)?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        (&mut reader).take(first.stdout).read_to_end(&mut stdout)?;
        reader.take(first.stderr).read_to_end(&mut stderr)?;
        Ok(Some(Output { head: first.head, stdout, stderr }))
    }

    /// What came of the task, shortened; none when nothing is kept.
    pub(super) fn result(&self, task: &Task) -> io::Result<Option<TaskResult>> {
        let Some(Output { head, stdout, stderr }) = self.read_output(&task.spec.id)? else { return Ok(None) };
        let truncated = head.truncated || stdout.len().max(stderr.len()) > MAX_SHOWN_OUTPUT;
        Ok(Some(TaskResult {
            attempt: head.attempt,
            exit_code: head.exit_code,
            stdout: shown(&stdout),
            stderr: shown(&stderr),
            truncated,
            value: head.value,
            exception: head.exception,
            duration_us: head.duration_us,
        }))
    }

    /// All that is kept of `stream`; nothing when nothing is.
    pub(super) fn log(&self, id: &str, stream: OutputStream) -> io::Result<Vec<u8>> {
        let output = self.read_output(id)?.unwrap_or_default();
        Ok(match stream {
            OutputStream::Stdout => output.stdout,
            OutputStream::Stderr => output.stderr,
        })
    }
}

fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.get(..MAX_SHOWN_OUTPUT).unwrap_or(bytes)).into_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use ark_types::task::{TaskCommand, TaskState};
    use serde_json::json;

    use super::*;

    fn task(id: &str, state: TaskState) -> Task {
        let json = json!({
            "id": id, "work": { "kind": "command", "program": "true" }, "created_unix_ms": 1, "state": state,
        });
        serde_json::from_value(json).unwrap()
    }

    fn request(argument: &str) -> CreateTask {
        let command =
            TaskCommand { argv: vec!["true".to_owned(), argument.to_owned()], ..TaskCommand::default() };
        CreateTask { command: Some(command), key: Some("k".parse().unwrap()), ..CreateTask::default() }
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
            files.write_output(id, Output::default()).unwrap();
        }
        fs::write(place.join("2.request.new"), "half").unwrap();
        let tasks = [task("2", TaskState::Running), task("3", TaskState::Succeeded)].into_iter().collect();
        let files = Files::open(place.clone(), &tasks).unwrap();
        let mut left: Vec<_> =
            fs::read_dir(&place).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        assert_eq!(left, ["2.digest", "2.output", "2.request", "3.digest", "3.output"]);
        files.remove("2").unwrap();
        files.remove("3").unwrap();
        assert_eq!(fs::read_dir(&place).unwrap().count(), 0);
    }

    #[test]
    fn output_is_kept_in_bounds_and_shown_in_narrower_ones() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::open(dir.path().join("tasks"), &Tasks::default()).unwrap();
        let task = task("1", TaskState::Succeeded);
        assert_eq!(
            (files.result(&task).unwrap(), files.log("1", OutputStream::Stdout).unwrap()),
            (None, vec![])
        );
        let head = Head { attempt: 3, value: Some("4\n2".to_owned()), ..Head::default() };
        let output = Output { head: head.clone(), stdout: b"out\n\xff".to_vec(), stderr: b"err".to_vec() };
        let kept = files.write_output("1", output).unwrap();
        assert_eq!((kept.stdout_bytes, kept.stderr_bytes, kept.truncated, kept.bytes()), (5, 3, false, 8));
        let result = files.result(&task).unwrap().unwrap();
        assert_eq!((result.attempt, result.value.as_deref(), result.truncated), (3, Some("4\n2"), false));
        assert_eq!((result.stdout.as_str(), result.stderr.as_str()), ("out\n\u{fffd}", "err"));

        let output =
            Output { head: head.clone(), stdout: vec![b'x'; MAX_SHOWN_OUTPUT + 1], stderr: Vec::new() };
        assert!(!files.write_output("1", output).unwrap().truncated, "all of it is kept");
        let result = files.result(&task).unwrap().unwrap();
        assert_eq!((result.stdout.len(), result.truncated), (MAX_SHOWN_OUTPUT, true));
        assert_eq!(files.log("1", OutputStream::Stdout).unwrap().len(), MAX_SHOWN_OUTPUT + 1);
        let output = Output { head, stdout: Vec::new(), stderr: vec![b'x'; MAX_KEPT_OUTPUT + 9] };
        assert_eq!(
            files.write_output("1", output).unwrap().stderr_bytes,
            u64::try_from(MAX_KEPT_OUTPUT).unwrap()
        );
        assert!(files.result(&task).unwrap().unwrap().truncated);
    }
}

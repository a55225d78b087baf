//! Evaluating code in an interpreter that stays.
//!
//! | file | what |
//! |---|---|
//! | [`interpreter`] | starts the evaluator of a language and holds the pipes to it |
//! | [`reply`] | what goes over the pipes |
//! | [`turn`] | one poll(2) loop per request: output out, time limit, interruption, end |
//!
//! There is one interpreter per language, started by the first request. It takes one request at a time; others wait for
//! their turn, or until their host has closed. One that has ended is not replaced in silence: a request has been told
//! before the next begins with a new one.

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ark_link::Connection;
use ark_types::eval::{EvalEnd, EvalRequest, Language, MAX_CODE, MAX_VALUE};
use ark_types::exec::ExitStatus;
use ark_types::guest::{ErrorCode, Frame, GuestError, Kind};

use crate::children::Children;
use crate::failure::{Failure, failure, system_failure};
use crate::poll::{entry, poll};

mod interpreter;
mod reply;
mod turn;

use interpreter::{Interpreter, Launch};
use reply::Task;
use turn::{Audience, Cause, Finished, Outcome, START_LIMIT, Turn};

/// Where images have the evaluator of Python.
const PYTHON_EVALUATOR: &str = "/usr/lib/ark/evaluator.py";
/// Between two looks at whether the host of a waiting request has closed.
const LOOK: Duration = Duration::from_millis(100);
/// How long reseeding may take, with the wait for an evaluation that is being interrupted.
const RESEED_LIMIT: Duration = Duration::from_secs(10);
/// Hexadecimal digits of the random bytes an evaluator shows.
const RANDOM_DIGITS: usize = 32;
const NEXT_IS_NEW: &str = "the next request begins with a new one";

/// The interpreters, by language.
#[derive(Debug)]
pub(crate) struct Evaluators(Vec<Slot>);

/// Place of one language's interpreter.
#[derive(Debug)]
struct Slot {
    launch: Launch,
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Whether somebody holds it.
    taken: bool,
    interpreter: Option<Interpreter>,
}

/// The turn to use a language's interpreter; what is in it when it ends stays for the next.
struct Held<'a> {
    slot: &'a Slot,
    interpreter: Option<Interpreter>,
}

impl Evaluators {
    /// No interpreter runs yet. `python` is another file than the image's own.
    pub(crate) fn new(python: Option<PathBuf>) -> Self {
        let script = python.unwrap_or_else(|| PathBuf::from(PYTHON_EVALUATOR));
        let launches = [Launch { language: Language::Python, program: "python3", script }];
        Self(launches.into_iter().map(Slot::new).collect())
    }

    fn slot(&self, language: Language) -> Result<&Slot, GuestError> {
        let slot = self.0.iter().find(|slot| slot.launch.language == language);
        slot.ok_or_else(|| {
            failure(ErrorCode::NoEvaluator, format!("this guestd knows no evaluator for {language:?}"))
        })
    }

    /// Has every interpreter that runs reseed its generators, with `seed` (hexadecimal digits) among what goes into them, and
    /// returns random digits that the first then gave.
    ///
    /// # Errors
    /// When one could not: it has been ended, for its random numbers would be its parent's.
    pub(crate) fn reseed(&self, seed: &str) -> Result<Option<String>, GuestError> {
        let end = Instant::now() + RESEED_LIMIT;
        let mut random = None;
        for slot in &self.0 {
            let drawn = slot.reseed(seed, end)?;
            random = random.or(drawn);
        }
        Ok(random)
    }
}

impl Slot {
    fn new(launch: Launch) -> Self {
        Self { launch, state: Mutex::default(), freed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a turn, until `given_up` says that nobody wants it any more.
    fn take(&self, mut given_up: impl FnMut() -> bool) -> Option<Held<'_>> {
        let mut state = self.lock();
        while state.taken {
            if given_up() {
                return None;
            }
            state = self.freed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.taken = true;
        Some(Held { slot: self, interpreter: state.interpreter.take() })
    }

    fn reseed(&self, seed: &str, end: Instant) -> Result<Option<String>, GuestError> {
        let language = self.launch.language;
        let failed = |why: &str| {
            let message = format!("the generators of the {language:?} interpreter were not reseeded: {why}");
            failure(ErrorCode::Internal, message)
        };
        let mut held =
            self.take(|| Instant::now() >= end).ok_or_else(|| failed("an evaluation did not end"))?;
        // One that has ended stays until a request has been told.
        if held.interpreter.as_ref().is_none_or(|i| i.child.try_wait().is_some()) {
            return Ok(None);
        }
        let Some(mut interpreter) = held.interpreter.take() else { return Ok(None) };
        let left = end.saturating_duration_since(Instant::now());
        let task = Task::Seed { seed };
        let finished = Turn::new(&mut interpreter, Audience::Guestd, &task, Some(left)).and_then(Turn::run);
        let finished = finished.map_err(|e| system_failure("the interpreter could not be waited for", &e))?;
        let reply = match finished {
            Finished { outcome: Outcome::Reply(reply), .. } => reply,
            Finished { cause: Some(Cause::Deadline), .. } => return Err(failed("it did not answer in time")),
            Finished { outcome: Outcome::Ended(status), .. } => {
                return Err(failed(&format!("it {}", told(status))));
            }
        };
        let digits = |d: &String| d.len() == RANDOM_DIGITS && d.bytes().all(|b| b.is_ascii_hexdigit());
        match reply.random.filter(digits) {
            Some(random) => {
                held.interpreter = Some(interpreter);
                Ok(Some(random.to_ascii_lowercase()))
            }
            None => Err(failed(reply.error.as_deref().unwrap_or("its answer is no answer"))),
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut state = self.slot.lock();
        state.taken = false;
        state.interpreter = self.interpreter.take();
        self.slot.freed.notify_one();
    }
}

/// Serves one `Eval` operation to its end.
pub(crate) fn serve(
    connection: &mut Connection,
    request: &EvalRequest,
    evaluators: &Evaluators,
    children: &'static Children,
) -> Result<(), Failure> {
    if request.code.len() > MAX_CODE || request.code.contains('\0') {
        let message = format!("the code is longer than {MAX_CODE} bytes or has a NUL character in it");
        return Err(failure(ErrorCode::BadRequest, message).into());
    }
    let slot = evaluators.slot(request.language)?;
    let mut held = slot.take(|| gone(connection)).ok_or_else(reset)?;
    // Whoever closed while it waited wants nothing evaluated any more.
    let end =
        if gone(connection) { Err(reset()) } else { evaluate(connection, request, &mut held, children) };
    // The next may begin while this host reads.
    drop(held);
    let end = end?;
    let link = |e: io::Error| Failure::Link(e.into());
    connection.stream().set_nonblocking(false).map_err(link)?;
    Ok(connection.send(&Frame::json(Kind::Evaluated, &end)?)?)
}

fn evaluate(
    connection: &mut Connection,
    request: &EvalRequest,
    held: &mut Held<'_>,
    children: &'static Children,
) -> Result<EvalEnd, Failure> {
    let mut interpreter = match held.interpreter.take() {
        None => Interpreter::start(&held.slot.launch, children)?,
        Some(interpreter) => match interpreter.child.try_wait() {
            None => interpreter,
            Some(status) => return Err(ended_before(&interpreter, status).into()),
        },
    };
    connection.stream().set_nonblocking(true).map_err(|e| Failure::Link(e.into()))?;
    let task = Task::Code { code: &request.code, limit: MAX_VALUE };
    let limit = request.timeout_ms.map(Duration::from_millis);
    let finished = Turn::new(&mut interpreter, Audience::Host(connection), &task, limit).and_then(Turn::run);
    let finished = finished.map_err(|e| system_failure("the interpreter could not be waited for", &e))?;
    match finished.outcome {
        Outcome::Reply(reply) => {
            held.interpreter = Some(interpreter);
            match finished.cause {
                Some(Cause::HostGone) => Err(reset()),
                Some(_) => {
                    let message = format!(
                        "the code ran longer than {} ms and was interrupted; what it had bound by then stays",
                        request.timeout_ms.unwrap_or_default()
                    );
                    Err(failure(ErrorCode::DeadlinePassed, message).into())
                }
                None => {
                    let duration_us = u64::try_from(finished.duration.as_micros()).unwrap_or(u64::MAX);
                    Ok(EvalEnd { value: reply.value, exception: reply.exception, duration_us })
                }
            }
        }
        Outcome::Ended(status) => {
            if finished.cause == Some(Cause::HostGone) && interpreter.ready {
                // The next request is told what this host cannot be.
                interpreter.untold = true;
                held.interpreter = Some(interpreter);
            }
            Err(ended(status, finished.cause, request.timeout_ms.unwrap_or_default()))
        }
    }
}

/// What the host is told of an interpreter that has ended before its request came.
fn ended_before(interpreter: &Interpreter, status: ExitStatus) -> GuestError {
    let (code, how) = if interpreter.untold {
        let how = "did not let itself be interrupted when the host closed its last request, and was ended";
        (ErrorCode::Internal, how.to_owned())
    } else {
        (ended_code(status), format!("{} after its last request", told(status)))
    };
    failure(code, format!("the interpreter {how}; what it had bound is gone, and {NEXT_IS_NEW}"))
}

/// What the host is told of an interpreter that ended during its request.
fn ended(status: ExitStatus, cause: Option<Cause>, limit_ms: u64) -> Failure {
    let (code, message) = match cause {
        Some(Cause::HostGone) => return reset(),
        Some(Cause::Start) => {
            let seconds = START_LIMIT.as_secs();
            (
                ErrorCode::DeadlinePassed,
                format!("the interpreter did not start within {seconds} s and was ended"),
            )
        }
        Some(Cause::Deadline) => (
            ErrorCode::DeadlinePassed,
            format!(
                "the code ran longer than {limit_ms} ms, did not end when it was interrupted, and was ended with its interpreter"
            ),
        ),
        Some(Cause::Broken) => {
            (ErrorCode::Internal, "the code took the pipes from its interpreter, which was ended".to_owned())
        }
        None => (ended_code(status), format!("the interpreter {} while it evaluated the code", told(status))),
    };
    failure(code, format!("{message}; {NEXT_IS_NEW}")).into()
}

/// SIGKILL from nobody here is the kernel's, for want of memory.
fn ended_code(status: ExitStatus) -> ErrorCode {
    match status {
        ExitStatus::Signaled { signal } if i32::from(signal) == libc::SIGKILL => ErrorCode::Exhausted,
        _ => ErrorCode::Internal,
    }
}

/// How a process ended, in words.
fn told(status: ExitStatus) -> String {
    match status {
        ExitStatus::Exited { code } => format!("ended itself with exit code {code}"),
        ExitStatus::Signaled { signal } if i32::from(signal) == libc::SIGKILL => {
            "was killed (signal 9), most likely because memory ran out,".to_owned()
        }
        ExitStatus::Signaled { signal } => format!("was ended by signal {signal}"),
        ExitStatus::TimedOut => "was ended".to_owned(),
    }
}

fn reset() -> Failure {
    Failure::Link(io::Error::from(io::ErrorKind::ConnectionReset).into())
}

/// Whether the host has closed.
fn gone(connection: &Connection) -> bool {
    let mut fds = [entry(Some(connection.stream().as_fd()), libc::POLLRDHUP)];
    poll(&mut fds, Some(Instant::now())).is_ok() && fds.iter().any(|fd| fd.revents != 0)
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::path::Path;

    use ark_link::Stream;

    use super::*;

    /// Evaluates `code` in the interpreter that images have.
    fn eval(evaluators: &Evaluators, children: &'static Children, code: &str) -> EvalEnd {
        let (a, b) = UnixStream::pair().unwrap();
        let [mut guest, mut host] = [a, b].map(|s| Connection::new(Stream::from(OwnedFd::from(s))));
        let request = EvalRequest { code: code.to_owned(), ..EvalRequest::default() };
        serve(&mut guest, &request, evaluators, children).unwrap();
        host.recv().unwrap().unwrap().parse().unwrap()
    }

    #[test]
    fn reseeding_gives_an_interpreter_random_numbers_of_its_own_or_ends_it() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest-images/python/evaluator.py");
        let (evaluators, children) = (Evaluators::new(Some(file)), &*Box::leak(Box::default()));
        let seed = "5a".repeat(32);
        assert_eq!(evaluators.reseed(&seed).unwrap(), None, "none runs");
        let draw = "import random, ssl\nrandom.random()";
        let mut seen = Vec::new();
        for _ in 0..2 {
            eval(&evaluators, children, "import random\nrandom.seed(1)\nkept = 1");
            seen.extend([evaluators.reseed(&seed).unwrap(), eval(&evaluators, children, draw).value]);
        }
        eval(&evaluators, children, "random.seed(1)");
        seen.push(eval(&evaluators, children, draw).value);
        assert!(seen.iter().all(Option::is_some));
        for (at, one) in seen.iter().enumerate() {
            assert!(!seen.iter().skip(at + 1).any(|other| other == one), "{seen:?}");
        }
        let names = "tempfile._get_candidate_names()";
        eval(&evaluators, children, &format!("import tempfile\nnames = {names}"));
        evaluators.reseed(&seed).unwrap();
        let same = eval(&evaluators, children, &format!("{names} is names"));
        assert_eq!(same.value.as_deref(), Some("False"), "names of temporary files are drawn anew");
        let broken = "import sys\nclass Broken:\n    def seed(self, _): raise OSError('no seed')\n\
                      sys.modules['numpy.random'] = Broken()\nkept";
        assert_eq!(eval(&evaluators, children, broken).value.as_deref(), Some("1"));
        let error = evaluators.reseed(&seed).unwrap_err();
        assert!(error.message.contains("no seed"), "{}", error.message);
        let gone = eval(&evaluators, children, "kept").exception.unwrap();
        assert_eq!(gone.kind, "NameError");
        eval(&evaluators, children, "import os, threading\nthreading.Timer(0.1, os._exit, [1]).start()");
        std::thread::sleep(Duration::from_millis(600));
        assert_eq!(evaluators.reseed(&seed).unwrap(), None, "what has ended has no generators");
    }
}

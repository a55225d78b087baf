//! An evaluator's process and the pipes to it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use ark_types::eval::Language;
use ark_types::exec::ExecRequest;
use ark_types::guest::{ErrorCode, GuestError};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;

use crate::children::{Child, Children};
use crate::exec::plan::Plan;
use crate::exec::spawn::{ChildStdio, spawn};
use crate::failure::{failure, system_failure};

/// How the evaluator of a language is started: `PROGRAM SCRIPT REQUESTS REPLIES`, the last two being descriptors.
#[derive(Debug)]
pub(crate) struct Launch {
    /// What it evaluates.
    pub(crate) language: Language,
    /// Interpreter, looked for in the default `PATH`.
    pub(crate) program: &'static str,
    /// The evaluator itself.
    pub(crate) script: PathBuf,
}

/// A running evaluator.
#[derive(Debug)]
pub(super) struct Interpreter {
    pub(super) child: Child<'static>,
    /// Where requests are written to.
    pub(super) requests: OwnedFd,
    /// Where replies come from.
    pub(super) replies: OwnedFd,
    /// Standard output and standard error of the code; none once nobody has them open for writing.
    pub(super) outputs: [Option<OwnedFd>; 2],
    /// Part of a reply that has come.
    pub(super) line: Vec<u8>,
    /// Number of the last request; 0 was the start.
    pub(super) last: u64,
    /// Whether it has said that it takes requests.
    pub(super) ready: bool,
    /// Whether guestd has ended it for a host that closed, which therefore was not told.
    pub(super) untold: bool,
}

impl Interpreter {
    /// Starts one, as exec starts programs for root.
    pub(super) fn start(launch: &Launch, children: &'static Children) -> Result<Self, GuestError> {
        let Launch { language, program, script } = launch;
        let missing = |what: &str| {
            let message = format!(
                "this image has no evaluator for {language:?}: there is no {what}; create the agent from an image that has one"
            );
            failure(ErrorCode::NoEvaluator, message)
        };
        if !script.is_file() {
            return Err(missing(&script.display().to_string()));
        }
        let pipes =
            Pipes::new().map_err(|e| system_failure("the evaluator's pipes could not be made", &e))?;
        let [stdout, stderr, replies, requests] = pipes.theirs;
        let number = |fd: &OwnedFd| fd.as_raw_fd().to_string();
        let argv =
            vec![(*program).to_owned(), script.display().to_string(), number(&requests), number(&replies)];
        let plan = Plan::new(ExecRequest { argv, ..ExecRequest::default() }, Path::new("/"))?;
        let stdio = ChildStdio {
            fds: [pipes.null.as_fd(), stdout.as_fd(), stderr.as_fd()],
            kept: &[requests.as_fd(), replies.as_fd()],
            terminal: false,
        };
        let child = spawn(children, &plan, &stdio).map_err(|e| match e.code {
            ErrorCode::ProgramNotFound => missing(&format!("{program} in the PATH")),
            _ => e,
        })?;
        let [stdout, stderr, replies, requests] = pipes.ours;
        Ok(Self {
            child,
            requests,
            replies,
            outputs: [Some(stdout), Some(stderr)],
            line: Vec::new(),
            last: 0,
            ready: false,
            untold: false,
        })
    }
}

/// Both ends of an evaluator's pipes: standard output, standard error, replies, requests.
struct Pipes {
    /// guestd's ends, non-blocking.
    ours: [OwnedFd; 4],
    theirs: [OwnedFd; 4],
    /// What the code reads from.
    null: OwnedFd,
}

impl Pipes {
    fn new() -> io::Result<Self> {
        let null = OwnedFd::from(File::open("/dev/null")?);
        let (stdout, out_write) = pipe2(OFlag::O_CLOEXEC)?;
        let (stderr, err_write) = pipe2(OFlag::O_CLOEXEC)?;
        let (replies, replies_write) = pipe2(OFlag::O_CLOEXEC)?;
        let (requests_read, requests) = pipe2(OFlag::O_CLOEXEC)?;
        let ours = [stdout, stderr, replies, requests];
        for fd in &ours {
            fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        Ok(Self { ours, theirs: [out_write, err_write, replies_write, requests_read], null })
    }
}

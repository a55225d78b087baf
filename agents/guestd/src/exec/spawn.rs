//! Starting a program without copying guestd.
//!
//! The child is made with `CLONE_VM | CLONE_VFORK`, as posix_spawn(3) does it: it runs on a small stack of its own in
//! guestd's memory while the calling thread waits, prepares itself (session, terminal, descriptors, user, directory) and
//! becomes the program. No page table is copied, and what went wrong comes back through memory: no pipe is needed.
//! posix_spawn itself can set neither a controlling terminal nor a user. Until execve the child may only make system
//! calls: no allocation, no locks, no panics. Users are set with raw system calls, as the C library's wrappers would
//! change every thread of guestd.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use ark_types::guest::{ErrorCode, GuestError};
use nix::errno::Errno;

use super::plan::Plan;
use crate::children::{Child, Children};
use crate::failure::{failure, system_failure};

/// Stack of the child until execve; the calls below take well under 4 KiB in a debug build.
const STACK: usize = 32 << 10;

/// Descriptors a program starts with.
pub(crate) struct ChildStdio<'a> {
    /// Descriptors that become 0, 1 and 2.
    pub(crate) fds: [BorrowedFd<'a>; 3],
    /// Descriptors above 2 that it keeps, under their numbers.
    pub(crate) kept: &'a [BorrowedFd<'a>],
    /// Whether descriptor 0 becomes the controlling terminal.
    pub(crate) terminal: bool,
}

/// What the child was doing when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Session,
    Terminal,
    Descriptors,
    User,
    Directory,
    Program,
}

/// Everything the child needs, and where it leaves its error. Pointers are to data that outlives the clone call.
struct Orders {
    programs: Vec<*const c_char>,
    argv: Vec<*const c_char>,
    env: Vec<*const c_char>,
    dirs: Vec<*const c_char>,
    /// User, group and supplementary groups to take on.
    ids: Option<(u32, u32, Vec<u32>)>,
    fds: [RawFd; 3],
    kept: Vec<RawFd>,
    terminal: bool,
    failed: Option<(Step, Errno)>,
}

/// Pointers to `strings`.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|s| s.as_ptr()).collect()
}

/// The same with the null at the end that execve(2) wants.
fn null_ended(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
}

/// Starts the program of `plan` with `stdio`.
///
/// # Errors
/// What the child could not do, as the host is to be told it.
pub(crate) fn spawn<'a>(
    children: &'a Children,
    plan: &Plan,
    stdio: &ChildStdio<'_>,
) -> Result<Child<'a>, GuestError> {
    let mut orders = Orders {
        programs: pointers(&plan.programs),
        argv: null_ended(&plan.argv),
        env: null_ended(&plan.env),
        dirs: pointers(&plan.dirs),
        ids: plan.user.as_ref().map(|u| (u.uid, u.gid, u.groups.clone())),
        fds: stdio.fds.map(|fd| fd.as_raw_fd()),
        kept: stdio.kept.iter().map(AsRawFd::as_raw_fd).collect(),
        terminal: stdio.terminal,
        failed: None,
    };
    let mut stack: Vec<u128> = Vec::with_capacity(STACK / size_of::<u128>());
    // SAFETY: the end of an allocation may be pointed to; stacks grow down from there. u128 gives the ABI's 16 bytes.
    let top: *mut c_void = unsafe { stack.as_mut_ptr().add(stack.capacity()) }.cast();
    let mut pidfd: c_int = -1;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    let spawning = children.spawning();
    // SAFETY: `become_program` gets `orders` and runs on `stack`; both outlive the child's use of them, because
    // CLONE_VFORK holds this thread until the child has left for execve or its end. `pidfd` is writable.
    let pid = unsafe { libc::clone(become_program, top, flags, (&raw mut orders).cast(), &raw mut pidfd) };
    let pid = Errno::result(pid).map_err(|e| system_failure("no process could be made", &e.into()))?;
    // SAFETY: clone has made this descriptor, close-on-exec, and nothing else owns it.
    let child = spawning.register(pid, unsafe { OwnedFd::from_raw_fd(pidfd) });
    // SAFETY: the child wrote through a pointer the compiler has lost sight of; a volatile read takes what is there.
    match unsafe { (&raw const orders.failed).read_volatile() } {
        None => Ok(child),
        Some((step, error)) => Err(explain(plan, step, error)),
    }
}

/// The child. Returns (and so exits) only on failure.
extern "C" fn become_program(orders: *mut c_void) -> c_int {
    // SAFETY: `spawn` passes its Orders and waits until this is over.
    let orders = unsafe { &mut *orders.cast::<Orders>() };
    let Err(failed) = follow(orders);
    orders.failed = Some(failed);
    127
}

/// Does what `orders` say, in the order the kernel needs it.
fn follow(orders: &Orders) -> Result<std::convert::Infallible, (Step, Errno)> {
    let at = |step: Step| move |e: Errno| (step, e);
    // SAFETY: no memory effects. A new session is a new process group too, and has no terminal yet.
    Errno::result(unsafe { libc::setsid() }).map_err(at(Step::Session))?;
    for (&from, to) in orders.fds.iter().zip(0..) {
        // SAFETY: no memory effects. guestd's own 0, 1 and 2 are always open, so `from` is above them, and the copy is
        // not close-on-exec.
        Errno::result(unsafe { libc::dup2(from, to) }).map_err(at(Step::Descriptors))?;
    }
    for &fd in &orders.kept {
        // SAFETY: no memory effects. The child has a descriptor table of its own: guestd's stays close-on-exec.
        Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }).map_err(at(Step::Descriptors))?;
    }
    if orders.terminal {
        // SAFETY: takes no pointer.
        Errno::result(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) }).map_err(at(Step::Terminal))?;
    }
    reset_signals();
    if let Some((uid, gid, groups)) = &orders.ids {
        // SAFETY: the pointer is to as many group ids as said.
        let done = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
        Errno::result(done).map_err(at(Step::User))?;
        // SAFETY: no memory effects.
        Errno::result(unsafe { libc::syscall(libc::SYS_setresgid, *gid, *gid, *gid) })
            .map_err(at(Step::User))?;
        // SAFETY: no memory effects.
        Errno::result(unsafe { libc::syscall(libc::SYS_setresuid, *uid, *uid, *uid) })
            .map_err(at(Step::User))?;
    }
    enter(&orders.dirs).map_err(at(Step::Directory))?;
    Err((Step::Program, execute(orders)))
}

/// Undoes what Rust's start-up and [`crate::children::block_sigchld`] did to signals: programs expect none of it.
fn reset_signals() {
    // SAFETY: SIG_DFL is a valid disposition for SIGPIPE; the child has its own table.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    // SAFETY: sigset_t is plain old data, for which all zeros is the empty set on Linux.
    let none: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `none` is initialised; the old mask is not asked for.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()) };
}

/// Enters the first of `dirs` that can be entered.
fn enter(dirs: &[*const c_char]) -> Result<(), Errno> {
    let mut error = Errno::ENOENT;
    for &dir in dirs {
        // SAFETY: `dir` is a C string that `spawn` keeps alive.
        match Errno::result(unsafe { libc::chdir(dir) }) {
            Ok(_) => return Ok(()),
            Err(e) => error = e,
        }
    }
    Err(error)
}

/// Becomes the first program that is there; like execvp(3), one that may not be run is remembered and the search goes on.
fn execute(orders: &Orders) -> Errno {
    let mut error = Errno::ENOENT;
    for &program in &orders.programs {
        // SAFETY: all are C strings, and the lists end with null; `spawn` keeps them alive.
        unsafe { libc::execve(program, orders.argv.as_ptr(), orders.env.as_ptr()) };
        match Errno::last() {
            Errno::ENOENT | Errno::ENOTDIR => {}
            Errno::EACCES => error = Errno::EACCES,
            other => return other,
        }
    }
    error
}

/// The child's error as a sentence for the host.
fn explain(plan: &Plan, step: Step, error: Errno) -> GuestError {
    let name = &plan.name;
    let why = error.desc();
    match step {
        Step::Program => explain_program(plan, error),
        Step::Directory => {
            let dir = plan.dirs.first().map_or(c"/", CString::as_c_str).to_string_lossy().into_owned();
            let message = format!("the working directory {dir:?} cannot be entered: {why}");
            failure(ErrorCode::BadWorkingDirectory, message)
        }
        Step::User => {
            failure(ErrorCode::UnknownUser, format!("{name:?} could not be run as the wanted user: {why}"))
        }
        Step::Session | Step::Terminal | Step::Descriptors => {
            system_failure(&format!("{name:?} could not be prepared"), &io::Error::from(error))
        }
    }
}

fn explain_program(plan: &Plan, error: Errno) -> GuestError {
    let name = &plan.name;
    let exists =
        |p: &CStr| p.to_bytes().starts_with(b"/") && p.to_str().is_ok_and(|p| std::fs::metadata(p).is_ok());
    match error {
        Errno::ENOENT if plan.programs.iter().any(|p| exists(p)) => failure(
            ErrorCode::ProgramNotExecutable,
            format!(
                "{name:?} is there, but the interpreter or loader it names is not; install that in the image"
            ),
        ),
        Errno::ENOENT | Errno::ENOTDIR => {
            let place = if name.contains('/') { "" } else { " in the PATH" };
            failure(ErrorCode::ProgramNotFound, format!("there is no program {name:?}{place} in the agent"))
        }
        Errno::E2BIG => {
            failure(ErrorCode::BadRequest, "arguments and environment are too long for the kernel")
        }
        Errno::ENOMEM | Errno::EAGAIN | Errno::ENFILE | Errno::EMFILE => {
            system_failure(&format!("{name:?} could not be run"), &io::Error::from(error))
        }
        Errno::EACCES => failure(
            ErrorCode::ProgramNotExecutable,
            format!(
                "{name:?} may not be run: it is a directory, or its execute permission is missing (chmod +x)"
            ),
        ),
        Errno::ENOEXEC => failure(
            ErrorCode::ProgramNotExecutable,
            format!("{name:?} is no program the kernel knows; a script needs a first line like #!/bin/sh"),
        ),
        other => {
            failure(ErrorCode::ProgramNotExecutable, format!("{name:?} cannot be run: {}", other.desc()))
        }
    }
}

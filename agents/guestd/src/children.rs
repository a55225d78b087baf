//! Child processes: who waits for which, without races.
//!
//! Programs that run on request are *registered*; their exec waits for them by pidfd. PID 1 also inherits every orphan,
//! and the reaper collects those. Both use wait(2), so this decides who may:
//!
//! - A spawner holds [`Children::spawning`] (shared) from before clone(2) until the child is registered. The reaper takes
//!   the same lock exclusively, so it never meets a child that is not registered yet.
//! - The reaper may collect a registered child, too: it leaves the status in the table. The exec, woken by its pidfd,
//!   finds it there, or collects it itself when it is first.
//! - Signals to a registered child's process group are sent under the table's lock and only while nobody has collected
//!   the child, so that its number cannot belong to somebody else.

use std::collections::HashMap;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use ark_types::exec::ExitStatus;
use libc::{c_int, pid_t};

/// Every child that somebody waits for.
#[derive(Debug, Default)]
pub(crate) struct Children {
    gate: RwLock<()>,
    table: Mutex<HashMap<pid_t, Option<ExitStatus>>>,
}

/// Proof that the reaper stands still.
pub(crate) struct Spawning<'a> {
    children: &'a Children,
    _gate: RwLockReadGuard<'a, ()>,
}

impl<'a> Spawning<'a> {
    /// Takes the child `pid`, made under this guard, into the table. `pidfd` refers to it.
    pub(crate) fn register(self, pid: pid_t, pidfd: OwnedFd) -> Child<'a> {
        self.children.lock().insert(pid, None);
        Child { children: self.children, pid, pidfd }
    }
}

impl Children {
    fn lock(&self) -> MutexGuard<'_, HashMap<pid_t, Option<ExitStatus>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the reaper away while a child is made.
    pub(crate) fn spawning(&self) -> Spawning<'_> {
        let gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        Spawning { children: self, _gate: gate }
    }

    /// Collects every process that ends, for ever. SIGCHLD must be blocked in every thread ([`block_sigchld`]).
    pub(crate) fn reap(&self) -> ! {
        let signals = sigchld();
        loop {
            while self.reap_one() {}
            let mut signal = 0;
            // SAFETY: both pointers refer to live locals of the right types.
            unsafe { libc::sigwait(&raw const signals, &raw mut signal) };
        }
    }

    /// Collects one ended process; whether there was one.
    fn reap_one(&self) -> bool {
        let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let mut table = self.lock();
        let Some((pid, status)) = collect(libc::P_ALL, 0) else { return false };
        if let Some(slot) = table.get_mut(&pid) {
            *slot = Some(status);
        }
        true
    }
}

/// A registered child. Dropped before it has ended, it takes its process group with it.
#[derive(Debug)]
pub(crate) struct Child<'a> {
    children: &'a Children,
    pid: pid_t,
    pidfd: OwnedFd,
}

impl Child<'_> {
    /// Its process id, which is also the id of its process group and session.
    pub(crate) const fn pid(&self) -> pid_t {
        self.pid
    }

    /// Readable once the process has ended.
    pub(crate) const fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// How it ended, if it has. Says so again however often it is asked.
    pub(crate) fn try_wait(&self) -> Option<ExitStatus> {
        let mut table = self.children.lock();
        let slot = table.get_mut(&self.pid)?;
        if slot.is_none() {
            let id = libc::id_t::try_from(self.pidfd.as_raw_fd()).unwrap_or_default();
            *slot = collect(libc::P_PIDFD, id).map(|(_, status)| status);
        }
        *slot
    }

    /// Sends `signal` to its process group, unless the child has been collected.
    pub(crate) fn signal_group(&self, signal: c_int) {
        let table = self.children.lock();
        if table.get(&self.pid) == Some(&None) {
            kill_group(self.pid, signal);
        }
    }

    /// Sends `signal` to the process alone.
    pub(crate) fn signal(&self, signal: c_int) {
        let info = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: without a siginfo, pidfd_send_signal reads no memory. Its only error here is that the process has ended.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.pidfd.as_raw_fd(), signal, info, 0) };
    }

    /// Kills what the child, collected already, left behind in its process group. A group's number stays taken while it
    /// has members; without members the number is not given out again before the whole range has been used up.
    pub(crate) fn kill_left_behind(&self) {
        kill_group(self.pid, libc::SIGKILL);
    }
}

impl Drop for Child<'_> {
    fn drop(&mut self) {
        while self.try_wait().is_none() {
            self.signal_group(libc::SIGKILL);
            let mut fd = libc::pollfd { fd: self.pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: `fd` is one valid pollfd. An early return is met by the loop.
            unsafe { libc::poll(&raw mut fd, 1, -1) };
        }
        self.children.lock().remove(&self.pid);
    }
}

fn kill_group(pid: pid_t, signal: c_int) {
    if pid > 1 {
        // SAFETY: kill has no memory effects. The only error is that nobody is left, which is what was wanted.
        unsafe { libc::kill(-pid, signal) };
    }
}

/// Collects an ended child that `kind` and `id` select (waitid(2)), without waiting.
fn collect(kind: libc::idtype_t, id: libc::id_t) -> Option<(pid_t, ExitStatus)> {
    // SAFETY: siginfo_t is plain old data, for which all zeros is a valid value.
    let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
    // SAFETY: `info` is writable.
    if unsafe { libc::waitid(kind, id, &raw mut info, libc::WEXITED | libc::WNOHANG) } != 0 {
        return None;
    }
    // SAFETY: waitid fills these fields, or leaves the zeros when nothing has ended.
    let pid = unsafe { info.si_pid() };
    // SAFETY: as above.
    let value = u8::try_from(unsafe { info.si_status() }).unwrap_or(u8::MAX);
    let status = if info.si_code == libc::CLD_EXITED {
        ExitStatus::Exited { code: value }
    } else {
        ExitStatus::Signaled { signal: value }
    };
    (pid != 0).then_some((pid, status))
}

fn sigchld() -> libc::sigset_t {
    // SAFETY: sigset_t is plain old data, for which all zeros is a valid value.
    let mut set: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: `set` is writable.
    unsafe { libc::sigemptyset(&raw mut set) };
    // SAFETY: `set` is initialised.
    unsafe { libc::sigaddset(&raw mut set, libc::SIGCHLD) };
    set
}

/// Blocks SIGCHLD in this thread and those it starts, so that only [`Children::reap`] takes it.
pub(crate) fn block_sigchld() {
    let set = sigchld();
    // SAFETY: `set` is initialised; the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
}

/// Stops ignoring what this process was started to ignore (nohup(1) and shells do that): programs would inherit it. SIGPIPE
/// stays as Rust set it; spawning resets it.
pub(crate) fn default_signals() {
    for signal in (1..=libc::SIGRTMAX()).filter(|&s| s != libc::SIGPIPE) {
        // SAFETY: SIG_DFL is a valid disposition; signals that have none to set answer with an error, which is fine.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

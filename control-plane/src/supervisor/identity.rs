//! Which process it is: a process id alone may have been used again, so it goes with start time and boot.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use serde::{Deserialize, Serialize};

/// A process, told apart from every other that this machine runs, ran or will run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: u32,
    /// When it started, clock ticks since the system's boot (`starttime`, field 22 of proc_pid_stat(5)).
    pub start_ticks: u64,
    /// Which boot (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
}

/// What [`ProcessIdentity::terminate`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Terminated {
    /// It ran, and no longer does.
    Killed,
    /// It had ended before.
    AlreadyGone,
}

impl ProcessIdentity {
    /// The identity of the process that is `pid` now.
    ///
    /// # Errors
    /// When there is none, or /proc cannot be read.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start_ticks =
            start_ticks(&stat).ok_or_else(|| io::Error::other("no start time in /proc/<pid>/stat"))?;
        Ok(Self { pid, start_ticks, boot_id: boot_id()? })
    }

    /// Writes it to `path`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        std::fs::write(path, serde_json::to_vec(self)?)
    }

    /// Reads what [`Self::write`] wrote.
    ///
    /// # Errors
    /// When the file is not there or does not hold an identity.
    pub fn read(path: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&std::fs::read(path)?)?)
    }

    /// Whether it is or was a process since this host was started last. Unknown counts as yes.
    #[must_use]
    pub fn is_of_this_boot(&self) -> bool {
        boot_id().map_or(true, |boot| boot == self.boot_id)
    }

    /// A hold on this very process, by which it can be signalled and waited for whoever's child it is; none when it is gone. A
    /// process that merely has its id is left alone.
    ///
    /// # Errors
    /// What the system said.
    pub fn pin(&self) -> io::Result<Option<Pinned>> {
        // The descriptor pins the process: if the identity still matches after it was opened, it is the one we mean.
        let process = match pidfd_open(self.pid) {
            Ok(process) => Pinned(process),
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(e) => return Err(e),
        };
        let is_same = Self::of(self.pid).is_ok_and(|now| now == *self);
        Ok((is_same && !process.has_ended()?).then_some(process))
    }

    /// Kills this very process and waits up to `limit` until it is gone. A process that merely has its id is left alone.
    ///
    /// # Errors
    /// When the process may not be killed or does not end in time.
    pub fn terminate(&self, limit: Duration) -> io::Result<Terminated> {
        let Some(process) = self.pin()? else { return Ok(Terminated::AlreadyGone) };
        process.kill()?;
        if process.ends_within(PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX))? {
            Ok(Terminated::Killed)
        } else {
            Err(io::Error::new(io::ErrorKind::TimedOut, "it did not end after SIGKILL"))
        }
    }
}

/// A process that its descriptor (pidfd, pidfd_open(2)) tells apart from every other: readable once it has ended.
#[derive(Debug)]
pub struct Pinned(OwnedFd);

impl Pinned {
    /// Sends it SIGKILL; one that has ended needs none.
    ///
    /// # Errors
    /// When it may not be killed.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_kill(&self.0) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other,
        }
    }

    /// Whether it has ended; as a zombie it has, too.
    ///
    /// # Errors
    /// What the system said.
    pub fn has_ended(&self) -> io::Result<bool> {
        self.ends_within(PollTimeout::ZERO)
    }

    fn ends_within(&self, limit: PollTimeout) -> io::Result<bool> {
        Ok(nix::poll::poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], limit)? > 0)
    }
}

impl AsRawFd for Pinned {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Pinned {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// `starttime` of a /proc/<pid>/stat line. The second field is the program's name in parentheses and may hold anything,
/// parentheses and spaces too, so fields are counted from the last `)`.
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    // The first field after the name is number 3.
    after_name.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

/// The boot that this program runs in: it does not see another.
pub(crate) fn boot_id() -> io::Result<String> {
    static BOOT: OnceLock<String> = OnceLock::new();
    if let Some(boot) = BOOT.get() {
        return Ok(boot.clone());
    }
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
    Ok(BOOT.get_or_init(|| boot).clone())
}

fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel just gave us this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn pidfd_kill(process: &OwnedFd) -> io::Result<()> {
    let info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: pidfd_send_signal(2) with a null siginfo reads no memory of ours.
    let result =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), libc::SIGKILL, info, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use proptest::prelude::*;

    use super::*;

    fn sleeper() -> std::process::Child {
        Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap()
    }

    #[test]
    fn a_process_is_killed_by_its_identity() {
        let mut child = sleeper();
        let identity = ProcessIdentity::of(child.id()).unwrap();
        assert_eq!(identity.terminate(Duration::from_secs(5)).unwrap(), Terminated::Killed);
        child.wait().unwrap();
        assert_eq!(identity.terminate(Duration::from_secs(5)).unwrap(), Terminated::AlreadyGone);
    }

    #[test]
    fn another_process_with_the_same_id_is_left_alone() {
        let mut child = sleeper();
        let now = ProcessIdentity::of(child.id()).unwrap();
        let earlier = ProcessIdentity { start_ticks: now.start_ticks - 1, ..now.clone() };
        let other_boot = ProcessIdentity { boot_id: "another".into(), ..now };
        for stranger in [earlier, other_boot] {
            assert_eq!(stranger.terminate(Duration::from_secs(5)).unwrap(), Terminated::AlreadyGone);
        }
        assert!(child.try_wait().unwrap().is_none(), "it still runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn the_start_time_is_found_behind_any_program_name() {
        let fields = (3..=52).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(start_ticks(&format!("7 (a) b) (c) {fields}")), Some(22));
        assert_eq!(start_ticks("7 (a) S 1 2"), None);
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text: String) {
            let _ = start_ticks(&text);
        }
    }
}

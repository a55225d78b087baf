//! Which process it was: a pid alone is used again by others.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::probe::boot_id;

/// Pause between two looks at a process.
const POLL: Duration = Duration::from_millis(20);

/// A process, told apart from any later one with the same pid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// Process id.
    pub(crate) pid: u32,
    /// Start time in clock ticks since boot: field 22 of `/proc/<pid>/stat` (proc(5)).
    start_ticks: u64,
    /// Boot of the kernel the ticks count from.
    boot_id: String,
}

impl Identity {
    /// The process that has `pid` now.
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        let (_, start_ticks) = read_stat(pid)?;
        Ok(Self { pid, start_ticks, boot_id: boot_id() })
    }

    /// Whether this very process still runs; a zombie does not.
    pub(crate) fn is_alive(&self) -> bool {
        self.boot_id == boot_id()
            && read_stat(self.pid)
                .is_ok_and(|(state, start)| start == self.start_ticks && state != 'Z' && state != 'X')
    }

    /// Sends it a signal, if it still is this very process.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        let pid = i32::try_from(self.pid).map_err(io::Error::other)?;
        if !self.is_alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Whether it ends within `patience`.
    pub(crate) async fn gone_within(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while self.is_alive() {
            if Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(POLL).await;
        }
        true
    }
}

/// State and start time of a process.
fn read_stat(pid: u32) -> io::Result<(char, u64)> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat"))?)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/<pid>/stat is not as proc(5) says"))
}

/// The program's name, field 2, stands in parentheses and may hold anything: what follows the last one counts.
fn parse_stat(text: &str) -> Option<(char, u64)> {
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?.chars().next()?;
    // Field 3 was the state; 18 lie between it and field 22.
    let start = fields.nth(18)?.parse().ok()?;
    Some((state, start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_forge_the_fields() {
        let line = "7 (a) R 1 (b)) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 9 9";
        assert_eq!(parse_stat(line), Some(('S', 987_654)));
        for bad in ["", "7 (a", "7 (a)", "7 (a) S 1 2 3"] {
            assert_eq!(parse_stat(bad), None);
        }
    }

    #[tokio::test]
    async fn a_process_is_known_until_it_ends() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let identity = Identity::of(child.id()).unwrap();
        assert!(identity.is_alive());
        let impostor = Identity { start_ticks: 1, ..identity.clone() };
        assert!(!impostor.is_alive());
        impostor.signal(Signal::SIGKILL).unwrap();
        assert!(
            !identity.gone_within(Duration::from_millis(50)).await,
            "another process with the pid is not harmed"
        );
        identity.signal(Signal::SIGKILL).unwrap();
        child.wait().unwrap();
        assert!(identity.gone_within(Duration::from_secs(5)).await);
    }
}

//! The clock that an agent's times are on: the wall clock as it was when the agent began, and on from there. Steps that the host's
//! clock makes later change nothing of it, not even while no `arkd` is there: what is noted of it is read with the host's time
//! since its start, and of another start it says nothing.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::host::{millis, unix_ms};
use crate::supervisor::boot_id;

/// What the two clocks that are read one after the other may differ by when nobody set either, milliseconds.
const SLACK_MS: u64 = 20;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    unix_ms: u64,
    /// The host's time since its start at that time.
    up_ms: u64,
}

/// What a later `arkd` takes a clock up with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reading {
    /// What it showed, milliseconds since about the Unix epoch.
    unix_ms: u64,
    /// The host's time since its start when it did, milliseconds.
    up_ms: u64,
    /// Which start (`/proc/sys/kernel/random/boot_id`).
    boot_id: String,
}

impl Clock {
    /// One that shows what the host's does, now.
    pub(crate) fn new() -> Self {
        Self { unix_ms: unix_ms(), up_ms: up_ms() }
    }

    /// The one that `reading` was taken of; one that shows what the host's does where there is none, or the host was started since.
    pub(crate) fn taken_up(reading: Option<&Reading>) -> Self {
        match reading {
            Some(reading) if boot_id().is_ok_and(|boot| boot == reading.boot_id) => {
                Self { unix_ms: reading.unix_ms, up_ms: reading.up_ms }
            }
            _ => Self::new(),
        }
    }

    /// What a later `arkd` takes it up with; none where the host does not say which start this is.
    pub(crate) fn reading(&self) -> Option<Reading> {
        let Self { unix_ms, up_ms } = *self;
        boot_id().ok().map(|boot_id| Reading { unix_ms, up_ms, boot_id })
    }

    /// Milliseconds since about the Unix epoch.
    pub(crate) fn now(&self) -> u64 {
        self.unix_ms.saturating_add(up_ms().saturating_sub(self.up_ms))
    }

    /// Whether the host's clock was set since this showed the same.
    pub(crate) fn is_off(&self) -> bool {
        self.now().abs_diff(unix_ms()) > SLACK_MS
    }

    /// How long it is until `at`.
    pub(crate) fn until(&self, at: u64) -> Duration {
        Duration::from_millis(at.saturating_sub(self.now()))
    }

    /// What it showed when the host's clock showed `wall_unix_ms`, which is past: that was not stepped since, as far as anybody knows.
    pub(crate) fn at(&self, wall_unix_ms: u64) -> u64 {
        self.now().saturating_sub(unix_ms().saturating_sub(wall_unix_ms))
    }
}

/// The host's time since its start, sleep included, milliseconds. Nobody can set it.
fn up_ms() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |since| millis(since.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the clock of an agent shows that began an hour before the host's clock was set forward by a day.
    #[test]
    fn a_step_of_the_hosts_clock_while_no_arkd_was_there_is_none_of_an_agents() {
        let (hour, day) = (3_600_000, 86_400_000);
        let began = Clock { unix_ms: unix_ms() - day - hour, up_ms: up_ms() };
        let reading = began.reading().unwrap();
        let again = Clock::taken_up(Some(&reading));
        let passed = again.now() - began.unix_ms;
        assert!(passed < hour, "{passed} ms");
        let before = again.at(unix_ms() - 1000);
        assert!(before + 1000 <= again.now() && before + hour > again.now(), "{before}");
        let of_another = Reading { boot_id: "another".to_owned(), ..reading };
        let anew = Clock::taken_up(Some(&of_another));
        assert!(anew.now() + hour > unix_ms() && Clock::taken_up(None).now() + hour > unix_ms());
    }
}

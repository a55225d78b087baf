//! Signals that go to the program instead of ending ark, and the way out when the program ignores them.

use std::io;
use std::time::{Duration, Instant};

use nix::libc::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::Failure;

/// Presses of the escape within [`ESCAPE_WINDOW`] that kill the program.
const ESCAPE_PRESSES: usize = 3;
/// See [`ESCAPE_PRESSES`].
const ESCAPE_WINDOW: Duration = Duration::from_secs(2);

/// The signals ark passes on. From its making until the process ends, none of them ends ark by itself.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    quit: Signal,
}

impl Signals {
    /// Begins to listen.
    pub(crate) fn listen() -> Result<Self, Failure> {
        let make = || -> io::Result<Self> {
            Ok(Self {
                interrupt: signal(SignalKind::interrupt())?,
                terminate: signal(SignalKind::terminate())?,
                hangup: signal(SignalKind::hangup())?,
                quit: signal(SignalKind::quit())?,
            })
        };
        make().map_err(|source| Failure::System { what: "cannot listen for signals", source })
    }

    /// The number of the next signal.
    pub(crate) async fn next(&mut self) -> u8 {
        let number = tokio::select! {
            _ = self.interrupt.recv() => SIGINT,
            _ = self.terminate.recv() => SIGTERM,
            _ = self.hangup.recv() => SIGHUP,
            _ = self.quit.recv() => SIGQUIT,
        };
        u8::try_from(number).unwrap_or(u8::MAX)
    }
}

/// Counts presses of the escape.
#[derive(Debug, Default)]
pub(crate) struct Escape {
    presses: Vec<Instant>,
}

impl Escape {
    /// Notes a press; true when it is the last of enough within the window.
    pub(crate) fn press(&mut self, now: Instant) -> bool {
        self.presses.retain(|at| now.duration_since(*at) <= ESCAPE_WINDOW);
        self.presses.push(now);
        self.presses.len() >= ESCAPE_PRESSES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_presses_within_two_seconds_are_an_escape() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut escape = Escape::default();
        assert!(!escape.press(at(0)) && !escape.press(at(1000)));
        assert!(!escape.press(at(2500)), "the first is too long ago");
        assert!(escape.press(at(2900)));
    }
}

//! The user's terminal: its size, and raw mode that is undone whatever happens.

use std::io::{self, IsTerminal, Stdin};

use ark_types::exec::TtySize;
use nix::libc;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

nix::ioctl_read_bad!(window_size, libc::TIOCGWINSZ, libc::winsize);

/// Size of a terminal that does not tell its own.
const FALLBACK: TtySize = TtySize { rows: 24, cols: 80 };

/// Size of the terminal that standard output, or else standard input, is connected to.
pub(crate) fn size() -> TtySize {
    let mut found = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    for fd in [libc::STDOUT_FILENO, libc::STDIN_FILENO] {
        // SAFETY: TIOCGWINSZ writes one `winsize`, and `found` is one; a bad descriptor is an error, not a danger.
        let told = unsafe { window_size(fd, &raw mut found) };
        if told.is_ok() && found.ws_row > 0 && found.ws_col > 0 {
            return TtySize { rows: found.ws_row, cols: found.ws_col };
        }
    }
    FALLBACK
}

/// Whether standard input is a terminal.
pub(crate) fn stdin_is_terminal() -> bool {
    io::stdin().is_terminal()
}

/// Standard input in raw mode: every key goes to the program, none is handled or echoed here. Dropping it restores what
/// was before.
pub(crate) struct RawMode {
    stdin: Stdin,
    before: Termios,
}

impl RawMode {
    /// Switches to raw mode.
    pub(crate) fn enter() -> io::Result<Self> {
        let stdin = io::stdin();
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSADRAIN, &raw)?;
        Ok(Self { stdin, before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // The terminal may be gone; then there is nothing to restore.
        let _ = tcsetattr(&self.stdin, SetArg::TCSADRAIN, &self.before);
    }
}

//! The whole guest: its clock and its end.

use std::process;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ark_types::guest::{ClockSet, ErrorCode, GuestError};
use nix::errno::Errno;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use nix::unistd::sync;

use crate::failure::failure;

/// Time programs have to end after SIGTERM when the guest shuts down.
const TERM_GRACE: Duration = Duration::from_millis(1500);
/// Time the kernel has to take them away after SIGKILL.
const KILL_GRACE: Duration = Duration::from_millis(500);
/// Between two looks at whether any are left.
const LOOK: Duration = Duration::from_millis(5);

/// Sets the wall clock.
pub(crate) fn set_clock(to: ClockSet) -> Result<(), GuestError> {
    let seconds = i64::try_from(to.unix_ns / 1_000_000_000).unwrap_or(i64::MAX);
    let rest = i64::try_from(to.unix_ns % 1_000_000_000).unwrap_or(0);
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(seconds, rest)).map_err(|e| {
        let code = if e == Errno::EINVAL { ErrorCode::BadRequest } else { ErrorCode::Internal };
        failure(code, format!("the clock could not be set: {}", e.desc()))
    })
}

/// What the wall clock says.
pub(crate) fn clock() -> ClockSet {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    ClockSet { unix_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX) }
}

/// Whether this process decides about the whole system.
pub(crate) fn is_init() -> bool {
    process::id() == 1
}

/// Ends every program (SIGTERM, a short grace, SIGKILL), writes out what is in memory and powers off.
pub(crate) fn power_off() -> ! {
    for (signal, grace) in [(libc::SIGTERM, TERM_GRACE), (libc::SIGKILL, KILL_GRACE)] {
        // SAFETY: kill has no memory effects. -1 spares this process, and as PID 1 it is nobody's target either.
        unsafe { libc::kill(-1, signal) };
        let end = Instant::now() + grace;
        while has_children() && Instant::now() < end {
            thread::sleep(LOOK);
        }
    }
    end(RebootMode::RB_POWER_OFF)
}

/// Resets the machine: its VMM then ends and says so.
pub(crate) fn reset() -> ! {
    end(RebootMode::RB_AUTOBOOT)
}

/// Ends this machine now.
fn end(mode: RebootMode) -> ! {
    sync();
    // Only an error returns, and then there is nothing better than the reset, and after that the kernel's own panic,
    // which the VMM sees as well.
    let _ = reboot(mode);
    let _ = reboot(RebootMode::RB_AUTOBOOT);
    process::abort()
}

/// Whether any process but this one and the kernel's is left: all are PID 1's children in the end.
fn has_children() -> bool {
    // SAFETY: a null siginfo is allowed; WNOWAIT leaves whatever has ended to the reaper.
    let answer = unsafe {
        libc::waitid(libc::P_ALL, 0, std::ptr::null_mut(), libc::WEXITED | libc::WNOHANG | libc::WNOWAIT)
    };
    Errno::result(answer) != Err(Errno::ECHILD)
}

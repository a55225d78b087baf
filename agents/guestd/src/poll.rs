//! Waiting for descriptors.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Instant;

use nix::errno::Errno;

/// An entry for `fd`, if there is one.
pub(crate) fn entry(fd: Option<BorrowedFd<'_>>, events: i16) -> libc::pollfd {
    raw_entry(fd.map(|fd| fd.as_raw_fd()), events)
}

/// An entry for the descriptor of this number. poll(2) passes over negative ones.
pub(crate) fn raw_entry(fd: Option<i32>, events: i16) -> libc::pollfd {
    libc::pollfd { fd: fd.unwrap_or(-1), events, revents: 0 }
}

/// ppoll(2) until `deadline`, to the nanosecond; without one, until something happens.
pub(crate) fn poll(fds: &mut [libc::pollfd], deadline: Option<Instant>) -> io::Result<()> {
    let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
    let left = left.map(|l| libc::timespec {
        tv_sec: i64::try_from(l.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(l.subsec_nanos()),
    });
    let timeout = left.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let count = libc::nfds_t::try_from(fds.len()).unwrap_or(0);
    // SAFETY: `fds` has as many entries as said, `timeout` is null or a live timespec, and no mask is given.
    match Errno::result(unsafe { libc::ppoll(fds.as_mut_ptr(), count, timeout, std::ptr::null()) }) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

//! The signals that ask the VMM to end, as a descriptor to wait on.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Signals that end the VMM in good order.
const ENDING: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// Blocks the signals in this thread alone, so that they are some other thread's.
pub fn leave_to_others() {
    // Without it a signal would be taken by this thread, to the same effect.
    let _ = block_in_this_thread();
}

/// The signals, which this thread no longer takes.
fn block_in_this_thread() -> io::Result<libc::sigset_t> {
    let set = vmm_sys_util::signal::create_sigset(&ENDING)?;
    // SAFETY: `set` is an initialized signal set and no old set is asked for.
    let failed = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if failed == 0 { Ok(set) } else { Err(io::Error::from_raw_os_error(failed)) }
}

/// SIGTERM, SIGINT and SIGHUP, blocked and turned into reads.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Blocks the signals in this thread and all it will start, and makes the descriptor. Every thread started before must
    /// have left them to others.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn block() -> io::Result<Self> {
        let set = block_in_this_thread()?;
        // SAFETY: `set` is an initialized signal set; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was made just now and nobody else owns it.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// The number of a signal that came, if one did.
    #[must_use]
    pub fn take(&self) -> Option<i32> {
        // The record's first field, `ssi_signo`, is all that is wanted; the kernel writes whole records only.
        let mut record = [0_u8; size_of::<libc::signalfd_siginfo>()];
        // SAFETY: the buffer is as long as said and lives through the call.
        let read = unsafe { libc::read(self.fd.as_raw_fd(), record.as_mut_ptr().cast(), record.len()) };
        let whole = usize::try_from(read).is_ok_and(|n| n == record.len());
        let signal = record.first_chunk().map(|number| i32::from_ne_bytes(*number));
        signal.filter(|_| whole)
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

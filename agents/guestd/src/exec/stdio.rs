//! A program's standard streams: three pipes, or one terminal.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use ark_types::exec::TtySize;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::pty::Winsize;
use nix::sys::stat::Mode;
use nix::unistd::{Uid, fchown, pipe2};

use super::spawn::ChildStdio;

nix::ioctl_write_ptr_bad!(set_lock, libc::TIOCSPTLCK, libc::c_int);
nix::ioctl_write_ptr_bad!(set_winsize, libc::TIOCSWINSZ, Winsize);
nix::ioctl_read_bad!(bytes_waiting, libc::FIONREAD, libc::c_int);

/// guestd's ends of the streams, non-blocking.
#[derive(Debug)]
pub(crate) enum Ours {
    /// Write end of stdin, read ends of stdout and stderr.
    Pipes {
        /// Standard input.
        stdin: OwnedFd,
        /// Standard output.
        stdout: OwnedFd,
        /// Standard error.
        stderr: OwnedFd,
    },
    /// Master side of the terminal.
    Terminal(OwnedFd),
}

/// The program's ends.
#[derive(Debug)]
pub(crate) enum Theirs {
    /// Stdin, stdout, stderr.
    Pipes([OwnedFd; 3]),
    /// Slave side of the terminal.
    Terminal(OwnedFd),
}

impl Theirs {
    /// As the child takes them.
    pub(crate) fn child_stdio(&self) -> ChildStdio<'_> {
        match self {
            Self::Pipes(fds) => {
                ChildStdio { fds: fds.each_ref().map(AsFd::as_fd), kept: &[], terminal: false }
            }
            Self::Terminal(slave) => ChildStdio { fds: [slave.as_fd(); 3], kept: &[], terminal: true },
        }
    }
}

/// Three pipes.
pub(crate) fn pipes() -> io::Result<(Ours, Theirs)> {
    let (in_read, stdin) = pipe2(OFlag::O_CLOEXEC)?;
    let (stdout, out_write) = pipe2(OFlag::O_CLOEXEC)?;
    let (stderr, err_write) = pipe2(OFlag::O_CLOEXEC)?;
    for fd in [&stdin, &stdout, &stderr] {
        fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    }
    Ok((Ours::Pipes { stdin, stdout, stderr }, Theirs::Pipes([in_read, out_write, err_write])))
}

/// A terminal of `size` that belongs to `owner`.
pub(crate) fn terminal(size: TtySize, owner: Option<u32>) -> io::Result<(Ours, Theirs)> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = open("/dev/ptmx", flags | OFlag::O_NONBLOCK, Mode::empty())?;
    // SAFETY: TIOCSPTLCK reads one int.
    unsafe { set_lock(master.as_raw_fd(), &0) }?;
    // TIOCGPTPEER opens the slave without a path, so it works whatever is mounted where.
    // SAFETY: takes open flags, no pointer.
    let slave = Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags.bits()) })?;
    // SAFETY: the ioctl has just made this descriptor, and nothing else owns it.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    if let Some(uid) = owner {
        fchown(&slave, Some(Uid::from_raw(uid)), None)?;
    }
    resize(&master, size)?;
    Ok((Ours::Terminal(master), Theirs::Terminal(slave)))
}

/// Gives the terminal another size; the kernel sends SIGWINCH to its foreground process group.
pub(crate) fn resize(master: &OwnedFd, size: TtySize) -> io::Result<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize.
    unsafe { set_winsize(master.as_raw_fd(), &raw const size) }?;
    Ok(())
}

/// Gives the pipe `fd` room for `size` bytes; whether it has it. A terminal has not, and where memory is short a pipe stays
/// as it is.
pub(crate) fn widen(fd: &OwnedFd, size: usize) -> bool {
    libc::c_int::try_from(size).is_ok_and(|size| fcntl(fd, FcntlArg::F_SETPIPE_SZ(size)).is_ok())
}

/// Bytes that could be read from `fd` now.
pub(crate) fn waiting(fd: &OwnedFd) -> usize {
    let mut count = 0;
    // SAFETY: FIONREAD writes one int.
    match unsafe { bytes_waiting(fd.as_raw_fd(), &raw mut count) } {
        Ok(_) => usize::try_from(count).unwrap_or(0),
        Err(_) => 0,
    }
}

/// What one read brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Took {
    /// So many bytes.
    Bytes(usize),
    /// Nothing at the moment.
    Nothing,
    /// The end: every writer is gone.
    End,
}

/// Reads once, up to `limit` bytes, behind what `buffer` holds. Memory that is not read into is not touched.
pub(crate) fn read_into(fd: &OwnedFd, buffer: &mut Vec<u8>, limit: usize) -> Took {
    buffer.reserve(limit);
    let spare: &mut [MaybeUninit<u8>] = buffer.spare_capacity_mut();
    let room = spare.len().min(limit);
    // SAFETY: `spare` has at least `room` writable bytes.
    let got = unsafe { libc::read(fd.as_raw_fd(), spare.as_mut_ptr().cast(), room) };
    match Errno::result(got) {
        Ok(0) => Took::End,
        Ok(n) => {
            let n = usize::try_from(n).unwrap_or(0).min(room);
            let len = buffer.len() + n;
            // SAFETY: read(2) has initialised `n` bytes, and n <= room <= capacity - len.
            unsafe { buffer.set_len(len) };
            Took::Bytes(n)
        }
        Err(Errno::EAGAIN | Errno::EINTR) => Took::Nothing,
        // EIO is how a terminal's master says that no slave is open.
        Err(_) => Took::End,
    }
}

//! Stream sockets: vsock inside a guest, Unix where host and guest share a kernel.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;
use std::{fmt, mem, ptr};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr, bind, connect,
    getsockopt, listen, setsockopt, shutdown, socket, sockopt,
};
use nix::sys::stat::{Mode, fchmod};
use nix::sys::time::{TimeVal, TimeValLike};

/// Context id of the host (`VMADDR_CID_HOST`, linux/vm_sockets.h).
pub const HOST_CID: u32 = libc::VMADDR_CID_HOST;
/// "Any context id", to listen on (`VMADDR_CID_ANY`, linux/vm_sockets.h).
pub const ANY_CID: u32 = libc::VMADDR_CID_ANY;
/// Connections that wait for [`Listener::accept`] before the kernel refuses more: a burst from the host is served late, not
/// refused.
const BACKLOG: i32 = 1024;

/// Where a socket listens or connects to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// AF_VSOCK (vsock(7)).
    Vsock {
        /// Context id.
        cid: u32,
        /// Port.
        port: u32,
    },
    /// Path of a Unix socket, at most 107 bytes (unix(7)).
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock { cid, port } => write!(f, "vsock {cid}:{port}"),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

impl Address {
    /// A fresh socket of this address' family and the address in the kernel's form.
    fn prepare(&self) -> io::Result<(OwnedFd, Box<dyn SockaddrLike>)> {
        let (family, address): (_, Box<dyn SockaddrLike>) = match self {
            Self::Vsock { cid, port } => (AddressFamily::Vsock, Box::new(VsockAddr::new(*cid, *port))),
            Self::Unix(path) => (AddressFamily::Unix, Box::new(UnixAddr::new(path)?)),
        };
        Ok((socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?, address))
    }
}

/// A socket that takes connections.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    /// Whether only the host may connect: a vsock listener can be reached from inside the guest as well, by loopback.
    host_only: bool,
}

impl Listener {
    /// Listens on `address`. A Unix socket gets mode 0600 before anyone can connect; an existing file is an error.
    ///
    /// # Errors
    /// What socket(2), bind(2) or listen(2) say: address in use, no permission, no vsock in this kernel.
    pub fn bind(address: &Address) -> io::Result<Self> {
        let (fd, raw) = address.prepare()?;
        let host_only = matches!(address, Address::Vsock { .. });
        if !host_only {
            // Linux gives the file the mode of the socket's own inode, so there is no moment with a wider mode.
            fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
        }
        bind(fd.as_raw_fd(), &*raw)?;
        listen(&fd, Backlog::new(BACKLOG)?)?;
        Ok(Self { fd, host_only })
    }

    /// Waits for the next connection. On vsock, connections from anywhere but the host are closed without a word.
    ///
    /// # Errors
    /// What accept4(2) says; the listener stays usable.
    pub fn accept(&self) -> io::Result<Stream> {
        loop {
            // SAFETY: sockaddr_vm is plain old data, for which all zeros is a valid value.
            let mut peer: libc::sockaddr_vm = unsafe { mem::zeroed() };
            let mut len = libc::socklen_t::try_from(size_of_val(&peer)).unwrap_or_default();
            let place: *mut libc::sockaddr =
                if self.host_only { (&raw mut peer).cast() } else { ptr::null_mut() };
            let len_place = if self.host_only { &raw mut len } else { ptr::null_mut() };
            // SAFETY: `place` is null or points to `len` writable bytes, as does `len_place` to a socklen_t; both outlive
            // the call.
            let fd = unsafe { libc::accept4(self.fd.as_raw_fd(), place, len_place, libc::SOCK_CLOEXEC) };
            let fd = match Errno::result(fd) {
                // SAFETY: accept4 has just made this descriptor, and nothing else owns it.
                Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
                Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
                Err(e) => return Err(e.into()),
            };
            if !self.host_only || peer.svm_cid == HOST_CID {
                return Ok(Stream { fd });
            }
        }
    }
}

/// One connection.
#[derive(Debug)]
pub struct Stream {
    fd: OwnedFd,
}

impl Stream {
    /// Connects to `address`.
    ///
    /// # Errors
    /// What connect(2) says; a host without a listener shows as `ConnectionReset` or `ConnectionRefused`.
    pub fn connect(address: &Address) -> io::Result<Self> {
        let (fd, raw) = address.prepare()?;
        connect(fd.as_raw_fd(), &*raw)?;
        Ok(Self { fd })
    }

    /// Starts to connect to `address` and returns at once; [`Connecting::wait`] has the result.
    ///
    /// # Errors
    /// What connect(2) says at once.
    pub fn begin_connect(address: &Address) -> io::Result<Connecting> {
        let (fd, raw) = address.prepare()?;
        let stream = Self { fd };
        stream.set_nonblocking(true)?;
        match connect(stream.fd.as_raw_fd(), &*raw) {
            Ok(()) | Err(Errno::EINPROGRESS) => Ok(Connecting { stream }),
            Err(e) => Err(e.into()),
        }
    }

    /// Whether reads and writes return `WouldBlock` where they would wait.
    ///
    /// # Errors
    /// What fcntl(2) says; not expected.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        let flags = if nonblocking { OFlag::O_NONBLOCK } else { OFlag::empty() };
        fcntl(&self.fd, FcntlArg::F_SETFL(flags))?;
        Ok(())
    }

    /// Makes a blocking read fail with `WouldBlock` after `timeout`; `None` waits for ever.
    ///
    /// # Errors
    /// What setsockopt(2) says; not expected.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        let ms = timeout.map_or(0, |t| i64::try_from(t.as_millis().max(1)).unwrap_or(i64::MAX));
        setsockopt(&self.fd, sockopt::ReceiveTimeout, &TimeVal::milliseconds(ms))?;
        Ok(())
    }

    /// Tells the other side that no more comes from here; reading goes on.
    ///
    /// # Errors
    /// What shutdown(2) says: the connection is gone already.
    pub fn finish(&self) -> io::Result<()> {
        shutdown(self.fd.as_raw_fd(), Shutdown::Write)?;
        Ok(())
    }

    /// Ends it in both directions, for whoever waits for it, too.
    pub fn end(&self) {
        // One that is gone already has ended.
        let _ = shutdown(self.fd.as_raw_fd(), Shutdown::Both);
    }
}

/// A connection in the making.
#[derive(Debug)]
pub struct Connecting {
    stream: Stream,
}

impl Connecting {
    /// Waits for the connection; reads and writes on it block.
    ///
    /// # Errors
    /// What connect(2) came to, or `TimedOut` after `most`.
    pub fn wait(self, most: Duration) -> io::Result<Stream> {
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLOUT)];
        let timeout = PollTimeout::try_from(most.as_millis()).unwrap_or(PollTimeout::MAX);
        loop {
            match poll(&mut fds, timeout) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        match getsockopt(&self.stream.fd, sockopt::SocketError)? {
            0 => {
                self.stream.set_nonblocking(false)?;
                Ok(self.stream)
            }
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

impl From<OwnedFd> for Stream {
    /// Takes a connected stream socket made elsewhere, a socket pair's end for example.
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl From<Stream> for OwnedFd {
    fn from(stream: Stream) -> Self {
        stream.fd
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(nix::unistd::read(&self.fd, buffer)?)
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[io::IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[io::IoSlice<'_>]) -> io::Result<usize> {
        // MSG_NOSIGNAL: a closed connection is an error to handle, whatever the process does with SIGPIPE.
        // SAFETY: msghdr is plain old data, for which all zeros is a valid value.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        // IoSlice has the layout of iovec by its documentation.
        message.msg_iov = parts.as_ptr().cast_mut().cast();
        message.msg_iovlen = parts.len();
        // SAFETY: `message` names only `parts`, which outlives the call, and sendmsg does not write through it.
        let sent = unsafe { libc::sendmsg(self.fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        Ok(usize::try_from(Errno::result(sent)?).unwrap_or_default())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_unix_listener_is_private_and_takes_connections() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let address = Address::Unix(path.clone());
        let listener = Listener::bind(&address).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Listener::bind(&address).unwrap_err().kind(), io::ErrorKind::AddrInUse);

        let client = Stream::connect(&address).unwrap();
        let served = listener.accept().unwrap();
        (&client).write_all(b"ping").unwrap();
        client.finish().unwrap();
        let mut said = String::new();
        (&served).read_to_string(&mut said).unwrap();
        assert_eq!(said, "ping");
    }

    #[test]
    fn a_connection_can_be_begun_and_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::Unix(dir.path().join("s"));
        assert_eq!(Stream::begin_connect(&address).unwrap_err().kind(), io::ErrorKind::NotFound);
        let listener = Listener::bind(&address).unwrap();
        let begun = Stream::begin_connect(&address).unwrap();
        let served = listener.accept().unwrap();
        let client = begun.wait(Duration::from_secs(1)).unwrap();
        (&served).write_all(b"x").unwrap();
        assert_eq!((&client).read(&mut [0; 4]).unwrap(), 1);
    }

    #[test]
    fn reads_can_be_bounded_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::Unix(dir.path().join("s"));
        let listener = Listener::bind(&address).unwrap();
        let client = Stream::connect(&address).unwrap();
        let _served = listener.accept().unwrap();
        client.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
        assert_eq!((&client).read(&mut [0; 4]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}

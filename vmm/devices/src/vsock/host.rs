//! The host's side: the listening socket, the `CONNECT <port>` line of its clients, services that the guest connects to.

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;

/// How long a client may take to send its line.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// `CONNECT 4294967295\r\n` has 20 bytes; the rest is for spaces.
const MAX_GREETING: usize = 32;

/// `sun_path` holds 107 bytes and a zero; the longest service adds `_4294967295`.
const MAX_UDS_PATH: usize = 107 - 11;

/// The listening socket could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The path is too long for a Unix socket.
    #[error(
        "the vsock path {0} is longer than {MAX_UDS_PATH} bytes, so `<path>_<port>` would not fit; choose a shorter one"
    )]
    PathTooLong(PathBuf),
    /// Binding failed.
    #[error("cannot listen on the vsock path {path}; remove it if it is left from an earlier run: {source}")]
    Bind {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The listening socket. Dropping it removes the path.
pub(super) struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens on `path`, which must not exist.
    pub(super) fn bind(path: &Path) -> Result<Self, ListenError> {
        if path.as_os_str().as_bytes().len() > MAX_UDS_PATH {
            return Err(ListenError::PathTooLong(path.to_owned()));
        }
        let bind = |source| ListenError::Bind { path: path.to_owned(), source };
        let socket = UnixListener::bind(path).map_err(bind)?;
        let listener = Self { socket, path: path.to_owned() };
        listener.socket.set_nonblocking(true).map_err(bind)?;
        Ok(listener)
    }

    /// The next client; `None` when there is none now.
    ///
    /// # Errors
    /// What the kernel said, for example that the process has no descriptor left.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.socket.accept() {
            Ok((client, _)) => {
                client.set_nonblocking(true)?;
                Ok(Some(client))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Connects to the service that stands for the host's `port`, without waiting.
    ///
    /// # Errors
    /// What the kernel said: nobody listens there, or its backlog is full.
    pub(super) fn connect_service(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.as_os_str().as_bytes().to_vec();
        path.extend_from_slice(format!("_{port}").as_bytes());
        connect(&path)
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Someone else may have removed it, with its directory.
        let _ = fs::remove_file(&self.path);
    }
}

/// A connection to the Unix socket at `path`. The standard library's `connect` waits while the listener's backlog is full,
/// which the guest could provoke.
#[expect(clippy::cast_possible_truncation, reason = "AF_UNIX is 1 and a sockaddr_un has 110 bytes")]
fn connect(path: &[u8]) -> io::Result<UnixStream> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: plain system call.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: zeroes are a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    if path.len() >= address.sun_path.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, byte) in address.sun_path.iter_mut().zip(path) {
        *place = byte.cast_signed();
    }
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address is initialised, `len` bytes long, and ends with a zero.
    if unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket.into())
}

/// A host client that has not yet said which port it wants.
pub(super) struct Client {
    socket: UnixStream,
    since: Instant,
}

/// What a client said so far.
pub(super) enum Greeting {
    /// Not a whole line yet.
    Incomplete(Client),
    /// It wants `port`. The line was taken out of `socket`.
    Connect {
        /// The guest's port.
        port: u32,
        /// The client's socket.
        socket: UnixStream,
        /// What is known to be in the socket behind the line.
        pending: EventSet,
    },
    /// No `CONNECT <port>` line, or gone.
    Bad,
}

impl Client {
    /// A client that connected just now.
    pub(super) fn new(socket: UnixStream) -> Self {
        Self { socket, since: Instant::now() }
    }

    /// Whether it took too long.
    pub(super) fn expired(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= GREETING_TIMEOUT
    }

    /// Its descriptor.
    pub(super) fn fd(&self) -> std::os::fd::RawFd {
        self.socket.as_raw_fd()
    }

    /// Looks for the line. What the client sent behind it stays in the socket. `events` were reported by epoll.
    pub(super) fn greet(self, events: EventSet) -> Greeting {
        let mut buffer = [0; MAX_GREETING];
        let seen = match peek(&self.socket, &mut buffer) {
            Ok([]) => return Greeting::Bad,
            Ok(seen) => seen,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Greeting::Incomplete(self);
            }
            Err(_) => return Greeting::Bad,
        };
        let Some(end) = seen.iter().position(|byte| *byte == b'\n') else {
            let ended = events.intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP);
            let full = seen.len() == MAX_GREETING;
            return if ended || full { Greeting::Bad } else { Greeting::Incomplete(self) };
        };
        let line_len = end.saturating_add(1);
        let Some(port) = seen.get(..end).and_then(parse_connect) else { return Greeting::Bad };
        let more = seen.len() > line_len || seen.len() == MAX_GREETING;
        let ends = EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR;
        let pending = (events & ends) | if more { EventSet::IN } else { EventSet::empty() };
        let mut socket = self.socket;
        match buffer.get_mut(..line_len).map(|line| socket.read_exact(line)) {
            Some(Ok(())) => Greeting::Connect { port, socket, pending },
            _ => Greeting::Bad,
        }
    }
}

/// The bytes at the front of the socket, which stay there.
fn peek<'b>(socket: &UnixStream, buffer: &'b mut [u8]) -> io::Result<&'b [u8]> {
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the buffer is valid for writes of its length.
    let n = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), flags) };
    let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    Ok(buffer.get(..n).unwrap_or_default())
}

/// The port in `CONNECT <port>`, the word in any case, as Firecracker has it.
pub(super) fn parse_connect(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (word, port) = (words.next()?, words.next()?);
    if !word.eq_ignore_ascii_case("connect") || words.next().is_some() {
        return None;
    }
    // `parse` would take a plus sign.
    if port.bytes().all(|byte| byte.is_ascii_digit()) { port.parse().ok() } else { None }
}

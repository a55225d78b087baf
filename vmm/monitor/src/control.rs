//! The control socket: lines of JSON, many clients, none of whom can make the VMM wait.
//!
//! The owner of the VM's state polls [`Server::fds`] and calls [`Server::serve`] for those that are ready. A client's
//! requests are answered in order; while it does not read its replies, its requests are not read either, nor while it waits
//! for a reply that takes time ([`Server::reply`]). What a client can make the VMM hold is bounded by [`MAX_CONTROL_LINE`]
//! and [`MAX_CLIENTS`].

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ark_types::plain::plain;
use ark_types::vmm::{ControlReply, ControlRequest, MAX_CONTROL_LINE};

use crate::end::Remove;

/// Most clients at once; a further one is turned away.
pub const MAX_CLIENTS: usize = 32;
/// Bytes read from a client at a time.
const CHUNK: usize = 4096;
/// Pause after a client could not be accepted, most likely because no descriptor is left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A control socket that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Somebody serves it.
    #[error("the control socket {0} is served by another process; give each VM its own path")]
    InUse(PathBuf),
    /// The system refused.
    #[error(
        "the control socket {path} cannot be made: {source}; its directory must exist and its path be shorter than 108 bytes"
    )]
    Bind {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A client's request, for a reply that comes later. None is used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u64);

/// Carries out a request; none means that the reply comes by [`Server::reply`].
type Answer<'a> = dyn FnMut(ControlRequest, Ticket) -> Option<ControlReply> + 'a;

/// The listening socket and its clients. Dropping it removes the socket's file.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    clients: Vec<Client>,
    /// The last attempt to accept a client failed; it still waits.
    accept_failed: bool,
    /// Tickets given out so far.
    tickets: u64,
    _file: Remove,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    /// What came and was not answered yet: less than a line, or lines that wait for the client to read.
    input: Vec<u8>,
    /// What it has not taken yet.
    output: Vec<u8>,
    /// To be closed when `output` is empty.
    closing: bool,
    /// The request that it waits for the reply to.
    waits: Option<Ticket>,
}

impl Server {
    /// Listens at `path`, mode 0600. A socket that nobody serves any more is replaced.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn bind(path: &Path) -> Result<Self, ControlError> {
        let failed = |source| ControlError::Bind { path: path.to_owned(), source };
        let listener = match UnixListener::bind(path) {
            Err(e) if e.kind() == ErrorKind::AddrInUse => {
                if UnixStream::connect(path).is_ok() {
                    return Err(ControlError::InUse(path.to_owned()));
                }
                remove_socket(path).and_then(|()| UnixListener::bind(path))
            }
            bound => bound,
        };
        let listener = listener.map_err(failed)?;
        let file = Remove(path.to_owned());
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self { listener, clients: Vec::new(), accept_failed: false, tickets: 0, _file: file })
    }

    /// What to wait on: each descriptor, and for what (poll(2)): for something to read, for room to write, or, of a client
    /// that waits and of whom nothing is expected, for its hanging up.
    pub fn fds(&self) -> impl Iterator<Item = (RawFd, libc::c_short)> + '_ {
        let clients = self.clients.iter().map(|client| {
            let events = match (client.waits, client.output.is_empty()) {
                (Some(_), _) => 0,
                (None, false) => libc::POLLOUT,
                (None, true) => libc::POLLIN,
            };
            (client.stream.as_raw_fd(), events)
        });
        let listener = (!self.accept_failed).then_some((self.listener.as_raw_fd(), libc::POLLIN));
        listener.into_iter().chain(clients)
    }

    /// Lets clients go that hung up while they waited for a reply; what each of them waited for.
    pub fn hung_up(&mut self) -> Vec<Ticket> {
        let mut tickets = Vec::new();
        self.clients.retain(|client| match client.waits {
            Some(ticket) if client.has_hung_up() => {
                tickets.push(ticket);
                false
            }
            _ => true,
        });
        tickets
    }

    /// When to call [`Self::serve`] again even if nothing of [`Self::fds`] is ready.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.accept_failed.then_some(ACCEPT_PAUSE)
    }

    /// Takes in and answers whatever can be without waiting; `answer` carries out one request, and gives none when the reply
    /// comes later.
    pub fn serve(&mut self, answer: &mut Answer<'_>) {
        self.accept_failed = loop {
            match self.listener.accept() {
                // Turned away by closing; a listener's queue that is left full would hide later clients for ever.
                Ok((stream, _)) => {
                    if self.clients.len() < MAX_CLIENTS && stream.set_nonblocking(true).is_ok() {
                        let (input, output) = (vec![], vec![]);
                        self.clients.push(Client { stream, input, output, closing: false, waits: None });
                    }
                }
                Err(e) => break e.kind() != ErrorKind::WouldBlock,
            }
        };
        let tickets = &mut self.tickets;
        self.clients.retain_mut(|client| client.serve(tickets, answer).is_ok());
    }

    /// Gives the reply to the request of `ticket`, whose client then goes on. Of no effect when the client has gone.
    pub fn reply(&mut self, ticket: Ticket, reply: &ControlReply) {
        for client in self.clients.iter_mut().filter(|client| client.waits == Some(ticket)) {
            client.waits = None;
            client.say(reply);
            // What does not fit, or fails, is seen to when the client is served next.
            let _ = client.flush();
        }
    }
}

/// Removes a socket left by a VMM that was killed; anything else at `path` stays, and binding then fails.
fn remove_socket(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt;
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => std::fs::remove_file(path),
        Ok(_) => Ok(()),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

impl Client {
    /// Whether nobody is at the other end. One that merely has nothing more to say still listens.
    fn has_hung_up(&self) -> bool {
        let mut fd = libc::pollfd { fd: self.stream.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: the pointer is to one entry, which lives through the call; it does not wait.
        let ready = unsafe { libc::poll(&raw mut fd, 1, 0) } > 0;
        ready && fd.revents & (libc::POLLHUP | libc::POLLERR) != 0
    }

    /// Everything that can be done without waiting. An error means that the connection is over.
    fn serve(&mut self, tickets: &mut u64, answer: &mut Answer<'_>) -> io::Result<()> {
        loop {
            self.flush()?;
            if !self.output.is_empty() || self.waits.is_some() {
                return Ok(());
            }
            if self.closing {
                return Err(ErrorKind::ConnectionAborted.into());
            }
            if let Some(line) = self.next_line() {
                let ticket = Ticket(*tickets);
                *tickets = tickets.wrapping_add(1);
                let reply = match serde_json::from_slice(&line) {
                    Ok(request) => answer(request, ticket),
                    Err(e) => Some(ControlReply::Refused { why: format!("not a request: {e}") }),
                };
                match reply {
                    Some(reply) => self.say(&reply),
                    None => self.waits = Some(ticket),
                }
            } else if self.input.len() > MAX_CONTROL_LINE {
                self.say(&ControlReply::Refused {
                    why: format!("a request has at most {MAX_CONTROL_LINE} bytes"),
                });
                self.closing = true;
            } else if !self.read()? {
                return Ok(());
            }
        }
    }

    /// Takes the first whole line from the input.
    fn next_line(&mut self) -> Option<Vec<u8>> {
        let end = self.input.iter().position(|b| *b == b'\n')?;
        let rest = self.input.split_off(end + 1);
        Some(std::mem::replace(&mut self.input, rest))
    }

    /// Reads a chunk; whether something came.
    fn read(&mut self) -> io::Result<bool> {
        let mut chunk = [0; CHUNK];
        match self.stream.read(&mut chunk) {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                self.input.extend_from_slice(chunk.get(..n).unwrap_or_default());
                Ok(true)
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(e) if e.kind() == ErrorKind::Interrupted => Ok(true),
            Err(e) => Err(e),
        }
    }

    fn say(&mut self, reply: &ControlReply) {
        let said = match reply {
            ControlReply::Refused { why } => serde_json::to_vec(&ControlReply::Refused { why: plain(why) }),
            _ => serde_json::to_vec(reply),
        };
        // Replies are plain data: they always have a JSON form.
        self.output = said.unwrap_or_default();
        self.output.push(b'\n');
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(n) => drop(self.output.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use ark_types::vmm::VmState;

    use super::*;

    fn server() -> (tempfile::TempDir, PathBuf, Server) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm.sock");
        let server = Server::bind(&path).unwrap();
        (dir, path, server)
    }

    fn connect(path: &Path) -> UnixStream {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }

    #[expect(clippy::unnecessary_wraps, reason = "other requests are answered later")]
    fn state(request: ControlRequest, _: Ticket) -> Option<ControlReply> {
        Some(match request {
            ControlRequest::Pause => ControlReply::State { state: VmState::Paused },
            _ => ControlReply::State { state: VmState::Running },
        })
    }

    fn replies(stream: &UnixStream, count: usize) -> Vec<ControlReply> {
        let lines = BufReader::new(stream).lines().take(count);
        lines.map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect()
    }

    #[test]
    fn requests_of_many_clients_are_answered_in_order_however_they_are_cut() {
        let (_dir, path, mut server) = server();
        let (a, b) = (connect(&path), connect(&path));
        (&a).write_all(b"{\"do\":\"state\"}\n{\"do\":\"pau").unwrap();
        (&b).write_all(b"{\"do\":\"pause\"}\n").unwrap();
        server.serve(&mut state);
        (&a).write_all(b"se\"}\n").unwrap();
        server.serve(&mut state);
        let (running, paused) = (VmState::Running, VmState::Paused);
        assert_eq!(replies(&a, 2), [running, paused].map(|state| ControlReply::State { state }));
        assert_eq!(replies(&b, 1), [ControlReply::State { state: paused }]);
    }

    #[test]
    fn a_client_that_waits_for_its_reply_holds_up_nobody_else_and_its_requests_stay_in_order() {
        let (_dir, path, mut server) = server();
        let (slow, other) = (connect(&path), connect(&path));
        (&slow).write_all(b"{\"do\":\"resume\"}\n{\"do\":\"pause\"}\n").unwrap();
        let mut asked = None;
        server.serve(&mut |request, ticket| match request {
            ControlRequest::Resume => {
                asked = Some(ticket);
                None
            }
            other => panic!("{other:?} was answered before the reply to the request before it"),
        });
        // Nothing is expected of it but that it hangs up.
        assert_eq!(server.fds().filter(|(_, events)| *events == 0).count(), 1);
        assert_eq!(server.hung_up(), []);
        (&other).write_all(b"{\"do\":\"state\"}\n").unwrap();
        server.serve(&mut state);
        assert!(matches!(replies(&other, 1)[..], [ControlReply::State { state: VmState::Running }]));

        let late = ControlReply::Refused { why: "late".into() };
        server.reply(Ticket(77), &ControlReply::Refused { why: "nobody's".into() });
        server.reply(asked.unwrap(), &late);
        server.serve(&mut state);
        assert_eq!(replies(&slow, 2), [late, ControlReply::State { state: VmState::Paused }]);
    }

    #[test]
    fn a_client_that_hangs_up_while_it_waits_is_told_from_one_that_has_nothing_more_to_say() {
        let (_dir, path, mut server) = server();
        let (gone, listens) = (connect(&path), connect(&path));
        let mut asked = Vec::new();
        for client in [&gone, &listens] {
            (&*client).write_all(b"{\"do\":\"resume\"}\n").unwrap();
            server.serve(&mut |_, ticket| {
                asked.push(ticket);
                None
            });
        }
        listens.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(server.hung_up(), []);
        drop(gone);
        assert_eq!(server.hung_up(), [asked[0]]);
        assert_eq!(server.hung_up(), []);
        server.reply(asked[1], &ControlReply::Refused { why: "late".into() });
        assert!(matches!(replies(&listens, 1)[..], [ControlReply::Refused { .. }]));
    }

    #[test]
    fn nonsense_is_refused_and_the_connection_goes_on() {
        let (_dir, path, mut server) = server();
        let client = connect(&path);
        for nonsense in ["", "{}", "\u{0}\u{1}", "{\"do\":\"explode\"}", "[[[["] {
            (&client).write_all(nonsense.as_bytes()).unwrap();
            (&client).write_all(b"\n").unwrap();
            server.serve(&mut state);
            assert!(matches!(replies(&client, 1)[..], [ControlReply::Refused { .. }]), "{nonsense}");
        }
        (&client).write_all(b"{\"do\":\"state\"}\n").unwrap();
        server.serve(&mut state);
        assert!(matches!(replies(&client, 1)[..], [ControlReply::State { .. }]));
    }

    #[test]
    fn a_line_without_end_is_refused_and_the_connection_closed() {
        let (_dir, path, mut server) = server();
        let client = connect(&path);
        let mut sent = 0;
        client.set_nonblocking(true).unwrap();
        while sent < MAX_CONTROL_LINE + CHUNK {
            sent += (&client).write(&[b'x'; CHUNK]).unwrap_or(0);
            server.serve(&mut state);
        }
        client.set_nonblocking(false).unwrap();
        let mut text = Vec::new();
        // The close may reset the connection, as not all that was sent was read.
        let _ = (&client).read_to_end(&mut text);
        assert!(String::from_utf8_lossy(&text).contains("at most 65536 bytes"));
        assert!(server.clients.is_empty());
    }

    #[test]
    fn a_client_that_does_not_read_is_not_read_from() {
        let (_dir, path, mut server) = server();
        let client = connect(&path);
        client.set_nonblocking(true).unwrap();
        let mut accepted = 0;
        for _ in 0..100_000 {
            match (&client).write(b"{\"do\":\"state\"}\n") {
                Ok(n) => accepted += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => panic!("{e}"),
            }
            server.serve(&mut state);
        }
        assert!(accepted < 16 << 20, "{accepted}");
        assert!(server.clients[0].input.len() <= MAX_CONTROL_LINE + CHUNK);
    }

    #[test]
    fn the_socket_is_private_and_goes_with_its_server() {
        let (_dir, path, server) = server();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(Server::bind(&path), Err(ControlError::InUse(_))));
        drop(server);
        assert!(!path.exists());
    }

    #[test]
    fn a_dead_servers_socket_is_replaced_and_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(Server::bind(&path).unwrap());
        std::fs::write(&path, "mine").unwrap();
        assert!(matches!(Server::bind(&path), Err(ControlError::Bind { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn a_listener_that_cannot_accept_is_not_polled_for_a_while() {
        let (_dir, path, mut server) = server();
        assert_eq!((server.fds().count(), server.retry_after()), (1, None));
        let other = connect(&path);
        let listener = server.listener.try_clone().unwrap();
        // SAFETY: both descriptors are open and stay their owners'; the second is no listener for a while.
        assert!(unsafe { libc::dup2(other.as_raw_fd(), server.listener.as_raw_fd()) } >= 0);
        server.serve(&mut state);
        assert_eq!((server.fds().count(), server.retry_after()), (0, Some(ACCEPT_PAUSE)));
        // SAFETY: as above; this takes it back.
        assert!(unsafe { libc::dup2(listener.as_raw_fd(), server.listener.as_raw_fd()) } >= 0);
        server.serve(&mut state);
        assert_eq!((server.fds().count(), server.retry_after()), (2, None));
    }

    #[test]
    fn clients_past_the_limit_are_turned_away() {
        let (_dir, path, mut server) = server();
        let clients: Vec<_> = (0..=MAX_CLIENTS).map(|_| connect(&path)).collect();
        server.serve(&mut state);
        assert_eq!(server.clients.len(), MAX_CLIENTS);
        let mut byte = [0];
        assert_eq!((&clients[MAX_CLIENTS]).read(&mut byte).unwrap(), 0);
    }
}

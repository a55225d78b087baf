//! Saying hello and staying heard.
//!
//! ```text
//!   connect ──► Hello ──► Heartbeat every 5 s ──┐
//!      ▲                        ▲───────────────┘
//!      ├───────── at once ◄─────┴── the host closed, or the guest was restored from a snapshot
//!      └── wait (20 ms, doubled up to 2 s) ◄── that failed, too
//! ```
//!
//! A restored guest finds its connection reset (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`), and whoever restored it waits for this
//! hello: hence the first attempt without a pause.

use std::io;
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use ark_types::guest::{Frame, HEARTBEAT_INTERVAL_MS, Kind};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::framed::{Connection, LinkError};
use crate::socket::{Address, Connecting, Stream};
use crate::vitals;

/// Wait after the second failed attempt; after the first there is none.
const FIRST_WAIT: Duration = Duration::from_millis(20);
/// How long connecting may take; vsock itself gives up after 2 s (`VSOCK_DEFAULT_CONNECT_TIMEOUT`).
const LONGEST_CONNECT: Duration = Duration::from_secs(3);
/// Longest wait between two attempts: an `arkd` that takes over a running guest hears from it within that time, and a guest that
/// nobody listens to wakes up this rarely.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// A connection to the host that hello is about to be said on.
#[derive(Debug)]
pub struct Call(Connecting);

/// Begins to connect to `address`; what has to be done before hello goes on meanwhile.
///
/// # Errors
/// When connecting fails at once.
pub fn call(address: &Address) -> io::Result<Call> {
    Stream::begin_connect(address).map(Call)
}

impl Call {
    /// Says hello in the name of `guestd` (a version) as soon as the connection stands.
    ///
    /// # Errors
    /// [`LinkError`] when nobody listens or the connection breaks at once.
    pub fn say_hello(self, guestd: &str) -> Result<Connection, LinkError> {
        let mut connection = Connection::new(self.0.wait(LONGEST_CONNECT)?);
        connection.send(&Frame::json(Kind::Hello, &vitals::hello(guestd))?)?;
        Ok(connection)
    }
}

/// Sends heartbeats over `first` (the connection hello was said on, if it was) and, whenever the host's side is gone, says
/// hello again as soon as somebody listens. Heartbeats are numbered through, whatever the connection.
pub fn keep_heard(address: &Address, guestd: &str, first: Option<Connection>) -> ! {
    let interval = Duration::from_millis(HEARTBEAT_INTERVAL_MS);
    let mut connection = first;
    let mut sequence = 0;
    let mut wait = Duration::ZERO;
    loop {
        if connection.is_none() {
            connection = call(address).ok().and_then(|call| call.say_hello(guestd).ok());
        }
        if let Some(open) = &mut connection {
            sequence += 1;
            if beat(open, sequence) && stays_open(open, interval) {
                wait = Duration::ZERO;
                continue;
            }
        }
        connection = None;
        thread::sleep(wait);
        wait = (wait * 2).clamp(FIRST_WAIT, LONGEST_WAIT);
    }
}

/// Sends heartbeat number `sequence`; whether it could.
fn beat(connection: &mut Connection, sequence: u64) -> bool {
    let beat = Frame::json(Kind::Heartbeat, &vitals::heartbeat(sequence)).map_err(LinkError::from);
    beat.and_then(|beat| connection.send(&beat)).is_ok()
}

/// Waits for `time`, but no longer than until the host closes; whether it is still there. The host never sends on this
/// connection, so anything to read is taken as its end too.
fn stays_open(connection: &Connection, time: Duration) -> bool {
    let end = Instant::now() + time;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        let mut fds = [PollFd::new(connection.stream().as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(left.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
        if poll(&mut fds, timeout).is_ok_and(|ready| ready > 0) {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use ark_types::guest::{Heartbeat, Hello};

    use super::*;
    use crate::socket::Listener;

    #[test]
    fn hello_is_said_again_when_the_host_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::Unix(dir.path().join("s"));
        let guest = address.clone();
        thread::spawn(move || keep_heard(&guest, "7.8", None));
        let mut last = 0;
        for _ in 0..2 {
            let _ = std::fs::remove_file(dir.path().join("s"));
            let listener = Listener::bind(&address).unwrap();
            let mut host = Connection::new(listener.accept().unwrap());
            let hello: Hello = host.recv().unwrap().unwrap().parse().unwrap();
            assert_eq!(hello.guestd, "7.8");
            let beat: Heartbeat = host.recv().unwrap().unwrap().parse().unwrap();
            assert!(beat.sequence > last);
            last = beat.sequence;
        }
    }
}

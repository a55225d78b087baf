//! Asking the guest to power off, as any client of its socket device would: connect to the device's Unix socket, name
//! guestd's port, send the one frame.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ark_types::guest::{CONTROL_PORT, Frame, HEADER_LEN, Kind};

use crate::mailbox::{Mailbox, News};

const STACK: usize = 64 << 10;
/// Pause between attempts: a guest that is still starting has nobody on the port yet.
const RETRY: Duration = Duration::from_millis(50);
/// Longest answer to `CONNECT`: `OK ` and a port number.
const MAX_ANSWER: u64 = 32;

/// Asks in a thread of its own until the guest has agreed or `grace` is over. Without a socket device (`uds` is `None`) it
/// tells the owner so.
pub fn ask(uds: Option<PathBuf>, grace: Duration, mailbox: &Mailbox) {
    let Some(uds) = uds else {
        let why = "the guest has no vsock device by which it could be asked to power off";
        return mailbox.send(News::CannotAsk(why.into()));
    };
    let deadline = Instant::now() + grace;
    let thread = std::thread::Builder::new().name("power-off".into()).stack_size(STACK);
    // The thread ends by itself at the deadline, or with the process.
    if let Err(error) = thread.spawn(move || ask_until(&uds, deadline)) {
        mailbox.send(News::CannotAsk(format!("no thread to ask the guest to power off: {error}")));
    }
}

fn ask_until(uds: &Path, deadline: Instant) {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || ask_once(uds, left).is_ok() {
            return;
        }
        std::thread::sleep(RETRY.min(left));
    }
}

/// One attempt, which waits for the guest's answer.
fn ask_once(uds: &Path, limit: Duration) -> io::Result<()> {
    let mut stream = UnixStream::connect(uds)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    stream.write_all(format!("CONNECT {CONTROL_PORT}\n").as_bytes())?;
    let mut answer = String::new();
    let mut reader = BufReader::with_capacity(64, (&stream).take(MAX_ANSWER));
    reader.read_line(&mut answer)?;
    if !answer.starts_with("OK ") {
        return Err(io::Error::other("the guest does not listen"));
    }
    let frame = Frame::empty(Kind::PowerOff).encode();
    (&stream).write_all(&frame)?;
    // Whatever it answers, it has heard. An end of the connection instead may mean that nobody had.
    let mut reply = [0; HEADER_LEN];
    (&stream).read_exact(&mut reply)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A socket device with guestd behind it; the first `refusals` connections find nobody on the port.
    fn guest(uds: &Path, refusals: u32) -> std::thread::JoinHandle<Kind> {
        let listener = UnixListener::bind(uds).unwrap();
        std::thread::spawn(move || {
            for attempt in 0.. {
                let (stream, _) = listener.accept().unwrap();
                let mut line = String::new();
                BufReader::with_capacity(1, &stream).read_line(&mut line).unwrap();
                assert_eq!(line, "CONNECT 1025\n");
                if attempt < refusals {
                    continue;
                }
                (&stream).write_all(b"OK 1073741824\n").unwrap();
                let mut header = [0; HEADER_LEN];
                (&stream).read_exact(&mut header).unwrap();
                (&stream).write_all(&Frame::empty(Kind::Ok).encode()).unwrap();
                return Frame::decode(&header).unwrap().kind;
            }
            unreachable!()
        })
    }

    #[test]
    fn the_guest_gets_the_frame_even_when_it_is_not_up_at_first() {
        let dir = tempfile::tempdir().unwrap();
        let uds = dir.path().join("v.sock");
        let guest = guest(&uds, 2);
        let mailbox = Mailbox::new().unwrap();
        ask(Some(uds), Duration::from_secs(10), &mailbox);
        assert_eq!(guest.join().unwrap(), Kind::PowerOff);
        assert_eq!(mailbox.take(), None);
    }

    #[test]
    fn without_a_device_the_owner_is_told() {
        let mailbox = Mailbox::new().unwrap();
        ask(None, Duration::from_secs(10), &mailbox);
        assert!(matches!(mailbox.take(), Some(News::CannotAsk(_))));
    }

    #[test]
    fn a_guest_that_never_answers_costs_the_grace_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let uds = dir.path().join("v.sock");
        let _silent = UnixListener::bind(&uds).unwrap();
        let start = Instant::now();
        ask_until(&uds, start + Duration::from_millis(200));
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}

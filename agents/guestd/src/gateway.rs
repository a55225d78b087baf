//! A Unix socket in the guest that leads to a port of the host, for programs that do not speak vsock: clients of OpenAI's API.
//!
//! It may be called by every user of the guest: whether the agent may use inference is the host's to say. It goes along in
//! snapshots, and what connects to it in a fork reaches the fork's own host; what was connected before has ended with the snapshot.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use ark_link::{Address, Listener, Stream};

use crate::bridge::bridge;

/// Most connections at a time: as many as the host takes. More wait.
const MOST: usize = 64;
/// Stack of the threads, which copy through buffers on the heap.
const STACK: usize = 64 << 10;
/// Pause after an accept(2) that failed for want of something, descriptors for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How many connections there are.
#[derive(Default)]
struct Room {
    taken: Mutex<usize>,
    left: Condvar,
}

/// A connection's part of the room.
struct Place(Arc<Room>);

impl Room {
    /// Waits for a place.
    fn take(self: &Arc<Self>) -> Place {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |taken: &mut usize| *taken >= MOST;
        let mut taken = self.left.wait_while(taken, full).unwrap_or_else(PoisonError::into_inner);
        *taken += 1;
        Place(Arc::clone(self))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.0.taken.lock().unwrap_or_else(PoisonError::into_inner);
        *taken = taken.saturating_sub(1);
        drop(taken);
        self.0.left.notify_one();
    }
}

/// Connects whoever connects to `path` with `host`, from a thread of its own on.
///
/// # Errors
/// When the socket or the thread cannot be made.
pub(crate) fn open(path: &Path, host: Address) -> io::Result<()> {
    let listener = Listener::bind(&Address::Unix(path.to_owned()))?;
    fs::set_permissions(path, Permissions::from_mode(0o666))?;
    thread::Builder::new().stack_size(STACK).spawn(move || serve(&listener, &host))?;
    Ok(())
}

fn serve(listener: &Listener, host: &Address) {
    let room = Arc::new(Room::default());
    loop {
        let place = room.take();
        match listener.accept() {
            Ok(program) => {
                let host = host.clone();
                let lead = move || {
                    lead(&program, &host);
                    drop(place);
                };
                // Without a thread the program finds its connection closed.
                let _ = thread::Builder::new().stack_size(STACK).spawn(lead);
            }
            Err(_) => thread::sleep(ACCEPT_PAUSE),
        }
    }
}

/// Connects `program` with `host`; where that does not answer, the connection ends.
fn lead(program: &Stream, host: &Address) {
    if let Ok(host) = Stream::connect(host) {
        // Without a second thread both have ended.
        let _ = bridge(program, &host);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    fn opened() -> (tempfile::TempDir, UnixListener, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (path, host) = (dir.path().join("socket"), dir.path().join("host"));
        let listener = UnixListener::bind(&host).unwrap();
        open(&path, Address::Unix(host)).unwrap();
        (dir, listener, path)
    }

    #[test]
    fn whoever_connects_is_connected_with_the_host() {
        let (_dir, host, path) = opened();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o666);
        let many = vec![7; 300_000];
        for _ in 0..3 {
            let mut program = UnixStream::connect(&path).unwrap();
            let mut there = host.accept().unwrap().0;
            let answering = thread::spawn(move || {
                let mut asked = Vec::new();
                there.read_to_end(&mut asked).unwrap();
                there.write_all(b"answer").unwrap();
                asked
            });
            program.write_all(&many).unwrap();
            program.shutdown(std::net::Shutdown::Write).unwrap();
            let mut answer = String::new();
            program.read_to_string(&mut answer).unwrap();
            assert_eq!((answer.as_str(), answering.join().unwrap()), ("answer", many.clone()));
        }
    }

    #[test]
    fn a_host_that_is_not_there_ends_the_connection_and_only_that() {
        let dir = tempfile::tempdir().unwrap();
        let (path, host) = (dir.path().join("socket"), dir.path().join("host"));
        open(&path, Address::Unix(host.clone())).unwrap();
        let mut program = UnixStream::connect(&path).unwrap();
        assert_eq!(program.read(&mut [0; 4]).unwrap(), 0);
        let listener = UnixListener::bind(&host).unwrap();
        let mut program = UnixStream::connect(&path).unwrap();
        let mut there = listener.accept().unwrap().0;
        there.write_all(b"here").unwrap();
        let mut said = [0; 4];
        program.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"here");
        // One side that is gone ends the other.
        drop(there);
        assert_eq!(program.read(&mut said).unwrap(), 0);
    }

    #[test]
    fn more_than_there_is_room_for_wait_until_one_ends() {
        let (_dir, host, path) = opened();
        let programs: Vec<_> = (0..MOST).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let there: Vec<_> = (0..MOST).map(|_| host.accept().unwrap().0).collect();
        let mut late = UnixStream::connect(&path).unwrap();
        late.write_all(b"late").unwrap();
        host.set_nonblocking(true).unwrap();
        assert_eq!(host.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        host.set_nonblocking(false).unwrap();
        drop((programs, there));
        let mut said = [0; 4];
        host.accept().unwrap().0.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"late");
    }
}

//! The guest's hello and heartbeat: a socket the guest connects to (through its VMM) on host port 1024.
//!
//! Any program in the guest may connect there, so one connection is served at a time, at a bounded pace, and what comes
//! after the first hello can only change what the guest reports about itself.

use std::path::Path;
use std::time::Duration;

use ark_types::guest::{Heartbeat, Hello, Kind};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{FrameReader, GuestFailure};

/// Least time between two frames, or two connections, that are looked at: a chattering guest waits, arkd does not spin.
const PACE: Duration = Duration::from_millis(50);
/// A connection on which no hello comes makes room for another after this: a busy guest may have given up a call that this
/// side still sees open, and calls again.
const FIRST_WORD: Duration = Duration::from_secs(10);
/// A connection that falls silent for this long after its hello makes room for another.
const SILENCE: Duration = Duration::from_secs(60);

/// What a guest said.
#[derive(Debug)]
pub enum Event {
    /// It is up.
    Hello(Hello),
    /// It is alive.
    Heartbeat(Heartbeat),
    /// It said something else; the connection was closed.
    Misbehaved(GuestFailure),
}

/// Listens for one guest. Dropping it closes the socket.
#[derive(Debug)]
pub struct Greeter {
    task: JoinHandle<()>,
    events: mpsc::Receiver<Event>,
}

impl Greeter {
    /// Listens on `socket`; call it before the VMM starts.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn listen(socket: &Path) -> std::io::Result<Self> {
        let listener = UnixListener::bind(socket)?;
        let (sender, events) = mpsc::channel(1);
        Ok(Self { task: tokio::spawn(serve(listener, sender)), events })
    }

    /// The next thing the guest says; waits for ever when it says nothing. Cancel-safe.
    pub async fn next(&mut self) -> Event {
        match self.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Greeter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: UnixListener, events: mpsc::Sender<Event>) {
    loop {
        if let Ok((stream, _)) = listener.accept().await
            && let Err(failure) = converse(stream, &events).await
            && events.send(Event::Misbehaved(failure)).await.is_err()
        {
            return;
        }
        tokio::time::sleep(PACE).await;
    }
}

/// One connection from hello to end.
async fn converse(stream: UnixStream, events: &mpsc::Sender<Event>) -> Result<(), GuestFailure> {
    // The write half has to live as long: dropping it would shut the socket down in that direction.
    let (reader, _writer) = stream.into_split();
    let mut reader = FrameReader::new(reader);
    let Ok(hello) = tokio::time::timeout(FIRST_WORD, reader.expect(Kind::Hello)).await else { return Ok(()) };
    let mut event = Event::Hello(hello?.parse()?);
    while events.send(event).await.is_ok() {
        tokio::time::sleep(PACE).await;
        let Ok(frame) = tokio::time::timeout(SILENCE, reader.expect(Kind::Heartbeat)).await else { break };
        event = match frame {
            Err(GuestFailure::Closed | GuestFailure::Broken(_)) => break,
            frame => Event::Heartbeat(frame?.parse()?),
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use ark_types::guest::Frame;
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    fn hello() -> Vec<u8> {
        let hello = Hello { guestd: "0.1".into(), kernel: "6.12".into(), uptime_ms: 5, cpus: 1 };
        Frame::json(Kind::Hello, &hello).unwrap().encode()
    }

    #[tokio::test]
    async fn a_guest_says_hello_and_lives_and_garbage_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock_1024");
        let mut greeter = Greeter::listen(&path).unwrap();

        let mut guest = UnixStream::connect(&path).await.unwrap();
        guest.write_all(&hello()).await.unwrap();
        assert!(matches!(greeter.next().await, Event::Hello(h) if h.kernel == "6.12"));
        let beat = Heartbeat { sequence: 1, uptime_ms: 7, mem_available_kib: 3, load1_x100: 0 };
        guest.write_all(&Frame::json(Kind::Heartbeat, &beat).unwrap().encode()).await.unwrap();
        assert!(matches!(greeter.next().await, Event::Heartbeat(b) if b == beat));
        guest.write_all(&hello()).await.unwrap();
        assert!(matches!(greeter.next().await, Event::Misbehaved(GuestFailure::Unexpected(Kind::Hello))));

        let mut liar = UnixStream::connect(&path).await.unwrap();
        liar.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        assert!(matches!(greeter.next().await, Event::Misbehaved(GuestFailure::Frame(_))));

        let mut again = UnixStream::connect(&path).await.unwrap();
        again.write_all(&hello()).await.unwrap();
        assert!(matches!(greeter.next().await, Event::Hello(_)));
    }
}

//! Where one agent's programs find services, and streams on to replicas.
//!
//! ```text
//!  program ─ vsock 2:1026 ─► its VMM ─ v.sock_1026 ─► here ─ v.sock, Dial ─► replica's VMM ─► guestd ─► 127.0.0.1:port
//! ```
//!
//! Everything an agent sends is hostile until checked: its line is bounded in length and time, and its streams in number. They
//! all end with its VMM, and count as calls of the replica that they lead to.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use ark_types::guest::SERVICES_PORT;
use ark_types::label::Owner;
use ark_types::layout::AgentDir;
use ark_types::plain::plain;
use ark_types::service::{MAX_LINE, NoWish, Wish};
use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::{ServiceError, call, view};
use crate::agent::Handle;
use crate::core::Core;
use crate::guest::dial;
use crate::ports::{self, Port, part};

/// Most connections of one agent at a time.
const MOST: usize = 64;
/// How long an agent may take to say what it wants.
const FIRST_WORD: Duration = Duration::from_secs(10);
/// How long it waits for a replica that is ready.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a stream that one side has ended goes on while nothing comes of the other: whoever ended it may be gone, and the
/// other waits for it.
const QUIET: Duration = Duration::from_secs(300);
/// Bytes that are passed on at a time.
const BUFFER: usize = 8 << 10;

/// Listens for the agent `id`, whose directory is `dir`, in place of who did before; call it before the VMM starts.
///
/// # Errors
/// When the socket cannot be made.
pub(crate) fn listen(core: &Arc<Core>, dir: &AgentDir, id: &str) -> io::Result<Port> {
    let (core, id) = (Arc::downgrade(core), id.to_owned());
    Port::listen(dir, SERVICES_PORT, MOST, move |stream| answer(stream, core.clone(), id.clone()))
}

/// Why an agent does not get what it wants.
#[derive(Debug, thiserror::Error)]
enum Refused {
    /// It was not understood.
    #[error(transparent)]
    NoWish(#[from] NoWish),
    /// It said nothing in time, or too much.
    #[error("no line of at most {MAX_LINE} bytes came within {} s", FIRST_WORD.as_secs())]
    NoLine,
    /// It is none yet, or no more.
    #[error("services are for agents that run")]
    NoAgent,
    /// The service.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// It has no port.
    #[error("the service {0} takes no connections: its spec names no port")]
    NoPort(String),
    /// The replica cannot be reached.
    #[error("the replica {0} cannot be connected with: {1}")]
    Replica(String, String),
}

/// Answers one connection. Whoever does not listen is not told.
async fn answer(mut stream: UnixStream, core: Weak<Core>, id: String) {
    let refused = match wish(&mut stream).await {
        Ok((Wish::List, _)) => list(&mut stream, &core, &id).await,
        Ok((Wish::Connect(service), early)) => {
            connect(&mut stream, early, &core, &id, service.as_ref()).await
        }
        Err(refused) => Err(refused),
    };
    if let Err(refused) = refused {
        // One line, whatever is quoted in it.
        let line = refused.to_string().replace(['\n', '\r'], " ");
        let _ = stream.write_all(format!("ERR {line}\n").as_bytes()).await;
    }
    part(stream).await;
}

/// What the agent wants, and what it sent behind that.
async fn wish(stream: &mut UnixStream) -> Result<(Wish, BytesMut), Refused> {
    let mut buffer = BytesMut::with_capacity(MAX_LINE);
    let line = async {
        loop {
            if let Some(end) = buffer.iter().take(MAX_LINE).position(|byte| *byte == b'\n') {
                return Some(buffer.split_to(end + 1));
            }
            let is_too_long = buffer.len() >= MAX_LINE;
            if is_too_long || stream.read_buf(&mut buffer).await.ok()? == 0 {
                return None;
            }
        }
    };
    let line = timeout(FIRST_WORD, line).await.ok().flatten().ok_or(Refused::NoLine)?;
    let wish = Wish::parse(line.strip_suffix(b"\n").unwrap_or(&line))?;
    Ok((wish, buffer))
}

/// The agent `id`, and whose it is.
fn caller(core: &Core, id: &str) -> Result<(Handle, Owner), Refused> {
    let agent = ports::caller(core, id).ok_or(Refused::NoAgent)?;
    let owner = agent.look(|agent| agent.owner.clone());
    Ok((agent, owner))
}

async fn list(stream: &mut UnixStream, core: &Weak<Core>, id: &str) -> Result<(), Refused> {
    let core = core.upgrade().ok_or(Refused::NoAgent)?;
    let (_, owner) = caller(&core, id)?;
    let mut text = Vec::new();
    for found in view::found(&core, &owner) {
        // Of a name and numbers there is always a JSON form.
        text.extend(serde_json::to_vec(&found).unwrap_or_default());
        text.push(b'\n');
    }
    let _ = stream.write_all(&text).await;
    Ok(())
}

/// Connects the agent with a replica of `service`, until both sides are done, or one is and the other is quiet for [`QUIET`].
async fn connect(
    stream: &mut UnixStream,
    early: BytesMut,
    core: &Weak<Core>,
    id: &str,
    service: &str,
) -> Result<(), Refused> {
    let core = core.upgrade().ok_or(Refused::NoAgent)?;
    let (caller, owner) = caller(&core, id)?;
    // That of another owner is as good as none.
    let spec = view::one(&core, service).ok().map(|service| service.spec);
    let spec = spec.filter(|spec| spec.owner == owner);
    let spec = spec.ok_or_else(|| ServiceError::NotFound(service.to_owned()))?;
    let port = spec.port.ok_or_else(|| Refused::NoPort(service.to_owned()))?;
    let picked = call::begin(&core, service, PATIENCE).await?;
    drop(core);
    let replica = picked.handle().clone();
    // It may have been made anew by somebody else meanwhile.
    if replica.agent().owner != owner {
        picked.end(false);
        return Err(ServiceError::NotFound(service.to_owned()).into());
    }
    let name = replica.name().to_string();
    let address = replica.guest().map_err(|why| Refused::Replica(name.clone(), why.to_string()))?;
    let mut dialled = match dial(address, port).await {
        Ok(dialled) => dialled,
        Err(failure) => {
            picked.end(false);
            return Err(Refused::Replica(name, failure.to_string()));
        }
    };
    let pass_on = async {
        stream.write_all(format!("OK {name}\n").as_bytes()).await?;
        stream.write_all(&dialled.first).await?;
        dialled.stream.write_all(&early).await?;
        pass_both(stream, &mut dialled.stream, QUIET).await
    };
    tokio::select! {
        passed = pass_on => if let Err(error) = passed {
            tracing::debug!(service, replica = name, error = %plain(&error), "a stream to a replica broke");
        },
        () = replica.ended() => {}
        () = caller.ended() => {}
    }
    picked.end(true);
    Ok(())
}

/// Passes on what either side sends until both are done, or one is and nothing comes of the other for as long as `quiet`.
async fn pass_both(one: &mut UnixStream, other: &mut UnixStream, quiet: Duration) -> io::Result<()> {
    let passed = AtomicU64::new(0);
    let ((one_reader, one_writer), (other_reader, other_writer)) = (one.split(), other.split());
    let mut there = std::pin::pin!(pass(one_reader, other_writer, &passed));
    let mut back = std::pin::pin!(pass(other_reader, one_writer, &passed));
    tokio::select! {
        ended = &mut there => {
            ended?;
            while_it_speaks(back, &passed, quiet).await
        }
        ended = &mut back => {
            ended?;
            while_it_speaks(there, &passed, quiet).await
        }
    }
}

/// Passes on what `from` sends, and its end.
async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    passed: &AtomicU64,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = from.read(&mut buffer).await?;
        let Some(bytes) = buffer.get(..count).filter(|bytes| !bytes.is_empty()) else { break };
        to.write_all(bytes).await?;
        passed.fetch_add(1, Ordering::Relaxed);
    }
    to.shutdown().await
}

/// Waits for the end of `passing`, as long as it goes on to count in `passed`, each time within `quiet`.
async fn while_it_speaks(
    mut passing: impl Future<Output = io::Result<()>> + Unpin,
    passed: &AtomicU64,
    quiet: Duration,
) -> io::Result<()> {
    loop {
        let before = passed.load(Ordering::Relaxed);
        match timeout(quiet, &mut passing).await {
            Ok(ended) => return ended,
            Err(_) if passed.load(Ordering::Relaxed) == before => return Err(io::ErrorKind::TimedOut.into()),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    #[tokio::test]
    async fn a_stream_whose_one_side_is_gone_ends_when_the_other_is_quiet() {
        let (mut caller, mut ours) = UnixStream::pair().unwrap();
        let (mut theirs, mut replica) = UnixStream::pair().unwrap();
        let quiet = Duration::from_millis(1);
        let passing = tokio::spawn(async move { pass_both(&mut ours, &mut theirs, quiet).await });
        let mut buffer = [0; 16];
        // While both are there, quiet means nothing.
        for _ in 0..5 {
            caller.write_all(b"question").await.unwrap();
            assert_eq!(replica.read(&mut buffer).await.unwrap(), 8);
            sleep(3 * quiet).await;
        }
        caller.shutdown().await.unwrap();
        assert_eq!(replica.read(&mut buffer).await.unwrap(), 0);
        assert_eq!(passing.await.unwrap().unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(caller.read(&mut buffer).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_stream_ends_with_the_end_of_both_sides() {
        let (mut caller, mut ours) = UnixStream::pair().unwrap();
        let (mut theirs, mut replica) = UnixStream::pair().unwrap();
        let passing = tokio::spawn(async move { pass_both(&mut ours, &mut theirs, QUIET).await });
        caller.write_all(b"question").await.unwrap();
        caller.shutdown().await.unwrap();
        let mut text = String::new();
        replica.read_to_string(&mut text).await.unwrap();
        replica.write_all(b"answer").await.unwrap();
        drop(replica);
        let mut answer = String::new();
        caller.read_to_string(&mut answer).await.unwrap();
        assert_eq!((text.as_str(), answer.as_str()), ("question", "answer"));
        passing.await.unwrap().unwrap();
    }
}

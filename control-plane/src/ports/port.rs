//! One port of the host that an agent's programs connect to.

use std::io;
use std::time::Duration;

use ark_types::layout::AgentDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};

/// How long an agent that was answered may take to end its side.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Most bytes that are read from it then.
const MAX_UNREAD: usize = 64 << 10;
/// Pause after an accept(2) that failed for want of something, descriptors for example.
const PAUSE: Duration = Duration::from_millis(50);

/// Listens for one agent's programs at one port. Dropping it ends everything that they have here.
#[derive(Debug)]
pub(crate) struct Port {
    task: JoinHandle<()>,
}

impl Port {
    /// Listens at `port` for the agent whose directory is `dir`, in place of who did before, and has each connection answered by
    /// `answer`, at most `most` at a time; call it before the VMM starts.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub(crate) fn listen<F, A>(dir: &AgentDir, port: u32, most: usize, answer: F) -> io::Result<Self>
    where
        F: Fn(UnixStream) -> A + Send + 'static,
        A: Future<Output = ()> + Send + 'static,
    {
        let socket = dir.host_port(port);
        // Anything but its absence is told by what follows.
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket)?;
        Ok(Self { task: tokio::spawn(serve(listener, most, answer)) })
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Serves connections, at most `most` at a time. They end with this future.
async fn serve<F, A>(listener: UnixListener, most: usize, answer: F)
where
    F: Fn(UnixStream) -> A,
    A: Future<Output = ()> + Send + 'static,
{
    let mut streams = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = streams.join_next() => {}
            accepted = listener.accept(), if streams.len() < most => match accepted {
                Ok((stream, _)) => drop(streams.spawn(answer(stream))),
                Err(_) => sleep(PAUSE).await,
            },
        }
    }
}

/// Says that no more comes, and reads what still does for a moment: closed with something unread, the connection would be broken
/// before the other side has read the answer.
pub(crate) async fn part(mut stream: UnixStream) {
    let _ = stream.shutdown().await;
    let reading = async {
        let mut buffer = [0; 4096];
        let mut most = MAX_UNREAD;
        while let Ok(count @ 1..) = stream.read(&mut buffer).await {
            most = most.saturating_sub(count);
            if most == 0 {
                return;
            }
        }
    };
    let _ = timeout(LAST_WORDS, reading).await;
}

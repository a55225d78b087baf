//! Callers by socket: each connection is served by a task of its own, and not more than a few hundred at once.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;

use ark_inference::server::{Models, serve};
use ark_link::{Address, Listener};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc};

/// Connections at once; more wait to be accepted.
const MAX_CONNECTIONS: usize = 256;

/// A socket whose connections come out one by one.
pub(crate) struct Listening {
    connections: mpsc::Receiver<io::Result<StdStream>>,
    what: String,
}

impl Listening {
    /// Listens; accepting blocks, so a thread does it.
    pub(crate) fn new(address: &Address) -> io::Result<Self> {
        let listener = Listener::bind(address)?;
        let (sender, connections) = mpsc::channel(1);
        std::thread::Builder::new().name("ark-accept".to_owned()).spawn(move || {
            loop {
                let connection = listener.accept().and_then(|stream| {
                    stream.set_nonblocking(true)?;
                    // The kernel reads and writes all stream sockets alike, and no address is asked for.
                    Ok(StdStream::from(OwnedFd::from(stream)))
                });
                let failed = connection.is_err();
                if sender.blocking_send(connection).is_err() || failed {
                    return;
                }
            }
        })?;
        Ok(Self { connections, what: address.to_string() })
    }

    /// Serves all who connect, until accepting fails.
    pub(crate) async fn serve(
        mut self,
        models: Arc<Models>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        tracing::info!("listening on {}", self.what);
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let permit = Arc::clone(&room).acquire_owned().await?;
            let Some(connection) = self.connections.recv().await else {
                return Err(format!("accepting on {} ended", self.what).into());
            };
            let stream = UnixStream::from_std(
                connection.map_err(|e| format!("cannot accept on {}: {e}", self.what))?,
            )?;
            let models = Arc::clone(&models);
            tokio::spawn(async move {
                let (read, write) = stream.into_split();
                if let Err(error) = serve(models, read, write, false).await {
                    tracing::debug!("a connection ended: {error}");
                }
                drop(permit);
            });
        }
    }
}

//! Listeners: the Unix socket always, TCP when asked for; both serve the same routes.

use ark_types::plain::plain;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use axum::Router;
use axum::serve::ListenerExt as _;
use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Why nobody could be served.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The Unix socket.
    #[error("the socket {path} cannot be made: {}", plain(source))]
    Unix {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The TCP address.
    #[error(
        "{address} cannot be listened on: {}; end the program that does, or choose another with --listen",
        plain(source)
    )]
    Tcp {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// The Unix socket. Dropping it removes the file.
#[derive(Debug)]
pub struct UnixSocket {
    listener: Option<UnixListener>,
    path: PathBuf,
}

impl UnixSocket {
    /// Listens on `path`, mode 0600. The file appears with its final mode: it is made beside and renamed over what an
    /// earlier `arkd` left, so call this with the lock held.
    ///
    /// # Errors
    /// [`ListenError::Unix`].
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let bind = || {
            let mut beside = path.as_os_str().to_owned();
            beside.push("+");
            let beside = PathBuf::from(beside);
            match std::fs::remove_file(&beside) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            let listener = UnixListener::bind(&beside)?;
            std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o600))?;
            std::fs::rename(&beside, path)?;
            Ok(listener)
        };
        let listener = bind().map_err(|source| ListenError::Unix { path: path.to_owned(), source })?;
        Ok(Self { listener: Some(listener), path: path.to_owned() })
    }

    /// Serves `routes` until `end`, without asking for a token. The second time it has nothing to serve on.
    pub fn serve(&mut self, routes: Router, end: CancellationToken) -> Option<JoinHandle<io::Result<()>>> {
        let listener = self.listener.take()?;
        Some(tokio::spawn(
            axum::serve(listener, routes).with_graceful_shutdown(end.cancelled_owned()).into_future(),
        ))
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Listens on `address`.
///
/// # Errors
/// [`ListenError::Tcp`].
pub async fn bind_tcp(address: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address).await.map_err(|source| ListenError::Tcp { address, source })
}

/// Serves `routes` on `listener` until `end`; they have to ask for the token themselves.
pub fn serve_tcp(
    listener: TcpListener,
    routes: Router,
    end: CancellationToken,
) -> JoinHandle<io::Result<()>> {
    let listener = listener.tap_io(|stream| {
        // Frames and replies are small and wanted at once.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY cannot be set");
        }
    });
    tokio::spawn(axum::serve(listener, routes).with_graceful_shutdown(end.cancelled_owned()).into_future())
}

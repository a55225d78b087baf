//! The whole: from the lock to the last socket removed.
//!
//! ```text
//!  lock ─► look what an earlier arkd left ─► hold what its agents need ─► take them in ─► listen (Unix, TCP) ─► serve …
//!                           ▲
//!                           └─ the next arkd ◄── agents run on ◄──┬── SIGTERM, SIGINT, `keep`
//!       files removed ◄── servers end ◄── agents end ◄────────────┴── POST /v1/shutdown, `end` (`ark stop`)
//! ```

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ark_types::event::Stream;
use ark_types::plain::plain;
use ark_types::shutdown::AgentsFate;
use axum::middleware::from_fn_with_state;
use futures_util::future::join_all;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::agent::{self, Known};
use crate::auth::{Token, TokenError, demand_token};
use crate::cleanup;
use crate::config::{Config, ConsoleLimits};
use crate::core::Core;
use crate::idempotency;
use crate::ledger::{Ledger, LedgerError};
use crate::routes;
use crate::server::{ListenError, UnixSocket, bind_tcp, serve_tcp};
use crate::settings::Settings;
use crate::store::{EventLog, OpenError, SqliteLog};
use crate::survivors::{self, Stance, Survivor, Survivors};
use crate::telemetry;
use crate::version;

/// Time the guests have to end in order when `arkd` ends.
const GRACE: Duration = Duration::from_secs(2);
/// Time that open connections have to end after their agents did.
const CONNECTIONS_GRACE: Duration = Duration::from_secs(2);

/// Why `arkd` did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The run directory.
    #[error("the run directory {path} cannot be used: {}; set ARK_RUN to one that can", plain(source))]
    RunDir {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The state directory.
    #[error("the state directory {path} cannot be used: {}; set ARK_STATE to one that can", plain(source))]
    StateDir {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another `arkd` is there.
    #[error(
        "another arkd{holder} already serves {dir}: use it, stop it, or set {variable} to another directory"
    )]
    Second {
        /// ` (pid 7)` where it is known.
        holder: String,
        /// The run or state directory.
        dir: PathBuf,
        /// What chooses it.
        variable: &'static str,
    },
    /// The token.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// A listener.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The log of events.
    #[error(transparent)]
    Log(#[from] OpenError),
    /// What is in the log of events.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// A serving `arkd`. Dropped without [`Self::shut_down`] or [`Self::leave`] it kills its agents, unless its process is killed.
#[derive(Debug)]
pub struct Daemon {
    core: Arc<Core>,
    end: CancellationToken,
    servers: Vec<JoinHandle<io::Result<()>>>,
    tcp: Option<SocketAddr>,
    // Dropped in this order: the socket goes while the lock is still held.
    _socket: UnixSocket,
    _state_lock: Lock,
    _lock: Lock,
}

impl Daemon {
    /// Starts serving.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left behind then.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        Self::start_on(config, |log| log).await
    }

    /// As [`Self::start`], over what `wrap` makes of the log of events.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left behind then.
    pub async fn start_on(
        config: Config,
        wrap: impl FnOnce(Arc<dyn EventLog>) -> Arc<dyn EventLog>,
    ) -> Result<Self, StartError> {
        let run = config.run.clone();
        let unusable = |source| StartError::RunDir { path: run.0.clone(), source };
        cleanup::make_private_dir(&run.0).map_err(unusable)?;
        let lock = Lock::take(&run.lock()).map_err(|failure| match failure {
            LockFailure::Held(holder) => {
                StartError::Second { holder, dir: run.0.clone(), variable: "ARK_RUN" }
            }
            LockFailure::System(source) => unusable(source),
        })?;
        let port = match config.listen {
            // The port first: when it is taken, what an earlier arkd left is left alone.
            Some(address) => Some(bind_tcp(address).await?),
            None => None,
        };
        let state_lock = lock_state(&config.state.0)?;
        let tcp = match port {
            Some(listener) => Some((listener, Token::load_or_make(&config.token_file)?)),
            None => None,
        };
        let mut survivors = survivors::look(&run, &config.state).await.map_err(unusable)?;
        if survivors.directories_removed > 0 {
            tracing::warn!(
                vmms = survivors.vmms_ended,
                directories = survivors.directories_removed,
                "cleaned up after an earlier arkd"
            );
        }
        let mut socket = UnixSocket::bind(&run.api_socket())?;

        let state = config.state.0.clone();
        let log = wrap(Arc::new(SqliteLog::open(&config.state.events())?));
        let ledger = Ledger::open(Arc::clone(&log), config.compaction).await?;
        let core = Core::new(config, &survivors.needed(), log, ledger);
        let (core, held) = core.map_err(|source| StartError::StateDir { path: state, source })?;
        let untold = std::mem::take(&mut survivors.untold);
        take_in(&core, survivors).await;
        // Whoever was taken in holds what it needs itself by now.
        drop(held);
        agent::load_paused(&core).await;
        agent::settle(&core, &untold).await;
        // What the log does not say yet is told by the directory, should this arkd be killed.
        let is_told = |id: &&String| core.ledger.settled(&Stream::agent(id)).is_ok();
        untold.iter().filter(is_told).for_each(|id| cleanup::remove_agent_dir(&core.config.run.agent(id).0));
        idempotency::settle(&core).await;
        core.services.start(&core);
        core.inference.start(&core);
        agent::sweep_checkpoints(&core);
        agent::follow_steps(&core);
        core.pool.start(&core);
        core.tasks.start(&core);
        let routes = routes::router(Arc::clone(&core));
        let open = telemetry::measured(version::told(routes.clone()), &core);
        let end = CancellationToken::new();
        let mut servers: Vec<_> = socket.serve(open, end.clone()).into_iter().collect();
        tracing::info!(socket = %run.api_socket().display(), "listening");
        let address = tcp.as_ref().and_then(|(listener, _)| listener.local_addr().ok());
        if let Some((listener, token)) = tcp {
            let guarded = routes.layer(from_fn_with_state(token, demand_token));
            servers.push(serve_tcp(
                listener,
                telemetry::measured(version::told(guarded), &core),
                end.clone(),
            ));
            tracing::info!(?address, "listening");
        }
        Ok(Self { core, end, servers, tcp: address, _socket: socket, _state_lock: state_lock, _lock: lock })
    }

    /// The TCP address it listens on, with the port the system chose where 0 was asked for.
    #[must_use]
    pub const fn tcp_address(&self) -> Option<SocketAddr> {
        self.tcp
    }

    /// Whether it can still do its work: the parts that every request needs are free, so none of them hangs. Waits for them.
    pub async fn is_well(&self) -> bool {
        let core = Arc::clone(&self.core);
        // On the runtime that serves requests, and through the locks that they take.
        tokio::spawn(async move {
            let _ = (core.registry.living(), core.pool.levels());
        })
        .await
        .is_ok()
    }

    /// Takes over what of `settings` can be while agents run: see [`crate::settings::RELOADABLE`].
    pub fn reload(&self, settings: &Settings) {
        self.core.pool.resize(settings.pool.into());
        self.core.consoles.limit(ConsoleLimits::from(&settings.log));
        self.core.telemetry.configure(settings.telemetry.clone());
    }

    /// Waits until a client asks it to end.
    pub async fn asked_to_end(&self) -> AgentsFate {
        self.core.asked_to_end().await
    }

    /// Ends agents, connections and listeners, and removes every file it made in the run directory.
    pub async fn shut_down(self) {
        self.end.cancel();
        self.core.services.close();
        self.core.templates.shut_down();
        self.core.tasks.stop().await;
        tokio::join!(self.core.registry.shut_down(GRACE), self.core.pool.shut_down());
        // By now they were told of the agents' ends.
        self.core.closing.cancel();
        await_connections(self.servers).await;
        remove_when_empty(&self.core.config.run.agents()).await;
    }

    /// Ends connections and listeners and what was made ahead, and leaves the agents to the next `arkd`; how many run on.
    pub async fn leave(self) -> usize {
        self.end.cancel();
        self.core.services.close();
        self.core.closing.cancel();
        self.core.templates.shut_down();
        tokio::join!(self.core.tasks.stop(), self.core.pool.shut_down(), await_connections(self.servers));
        // The agents' memory is read from snapshots that nobody holds for a while.
        self.core.snapshots.close();
        let left = self.core.registry.leave().await;
        // Not empty while there are agents, running or ended, to be known of.
        let _ = fs::remove_dir(self.core.config.run.agents());
        left
    }
}

/// Takes in the agents that an earlier `arkd` left.
async fn take_in(core: &Arc<Core>, survivors: Survivors) {
    for Survivor { known, vmm, stance } in survivors.agents {
        let Known { record, snapshot, .. } = known;
        let (id, name, state) = (record.agent.id.clone(), record.agent.name.clone(), record.agent.state);
        if core.ledger.is_removed(&id).await {
            // Its removal was recorded, and cut off before its directory went.
            vmm.into_iter().for_each(|mut vmm| vmm.kill());
            cleanup::remove_agent_dir(&core.config.run.agent(&id).0);
            continue;
        }
        let hold = snapshot.and_then(|snapshot| {
            let missing = |error: &_| {
                tracing::error!(%id, %name, %error, "what an agent's memory is read from is not known any more; it goes on, but no snapshot of it can be had");
            };
            core.snapshots.hold(snapshot).inspect_err(missing).ok()
        });
        let is_adopted = vmm.is_some();
        match agent::take_in(core, record, vmm, hold.as_ref()) {
            Ok(handle) if is_adopted => {
                tracing::info!(id, %name, "an agent is adopted");
                match stance {
                    Stance::Goes => handle.catch_up_clock(),
                    Stance::SetGoing => handle.set_clock_soon(),
                    Stance::Silent => handle.set_going_soon(),
                }
            }
            Ok(_) => tracing::info!(id, %name, %state, "an ended agent is known again"),
            Err(error) => {
                tracing::error!(id, %name, %error, "an agent cannot be taken in; it is ended");
                cleanup::remove_agent_dir(&core.config.run.agent(&id).0);
            }
        }
    }
}

/// Waits for the end of those who are served; who takes longer is cut.
async fn await_connections(servers: Vec<JoinHandle<io::Result<()>>>) {
    if tokio::time::timeout(CONNECTIONS_GRACE, join_all(servers)).await.is_err() {
        tracing::info!("connections that did not end are cut");
    }
}

/// Removes `dir` as soon as those who end beside the registry have left it; what is left after a moment stays for the next
/// start.
async fn remove_when_empty(dir: &Path) {
    let deadline = tokio::time::Instant::now() + GRACE;
    while fs::remove_dir(dir).is_err_and(|e| e.kind() == io::ErrorKind::DirectoryNotEmpty)
        && tokio::time::Instant::now() < deadline
    {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Takes the state directory: two that count who needs which snapshot would delete each other's.
fn lock_state(dir: &Path) -> Result<Lock, StartError> {
    let unusable = |source| StartError::StateDir { path: dir.to_owned(), source };
    cleanup::make_private_dir(dir).map_err(unusable)?;
    Lock::take(&dir.join("arkd.lock")).map_err(|failure| match failure {
        LockFailure::Held(holder) => {
            StartError::Second { holder, dir: dir.to_owned(), variable: "ARK_STATE" }
        }
        LockFailure::System(source) => unusable(source),
    })
}

/// Why a lock is not to be had.
enum LockFailure {
    /// Somebody has it: ` (pid 7)` where it is known who.
    Held(String),
    /// What the system said.
    System(io::Error),
}

/// The lock on the run or state directory. Dropping it removes the file.
#[derive(Debug)]
struct Lock {
    _file: File,
    path: PathBuf,
}

impl Lock {
    fn take(path: &Path) -> Result<Self, LockFailure> {
        loop {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)
                .map_err(LockFailure::System)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let mut pid = String::new();
                    let _ = (&mut file).take(20).read_to_string(&mut pid);
                    let holder =
                        pid.trim().parse::<u32>().map_or(String::new(), |pid| format!(" (pid {pid})"));
                    return Err(LockFailure::Held(holder));
                }
                Err(TryLockError::Error(e)) => return Err(LockFailure::System(e)),
            }
            // The arkd before us removes the file as it ends: a lock on a file that is no longer there locks nothing.
            if fs::metadata(path).is_ok_and(|now| file.metadata().is_ok_and(|ours| ours.ino() == now.ino())) {
                file.set_len(0).map_err(LockFailure::System)?;
                writeln!(file, "{}", std::process::id()).map_err(LockFailure::System)?;
                return Ok(Self { _file: file, path: path.to_owned() });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

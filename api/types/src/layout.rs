//! Where things are on disk.
//!
//! | directory | environment | default | holds |
//! |---|---|---|---|
//! | assets | `ARK_ASSETS` | `..` of the program's own directory | `bin/`, `kernel/`, `images/`, `models/`, `machine/`: read-only, made by `make` |
//! | state | `ARK_STATE` | `/var/lib/ark` (root), `~/.local/state/ark` | bearer token, events, environments of services, models, templates, snapshots, paused agents, tasks, consoles, machine's data disk and logs |
//! | run | `ARK_RUN` | `/run/ark` (root), `$XDG_RUNTIME_DIR/ark` | sockets, `agents/<id>/`: gone with the host |

use std::path::{Path, PathBuf};

/// Default address of the REST API for the CLI through the machine.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:7070";

/// The read-only files a release or a build consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assets(pub PathBuf);

impl Assets {
    /// `ARK_ASSETS`, else the parent of the directory the running program is in (`assets/bin/ark` → `assets`).
    ///
    /// # Errors
    /// When the running program's path cannot be told.
    pub fn locate() -> std::io::Result<Self> {
        if let Some(dir) = from_env("ARK_ASSETS") {
            return Ok(Self(dir));
        }
        let program = std::fs::canonicalize(std::env::current_exe()?)?;
        let dir = program.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
        Ok(Self(dir.to_owned()))
    }

    /// A program: `ark`, `arkd`, `ark-vmm`, `ark-guestd`.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        self.0.join("bin").join(name)
    }

    /// The guest kernel, an ELF `vmlinux`.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.0.join("kernel/vmlinux")
    }

    /// The guest's first root file system: an uncompressed cpio archive whose `/init` is `ark-guestd`.
    #[must_use]
    pub fn initrd(&self) -> PathBuf {
        self.0.join("kernel/guestd.cpio")
    }

    /// Directory of `<name>.erofs` and `<name>.json`.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.0.join("images")
    }

    /// Directory of the models that come with the release, `<name>.gguf` each.
    #[must_use]
    pub fn models(&self) -> PathBuf {
        self.0.join("models")
    }

    /// Directory of the emulated host's kernel, initramfs and asset disk.
    #[must_use]
    pub fn machine(&self) -> PathBuf {
        self.0.join("machine")
    }
}

/// What lasts: token, data disk, logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateDir(pub PathBuf);

impl StateDir {
    /// `ARK_STATE`, else the default for this user.
    #[must_use]
    pub fn locate(is_root: bool) -> Self {
        Self(from_env("ARK_STATE").unwrap_or_else(|| {
            if is_root {
                PathBuf::from("/var/lib/ark")
            } else {
                from_env("XDG_STATE_HOME").unwrap_or_else(|| home().join(".local/state")).join("ark")
            }
        }))
    }

    /// The bearer token of the REST API, mode 0600.
    #[must_use]
    pub fn token(&self) -> PathBuf {
        self.0.join("token")
    }

    /// Directory of the emulated host: data disk, console log, pid file, sockets.
    #[must_use]
    pub fn machine(&self) -> PathBuf {
        self.0.join("machine")
    }

    /// Directory of templates, `<digest>/` each.
    #[must_use]
    pub fn templates(&self) -> PathBuf {
        self.0.join("templates")
    }

    /// Directory of models that users added, `<name>/` each: `model.gguf` and `model.json`.
    #[must_use]
    pub fn models(&self) -> PathBuf {
        self.0.join("models")
    }

    /// Directory of snapshots, `<id>/` each: those that users named, and the branch points of forks.
    #[must_use]
    pub fn snapshots(&self) -> PathBuf {
        self.0.join("snapshots")
    }

    /// Directory of paused agents, `<agent id>/` each.
    #[must_use]
    pub fn paused(&self) -> PathBuf {
        self.0.join("paused")
    }

    /// Directory of what tasks are to do, and of what came of them: `<task id>.<what>`.
    #[must_use]
    pub fn tasks(&self) -> PathBuf {
        self.0.join("tasks")
    }

    /// Directory of the agents' checkpoints, `<agent id>/` each.
    #[must_use]
    pub fn checkpoints(&self) -> PathBuf {
        self.0.join("checkpoints")
    }

    /// Directory of the consoles of agents that are gone: `<agent id>.log` and `<agent id>.json` each.
    #[must_use]
    pub fn consoles(&self) -> PathBuf {
        self.0.join("consoles")
    }

    /// The log of events, an SQLite database.
    #[must_use]
    pub fn events(&self) -> PathBuf {
        self.0.join("events.db")
    }

    /// Directory of the environments of services: `<service>.<generation>.json` each, mode 0600.
    #[must_use]
    pub fn services(&self) -> PathBuf {
        self.0.join("services")
    }

    /// Log of an `arkd` that `ark` started.
    #[must_use]
    pub fn daemon_log(&self) -> PathBuf {
        self.0.join("arkd.log")
    }
}

/// What goes with the host: sockets and the agents' working directories. Kept short: a Unix socket's path has at most
/// 107 bytes (`sun_path`, unix(7)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunDir(pub PathBuf);

impl RunDir {
    /// `ARK_RUN`, else the default for this user.
    #[must_use]
    pub fn locate(is_root: bool) -> Self {
        Self(from_env("ARK_RUN").unwrap_or_else(|| {
            if is_root {
                PathBuf::from("/run/ark")
            } else {
                from_env("XDG_RUNTIME_DIR").unwrap_or_else(|| home().join(".ark-run")).join("ark")
            }
        }))
    }

    /// The REST API's Unix socket.
    #[must_use]
    pub fn api_socket(&self) -> PathBuf {
        self.0.join("arkd.sock")
    }

    /// Locked by the one `arkd` that serves this directory; holds its process id.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.0.join("arkd.lock")
    }

    /// Working directory of one agent.
    #[must_use]
    pub fn agent(&self, id: &str) -> AgentDir {
        AgentDir(self.0.join("agents").join(id))
    }

    /// Parent of the agents' working directories.
    #[must_use]
    pub fn agents(&self) -> PathBuf {
        self.0.join("agents")
    }
}

/// Working directory of one agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentDir(pub PathBuf);

impl AgentDir {
    /// The VMM's control socket.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.0.join("vmm.sock")
    }

    /// The vsock device's Unix socket.
    #[must_use]
    pub fn vsock(&self) -> PathBuf {
        self.0.join("v.sock")
    }

    /// The Unix socket that a connection of the guest to `port` of the host ends in.
    #[must_use]
    pub fn host_port(&self, port: u32) -> PathBuf {
        let mut socket = self.vsock().into_os_string();
        socket.push(format!("_{port}"));
        socket.into()
    }

    /// The serial console's log.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.0.join("console.log")
    }

    /// The VMM's own messages (standard error).
    #[must_use]
    pub fn vmm_log(&self) -> PathBuf {
        self.0.join("vmm.log")
    }

    /// The VMM's [`crate::vmm::ExitRecord`].
    #[must_use]
    pub fn exit_file(&self) -> PathBuf {
        self.0.join("exit.json")
    }

    /// Process identity of the VMM (pid and start time), for clean-up by a later `arkd`.
    #[must_use]
    pub fn identity(&self) -> PathBuf {
        self.0.join("vmm.json")
    }
}

fn from_env(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from)
}

fn home() -> PathBuf {
    from_env("HOME").unwrap_or_else(|| PathBuf::from("/"))
}

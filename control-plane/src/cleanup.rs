//! Directories of agents: making them and removing them.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use ark_types::layout::AgentDir;

/// Makes the directory `path` and its parents, open to this user alone. One that exists stays as it is.
///
/// # Errors
/// When the system refuses.
pub fn make_private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// An agent's directory. Dropping it removes it with everything in it, unless it is left to a later `arkd`.
#[derive(Debug)]
pub struct Home {
    dir: AgentDir,
    is_left: bool,
}

impl Home {
    /// Makes `dir`; one that an earlier `arkd` left stays as it is.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn make(dir: AgentDir) -> io::Result<Self> {
        make_private_dir(&dir.0)?;
        Ok(Self { dir, is_left: false })
    }

    /// Which it is.
    pub(crate) const fn dir(&self) -> &AgentDir {
        &self.dir
    }

    /// Leaves it to a later `arkd`.
    pub fn leave(mut self) {
        self.is_left = true;
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if !self.is_left {
            remove_agent_dir(&self.dir.0);
        }
    }
}

/// Removes an agent's directory with everything in it; what cannot be removed is left to the next start.
pub fn remove_agent_dir(path: &Path) {
    if let Err(error) = fs::remove_dir_all(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "an agent's directory cannot be removed");
    }
}

//! The three directories, found once, and files that only their owner may read.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use ark_types::layout::{Assets, RunDir, StateDir};

use crate::failure::Failure;

/// Where everything is.
#[derive(Clone, Debug)]
pub(crate) struct Dirs {
    /// Programs, kernel, images.
    pub(crate) assets: Assets,
    /// Token, machine, logs.
    pub(crate) state: StateDir,
    /// Sockets.
    pub(crate) run: RunDir,
}

impl Dirs {
    /// Finds them for this user.
    pub(crate) fn locate() -> Result<Self, Failure> {
        let root = nix::unistd::geteuid().is_root();
        let assets = Assets::locate()
            .map_err(|source| Failure::System { what: "cannot tell where ark is", source })?;
        Ok(Self { assets, state: StateDir::locate(root), run: RunDir::locate(root) })
    }

    /// Variables that make a child process find the same directories.
    pub(crate) fn environment(&self) -> [(&'static str, &Path); 3] {
        [("ARK_ASSETS", &self.assets.0), ("ARK_STATE", &self.state.0), ("ARK_RUN", &self.run.0)]
    }
}

/// Makes a directory and its parents, for this user only.
pub(crate) fn make_private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Writes a file beside its place and renames it, mode 0600: it is never half there, and never readable by others.
pub(crate) fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    make_private_dir(parent)?;
    // tempfile's files have mode 0600.
    let mut file = tempfile::NamedTempFile::new_in(parent)?;
    file.write_all(content)?;
    file.persist(path).map_err(|e| e.error)?;
    Ok(())
}

/// The bearer token, made on first use: 32 random bytes in hexadecimal.
pub(crate) fn token(state: &StateDir) -> io::Result<String> {
    let path = state.token();
    match fs::read_to_string(&path) {
        Ok(token) if !token.trim().is_empty() => return Ok(token.trim().to_owned()),
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let token = random_hex(32)?;
    write_private(&path, token.as_bytes())?;
    Ok(token)
}

/// `count` random bytes in hexadecimal.
pub(crate) fn random_hex(count: usize) -> io::Result<String> {
    let mut bytes = vec![0; count];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// Opens a log for appending, mode 0600.
pub(crate) fn open_log(path: &Path) -> io::Result<fs::File> {
    if let Some(parent) = path.parent() {
        make_private_dir(parent)?;
    }
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_token_is_made_once_and_only_its_owner_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir(dir.path().join("state"));
        let first = token(&state).unwrap();
        assert_eq!(first.len(), 64);
        assert_eq!(token(&state).unwrap(), first);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&state.token()), mode(&state.0)), (0o600, 0o700));
        fs::write(state.token(), "").unwrap();
        assert_ne!(token(&state).unwrap(), first, "an empty token is no token");
    }
}

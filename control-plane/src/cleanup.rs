//! Directories of agents: making them, removing them, and what an earlier, killed `arkd` left of them.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::time::Duration;

use ark_types::layout::{AgentDir, RunDir};

use crate::supervisor::{ProcessIdentity, Terminated};

/// How long a killed VMM may take to be gone: the kernel has its memory to give back.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// What [`after_a_killed_arkd`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    /// VMMs that still ran and were killed.
    pub vmms: usize,
    /// Directories that were removed.
    pub directories: usize,
}

/// Makes the directory `path` and its parents, open to this user alone. One that exists stays as it is.
///
/// # Errors
/// When the system refuses.
pub fn make_private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// An agent's directory. Dropping it removes it with everything in it.
#[derive(Debug)]
pub struct Home(AgentDir);

impl Home {
    /// Makes `dir`.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn make(dir: AgentDir) -> io::Result<Self> {
        make_private_dir(&dir.0)?;
        Ok(Self(dir))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        remove_agent_dir(&self.0.0);
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

/// Kills the VMMs that an earlier `arkd` left in `run` and removes their directories. Call it with the lock held.
///
/// # Errors
/// When the directory of agents cannot be read.
pub fn after_a_killed_arkd(run: &RunDir) -> io::Result<Cleaned> {
    let mut cleaned = Cleaned::default();
    let entries = match fs::read_dir(run.agents()) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(cleaned),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if !entry.file_name().to_str().is_some_and(is_id) {
            continue;
        }
        let dir = AgentDir(entry.path());
        match end_vmm(&dir) {
            Ok(Terminated::Killed) => cleaned.vmms += 1,
            Ok(Terminated::AlreadyGone) => {}
            Err(error) => {
                // Its directory stays, so that the next start finds it again.
                tracing::error!(path = %dir.0.display(), %error, "a VMM of an earlier arkd cannot be ended");
                continue;
            }
        }
        remove_agent_dir(&dir.0);
        cleaned.directories += 1;
    }
    Ok(cleaned)
}

fn end_vmm(dir: &AgentDir) -> io::Result<Terminated> {
    match ProcessIdentity::read(&dir.identity()) {
        Ok(identity) => identity.terminate(KILL_LIMIT),
        // Without a whole identity the VMM never got its configuration, and has ended by itself.
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) => {
            Ok(Terminated::AlreadyGone)
        }
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(Terminated::AlreadyGone),
        Err(e) => Err(e),
    }
}

/// Whether `name` is an agent's id: nothing else in the directory is touched.
fn is_id(name: &str) -> bool {
    name.len() == 16 && name.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn leftovers_are_ended_and_removed_and_nothing_else_is_touched() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir(dir.path().to_owned());
        assert_eq!(after_a_killed_arkd(&run).unwrap(), Cleaned::default());

        let mut vmm = Command::new("sleep").arg("1000").spawn().unwrap();
        let mut stranger = Command::new("sleep").arg("1000").spawn().unwrap();
        let alive = run.agent("0000000000000001");
        let reused = run.agent("0000000000000002");
        let unborn = run.agent("0000000000000003");
        let torn = run.agent("0000000000000004");
        for agent in [&alive, &reused, &unborn, &torn] {
            make_private_dir(&agent.0).unwrap();
        }
        ProcessIdentity::of(vmm.id()).unwrap().write(&alive.identity()).unwrap();
        let mut other = ProcessIdentity::of(stranger.id()).unwrap();
        other.start_ticks += 1;
        other.write(&reused.identity()).unwrap();
        fs::write(torn.identity(), "{\"pid\":").unwrap();
        fs::create_dir(run.agents().join("mine")).unwrap();

        assert_eq!(after_a_killed_arkd(&run).unwrap(), Cleaned { vmms: 1, directories: 4 });
        vmm.wait().unwrap();
        assert!(stranger.try_wait().unwrap().is_none());
        stranger.kill().unwrap();
        stranger.wait().unwrap();
        let left: Vec<_> = fs::read_dir(run.agents()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["mine"]);
    }
}

//! An agent that begins anew in what the pool has ready: a standby of its template, or else a prepared VMM.
//!
//! ```text
//!  agents/<agent>/ ──┐ change places at once ┌──► removed: what the agent had before
//!  agents/<ready>/ ──┘    (renameat2(2))     └──► the agent's: sockets and files of the VMM, the agent's record and console
//! ```
//!
//! A VMM finds its files from its working directory, which is that directory whatever its name is, so it goes on under the agent's.
//! An `arkd` that is killed before leaves the agent as it was and a directory that is nobody's; one that is killed later leaves the
//! agent half restarted, as its record says that came along. Either way the next one restarts it: see [`crate::survivors`].

use std::fs::{self, File};
use std::future::pending;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use ark_types::agent::AgentName;
use ark_types::layout::AgentDir;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use tokio::sync::oneshot;
use tracing::Instrument as _;

use super::birth::Standby;
use super::owner::Owner;
use super::request::Request;
use super::start::Life;
use super::{BootError, record};
use crate::pool::Den;
use crate::ports::Ports;
use crate::snapshots::Hold;
use crate::telemetry::{Ahead, Phase};
use crate::traces::step;

/// A standby that gave up what it has.
#[derive(Debug)]
pub(super) struct StoodBy {
    pub(super) life: Life,
    /// How often its guest was renewed.
    pub(super) renewals: u64,
}

impl Standby {
    /// Has it give up what it has, for an agent that has a grant of its own; none when it ended meanwhile.
    async fn give_up(self) -> Option<StoodBy> {
        let (handle, spare) = self.into_parts();
        drop(spare);
        let (to, given) = oneshot::channel();
        let _ = handle.0.requests.send(Request::GiveUp { to });
        given.await.ok()
    }
}

impl Life {
    /// Goes on in the prepared VMM `den`, in place of the one that ended.
    fn move_to_den(&mut self, dir: &AgentDir, den: Den) -> io::Result<()> {
        let Den { mut vmm, home, .. } = den;
        change_places(dir, home.dir())?;
        vmm.moved_to(dir.clone());
        // With what the agent had before.
        drop(home);
        self.listen_anew(dir)?;
        (self.vmm, self.restored) = (Some(vmm), None);
        Ok(())
    }

    /// Goes on as the standby that had `life`, in place of what ended. Its guest stays connected.
    fn move_to_standby(&mut self, dir: &AgentDir, life: Self) -> io::Result<()> {
        let Self { vmm, greeter, restored, home, .. } = life;
        change_places(dir, home.dir())?;
        drop(home);
        self.ports = Ports::listen(&self.seat.0, dir, &self.seat.1)?;
        self.vmm = vmm.map(|mut vmm| {
            vmm.moved_to(dir.clone());
            vmm
        });
        (self.greeter, self.restored) = (greeter, restored);
        Ok(())
    }
}

/// Has the directory `ready` be the `agent`'s, with its record and what its guests wrote to the console so far. What the agent
/// had before is in `ready` then.
fn change_places(agent: &AgentDir, ready: &AgentDir) -> io::Result<()> {
    record::link(agent, ready)?;
    if let Err(error) = carry_console(agent, ready) {
        tracing::warn!(path = %agent.console().display(), %error, "what the agent's guests wrote so far is lost");
    }
    renameat2(AT_FDCWD, &agent.0, AT_FDCWD, &ready.0, RenameFlags::RENAME_EXCHANGE)?;
    Ok(())
}

/// Has the console in `ready` begin with what is in that of the `agent`. What it held was said by nobody.
fn carry_console(agent: &AgentDir, ready: &AgentDir) -> io::Result<()> {
    match fs::hard_link(agent.console(), ready.console()) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        // It has none.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => return other,
    }
    // The VMM has it open, and only ever appends to it.
    let mut console = File::options().append(true).open(ready.console())?;
    console.set_len(0)?;
    io::copy(&mut File::open(agent.console())?, &mut console).map(drop)
}

impl Owner {
    /// Has the agent, whose VMM ended, go on as a standby of `template` that is of the snapshot `hold`, with every check of a
    /// claim; whether there was one.
    pub(super) async fn become_standby(
        &mut self,
        life: &mut Life,
        template: &AgentName,
        hold: &Hold,
    ) -> Result<bool, BootError> {
        let core = Arc::clone(&self.core);
        while let Some(standby) = core.pool.take_standby(template, hold.dir()) {
            core.telemetry.claimed(Ahead::Standby, true);
            let began = Instant::now();
            let Some(StoodBy { life: other, renewals }) = self.unless_unwanted(standby.give_up()).await?
            else {
                tracing::warn!("a standby ended before it was claimed");
                continue;
            };
            if let Err(error) = life.move_to_standby(&self.dir, other) {
                tracing::warn!(%error, "a standby cannot take the place of an agent");
                break;
            }
            self.body.set_renewals(renewals);
            let pid = life.vmm.as_ref().map(crate::supervisor::Vmm::pid);
            self.state.send_modify(|agent| agent.vmm_pid = pid);
            match self.renew(life, began, pending()).instrument(step("renewal")).await {
                Ok(()) => {
                    core.telemetry.phase(Phase::Claim, began.elapsed());
                    core.pool.claimed(template, true);
                    return Ok(true);
                }
                Err(error) if error.is_of_a_standby() => {
                    tracing::warn!(%error, "a standby is of no use");
                    life.kill().await;
                }
                Err(error) => return Err(error),
            }
        }
        core.telemetry.claimed(Ahead::Standby, false);
        core.pool.claimed(template, false);
        Ok(false)
    }

    /// Restores the guest of `hold` into the agent's directory, where an earlier VMM may have been: in a prepared VMM, where there
    /// is one.
    pub(super) async fn restore_again(&mut self, life: &mut Life, hold: &Hold) -> Result<(), BootError> {
        let den = self.core.pool.take_den(hold.manifest().vcpus);
        self.core.telemetry.claimed(Ahead::Prepared, den.is_some());
        let moved = den.is_some_and(|den| match life.move_to_den(&self.dir, den) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "a prepared VMM cannot take the place of an agent's");
                false
            }
        });
        if !moved {
            life.clear(&self.dir)?;
        }
        self.restore(life, hold).await
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;
    use crate::cleanup::make_private_dir;

    fn dirs(scratch: &tempfile::TempDir) -> (AgentDir, AgentDir) {
        let dir = |name: &str| {
            let dir = AgentDir(scratch.path().join(name));
            make_private_dir(&dir.0).unwrap();
            dir
        };
        (dir("agent"), dir("ready"))
    }

    #[test]
    fn the_record_and_the_console_come_along_and_the_rest_is_what_was_ready() {
        let scratch = tempfile::tempdir().unwrap();
        let (agent, ready) = dirs(&scratch);
        assert!(change_places(&agent, &ready).is_err(), "an agent without a record would be lost halfway");
        fs::write(agent.0.join("agent.json"), "record").unwrap();
        fs::write(agent.console(), "earlier\n").unwrap();
        fs::write(agent.exit_file(), "ended").unwrap();
        fs::write(ready.identity(), "identity").unwrap();
        // Open as the VMM has it.
        let mut vmm = File::options().create(true).append(true).open(ready.console()).unwrap();
        io::Write::write_all(&mut vmm, b"nobody's\n").unwrap();
        change_places(&agent, &ready).unwrap();
        io::Write::write_all(&mut vmm, b"now\n").unwrap();
        let read = |dir: &AgentDir, name: &str| fs::read_to_string(dir.0.join(name)).ok();
        assert_eq!(read(&agent, "agent.json").as_deref(), Some("record"));
        assert_eq!(read(&agent, "console.log").as_deref(), Some("earlier\nnow\n"));
        assert_eq!(read(&agent, "vmm.json").as_deref(), Some("identity"));
        assert_eq!(read(&agent, "exit.json"), None, "that of the VMM before");
        assert_eq!(read(&ready, "exit.json").as_deref(), Some("ended"), "until it goes with its directory");
    }

    #[test]
    fn a_vmm_that_has_no_console_yet_goes_on_in_the_agents() {
        let scratch = tempfile::tempdir().unwrap();
        let (agent, ready) = dirs(&scratch);
        fs::write(agent.0.join("agent.json"), "record").unwrap();
        change_places(&agent, &ready).unwrap();
        assert!(!agent.console().exists());
        fs::write(agent.console(), "earlier\n").unwrap();
        let before = fs::metadata(agent.console()).unwrap().ino();
        let (_, another) = dirs(&scratch);
        fs::remove_dir_all(&another.0).unwrap();
        make_private_dir(&another.0).unwrap();
        change_places(&agent, &another).unwrap();
        assert_eq!(fs::metadata(agent.console()).unwrap().ino(), before, "whoever follows it goes on");
    }
}

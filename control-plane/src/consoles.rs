//! What the guests of agents that are gone wrote to their consoles: kept on disk, within limits, to be read later.
//!
//! ```text
//!  StateDir/consoles/<id>.log    the console, as the VMM bounded it
//!  StateDir/consoles/<id>.json   whose it was, and how it ended; written last
//! ```
//!
//! An agent's directory goes with it, and with the host; an agent that failed is the one whose console is asked for. So the
//! console of one that did not start or ended by itself is copied here; deleting an agent by request deletes its copy, too.

mod reading;

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ark_types::agent::Agent;
use ark_types::console::KeptConsole;

use crate::cleanup::make_private_dir;
use crate::config::ConsoleLimits;
use crate::host::unix_ms;

pub use reading::{Begin, Piece, Reading};

/// See the module.
#[derive(Debug)]
pub struct Consoles {
    dir: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    limits: ConsoleLimits,
    /// Oldest first.
    kept: VecDeque<KeptConsole>,
}

impl Consoles {
    /// Those that earlier `arkd`s kept in `dir`.
    ///
    /// # Errors
    /// When the directory cannot be made or read.
    pub fn open(dir: PathBuf, limits: ConsoleLimits) -> io::Result<Self> {
        make_private_dir(&dir)?;
        let mut kept: Vec<KeptConsole> = Vec::new();
        for path in fs::read_dir(&dir)?.flatten().map(|entry| entry.path()) {
            let is_record = path.extension().is_some_and(|extension| extension == "json");
            match if is_record { read_record(&path) } else { continue } {
                Ok(console) => kept.push(console),
                Err(error) => tracing::warn!(path = %path.display(), %error, "a kept console has no record"),
            }
        }
        // What has no record was never finished, or is of no use.
        for path in fs::read_dir(&dir)?.flatten().map(|entry| entry.path()) {
            let is_kept = |kept: &KeptConsole| path.file_stem().is_some_and(|stem| stem == kept.id.as_str());
            if !kept.iter().any(is_kept) {
                remove_file(&path);
            }
        }
        kept.sort_by(|a, b| (a.ended_unix_ms, &a.id).cmp(&(b.ended_unix_ms, &b.id)));
        let consoles = Self { dir, inner: Mutex::new(Inner { limits, kept: kept.into() }) };
        consoles.limit(limits);
        Ok(consoles)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.log"))
    }

    fn record(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }

    /// The record before it is whole.
    fn unfinished(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.json.new"))
    }

    /// Has other limits from now on.
    pub fn limit(&self, limits: ConsoleLimits) {
        let mut inner = self.lock();
        inner.limits = limits;
        self.drop_surplus(&mut inner);
    }

    /// Keeps a copy of `console`, that of `agent`, which ended because of `reason`. Where that does not work, the log says so.
    pub fn keep(&self, agent: &Agent, console: &Path, reason: &str) {
        if self.lock().limits.agents == 0 {
            return;
        }
        match self.copy(agent, console, reason) {
            Ok(Some(kept)) => {
                let mut inner = self.lock();
                inner.kept.retain(|other| other.id != kept.id);
                inner.kept.push_back(kept);
                self.drop_surplus(&mut inner);
            }
            Ok(None) => {}
            Err(error) => {
                self.lock().kept.retain(|kept| kept.id != agent.id);
                self.remove(&agent.id);
                tracing::warn!(id = agent.id, name = %agent.name, %error, "the agent's console cannot be kept");
            }
        }
    }

    /// None when the VMM never began it.
    fn copy(&self, agent: &Agent, console: &Path, reason: &str) -> io::Result<Option<KeptConsole>> {
        let bytes = match fs::copy(console, self.log(&agent.id)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && !console.exists() => return Ok(None),
            other => other?,
        };
        let kept = KeptConsole {
            id: agent.id.clone(),
            name: agent.name.clone(),
            image: agent.image.clone(),
            ended_unix_ms: unix_ms(),
            reason: reason.to_owned(),
            bytes,
        };
        let beside = self.unfinished(&agent.id);
        fs::write(&beside, serde_json::to_vec(&kept)?)?;
        fs::rename(beside, self.record(&agent.id))?;
        Ok(Some(kept))
    }

    /// Every kept console, oldest first.
    #[must_use]
    pub fn list(&self) -> Vec<KeptConsole> {
        self.lock().kept.iter().cloned().collect()
    }

    /// The file of the agent with the id `key`, or of the newest one of that name.
    #[must_use]
    pub fn find(&self, key: &str) -> Option<PathBuf> {
        let inner = self.lock();
        let by_id = inner.kept.iter().find(|kept| kept.id == key);
        let found = by_id.or_else(|| inner.kept.iter().rev().find(|kept| kept.name.as_ref() == key));
        found.map(|kept| self.log(&kept.id))
    }

    /// Removes the console of the agent `id`, if it is kept.
    pub fn forget(&self, id: &str) {
        let mut inner = self.lock();
        let before = inner.kept.len();
        inner.kept.retain(|kept| kept.id != id);
        if inner.kept.len() < before {
            self.remove(id);
        }
    }

    fn drop_surplus(&self, inner: &mut Inner) {
        let mut bytes: u64 = inner.kept.iter().map(|kept| kept.bytes).sum();
        while inner.kept.len() > inner.limits.agents || bytes > inner.limits.bytes {
            let Some(oldest) = inner.kept.pop_front() else { return };
            bytes = bytes.saturating_sub(oldest.bytes);
            self.remove(&oldest.id);
        }
    }

    /// The record goes first, so that none is left without its console.
    fn remove(&self, id: &str) {
        [self.record(id), self.unfinished(id), self.log(id)].iter().for_each(|path| remove_file(path));
    }
}

fn remove_file(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "a kept console cannot be removed");
    }
}

fn read_record(path: &Path) -> io::Result<KeptConsole> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn agent(id: &str, name: &str) -> Agent {
        let json = json!({
            "id": id, "name": name, "origin": { "from": "boot" }, "image": "base", "image_digest": "sha256:00",
            "vcpus": 1, "memory_mib": 64, "state": "failed", "created_unix_ms": 0, "auto_remove": false,
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn the_newest_consoles_are_kept_within_the_limits_and_across_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let console = dir.path().join("console.log");
        let kept = dir.path().join("consoles");
        let limits = ConsoleLimits { agents: 3, bytes: 10 };
        let consoles = Consoles::open(kept.clone(), limits).unwrap();
        consoles.keep(&agent("0", "none"), &dir.path().join("nothing"), "it never began");
        assert_eq!(consoles.list(), []);
        for (id, name, text) in [("1", "a", "1234"), ("2", "b", "12"), ("3", "a", "12"), ("4", "c", "1")] {
            fs::write(&console, text).unwrap();
            consoles.keep(&agent(id, name), &console, "it failed");
        }
        let ids = |consoles: &Consoles| consoles.list().into_iter().map(|k| k.id).collect::<Vec<_>>();
        assert_eq!(ids(&consoles), ["2", "3", "4"], "no more than three");
        assert_eq!(fs::read_to_string(consoles.find("a").unwrap()).unwrap(), "12");
        fs::write(&console, "12345678").unwrap();
        consoles.keep(&agent("5", "d"), &console, "it failed");
        assert_eq!(ids(&consoles), ["4", "5"], "no more than ten bytes");
        drop(consoles);

        // As a disk that was full and an arkd that was killed leave them.
        for unfinished in ["6.json", "6.log", "7.log", "7.json.new"] {
            fs::write(kept.join(unfinished), "{").unwrap();
        }
        let consoles = Consoles::open(kept.clone(), limits).unwrap();
        assert_eq!(ids(&consoles), ["4", "5"]);
        consoles.forget("5");
        assert!(consoles.find("d").is_none() && consoles.find("4").is_some());
        consoles.limit(ConsoleLimits { agents: 0, bytes: 10 });
        consoles.keep(&agent("7", "e"), &console, "it failed");
        assert_eq!(fs::read_dir(&kept).unwrap().count(), 0, "every file went with its console");

        consoles.limit(limits);
        fs::create_dir(kept.join("8.json")).unwrap();
        consoles.keep(&agent("8", "f"), &console, "its record cannot be written");
        assert_eq!(consoles.list(), []);
        let left: Vec<_> = fs::read_dir(&kept).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["8.json"], "nothing is left that is not counted");
    }
}

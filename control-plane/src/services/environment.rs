//! The values of services' environments, which may be secrets and so are not in the log of events.
//!
//! Each generation has a file of its own, mode 0600, written for good before the event that names the generation is appended,
//! and removed after the next one's is: whatever event is the last, the file that it names is there.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::path::PathBuf;

use ark_types::agent::AgentName;
use ark_types::layout::StateDir;

use crate::cleanup::make_private_dir;
use crate::projection::WantedServices;
use crate::snapshots::{remove_file, write_file};

/// Variables and their values.
pub(super) type Environment = BTreeMap<String, String>;

fn name_of(service: &AgentName, generation: u64) -> String {
    // No service's name has a dot.
    format!("{service}.{generation}.json")
}

fn path(state: &StateDir, service: &AgentName, generation: u64) -> PathBuf {
    state.services().join(name_of(service, generation))
}

/// Writes it for good.
pub(super) fn write(
    state: &StateDir,
    service: &AgentName,
    generation: u64,
    env: &Environment,
) -> io::Result<()> {
    make_private_dir(&state.services())?;
    write_file(&path(state, service, generation), &serde_json::to_vec(env)?)
}

/// Reads it; one without variables has no file.
pub(super) fn read(
    state: &StateDir,
    service: &AgentName,
    generation: u64,
    names: &[String],
) -> io::Result<Environment> {
    if names.is_empty() {
        return Ok(Environment::new());
    }
    let env: Environment = serde_json::from_slice(&fs::read(path(state, service, generation))?)?;
    if env.keys().ne(names) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is that of another service"));
    }
    Ok(env)
}

/// Removes it; what cannot be removed now goes with the next [`sweep`].
pub(super) fn remove(state: &StateDir, service: &AgentName, generation: u64) {
    if let Err(error) = remove_file(&path(state, service, generation)) {
        tracing::error!(%service, generation, %error, "the environment of a service that needs it no more cannot be removed");
    }
}

/// Removes those that no service needs.
pub(super) fn sweep(state: &StateDir, services: &WantedServices) {
    let needed: HashSet<String> =
        services.iter().map(|(name, wanted)| name_of(name, wanted.generation)).collect();
    for entry in fs::read_dir(state.services()).into_iter().flatten().flatten() {
        let is_needed = entry.file_name().to_str().is_some_and(|name| needed.contains(name));
        if !is_needed && let Err(error) = remove_file(&entry.path()) {
            tracing::error!(path = %entry.path().display(), %error, "what is left of a service cannot be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn values_are_kept_from_others_and_go_when_nobody_needs_them() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir(dir.path().to_owned());
        let service: AgentName = "web".parse().unwrap();
        let env = Environment::from([("KEY".to_owned(), "secret".to_owned())]);
        let names = ["KEY".to_owned()];
        write(&state, &service, 3, &env).unwrap();
        let mode = |path: &PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&state.services()), mode(&path(&state, &service, 3))), (0o700, 0o600));
        assert_eq!(read(&state, &service, 3, &names).unwrap(), env);
        assert_eq!(read(&state, &service, 4, &[]).unwrap(), Environment::new());
        assert!(read(&state, &service, 4, &names).is_err());
        assert!(read(&state, &service, 3, &["OTHER".to_owned()]).is_err());
        sweep(&state, &WantedServices::default());
        assert_eq!(fs::read_dir(state.services()).unwrap().count(), 0);
        remove(&state, &service, 3);
    }
}

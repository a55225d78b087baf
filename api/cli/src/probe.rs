//! The host probe: `ark-vmm probe` runs a tiny guest. Its answer holds until the host, the program or our right to open
//! `/dev/kvm` changes, so it is kept in the run directory; a no for a while only, because a host under load may have been
//! too slow for the probe's deadline.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ark_types::health::ProbeReport;
use ark_types::plain::plain;
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use crate::dirs::{Dirs, write_private};
use crate::output::now_unix_ms;

/// Longest a probe may take; it bounds itself to a second, processes start slowly on a loaded host.
const PROBE_DEADLINE: Duration = Duration::from_secs(15);

/// How long a no is kept, milliseconds: ten minutes.
const KEEP_NO_MS: u64 = 600_000;

/// The probe could not be run; what it answers is not an error.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProbeError {
    /// The program is missing.
    #[error("{} is missing: say `make` in the project's directory, or set ARK_ASSETS to where it was built", .0.display())]
    Missing(PathBuf),
    /// It did not start, or gave no answer that can be read.
    #[error("the host probe ({}) failed: {why}", .program.display())]
    Failed {
        /// What was run.
        program: PathBuf,
        /// Why.
        why: String,
    },
}

/// What an answer depends on, and the answer.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Cached {
    boot_id: String,
    program_mtime_ns: i128,
    kvm_opens: bool,
    at_unix_ms: u64,
    report: ProbeReport,
}

impl Cached {
    /// Whether the answer may still be given at `now_ms`.
    fn holds(&self, (boot_id, program_mtime_ns, kvm_opens): &(String, i128, bool), now_ms: u64) -> bool {
        let same = (&self.boot_id, &self.program_mtime_ns, &self.kvm_opens)
            == (boot_id, program_mtime_ns, kvm_opens);
        // A clock that was set back makes the age huge or tiny; a new probe costs less than thinking about it.
        same && (self.report.usable || now_ms.abs_diff(self.at_unix_ms) < KEEP_NO_MS)
    }
}

/// Says whether KVM is usable; from memory when nothing changed since the last answer.
pub(crate) async fn cached(dirs: &Dirs) -> Result<ProbeReport, ProbeError> {
    let path = cache(dirs);
    let key = key(dirs);
    let kept = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Cached>(&bytes).ok());
    match kept {
        Some(kept) if kept.holds(&key, now_unix_ms()) => Ok(kept.report),
        _ => fresh(dirs).await,
    }
}

/// Runs the probe and keeps its answer.
pub(crate) async fn fresh(dirs: &Dirs) -> Result<ProbeReport, ProbeError> {
    let (boot_id, program_mtime_ns, kvm_opens) = key(dirs);
    let program = dirs.assets.program("ark-vmm");
    let report = run(&program).await?;
    let kept = Cached { boot_id, program_mtime_ns, kvm_opens, at_unix_ms: now_unix_ms(), report };
    // Not being able to keep it costs the next command a probe, nothing more.
    let _ = serde_json::to_vec(&kept).map(|json| write_private(&cache(dirs), &json));
    Ok(kept.report)
}

async fn run(program: &Path) -> Result<ProbeReport, ProbeError> {
    let failed = |why: String| ProbeError::Failed { program: program.to_owned(), why };
    let child = Command::new(program).args(["probe", "--json"]).kill_on_drop(true).output();
    let output = match tokio::time::timeout(PROBE_DEADLINE, child).await {
        Err(_) => return Err(failed(format!("no answer within {} s", PROBE_DEADLINE.as_secs()))),
        Ok(Err(e)) if e.kind() == io::ErrorKind::NotFound => {
            return Err(ProbeError::Missing(program.to_owned()));
        }
        Ok(Err(e)) => return Err(failed(plain(&e))),
        Ok(Ok(output)) => output,
    };
    // Exit code 1 means not usable: the report says why.
    serde_json::from_slice(&output.stdout).map_err(|e| {
        let said = String::from_utf8_lossy(&output.stderr);
        failed(format!("{}, and its answer is no report ({e}) {}", output.status, said.trim()))
    })
}

fn cache(dirs: &Dirs) -> PathBuf {
    dirs.run.0.join("probe.json")
}

fn key(dirs: &Dirs) -> (String, i128, bool) {
    let program = fs::metadata(dirs.assets.program("ark-vmm"));
    let mtime = program.map_or(0, |m| i128::from(m.mtime()) * 1_000_000_000 + i128::from(m.mtime_nsec()));
    let kvm_opens = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    (boot_id(), mtime, kvm_opens)
}

/// Identity of this boot of the kernel (random(4)); empty where `/proc` is missing.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use ark_types::layout::{Assets, RunDir, StateDir};

    use super::*;

    fn install(dirs: &Dirs, script: &str) {
        let program = dirs.assets.program("ark-vmm");
        fs::create_dir_all(program.parent().unwrap()).unwrap();
        // Renamed into place: a file that is open for writing cannot be run.
        let draft = program.with_extension("draft");
        fs::write(&draft, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&draft, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(draft, program).unwrap();
    }

    #[test]
    fn a_yes_is_kept_for_the_boot_and_a_no_for_a_while() {
        let key = ("b".to_owned(), 1, true);
        let cached = |usable| {
            let report = ProbeReport { usable, reason: String::new(), duration_us: 0 };
            Cached { boot_id: "b".to_owned(), program_mtime_ns: 1, kvm_opens: true, at_unix_ms: 5, report }
        };
        assert!(cached(true).holds(&key, 5 + 10 * KEEP_NO_MS));
        assert!(cached(false).holds(&key, 4 + KEEP_NO_MS) && !cached(false).holds(&key, 5 + KEEP_NO_MS));
        for other in [("c".to_owned(), 1, true), ("b".to_owned(), 2, true), ("b".to_owned(), 1, false)] {
            assert!(!cached(true).holds(&other, 5));
        }
    }

    #[tokio::test]
    async fn an_answer_is_kept_until_the_program_changes() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let dirs =
            Dirs { assets: Assets(at("assets")), state: StateDir(at("state")), run: RunDir(at("run")) };
        assert!(matches!(cached(&dirs).await, Err(ProbeError::Missing(_))));
        let count = at("count");
        let answer = r#"{"usable":false,"reason":"no","duration_us":5}"#;
        install(&dirs, &format!("echo x >> {}; echo '{answer}'; exit 1", count.display()));
        for _ in 0..3 {
            assert!(!cached(&dirs).await.unwrap().usable);
        }
        assert_eq!(fs::read_to_string(&count).unwrap(), "x\n");
        fresh(&dirs).await.unwrap();
        assert_eq!(fs::read_to_string(&count).unwrap(), "x\nx\n");
        std::thread::sleep(Duration::from_millis(20));
        install(&dirs, "echo broken >&2; exit 3");
        let error = cached(&dirs).await.unwrap_err().to_string();
        assert!(error.contains("broken") && error.contains("exit status: 3"), "{error}");
    }
}

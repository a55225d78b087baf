//! Proof by `ark-vmm verify`: what was written is what is there.

use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use ark_types::plain::plain;
use ark_types::vmm::ExitReason;
use tokio::process::Command;

use super::files::Stamp;
use super::table::Proof;
use super::{SnapshotError, tells_of_full_disk};

/// Time that reading (or writing) all of a snapshot may take: 64 GiB at 64 MiB/s.
const LIMIT: Duration = Duration::from_secs(1024);
/// Most characters of what `ark-vmm` says that are passed on.
const MAX_WORDS: usize = 2000;

/// Proves the files in `dir` unless they look as they did when `proof` was made.
pub(super) async fn prove(proof: &Proof, dir: &Path, vmm: &Path) -> Result<(), SnapshotError> {
    let mut proof = proof.lock().await;
    let now = Stamp::of(dir).map_err(|error| missing(dir, &error))?;
    if proof.as_ref() == Some(&now) {
        return Ok(());
    }
    *proof = None;
    tool(vmm, &["verify".as_ref(), dir.as_os_str()], dir).await?;
    // The look before counts: what changed during the proof is proved again.
    *proof = Some(now);
    Ok(())
}

fn missing(dir: &Path, error: &io::Error) -> SnapshotError {
    let why =
        format!("a file of it cannot be looked at: {}; use another copy or take it again", plain(error));
    SnapshotError::Unusable { dir: dir.to_owned(), why }
}

/// Runs `ark-vmm` with `arguments` on the snapshot in `dir`; the process ends when the caller stops waiting.
pub(super) async fn tool(
    vmm: &Path,
    arguments: &[&std::ffi::OsStr],
    dir: &Path,
) -> Result<(), SnapshotError> {
    let mut command = Command::new(vmm);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // Its own group: a Ctrl-C on arkd's terminal is for arkd.
    command.process_group(0).kill_on_drop(true);
    let Ok(ended) = tokio::time::timeout(LIMIT, command.output()).await else {
        let what = format!("`ark-vmm` on {}", dir.display());
        return Err(SnapshotError::Endless { what, limit_s: LIMIT.as_secs() });
    };
    let output = ended.map_err(|source| SnapshotError::Tool { program: vmm.to_owned(), source })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let words = said.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or_default();
    let words: String = words.strip_prefix("ark-vmm: ").unwrap_or(words).chars().take(MAX_WORDS).collect();
    let dir = dir.to_owned();
    if tells_of_full_disk(&words) {
        return Err(SnapshotError::DiskFull { dir, why: plain(&words) });
    }
    let why = if words.is_empty() {
        format!("`ark-vmm` ended with {} and said nothing", output.status)
    } else {
        plain(&words)
    };
    let is_bad = output.status.code() == Some(ExitReason::BadSnapshot.exit_code().into());
    Err(if is_bad { SnapshotError::Unusable { dir, why } } else { SnapshotError::Unproved { dir, why } })
}

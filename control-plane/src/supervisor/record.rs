//! How a VMM ended, told from what it left: exit status and standard output, or its exit file; last words.

use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::ExitStatus;

use ark_types::layout::AgentDir;
use ark_types::plain::plain;
use ark_types::vmm::{ExitReason, ExitRecord};

use crate::host::unix_ms;

/// Most bytes of a log that are quoted to a client.
const MAX_QUOTE: u64 = 2048;
/// Most bytes of an exit file that are read.
const MAX_EXIT_FILE: u64 = 64 << 10;
/// Most lines of a log that are quoted to a client.
const QUOTED_LINES: usize = 12;

/// The record of a VMM that ended with `status` after it wrote `output`.
pub(super) fn of(status: io::Result<ExitStatus>, output: &[u8], dir: &AgentDir) -> ExitRecord {
    let at_unix_ms = unix_ms();
    let status = match status {
        Ok(status) => status,
        Err(e) => {
            let detail = Some(format!("how it ended could not be told: {}", plain(&e)));
            return ExitRecord { reason: ExitReason::Internal, detail, at_unix_ms };
        }
    };
    if let Some(signal) = status.signal() {
        let name = nix::sys::signal::Signal::try_from(signal).map_or("an unknown signal", |s| s.as_str());
        let detail =
            Some(format!("signal {signal} ({name}) ended it; what the agent held in memory is lost"));
        return ExitRecord { reason: ExitReason::Killed, detail, at_unix_ms };
    }
    serde_json::from_slice(output).ok().unwrap_or_else(|| {
        let words = tail_text(&dir.vmm_log());
        let detail = format!("it ended with exit code {} and no record", status.code().unwrap_or_default());
        let detail = if words.is_empty() { detail } else { format!("{detail}; its last words:\n{words}") };
        ExitRecord { reason: ExitReason::Internal, detail: Some(detail), at_unix_ms }
    })
}

/// The record of a VMM that ended in `dir` and was no child of this `arkd`, which therefore knows no exit status: what it
/// wrote to its exit file, else `how` and that there is no such file.
pub(crate) fn left_in(dir: &AgentDir, how: &str) -> ExitRecord {
    let told = std::fs::File::open(dir.exit_file())
        .and_then(|file| Ok(serde_json::from_reader(io::BufReader::new(file.take(MAX_EXIT_FILE)))?));
    told.unwrap_or_else(|_: io::Error| ExitRecord {
        reason: ExitReason::Killed,
        detail: Some(format!("{how} and left no record; what the agent held in memory is lost")),
        at_unix_ms: unix_ms(),
    })
}

/// The last lines of the log at `path`, fit for a terminal: what is not printable is left out. Empty when there is none.
#[must_use]
pub fn tail_text(path: &Path) -> String {
    let bytes = tail_bytes(path).unwrap_or_default();
    let text: String = String::from_utf8_lossy(&bytes)
        .chars()
        .filter(|c| *c == '\n' || *c == '\t' || !c.is_control())
        .collect();
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines.get(lines.len().saturating_sub(QUOTED_LINES)..).unwrap_or_default().join("\n")
}

fn tail_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = std::fs::File::open(path)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(MAX_QUOTE)))?;
    let mut bytes = Vec::new();
    file.take(MAX_QUOTE).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(raw_status: i32, output: &[u8]) -> ExitRecord {
        let dir = tempfile::tempdir().unwrap();
        let dir = AgentDir(dir.path().to_owned());
        std::fs::write(dir.vmm_log(), "\x1b[31mno\x07 kernel\n").unwrap();
        of(Ok(ExitStatus::from_raw(raw_status)), output, &dir)
    }

    #[test]
    fn a_record_is_believed_a_signal_is_named_and_silence_is_explained() {
        let said = ended(0, br#"{"reason":"guest_panic","at_unix_ms":7}"#);
        assert_eq!((said.reason, said.at_unix_ms), (ExitReason::GuestPanic, 7));
        let killed = ended(9, b"");
        assert_eq!(killed.reason, ExitReason::Killed);
        assert!(killed.detail.unwrap().contains("signal 9 (SIGKILL)"));
        let silent = ended(22 << 8, b"not json");
        assert_eq!(silent.reason, ExitReason::Internal);
        let detail = silent.detail.unwrap();
        assert!(detail.contains("exit code 22") && detail.ends_with("[31mno kernel"), "{detail}");
    }

    #[test]
    fn only_the_end_of_a_long_log_is_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let text: Vec<String> = (0..10_000).map(|n| format!("line {n}")).collect();
        std::fs::write(&path, text.join("\r\n")).unwrap();
        let tail = tail_text(&path);
        assert_eq!(tail.lines().count(), QUOTED_LINES);
        assert!(tail.ends_with("line 9999"));
        assert_eq!(tail_text(Path::new("/nonexistent")), "");
    }
}

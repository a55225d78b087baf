//! How a VMM's end is told, and what it leaves behind: nothing but the record of the end.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use ark_types::plain::plain;
use ark_types::vmm::ExitRecord;

use crate::life::End;

/// Removes a file of ours when dropped.
#[derive(Debug)]
pub struct Remove(pub PathBuf);

impl Drop for Remove {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The record of `end`, now.
#[must_use]
pub fn record(end: End) -> ExitRecord {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let at_unix_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    // Details quote the system's errors, each at its own place in a sentence.
    ExitRecord { reason: end.reason, detail: end.detail.as_deref().map(plain), at_unix_ms }
}

/// Writes `record` as one line to `out` and, under its name only when it is whole, to `file`. Both are tried.
///
/// # Errors
/// What could not be written, and why.
pub fn tell(record: &ExitRecord, file: Option<&Path>, out: &mut dyn Write) -> io::Result<()> {
    let mut line = serde_json::to_string(record)?;
    line.push('\n');
    let kept = file.map_or(Ok(()), |path| {
        write_whole(path, line.as_bytes()).map_err(|e| {
            io::Error::new(e.kind(), format!("the end record cannot be written to {}: {e}", path.display()))
        })
    });
    out.write_all(line.as_bytes())?;
    out.flush()?;
    kept
}

fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = Remove(beside.into());
    File::create(&beside.0)?.write_all(bytes)?;
    std::fs::rename(&beside.0, path)
}

#[cfg(test)]
mod tests {
    use ark_types::vmm::ExitReason;

    use super::*;

    #[test]
    fn the_record_is_one_line_and_the_same_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("exit.json");
        let record = record(End { reason: ExitReason::GuestPanic, detail: Some("two\nlines".into()) });
        let mut out = Vec::new();
        tell(&record, Some(&file), &mut out).unwrap();
        assert_eq!(out.iter().filter(|b| **b == b'\n').count(), 1);
        assert_eq!(std::fs::read(&file).unwrap(), out);
        assert_eq!(serde_json::from_slice::<ExitRecord>(&out).unwrap(), record);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_cannot_be_written_still_leaves_the_line() {
        let record = record(End { reason: ExitReason::Stopped, detail: None });
        let mut out = Vec::new();
        let error = tell(&record, Some(Path::new("/proc/none/exit.json")), &mut out).unwrap_err();
        assert!(error.to_string().contains("/proc/none/exit.json"));
        assert!(!out.is_empty());
    }
}

//! This host: memory, processors, time, and whether its KVM can run guests.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ark_types::health::ProbeReport;
use ark_types::plain::plain;
use tokio::process::Command;

/// Memory of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// All of it, MiB.
    pub total_mib: u64,
    /// What new programs could have without swapping, MiB.
    pub available_mib: u64,
}

impl Memory {
    /// What /proc/meminfo says now.
    ///
    /// # Errors
    /// When it cannot be read or lacks a line.
    pub fn read() -> std::io::Result<Self> {
        let text = std::fs::read_to_string("/proc/meminfo")?;
        Self::parse(&text)
            .ok_or_else(|| std::io::Error::other("/proc/meminfo lacks MemTotal or MemAvailable"))
    }

    fn parse(text: &str) -> Option<Self> {
        let mib = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            let kib: u64 = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
            Some(kib / 1024)
        };
        Some(Self { total_mib: mib("MemTotal")?, available_mib: mib("MemAvailable")? })
    }
}

/// Processors this process may use.
#[must_use]
pub fn cpus() -> u32 {
    std::thread::available_parallelism().ok().and_then(|n| u32::try_from(n.get()).ok()).unwrap_or(1)
}

/// Milliseconds since the Unix epoch.
#[must_use]
pub fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// Whole milliseconds of `duration`.
#[must_use]
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Asks `vmm probe --json` whether guests can run here, and waits for up to `limit`.
pub async fn probe(vmm: &Path, limit: Duration) -> ProbeReport {
    let started = std::time::Instant::now();
    // The probe keeps its own limit; a second more is for its start.
    let report = tokio::time::timeout(limit + Duration::from_secs(1), run_probe(vmm, limit)).await;
    let reason = match report {
        Ok(Ok(report)) => return report,
        Ok(Err(why)) => why,
        Err(_) => format!("the probe did not end within {} s; KVM hangs on this host", limit.as_secs()),
    };
    ProbeReport {
        usable: false,
        reason,
        duration_us: u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX),
    }
}

async fn run_probe(vmm: &Path, limit: Duration) -> Result<ProbeReport, String> {
    let output = Command::new(vmm)
        .args(["probe", "--json", "--limit-ms", &limit.as_millis().to_string()])
        .stdin(Stdio::null())
        .process_group(0)
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|e| {
            let why = plain(&e);
            format!("{} cannot be started: {why}; build it with `make`, or set ARK_ASSETS", vmm.display())
        })?;
    serde_json::from_slice(&output.stdout).map_err(|_| {
        let said = String::from_utf8_lossy(&output.stderr);
        format!("the probe ended with {} and no report: {}", output.status, said.trim())
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn meminfo_is_understood_and_a_missing_line_noticed() {
        let text = "MemTotal:       24576000 kB\nMemFree:   5 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(Memory::parse(text), Some(Memory { total_mib: 24000, available_mib: 2 }));
        assert_eq!(Memory::parse("MemTotal: 1 kB\n"), None);
        assert!(Memory::read().unwrap().total_mib > 0);
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text: String) {
            let _ = Memory::parse(&text);
        }
    }

    #[tokio::test]
    async fn a_probe_that_is_missing_or_babbles_is_a_reason() {
        let limit = Duration::from_secs(10);
        let missing = probe(Path::new("/nonexistent/ark-vmm"), limit).await;
        assert!(!missing.usable && missing.reason.contains("cannot be started"), "{}", missing.reason);
        let babbles = probe(Path::new("/bin/echo"), limit).await;
        assert!(babbles.reason.contains("no report"), "{}", babbles.reason);
    }
}

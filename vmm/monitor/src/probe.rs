//! `ark-vmm probe`: whether this host's KVM can run guests.

use std::io::{self, Write};
use std::time::Duration;

use ark_types::health::ProbeReport;

/// Probes for up to `limit` and prints the answer; gives the exit code: 0 usable, 1 not.
///
/// # Errors
/// When the answer cannot be printed.
pub fn run(json: bool, limit: Duration, out: &mut dyn Write) -> io::Result<u8> {
    let outcome = ark_hal::probe::probe(limit);
    let report = ProbeReport {
        usable: outcome.usable,
        reason: outcome.reason,
        duration_us: u64::try_from(outcome.duration.as_micros()).unwrap_or(u64::MAX),
    };
    print(&report, json, out)?;
    Ok(u8::from(!report.usable))
}

fn print(report: &ProbeReport, json: bool, out: &mut dyn Write) -> io::Result<()> {
    if json {
        serde_json::to_writer(&mut *out, report)?;
        return writeln!(out);
    }
    let verdict = if report.usable { "usable" } else { "not usable" };
    writeln!(out, "KVM is {verdict}: {} ({} ms)", report.reason, report.duration_us / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_one_line_for_people_or_programs() {
        let report =
            ProbeReport { usable: false, reason: "SYSCALL stays in ring 3".into(), duration_us: 12_345 };
        let (mut text, mut json) = (Vec::new(), Vec::new());
        print(&report, false, &mut text).unwrap();
        print(&report, true, &mut json).unwrap();
        assert_eq!(text, b"KVM is not usable: SYSCALL stays in ring 3 (12 ms)\n");
        assert_eq!(serde_json::from_slice::<ProbeReport>(&json).unwrap(), report);
        assert!(json.ends_with(b"}\n"));
    }
}

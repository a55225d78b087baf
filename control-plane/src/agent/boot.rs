//! Boots that an emulated processor spoiled, and how they are told from guests that fail by themselves.
//!
//! QEMU's software emulation of SVM spoils a nested guest's processor now and then. The cause that is known is kept away (no
//! guest runs on the emulated host's first processor, see `ark machine`), yet of 1,120 boots, twenty at once, one stood still
//! after 28 exits. Before its hello a guest has done nothing for anybody, so it can be booted again without losing or
//! repeating anything. On a real processor a guest that fails so would only fail again, so there nothing is booted again.

use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use ark_types::layout::AgentDir;
use ark_types::vmm::{ControlReply, ControlRequest, ExitReason};

use super::BootError;
use crate::guest::GuestFailure;
use crate::supervisor;

/// How often an agent's guest is booted, at most, where the processor is emulated.
const EMULATED_ATTEMPTS: u32 = 3;
/// A booting guest that makes no exit and takes no memory for this long stands still.
const STANDSTILL: Duration = Duration::from_secs(20);
/// How often it is looked at.
const LOOK: Duration = Duration::from_secs(4);

/// How often a guest may be booted on this host.
pub(super) fn attempts() -> u32 {
    if processor_is_emulated() { EMULATED_ATTEMPTS } else { 1 }
}

/// Whether booting again can help.
pub(super) fn is_worth_another(error: &BootError) -> bool {
    match error {
        // At the deadline something moves, but never to a hello.
        BootError::Standstill { .. } | BootError::Deadline { .. } | BootError::NoCall { .. } => true,
        // A restored guest that does not answer stands still, too.
        BootError::Renewal(failure) => matches!(failure, GuestFailure::Late(_)),
        BootError::Ended { record, .. } => record.reason == ExitReason::GuestCrash,
        BootError::Directory { .. }
        | BootError::Spawn(_)
        | BootError::Hello(_)
        | BootError::Check(_)
        | BootError::Unrecorded(_)
        | BootError::Removed
        | BootError::Ending => false,
    }
}

/// Removes what a killed VMM left in the agent's directory and the next one would stumble over.
pub(super) fn clear(dir: &AgentDir) {
    for left in [dir.vsock(), dir.control_socket(), dir.exit_file()] {
        // Not there when the VMM ended by itself; anything else the next VMM reports with its reason.
        let _ = std::fs::remove_file(left);
    }
}

/// Returns when the guest of the VMM that listens on `control` stands still. Never where the processor is real: there only
/// the boot's deadline counts.
pub(super) async fn standstill(control: &Path) -> Duration {
    if !processor_is_emulated() {
        std::future::pending::<()>().await;
    }
    let mut last = (None, Instant::now());
    loop {
        tokio::time::sleep(LOOK).await;
        // A VMM that does not answer makes no progress either; one that ended is noticed by its end.
        let seen = match supervisor::ask(control, ControlRequest::Metrics).await {
            Ok(ControlReply::Metrics(now)) => Some((now.exits, now.guest_resident_bytes)),
            _ => last.0,
        };
        if seen != last.0 {
            last = (seen, Instant::now());
        } else if last.1.elapsed() >= STANDSTILL {
            return last.1.elapsed();
        }
    }
}

/// QEMU names the processors that it emulates in software. Looked at once: on a host with many processors the kernel takes
/// its time to describe them.
fn processor_is_emulated() -> bool {
    static IS_EMULATED: LazyLock<bool> =
        LazyLock::new(|| std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| is_emulated(&text)));
    *IS_EMULATED
}

fn is_emulated(cpuinfo: &str) -> bool {
    cpuinfo.lines().any(|line| line.starts_with("model name") && line.contains("QEMU TCG"))
}

#[cfg(test)]
mod tests {
    use ark_types::vmm::ExitRecord;

    use super::*;

    fn ended(reason: ExitReason) -> BootError {
        let record = ExitRecord { reason, detail: None, at_unix_ms: 0 };
        BootError::Ended { record, words: String::new() }
    }

    #[test]
    fn only_what_an_emulated_processor_can_spoil_is_tried_again() {
        assert!(is_worth_another(&ended(ExitReason::GuestCrash)));
        assert!(is_worth_another(&BootError::Standstill { time: STANDSTILL, words: String::new() }));
        assert!(is_worth_another(&BootError::Deadline { limit: STANDSTILL, words: String::new() }));
        assert!(!is_worth_another(&ended(ExitReason::GuestPanic)));
        assert!(!is_worth_another(&ended(ExitReason::BadConfig)));
        assert!(!is_worth_another(&BootError::Removed));
    }

    #[test]
    fn a_killed_vmms_sockets_make_room_and_the_guests_hello_stays_open() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = AgentDir(scratch.path().to_owned());
        let hello = scratch.path().join("v.sock_1024");
        for file in [dir.vsock(), dir.control_socket(), dir.exit_file(), hello.clone(), dir.console()] {
            std::fs::write(file, "").unwrap();
        }
        clear(&dir);
        assert!(!dir.vsock().exists() && !dir.control_socket().exists() && !dir.exit_file().exists());
        assert!(hello.exists() && dir.console().exists());
    }

    #[test]
    fn an_emulated_processor_is_known_by_its_name() {
        assert!(is_emulated("processor\t: 0\nmodel name\t: QEMU TCG CPU version 2.5+\n"));
        assert!(!is_emulated("model name\t: AMD EPYC\nflags\t: svm\n"));
    }
}

//! How a VMM ended.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Why a VMM ended; each reason has an exit code of the `ark-vmm` process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest powered itself off.
    GuestPoweroff,
    /// The guest reset itself; this VMM does not start it again.
    GuestReboot,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest's processor cannot go on: triple fault or an exit KVM calls an error.
    GuestCrash,
    /// The control socket asked for a stop and the guest powered off in time.
    Stopped,
    /// The control socket asked for a stop and the guest did not follow in time.
    StopDeadline,
    /// SIGTERM, SIGINT or SIGHUP asked the VMM to end.
    Signal,
    /// SIGKILL, or another signal the VMM cannot catch; told by who started it, never by the VMM.
    Killed,
    /// The configuration, kernel or an image could not be used; no guest ran.
    BadConfig,
    /// The snapshot could not be used: damaged, of another release or of another kind of processor; no guest ran.
    BadSnapshot,
    /// The host could not make the VM (KVM, memory, files); no guest ran.
    HostError,
    /// The VMM failed while the guest ran.
    Internal,
}

impl ExitReason {
    /// Exit code of the process that ends for this reason (`Killed` has none of its own).
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::GuestPoweroff | Self::Stopped => 0,
            Self::GuestReboot => 10,
            Self::GuestPanic => 11,
            Self::GuestCrash => 12,
            Self::StopDeadline => 13,
            Self::Signal => 14,
            Self::BadConfig => 20,
            Self::HostError => 21,
            Self::Internal => 22,
            Self::BadSnapshot => 23,
            Self::Killed => 137,
        }
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GuestPoweroff => "the guest powered itself off",
            Self::GuestReboot => "the guest reset itself",
            Self::GuestPanic => "the guest's kernel panicked",
            Self::GuestCrash => "the guest's processor could not go on",
            Self::Stopped => "stopped on request",
            Self::StopDeadline => "ended on request after the guest did not stop in time",
            Self::Signal => "a signal asked the VMM to end",
            Self::Killed => "the VMM was killed",
            Self::BadConfig => "the configuration could not be used",
            Self::BadSnapshot => "the snapshot could not be used",
            Self::HostError => "the host could not make the VM",
            Self::Internal => "the VMM failed",
        })
    }
}

/// The end of a VMM, written to `exit_file` and, as the one line on standard output, to who started it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExitRecord {
    /// Why it ended.
    pub reason: ExitReason,
    /// What happened in detail and what to do next, where there is more to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// When, milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
}

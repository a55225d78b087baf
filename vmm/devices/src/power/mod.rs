//! How a guest ends: ACPI power-off and reset registers, and pvpanic.

mod acpi;
mod pvpanic;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use self::acpi::{PowerControl, RESET_VALUE, S5_SLEEP_TYPE};
pub use self::pvpanic::{PVPANIC_PORT, Pvpanic};

/// What the guest says about its own end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// It powered itself off (S5).
    PowerOff,
    /// It reset itself.
    Reboot,
    /// Its kernel panicked and stops here.
    Panicked,
    /// Its kernel panicked and goes on into a crash kernel.
    CrashLoaded,
}

/// Told of a [`PowerEvent`], on the vCPU's thread that caused it, within the guest's access: it should only note the event
/// and wake somebody. It may be told more than once.
pub type PowerSink = Arc<dyn Fn(PowerEvent) + Send + Sync>;

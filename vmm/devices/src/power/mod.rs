//! How a guest ends: ACPI power-off and reset registers, and pvpanic.

mod acpi;
mod pvpanic;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

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
/// and wake somebody. A device tells each event once: a guest that goes on after its end must not flood who listens.
pub type PowerSink = Arc<dyn Fn(PowerEvent) + Send + Sync>;

/// Tells a sink each event once.
struct Once {
    sink: PowerSink,
    /// Bit n: the event with discriminant n was told.
    told: AtomicU8,
}

impl Once {
    fn new(sink: PowerSink) -> Self {
        Self { sink, told: AtomicU8::new(0) }
    }

    fn tell(&self, event: PowerEvent) {
        let bit = 1 << event as u8;
        if self.told.fetch_or(bit, Ordering::Relaxed) & bit == 0 {
            (self.sink)(event);
        }
    }
}

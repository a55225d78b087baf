//! The pvpanic device: one port a panicking kernel writes to (QEMU's `docs/specs/pvpanic.rst`, Linux's
//! `include/uapi/misc/pvpanic.h`).

use super::{Once, PowerEvent, PowerSink};
use crate::bus::BusDevice;

/// Where it is on PCs; ACPI names it `QEMU0001`.
pub const PVPANIC_PORT: u16 = 0x505;

/// PVPANIC_PANICKED.
const PANICKED: u8 = 1 << 0;
/// PVPANIC_CRASH_LOADED.
const CRASH_LOADED: u8 = 1 << 1;

/// The port: reads tell which events it knows, writes report them.
pub struct Pvpanic {
    sink: Once,
}

impl Pvpanic {
    /// Ports it occupies.
    pub const WINDOW: u64 = 1;

    /// A port that tells `sink`.
    #[must_use]
    pub fn new(sink: PowerSink) -> Self {
        Self { sink: Once::new(sink) }
    }
}

impl BusDevice for Pvpanic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        if value & PANICKED != 0 {
            self.sink.tell(PowerEvent::Panicked);
        } else if value & CRASH_LOADED != 0 {
            self.sink.tell(PowerEvent::CrashLoaded);
        }
    }
}

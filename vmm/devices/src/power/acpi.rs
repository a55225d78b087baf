//! The three registers a hardware-reduced ACPI system needs (ACPI 6.5, sections 4.8.3.6 and 4.8.3.7).
//!
//! | offset | register | access |
//! |---|---|---|
//! | 0 | sleep control: SLP_TYP in bits 4:2, SLP_EN is bit 5 | write; reads as 0 |
//! | 1 | sleep status: WAK_STS is bit 7 | reads as 0: this machine never wakes from anything |
//! | 2 | reset: [`RESET_VALUE`] resets | write; reads as 0 |

use super::{Once, PowerEvent, PowerSink};
use crate::bus::BusDevice;

/// SLP_TYP of S5; the DSDT's `_S5` package names the same.
pub const S5_SLEEP_TYPE: u8 = 5;
/// What the FADT tells the guest to write to the reset register.
pub const RESET_VALUE: u8 = 1;

/// SLP_EN: enter the state SLP_TYP names.
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;

/// The power registers, on [`Self::WINDOW`] ports anywhere.
pub struct PowerControl {
    sink: Once,
}

impl PowerControl {
    /// Offset of the sleep control register: the FADT's `SLEEP_CONTROL_REG`, 8 bits.
    pub const SLEEP_CONTROL: u64 = 0;
    /// Offset of the sleep status register: the FADT's `SLEEP_STATUS_REG`, 8 bits.
    pub const SLEEP_STATUS: u64 = 1;
    /// Offset of the reset register: the FADT's `RESET_REG`, 8 bits.
    pub const RESET: u64 = 2;
    /// Ports it occupies.
    pub const WINDOW: u64 = 4;

    /// Registers that tell `sink`.
    #[must_use]
    pub fn new(sink: PowerSink) -> Self {
        Self { sink: Once::new(sink) }
    }
}

impl BusDevice for PowerControl {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (Self::SLEEP_CONTROL, &[value]) => {
                let sleep_type = (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
                if value & SLEEP_ENABLE != 0 && sleep_type == S5_SLEEP_TYPE {
                    self.sink.tell(PowerEvent::PowerOff);
                }
            }
            (Self::RESET, &[RESET_VALUE]) => self.sink.tell(PowerEvent::Reboot),
            _ => {}
        }
    }
}

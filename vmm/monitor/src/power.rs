//! The guest's ways to say that it is done: ACPI's sleep and reset registers, and pvpanic.

use std::sync::atomic::{AtomicBool, Ordering};

use ark_devices::bus::BusDevice;

use crate::acpi::{RESET_VALUE, SLEEP_VALUE_S5};
use crate::mailbox::{Mailbox, News};
use crate::map;

/// Ports from [`map::SLEEP_CONTROL`] on.
pub const REGISTERS: u64 = 3;

const SLEEP_CONTROL: u64 = 0;
const RESET: u64 = (map::RESET - map::SLEEP_CONTROL) as u64;

/// Sleep control, sleep status and reset (ACPI 6.5, section 4.8.3.7 and 4.8.3.6). All read as zero: the status register's
/// wake bit is never set, as nothing sleeps.
pub struct PowerRegisters {
    mailbox: Mailbox,
    told: AtomicBool,
}

impl PowerRegisters {
    /// Registers that tell `mailbox`, once.
    #[must_use]
    pub fn new(mailbox: Mailbox) -> Self {
        Self { mailbox, told: AtomicBool::new(false) }
    }
}

impl BusDevice for PowerRegisters {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let news = match (offset, data) {
            (SLEEP_CONTROL, [SLEEP_VALUE_S5]) => News::GuestPowerOff,
            (RESET, [RESET_VALUE]) => News::GuestReset,
            _ => return,
        };
        // A guest that goes on after its end could fill the mailbox otherwise.
        if !self.told.swap(true, Ordering::Relaxed) {
            self.mailbox.send(news);
        }
    }
}

/// The pvpanic device (QEMU docs/specs/pvpanic.rst): reading tells which events it takes, writing reports them.
pub struct PanicPort {
    mailbox: Mailbox,
    told: AtomicBool,
}

/// `PVPANIC_PANICKED` (include/uapi/misc/pvpanic.h): the kernel panicked and will do nothing about it itself.
const PANICKED: u8 = 1;

impl PanicPort {
    /// A port that tells `mailbox`, once.
    #[must_use]
    pub fn new(mailbox: Mailbox) -> Self {
        Self { mailbox, told: AtomicBool::new(false) }
    }
}

impl BusDevice for PanicPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let panicked = data.first().is_some_and(|events| events & PANICKED != 0);
        if panicked && !self.told.swap(true, Ordering::Relaxed) {
            self.mailbox.send(News::GuestPanic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn news(device: &dyn BusDevice, mailbox: &Mailbox, offset: u64, data: &[u8]) -> Option<News> {
        device.write(offset, data);
        mailbox.take()
    }

    #[test]
    fn only_the_right_value_in_the_right_register_ends_the_guest_and_only_once() {
        for (offset, value, what) in [(0, 0x34, News::GuestPowerOff), (2, 1, News::GuestReset)] {
            let mailbox = Mailbox::new().unwrap();
            let registers = PowerRegisters::new(mailbox.clone());
            // Another sleep state, no SLP_EN, the status register, no data, too much data.
            for (offset, data) in [(0, &[0x24][..]), (0, &[0x14]), (1, &[0x34]), (2, &[0]), (0, &[]), (0, &[0x34; 9])] {
                assert_eq!(news(&registers, &mailbox, offset, data), None);
            }
            assert_eq!(news(&registers, &mailbox, offset, &[value]), Some(what));
            assert_eq!(news(&registers, &mailbox, offset, &[value]), None);
        }
    }

    #[test]
    fn a_panic_is_told_once() {
        let mailbox = Mailbox::new().unwrap();
        let port = PanicPort::new(mailbox.clone());
        let mut supported = [0];
        port.read(0, &mut supported);
        assert_eq!(supported, [1]);
        assert_eq!(news(&port, &mailbox, 0, &[2]), None);
        assert_eq!(news(&port, &mailbox, 0, &[3]), Some(News::GuestPanic));
        assert_eq!(news(&port, &mailbox, 0, &[1]), None);
    }
}

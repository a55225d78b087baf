//! The device status: how far driver and device have come with each other.
//!
//! ```text
//!  Reset ──► Acknowledged ──► Driver ──► FeaturesOk ──► DriverOk
//!    ▲            │              │            │             │
//!    └────────────┴──────────────┴────────────┴─────────────┘   writing 0; the only way on once the driver said FAILED
//! ```

use super::registers::{
    STATUS_ACKNOWLEDGE, STATUS_DRIVER, STATUS_DRIVER_OK, STATUS_FAILED, STATUS_FEATURES_OK,
    STATUS_NEEDS_RESET,
};

/// How far initialization has come (specification 1.2, section 3.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// Nothing was said yet.
    Reset,
    /// The guest noticed the device.
    Acknowledged,
    /// The guest has a driver; features are negotiated.
    Driver,
    /// Features are settled; queues are set up.
    FeaturesOk,
    /// The device is live.
    DriverOk,
}

/// What a write to the status register means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Start over.
    Reset,
    /// The next phase, if the device agrees.
    To(Phase),
    /// The driver gives up on the device.
    Fail,
    /// What is set already.
    Same,
    /// Not a move the specification knows: ignored.
    Illegal,
}

impl Phase {
    /// Its bits in the status register.
    pub(super) const fn bits(self) -> u32 {
        match self {
            Self::Reset => 0,
            Self::Acknowledged => STATUS_ACKNOWLEDGE,
            Self::Driver => STATUS_ACKNOWLEDGE | STATUS_DRIVER,
            Self::FeaturesOk => STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK,
            Self::DriverOk => STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK,
        }
    }

    /// The counterpart of [`Self::bits`].
    pub(super) fn from_bits(bits: u32) -> Option<Self> {
        [Self::Reset, Self::Acknowledged, Self::Driver, Self::FeaturesOk, Self::DriverOk]
            .into_iter()
            .find(|phase| phase.bits() == bits)
    }

    const fn next(self) -> Option<Self> {
        match self {
            Self::Reset => Some(Self::Acknowledged),
            Self::Acknowledged => Some(Self::Driver),
            Self::Driver => Some(Self::FeaturesOk),
            Self::FeaturesOk => Some(Self::DriverOk),
            Self::DriverOk => None,
        }
    }
}

/// What `written` means in `phase`, `failed` being whether the driver gave up before. DEVICE_NEEDS_RESET is the device's bit:
/// a driver that writes back what it read does not set it.
pub(super) fn step(phase: Phase, failed: bool, written: u32) -> Step {
    if written == 0 {
        return Step::Reset;
    }
    let gives_up = written & STATUS_FAILED != 0;
    let bits = written & !(STATUS_FAILED | STATUS_NEEDS_RESET);
    if bits == phase.bits() {
        return if gives_up == failed {
            Step::Same
        } else if gives_up {
            Step::Fail
        } else {
            Step::Illegal
        };
    }
    match phase.next() {
        Some(next) if bits == next.bits() && !failed && !gives_up => Step::To(next),
        Some(_) | None => Step::Illegal,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: [Phase; 5] =
        [Phase::Reset, Phase::Acknowledged, Phase::Driver, Phase::FeaturesOk, Phase::DriverOk];

    #[test]
    fn the_way_up_is_one_bit_at_a_time() {
        let mut phase = Phase::Reset;
        for written in [1, 3, 11, 15] {
            let Step::To(next) = step(phase, false, written) else { panic!("{phase:?} {written}") };
            phase = next;
            assert_eq!(phase.bits(), written);
        }
        assert_eq!(phase, Phase::DriverOk);
    }

    #[test]
    fn a_driver_that_gave_up_can_only_reset() {
        for phase in ALL {
            if phase != Phase::Reset {
                assert_eq!(step(phase, false, phase.bits() | 0x80), Step::Fail);
            }
            for written in 1..=0xff {
                assert!(matches!(step(phase, true, written), Step::Same | Step::Illegal));
            }
            assert_eq!(step(phase, true, 0), Step::Reset);
        }
    }

    #[test]
    fn the_devices_bit_is_ignored() {
        assert_eq!(step(Phase::DriverOk, false, 15 | 0x40), Step::Same);
        assert_eq!(step(Phase::FeaturesOk, false, 15 | 0x40), Step::To(Phase::DriverOk));
    }

    proptest! {
        #[test]
        fn no_write_skips_a_phase_or_goes_back(index in 0..5_usize, failed: bool, written: u32) {
            let phase = ALL[index];
            match step(phase, failed, written) {
                Step::To(next) => {
                    prop_assert!(!failed);
                    prop_assert_eq!(ALL.iter().position(|&p| p == next), Some(index + 1));
                }
                Step::Reset => prop_assert_eq!(written, 0),
                Step::Fail | Step::Same | Step::Illegal => {}
            }
        }
    }
}

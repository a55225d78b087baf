//! Whether an agent that runs is well: its guest is heard, and its own checks pass.

/// How an agent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    /// Well.
    Well,
    /// Its guest is not heard.
    Silent,
    /// Its checks fail.
    Failing,
}

/// What came of the checks of an agent since it came up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Failures in a row that count.
    pub(super) failed: u32,
    /// Whether the last one passed.
    pub(super) is_passed: bool,
    /// Whether any did.
    has_passed: bool,
}

impl Tally {
    /// A check passed.
    pub(crate) fn passed(&mut self) {
        *self = Self { failed: 0, is_passed: true, has_passed: true };
    }

    /// A check failed, within the agent's start period if `is_starting`.
    pub(crate) fn failed(&mut self, is_starting: bool) {
        self.is_passed = false;
        if self.has_passed || !is_starting {
            self.failed = self.failed.saturating_add(1);
        }
    }

    /// Whether checks fail, of which `most` in a row are too many, for an agent that was told to be as `told`.
    pub(super) fn is_failing(self, most: u32, told: Health) -> bool {
        self.failed >= most || told == Health::Failing && !self.is_passed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_agent_is_unhealthy_by_failures_in_a_row_that_count_and_well_by_one_pass(
            checks in prop::collection::vec((any::<bool>(), any::<bool>()), 0..40), most in 1u32..6,
        ) {
            let (mut tally, mut told) = (Tally::default(), Health::Well);
            let (mut in_a_row, mut has_passed, mut expected) = (0, false, Health::Well);
            for (passes, is_starting) in checks {
                if passes {
                    tally.passed();
                    (in_a_row, has_passed, expected) = (0, true, Health::Well);
                } else {
                    tally.failed(is_starting);
                    in_a_row += u32::from(has_passed || !is_starting);
                    if in_a_row >= most {
                        expected = Health::Failing;
                    }
                }
                told = if tally.is_failing(most, told) { Health::Failing } else { Health::Well };
                prop_assert_eq!(told, expected);
            }
        }
    }

    #[test]
    fn who_was_unhealthy_under_an_earlier_arkd_is_until_a_check_passes() {
        let mut tally = Tally::default();
        assert!(tally.is_failing(3, Health::Failing) && !tally.is_failing(3, Health::Well));
        tally.failed(false);
        assert!(tally.is_failing(3, Health::Failing));
        tally.passed();
        assert!(!tally.is_failing(3, Health::Failing));
    }
}

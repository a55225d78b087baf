//! Which of several replicas takes the next call.

/// The place in `loads`, calls under way in each, of the one that takes the next call: one with the fewest, and among equals
/// the next one from `turn` on, so that they take turns. None when there is none.
pub(super) fn pick(loads: &[u32], turn: u64) -> Option<usize> {
    let least = loads.iter().min()?;
    let equals: Vec<usize> = (0..loads.len()).filter(|at| loads.get(*at) == Some(least)).collect();
    let at = turn % u64::try_from(equals.len()).ok()?;
    equals.get(usize::try_from(at).ok()?).copied()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn equals_take_turns() {
        let picked: Vec<_> = (0..6).map(|turn| pick(&[1, 0, 0, 2, 0], turn).unwrap()).collect();
        assert_eq!(picked, [1, 2, 4, 1, 2, 4]);
        assert_eq!(pick(&[], 7), None);
    }

    proptest! {
        #[test]
        fn nobody_with_more_calls_is_picked(loads in prop::collection::vec(0..5_u32, 0..20), turn: u64) {
            match pick(&loads, turn) {
                Some(at) => prop_assert!(loads.iter().all(|load| loads[at] <= *load)),
                None => prop_assert!(loads.is_empty()),
            }
        }

        #[test]
        fn calls_that_do_not_end_are_spread_evenly(replicas in 1..20_usize, calls in 0..100_usize, first: u64) {
            let mut loads = vec![0; replicas];
            for call in 0..calls {
                let at = pick(&loads, first.wrapping_add(call as u64)).unwrap();
                loads[at] += 1;
            }
            let (least, most) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
            prop_assert!(most - least <= 1, "{:?}", loads);
        }
    }
}

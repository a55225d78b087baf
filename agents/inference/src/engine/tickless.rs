//! Processors that the kernel leaves alone: its parameter `nohz_full` lists those that get no timer tick while one thread runs.
//!
//! In a VM each tick is several exits, and after each the caches of translated addresses are cold.

use std::fs;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Where the kernel lists them (Documentation/ABI/testing/sysfs-devices-system-cpu); absent where it was built without.
const LIST: &str = "/sys/devices/system/cpu/nohz_full";

/// Keeps this thread, and those that it starts, to the processors without a tick, if there are any.
pub(super) fn stay() {
    let Some(set) = fs::read_to_string(LIST).ok().and_then(|list| parse(&list)) else { return };
    if let Err(error) = sched_setaffinity(Pid::from_raw(0), &set) {
        tracing::warn!("the engine runs where the timer ticks: sched_setaffinity: {error}");
    }
}

/// A list of processors such as `1-3,5`; none when it names none, as `(null)` and an empty line do.
fn parse(list: &str) -> Option<CpuSet> {
    let mut set = CpuSet::new();
    let mut any = false;
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        // Beyond the set's size there is an error.
        for processor in first..=last {
            set.set(processor).ok()?;
            any = true;
        }
    }
    any.then_some(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(list: &str) -> Option<Vec<usize>> {
        let set = parse(list)?;
        Some((0..CpuSet::count()).filter(|&n| set.is_set(n).unwrap_or(false)).collect())
    }

    #[test]
    fn ranges_and_single_processors_are_read() {
        assert_eq!(members("1-3,5\n"), Some(vec![1, 2, 3, 5]));
        assert_eq!(members("1\n"), Some(vec![1]));
    }

    #[test]
    fn a_kernel_that_has_none_says_so_in_several_ways() {
        for none in ["", "\n", " (null)\n", "5-1", "0-99999999"] {
            assert_eq!(members(none), None, "{none:?}");
        }
    }
}

//! The memory map the kernel is told (ACPI specification 6.5, section 15).

use ark_hal::memory;

use crate::map;

/// What a range is, as the e820 interface numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Usable memory.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
    /// Holds ACPI tables.
    Acpi = 3,
}

/// One range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// What it is.
    pub kind: Kind,
}

/// The memory map of a guest with `bytes` of RAM, in ascending order. RAM behind the PC's video and BIOS ranges stays
/// unused but for the ACPI tables and the VM generation id.
#[must_use]
pub fn layout(bytes: u64) -> Vec<Entry> {
    let entry = |start, end: u64, kind| Entry { start, len: end - start, kind };
    let mut entries = vec![
        entry(0, map::LOW_RAM_END, Kind::Ram),
        entry(map::LOW_RAM_END, map::ACPI, Kind::Reserved),
        entry(map::ACPI, map::ACPI + map::ACPI_LEN, Kind::Acpi),
        entry(map::GENERATION, map::GENERATION + map::GENERATION_LEN, Kind::Reserved),
    ];
    for (start, len) in memory::layout(bytes) {
        let first = start.max(map::HIGH_RAM);
        entries.push(entry(first, start + len, Kind::Ram));
    }
    entries
}

#[cfg(test)]
mod tests {
    use ark_types::agent::MIN_MEMORY_MIB;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_small_guest_has_one_range_above_1_mib() {
        let entries = layout(128 << 20);
        assert_eq!(entries.len(), 5);
        assert_eq!(entries[4], Entry { start: 1 << 20, len: 127 << 20, kind: Kind::Ram });
    }

    #[test]
    fn a_guest_of_5_gib_has_its_last_2_gib_above_4_gib() {
        let entries = layout(5 << 30);
        assert_eq!(entries[4], Entry { start: 1 << 20, len: (3 << 30) - (1 << 20), kind: Kind::Ram });
        assert_eq!(entries[5], Entry { start: 4 << 30, len: 2 << 30, kind: Kind::Ram });
        assert_eq!(entries.len(), 6);
    }

    proptest! {
        #[test]
        fn ranges_ascend_do_not_overlap_and_leave_the_gap_free(mib in MIN_MEMORY_MIB..1 << 20) {
            let entries = layout(mib << 20);
            for pair in entries.windows(2) {
                prop_assert!(pair[0].start + pair[0].len <= pair[1].start);
            }
            for e in &entries {
                prop_assert!(e.len > 0);
                prop_assert!(e.start + e.len <= memory::MMIO_GAP_START || e.start >= memory::MMIO_GAP_END);
            }
            let usable: u64 = entries.iter().filter(|e| e.kind == Kind::Ram).map(|e| e.len).sum();
            prop_assert_eq!(usable, (mib << 20) - (map::HIGH_RAM - map::LOW_RAM_END));
        }
    }
}

//! CPUID of one processor: what KVM offers on this host, with the topology leaves filled in.
//!
//! The topology is one socket of `count` cores with one thread each; APIC ids are 0, 1, 2, … Intel's leaves are 1, 4, 0xb
//! and 0x1f (Intel SDM 2A, CPUID), AMD's 1, 0x8000_0008, 0x8000_001d and 0x8000_001e (AMD APM 3, appendix E).

use kvm_bindings::kvm_cpuid_entry2;

/// Which of how many processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Processor {
    pub(super) index: u8,
    /// At least 1 and greater than `index`.
    pub(super) count: u8,
}

impl Processor {
    /// Bits of an APIC id that number the cores: 2^bits is `count` rounded up to a power of two.
    fn id_bits(self) -> u32 {
        u8::BITS - self.count.saturating_sub(1).leading_zeros()
    }

    /// APIC ids set aside for the socket, less one.
    fn last_id(self) -> u32 {
        (1 << self.id_bits()) - 1
    }
}

const LEAF_VENDOR: u32 = 0x0;
const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHES: u32 = 0x4;
const LEAF_FEATURES_V2: u32 = 0x7;
const LEAF_PERFORMANCE_MONITORING: u32 = 0xa;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_XSAVE: u32 = 0xd;
const LEAF_AMX_TILES: u32 = 0x1d;
const LEAF_AMX_MULTIPLIER: u32 = 0x1e;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_CACHES: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;
const LEAF_AMD_PERFORMANCE_MONITORING: u32 = 0x8000_0022;
const LEAF_AMD_TOPOLOGY_V2: u32 = 0x8000_0026;

/// Leaf 1, ECX.
const ECX_PDCM: u32 = 1 << 15;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: EBX's processor count is valid.
const EDX_HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX: HTT means cores, not threads.
const ECX_CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0x8000_0001, ECX: extended performance counters of the core, the northbridge and the last level cache.
const ECX_PERFORMANCE_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;

/// Intel's matrix extensions (AMX). KVM gives their 8 KiB of state per processor only to a process that asked for it
/// (ARCH_REQ_XCOMP_GUEST_PERM), but lists the instructions all the same, and before 6.4 one of the two XCR0 bits, which no
/// XSETBV takes alone. So guests have none of it. Leaf 7: EDX of sub-leaf 0 (BF16, TILE, INT8), EAX (FP16) and EDX
/// (COMPLEX) of sub-leaf 1; leaf 0xd: EAX of sub-leaf 0, and the bits' numbers are sub-leaves (Intel SDM 1, chapter 18).
const EDX_AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
const EAX_AMX_FP16: u32 = 1 << 21;
const EDX_AMX_COMPLEX: u32 = 1 << 8;
const XCR0_AMX: u32 = 1 << 17 | 1 << 18;
const XSAVE_AMX: std::ops::RangeInclusive<u32> = 17..=18;

/// Leaf 0, EBX: how the names `AuthenticAMD` and `HygonGenuine` begin.
const AMD_EBX: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];

/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`: the entry is one sub-leaf of several.
const HAS_SUBLEAVES: u32 = kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;

/// The entries for one processor. `tsc_deadline`: the in-kernel APIC has that timer mode (old kernels do not say so in
/// their list).
pub(super) fn for_processor(
    supported: &[kvm_cpuid_entry2],
    processor: Processor,
    tsc_deadline: bool,
) -> Vec<kvm_cpuid_entry2> {
    let amd = supported.iter().any(|e| e.function == LEAF_VENDOR && AMD_EBX.contains(&e.ebx));
    let mut entries = Vec::with_capacity(supported.len() + 4);
    for entry in supported {
        match entry.function {
            // Made anew below, with as many levels as there are.
            LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => {
                if entry.index == 0 {
                    entries.extend(topology_levels(entry.function, processor));
                }
            }
            // Describes the host's dies and sockets; absent means: look at the leaves below.
            LEAF_AMD_TOPOLOGY_V2 => {}
            LEAF_AMX_TILES | LEAF_AMX_MULTIPLIER => {}
            LEAF_XSAVE if XSAVE_AMX.contains(&entry.index) => {}
            _ => {
                let mut entry = *entry;
                adjust(&mut entry, processor, amd, tsc_deadline);
                entries.push(entry);
            }
        }
    }
    entries
}

fn adjust(entry: &mut kvm_cpuid_entry2, processor: Processor, amd: bool, tsc_deadline: bool) {
    let id = u32::from(processor.index);
    match entry.function {
        LEAF_FEATURES => {
            entry.ebx = entry.ebx & 0xffff | id << 24 | (processor.last_id() + 1).min(0xff) << 16;
            set(&mut entry.ecx, ECX_PDCM, false);
            set(&mut entry.ecx, ECX_HYPERVISOR, true);
            if tsc_deadline {
                set(&mut entry.ecx, ECX_TSC_DEADLINE, true);
            }
            set(&mut entry.edx, EDX_HTT, processor.count > 1);
        }
        LEAF_CACHES if cache_type(entry.eax) != 0 => {
            // EAX[31:26]: cores in the socket, less one; six bits.
            entry.eax =
                with_sharing(entry.eax, processor) & !(0x3f << 26) | processor.last_id().min(0x3f) << 26;
        }
        LEAF_AMD_CACHES if cache_type(entry.eax) != 0 => entry.eax = with_sharing(entry.eax, processor),
        LEAF_FEATURES_V2 if entry.index == 0 => set(&mut entry.edx, EDX_AMX, false),
        LEAF_FEATURES_V2 if entry.index == 1 => {
            set(&mut entry.eax, EAX_AMX_FP16, false);
            set(&mut entry.edx, EDX_AMX_COMPLEX, false);
        }
        LEAF_XSAVE if entry.index == 0 => set(&mut entry.eax, XCR0_AMX, false),
        // No performance counters, see `vm::turn_off_performance_counters`.
        LEAF_PERFORMANCE_MONITORING | LEAF_AMD_PERFORMANCE_MONITORING => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        LEAF_AMD_FEATURES if amd => {
            set(&mut entry.ecx, ECX_CMP_LEGACY, processor.count > 1);
            set(&mut entry.ecx, ECX_PERFORMANCE_COUNTERS, false);
        }
        LEAF_AMD_SIZES if amd => {
            // ECX[7:0]: cores less one, ECX[15:12]: bits of the APIC id that number them.
            entry.ecx = entry.ecx & !0xf0ff
                | u32::from(processor.count.saturating_sub(1))
                | processor.id_bits() << 12;
        }
        // EAX: APIC id. EBX: core id, one thread per core. ECX: node 0 of one.
        LEAF_AMD_TOPOLOGY => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

fn set(register: &mut u32, bits: u32, on: bool) {
    *register = if on { *register | bits } else { *register & !bits };
}

/// EAX[4:0] of a cache leaf; zero ends the list.
fn cache_type(eax: u32) -> u32 {
    eax & 0x1f
}

/// EAX[25:14]: APIC ids that share the cache, less one. Levels 1 and 2 belong to a core, those above to the socket.
fn with_sharing(eax: u32, processor: Processor) -> u32 {
    let level = eax >> 5 & 0x7;
    let sharing = if level < 3 { 0 } else { processor.last_id() };
    eax & !(0xfff << 14) | sharing << 14
}

/// Leaf 0xb or 0x1f: threads (one per core), cores, end of list.
fn topology_levels(function: u32, processor: Processor) -> [kvm_cpuid_entry2; 3] {
    /// ECX[15:8].
    const THREADS: u32 = 1;
    const CORES: u32 = 2;
    let level = |index: u32, kind: u32, shift: u32, processors: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: HAS_SUBLEAVES,
        eax: shift,
        ebx: processors,
        ecx: kind << 8 | index,
        edx: processor.index.into(),
        ..Default::default()
    };
    [level(0, THREADS, 0, 1), level(1, CORES, processor.id_bits(), processor.count.into()), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn vendor(name: &[u8; 12]) -> kvm_cpuid_entry2 {
        let word = |i: usize| u32::from_le_bytes([name[i], name[i + 1], name[i + 2], name[i + 3]]);
        entry(LEAF_VENDOR, 0, [0x1f, word(0), word(8), word(4)])
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|e| (e.function, e.index) == (function, index)).unwrap()
    }

    #[test]
    fn the_feature_leaf_names_the_processor_the_hypervisor_and_the_timer() {
        let supported =
            [vendor(b"GenuineIntel"), entry(LEAF_FEATURES, 0, [0x906ea, 0x0510_0800, 0x8001, 0x2])];
        let entries = for_processor(&supported, Processor { index: 2, count: 3 }, true);
        let leaf = find(&entries, LEAF_FEATURES, 0);
        assert_eq!(leaf.eax, 0x906ea);
        assert_eq!(leaf.ebx, 0x0204_0800);
        assert_eq!(leaf.ecx, 0x1 | ECX_HYPERVISOR | ECX_TSC_DEADLINE);
        assert_eq!(leaf.edx, 0x2 | EDX_HTT);
        let alone = for_processor(&supported, Processor { index: 0, count: 1 }, false);
        let leaf = find(&alone, LEAF_FEATURES, 0);
        assert_eq!((leaf.ebx, leaf.ecx, leaf.edx), (0x0001_0800, 0x1 | ECX_HYPERVISOR, 0x2));
    }

    #[test]
    fn intel_caches_are_shared_by_level_and_the_list_ends() {
        let cache = |index, level: u32| entry(LEAF_CACHES, index, [0xfc00_c001 | level << 5, 1, 2, 3]);
        let supported = [cache(0, 1), cache(1, 2), cache(2, 3), entry(LEAF_CACHES, 3, [0; 4])];
        let entries = for_processor(&supported, Processor { index: 0, count: 6 }, false);
        let sharing = |index| find(&entries, LEAF_CACHES, index).eax >> 14 & 0xfff;
        assert_eq!([sharing(0), sharing(1), sharing(2)], [0, 0, 7]);
        assert_eq!(find(&entries, LEAF_CACHES, 0).eax >> 26, 7);
        assert_eq!(find(&entries, LEAF_CACHES, 3).eax, 0);
    }

    #[test]
    fn the_topology_leaves_have_threads_then_cores_then_an_end() {
        let supported = [
            entry(LEAF_TOPOLOGY, 0, [0; 4]),
            entry(LEAF_TOPOLOGY, 1, [9; 4]),
            entry(LEAF_TOPOLOGY_V2, 0, [7; 4]),
        ];
        let entries = for_processor(&supported, Processor { index: 3, count: 4 }, false);
        assert_eq!(entries.len(), 6);
        for function in [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2] {
            let registers = |index| {
                let e = find(&entries, function, index);
                assert_eq!(e.flags, HAS_SUBLEAVES);
                [e.eax, e.ebx, e.ecx, e.edx]
            };
            assert_eq!(registers(0), [0, 1, 0x100, 3]);
            assert_eq!(registers(1), [2, 4, 0x201, 3]);
            assert_eq!(registers(2), [0, 0, 2, 3]);
        }
    }

    #[test]
    fn amd_leaves_name_the_core_and_count_them() {
        let supported = [
            vendor(b"AuthenticAMD"),
            entry(LEAF_AMD_FEATURES, 0, [1, 2, 4, 8]),
            entry(LEAF_AMD_SIZES, 0, [0x3028, 5, 0x0001_6007, 6]),
            entry(LEAF_AMD_CACHES, 0, [0x163, 0, 0, 0]),
            entry(LEAF_AMD_TOPOLOGY, 0, [0xff; 4]),
            entry(LEAF_AMD_TOPOLOGY_V2, 0, [0xff; 4]),
        ];
        let entries = for_processor(&supported, Processor { index: 1, count: 4 }, false);
        assert_eq!(find(&entries, LEAF_AMD_FEATURES, 0).ecx, 4 | ECX_CMP_LEGACY);
        let sizes = find(&entries, LEAF_AMD_SIZES, 0);
        assert_eq!((sizes.eax, sizes.ecx), (0x3028, 0x0001_2003));
        assert_eq!(find(&entries, LEAF_AMD_CACHES, 0).eax, 0x163 | 3 << 14);
        let topology = find(&entries, LEAF_AMD_TOPOLOGY, 0);
        assert_eq!((topology.eax, topology.ebx, topology.ecx), (1, 1, 0));
        assert!(!entries.iter().any(|e| e.function == LEAF_AMD_TOPOLOGY_V2));
    }

    #[test]
    fn an_amd_processor_has_no_performance_counters_and_an_intel_one_no_core_count_of_amd() {
        let counters = entry(LEAF_AMD_FEATURES, 0, [0, 0, 1 << 22 | ECX_PERFORMANCE_COUNTERS, 0]);
        let supported =
            [vendor(b"AuthenticAMD"), counters, entry(LEAF_AMD_PERFORMANCE_MONITORING, 0, [1, 6, 0, 0])];
        let entries = for_processor(&supported, Processor { index: 0, count: 1 }, false);
        assert_eq!(find(&entries, LEAF_AMD_FEATURES, 0).ecx, 1 << 22);
        let leaf = find(&entries, LEAF_AMD_PERFORMANCE_MONITORING, 0);
        assert_eq!((leaf.eax, leaf.ebx), (0, 0));

        let sizes = entry(LEAF_AMD_SIZES, 0, [0x302e, 0, 0, 0]);
        let entries =
            for_processor(&[vendor(b"GenuineIntel"), sizes], Processor { index: 0, count: 4 }, false);
        assert_eq!(find(&entries, LEAF_AMD_SIZES, 0), sizes);
    }

    #[test]
    fn nothing_is_left_of_amx_and_all_of_avx_512() {
        let supported = [
            entry(LEAF_FEATURES_V2, 0, [1, 1 << 16, 0, EDX_AMX | 1 << 23]),
            entry(LEAF_FEATURES_V2, 1, [EAX_AMX_FP16 | 1 << 5, 0, 0, EDX_AMX_COMPLEX | 1 << 14]),
            // As kernels before 6.4 list it: the configuration's bit without the data's.
            entry(LEAF_XSAVE, 0, [0xe7 | 1 << 17, 0, 0x2b00, 0]),
            entry(LEAF_XSAVE, 17, [64, 2752, 0, 0]),
            entry(LEAF_XSAVE, 18, [8192, 2816, 6, 0]),
            entry(LEAF_XSAVE, 7, [1024, 1664, 0, 0]),
            entry(LEAF_AMX_TILES, 1, [1; 4]),
            entry(LEAF_AMX_MULTIPLIER, 0, [1; 4]),
        ];
        let entries = for_processor(&supported, Processor { index: 0, count: 1 }, false);
        assert_eq!(entries.len(), 4);
        let (first, second) = (find(&entries, LEAF_FEATURES_V2, 0), find(&entries, LEAF_FEATURES_V2, 1));
        assert_eq!((first.ebx, first.edx, second.eax, second.edx), (1 << 16, 1 << 23, 1 << 5, 1 << 14));
        assert_eq!(find(&entries, LEAF_XSAVE, 0).eax, 0xe7);
        assert_eq!(find(&entries, LEAF_XSAVE, 7), supported[5]);
    }

    #[test]
    fn the_paravirtual_leaves_stay_and_the_pmu_goes() {
        let signature = entry(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]);
        let supported = [signature, entry(LEAF_PERFORMANCE_MONITORING, 0, [0x0730_0404, 0, 0, 0x603])];
        let entries = for_processor(&supported, Processor { index: 0, count: 1 }, true);
        assert_eq!(find(&entries, 0x4000_0000, 0), signature);
        assert_eq!(find(&entries, LEAF_PERFORMANCE_MONITORING, 0).eax, 0);
    }

    proptest! {
        #[test]
        fn apic_ids_fit_the_bits_that_number_them(count in 1_u8..=255, index in 0_u8..255) {
            prop_assume!(index < count);
            let processor = Processor { index, count };
            prop_assert!(u32::from(index) >> processor.id_bits() == 0);
            prop_assert!(u32::from(count) <= processor.last_id() + 1);
            prop_assert!(processor.last_id() < 2 * u32::from(count));
        }
    }
}

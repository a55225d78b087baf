//! Which processor a host has, and whether it can go on with what another one began.

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

/// A host's processor, for the manifest of a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processor {
    /// For example `GenuineIntel`.
    pub vendor: String,
    /// Family, with the extended family added as vendors do.
    pub family: u32,
    /// Model, with the extended model.
    pub model: u32,
    /// Stepping.
    pub stepping: u32,
    /// The name it is sold by; empty where the processor has none.
    pub brand: String,
}

/// A saved vCPU cannot go on here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForeignProcessor {
    /// Another maker's.
    #[error(
        "it was taken on a processor of {saved:?} and this one is of {here:?}: restore it on the kind of processor it was \
         taken on, or build it again here"
    )]
    Vendor {
        /// The saved one's.
        saved: String,
        /// This host's.
        here: String,
    },
    /// The guest was told of a feature that is not here.
    #[error(
        "its guest uses a processor feature that is not here (CPUID leaf {leaf:#x}, sub-leaf {subleaf}, {register} bit \
         {bit}): restore it on the kind of processor it was taken on, or build it again here"
    )]
    Feature {
        /// CPUID leaf (EAX).
        leaf: u32,
        /// Sub-leaf (ECX).
        subleaf: u32,
        /// Register of the answer.
        register: &'static str,
        /// Bit of the register.
        bit: u32,
    },
}

/// One register of feature bits.
struct Features {
    leaf: u32,
    subleaf: u32,
    name: &'static str,
    register: fn(&kvm_cpuid_entry2) -> u32,
    /// Bits that do not come from the host's list: KVM derives them from the guest's own registers (OSXSAVE, APIC, OSPKE,
    /// MONITOR), or we set them ourselves (HYPERVISOR, the TSC-deadline timer, core counts).
    ignored: u32,
}

/// The leaves whose bits are promises to the guest (Intel SDM 2A, CPUID; AMD APM 3, appendix E): features, extended
/// features, states that XSAVE knows and its variants, AMD's features, and AMD's controls of speculation.
const FEATURES: [Features; 13] = [
    features(0x1, 0, "ECX", |e| e.ecx, 1 << 3 | 1 << 24 | 1 << 27 | 1 << 31),
    features(0x1, 0, "EDX", |e| e.edx, 1 << 9 | 1 << 28),
    features(0x7, 0, "EBX", |e| e.ebx, 0),
    features(0x7, 0, "ECX", |e| e.ecx, 1 << 4),
    features(0x7, 0, "EDX", |e| e.edx, 0),
    features(0x7, 1, "EAX", |e| e.eax, 0),
    features(0x7, 1, "EDX", |e| e.edx, 0),
    features(0xd, 0, "EAX", |e| e.eax, 0),
    features(0xd, 0, "EDX", |e| e.edx, 0),
    features(0xd, 1, "EAX", |e| e.eax, 0),
    features(0x8000_0001, 0, "ECX", |e| e.ecx, 1 << 1),
    features(0x8000_0001, 0, "EDX", |e| e.edx, 1 << 9),
    features(0x8000_0008, 0, "EBX", |e| e.ebx, 0),
];

const fn features(
    leaf: u32,
    subleaf: u32,
    name: &'static str,
    register: fn(&kvm_cpuid_entry2) -> u32,
    ignored: u32,
) -> Features {
    Features { leaf, subleaf, name, register, ignored }
}

fn find(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> Option<&kvm_cpuid_entry2> {
    entries.iter().find(|e| (e.function, e.index) == (leaf, subleaf))
}

/// Compares what a saved guest was told with what `host` offers; a leaf that is missing has no features.
pub(crate) fn check(saved: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Result<(), ForeignProcessor> {
    let (theirs, ours) = (vendor(saved), vendor(host));
    if theirs != ours {
        return Err(ForeignProcessor::Vendor { saved: theirs, here: ours });
    }
    for Features { leaf, subleaf, name, register, ignored } in &FEATURES {
        let bits = |entries| find(entries, *leaf, *subleaf).map_or(0, register);
        let missing = bits(saved) & !bits(host) & !ignored;
        if missing != 0 {
            return Err(ForeignProcessor::Feature {
                leaf: *leaf,
                subleaf: *subleaf,
                register: name,
                bit: missing.trailing_zeros(),
            });
        }
    }
    Ok(())
}

/// Leaf 0: EBX, EDX, ECX.
fn vendor(entries: &[kvm_cpuid_entry2]) -> String {
    find(entries, 0, 0).map_or_else(String::new, |e| text(&[e.ebx, e.edx, e.ecx]))
}

/// Registers as text, up to its end and without spaces around.
fn text(registers: &[u32]) -> String {
    let bytes: Vec<u8> =
        registers.iter().flat_map(|r| r.to_le_bytes()).take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

impl Processor {
    /// What `entries` say.
    pub(crate) fn of(entries: &[kvm_cpuid_entry2]) -> Self {
        // Leaf 1, EAX: extended family [27:20], extended model [19:16], family [11:8], model [7:4], stepping [3:0].
        let signature = find(entries, 1, 0).map_or(0, |e| e.eax);
        let field = |shift: u32, mask: u32| signature >> shift & mask;
        let base = field(8, 0xf);
        let family = if base == 0xf { base + field(20, 0xff) } else { base };
        let extended = if matches!(base, 0x6 | 0xf) { field(16, 0xf) << 4 } else { 0 };
        let brand: Vec<u32> = (0x8000_0002..=0x8000_0004)
            .filter_map(|leaf| find(entries, leaf, 0))
            .flat_map(|e| [e.eax, e.ebx, e.ecx, e.edx])
            .collect();
        Self {
            vendor: vendor(entries),
            family,
            model: extended | field(4, 0xf),
            stepping: field(0, 0xf),
            brand: text(&brand),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn words(text: &str) -> Vec<u32> {
        text.as_bytes().chunks(4).map(|c| u32::from_le_bytes(c.try_into().unwrap())).collect()
    }

    fn named(vendor: &str) -> kvm_cpuid_entry2 {
        let name = words(vendor);
        entry(0, 0, [0x20, name[0], name[2], name[1]])
    }

    #[test]
    fn a_processor_says_who_it_is() {
        let brand = words("  Intel(R) Xeon(R) CPU @ 2.80GHz\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        let mut entries = vec![named("GenuineIntel"), entry(1, 0, [0x0005_0657, 0, 0, 0])];
        for (leaf, registers) in (0x8000_0002..).zip(brand.chunks(4)) {
            entries.push(entry(leaf, 0, registers.try_into().unwrap()));
        }
        let processor = Processor::of(&entries);
        assert_eq!(processor.vendor, "GenuineIntel");
        assert_eq!((processor.family, processor.model, processor.stepping), (6, 0x55, 7));
        assert_eq!(processor.brand, "Intel(R) Xeon(R) CPU @ 2.80GHz");
        let amd = Processor::of(&[named("AuthenticAMD"), entry(1, 0, [0x00a2_0f12, 0, 0, 0])]);
        assert_eq!((amd.family, amd.model, amd.stepping), (0x19, 0x21, 2));
        assert_eq!(Processor::of(&[]), Processor::default());
    }

    #[test]
    fn another_vendor_is_refused_with_what_to_do() {
        let error = check(&[named("AuthenticAMD")], &[named("GenuineIntel")]).unwrap_err();
        for part in ["AuthenticAMD", "GenuineIntel", "build it again here"] {
            assert!(error.to_string().contains(part), "{error}");
        }
        assert!(check(&[], &[named("GenuineIntel")]).is_err());
    }

    #[test]
    fn a_missing_feature_is_named_and_what_is_ours_is_not_asked_for() {
        let host = [named("GenuineIntel"), entry(1, 0, [0, 0, 0x1, 0x2]), entry(7, 0, [0, 1 << 5, 0, 0])];
        let own = entry(1, 7, [0; 4]);
        let same = [host[0], entry(1, 0, [9, 9, 0x1 | 1 << 24 | 1 << 27 | 1 << 31, 0x2 | 1 << 28]), own];
        check(&same, &host).unwrap();
        let more = [host[0], entry(7, 0, [0, 1 << 5 | 1 << 16, 0, 0])];
        let error = check(&more, &host).unwrap_err();
        assert_eq!(error, ForeignProcessor::Feature { leaf: 7, subleaf: 0, register: "EBX", bit: 16 });
        assert!(error.to_string().contains("CPUID leaf 0x7, sub-leaf 0, EBX bit 16"), "{error}");
        let subleaf = [host[0], entry(0xd, 1, [8, 0, 0, 0])];
        assert!(matches!(check(&subleaf, &host), Err(ForeignProcessor::Feature { leaf: 0xd, bit: 3, .. })));
    }

    proptest! {
        #[test]
        fn less_is_always_welcome_and_more_never(which in 0..FEATURES.len(), here: u32, there: u32) {
            let features = &FEATURES[which];
            let leaf = |bits: u32| {
                let mut leaf = entry(features.leaf, features.subleaf, [0; 4]);
                match features.name {
                    "EAX" => leaf.eax = bits,
                    "EBX" => leaf.ebx = bits,
                    "ECX" => leaf.ecx = bits,
                    _ => leaf.edx = bits,
                }
                [named("GenuineIntel"), leaf]
            };
            prop_assert!(check(&leaf(here & there), &leaf(here)).is_ok());
            let missing = there & !here & !features.ignored;
            match check(&leaf(there), &leaf(here)) {
                Ok(()) => prop_assert_eq!(missing, 0),
                Err(ForeignProcessor::Feature { bit, .. }) => prop_assert!(missing >> bit & 1 == 1),
                Err(other) => prop_assert!(false, "{}", other),
            }
        }
    }
}

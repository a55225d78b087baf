//! What the boot processor finds when it starts: the state that the 64-bit Linux boot protocol wants
//! (Documentation/arch/x86/boot.rst): long mode, paging with an identity map, flat segments, interrupts off.
//!
//! GDT and page tables lie in guest memory between [`BOOT_AREA_START`] and [`BOOT_AREA_END`]; the guest may overwrite them
//! as soon as it has its own. The kernel, its command line and the zero page must lie elsewhere, below 1 GiB.

use kvm_bindings::{
    CpuId, Msrs, kvm_dtable, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
    kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::failed;
use crate::{HalError, VcpuEntry};

/// First guest-physical address used here.
pub const BOOT_AREA_START: u64 = 0x9000;
/// First guest-physical address after the ones used here.
pub const BOOT_AREA_END: u64 = 0xd000;

const PML4: u64 = BOOT_AREA_START;
const PDPT: u64 = PML4 + 0x1000;
const PAGE_DIRECTORY: u64 = PDPT + 0x1000;
const GDT: u64 = PAGE_DIRECTORY + 0x1000;

/// The three tables of the identity map, one page each.
pub(crate) const PAGE_TABLES: [u64; 3] = [PML4, PDPT, PAGE_DIRECTORY];

/// Page table entry bits (Intel SDM 3A, 4.5): present and writable; a 2 MiB page.
const PRESENT_WRITABLE: u64 = 0x3;
const LARGE_PAGE: u64 = 0x80;
/// Entries in a table, and bytes that one entry of the page directory maps.
const ENTRIES: u64 = 512;
const LARGE_PAGE_SIZE: u64 = 2 << 20;

/// `__BOOT_CS` and `__BOOT_DS` of the boot protocol.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
/// Task state segment; processors with VT-x refuse to enter a guest without one.
const TASK_SELECTOR: u16 = 0x20;

/// Control register and EFER bits (Intel SDM 3A, 2.5 and 2.2.1).
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// The bit of RFLAGS that is always one.
const RFLAGS_RESERVED: u64 = 2;

/// Segment types (Intel SDM 3A, 3.4.5.1 and 3.5).
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_BUSY_TSS: u8 = 0xb;

/// Registers, segments, FPU and local APIC of the boot processor; writes GDT and page tables.
pub(super) fn set_registers(
    vcpu: &VcpuFd,
    memory: &GuestMemoryMmap,
    entry: VcpuEntry,
) -> Result<(), HalError> {
    let segments = Segments::flat();
    write_tables(memory, &segments).map_err(|error| HalError {
        what: "write page tables and GDT into guest memory",
        source: std::io::Error::other(error),
    })?;

    let mut sregs = vcpu.get_sregs().map_err(failed("read the segments (KVM_GET_SREGS)"))?;
    enter_long_mode(&mut sregs, &segments);
    vcpu.set_sregs(&sregs).map_err(failed("set the segments (KVM_SET_SREGS)"))?;

    let regs =
        kvm_regs { rip: entry.rip, rsi: entry.boot_params, rflags: RFLAGS_RESERVED, ..Default::default() };
    vcpu.set_regs(&regs).map_err(failed("set the registers (KVM_SET_REGS)"))?;

    // What FNINIT and a reset leave: all exceptions masked (Intel SDM 1, 8.1.5 and 10.2.3).
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(failed("set the floating point unit (KVM_SET_FPU)"))?;

    let mut lapic = vcpu.get_lapic().map_err(failed("read the local APIC (KVM_GET_LAPIC)"))?;
    connect_lints(&mut lapic);
    vcpu.set_lapic(&lapic).map_err(failed("set the local APIC (KVM_SET_LAPIC)"))
}

struct Segments {
    code: kvm_segment,
    data: kvm_segment,
    task: kvm_segment,
}

impl Segments {
    fn flat() -> Self {
        let flat = kvm_segment { base: 0, limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() };
        Self {
            code: kvm_segment { selector: CODE_SELECTOR, type_: TYPE_CODE, l: 1, ..flat },
            data: kvm_segment { selector: DATA_SELECTOR, type_: TYPE_DATA, db: 1, ..flat },
            task: kvm_segment {
                selector: TASK_SELECTOR,
                type_: TYPE_BUSY_TSS,
                s: 0,
                g: 0,
                limit: 0x67,
                ..flat
            },
        }
    }
}

/// A segment as an 8-byte descriptor (Intel SDM 3A, 3.4.5). The base is zero in all of ours.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.avl)
        | u64::from(segment.l) << 1
        | u64::from(segment.db) << 2
        | u64::from(segment.g) << 3;
    (limit & 0xffff) | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
}

/// The GDT; the task segment's descriptor takes two entries in long mode, the second holds the base's upper half.
fn gdt(segments: &Segments) -> [u64; 6] {
    [0, 0, descriptor(&segments.code), descriptor(&segments.data), descriptor(&segments.task), 0]
}

/// Identity map of the first GiB by 2 MiB pages, and the GDT.
fn write_tables(memory: &GuestMemoryMmap, segments: &Segments) -> Result<(), GuestMemoryError> {
    memory.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    memory.write_obj(PAGE_DIRECTORY | PRESENT_WRITABLE, GuestAddress(PDPT))?;
    let directory: Vec<u8> = (0..ENTRIES)
        .flat_map(|index| ((index * LARGE_PAGE_SIZE) | LARGE_PAGE | PRESENT_WRITABLE).to_le_bytes())
        .collect();
    memory.write_slice(&directory, GuestAddress(PAGE_DIRECTORY))?;
    memory.write_obj(gdt(segments), GuestAddress(GDT))
}

fn enter_long_mode(sregs: &mut kvm_sregs, segments: &Segments) {
    sregs.cs = segments.code;
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = segments.data;
    }
    sregs.tr = segments.task;
    sregs.gdt = kvm_dtable { base: GDT, limit: 6 * 8 - 1, ..Default::default() };
    // No handlers: a fault before the guest has its own IDT is a triple fault, which is an exit.
    sregs.idt = kvm_dtable::default();
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

/// Offsets of the local vector table's entries for the two pins in the APIC page, and the delivery modes they get (Intel
/// SDM 3A, 11.5.1): the PIC is on LINT0, NMI on LINT1, as firmware leaves them on every PC.
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVERY_MASK: u32 = 0x700;
const DELIVERY_NMI: u32 = 0x400;
const DELIVERY_EXTINT: u32 = 0x700;
const LVT_MASKED: u32 = 1 << 16;

fn connect_lints(lapic: &mut kvm_lapic_state) {
    for (offset, mode) in [(LVT_LINT0, DELIVERY_EXTINT), (LVT_LINT1, DELIVERY_NMI)] {
        let mut bytes = [0; 4];
        for (byte, reg) in bytes.iter_mut().zip(&lapic.regs[offset..]) {
            *byte = reg.cast_unsigned();
        }
        let value = u32::from_le_bytes(bytes) & !(DELIVERY_MASK | LVT_MASKED) | mode;
        for (reg, byte) in lapic.regs[offset..].iter_mut().zip(value.to_le_bytes()) {
            *reg = byte.cast_signed();
        }
    }
}

/// MSRs whose reset value is not what Linux wants from firmware: `(index, value, what to say when KVM refuses)`; without a
/// word the MSR is a nicety that some hosts do not offer. Everything else (SYSCALL, SYSENTER, PAT, TSC) Linux sets itself.
const MSRS: [(u32, u64, Option<&str>); 2] = [
    // IA32_MTRR_DEF_TYPE: MTRRs on, memory is write-back. With the reset value (off) Linux would not use PAT.
    (0x2ff, 1 << 11 | 6, Some("set the memory type (KVM_SET_MSRS, IA32_MTRR_DEF_TYPE)")),
    // IA32_MISC_ENABLE, an Intel matter: fast string operations on, no branch trace store, no PEBS.
    (0x1a0, 1 | 1 << 11 | 1 << 12, None),
];

/// Leaf 0xd, sub-leaf 0: EAX and EDX are the bits that XCR0 may have (Intel SDM 2A, CPUID).
const LEAF_XSAVE: u32 = 0xd;

/// Sets XCR0 to all that `cpuid` offers, on every processor: INIT does not reset it. Linux sets the same value. The SVM of
/// QEMU's emulated processors does not tell KVM when a guest does that; KVM would then go on with the reset value, report
/// an XSAVE area that is too small for the features in use, and Linux would do without XSAVE and AVX.
pub(super) fn set_xcr0(vcpu: &VcpuFd, cpuid: &CpuId) -> Result<(), HalError> {
    let Some(leaf) = cpuid.as_slice().iter().find(|e| (e.function, e.index) == (LEAF_XSAVE, 0)) else {
        return Ok(());
    };
    let value = u64::from(leaf.edx) << 32 | u64::from(leaf.eax);
    if value == 0 {
        return Ok(());
    }
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0].value = value;
    vcpu.set_xcrs(&xcrs).map_err(failed("turn on the extended states (KVM_SET_XCRS)"))
}

/// Sets the MSRs, on every processor: INIT does not reset them.
pub(super) fn set_msrs(vcpu: &VcpuFd) -> Result<(), HalError> {
    for (index, data, needed) in MSRS {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        let msrs = Msrs::from_entries(&[entry]).map_err(|e| HalError {
            what: "set an MSR (KVM_SET_MSRS)",
            source: std::io::Error::other(format!("{e:?}")),
        })?;
        // The result is the number of MSRs that were set.
        let set = vcpu.set_msrs(&msrs);
        if let (Some(what), Err(_) | Ok(0)) = (needed, &set) {
            let source = set.err().map_or_else(|| std::io::Error::other("refused"), Into::into);
            return Err(HalError { what, source });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{HugePages, create};

    #[test]
    fn the_gdt_has_the_descriptors_of_the_boot_protocol() {
        assert_eq!(
            gdt(&Segments::flat()),
            [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067, 0]
        );
    }

    #[test]
    fn the_page_tables_map_the_first_gib_to_itself() {
        let memory = create(0x10_0000, HugePages::Never).unwrap();
        write_tables(&memory, &Segments::flat()).unwrap();
        let entry =
            |table: u64, index: u64| -> u64 { memory.read_obj(GuestAddress(table + index * 8)).unwrap() };
        let walk = |address: u64| {
            let pdpt = entry(PML4, address >> 39 & 511) & !0xfff;
            let directory = entry(pdpt, address >> 30 & 511) & !0xfff;
            let leaf = entry(directory, address >> 21 & 511);
            assert_eq!(leaf & 0xfff, LARGE_PAGE | PRESENT_WRITABLE);
            (leaf & !0xfff) + (address & 0x1f_ffff)
        };
        for address in [0, 0x7000, 0x100_0000, 0x3fff_ffff] {
            assert_eq!(walk(address), address);
        }
        assert_eq!(entry(PML4, 1), 0);
        assert_eq!(entry(PDPT, 1), 0);
    }

    #[test]
    fn too_little_memory_is_an_error() {
        let memory = create(BOOT_AREA_END - 0x1000, HugePages::Never).unwrap();
        assert!(write_tables(&memory, &Segments::flat()).is_err());
    }

    #[test]
    fn long_mode_is_on_with_our_tables() {
        let mut sregs = kvm_sregs { apic_base: 0xfee0_0900, cr8: 3, ..Default::default() };
        enter_long_mode(&mut sregs, &Segments::flat());
        assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x8000_0011, 0x9000, 0x20, 0x500));
        assert_eq!((sregs.cs.selector, sregs.ss.selector, sregs.tr.selector), (0x10, 0x18, 0x20));
        assert_eq!((sregs.gdt.base, sregs.gdt.limit), (0xc000, 47));
        assert_eq!(sregs.apic_base, 0xfee0_0900);
    }

    #[test]
    fn the_lints_are_unmasked_and_other_bits_stay() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[LVT_LINT0 + 1] = 0x20;
        lapic.regs[LVT_LINT0 + 2] = 1;
        lapic.regs[LVT_LINT1 + 2] = 1;
        connect_lints(&mut lapic);
        assert_eq!(lapic.regs[LVT_LINT0..LVT_LINT0 + 4], [0, 0x27, 0, 0]);
        assert_eq!(lapic.regs[LVT_LINT1..LVT_LINT1 + 4], [0, 0x04, 0, 0]);
    }
}

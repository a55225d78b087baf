//! The ACPI tables: what lets an unmodified kernel find processors, devices and the way to power off.
//!
//! "Hardware-reduced" ACPI (specification 6.5, section 4.1): no fixed hardware but a sleep, a status and a reset
//! register. RSDP, XSDT, FADT, MADT and DSDT stand one behind the other from [`map::ACPI`]; the RSDP comes first, and
//! what follows the DSDT is free for later tables.

mod dsdt;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use ark_devices::power::{PowerControl, RESET_VALUE};

use crate::map;

const OEM_ID: [u8; 6] = *b"NOAARK";
const OEM_TABLE_ID: [u8; 8] = *b"ARKVMM  ";
const OEM_REVISION: u32 = 1;

/// `IAPC_BOOT_ARCH` of the FADT (specification 6.5, section 5.2.9.3): no VGA (bit 2), no MSI (bit 3), no CMOS clock
/// (bit 5); clear bits 0 and 1 say that there are no ISA devices and no keyboard controller.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 3 | 1 << 5;

/// Tables that do not fit where the map has room for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the ACPI tables take {0} bytes and have room for {max}; this is a defect", max = map::ACPI_LEN)]
pub struct TooLarge(usize);

/// The tables of a guest with `vcpus` processors and `virtio_devices` virtio devices, to be written at [`map::ACPI`],
/// which is where their RSDP is.
///
/// # Errors
/// [`TooLarge`].
pub fn tables(vcpus: u8, virtio_devices: u32) -> Result<Vec<u8>, TooLarge> {
    let dsdt = dsdt::build(vcpus, virtio_devices);
    let madt = bytes(&madt(vcpus));

    let mut at = map::ACPI + align(Rsdp::len());
    let mut place = |len: usize| {
        let here = at;
        at += align(len);
        here
    };
    let dsdt_at = place(dsdt.len());
    let fadt = bytes(&fadt(dsdt_at).finalize());
    let fadt_at = place(fadt.len());
    let madt_at = place(madt.len());
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt_at);
    xsdt.add_entry(madt_at);
    let xsdt = bytes(&xsdt);
    let xsdt_at = place(xsdt.len());

    let mut image = bytes(&Rsdp::new(OEM_ID, xsdt_at));
    for table in [dsdt, fadt, madt, xsdt] {
        image.resize(image.len().next_multiple_of(ALIGN), 0);
        image.extend_from_slice(&table);
    }
    if image.len() as u64 > map::ACPI_LEN {
        return Err(TooLarge(image.len()));
    }
    Ok(image)
}

/// Every table begins at a multiple of this.
const ALIGN: usize = 16;

fn align(len: usize) -> u64 {
    len.next_multiple_of(ALIGN) as u64
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt_at: u64) -> FADTBuilder {
    const BITS: u8 = 8;
    let register = |offset| {
        let port = u64::from(map::POWER) + offset;
        GAS::new(AddressSpace::SystemIo, BITS, 0, AccessSize::ByteAccess, port)
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt_at)
        .preferred_pm_profile(PmProfile::PerformanceServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = register(PowerControl::RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = register(PowerControl::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(PowerControl::SLEEP_STATUS);
    fadt
}

/// Processors (their local APIC ids are their indexes) and the one IOAPIC.
fn madt(vcpus: u8) -> MADT {
    let mut madt =
        MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, LocalInterruptController::Address(map::LAPIC));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, map::IOAPIC, 0));
    madt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, b| sum.wrapping_add(*b))
    }

    /// The table at guest-physical `addr` of `image`, checked for signature, length and checksum.
    fn table<'a>(image: &'a [u8], addr: u64, signature: &[u8; 4]) -> &'a [u8] {
        let at = usize::try_from(addr - map::ACPI).unwrap();
        assert_eq!(&image[at..at + 4], signature);
        let table = &image[at..at + u32_at(image, at + 4) as usize];
        assert_eq!(sum(table), 0, "checksum of {}", String::from_utf8_lossy(signature));
        table
    }

    #[test]
    fn the_tables_lead_from_the_rsdp_to_the_dsdt_with_right_checksums() {
        let image = tables(4, 10).unwrap();
        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!(sum(&image[..20]), 0);
        assert_eq!(sum(&image[..36]), 0);
        let xsdt = table(&image, u64_at(&image, 24), b"XSDT");
        assert_eq!(xsdt.len(), 36 + 2 * 8);
        let fadt = table(&image, u64_at(xsdt, 36), b"FACP");
        table(&image, u64_at(xsdt, 44), b"APIC");
        table(&image, u64_at(fadt, 140), b"DSDT");
    }

    #[test]
    fn the_fadt_offers_sleep_and_reset_registers_and_nothing_of_a_pc() {
        let image = tables(1, 1).unwrap();
        let xsdt = table(&image, u64_at(&image, 24), b"XSDT");
        let fadt = table(&image, u64_at(xsdt, 36), b"FACP");
        // HW_REDUCED_ACPI and RESET_REG_SUP.
        assert_eq!(u32_at(fadt, 112) & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
        // (offset of the generic address structure, port): reset, sleep control, sleep status.
        for (at, port) in [(116, 0x602), (244, 0x600), (256, 0x601)] {
            assert_eq!(fadt[at..at + 4], [1, 8, 0, 1]);
            assert_eq!(u64_at(fadt, at + 4), port);
        }
        assert_eq!(fadt[128], RESET_VALUE);
        assert_eq!(u16::from_le_bytes([fadt[109], fadt[110]]), BOOT_ARCH);
    }

    #[test]
    fn the_madt_lists_every_processor_and_the_ioapic() {
        let image = tables(32, 1).unwrap();
        let xsdt = table(&image, u64_at(&image, 24), b"XSDT");
        let madt = table(&image, u64_at(xsdt, 44), b"APIC");
        assert_eq!(u32_at(madt, 36), map::LAPIC);
        let mut rest = &madt[44..];
        for id in 0..32 {
            assert_eq!(rest[..8], [0, 8, id, id, 1, 0, 0, 0]);
            rest = &rest[8..];
        }
        assert_eq!(rest[..4], [1, 12, 0, 0]);
        assert_eq!(u32_at(rest, 4), map::IOAPIC);
        assert_eq!(rest.len(), 12);
    }

    #[test]
    fn the_largest_guest_leaves_room_for_more_tables() {
        assert!(tables(32, 10).unwrap().len() < 0x4000);
    }
}

//! The guest's address map: what is at which guest-physical address and at which port.
//!
//! | address | what |
//! |---|---|
//! | `0x0` .. `0xa_0000` | RAM; the boot data below 640 KiB |
//! | `0xe_0000` .. `0xf_f000` | ACPI tables |
//! | `0xf_f000` .. `0x10_0000` | the VM generation id |
//! | `0x10_0000` .. 3 GiB | RAM; the kernel where its ELF header says, the initial root file system at the end |
//! | 3 GiB .. 4 GiB | no RAM: virtio windows from `0xd000_0000`, IOAPIC, local APICs |
//! | 4 GiB .. | the rest of the RAM |

/// The zero page (`struct boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;
/// The kernel's command line; [`ark_types::vmm::MAX_CMDLINE`] bytes and a NUL.
pub const CMDLINE: u64 = 0x2_0000;
/// End of the RAM below 1 MiB: the video and BIOS ranges of a PC begin here.
pub const LOW_RAM_END: u64 = 0xa_0000;
/// The ACPI tables' first byte, where the RSDP is.
pub const ACPI: u64 = 0xe_0000;
/// Bytes set aside for the ACPI tables.
pub const ACPI_LEN: u64 = 0x1_f000;
/// The VM generation id: 16 bytes in a page that the kernel is told not to touch (its specification wants it outside of
/// usable memory and of memory that ACPI tables are reclaimed from).
pub const GENERATION: u64 = ACPI + ACPI_LEN;
/// Bytes set aside for the VM generation id.
pub const GENERATION_LEN: u64 = 0x1000;
/// RAM above 1 MiB.
pub const HIGH_RAM: u64 = 0x10_0000;
/// First virtio-mmio window.
pub const VIRTIO: u64 = 0xd000_0000;
/// Bytes of one virtio-mmio window.
pub const VIRTIO_LEN: u64 = 0x1000;
/// Interrupt lines for virtio devices, one each, edge-triggered.
pub const VIRTIO_GSIS: std::ops::RangeInclusive<u32> = 5..=14;
/// Interrupt line that says that the VM generation id has changed, edge-triggered.
pub const GENERATION_GSI: u32 = 15;
/// The IOAPIC (KVM's fixed place for it).
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APICs (their address after reset).
pub const LAPIC: u32 = 0xfee0_0000;

/// COM1's first port.
pub const COM1: u16 = 0x3f8;
/// COM1's interrupt line.
pub const COM1_GSI: u32 = 4;
/// pvpanic's one port.
pub const PVPANIC: u16 = ark_devices::power::PVPANIC_PORT;
/// ACPI's sleep and reset registers ([`ark_devices::power::PowerControl`]).
pub const POWER: u16 = 0x600;

/// Base address of virtio window `index`.
#[must_use]
pub const fn virtio_window(index: u32) -> u64 {
    VIRTIO + index as u64 * VIRTIO_LEN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_disk_vsock_and_rng_have_a_line_and_a_window_in_the_gap() {
        let devices = u32::try_from(ark_types::vmm::MAX_DISKS).unwrap() + 2;
        assert!(VIRTIO_GSIS.count() >= devices as usize);
        assert!(!VIRTIO_GSIS.contains(&GENERATION_GSI) && !VIRTIO_GSIS.contains(&COM1_GSI));
        let end = virtio_window(devices);
        assert_eq!(GENERATION + GENERATION_LEN, HIGH_RAM);
        assert!(VIRTIO >= ark_hal::memory::MMIO_GAP_START && end <= u64::from(IOAPIC));
    }
}

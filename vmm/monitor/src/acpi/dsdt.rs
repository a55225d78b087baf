//! The DSDT: devices in ACPI's byte code (specification 6.5, section 20).

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path,
    ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;
use ark_devices::power::{Pvpanic, S5_SLEEP_TYPE};
use ark_devices::serial;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::map;

/// Bytes of a table's header.
const HEADER_LEN: u32 = 36;
/// Revision 2 and above mean 64-bit integers.
const REVISION: u8 = 6;

/// The DSDT of a guest with `vcpus` processors and `virtio_devices` virtio devices.
pub(super) fn build(vcpus: u8, virtio_devices: u32) -> Vec<u8> {
    let mut devices = Vec::new();
    for id in 0..vcpus {
        processor(id, &mut devices);
    }
    for index in 0..virtio_devices {
        virtio(index, &mut devices);
    }
    serial(&mut devices);
    pvpanic(&mut devices);
    generation(&mut devices);
    events(&mut devices);

    let mut dsdt = Sdt::new(*b"DSDT", HEADER_LEN, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&Scope::raw("\\_SB_".into(), devices));
    let mut s5 = Vec::new();
    let sleep_type = S5_SLEEP_TYPE;
    Name::new("\\_S5_".into(), &Package::new(vec![&sleep_type, &ZERO, &ZERO, &ZERO])).to_aml_bytes(&mut s5);
    dsdt.append_slice(&s5);
    dsdt.as_slice().to_vec()
}

/// A processor device: `_UID` is the one of its MADT entry.
fn processor(id: u8, out: &mut Vec<u8>) {
    let path = Path::new(&format!("C{id:03X}"));
    Device::new(path, vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &id)])
        .to_aml_bytes(out);
}

/// A virtio-mmio device ("LNRO0005" is what Linux's driver goes by).
fn virtio(index: u32, out: &mut Vec<u8>) {
    let path = Path::new(&format!("V{index:03X}"));
    #[expect(clippy::cast_possible_truncation, reason = "the windows are below 4 GiB")]
    let window = Memory32Fixed::new(true, map::virtio_window(index) as u32, map::VIRTIO_LEN as u32);
    let line = interrupt(map::VIRTIO_GSIS.start() + index);
    Device::new(
        path,
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &index),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&window, &line])),
        ],
    )
    .to_aml_bytes(out);
}

/// COM1, a 16550A.
fn serial(out: &mut Vec<u8>) {
    let ports = ports(map::COM1, serial::WINDOW);
    let line = interrupt(map::COM1_GSI);
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &line])),
        ],
    )
    .to_aml_bytes(out);
}

/// The port a panicking kernel writes to.
fn pvpanic(out: &mut Vec<u8>) {
    let port = ports(map::PVPANIC, Pvpanic::WINDOW);
    Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&port])),
        ],
    )
    .to_aml_bytes(out);
}

/// The device of the VM generation id ("Virtual Machine Generation ID", Microsoft, 2012): Linux goes by its compatible id,
/// whose letters ACPI takes for capitals, and asks `ADDR` for the halves of the id's address, the lower one first.
fn generation(out: &mut Vec<u8>) {
    #[expect(clippy::cast_possible_truncation, reason = "the halves of an address")]
    let (low, high) = (map::GENERATION as u32, (map::GENERATION >> 32) as u32);
    Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"ARKVGID0"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(out);
}

/// The generic event device (specification 6.5, section 5.6.9): its one interrupt says that the generation id has changed.
fn events(out: &mut Vec<u8>) {
    /// What the device of the generation id is told when the id has changed.
    const CHANGED: u8 = 0x80;
    let line = interrupt(map::GENERATION_GSI);
    let (device, number) = (Path::new("\\_SB_.VGEN"), Arg(0));
    let notify = Notify::new(&device, &CHANGED);
    let it_is = Equal::new(&number, &map::GENERATION_GSI);
    Device::new(
        "GED0".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&line])),
            &Method::new("_EVT".into(), 1, true, vec![&If::new(&it_is, vec![&notify])]),
        ],
    )
    .to_aml_bytes(out);
}

/// `len` ports from `first` on, which cannot be elsewhere.
fn ports(first: u16, len: u64) -> IO {
    IO::new(first, first, 1, u8::try_from(len).unwrap_or(u8::MAX))
}

/// An edge-triggered, active-high line of one device.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contains(bytes: &[u8], needle: &[u8]) -> bool {
        bytes.windows(needle.len()).any(|w| w == needle)
    }

    #[test]
    fn every_device_is_in_the_table_once() {
        let dsdt = build(2, 3);
        for name in ["C000", "C001", "V000", "V001", "V002", "COM1", "PEVT", "GED0", "_S5_"] {
            assert_eq!(dsdt.windows(4).filter(|w| *w == name.as_bytes()).count(), 1, "{name}");
        }
        for name in ["C002", "V003"] {
            assert!(!contains(&dsdt, name.as_bytes()), "{name}");
        }
    }

    #[test]
    fn a_virtio_device_names_its_window_and_its_line() {
        let dsdt = build(1, 2);
        // Memory32Fixed descriptor: tag, length 9, writable, base, length.
        let mut window = vec![0x86, 9, 0, 1];
        window.extend_from_slice(&0xd000_1000_u32.to_le_bytes());
        window.extend_from_slice(&0x1000_u32.to_le_bytes());
        assert!(contains(&dsdt, &window));
        // Extended interrupt descriptor: tag, length 6, consumer and edge-triggered, one line.
        let mut line = vec![0x89, 6, 0, 0b11, 1];
        line.extend_from_slice(&6_u32.to_le_bytes());
        assert!(contains(&dsdt, &line));
    }

    #[test]
    fn the_generation_ids_device_names_its_address_and_is_notified_on_its_line() {
        let dsdt = build(1, 1);
        for text in [&b"VM_Gen_Counter\0"[..], b"ARKVGID0\0", b"ACPI0013\0"] {
            assert!(contains(&dsdt, text), "{}", String::from_utf8_lossy(text));
        }
        // Name, "ADDR", package of two: a double word and zero.
        let address = [&b"\x08ADDR\x12"[..], &[8, 2, 0x0c, 0x00, 0xf0, 0x0f, 0x00, 0x00]].concat();
        assert!(contains(&dsdt, &address));
        let mut line = vec![0x89, 6, 0, 0b11, 1];
        line.extend_from_slice(&15_u32.to_le_bytes());
        assert!(contains(&dsdt, &line));
        // Method(_EVT, 1, serialized) { If (Arg0 == 15) { Notify(\_SB.VGEN, 0x80) } }
        let event = b"\x14\x19_EVT\x09\xa0\x12\x93\x68\x0a\x0f\x86\\\x2e_SB_VGEN\x0a\x80";
        let at = dsdt.windows(4).position(|w| w == b"_EVT").unwrap();
        assert_eq!(&dsdt[at - 2..][..event.len()], event);
    }
}

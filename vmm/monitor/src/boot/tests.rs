use std::collections::BTreeMap;

use ark_hal::memory::{HugePages, create};
use proptest::prelude::*;

use super::testing::{START, elf};
use super::*;

const MIB: u64 = 1 << 20;

struct Files {
    dir: tempfile::TempDir,
    config: VmConfig,
}

impl Files {
    fn with_kernel(kernel: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinux");
        std::fs::write(&path, kernel).unwrap();
        let config = VmConfig {
            kernel: path,
            initrd: None,
            cmdline: String::new(),
            vcpus: 1,
            memory_mib: 64,
            disks: vec![],
            vsock: None,
            console: None,
            control_socket: None,
            exit_file: None,
            labels: BTreeMap::new(),
        };
        Self { dir, config }
    }

    fn with_initrd(mut self, len: u64) -> Self {
        let path = self.dir.path().join("initrd");
        std::fs::write(&path, b"cpio").unwrap();
        File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
        self.config.initrd = Some(path);
        self
    }

    fn load(&self) -> Result<(GuestMemory, VcpuEntry), BootError> {
        let bytes = self.config.memory_mib << 20;
        let memory = create(bytes, HugePages::Never).unwrap();
        let entry = Payload::open(&self.config)?.load(&memory, bytes, map::ACPI)?;
        Ok((memory, entry))
    }

    fn refusal(&self) -> String {
        self.load().unwrap_err().to_string()
    }
}

fn zero_page_of(memory: &GuestMemory) -> boot_params {
    memory.read_obj(GuestAddress(map::ZERO_PAGE)).unwrap()
}

#[test]
fn kernel_command_line_and_zero_page_are_where_the_boot_protocol_looks() {
    let mut files = Files::with_kernel(&elf(b"code"));
    files.config.cmdline = "ark=1".into();
    let (memory, entry) = files.load().unwrap();
    assert_eq!(entry, VcpuEntry { rip: START, boot_params: map::ZERO_PAGE });
    assert_eq!(&memory.read_obj::<[u8; 4]>(GuestAddress(START)).unwrap(), b"code");

    let params = zero_page_of(&memory);
    let hdr = params.hdr;
    assert_eq!((hdr.header, hdr.boot_flag, hdr.type_of_loader), (0x5372_6448, 0xaa55, 0xff));
    assert_eq!((hdr.ramdisk_image, hdr.ramdisk_size), (0, 0));
    assert_eq!({ params.acpi_rsdp_addr }, map::ACPI);
    assert_eq!(params.e820_entries, 5);
    let mut line = vec![0; hdr.cmdline_size as usize + 1];
    memory.read_slice(&mut line, GuestAddress(hdr.cmd_line_ptr.into())).unwrap();
    assert!(line.ends_with(b" ark=1\0"));
}

#[test]
fn the_initrd_ends_where_the_memory_ends() {
    let files = Files::with_kernel(&elf(b"code")).with_initrd(5000);
    let (memory, _) = files.load().unwrap();
    let hdr = zero_page_of(&memory).hdr;
    assert_eq!(u64::from(hdr.ramdisk_image), 64 * MIB - 0x2000);
    assert_eq!({ hdr.ramdisk_size }, 5000);
    let start = GuestAddress(hdr.ramdisk_image.into());
    assert_eq!(&memory.read_obj::<[u8; 4]>(start).unwrap(), b"cpio");
}

#[test]
fn an_initrd_that_does_not_fit_beside_the_kernel_is_refused() {
    let files = Files::with_kernel(&elf(b"code"));
    let room = 64 * MIB - START - 0x1000;
    let files = files.with_initrd(room);
    files.load().unwrap();
    for len in [room + 1, 64 * MIB, 1 << 40] {
        let mut again = Files::with_kernel(&elf(b"code"));
        again = again.with_initrd(len);
        assert!(again.refusal().contains("give the VM more memory"), "{len}");
    }
}

#[test]
fn a_missing_kernel_is_named() {
    let mut files = Files::with_kernel(b"");
    files.config.kernel = "/nowhere/vmlinux".into();
    assert!(files.refusal().contains("/nowhere/vmlinux cannot be read: No such file"));
}

#[test]
fn a_directory_or_a_fifo_is_no_kernel_and_nothing_waits_for_it() {
    let mut files = Files::with_kernel(b"");
    files.config.kernel = files.dir.path().to_owned();
    assert!(files.refusal().contains("is not a regular file"));
    let fifo = files.dir.path().join("fifo");
    let name = std::ffi::CString::new(fifo.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: the name is a C string that lives through the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    files.config.kernel = fifo;
    assert!(files.refusal().contains("is not a regular file"));
}

#[test]
fn what_is_not_an_elf_file_for_this_machine_is_refused() {
    let good = elf(b"code");
    let mut bits32 = good.clone();
    bits32[4] = 1;
    let mut arm = good.clone();
    arm[18] = 183;
    for bad in [b"".to_vec(), b"MZ".to_vec(), vec![0x1f; 4096], good[..19].to_vec(), bits32, arm] {
        let refusal = Files::with_kernel(&bad).refusal();
        assert!(refusal.contains("is not a 64-bit x86 ELF executable"), "{refusal}");
    }
}

#[test]
fn a_truncated_kernel_is_refused() {
    let good = elf(&[0; 256]);
    for len in [20, 63, 100, 200, good.len() - 1] {
        let refusal = Files::with_kernel(&good[..len]).refusal();
        assert!(refusal.contains("truncated"), "{len}: {refusal}");
    }
}

#[test]
fn a_kernel_that_starts_outside_of_what_it_loads_is_refused() {
    for entry in [0x7000, START + 4] {
        let mut file = elf(b"code");
        file[24..32].copy_from_slice(&u64::to_le_bytes(entry));
        let refusal = Files::with_kernel(&file).refusal();
        assert!(refusal.contains("build it again"), "{refusal}");
    }
}

proptest! {
    #[test]
    fn no_elf_headers_make_the_loader_panic(at in 0..120_usize, bytes: [u8; 8], code in 0..300_usize) {
        let mut file = elf(&vec![0; code]);
        for (offset, byte) in bytes.iter().enumerate() {
            if let Some(b) = file.get_mut(at + offset) {
                *b = *byte;
            }
        }
        let _ = Files::with_kernel(&file).load();
    }
}

//! A kernel for tests: the smallest ELF file the loader takes.

use std::path::{Path, PathBuf};

/// Where [`elf`] is loaded and starts.
pub(crate) const START: u64 = 0x100_0000;

/// An ELF executable for x86-64 with one segment of `code` at [`START`].
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend_from_slice(&2_u16.to_le_bytes()); // e_type: ET_EXEC
    file.extend_from_slice(&62_u16.to_le_bytes()); // e_machine: EM_X86_64
    file.extend_from_slice(&1_u32.to_le_bytes()); // e_version
    file.extend_from_slice(&START.to_le_bytes()); // e_entry
    file.extend_from_slice(&64_u64.to_le_bytes()); // e_phoff
    file.extend_from_slice(&[0; 12]); // e_shoff, e_flags
    for half in [64_u16, 56, 1, 0, 0, 0] {
        file.extend_from_slice(&half.to_le_bytes()); // e_ehsize, e_phentsize, e_phnum, e_sh…
    }
    file.extend_from_slice(&1_u32.to_le_bytes()); // p_type: PT_LOAD
    file.extend_from_slice(&5_u32.to_le_bytes()); // p_flags: R+X
    let len = code.len() as u64;
    for word in [120, START, START, len, len, 0x1000] {
        file.extend_from_slice(&word.to_le_bytes()); // p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
    }
    assert_eq!(file.len(), 120);
    file.extend_from_slice(code);
    file
}

/// [`elf`] as a file in `dir`.
pub(crate) fn kernel(dir: &Path) -> PathBuf {
    let path = dir.join("vmlinux");
    std::fs::write(&path, elf(&[0xf4; 64])).unwrap();
    path
}

//! Direct boot of an ELF kernel: kernel, initial root file system, command line and zero page into guest memory
//! (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

pub mod cmdline;
pub mod e820;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ark_devices::GuestMemory;
use ark_hal::VcpuEntry;
use ark_hal::memory::MMIO_GAP_START;
use ark_types::vmm::{ConfigError, VmConfig};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{Error as LoaderError, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::map;

/// A guest that cannot be booted. Each of them is the configuration's fault: the files it names or their size.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file could not be read.
    #[error("the {what} {path} cannot be read: {source}; check the path and its permissions")]
    Read {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Not a regular file.
    #[error("the {what} {path} is not a regular file; give the path of one")]
    NotAFile {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// Its path.
        path: PathBuf,
    },
    /// The kernel is no ELF file for this machine.
    #[error(
        "the kernel {path} is not a 64-bit x86 ELF executable; give an uncompressed `vmlinux`, not a bzImage"
    )]
    NotElf {
        /// Its path.
        path: PathBuf,
    },
    /// The kernel's headers point past its end, or its segments past the guest's memory.
    #[error(
        "the kernel {path} cannot be loaded into {memory_mib} MiB of memory ({why}): it is truncated, damaged or too \
         large; build it again or give the VM more memory"
    )]
    Load {
        /// Its path.
        path: PathBuf,
        /// Guest memory, MiB.
        memory_mib: u64,
        /// What the loader said.
        why: String,
    },
    /// The kernel does not start in RAM above 1 MiB.
    #[error("the kernel {path} starts at {entry:#x}, where it has loaded nothing; build it again")]
    Entry {
        /// Its path.
        path: PathBuf,
        /// Its entry point.
        entry: u64,
    },
    /// No room for the initial root file system beside the kernel.
    #[error("the initrd {path} ({len} bytes) does not fit beside the kernel; give the VM more memory")]
    NoRoom {
        /// Its path.
        path: PathBuf,
        /// Its size.
        len: u64,
    },
    /// The command line is too long.
    #[error(transparent)]
    Cmdline(#[from] ConfigError),
    /// The boot data could not be written.
    #[error("the boot data cannot be written to guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// A file, opened without waiting for whoever is at the other end of a FIFO, and its size.
fn open(what: &'static str, path: &Path) -> Result<(File, u64), BootError> {
    let read = |source| BootError::Read { what, path: path.to_owned(), source };
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(read)?;
    let metadata = file.metadata().map_err(read)?;
    if !metadata.is_file() {
        return Err(BootError::NotAFile { what, path: path.to_owned() });
    }
    Ok((file, metadata.len()))
}

/// The kernel and the initial root file system, opened and looked at before anything of the VM is made.
#[derive(Debug)]
pub struct Payload {
    kernel: (PathBuf, File),
    initrd: Option<(PathBuf, File, u64)>,
    cmdline: String,
}

impl Payload {
    /// Opens what `config` names.
    ///
    /// # Errors
    /// [`BootError`] says which file and why.
    pub fn open(config: &VmConfig) -> Result<Self, BootError> {
        let cmdline = cmdline::build(&config.cmdline)?;
        let (kernel, _) = open("kernel", &config.kernel)?;
        check_elf(&config.kernel, &kernel)?;
        let initrd = match &config.initrd {
            Some(path) => open("initrd", path).map(|(file, len)| Some((path.clone(), file, len)))?,
            None => None,
        };
        Ok(Self { kernel: (config.kernel.clone(), kernel), initrd, cmdline })
    }

    /// Puts everything into `memory` of `bytes` bytes; the ACPI tables' RSDP is at `rsdp`.
    ///
    /// # Errors
    /// [`BootError`] says which file and why.
    pub fn load(mut self, memory: &GuestMemory, bytes: u64, rsdp: u64) -> Result<VcpuEntry, BootError> {
        let (path, file) = &mut self.kernel;
        let above = Some(GuestAddress(map::HIGH_RAM));
        let kernel = Elf::load(memory, None, file, above).map_err(|error| BootError::Load {
            path: path.clone(),
            memory_mib: bytes >> 20,
            why: innermost(&error),
        })?;
        let rip = kernel.kernel_load.0;
        if rip < map::HIGH_RAM || rip >= kernel.kernel_end {
            return Err(BootError::Entry { path: path.clone(), entry: rip });
        }
        let initrd = match &self.initrd {
            Some((path, file, len)) => Some(load_initrd(memory, bytes, kernel.kernel_end, path, file, *len)?),
            None => None,
        };
        memory.write_slice(self.cmdline.as_bytes(), GuestAddress(map::CMDLINE))?;
        memory.write_obj(0u8, GuestAddress(map::CMDLINE + self.cmdline.len() as u64))?;
        memory.write_obj(zero_page(&self.cmdline, bytes, initrd, rsdp), GuestAddress(map::ZERO_PAGE))?;
        Ok(VcpuEntry { rip, boot_params: map::ZERO_PAGE })
    }
}

/// The loader's reason without the prefix that it repeats at every level.
fn innermost(error: &LoaderError) -> String {
    let text = error.to_string();
    text.rsplit(": ").next().unwrap_or_default().to_owned()
}

/// Checks what the loader does not: that the file is an ELF one of 64 bits for x86-64 (`EI_CLASS`, `e_machine`).
fn check_elf(path: &Path, file: &File) -> Result<(), BootError> {
    const ELFCLASS64: u8 = 2;
    const EM_X86_64: u16 = 62;
    let mut head = [0; 20];
    let no_elf = || BootError::NotElf { path: path.to_owned() };
    match file.read_exact_at(&mut head, 0) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(no_elf()),
        Err(source) => return Err(BootError::Read { what: "kernel", path: path.to_owned(), source }),
    }
    let machine = u16::from_le_bytes([head[18], head[19]]);
    if &head[..4] != b"\x7fELF" || head[4] != ELFCLASS64 || machine != EM_X86_64 {
        return Err(no_elf());
    }
    Ok(())
}

/// Reads the archive to the end of the RAM below 4 GiB; gives its address and length.
fn load_initrd(
    memory: &GuestMemory,
    bytes: u64,
    kernel_end: u64,
    path: &Path,
    file: &File,
    len: u64,
) -> Result<(u32, u32), BootError> {
    const PAGE: u64 = 0x1000;
    let no_room = || BootError::NoRoom { path: path.to_owned(), len };
    let low_end = bytes.min(MMIO_GAP_START);
    let start = low_end.checked_sub(len).ok_or_else(no_room)? & !(PAGE - 1);
    if start < kernel_end {
        return Err(no_room());
    }
    let (Ok(start), Ok(short)) = (u32::try_from(start), u32::try_from(len)) else { return Err(no_room()) };
    let mut file = file;
    let size = usize::try_from(len).map_err(|_| no_room())?;
    memory.read_exact_volatile_from(GuestAddress(start.into()), &mut file, size).map_err(|e| {
        BootError::Read { what: "initrd", path: path.to_owned(), source: io::Error::other(e.to_string()) }
    })?;
    Ok((start, short))
}

/// The zero page (Documentation/arch/x86/zero-page.rst).
fn zero_page(cmdline: &str, bytes: u64, initrd: Option<(u32, u32)>, rsdp: u64) -> boot_params {
    /// "HdrS": the set-up header is there.
    const HEADER: u32 = 0x5372_6448;
    /// Boot loader without a registered id.
    const UNDEFINED_LOADER: u8 = 0xff;
    const BOOT_FLAG: u16 = 0xaa55;
    let mut params = boot_params::default();
    params.hdr.header = HEADER;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.type_of_loader = UNDEFINED_LOADER;
    #[expect(clippy::cast_possible_truncation, reason = "the map places it below 1 MiB")]
    {
        params.hdr.cmd_line_ptr = map::CMDLINE as u32;
    }
    params.hdr.cmdline_size = u32::try_from(cmdline.len()).unwrap_or(u32::MAX);
    if let Some((start, len)) = initrd {
        params.hdr.ramdisk_image = start;
        params.hdr.ramdisk_size = len;
    }
    params.acpi_rsdp_addr = rsdp;
    let entries = e820::layout(bytes);
    let mut table = params.e820_table;
    for (slot, entry) in table.iter_mut().zip(&entries) {
        *slot = boot_e820_entry { addr: entry.start, size: entry.len, r#type: entry.kind as u32 };
    }
    params.e820_table = table;
    params.e820_entries = u8::try_from(entries.len().min(table.len())).unwrap_or(u8::MAX);
    params
}

//! The probe's guest: about a hundred bytes of machine code that do what every kernel does in its first millisecond.
//!
//! It starts in long mode at ring 0, enters ring 3 by IRET, comes back by SYSCALL, leaves again by SYSRET, comes back by a
//! second SYSCALL and writes its code segment to a port. That it really is at ring 0 then, and not just said to be, shows in
//! privileged instructions: reading CR0, and the port write itself (the I/O privilege level is 0). A byte in memory tells
//! how far it got. There is no IDT: any fault is a triple fault, which ends the run.

use core::arch::global_asm;
use std::fmt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// Guest-physical addresses: the code, the byte that tells how far it got, and the tops of both stacks.
pub(super) const CODE: u64 = 0x1_0000;
const STAGE: u64 = 0x1_1000;
const KERNEL_STACK: u64 = 0x1_3000;
const USER_STACK: u64 = 0x1_4000;

/// How much memory the guest needs.
pub(super) const MEMORY_SIZE: u64 = 0x2_0000;

/// Where the guest reports success, and the upper half of what it writes; the lower half is its code segment.
pub(super) const PORT: u16 = 0x510;
const MAGIC: u32 = 0x41b2_0000;

/// Selectors in the guest's own GDT. SYSCALL takes CS and SS from STAR[47:32] and the next entry, SYSRET takes SS and CS
/// from STAR[63:48] + 8 and + 16 (AMD APM 2, 6.1.1).
const KERNEL_CODE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x10;
const SYSRET_BASE: u16 = 0x18 | 3;
const USER_DATA: u16 = 0x20 | 3;
const USER_CODE: u16 = 0x28 | 3;

/// The user bit of a page table entry (Intel SDM 3A, 4.5).
const USER: u64 = 0x4;

global_asm!(
    r#"
    .pushsection .rodata.ark_probe_guest, "a", @progbits
    .balign 16
    .globl ark_probe_guest_start
ark_probe_guest_start:
    mov rsp, {kernel_stack}
    lgdt [rip + 80f]
    push {kernel_code}
    lea rax, [rip + 20f]
    push rax
    retfq
20: mov eax, {kernel_data}
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov ecx, 0xc0000080         // EFER: turn SYSCALL on
    rdmsr
    or eax, 1
    wrmsr
    mov ecx, 0xc0000081         // STAR
    xor eax, eax
    mov edx, {star}
    wrmsr
    mov ecx, 0xc0000082         // LSTAR
    lea rax, [rip + 40f]
    xor edx, edx
    wrmsr
    mov ecx, 0xc0000084         // SFMASK
    xor eax, eax
    wrmsr
    mov byte ptr [{stage}], 1
    push {user_data}
    push {user_stack}
    push 2
    push {user_code}
    lea rax, [rip + 30f]
    push rax
    iretq
30: mov byte ptr [{stage}], 2   // ring 3
    syscall
    mov byte ptr [{stage}], 4   // ring 3 again
    syscall
    ud2
40: mov rax, cr0                // faults unless this really is ring 0
    cmp byte ptr [{stage}], 4
    je 50f
    mov byte ptr [{stage}], 3
    sysretq
50: mov byte ptr [{stage}], 5
    popcnt eax, ecx
    mov eax, cs
    or eax, {magic}
    mov edx, {port}
    out dx, eax
60: hlt
    jmp 60b
    .balign 8
70: .quad 0
    .quad 0x00af9b000000ffff    // kernel code, 64 bit
    .quad 0x00cf93000000ffff    // kernel data
    .quad 0x00cffb000000ffff    // user code, 32 bit (never used, SYSRET wants the place)
    .quad 0x00cff3000000ffff    // user data
    .quad 0x00affb000000ffff    // user code, 64 bit
80: .word 80b - 70b - 1
    .quad {code} + (70b - ark_probe_guest_start)
    .globl ark_probe_guest_end
ark_probe_guest_end:
    .popsection
    "#,
    code = const CODE,
    stage = const STAGE,
    kernel_stack = const KERNEL_STACK,
    user_stack = const USER_STACK,
    kernel_code = const KERNEL_CODE,
    kernel_data = const KERNEL_DATA,
    user_code = const USER_CODE,
    user_data = const USER_DATA,
    star = const (SYSRET_BASE as u32) << 16 | KERNEL_CODE as u32,
    magic = const MAGIC,
    port = const PORT,
);

unsafe extern "C" {
    static ark_probe_guest_start: u8;
    static ark_probe_guest_end: u8;
}

fn code() -> &'static [u8] {
    let start = &raw const ark_probe_guest_start;
    let length = (&raw const ark_probe_guest_end).addr() - start.addr();
    // SAFETY: the labels enclose the bytes assembled above, in one read-only section that lives as long as the program.
    unsafe { std::slice::from_raw_parts(start, length) }
}

/// Puts the code in its place.
pub(super) fn load(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    memory.write_slice(code(), GuestAddress(CODE))
}

/// Lets ring 3 use the first 2 MiB that `page_tables` (one entry in each leads there) map.
pub(super) fn open_to_ring_3(memory: &GuestMemoryMmap, page_tables: &[u64]) -> Result<(), GuestMemoryError> {
    for table in page_tables {
        let entry: u64 = memory.read_obj(GuestAddress(*table))?;
        memory.write_obj(entry | USER, GuestAddress(*table))?;
    }
    Ok(())
}

/// How far the guest got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// It did not get through setting up segments and MSRs at ring 0.
    Nothing,
    /// About to enter ring 3 by IRET.
    Ring0,
    /// In ring 3, about to use SYSCALL.
    Ring3,
    /// In the SYSCALL handler, about to return by SYSRET.
    Syscall,
    /// In ring 3 again, about to use SYSCALL a second time.
    Ring3Again,
    /// In the handler again, about to write the port.
    SyscallAgain,
}

impl Stage {
    /// Reads it from the guest's memory.
    pub(super) fn read(memory: &GuestMemoryMmap) -> Self {
        match memory.read_obj(GuestAddress(STAGE)) {
            Ok(1_u8) => Self::Ring0,
            Ok(2) => Self::Ring3,
            Ok(3) => Self::Syscall,
            Ok(4) => Self::Ring3Again,
            Ok(5) => Self::SyscallAgain,
            _ => Self::Nothing,
        }
    }
}

impl fmt::Display for Stage {
    /// What failed, when the guest got no further.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "setting up segments and MSRs at ring 0",
            Self::Ring0 => "entering ring 3 by IRET",
            Self::Ring3 => "SYSCALL from ring 3",
            Self::Syscall => "returning to ring 3 by SYSRET",
            Self::Ring3Again => "the second SYSCALL from ring 3",
            Self::SyscallAgain => "the port write at ring 0 after SYSCALL",
        })
    }
}

/// Whether `data`, written to [`PORT`], is the guest's success at privilege level 0.
pub(super) fn is_success(data: &[u8]) -> bool {
    data == (MAGIC | u32::from(KERNEL_CODE)).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{HugePages, create};

    #[test]
    fn the_code_fits_below_the_stage_byte_and_begins_and_ends_as_written() {
        let code = code();
        assert!(code.len() as u64 <= STAGE - CODE, "{} bytes", code.len());
        // mov rsp, imm32; and the GDT's address at the end.
        assert_eq!(code[..3], [0x48, 0xc7, 0xc4]);
        let gdt = u64::from_le_bytes(code[code.len() - 8..].try_into().unwrap());
        assert!((CODE..CODE + code.len() as u64).contains(&gdt) && gdt.is_multiple_of(8));
    }

    #[test]
    fn the_stage_is_read_from_memory_and_odd_values_count_as_nothing() {
        let memory = create(MEMORY_SIZE, HugePages::Never).unwrap();
        load(&memory).unwrap();
        assert_eq!(Stage::read(&memory), Stage::Nothing);
        for (byte, stage) in [(2_u8, Stage::Ring3), (5, Stage::SyscallAgain), (200, Stage::Nothing)] {
            memory.write_obj(byte, GuestAddress(STAGE)).unwrap();
            assert_eq!(Stage::read(&memory), stage);
        }
    }

    #[test]
    fn success_needs_the_magic_and_a_ring_0_code_segment() {
        assert!(is_success(&0x41b2_0008_u32.to_le_bytes()));
        assert!(!is_success(&0x41b2_002b_u32.to_le_bytes()));
        assert!(!is_success(&[8]));
    }
}

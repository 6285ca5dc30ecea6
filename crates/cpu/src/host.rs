//! Touching host memory that may vanish.
//!
//! Guest memory belongs to the program that made the virtual machine; it may unmap it, or
//! truncate the file behind it, while a processor runs. Every access to it is one instruction
//! whose address and resume point stand in the section `eptide_fixup`. The handler for SIGSEGV
//! and SIGBUS ([`crate::faults`]) looks the faulting instruction up there, sets RCX to 1 and resumes
//! behind it; any other fault is the program's.
//!
//! Aligned accesses of up to 8 bytes are single host instructions, so guests get the host's
//! atomicity and memory ordering, which are the guest's own.

pub(crate) mod code_memory;

use std::arch::asm;

/// The memory at the address cannot be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostFault;

/// An integer that a guest access moves: `u8`, `u16`, `u32` or `u64`.
pub(crate) trait HostInt: Copy + Sized {
    /// Bytes.
    const SIZE: usize;
    /// Loads from `hva`.
    ///
    /// # Safety
    /// `hva` lies in memory that this process gave to the guest, or is not mapped at all.
    unsafe fn load(hva: u64) -> Result<Self, HostFault>;
    /// Stores to `hva`.
    ///
    /// # Safety
    /// As for `load`; and no Rust object lives there.
    unsafe fn store(hva: u64, value: Self) -> Result<(), HostFault>;
    /// Atomically replaces `old` by `new` at `hva`; returns the value found.
    ///
    /// # Safety
    /// As for `store`.
    unsafe fn compare_exchange(hva: u64, old: Self, new: Self) -> Result<Self, HostFault>;
}

macro_rules! host_int {
    ($ty:ident, $class:ident, $load:literal, $store:literal, $cmpxchg:literal, $a:tt, $wide:ty) => {
        impl HostInt for $ty {
            const SIZE: usize = size_of::<$ty>();

            #[inline(always)]
            unsafe fn load(hva: u64) -> Result<Self, HostFault> {
                let (value, fault): ($wide, u64);
                // SAFETY: a plain load cannot be used because it may fault; the caller vouches
                // that no Rust object is read, and the fixup entry turns a fault into `fault`.
                unsafe {
                    asm!(
                        "xor ecx, ecx",
                        concat!("2: ", $load),
                        "3:",
                        ".pushsection eptide_fixup, \"aR\", @progbits",
                        ".long 2b - .",
                        ".long 3b - .",
                        ".popsection",
                        p = in(reg) hva,
                        v = lateout(reg) value,
                        out("rcx") fault,
                        options(nostack, readonly)
                    );
                }
                if fault == 0 { Ok(value as $ty) } else { Err(HostFault) }
            }

            #[inline(always)]
            unsafe fn store(hva: u64, value: Self) -> Result<(), HostFault> {
                let fault: u64;
                // SAFETY: as in `load`; the caller vouches that no Rust object is written.
                unsafe {
                    asm!(
                        "xor ecx, ecx",
                        concat!("2: ", $store),
                        "3:",
                        ".pushsection eptide_fixup, \"aR\", @progbits",
                        ".long 2b - .",
                        ".long 3b - .",
                        ".popsection",
                        p = in(reg) hva,
                        v = in($class) value,
                        out("rcx") fault,
                        options(nostack)
                    );
                }
                if fault == 0 { Ok(()) } else { Err(HostFault) }
            }

            #[inline(always)]
            unsafe fn compare_exchange(hva: u64, old: Self, new: Self) -> Result<Self, HostFault> {
                let fault: u64;
                let found: $ty;
                // SAFETY: as in `store`.
                unsafe {
                    asm!(
                        "xor ecx, ecx",
                        concat!("2: lock ", $cmpxchg),
                        "3:",
                        ".pushsection eptide_fixup, \"aR\", @progbits",
                        ".long 2b - .",
                        ".long 3b - .",
                        ".popsection",
                        p = in(reg) hva,
                        v = in($class) new,
                        inout($a) old => found,
                        out("rcx") fault,
                        options(nostack)
                    );
                }
                if fault == 0 { Ok(found) } else { Err(HostFault) }
            }
        }
    };
}

host_int!(
    u8,
    reg_byte,
    "movzx {v:e}, byte ptr [{p}]",
    "mov byte ptr [{p}], {v}",
    "cmpxchg byte ptr [{p}], {v}",
    "al",
    u32
);
host_int!(
    u16,
    reg,
    "movzx {v:e}, word ptr [{p}]",
    "mov word ptr [{p}], {v:x}",
    "cmpxchg word ptr [{p}], {v:x}",
    "ax",
    u32
);
host_int!(
    u32,
    reg,
    "mov {v:e}, dword ptr [{p}]",
    "mov dword ptr [{p}], {v:e}",
    "cmpxchg dword ptr [{p}], {v:e}",
    "eax",
    u32
);
host_int!(
    u64,
    reg,
    "mov {v}, qword ptr [{p}]",
    "mov qword ptr [{p}], {v}",
    "cmpxchg qword ptr [{p}], {v}",
    "rax",
    u64
);

/// CMPXCHG16B at `hva`, which is 16-byte aligned. Returns the value found.
///
/// # Safety
/// As for [`HostInt::store`].
pub(crate) unsafe fn compare_exchange_16(
    hva: u64,
    old: u128,
    new: u128,
) -> Result<u128, HostFault> {
    let fault: u64;
    let (low, high): (u64, u64);
    // SAFETY: as in `store`. RBX is reserved by the compiler, so it is swapped in and out; the
    // address register is pinned so that it cannot be RBX.
    unsafe {
        asm!(
            "xchg rsi, rbx",
            "2: lock cmpxchg16b xmmword ptr [rdi]",
            "mov r8d, 0",
            "jmp 4f",
            "3: mov r8d, 1",
            "4: mov rbx, rsi",
            ".pushsection eptide_fixup, \"aR\", @progbits",
            ".long 2b - .",
            ".long 3b - .",
            ".popsection",
            in("rdi") hva,
            inout("rsi") new as u64 => _,
            in("rcx") (new >> 64) as u64,
            inout("rax") old as u64 => low,
            inout("rdx") (old >> 64) as u64 => high,
            out("r8") fault,
            lateout("rcx") _,
            options(nostack)
        );
    }
    if fault == 0 {
        Ok(low as u128 | (high as u128) << 64)
    } else {
        Err(HostFault)
    }
}

/// Copies `to.len()` bytes from `hva`, in one string instruction.
///
/// # Safety
/// As for [`HostInt::load`], for the whole range.
pub(crate) unsafe fn copy_from(hva: u64, to: &mut [u8]) -> Result<(), HostFault> {
    // SAFETY: the destination is a live exclusive slice; the source is the caller's promise.
    unsafe { copy(to.as_mut_ptr() as u64, hva, to.len()) }
}

/// Copies 64 bytes from `hva`, eight at a time.
///
/// # Safety
/// As for [`HostInt::load`], for the whole range.
#[inline]
pub(crate) unsafe fn copy_64(hva: u64, to: &mut [u8; 64]) -> Result<(), HostFault> {
    for (chunk, at) in to.chunks_exact_mut(8).zip((hva..).step_by(8)) {
        // SAFETY: as promised by the caller.
        chunk.copy_from_slice(&unsafe { u64::load(at) }?.to_le_bytes());
    }
    Ok(())
}

/// Copies `from` to `hva`.
///
/// # Safety
/// As for [`HostInt::store`], for the whole range.
pub(crate) unsafe fn copy_to(hva: u64, from: &[u8]) -> Result<(), HostFault> {
    // SAFETY: the source is a live slice; the destination is the caller's promise.
    unsafe { copy(hva, from.as_ptr() as u64, from.len()) }
}

/// Copies between two ranges of guest memory, upwards.
///
/// # Safety
/// As for [`HostInt::load`] and [`HostInt::store`].
pub(crate) unsafe fn copy_within_guest(to: u64, from: u64, len: usize) -> Result<(), HostFault> {
    // SAFETY: as promised by the caller.
    unsafe { copy(to, from, len) }
}

/// `rep movsb`; a fault leaves a part copied.
///
/// # Safety
/// Both ranges are memory that may be accessed so, or not mapped at all.
unsafe fn copy(to: u64, from: u64, len: usize) -> Result<(), HostFault> {
    let left: u64;
    let fault: u64;
    // SAFETY: as promised by the caller. On a fault the handler sets RCX to 1 and resumes at 3,
    // where R8 still is 1; a completed copy clears it.
    unsafe {
        asm!(
            "mov r8d, 1",
            "2: rep movsb",
            "xor r8d, r8d",
            "3:",
            ".pushsection eptide_fixup, \"aR\", @progbits",
            ".long 2b - .",
            ".long 3b - .",
            ".popsection",
            inout("rdi") to => _,
            inout("rsi") from => _,
            inout("rcx") len as u64 => left,
            out("r8") fault,
            options(nostack)
        );
    }
    let _ = left;
    if fault == 0 { Ok(()) } else { Err(HostFault) }
}

/// One row of `eptide_fixup`: distances from the fields themselves.
#[repr(C)]
struct Fixup {
    instruction: i32,
    resume: i32,
}

unsafe extern "C" {
    #[link_name = "__start_eptide_fixup"]
    static FIXUPS_START: Fixup;
    #[link_name = "__stop_eptide_fixup"]
    static FIXUPS_STOP: Fixup;
}

/// The resume address for a fault at `rip`, if an access of this module is there.
fn resume_point(rip: u64) -> Option<u64> {
    let mut row = &raw const FIXUPS_START;
    let end = &raw const FIXUPS_STOP;
    while row < end {
        // SAFETY: the linker made the section an array of `Fixup`, all of it initialised.
        let (instruction, resume) = unsafe { ((*row).instruction, (*row).resume) };
        let here = row as u64;
        if here.wrapping_add_signed(instruction.into()) == rip {
            return Some((here + 4).wrapping_add_signed(resume.into()));
        }
        row = row.wrapping_add(1);
    }
    None
}

/// Deals with a fault at `registers` if one of this crate's instructions raised it.
pub(crate) fn on_fault(registers: &mut [libc::greg_t]) -> bool {
    let rip = registers[libc::REG_RIP as usize] as u64;
    if let Some(resume) = resume_point(rip) {
        registers[libc::REG_RIP as usize] = resume as i64;
        registers[libc::REG_RCX as usize] = 1;
        return true;
    }
    code_memory::resume_at_fixup(registers)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Page(u64);

    impl Page {
        fn new(protection: i32) -> Page {
            // SAFETY: a fresh anonymous mapping.
            let address = unsafe {
                libc::mmap(
                    core::ptr::null_mut(),
                    4096,
                    protection,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                )
            };
            assert_ne!(address, libc::MAP_FAILED);
            Page(address as u64)
        }
    }

    impl Drop for Page {
        fn drop(&mut self) {
            // SAFETY: the mapping made in `new`.
            unsafe { libc::munmap(self.0 as *mut _, 4096) };
        }
    }

    #[test]
    fn accesses_to_mapped_memory_work() {
        crate::faults::install();
        let page = Page::new(libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: the page is this test's own.
        unsafe {
            u64::store(page.0, 0x1122_3344_5566_7788).unwrap();
            assert_eq!(u8::load(page.0), Ok(0x88));
            assert_eq!(u16::load(page.0 + 1), Ok(0x6677));
            assert_eq!(u32::compare_exchange(page.0, 0, 1), Ok(0x5566_7788));
            assert_eq!(
                u32::compare_exchange(page.0, 0x5566_7788, 9),
                Ok(0x5566_7788)
            );
            assert_eq!(u64::load(page.0), Ok(0x1122_3344_0000_0009));
            let found = compare_exchange_16(page.0, 0, 1).unwrap();
            assert_eq!(found, 0x1122_3344_0000_0009);
            assert_eq!(compare_exchange_16(page.0, found, 5 << 64 | 4), Ok(found));
            let mut bytes = [0; 16];
            copy_from(page.0, &mut bytes).unwrap();
            assert_eq!((bytes[0], bytes[8]), (4, 5));
        }
    }

    #[test]
    fn a_fault_is_an_error_and_not_a_death() {
        crate::faults::install();
        let page = Page::new(libc::PROT_NONE);
        // SAFETY: the page is inaccessible, which is what is tested.
        unsafe {
            assert_eq!(u8::load(page.0), Err(HostFault));
            assert_eq!(u16::store(page.0, 1), Err(HostFault));
            assert_eq!(u32::load(page.0), Err(HostFault));
            assert_eq!(u64::compare_exchange(page.0, 0, 1), Err(HostFault));
            assert_eq!(compare_exchange_16(page.0, 0, 1), Err(HostFault));
            assert_eq!(copy_from(page.0, &mut [0; 8]), Err(HostFault));
            assert_eq!(copy_to(page.0, &[0; 8]), Err(HostFault));
        }
    }
}

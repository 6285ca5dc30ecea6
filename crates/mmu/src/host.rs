//! Asking whether host memory is there, without dying if it is not.
//!
//! Guest memory is the VMM's: it may be unmapped, without access rights, or a file that has been
//! truncated. Touching it would kill the process, so the kernel is asked to touch it.

use arch::addr::{Hva, PAGE_SIZE};
use rustix::io::Errno;
use rustix::mm::{Advice, madvise};
use std::ffi::c_void;
use std::ops::Range;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

/// What is to be done to host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostAccess {
    /// Read it.
    Read,
    /// Write it.
    Write,
}

/// Host memory that was there is not any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

/// Host memory as the MMU needs to know it.
///
/// Accesses come after [`HostMemory::populate`] said yes to their page, and lie in one page. The VMM
/// may have taken the memory away since: that is for an implementation to find out. Those given here
/// do not, and are for memory that stays.
pub trait HostMemory: Send + Sync {
    /// Makes every page of the page-aligned range present for the access; false if any cannot be.
    fn populate(&self, range: Range<Hva>, access: HostAccess) -> bool;

    /// Reads bytes: 1, 2, 4 or 8 aligned ones at once.
    ///
    /// # Safety
    /// The range is guest memory, reached only through raw pointers.
    unsafe fn read(&self, from: Hva, into: &mut [u8]) -> Result<(), Gone> {
        // SAFETY: as promised by the caller.
        unsafe { load(from, into) };
        Ok(())
    }

    /// Writes bytes: 1, 2, 4 or 8 aligned ones at once, since a processor may be walking a table
    /// there.
    ///
    /// # Safety
    /// As for [`HostMemory::read`].
    unsafe fn write(&self, into: Hva, bytes: &[u8]) -> Result<(), Gone> {
        // SAFETY: as promised by the caller.
        unsafe { store(into, bytes) };
        Ok(())
    }

    /// Writes `new` if `old` is there, and makes `old` what is there; whether it was written.
    /// Atomic for 1, 2, 4, 8 and (where the processor can) 16 aligned bytes.
    ///
    /// # Safety
    /// As for [`HostMemory::read`].
    unsafe fn compare_exchange(&self, at: Hva, old: &mut [u8], new: &[u8]) -> Result<bool, Gone> {
        // SAFETY: as promised by the caller.
        Ok(unsafe { compare_exchange(at, old, new) })
    }
}

/// The memory of this process.
#[derive(Clone, Copy, Debug)]
pub struct ProcessMemory {
    has_populate: bool,
}

impl ProcessMemory {
    /// Finds out how the kernel can be asked: `MADV_POPULATE_*` since Linux 5.14, single probing
    /// system calls before.
    pub fn new() -> Self {
        let probe = Box::new(0_u8);
        let page = Hva::new(std::ptr::from_ref(&*probe) as u64).page_base();
        let has_populate = advise(page..page.wrapping_add(PAGE_SIZE), HostAccess::Read).is_ok();
        Self { has_populate }
    }
}

impl Default for ProcessMemory {
    fn default() -> Self {
        Self::new()
    }
}

impl HostMemory for ProcessMemory {
    fn populate(&self, range: Range<Hva>, access: HostAccess) -> bool {
        if self.has_populate {
            return loop {
                match advise(range.clone(), access) {
                    Ok(()) => break true,
                    // A signal or memory pressure interrupted it: what is done stays done.
                    Err(Errno::INTR | Errno::AGAIN) => {}
                    Err(_) => break false,
                }
            };
        }
        (range.start.get()..range.end.get())
            .step_by(PAGE_SIZE as usize)
            .all(|page| probe_page(page, access))
    }
}

fn advise(range: Range<Hva>, access: HostAccess) -> Result<(), Errno> {
    let advice = match access {
        HostAccess::Read => Advice::LinuxPopulateRead,
        HostAccess::Write => Advice::LinuxPopulateWrite,
    };
    let length = range.end.get().saturating_sub(range.start.get()) as usize;
    // SAFETY: these two kinds of advice fault pages in as an access would and change no content;
    // for addresses that are not mapped, the kernel answers with an error.
    unsafe { madvise(range.start.get() as *mut c_void, length, advice) }
}

/// Has the kernel access one word of a page in the least intrusive way there is: a futex operation
/// that wakes nobody and, for writing, an atomic OR of nothing.
fn probe_page(page: u64, access: HostAccess) -> bool {
    const FUTEX_WAKE_OP: i32 = 5;
    const OR_ZERO_COMPARE_EQUAL: u32 = 2 << 28;
    let own = 0_u32;
    match access {
        HostAccess::Read => {
            let mut byte = 0_u8;
            let local = libc::iovec {
                iov_base: (&raw mut byte).cast(),
                iov_len: 1,
            };
            let remote = libc::iovec {
                iov_base: page as *mut c_void,
                iov_len: 1,
            };
            // SAFETY: both vectors are valid for the call; the kernel checks the remote address.
            unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) == 1 }
        }
        HostAccess::Write => {
            // SAFETY: the first address is a local variable; the kernel checks the second, and
            // its atomic OR with zero leaves the word as it is.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    &raw const own,
                    FUTEX_WAKE_OP,
                    0,
                    0_usize,
                    page,
                    OR_ZERO_COMPARE_EQUAL,
                )
            };
            result >= 0
        }
    }
}

/// Calls a macro with the atomic type for each length, for what is aligned.
macro_rules! with_atomic {
    ($hva:expr, $length:expr, $do:ident, $otherwise:expr) => {
        match $length {
            length if $hva.get() & (length as u64).wrapping_sub(1) != 0 => $otherwise,
            1 => $do!(AtomicU8, u8),
            2 => $do!(AtomicU16, u16),
            4 => $do!(AtomicU32, u32),
            8 => $do!(AtomicU64, u64),
            _ => $otherwise,
        }
    };
}

/// Loads bytes: at once, if they are an aligned word.
///
/// # Safety
/// The bytes at `hva` are guest memory.
unsafe fn load(hva: Hva, into: &mut [u8]) {
    let from = std::ptr::with_exposed_provenance_mut::<u8>(hva.get() as usize);
    macro_rules! word {
        ($atomic:ident, $int:ident) => {{
            // SAFETY: as promised by the caller, and aligned.
            let value: $int = unsafe { $atomic::from_ptr(from.cast()) }.load(SeqCst);
            into.copy_from_slice(&value.to_le_bytes());
        }};
    }
    with_atomic!(hva, into.len(), word, {
        // SAFETY: as promised by the caller.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    });
}

/// Stores bytes: at once, if they are an aligned word.
///
/// # Safety
/// The bytes at `hva` are guest memory that takes writes.
unsafe fn store(hva: Hva, bytes: &[u8]) {
    let into = std::ptr::with_exposed_provenance_mut::<u8>(hva.get() as usize);
    macro_rules! word {
        ($atomic:ident, $int:ident) => {{
            let value = $int::from_le_bytes(bytes.try_into().expect("as long as the type"));
            // SAFETY: as promised by the caller, and aligned.
            unsafe { $atomic::from_ptr(into.cast()) }.store(value, SeqCst)
        }};
    }
    with_atomic!(hva, bytes.len(), word, {
        // SAFETY: as promised by the caller.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), into, bytes.len()) }
    });
}

/// Writes `new` if `old` is there, and makes `old` what is there; true if it was written.
///
/// # Safety
/// As for [`store`].
unsafe fn compare_exchange(hva: Hva, old: &mut [u8], new: &[u8]) -> bool {
    let at = std::ptr::with_exposed_provenance_mut::<u8>(hva.get() as usize);
    macro_rules! word {
        ($atomic:ident, $int:ident) => {{
            let word =
                |bytes: &[u8]| $int::from_le_bytes(bytes.try_into().expect("as long as the type"));
            // SAFETY: as promised by the caller, and aligned.
            let cell = unsafe { $atomic::from_ptr(at.cast()) };
            let result = cell.compare_exchange(word(old), word(new), SeqCst, SeqCst);
            let found = result.unwrap_or_else(|found| found);
            old.copy_from_slice(&found.to_le_bytes());
            result.is_ok()
        }};
    }
    with_atomic!(hva, new.len(), word, {
        if new.len() == 16 && hva.get() & 15 == 0 && is_x86_feature_detected!("cmpxchg16b") {
            let word =
                |bytes: &[u8]| u128::from_le_bytes(bytes.try_into().expect("as long as the type"));
            let (expected, new) = (word(old), word(new));
            // SAFETY: as promised by the caller, aligned, and the processor has the instruction.
            let found = unsafe { compare_exchange_16(at.cast(), expected, new) };
            old.copy_from_slice(&found.to_le_bytes());
            return found == expected;
        }
        let mut found = [0; 16];
        let found = &mut found[..new.len()];
        // SAFETY: as promised by the caller.
        unsafe { std::ptr::copy_nonoverlapping(at, found.as_mut_ptr(), new.len()) };
        let is_same = found == old;
        if is_same {
            // SAFETY: as promised by the caller.
            unsafe { std::ptr::copy_nonoverlapping(new.as_ptr(), at, new.len()) };
        }
        old.copy_from_slice(found);
        is_same
    })
}

/// CMPXCHG16B; what it found.
///
/// # Safety
/// As for [`store`]; the address is aligned, and the processor has the instruction.
unsafe fn compare_exchange_16(at: *mut u128, old: u128, new: u128) -> u128 {
    let (mut low, mut high) = (old as u64, (old >> 64) as u64);
    // SAFETY: as promised by the caller. RBX, which belongs to the compiler, is put back.
    unsafe {
        std::arch::asm!(
            "xchg rbx, rsi",
            "lock cmpxchg16b [rdi]",
            "mov rbx, rsi",
            in("rdi") at,
            inout("rsi") new as u64 => _,
            in("rcx") (new >> 64) as u64,
            inout("rax") low,
            inout("rdx") high,
            options(nostack),
        );
    }
    u128::from(high) << 64 | u128::from(low)
}

#[cfg(all(test, not(miri), not(feature = "model")))]
mod tests {
    use super::*;
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

    fn check(host: ProcessMemory) {
        let length = 4 * PAGE_SIZE as usize;
        let flags = MapFlags::PRIVATE;
        // SAFETY: a new mapping at an address the kernel chooses.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )
        }
        .unwrap();
        let page = |n: u64| {
            let start = Hva::new(base as u64 + n * PAGE_SIZE);
            start..start.wrapping_add(PAGE_SIZE)
        };
        assert!(host.populate(page(0).start..page(3).end, HostAccess::Write));
        let at = |n: u64| (base as u64 + n * PAGE_SIZE) as *mut c_void;
        // SAFETY: pages of the mapping above, which nothing else uses.
        unsafe {
            mprotect(at(1), 4096, rustix::mm::MprotectFlags::READ).unwrap();
            mprotect(at(2), 4096, rustix::mm::MprotectFlags::empty()).unwrap();
            munmap(at(3), 4096).unwrap();
        }
        let can = |n| {
            (
                host.populate(page(n), HostAccess::Read),
                host.populate(page(n), HostAccess::Write),
            )
        };
        assert_eq!(can(0), (true, true));
        assert_eq!(can(1), (true, false));
        assert_eq!(can(2), (false, false));
        assert_eq!(can(3), (false, false));
        // SAFETY: what is left of the mapping.
        unsafe { munmap(base, 3 * 4096) }.unwrap();
    }

    #[test]
    fn missing_host_memory_is_found_out_without_touching_it() {
        check(ProcessMemory::new());
        check(ProcessMemory {
            has_populate: false,
        });
    }
}

//! Asking whether host memory is there, without dying if it is not.
//!
//! Guest memory is the VMM's: it may be unmapped, without access rights, or a file that has been
//! truncated. Touching it would kill the process, so the kernel is asked to touch it.

use arch::addr::{Hva, PAGE_SIZE};
use rustix::io::Errno;
use rustix::mm::{Advice, madvise};
use std::ffi::c_void;
use std::ops::Range;

/// What is to be done to host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostAccess {
    /// Read it.
    Read,
    /// Write it.
    Write,
}

/// Host memory as the MMU needs to know it.
pub trait HostMemory: Send + Sync {
    /// Makes every page of the page-aligned range present for the access; false if any cannot be.
    fn populate(&self, range: Range<Hva>, access: HostAccess) -> bool;
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

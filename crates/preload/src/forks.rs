//! Whether this process is a child of the one that has the objects.
//!
//! A child of a fork inherits the locks as they are, held by threads that it does not have. So
//! whoever may be in a child looks here first, and takes no lock if it is one. The answer is a byte
//! that the kernel zeroes in each child that does not share its parent's memory, however it is made;
//! a child that does share it (vfork) is as good as the parent.

use std::io::Write;
use std::os::fd::RawFd;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU8, Ordering};

/// The byte: 1 in the process that has the objects. Null while there were none.
static MARK: AtomicPtr<AtomicU8> = AtomicPtr::new(null_mut());

/// Marks this process as the one that has the objects.
pub(crate) fn mark() {
    if !MARK.load(Ordering::Acquire).is_null() {
        return;
    }
    const PAGE: usize = 4096;
    // SAFETY: a new mapping, which stays; a kernel without the advice refuses it.
    let page = unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let page = libc::mmap(null_mut(), PAGE, protection, flags, -1, 0);
        if page == libc::MAP_FAILED || libc::madvise(page, PAGE, libc::MADV_WIPEONFORK) != 0 {
            return;
        }
        page.cast::<AtomicU8>()
    };
    // SAFETY: the page just mapped.
    unsafe { &*page }.store(1, Ordering::Relaxed);
    let first = MARK.compare_exchange(null_mut(), page, Ordering::AcqRel, Ordering::Relaxed);
    if first.is_err() {
        // SAFETY: the page mapped above, which nobody has seen.
        unsafe { libc::munmap(page.cast(), PAGE) };
    }
}

/// Whether this process is a child. Async-signal-safe.
#[inline]
pub(crate) fn is_child() -> bool {
    // SAFETY: a page that is never unmapped, or null.
    let mark = unsafe { MARK.load(Ordering::Acquire).as_ref() };
    mark.is_some_and(|mark| mark.load(Ordering::Relaxed) == 0)
}

/// Whether a descriptor is of an object's file, by the file's name: for a child, which cannot look
/// into its parent's tables. Async-signal-safe.
pub(crate) fn is_objects_file(fd: RawFd) -> bool {
    const NAMES: &[u8] = b"/memfd:kvm";
    let mut path = [0_u8; 40];
    if write!(&mut path[..39], "/proc/self/fd/{fd}").is_err() {
        return false;
    }
    let mut name = [0_u8; NAMES.len()];
    // SAFETY: the path ends in zero, and the name has the room that is said.
    let length = unsafe {
        let name = name.as_mut_ptr().cast();
        libc::readlink(path.as_ptr().cast(), name, NAMES.len())
    };
    length == NAMES.len() as isize && name == *NAMES
}

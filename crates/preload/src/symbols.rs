//! The C library's functions that programs reach `/dev/kvm` by.

use crate::next::next;
use crate::objects;
use libc::{c_char, c_int, c_long, c_uint, c_ulong, c_void, mode_t, off_t, size_t};
use rustix::mm::{MapFlags, ProtFlags};
use std::ffi::CStr;

/// Sets errno and gives -1.
pub(crate) fn fail<T: Failure>(errno: c_int) -> T {
    // SAFETY: the calling thread's errno.
    unsafe { *libc::__errno_location() = errno };
    T::FAILURE
}

/// What functions of a type return when they fail.
pub(crate) trait Failure {
    /// It.
    const FAILURE: Self;
}

impl Failure for c_int {
    const FAILURE: c_int = -1;
}

/// The functions that return a signal's handler.
impl Failure for usize {
    const FAILURE: usize = libc::SIG_ERR;
}

/// A function's result or, with errno set, -1.
fn answer(result: Result<c_int, i32>) -> c_int {
    result.unwrap_or_else(fail)
}

/// Whether a path is that of KVM's device.
///
/// # Safety
///
/// The path is null or a C string.
unsafe fn is_device(path: *const c_char) -> bool {
    // SAFETY: the caller's promise.
    !path.is_null() && unsafe { CStr::from_ptr(path) } == c"/dev/kvm"
}

/// Functions with a path among their arguments: their names, the arguments before and after the
/// path, and what they answer for KVM's device.
macro_rules! with_path {
    ($($name:ident [$($before:ident: $before_type:ty)?] [$($after:ident: $after_type:ty),*] => $answer:expr;)*) => {
        $(
            #[doc = concat!("`", stringify!($name), "`.\n\n# Safety\n\nAs of the C library's.")]
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C" fn $name(
                $($before: $before_type,)? path: *const c_char $(, $after: $after_type)*
            ) -> c_int {
                // SAFETY: the program passes a C string.
                if unsafe { is_device(path) } {
                    return answer($answer);
                }
                next!($name(
                    $($before: $before_type,)? path: *const c_char $(, $after: $after_type)*
                ) -> c_int)
            }
        )*
    };
}

// The mode is passed on whether or not the program gave one; without O_CREAT nobody looks at it.
with_path! {
    open [] [flags: c_int, mode: mode_t] => objects::open(flags);
    open64 [] [flags: c_int, mode: mode_t] => objects::open(flags);
    __open_2 [] [flags: c_int] => objects::open(flags);
    __open64_2 [] [flags: c_int] => objects::open(flags);
    openat [directory: c_int] [flags: c_int, mode: mode_t] => objects::open(flags);
    openat64 [directory: c_int] [flags: c_int, mode: mode_t] => objects::open(flags);
    __openat_2 [directory: c_int] [flags: c_int] => objects::open(flags);
    __openat64_2 [directory: c_int] [flags: c_int] => objects::open(flags);
}

with_path! {
    access [] [mode: c_int] => may(mode);
    eaccess [] [mode: c_int] => may(mode);
    euidaccess [] [mode: c_int] => may(mode);
    faccessat [directory: c_int] [mode: c_int, flags: c_int] => may(mode);
}

with_path! {
    stat [] [buffer: *mut libc::stat64] => describe(buffer);
    stat64 [] [buffer: *mut libc::stat64] => describe(buffer);
    lstat [] [buffer: *mut libc::stat64] => describe(buffer);
    lstat64 [] [buffer: *mut libc::stat64] => describe(buffer);
    __xstat [version: c_int] [buffer: *mut libc::stat64] => describe(buffer);
    __xstat64 [version: c_int] [buffer: *mut libc::stat64] => describe(buffer);
    __lxstat [version: c_int] [buffer: *mut libc::stat64] => describe(buffer);
    __lxstat64 [version: c_int] [buffer: *mut libc::stat64] => describe(buffer);
    fstatat [directory: c_int] [buffer: *mut libc::stat64, flags: c_int] => describe(buffer);
    fstatat64 [directory: c_int] [buffer: *mut libc::stat64, flags: c_int] => describe(buffer);
    statx [directory: c_int] [flags: c_int, mask: c_uint, buffer: *mut libc::statx] => describe_extended(buffer);
}

/// Whether the device may be used in a way: everybody may read and write it.
fn may(mode: c_int) -> Result<c_int, i32> {
    if mode & libc::X_OK != 0 {
        return Err(libc::EACCES);
    }
    Ok(0)
}

const DEVICE_MODE: u32 = libc::S_IFCHR | 0o666;
const MAJOR: c_uint = 10;
const MINOR: c_uint = 232;

/// Describes the device to `stat`.
fn describe(buffer: *mut libc::stat64) -> Result<c_int, i32> {
    // SAFETY: the structure is integers.
    let mut stat: libc::stat64 = unsafe { std::mem::zeroed() };
    stat.st_mode = DEVICE_MODE;
    stat.st_nlink = 1;
    stat.st_rdev = libc::makedev(MAJOR, MINOR);
    stat.st_blksize = 4096;
    store(buffer, stat)
}

/// Describes the device to `statx`.
fn describe_extended(buffer: *mut libc::statx) -> Result<c_int, i32> {
    // SAFETY: the structure is integers.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    stat.stx_mask = libc::STATX_TYPE | libc::STATX_MODE | libc::STATX_NLINK;
    stat.stx_mode = DEVICE_MODE as u16;
    stat.stx_nlink = 1;
    (stat.stx_rdev_major, stat.stx_rdev_minor) = (MAJOR, MINOR);
    stat.stx_blksize = 4096;
    store(buffer, stat)
}

fn store<T>(buffer: *mut T, value: T) -> Result<c_int, i32> {
    if buffer.is_null() {
        return Err(libc::EFAULT);
    }
    // SAFETY: the program's buffer has room for it.
    unsafe { buffer.write(value) };
    Ok(0)
}

/// `ioctl`.
///
/// # Safety
///
/// As of the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn ioctl(
    fd: c_int,
    request: c_ulong,
    argument: *mut c_void,
) -> c_int {
    /// The type of KVM's requests.
    const KVMIO: u32 = 0xae;
    // Musl passes an int, which may be sign-extended; the kernel looks at 32 bits.
    let number = request as u32;
    if number >> 8 & 0xff == KVMIO
        && let Some(result) = without_cancellation(|| objects::ioctl(fd, number, argument as u64))
    {
        return answer(result);
    }
    next!(ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int)
}

unsafe extern "C-unwind" {
    fn pthread_setcanceltype(kind: c_int, old: *mut c_int) -> c_int;
}

/// Calls a function in whose middle the thread cannot be cancelled, even if the program says that
/// it may be at any moment. It is afterwards: this may not return then.
fn without_cancellation<R: Copy>(function: impl FnOnce() -> R) -> R {
    const DEFERRED: c_int = 0;
    let mut kind = DEFERRED;
    // SAFETY: `kind` is the caller's own.
    unsafe { pthread_setcanceltype(DEFERRED, &mut kind) };
    let result = function();
    if kind != DEFERRED {
        // SAFETY: as above. If this unwinds there is nothing to be dropped.
        unsafe { pthread_setcanceltype(kind, &mut kind) };
    }
    result
}

/// `pthread_cancel`.
///
/// # Safety
///
/// As of the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pthread_cancel(thread: libc::pthread_t) -> c_int {
    let result = next!(pthread_cancel(thread: libc::pthread_t) -> c_int);
    // The thread may be in a KVM_RUN, and is cancelled when that has ended.
    objects::interrupt_vcpus();
    result
}

/// System calls after which a descriptor's number may mean something else. Not the C library's
/// functions: a child looks for none of them after a fork.
macro_rules! renumber {
    ($($name:ident = $call:ident($($argument:ident: $type:ty),*);)*) => {
        $(
            #[doc = concat!("`", stringify!($name), "`.\n\n# Safety\n\nAs of the C library's.")]
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C" fn $name($($argument: $type),*) -> c_int {
                objects::renumbered();
                // SAFETY: the arguments are the program's own.
                let result = unsafe { libc::syscall(libc::$call, $($argument as c_long),*) };
                objects::renumbered();
                result as c_int
            }
        )*
    };
}

renumber! {
    close_range = SYS_close_range(first: c_uint, last: c_uint, flags: c_int);
    dup2 = SYS_dup2(from: c_int, to: c_int);
    dup3 = SYS_dup3(from: c_int, to: c_int, flags: c_int);
}

/// `close`.
///
/// # Safety
///
/// As of the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn close(fd: c_int) -> c_int {
    // SAFETY: the argument is the program's own.
    objects::close(fd, || unsafe {
        libc::syscall(libc::SYS_close, fd as c_long) as c_int
    })
}

/// `munmap`.
///
/// # Safety
///
/// As of the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn munmap(address: *mut c_void, length: size_t) -> c_int {
    // SAFETY: the arguments are the program's own.
    objects::unmap(address as usize, length, || unsafe {
        libc::syscall(libc::SYS_munmap, address, length) as c_int
    })
}

/// `mmap`: into a vCPU's mapping goes the page that all vCPUs of a VM share.
///
/// # Safety
///
/// As of the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mmap(
    address: *mut c_void,
    length: size_t,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    let is_file = fd >= 0 && flags & libc::MAP_ANONYMOUS == 0;
    let is_private = flags & libc::MAP_TYPE == libc::MAP_PRIVATE;
    let is_plain = !is_private && protection & libc::PROT_EXEC == 0;
    if is_file && !objects::may_map(fd, length, offset, is_plain) {
        fail::<c_int>(libc::EINVAL);
        return libc::MAP_FAILED;
    }
    // Not the C library's: it may be called before and by whatever finds that.
    // SAFETY: the arguments are the program's own.
    let mapped = unsafe {
        libc::syscall(
            libc::SYS_mmap,
            address,
            length,
            protection as c_long,
            flags as c_long,
            fd as c_long,
            offset,
        )
    };
    if mapped == -1 || !is_file {
        return mapped as *mut c_void;
    }
    let protection = ProtFlags::from_bits_retain(protection as u32);
    if let Err(errno) = objects::map_shared_page(fd, mapped as usize, length, offset, protection) {
        // SAFETY: the mapping just made.
        unsafe { libc::syscall(libc::SYS_munmap, mapped, length) };
        fail::<c_int>(errno);
        return libc::MAP_FAILED;
    }
    mapped as *mut c_void
}

/// `mmap64`, which is the same.
///
/// # Safety
///
/// As of the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mmap64(
    address: *mut c_void,
    length: size_t,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    // SAFETY: the arguments are the program's own.
    unsafe { mmap(address, length, protection, flags, fd, offset) }
}

/// Maps a page of `file` over the one at `address`.
///
/// # Safety
///
/// The page is one that the program has just mapped and not yet looked into.
pub(crate) unsafe fn overlay(
    address: usize,
    protection: ProtFlags,
    file: rustix::fd::BorrowedFd<'_>,
) -> Result<(), i32> {
    let flags = MapFlags::SHARED | MapFlags::FIXED;
    // SAFETY: the caller's promise.
    let mapped =
        unsafe { rustix::mm::mmap(address as *mut c_void, 4096, protection, flags, file, 0) };
    mapped.map(|_| ()).map_err(|errno| errno.raw_os_error())
}

//! Programs that this one starts and that the library would not be loaded into.
//!
//! A statically linked program, or one for another architecture, has no dynamic loader that would
//! look at `LD_PRELOAD`; in a new environment (`env -i`) there is none. Such a program would get the
//! machine's own `/dev/kvm`, if there is one, and nobody would know. It is not started if it seems
//! to want the device: its file or one of its arguments holds the device's name. Others (a static
//! shell, a compiler) are left alone.
//!
//! All of this may run in the child of a fork or vfork, where other threads' locks are held for
//! ever: it allocates nothing and makes system calls only. What it calls in the C library is looked
//! up when the library is loaded.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicPtr, Ordering};

use crate::next::{Next, call_next};
use crate::symbols::fail;

/// The device's name, as a program's file holds it.
const DEVICE: &[u8] = b"/dev/kvm";
/// Set to `allow`, it lets every program start.
const VARIABLE: &CStr = c"EPTIDE_BYPASS";
/// Bytes of a file that are looked at together.
const CHUNK: usize = 16384;
/// Longest path, with the zero behind it.
const PATH_MAX: usize = 4096;

type Words = *const *const c_char;

/// What a program is started with: lists of C strings with a null pointer behind them.
#[derive(Clone, Copy)]
struct Given {
    arguments: Words,
    environment: Words,
}

unsafe extern "C" {
    /// This process's environment.
    static environ: Words;
}

/// The library's path as the dynamic loader was given it; null while that is not known.
static LIBRARY: AtomicPtr<c_char> = AtomicPtr::new(std::ptr::null_mut());

/// A file that is closed when it is out of use.
struct File(c_int);

impl File {
    /// Opens a program's file; `None` if it cannot be read.
    ///
    /// # Safety
    ///
    /// The path is a C string.
    unsafe fn open(directory: c_int, path: *const c_char) -> Option<Self> {
        let flags = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the caller's promise.
        let fd = unsafe { libc::syscall(libc::SYS_openat, directory, path, flags, 0) };
        (fd >= 0).then_some(Self(fd as c_int))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: the descriptor is this value's own.
        unsafe { libc::syscall(libc::SYS_close, self.0) };
    }
}

/// Reads from a place in a file; how many bytes were there.
fn read_at(fd: c_int, buffer: &mut [u8], at: u64) -> usize {
    let mut filled = 0;
    while filled < buffer.len() {
        let rest = &mut buffer[filled..];
        let offset = at + filled as u64;
        // SAFETY: the kernel writes into `rest`, as far as its length says.
        let count =
            unsafe { libc::syscall(libc::SYS_pread64, fd, rest.as_mut_ptr(), rest.len(), offset) };
        match count {
            1.. => filled += count as usize,
            _ => break,
        }
    }
    filled
}

/// Whether a file is a program without a dynamic loader that would load this library.
fn is_out_of_reach(fd: c_int) -> bool {
    const INTERP: u32 = 3;
    const ENTRY: usize = 56;
    let mut header = [0; 64];
    if read_at(fd, &mut header, 0) < 52 || !header.starts_with(b"\x7fELF") {
        return false;
    }
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    const ELF64: u8 = 2;
    const X86_64: u16 = 62;
    if header[4] != ELF64 || half(18) != X86_64 {
        return true;
    }
    let mut table = [0; 8];
    table.copy_from_slice(&header[32..40]);
    let (size, count) = (half(54), half(56));
    if usize::from(size) != ENTRY {
        return true;
    }
    !(0..u64::from(count)).any(|index| {
        let mut kind = [0; 4];
        let at = u64::from_le_bytes(table).wrapping_add(index * ENTRY as u64);
        read_at(fd, &mut kind, at) == kind.len() && u32::from_le_bytes(kind) == INTERP
    })
}

/// Whether a file holds the device's name.
fn names_the_device(fd: c_int) -> bool {
    let mut buffer = [0; CHUNK];
    let mut at = 0;
    loop {
        let count = read_at(fd, &mut buffer, at);
        if holds_the_name(&buffer[..count]) {
            return true;
        }
        if count < CHUNK {
            return false;
        }
        // The name may lie across two chunks.
        at += (CHUNK - DEVICE.len()) as u64;
    }
}

fn holds_the_name(bytes: &[u8]) -> bool {
    holds(bytes, DEVICE)
}

fn holds(bytes: &[u8], part: &[u8]) -> bool {
    // SAFETY: both are of the lengths given.
    let found = unsafe {
        let (bytes, length) = (bytes.as_ptr().cast::<c_void>(), bytes.len());
        libc::memmem(bytes, length, part.as_ptr().cast(), part.len())
    };
    !found.is_null()
}

/// Whether one of a list's words is as `is_it` says.
///
/// # Safety
///
/// The list is null, or C strings with a null pointer behind them.
unsafe fn has_word(list: Words, is_it: impl Fn(&[u8]) -> bool) -> bool {
    if list.is_null() {
        return false;
    }
    // SAFETY: the caller's promise.
    unsafe {
        (0..)
            .map(|index| *list.add(index))
            .take_while(|word| !word.is_null())
            .any(|word| is_it(CStr::from_ptr(word).to_bytes()))
    }
}

/// Whether an environment has the dynamic loader load this library. Where it is loaded for another
/// reason than the environment's, it is loaded into every program.
///
/// # Safety
///
/// As for [`has_word`].
unsafe fn carries_the_library(environment: Words) -> bool {
    let library = LIBRARY.load(Ordering::Relaxed);
    if library.is_null() {
        return true;
    }
    // SAFETY: the loader's string, which stays.
    let library = unsafe { CStr::from_ptr(library) }.to_bytes();
    // SAFETY: the caller's promise.
    unsafe { has_word(environment, |word| preloads(word, library)) }
}

/// Whether a word of an environment is a list of libraries that has this one.
fn preloads(word: &[u8], library: &[u8]) -> bool {
    let list = word.strip_prefix(b"LD_PRELOAD=");
    list.is_some_and(|list| holds(list, library))
}

fn is_allowed() -> bool {
    // SAFETY: a C string; nobody else changes the environment at this moment, as for any exec.
    let value = unsafe { libc::getenv(VARIABLE.as_ptr()) };
    // SAFETY: the environment holds C strings.
    !value.is_null() && unsafe { CStr::from_ptr(value) } == c"allow"
}

/// Whether the program in a file must not start; says so then.
///
/// # Safety
///
/// The lists are as for [`has_word`]; the name is a C string.
unsafe fn is_stopped(fd: c_int, name: *const c_char, given: Given) -> bool {
    // SAFETY: the caller's promise.
    let is_reached = unsafe { carries_the_library(given.environment) } && !is_out_of_reach(fd);
    if is_reached || is_allowed() {
        return false;
    }
    // SAFETY: the caller's promise.
    if !names_the_device(fd) && !unsafe { has_word(given.arguments, holds_the_name) } {
        return false;
    }
    // SAFETY: the caller's promise.
    let name = unsafe { CStr::from_ptr(name) }.to_bytes();
    for part in [
        &b"eptide: "[..],
        name,
        b": not started. Eptide would not be loaded into it (it is statically linked, for another \
          architecture, or without LD_PRELOAD in its environment), and it seems to want /dev/kvm, \
          which would be the machine's own (EPTIDE_BYPASS=allow lets it)\n",
    ] {
        // SAFETY: the bytes are there. Nobody is left to tell when it fails.
        unsafe { libc::syscall(libc::SYS_write, 2, part.as_ptr(), part.len()) };
    }
    true
}

/// Whether the program of a path must not start.
///
/// # Safety
///
/// As for [`is_stopped`].
unsafe fn is_stopped_at(directory: c_int, path: *const c_char, given: Given) -> bool {
    if path.is_null() {
        return false;
    }
    // SAFETY: the caller's promise. What cannot be read cannot be judged.
    unsafe {
        let file = File::open(directory, path);
        file.is_some_and(|file| is_stopped(file.0, path, given))
    }
}

/// Whether the program that a name stands for, by `PATH` if it has no slash, must not start.
///
/// # Safety
///
/// As for [`is_stopped`].
unsafe fn is_stopped_in_path(name: *const c_char, given: Given) -> bool {
    if name.is_null() {
        return false;
    }
    // SAFETY: the caller's promise.
    let bytes = unsafe { CStr::from_ptr(name) }.to_bytes();
    if bytes.contains(&b'/') {
        // SAFETY: the caller's promise.
        return unsafe { is_stopped_at(libc::AT_FDCWD, name, given) };
    }
    // SAFETY: a C string, as are the environment's values.
    let folders = unsafe {
        let value = libc::getenv(c"PATH".as_ptr());
        match value.is_null() {
            true => c"/bin:/usr/bin",
            false => CStr::from_ptr(value),
        }
    };
    for folder in folders.to_bytes().split(|byte| *byte == b':') {
        let mut path = [0_u8; PATH_MAX];
        let end = folder.len() + 1 + bytes.len();
        if end >= PATH_MAX {
            continue;
        }
        path[..folder.len()].copy_from_slice(folder);
        // An empty folder is the current one.
        path[folder.len()] = if folder.is_empty() { b'.' } else { b'/' };
        let start = if folder.is_empty() {
            2
        } else {
            folder.len() + 1
        };
        if folder.is_empty() {
            path[1] = b'/';
        }
        path[start..start + bytes.len()].copy_from_slice(bytes);
        let path = path.as_ptr().cast::<c_char>();
        // SAFETY: the path ends in zero.
        let may = unsafe { libc::syscall(libc::SYS_access, path, libc::X_OK) };
        if may == 0 {
            // SAFETY: the path ends in zero, and the caller's promise.
            return unsafe { is_stopped_at(libc::AT_FDCWD, path, given) };
        }
    }
    false
}

type Actions = *const libc::posix_spawn_file_actions_t;
type Attributes = *const libc::posix_spawnattr_t;

/// Functions that start a program: their arguments, when they must not, and what they answer then.
macro_rules! starts {
    ($($name:ident($($argument:ident: $type:ty),*) if $stopped:expr => $answer:expr;)*) => {
        $(
            mod $name {
                /// The function's name.
                pub(super) const NAME: &str = concat!(stringify!($name), "\0");
            }

            #[doc = concat!("`", stringify!($name), "`.\n\n# Safety\n\nAs of the C library's.")]
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C" fn $name($($argument: $type),*) -> c_int {
                // SAFETY: the arguments are the program's own.
                if unsafe { $stopped } {
                    return $answer;
                }
                call_next!(&NEXT[Start::$name as usize], ($($argument: $type),*) -> c_int)
            }
        )*

        /// The functions.
        #[allow(non_camel_case_types, reason = "named as in C")]
        enum Start { $($name),* }

        /// What stands behind each.
        static NEXT: [Next; FUNCTIONS] = [$(Next::new(c_name($name::NAME))),*];
        const FUNCTIONS: usize = [$($name::NAME),*].len();
    };
}

const fn c_name(name: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(name.as_bytes()) {
        Ok(name) => name,
        Err(_) => panic!("a name with one zero, at its end"),
    }
}

// The C library's other functions of this kind take a list of arguments of any length (execl); what
// they call is not looked at.
starts! {
    execve(path: *const c_char, arguments: Words, environment: Words)
        if is_stopped_at(libc::AT_FDCWD, path, Given { arguments, environment }) => fail(libc::EACCES);
    execv(path: *const c_char, arguments: Words)
        if is_stopped_at(libc::AT_FDCWD, path, Given { arguments, environment: environ }) => fail(libc::EACCES);
    execvp(name: *const c_char, arguments: Words)
        if is_stopped_in_path(name, Given { arguments, environment: environ }) => fail(libc::EACCES);
    execvpe(name: *const c_char, arguments: Words, environment: Words)
        if is_stopped_in_path(name, Given { arguments, environment }) => fail(libc::EACCES);
    execveat(directory: c_int, path: *const c_char, arguments: Words, environment: Words,
        flags: c_int)
        if is_stopped_from(directory, path, Given { arguments, environment }) => fail(libc::EACCES);
    fexecve(fd: c_int, arguments: Words, environment: Words)
        if is_stopped(fd, c"a program".as_ptr(), Given { arguments, environment }) => fail(libc::EACCES);
    posix_spawn(child: *mut libc::pid_t, path: *const c_char, actions: Actions,
        attributes: Attributes, arguments: Words, environment: Words)
        if is_stopped_at(libc::AT_FDCWD, path, Given { arguments, environment }) => libc::EACCES;
    posix_spawnp(child: *mut libc::pid_t, name: *const c_char, actions: Actions,
        attributes: Attributes, arguments: Words, environment: Words)
        if is_stopped_in_path(name, Given { arguments, environment }) => libc::EACCES;
}

/// Whether the program that `execveat` is given must not start.
///
/// # Safety
///
/// As for [`is_stopped`].
unsafe fn is_stopped_from(directory: c_int, path: *const c_char, given: Given) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        match !path.is_null() && *path == 0 {
            true => is_stopped(directory, c"a program".as_ptr(), given),
            false => is_stopped_at(directory, path, given),
        }
    }
}

/// Looks up what is called later, perhaps in a child where nothing can be looked up any more.
extern "C" fn look_up() {
    for next in &NEXT {
        next.address();
    }
    let mut found = MaybeUninit::<libc::Dl_info>::zeroed();
    let here = look_up as *const c_void;
    // SAFETY: a structure of pointers, which is zeroed or filled; the name is the loader's own.
    unsafe {
        libc::dladdr(here, found.as_mut_ptr());
        let name = found.assume_init().dli_fname;
        if !name.is_null() {
            let library = CStr::from_ptr(name).to_bytes();
            if has_word(environ, |word| preloads(word, library)) {
                LIBRARY.store(name.cast_mut(), Ordering::Relaxed);
            }
        }
    }
}

/// The dynamic loader calls it when it has loaded the library.
#[used]
#[unsafe(link_section = ".init_array")]
static WHEN_LOADED: extern "C" fn() = look_up;

//! Executable memory for stubs, and the faults that strike in them.
//!
//! The buffer is mapped twice, once writable and once executable, so that no page is both. It is
//! reserved whole when it is first needed and never moves; stubs are never freed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Bytes reserved for stubs.
const SIZE: usize = 64 << 20;

/// Where the executable mapping lies, for the signal handler. Zero while there is none.
static START: AtomicU64 = AtomicU64::new(0);

/// The two mappings of the buffer.
pub(crate) struct Buffer {
    writable: u64,
    executable: u64,
    used: Mutex<usize>,
}

/// What a stub works on besides processor state. `repr(C)`: stubs reach it by offset.
#[repr(C, align(64))]
pub(crate) struct Scratch {
    /// The memory operand, with room for any misalignment.
    pub memory: [u8; 512 + 64],
    /// The host's MXCSR while a stub runs with the guest's.
    pub host_mxcsr: u32,
    pub _pad: u32,
    /// RFLAGS in and out.
    pub flags: u64,
    /// Address of the memory operand, in `memory`.
    pub operand: u64,
    /// The vector of the exception that the instruction raised, set by the signal handler; 0 for
    /// none (no instruction run here divides integers).
    pub fault: u64,
    /// Where the stub goes on after such a fault.
    pub resume: u64,
}

impl Scratch {
    pub(crate) fn new() -> Scratch {
        Scratch {
            memory: [0; 512 + 64],
            operand: 0,
            host_mxcsr: 0,
            _pad: 0,
            flags: 0,
            fault: 0,
            resume: 0,
        }
    }
}

/// The buffer, if the host lets it be made.
pub(crate) fn buffer() -> Option<&'static Buffer> {
    static BUFFER: OnceLock<Option<Buffer>> = OnceLock::new();
    BUFFER.get_or_init(Buffer::new).as_ref()
}

impl Buffer {
    fn new() -> Option<Buffer> {
        // SAFETY: fresh mappings of a fresh memory file, checked before use; the file stays
        // alive through them.
        unsafe {
            let fd = libc::memfd_create(c"eptide-stubs".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return None;
            }
            let map = |protection| {
                libc::mmap(
                    std::ptr::null_mut(),
                    SIZE,
                    protection,
                    libc::MAP_SHARED,
                    fd,
                    0,
                )
            };
            let sized = libc::ftruncate(fd, SIZE as libc::off_t) == 0;
            let writable = map(libc::PROT_READ | libc::PROT_WRITE);
            let executable = map(libc::PROT_READ | libc::PROT_EXEC);
            libc::close(fd);
            if !sized || writable == libc::MAP_FAILED || executable == libc::MAP_FAILED {
                return None;
            }
            START.store(executable as u64, Ordering::SeqCst);
            Some(Buffer {
                writable: writable as u64,
                executable: executable as u64,
                used: Mutex::new(0),
            })
        }
    }

    /// Copies a stub's code in; its executable address, or `None` if the buffer is full.
    pub(crate) fn add(&self, code: &[u8]) -> Option<u64> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let at = *used;
        if at + code.len() > SIZE {
            return None;
        }
        // SAFETY: the range lies in the writable mapping and no one else has it.
        unsafe {
            let to = (self.writable + at as u64) as *mut u8;
            to.copy_from_nonoverlapping(code.as_ptr(), code.len());
        }
        *used = (at + code.len()).next_multiple_of(16);
        Some(self.executable + at as u64)
    }
}

/// Deals with a fault at `registers` if it struck in a stub: notes the vector in the scratch
/// area, which RSI points to in every stub, and resumes where the stub says.
pub(crate) fn on_stub_fault(registers: &mut [libc::greg_t]) -> bool {
    let start = START.load(Ordering::SeqCst);
    let rip = registers[libc::REG_RIP as usize] as u64;
    if start == 0 || rip.wrapping_sub(start) >= SIZE as u64 {
        return false;
    }
    let scratch = registers[libc::REG_RSI as usize] as *mut Scratch;
    // SAFETY: code in the buffer runs only as stubs, whose RSI is their scratch area.
    unsafe {
        (*scratch).fault = registers[libc::REG_TRAPNO as usize] as u64;
        registers[libc::REG_RIP as usize] = (*scratch).resume as libc::greg_t;
    }
    true
}

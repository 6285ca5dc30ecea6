//! Memory for generated code, and the faults that strike in it.
//!
//! Each piece of generated code lies in the [`CodeMemory`] of one processor, which is bounded,
//! filled from its start to its end, emptied as a whole, and freed with its owner:
//!
//! ```text
//!   one memory file       writable view ──── generators copy code in here
//!                  └──────executable view ── processors run it here
//! ```
//!
//! It is mapped twice, so that no page is writable and executable at once. Who generates code asks
//! [`CodeMemory::has_room`] where none of it is executing, between two blocks; without room, all
//! that points to the code is dropped (blocks, tables of stubs, chained jumps), then
//! [`CodeMemory::reset`] empties the memory.
//!
//! # Faults
//!
//! Generated code may fault: on guest memory that has gone, by an unmasked floating-point
//! exception. For each stretch of code that may, the generator supplies a [`Fixup`]: where to go on.
//! The process's handler of signals looks the faulting instruction up among all live memories, has
//! the memory's [`Report`] note the vector where the code will look for it, and resumes there.
//!
//! The look-up takes no lock and allocates nothing, since it is made by a signal handler. It may
//! look at a table of fixups because only the thread that executes a processor's code adds to that
//! processor's memory: while code executes there, its table does not change.
//!
//! The views lie among the addresses that are Eptide's own ([`reserved`]), so that no memslot names
//! them, with a page that cannot be accessed behind each.
//!
//! A memory is for one processor because emptying it is then a matter of that processor's own
//! thread. Nothing may run in it after the owner is gone.

use core::ops::Range;
use core::ptr::null_mut;
use reserved::Region;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};

/// Where a piece of code begins: no two share a line of 16 bytes.
const ALIGNMENT: usize = 16;

/// Bytes behind each view that cannot be accessed.
const GUARD: usize = 4096;

/// A stretch of a piece of code whose faults lead elsewhere, as offsets from the piece's start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fixup {
    /// The first bytes of the instructions that may fault lie in this range.
    pub instructions: Range<u32>,
    /// Where execution goes on.
    pub resume: u32,
}

/// What the signal handler does besides resuming at a fixup: notes the exception's vector for the
/// code that goes on there. Registers are those of the fault; changes to them take effect.
///
/// # Safety
/// The registers are those of code in the memory that this was given to, at an instruction for
/// which there is a fixup. Runs in a signal handler.
pub(crate) type Report = unsafe fn(&mut [libc::greg_t], u8);

/// What the signal handler looks at, at an address that does not change.
struct Table {
    report: Report,
    /// By address, none overlapping.
    fixups: Vec<Placed>,
}

/// A fixup, as offsets from the memory's start.
struct Placed {
    start: u32,
    end: u32,
    resume: u32,
}

/// An entry of the registry of live memories: never freed, but used again.
struct Entry {
    taken: AtomicBool,
    /// The executable view; zero while there is none.
    start: AtomicU64,
    size: AtomicU64,
    table: AtomicPtr<Table>,
    /// Fixed once the entry can be found.
    next: AtomicPtr<Entry>,
}

/// The first entry.
static ENTRIES: AtomicPtr<Entry> = AtomicPtr::new(null_mut());

fn entries() -> impl Iterator<Item = &'static Entry> {
    let mut next = &ENTRIES;
    core::iter::from_fn(move || {
        // SAFETY: entries are leaked, so what the list holds stays valid; null ends it.
        let entry: &'static Entry = unsafe { next.load(Ordering::Acquire).as_ref() }?;
        next = &entry.next;
        Some(entry)
    })
}

impl Entry {
    /// An entry that is now the caller's: one that was given back, or a new one.
    fn take() -> &'static Entry {
        let free = |entry: &&Entry| {
            entry
                .taken
                .compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        };
        if let Some(entry) = entries().find(free) {
            return entry;
        }
        let entry: &'static Entry = Box::leak(Box::new(Entry {
            taken: AtomicBool::new(true),
            start: AtomicU64::new(0),
            size: AtomicU64::new(0),
            table: AtomicPtr::new(null_mut()),
            next: AtomicPtr::new(null_mut()),
        }));
        let mut first = ENTRIES.load(Ordering::Acquire);
        loop {
            entry.next.store(first, Ordering::Relaxed);
            let new = core::ptr::from_ref(entry).cast_mut();
            match ENTRIES.compare_exchange(first, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return entry,
                Err(now) => first = now,
            }
        }
    }

    /// Where `address` lies in the executable view. Other entries may change meanwhile; the one in
    /// whose memory the calling thread executes does not.
    fn offset_of(&self, address: u64) -> Option<u64> {
        let start = self.start.load(Ordering::Acquire);
        let offset = address.wrapping_sub(start);
        let inside = start != 0 && offset < self.size.load(Ordering::Acquire);
        // Given back and taken anew in between: the size is not the one that belonged to it.
        (inside && self.start.load(Ordering::Acquire) == start).then_some(offset)
    }
}

/// Memory for the generated code of one processor.
pub(crate) struct CodeMemory {
    entry: &'static Entry,
    table: *mut Table,
    writable: *mut u8,
    executable: u64,
    size: usize,
    used: usize,
    /// Both views.
    _region: Region,
}

// SAFETY: the memory and the table are owned, and reached from elsewhere only by the handler of
// signals of the thread that executes the code.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    /// Memory for `size` bytes of code, a multiple of 4096 and below 4 GiB. The host's memory is
    /// used as code comes in.
    pub(crate) fn new(size: usize, report: Report) -> io::Result<CodeMemory> {
        assert!(size.is_multiple_of(4096) && u32::try_from(size).is_ok());
        // SAFETY: the name is a string that ends in zero.
        let file = unsafe {
            let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
            libc::memfd_create(c"eptide-code".as_ptr(), flags)
        };
        if file < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        let file = unsafe { OwnedFd::from_raw_fd(file) };
        // SAFETY: the descriptor is open.
        if unsafe { libc::ftruncate(file.as_raw_fd(), size as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let region = Region::new(2 * (size + GUARD), GUARD)?;
        let view = |offset, protection| {
            // SAFETY: nothing refers to a new region.
            unsafe { region.map_file(offset, size, file.as_fd(), 0, protection) }
        };
        let writable = view(0, libc::PROT_READ | libc::PROT_WRITE)?;
        let executable = view(size + GUARD, libc::PROT_READ | libc::PROT_EXEC)?;
        // Whoever finds the file among the process's mappings can neither change nor shorten it.
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: the descriptor is open. Kernels that do not know the seal on writing refuse.
        unsafe {
            libc::fcntl(
                file.as_raw_fd(),
                libc::F_ADD_SEALS,
                libc::F_SEAL_FUTURE_WRITE,
            );
            libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals);
        }
        let executable = executable.expose_provenance() as u64;
        let table = Box::into_raw(Box::new(Table {
            report,
            fixups: Vec::new(),
        }));
        let entry = Entry::take();
        entry.table.store(table, Ordering::Relaxed);
        entry.size.store(size as u64, Ordering::Release);
        entry.start.store(executable, Ordering::Release);
        Ok(CodeMemory {
            entry,
            table,
            writable,
            executable,
            size,
            used: 0,
            _region: region,
        })
    }

    /// Where the next piece of code will lie, if there is room for it.
    pub(crate) fn next_address(&self) -> u64 {
        self.executable + self.used as u64
    }

    /// Whether a piece of `len` bytes can be added.
    pub(crate) fn has_room(&self, len: usize) -> bool {
        len <= self.size - self.used
    }

    /// Adds a piece of code; its executable address, or `None` without room. Fixups are in the
    /// order of their instructions and do not overlap.
    pub(crate) fn add(&mut self, code: &[u8], fixups: &[Fixup]) -> Option<u64> {
        if !self.has_room(code.len()) {
            return None;
        }
        let at = self.used as u32;
        // SAFETY: no code of this memory executes while its owner is borrowed, so the handler does
        // not look at the table.
        let table = unsafe { &mut *self.table };
        table.fixups.extend(fixups.iter().map(|fixup| Placed {
            start: at + fixup.instructions.start,
            end: at + fixup.instructions.end,
            resume: at + fixup.resume,
        }));
        let address = self.executable + self.used as u64;
        self.writable_view(address, code.len())?
            .copy_from_slice(code);
        self.used = (self.used + code.len())
            .next_multiple_of(ALIGNMENT)
            .min(self.size);
        Some(address)
    }

    /// The writable view of code at an executable address, for changing it where it lies; `None` if
    /// it is not in this memory.
    pub(crate) fn writable_view(&mut self, address: u64, len: usize) -> Option<&mut [u8]> {
        let offset = usize::try_from(address.checked_sub(self.executable)?).ok()?;
        if offset.checked_add(len)? > self.size {
            return None;
        }
        // SAFETY: inside the mapping, which belongs to this memory alone; `self` is borrowed as
        // long as the slice lives. The executable view of it is never borrowed.
        Some(unsafe { core::slice::from_raw_parts_mut(self.writable.add(offset), len) })
    }

    /// Empties the memory. Nothing may point into it any more.
    pub(crate) fn reset(&mut self) {
        // SAFETY: as in `add`.
        unsafe { &mut *self.table }.fixups.clear();
        self.used = 0;
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // Before the addresses can belong to another.
        self.entry.start.store(0, Ordering::Release);
        // SAFETY: the box made in `new`; no thread executes code of this memory, so no handler
        // looks at it.
        drop(unsafe { Box::from_raw(self.table) });
        self.entry.taken.store(false, Ordering::Release);
    }
}

/// Whether an address lies in some live memory. Async-signal-safe.
#[cfg(test)]
fn is_generated(address: u64) -> bool {
    entries().any(|entry| entry.offset_of(address).is_some())
}

/// Deals with a fault at these registers, if it struck in generated code with a fixup: notes the
/// vector and resumes where the fixup says. Async-signal-safe; to be called by the handler of the
/// thread that faulted.
pub(crate) fn resume_at_fixup(registers: &mut [libc::greg_t]) -> bool {
    let rip = registers[libc::REG_RIP as usize] as u64;
    let Some((entry, offset)) = entries().find_map(|e| Some((e, e.offset_of(rip)?))) else {
        return false;
    };
    // SAFETY: this thread executes code in the memory, so its owner is alive and not borrowed.
    let table = unsafe { &*entry.table.load(Ordering::Acquire) };
    let offset = offset as u32;
    let behind = table.fixups.partition_point(|fixup| fixup.start <= offset);
    let Some(fixup) = behind.checked_sub(1).map(|at| &table.fixups[at]) else {
        return false;
    };
    if offset >= fixup.end {
        return false;
    }
    let vector = registers[libc::REG_TRAPNO as usize] as u8;
    // SAFETY: the registers are those of code in this memory, at an instruction with a fixup.
    unsafe { (table.report)(registers, vector) };
    registers[libc::REG_RIP as usize] =
        (rip - u64::from(offset) + u64::from(fixup.resume)) as libc::greg_t;
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::ptr::with_exposed_provenance_mut;

    /// Leaves the vector in RAX.
    unsafe fn in_rax(registers: &mut [libc::greg_t], vector: u8) {
        registers[libc::REG_RAX as usize] = vector.into();
    }

    fn call(address: u64) -> u64 {
        // SAFETY: the tests' code follows the C calling convention.
        let code: extern "C" fn() -> u64 =
            unsafe { core::mem::transmute(with_exposed_provenance_mut::<()>(address as usize)) };
        code()
    }

    /// XOR EAX, EAX; the instruction; RET; and the place to go on: RET.
    fn faulting(instruction: &[u8]) -> (Vec<u8>, Fixup) {
        let mut code = vec![0x31, 0xc0];
        let start = code.len() as u32;
        code.extend_from_slice(instruction);
        code.push(0xc3);
        let resume = code.len() as u32;
        code.push(0xc3);
        let instructions = start..start + 1;
        (
            code,
            Fixup {
                instructions,
                resume,
            },
        )
    }

    #[test]
    fn code_runs_and_its_faults_resume_at_fixups() {
        crate::faults::install();
        let mut memory = CodeMemory::new(4096, in_rax).unwrap();
        // MOV EAX, 5; RET
        let plain = memory.add(&[0xb8, 5, 0, 0, 0, 0xc3], &[]).unwrap();
        let pieces: Vec<_> = [
            (&[0x0f, 0x0b][..], 6),                // UD2
            (&[0x8a, 0x04, 0x25, 0, 0, 0, 0], 14), // MOV AL, [0]
            (&[0xf4], 13),                         // HLT
            (&[0xf7, 0xf0], 0),                    // DIV EAX, of EDX:EAX by zero
        ]
        .into_iter()
        .map(|(instruction, vector)| {
            let (code, fixup) = faulting(instruction);
            (memory.add(&code, &[fixup]).unwrap(), vector)
        })
        .collect();
        assert_eq!(call(plain), 5);
        for (address, vector) in pieces {
            assert_eq!(call(address), vector);
        }
    }

    #[test]
    fn memory_is_bounded_and_can_be_emptied() {
        let mut memory = CodeMemory::new(4096, in_rax).unwrap();
        let first = memory.add(&[0x90; 4000], &[]).unwrap();
        assert_eq!(memory.add(&[0x90; 200], &[]), None);
        assert!(memory.add(&[0x90; 96], &[]).is_some());
        assert!(memory.has_room(0) && !memory.has_room(1));
        memory.reset();
        assert_eq!(memory.add(&[0xc3; 200], &[]), Some(first));
        assert_eq!(memory.writable_view(first, 200).unwrap(), [0xc3; 200]);
        assert!(memory.writable_view(first + 4000, 97).is_none());
        assert!(memory.writable_view(first - 1, 1).is_none());
    }

    #[test]
    fn memory_is_registered_while_it_lives() {
        let mut memory = CodeMemory::new(4096, in_rax).unwrap();
        let address = memory.add(&[0xc3], &[]).unwrap();
        assert!(is_generated(address) && is_generated(address + 4095));
        assert!(!is_generated(address + 4096) || !is_generated(address - 1));
        let before = entries().count();
        drop(memory);
        for _ in 0..100 {
            drop(CodeMemory::new(4096, in_rax).unwrap());
        }
        // Entries are used again; other tests of the process may have made some.
        assert!(entries().count() < before + 50);
    }

    #[test]
    fn no_page_is_writable_and_executable() {
        let _memory = CodeMemory::new(1 << 16, in_rax).unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let views: Vec<_> = maps.lines().filter(|l| l.contains("eptide-code")).collect();
        assert!(views.len() >= 2);
        assert!(views.iter().all(|line| !line.contains("wx")));
    }
}

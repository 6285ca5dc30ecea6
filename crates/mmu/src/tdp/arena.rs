//! Memory for table pages: zeroed, aligned to its size, and no memslot's.
//!
//! A guest that could reach a page table could map all memory of the process, so tables lie among
//! the addresses that slots may not name ([`reserved`]). Miri, which knows no such mappings, gives
//! them the allocator's memory.

use super::table::ARENA_BYTES;
use std::ptr::NonNull;

/// [`ARENA_BYTES`] of memory.
#[derive(Debug)]
pub(super) struct Arena(Backing);

#[cfg(not(miri))]
type Backing = reserved::Region;
#[cfg(miri)]
type Backing = NonNull<u8>;

#[cfg(not(miri))]
impl Arena {
    /// `None` where the host has no memory.
    pub(super) fn new() -> Option<Arena> {
        let region = reserved::Region::new(ARENA_BYTES, ARENA_BYTES).ok()?;
        region.allocate(0, ARENA_BYTES).ok()?;
        Some(Arena(region))
    }

    pub(super) fn start(&self) -> NonNull<u8> {
        NonNull::new(self.0.start()).unwrap_or_else(|| unreachable!("no region is at address 0"))
    }
}

#[cfg(miri)]
impl Arena {
    pub(super) fn new() -> Option<Arena> {
        // SAFETY: the layout's size is not zero.
        NonNull::new(unsafe { std::alloc::alloc_zeroed(layout()) }).map(Arena)
    }

    pub(super) fn start(&self) -> NonNull<u8> {
        self.0
    }
}

#[cfg(miri)]
fn layout() -> std::alloc::Layout {
    std::alloc::Layout::from_size_align(ARENA_BYTES, ARENA_BYTES).unwrap()
}

#[cfg(miri)]
impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout; the pool's owner, the MMU, is gone, and with it every
        // processor that could walk its tables.
        unsafe { std::alloc::dealloc(self.0.as_ptr(), layout()) };
    }
}

#[cfg(miri)]
// SAFETY: the memory is owned, and reached only by the pool and the holders of its tables.
unsafe impl Send for Arena {}

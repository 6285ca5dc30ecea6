//! Table pages.

use super::arena::Arena;
use crate::spte::Spte;
use crate::sync::{self, Mutex, point};
use arch::addr::{Gfn, Hva, PAGE_SIZE};
use arch::paging::{Level, entry::ADDRESS};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};
use std::sync::atomic::{AtomicU64, AtomicUsize};

/// Entries in a table.
pub(crate) const ENTRIES: usize = 512;

/// What the entries of a freed table hold under the model checker: no walk may see it.
pub(crate) const POISON: Spte = Spte::from_raw(0x0dea_d000_dead_0000);

/// One entry of a table, shared with processors and other threads.
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct Cell(AtomicU64);

impl Cell {
    #[inline(always)]
    pub(crate) fn load(&self) -> Spte {
        point();
        let entry = Spte::from_raw(self.0.load(Acquire));
        if cfg!(feature = "model") {
            assert_ne!(entry, POISON, "a walk reached a freed table");
        }
        entry
    }

    /// Replaces `old` by `new`; on failure gives what stands there.
    #[inline(always)]
    pub(crate) fn exchange(&self, old: Spte, new: Spte) -> Result<(), Spte> {
        point();
        match self
            .0
            .compare_exchange(old.raw(), new.raw(), AcqRel, Acquire)
        {
            Ok(_) => Ok(()),
            Err(now) => Err(Spte::from_raw(now)),
        }
    }

    /// Puts `new` in, whatever stands there, and gives that.
    #[inline(always)]
    pub(crate) fn swap(&self, new: Spte) -> Spte {
        point();
        Spte::from_raw(self.0.swap(new.raw(), AcqRel))
    }

    /// Changes the entry by `change` until no processor interferes; gives the entry before, or
    /// `None` if `change` found nothing to do.
    pub(crate) fn update(&self, change: impl Fn(Spte) -> Option<Spte>) -> Option<Spte> {
        let mut old = self.load();
        loop {
            let new = change(old).filter(|&new| new != old)?;
            match self.exchange(old, new) {
                Ok(()) => return Some(old),
                Err(now) => old = now,
            }
        }
    }

    /// Empties the entry of a table that nobody else can see any more.
    pub(crate) fn take_private(&self) -> Spte {
        Spte::from_raw(self.0.swap(Spte::EMPTY.raw(), Relaxed))
    }

    /// Sets the entry of a table that nobody else can see yet.
    fn set_private(&self, new: Spte) {
        self.0.store(new.raw(), Relaxed);
    }
}

/// A table: one 4 KiB page.
#[derive(Debug)]
#[repr(C, align(4096))]
pub(crate) struct TablePage {
    cells: [Cell; ENTRIES],
}

const _: () = assert!(size_of::<TablePage>() as u64 == PAGE_SIZE);

impl TablePage {
    /// The entry that translates `gfn` in a table at `level`.
    #[inline(always)]
    pub(crate) fn cell(&self, gfn: Gfn, level: Level) -> &Cell {
        &self.cells[Self::index(gfn, level)]
    }

    #[inline(always)]
    pub(crate) fn index(gfn: Gfn, level: Level) -> usize {
        (gfn.get() >> (9 * (u32::from(level.number()) - 1))) as usize % ENTRIES
    }

    pub(crate) fn cells(&self) -> &[Cell; ENTRIES] {
        &self.cells
    }

    /// The table that one of this table's entries points to.
    ///
    /// # Safety
    ///
    /// `entry` was read from this table, as a table entry, while `self` was protected: under the
    /// MMU lock, or in a reading session of a gate. Both keep every table that was linked at that
    /// time allocated for as long as they last, which is at least the lifetime of `self`.
    #[inline(always)]
    pub(crate) unsafe fn child(&self, entry: Spte) -> &TablePage {
        let address = entry.table_address().get() as usize;
        // SAFETY: table entries hold the exposed address of a `TablePage` of the VM's pool, and the
        // caller vouches that it is not freed while `self` is borrowed.
        unsafe { &*std::ptr::with_exposed_provenance::<TablePage>(address) }
    }

    pub(crate) fn address(&self) -> Hva {
        Hva::new(std::ptr::from_ref(self).expose_provenance() as u64)
    }

    fn clear(&self) {
        for cell in &self.cells {
            cell.set_private(Spte::EMPTY);
        }
    }

    /// Fills a table that nobody else can see yet.
    pub(crate) fn fill(&self, entry: impl Fn(u64) -> Spte) {
        for (index, cell) in self.cells.iter().enumerate() {
            cell.set_private(entry(index as u64));
        }
    }
}

/// Pages in one allocation; its first page is the header.
const ARENA_PAGES: usize = 512;
pub(super) const ARENA_BYTES: usize = ARENA_PAGES * PAGE_SIZE as usize;

/// The first page of an arena: a word of marks for each page.
#[repr(C, align(4096))]
struct ArenaHeader {
    marks: [AtomicU64; ARENA_PAGES],
}

/// The table stands where a huge page would, because of an instruction fetch.
pub(crate) const NX_SPLIT: u64 = 1 << 0;

const _: () = assert!(size_of::<ArenaHeader>() as u64 == PAGE_SIZE);

/// Where table pages come from and go back to.
#[derive(Debug)]
pub(crate) struct TablePool {
    inner: Mutex<Inner>,
    used: AtomicUsize,
    limit: AtomicUsize,
}

#[derive(Debug, Default)]
struct Inner {
    arenas: Vec<Arena>,
    free: Vec<NonNull<TablePage>>,
}

// SAFETY: the pointers own memory that only the pool and the holders of `OwnedTable` reach.
unsafe impl Send for Inner {}

/// A table page that is linked nowhere.
#[derive(Debug)]
pub(crate) struct OwnedTable(NonNull<TablePage>);

// SAFETY: the page is atomics only, and owned.
unsafe impl Send for OwnedTable {}
// SAFETY: as above; shared access is through atomics.
unsafe impl Sync for OwnedTable {}

impl OwnedTable {
    pub(crate) fn page(&self) -> &TablePage {
        // SAFETY: the page is allocated as long as its owner has not given it back.
        unsafe { self.0.as_ref() }
    }

    /// The page a table entry pointed to, now that it has been unlinked and everybody has let go.
    ///
    /// # Safety
    ///
    /// `address` is a page of the VM's pool, nothing points to it and nobody looks at it.
    pub(crate) unsafe fn from_address(address: Hva) -> Self {
        let page = std::ptr::with_exposed_provenance_mut(address.get() as usize);
        // SAFETY: pool pages are not at address zero.
        Self(unsafe { NonNull::new_unchecked(page) })
    }
}

impl TablePool {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            inner: Mutex::new(Inner::default()),
            used: AtomicUsize::new(0),
            limit: AtomicUsize::new(limit),
        }
    }

    /// Table pages in use, caches included.
    pub(crate) fn used(&self) -> usize {
        self.used.load(Relaxed)
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit.load(Relaxed)
    }

    pub(crate) fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Relaxed);
    }

    /// An empty table, or `None` at the limit, and where the host has no memory.
    pub(crate) fn allocate(&self) -> Option<OwnedTable> {
        if self.used.fetch_add(1, Relaxed) >= self.limit() {
            self.used.fetch_sub(1, Relaxed);
            return None;
        }
        let page = {
            let mut inner = sync::lock(&self.inner);
            match inner.free.pop() {
                Some(page) => Some(page),
                None => inner.grow(),
            }
        };
        let Some(page) = page else {
            self.used.fetch_sub(1, Relaxed);
            return None;
        };
        let table = OwnedTable(page);
        mark_word(table.page().address()).store(0, Relaxed);
        table.page().clear();
        Some(table)
    }

    pub(crate) fn free(&self, table: OwnedTable) {
        // The models look for walks that end up here.
        if cfg!(feature = "model") {
            table.page().fill(|_| POISON);
        }
        sync::lock(&self.inner).free.push(table.0);
        self.used.fetch_sub(1, Relaxed);
    }
}

impl Inner {
    fn grow(&mut self) -> Option<NonNull<TablePage>> {
        let arena = Arena::new()?;
        let start = arena.start();
        start.as_ptr().expose_provenance();
        self.arenas.push(arena);
        let pages = (1..ARENA_PAGES).rev().map(|n| {
            // SAFETY: within the allocation.
            unsafe { start.add(n * PAGE_SIZE as usize) }.cast::<TablePage>()
        });
        self.free.extend(pages);
        self.free.pop()
    }
}

/// The word of marks of the table page at `address`.
pub(crate) fn mark_word(address: Hva) -> &'static AtomicU64 {
    let arena = address.align_down(ARENA_BYTES as u64).get();
    let index = (address.get() - arena) / PAGE_SIZE;
    let header = std::ptr::with_exposed_provenance::<ArenaHeader>(arena as usize);
    // SAFETY: table pages lie in arenas, which are aligned to their size and begin with a header,
    // and live as long as the VM's MMU, in whose methods alone the reference is used.
    unsafe { &(*header).marks[index as usize] }
}

/// Table pages set aside by one vCPU, so that nothing is allocated under a lock.
#[derive(Debug)]
pub(crate) struct TableCache {
    pool: Arc<TablePool>,
    tables: Vec<OwnedTable>,
}

/// Tables that one vCPU sets aside: what one fault may use, a table per level, with room for splits.
pub const CACHE_TABLES: usize = 6;

impl TableCache {
    pub(crate) fn new(pool: Arc<TablePool>) -> Self {
        Self {
            pool,
            tables: Vec::with_capacity(CACHE_TABLES),
        }
    }

    /// Fills the cache; false at the table limit.
    #[inline]
    pub(crate) fn top_up(&mut self) -> bool {
        while self.tables.len() < CACHE_TABLES {
            match self.pool.allocate() {
                Some(table) => self.tables.push(table),
                None => return false,
            }
        }
        true
    }

    pub(crate) fn take(&mut self) -> Option<OwnedTable> {
        self.tables.pop()
    }

    /// Puts a table back that could not be linked. Its entries may have been filled.
    pub(crate) fn put_back(&mut self, table: OwnedTable) {
        table.page().clear();
        self.tables.push(table);
    }
}

impl Drop for TableCache {
    fn drop(&mut self) {
        for table in self.tables.drain(..) {
            self.pool.free(table);
        }
    }
}

const _: () = assert!(PAGE_SIZE - 1 == !ADDRESS & 0xfff);

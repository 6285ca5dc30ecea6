//! Paging-structure caches: where walks of the guest's tables, and of EPT, may start.
//!
//! For each level a direct-mapped cache of the tables that recent walks went through. A TLB miss in
//! a region that was walked before reads one entry, the leaf, instead of one for each level.
//!
//! An entry for the guest's tables is tagged with its address space, like those of the TLB, so that
//! what forgets the number of a space forgets its tables. INVLPG must drop every entry of the current space, whatever
//! its address: the architecture lets software free a table after one INVLPG. Here it drops all, by
//! counting the epoch that is part of each tag. A walk that would end in a fault or an exit is made
//! again from the root first.
//!
//! Source: SDM volume 3, "Paging-Structure Caches" and "Invalidation of TLBs and Paging-Structure
//! Caches".

use arch::paging::{CachedTable, Entry as PagingEntry, Exchange, Level, TableMemory};

/// Tables kept for each level.
const ENTRIES: usize = 64;

/// Levels whose tables are kept: those below the top one of five.
const LEVELS: usize = Level::COUNT - 1;

#[derive(Clone, Copy)]
struct Entry {
    key: u64,
    tag: u64,
    table: CachedTable,
}

/// A tag that no walk has.
const NO_TAG: u64 = u64::MAX;

const EMPTY: Entry = Entry {
    key: 0,
    tag: NO_TAG,
    table: CachedTable {
        address: 0,
        combined: 0,
    },
};

/// The paging-structure caches of one processor.
pub(crate) struct WalkCache {
    levels: Box<[[Entry; ENTRIES]; LEVELS]>,
    epoch: u64,
    enabled: bool,
}

impl WalkCache {
    pub(crate) fn new() -> WalkCache {
        WalkCache {
            levels: Box::new([[EMPTY; ENTRIES]; LEVELS]),
            epoch: 0,
            enabled: true,
        }
    }

    /// Drops everything.
    #[inline]
    pub(crate) fn flush(&mut self) {
        self.epoch += 1;
    }

    /// Switches the caches on or off.
    pub(crate) fn enable(&mut self, enabled: bool) {
        self.enabled = enabled;
        self.flush();
    }

    /// The tag of entries of address space number `space` that are made now.
    #[inline]
    pub(crate) fn tag(&self, space: u64) -> u64 {
        self.epoch << 10 | space
    }

    #[inline(always)]
    pub(crate) fn get(&self, tag: u64, level: Level, key: u64) -> Option<CachedTable> {
        let entry = &self.levels.get(level.index())?[key as usize & (ENTRIES - 1)];
        (entry.key == key && entry.tag == tag).then_some(entry.table)
    }

    #[inline(always)]
    pub(crate) fn set(&mut self, tag: u64, level: Level, key: u64, table: Option<CachedTable>) {
        let Some(entries) = self.levels.get_mut(level.index()) else {
            return;
        };
        let entry = &mut entries[key as usize & (ENTRIES - 1)];
        match table {
            Some(table) if self.enabled => *entry = Entry { key, tag, table },
            None if entry.key == key && entry.tag == tag => *entry = EMPTY,
            _ => {}
        }
    }
}

/// Tables with the caches in front of them.
pub(crate) struct CachedTables<'a, M> {
    pub tables: &'a mut M,
    pub cache: &'a mut WalkCache,
    /// The tag of the address space that is walked.
    pub tag: u64,
}

impl<M: TableMemory> TableMemory for CachedTables<'_, M> {
    type Error = M::Error;
    type Handle = M::Handle;

    #[inline]
    fn read<E: PagingEntry>(
        &mut self,
        address: u64,
        level: Level,
    ) -> Result<(E, M::Handle), M::Error> {
        self.tables.read(address, level)
    }

    fn compare_exchange<E: PagingEntry>(
        &mut self,
        handle: M::Handle,
        address: u64,
        old: E,
        new: E,
    ) -> Result<Exchange, M::Error> {
        self.tables.compare_exchange(handle, address, old, new)
    }

    #[inline(always)]
    fn cached_table(&self, level: Level, key: u64) -> Option<CachedTable> {
        self.cache.get(self.tag, level, key)
    }

    #[inline(always)]
    fn cache_table(&mut self, level: Level, key: u64, table: Option<CachedTable>) {
        self.cache.set(self.tag, level, key, table);
    }
}

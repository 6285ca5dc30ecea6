//! The walk itself.

use super::format::{page_bytes, page_shift};
use super::{Entry, Level, Mode, PagingFormat};

/// Where the tables are: the caller's way of reading and compare-exchanging entries.
pub trait TableMemory {
    /// Why an entry could not be read: the caller's own, passed through.
    type Error;
    /// What the caller wants back to write the entry it read (a host pointer, for instance).
    type Handle: Copy + Default;

    /// Reads the entry at `address`, an address in the space the tables live in, in one atomic
    /// load.
    fn read<E: Entry>(
        &mut self,
        address: u64,
        level: Level,
    ) -> Result<(E, Self::Handle), Self::Error>;

    /// Replaces the entry by `new` if it still is `old`.
    fn compare_exchange<E: Entry>(
        &mut self,
        handle: Self::Handle,
        address: u64,
        old: E,
        new: E,
    ) -> Result<Exchange, Self::Error>;

    /// Asks the paging-structure cache, where there is one, for the table at `level` that an
    /// earlier walk reached. `key` is the address without the bits that index that table and those
    /// below it.
    #[inline(always)]
    fn cached_table(&self, _level: Level, _key: u64) -> Option<CachedTable> {
        None
    }

    /// Offers the paging-structure cache a table that a completed walk used, every entry on the way
    /// to it accessed; `None` takes one out that led to a fault.
    #[inline(always)]
    fn cache_table(&mut self, _level: Level, _key: u64, _table: Option<CachedTable>) {}
}

/// What a paging-structure cache holds: a table and the rights of the way to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachedTable {
    /// The table's address.
    pub address: u64,
    /// AND of the entries above it, with the format's inverted bits flipped.
    pub combined: u64,
}

/// How a compare-exchange of a table entry ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exchange {
    /// The entry holds the new value.
    Written,
    /// The entry was no longer what the walk had read: walk again.
    Changed,
    /// The table lies in memory that takes no writes (a read-only memslot). The walk's answer
    /// stands, the bits stay as they are, and that is no fault.
    Ignored,
}

/// One entry that a walk used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step<E, H> {
    /// The entry as read.
    pub entry: E,
    /// Where it was read, in the space the tables live in.
    pub address: u64,
    /// What the caller's `read` returned with it.
    pub handle: H,
}

/// A completed walk: a leaf was reached.
#[derive(Clone, Copy, Debug)]
pub struct Walk<F: PagingFormat, H> {
    /// The translated address.
    pub address: u64,
    /// The leaf's level.
    pub level: Level,
    /// What the combined entries allow.
    pub rights: F::Rights,
    /// The level at which the walk started.
    top: Level,
    /// AND of the entries above `top`.
    above: u64,
    steps: [Step<F::Entry, H>; Level::COUNT],
    accessed_dirty: bool,
}

/// Why an entry ended a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// It is not present.
    NotPresent,
    /// It is present with a reserved bit, or otherwise malformed.
    Malformed,
}

/// A walk that an entry ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Why.
    pub kind: FaultKind,
    /// The entry's level.
    pub level: Level,
    /// The entry.
    pub entry: u64,
    /// AND of the entries up to and including this one, with the format's inverted bits flipped.
    pub combined: u64,
}

/// Why a walk gave no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkError<E> {
    /// An entry ended it.
    Fault(Fault),
    /// An entry could not be read.
    Memory {
        /// The level of the table that was to be read.
        level: Level,
        /// The caller's error.
        error: E,
    },
}

/// How writing accessed and dirty bits ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marked {
    /// All the bits that could be written are.
    Done {
        /// The leaf's dirty bit is set (always, where the mode has none). While it is not, a
        /// cached translation must not allow writes: the first one has to set it.
        is_dirty: bool,
    },
    /// An entry changed since it was read: walk again.
    Changed,
}

/// Follows the tables from the one at `root`, which is at level [`PagingFormat::TOP`], to the leaf
/// that translates `address`. Writes nothing.
#[inline(always)]
pub fn walk<F: PagingFormat, M: TableMemory>(
    mode: &Mode<F>,
    memory: &mut M,
    root: u64,
    address: u64,
) -> Result<Walk<F, M::Handle>, WalkError<M::Error>> {
    let root = CachedTable {
        address: root,
        combined: u64::MAX,
    };
    walk_from(mode, memory, F::TOP, root, address)
}

/// The address without the bits that index the table at `level` and those below it.
#[inline(always)]
fn table_key<F: PagingFormat>(level: Level, address: u64) -> u64 {
    address >> (page_shift::<F>(level) + F::INDEX_BITS)
}

/// The lowest table that the paging-structure cache knows for `address`.
#[inline(always)]
pub(super) fn cached_start<F: PagingFormat, M: TableMemory>(
    memory: &M,
    address: u64,
) -> Option<(Level, CachedTable)> {
    let mut level = Level::PTE;
    while level < F::TOP {
        if let Some(table) = memory.cached_table(level, table_key::<F>(level, address)) {
            return Some((level, table));
        }
        level = level.above()?;
    }
    None
}

/// Takes every table for `address` out of the paging-structure cache.
#[cold]
pub(super) fn forget_tables<F: PagingFormat, M: TableMemory>(memory: &mut M, address: u64) {
    let mut level = Level::PTE;
    while level < F::TOP {
        memory.cache_table(level, table_key::<F>(level, address), None);
        match level.above() {
            Some(above) => level = above,
            None => return,
        }
    }
}

/// Follows the tables from `start`, which is at level `top`.
#[inline(always)]
pub(super) fn walk_from<F: PagingFormat, M: TableMemory>(
    mode: &Mode<F>,
    memory: &mut M,
    top: Level,
    start: CachedTable,
    address: u64,
) -> Result<Walk<F, M::Handle>, WalkError<M::Error>> {
    let mut steps = [Step::default(); Level::COUNT];
    let mut combined = start.combined;
    let mut table = start.address;
    let mut level = top;
    loop {
        let index = address >> page_shift::<F>(level) & ((1 << F::INDEX_BITS) - 1);
        let at = table | (index * F::Entry::SIZE);
        let (raw, handle) = match memory.read::<F::Entry>(at, level) {
            Ok(read) => read,
            Err(error) => return Err(WalkError::Memory { level, error }),
        };
        steps[level.index()] = Step {
            entry: raw,
            address: at,
            handle,
        };
        let entry = raw.to_u64();
        combined &= entry ^ F::INVERTED;
        if !mode.is_present(entry) {
            let kind = FaultKind::NotPresent;
            return Err(WalkError::Fault(Fault {
                kind,
                level,
                entry,
                combined,
            }));
        }
        let is_leaf = mode.is_leaf(entry, level);
        if mode.is_malformed(entry, level, is_leaf) {
            let kind = FaultKind::Malformed;
            return Err(WalkError::Fault(Fault {
                kind,
                level,
                entry,
                combined,
            }));
        }
        if is_leaf {
            let inside = address & (page_bytes::<F>(level) - 1);
            return Ok(Walk {
                address: F::page_address(entry, level) | inside,
                level,
                rights: F::rights(mode, combined),
                top,
                above: start.combined,
                steps,
                accessed_dirty: mode.accessed_dirty,
            });
        }
        table = F::table_address(entry);
        level = match level.below() {
            Some(below) => below,
            // Level 1 entries are always leaves: `Mode` sets every bit of `leaf[0]`.
            None => unreachable!("a level 1 entry is a leaf"),
        };
    }
}

impl<F: PagingFormat, H: Copy> Walk<F, H> {
    /// The leaf entry.
    #[inline(always)]
    pub fn leaf(&self) -> F::Entry {
        self.steps[self.level.index()].entry
    }

    /// The entry used at `level`: only levels from the leaf's up to the one where the walk started
    /// have one.
    #[inline(always)]
    pub fn step(&self, level: Level) -> Option<&Step<F::Entry, H>> {
        if level >= self.level && level <= self.top {
            Some(&self.steps[level.index()])
        } else {
            None
        }
    }

    /// Whether the leaf's dirty bit is set (always, where the mode has none).
    #[inline(always)]
    pub fn is_dirty(&self) -> bool {
        !self.accessed_dirty || self.leaf().to_u64() & F::DIRTY != 0
    }

    /// The bits that the entry at `level` lacks for an access (dirty only where it `is_write` and
    /// the entry is the leaf).
    #[inline(always)]
    fn missing(&self, level: Level, is_write: bool) -> u64 {
        let dirty = if is_write && level == self.level {
            F::DIRTY
        } else {
            0
        };
        (F::ACCESSED | dirty) & !self.steps[level.index()].entry.to_u64()
    }

    /// The levels whose entries need an accessed or dirty bit written for this access, as a set of
    /// bits numbered by [`Level::index`].
    pub fn unmarked(&self, is_write: bool) -> u8 {
        if !self.accessed_dirty {
            return 0;
        }
        (self.level.number()..=self.top.number())
            .filter_map(Level::new)
            .filter(|&level| self.missing(level, is_write) != 0)
            .fold(0, |set, level| set | 1 << level.index())
    }

    /// Writes the accessed bits of every entry used and, for a write, the leaf's dirty bit.
    #[inline(always)]
    pub fn mark<M: TableMemory<Handle = H>>(
        &mut self,
        memory: &mut M,
        is_write: bool,
    ) -> Result<Marked, M::Error> {
        if !self.accessed_dirty {
            return Ok(Marked::Done { is_dirty: true });
        }
        let mut level = self.top;
        loop {
            let missing = self.missing(level, is_write);
            if missing != 0 && self.write_bits(memory, level, missing)? == Exchange::Changed {
                return Ok(Marked::Changed);
            }
            match level.below() {
                Some(below) if below >= self.level => level = below,
                _ => {
                    return Ok(Marked::Done {
                        is_dirty: self.is_dirty(),
                    });
                }
            }
        }
    }

    /// Offers the tables that this walk went through, once it is marked, to the paging-structure
    /// cache.
    #[inline(always)]
    pub(super) fn remember<M: TableMemory<Handle = H>>(&self, memory: &mut M, address: u64) {
        let mut combined = self.above;
        let mut level = self.top;
        while level > self.level {
            let entry = self.steps[level.index()].entry.to_u64();
            combined &= entry ^ F::INVERTED;
            let Some(below) = level.below() else { return };
            let table = CachedTable {
                address: F::table_address(entry),
                combined,
            };
            memory.cache_table(below, table_key::<F>(below, address), Some(table));
            level = below;
        }
    }

    #[cold]
    fn write_bits<M: TableMemory<Handle = H>>(
        &mut self,
        memory: &mut M,
        level: Level,
        bits: u64,
    ) -> Result<Exchange, M::Error> {
        let step = &mut self.steps[level.index()];
        let new = F::Entry::from_u64(step.entry.to_u64() | bits);
        let exchange = memory.compare_exchange(step.handle, step.address, step.entry, new)?;
        if exchange == Exchange::Written {
            step.entry = new;
        }
        Ok(exchange)
    }
}

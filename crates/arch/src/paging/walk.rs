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
    let mut steps = [Step::default(); Level::COUNT];
    let mut combined = u64::MAX;
    let mut table = root;
    let mut level = F::TOP;
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

    /// The entry used at `level`: only levels from the leaf's up to the format's top have one.
    #[inline(always)]
    pub fn step(&self, level: Level) -> Option<&Step<F::Entry, H>> {
        if level >= self.level && level <= F::TOP {
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
        (self.level.number()..=F::TOP.number())
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
        let mut level = F::TOP;
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

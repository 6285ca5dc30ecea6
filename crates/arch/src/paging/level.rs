//! Levels of a page table.

use crate::addr::PAGE_SHIFT;
use core::fmt;

/// A level of a page table, counted from the leaf tables up: 1 holds PTEs, 5 holds PML5 entries.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Level(u8);

impl Level {
    /// Level 1: page-table entries, which map 4 KiB.
    pub const PTE: Self = Self(1);
    /// Level 2: page-directory entries; a leaf maps 2 MiB (4 MiB in 32-bit paging).
    pub const PDE: Self = Self(2);
    /// Level 3: page-directory-pointer entries; a leaf maps 1 GiB.
    pub const PDPTE: Self = Self(3);
    /// Level 4: PML4 entries.
    pub const PML4E: Self = Self(4);
    /// Level 5: PML5 entries.
    pub const PML5E: Self = Self(5);
    /// The greatest number of levels any format has.
    pub const COUNT: usize = 5;

    /// The level with that number, 1 to 5.
    pub const fn new(number: u8) -> Option<Self> {
        if number >= 1 && number as usize <= Self::COUNT {
            Some(Self(number))
        } else {
            None
        }
    }

    /// 1 to 5.
    #[inline(always)]
    pub const fn number(self) -> u8 {
        self.0
    }

    /// 0 to 4, for arrays indexed by level.
    #[inline(always)]
    pub const fn index(self) -> usize {
        (self.0 - 1) as usize
    }

    /// The level of the tables that this level's entries point to.
    #[inline(always)]
    pub const fn below(self) -> Option<Self> {
        if self.0 > 1 {
            Some(Self(self.0 - 1))
        } else {
            None
        }
    }

    /// The level whose entries point to this level's tables.
    #[inline(always)]
    pub const fn above(self) -> Option<Self> {
        Self::new(self.0 + 1)
    }

    /// log2 of the bytes that one entry spans, in the formats with 512 entries a table.
    #[inline(always)]
    pub const fn shift(self) -> u32 {
        PAGE_SHIFT + 9 * (self.0 as u32 - 1)
    }

    /// Bytes that one entry spans, in the formats with 512 entries a table.
    #[inline(always)]
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    /// 4 KiB pages that one entry spans, in the formats with 512 entries a table.
    #[inline(always)]
    pub const fn pages(self) -> u64 {
        1 << (self.shift() - PAGE_SHIFT)
    }
}

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Level({})", self.0)
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

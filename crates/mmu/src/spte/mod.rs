//! Shadow page-table entries: the only place where one is made or taken apart.
//!
//! ```text
//!   63 62        52 51                12 11 10  9  8  7  6  5 3 2 1 0
//!  ┌──┬────────────┬────────────────────┬──┬──┬──┬──┬──┬──┬────┬─┬─┬─┐
//!  │  │ software   │ frame              │ M│XU│ D│ A│PS│IP│ MT │X│W│R│  leaf, table
//!  │Wr│ gen 18:8   │ gfn                │ 0│ gen 7:0          │1│1│0│  MMIO
//!  └──┴────────────┴────────────────────┴──┴──────────────────┴─┴─┴─┘
//! ```
//!
//! M ([`MMU_PRESENT`]) says that the MMU maps something here, whatever the hardware bits say: an
//! entry without access flags that is aged has R, W and X clear and M set. Zero is an empty entry.
//! [`Spte::FROZEN`] stands in a table that is being torn down: nobody may build on it.

mod leaf;
mod mmio;

pub(crate) use leaf::{LeafAccess, LeafPolicy};
pub(crate) use mmio::{GENERATION_MASK, MmioFormat};

use arch::addr::{Hva, Pfn};
use arch::paging::{Level, ept_entry as ept};
use std::fmt;

/// The MMU maps something here.
const MMU_PRESENT: u64 = ept::SOFTWARE;
/// The slot and the host allow writing.
const HOST_WRITABLE: u64 = 1 << 52;
/// The MMU may make the entry writable without looking further: the page is not write-tracked.
const MMU_WRITABLE: u64 = 1 << 53;
/// Where an aged entry keeps R and X.
const SAVED_SHIFT: u32 = 54;
const SAVED: u64 = (ept::READ | ept::EXECUTE) << SAVED_SHIFT;

const RWX: u64 = ept::READ | ept::WRITE | ept::EXECUTE | ept::EXECUTE_USER;
/// Both execute bits, so that mode-based execute control changes nothing.
const EXECUTE: u64 = ept::EXECUTE | ept::EXECUTE_USER;

const _: () =
    assert!(HOST_WRITABLE & MMU_WRITABLE == 0 && SAVED & (HOST_WRITABLE | MMU_WRITABLE) == 0);
const _: () = assert!((HOST_WRITABLE | MMU_WRITABLE | SAVED) & !ept::SOFTWARE_HIGH == 0);
const _: () = assert!(Spte::FROZEN.0 & (RWX | MMU_PRESENT) == 0 && Spte::FROZEN.0 != 0);

/// An entry of a table that the MMU writes and the processor walks.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Spte(u64);

impl Spte {
    /// Nothing is mapped.
    pub(crate) const EMPTY: Spte = Spte(0);
    /// The table is being torn down.
    pub(crate) const FROZEN: Spte = Spte(0x5a << 3 | 1 << 59);

    pub(crate) const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    pub(crate) const fn raw(self) -> u64 {
        self.0
    }

    /// An entry that points to a table. Rights are decided at the leaves.
    pub(crate) fn table(address: Hva) -> Self {
        debug_assert_eq!(address.get() & !ept::ADDRESS, 0);
        // The accessed flag is set so that the processor has nothing to write here.
        Self(address.get() | RWX | MMU_PRESENT | ept::ACCESSED)
    }

    /// Whether the MMU maps something here (a table or a page).
    #[inline(always)]
    pub(crate) const fn is_present(self) -> bool {
        self.0 & MMU_PRESENT != 0
    }

    #[inline(always)]
    pub(crate) const fn is_frozen(self) -> bool {
        self.0 == Self::FROZEN.0
    }

    /// Whether it maps a page.
    #[inline(always)]
    pub(crate) fn is_leaf(self, level: Level) -> bool {
        self.is_present() && (level == Level::PTE || self.0 & ept::PAGE_SIZE != 0)
    }

    /// Whether it points to a table.
    #[inline(always)]
    pub(crate) fn is_table(self, level: Level) -> bool {
        self.is_present() && level != Level::PTE && self.0 & ept::PAGE_SIZE == 0
    }

    /// The table it points to.
    pub(crate) const fn table_address(self) -> Hva {
        Hva::new(self.0 & ept::ADDRESS)
    }

    /// The frame that a leaf maps.
    pub(crate) const fn pfn(self) -> Pfn {
        Hva::new(self.0 & ept::ADDRESS).pfn()
    }

    pub(crate) const fn is_writable(self) -> bool {
        self.0 & ept::WRITE != 0
    }

    #[cfg(test)]
    pub(crate) const fn is_executable(self) -> bool {
        self.0 & ept::EXECUTE != 0
    }

    pub(crate) const fn is_dirty(self) -> bool {
        self.0 & ept::DIRTY != 0
    }
}

impl fmt::Debug for Spte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Spte({:#018x})", self.0)
    }
}

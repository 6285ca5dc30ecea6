//! What a paging format is, and the masks a walk needs, computed once per mode.

use super::Level;
use crate::addr::PAGE_MASK;
use core::fmt::Debug;
use core::marker::PhantomData;

/// Bits of page-table entries outside EPT.
pub mod entry {
    /// P: the entry is in use.
    pub const PRESENT: u64 = 1 << 0;
    /// R/W: writes are allowed.
    pub const WRITABLE: u64 = 1 << 1;
    /// U/S: user-mode accesses are allowed.
    pub const USER: u64 = 1 << 2;
    /// PWT: page-level write-through.
    pub const WRITE_THROUGH: u64 = 1 << 3;
    /// PCD: page-level cache disable.
    pub const CACHE_DISABLE: u64 = 1 << 4;
    /// A: the entry has been used in a translation.
    pub const ACCESSED: u64 = 1 << 5;
    /// D: the page that the (leaf) entry maps has been written.
    pub const DIRTY: u64 = 1 << 6;
    /// PS: a leaf above level 1. At level 1 the bit is PAT.
    pub const PAGE_SIZE: u64 = 1 << 7;
    /// G: the translation survives CR3 loads (leaf entries with CR4.PGE).
    pub const GLOBAL: u64 = 1 << 8;
    /// Bits 11:9, which hardware ignores.
    pub const SOFTWARE: u64 = 0b111 << 9;
    /// PAT of a leaf above level 1.
    pub const PAT_LARGE: u64 = 1 << 12;
    /// Bits 51:12: where an address may be.
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    /// Bits 58:52, which hardware ignores in 4- and 5-level paging.
    pub const SOFTWARE_HIGH: u64 = 0x7f << 52;
    /// First bit of the four-bit protection key (leaf entries, 4- and 5-level paging).
    pub const KEY_SHIFT: u32 = 59;
    /// The protection key.
    pub const KEY: u64 = 0xf << KEY_SHIFT;
    /// XD (NX): no instruction fetches, where EFER.NXE is set.
    pub const NO_EXECUTE: u64 = 1 << 63;

    const _: () = assert!(
        (PRESENT
            | WRITABLE
            | USER
            | WRITE_THROUGH
            | CACHE_DISABLE
            | ACCESSED
            | DIRTY
            | PAGE_SIZE
            | GLOBAL)
            ^ SOFTWARE
            ^ ADDRESS
            ^ SOFTWARE_HIGH
            ^ KEY
            ^ NO_EXECUTE
            == u64::MAX
    );
}

/// A page-table entry as it lies in memory: `u32` or `u64`.
pub trait Entry: Copy + Eq + Debug + Default + 'static {
    /// Bytes in memory.
    const SIZE: u64;
    /// Zero-extended to 64 bits.
    fn to_u64(self) -> u64;
    /// The low bits of `raw`.
    fn from_u64(raw: u64) -> Self;
}

impl Entry for u32 {
    const SIZE: u64 = 4;
    #[inline(always)]
    fn to_u64(self) -> u64 {
        self.into()
    }
    #[inline(always)]
    fn from_u64(raw: u64) -> Self {
        raw as u32
    }
}

impl Entry for u64 {
    const SIZE: u64 = 8;
    #[inline(always)]
    fn to_u64(self) -> u64 {
        self
    }
    #[inline(always)]
    fn from_u64(raw: u64) -> Self {
        raw
    }
}

/// A page-table format: the facts about its entries that do not change with control registers.
pub trait PagingFormat: Copy + Debug + 'static {
    /// The entry as it lies in memory.
    type Entry: Entry;
    /// What the combined entries allow.
    type Rights: Copy + Eq + Debug;

    /// Its name in dumps.
    const NAME: &'static str;
    /// The level of the table the root register points to. PAE's is 2: its level 3 is four
    /// registers.
    const TOP: Level;
    /// log2 of the entries in a table.
    const INDEX_BITS: u32;
    /// Bits that grant a right when *clear*; the walk inverts them so that rights combine by AND.
    const INVERTED: u64;
    /// The accessed bit.
    const ACCESSED: u64;
    /// The dirty bit of a leaf.
    const DIRTY: u64;

    /// Whether a present entry without reserved bits still breaks a rule of the format.
    #[inline(always)]
    fn is_illegal(_mode: &Mode<Self>, _entry: u64, _is_leaf: bool) -> bool {
        false
    }

    /// The rights that an AND over the path's entries (with [`Self::INVERTED`] bits flipped) means.
    fn rights(mode: &Mode<Self>, combined: u64) -> Self::Rights;

    /// The address of the page that a leaf at `level` maps.
    #[inline(always)]
    fn page_address(entry: u64, level: Level) -> u64 {
        entry & entry::ADDRESS & !(page_bytes::<Self>(level) - 1)
    }

    /// The address of the table that a non-leaf entry points to.
    #[inline(always)]
    fn table_address(entry: u64) -> u64 {
        entry & entry::ADDRESS
    }
}

/// log2 of the bytes that one entry at `level` spans.
#[inline(always)]
pub(super) const fn page_shift<F: PagingFormat>(level: Level) -> u32 {
    12 + F::INDEX_BITS * (level.number() as u32 - 1)
}

/// Bytes that one entry at `level` spans.
#[inline(always)]
pub(super) const fn page_bytes<F: PagingFormat>(level: Level) -> u64 {
    1 << page_shift::<F>(level)
}

/// A format together with everything a walk must know from control registers and capabilities,
/// as masks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode<F: PagingFormat> {
    /// An entry is present when it has one of these bits.
    pub(super) present: u64,
    /// Per level: a present entry with one of these bits is a leaf.
    pub(super) leaf: [u64; Level::COUNT],
    /// Per level: bits that must be clear in an entry that points to a table.
    pub(super) reserved_table: [u64; Level::COUNT],
    /// Per level: bits that must be clear in a leaf.
    pub(super) reserved_leaf: [u64; Level::COUNT],
    /// Whether accessed and dirty bits exist.
    pub(super) accessed_dirty: bool,
    /// Format-specific switches (EPT capabilities).
    pub(super) features: u32,
    pub(super) format: PhantomData<F>,
}

impl<F: PagingFormat> Mode<F> {
    /// The bits that must be clear in an entry at `level`.
    pub const fn reserved(&self, level: Level, is_leaf: bool) -> u64 {
        if is_leaf {
            self.reserved_leaf[level.index()]
        } else {
            self.reserved_table[level.index()]
        }
    }

    /// Whether the walk writes accessed and dirty bits.
    pub const fn has_accessed_dirty(&self) -> bool {
        self.accessed_dirty
    }

    /// Whether `entry` is present.
    #[inline(always)]
    pub const fn is_present(&self, entry: u64) -> bool {
        entry & self.present != 0
    }

    /// Whether a present `entry` at `level` is a leaf (or an illegal attempt at one).
    #[inline(always)]
    pub const fn is_leaf(&self, entry: u64, level: Level) -> bool {
        entry & self.leaf[level.index()] != 0
    }

    /// Whether a present `entry` has a reserved bit set or is otherwise illegal.
    #[inline(always)]
    pub fn is_malformed(&self, entry: u64, level: Level, is_leaf: bool) -> bool {
        entry & self.reserved(level, is_leaf) != 0 || F::is_illegal(self, entry, is_leaf)
    }
}

/// The mask of bits `low..high`.
pub(super) const fn bits(low: u32, high: u32) -> u64 {
    if low >= high {
        return 0;
    }
    let up_to = if high >= 64 {
        u64::MAX
    } else {
        (1 << high) - 1
    };
    up_to & !((1 << low) - 1)
}

/// Bits of a leaf's address field that its size leaves no room for: from `from` up to the page size.
pub(super) const fn below_page(from: u32, level: Level) -> u64 {
    bits(from, level.shift())
}

const _: () = assert!(bits(12, 52) == entry::ADDRESS);
const _: () = assert!(below_page(13, Level::PDE) == 0x1f_e000);
const _: () = assert!(PAGE_MASK == bits(0, 12));

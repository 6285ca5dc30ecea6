//! Entries of shadow tables, in the format of 4- and 5-level paging.
//!
//! ```text
//!   63 62        52 51 50            12 11 10  9  8 7  6 5 4 3 2 1 0
//!  ┌──┬──┬────────┬──┬────────────────┬──┬──┬──┬───┬──┬─┬────┬─┬─┬─┐
//!  │NX│key        │ 0│ frame          │ M│  │HW│   │PS│D│A   │U│W│1│  leaf, table
//!  │NX│ gen 18:8  │ 1│ gfn            │ 0│ gen 7:0           │U│W│1│  MMIO
//!  └──┴───────────┴──┴────────────────┴──┴───────────────────┴─┴─┴─┘
//! ```
//!
//! M: the MMU maps something here. HW: slot and host take writes. The processor is told that
//! physical addresses have 51 bits, so bit 51 with P set is a reserved-bit fault: the MMIO entry.

use arch::addr::{Gfn, Hva, PAGE_SHIFT};
use arch::paging::{Level, Rights, entry as x86};

const MMU_PRESENT: u64 = 1 << 11;
const HOST_WRITABLE: u64 = 1 << 9;
/// The reserved bit of MMIO entries.
const MMIO: u64 = 1 << 51;
const FRAME: u64 = x86::ADDRESS & !MMIO;

const LOW_BITS: u32 = 8;
const LOW_SHIFT: u32 = 3;
const HIGH_SHIFT: u32 = 52;
const HIGH_MASK: u64 = (1 << 11) - 1;

const _: () = assert!(MMU_PRESENT & x86::SOFTWARE != 0 && HOST_WRITABLE & x86::SOFTWARE != 0);
const _: () = assert!(LOW_SHIFT + LOW_BITS == MMU_PRESENT.trailing_zeros());

/// An entry of a shadow table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(u64);

/// What a leaf is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct LeafParts {
    pub(super) hva: Hva,
    pub(super) level: Level,
    pub(super) rights: Rights,
    pub(super) key: u8,
    pub(super) host_writable: bool,
    pub(super) writable: bool,
}

impl Entry {
    pub(super) const EMPTY: Entry = Entry(0);

    pub(super) const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    pub(super) const fn raw(self) -> u64 {
        self.0
    }

    /// A link: rights are decided at the leaves.
    pub(super) fn table(address: Hva) -> Self {
        debug_assert_eq!(address.get() & !FRAME, 0);
        let flags = x86::PRESENT | x86::WRITABLE | x86::USER | x86::ACCESSED | MMU_PRESENT;
        Self(address.get() | flags)
    }

    pub(super) fn leaf(parts: &LeafParts) -> Self {
        let mut raw = parts.hva.get() | x86::PRESENT | x86::ACCESSED | MMU_PRESENT;
        raw |= u64::from(parts.key) << x86::KEY_SHIFT;
        if parts.level > Level::PTE {
            raw |= x86::PAGE_SIZE;
        }
        if parts.rights.contains(Rights::USER) {
            raw |= x86::USER;
        }
        if !parts.rights.contains(Rights::EXECUTABLE) {
            raw |= x86::NO_EXECUTE;
        }
        if parts.host_writable {
            raw |= HOST_WRITABLE;
        }
        if parts.writable {
            raw |= x86::WRITABLE | x86::DIRTY;
        }
        Self(raw)
    }

    /// The entry of a page without memory.
    pub(super) fn mmio(gfn: Gfn, rights: Rights, generation: u64) -> Self {
        let mut raw = x86::PRESENT | MMIO | gfn.get() << PAGE_SHIFT & FRAME;
        raw |= (generation & ((1 << LOW_BITS) - 1)) << LOW_SHIFT;
        raw |= (generation >> LOW_BITS & HIGH_MASK) << HIGH_SHIFT;
        if rights.contains(Rights::WRITABLE) {
            raw |= x86::WRITABLE;
        }
        if rights.contains(Rights::USER) {
            raw |= x86::USER;
        }
        if !rights.contains(Rights::EXECUTABLE) {
            raw |= x86::NO_EXECUTE;
        }
        Self(raw)
    }

    pub(super) const fn is_mmio(self) -> bool {
        self.0 & (MMIO | x86::PRESENT) == MMIO | x86::PRESENT
    }

    pub(super) const fn mmio_gfn(self) -> Gfn {
        Gfn::new((self.0 & FRAME) >> PAGE_SHIFT)
    }

    pub(super) const fn mmio_generation(self) -> u64 {
        let low = self.0 >> LOW_SHIFT & ((1 << LOW_BITS) - 1);
        low | (self.0 >> HIGH_SHIFT & HIGH_MASK) << LOW_BITS
    }

    /// Rights, of a leaf or an MMIO entry.
    pub(super) fn rights(self) -> Rights {
        let mut rights = Rights::empty();
        rights.set(Rights::WRITABLE, self.0 & x86::WRITABLE != 0);
        rights.set(Rights::USER, self.0 & x86::USER != 0);
        rights.set(Rights::EXECUTABLE, self.0 & x86::NO_EXECUTE == 0);
        rights
    }

    pub(super) const fn is_present(self) -> bool {
        self.0 & MMU_PRESENT != 0
    }

    pub(super) fn is_leaf(self, level: Level) -> bool {
        self.is_present() && (level == Level::PTE || self.0 & x86::PAGE_SIZE != 0)
    }

    pub(super) fn is_table(self, level: Level) -> bool {
        self.is_present() && !self.is_leaf(level)
    }

    pub(super) const fn address(self) -> Hva {
        Hva::new(self.0 & FRAME)
    }

    pub(super) const fn is_writable(self) -> bool {
        self.0 & x86::WRITABLE != 0
    }

    pub(super) const fn is_accessed(self) -> bool {
        self.0 & x86::ACCESSED != 0
    }

    /// Without write permission. The dirty flag goes with it: it says nothing here.
    pub(super) const fn write_protected(self) -> Self {
        Self(self.0 & !(x86::WRITABLE | x86::DIRTY))
    }

    pub(super) const fn execute_protected(self) -> Self {
        Self(self.0 | x86::NO_EXECUTE)
    }

    pub(super) const fn unaccessed(self) -> Self {
        Self(self.0 & !x86::ACCESSED)
    }

    /// The same but for flags that a processor sets.
    pub(super) const fn is_same(self, other: Self) -> bool {
        (self.0 ^ other.0) & !(x86::ACCESSED | x86::DIRTY) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mmio_entries_keep_what_they_are_given() {
        for generation in [0, 1, 0xff, 0x100, 0x7_ffff, 0x5_5555] {
            for rights in [
                Rights::empty(),
                Rights::WRITABLE | Rights::USER,
                Rights::EXECUTABLE,
            ] {
                let entry = Entry::mmio(Gfn::new(0xf_ee00), rights, generation);
                assert!(entry.is_mmio() && !entry.is_present());
                assert_eq!(entry.mmio_gfn(), Gfn::new(0xf_ee00));
                assert_eq!(entry.mmio_generation(), generation);
                assert_eq!(entry.rights(), rights);
            }
        }
    }

    #[test]
    fn leaves_and_links() {
        let leaf = Entry::leaf(&LeafParts {
            hva: Hva::new(0x7fff_0020_0000),
            level: Level::PDE,
            rights: Rights::USER | Rights::WRITABLE,
            key: 5,
            host_writable: true,
            writable: true,
        });
        assert!(leaf.is_leaf(Level::PDE) && leaf.is_writable() && !leaf.is_mmio());
        assert_eq!(leaf.rights(), Rights::USER | Rights::WRITABLE);
        assert!(!leaf.write_protected().is_writable());
        let link = Entry::table(Hva::new(0x7fff_0000_1000));
        assert!(link.is_table(Level::PDE) && link.address() == Hva::new(0x7fff_0000_1000));
    }
}

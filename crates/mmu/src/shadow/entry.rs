//! Entries of shadow tables, in the format of what walks them: 4- and 5-level paging, or EPT (for
//! tables that shadow a nested hypervisor's EPT).
//!
//! ```text
//!   63 62        52 51 50            12 11 10  9  8 7  6 5 4 3 2 1 0
//!  ┌──┬──┬────────┬──┬────────────────┬──┬─────┬───┬──┬─┬────┬─┬─┬─┐
//!  │NX│key        │ 0│ frame          │ M│     │   │PS│D│A   │U│W│1│  paging: leaf, table
//!  │NX│ gen 18:8  │ 1│ gfn            │ 0│ gen 7:0          │U│W│1│  paging: MMIO
//!  │  │          E│ 0│ frame          │ M│XU│ D│ A │PS│ │ MT │X│W│R│  EPT: leaf, table
//!  │Wr│ gen 18:8  │ 0│ gfn            │ 0│ gen 7:0          │1│1│0│  EPT: MMIO
//!  └──┴───────────┴──┴────────────────┴──┴──────────────────┴─┴─┴─┘
//! ```
//!
//! M: the MMU maps something here. E: the format is EPT's, so that an entry says by itself how it is
//! to be read. The processor is told that physical addresses have 51 bits, so bit 51 with P set is a
//! reserved-bit fault: the MMIO entry. EPT's is a misconfiguration.
//!
//! Rights are those of paging. In EPT, [`Rights::USER`] stands for reads.

use arch::addr::{Gfn, Hva, PAGE_SHIFT};
use arch::paging::{Level, Rights, entry as x86, ept_entry as ept};

const MMU_PRESENT: u64 = 1 << 11;
/// The format is EPT's.
const EPT: u64 = 1 << 52;
/// The reserved bit of MMIO entries.
const MMIO: u64 = 1 << 51;
const FRAME: u64 = x86::ADDRESS & !MMIO;
/// EPT's MMIO pattern, and the bits that it is about.
const EPT_MMIO: u64 = ept::WRITE | ept::EXECUTE;
const EPT_MMIO_MASK: u64 = ept::READ | ept::WRITE | ept::EXECUTE | MMU_PRESENT;
const EPT_MMIO_WRITABLE: u64 = 1 << 63;

const LOW_BITS: u32 = 8;
const LOW_SHIFT: u32 = 3;
const HIGH_SHIFT: u32 = 52;
const HIGH_MASK: u64 = (1 << 11) - 1;

const _: () = assert!(MMU_PRESENT & x86::SOFTWARE != 0 && MMU_PRESENT == ept::SOFTWARE);
const _: () = assert!(EPT & ept::SOFTWARE_HIGH != 0 && EPT & x86::SOFTWARE_HIGH != 0);
const _: () = assert!(x86::WRITABLE == ept::WRITE && x86::PAGE_SIZE == ept::PAGE_SIZE);
const _: () = assert!(LOW_SHIFT + LOW_BITS == MMU_PRESENT.trailing_zeros());

/// What walks a shadow table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Walker {
    /// The processor's paging, in place of the guest's.
    Paging,
    /// The processor's EPT, in place of a nested hypervisor's.
    Ept,
}

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
    pub(super) fn table(walker: Walker, address: Hva) -> Self {
        debug_assert_eq!(address.get() & !FRAME, 0);
        let flags = match walker {
            Walker::Paging => x86::PRESENT | x86::WRITABLE | x86::USER | x86::ACCESSED,
            Walker::Ept => {
                let execute = ept::EXECUTE | ept::EXECUTE_USER;
                ept::READ | ept::WRITE | execute | ept::ACCESSED | EPT
            }
        };
        Self(address.get() | flags | MMU_PRESENT)
    }

    pub(super) fn leaf(walker: Walker, parts: &LeafParts) -> Self {
        let mut raw = parts.hva.get() | MMU_PRESENT;
        if parts.level > Level::PTE {
            raw |= x86::PAGE_SIZE;
        }
        if parts.writable {
            raw |= x86::WRITABLE;
        }
        let has = |right, bits| {
            if parts.rights.contains(right) {
                bits
            } else {
                0
            }
        };
        raw |= match walker {
            Walker::Paging => {
                let no_execute = has(Rights::EXECUTABLE, x86::NO_EXECUTE) ^ x86::NO_EXECUTE;
                let key = u64::from(parts.key) << x86::KEY_SHIFT;
                let dirty = if parts.writable { x86::DIRTY } else { 0 };
                let user = has(Rights::USER, x86::USER);
                x86::PRESENT | x86::ACCESSED | user | no_execute | key | dirty
            }
            Walker::Ept => {
                let execute = has(Rights::EXECUTABLE, ept::EXECUTE | ept::EXECUTE_USER);
                let dirty = if parts.writable { ept::DIRTY } else { 0 };
                let read = has(Rights::USER, ept::READ);
                ept::WRITE_BACK | ept::ACCESSED | EPT | read | execute | dirty
            }
        };
        Self(raw)
    }

    /// The entry of a page without memory.
    pub(super) fn mmio(walker: Walker, gfn: Gfn, rights: Rights, generation: u64) -> Self {
        let mut raw = gfn.get() << PAGE_SHIFT & FRAME;
        raw |= (generation & ((1 << LOW_BITS) - 1)) << LOW_SHIFT;
        raw |= (generation >> LOW_BITS & HIGH_MASK) << HIGH_SHIFT;
        let is_writable = rights.contains(Rights::WRITABLE);
        if walker == Walker::Ept {
            let writable = if is_writable { EPT_MMIO_WRITABLE } else { 0 };
            return Self(raw | EPT_MMIO | writable);
        }
        raw |= x86::PRESENT | MMIO;
        if is_writable {
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

    const fn is_ept_mmio(self) -> bool {
        self.0 & EPT_MMIO_MASK == EPT_MMIO
    }

    pub(super) const fn is_mmio(self) -> bool {
        self.0 & (MMIO | x86::PRESENT) == MMIO | x86::PRESENT || self.is_ept_mmio()
    }

    pub(super) const fn mmio_gfn(self) -> Gfn {
        Gfn::new((self.0 & FRAME) >> PAGE_SHIFT)
    }

    pub(super) const fn mmio_generation(self) -> u64 {
        let low = self.0 >> LOW_SHIFT & ((1 << LOW_BITS) - 1);
        low | (self.0 >> HIGH_SHIFT & HIGH_MASK) << LOW_BITS
    }

    /// Whether a leaf or table entry is EPT's.
    const fn is_ept(self) -> bool {
        self.0 & (MMU_PRESENT | EPT) == MMU_PRESENT | EPT
    }

    /// Rights, of a leaf or an MMIO entry; of EPT's MMIO entry whether writes are among them.
    pub(super) fn rights(self) -> Rights {
        let mut rights = Rights::empty();
        if self.is_ept_mmio() {
            rights.set(Rights::WRITABLE, self.0 & EPT_MMIO_WRITABLE != 0);
            return rights;
        }
        rights.set(Rights::WRITABLE, self.0 & x86::WRITABLE != 0);
        if self.is_ept() {
            rights.set(Rights::USER, self.0 & ept::READ != 0);
            rights.set(Rights::EXECUTABLE, self.0 & ept::EXECUTE != 0);
        } else {
            rights.set(Rights::USER, self.0 & x86::USER != 0);
            rights.set(Rights::EXECUTABLE, self.0 & x86::NO_EXECUTE == 0);
        }
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
        self.0 & self.flags().0 != 0
    }

    /// Without write permission. The dirty flag goes with it: it says nothing here.
    pub(super) const fn write_protected(self) -> Self {
        Self(self.0 & !(x86::WRITABLE | self.flags().1))
    }

    pub(super) const fn execute_protected(self) -> Self {
        if self.is_ept() {
            Self(self.0 & !(ept::EXECUTE | ept::EXECUTE_USER))
        } else {
            Self(self.0 | x86::NO_EXECUTE)
        }
    }

    pub(super) const fn unaccessed(self) -> Self {
        Self(self.0 & !self.flags().0)
    }

    /// The same but for flags that a processor sets.
    pub(super) const fn is_same(self, other: Self) -> bool {
        let (accessed, dirty) = self.flags();
        (self.0 ^ other.0) & !(accessed | dirty) == 0
    }

    /// The accessed and the dirty flag.
    const fn flags(self) -> (u64, u64) {
        if self.is_ept() {
            (ept::ACCESSED, ept::DIRTY)
        } else {
            (x86::ACCESSED, x86::DIRTY)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WALKERS: [Walker; 2] = [Walker::Paging, Walker::Ept];

    #[test]
    fn mmio_entries_keep_what_they_are_given() {
        for walker in WALKERS {
            for generation in [0, 1, 0xff, 0x100, 0x7_ffff, 0x5_5555] {
                for rights in [
                    Rights::empty(),
                    Rights::WRITABLE | Rights::USER,
                    Rights::EXECUTABLE,
                ] {
                    let entry = Entry::mmio(walker, Gfn::new(0xf_ee00), rights, generation);
                    assert!(entry.is_mmio() && !entry.is_present());
                    assert_eq!(entry.mmio_gfn(), Gfn::new(0xf_ee00));
                    assert_eq!(entry.mmio_generation(), generation);
                    let kept = match walker {
                        Walker::Paging => Rights::all(),
                        Walker::Ept => Rights::WRITABLE,
                    };
                    assert_eq!(entry.rights(), rights & kept);
                }
            }
        }
    }

    #[test]
    fn leaves_and_links() {
        for walker in WALKERS {
            let leaf = Entry::leaf(
                walker,
                &LeafParts {
                    hva: Hva::new(0x7fff_0020_0000),
                    level: Level::PDE,
                    rights: Rights::USER | Rights::WRITABLE,
                    key: if walker == Walker::Paging { 5 } else { 0 },
                    writable: true,
                },
            );
            assert!(leaf.is_leaf(Level::PDE) && leaf.is_writable() && !leaf.is_mmio());
            assert_eq!(leaf.rights(), Rights::USER | Rights::WRITABLE);
            assert_eq!(leaf.is_ept(), walker == Walker::Ept);
            assert!(!leaf.write_protected().is_writable());
            assert_eq!(leaf.execute_protected(), leaf);
            assert!(leaf.is_accessed() && !leaf.unaccessed().is_accessed());
            assert!(leaf.is_same(leaf.unaccessed()) && !leaf.is_same(leaf.write_protected()));
            let link = Entry::table(walker, Hva::new(0x7fff_0000_1000));
            assert!(link.is_table(Level::PDE) && link.address() == Hva::new(0x7fff_0000_1000));
            assert!(!link.is_mmio());
        }
    }
}

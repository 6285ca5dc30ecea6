//! Leaves: from what is to be mapped to an entry, and the changes an entry goes through.

use super::{EXECUTE, HOST_WRITABLE, MMU_PRESENT, MMU_WRITABLE, RWX, SAVED, SAVED_SHIFT, Spte};
use crate::config::{Config, DirtyMethod};
use crate::memslot::{Memslot, Probed};
use arch::addr::{Gfn, PAGE_SHIFT};
use arch::paging::{Level, ept_entry as ept};

/// What a mapping is made for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LeafAccess {
    pub(crate) is_write: bool,
    pub(crate) is_fetch: bool,
}

/// What the VM's configuration says about leaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeafPolicy {
    accessed_dirty: bool,
    write_protects: bool,
    nx_huge_pages: bool,
}

impl LeafPolicy {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            accessed_dirty: config.accessed_dirty,
            write_protects: config.dirty_method == DirtyMethod::WriteProtect,
            nx_huge_pages: config.nx_huge_pages,
        }
    }

    pub(crate) fn accessed_dirty(&self) -> bool {
        self.accessed_dirty
    }

    /// The entry that maps the block at `level` around `gfn` for an access.
    ///
    /// `probed` is what is known of the whole block's host memory. While the slot is logged by
    /// write protection, only a write makes the entry writable.
    pub(crate) fn leaf(
        &self,
        slot: &Memslot,
        gfn: Gfn,
        level: Level,
        probed: Probed,
        access: LeafAccess,
    ) -> Spte {
        let first = gfn.align_down(level.pages());
        let mut raw = slot.hva_of(first).get() | ept::READ | ept::WRITE_BACK | ept::IGNORE_PAT;
        raw |= MMU_PRESENT;
        if level > Level::PTE {
            raw |= ept::PAGE_SIZE;
        }
        let is_huge = level > Level::PTE;
        if !(is_huge && self.nx_huge_pages || slot.traps_execution(first)) {
            raw |= EXECUTE;
        }
        if probed == Probed::Writable && !slot.is_read_only() {
            raw |= HOST_WRITABLE;
            if is_huge || !slot.is_tracked(first) {
                raw |= MMU_WRITABLE;
                let is_protected = slot.logs_dirty() && self.write_protects && !access.is_write;
                raw |= if is_protected { 0 } else { ept::WRITE };
            }
        }
        if self.accessed_dirty {
            raw |= ept::ACCESSED;
            // Without a log, setting the flag now spares the processor a walk later.
            raw |= if access.is_write || !slot.logs_dirty() {
                ept::DIRTY
            } else {
                0
            };
        }
        Spte(raw)
    }
}

impl Spte {
    /// Whether a present leaf lets the processor do the access as it stands.
    pub(crate) fn allows(self, access: LeafAccess) -> bool {
        let mut needed = ept::READ;
        needed |= if access.is_write { ept::WRITE } else { 0 };
        needed |= if access.is_fetch { ept::EXECUTE } else { 0 };
        self.0 & needed == needed
    }

    /// Whether it is a leaf without hardware rights: aged, waiting for the next access.
    pub(crate) const fn is_aged(self) -> bool {
        self.0 & MMU_PRESENT != 0 && self.0 & RWX == 0
    }

    /// The leaf made inaccessible, its rights kept aside. Write permission is not kept: it comes
    /// back through the same doors as for any leaf.
    pub(crate) fn aged(self) -> Spte {
        let saved = (self.0 & (ept::READ | ept::EXECUTE)) << SAVED_SHIFT;
        Spte(self.0 & !(RWX | SAVED) | saved)
    }

    /// An aged leaf made accessible again.
    pub(crate) fn restored(self) -> Spte {
        let rights = (self.0 & SAVED) >> SAVED_SHIFT;
        let user = if rights & ept::EXECUTE != 0 {
            ept::EXECUTE_USER
        } else {
            0
        };
        Spte(self.0 & !SAVED | rights | user)
    }

    /// Whether write permission may be given back without the lock.
    pub(crate) const fn may_become_writable(self) -> bool {
        let both = HOST_WRITABLE | MMU_WRITABLE;
        self.0 & both == both
    }

    /// The leaf with write permission, dirty.
    pub(crate) const fn made_writable(self) -> Spte {
        Spte(self.0 | ept::WRITE | ept::DIRTY)
    }

    /// The leaf without write permission; the fast path may give it back.
    pub(crate) const fn write_protected(self) -> Spte {
        Spte(self.0 & !ept::WRITE)
    }

    /// The leaf without execute permission.
    pub(crate) const fn execute_protected(self) -> Spte {
        Spte(self.0 & !(EXECUTE | ept::EXECUTE << SAVED_SHIFT))
    }

    /// The leaf without write permission; only a fault under the lock gives it back.
    pub(crate) const fn write_tracked(self) -> Spte {
        Spte(self.0 & !(ept::WRITE | MMU_WRITABLE))
    }

    /// The leaf, clean.
    pub(crate) const fn cleaned(self) -> Spte {
        Spte(self.0 & !ept::DIRTY)
    }

    /// The leaf, not accessed.
    pub(crate) const fn unaccessed(self) -> Spte {
        Spte(self.0 & !ept::ACCESSED)
    }

    pub(crate) const fn is_accessed(self) -> bool {
        self.0 & ept::ACCESSED != 0
    }

    /// This entry as replacement of `old`, which maps the same frame: what the guest was already
    /// allowed and what the processor has recorded is not taken back.
    pub(crate) fn taking_over(self, old: Spte) -> Spte {
        let write = if self.may_become_writable() {
            old.0 & ept::WRITE
        } else {
            0
        };
        Spte(self.0 | write | old.0 & (ept::ACCESSED | ept::DIRTY))
    }

    /// The entry for the `index`th part of a huge leaf at `level`, one level down.
    ///
    /// With `executable_parts` (the huge page is not executable because it is huge) the parts are.
    pub(crate) fn part(self, level: Level, index: u64, executable_parts: bool) -> Spte {
        let Some(below) = level.below() else {
            return self;
        };
        let mut raw = self.0 + (index << (PAGE_SHIFT + 9 * (below.number() as u32 - 1)));
        if below == Level::PTE {
            raw &= !ept::PAGE_SIZE;
            if executable_parts && raw & RWX != 0 {
                raw |= EXECUTE;
            } else if executable_parts {
                raw |= ept::EXECUTE << SAVED_SHIFT;
            }
        }
        Spte(raw)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memslot::{AddressSpace, SlotFlags, SlotId};
    use arch::addr::Hva;

    fn slot(flags: SlotFlags) -> Memslot {
        let id = SlotId {
            space: AddressSpace::Normal,
            number: 0,
        };
        Memslot::new(id, Gfn::new(0x200), 0x400, Hva::new(0x4000_0000), flags)
    }

    const WRITE: LeafAccess = LeafAccess {
        is_write: true,
        is_fetch: false,
    };
    const READ: LeafAccess = LeafAccess {
        is_write: false,
        is_fetch: false,
    };

    fn leaf(config: Config, slot: &Memslot, level: Level, access: LeafAccess) -> Spte {
        LeafPolicy::new(&config).leaf(slot, Gfn::new(0x201), level, Probed::Writable, access)
    }

    #[test]
    fn a_plain_leaf_has_all_rights() {
        let spte = leaf(
            Config::default(),
            &slot(SlotFlags::empty()),
            Level::PTE,
            READ,
        );
        assert_eq!(spte.pfn().hva(), Hva::new(0x4000_1000));
        assert!(spte.is_writable() && spte.is_executable() && spte.is_dirty());
        assert!(spte.is_leaf(Level::PTE) && !spte.is_table(Level::PTE));
    }

    #[test]
    fn a_logged_leaf_becomes_writable_by_a_write_only() {
        let slot = slot(SlotFlags::LOG_DIRTY_PAGES);
        let read = leaf(Config::default(), &slot, Level::PTE, READ);
        assert!(!read.is_writable() && read.may_become_writable() && !read.is_dirty());
        assert!(leaf(Config::default(), &slot, Level::PTE, WRITE).is_writable());
        let by_flags = Config {
            dirty_method: DirtyMethod::DirtyFlags,
            ..Config::default()
        };
        let read = leaf(by_flags, &slot, Level::PTE, READ);
        assert!(read.is_writable() && !read.is_dirty());
    }

    #[test]
    fn read_only_tracked_and_trapped_pages() {
        let read_only = leaf(
            Config::default(),
            &slot(SlotFlags::READONLY),
            Level::PTE,
            READ,
        );
        assert!(!read_only.is_writable() && !read_only.may_become_writable());
        let slot = slot(SlotFlags::empty());
        slot.track(Gfn::new(0x201));
        slot.set_execution_trap(Gfn::new(0x201), true);
        let spte = leaf(Config::default(), &slot, Level::PTE, READ);
        assert!(!spte.is_writable() && !spte.may_become_writable() && !spte.is_executable());
    }

    #[test]
    fn ageing_and_back() {
        let spte = leaf(
            Config::default(),
            &slot(SlotFlags::empty()),
            Level::PTE,
            READ,
        );
        let aged = spte.aged();
        assert!(aged.is_aged() && aged.is_present() && !aged.allows(READ));
        assert_eq!(aged.restored().made_writable(), spte);
    }

    #[test]
    fn parts_of_a_huge_page() {
        let config = Config {
            nx_huge_pages: true,
            ..Config::default()
        };
        let huge = leaf(config, &slot(SlotFlags::empty()), Level::PDE, WRITE);
        assert!(huge.is_leaf(Level::PDE) && !huge.is_executable());
        let part = huge.part(Level::PDE, 3, true);
        assert!(part.is_executable() && part.is_writable());
        assert_eq!(part.pfn().hva(), Hva::new(0x4000_3000));
        assert_eq!(part.raw() & ept::PAGE_SIZE, 0);
    }
}

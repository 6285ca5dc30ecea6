//! Walking over a range of frames under the exclusive lock.

use super::table::{Cell, ENTRIES, TablePage};
use crate::config::DirtyMethod;
use crate::memslot::{AddressSpace, Memslot};
use crate::mmu::{Exclusive, Mmu, Owed};
use crate::spte::Spte;
use arch::addr::Gfn;
use arch::paging::Level;
use std::ops::Range;

/// A leaf (or MMIO entry) that a visit came by.
pub(crate) struct Leaf<'a> {
    pub(crate) cell: &'a Cell,
    pub(crate) entry: Spte,
    pub(crate) level: Level,
    /// The first frame of its block, which may lie before the range visited.
    pub(crate) first: Gfn,
}

/// The entries of a table, whose first frame is `base`, that overlap the range.
fn overlap(base: Gfn, level: Level, range: &Range<Gfn>) -> Range<usize> {
    let span = level.pages();
    let end = base.get() + span * ENTRIES as u64;
    let (from, to) = (range.start.get().max(base.get()), range.end.get().min(end));
    if from >= to {
        return 0..0;
    }
    ((from - base.get()) / span) as usize..((to - base.get()).div_ceil(span)) as usize
}

fn visit(
    table: &TablePage,
    level: Level,
    base: Gfn,
    range: &Range<Gfn>,
    found: &mut impl FnMut(Leaf<'_>),
) {
    for index in overlap(base, level, range) {
        let first = base.wrapping_add(index as u64 * level.pages());
        let cell = &table.cells()[index];
        let entry = cell.load();
        match level.below() {
            Some(below) if entry.is_table(level) => {
                // SAFETY: a table entry of `table`, under the exclusive lock.
                visit(unsafe { table.child(entry) }, below, first, range, found);
            }
            _ if entry != Spte::EMPTY => found(Leaf {
                cell,
                entry,
                level,
                first,
            }),
            _ => {}
        }
    }
}

/// Empties the range. Tables that lie in it whole are unlinked whole.
fn zap(
    table: &TablePage,
    level: Level,
    base: Gfn,
    range: &Range<Gfn>,
    removed: &mut impl FnMut(Spte, Level, Gfn),
) {
    for index in overlap(base, level, range) {
        let first = base.wrapping_add(index as u64 * level.pages());
        let cell = &table.cells()[index];
        let entry = cell.load();
        if entry == Spte::EMPTY {
            continue;
        }
        let is_covered = first >= range.start && first.wrapping_add(level.pages()) <= range.end;
        match level.below() {
            Some(below) if entry.is_table(level) && !is_covered => {
                // SAFETY: a table entry of `table`, under the exclusive lock.
                zap(unsafe { table.child(entry) }, below, first, range, removed);
            }
            _ => removed(cell.swap(Spte::EMPTY), level, first),
        }
    }
}

impl Mmu {
    /// Calls `found` for every leaf and MMIO entry that overlaps the range.
    pub(crate) fn for_each_leaf(
        &self,
        exclusive: &Exclusive<'_>,
        space: AddressSpace,
        range: &Range<Gfn>,
        mut found: impl FnMut(Leaf<'_>),
    ) {
        let Some(root) = self.current_root(space) else {
            return;
        };
        let Some(table) = root.table(exclusive) else {
            return;
        };
        visit(table, root.level(), Gfn::new(0), range, &mut found);
    }

    /// Empties the range.
    pub(crate) fn zap_range(
        &self,
        exclusive: &Exclusive<'_>,
        space: AddressSpace,
        range: &Range<Gfn>,
        owed: &mut Owed,
    ) {
        self.shadow_zap_range(exclusive, space, range);
        let Some(root) = self.current_root(space) else {
            return;
        };
        let Some(table) = root.table(exclusive) else {
            return;
        };
        zap(
            table,
            root.level(),
            Gfn::new(0),
            range,
            &mut |old, level, first| {
                self.count_zapped(old, level);
                if old.is_table(level) {
                    owed.retire(space, old, level, first);
                } else if old.is_leaf(level) {
                    self.leaf_removed(space, old, level, first);
                    owed.flush_range(first..first.wrapping_add(level.pages()));
                }
            },
        );
    }

    fn count_zapped(&self, old: Spte, level: Level) {
        if old.is_mmio() {
            self.counters.mmio_zapped.add(1);
        } else if old.is_table(level) {
            self.counters.table_unlinked.add(1);
        } else {
            self.counters.leaf_zapped.add(1);
        }
    }

    /// Keeps what a removed leaf knew: where the log is collected from dirty flags, its flag.
    pub(crate) fn leaf_removed(&self, space: AddressSpace, old: Spte, level: Level, first: Gfn) {
        if self.config.dirty_method == DirtyMethod::WriteProtect || !old.is_dirty() {
            return;
        }
        let slots = self.slots();
        for gfn in (0..level.pages()).map(|n| first.wrapping_add(n)) {
            if let Some(slot) = slots.find(space, gfn).filter(|slot| slot.logs_dirty()) {
                self.mark_slot_dirty(slot, gfn);
            }
        }
    }

    /// Makes the next write to every page of the slot be noticed.
    pub(crate) fn protect_slot(
        &self,
        exclusive: &Exclusive<'_>,
        slot: &Memslot,
        huge_only: bool,
        owed: &mut Owed,
    ) {
        if huge_only {
            // Only huge leaves would go; the others are protected page by page.
            self.shadow_zap_range(exclusive, slot.id().space, &slot.gfns());
        } else {
            let range = slot.gfns();
            self.shadow_restrict(
                exclusive,
                slot.id().space,
                &range,
                crate::shadow::Lost::Write,
            );
        }
        self.for_each_leaf(exclusive, slot.id().space, &slot.gfns(), |leaf| {
            if leaf.level > Level::PTE || !huge_only {
                self.protect_leaf(&leaf, slot, owed);
            }
        });
    }

    /// Makes the next write to one page be noticed.
    pub(crate) fn protect_page(
        &self,
        exclusive: &Exclusive<'_>,
        slot: &Memslot,
        gfn: Gfn,
        owed: &mut Owed,
    ) {
        let range = gfn..gfn.wrapping_add(1);
        self.shadow_protect_page(exclusive, slot, gfn);
        self.for_each_leaf(exclusive, slot.id().space, &range, |leaf| {
            self.protect_leaf(&leaf, slot, owed);
        });
    }

    /// A huge leaf is always write-protected: its dirty flag could not name a page. So are, by
    /// method, small ones; otherwise their flag is cleared, and kept in the log if it was set and
    /// the log is made of flags.
    fn protect_leaf(&self, leaf: &Leaf<'_>, slot: &Memslot, owed: &mut Owed) {
        let by_flag =
            leaf.level == Level::PTE && self.config.dirty_method != DirtyMethod::WriteProtect;
        let level = leaf.level;
        let changed = leaf.cell.update(|entry| {
            // A huge leaf's flag says nothing of the pages it will be split into.
            let is_cleaned = by_flag || level > Level::PTE;
            let clean = if is_cleaned { entry.cleaned() } else { entry };
            let new = if by_flag {
                clean
            } else {
                clean.write_protected()
            };
            entry.is_leaf(level).then_some(new)
        });
        if changed.is_some() {
            self.counters.write_protected.add(1);
            let end = leaf.first.wrapping_add(level.pages());
            owed.flush_range(leaf.first.max(slot.gfns().start)..end.min(slot.gfns().end));
        }
    }

    /// Moves the dirty flags of the slot's leaves into its bitmap.
    pub(crate) fn collect_dirty_flags(
        &self,
        exclusive: &Exclusive<'_>,
        slot: &Memslot,
        owed: &mut Owed,
    ) {
        self.for_each_leaf(exclusive, slot.id().space, &slot.gfns(), |leaf| {
            if leaf.level != Level::PTE {
                return;
            }
            let cleaned = leaf
                .cell
                .update(|entry| entry.is_leaf(Level::PTE).then_some(entry.cleaned()));
            if cleaned.is_some() {
                self.mark_slot_dirty(slot, leaf.first);
                owed.flush_range(leaf.first..leaf.first.wrapping_add(1));
            }
        });
    }

    /// Splits the slot's huge leaves, as far as tables are to be had: what is not split now is
    /// split by the first write.
    pub(crate) fn split_slot(&self, exclusive: &Exclusive<'_>, slot: &Memslot) {
        for level in [Level::PDPTE, Level::PDE] {
            self.for_each_leaf(exclusive, slot.id().space, &slot.gfns(), |leaf| {
                if leaf.level == level && leaf.entry.is_leaf(level) {
                    self.split_leaf(&leaf);
                }
            });
        }
    }

    fn split_leaf(&self, leaf: &Leaf<'_>) {
        let Some(fresh) = self.pool.allocate() else {
            return;
        };
        let executable = self.config.nx_huge_pages;
        loop {
            let old = leaf.cell.load();
            fresh
                .page()
                .fill(|index| old.part(leaf.level, index, executable));
            // A processor may set flags meanwhile: they must go into the parts.
            if leaf
                .cell
                .exchange(old, Spte::table(fresh.page().address()))
                .is_ok()
            {
                self.counters.huge_split.add(1);
                return;
            }
        }
    }

    /// Unlinks the tables that stand where huge leaves could.
    pub(crate) fn unlink_collapsible(
        &self,
        exclusive: &Exclusive<'_>,
        slot: &Memslot,
        owed: &mut Owed,
    ) {
        self.shadow_zap_range(exclusive, slot.id().space, &slot.gfns());
        let span = Level::PDE.pages();
        let mut gfn = slot.gfns().start.align_down(span);
        while gfn < slot.gfns().end {
            let end = gfn.wrapping_add(span);
            let first = gfn.max(slot.gfns().start);
            if slot.max_level(first, self.config.max_level, false) > Level::PTE {
                self.unlink_table(exclusive, slot.id().space, first, Level::PDE, owed);
            }
            gfn = end;
        }
    }

    /// Unlinks the table below the entry for `gfn` at `level`, if one is there; true if so.
    pub(crate) fn unlink_table(
        &self,
        exclusive: &Exclusive<'_>,
        space: AddressSpace,
        gfn: Gfn,
        level: Level,
        owed: &mut Owed,
    ) -> bool {
        let Some(root) = self.current_root(space) else {
            return false;
        };
        let Some(mut table) = root.table(exclusive) else {
            return false;
        };
        let mut at = root.level();
        loop {
            let cell = table.cell(gfn, at);
            let entry = cell.load();
            if !entry.is_table(at) {
                return false;
            }
            if at == level {
                let old = cell.swap(Spte::EMPTY);
                self.count_zapped(old, level);
                owed.retire(space, old, level, gfn.align_down(level.pages()));
                return true;
            }
            // SAFETY: a table entry of `table`, under the exclusive lock.
            table = unsafe { table.child(entry) };
            let Some(below) = at.below() else {
                return false;
            };
            at = below;
        }
    }
}

//! Taking tables apart after everybody has let go.

use super::root::Root;
use super::table::{OwnedTable, TablePage};
use crate::config::DirtyMethod;
use crate::gate::Flush;
use crate::memslot::AddressSpace;
use crate::mmu::{Exclusive, Mmu, Owed};
use crate::spte::Spte;
use crate::sync::{self, Mutant, is_mutant};
use arch::addr::{Gfn, Hva};
use arch::paging::Level;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

/// A table that was unlinked and waits to be taken apart.
#[derive(Debug)]
pub(crate) struct Retired {
    pub(crate) space: AddressSpace,
    pub(crate) address: Hva,
    /// The level of its own entries.
    pub(crate) level: Level,
    /// Its first frame.
    pub(crate) first: Gfn,
    /// Its entries were frozen and what they pointed to is retired on its own.
    is_frozen: bool,
}

impl Retired {
    /// The table below an `entry` at `level` that covers the frames from `first` on.
    pub(crate) fn below(
        space: AddressSpace,
        entry: Spte,
        level: Level,
        first: Gfn,
    ) -> Option<Self> {
        Some(Self {
            space,
            address: entry.table_address(),
            level: level.below()?,
            first,
            is_frozen: false,
        })
    }
}

impl Mmu {
    /// Freezes and hands over the table that a huge leaf has replaced, under the shared lock.
    ///
    /// Other threads may be inside it, about to link a table or set a leaf: freezing each entry
    /// makes their compare-exchange fail, so that nothing is built into a dying table and lost.
    pub(crate) fn retire_replaced(&self, space: AddressSpace, old: Spte, level: Level, gfn: Gfn) {
        if let Some(retired) = Retired::below(space, old, level, gfn.align_down(level.pages())) {
            self.freeze(retired);
        }
        self.has_retired.store(1, SeqCst);
    }

    fn freeze(&self, mut retired: Retired) {
        let table: *const TablePage =
            std::ptr::with_exposed_provenance(retired.address.get() as usize);
        // SAFETY: unlinked by this thread under the shared lock, which it still holds; it is freed
        // under the exclusive lock at the earliest.
        let table = unsafe { &*table };
        for (index, cell) in table.cells().iter().enumerate() {
            let old = if is_mutant(Mutant::NoFreeze) {
                cell.load()
            } else {
                cell.swap(Spte::FROZEN)
            };
            let first = retired
                .first
                .wrapping_add(index as u64 * retired.level.pages());
            if old.is_table(retired.level) {
                if let Some(child) = Retired::below(retired.space, old, retired.level, first) {
                    self.freeze(child);
                }
            } else if old.is_leaf(retired.level) {
                self.leaf_removed(retired.space, old, retired.level, first);
            }
        }
        retired.is_frozen = true;
        sync::lock(&self.retired).push(retired);
    }

    /// Frees what was retired under the shared lock. The caller holds no lock.
    #[inline]
    pub(crate) fn drain_retired(&self) {
        if self.has_retired.load(SeqCst) == 0 {
            return;
        }
        let exclusive = self.exclusive();
        self.finish(exclusive, Owed::default());
    }

    /// Pays what a change under the exclusive lock owes: the flush goes round before the lock is
    /// dropped, so that nobody who finds an entry already changed takes that for done, and then the
    /// unlinked tables are freed. That includes tables retired under the shared lock.
    pub(crate) fn finish(&self, exclusive: Exclusive<'_>, owed: Owed) {
        self.shadow_flush(&exclusive);
        let Owed {
            mut flush,
            mut tables,
        } = owed;
        if self.has_retired.swap(0, SeqCst) != 0 {
            flush = Some(Flush::All);
            tables.append(&mut sync::lock(&self.retired));
        }
        if let Some(flush) = flush {
            self.flush(&flush);
        }
        for retired in tables {
            self.take_apart(&retired);
        }
        drop(exclusive);
    }

    /// Frees a table and everything below it.
    fn take_apart(&self, retired: &Retired) {
        // SAFETY: it was unlinked; since then the exclusive lock was held and a flush went round,
        // so no thread and no processor has a way into it.
        let table = unsafe { OwnedTable::from_address(retired.address) };
        if !retired.is_frozen {
            self.empty(table.page(), retired.space, retired.level, retired.first);
        }
        self.counters.table_freed.add(1);
        self.pool.free(table);
    }

    fn empty(&self, table: &TablePage, space: AddressSpace, level: Level, base: Gfn) {
        for (index, cell) in table.cells().iter().enumerate() {
            let old = cell.take_private();
            let first = base.wrapping_add(index as u64 * level.pages());
            if old.is_table(level) {
                if let Some(child) = Retired::below(space, old, level, first) {
                    self.take_apart(&child);
                }
            } else if old.is_leaf(level) {
                self.leaf_removed(space, old, level, first);
            }
        }
    }

    /// Drops every translation: the roots are made invalid at once, processors load others at
    /// their next entry, and the old tables are taken apart afterwards, without the lock.
    ///
    /// The flush must be over before the lock is dropped. Otherwise:
    ///
    /// ```text
    ///   here                        reader of the log              vCPU, in guest mode
    ///   takes the roots away
    ///                               takes bits, finds no root to
    ///                               protect, owes no flush
    ///                                                              writes by its old translation
    ///   flush
    /// ```
    pub fn zap_all(&self) {
        tracing::debug!("all roots made invalid");
        self.counters.zap_all.add(1);
        let exclusive = self.exclusive();
        self.shadow_zap_all(&exclusive);
        let roots: Vec<Arc<Root>> = sync::lock(&self.roots)
            .iter_mut()
            .filter_map(Option::take)
            .collect();
        for root in &roots {
            root.invalidate();
        }
        let exclusive = if is_mutant(Mutant::ZapAllUnlocked) {
            drop(exclusive);
            self.flush(&Flush::All);
            None
        } else {
            self.flush(&Flush::All);
            // Dirty flags must be in the log before anybody reads it again.
            let is_needed = self.config.dirty_method != DirtyMethod::WriteProtect;
            is_needed.then_some(exclusive)
        };
        for root in roots {
            self.empty(root.dead_table(), root.space(), root.level(), Gfn::new(0));
        }
        drop(exclusive);
    }

    /// Makes room at the table limit: unlinks last-level tables, going round the address spaces,
    /// so that those scanned longest ago go first. What they mapped faults in again.
    pub(crate) fn reclaim_tables(&self, count: usize) {
        let exclusive = self.exclusive();
        let mut owed = Owed::default();
        let hand = Gfn::new(self.reclaim_hand.load(Relaxed));
        for from in [hand, Gfn::new(0)] {
            for space in AddressSpace::ALL {
                self.unlink_from(&exclusive, space, from, count, &mut owed);
            }
        }
        self.counters.table_reclaimed.add(owed.tables.len() as u64);
        let has_found = !owed.tables.is_empty();
        tracing::debug!(
            tables = owed.tables.len(),
            "table limit reached: reclaiming"
        );
        self.finish(exclusive, owed);
        if !has_found {
            // Upper tables only: rare, and rebuilt quickly.
            self.zap_all();
        }
    }

    fn unlink_from(
        &self,
        exclusive: &Exclusive<'_>,
        space: AddressSpace,
        from: Gfn,
        count: usize,
        owed: &mut Owed,
    ) {
        let Some(root) = self.current_root(space) else {
            return;
        };
        let Some(table) = root.table(exclusive) else {
            return;
        };
        let mut victims = Vec::new();
        collect_last_level(table, root.level(), Gfn::new(0), from, count, &mut victims);
        for gfn in victims {
            if owed.tables.len() < count {
                self.unlink_table(exclusive, space, gfn, Level::PDE, owed);
                self.reclaim_hand
                    .store(gfn.get() + Level::PDE.pages(), Relaxed);
            }
        }
    }
}

/// The first frames of up to `count` last-level tables at or after `from`.
fn collect_last_level(
    table: &TablePage,
    level: Level,
    base: Gfn,
    from: Gfn,
    count: usize,
    found: &mut Vec<Gfn>,
) {
    for (index, cell) in table.cells().iter().enumerate() {
        let first = base.wrapping_add(index as u64 * level.pages());
        let entry = cell.load();
        let is_before = first.wrapping_add(level.pages()) <= from;
        if found.len() >= count {
            return;
        }
        if is_before || !entry.is_table(level) {
            continue;
        }
        match level.below() {
            Some(below) if level > Level::PDE => {
                // SAFETY: a table entry of `table`, under the exclusive lock.
                collect_last_level(
                    unsafe { table.child(entry) },
                    below,
                    first,
                    from,
                    count,
                    found,
                );
            }
            _ => found.push(first),
        }
    }
}

//! Building a translation under the shared lock.
//!
//! ```text
//!   vCPU A                                  vCPU B
//!   reads an empty entry                    reads the same empty entry
//!   links its table by compare-exchange     fails: takes what A linked, its own table goes back
//! ```
//!
//! Any entry may change between the read and the exchange; the exchange then fails, and the loop
//! reads again. An entry found frozen lies in a table that is being torn down: the fault is given up
//! and comes again, when the new structure stands.

use super::root::Root;
use super::table::{Cell, NX_SPLIT, TableCache, TablePage, mark_word};
use crate::fault::FaultResult;
use crate::memslot::{Memslot, Probed};
use crate::mmu::{Mmu, Shared};
use crate::spte::{LeafAccess, Spte};
use crate::stats::Counters;
use crate::sync::{Mutant, is_mutant};
use arch::addr::Gfn;
use arch::paging::Level;
use std::sync::atomic::Ordering::Relaxed;

/// One translation to be built.
pub(crate) struct MapRequest<'a> {
    pub(crate) root: &'a Root,
    pub(crate) slot: &'a Memslot,
    pub(crate) gfn: Gfn,
    pub(crate) access: LeafAccess,
    /// The level to map at, as far as slot and host memory go.
    pub(crate) goal: Level,
    /// What is known of the host memory of the block at `goal`.
    pub(crate) probed: Probed,
}

/// What stands where an entry is to be placed.
struct Place<'a> {
    table: &'a TablePage,
    cell: &'a Cell,
    level: Level,
    old: Spte,
}

impl Mmu {
    /// Maps a page for a fault. The caller holds the lock and has found the fault not stale.
    pub(crate) fn map(
        &self,
        shared: &Shared<'_>,
        cache: &mut TableCache,
        counters: &Counters,
        request: &MapRequest<'_>,
    ) -> FaultResult {
        let is_huge_refused = self.config.nx_huge_pages && request.access.is_fetch;
        let goal = if is_huge_refused {
            Level::PTE
        } else {
            request.goal
        };
        let Some(root) = request.root.table(shared) else {
            return FaultResult::Retry;
        };
        match self.descend(root, cache, counters, request, goal) {
            Some(place) => self.place_leaf(&place, counters, request),
            None => {
                counters.map_lost.bump();
                FaultResult::Retry
            }
        }
    }

    /// Finds the entry at the goal level, linking and splitting on the way; `None` where another
    /// thread is tearing down.
    fn descend<'a>(
        &self,
        root: &'a TablePage,
        cache: &mut TableCache,
        counters: &Counters,
        request: &MapRequest<'_>,
        mut goal: Level,
    ) -> Option<Place<'a>> {
        let (mut table, mut level) = (root, request.root.level());
        let mut cell = table.cell(request.gfn, level);
        let mut old = cell.load();
        loop {
            if old.is_frozen() {
                return None;
            }
            if level == goal && !(old.is_table(level) && is_nx_split(old)) {
                return Some(Place {
                    table,
                    cell,
                    level,
                    old,
                });
            }
            // A table that stands there because of fetches stays until it is recovered.
            let below = level.below()?;
            goal = goal.min(below);
            if !old.is_table(level) {
                match self.link(cell, old, level, cache, counters, request) {
                    Ok(linked) => old = linked,
                    Err(now) => {
                        old = now?;
                        continue;
                    }
                }
            }
            // SAFETY: `old` is a table entry of `table`, read or linked under the shared lock.
            table = unsafe { table.child(old) };
            level = below;
            cell = table.cell(request.gfn, level);
            old = cell.load();
        }
    }

    /// Puts a table below an entry that has none: an empty one, or one that splits a huge page. On
    /// failure gives what now stands there, or `None` without a table to link.
    fn link(
        &self,
        cell: &Cell,
        old: Spte,
        level: Level,
        cache: &mut TableCache,
        counters: &Counters,
        request: &MapRequest<'_>,
    ) -> Result<Spte, Option<Spte>> {
        let fresh = cache.take().ok_or(None)?;
        let is_split = old.is_leaf(level);
        if is_split {
            let executable = self.config.nx_huge_pages;
            fresh
                .page()
                .fill(|index| old.part(level, index, executable));
        }
        let new = Spte::table(fresh.page().address());
        let is_nx = self.config.nx_huge_pages && request.access.is_fetch && level <= request.goal;
        if is_nx {
            mark_word(fresh.page().address()).fetch_or(NX_SPLIT, Relaxed);
        }
        if let Err(now) = cell.exchange(old, new) {
            mark_word(fresh.page().address()).store(0, Relaxed);
            cache.put_back(fresh);
            counters.link_lost.bump();
            return Err(Some(now));
        }
        if is_split {
            counters.huge_split.bump();
        }
        if is_nx {
            self.note_nx_split(request.root.space(), request.gfn, level);
        }
        counters.table_linked.bump();
        Ok(new)
    }

    fn place_leaf(
        &self,
        place: &Place<'_>,
        counters: &Counters,
        request: &MapRequest<'_>,
    ) -> FaultResult {
        let Place {
            cell, level, old, ..
        } = *place;
        let MapRequest {
            slot, gfn, access, ..
        } = *request;
        let mut new = self.policy.leaf(slot, gfn, level, request.probed, access);
        if old.is_leaf(level) {
            if old.allows(access) {
                counters.spurious.bump();
                return FaultResult::Spurious;
            }
            debug_assert_eq!(
                old.pfn(),
                new.pfn(),
                "host memory moved without invalidation"
            );
            new = new.taking_over(old);
        }
        if !new.allows(access) {
            // Write tracking or a trap came between the first look at the slot and the lock.
            counters.map_lost.bump();
            return FaultResult::Retry;
        }
        if access.is_write {
            // Before the entry is writable, and under the lock that readers of the log take
            // exclusively: no write can be visible to one of them and not in its log.
            self.mark_slot_dirty(slot, gfn);
        }
        if is_mutant(Mutant::BlindMap) {
            cell.swap(new);
        } else if cell.exchange(old, new).is_err() {
            counters.map_lost.bump();
            return FaultResult::Retry;
        }
        if old.is_table(level) {
            self.retire_replaced(request.root.space(), old, level, gfn);
            counters.huge_formed.bump();
        }
        count_level(counters, level);
        if level == Level::PTE {
            self.prefetch(place.table, counters, request);
        }
        FaultResult::Fixed
    }

    /// Maps the neighbours of a page whose entries are empty, as if they had been read.
    fn prefetch(&self, table: &TablePage, counters: &Counters, request: &MapRequest<'_>) {
        let count = u64::from(self.config.prefetch) + 1;
        let first = request.gfn.align_down(count);
        for gfn in (0..count).map(|n| first.wrapping_add(n)) {
            if gfn == request.gfn || !request.slot.contains(gfn) {
                continue;
            }
            let cell = table.cell(gfn, Level::PTE);
            let probed = request.slot.probed(gfn);
            if probed == Probed::Unknown || cell.load() != Spte::EMPTY {
                continue;
            }
            let access = LeafAccess::default();
            let leaf = self
                .policy
                .leaf(request.slot, gfn, Level::PTE, probed, access);
            if cell.exchange(Spte::EMPTY, leaf).is_ok() {
                counters.prefetched.bump();
            }
        }
    }

    /// Puts an MMIO entry in the place of a frame that has no memory. False if that failed for
    /// reasons that another try may not find.
    pub(crate) fn map_mmio(
        &self,
        shared: &Shared<'_>,
        cache: &mut TableCache,
        counters: &Counters,
        (root, gfn): (&Root, Gfn),
        entry: Spte,
    ) -> bool {
        let Some(table) = root.table(shared) else {
            return false;
        };
        let (mut table, mut level) = (table, root.level());
        loop {
            let cell = table.cell(gfn, level);
            let old = cell.load();
            if old.is_frozen() || old.is_leaf(level) {
                // A leaf where no memory is will be gone when its zap has come round.
                return false;
            }
            let Some(below) = level.below() else {
                let is_there = old == entry || cell.exchange(old, entry).is_ok();
                if is_there {
                    counters.mmio_mapped.bump();
                }
                return is_there;
            };
            let mut next = old;
            if !old.is_table(level) {
                let Some(fresh) = cache.take() else {
                    return false;
                };
                next = Spte::table(fresh.page().address());
                if cell.exchange(old, next).is_err() {
                    cache.put_back(fresh);
                    counters.link_lost.bump();
                    continue;
                }
                counters.table_linked.bump();
            }
            // SAFETY: `next` is a table entry of `table`, read or linked under the shared lock.
            table = unsafe { table.child(next) };
            level = below;
        }
    }
}

fn is_nx_split(entry: Spte) -> bool {
    mark_word(entry.table_address()).load(Relaxed) & NX_SPLIT != 0
}

fn count_level(counters: &Counters, level: Level) {
    match level {
        Level::PTE => counters.mapped_4k.bump(),
        Level::PDE => counters.mapped_2m.bump(),
        _ => counters.mapped_1g.bump(),
    }
}

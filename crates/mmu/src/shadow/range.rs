//! What the rest of the MMU does to frames: the counterparts of `tdp::range`.

use super::page::{Place, State};
use crate::memslot::{AddressSpace, Memslot};
use crate::mmu::{Exclusive, Mmu};
use crate::spte::Spte;
use arch::addr::Gfn;
use arch::paging::Level;
use std::ops::Range;
use std::sync::atomic::Ordering::SeqCst;

/// A right to be taken from leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    Write,
    Execute,
}

impl Mmu {
    /// Drops the leaves of the range.
    pub(crate) fn shadow_zap_range(
        &self,
        exclusive: &Exclusive<'_>,
        space: AddressSpace,
        range: &Range<Gfn>,
    ) {
        if !self.has_shadow_pages() {
            return;
        }
        let state = &mut *self.shadow.state(exclusive);
        for place in state.leaves_in(space, range) {
            state.clear(place);
            self.counters.leaf_zapped.add(1);
        }
        self.flush_stale(state);
    }

    /// Takes every shadow page away.
    pub(crate) fn shadow_zap_all(&self, exclusive: &Exclusive<'_>) {
        if !self.has_shadow_pages() {
            return;
        }
        let state = &mut *self.shadow.state(exclusive);
        for id in state.all() {
            self.zap_page(state, id);
        }
        self.flush_stale(state);
    }

    /// Takes a right from the leaves of the range; huge ones go altogether. Flushes.
    pub(crate) fn shadow_restrict(
        &self,
        exclusive: &Exclusive<'_>,
        space: AddressSpace,
        range: &Range<Gfn>,
        lost: Lost,
    ) {
        if !self.has_shadow_pages() {
            return;
        }
        let state = &mut *self.shadow.state(exclusive);
        for place in state.leaves_in(space, range) {
            self.restrict_leaf(state, place, lost);
        }
        self.flush_stale(state);
    }

    fn restrict_leaf(&self, state: &mut State, place: Place, lost: Lost) {
        let page = state.page(place.page);
        if page.role.level > Level::PTE {
            state.clear(place);
            return;
        }
        let has_changed = page.change(place.index.into(), |entry| match lost {
            Lost::Write => entry.write_protected(),
            Lost::Execute => entry.execute_protected(),
        });
        state.is_stale |= has_changed;
    }

    /// Write-protects one page for the dirty log.
    pub(crate) fn shadow_protect_page(&self, exclusive: &Exclusive<'_>, slot: &Memslot, gfn: Gfn) {
        if self.has_shadow_pages() {
            let state = &mut *self.shadow.state(exclusive);
            self.take_writes(state, slot.id().space, gfn);
        }
    }

    /// Owed flushes of what was protected.
    pub(crate) fn shadow_flush(&self, exclusive: &Exclusive<'_>) {
        if self.has_shadow_pages() {
            self.flush_stale(&mut self.shadow.state(exclusive));
        }
    }

    /// Takes write permission of a frame from every leaf; the flush is owed.
    pub(super) fn take_writes(&self, state: &mut State, space: AddressSpace, gfn: Gfn) {
        for level in [Level::PTE, Level::PDE, Level::PDPTE] {
            for place in state.leaves(space, gfn.align_down(level.pages()), level) {
                self.restrict_leaf(state, place, Lost::Write);
                self.counters.write_protected.add(1);
            }
        }
    }

    /// Makes sure that no processor can write a table any more.
    pub(super) fn protect_table(
        &self,
        exclusive: &Exclusive<'_>,
        state: &mut State,
        space: AddressSpace,
        gfn: Gfn,
    ) {
        self.take_table_writes(exclusive, state, space, gfn);
        self.flush_stale(state);
    }

    /// Takes write permission of a table from every leaf, wherever it is; the flush is owed.
    pub(super) fn take_table_writes(
        &self,
        exclusive: &Exclusive<'_>,
        state: &mut State,
        space: AddressSpace,
        gfn: Gfn,
    ) {
        self.take_writes(state, space, gfn);
        if self.config.shadow {
            return;
        }
        // The hypervisor whose nested EPT this is has the table in its own EPT.
        let range = gfn..gfn.wrapping_add(1);
        self.for_each_leaf(exclusive, space, &range, |leaf| {
            let changed = leaf.cell.update(|entry| match leaf.level {
                Level::PTE => entry.is_leaf(Level::PTE).then(|| entry.write_tracked()),
                _ => Some(Spte::EMPTY),
            });
            state.is_stale |= changed.is_some();
        });
    }

    /// Whether there may be shadow pages: without EPT always, else from the first nested EPT on.
    pub(crate) fn has_shadow_pages(&self) -> bool {
        self.config.shadow || self.has_nested.load(SeqCst) != 0
    }

    /// Forgets that the range was accessed; whether it had been.
    pub(crate) fn shadow_age(
        &self,
        exclusive: &Exclusive<'_>,
        space: AddressSpace,
        range: &Range<Gfn>,
    ) -> bool {
        if !self.has_shadow_pages() {
            return false;
        }
        let state = self.shadow.state(exclusive);
        let mut was_young = false;
        for place in state.leaves_in(space, range) {
            let page = state.page(place.page);
            if page.change(place.index.into(), super::entry::Entry::unaccessed) {
                self.counters.aged.add(1);
                was_young = true;
            }
        }
        was_young
    }

    /// Whether the range was accessed since it was last aged.
    pub(crate) fn shadow_is_young(
        &self,
        exclusive: &Exclusive<'_>,
        space: AddressSpace,
        range: &Range<Gfn>,
    ) -> bool {
        if !self.has_shadow_pages() {
            return false;
        }
        let state = self.shadow.state(exclusive);
        let places = state.leaves_in(space, range);
        places.iter().any(|place| {
            let page = state.page(place.page);
            page.entry(place.index.into()).is_accessed()
        })
    }
}

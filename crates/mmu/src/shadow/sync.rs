//! Guest writes to shadowed tables.
//!
//! | table | a write to it |
//! | --- | --- |
//! | last level | makes it unsync: writable from then on |
//! | above | is emulated; what the shadow derived from the entry is dropped |
//! | above, written again and again | zaps the shadow page: writable, shadowed again when used |
//!
//! An unsync page is brought up to date, and its guest table write-protected again, when the guest
//! does what flushes a TLB. INVLPG brings one entry up to date.
//!
//! ```text
//!   vCPU A                              vCPU B
//!   writes an entry of an unsync table
//!                                       loads CR3: protects the table, flushes: A is out,
//!   writes another: faults              then reads every entry
//! ```
//!
//! The protection and its flush come before the reading. A write that was not seen comes after the
//! flush, faults, and makes the table unsync again.

use super::entry::Entry;
use super::fault::index_of;
use super::page::{ENTRIES, PageId, Place, State};
use crate::memslot::{AddressSpace, Memslot, Memslots};
use crate::mmu::{Exclusive, Mmu};
use crate::vcpu::Vcpu;
use arch::addr::{Gfn, Gpa, Gva};
use arch::paging::Level;
use std::sync::atomic::Ordering::SeqCst;

/// Emulated writes to a table, none of its entries used in between, after which its shadow goes.
const FLOOD: u8 = 3;

impl Mmu {
    /// Makes the shadow pages of a table unsync, so that the frame may be written. False if it must
    /// stay protected.
    pub(super) fn make_unsync(
        &self,
        state: &mut State,
        space: AddressSpace,
        slot: &Memslot,
        gfn: Gfn,
    ) -> bool {
        let mut pages = state.tables_of(space, gfn);
        pages.retain(|&id| !state.page(id).is_unsync);
        let is_last = |&id: &PageId| state.page(id).role.level == Level::PTE;
        if usize::from(slot.trackers(gfn)) != pages.len() || !pages.iter().all(is_last) {
            return false;
        }
        for id in pages {
            state.page_mut(id).is_unsync = true;
            state.unsync.push(id);
            slot.untrack(gfn);
            self.counters.unsynced.add(1);
        }
        self.has_unsync.store(1, SeqCst);
        true
    }

    /// Brings every unsync page up to date: for CR3 loads and whatever else flushes the TLB. The
    /// processor's own TLB is the caller's.
    pub fn sync_shadow(&self) {
        if self.has_unsync.load(SeqCst) == 0 {
            return;
        }
        let slots = self.slots();
        let exclusive = self.exclusive();
        let state = &mut *self.shadow.state(&exclusive);
        let pages = std::mem::take(&mut state.unsync);
        self.resync(&exclusive, state, &slots, pages);
        self.has_unsync.store(0, SeqCst);
    }

    /// Protects the tables of unsync pages, and then brings the pages up to date.
    fn resync(
        &self,
        exclusive: &Exclusive<'_>,
        state: &mut State,
        slots: &Memslots,
        mut pages: Vec<PageId>,
    ) {
        pages.retain(|&id| state.try_page(id).is_some_and(|page| page.is_unsync));
        for &id in &pages {
            // Named twice, or gone.
            if !state.try_page(id).is_some_and(|page| page.is_unsync) {
                continue;
            }
            let (gfn, space) = (state.page(id).gfn, state.page(id).role.space);
            state.page_mut(id).is_unsync = false;
            let slot = slots.find(space, gfn);
            if slot.and_then(|slot| slot.track(gfn)).is_none() {
                // Not to be counted: gone with its slot.
                state.page_mut(id).is_unsync = true;
                self.zap_page(state, id);
                continue;
            }
            self.take_table_writes(exclusive, state, space, gfn);
        }
        self.flush_stale(state);
        for id in pages {
            if state.try_page(id).is_some() {
                self.sync_page(state, slots, id);
                self.counters.synced.add(1);
            }
        }
    }

    /// Brings unsync pages of one table up to date and protects it.
    pub(super) fn resync_frame(
        &self,
        exclusive: &Exclusive<'_>,
        state: &mut State,
        slots: &Memslots,
        space: AddressSpace,
        gfn: Gfn,
    ) {
        let pages = state.tables_of(space, gfn);
        self.resync(exclusive, state, slots, pages);
    }

    /// Brings a page, or the unsync pages that it leads to, up to date; they stay unsync.
    pub(super) fn sync_below(&self, state: &mut State, slots: &Memslots, id: PageId) {
        if self.has_unsync.load(SeqCst) == 0 {
            return;
        }
        let mut below = state.unsync.clone();
        below.retain(|&page| {
            let is_unsync = state.try_page(page).is_some_and(|page| page.is_unsync);
            is_unsync && state.leads_to(id, page)
        });
        for page in below {
            self.sync_page(state, slots, page);
        }
    }

    /// Compares every entry of a last-level page with the guest's.
    pub(super) fn sync_page(&self, state: &mut State, slots: &Memslots, id: PageId) {
        for index in 0..ENTRIES as u16 {
            self.sync_entry(state, slots, Place { page: id, index });
        }
    }

    fn sync_entry(&self, state: &mut State, slots: &Memslots, at: Place) {
        let old = state.page(at.page).entry(at.index.into());
        if old == Entry::EMPTY {
            return;
        }
        match self.leaf_without_fault(state, slots, at, old) {
            Some((gfn, new))
                if old.is_mmio() || state.page(at.page).leaf_gfn(at.index.into()) == gfn =>
            {
                state.set_leaf(at, gfn, new);
            }
            _ => {
                state.clear(at);
            }
        }
    }

    /// INVLPG: brings the entry for a linear address up to date, in every root that the vCPU knows.
    /// True if the processor has to drop all translations instead of the one: the guest's page may
    /// have been larger than those.
    pub fn invalidate_linear(&self, vcpu: &mut Vcpu, gva: Gva) -> bool {
        if self.has_unsync.load(SeqCst) != 0 {
            self.sync_linear(vcpu, gva);
        }
        let large_drops = self.shadow.large_drops();
        std::mem::replace(&mut vcpu.shadow.large_drops, large_drops) != large_drops
    }

    /// Makes a table writable whatever its shadow pages are, by taking them away: for writes that
    /// cannot be emulated.
    pub fn unprotect_shadow(&self, space: AddressSpace, gfn: Gfn) {
        let exclusive = self.exclusive();
        let state = &mut *self.shadow.state(&exclusive);
        for id in state.tables_of(space, gfn) {
            self.zap_page(state, id);
        }
    }

    fn sync_linear(&self, vcpu: &Vcpu, gva: Gva) {
        let slots = self.slots();
        let exclusive = self.exclusive();
        let state = &mut *self.shadow.state(&exclusive);
        for root in vcpu.shadow.roots() {
            let mut id = root;
            loop {
                let level = state.page(id).role.level;
                let at = Place {
                    page: id,
                    index: index_of(gva.get(), level),
                };
                if level == Level::PTE {
                    if state.page(id).is_unsync {
                        self.sync_entry(state, &slots, at);
                    }
                    break;
                }
                let Some(child) = state.child(at, level) else {
                    break;
                };
                id = child;
            }
        }
    }

    /// A write that KVM makes to a tracked page, for the guest or for itself: what was derived from
    /// the entries goes.
    pub(crate) fn shadow_written(
        &self,
        exclusive: &Exclusive<'_>,
        space: AddressSpace,
        gpa: Gpa,
        length: usize,
    ) {
        if length == 0 {
            return;
        }
        let state = &mut *self.shadow.state(exclusive);
        for id in state.tables_of(space, gpa.gfn()) {
            let page = state.page_mut(id);
            page.writes = page.writes.saturating_add(1);
            let (role, writes) = (page.role, page.writes);
            if writes >= FLOOD {
                self.counters.write_floods.add(1);
                self.zap_page(state, id);
                continue;
            }
            let is_legacy = state.modes.get(role.mode).is_legacy();
            let bytes = if is_legacy { 4 } else { 8 };
            let first = gpa.page_offset() as usize / bytes;
            let last = (gpa.page_offset() as usize + length - 1) / bytes;
            for entry in first..=last {
                for index in places_of(is_legacy, role.level, role.quadrant, entry) {
                    state.clear(Place { page: id, index });
                }
            }
        }
    }
}

/// The entries of a shadow page that derive from entry `entry` of its guest table.
fn places_of(is_legacy: bool, level: Level, quadrant: u8, entry: usize) -> std::ops::Range<u16> {
    if !is_legacy {
        return entry as u16..entry as u16 + 1;
    }
    // A four-byte directory entry spans two shadow entries.
    let (each, part) = if level == Level::PDE {
        (2, 256)
    } else {
        (1, 512)
    };
    let start = usize::from(quadrant) * part;
    if (start..start + part).contains(&entry) {
        let index = ((entry - start) * each) as u16;
        index..index + each as u16
    } else {
        0..0
    }
}

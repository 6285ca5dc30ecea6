//! Host memory that changes under the guest, and its age.
//!
//! ```text
//!   VMM thread                          vCPU
//!                                       notes the sequence
//!   begin: in progress, zap, flush      resolves gfn to host memory
//!   unmaps or remaps its memory         takes the lock: in progress → retry
//!   end: sequence + 1                   takes the lock: sequence changed → retry
//! ```
//!
//! A vCPU that noted the sequence before the invalidation began and takes the lock after it ended
//! sees the sequence changed; one that takes the lock in between sees the range. So nothing that was
//! resolved before is mapped after.

use crate::mmu::{Mmu, Owed};
use arch::addr::{Gfn, Hva};
use std::ops::Range;

/// Host memory being changed; the change is over when this is dropped.
#[must_use = "host memory may be changed only while the guard is held"]
#[derive(Debug)]
pub struct Invalidation<'a> {
    mmu: &'a Mmu,
}

impl Mmu {
    /// Begins a change of host memory: when this returns, no processor reaches the range any more,
    /// and none will until the guard is dropped. Call it before memory behind a slot is unmapped,
    /// remapped or protected; memory that was missing and is there now needs none.
    pub fn invalidate(&self, range: Range<Hva>) -> Invalidation<'_> {
        let exclusive = self.exclusive();
        self.invalidations.begin(&exclusive, &range);
        let mut owed = Owed::default();
        {
            let slots = self.slots();
            for (slot, gfns) in slots.overlapping(range.clone()) {
                slot.forget_probes(&range);
                self.zap_range(&exclusive, slot.id().space, &gfns, &mut owed);
            }
        }
        self.finish(exclusive, owed);
        Invalidation { mmu: self }
    }

    /// Forgets that the range was accessed; whether it had been. Where there are no accessed flags,
    /// entries are made inaccessible until the next access.
    pub fn age(&self, range: Range<Hva>) -> bool {
        let exclusive = self.exclusive();
        let mut owed = Owed::default();
        let mut was_young = false;
        let slots = self.slots();
        for (slot, gfns) in slots.overlapping(range) {
            was_young |= self.shadow_age(&exclusive, slot.id().space, &gfns);
            self.for_each_leaf(&exclusive, slot.id().space, &gfns, |leaf| {
                let level = leaf.level;
                let changed = leaf.cell.update(|entry| {
                    if !entry.is_leaf(level) {
                        None
                    } else if self.policy.accessed_dirty() {
                        Some(entry.unaccessed())
                    } else {
                        (!entry.is_aged()).then(|| entry.aged())
                    }
                });
                if changed.is_some() {
                    was_young = true;
                    self.counters.aged.add(1);
                    // A cached translation whose flag was cleared only ages too early, which is
                    // harmless; one that was made inaccessible must go.
                    if !self.policy.accessed_dirty() {
                        owed.flush_range(leaf.first..leaf.first.wrapping_add(level.pages()));
                    }
                }
            });
        }
        drop(slots);
        self.finish(exclusive, owed);
        was_young
    }

    /// Whether the range was accessed since it was last aged.
    pub fn is_young(&self, range: Range<Hva>) -> bool {
        let exclusive = self.exclusive();
        let slots = self.slots();
        let mut is_young = false;
        for (slot, gfns) in slots.overlapping(range) {
            is_young |= self.shadow_is_young(&exclusive, slot.id().space, &gfns);
            self.for_each_leaf(&exclusive, slot.id().space, &gfns, |leaf| {
                let by_flag = self.policy.accessed_dirty();
                is_young |= leaf.entry.is_leaf(leaf.level)
                    && if by_flag {
                        leaf.entry.is_accessed()
                    } else {
                        !leaf.entry.is_aged()
                    };
            });
        }
        is_young
    }

    /// Drops the translations of a range of frames in every address space.
    pub fn zap_gfns(&self, range: Range<Gfn>) {
        let exclusive = self.exclusive();
        let mut owed = Owed::default();
        for space in crate::memslot::AddressSpace::ALL {
            self.zap_range(&exclusive, space, &range, &mut owed);
        }
        self.finish(exclusive, owed);
    }
}

impl Drop for Invalidation<'_> {
    fn drop(&mut self) {
        let exclusive = self.mmu.exclusive();
        self.mmu.invalidations.end(&exclusive);
    }
}

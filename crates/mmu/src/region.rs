//! Changing memslots while vCPUs run.
//!
//! Deleting or moving a slot takes two snapshots:
//!
//! ```text
//!   1. the slot is marked invalid, the generation "in progress"     faults on it retry
//!      wait for readers of the snapshot before
//!   2. zap the slot's range, flush                                   nobody reaches its memory
//!   3. the final slots, the next generation                          MMIO entries are stale now
//!      wait for readers of the snapshot of step 1
//! ```
//!
//! When the call returns, the caller may unmap the slot's memory. Creating a slot and changing flags
//! need one snapshot: a stale MMIO entry in the new range is recognised by its generation.

use crate::memslot::{Change, MemoryRegion, Memslot, Memslots, SlotError, plan};
use crate::mmu::{Mmu, Owed};
use crate::spte::GENERATION_MASK;
use crate::sync;
use std::sync::Arc;
use std::sync::atomic::Ordering::Release;

impl Mmu {
    /// Creates, moves, deletes (size 0) a slot or changes its flags, as
    /// KVM_SET_USER_MEMORY_REGION. On error nothing has changed. Must not be called while the
    /// calling thread holds a [`crate::SlotsGuard`].
    pub fn set_memory_region(&self, region: &MemoryRegion) -> Result<(), SlotError> {
        let _one_at_a_time = sync::lock(&self.update);
        let current = self.snapshot.load_full();
        match plan(&current, region, self.config.physical_bits)? {
            Change::Nothing => return Ok(()),
            Change::Create(slot) => {
                if slot.logs_dirty() {
                    self.begin_log(&slot);
                }
                self.publish(current.replace(None, Some(slot)));
            }
            Change::Delete(old) => self.take_away(&current, &old, None),
            Change::Move(old, new) => self.take_away(&current, &old, Some(new)),
            Change::Flags(old, new) => self.change_flags(&current, &old, new),
        }
        self.counters.slot_changes.add(1);
        tracing::debug!(?region, "memslot changed");
        Ok(())
    }

    /// Makes a snapshot current and waits until nobody uses the one before.
    fn publish(&self, slots: Memslots) {
        if slots.generation() & GENERATION_MASK == 0 {
            // MMIO entries hold only so many bits of it: those of 2^19 changes ago would pass for
            // current ones from now on. Entries made between here and the store are of the
            // generation before. That holds for a half-done change, too, since the next generation
            // begins the count all the same.
            self.zap_all();
        }
        // The MMIO path compares with this number alone: it must not lag behind.
        self.generation.store(slots.generation(), Release);
        sync::point();
        self.snapshot.store(Arc::new(slots));
        self.srcu.synchronize();
    }

    fn take_away(&self, current: &Memslots, old: &Memslot, new: Option<Memslot>) {
        let invalid = Memslot {
            is_invalid: true,
            ..old.clone()
        };
        let between = current.replace(Some(old.id()), Some(invalid)).unsettled();
        let last = between.replace(Some(old.id()), new);
        self.publish(between);
        let exclusive = self.exclusive();
        let mut owed = Owed::default();
        // Shadow pages of tables in the slot are counted in its pages, which go with it.
        self.shadow_zap_all(&exclusive);
        self.zap_range(&exclusive, old.id().space, &old.gfns(), &mut owed);
        self.finish(exclusive, owed);
        self.publish(last);
    }

    fn change_flags(&self, current: &Memslots, old: &Memslot, new: Memslot) {
        let starts = new.logs_dirty() && !old.logs_dirty();
        let stops = !new.logs_dirty() && old.logs_dirty();
        let slot = new.clone();
        if starts {
            self.begin_log(&slot);
        }
        // Whoever mapped with the old flags has left when this returns, so what it mapped is found
        // below.
        self.publish(current.replace(Some(old.id()), Some(new)));
        let exclusive = self.exclusive();
        let mut owed = Owed::default();
        if starts {
            if self.config.eager_split {
                self.split_slot(&exclusive, &slot);
            }
            let huge_only = self.dirty_options.is_initially_set();
            self.protect_slot(&exclusive, &slot, huge_only, &mut owed);
        }
        if stops {
            self.unlink_collapsible(&exclusive, &slot, &mut owed);
        }
        self.finish(exclusive, owed);
    }

    fn begin_log(&self, slot: &Memslot) {
        if self.dirty_options.is_initially_set()
            && let Some(bitmap) = &slot.dirty
        {
            bitmap.mark_all();
        }
    }
}

//! Watching pages: write tracking and execution traps.

use crate::memslot::{AddressSpace, Memslot};
use crate::mmu::{Mmu, Owed};
use crate::shadow::Lost;
use crate::sync::{Mutant, is_mutant, point};
use arch::addr::{Gfn, Gpa};
use arch::paging::Level;
use std::ops::Range;
use std::sync::Arc;

/// Told of writes to tracked pages (shadow paging, a device model's page tables).
pub trait WriteListener: Send + Sync {
    /// `bytes` were written at `gpa` on behalf of the guest.
    fn page_written(&self, space: AddressSpace, gpa: Gpa, bytes: &[u8]);
}

/// Why a page cannot be watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TrackError {
    /// No slot has the frame.
    #[error("guest frame {0} is in no slot")]
    NoMemory(Gfn),
    /// 65535 users track the frame already, or none does where one is to be removed.
    #[error("guest frame {0} has too many or too few users")]
    Users(Gfn),
}

impl Mmu {
    /// Adds a user that must see every write to the frame: guest writes end in
    /// [`crate::FaultResult::WriteProtected`].
    pub fn track_writes(&self, space: AddressSpace, gfn: Gfn) -> Result<(), TrackError> {
        self.with_slot(space, gfn, |slot| {
            let is_first = slot.track(gfn).ok_or(TrackError::Users(gfn))?;
            // The counter is up before the lock is taken: whoever maps under the lock afterwards
            // sees it, whoever mapped before is found here.
            if is_first {
                self.restrict(space, gfn..gfn.wrapping_add(1), Restriction::Write);
            }
            Ok(())
        })
    }

    /// Removes a user.
    pub fn untrack_writes(&self, space: AddressSpace, gfn: Gfn) -> Result<(), TrackError> {
        self.with_slot(space, gfn, |slot| {
            slot.untrack(gfn).map(drop).ok_or(TrackError::Users(gfn))
        })
    }

    /// Adds a listener for writes that KVM makes to tracked pages.
    pub fn add_write_listener(&self, listener: Arc<dyn WriteListener>) {
        self.write_listeners.rcu(|listeners| {
            let mut listeners = Vec::clone(listeners);
            listeners.push(Arc::clone(&listener));
            listeners
        });
    }

    /// Sets or clears the execution trap of the frames: a fetch from one ends in
    /// [`crate::FaultResult::ExecuteTrap`] from the next instruction of any vCPU on. Frames in no
    /// slot make it fail, with nothing changed.
    pub fn set_execution_traps(
        &self,
        space: AddressSpace,
        range: Range<Gfn>,
        is_trapped: bool,
    ) -> Result<(), TrackError> {
        let frames = || (range.start.get()..range.end.get()).map(Gfn::new);
        let slots = self.slots();
        if let Some(gfn) = frames().find(|&gfn| slots.find(space, gfn).is_none()) {
            return Err(TrackError::NoMemory(gfn));
        }
        let mut has_changed = false;
        for gfn in frames() {
            if let Some(slot) = slots.find(space, gfn) {
                has_changed |= slot.set_execution_trap(gfn, is_trapped);
            }
        }
        drop(slots);
        // Clearing needs no more: a fetch faults once and finds the trap gone.
        if has_changed && is_trapped {
            self.restrict(space, range, Restriction::Execute);
        }
        Ok(())
    }

    /// Whether a fetch from the frame traps. A frame in no slot has no trap.
    pub fn has_execution_trap(&self, space: AddressSpace, gfn: Gfn) -> bool {
        let slots = self.slots();
        slots
            .find(space, gfn)
            .is_some_and(|slot| slot.traps_execution(gfn))
    }

    fn with_slot<T>(
        &self,
        space: AddressSpace,
        gfn: Gfn,
        then: impl FnOnce(&Memslot) -> Result<T, TrackError>,
    ) -> Result<T, TrackError> {
        let slots = self.slots();
        let slot = slots.find(space, gfn).filter(|slot| !slot.is_invalid);
        then(slot.ok_or(TrackError::NoMemory(gfn))?)
    }

    /// Takes a right from the leaves of the range; huge ones go altogether.
    fn restrict(&self, space: AddressSpace, range: Range<Gfn>, restriction: Restriction) {
        let exclusive = self.exclusive();
        let mut owed = Owed::default();
        let mut huge = Vec::new();
        let mut has_changed = false;
        self.for_each_leaf(&exclusive, space, &range, |leaf| {
            if leaf.level > Level::PTE {
                huge.push(leaf.first..leaf.first.wrapping_add(leaf.level.pages()));
                return;
            }
            let changed = leaf.cell.update(|entry| {
                entry.is_leaf(Level::PTE).then(|| match restriction {
                    Restriction::Write => entry.write_tracked(),
                    Restriction::Execute => entry.execute_protected(),
                })
            });
            has_changed |= changed.is_some();
        });
        let lost = match restriction {
            Restriction::Write => Lost::Write,
            Restriction::Execute => Lost::Execute,
        };
        self.shadow_restrict(&exclusive, space, &range, lost);
        // Whether or not a leaf changed: a fault that saw the page's new state before the lock was
        // taken may have put a leaf with fewer rights in its place already, and flushed nothing.
        if has_changed || !is_mutant(Mutant::RestrictWithoutFlush) {
            owed.flush_range(range);
        }
        for range in huge {
            self.zap_range(&exclusive, space, &range, &mut owed);
        }
        self.finish(exclusive, owed);
    }

    /// Makes a write to guest memory with all that it means for the log and for those who track the
    /// page. `write` says whether it wrote.
    pub(crate) fn write_reported(
        &self,
        space: AddressSpace,
        slot: &Memslot,
        gpa: Gpa,
        bytes: &[u8],
        write: impl FnOnce() -> bool,
    ) {
        let gfn = gpa.gfn();
        let marked = || {
            let is_written = write();
            if is_written {
                self.mark_slot_dirty(slot, gfn);
            }
            is_written
        };
        let is_written = if self.has_shadow_pages() && slot.is_tracked(gfn) {
            // What was derived from a table goes before the new entry is there: who sees that, and
            // invalidates the address, must not find the old translation.
            let exclusive = self.exclusive();
            let take_away = || self.shadow_written(&exclusive, space, gpa, bytes.len());
            if is_mutant(Mutant::WriteFirst) {
                let is_written = marked();
                point();
                take_away();
                is_written
            } else {
                take_away();
                point();
                marked()
            }
        } else {
            // The log is taken under the exclusive lock: it sees the write with its mark.
            let shared = slot.logs_dirty().then(|| self.shared());
            let is_written = marked();
            drop(shared);
            if self.has_shadow_pages() {
                // Whoever shadows a table tracks it and then reads it: with the write before the
                // second look at the tracker, one of the two sees the other.
                std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
                if slot.is_tracked(gfn) {
                    self.shadow_written(&self.exclusive(), space, gpa, bytes.len());
                }
            }
            is_written
        };
        if is_written && slot.is_tracked(gfn) {
            for listener in self.write_listeners.load().iter() {
                listener.page_written(space, gpa, bytes);
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Restriction {
    Write,
    Execute,
}

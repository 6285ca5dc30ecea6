//! A snapshot of all memslots.

use super::{Memslot, SlotId};
use arch::addr::{Gfn, Hva};
use std::ops::Range;
use std::sync::Arc;

/// An address space of the VM: what a vCPU sees depends on whether it is in system management mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum AddressSpace {
    /// Outside system management mode.
    #[default]
    Normal,
    /// In system management mode.
    Smm,
}

impl AddressSpace {
    /// Both.
    pub const ALL: [AddressSpace; 2] = [AddressSpace::Normal, AddressSpace::Smm];

    /// The address space with KVM's number (the high half of `kvm_userspace_memory_region.slot`).
    pub const fn from_number(number: u16) -> Option<Self> {
        match number {
            0 => Some(Self::Normal),
            1 => Some(Self::Smm),
            _ => None,
        }
    }

    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

/// Marks the snapshot of a change that is half done: what is derived from it must not be kept.
pub(crate) const UPDATE_IN_PROGRESS: u64 = 1 << 63;

/// All memslots at one moment.
#[derive(Clone, Debug, Default)]
pub struct Memslots {
    pub(crate) generation: u64,
    /// Per address space, ordered by first frame, free of overlap.
    pub(crate) spaces: [Vec<Arc<Memslot>>; 2],
}

impl Memslots {
    /// Counts the changes of memslots; the top bit marks a change in progress.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.generation & UPDATE_IN_PROGRESS == 0
    }

    /// The slot that a frame lies in.
    #[inline]
    pub fn find(&self, space: AddressSpace, gfn: Gfn) -> Option<&Arc<Memslot>> {
        let slots = &self.spaces[space.index()];
        let after = slots.partition_point(|slot| slot.base <= gfn);
        slots[..after].last().filter(|slot| slot.contains(gfn))
    }

    /// The slot with that name.
    pub fn get(&self, id: SlotId) -> Option<&Arc<Memslot>> {
        self.spaces[id.space.index()]
            .iter()
            .find(|slot| slot.id == id)
    }

    /// The slots of an address space, ordered by first frame.
    pub fn iter(&self, space: AddressSpace) -> impl Iterator<Item = &Arc<Memslot>> {
        self.spaces[space.index()].iter()
    }

    /// The slots of both address spaces whose host memory overlaps `hvas`, with the frames that do.
    pub(crate) fn overlapping(
        &self,
        hvas: Range<Hva>,
    ) -> impl Iterator<Item = (&Arc<Memslot>, Range<Gfn>)> {
        self.spaces
            .iter()
            .flatten()
            .filter_map(move |slot| slot.gfns_of(&hvas).map(|gfns| (slot, gfns)))
    }

    /// The same slots with `old` left out and `new` put in, one generation on.
    pub(crate) fn replace(&self, old: Option<SlotId>, new: Option<Memslot>) -> Self {
        let mut spaces = self.spaces.clone();
        if let Some(id) = old {
            spaces[id.space.index()].retain(|slot| slot.id != id);
        }
        if let Some(slot) = new {
            let slots = &mut spaces[slot.id.space.index()];
            let at = slots.partition_point(|other| other.base < slot.base);
            slots.insert(at, Arc::new(slot));
        }
        Self {
            generation: (self.generation & !UPDATE_IN_PROGRESS) + 1,
            spaces,
        }
    }

    /// Marks the snapshot as one step of a longer change.
    pub(crate) fn unsettled(mut self) -> Self {
        self.generation |= UPDATE_IN_PROGRESS;
        self
    }
}

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
    generation: u64,
    spaces: [Space; 2],
}

impl Memslots {
    /// No slots yet.
    pub(crate) fn none(generation: u64) -> Self {
        Self {
            generation,
            spaces: Default::default(),
        }
    }

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
        let chunk = self.spaces[space.index()].chunk_of(gfn)?;
        let after = chunk.partition_point(|slot| slot.base <= gfn);
        chunk[..after].last().filter(|slot| slot.contains(gfn))
    }

    /// The slot with that name.
    pub fn get(&self, id: SlotId) -> Option<&Arc<Memslot>> {
        let (chunk, at) = place(id);
        let chunk = self.spaces[id.space.index()].by_number.get(chunk)?;
        chunk.get(at)?.as_ref()
    }

    /// The slots of an address space, ordered by first frame.
    pub fn iter(&self, space: AddressSpace) -> impl Iterator<Item = &Arc<Memslot>> {
        self.spaces[space.index()].iter()
    }

    /// The slots of an address space that have frames among `gfns`, in order.
    pub(crate) fn within(
        &self,
        space: AddressSpace,
        gfns: Range<Gfn>,
    ) -> impl Iterator<Item = &Arc<Memslot>> {
        let space = &self.spaces[space.index()];
        let from = space.chunks_up_to(gfns.start).saturating_sub(1);
        let slots = space.by_frame[from..].iter().flat_map(|chunk| chunk.iter());
        slots
            .skip_while(move |slot| slot.gfns().end <= gfns.start)
            .take_while(move |slot| slot.base < gfns.end)
    }

    /// The slots of both address spaces whose host memory overlaps `hvas`, with the frames that do.
    pub(crate) fn overlapping(
        &self,
        hvas: Range<Hva>,
    ) -> impl Iterator<Item = (&Arc<Memslot>, Range<Gfn>)> {
        self.spaces
            .iter()
            .flat_map(Space::iter)
            .filter_map(move |slot| slot.gfns_of(&hvas).map(|gfns| (slot, gfns)))
    }

    /// The same slots with `old` left out and `new` put in, one generation on.
    pub(crate) fn replace(&self, old: Option<SlotId>, new: Option<Memslot>) -> Self {
        let mut spaces = self.spaces.clone();
        if let Some(old) = old.and_then(|id| self.get(id)) {
            spaces[old.id.space.index()].remove(old);
        }
        if let Some(slot) = new {
            spaces[slot.id.space.index()].insert(slot);
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

/// The slots of one address space. What a change leaves alone, the snapshots before and after it
/// share: with tens of thousands of slots, one of them is changed in microseconds.
#[derive(Clone, Debug, Default)]
struct Space {
    /// Ordered by first frame, free of overlap; no chunk is empty.
    by_frame: Vec<Arc<Vec<Arc<Memslot>>>>,
    /// At the places that [`place`] gives.
    by_number: Vec<Arc<Vec<Option<Arc<Memslot>>>>>,
}

/// The most slots in a chunk of either order.
const CHUNK: usize = 256;

/// Chunk and place in it of a slot by its number.
fn place(id: SlotId) -> (usize, usize) {
    let number = usize::from(id.number);
    (number / CHUNK, number % CHUNK)
}

impl Space {
    fn iter(&self) -> impl Iterator<Item = &Arc<Memslot>> {
        self.by_frame.iter().flat_map(|chunk| chunk.iter())
    }

    /// How many chunks begin at `gfn` or below.
    fn chunks_up_to(&self, gfn: Gfn) -> usize {
        let begins = |chunk: &Arc<Vec<Arc<Memslot>>>| chunk[0].base <= gfn;
        self.by_frame.partition_point(begins)
    }

    /// The chunk in which a slot with that frame would be.
    #[inline]
    fn chunk_of(&self, gfn: Gfn) -> Option<&Vec<Arc<Memslot>>> {
        let up_to = match &self.by_frame[..] {
            [_] => 1,
            _ => self.chunks_up_to(gfn),
        };
        self.by_frame[..up_to].last().map(|chunk| &**chunk)
    }

    fn remove(&mut self, old: &Memslot) {
        if let Some(at) = self.chunks_up_to(old.base).checked_sub(1) {
            let chunk = Arc::make_mut(&mut self.by_frame[at]);
            chunk.retain(|slot| slot.id != old.id);
            if chunk.is_empty() {
                self.by_frame.remove(at);
            }
        }
        *self.numbered(old.id) = None;
    }

    fn insert(&mut self, slot: Memslot) {
        let slot = Arc::new(slot);
        *self.numbered(slot.id) = Some(slot.clone());
        let at = self.chunks_up_to(slot.base).saturating_sub(1);
        let Some(chunk) = self.by_frame.get_mut(at) else {
            self.by_frame.push(Arc::new(vec![slot]));
            return;
        };
        let chunk = Arc::make_mut(chunk);
        let place = chunk.partition_point(|other| other.base < slot.base);
        chunk.insert(place, slot);
        if chunk.len() > CHUNK {
            let rest = chunk.split_off(CHUNK / 2);
            self.by_frame.insert(at + 1, Arc::new(rest));
        }
    }

    fn numbered(&mut self, id: SlotId) -> &mut Option<Arc<Memslot>> {
        let (chunk, at) = place(id);
        if self.by_number.len() <= chunk {
            self.by_number.resize_with(chunk + 1, Arc::default);
        }
        let chunk = Arc::make_mut(&mut self.by_number[chunk]);
        if chunk.len() <= at {
            chunk.resize(at + 1, None);
        }
        &mut chunk[at]
    }
}

#[cfg(test)]
mod tests {
    use super::super::SlotFlags;
    use super::*;
    use std::collections::BTreeMap;

    fn slot(number: u16, base: u64) -> Memslot {
        let id = SlotId {
            space: AddressSpace::Normal,
            number,
        };
        let hva = Hva::new(0x10_0000 + (u64::from(number) << 13));
        Memslot::new(id, Gfn::new(base), 2, hva, SlotFlags::empty())
    }

    /// Thousands of slots come, move and go; a map says what must be found.
    #[test]
    #[cfg_attr(miri, ignore = "takes hours there, and nothing in this file is unsafe")]
    fn many_slots_are_found_by_frame_and_by_number() {
        let mut slots = Memslots::default();
        let mut bases = BTreeMap::new();
        let mut random = 1u64;
        for _ in 0..6000 {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            let number = (random >> 33) as u16 % 1500;
            let base = (random >> 49) % 4000 * 2;
            let id = slot(number, 0).id;
            let is_free = bases.values().all(|&other| other != base);
            let old = bases.remove(&number).map(|_| id);
            let new = is_free.then(|| slot(number, base));
            if is_free {
                bases.insert(number, base);
            }
            slots = slots.replace(old, new);
        }
        let space = AddressSpace::Normal;
        let mut sorted: Vec<_> = bases.iter().map(|(&n, &base)| (base, n)).collect();
        sorted.sort_unstable();
        let found: Vec<_> = (slots.iter(space))
            .map(|slot| (slot.base.get(), slot.id.number))
            .collect();
        assert!(sorted.len() > 2 * CHUNK);
        assert_eq!(found, sorted);
        for number in 0..1500 {
            let found = slots.get(slot(number, 0).id).map(|slot| slot.base.get());
            assert_eq!(found, bases.get(&number).copied());
        }
        let at = |gfn: u64| sorted.iter().find(|&&(base, _)| base == gfn & !1);
        for gfn in 0..8010 {
            let found = slots.find(space, Gfn::new(gfn)).map(|slot| slot.id.number);
            assert_eq!(found, at(gfn).map(|&(_, number)| number));
            let range = Gfn::new(gfn)..Gfn::new(gfn + 5);
            let found = slots.within(space, range).map(|slot| slot.base.get());
            let expected = sorted.iter().map(|&(base, _)| base);
            assert!(found.eq(expected.filter(|&base| base < gfn + 5 && base + 2 > gfn)));
        }
    }
}

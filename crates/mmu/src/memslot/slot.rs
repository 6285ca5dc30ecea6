//! One memslot and the state of its pages.

use super::AddressSpace;
use crate::dirty::DirtyBitmap;
use arch::addr::{Gfn, Hva, PAGE_SHIFT};
use arch::paging::Level;
use bitflags::bitflags;
use std::ops::Range;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32};
use std::sync::{Arc, OnceLock};

bitflags! {
    /// Flags of `kvm_userspace_memory_region`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct SlotFlags: u32 {
        /// KVM_MEM_LOG_DIRTY_PAGES.
        const LOG_DIRTY_PAGES = 1 << 0;
        /// KVM_MEM_READONLY.
        const READONLY = 1 << 1;
    }
}

/// A slot's name: its address space and number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId {
    /// The address space.
    pub space: AddressSpace,
    /// The number, unique in its address space.
    pub number: u16,
}

/// A memslot: guest frames `base..base + pages` are host memory from `hva` on.
#[derive(Clone, Debug)]
pub struct Memslot {
    pub(crate) id: SlotId,
    pub(crate) base: Gfn,
    pub(crate) pages: u64,
    pub(crate) hva: Hva,
    pub(crate) flags: SlotFlags,
    /// Being deleted or moved: accesses are retried until the change is complete.
    pub(crate) is_invalid: bool,
    pub(crate) dirty: Option<Arc<DirtyBitmap>>,
    pub(crate) state: Arc<PageState>,
}

/// State of a slot's pages that outlives a change of flags.
#[derive(Debug)]
pub(crate) struct PageState {
    /// Users that track writes, per page.
    tracked: Sparse<AtomicU16>,
    /// One access byte per page.
    access: Sparse<AtomicU8>,
    /// Reasons against a huge page, per 2 MiB and per 1 GiB.
    disallow: [Box<[AtomicU32]>; 2],
    /// What is known of the host memory, per `1 << PROBE_SHIFT` bytes of host address.
    probed: Box<[AtomicU8]>,
}

/// A value per page of which few differ from the default: made by the block when first needed.
#[derive(Debug)]
struct Sparse<T> {
    blocks: Box<[OnceLock<Box<[T]>>]>,
}

/// Pages in a block of a [`Sparse`].
const BLOCK: u64 = 4096;

impl<T: Default> Sparse<T> {
    fn new(pages: u64) -> Self {
        Self {
            blocks: (0..pages.div_ceil(BLOCK))
                .map(|_| OnceLock::new())
                .collect(),
        }
    }

    /// The page's value, unless it has never been anything but the default.
    #[inline]
    fn get(&self, index: u64) -> Option<&T> {
        let block = self.blocks[(index / BLOCK) as usize].get()?;
        Some(&block[(index % BLOCK) as usize])
    }

    fn get_or_make(&self, index: u64) -> &T {
        let make = || (0..BLOCK).map(|_| T::default()).collect();
        let block = self.blocks[(index / BLOCK) as usize].get_or_init(make);
        &block[(index % BLOCK) as usize]
    }
}

/// What probing host memory has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Probed {
    /// Nothing yet (or it changed since).
    Unknown,
    /// It can be read.
    Readable,
    /// It can be read and written.
    Writable,
}

/// Whether a reason against huge pages comes or goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Disallow {
    Add,
    Remove,
}

/// Granularity of the probe records: coarse for the model checker, which cannot afford 512 faults.
const PROBE_SHIFT: u32 = if cfg!(feature = "model") { 30 } else { 21 };

/// The page takes no instruction fetches on the processor: it is to be emulated.
const ACCESS_TRAP_EXECUTE: u8 = 1 << 0;

impl PageState {
    fn new(base: Gfn, pages: u64, hva: Hva) -> Self {
        let huge = |level: Level| {
            let first = base.get() / level.pages();
            let last = (base.get() + pages - 1) / level.pages();
            (first..=last).map(|_| AtomicU32::new(0)).collect()
        };
        let last_byte = hva.get() + (pages << PAGE_SHIFT) - 1;
        let probed = (hva.get() >> PROBE_SHIFT..=last_byte >> PROBE_SHIFT)
            .map(|_| AtomicU8::new(Probed::Unknown as u8))
            .collect();
        Self {
            tracked: Sparse::new(pages),
            access: Sparse::new(pages),
            disallow: [huge(Level::PDE), huge(Level::PDPTE)],
            probed,
        }
    }
}

impl Memslot {
    pub(crate) fn new(id: SlotId, base: Gfn, pages: u64, hva: Hva, flags: SlotFlags) -> Self {
        let state = Arc::new(PageState::new(base, pages, hva));
        let mut slot = Self {
            id,
            base,
            pages,
            hva,
            flags,
            is_invalid: false,
            dirty: None,
            state,
        };
        slot.adjust_bitmap();
        slot
    }

    /// The same slot with other flags: its pages keep their state, and its bitmap if it had one.
    pub(crate) fn with_flags(&self, flags: SlotFlags) -> Self {
        let mut slot = Self {
            flags,
            ..self.clone()
        };
        slot.adjust_bitmap();
        slot
    }

    fn adjust_bitmap(&mut self) {
        if !self.logs_dirty() {
            self.dirty = None;
        } else if self.dirty.is_none() {
            self.dirty = Some(Arc::new(DirtyBitmap::new(self.pages)));
        }
    }

    /// Its name.
    pub fn id(&self) -> SlotId {
        self.id
    }

    /// Its guest frames.
    pub fn gfns(&self) -> Range<Gfn> {
        self.base..self.base.wrapping_add(self.pages)
    }

    /// Its size in 4 KiB pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Its host memory.
    pub fn hvas(&self) -> Range<Hva> {
        self.hva..self.hva.wrapping_add(self.pages << PAGE_SHIFT)
    }

    /// Its flags.
    pub fn flags(&self) -> SlotFlags {
        self.flags
    }

    /// Whether guest writes are MMIO.
    pub fn is_read_only(&self) -> bool {
        self.flags.contains(SlotFlags::READONLY)
    }

    /// Whether writes are logged.
    pub fn logs_dirty(&self) -> bool {
        self.flags.contains(SlotFlags::LOG_DIRTY_PAGES)
    }

    /// Whether the frame lies in it.
    #[inline]
    pub fn contains(&self, gfn: Gfn) -> bool {
        gfn.wrapping_sub(self.base.get()).get() < self.pages
    }

    /// The index of a frame inside the slot.
    #[inline]
    pub(crate) fn index(&self, gfn: Gfn) -> u64 {
        debug_assert!(self.contains(gfn));
        gfn.get() - self.base.get()
    }

    /// The host address of a frame that lies in the slot.
    #[inline]
    pub fn hva_of(&self, gfn: Gfn) -> Hva {
        self.hva.wrapping_add(self.index(gfn) << PAGE_SHIFT)
    }

    /// The frames whose host memory overlaps `hvas`.
    pub(crate) fn gfns_of(&self, hvas: &Range<Hva>) -> Option<Range<Gfn>> {
        let own = self.hvas();
        let start = hvas.start.max(own.start);
        let end = hvas.end.min(own.end);
        if start >= end {
            return None;
        }
        let first = (start.get() - self.hva.get()) >> PAGE_SHIFT;
        let last = (end.get() - 1 - self.hva.get()) >> PAGE_SHIFT;
        Some(self.base.wrapping_add(first)..self.base.wrapping_add(last + 1))
    }

    /// Records a write by the guest, or by KVM for it.
    #[inline]
    pub(crate) fn mark_dirty(&self, gfn: Gfn) {
        if let Some(bitmap) = &self.dirty {
            bitmap.mark(self.index(gfn));
        }
    }

    // --- write tracking ---

    /// Whether somebody tracks writes to the frame.
    #[inline]
    pub(crate) fn is_tracked(&self, gfn: Gfn) -> bool {
        self.state
            .tracked
            .get(self.index(gfn))
            .is_some_and(|users| users.load(SeqCst) != 0)
    }

    /// How many track writes to the frame.
    pub(crate) fn trackers(&self, gfn: Gfn) -> u16 {
        let users = self.state.tracked.get(self.index(gfn));
        users.map_or(0, |users| users.load(SeqCst))
    }

    /// Adds a user; true if it is the first. `None` when there are too many to count.
    pub(crate) fn track(&self, gfn: Gfn) -> Option<bool> {
        let counter = self.state.tracked.get_or_make(self.index(gfn));
        let before = counter
            .try_update(SeqCst, SeqCst, |users| users.checked_add(1))
            .ok()?;
        if before == 0 {
            self.disallow_huge(gfn, Disallow::Add);
        }
        Some(before == 0)
    }

    /// Removes a user; true if it was the last. `None` when there was none.
    pub(crate) fn untrack(&self, gfn: Gfn) -> Option<bool> {
        let counter = self.state.tracked.get(self.index(gfn))?;
        let before = counter
            .try_update(SeqCst, SeqCst, |users| users.checked_sub(1))
            .ok()?;
        if before == 1 {
            self.disallow_huge(gfn, Disallow::Remove);
        }
        Some(before == 1)
    }

    // --- execution traps ---

    /// Whether a fetch from the frame traps.
    #[inline]
    pub(crate) fn traps_execution(&self, gfn: Gfn) -> bool {
        let access = self.state.access.get(self.index(gfn));
        access.is_some_and(|byte| byte.load(SeqCst) & ACCESS_TRAP_EXECUTE != 0)
    }

    /// Takes over the traps of the slot that this one, which nobody has seen yet, is after its
    /// move: traps belong to the memory, not to where it is.
    pub(crate) fn adopt_execution_traps(&self, old: &Memslot) {
        let frames = |slot: &Memslot| {
            let first = slot.base.get();
            (first..first + slot.pages).map(Gfn::new)
        };
        for (before, after) in frames(old).zip(frames(self)) {
            if old.traps_execution(before) {
                self.set_execution_trap(after, true);
            }
        }
    }

    /// Sets or clears the trap of one frame; true if that was a change.
    pub(crate) fn set_execution_trap(&self, gfn: Gfn, is_trapped: bool) -> bool {
        let byte = self.state.access.get_or_make(self.index(gfn));
        let before = if is_trapped {
            byte.fetch_or(ACCESS_TRAP_EXECUTE, SeqCst)
        } else {
            byte.fetch_and(!ACCESS_TRAP_EXECUTE, SeqCst)
        };
        let has_changed = (before & ACCESS_TRAP_EXECUTE != 0) != is_trapped;
        if has_changed {
            let how = if is_trapped {
                Disallow::Add
            } else {
                Disallow::Remove
            };
            self.disallow_huge(gfn, how);
        }
        has_changed
    }

    // --- huge pages ---

    fn disallow_huge(&self, gfn: Gfn, how: Disallow) {
        for level in [Level::PDE, Level::PDPTE] {
            let counter = self.disallow_counter(gfn, level);
            match how {
                Disallow::Add => counter.fetch_add(1, SeqCst),
                Disallow::Remove => counter.fetch_sub(1, SeqCst),
            };
        }
    }

    fn disallow_counter(&self, gfn: Gfn, level: Level) -> &AtomicU32 {
        let index = gfn.get() / level.pages() - self.base.get() / level.pages();
        &self.state.disallow[level.index() - 1][index as usize]
    }

    /// The largest level, up to `max`, at which the frame may be mapped: its naturally aligned block
    /// lies in the slot, is congruent with host memory, holds nothing that is handled by page, and
    /// is not logged by page.
    pub(crate) fn max_level(&self, gfn: Gfn, max: Level, logs_by_page: bool) -> Level {
        let mut level = max.min(Level::PDPTE);
        while let Some(below) = level.below() {
            if !logs_by_page && self.allows_huge(gfn, level) {
                return level;
            }
            level = below;
        }
        level
    }

    fn allows_huge(&self, gfn: Gfn, level: Level) -> bool {
        let start = gfn.align_down(level.pages());
        let fits =
            start >= self.base && start.get() + level.pages() <= self.base.get() + self.pages;
        let skew = (self.base.get() << PAGE_SHIFT) ^ self.hva.get();
        fits && skew & (level.bytes() - 1) == 0
            && self.disallow_counter(gfn, level).load(SeqCst) == 0
    }

    // --- host memory ---

    fn probe_index(&self, hva: Hva) -> usize {
        ((hva.get() >> PROBE_SHIFT) - (self.hva.get() >> PROBE_SHIFT)) as usize
    }

    /// What is known of the host memory of a frame.
    #[inline]
    pub(crate) fn probed(&self, gfn: Gfn) -> Probed {
        match self.state.probed[self.probe_index(self.hva_of(gfn))].load(Acquire) {
            0 => Probed::Unknown,
            1 => Probed::Readable,
            _ => Probed::Writable,
        }
    }

    /// What is known of all the host memory of the aligned block around a frame.
    pub(crate) fn probed_block(&self, gfn: Gfn, level: Level) -> Probed {
        let first = gfn.align_down(level.pages());
        (0..level.pages())
            .step_by(1 << (PROBE_SHIFT - PAGE_SHIFT))
            .map(|offset| self.probed(first.wrapping_add(offset)))
            .min()
            .unwrap_or(Probed::Unknown)
    }

    /// The part of the slot's memory that shares a probe record with the frame.
    pub(crate) fn probe_chunk(&self, gfn: Gfn) -> Range<Hva> {
        let start = self.hva_of(gfn).align_down(1 << PROBE_SHIFT);
        let end = start.wrapping_add(1 << PROBE_SHIFT);
        start.max(self.hva)..end.min(self.hvas().end)
    }

    /// Records a probe of the whole chunk around a frame.
    pub(crate) fn set_probed(&self, gfn: Gfn, probed: Probed) {
        self.state.probed[self.probe_index(self.hva_of(gfn))].store(probed as u8, Release);
    }

    /// Forgets probes that `hvas` touches.
    pub(crate) fn forget_probes(&self, hvas: &Range<Hva>) {
        let own = self.hvas();
        let (start, end) = (hvas.start.max(own.start), hvas.end.min(own.end));
        if start >= end {
            return;
        }
        let last = Hva::new(end.get() - 1);
        for record in &self.state.probed[self.probe_index(start)..=self.probe_index(last)] {
            record.store(Probed::Unknown as u8, Relaxed);
        }
    }
}

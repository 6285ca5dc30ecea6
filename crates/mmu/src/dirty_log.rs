//! The dirty log.
//!
//! Reading the log takes bits and makes the next write to their pages be noticed again, under the
//! exclusive lock and with the flush inside it. A write that a reader can see is in the bits it was
//! given or in the bitmap by the time it has them; see `tdp::fast` for the path without a lock.

use crate::config::DirtyMethod;
use crate::dirty::DirtyBitmap;
use crate::memslot::{AddressSpace, Memslot, SlotId};
use crate::mmu::{Exclusive, Mmu, Owed};
use arch::addr::Gfn;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

/// Why the log of a slot cannot be read or cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyLogError {
    /// There is no such slot, or it has no log. KVM answers ENOENT.
    #[error("slot {} does not exist or is not logged", .0.number)]
    NotLogged(SlotId),
    /// The caller's bitmap is too short for the pages it is to hold. KVM answers EFAULT.
    #[error("a bitmap of {given} words does not hold {needed}")]
    ShortBitmap {
        /// Words needed.
        needed: usize,
        /// Words given.
        given: usize,
    },
    /// The first page is no multiple of 64, or the range leaves the slot, or its length is no
    /// multiple of 64 though it does not end the slot. KVM answers EINVAL.
    #[error("pages {first} to {first}+{pages} are no range of whole words in the slot")]
    BadRange {
        /// First page in the slot.
        first: u64,
        /// Pages.
        pages: u64,
    },
}

/// Told of every page that is written for the first time since it was last protected: the seam for
/// dirty rings.
pub trait DirtySink: Send + Sync {
    /// Page `index` of the slot is written. Called on the writing vCPU's thread, under the MMU lock
    /// or in a reading session: it must not call the MMU.
    fn page_dirtied(&self, slot: SlotId, index: u64);
}

/// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
#[derive(Debug, Default)]
pub(crate) struct DirtyOptions {
    initially_set: AtomicBool,
}

impl DirtyOptions {
    pub(crate) fn is_initially_set(&self) -> bool {
        self.initially_set.load(Relaxed)
    }
}

impl Mmu {
    /// Whether logs that begin from now on begin with every page dirty and unprotected
    /// (KVM_DIRTY_LOG_INITIALLY_SET): protection then comes with clearing.
    pub fn set_dirty_log_initially_set(&self, is_set: bool) {
        self.dirty_options.initially_set.store(is_set, Relaxed);
    }

    /// Has every page that becomes dirty reported, once and for all vCPUs. False if a sink is set
    /// already.
    pub fn set_dirty_sink(&self, sink: Arc<dyn DirtySink>) -> bool {
        self.dirty_sink.set(sink).is_ok()
    }

    /// Takes the log: copies it to `out` and clears it (KVM_GET_DIRTY_LOG without manual
    /// protection). With page-modification logging, drain the processors' buffers first.
    pub fn dirty_log(
        &self,
        space: AddressSpace,
        number: u16,
        out: &mut [u64],
    ) -> Result<(), DirtyLogError> {
        self.with_log(space, number, |mmu, slot, bitmap| {
            check_length(bitmap, out.len())?;
            let exclusive = mmu.exclusive();
            let mut owed = mmu.collected(&exclusive, slot);
            for (index, word) in out.iter_mut().enumerate().take(bitmap.len()) {
                *word = bitmap.take(index, u64::MAX);
                mmu.protect_word(&exclusive, slot, index, *word, &mut owed);
            }
            mmu.finish(exclusive, owed);
            Ok(())
        })
    }

    /// Copies the log to `out` and leaves it as it is (KVM_GET_DIRTY_LOG with manual protection).
    pub fn dirty_log_keep(
        &self,
        space: AddressSpace,
        number: u16,
        out: &mut [u64],
    ) -> Result<(), DirtyLogError> {
        self.with_log(space, number, |mmu, slot, bitmap| {
            check_length(bitmap, out.len())?;
            let exclusive = mmu.exclusive();
            let owed = mmu.collected(&exclusive, slot);
            mmu.finish(exclusive, owed);
            for (index, word) in out.iter_mut().enumerate().take(bitmap.len()) {
                *word = bitmap.word(index);
            }
            Ok(())
        })
    }

    /// Clears the pages of `bitmap` (bit 0: page `first` of the slot) in the log and protects them
    /// (KVM_CLEAR_DIRTY_LOG).
    pub fn clear_dirty_log(
        &self,
        space: AddressSpace,
        number: u16,
        first: u64,
        pages: u64,
        bitmap: &[u64],
    ) -> Result<(), DirtyLogError> {
        self.with_log(space, number, |mmu, slot, log| {
            check_range(slot, first, pages)?;
            let words = pages.div_ceil(64) as usize;
            if bitmap.len() < words {
                return Err(DirtyLogError::ShortBitmap {
                    needed: words,
                    given: bitmap.len(),
                });
            }
            let exclusive = mmu.exclusive();
            let mut owed = Owed::default();
            for (offset, &mask) in bitmap[..words].iter().enumerate() {
                let index = first as usize / 64 + offset;
                let taken = log.take(index, mask);
                // A flag that was not collected yet is of a write before the clearing, too.
                let is_by_flags = mmu.config.dirty_method == DirtyMethod::DirtyFlags;
                let pages = if is_by_flags {
                    mask & in_slot(slot, index)
                } else {
                    taken
                };
                mmu.protect_word(&exclusive, slot, index, pages, &mut owed);
            }
            mmu.finish(exclusive, owed);
            Ok(())
        })
    }

    /// Makes the next write to pages `first..first + 64` of a slot, as far as `mask` names them, be
    /// noticed: what resetting a dirty ring needs.
    pub fn protect_pages(
        &self,
        space: AddressSpace,
        number: u16,
        first: u64,
        mask: u64,
    ) -> Result<(), DirtyLogError> {
        self.with_log(space, number, |mmu, slot, _| {
            let exclusive = mmu.exclusive();
            let mut owed = Owed::default();
            for index in bits_of(mask)
                .map(|bit| first + bit)
                .filter(|&i| i < slot.pages())
            {
                let gfn = slot.gfns().start.wrapping_add(index);
                mmu.protect_page(&exclusive, slot, gfn, &mut owed);
            }
            mmu.finish(exclusive, owed);
            Ok(())
        })
    }

    /// Records a write to a frame that the MMU does not see: an entry of a page-modification log,
    /// or KVM's own write.
    pub fn mark_dirty(&self, space: AddressSpace, gfn: Gfn) {
        let slots = self.slots();
        if let Some(slot) = slots.find(space, gfn) {
            self.mark_slot_dirty(slot, gfn);
        }
    }

    fn with_log<T>(
        &self,
        space: AddressSpace,
        number: u16,
        then: impl FnOnce(&Self, &Memslot, &DirtyBitmap) -> Result<T, DirtyLogError>,
    ) -> Result<T, DirtyLogError> {
        let _one_at_a_time = crate::sync::lock(&self.update);
        let id = SlotId { space, number };
        let slot = self.snapshot.load().get(id).cloned();
        let slot = slot.ok_or(DirtyLogError::NotLogged(id))?;
        let bitmap = slot.dirty.clone().ok_or(DirtyLogError::NotLogged(id))?;
        then(self, &slot, &bitmap)
    }

    /// Where the log is made of dirty flags, brings the bitmap up to date.
    fn collected(&self, exclusive: &Exclusive<'_>, slot: &Memslot) -> Owed {
        let mut owed = Owed::default();
        if self.config.dirty_method == DirtyMethod::DirtyFlags {
            self.collect_dirty_flags(exclusive, slot, &mut owed);
        }
        owed
    }

    fn protect_word(
        &self,
        exclusive: &Exclusive<'_>,
        slot: &Memslot,
        index: usize,
        pages: u64,
        owed: &mut Owed,
    ) {
        let first = slot.gfns().start.wrapping_add(index as u64 * 64);
        for bit in bits_of(pages) {
            self.protect_page(exclusive, slot, first.wrapping_add(bit), owed);
        }
    }
}

fn check_length(bitmap: &DirtyBitmap, given: usize) -> Result<(), DirtyLogError> {
    let needed = bitmap.len();
    if given < needed {
        Err(DirtyLogError::ShortBitmap { needed, given })
    } else {
        Ok(())
    }
}

fn check_range(slot: &Memslot, first: u64, pages: u64) -> Result<(), DirtyLogError> {
    let end = first.checked_add(pages);
    let is_inside = end.is_some_and(|end| end <= slot.pages()) && first < slot.pages();
    let ends_slot = end == Some(slot.pages());
    if is_inside && first.is_multiple_of(64) && (pages.is_multiple_of(64) || ends_slot) {
        Ok(())
    } else {
        Err(DirtyLogError::BadRange { first, pages })
    }
}

/// The bits of a word that stand for pages of the slot.
fn in_slot(slot: &Memslot, word: usize) -> u64 {
    let rest = slot.pages() - word as u64 * 64;
    if rest >= 64 {
        u64::MAX
    } else {
        (1 << rest) - 1
    }
}

/// The numbers of the bits that are set.
fn bits_of(mut word: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        let bit = (word != 0).then(|| u64::from(word.trailing_zeros()));
        word &= word.wrapping_sub(1);
        bit
    })
}

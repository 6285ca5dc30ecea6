//! The dirty bitmap of a slot.

use crate::sync::point;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

/// One bit per page: written since it was last taken.
#[derive(Debug)]
pub(crate) struct DirtyBitmap {
    words: Box<[AtomicU64]>,
    pages: u64,
}

impl DirtyBitmap {
    pub(crate) fn new(pages: u64) -> Self {
        Self {
            words: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            pages,
        }
    }

    /// The number of words.
    pub(crate) fn len(&self) -> usize {
        self.words.len()
    }

    /// Sets the bit of page `index`.
    ///
    /// Looking before writing is safe: if a taker clears the bit after this load, the taker has the
    /// page in its result, and it only then takes away write access.
    #[inline]
    pub(crate) fn mark(&self, index: u64) {
        let (word, bit) = (&self.words[(index / 64) as usize], 1 << (index % 64));
        point();
        if word.load(SeqCst) & bit == 0 {
            word.fetch_or(bit, SeqCst);
        }
    }

    /// Sets every bit.
    pub(crate) fn mark_all(&self) {
        for (index, word) in self.words.iter().enumerate() {
            let rest = self.pages - index as u64 * 64;
            word.store(
                if rest >= 64 {
                    u64::MAX
                } else {
                    (1 << rest) - 1
                },
                SeqCst,
            );
        }
    }

    /// The word `index`, left as it is.
    pub(crate) fn word(&self, index: usize) -> u64 {
        self.words[index].load(SeqCst)
    }

    /// Clears the bits of `mask` in word `index`; gives those that were set.
    pub(crate) fn take(&self, index: usize, mask: u64) -> u64 {
        point();
        if self.words[index].load(SeqCst) & mask == 0 {
            return 0;
        }
        self.words[index].fetch_and(!mask, SeqCst) & mask
    }
}

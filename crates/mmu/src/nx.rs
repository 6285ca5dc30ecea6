//! The NX huge page workaround: which tables stand in a huge page's place because of fetches.

use crate::memslot::AddressSpace;
use crate::mmu::{Mmu, Owed};
use crate::sync::{self, Mutex};
use arch::addr::Gfn;
use arch::paging::Level;
use std::collections::VecDeque;

/// Tables to be recovered, oldest first.
#[derive(Debug, Default)]
pub(crate) struct NxSplits(Mutex<VecDeque<(AddressSpace, Gfn, Level)>>);

/// How many tables are kept in mind.
const MAX_NOTED: usize = 1 << 16;

impl Mmu {
    pub(crate) fn note_nx_split(&self, space: AddressSpace, gfn: Gfn, level: Level) {
        self.counters.nx_split.add(1);
        let first = gfn.align_down(level.pages());
        let mut splits = sync::lock(&self.nx_splits.0);
        // Who never recovers need not pay for it: the oldest are forgotten.
        if splits.len() == MAX_NOTED {
            splits.pop_front();
        }
        splits.push_back((space, first, level));
    }

    /// Unlinks up to `max` of the tables that instruction fetches put in the place of huge pages,
    /// oldest first, so that the next data access maps a huge page again. Returns how many were.
    /// To be called now and then: what still executes is split again.
    pub fn recover_nx_huge_pages(&self, max: usize) -> usize {
        let exclusive = self.exclusive();
        let mut owed = Owed::default();
        let mut recovered = 0;
        let batch: Vec<_> = {
            let mut splits = sync::lock(&self.nx_splits.0);
            let count = max.min(splits.len());
            splits.drain(..count).collect()
        };
        for (space, gfn, level) in batch {
            // It may be gone by now, or be a huge page again: then there is nothing to unlink.
            if self.unlink_table(&exclusive, space, gfn, level, &mut owed) {
                recovered += 1;
            }
        }
        self.counters.nx_recovered.add(recovered as u64);
        self.finish(exclusive, owed);
        recovered
    }
}

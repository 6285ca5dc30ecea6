//! Read sections that an updater can wait out: sleepable RCU in miniature.
//!
//! A reader enters a section, loads the current snapshot and may use what it found (a host address,
//! say) until it leaves. An updater publishes a new snapshot and then calls
//! [`Srcu::synchronize`]: when that returns, every section that could have seen the old snapshot
//! has ended.
//!
//! Why waiting for each counter to be zero once is enough: a reader that saw the old snapshot
//! counted itself before it loaded the snapshot, which was before the updater's store, which is
//! before the updater reads the counters. So the updater sees it counted until it leaves. Turning
//! new readers over to the other counter first only keeps them from starving the updater.
//!
//! The counters are split by thread, so that readers do not share a cache line.

use crate::sync::{self, AtomicUsize, Mutex, Padded, SHARDS};
use std::sync::atomic::Ordering::SeqCst;

/// The counters of one protected thing.
#[derive(Debug, Default)]
pub(crate) struct Srcu {
    side: AtomicUsize,
    readers: [Padded<[AtomicUsize; 2]>; SHARDS],
    updater: Mutex<()>,
}

/// A read section; it ends when dropped.
#[derive(Debug)]
pub(crate) struct ReadSection<'a> {
    readers: &'a AtomicUsize,
}

impl Srcu {
    /// Enters a read section.
    #[inline]
    pub(crate) fn read(&self) -> ReadSection<'_> {
        let readers = &self.readers[sync::shard()].0[self.side.load(SeqCst) & 1];
        readers.fetch_add(1, SeqCst);
        ReadSection { readers }
    }

    /// Waits until every section that was entered before the call has ended. Must not be called
    /// from inside a section.
    pub(crate) fn synchronize(&self) {
        let _one_at_a_time = sync::lock(&self.updater);
        for _ in 0..2 {
            let side = self.side.fetch_xor(1, SeqCst) & 1;
            for shard in &self.readers {
                let mut turn = 0;
                while shard.0[side].load(SeqCst) != 0 {
                    sync::pause(turn);
                    turn += 1;
                }
            }
        }
    }
}

impl Drop for ReadSection<'_> {
    #[inline]
    fn drop(&mut self) {
        self.readers.fetch_sub(1, SeqCst);
    }
}

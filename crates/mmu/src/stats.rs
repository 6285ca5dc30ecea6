//! A counter at every decision.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

/// A number of events.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// One more, from the only thread that writes this counter.
    #[inline(always)]
    pub(crate) fn bump(&self) {
        self.0.store(self.0.load(Relaxed) + 1, Relaxed);
    }

    /// More, from any thread.
    #[inline]
    pub(crate) fn add(&self, by: u64) {
        self.0.fetch_add(by, Relaxed);
    }
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// Counters of one vCPU, or of what no vCPU does.
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter,)+
        }

        /// Values of all counters at one moment (of each counter's own).
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Stats {
            $($(#[doc = $doc])+ pub $name: u64,)+
        }

        impl Counters {
            pub(crate) fn add_to(&self, stats: &mut Stats) {
                $(stats.$name += self.$name.0.load(Relaxed);)+
            }
        }

        impl Stats {
            /// Every counter with its name and value, in a fixed order.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)+].into_iter()
            }
        }
    };
}

counters! {
    /// Faults taken, of any kind.
    faults,
    /// Faults settled by the fast path.
    fast_fixed,
    /// Fast-path exchanges that other threads won every time.
    fast_lost,
    /// Faults whose access turned out to be allowed already.
    spurious,
    /// Mappings of 4 KiB made for a fault.
    mapped_4k,
    /// Mappings of 2 MiB made for a fault.
    mapped_2m,
    /// Mappings of 1 GiB made for a fault.
    mapped_1g,
    /// Neighbours mapped along with a fault.
    prefetched,
    /// Tables linked.
    table_linked,
    /// Tables that another thread had linked first.
    link_lost,
    /// Leaves that another thread changed first, or whose page's state changed.
    map_lost,
    /// Faults given up because host memory was invalidated meanwhile.
    stale_invalidation,
    /// Faults given up because the root was no longer valid.
    stale_root,
    /// Faults given up because their slot is being deleted or moved.
    stale_slot,
    /// Probes of host memory by system call.
    host_probes,
    /// Faults on host memory that is not there.
    host_missing,
    /// Writes to write-tracked pages.
    write_tracked,
    /// Fetches from pages that trap execution.
    execute_trapped,
    /// Fetches from holes.
    hole_fetches,
    /// Writes to read-only slots.
    read_only_writes,
    /// MMIO accesses found in a vCPU's cache.
    mmio_cached,
    /// MMIO accesses settled by the entry.
    mmio_by_entry,
    /// MMIO entries of an earlier generation met.
    mmio_stale,
    /// Misconfigurations whose entry was gone or replaced when looked at.
    mmio_vanished,
    /// Misconfigurations that are none of the MMU's making.
    mmio_invalid,
    /// MMIO entries made.
    mmio_mapped,
    /// MMIO accesses that left no entry (a change of slots in progress, or out of reach).
    mmio_unmapped,
    /// MMIO entries removed.
    mmio_zapped,
    /// Leaves removed.
    leaf_zapped,
    /// Tables unlinked.
    table_unlinked,
    /// Tables freed.
    table_freed,
    /// Tables unlinked to make room.
    table_reclaimed,
    /// Huge leaves split.
    huge_split,
    /// Huge leaves that replaced a table.
    huge_formed,
    /// Tables that stand in a huge page's place because of fetches.
    nx_split,
    /// Of those, tables removed by recovery.
    nx_recovered,
    /// Leaves write-protected or cleaned for the dirty log.
    write_protected,
    /// Leaves aged.
    aged,
    /// Flushes sent round.
    flushes,
    /// Times all roots were made invalid.
    zap_all,
    /// Changes of memslots.
    slot_changes,
    /// Page faults in shadow mode that were the guest's own.
    guest_faults,
    /// Shadow pages made.
    shadow_made,
    /// Shadow pages taken away.
    shadow_zapped,
    /// Shadow pages that became unsync.
    unsynced,
    /// Shadow pages brought up to date and protected again.
    synced,
    /// Shadow pages zapped because their guest table was written again and again.
    write_floods,
}

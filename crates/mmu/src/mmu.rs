//! The MMU of one VM.

use crate::config::{Config, ConfigError};
use crate::dirty_log::{DirtyOptions, DirtySink};
use crate::gate::{Flush, Gates, Processors};
use crate::host::{HostMemory, ProcessMemory};
use crate::memslot::{AddressSpace, Memslot, Memslots};
use crate::mmio::MmioCache;
use crate::nx::NxSplits;
use crate::shadow::Shadow;
use crate::spte::{LeafPolicy, MmioFormat, Spte};
use crate::srcu::{ReadSection, Srcu};
use crate::stats::{Counters, Stats};
use crate::sync::{
    self, AtomicU64, AtomicUsize, Mutex, Padded, RwLock, RwLockReadGuard, RwLockWriteGuard, SHARDS,
};
use crate::tdp::{Retired, Root, TableCache, TablePool};
use crate::track::WriteListener;
use crate::vcpu::Vcpu;
use arc_swap::ArcSwap;
use arch::addr::{Gfn, Hva};
use arch::controls::Eptp;
use arch::paging::{EptFeatures, EptPaging, Level};
use std::ops::{Deref, Range};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, OnceLock};

/// KVM's MMU for one VM.
pub struct Mmu {
    pub(crate) config: Config,
    pub(crate) policy: LeafPolicy,
    pub(crate) mmio_format: MmioFormat,
    /// The format that processors walk, for judging entries found wrong.
    pub(crate) ept: EptPaging,
    pub(crate) host: Box<dyn HostMemory>,

    /// Changes of memslots, one at a time. Taken before everything else.
    pub(crate) update: Mutex<()>,
    pub(crate) snapshot: ArcSwap<Memslots>,
    pub(crate) srcu: Srcu,
    /// The generation of the current snapshot, for the MMIO path.
    pub(crate) generation: AtomicU64,

    lock: MmuLock,
    pub(crate) invalidations: Invalidations,

    pub(crate) roots: Mutex<[Option<Arc<Root>>; 2]>,
    pub(crate) pool: Arc<TablePool>,
    pub(crate) retired: Mutex<Vec<Retired>>,
    pub(crate) has_retired: AtomicUsize,
    pub(crate) reclaim_hand: AtomicU64,
    pub(crate) nx_splits: NxSplits,
    pub(crate) shadow: Shadow,
    /// Some shadow page may be unsync.
    pub(crate) has_unsync: AtomicUsize,
    /// A nested EPT has been shadowed.
    pub(crate) has_nested: AtomicUsize,

    gates: Gates,
    pub(crate) dirty_options: DirtyOptions,
    pub(crate) dirty_sink: OnceLock<Arc<dyn DirtySink>>,
    pub(crate) write_listeners: ArcSwap<Vec<Arc<dyn WriteListener>>>,
    pub(crate) counters: Arc<Counters>,
    vcpu_counters: Mutex<Vec<Arc<Counters>>>,
}

/// Host memory that is being taken away. Written under the exclusive lock, read under the shared one.
#[derive(Debug, Default)]
pub(crate) struct Invalidations {
    in_progress: AtomicU64,
    /// Everything that is or was in progress since the last moment with none.
    start: AtomicU64,
    end: AtomicU64,
    /// Counts those that have ended.
    sequence: AtomicU64,
}

impl Invalidations {
    pub(crate) fn begin(&self, _: &Exclusive<'_>, range: &Range<Hva>) {
        let (mut start, mut end) = (range.start.get(), range.end.get());
        if self.in_progress.fetch_add(1, SeqCst) != 0 {
            start = start.min(self.start.load(SeqCst));
            end = end.max(self.end.load(SeqCst));
        }
        self.start.store(start, SeqCst);
        self.end.store(end, SeqCst);
    }

    pub(crate) fn end(&self, _: &Exclusive<'_>) {
        self.sequence.fetch_add(1, SeqCst);
        if self.in_progress.fetch_sub(1, SeqCst) == 1 {
            self.start.store(0, SeqCst);
            self.end.store(0, SeqCst);
        }
    }

    /// To be noted before host memory is looked at.
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence.load(SeqCst)
    }

    /// Whether what was seen of the range since `sequence` was noted may have changed.
    pub(crate) fn has_hit(&self, _: &impl Locked, sequence: u64, range: &Range<Hva>) -> bool {
        let is_over = self.sequence() != sequence;
        is_over
            || self.start.load(SeqCst) < range.end.get()
                && range.start.get() < self.end.load(SeqCst)
    }
}

/// The MMU lock, split by thread: shared in one shard, exclusive in all.
#[derive(Debug, Default)]
struct MmuLock([Padded<RwLock<()>>; SHARDS]);

/// The MMU lock, shared.
pub(crate) struct Shared<'a>(#[allow(dead_code, reason = "held")] RwLockReadGuard<'a, ()>);
/// The MMU lock, exclusive.
pub(crate) struct Exclusive<'a>(
    #[allow(dead_code, reason = "held")] [RwLockWriteGuard<'a, ()>; SHARDS],
);

/// The MMU lock, either way.
pub(crate) trait Locked {}
impl Locked for Shared<'_> {}
impl Locked for Exclusive<'_> {}

/// What a change under the exclusive lock owes before the lock may be dropped.
#[must_use = "flushes and tables are owed until `Mmu::finish`"]
#[derive(Debug, Default)]
pub(crate) struct Owed {
    pub(crate) flush: Option<Flush>,
    pub(crate) tables: Vec<Retired>,
}

impl Owed {
    pub(crate) fn flush_range(&mut self, range: Range<Gfn>) {
        self.flush = Some(match self.flush.take() {
            Some(Flush::Range(all)) => {
                Flush::Range(all.start.min(range.start)..all.end.max(range.end))
            }
            Some(Flush::All) => Flush::All,
            None => Flush::Range(range),
        });
    }

    /// The table below an unlinked entry is to be freed, and what it translated flushed.
    pub(crate) fn retire(&mut self, space: AddressSpace, entry: Spte, level: Level, first: Gfn) {
        self.tables
            .extend(Retired::below(space, entry, level, first));
        self.flush_range(first..first.wrapping_add(level.pages()));
    }
}

/// A snapshot of the memslots. While it is held, no change of memslots completes that would make a
/// host address found through it invalid; do not hold it long, nor across a change of memslots.
pub struct SlotsGuard<'a> {
    snapshot: arc_swap::Guard<Arc<Memslots>>,
    _section: ReadSection<'a>,
}

impl Deref for SlotsGuard<'_> {
    type Target = Memslots;
    fn deref(&self) -> &Memslots {
        &self.snapshot
    }
}

/// No table page could be had, not even after making room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("out of page-table pages")]
pub struct OutOfTables;

impl Mmu {
    /// An MMU without slots, on the memory of this process.
    pub fn new(config: Config, processors: Arc<dyn Processors>) -> Result<Arc<Self>, ConfigError> {
        Self::with_host(config, processors, Box::new(ProcessMemory::new()))
    }

    /// An MMU that asks `host` whether memory is there.
    pub fn with_host(
        config: Config,
        processors: Arc<dyn Processors>,
        host: Box<dyn HostMemory>,
    ) -> Result<Arc<Self>, ConfigError> {
        config.check()?;
        let mut features =
            EptFeatures::EXECUTE_ONLY | EptFeatures::PAGES_2M | EptFeatures::PAGES_1G;
        features.set(EptFeatures::ACCESSED_DIRTY, config.accessed_dirty);
        let Some(ept) = EptPaging::new(config.levels, features, 52) else {
            return Err(ConfigError::Levels(config.levels));
        };
        let slots = Memslots::none(config.first_generation);
        Ok(Arc::new(Self {
            config,
            policy: LeafPolicy::new(&config),
            mmio_format: MmioFormat::new(config.physical_bits),
            ept,
            host,
            update: Mutex::new(()),
            generation: AtomicU64::new(slots.generation()),
            snapshot: ArcSwap::from_pointee(slots),
            srcu: Srcu::default(),
            lock: MmuLock::default(),
            invalidations: Invalidations::default(),
            roots: Mutex::new([None, None]),
            pool: Arc::new(TablePool::new(config.max_table_pages)),
            retired: Mutex::new(Vec::new()),
            has_retired: AtomicUsize::new(0),
            reclaim_hand: AtomicU64::new(0),
            nx_splits: NxSplits::default(),
            shadow: Shadow::default(),
            has_unsync: AtomicUsize::new(0),
            has_nested: AtomicUsize::new(0),
            gates: Gates::new(processors),
            dirty_options: DirtyOptions::default(),
            dirty_sink: OnceLock::new(),
            write_listeners: ArcSwap::from_pointee(Vec::new()),
            counters: Arc::new(Counters::default()),
            vcpu_counters: Mutex::new(Vec::new()),
        }))
    }

    /// The configuration it was made with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The MMU's part of a new vCPU, outside guest mode.
    pub fn create_vcpu(&self, id: u32) -> Vcpu {
        let counters = Arc::new(Counters::default());
        sync::lock(&self.vcpu_counters).push(Arc::clone(&counters));
        Vcpu {
            gate: self.gates.add(id),
            root: None,
            space: AddressSpace::Normal,
            cache: TableCache::new(Arc::clone(&self.pool)),
            mmio: MmioCache::default(),
            shadow: crate::shadow::VcpuShadow::default(),
            counters,
        }
    }

    /// The EPT pointer to enter guest mode with. To be called before every entry: it is cheap as
    /// long as the root is valid, and makes or finds another one when it is not.
    #[inline]
    pub fn load(&self, vcpu: &mut Vcpu) -> Result<Eptp, OutOfTables> {
        if let Some(root) = &vcpu.root
            && root.is_valid()
        {
            return Ok(self.eptp(root));
        }
        self.load_root(vcpu)
    }

    #[cold]
    fn load_root(&self, vcpu: &mut Vcpu) -> Result<Eptp, OutOfTables> {
        for _ in 0..2 {
            if let Some(root) = self.root(vcpu.space) {
                let eptp = self.eptp(&root);
                vcpu.root = Some(root);
                return Ok(eptp);
            }
            self.reclaim_tables(RECLAIM_BATCH);
        }
        Err(OutOfTables)
    }

    /// The valid root of an address space, made if there is none; `None` at the table limit.
    fn root(&self, space: AddressSpace) -> Option<Arc<Root>> {
        let mut roots = sync::lock(&self.roots);
        if let Some(root) = &roots[space.index()] {
            return Some(Arc::clone(root));
        }
        let level = Level::new(self.config.levels)?;
        let root = Arc::new(Root::new(space, level, &self.pool)?);
        roots[space.index()] = Some(Arc::clone(&root));
        Some(root)
    }

    pub(crate) fn current_root(&self, space: AddressSpace) -> Option<Arc<Root>> {
        sync::lock(&self.roots)[space.index()].clone()
    }

    fn eptp(&self, root: &Root) -> Eptp {
        Eptp::new(
            root.address().get(),
            self.config.levels,
            self.config.accessed_dirty,
        )
    }

    /// The current memslots.
    #[inline]
    pub fn slots(&self) -> SlotsGuard<'_> {
        let section = self.srcu.read();
        sync::point();
        SlotsGuard {
            snapshot: self.snapshot.load(),
            _section: section,
        }
    }

    pub(crate) fn shared(&self) -> Shared<'_> {
        Shared(sync::read(&self.lock.0[sync::shard()].0))
    }

    pub(crate) fn exclusive(&self) -> Exclusive<'_> {
        Exclusive(std::array::from_fn(|shard| {
            sync::write(&self.lock.0[shard].0)
        }))
    }

    /// Sends a flush round and waits for it.
    pub(crate) fn flush(&self, flush: &Flush) {
        self.counters.flushes.add(1);
        self.gates.flush(flush);
    }

    /// Returns when every processor that is in guest mode has left it once. The caller's own vCPU
    /// must be outside.
    pub fn synchronize(&self) {
        let nothing = Gfn::new(0);
        self.flush(&Flush::Range(nothing..nothing));
    }

    /// Makes every processor drop all translations: for changes that are not of tables (a change
    /// of what the processor may cache).
    pub fn flush_all(&self) {
        self.flush(&Flush::All);
    }

    /// Records a write to a page, if its slot is logged.
    #[inline]
    pub(crate) fn mark_slot_dirty(&self, slot: &Memslot, gfn: Gfn) {
        if slot.logs_dirty() {
            slot.mark_dirty(gfn);
            if let Some(sink) = self.dirty_sink.get() {
                sink.page_dirtied(slot.id(), slot.index(gfn));
            }
        }
    }

    /// The VM's counters: those of all its vCPUs, also of vCPUs that are gone, and its own.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats::default();
        self.counters.add_to(&mut stats);
        for counters in &*sync::lock(&self.vcpu_counters) {
            counters.add_to(&mut stats);
        }
        stats
    }

    /// Changes [`crate::Config::max_table_pages`], which the tables there are may not exceed: the
    /// oldest go.
    pub fn set_max_table_pages(&self, pages: usize) {
        self.pool.set_limit(pages);
        let mut used = self.pool.used();
        while used > pages {
            if self.config.shadow {
                self.reclaim_shadow();
            } else {
                self.reclaim_tables(RECLAIM_BATCH.min(used - pages));
            }
            let now = self.pool.used();
            if now >= used {
                // What is left is in use this moment.
                break;
            }
            used = now;
        }
    }

    /// Table pages in use, those set aside by vCPUs included.
    pub fn table_pages(&self) -> usize {
        self.pool.used()
    }
}

/// How often room is made for a fault before it fails.
pub(crate) const TOP_UPS: u32 = 16;
/// Tables unlinked at a time when the limit is reached.
pub(crate) const RECLAIM_BATCH: usize = 64;

impl Drop for Mmu {
    fn drop(&mut self) {
        // No vCPU can be inside any more: each holds what it needs by reference to this.
        for root in sync::lock(&self.roots).iter_mut().filter_map(Option::take) {
            root.invalidate();
        }
    }
}

impl std::fmt::Debug for Mmu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mmu")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

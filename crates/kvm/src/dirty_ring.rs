//! The dirty ring: written pages as a queue per vCPU instead of a bitmap per slot.
//!
//! An entry's flags say whose it is: 0 free, [`DIRTY`] published for user space, [`RESET`]
//! returned by user space, which KVM_RESET_DIRTY_RINGS frees and protects again. A ring that is
//! nearly full ends KVM_RUN until user space has made room.
//!
//! Source: KVM API, "KVM_CAP_DIRTY_LOG_RING".

use crate::error::{Result, fail};
use crate::run_area::{DIRTY_RING_PAGE, Mapping, PAGE, RunArea};
use kvm_bindings::kvm_dirty_gfn;
use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The entry is for user space to collect.
const DIRTY: u32 = 1 << 0;
/// User space has collected the entry.
const RESET: u32 = 1 << 1;
/// Entries kept free for pages that one entry into the guest can dirty.
const RESERVED: u32 = 64;
/// Entries kept free, too, where a page-modification log fills the ring: the log's.
const RESERVED_FOR_LOG: u32 = 512;
/// The largest ring, in bytes.
pub(crate) const MAX_BYTES: u32 = 65536 * size_of::<kvm_dirty_gfn>() as u32;

/// The dirty ring of one vCPU.
#[derive(Debug)]
pub(crate) struct DirtyRing {
    /// The entries.
    mapping: Mapping,
    count: u32,
    /// Entries kept free.
    reserved: u32,
    /// Entries published and entries freed, ever.
    published: AtomicU32,
    freed: AtomicU32,
    producer: Mutex<()>,
}

// SAFETY: the mapping is shared memory whose entries are handed over by their flags, which are
// accessed atomically; the indices are this value's own.
unsafe impl Send for DirtyRing {}
// SAFETY: as above; producers take turns by the mutex.
unsafe impl Sync for DirtyRing {}

/// Entries kept free.
fn reserved(with_log: bool) -> u32 {
    if with_log {
        RESERVED + RESERVED_FOR_LOG
    } else {
        RESERVED
    }
}

/// Whether a ring may have this size in bytes.
pub(crate) fn check_size(bytes: u64, with_log: bool) -> Result<u32> {
    let least = (reserved(with_log) as u64 + 1) * size_of::<kvm_dirty_gfn>() as u64;
    if !bytes.is_power_of_two() || bytes < least.max(PAGE as u64) {
        return fail(libc::EINVAL);
    }
    if bytes > MAX_BYTES as u64 {
        return fail(libc::E2BIG);
    }
    Ok(bytes as u32)
}

impl DirtyRing {
    /// Its size.
    pub(crate) fn bytes(&self) -> usize {
        self.count as usize * size_of::<kvm_dirty_gfn>()
    }

    /// Maps the ring of `bytes` bytes behind a vCPU's area.
    pub(crate) fn new(area: &RunArea, bytes: u32, with_log: bool) -> Result<Arc<DirtyRing>> {
        let offset = (DIRTY_RING_PAGE * PAGE) as u64;
        let mapping = Mapping::new(area.fd(), offset, bytes as usize)?;
        Ok(Arc::new(DirtyRing {
            mapping,
            count: bytes / size_of::<kvm_dirty_gfn>() as u32,
            reserved: reserved(with_log),
            published: AtomicU32::new(0),
            freed: AtomicU32::new(0),
            producer: Mutex::new(()),
        }))
    }

    fn entry(&self, index: u32) -> *mut kvm_dirty_gfn {
        // SAFETY: the index is reduced to the number of entries of the mapping.
        unsafe {
            self.mapping
                .base()
                .cast::<kvm_dirty_gfn>()
                .add((index & (self.count - 1)) as usize)
        }
    }

    fn flags(&self, index: u32) -> &AtomicU32 {
        // SAFETY: the entry is in the mapping, which lives as long as `self`; its flags are only
        // accessed atomically.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.entry(index)).flags) }
    }

    /// Publishes a page. A full ring, which entries are kept free to prevent, loses nothing: the
    /// slot's bitmap has the page too.
    fn push(&self, slot: u32, offset: u64) {
        let _producer = self.producer.lock().unwrap_or_else(PoisonError::into_inner);
        let index = self.published.load(Ordering::Relaxed);
        if index.wrapping_sub(self.freed.load(Ordering::Acquire)) >= self.count {
            tracing::error!(slot, offset, "dirty ring overflow");
            return;
        }
        let entry = self.entry(index);
        // SAFETY: a free entry is the producer's alone; it is published by its flags.
        unsafe {
            (&raw mut (*entry).slot).write(slot);
            (&raw mut (*entry).offset).write(offset);
        }
        self.flags(index).store(DIRTY, Ordering::Release);
        self.published
            .store(index.wrapping_add(1), Ordering::Release);
    }

    /// Whether user space must make room before the guest runs again.
    pub(crate) fn is_nearly_full(&self) -> bool {
        let used = self
            .published
            .load(Ordering::Relaxed)
            .wrapping_sub(self.freed.load(Ordering::Relaxed));
        used >= self.count - self.reserved
    }

    /// Frees the entries that user space has collected, in order: their slots and offsets.
    pub(crate) fn take_collected(&self) -> Vec<(u32, u64)> {
        let mut collected = Vec::new();
        loop {
            let index = self.freed.load(Ordering::Relaxed);
            if index == self.published.load(Ordering::Acquire)
                || self.flags(index).load(Ordering::Acquire) & RESET == 0
            {
                return collected;
            }
            // SAFETY: the flags handed the entry back.
            let entry = unsafe { self.entry(index).read() };
            self.flags(index).store(0, Ordering::Release);
            self.freed.store(index.wrapping_add(1), Ordering::Release);
            collected.push((entry.slot, entry.offset));
        }
    }
}

thread_local! {
    /// The ring of the vCPU that runs on this thread.
    static CURRENT: Cell<*const DirtyRing> = const { Cell::new(std::ptr::null()) };
}

/// Makes `ring` the calling thread's until the guard is dropped.
pub(crate) fn enter(ring: Option<&DirtyRing>) -> Guard<'_> {
    CURRENT.with(|current| current.set(ring.map_or(std::ptr::null(), std::ptr::from_ref)));
    Guard(std::marker::PhantomData)
}

/// See [`enter`].
pub(crate) struct Guard<'a>(std::marker::PhantomData<&'a DirtyRing>);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        CURRENT.with(|current| current.set(std::ptr::null()));
    }
}

/// Puts written pages into the ring of the vCPU that wrote them. What other threads write (an
/// ioctl that changes guest memory) goes to the first vCPU's ring.
#[derive(Debug, Default)]
pub(crate) struct Rings {
    all: Mutex<Vec<Arc<DirtyRing>>>,
}

impl Rings {
    pub(crate) fn add(&self, ring: Arc<DirtyRing>) {
        self.all
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(ring);
    }

    /// All rings.
    pub(crate) fn all(&self) -> Vec<Arc<DirtyRing>> {
        self.all
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl mmu::DirtySink for Rings {
    fn page_dirtied(&self, slot: mmu::SlotId, index: u64) {
        let number = (slot.space as u32) << 16 | slot.number as u32;
        let current = CURRENT.with(Cell::get);
        if !current.is_null() {
            // SAFETY: set only while the guard that borrows the ring lives on this thread.
            unsafe { &*current }.push(number, index);
        } else if let Some(first) = self.all().first() {
            first.push(number, index);
        }
    }
}

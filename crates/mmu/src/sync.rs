//! What threads synchronise with, so that the model checker can take its place.
//!
//! With the `model` feature the primitives are `shuttle`'s, and [`point`] marks each access to an
//! entry as a place where another thread may run. Without it everything is `std`'s and `point`
//! vanishes. Mutants switch off one check or ordering, for the models to catch; outside the feature
//! they are constant `false`.

#[cfg(not(feature = "model"))]
pub(crate) use std::sync::{
    Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic::AtomicU64,
    atomic::AtomicUsize,
};

#[cfg(feature = "model")]
pub(crate) use shuttle::sync::{
    Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic::AtomicU64,
    atomic::AtomicUsize,
};

/// A place where another thread may run, under the model checker.
#[inline(always)]
pub(crate) fn point() {
    // An access to a shared variable: unlike a yield, it does not say that the thread waits.
    #[cfg(feature = "model")]
    shuttle::sync::atomic::AtomicBool::new(false).load(std::sync::atomic::Ordering::SeqCst);
}

/// Gives its content a cache line (and the one that is fetched along with it) of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Padded<T>(pub(crate) T);

/// How many ways the counters and locks that every fault passes through are split, so that faults of
/// different threads do not pass a cache line back and forth.
pub(crate) const SHARDS: usize = if cfg!(feature = "model") { 1 } else { 8 };
const _: () = assert!(SHARDS.is_power_of_two());

/// The calling thread's shard.
#[inline]
pub(crate) fn shard() -> usize {
    use std::sync::atomic::AtomicUsize as Plain;
    static NEXT: Plain = Plain::new(0);
    thread_local! {
        static OWN: usize = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed) & (SHARDS - 1);
    }
    OWN.with(|own| *own)
}

/// One turn of waiting for another thread: spins first, then lets others run.
#[inline]
pub(crate) fn pause(turn: u32) {
    #[cfg(feature = "model")]
    {
        let _ = turn;
        shuttle::thread::yield_now();
    }
    #[cfg(not(feature = "model"))]
    match turn {
        0..64 => std::hint::spin_loop(),
        64..256 => std::thread::yield_now(),
        _ => std::thread::sleep(std::time::Duration::from_micros(50)),
    }
}

/// Takes a lock whose holders leave no broken state when they panic: a panic elsewhere in the
/// process must not spread to every vCPU.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// [`lock`] for the shared side of a reader-writer lock.
pub(crate) fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// [`lock`] for the exclusive side of a reader-writer lock.
pub(crate) fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The mutants: each removes one check or ordering that the models must notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mutant {
    /// A leaf is stored instead of compare-exchanged.
    BlindMap = 1,
    /// A removed table's entries are not frozen.
    NoFreeze,
    /// The invalidation sequence is not checked under the lock.
    NoSequenceCheck,
    /// The fast path does not mark the page dirty after making it writable.
    NoFastPathMark,
    /// A dirty-log clear does not wait for the fast path.
    NoFlushWait,
    /// An MMIO entry's generation is not compared.
    NoGenerationCheck,
    /// Table pages are freed without waiting for processors and readers.
    FreeWithoutFlush,
    /// Making all roots invalid flushes after the lock is dropped.
    ZapAllUnlocked,
    /// Restricting a page flushes only if its leaf had the right.
    RestrictWithoutFlush,
    /// A guest table is not write-protected when it gets a shadow page.
    NoTableProtection,
    /// Guest entries are not read again under the lock.
    NoSecondRead,
    /// A part of a large guest page is linked without a second look at the page's entry.
    NoLookAtLargePage,
    /// What was derived from an entry goes after the entry is written.
    WriteFirst,
}

#[cfg(feature = "model")]
mod mutants {
    use std::sync::atomic::{AtomicU8, Ordering};

    static ACTIVE: AtomicU8 = AtomicU8::new(0);

    /// Turns one mutant on, or all off. Process-wide: one model at a time.
    pub fn set_mutant(mutant: Option<super::Mutant>) {
        ACTIVE.store(mutant.map_or(0, |m| m as u8), Ordering::SeqCst);
    }

    pub(crate) fn is_mutant(mutant: super::Mutant) -> bool {
        ACTIVE.load(Ordering::SeqCst) == mutant as u8
    }
}
#[cfg(feature = "model")]
pub(crate) use mutants::is_mutant;
#[cfg(feature = "model")]
pub use mutants::set_mutant;

/// Whether the check that `mutant` removes is to be skipped.
#[cfg(not(feature = "model"))]
#[inline(always)]
pub(crate) const fn is_mutant(_: Mutant) -> bool {
    false
}

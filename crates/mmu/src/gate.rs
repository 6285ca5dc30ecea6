//! Where each processor is, and how to be sure that none still uses what was removed.
//!
//! A vCPU is *outside*, *in guest mode* (its processor walks tables and caches translations) or
//! *reading* page tables without a lock. A thread that removes a translation
//!
//! 1. unlinks it,
//! 2. posts a flush to every gate,
//! 3. kicks every vCPU that is in guest mode,
//! 4. waits until every gate that was inside has been left at least once, and then frees.
//!
//! ```text
//!   vCPU                            remover
//!   session := inside               pending := flush
//!   pending set?  yes → outside,    session inside?  yes → kick, wait for another session
//!                       flush
//! ```
//!
//! Both sides write before they read, sequentially consistent, so at least one of them sees the
//! other: either the vCPU finds the flush and does not run on stale translations, or the remover
//! waits for it. A new session that begins while the remover waits has seen the flush, so waiting
//! for *another* session is enough and nobody can starve the remover.

use crate::sync::{self, AtomicU64, AtomicUsize, Mutant, Mutex};
use arch::addr::Gfn;
use std::ops::Range;
use std::sync::atomic::Ordering::{Release, SeqCst};
use std::sync::{Arc, Weak};

/// What a vCPU's host (KVM) does for the flush protocol.
pub trait Processors: Send + Sync {
    /// Makes the vCPU leave guest mode soon. It must stick: a kick that comes after
    /// [`Gate::enter`] succeeded and before the first guest instruction ends that entry, too. For a
    /// vCPU that is not in guest mode any more it does no harm.
    fn kick(&self, vcpu: u32);
}

/// Translations that a processor must drop.
#[must_use = "a flush that is owed must reach the processors"]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Those of these guest frames, in every address space.
    Range(Range<Gfn>),
    /// All of them.
    All,
}

impl Flush {
    fn merge(self, other: Flush) -> Flush {
        match (self, other) {
            (Flush::Range(a), Flush::Range(b)) => {
                Flush::Range(a.start.min(b.start)..a.end.max(b.end))
            }
            _ => Flush::All,
        }
    }
}

/// What [`Gate::enter`] found.
#[must_use]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The vCPU is in guest mode: run it.
    Ready,
    /// The vCPU is still outside and its processor holds translations that are gone: drop them,
    /// and start again with [`crate::Mmu::load`], since the root may be another one now.
    Flush(Flush),
}

const OUTSIDE: u64 = 0;
const GUEST: u64 = 1;
const READING: u64 = 2;
const MODE: u64 = 3;
const NEXT_SESSION: u64 = 4;

/// One vCPU's gate. Only the vCPU's own thread passes through it; others post to it and wait at it.
#[derive(Debug)]
#[repr(align(128))]
pub struct Gate {
    vcpu: u32,
    /// A counter of sessions with the mode in its low bits.
    session: AtomicU64,
    has_pending: AtomicUsize,
    pending: Mutex<Option<Flush>>,
}

/// Reading page tables without a lock; ends when dropped.
#[derive(Debug)]
pub(crate) struct Reading<'a> {
    gate: &'a Gate,
}

impl Gate {
    pub(crate) fn new(vcpu: u32) -> Self {
        Self {
            vcpu,
            session: AtomicU64::new(OUTSIDE),
            has_pending: AtomicUsize::new(0),
            pending: Mutex::new(None),
        }
    }

    /// Puts the vCPU into guest mode unless it owes a flush. Until [`Gate::exit`] other threads may
    /// kick it and wait for that, holding the MMU's lock: the vCPU's thread must run the guest and
    /// leave, and call nothing of the MMU in between.
    #[inline]
    pub fn enter(&self) -> Entry {
        self.begin(GUEST);
        if self.has_pending.load(SeqCst) == 0 {
            return Entry::Ready;
        }
        self.end();
        self.take_flush().map_or_else(|| self.enter(), Entry::Flush)
    }

    /// Takes the vCPU out of guest mode.
    #[inline]
    pub fn exit(&self) {
        debug_assert_eq!(self.session.load(SeqCst) & MODE, GUEST);
        self.end();
    }

    /// Whether a flush waits for the vCPU: the processor's loop may ask instead of being kicked.
    #[inline]
    pub fn has_pending_flush(&self) -> bool {
        self.has_pending.load(SeqCst) != 0
    }

    /// Begins a lockless read of page tables; not from guest mode and not nested.
    #[inline]
    pub(crate) fn read(&self) -> Reading<'_> {
        self.begin(READING);
        Reading { gate: self }
    }

    /// Takes the flush that is owed, if any: for a vCPU that flushes before it enters.
    pub fn take_flush(&self) -> Option<Flush> {
        let mut pending = sync::lock(&self.pending);
        self.has_pending.store(0, SeqCst);
        pending.take()
    }

    #[inline]
    fn begin(&self, mode: u64) {
        let session = self.session.load(SeqCst);
        debug_assert_eq!(session & MODE, OUTSIDE, "one session at a time");
        // A swap, since x86 orders it before the loads that follow.
        self.session
            .swap((session & !MODE) + NEXT_SESSION + mode, SeqCst);
    }

    #[inline]
    fn end(&self) {
        let session = self.session.load(SeqCst);
        // A plain store on x86: nothing that the vCPU reads afterwards is the protocol's.
        self.session
            .store((session & !MODE) + NEXT_SESSION, Release);
    }

    fn post(&self, flush: Flush) {
        let mut pending = sync::lock(&self.pending);
        *pending = Some(match pending.take() {
            Some(earlier) => earlier.merge(flush),
            None => flush,
        });
        self.has_pending.store(1, SeqCst);
    }
}

impl Drop for Reading<'_> {
    #[inline]
    fn drop(&mut self) {
        self.gate.end();
    }
}

/// All the gates of a VM.
pub(crate) struct Gates {
    gates: Mutex<Vec<Weak<Gate>>>,
    processors: Arc<dyn Processors>,
}

/// How often a waiter looks before it kicks again; a safety net, not part of the protocol.
const TURNS_PER_KICK: u32 = 4096;

impl Gates {
    pub(crate) fn new(processors: Arc<dyn Processors>) -> Self {
        Self {
            gates: Mutex::new(Vec::new()),
            processors,
        }
    }

    pub(crate) fn add(&self, vcpu: u32) -> Arc<Gate> {
        let gate = Arc::new(Gate::new(vcpu));
        let mut gates = sync::lock(&self.gates);
        gates.retain(|gate| gate.strong_count() > 0);
        gates.push(Arc::downgrade(&gate));
        gate
    }

    /// The protocol: when this returns, no processor uses a translation, and no lockless reader an
    /// entry or table, that was unlinked before the call. The caller's own vCPU must be outside.
    pub(crate) fn flush(&self, flush: &Flush) {
        let gates: Vec<_> = sync::lock(&self.gates)
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        for gate in &gates {
            gate.post(flush.clone());
        }
        if sync::is_mutant(Mutant::NoFlushWait) || sync::is_mutant(Mutant::FreeWithoutFlush) {
            return;
        }
        let inside: Vec<_> = gates.iter().map(|gate| gate.session.load(SeqCst)).collect();
        for (gate, session) in gates.iter().zip(&inside) {
            if session & MODE == GUEST {
                self.processors.kick(gate.vcpu);
            }
        }
        for (gate, &session) in gates.iter().zip(&inside) {
            self.wait(gate, session);
        }
    }

    fn wait(&self, gate: &Gate, session: u64) {
        let mut turn = 0;
        while session & MODE != OUTSIDE && gate.session.load(SeqCst) == session {
            sync::pause(turn);
            turn += 1;
            if turn.is_multiple_of(TURNS_PER_KICK) && session & MODE == GUEST {
                self.processors.kick(gate.vcpu);
            }
        }
    }
}

impl std::fmt::Debug for Gates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gates").finish_non_exhaustive()
    }
}

#[cfg(all(test, not(feature = "model")))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    struct Flag(AtomicBool);
    impl Processors for Flag {
        fn kick(&self, _: u32) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_flush_posted_outside_is_found_at_entry_and_merges() {
        let gates = Gates::new(Arc::new(Flag(AtomicBool::new(false))));
        let gate = gates.add(0);
        gates.flush(&Flush::Range(Gfn::new(5)..Gfn::new(6)));
        gates.flush(&Flush::Range(Gfn::new(1)..Gfn::new(2)));
        assert_eq!(
            gate.enter(),
            Entry::Flush(Flush::Range(Gfn::new(1)..Gfn::new(6)))
        );
        assert_eq!(gate.enter(), Entry::Ready);
        gate.exit();
        gates.flush(&Flush::Range(Gfn::new(1)..Gfn::new(2)));
        gates.flush(&Flush::All);
        assert_eq!(gate.enter(), Entry::Flush(Flush::All));
    }

    #[test]
    fn a_vcpu_in_guest_mode_is_kicked_and_waited_for() {
        let flag = Arc::new(Flag(AtomicBool::new(false)));
        let gates = Gates::new(flag.clone());
        let gate = gates.add(0);
        assert_eq!(gate.enter(), Entry::Ready);
        std::thread::scope(|scope| {
            scope.spawn(|| gates.flush(&Flush::All));
            while !flag.0.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            gate.exit();
        });
        assert_eq!(gate.enter(), Entry::Flush(Flush::All));
    }
}

//! The MMIO path: what a misconfiguration means.
//!
//! | found | meaning | verdict |
//! | --- | --- | --- |
//! | the vCPU's cache, of the current generation | the same page as last time | MMIO |
//! | our pattern, current generation | a hole, as when the entry was made | MMIO, cached |
//! | our pattern, another generation | memslots changed since | as a violation |
//! | empty, frozen, or a proper mapping | another vCPU zapped or replaced it | run again |
//! | anything malformed | not of the MMU's making | invalid, with a dump |
//!
//! The page's address comes from the entry, never from a second walk of the guest's tables: the
//! guest may have changed them since the access.

use crate::fault::{FaultError, FaultResult};
use crate::mmu::Mmu;
use crate::spte::{GENERATION_MASK, Spte};
use crate::sync::{Mutant, is_mutant};
use crate::vcpu::Vcpu;
use arch::addr::{Gfn, Gpa};
use arch::page_fault::ErrorCode;
use std::sync::Once;
use std::sync::atomic::Ordering::Acquire;

/// An access to guest-physical memory that no slot takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioAccess {
    /// Where the faulting access begins.
    pub gpa: Gpa,
    /// It was recognised without looking at memslots.
    pub is_known: bool,
}

impl MmioAccess {
    pub(crate) fn uncached(gpa: Gpa) -> Self {
        Self {
            gpa,
            is_known: false,
        }
    }

    fn known(gfn: Gfn, gpa: Gpa) -> Self {
        Self {
            gpa: gfn.gpa().wrapping_add(gpa.page_offset()),
            is_known: true,
        }
    }
}

/// The last MMIO page of a vCPU.
#[derive(Debug)]
pub(crate) struct MmioCache {
    gfn: Gfn,
    generation: u64,
}

/// No generation: no snapshot has it.
const NO_GENERATION: u64 = u64::MAX;

impl Default for MmioCache {
    fn default() -> Self {
        Self {
            gfn: Gfn::new(0),
            generation: NO_GENERATION,
        }
    }
}

impl MmioCache {
    #[inline(always)]
    fn holds(&self, gfn: Gfn, generation: u64) -> bool {
        self.gfn == gfn && self.generation == generation
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

impl Mmu {
    /// The MMIO page that a misconfiguration at `gpa` hit, if it is the vCPU's last one. Unlike
    /// everything else about faults this may be asked in guest mode.
    #[inline]
    pub fn cached_mmio(&self, vcpu: &mut Vcpu, gpa: Gpa) -> Option<MmioAccess> {
        let generation = self.generation.load(Acquire);
        if !vcpu.mmio.holds(gpa.gfn(), generation) {
            return None;
        }
        vcpu.counters.faults.bump();
        vcpu.counters.mmio_cached.bump();
        Some(MmioAccess::known(gpa.gfn(), gpa))
    }

    #[inline]
    pub(crate) fn misconfiguration(
        &self,
        vcpu: &mut Vcpu,
        gpa: Gpa,
        code: ErrorCode,
    ) -> FaultResult {
        let generation = self.generation.load(Acquire);
        if code.contains(ErrorCode::PRIVATE_ACCESS) {
            return private_reserved(gpa);
        }
        if vcpu.mmio.holds(gpa.gfn(), generation) {
            vcpu.counters.mmio_cached.bump();
            return FaultResult::Mmio(MmioAccess::known(gpa.gfn(), gpa));
        }
        self.misconfigured_entry(vcpu, gpa, code, generation)
    }

    fn misconfigured_entry(
        &self,
        vcpu: &mut Vcpu,
        gpa: Gpa,
        code: ErrorCode,
        generation: u64,
    ) -> FaultResult {
        let Some(root) = &vcpu.root else {
            return FaultResult::Retry;
        };
        let Some(entry) = self.lockless_entry(&vcpu.gate, root, gpa.gfn()) else {
            vcpu.counters.stale_root.bump();
            return FaultResult::Retry;
        };
        if !entry.is_mmio() {
            return self.vanished(vcpu, gpa, entry);
        }
        let is_current = entry.mmio_generation() == generation & GENERATION_MASK
            && generation & crate::memslot::UPDATE_IN_PROGRESS == 0;
        if is_current || is_mutant(Mutant::NoGenerationCheck) {
            debug_assert!(entry.is_mmio_writable());
            let gfn = self.mmio_format.gfn(entry);
            vcpu.mmio = MmioCache { gfn, generation };
            vcpu.counters.mmio_by_entry.bump();
            return FaultResult::Mmio(MmioAccess::known(gfn, gpa));
        }
        vcpu.counters.mmio_stale.bump();
        self.violation(vcpu, gpa, code - ErrorCode::RSVD)
    }

    /// The entry that the processor rejected is not the pattern (any more).
    fn vanished(&self, vcpu: &Vcpu, gpa: Gpa, entry: Spte) -> FaultResult {
        if entry == Spte::EMPTY || entry.is_frozen() {
            vcpu.counters.mmio_vanished.bump();
            return FaultResult::Retry;
        }
        if entry.is_present() && self.malformed_level(vcpu, gpa).is_none() {
            vcpu.counters.mmio_vanished.bump();
            return FaultResult::Retry;
        }
        vcpu.counters.mmio_invalid.bump();
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            tracing::error!(
                "EPT misconfiguration not of KVM's making:\n{}",
                self.dump_walk(vcpu, gpa)
            );
        });
        FaultResult::Invalid
    }
}

#[cold]
fn private_reserved(gpa: Gpa) -> FaultResult {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| tracing::warn!("reserved-bit fault on a private access at {gpa}"));
    FaultResult::Error(FaultError::PrivateReserved(gpa))
}

//! Page faults on guest memory: from a fault to a verdict.
//!
//! The order of the steps, each of which may settle the fault:
//!
//! 1. A misconfiguration (reserved bit) takes the MMIO path.
//! 2. The memslots: a hole, a slot in transition, a trap, a write that no memory takes.
//! 3. The fast path: one compare-exchange without a lock.
//! 4. Table pages are set aside, the invalidation sequence is noted, host memory is probed.
//! 5. Under the shared lock: give up if host memory was invalidated meanwhile; else map.
//!
//! Whatever is given up is [`FaultResult::Retry`]: the guest runs, faults again and meets the new
//! state.

use crate::host::HostAccess;
use crate::memslot::{AddressSpace, Memslot, Memslots, Probed};
use crate::mmio::MmioAccess;
use crate::mmu::{Mmu, RECLAIM_BATCH};
use crate::spte::LeafAccess;
use crate::sync::{Mutant, is_mutant};
use crate::tdp::{MapRequest, Root};
use crate::vcpu::Vcpu;
use arch::addr::{Gfn, Gpa, Hva, PAGE_SIZE};
use arch::page_fault::ErrorCode;
use arch::paging::Level;
use std::ops::Range;
use std::sync::Arc;

/// What is to be done about a fault.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultResult {
    /// The access is possible now: run the guest.
    Fixed,
    /// It was possible already (another vCPU was faster, or the processor remembered old rights):
    /// run the guest.
    Spurious,
    /// Something changed while the fault was handled: run the guest, which may fault again.
    Retry,
    /// There is no memory to access: emulate the instruction, whose access is MMIO at that address.
    /// A misconfiguration does not say what was tried: where it was the fetch of the instruction
    /// itself, the emulator finds no bytes there, which is an emulation failure.
    Mmio(MmioAccess),
    /// The page's writes are tracked: emulate the instruction, whose write KVM makes and reports to
    /// the trackers.
    WriteProtected,
    /// The page traps execution: leave to user space before the instruction has any effect.
    ExecuteTrap,
    /// An instruction was to be fetched from a frame without memory: an emulation failure for user
    /// space.
    FetchFromHole,
    /// The processor met an entry that is malformed and not the MMU's doing: an internal error.
    Invalid,
    /// The fault cannot be handled: the run fails.
    Error(FaultError),
}

/// Why a fault cannot be handled. The VM can run again when the cause is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FaultError {
    /// Host memory of a slot cannot be accessed: not mapped, protected, or beyond a file's end.
    /// KVM answers EFAULT.
    #[error("host memory at {hva} behind guest address {gpa} cannot be accessed")]
    HostMemory {
        /// The page's host address.
        hva: Hva,
        /// The guest address.
        gpa: Gpa,
    },
    /// No page for a table. KVM answers ENOMEM.
    #[error("out of page-table pages")]
    OutOfTables,
    /// A reserved-bit fault that claims a private access: a contradiction. KVM answers EFAULT.
    #[error("reserved-bit fault on a private access at {0}")]
    PrivateReserved(Gpa),
}

/// A fault being handled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) gpa: Gpa,
    pub(crate) gfn: Gfn,
    pub(crate) access: LeafAccess,
    pub(crate) is_present: bool,
}

impl Fault {
    pub(crate) fn new(gpa: Gpa, code: ErrorCode) -> Self {
        let access = LeafAccess {
            is_write: code.contains(ErrorCode::WRITE),
            is_fetch: code.contains(ErrorCode::FETCH),
        };
        let is_present = code.contains(ErrorCode::PRESENT);
        Self {
            gpa,
            gfn: gpa.gfn(),
            access,
            is_present,
        }
    }

    /// Whether a permission put aside could be what the fault lacks: of a present entry write
    /// permission; of an entry that is aged without accessed flags, and so not present, anything.
    pub(crate) fn may_be_fast(&self, accessed_dirty: bool) -> bool {
        if self.is_present {
            self.access.is_write
        } else {
            !accessed_dirty
        }
    }
}

/// Host memory found present.
pub(crate) struct Resolved {
    pub(crate) probed: Probed,
    /// All that shares the frame's probe record was probed: worth recording.
    pub(crate) is_chunk: bool,
    pub(crate) goal: Level,
}

impl Mmu {
    /// Handles a fault of a vCPU's processor at `gpa`.
    ///
    /// For an EPT violation, `code` says READ → USER, WRITE, FETCH, and PRESENT if any of the
    /// qualification's bits 5:3 is set; for an EPT misconfiguration it is RSVD. The vCPU is out of
    /// guest mode, after [`Mmu::load`].
    pub fn handle_page_fault(&self, vcpu: &mut Vcpu, gpa: Gpa, code: ErrorCode) -> FaultResult {
        vcpu.counters.faults.bump();
        let result = if code.contains(ErrorCode::RSVD) {
            self.misconfiguration(vcpu, gpa, code)
        } else {
            self.violation(vcpu, gpa, code)
        };
        self.drain_retired();
        result
    }

    pub(crate) fn violation(&self, vcpu: &mut Vcpu, gpa: Gpa, code: ErrorCode) -> FaultResult {
        let fault = Fault::new(gpa, code);
        // Taken out for the time of the fault: its reference count is everybody's.
        let root = vcpu.root.take().filter(|root| root.is_valid());
        let Some(root) = root else {
            vcpu.counters.stale_root.bump();
            return FaultResult::Retry;
        };
        let result = self.violation_below(vcpu, &root, &fault);
        vcpu.root = Some(root);
        result
    }

    fn violation_below(&self, vcpu: &mut Vcpu, root: &Root, fault: &Fault) -> FaultResult {
        let slots = self.slots();
        let slot = match self.judge(vcpu, &slots, fault) {
            Ok(slot) => slot,
            Err(Verdict::Hole) => return self.hole(vcpu, &slots, root, fault),
            Err(Verdict::Result(result)) => return result,
        };
        if let Some(result) = self.fast_fault(&vcpu.gate, root, slot, fault, &vcpu.counters) {
            return result;
        }
        if !self.top_up(vcpu) {
            return FaultResult::Error(FaultError::OutOfTables);
        }
        self.slow_fault(vcpu, root, slot, fault)
    }

    fn slow_fault(
        &self,
        vcpu: &mut Vcpu,
        root: &Root,
        slot: &Memslot,
        fault: &Fault,
    ) -> FaultResult {
        // Before host memory is looked at: an invalidation that ends after this is noticed below.
        let sequence = self.invalidations.sequence();
        let counters = Arc::clone(&vcpu.counters);
        let Some(resolved) = self.resolve(slot, fault) else {
            counters.host_missing.bump();
            let hva = slot.hva_of(fault.gfn);
            return FaultResult::Error(FaultError::HostMemory {
                hva,
                gpa: fault.gpa,
            });
        };
        crate::sync::point();
        let shared = self.shared();
        let range = self.touched(slot, fault.gfn, resolved.goal);
        let is_stale = self.invalidations.has_hit(&shared, sequence, &range);
        if is_stale && !is_mutant(Mutant::NoSequenceCheck) {
            counters.stale_invalidation.bump();
            return FaultResult::Retry;
        }
        if resolved.is_chunk {
            slot.set_probed(fault.gfn, resolved.probed);
        }
        let goal = self.goal_level(slot, fault.gfn, &resolved);
        let request = MapRequest {
            root,
            slot,
            gfn: fault.gfn,
            access: fault.access,
            goal,
            probed: if goal > Level::PTE {
                slot.probed_block(fault.gfn, goal)
            } else {
                resolved.probed
            },
        };
        self.map(&shared, &mut vcpu.cache, &counters, &request)
    }

    /// Fills the vCPU's cache of table pages, making room at the limit.
    pub(crate) fn top_up(&self, vcpu: &mut Vcpu) -> bool {
        // Others may take what was made room for.
        for _ in 0..crate::mmu::TOP_UPS {
            if vcpu.cache.top_up() {
                return true;
            }
            self.reclaim_tables(RECLAIM_BATCH.min(self.pool.limit() / 4));
        }
        vcpu.cache.top_up()
    }

    /// What the memslots say about a fault.
    fn judge<'a>(
        &self,
        vcpu: &Vcpu,
        slots: &'a Memslots,
        fault: &Fault,
    ) -> Result<&'a Memslot, Verdict> {
        let slot = slots.find(vcpu.space, fault.gfn).ok_or(Verdict::Hole)?;
        let counters = &vcpu.counters;
        if slot.is_invalid {
            counters.stale_slot.bump();
            return Err(Verdict::Result(FaultResult::Retry));
        }
        if fault.access.is_fetch && slot.traps_execution(fault.gfn) {
            counters.execute_trapped.bump();
            return Err(Verdict::Result(FaultResult::ExecuteTrap));
        }
        if fault.access.is_write && slot.is_read_only() {
            counters.read_only_writes.bump();
            let access = MmioAccess::uncached(fault.gpa);
            return Err(Verdict::Result(FaultResult::Mmio(access)));
        }
        if fault.access.is_write && slot.is_tracked(fault.gfn) {
            counters.write_tracked.bump();
            return Err(Verdict::Result(FaultResult::WriteProtected));
        }
        Ok(slot)
    }

    /// Finds out whether the frame's host memory is there, a whole chunk at a time where possible.
    pub(crate) fn resolve(&self, slot: &Memslot, fault: &Fault) -> Option<Resolved> {
        let goal = slot.max_level(fault.gfn, self.config.max_level, slot.logs_dirty());
        let needed = if fault.access.is_write {
            Probed::Writable
        } else {
            Probed::Readable
        };
        let known = slot.probed(fault.gfn);
        if known >= needed {
            return Some(Resolved {
                probed: known,
                is_chunk: false,
                goal,
            });
        }
        // A chunk counts only if all of it takes what the slot allows; one with a page that does
        // not is resolved page by page.
        let best = if slot.is_read_only() {
            Probed::Readable
        } else {
            Probed::Writable
        };
        let chunk = slot.probe_chunk(fault.gfn);
        if known == Probed::Unknown && self.probe(slot, &chunk) == Some(best) {
            return Some(Resolved {
                probed: best,
                is_chunk: true,
                goal,
            });
        }
        let start = slot.hva_of(fault.gfn);
        let probed = self.probe(slot, &(start..start.wrapping_add(PAGE_SIZE)))?;
        let goal = Level::PTE;
        (probed >= needed).then_some(Resolved {
            probed,
            is_chunk: false,
            goal,
        })
    }

    fn probe(&self, slot: &Memslot, range: &Range<Hva>) -> Option<Probed> {
        self.counters.host_probes.add(1);
        let can = |access| self.host.populate(range.clone(), access);
        if !slot.is_read_only() && can(HostAccess::Write) {
            Some(Probed::Writable)
        } else if can(HostAccess::Read) {
            Some(Probed::Readable)
        } else {
            None
        }
    }

    /// The host memory that mapping the frame may make reachable.
    pub(crate) fn touched(&self, slot: &Memslot, gfn: Gfn, goal: Level) -> Range<Hva> {
        // Prefetching stays inside the 2 MiB that one table maps.
        let pages = goal.max(Level::PDE).pages();
        let first = gfn.align_down(pages).max(slot.gfns().start);
        let end = gfn
            .align_down(pages)
            .wrapping_add(pages)
            .min(slot.gfns().end);
        let bytes = (end.get() - first.get()) * PAGE_SIZE;
        slot.hva_of(first)..slot.hva_of(first).wrapping_add(bytes)
    }

    /// The level to map at, with everything said under the lock: what keeps huge pages away is
    /// changed before the exclusive lock is taken to act on it, so it is seen here or acted on later.
    pub(crate) fn goal_level(&self, slot: &Memslot, gfn: Gfn, resolved: &Resolved) -> Level {
        let mut goal = slot.max_level(gfn, resolved.goal, slot.logs_dirty());
        while goal > Level::PTE && slot.probed_block(gfn, goal) == Probed::Unknown {
            goal = goal.below().unwrap_or(Level::PTE);
        }
        goal
    }

    /// A fault on a frame without memory.
    fn hole(&self, vcpu: &mut Vcpu, slots: &Memslots, root: &Root, fault: &Fault) -> FaultResult {
        let counters = Arc::clone(&vcpu.counters);
        if fault.access.is_fetch {
            counters.hole_fetches.bump();
            return FaultResult::FetchFromHole;
        }
        let is_mapped = slots.is_settled()
            && fault.gpa.fits(self.config.physical_bits)
            && self.top_up(vcpu)
            && {
                let entry = self.mmio_format.entry(fault.gfn, true, slots.generation());
                let shared = self.shared();
                self.map_mmio(
                    &shared,
                    &mut vcpu.cache,
                    &counters,
                    (root, fault.gfn),
                    entry,
                )
            };
        if !is_mapped {
            counters.mmio_unmapped.bump();
        }
        FaultResult::Mmio(MmioAccess::uncached(fault.gpa))
    }

    /// The host address of a frame, or `None` where no memory is.
    pub fn gfn_to_hva(&self, space: AddressSpace, gfn: Gfn) -> Option<Hva> {
        let slots = self.slots();
        slots
            .find(space, gfn)
            .filter(|slot| !slot.is_invalid)
            .map(|slot| slot.hva_of(gfn))
    }
}

/// What ends a fault before any table is looked at.
enum Verdict {
    Hole,
    Result(FaultResult),
}

//! When the vCPU is in guest mode, as the MMU sees it, and what the processor is told at entries.
//!
//! In guest mode the processor uses translations, and who removes some waits until the vCPU has
//! left. Most exits leave at once, because their handlers need the MMU or may take long. A handler
//! that needs neither stays ([`crate::exits`] says which), so that the next entry costs no look at
//! the root and no fence. What others want meanwhile they post with a kick, which that entry meets.
//!
//! Nothing may call the MMU from guest mode but what waits for nobody: the look into the cache of
//! MMIO pages, reads of guest memory, and marks in the dirty log.

use crate::exits::Outcome;
use crate::vcpu::{Core, Vcpu};
use arch::addr::Gpa;
use arch::exit::VmExit;
use cpu::Flush;
use mmu::Entry;
use std::ops::{Deref, DerefMut};
use std::sync::MutexGuard;

/// The vCPU's lock in KVM_RUN. However that ends, by a panic too, the vCPU is out of guest mode
/// then: others would wait for it for ever.
pub(super) struct Outside<'a>(pub(super) MutexGuard<'a, Core>);

impl Deref for Outside<'_> {
    type Target = Core;

    fn deref(&self) -> &Core {
        &self.0
    }
}

impl DerefMut for Outside<'_> {
    fn deref_mut(&mut self) -> &mut Core {
        &mut self.0
    }
}

impl Drop for Outside<'_> {
    fn drop(&mut self) {
        self.0.leave_guest_mode();
        self.0.cpu.rest();
    }
}

impl Core {
    /// Goes into guest mode with the current root, unless the vCPU is there; false if a flush came
    /// first.
    pub(crate) fn enter_guest_mode(&mut self, vcpu: &Vcpu) -> Result<bool, Outcome> {
        if self.in_guest_mode {
            return Ok(true);
        }
        self.load(vcpu)?;
        vcpu.note_processor();
        self.debug.before_entry(&mut self.controls);
        Ok(self.pass_gate())
    }

    /// Leaves guest mode, if the vCPU is there.
    pub(crate) fn leave_guest_mode(&mut self) {
        if std::mem::take(&mut self.in_guest_mode) {
            self.mmu.gate().exit();
        }
    }

    /// Executes until the next exit.
    pub(super) fn enter_processor(&mut self, vcpu: &Vcpu) -> VmExit {
        let guest = self.put_processor_registers();
        self.promise();
        let exit = self.cpu.enter(&self.controls);
        self.take_guest_registers(guest);
        self.record_modified_pages(vcpu);
        self.is_unchanged = true;
        exit
    }

    /// Moves the processor's page-modification log to the dirty log. In guest mode: who reads the
    /// dirty log waits until the vCPU has left.
    #[inline]
    pub(crate) fn record_modified_pages(&mut self, vcpu: &Vcpu) {
        if self.cpu.has_page_modifications() {
            let (mmu, space) = (&vcpu.vm().mmu, self.mmu.address_space());
            for page in self.cpu.take_page_modification_log() {
                mmu.mark_dirty(space, Gpa::new(page).gfn());
            }
        }
    }

    /// Spares the processor a look at what did not change since it last executed.
    pub(crate) fn promise(&mut self) {
        if self.is_unchanged && !self.has_shadow_paging && !self.debug.is_active() {
            self.cpu.assume_unchanged();
        }
    }

    /// Sets the EPT pointer; without EPT, the shadow root.
    fn load(&mut self, vcpu: &Vcpu) -> Result<(), Outcome> {
        if self.has_shadow_paging {
            return self.load_shadow(vcpu);
        }
        let eptp = vcpu
            .vm()
            .mmu
            .load(&mut self.mmu)
            .map_err(|_| Outcome::Fail(libc::ENOMEM))?;
        self.is_unchanged &= eptp == self.controls.eptp;
        self.controls.eptp = eptp;
        Ok(())
    }

    /// Goes through the MMU's gate into guest mode; false if a flush came first, which has been
    /// made.
    fn pass_gate(&mut self) -> bool {
        // The gate's exchange is the fence for both.
        self.cpu.announce();
        match self.mmu.gate().enter() {
            Entry::Ready => {
                self.in_guest_mode = true;
                true
            }
            Entry::Flush(flush) => {
                self.counters.tlb_flushes += 1;
                self.is_unchanged = false;
                self.cpu.flush(match flush {
                    mmu::Flush::All => Flush::All,
                    mmu::Flush::Range(frames) => {
                        let start = frames.start.gpa().get();
                        let pages = frames.end.offset_from(frames.start).unwrap_or(0);
                        Flush::Gpa {
                            start,
                            len: pages.saturating_mul(4096),
                        }
                    }
                });
                false
            }
        }
    }
}

//! The task-priority register by its other names: CR8, KVM_TPR_ACCESS_REPORTING and the word of
//! KVM_SET_VAPIC_ADDR.
//!
//! Old 32-bit systems write the TPR often, and each write of the register page is an exit. A VMM
//! can have the accesses reported, patch them into accesses to a word of memory, and have that
//! word kept the same as the register.

use super::*;
use std::sync::atomic::{AtomicBool, AtomicU8};

/// An access to the TPR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum TprAccess {
    /// It was read.
    Read,
    /// It was written.
    Write,
}

/// Reports of accesses to the TPR.
#[derive(Debug, Default)]
pub(super) struct TprReports {
    on: AtomicBool,
    wrote: AtomicU8,
}

impl LocalApic {
    /// CR8: the upper four bits of the TPR.
    pub fn cr8(&self) -> u64 {
        (self.lock().get(reg::TPR) >> 4 & 0xf) as u64
    }

    /// Sets CR8.
    pub fn set_cr8(&self, value: u64) {
        self.lock().set(reg::TPR, (value as u32 & 0xf) << 4);
        self.mailbox.post_own(Request::EVENT);
    }

    /// KVM_TPR_ACCESS_REPORTING: every access to the TPR through the register page posts
    /// [`Request::TPR_ACCESS`].
    pub fn set_tpr_reporting(&self, on: bool) {
        self.tpr_reports.on.store(on, Ordering::Relaxed);
    }

    /// The access that [`Request::TPR_ACCESS`] is about.
    pub fn tpr_access(&self) -> TprAccess {
        if self.tpr_reports.wrote.load(Ordering::Relaxed) == TprAccess::Write as u8 {
            TprAccess::Write
        } else {
            TprAccess::Read
        }
    }

    /// An access to `offset` of the register page by the vCPU's own thread.
    pub(super) fn note_access(&self, offset: u32, access: TprAccess) {
        if offset == reg::TPR && self.tpr_reports.on.load(Ordering::Relaxed) {
            self.tpr_reports
                .wrote
                .store(access as u8, Ordering::Relaxed);
            self.mailbox.post_own(Request::TPR_ACCESS);
        }
    }

    /// What the guest finds at the address of KVM_SET_VAPIC_ADDR: the TPR, the priority class that
    /// waits, nothing, the vector in service.
    pub fn virtual_word(&self) -> [u8; 4] {
        let state = self.lock();
        let waiting = state.highest(reg::IRR).unwrap_or(0);
        let in_service = state.highest(reg::ISR).unwrap_or(0);
        [state.get(reg::TPR) as u8, waiting & 0xf0, 0, in_service]
    }

    /// Takes over the TPR that the guest left at the address of KVM_SET_VAPIC_ADDR.
    pub fn set_tpr(&self, tpr: u8) {
        let mut state = self.lock();
        if state.get(reg::TPR) as u8 != tpr {
            state.set(reg::TPR, tpr as u32);
            self.mailbox.post_own(Request::EVENT);
        }
    }
}

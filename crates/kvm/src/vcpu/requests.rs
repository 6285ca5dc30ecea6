//! What reaches a vCPU from outside between entries, and what ends a halt.

use crate::events::{self, Events};
use crate::exits::Outcome;
use crate::irqchip::lapic::TprAccess;
use crate::mailbox::{Request, Woken};
use crate::mmio::Emulation;
use crate::signals;
use crate::vcpu::{Core, MpState, Vcpu};
use arch::control_registers::Cr0;
use arch::segment::SegmentName;
use cpu::{CpuState, Flush, Gpr};
use kvm_bindings::{KVM_EXIT_HLT, KVM_EXIT_TPR_ACCESS, kvm_run__bindgen_ty_1__bindgen_ty_9};

impl Core {
    /// Does what the mailbox asks for.
    pub(super) fn requests(&mut self, vcpu: &Vcpu) -> Outcome {
        self.is_unchanged = false;
        let mailbox = vcpu.mailbox();
        if mailbox.take(Request::VM_DEAD) {
            return Outcome::Fail(libc::EIO);
        }
        if mailbox.take(Request::CODE) {
            self.cpu.entered_from_user();
        }
        if mailbox.take(Request::EVENT | Request::TIMER) {
            self.look_for_events = true;
        }
        if mailbox.take(Request::NMI) {
            let most = self.events.most_nmis(self.cpu.state.interruptibility);
            self.events.nmis = (self.events.nmis + mailbox.take_nmis()).min(most);
            self.look_for_events = true;
        }
        if mailbox.take(Request::CLOCK_UPDATE) {
            self.update_clock_page(vcpu);
        }
        if mailbox.take(Request::STEAL_UPDATE) {
            self.update_steal_time(vcpu);
        }
        if mailbox.take(Request::TLB_FLUSH) {
            self.flush_guest_translations(vcpu);
        }
        if mailbox.take(Request::TRIPLE_FAULT) {
            self.events.triple_fault = true;
        }
        if mailbox.take(Request::SMI) {
            self.smm.pending = true;
            self.look_for_events = true;
        }
        mailbox.take(Request::SCAN_IOAPIC | Request::MMU_RELOAD | Request::TRAPS_CHANGED);
        if mailbox.take(Request::MSR_FILTER) {
            self.update_msr_bitmap(vcpu.vm());
        }
        mailbox.take(Request::YIELD);
        if mailbox.take(Request::UNHALT) {
            self.kicked = true;
        }
        self.start_up_requests(vcpu);
        if mailbox.take(Request::TPR_ACCESS) {
            return self.report_tpr_access(vcpu);
        }
        if mailbox.take(Request::INTERRUPT_RUN) || self.signal_pending(vcpu) {
            return Outcome::Interrupted;
        }
        Outcome::Resume
    }

    /// KVM_EXIT_TPR_ACCESS.
    fn report_tpr_access(&mut self, vcpu: &Vcpu) -> Outcome {
        let Some(apic) = vcpu.apic() else {
            return Outcome::Resume;
        };
        let rip = self.emulation.rip;
        let run = vcpu.kvm_run(self);
        run.exit_reason = KVM_EXIT_TPR_ACCESS;
        run.__bindgen_anon_1.tpr_access = kvm_run__bindgen_ty_1__bindgen_ty_9 {
            rip,
            is_write: (apic.tpr_access() == TprAccess::Write) as u32,
            pad: 0,
        };
        Outcome::Exit
    }

    /// INIT and start-up IPIs.
    pub(super) fn start_up_requests(&mut self, vcpu: &Vcpu) {
        let mailbox = vcpu.mailbox();
        let init = mailbox.take(Request::INIT);
        if init && self.cpu.state.smm {
            self.smm.latched_init = true;
        } else if init {
            self.init(vcpu);
            let waits = !vcpu.vm().is_bootstrap(vcpu.id());
            self.mp_state = if waits {
                MpState::InitReceived
            } else {
                MpState::Runnable
            };
        }
        if mailbox.take(Request::SIPI) && self.mp_state == MpState::InitReceived {
            self.sipi_vector = mailbox.sipi_vector();
            let code = &mut self.cpu.state.segments[SegmentName::Cs as usize];
            code.selector = (self.sipi_vector as u16) << 8;
            code.base = (self.sipi_vector as u64) << 12;
            self.cpu.state.rip = 0;
            self.mp_state = MpState::Runnable;
        }
    }

    /// The state after INIT (SDM volume 3, "Processor State After Reset"): that of a reset, but
    /// caches, extended state, the counter and most MSRs keep theirs.
    pub(super) fn init(&mut self, vcpu: &Vcpu) {
        let old = &self.cpu.state;
        let mut state = CpuState::reset();
        state.extended = old.extended.clone();
        state.xcr0 = old.xcr0;
        state.pkru = old.pkru;
        state.msrs = old.msrs;
        state.smbase = old.smbase;
        state.cr0 = Cr0::ET | old.cr0 & (Cr0::CD | Cr0::NW);
        let version = self.cpuid.output(1, 0).0[0];
        state.set_gpr(Gpr::Rdx, if version == 0 { 0x600 } else { version as u64 });
        self.cpu.state = state;
        self.events = Events::default();
        self.completion = None;
        self.emulation = Emulation::default();
        self.kicked = false;
        self.reset_paravirtual(vcpu);
        if let Some(apic) = vcpu.apic() {
            apic.reset(false);
        }
        self.cpu.flush(Flush::Guest);
    }

    /// Whether a vCPU that does not run has a reason to.
    pub(super) fn has_work(&self, vcpu: &Vcpu) -> bool {
        let interrupted = || {
            !self.debug.blocks_interrupts()
                && events::interrupts_open(&self.cpu.state)
                && self.interrupt_waits(vcpu)
        };
        let nmi = self.events.nmis != 0 && events::nmis_open(&self.cpu.state);
        match self.mp_state {
            MpState::Runnable => true,
            MpState::Halted => {
                nmi || self.kicked
                    || self.smi_waits()
                    || interrupted()
                    || self.events.exception.is_some()
                    || self.events.again.is_some()
                    || self.events.triple_fault
            }
            MpState::Uninitialized | MpState::InitReceived => false,
        }
    }

    /// Sleeps until there is a reason to run or to leave.
    pub(super) fn block(&mut self, vcpu: &Vcpu) -> Outcome {
        /// Longest sleep without another look, in nanoseconds; shorter when blocked signals must
        /// be looked for.
        const LONG: u64 = 1_000_000_000;
        const SHORT: u64 = 1_000_000;
        loop {
            let outcome = self.requests(vcpu);
            if outcome != Outcome::Resume {
                return outcome;
            }
            if self.has_work(vcpu) {
                if self.mp_state == MpState::Halted {
                    self.mp_state = MpState::Runnable;
                    self.kicked = false;
                    self.halted_in_guest = false;
                    self.counters.halt_wakeups += 1;
                }
                self.look_for_events = true;
                return Outcome::Resume;
            }
            if self.interrupt_window_wanted(vcpu) {
                return Outcome::Resume;
            }
            let mailbox = vcpu.mailbox();
            let timeout = if self.signal_mask.is_some() {
                SHORT
            } else {
                LONG
            };
            self.leave_guest_mode();
            self.cpu.rest();
            self.mark_not_running(vcpu);
            let woken = mailbox.sleep(
                || !mailbox.is_empty() || vcpu.run_area().immediate_exit(),
                timeout,
            );
            self.mark_running(vcpu);
            if woken == Woken::Signal
                || vcpu.run_area().immediate_exit()
                || self.signal_pending(vcpu)
            {
                return Outcome::Interrupted;
            }
        }
    }

    /// HLT was executed.
    pub(crate) fn halt(&mut self, vcpu: &Vcpu) -> Outcome {
        if vcpu.vm().settings().halts_in_guest {
            self.mp_state = MpState::Halted;
            self.halted_in_guest = true;
            return Outcome::Resume;
        }
        self.counters.halt_exits += 1;
        if vcpu.apic().is_some() {
            self.mp_state = MpState::Halted;
            return Outcome::Resume;
        }
        vcpu.kvm_run(self).exit_reason = KVM_EXIT_HLT;
        Outcome::Exit
    }

    /// A signal came, or waits and is let through by KVM_SET_SIGNAL_MASK, or user space asked to
    /// leave.
    pub(super) fn signal_pending(&self, vcpu: &Vcpu) -> bool {
        if vcpu.run_area().immediate_exit() || signals::arrived() {
            return true;
        }
        self.signal_mask
            .is_some_and(|mask| signals::pending() & !mask != 0)
    }
}

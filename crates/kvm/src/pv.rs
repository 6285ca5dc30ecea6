//! Pages that guests share with KVM: system time, wall clock, steal time, end of interrupt, TPR.
//!
//! Source: the kernel's "KVM-specific MSRs".

use crate::clock::{GUEST_STOPPED, STABLE, TimeInfo, wall_clock_bytes};
use crate::cpuid::pv;
use crate::vcpu::{Core, Vcpu};
use arch::addr::Gpa;
use arch::msr;

/// Bit 0 of the system-time and steal-time MSRs: the page is in use.
const ENABLED: u64 = 1;

/// State of the shared pages.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ParavirtualPages {
    clock_version: u32,
    /// KVM_KVMCLOCK_CTRL: tell the guest that it was stopped.
    pub(crate) stopped: bool,
    /// Where the steal-time record is, if it is in use.
    steal: Option<u64>,
    /// The run delay that was last added.
    last_delay: u64,
    /// Where the end-of-interrupt flag is, if it is in use.
    eoi: Option<u64>,
    /// The flag is set: the guest may end the interrupt in service by clearing it.
    eoi_offered: bool,
    /// Where the TPR is kept for the guest (KVM_SET_VAPIC_ADDR), if it is.
    vapic: Option<u64>,
}

/// struct kvm_steal_time: u64 steal, u32 version, u32 flags, u8 preempted.
mod steal {
    pub(super) const VERSION: u64 = 8;
    pub(super) const PREEMPTED: u64 = 16;
    /// The vCPU does not run.
    pub(super) const NOT_RUNNING: u8 = 1;
    /// Another vCPU wants translations flushed before this one runs again.
    pub(super) const FLUSH: u8 = 2;
}

impl Core {
    fn write_page(&self, vcpu: &Vcpu, gpa: u64, bytes: &[u8]) {
        let space = self.mmu.address_space();
        if let Err(error) = vcpu.vm().mmu.write_guest(space, Gpa::new(gpa), bytes) {
            tracing::debug!(%error, "paravirtual page is not in memory");
        }
    }

    /// Whether the system-time page is in use.
    pub(crate) fn has_clock_page(&self) -> bool {
        self.msrs.get(msr::KVM_SYSTEM_TIME_NEW) & ENABLED != 0
    }

    /// Writes the system-time page.
    pub(crate) fn update_clock_page(&mut self, vcpu: &Vcpu) {
        let register = self.msrs.get(msr::KVM_SYSTEM_TIME_NEW);
        if register & ENABLED == 0 {
            return;
        }
        let gpa = register & !ENABLED;
        let mut flags = 0;
        if self.cpuid.paravirtual() & pv::CLOCKSOURCE_STABLE != 0 {
            flags |= STABLE;
        }
        if std::mem::take(&mut self.paravirtual.stopped) {
            flags |= GUEST_STOPPED;
        }
        let info = TimeInfo::new(&vcpu.vm().clock, &self.tsc, flags);
        let version = self.paravirtual.clock_version.wrapping_add(2) & !1;
        self.paravirtual.clock_version = version;
        // Odd first, so that a reader that overlaps tries again; then the contents; then even.
        self.write_page(vcpu, gpa, &version.wrapping_sub(1).to_le_bytes());
        self.write_page(vcpu, gpa.wrapping_add(4), &info.to_bytes()[4..]);
        self.write_page(vcpu, gpa, &version.to_le_bytes());
    }

    /// Writes the wall-clock structure at `gpa`: the time at which system time was zero.
    pub(crate) fn write_wall_clock(&mut self, vcpu: &Vcpu, gpa: u64) {
        if gpa == 0 {
            return;
        }
        let mut version = [0; 4];
        let space = self.mmu.address_space();
        let _ = vcpu.vm().mmu.read_guest(space, Gpa::new(gpa), &mut version);
        let version = (u32::from_le_bytes(version) | 1).wrapping_add(1);
        let bytes = wall_clock_bytes(version, vcpu.vm().clock.wall_base());
        self.write_page(vcpu, gpa, &version.wrapping_sub(1).to_le_bytes());
        self.write_page(vcpu, gpa.wrapping_add(4), &bytes[4..]);
        self.write_page(vcpu, gpa, &version.to_le_bytes());
    }

    /// The guest wrote the steal-time MSR: count from here.
    pub(crate) fn set_steal_time(&mut self, vcpu: &Vcpu, register: u64) {
        self.paravirtual.steal = (register & ENABLED != 0).then_some(register & !0x3f);
        self.paravirtual.last_delay = vcpu.run_delay().get();
        self.follow_run_delay(vcpu);
    }

    /// KVM_RUN begins on this thread: what the scheduler takes from it is stolen.
    pub(crate) fn follow_run_delay(&self, vcpu: &Vcpu) {
        if self.paravirtual.steal.is_some() {
            vcpu.run_delay().follow();
        }
    }

    fn read_word<const N: usize>(&self, vcpu: &Vcpu, gpa: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        let space = self.mmu.address_space();
        let read = vcpu.vm().mmu.read_guest(space, Gpa::new(gpa), &mut bytes);
        read.ok().map(|()| bytes)
    }

    /// Adds what the scheduler took from this thread to the steal-time record.
    pub(crate) fn update_steal_time(&mut self, vcpu: &Vcpu) {
        let Some(gpa) = self.paravirtual.steal else {
            return;
        };
        let delay = vcpu.run_delay().get();
        let more = delay.wrapping_sub(self.paravirtual.last_delay);
        if more == 0 {
            return;
        }
        self.paravirtual.last_delay = delay;
        let version_at = gpa.wrapping_add(steal::VERSION);
        let (Some(sum), Some(version)) =
            (self.read_word(vcpu, gpa), self.read_word(vcpu, version_at))
        else {
            return;
        };
        let sum = u64::from_le_bytes(sum).wrapping_add(more);
        let version = u32::from_le_bytes(version) & !1;
        self.write_page(vcpu, version_at, &(version | 1).to_le_bytes());
        self.write_page(vcpu, gpa, &sum.to_le_bytes());
        self.write_page(vcpu, version_at, &version.wrapping_add(2).to_le_bytes());
    }

    /// Tells other vCPUs that this one is about to sleep: they need not wait for it, neither at a
    /// lock nor for a flush of its translations.
    pub(crate) fn mark_not_running(&self, vcpu: &Vcpu) {
        if let Some(gpa) = self.paravirtual.steal {
            self.write_page(
                vcpu,
                gpa.wrapping_add(steal::PREEMPTED),
                &[steal::NOT_RUNNING],
            );
        }
    }

    /// Takes the mark back, and makes the flush that another vCPU left to be made.
    pub(crate) fn mark_running(&mut self, vcpu: &Vcpu) {
        let Some(gpa) = self.paravirtual.steal else {
            return;
        };
        let gpa = Gpa::new(gpa.wrapping_add(steal::PREEMPTED));
        let (mmu, space) = (&vcpu.vm().mmu, self.mmu.address_space());
        let mut old = [0];
        // The first round guesses, those after it know what others wrote meanwhile.
        loop {
            match mmu.compare_exchange_guest(space, gpa, &mut old, &[0]) {
                Ok(true) => break,
                Ok(false) => {}
                Err(_) => return,
            }
        }
        let [old] = old;
        if old & steal::FLUSH != 0 {
            self.flush_guest_translations(vcpu);
        }
    }

    /// Drops the translations that the guest's own tables made, as the guest would.
    pub(crate) fn flush_guest_translations(&mut self, vcpu: &Vcpu) {
        self.counters.tlb_flushes += 1;
        self.sync_shadow(vcpu);
        self.cpu.flush(cpu::Flush::Guest);
    }

    /// The guest wrote the end-of-interrupt MSR.
    pub(crate) fn set_eoi_flag(&mut self, register: u64) {
        self.paravirtual.eoi = (register & ENABLED != 0).then_some(register & !ENABLED);
        self.paravirtual.eoi_offered = false;
    }

    /// KVM_SET_VAPIC_ADDR: keeps the TPR in memory at `gpa`; 0 ends it.
    pub(crate) fn set_vapic_address(&mut self, vcpu: &Vcpu, gpa: u64) -> crate::Result<()> {
        if vcpu.apic().is_none() {
            return crate::error::fail(libc::EINVAL);
        }
        if gpa != 0 && self.read_word::<4>(vcpu, gpa).is_none() {
            return crate::error::fail(libc::EINVAL);
        }
        self.paravirtual.vapic = (gpa != 0).then_some(gpa);
        self.look_for_events = true;
        Ok(())
    }

    /// Before an entry: what the guest may do to its interrupts by memory alone.
    pub(crate) fn offer_to_guest(&mut self, vcpu: &Vcpu) {
        self.offer_eoi(vcpu);
        if let (Some(gpa), Some(apic)) = (self.paravirtual.vapic, vcpu.apic()) {
            self.write_page(vcpu, gpa, &apic.virtual_word());
        }
    }

    /// After an exit: what the guest did.
    pub(crate) fn collect_from_guest(&mut self, vcpu: &Vcpu) {
        if !self.paravirtual.eoi_offered && self.paravirtual.vapic.is_none() {
            return;
        }
        self.leave_guest_mode();
        if self.paravirtual.eoi_offered {
            self.collect_eoi(vcpu);
        }
        if let (Some(gpa), Some(apic)) = (self.paravirtual.vapic, vcpu.apic())
            && let Some([tpr]) = self.read_word(vcpu, gpa)
        {
            apic.set_tpr(tpr);
        }
    }

    /// Before an entry: if ending the interrupt in service has no effect but on the local APIC's
    /// registers, lets the guest end it by clearing a flag in memory.
    fn offer_eoi(&mut self, vcpu: &Vcpu) {
        let Some(gpa) = self.paravirtual.eoi else {
            return;
        };
        let (Some(apic), Some(chip)) = (vcpu.apic(), vcpu.vm().irqchip()) else {
            return;
        };
        let Some(vector) = apic.quiet_in_service() else {
            return;
        };
        if !chip.reports_eoi(vector) {
            self.write_page(vcpu, gpa, &[1]);
            self.paravirtual.eoi_offered = true;
        }
    }

    /// After an exit: ends the interrupt if the guest cleared the flag, and withdraws the offer,
    /// which may not hold for what is done before the next entry. That entry looks again.
    fn collect_eoi(&mut self, vcpu: &Vcpu) {
        self.paravirtual.eoi_offered = false;
        let (Some(gpa), Some(apic)) = (self.paravirtual.eoi, vcpu.apic()) else {
            return;
        };
        match self.read_word(vcpu, gpa) {
            Some([flag]) if flag & 1 == 0 => {
                let effect = apic.end_of_interrupt();
                vcpu.apply(self, effect);
            }
            _ => {
                self.write_page(vcpu, gpa, &[0]);
                self.look_for_events = true;
            }
        }
    }

    /// INIT takes the processor's paravirtual pages out of use: their memory may become something
    /// else before the processor is started again.
    pub(crate) fn reset_paravirtual(&mut self, vcpu: &Vcpu) {
        for register in [
            msr::KVM_SYSTEM_TIME,
            msr::KVM_SYSTEM_TIME_NEW,
            msr::KVM_STEAL_TIME,
            msr::KVM_PV_EOI_EN,
        ] {
            self.msrs.set(register, 0);
        }
        self.set_steal_time(vcpu, 0);
        self.set_eoi_flag(0);
    }
}

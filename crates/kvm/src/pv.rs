//! Pages that guests share with KVM: system time, wall clock, steal time.
//!
//! Source: the kernel's "KVM-specific MSRs".

use crate::clock::{GUEST_STOPPED, STABLE, TimeInfo, run_delay, wall_clock_bytes};
use crate::cpuid::pv;
use crate::time::monotonic_ns;
use crate::vcpu::{Core, Vcpu};
use arch::addr::Gpa;
use arch::msr;

/// Bit 0 of the system-time and steal-time MSRs: the page is in use.
const ENABLED: u64 = 1;
/// Nanoseconds between looks at the scheduler's statistics.
const STEAL_INTERVAL: u64 = 100_000_000;

/// State of the shared pages.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ParavirtualPages {
    clock_version: u32,
    /// KVM_KVMCLOCK_CTRL: tell the guest that it was stopped.
    pub(crate) stopped: bool,
    steal_version: u32,
    steal: u64,
    /// Run delay of this thread when it was last added.
    last_delay: Option<u64>,
    last_look: u64,
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

    /// The guest enabled (or moved) its steal-time record: count from here.
    pub(crate) fn start_steal_time(&mut self) {
        self.paravirtual.last_delay = None;
        self.paravirtual.last_look = 0;
    }

    /// Adds what the scheduler took from this thread to the steal-time record.
    pub(crate) fn update_steal_time(&mut self, vcpu: &Vcpu) {
        let register = self.msrs.get(msr::KVM_STEAL_TIME);
        let now = monotonic_ns();
        if register & ENABLED == 0 || now < self.paravirtual.last_look + STEAL_INTERVAL {
            return;
        }
        let page = &mut self.paravirtual;
        page.last_look = now;
        let delay = run_delay();
        if let Some(last) = page.last_delay.replace(delay) {
            page.steal += delay.saturating_sub(last);
        }
        let version = page.steal_version.wrapping_add(2) & !1;
        page.steal_version = version;
        let steal = page.steal;
        // struct kvm_steal_time: u64 steal, u32 version, u32 flags, u8 preempted.
        let gpa = register & !0x3f;
        self.write_page(
            vcpu,
            gpa.wrapping_add(8),
            &version.wrapping_sub(1).to_le_bytes(),
        );
        self.write_page(vcpu, gpa, &steal.to_le_bytes());
        self.write_page(vcpu, gpa.wrapping_add(12), &[0; 5]);
        self.write_page(vcpu, gpa.wrapping_add(8), &version.to_le_bytes());
    }
}

//! Instructions that wait, and the clocks that bound how long a guest may run or wait: HLT, PAUSE,
//! MONITOR and MWAIT, their user-level kin, the preemption timer, the notify window.

use super::attempt;
use crate::memory::DATA;
use crate::op::{Flow, Op};
use crate::state::LazyFlags;
use crate::vcpu::{Cause, Vcpu};
use arch::control_registers::Cr4;
use arch::controls::{PinControls, PrimaryControls, SecondaryControls};
use arch::cpuid::Feature;
use arch::exit::{ExitReason, VmExit};
use std::sync::atomic::Ordering;

/// The host's time-stamp counter.
fn host_tsc() -> u64 {
    // SAFETY: as in `guest_tsc`.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// HLT.
pub(crate) fn hlt(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.require_cpl0());
    if cpu.primary(PrimaryControls::HLT_EXITING) {
        cpu.exit_for(op, ExitReason::Hlt, 0);
        return Flow::Stop;
    }
    cpu.state.activity = arch::controls::Activity::Halt;
    cpu.request_own();
    cpu.end_block(op)
}

/// PAUSE.
pub(crate) fn pause(cpu: &mut Vcpu, op: &Op) -> Flow {
    let exits = cpu.primary(PrimaryControls::PAUSE_EXITING)
        || cpu.secondary(SecondaryControls::PAUSE_LOOP_EXITING)
            && cpu.cpl() == 0
            && cpu.pause_loop_exits();
    if exits {
        cpu.exit_for(op, ExitReason::Pause, 0);
        return Flow::Stop;
    }
    std::hint::spin_loop();
    Flow::Next
}

impl Vcpu {
    /// Whether this PAUSE is one too many (SDM volume 3, "Controls for PAUSE-Loop Exiting").
    fn pause_loop_exits(&mut self) -> bool {
        let now = host_tsc();
        let (gap, window) = (self.controls().ple_gap, self.controls().ple_window);
        let detector = &mut self.pause_loop;
        if now.wrapping_sub(detector.last) > gap.into() {
            detector.first = now;
        }
        detector.last = now;
        now.wrapping_sub(detector.first) > window.into()
    }
}

/// MONITOR (`aux` 0) and MWAIT (1).
pub(crate) fn monitor(cpu: &mut Vcpu, op: &Op) -> Flow {
    if cpu.cpl() != 0 {
        cpu.undefined();
        return Flow::Stop;
    }
    let (control, reason) = if op.aux == 0 {
        (PrimaryControls::MONITOR_EXITING, ExitReason::Monitor)
    } else {
        (PrimaryControls::MWAIT_EXITING, ExitReason::Mwait)
    };
    if cpu.primary(control) {
        cpu.exit_for(op, reason, 0);
        return Flow::Stop;
    }
    // Whoever intercepts the instruction decides what a guest without the feature finds.
    if !cpu.has(Feature::MONITOR) {
        cpu.undefined();
        return Flow::Stop;
    }
    Flow::Next
}

/// UMONITOR: the address in register `dst`, of `aux` bytes. Nothing watches it, because UMWAIT
/// may end for any reason.
pub(crate) fn umonitor(cpu: &mut Vcpu, op: &Op) -> Flow {
    if !cpu.secondary(SecondaryControls::USER_WAIT_PAUSE) {
        cpu.undefined();
        return Flow::Stop;
    }
    let offset = cpu.sized_reg(op.dst, op.aux);
    let segment = if op.segment < 6 { op.segment } else { DATA };
    let address = attempt!(cpu.linear(segment, offset, 1, false));
    cpu.check_read(address, 1, segment).into()
}

/// UMWAIT (`aux` 0) and TPAUSE (1); the requested state is in register `dst`.
pub(crate) fn wait(cpu: &mut Vcpu, op: &Op) -> Flow {
    if !cpu.secondary(SecondaryControls::USER_WAIT_PAUSE) {
        cpu.undefined();
        return Flow::Stop;
    }
    let forbidden = cpu.state.cr4.contains(Cr4::TSD) && cpu.cpl() != 0;
    if forbidden || cpu.reg::<u32>(op.dst) >> 1 != 0 {
        cpu.general_protection();
        return Flow::Stop;
    }
    if cpu.primary(PrimaryControls::RDTSC_EXITING) {
        let mut exit = VmExit::new(if op.aux == 0 {
            ExitReason::Umwait
        } else {
            ExitReason::Tpause
        });
        exit.instruction_length = op.len.into();
        exit.instruction_info = u32::from(op.dst / 8) << 3;
        cpu.stop_with(Cause::Exit(exit));
        return Flow::Stop;
    }
    // A wait may end early; this one does when anything wants the processor's attention.
    let deadline = u64::from(cpu.reg::<u32>(0)) | u64::from(cpu.reg::<u32>(16)) << 32;
    let longest = host_tsc().wrapping_add(LONGEST_WAIT);
    while op.aux == 1
        && cpu.guest_tsc() < deadline
        && host_tsc() < longest
        && cpu.attention.flags.load(Ordering::Relaxed) == 0
    {
        std::hint::spin_loop();
    }
    cpu.state.flags = LazyFlags::from_status(0);
    Flow::Next
}

/// Time-stamp ticks that TPAUSE waits at the most.
const LONGEST_WAIT: u64 = 100_000;

impl Vcpu {
    /// An event is about to be delivered with no instruction since the last one: the exit, if that
    /// has gone on for longer than the notify window.
    ///
    /// A processor without microcode has one way to be kept from its event windows: deliveries
    /// that each raise the next event, as that of #DB onto a watched stack does.
    pub(crate) fn notify_exit(&mut self) -> Option<VmExit> {
        if !self.secondary(SecondaryControls::NOTIFY_EXITING) {
            return None;
        }
        let now = host_tsc();
        let since = *self.windowless_since.get_or_insert(now);
        if now.wrapping_sub(since) <= self.controls().notify_window.into() {
            return None;
        }
        self.windowless_since = None;
        Some(VmExit::new(ExitReason::Notify))
    }
}

impl Vcpu {
    /// The preemption timer's remaining value, in its own units.
    pub fn preemption_timer_value(&self) -> Option<u32> {
        let deadline = self.preemption_deadline?;
        let now = host_tsc();
        Some((deadline.saturating_sub(now) >> PREEMPTION_SHIFT).min(u32::MAX.into()) as u32)
    }

    /// Starts the preemption timer, if the controls ask for it.
    pub(crate) fn start_preemption_timer(&mut self) {
        let controls = self.controls();
        if !controls.pin.contains(PinControls::PREEMPTION_TIMER) {
            self.preemption_deadline = None;
            return;
        }
        let ticks = u64::from(controls.preemption_timer) << PREEMPTION_SHIFT;
        let now = host_tsc();
        self.preemption_deadline = Some(now.wrapping_add(ticks));
    }
}

/// log2 of the time-stamp ticks in a unit of the preemption timer.
pub(crate) const PREEMPTION_SHIFT: u32 = 5;

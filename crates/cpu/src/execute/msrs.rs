//! RDMSR and WRMSR of the MSRs that live in the processor, and what those do.

use super::attempt;
use crate::op::{Flow, Op};
use crate::vcpu::Vcpu;
use arch::control_registers::{Cr0, Efer};
use arch::controls::{PrimaryControls, SecondaryControls};
use arch::exit::ExitReason;
use arch::msr;
use arch::segment::SegmentName;

/// RDMSR.
pub(crate) fn rdmsr(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.require_cpl0());
    let number = cpu.reg::<u32>(8);
    if cpu.msr_exits(number, false) {
        cpu.exit_for(op, ExitReason::Rdmsr, 0);
        return Flow::Stop;
    }
    let virtualized = cpu.read_virtual_x2apic(number);
    match virtualized.or_else(|| cpu.read_msr(number)) {
        Some(value) => {
            cpu.set_reg(0, value as u32);
            cpu.set_reg(16, (value >> 32) as u32);
            Flow::Next
        }
        None => {
            cpu.general_protection();
            Flow::Stop
        }
    }
}

/// WRMSR.
pub(crate) fn wrmsr(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.require_cpl0());
    let number = cpu.reg::<u32>(8);
    if cpu.msr_exits(number, true) {
        cpu.exit_for(op, ExitReason::Wrmsr, 0);
        return Flow::Stop;
    }
    let value = u64::from(cpu.reg::<u32>(0)) | u64::from(cpu.reg::<u32>(16)) << 32;
    if let Some(written) = cpu.write_virtual_x2apic(number, value) {
        let exit = attempt!(written);
        return cpu.end_with(op, exit);
    }
    if !cpu.write_msr(number, value) {
        cpu.general_protection();
        return Flow::Stop;
    }
    cpu.end_block(op)
}

impl Vcpu {
    fn msr_exits(&self, number: u32, write: bool) -> bool {
        !self.primary(PrimaryControls::USE_MSR_BITMAPS)
            || self.controls().msr_bitmap.exits(number, write)
    }

    /// The guest's time-stamp counter.
    pub(crate) fn guest_tsc(&self) -> u64 {
        // SAFETY: RDTSC and LFENCE have no preconditions on processors this crate runs on. The host
        // may read its counter before loads that come earlier: a guest that has just read another
        // vCPU's reading from memory would find its own to be the smaller one.
        let host = unsafe {
            core::arch::x86_64::_mm_lfence();
            core::arch::x86_64::_rdtsc()
        };
        let controls = self.controls();
        if !self.primary(PrimaryControls::TSC_OFFSETTING) {
            return host;
        }
        let scaled = if self.secondary(SecondaryControls::TSC_SCALING) {
            ((u128::from(host) * u128::from(controls.tsc_multiplier)) >> 48) as u64
        } else {
            host
        };
        scaled.wrapping_add(controls.tsc_offset)
    }

    /// Reads an MSR that lives in the processor; `None` for others.
    pub fn read_msr(&self, number: u32) -> Option<u64> {
        let state = &self.state;
        let msrs = &state.msrs;
        Some(match number {
            msr::TSC => self.guest_tsc(),
            msr::EFER => state.efer.bits(),
            msr::STAR => msrs.star,
            msr::LSTAR => msrs.lstar,
            msr::CSTAR => msrs.cstar,
            msr::FMASK => msrs.fmask,
            msr::FS_BASE => state.segments[SegmentName::Fs as usize].base,
            msr::GS_BASE => state.segments[SegmentName::Gs as usize].base,
            msr::KERNEL_GS_BASE => msrs.kernel_gs_base,
            msr::TSC_AUX => msrs.tsc_aux,
            msr::SYSENTER_CS => msrs.sysenter_cs,
            msr::SYSENTER_ESP => msrs.sysenter_esp,
            msr::SYSENTER_EIP => msrs.sysenter_eip,
            msr::PAT => msrs.pat,
            msr::DEBUGCTL => msrs.debugctl,
            msr::XSS => msrs.xss,
            msr::PKRS => msrs.pkrs,
            msr::SPEC_CTRL => msrs.spec_ctrl,
            _ => return None,
        })
    }

    /// Writes an MSR that lives in the processor. Returns whether the value was acceptable.
    fn write_msr(&mut self, number: u32, value: u64) -> bool {
        let canonical = self.is_canonical(value);
        let msrs = &mut self.state.msrs;
        match number {
            msr::EFER => return self.set_efer(value),
            msr::STAR => msrs.star = value,
            msr::LSTAR if canonical => msrs.lstar = value,
            msr::CSTAR if canonical => msrs.cstar = value,
            msr::FMASK => msrs.fmask = value & 0xffff_ffff,
            msr::FS_BASE if canonical => self.set_segment_base(SegmentName::Fs, value),
            msr::GS_BASE if canonical => self.set_segment_base(SegmentName::Gs, value),
            msr::KERNEL_GS_BASE if canonical => msrs.kernel_gs_base = value,
            msr::TSC_AUX if value >> 32 == 0 => msrs.tsc_aux = value,
            msr::SYSENTER_CS => msrs.sysenter_cs = value & 0xffff_ffff,
            msr::SYSENTER_ESP if canonical => msrs.sysenter_esp = value,
            msr::SYSENTER_EIP if canonical => msrs.sysenter_eip = value,
            msr::PAT => {
                let valid = value
                    .to_le_bytes()
                    .iter()
                    .all(|t| matches!(t, 0 | 1 | 4..=7));
                if valid {
                    msrs.pat = value;
                }
                return valid;
            }
            msr::DEBUGCTL => msrs.debugctl = value,
            msr::XSS => msrs.xss = value,
            msr::PKRS if value >> 32 == 0 => {
                msrs.pkrs = value;
                self.update_context();
            }
            msr::SPEC_CTRL => msrs.spec_ctrl = value,
            _ => return false,
        }
        true
    }

    /// Sets a segment base without touching the rest (WRMSR, WRFSBASE).
    pub(crate) fn set_segment_base(&mut self, name: SegmentName, base: u64) {
        self.state.segments[name as usize].base = base;
        self.state.segment_bases[name as usize] = base;
    }

    fn set_efer(&mut self, value: u64) -> bool {
        let new = Efer::from_bits_retain(value);
        let old = self.state.efer;
        if value & !self.efer_allowed() != 0
            || (old ^ new).contains(Efer::LME) && self.state.cr0.contains(Cr0::PG)
        {
            return false;
        }
        // LMA is read-only.
        self.state.efer = (new - Efer::LMA) | old & Efer::LMA;
        self.update_mode();
        true
    }
}

//! Control and debug registers, MSRs, time, CPUID, halts, TLB instructions, VMX instructions.

use super::attempt;
use crate::memory::{DATA, Int};
use crate::op::{Flow, Op, Stop, flag};
use crate::vcpu::{Cause, Vcpu};
use arch::control_registers::{Cr0, Cr3, Cr4, Dr6, Dr7, Efer, Xcr0};
use arch::controls::{PinControls, PrimaryControls, SecondaryControls};
use arch::cpuid::Feature;
use arch::exception::Exception;
use arch::exit::{CrAccess, DrAccess, ExitReason, VmExit};
use arch::msr;
use arch::segment::SegmentName;

/// CR0 bits that exist; the others read as written to in the low half and must be zero above.
const CR0_DEFINED: u64 = 0xe005_003f;

impl Vcpu {
    /// Stops for an exit caused by this instruction.
    pub(crate) fn exit_for(&mut self, op: &Op, reason: ExitReason, qualification: u64) -> Stop {
        let mut exit = VmExit::new(reason);
        exit.qualification = qualification;
        exit.instruction_length = op.len.into();
        self.stop_with(Cause::Exit(exit))
    }

    /// Whether a primary control is in force.
    pub(crate) fn primary(&self, control: PrimaryControls) -> bool {
        self.controls().primary.contains(control)
    }

    /// CR0 as the guest reads it.
    fn visible_cr0(&self) -> u64 {
        let c = self.controls();
        self.state.cr0.bits() & !c.cr0_mask | c.cr0_shadow & c.cr0_mask
    }

    /// CR4 as the guest reads it.
    fn visible_cr4(&self) -> u64 {
        let c = self.controls();
        self.state.cr4.bits() & !c.cr4_mask | c.cr4_shadow & c.cr4_mask
    }

    /// CR4 bits that the guest's features allow.
    pub fn cr4_allowed(&self) -> u64 {
        let mut allowed = Cr4::TSD | Cr4::PCE | Cr4::OSXMMEXCPT;
        let table = [
            (Feature::VME, Cr4::VME | Cr4::PVI),
            (Feature::DE, Cr4::DE),
            (Feature::PSE, Cr4::PSE),
            (Feature::PAE, Cr4::PAE),
            (Feature::MCE, Cr4::MCE),
            (Feature::PGE, Cr4::PGE),
            (Feature::FXSR, Cr4::OSFXSR),
            (Feature::UMIP, Cr4::UMIP),
            (Feature::LA57, Cr4::LA57),
            (Feature::VMX, Cr4::VMXE),
            (Feature::FSGSBASE, Cr4::FSGSBASE),
            (Feature::PCID, Cr4::PCIDE),
            (Feature::XSAVE, Cr4::OSXSAVE),
            (Feature::SMEP, Cr4::SMEP),
            (Feature::SMAP, Cr4::SMAP),
            (Feature::PKU, Cr4::PKE),
            (Feature::PKS, Cr4::PKS),
        ];
        for (feature, bits) in table {
            if self.has(feature) {
                allowed |= bits;
            }
        }
        allowed.bits()
    }

    /// EFER bits that the guest's features allow.
    fn efer_allowed(&self) -> u64 {
        let mut allowed = Efer::empty();
        for (feature, bits) in [
            (Feature::SYSCALL, Efer::SCE),
            (Feature::LM, Efer::LME | Efer::LMA),
            (Feature::NX, Efer::NXE),
            (Feature::FXSR_OPT, Efer::FFXSR),
        ] {
            if self.has(feature) {
                allowed |= bits;
            }
        }
        allowed.bits()
    }

    /// Loads the PDPTEs that `cr3` names, if PAE paging is (about to be) in use.
    fn load_pdptes(&mut self, cr3: u64) -> Result<(), Stop> {
        let mut pdptes = [0; 4];
        for (i, pdpte) in pdptes.iter_mut().enumerate() {
            let gpa = (cr3 & 0xffff_ffe0) + 8 * i as u64;
            *pdpte = self.read_physical(gpa)?;
        }
        if !self.paging.accepts_pdptes(&pdptes) {
            return Err(self.general_protection());
        }
        self.state.pdptes = pdptes;
        Ok(())
    }

    fn pae_paging(&self) -> bool {
        self.state.cr0.contains(Cr0::PG)
            && self.state.cr4.contains(Cr4::PAE)
            && !self.state.efer.contains(Efer::LMA)
    }

    /// Reloads the PDPTEs where hardware's walk uses them; undoes `old` if they are bad.
    fn reload_pdptes(&mut self, old: (Cr0, Cr4, Efer)) -> Result<(), Stop> {
        self.update_mode();
        if !self.pae_paging() || !self.controls().ept() {
            return Ok(());
        }
        let cr3 = self.state.cr3;
        if let Err(stop) = self.load_pdptes(cr3) {
            (self.state.cr0, self.state.cr4, self.state.efer) = old;
            self.update_mode();
            return Err(stop);
        }
        Ok(())
    }

    /// Sets CR0 as MOV to CR0 does, after interception.
    fn set_cr0(&mut self, value: u64) -> Result<(), Stop> {
        let new = Cr0::from_bits_retain(value & CR0_DEFINED | Cr0::ET.bits());
        if value >> 32 != 0
            || new.contains(Cr0::PG) && !new.contains(Cr0::PE)
            || new.contains(Cr0::NW) && !new.contains(Cr0::CD)
        {
            return Err(self.general_protection());
        }
        let old = (self.state.cr0, self.state.cr4, self.state.efer);
        let paging_changes = (old.0 ^ new).contains(Cr0::PG);
        if paging_changes {
            if new.contains(Cr0::PG) {
                let cs_long = self.state.segments[SegmentName::Cs as usize]
                    .access
                    .has(arch::segment::AccessRights::L);
                let lme = self.state.efer.contains(Efer::LME);
                if lme && (!self.state.cr4.contains(Cr4::PAE) || cs_long) {
                    return Err(self.general_protection());
                }
                self.state.efer.set(Efer::LMA, lme);
            } else {
                if self.long64 || self.state.cr4.contains(Cr4::PCIDE) {
                    return Err(self.general_protection());
                }
                self.state.efer.remove(Efer::LMA);
            }
        } else if !new.contains(Cr0::PG) && self.state.cr4.contains(Cr4::PCIDE) {
            return Err(self.general_protection());
        }
        self.state.cr0 = new;
        let pae_bits = Cr0::PG | Cr0::CD | Cr0::NW;
        if (old.0 ^ new).intersects(pae_bits) {
            self.reload_pdptes(old)?;
        }
        if (old.0 ^ new).intersects(Cr0::PG | Cr0::PE) {
            self.tlb.flush();
        }
        self.update_mode();
        Ok(())
    }

    /// Sets CR4 as MOV to CR4 does, after interception.
    fn set_cr4(&mut self, value: u64) -> Result<(), Stop> {
        let new = Cr4::from_bits_retain(value);
        let long = self.state.efer.contains(Efer::LMA);
        let old = self.state.cr4;
        let pcid_on = new.contains(Cr4::PCIDE) && !old.contains(Cr4::PCIDE);
        if value & !self.cr4_allowed() != 0
            || long && !new.contains(Cr4::PAE)
            || long && (old ^ new).contains(Cr4::LA57)
            || pcid_on && (!long || self.state.cr3 & Cr3::PCID_MASK != 0)
        {
            return Err(self.general_protection());
        }
        self.state.cr4 = new;
        let pae_bits = Cr4::PAE | Cr4::PGE | Cr4::PSE | Cr4::SMEP;
        if (old ^ new).intersects(pae_bits) {
            self.reload_pdptes((self.state.cr0, old, self.state.efer))?;
        }
        let flushes = Cr4::PGE | Cr4::PAE | Cr4::PSE | Cr4::PCIDE | Cr4::SMEP | Cr4::LA57;
        if (old ^ new).intersects(flushes) {
            self.tlb.flush();
        }
        self.update_mode();
        Ok(())
    }

    /// Sets CR3 as MOV to CR3 does, after interception.
    fn set_cr3(&mut self, value: u64) -> Result<(), Stop> {
        let pcide = self.state.cr4.contains(Cr4::PCIDE);
        let no_flush = pcide && value & Cr3::NO_FLUSH.bits() != 0;
        let new = if pcide {
            value & !Cr3::NO_FLUSH.bits()
        } else {
            value
        };
        let new = if self.state.efer.contains(Efer::LMA) {
            if new >> self.maxphyaddr != 0 {
                return Err(self.general_protection());
            }
            new
        } else {
            new & 0xffff_ffff
        };
        if self.pae_paging() && self.controls().ept() {
            self.load_pdptes(new)?;
        }
        self.state.cr3 = new;
        if !no_flush {
            let (pcid, vpid) = ((new & Cr3::PCID_MASK) as u16, self.controls().vpid);
            let pcid = if pcide { pcid } else { 0 };
            self.tlb
                .flush_spaces(|space| space.pcid == pcid && space.vpid == vpid);
        }
        self.update_context();
        Ok(())
    }

    /// CR8 as the guest sees it.
    fn task_priority(&self) -> u64 {
        self.state.cr8
    }

    fn set_task_priority(&mut self, value: u64) -> Result<(), Stop> {
        if value > 15 {
            return Err(self.general_protection());
        }
        self.state.cr8 = value;
        if self.primary(PrimaryControls::TPR_SHADOW)
            && !self.secondary(SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY)
            && (value as u32) < self.controls().tpr_threshold & 0xf
        {
            // A trap-like exit: the instruction has completed.
            let exit = VmExit::new(ExitReason::TprBelowThreshold);
            return Err(self.stop_with(Cause::ExitAfter(exit)));
        }
        Ok(())
    }

    /// Reads a guest-physical quadword (PDPTEs).
    fn read_physical(&mut self, gpa: u64) -> Result<u64, Stop> {
        use crate::host::HostInt;
        use crate::second_stage::StageAccess;
        match self.second_stage.translate(gpa, StageAccess::Read) {
            // SAFETY: the second stage maps nothing but memory given to the guest.
            Ok(mapped) => match unsafe { u64::load(mapped.hva) } {
                Ok(value) => Ok(value),
                Err(_) => {
                    self.host_fault_gpa = Some(gpa);
                    Err(self.pdpte_exit(gpa, ExitReason::EptViolation, 0))
                }
            },
            Err(outcome) => {
                let reason = match outcome.reason {
                    crate::second_stage::Reason::Misconfigured => ExitReason::EptMisconfiguration,
                    _ => ExitReason::EptViolation,
                };
                Err(self.pdpte_exit(gpa, reason, outcome.qualification.bits()))
            }
        }
    }

    /// An EPT exit while loading PDPTEs: the linear address is not valid.
    fn pdpte_exit(&mut self, gpa: u64, reason: ExitReason, qualification: u64) -> Stop {
        let mut exit = VmExit::new(reason);
        exit.guest_physical_address = gpa;
        if reason == ExitReason::EptViolation {
            exit.qualification = qualification | arch::exit::EptViolation::READ.bits();
        }
        self.stop_with(Cause::Exit(exit))
    }
}

/// MOV to control register `aux` from register `dst`.
pub(crate) fn mov_to_cr(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.require_cpl0());
    let value = if cpu.long64 {
        cpu.reg::<u64>(op.dst)
    } else {
        cpu.reg::<u32>(op.dst).into()
    };
    let access = CrAccess::MovTo {
        cr: op.aux,
        register: op.dst / 8,
    };
    let controls = cpu.controls();
    let intercepted = match op.aux {
        0 => (value ^ controls.cr0_shadow) & controls.cr0_mask != 0,
        4 => (value ^ controls.cr4_shadow) & controls.cr4_mask != 0,
        3 => cpu.primary(PrimaryControls::CR3_LOAD_EXITING),
        8 => cpu.primary(PrimaryControls::CR8_LOAD_EXITING),
        _ => false,
    };
    if intercepted {
        cpu.exit_for(op, ExitReason::CrAccess, access.qualification());
        return Flow::Stop;
    }
    match op.aux {
        0 => {
            let mask = cpu.controls().cr0_mask;
            let value = value & !mask | cpu.state.cr0.bits() & mask;
            attempt!(cpu.set_cr0(value));
        }
        2 => cpu.state.cr2 = value,
        3 => attempt!(cpu.set_cr3(value)),
        4 => {
            let mask = cpu.controls().cr4_mask;
            let value = value & !mask | cpu.state.cr4.bits() & mask;
            attempt!(cpu.set_cr4(value));
        }
        8 => attempt!(cpu.set_task_priority(value)),
        _ => {
            cpu.undefined();
            return Flow::Stop;
        }
    }
    cpu.end_block(op)
}

/// MOV from control register `aux` to register `dst`.
pub(crate) fn mov_from_cr(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.require_cpl0());
    let intercepted = match op.aux {
        3 => cpu.primary(PrimaryControls::CR3_STORE_EXITING),
        8 => cpu.primary(PrimaryControls::CR8_STORE_EXITING),
        _ => false,
    };
    if intercepted {
        let access = CrAccess::MovFrom {
            cr: op.aux,
            register: op.dst / 8,
        };
        cpu.exit_for(op, ExitReason::CrAccess, access.qualification());
        return Flow::Stop;
    }
    let value = match op.aux {
        0 => cpu.visible_cr0(),
        2 => cpu.state.cr2,
        3 => cpu.state.cr3,
        4 => cpu.visible_cr4(),
        8 => cpu.task_priority(),
        _ => {
            cpu.undefined();
            return Flow::Stop;
        }
    };
    if cpu.long64 {
        cpu.set_reg(op.dst, value);
    } else {
        cpu.set_reg(op.dst, value as u32);
    }
    Flow::Next
}

/// CLTS.
pub(crate) fn clts(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.require_cpl0());
    let controls = cpu.controls();
    let ts = Cr0::TS.bits();
    if controls.cr0_mask & ts != 0 {
        if controls.cr0_shadow & ts != 0 {
            cpu.exit_for(op, ExitReason::CrAccess, CrAccess::Clts.qualification());
            return Flow::Stop;
        }
        return cpu.end_block(op);
    }
    cpu.state.cr0.remove(Cr0::TS);
    cpu.end_block(op)
}

/// LMSW.
pub(crate) fn lmsw(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.require_cpl0());
    let source = attempt!(cpu.load_rm::<u16>(op));
    let (mask, shadow) = (cpu.controls().cr0_mask, cpu.controls().cr0_shadow);
    let value = u64::from(source);
    // LMSW can set PE, not clear it.
    let pe = value & mask & !shadow & 1 != 0;
    if pe || (value ^ shadow) & mask & 0xe != 0 {
        let memory = op.flags & flag::MEMORY != 0;
        let qualification = CrAccess::Lmsw { source, memory }.qualification();
        cpu.exit_for(op, ExitReason::CrAccess, qualification);
        return Flow::Stop;
    }
    let old = cpu.state.cr0.bits();
    let changed = old & !0xe | value & 0xf;
    attempt!(cpu.set_cr0(changed & !mask | old & mask));
    cpu.end_block(op)
}

/// SMSW.
pub(crate) fn smsw<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.check_umip());
    let value = cpu.visible_cr0();
    if op.flags & flag::MEMORY != 0 {
        return cpu.store(op, value as u16).into();
    }
    cpu.set_reg(op.dst, T::truncate(value));
    Flow::Next
}

/// MOV to and from debug registers: register `dst`, debug register `aux`, `aux2` 1 for reads.
pub(crate) fn mov_dr(cpu: &mut Vcpu, op: &Op) -> Flow {
    let (from, number) = (op.aux2 == 1, op.aux);
    let de = cpu.state.cr4.contains(Cr4::DE);
    if de && matches!(number, 4 | 5) {
        cpu.undefined();
        return Flow::Stop;
    }
    if cpu.primary(PrimaryControls::MOV_DR_EXITING) && cpu.cpl() == 0 {
        let access = DrAccess {
            dr: number,
            from,
            register: op.dst / 8,
        };
        cpu.exit_for(op, ExitReason::DrAccess, access.qualification());
        return Flow::Stop;
    }
    attempt!(cpu.require_cpl0());
    if cpu.state.dr7.contains(Dr7::GD) {
        let exception = Exception::Debug;
        let fault = crate::event::Fault {
            exception,
            error_code: None,
            address: Dr6::BD.bits(),
        };
        cpu.stop_with(Cause::Exception(fault));
        return Flow::Stop;
    }
    let long = cpu.long64;
    if from {
        let value = match number {
            0..=3 => cpu.state.dr[number as usize],
            4 | 6 => cpu.state.dr6.bits(),
            _ => cpu.state.dr7.bits(),
        };
        if long {
            cpu.set_reg(op.dst, value);
        } else {
            cpu.set_reg(op.dst, value as u32);
        }
        return Flow::Next;
    }
    let value = if long {
        cpu.reg::<u64>(op.dst)
    } else {
        cpu.reg::<u32>(op.dst).into()
    };
    if number >= 4 && value >> 32 != 0 {
        cpu.general_protection();
        return Flow::Stop;
    }
    match number {
        0..=3 => cpu.state.dr[number as usize] = value,
        4 | 6 => {
            cpu.state.dr6 = Dr6::from_bits_retain(value & Dr6::VOLATILE | Dr6::FIXED_1);
        }
        _ => {
            cpu.state.dr7 = Dr7::from_bits_retain(value & 0xffff_2bff | Dr7::FIXED_1);
        }
    }
    cpu.update_context();
    cpu.request_own();
    cpu.end_block(op)
}

/// RDMSR.
pub(crate) fn rdmsr(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.require_cpl0());
    let number = cpu.reg::<u32>(8);
    if cpu.msr_exits(number, false) {
        cpu.exit_for(op, ExitReason::Rdmsr, 0);
        return Flow::Stop;
    }
    match cpu.read_msr(number) {
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
        // SAFETY: RDTSC has no preconditions on processors this crate runs on.
        let host = unsafe { core::arch::x86_64::_rdtsc() };
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
                self.tlb.flush();
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

/// INVLPG.
pub(crate) fn invlpg(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.require_cpl0());
    let gva = cpu
        .effective(op)
        .wrapping_add(cpu.state.segment_bases[op.segment as usize]);
    let gva = if cpu.long64 && op.flags & flag::ADDRESS_32 == 0 {
        gva
    } else {
        gva & 0xffff_ffff
    };
    if cpu.primary(PrimaryControls::INVLPG_EXITING) {
        cpu.exit_for(op, ExitReason::Invlpg, gva);
        return Flow::Stop;
    }
    if !cpu.long64 || cpu.is_canonical(gva) {
        cpu.tlb.flush_page(gva);
        cpu.update_jump_key();
    }
    cpu.end_block(op)
}

/// INVPCID; the type is in register `dst`.
pub(crate) fn invpcid(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.require_cpl0());
    if cpu.primary(PrimaryControls::INVLPG_EXITING) {
        let info = cpu.operand_info(op) | u32::from(op.dst / 8) << 28;
        let mut exit = VmExit::new(ExitReason::Invpcid);
        exit.instruction_length = op.len.into();
        exit.instruction_info = info;
        exit.qualification = op.disp as i64 as u64;
        cpu.stop_with(Cause::Exit(exit));
        return Flow::Stop;
    }
    let kind = if cpu.long64 {
        cpu.reg::<u64>(op.dst)
    } else {
        cpu.reg::<u32>(op.dst).into()
    };
    let mut bytes = [0; 16];
    attempt!(cpu.read_operand_bytes(op, 0, &mut bytes));
    let descriptor = u128::from_le_bytes(bytes);
    let (pcid, gva) = ((descriptor & 0xfff) as u16, (descriptor >> 64) as u64);
    let reserved = descriptor as u64 >> 12 != 0;
    let pcide = cpu.state.cr4.contains(Cr4::PCIDE);
    let bad = match kind {
        0 => reserved || !cpu.is_canonical(gva) || pcid != 0 && !pcide,
        1 => reserved || pcid != 0 && !pcide,
        2 | 3 => false,
        _ => true,
    };
    if bad {
        cpu.general_protection();
        return Flow::Stop;
    }
    match kind {
        0 => cpu.tlb.flush_page(gva),
        1 => cpu.tlb.flush_spaces(|space| space.pcid == pcid),
        _ => cpu.tlb.flush(),
    }
    cpu.update_context();
    cpu.end_block(op)
}

/// SWAPGS.
pub(crate) fn swapgs(cpu: &mut Vcpu, _op: &Op) -> Flow {
    attempt!(cpu.require_cpl0());
    let gs = cpu.state.segments[SegmentName::Gs as usize].base;
    let swapped = cpu.state.msrs.kernel_gs_base;
    cpu.state.msrs.kernel_gs_base = gs;
    cpu.set_segment_base(SegmentName::Gs, swapped);
    Flow::Next
}

/// RDFSBASE, RDGSBASE (`aux2` 0) and WRFSBASE, WRGSBASE (1) of segment `aux`, register `dst`.
pub(crate) fn segment_base<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    if !cpu.state.cr4.contains(Cr4::FSGSBASE) {
        cpu.undefined();
        return Flow::Stop;
    }
    let name = SegmentName::ALL[op.aux as usize];
    if op.aux2 == 0 {
        let base = cpu.state.segments[name as usize].base;
        cpu.set_reg(op.dst, T::truncate(base));
        return Flow::Next;
    }
    let base: u64 = cpu.reg::<T>(op.dst).into();
    if !cpu.is_canonical(base) {
        cpu.general_protection();
        return Flow::Stop;
    }
    cpu.set_segment_base(name, base);
    Flow::Next
}

/// CPUID.
pub(crate) fn cpuid(cpu: &mut Vcpu, op: &Op) -> Flow {
    cpu.exit_for(op, ExitReason::Cpuid, 0);
    Flow::Stop
}

/// RDTSC (`aux` 0) and RDTSCP (1).
pub(crate) fn rdtsc(cpu: &mut Vcpu, op: &Op) -> Flow {
    if cpu.state.cr4.contains(Cr4::TSD) && cpu.cpl() != 0 {
        cpu.general_protection();
        return Flow::Stop;
    }
    if cpu.primary(PrimaryControls::RDTSC_EXITING) {
        let reason = if op.aux == 0 {
            ExitReason::Rdtsc
        } else {
            ExitReason::Rdtscp
        };
        cpu.exit_for(op, reason, 0);
        return Flow::Stop;
    }
    let tsc = cpu.guest_tsc();
    cpu.set_reg(0, tsc as u32);
    cpu.set_reg(16, (tsc >> 32) as u32);
    if op.aux == 1 {
        let aux = cpu.state.msrs.tsc_aux;
        cpu.set_reg(8, aux as u32);
    }
    Flow::Next
}

/// RDPID.
pub(crate) fn rdpid(cpu: &mut Vcpu, op: &Op) -> Flow {
    let aux = cpu.state.msrs.tsc_aux;
    cpu.set_reg(op.dst, aux);
    Flow::Next
}

/// RDPMC.
pub(crate) fn rdpmc(cpu: &mut Vcpu, op: &Op) -> Flow {
    if !cpu.state.cr4.contains(Cr4::PCE) && cpu.cpl() != 0 {
        cpu.general_protection();
        return Flow::Stop;
    }
    if cpu.primary(PrimaryControls::RDPMC_EXITING) {
        cpu.exit_for(op, ExitReason::Rdpmc, 0);
        return Flow::Stop;
    }
    // No counters exist.
    cpu.general_protection();
    Flow::Stop
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
        // SAFETY: as in `guest_tsc`.
        let now = unsafe { core::arch::x86_64::_rdtsc() };
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
    if !cpu.has(Feature::MONITOR) || cpu.cpl() != 0 {
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
    Flow::Next
}

/// INVD (`aux` 0) and WBINVD, WBNOINVD (1).
pub(crate) fn cache(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.require_cpl0());
    if op.aux == 0 {
        cpu.exit_for(op, ExitReason::Invd, 0);
        return Flow::Stop;
    }
    if cpu.secondary(SecondaryControls::WBINVD_EXITING) {
        cpu.exit_for(op, ExitReason::Wbinvd, 0);
        return Flow::Stop;
    }
    Flow::Next
}

/// XGETBV.
pub(crate) fn xgetbv(cpu: &mut Vcpu, _op: &Op) -> Flow {
    if !cpu.state.cr4.contains(Cr4::OSXSAVE) {
        cpu.undefined();
        return Flow::Stop;
    }
    let index = cpu.reg::<u32>(8);
    let value = match index {
        0 => cpu.state.xcr0.bits(),
        1 if cpu.has(Feature::XGETBV1) => cpu.state.xcr0.bits() & cpu.components_in_use(),
        _ => {
            cpu.general_protection();
            return Flow::Stop;
        }
    };
    cpu.set_reg(0, value as u32);
    cpu.set_reg(16, (value >> 32) as u32);
    Flow::Next
}

/// XSETBV.
pub(crate) fn xsetbv(cpu: &mut Vcpu, op: &Op) -> Flow {
    if !cpu.state.cr4.contains(Cr4::OSXSAVE) {
        cpu.undefined();
        return Flow::Stop;
    }
    attempt!(cpu.require_cpl0());
    cpu.exit_for(op, ExitReason::Xsetbv, 0);
    Flow::Stop
}

impl Vcpu {
    /// XINUSE: the components that are not in their initial state.
    pub(crate) fn components_in_use(&self) -> u64 {
        use crate::state::ExtendedState;
        let area = &self.state.extended.0;
        let initial = ExtendedState::initial();
        let range = |from: usize, to: usize| area[from..to] != initial.0[from..to];
        let mut in_use = Xcr0::empty();
        in_use.set(Xcr0::X87, range(0, 24) || range(32, 160));
        in_use.set(Xcr0::SSE, range(160, 416));
        in_use.set(Xcr0::AVX, range(576, 832));
        in_use.set(Xcr0::PKRU, self.state.pkru != 0);
        in_use.bits()
    }
}

/// RDRAND (`aux` 0) and RDSEED (1).
pub(crate) fn random<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let (control, reason) = if op.aux == 0 {
        (SecondaryControls::RDRAND_EXITING, ExitReason::Rdrand)
    } else {
        (SecondaryControls::RDSEED_EXITING, ExitReason::Rdseed)
    };
    if cpu.secondary(control) {
        cpu.exit_for(op, reason, 0);
        return Flow::Stop;
    }
    let mut bytes = [0; 8];
    // SAFETY: the buffer is valid for its length.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    let ok = got == 8;
    cpu.set_reg(
        op.dst,
        T::truncate(if ok { u64::from_le_bytes(bytes) } else { 0 }),
    );
    cpu.state.flags = crate::state::LazyFlags::from_status(ok.into());
    Flow::Next
}

/// RDPKRU (`aux` 0) and WRPKRU (1).
pub(crate) fn pkru(cpu: &mut Vcpu, op: &Op) -> Flow {
    if !cpu.state.cr4.contains(Cr4::PKE) {
        cpu.undefined();
        return Flow::Stop;
    }
    if cpu.reg::<u32>(8) != 0 || op.aux == 1 && cpu.reg::<u32>(16) != 0 {
        cpu.general_protection();
        return Flow::Stop;
    }
    if op.aux == 0 {
        let value = cpu.state.pkru;
        cpu.set_reg(0, value);
        cpu.set_reg(16, 0u32);
        return Flow::Next;
    }
    cpu.state.pkru = cpu.reg::<u32>(0);
    cpu.update_context();
    Flow::Next
}

/// VMCALL and VMMCALL: exits at any privilege level.
pub(crate) fn vmcall(cpu: &mut Vcpu, op: &Op) -> Flow {
    cpu.exit_for(op, ExitReason::Vmcall, 0);
    Flow::Stop
}

/// The other VMX instructions; `aux` is the exit reason. They are #UD while the guest has not
/// enabled VMX.
pub(crate) fn vmx(cpu: &mut Vcpu, op: &Op) -> Flow {
    if !cpu.state.cr4.contains(Cr4::VMXE) || cpu.real_segments() {
        cpu.undefined();
        return Flow::Stop;
    }
    let Some(reason) = ExitReason::from_number(op.aux.into()) else {
        cpu.undefined();
        return Flow::Stop;
    };
    let mut exit = VmExit::new(reason);
    exit.instruction_length = op.len.into();
    exit.qualification = op.disp as i64 as u64;
    exit.instruction_info = cpu.operand_info(op);
    cpu.stop_with(Cause::Exit(exit));
    Flow::Stop
}

/// RSM outside SMM is #UD; in SMM it exits for the hypervisor, which holds the saved state.
pub(crate) fn rsm(cpu: &mut Vcpu, op: &Op) -> Flow {
    if !cpu.state.smm {
        cpu.undefined();
        return Flow::Stop;
    }
    cpu.exit_for(op, ExitReason::Rsm, 0);
    Flow::Stop
}

/// CLZERO: clears the cache line that rAX names.
pub(crate) fn clzero(cpu: &mut Vcpu, op: &Op) -> Flow {
    let offset = cpu.counter_like(0, op.aux2) & !63;
    let address = attempt!(cpu.linear(DATA, offset, 64, true));
    cpu.write_bytes(address, DATA, &[0; 64]).into()
}

impl Vcpu {
    /// A register by address size.
    fn counter_like(&self, register: u8, size: u8) -> u64 {
        match size {
            2 => self.reg::<u16>(register).into(),
            4 => self.reg::<u32>(register).into(),
            _ => self.reg::<u64>(register),
        }
    }

    /// The preemption timer's remaining value, in its own units.
    pub fn preemption_timer_value(&self) -> Option<u32> {
        let deadline = self.preemption_deadline?;
        // SAFETY: as in `guest_tsc`.
        let now = unsafe { core::arch::x86_64::_rdtsc() };
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
        // SAFETY: as in `guest_tsc`.
        let now = unsafe { core::arch::x86_64::_rdtsc() };
        self.preemption_deadline = Some(now.wrapping_add(ticks));
    }
}

/// log2 of the time-stamp ticks in a unit of the preemption timer.
pub(crate) const PREEMPTION_SHIFT: u32 = 5;

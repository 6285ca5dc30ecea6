//! MOV to and from control and debug registers, CLTS, LMSW, SMSW.
//!
//! Source: SDM volume 2 under each instruction; volume 3, "Control Registers" and "Debug Registers".

use super::attempt;
use crate::memory::Int;
use crate::op::{Flow, Op, Stop, flag};
use crate::vcpu::{Cause, Vcpu};
use arch::control_registers::{Cr0, Cr3, Cr4, Dr6, Dr7, Efer};
use arch::controls::PrimaryControls;
use arch::cpuid::Feature;
use arch::exception::Exception;
use arch::exit::{CrAccess, DrAccess, ExitReason, VmExit};
use arch::segment::SegmentName;

/// CR0 bits that exist; the others read as written to in the low half and must be zero above.
const CR0_DEFINED: u64 = 0xe005_003f;

impl Vcpu {
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
            if self.shows(feature) {
                allowed |= bits;
            }
        }
        allowed.bits()
    }

    /// EFER bits that the guest's features allow.
    pub(super) fn efer_allowed(&self) -> u64 {
        let mut allowed = Efer::empty();
        for (feature, bits) in [
            (Feature::SYSCALL, Efer::SCE),
            (Feature::LM, Efer::LME | Efer::LMA),
            (Feature::NX, Efer::NXE),
            (Feature::FXSR_OPT, Efer::FFXSR),
        ] {
            if self.shows(feature) {
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
        if self.primary(PrimaryControls::TPR_SHADOW) {
            return self.virtual_task_priority();
        }
        self.state.cr8
    }

    /// Sets CR8; the exit that follows the instruction.
    fn set_task_priority(&mut self, value: u64) -> Result<Option<VmExit>, Stop> {
        if value > 15 {
            return Err(self.general_protection());
        }
        if self.primary(PrimaryControls::TPR_SHADOW) {
            return Ok(self.set_virtual_task_priority(value));
        }
        self.state.cr8 = value;
        Ok(None)
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
        8 => {
            let exit = attempt!(cpu.set_task_priority(value));
            return cpu.end_with(op, exit);
        }
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

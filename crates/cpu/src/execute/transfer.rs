//! Far transfers: far JMP, CALL, RET, IRET, INT, and the fast system calls.
//!
//! Source: SDM volume 2 under each instruction; volume 3, "Privilege Levels" and
//! "Fast System Calls in 64-Bit Mode".

use super::{attempt, stack::writable_flags};
use crate::event::Event;
use crate::op::{Flow, Op, Stop, flag};
use crate::segmentation::Descriptor;
use crate::state::Gpr;
use crate::vcpu::{Cause, Vcpu};
use arch::control_registers::{Cr0, Dr6, Efer, Rflags};
use arch::controls::Interruptibility;
use arch::exception::Exception;
use arch::exit::TaskSwitchSource;
use arch::interruption::InterruptionType;
use arch::segment::{AccessRights, Segment, SegmentName};

const CS: usize = SegmentName::Cs as usize;
const SS: usize = SegmentName::Ss as usize;

/// A flat segment as SYSCALL and SYSENTER load it.
fn flat(selector: u16, code: bool, dpl: u8, long: bool) -> Segment {
    let kind = if code { 0xb } else { 3 };
    let size = if long {
        AccessRights::L
    } else {
        AccessRights::DB
    };
    let access =
        kind | AccessRights::S | u32::from(dpl) << 5 | AccessRights::P | AccessRights::G | size;
    Segment {
        base: 0,
        limit: 0xffff_ffff,
        access: AccessRights(access),
        selector,
    }
}

impl Vcpu {
    fn selector_fault(&mut self, exception: Exception, selector: u16) -> Stop {
        self.raise_code(exception, u32::from(selector & !3))
    }

    /// Pushes the far return address of a CALL; RSP is as it was if the second push faults.
    fn push_far_return(&mut self, cs: u16, next: u64, size: u8) -> Result<(), Stop> {
        let before = self.state.gpr(Gpr::Rsp);
        self.push_sized(cs.into(), size)?;
        if let Err(stop) = self.push_sized(next, size) {
            self.state.set_gpr(Gpr::Rsp, before);
            return Err(stop);
        }
        Ok(())
    }

    /// Commits a transfer to `offset` in code segment `cs`.
    fn enter_code(&mut self, cs: Segment, offset: u64) {
        self.state.segments[CS] = cs;
        self.state.rip = offset;
        self.update_mode();
    }

    fn check_code_target(&mut self, cs: &Segment, offset: u64) -> Result<(), Stop> {
        let long = self.long_mode && cs.access.has(AccessRights::L);
        let ok = if long {
            self.is_canonical(offset)
        } else {
            offset <= cs.limit.into()
        };
        if ok {
            Ok(())
        } else {
            Err(self.general_protection())
        }
    }

    /// Far JMP or CALL to `selector:offset`. `push` is the operand size of a CALL.
    fn far_transfer(
        &mut self,
        op: &Op,
        selector: u16,
        offset: u64,
        push: Option<u8>,
    ) -> Result<(), Stop> {
        let next = self.next_rip(op);
        let old_cs = self.state.segments[CS].selector;
        if self.real_segments() {
            if offset > 0xffff && self.v86() {
                return Err(self.general_protection());
            }
            if let Some(size) = push {
                self.push_far_return(old_cs, next, size)?;
            }
            let mut cs = self.state.segments[CS];
            cs.selector = selector;
            cs.base = u64::from(selector) << 4;
            self.enter_code(cs, offset);
            return Ok(());
        }
        if selector & !3 == 0 {
            return Err(self.general_protection());
        }
        let descriptor = self.read_raw_descriptor(selector, Exception::GeneralProtection, 0)?;
        if descriptor.is_system() {
            return self.far_through_gate(op, selector, descriptor, push);
        }
        let mut cs = descriptor.segment(selector);
        self.check_direct_code(&cs, selector)?;
        self.check_code_target(&cs, offset)?;
        let cpl = self.cpl();
        cs.selector = selector & !3 | u16::from(cpl);
        if let Some(size) = push {
            self.push_far_return(old_cs, next, size)?;
        }
        self.mark_accessed(selector, &mut cs)?;
        self.enter_code(cs, offset);
        Ok(())
    }

    /// Checks a code segment named directly by a far transfer.
    fn check_direct_code(&mut self, cs: &Segment, selector: u16) -> Result<(), Stop> {
        let access = cs.access;
        let cpl = self.cpl();
        let both_sizes = access.has(AccessRights::L | AccessRights::DB) && self.long_mode;
        let privileged = if access.has(AccessRights::EC) {
            access.dpl() > cpl
        } else {
            (selector & 3) as u8 > cpl || access.dpl() != cpl
        };
        if !access.has(AccessRights::CODE | AccessRights::S) || privileged || both_sizes {
            return Err(self.selector_fault(Exception::GeneralProtection, selector));
        }
        if !access.has(AccessRights::P) {
            return Err(self.selector_fault(Exception::SegmentNotPresent, selector));
        }
        Ok(())
    }

    /// A far JMP or CALL whose selector names a system descriptor.
    fn far_through_gate(
        &mut self,
        op: &Op,
        selector: u16,
        descriptor: Descriptor,
        push: Option<u8>,
    ) -> Result<(), Stop> {
        let kind = descriptor.access().kind();
        let task = !self.long_mode && matches!(kind, 1 | 5 | 9);
        let call_gate = kind == 12 || kind == 4 && !self.long_mode;
        let dpl = descriptor.access().dpl();
        if !task && !call_gate || dpl < self.cpl() || dpl < (selector & 3) as u8 {
            return Err(self.selector_fault(Exception::GeneralProtection, selector));
        }
        if !descriptor.access().has(AccessRights::P) {
            return Err(self.selector_fault(Exception::SegmentNotPresent, selector));
        }
        if task {
            let source = if push.is_some() {
                TaskSwitchSource::Call
            } else {
                TaskSwitchSource::Jmp
            };
            let tss = if kind == 5 {
                descriptor.gate_selector()
            } else {
                selector
            };
            return Err(self.task_switch_exit(source, tss, op.len.into()));
        }
        self.through_call_gate(op, selector, descriptor, push.is_some())
    }

    fn through_call_gate(
        &mut self,
        op: &Op,
        gate_selector: u16,
        gate: Descriptor,
        call: bool,
    ) -> Result<(), Stop> {
        let gate = if self.long_mode {
            self.read_system_descriptor(gate_selector, Exception::GeneralProtection)?
        } else {
            gate
        };
        let selector = gate.gate_selector();
        if selector & !3 == 0 {
            return Err(self.general_protection());
        }
        let mut cs = self.read_descriptor(selector, Exception::GeneralProtection, 0)?;
        let access = cs.access;
        let cpl = self.cpl();
        let conforming = access.has(AccessRights::EC);
        let wrong_size =
            self.long_mode && (!access.has(AccessRights::L) || access.has(AccessRights::DB));
        let wrong_level = access.dpl() > cpl || !call && !conforming && access.dpl() != cpl;
        if !access.has(AccessRights::CODE | AccessRights::S) || wrong_size || wrong_level {
            return Err(self.selector_fault(Exception::GeneralProtection, selector));
        }
        if !access.has(AccessRights::P) {
            return Err(self.selector_fault(Exception::SegmentNotPresent, selector));
        }
        let wide = gate.access().kind() == 12;
        let offset = if wide {
            gate.gate_offset()
        } else {
            gate.gate_offset() & 0xffff
        };
        let size: u8 = if self.long_mode {
            8
        } else if wide {
            4
        } else {
            2
        };
        self.check_code_target(&cs, offset)?;
        let next = self.next_rip(op);
        let old_cs = self.state.segments[CS].selector;
        let inner = call && !conforming && access.dpl() < cpl;
        let level = if inner { access.dpl() } else { cpl };
        cs.selector = selector & !3 | u16::from(level);
        if inner {
            self.call_inner(level, size, gate.gate_parameters(), next)?;
        } else if call {
            self.push_far_return(old_cs, next, size)?;
        }
        self.mark_accessed(selector, &mut cs)?;
        self.enter_code(cs, offset);
        Ok(())
    }

    /// Switches to the stack of an inner level and pushes the frame of a call through a gate.
    fn call_inner(&mut self, level: u8, size: u8, parameters: u8, next: u64) -> Result<(), Stop> {
        let old_ss = self.state.segments[SS].selector;
        let old_rsp = self.state.gpr(Gpr::Rsp);
        let old_cs = self.state.segments[CS].selector;
        let (ss, rsp) = if self.long_mode {
            let tr = self.state.tr;
            let offset = 4 + 8 * u64::from(level);
            if offset + 7 > tr.limit.into() {
                return Err(self.selector_fault(Exception::InvalidTss, tr.selector));
            }
            let rsp: u64 = self.read_system(tr.base.wrapping_add(offset))?;
            if !self.is_canonical(rsp) {
                return Err(self.raise_code(Exception::StackFault, 0));
            }
            let access = AccessRights(AccessRights::UNUSABLE | u32::from(level) << 5);
            (
                Segment {
                    selector: level.into(),
                    access,
                    ..Segment::default()
                },
                rsp,
            )
        } else {
            self.read_tss_stack(level, 0)?
        };
        let mut values = vec![old_ss.into(), old_rsp];
        if !self.long_mode {
            for i in (0..u64::from(parameters)).rev() {
                values.push(self.peek_sized(i * u64::from(size), size)?);
            }
        }
        values.extend([u64::from(old_cs), next]);
        let mask = if self.long_mode {
            u64::MAX
        } else if ss.access.has(AccessRights::DB) {
            0xffff_ffff
        } else {
            0xffff
        };
        let mut sp = rsp;
        for value in values {
            sp = sp.wrapping_sub(size.into()) & mask;
            let address = if self.long_mode {
                sp
            } else {
                ss.base.wrapping_add(sp) & 0xffff_ffff
            };
            match size {
                2 => self.write_stack_as(address, false, value as u16)?,
                4 => self.write_stack_as(address, false, value as u32)?,
                _ => self.write_stack_as(address, false, value)?,
            }
        }
        self.state.segments[SS] = ss;
        self.state.set_gpr(Gpr::Rsp, rsp & !mask | sp);
        Ok(())
    }

    /// The selector:offset operand of an indirect far transfer.
    fn far_operand(&mut self, op: &Op) -> Result<(u16, u64), Stop> {
        if op.flags & flag::MEMORY == 0 {
            return Ok((op.imm as u16, op.imm >> 16));
        }
        let size = usize::from(op.aux);
        let mut bytes = [0; 10];
        self.read_operand_bytes(op, 0, &mut bytes[..size + 2])?;
        let selector = u16::from_le_bytes([bytes[size], bytes[size + 1]]);
        bytes[size..].fill(0);
        let mut offset = [0; 8];
        offset.copy_from_slice(&bytes[..8]);
        Ok((selector, u64::from_le_bytes(offset)))
    }

    /// Far return to an outer (or the same) level; used by RETF and IRET.
    fn check_return_code(&mut self, selector: u16) -> Result<Segment, Stop> {
        if selector & !3 == 0 {
            return Err(self.general_protection());
        }
        let cs = self.read_descriptor(selector, Exception::GeneralProtection, 0)?;
        let access = cs.access;
        let rpl = (selector & 3) as u8;
        let both_sizes = access.has(AccessRights::L | AccessRights::DB) && self.long_mode;
        let wrong_level = rpl < self.cpl()
            || if access.has(AccessRights::EC) {
                access.dpl() > rpl
            } else {
                access.dpl() != rpl
            };
        if !access.has(AccessRights::CODE | AccessRights::S) || both_sizes || wrong_level {
            return Err(self.selector_fault(Exception::GeneralProtection, selector));
        }
        if !access.has(AccessRights::P) {
            return Err(self.selector_fault(Exception::SegmentNotPresent, selector));
        }
        Ok(cs)
    }

    fn check_return_stack(
        &mut self,
        selector: u16,
        rpl: u8,
        cs: &Segment,
    ) -> Result<Segment, Stop> {
        if selector & !3 == 0 {
            let long = self.long_mode && cs.access.has(AccessRights::L);
            if !long || rpl == 3 || selector & 3 != u16::from(rpl) {
                return Err(self.general_protection());
            }
            let access = AccessRights(AccessRights::UNUSABLE | u32::from(rpl) << 5);
            return Ok(Segment {
                selector,
                access,
                ..Segment::default()
            });
        }
        let mut ss = self.read_descriptor(selector, Exception::GeneralProtection, 0)?;
        let access = ss.access;
        let writable =
            access.has(AccessRights::S | AccessRights::RW) && access.0 & AccessRights::CODE == 0;
        if selector & 3 != u16::from(rpl) || access.dpl() != rpl || !writable {
            return Err(self.selector_fault(Exception::GeneralProtection, selector));
        }
        if !access.has(AccessRights::P) {
            return Err(self.selector_fault(Exception::StackFault, selector));
        }
        self.mark_accessed(selector, &mut ss)?;
        Ok(ss)
    }

    /// Data segments that the outer level may not keep become null. Only that: what the register
    /// holds besides the selector stays, since 64-bit systems keep bases of FS and GS under null
    /// selectors across returns to user mode.
    fn drop_inner_segments(&mut self, level: u8) {
        for name in [
            SegmentName::Es,
            SegmentName::Ds,
            SegmentName::Fs,
            SegmentName::Gs,
        ] {
            let segment = self.state.segments[name as usize];
            let access = segment.access;
            let conforming = access.has(AccessRights::CODE | AccessRights::EC);
            if !access.usable() || !conforming && access.dpl() < level {
                let segment = &mut self.state.segments[name as usize];
                segment.selector = 0;
                segment.access.0 |= AccessRights::UNUSABLE;
            }
        }
    }

    fn iret_real(&mut self, op: &Op) -> Result<(), Stop> {
        let size = op.aux;
        let is_virtual = self.flags_image_is_virtual(size)?;
        let rip = self.peek_sized(0, size)?;
        let selector = self.peek_sized(size.into(), size)? as u16;
        let flags = self.peek_sized(2 * u64::from(size), size)?;
        self.check_code_limit(rip, 1)?;
        let virtual_flags = if is_virtual {
            Some(self.flags_from_virtual_image(flags)?)
        } else {
            None
        };
        self.release_stack(3 * u64::from(size));
        let mut cs = self.state.segments[CS];
        cs.selector = selector;
        cs.base = u64::from(selector) << 4;
        self.enter_code(cs, rip);
        if let Some(flags) = virtual_flags {
            self.change_rflags(flags);
            return Ok(());
        }
        let mut mask = writable_flags(self, size) | Rflags::RF.bits();
        if self.v86() {
            mask &= !(Rflags::IOPL0 | Rflags::IOPL1).bits();
        }
        if size == 2 {
            mask &= 0xffff;
        }
        let old = self.state.rflags();
        self.change_rflags(old & !mask | flags & mask);
        Ok(())
    }

    fn iret_protected(&mut self, op: &Op) -> Result<(), Stop> {
        let size = op.aux;
        let step = u64::from(size);
        if self.state.rflags_rest & Rflags::NT.bits() != 0 {
            if self.long_mode {
                return Err(self.general_protection());
            }
            let back: u16 = self.read_system(self.state.tr.base)?;
            return Err(self.task_switch_exit(TaskSwitchSource::Iret, back, op.len.into()));
        }
        let rip = self.peek_sized(0, size)?;
        let selector = self.peek_sized(step, size)? as u16;
        let flags = self.peek_sized(2 * step, size)?;
        if flags & Rflags::VM.bits() != 0 && self.cpl() == 0 && size == 4 && !self.long_mode {
            return self.iret_to_v86(rip, selector, flags);
        }
        let mut cs = self.check_return_code(selector)?;
        let rpl = (selector & 3) as u8;
        let cpl = self.cpl();
        self.check_code_target(&cs, rip)?;
        let switches = rpl > cpl || self.long64;
        let stack = if switches {
            let rsp = self.peek_sized(3 * step, size)?;
            let ss_selector = self.peek_sized(4 * step, size)? as u16;
            Some((rsp, self.check_return_stack(ss_selector, rpl, &cs)?))
        } else {
            None
        };
        // What may change is decided at the level that is left.
        let mut mask = writable_flags(self, size) | Rflags::RF.bits();
        if cpl == 0 && size >= 4 {
            mask |= (Rflags::VIF | Rflags::VIP).bits();
        }
        if size == 2 {
            mask &= 0xffff;
        }
        self.mark_accessed(selector, &mut cs)?;
        match stack {
            None => self.release_stack(3 * step),
            Some((rsp, ss)) => {
                self.state.segments[SS] = ss;
                self.state.segments[CS] = cs;
                self.update_mode();
                if size == 8 || self.long64 {
                    self.state.set_gpr(Gpr::Rsp, rsp);
                } else {
                    self.set_stack_pointer(rsp);
                }
            }
        }
        cs.selector = selector;
        let rip = if self.long_mode && cs.access.has(AccessRights::L) {
            rip
        } else {
            rip & 0xffff_ffff
        };
        self.enter_code(cs, rip);
        if rpl > cpl {
            self.drop_inner_segments(rpl);
        }
        let old = self.state.rflags();
        self.change_rflags(old & !mask | flags & mask);
        Ok(())
    }

    fn iret_to_v86(&mut self, rip: u64, cs: u16, flags: u64) -> Result<(), Stop> {
        let mut values = [0; 6];
        for (i, value) in values.iter_mut().enumerate() {
            *value = self.peek_sized(12 + 4 * i as u64, 4)?;
        }
        let [esp, ss, es, ds, fs, gs] = values;
        if rip > 0xffff {
            return Err(self.general_protection());
        }
        self.state.set_rflags(flags & 0x3f_7fd7 | Rflags::VM.bits());
        let selectors = [
            (SegmentName::Es, es),
            (SegmentName::Cs, cs.into()),
            (SegmentName::Ss, ss),
            (SegmentName::Ds, ds),
            (SegmentName::Fs, fs),
            (SegmentName::Gs, gs),
        ];
        for (name, selector) in selectors {
            let selector = selector as u16;
            self.state.segments[name as usize] = Segment {
                base: u64::from(selector) << 4,
                limit: 0xffff,
                access: AccessRights(0xf3),
                selector,
            };
        }
        self.state.set_gpr(Gpr::Rsp, esp & 0xffff_ffff);
        self.state.rip = rip;
        self.update_mode();
        self.request_own();
        Ok(())
    }
}

/// Far JMP; `aux` is the operand size, a direct target is in `imm` (offset << 16 | selector).
pub(crate) fn jmp_far(cpu: &mut Vcpu, op: &Op) -> Flow {
    let (selector, offset) = attempt!(cpu.far_operand(op));
    attempt!(cpu.far_transfer(op, selector, offset, None));
    Flow::Branch
}

/// Far CALL, likewise.
pub(crate) fn call_far(cpu: &mut Vcpu, op: &Op) -> Flow {
    let (selector, offset) = attempt!(cpu.far_operand(op));
    attempt!(cpu.far_transfer(op, selector, offset, Some(op.aux)));
    Flow::Branch
}

/// Far RET; `aux` is the operand size, `imm` more bytes are released.
pub(crate) fn ret_far(cpu: &mut Vcpu, op: &Op) -> Flow {
    let size = op.aux;
    let step = u64::from(size);
    let rip = attempt!(cpu.peek_sized(0, size));
    let selector = attempt!(cpu.peek_sized(step, size)) as u16;
    if cpu.real_segments() {
        attempt!(cpu.check_code_limit(rip, 1));
        cpu.release_stack(2 * step + op.imm);
        let mut cs = cpu.state.segments[CS];
        cs.selector = selector;
        cs.base = u64::from(selector) << 4;
        cpu.enter_code(cs, rip);
        return Flow::Branch;
    }
    let mut cs = attempt!(cpu.check_return_code(selector));
    attempt!(cpu.check_code_target(&cs, rip));
    let rpl = (selector & 3) as u8;
    if rpl == cpu.cpl() {
        attempt!(cpu.mark_accessed(selector, &mut cs));
        cpu.release_stack(2 * step + op.imm);
        cpu.enter_code(cs, rip);
        return Flow::Branch;
    }
    let rsp = attempt!(cpu.peek_sized(2 * step + op.imm, size));
    let ss_selector = attempt!(cpu.peek_sized(3 * step + op.imm, size)) as u16;
    let ss = attempt!(cpu.check_return_stack(ss_selector, rpl, &cs));
    attempt!(cpu.mark_accessed(selector, &mut cs));
    cpu.state.segments[SS] = ss;
    cpu.enter_code(cs, rip);
    cpu.set_stack_pointer(rsp.wrapping_add(op.imm));
    cpu.drop_inner_segments(rpl);
    Flow::Branch
}

/// IRET; `aux` is the operand size.
pub(crate) fn iret(cpu: &mut Vcpu, op: &Op) -> Flow {
    // NMIs stay blocked until the IRET has completed; an exit on the way says so.
    cpu.unblocking_nmi = cpu.state.interruptibility.contains(Interruptibility::NMI);
    let result = if cpu.real_segments() {
        cpu.iret_real(op)
    } else {
        cpu.iret_protected(op)
    };
    attempt!(result);
    cpu.unblocking_nmi = false;
    cpu.state.interruptibility.remove(Interruptibility::NMI);
    cpu.request_own();
    Flow::Branch
}

/// INT n (`imm`), INT3, INTO and INT1; `aux` is the [`InterruptionType`].
pub(crate) fn int(cpu: &mut Vcpu, op: &Op) -> Flow {
    let kind = match op.aux {
        4 => InterruptionType::SoftwareInterrupt,
        5 => InterruptionType::PrivilegedSoftwareException,
        _ => InterruptionType::SoftwareException,
    };
    let vector = op.imm as u8;
    if vector == Exception::Overflow.vector()
        && kind == InterruptionType::SoftwareException
        && cpu.state.flags.status() & Rflags::OF.bits() == 0
    {
        return cpu.end_block(op);
    }
    if kind == InterruptionType::SoftwareInterrupt {
        attempt!(cpu.check_software_interrupt(vector));
    }
    let event = Event {
        vector,
        kind,
        error_code: None,
        length: op.len.into(),
    };
    cpu.stop_with(Cause::Software(event));
    Flow::Stop
}

/// SYSCALL. From compatibility mode it goes where CSTAR says, as AMD's processors have it; with
/// CSTAR clear it is #UD there, as on Intel's.
pub(crate) fn syscall(cpu: &mut Vcpu, op: &Op) -> Flow {
    let target = if cpu.long64 {
        cpu.state.msrs.lstar
    } else {
        cpu.state.msrs.cstar
    };
    let available = cpu.long64 || cpu.long_mode && target != 0;
    if !cpu.state.efer.contains(Efer::SCE) || !available {
        cpu.undefined();
        return Flow::Stop;
    }
    let msrs = cpu.state.msrs;
    let next = cpu.next_rip(op);
    cpu.state.set_gpr(Gpr::Rcx, next);
    let flags = cpu.state.rflags() & !Rflags::RF.bits();
    cpu.state.set_gpr(Gpr::R11, flags);
    cpu.state.set_rflags(flags & !msrs.fmask);
    let selector = (msrs.star >> 32) as u16 & !3;
    cpu.state.segments[SS] = flat(selector.wrapping_add(8), false, 0, false);
    cpu.enter_code(flat(selector, true, 0, true), target);
    cpu.request_own_for_flags(flags);
    cpu.step_by_new_flags();
    Flow::Branch
}

/// SYSRET; `aux` is 8 for a return to 64-bit code.
pub(crate) fn sysret(cpu: &mut Vcpu, op: &Op) -> Flow {
    if !cpu.state.efer.contains(Efer::SCE) || !cpu.long64 {
        cpu.undefined();
        return Flow::Stop;
    }
    attempt!(cpu.require_cpl0());
    let long = op.aux == 8;
    let rip = cpu.state.gpr(Gpr::Rcx);
    if long && !cpu.is_canonical(rip) {
        cpu.general_protection();
        return Flow::Stop;
    }
    let star = (cpu.state.msrs.star >> 48) as u16;
    let flags = cpu.state.gpr(Gpr::R11) & 0x3c_7fd7;
    let selector = if long { star.wrapping_add(16) } else { star } | 3;
    cpu.state.segments[SS] = flat(star.wrapping_add(8) | 3, false, 3, false);
    let rip = if long { rip } else { rip & 0xffff_ffff };
    cpu.enter_code(flat(selector, true, 3, long), rip);
    cpu.change_rflags(flags);
    cpu.step_by_new_flags();
    Flow::Branch
}

/// SYSENTER.
pub(crate) fn sysenter(cpu: &mut Vcpu, _op: &Op) -> Flow {
    let msrs = cpu.state.msrs;
    if !cpu.state.cr0.contains(Cr0::PE) || msrs.sysenter_cs & 0xfffc == 0 {
        cpu.general_protection();
        return Flow::Stop;
    }
    let long = cpu.long_mode;
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    let selector = msrs.sysenter_cs as u16 & !3;
    cpu.clear_flags(Rflags::VM | Rflags::IF | Rflags::RF);
    cpu.state.segments[SS] = flat(selector.wrapping_add(8), false, 0, false);
    cpu.state.set_gpr(Gpr::Rsp, msrs.sysenter_esp & mask);
    cpu.enter_code(flat(selector, true, 0, long), msrs.sysenter_eip & mask);
    Flow::Branch
}

/// SYSEXIT; `aux` is 8 for a return to 64-bit code.
pub(crate) fn sysexit(cpu: &mut Vcpu, op: &Op) -> Flow {
    let msrs = cpu.state.msrs;
    if !cpu.state.cr0.contains(Cr0::PE) || cpu.cpl() != 0 || msrs.sysenter_cs & 0xfffc == 0 {
        cpu.general_protection();
        return Flow::Stop;
    }
    let long = op.aux == 8;
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    let (rip, rsp) = (
        cpu.state.gpr(Gpr::Rdx) & mask,
        cpu.state.gpr(Gpr::Rcx) & mask,
    );
    if long && !(cpu.is_canonical(rip) && cpu.is_canonical(rsp)) {
        cpu.general_protection();
        return Flow::Stop;
    }
    let offset = if long { 32 } else { 16 };
    let selector = (msrs.sysenter_cs as u16).wrapping_add(offset) | 3;
    cpu.state.segments[SS] = flat(selector.wrapping_add(8), false, 3, false);
    cpu.state.set_gpr(Gpr::Rsp, rsp);
    cpu.enter_code(flat(selector, true, 3, long), rip);
    Flow::Branch
}

impl Vcpu {
    /// After RFLAGS lost bits: only TF, set before, needs the loop's attention.
    /// SYSCALL and SYSRET single-step by the trap flag that they leave, not by the one before them.
    fn step_by_new_flags(&mut self) {
        self.has_stepped = true;
        if self.state.rflags_rest & Rflags::TF.bits() != 0 {
            self.state.pending_debug |= Dr6::BS.bits();
            self.request_own();
        }
    }

    fn request_own_for_flags(&self, before: u64) {
        if before & (Rflags::TF | Rflags::RF).bits() != 0 {
            self.request_own();
        }
    }
}

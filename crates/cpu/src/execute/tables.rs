//! Descriptor-table and segment instructions.

use super::attempt;
use crate::memory::Int;
use crate::op::{Flow, Op, Stop, flag};
use crate::vcpu::{Cause, Vcpu};
use arch::control_registers::{Cr4, Rflags};
use arch::controls::{Interruptibility, PrimaryControls, SecondaryControls};
use arch::exit::{ExitReason, VmExit};
use arch::segment::{AccessRights, DescriptorTable, SegmentName};

impl Vcpu {
    /// #GP(0) above CPL 0.
    pub(crate) fn require_cpl0(&mut self) -> Result<(), Stop> {
        if self.cpl() == 0 || self.real_mode() {
            Ok(())
        } else {
            Err(self.general_protection())
        }
    }

    /// #GP(0) for SGDT, SIDT, SLDT, STR and SMSW above CPL 0 with UMIP.
    pub(crate) fn check_umip(&mut self) -> Result<(), Stop> {
        if self.state.cr4.contains(Cr4::UMIP) && self.cpl() != 0 {
            return Err(self.general_protection());
        }
        Ok(())
    }

    /// Whether a secondary control is in force.
    pub(crate) fn secondary(&self, control: SecondaryControls) -> bool {
        let controls = self.controls();
        controls.primary.contains(PrimaryControls::SECONDARY)
            && controls.secondary.contains(control)
    }

    /// Instruction information of a memory or register operand: scaling, address size, segment,
    /// index, base (SDM volume 3, "Information for VM Exits Due to Instruction Execution").
    pub(crate) fn operand_info(&self, op: &Op) -> u32 {
        use crate::state::slot;
        if op.flags & flag::MEMORY == 0 {
            return 1 << 10 | u32::from(op.dst / 8) << 3;
        }
        let address_size = if op.flags & flag::ADDRESS_16 != 0 {
            0
        } else if op.flags & flag::ADDRESS_32 != 0 || !self.long64 {
            1
        } else {
            2
        };
        let register = |slot_number: u8, field: u32, invalid: u32| {
            if usize::from(slot_number) < slot::ZERO {
                u32::from(slot_number) << field
            } else {
                1 << invalid
            }
        };
        u32::from(op.scale)
            | address_size << 7
            | u32::from(op.segment.min(5)) << 15
            | register(op.index, 18, 22)
            | register(op.base, 23, 27)
    }

    fn table_exit(&mut self, op: &Op, reason: ExitReason, identity: u32) -> Stop {
        let mut exit = VmExit::new(reason);
        exit.instruction_length = op.len.into();
        exit.qualification = op.disp as i64 as u64;
        exit.instruction_info = self.operand_info(op) | identity << 28;
        self.stop_with(Cause::Exit(exit))
    }
}

/// SGDT (`aux` 0), SIDT (1), LGDT (2), LIDT (3); `aux2` is the operand size.
pub(crate) fn descriptor_table(cpu: &mut Vcpu, op: &Op) -> Flow {
    let load = op.aux >= 2;
    if load {
        attempt!(cpu.require_cpl0());
    } else {
        attempt!(cpu.check_umip());
    }
    if cpu.secondary(SecondaryControls::DESCRIPTOR_TABLE_EXITING) {
        cpu.table_exit(op, ExitReason::GdtrIdtrAccess, op.aux.into());
        return Flow::Stop;
    }
    let size = if cpu.long64 { 10 } else { 6 };
    if load {
        let mut bytes = [0; 10];
        attempt!(cpu.read_operand_bytes(op, 0, &mut bytes[..size]));
        let limit = u16::from_le_bytes([bytes[0], bytes[1]]);
        let mut base = [0; 8];
        base[..size - 2].copy_from_slice(&bytes[2..size]);
        let mut base = u64::from_le_bytes(base);
        if op.aux2 == 2 {
            base &= 0xff_ffff;
        }
        if cpu.long64 && !cpu.is_canonical(base) {
            cpu.general_protection();
            return Flow::Stop;
        }
        let table = DescriptorTable { base, limit };
        if op.aux == 2 {
            cpu.state.gdtr = table;
        } else {
            cpu.state.idtr = table;
        }
        return Flow::Next;
    }
    let table = if op.aux == 0 {
        cpu.state.gdtr
    } else {
        cpu.state.idtr
    };
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let address = attempt!(cpu.address(op, size as u64, true));
    cpu.write_bytes(address, op.segment, &bytes[..size]).into()
}

/// LLDT (`aux` 2) and LTR (3).
pub(crate) fn load_system_segment(cpu: &mut Vcpu, op: &Op) -> Flow {
    if cpu.real_segments() {
        cpu.undefined();
        return Flow::Stop;
    }
    attempt!(cpu.require_cpl0());
    if cpu.secondary(SecondaryControls::DESCRIPTOR_TABLE_EXITING) {
        cpu.table_exit(op, ExitReason::LdtrTrAccess, op.aux.into());
        return Flow::Stop;
    }
    let selector = attempt!(cpu.load_rm::<u16>(op));
    let loaded = if op.aux == 2 {
        cpu.load_ldtr(selector)
    } else {
        cpu.load_tr(selector)
    };
    loaded.into()
}

/// SLDT (`aux` 0) and STR (1) to memory or a register of type `T`.
pub(crate) fn store_system_segment<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    if cpu.real_segments() {
        cpu.undefined();
        return Flow::Stop;
    }
    attempt!(cpu.check_umip());
    if cpu.secondary(SecondaryControls::DESCRIPTOR_TABLE_EXITING) {
        cpu.table_exit(op, ExitReason::LdtrTrAccess, op.aux.into());
        return Flow::Stop;
    }
    let selector = if op.aux == 0 {
        cpu.state.ldtr.selector
    } else {
        cpu.state.tr.selector
    };
    cpu.store_rm(op, T::truncate(selector.into())).into()
}

/// MOV to segment register `aux`.
pub(crate) fn mov_to_segment(cpu: &mut Vcpu, op: &Op) -> Flow {
    let selector = attempt!(cpu.load_rm::<u16>(op));
    let name = SegmentName::ALL[op.aux as usize];
    attempt!(cpu.load_segment(name, selector));
    if name == SegmentName::Ss {
        cpu.state.interruptibility.insert(Interruptibility::MOV_SS);
        cpu.request_own();
        cpu.update_mode();
    }
    cpu.end_block(op)
}

/// MOV from segment register `aux`, to a register of type `T`.
pub(crate) fn mov_from_segment<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let selector = cpu.state.segments[op.aux as usize].selector;
    cpu.set_reg(op.dst, T::truncate(selector.into()));
    Flow::Next
}

/// MOV from segment register `aux` to memory.
pub(crate) fn store_segment(cpu: &mut Vcpu, op: &Op) -> Flow {
    let selector = cpu.state.segments[op.aux as usize].selector;
    cpu.store(op, selector).into()
}

/// VERR (`aux` 0) and VERW (1).
pub(crate) fn verify(cpu: &mut Vcpu, op: &Op) -> Flow {
    if cpu.real_segments() {
        cpu.undefined();
        return Flow::Stop;
    }
    let selector = attempt!(cpu.load_rm::<u16>(op));
    let ok = match attempt!(cpu.visible_descriptor(selector)) {
        Some(d) if !d.is_system() && cpu.may_examine(&d, selector) => {
            let access = d.access();
            let code = access.has(AccessRights::CODE);
            let rw = access.has(AccessRights::RW);
            if op.aux == 0 {
                !code || rw
            } else {
                !code && rw
            }
        }
        _ => false,
    };
    super::data::set_zero_flag(cpu, ok);
    Flow::Next
}

/// LAR (`aux` 0) and LSL (1) into a register of type `T`; the selector is the source operand.
pub(crate) fn load_rights<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    if cpu.real_segments() {
        cpu.undefined();
        return Flow::Stop;
    }
    let selector = attempt!(cpu.load_rm_src::<u16>(op));
    let descriptor = attempt!(cpu.visible_descriptor(selector));
    let long = cpu.long_mode;
    let valid = |kind: u32| match (op.aux, long) {
        (0, false) => matches!(kind, 1..=5 | 9 | 11 | 12),
        (0, true) => matches!(kind, 2 | 9 | 11 | 12),
        (_, false) => matches!(kind, 1..=3 | 9 | 11),
        (_, true) => matches!(kind, 2 | 9 | 11),
    };
    match descriptor {
        Some(d)
            if (!d.is_system() || valid(d.access().kind())) && cpu.may_examine(&d, selector) =>
        {
            let value = if op.aux == 0 {
                d.low >> 32 & 0x00ff_ff00
            } else {
                d.segment(selector).limit.into()
            };
            cpu.set_reg(op.dst, T::truncate(value));
            super::data::set_zero_flag(cpu, true);
        }
        _ => super::data::set_zero_flag(cpu, false),
    }
    Flow::Next
}

/// ARPL.
pub(crate) fn arpl(cpu: &mut Vcpu, op: &Op) -> Flow {
    if cpu.real_segments() {
        cpu.undefined();
        return Flow::Stop;
    }
    let source = cpu.reg::<u16>(op.src) & 3;
    let target = attempt!(cpu.load_rm::<u16>(op));
    let adjust = target & 3 < source;
    if adjust {
        attempt!(cpu.store_rm(op, target & !3 | source));
    }
    super::data::set_zero_flag(cpu, adjust);
    Flow::Next
}

/// CLI (`aux` 0) and STI (1).
pub(crate) fn interrupt_flag(cpu: &mut Vcpu, op: &Op) -> Flow {
    if cpu.masks_virtually() {
        return cpu.set_virtual_flag(op.aux == 1).into();
    }
    let flags = Rflags::from_bits_retain(cpu.state.rflags_rest);
    if !cpu.real_mode() && cpu.cpl() > flags.iopl() {
        cpu.general_protection();
        return Flow::Stop;
    }
    if op.aux == 0 {
        cpu.state.rflags_rest &= !Rflags::IF.bits();
        return Flow::Next;
    }
    if !flags.contains(Rflags::IF) {
        cpu.state.rflags_rest |= Rflags::IF.bits();
        cpu.state.interruptibility.insert(Interruptibility::STI);
        cpu.request_own();
    }
    cpu.end_block(op)
}

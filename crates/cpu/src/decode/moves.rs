//! Handlers for moves, exchanges, extensions, and what conditions choose.

use super::Context;
use super::general::{Choice, by_condition, by_size, last, next, reg_rm, rm};
use crate::execute::{control_registers, data, tables};
use crate::op::{Op, flag};
use iced_x86::{Code, Mnemonic, OpKind, Register};

pub(super) fn moves(c: &Context<'_>, op: &mut Op) -> Choice {
    let i = c.instruction;
    match i.mnemonic() {
        Mnemonic::Mov => mov(c, op),
        Mnemonic::Movzx => {
            let to = reg_rm(c, op, 1);
            next(match (c.operand_size(1), to) {
                (1, 2) => data::movzx::<u8, u16>,
                (1, 4) => data::movzx::<u8, u32>,
                (1, _) => data::movzx::<u8, u64>,
                (_, 2) => data::movzx::<u16, u16>,
                (_, 4) => data::movzx::<u16, u32>,
                _ => data::movzx::<u16, u64>,
            })
        }
        Mnemonic::Movsx | Mnemonic::Movsxd => {
            let to = reg_rm(c, op, 1);
            next(match (c.operand_size(1), to) {
                (1, 2) => data::movsx::<u8, u16>,
                (1, 4) => data::movsx::<u8, u32>,
                (1, _) => data::movsx::<u8, u64>,
                (2, 2) => data::movsx::<u16, u16>,
                (2, 4) => data::movsx::<u16, u32>,
                (2, _) => data::movsx::<u16, u64>,
                (_, 2) => data::movsx::<u32, u16>,
                (_, 4) => data::movsx::<u32, u32>,
                _ => data::movsx::<u32, u64>,
            })
        }
        Mnemonic::Movbe => {
            if c.is_memory(0) {
                op.src = c.offset(1);
                return next(by_size!(c.operand_size(1), data::movbe_store));
            }
            op.dst = c.offset(0);
            next(by_size!(c.operand_size(0), data::movbe_load))
        }
        Mnemonic::Lea => {
            op.dst = c.offset(0);
            next(by_size!(c.operand_size(0), data::lea))
        }
        Mnemonic::Xchg => {
            let size = c.operand_size(0);
            if c.is_memory(0) {
                op.src = c.offset(1);
                op.flags |= flag::LOCK;
                return next(by_size!(size, data::xchg_mem));
            }
            (op.dst, op.src) = (c.offset(0), c.offset(1));
            next(by_size!(size, data::xchg_reg))
        }
        Mnemonic::Bswap => {
            op.dst = c.offset(0);
            next(by_size!(c.operand_size(0), data::bswap))
        }
        Mnemonic::Cbw => next(data::extend_rax::<u8, u16>),
        Mnemonic::Cwde => next(data::extend_rax::<u16, u32>),
        Mnemonic::Cdqe => next(data::extend_rax::<u32, u64>),
        Mnemonic::Cwd => next(data::extend_rdx::<u16>),
        Mnemonic::Cdq => next(data::extend_rdx::<u32>),
        Mnemonic::Cqo => next(data::extend_rdx::<u64>),
        Mnemonic::Xlatb => {
            let size = match i.op_kind(0) {
                _ if i.memory_base() == Register::BX => 2,
                _ if i.memory_base() == Register::EBX => 4,
                _ => 8,
            };
            op.segment = super::segment_index(i.memory_segment());
            op.base = 3;
            op.index = crate::state::slot::ZERO as u8;
            op.disp = 0;
            c.set_address_size(op, size);
            next(data::xlat)
        }
        Mnemonic::Lahf => next(data::lahf),
        Mnemonic::Sahf => next(data::sahf),
        Mnemonic::Clc | Mnemonic::Stc | Mnemonic::Cmc | Mnemonic::Salc => {
            op.aux = match i.mnemonic() {
                Mnemonic::Clc => 0,
                Mnemonic::Stc => 1,
                Mnemonic::Cmc => 2,
                _ => 3,
            };
            next(data::carry)
        }
        Mnemonic::Cld | Mnemonic::Std => {
            op.aux = u8::from(i.mnemonic() == Mnemonic::Std);
            next(data::direction)
        }
        _ => {
            let condition = condition(c.instruction)?;
            let name = i.mnemonic();
            if is_cmov(name) {
                let size = reg_rm(c, op, 1);
                return next(match size {
                    2 => by_condition!(condition, data::cmov, u16),
                    4 => by_condition!(condition, data::cmov, u32),
                    _ => by_condition!(condition, data::cmov, u64),
                });
            }
            if is_set(name) {
                rm(c, op, 0);
                return next(by_condition!(condition, data::setcc));
            }
            None
        }
    }
}

/// The condition of Jcc, SETcc and CMOVcc, in their opcodes' encoding.
pub(super) fn condition(instruction: &iced_x86::Instruction) -> Option<u8> {
    use iced_x86::ConditionCode as Cc;
    Some(match instruction.condition_code() {
        Cc::None => return None,
        Cc::o => 0,
        Cc::no => 1,
        Cc::b => 2,
        Cc::ae => 3,
        Cc::e => 4,
        Cc::ne => 5,
        Cc::be => 6,
        Cc::a => 7,
        Cc::s => 8,
        Cc::ns => 9,
        Cc::p => 10,
        Cc::np => 11,
        Cc::l => 12,
        Cc::ge => 13,
        Cc::le => 14,
        Cc::g => 15,
    })
}

fn is_cmov(m: Mnemonic) -> bool {
    matches!(
        m,
        Mnemonic::Cmovo
            | Mnemonic::Cmovno
            | Mnemonic::Cmovb
            | Mnemonic::Cmovae
            | Mnemonic::Cmove
            | Mnemonic::Cmovne
            | Mnemonic::Cmovbe
            | Mnemonic::Cmova
            | Mnemonic::Cmovs
            | Mnemonic::Cmovns
            | Mnemonic::Cmovp
            | Mnemonic::Cmovnp
            | Mnemonic::Cmovl
            | Mnemonic::Cmovge
            | Mnemonic::Cmovle
            | Mnemonic::Cmovg
    )
}

fn is_set(m: Mnemonic) -> bool {
    matches!(
        m,
        Mnemonic::Seto
            | Mnemonic::Setno
            | Mnemonic::Setb
            | Mnemonic::Setae
            | Mnemonic::Sete
            | Mnemonic::Setne
            | Mnemonic::Setbe
            | Mnemonic::Seta
            | Mnemonic::Sets
            | Mnemonic::Setns
            | Mnemonic::Setp
            | Mnemonic::Setnp
            | Mnemonic::Setl
            | Mnemonic::Setge
            | Mnemonic::Setle
            | Mnemonic::Setg
    )
}

fn mov(c: &Context<'_>, op: &mut Op) -> Choice {
    let i = c.instruction;
    let class = |n: u32| c.is_register(n).then(|| i.op_register(n));
    if let Some(register) = class(0) {
        if register.is_segment_register() {
            if c.is_register(1) {
                op.dst = c.offset(1);
            }
            op.aux = super::segment_index(register);
            return if register == Register::CS {
                None
            } else {
                last(tables::mov_to_segment)
            };
        }
        if register.is_cr() {
            op.dst = c.offset(1);
            op.aux = register.number() as u8;
            return last(control_registers::mov_to_cr);
        }
        if register.is_dr() {
            op.dst = c.offset(1);
            op.aux = register.number() as u8;
            return last(control_registers::mov_dr);
        }
    }
    if let Some(register) = class(1) {
        if register.is_segment_register() {
            op.aux = super::segment_index(register);
            if c.is_memory(0) {
                return next(tables::store_segment);
            }
            op.dst = c.offset(0);
            return next(by_size!(c.operand_size(0), tables::mov_from_segment));
        }
        if register.is_cr() {
            op.dst = c.offset(0);
            op.aux = register.number() as u8;
            return next(control_registers::mov_from_cr);
        }
        if register.is_dr() {
            op.dst = c.offset(0);
            (op.aux, op.aux2) = (register.number() as u8, 1);
            return last(control_registers::mov_dr);
        }
    }
    let size = c.operand_size(0);
    let far = c.long() && i.memory_displ_size() == 8 && i.memory_base() == Register::None;
    next(match (c.is_memory(0), i.op_kind(1)) {
        (true, OpKind::Register) if far && absolute(c) => {
            op.imm = i.memory_displacement64();
            by_size!(size, data::store_absolute)
        }
        (false, OpKind::Memory) if far && absolute(c) => {
            op.imm = i.memory_displacement64();
            by_size!(size, data::load_absolute)
        }
        (false, OpKind::Register) => {
            (op.dst, op.src) = (c.offset(0), c.offset(1));
            by_size!(size, data::mov_reg_reg)
        }
        (false, OpKind::Memory) => {
            op.dst = c.offset(0);
            by_size!(size, data::mov_reg_mem)
        }
        (true, OpKind::Register) => {
            op.src = c.offset(1);
            by_size!(size, data::mov_mem_reg)
        }
        (false, _) => {
            op.dst = c.offset(0);
            op.imm = i.immediate(1);
            by_size!(size, data::mov_reg_imm)
        }
        (true, _) => {
            op.imm = i.immediate(1);
            by_size!(size, data::mov_mem_imm)
        }
    })
}

/// Whether this is MOV between the accumulator and a 64-bit absolute address.
fn absolute(c: &Context<'_>) -> bool {
    matches!(
        c.instruction.code(),
        Code::Mov_AL_moffs8
            | Code::Mov_AX_moffs16
            | Code::Mov_EAX_moffs32
            | Code::Mov_RAX_moffs64
            | Code::Mov_moffs8_AL
            | Code::Mov_moffs16_AX
            | Code::Mov_moffs32_EAX
            | Code::Mov_moffs64_RAX
    )
}

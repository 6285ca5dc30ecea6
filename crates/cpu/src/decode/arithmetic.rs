//! Handlers for arithmetic, logic, shifts and bit instructions.

use super::Context;
use super::general::{Choice, by_size, next, reg_rm, rm};
use crate::execute::alu::{self, Adc, Add, And, Cmp, Dec, Inc, Neg, Not, Or, Sbb, Sub, Test, Xor};
use crate::execute::bit::{self, action};
use crate::execute::shift::{self, Rcl, Rcr, Rol, Ror, Sar, Shl, Shr};
use crate::execute::{data, multiply};
use crate::op::Op;
use iced_x86::{Mnemonic, OpKind};

fn binary<B: alu::Binary>(c: &Context<'_>, op: &mut Op) -> Choice {
    let i = c.instruction;
    let size = c.operand_size(0);
    let handler = match (c.is_memory(0), i.op_kind(1)) {
        (false, OpKind::Register) => {
            (op.dst, op.src) = (c.offset(0), c.offset(1));
            by_size!(size, alu::reg_reg<B>)
        }
        (false, OpKind::Memory) => {
            op.dst = c.offset(0);
            by_size!(size, alu::reg_mem<B>)
        }
        (true, OpKind::Register) => {
            op.src = c.offset(1);
            by_size!(size, alu::mem_reg<B>)
        }
        (false, _) => {
            op.dst = c.offset(0);
            op.imm = i.immediate(1);
            by_size!(size, alu::reg_imm<B>)
        }
        (true, _) => {
            op.imm = i.immediate(1);
            by_size!(size, alu::mem_imm<B>)
        }
    };
    next(handler)
}

fn unary<U: alu::Unary>(c: &Context<'_>, op: &mut Op) -> Choice {
    let size = c.operand_size(0);
    if c.is_memory(0) {
        return next(by_size!(size, alu::unary_mem<U>));
    }
    op.dst = c.offset(0);
    next(by_size!(size, alu::unary_reg<U>))
}
fn shifts<S: shift::Shift>(c: &Context<'_>, op: &mut Op) -> Choice {
    let size = rm(c, op, 0);
    if c.is_register(1) {
        return next(by_size!(size, shift::by_cl<S>));
    }
    op.imm = c.instruction.immediate(1);
    next(by_size!(size, shift::by_imm<S>))
}

pub(super) fn arithmetic(c: &Context<'_>, op: &mut Op) -> Choice {
    let i = c.instruction;
    match i.mnemonic() {
        Mnemonic::Add => binary::<Add>(c, op),
        Mnemonic::Adc => binary::<Adc>(c, op),
        Mnemonic::Sub => binary::<Sub>(c, op),
        Mnemonic::Sbb => binary::<Sbb>(c, op),
        Mnemonic::Cmp => binary::<Cmp>(c, op),
        Mnemonic::And => binary::<And>(c, op),
        Mnemonic::Or => binary::<Or>(c, op),
        Mnemonic::Xor => binary::<Xor>(c, op),
        Mnemonic::Test => binary::<Test>(c, op),
        Mnemonic::Inc => unary::<Inc>(c, op),
        Mnemonic::Dec => unary::<Dec>(c, op),
        Mnemonic::Neg => unary::<Neg>(c, op),
        Mnemonic::Not => unary::<Not>(c, op),
        Mnemonic::Shl | Mnemonic::Sal => shifts::<Shl>(c, op),
        Mnemonic::Shr => shifts::<Shr>(c, op),
        Mnemonic::Sar => shifts::<Sar>(c, op),
        Mnemonic::Rol => shifts::<Rol>(c, op),
        Mnemonic::Ror => shifts::<Ror>(c, op),
        Mnemonic::Rcl => shifts::<Rcl>(c, op),
        Mnemonic::Rcr => shifts::<Rcr>(c, op),
        Mnemonic::Shld | Mnemonic::Shrd => {
            op.aux = u8::from(i.mnemonic() == Mnemonic::Shrd);
            let size = rm(c, op, 0);
            op.src = c.offset(1);
            if c.is_register(2) {
                return next(by_size!(size, shift::double_cl));
            }
            op.imm = i.immediate(2);
            next(by_size!(size, shift::double_imm))
        }
        Mnemonic::Mul => {
            let size = rm(c, op, 0);
            next(by_size!(size, multiply::mul))
        }
        Mnemonic::Imul => imul(c, op),
        Mnemonic::Div => {
            let size = rm(c, op, 0);
            next(by_size!(size, multiply::div))
        }
        Mnemonic::Idiv => {
            let size = rm(c, op, 0);
            next(by_size!(size, multiply::idiv))
        }
        Mnemonic::Xadd => {
            let size = rm(c, op, 0);
            op.src = c.offset(1);
            next(by_size!(size, alu::xadd))
        }
        Mnemonic::Cmpxchg => {
            let size = rm(c, op, 0);
            op.src = c.offset(1);
            next(by_size!(size, alu::cmpxchg))
        }
        Mnemonic::Cmpxchg8b => next(data::cmpxchg8b),
        Mnemonic::Cmpxchg16b => next(data::cmpxchg16b),
        Mnemonic::Daa | Mnemonic::Das => {
            op.aux = u8::from(i.mnemonic() == Mnemonic::Das);
            next(multiply::decimal_adjust)
        }
        Mnemonic::Aaa | Mnemonic::Aas => {
            op.aux = u8::from(i.mnemonic() == Mnemonic::Aas);
            next(multiply::ascii_adjust)
        }
        Mnemonic::Aam => {
            op.imm = i.immediate(0);
            next(multiply::aam)
        }
        Mnemonic::Aad => {
            op.imm = i.immediate(0);
            next(multiply::aad)
        }
        _ => None,
    }
}

fn imul(c: &Context<'_>, op: &mut Op) -> Choice {
    match c.instruction.op_count() {
        1 => {
            let size = rm(c, op, 0);
            next(by_size!(size, multiply::imul1))
        }
        2 => {
            let size = reg_rm(c, op, 1);
            next(by_size!(size, multiply::imul2))
        }
        _ => {
            let size = reg_rm(c, op, 1);
            op.imm = c.instruction.immediate(2);
            next(by_size!(size, multiply::imul3))
        }
    }
}
pub(super) fn bits(c: &Context<'_>, op: &mut Op) -> Choice {
    let i = c.instruction;
    match i.mnemonic() {
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc => {
            op.aux = match i.mnemonic() {
                Mnemonic::Bt => action::TEST,
                Mnemonic::Bts => action::SET,
                Mnemonic::Btr => action::RESET,
                _ => action::COMPLEMENT,
            };
            let size = rm(c, op, 0);
            if c.is_register(1) {
                op.src = c.offset(1);
                return next(by_size!(size, bit::test_reg));
            }
            op.imm = i.immediate(1);
            next(by_size!(size, bit::test_imm))
        }
        Mnemonic::Bsf | Mnemonic::Bsr => {
            op.aux = u8::from(i.mnemonic() == Mnemonic::Bsr);
            let size = reg_rm(c, op, 1);
            next(by_size!(size, bit::scan))
        }
        Mnemonic::Tzcnt | Mnemonic::Lzcnt => {
            op.aux = u8::from(i.mnemonic() == Mnemonic::Lzcnt);
            let size = reg_rm(c, op, 1);
            next(by_size!(size, bit::count_zeros))
        }
        Mnemonic::Popcnt => {
            let size = reg_rm(c, op, 1);
            next(by_size!(size, bit::popcnt))
        }
        Mnemonic::Andn => {
            let size = reg_rm(c, op, 2);
            op.aux2 = c.offset(1);
            next(by_size!(size, bit::andn))
        }
        Mnemonic::Blsi | Mnemonic::Blsmsk | Mnemonic::Blsr => {
            op.aux = match i.mnemonic() {
                Mnemonic::Blsi => 0,
                Mnemonic::Blsmsk => 1,
                _ => 2,
            };
            let size = reg_rm(c, op, 1);
            next(by_size!(size, bit::lowest_bit))
        }
        Mnemonic::Bextr => {
            let size = reg_rm(c, op, 1);
            op.aux2 = c.offset(2);
            next(by_size!(size, bit::bextr))
        }
        Mnemonic::Bzhi => {
            let size = reg_rm(c, op, 1);
            op.aux2 = c.offset(2);
            next(by_size!(size, bit::bzhi))
        }
        Mnemonic::Pdep | Mnemonic::Pext => {
            op.aux = u8::from(i.mnemonic() == Mnemonic::Pext);
            let size = reg_rm(c, op, 2);
            op.aux2 = c.offset(1);
            next(by_size!(size, bit::deposit_extract))
        }
        Mnemonic::Mulx => {
            let size = reg_rm(c, op, 2);
            op.aux2 = c.offset(1);
            next(by_size!(size, multiply::mulx))
        }
        Mnemonic::Sarx | Mnemonic::Shlx | Mnemonic::Shrx => {
            op.aux = match i.mnemonic() {
                Mnemonic::Sarx => 0,
                Mnemonic::Shlx => 1,
                _ => 2,
            };
            let size = reg_rm(c, op, 1);
            op.aux2 = c.offset(2);
            next(by_size!(size, shift::shift_without_flags))
        }
        Mnemonic::Rorx => {
            let size = reg_rm(c, op, 1);
            op.imm = i.immediate(2);
            next(by_size!(size, shift::rorx))
        }
        Mnemonic::Adcx | Mnemonic::Adox => {
            op.aux = u8::from(i.mnemonic() == Mnemonic::Adox);
            let size = reg_rm(c, op, 1);
            next(by_size!(size, alu::adx))
        }
        Mnemonic::Crc32 => {
            reg_rm(c, op, 1);
            next(by_size!(c.operand_size(1), bit::crc32))
        }
        _ => None,
    }
}

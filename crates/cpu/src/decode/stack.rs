//! Handlers for stack and string instructions.

use super::Context;
use super::general::{Choice, by_size, is_immediate, last, next, rm};
use crate::execute::{io, stack, string};
use crate::op::Op;
use iced_x86::{Code, Mnemonic, OpKind};

/// The operand size of a stack instruction, from its code's name for sizes.
fn stack_size(c: &Context<'_>) -> u8 {
    let bytes = c.instruction.stack_pointer_increment().unsigned_abs();
    bytes as u8
}

fn string_operands(c: &Context<'_>, op: &mut Op) {
    let i = c.instruction;
    let mut size = 8;
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => size = 2,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => size = 4,
            _ => {}
        }
    }
    op.aux2 = size;
    op.segment = super::segment_index(i.memory_segment());
}

pub(super) fn stack_and_strings(c: &Context<'_>, op: &mut Op) -> Choice {
    let i = c.instruction;
    let m = i.mnemonic();
    // Some string mnemonics are also those of SIMD moves: told apart by the operands.
    let string_kind = i.op_count() > 0
        && (0..i.op_count()).any(|n| {
            matches!(
                i.op_kind(n),
                OpKind::MemorySegSI
                    | OpKind::MemorySegESI
                    | OpKind::MemorySegRSI
                    | OpKind::MemorySegDI
                    | OpKind::MemorySegEDI
                    | OpKind::MemorySegRDI
                    | OpKind::MemoryESDI
                    | OpKind::MemoryESEDI
                    | OpKind::MemoryESRDI
            )
        });
    if string_kind {
        string_operands(c, op);
        let size = i.memory_size().size();
        return match m {
            Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => {
                next(by_size!(size, string::movs))
            }
            Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => {
                next(by_size!(size, string::stos))
            }
            Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => {
                next(by_size!(size, string::lods))
            }
            Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq => {
                next(by_size!(size, string::cmps))
            }
            Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => {
                next(by_size!(size, string::scas))
            }
            Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => {
                (op.aux, op.src) = (size as u8, 1);
                last(io::string_io)
            }
            Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => {
                (op.aux, op.src) = (size as u8, 0);
                last(io::string_io)
            }
            // MASKMOVQ and its kin belong to the vector family.
            _ => None,
        };
    }
    match m {
        Mnemonic::Push => push(c, op),
        Mnemonic::Pop => pop(c, op),
        Mnemonic::Pusha | Mnemonic::Pushad => {
            op.aux = stack_size(c) / 8;
            next(stack::pusha)
        }
        Mnemonic::Popa | Mnemonic::Popad => {
            op.aux = stack_size(c) / 8;
            next(stack::popa)
        }
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => {
            op.aux = stack_size(c);
            next(stack::pushf)
        }
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => {
            op.aux = stack_size(c);
            last(stack::popf)
        }
        Mnemonic::Enter => {
            op.imm = u64::from(i.immediate16());
            op.aux2 = i.immediate8_2nd();
            op.aux = match i.code() {
                Code::Enterw_imm16_imm8 => 2,
                Code::Enterd_imm16_imm8 => 4,
                _ => 8,
            };
            next(stack::enter)
        }
        Mnemonic::Leave => match i.code() {
            Code::Leaveq => next(stack::leave64),
            Code::Leaved => {
                op.aux = 4;
                next(stack::leave)
            }
            _ => {
                op.aux = 2;
                next(stack::leave)
            }
        },
        Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lss => {
            op.aux2 = match m {
                Mnemonic::Les => 0,
                Mnemonic::Lss => 2,
                Mnemonic::Lds => 3,
                Mnemonic::Lfs => 4,
                _ => 5,
            };
            op.dst = c.offset(0);
            last(by_size!(c.operand_size(0), stack::load_far_pointer))
        }
        Mnemonic::Stac | Mnemonic::Clac => {
            op.aux = u8::from(m == Mnemonic::Stac);
            next(stack::set_ac)
        }
        _ => None,
    }
}

fn push(c: &Context<'_>, op: &mut Op) -> Choice {
    let i = c.instruction;
    let size = stack_size(c);
    if c.is_register(0) && i.op_register(0).is_segment_register() {
        op.src = super::segment_index(i.op_register(0));
        op.aux = size;
        return next(stack::push_segment);
    }
    if is_immediate(i.op_kind(0)) {
        op.imm = i.immediate(0);
        if c.long() && size == 8 {
            return next(stack::push_imm);
        }
        op.aux = 1;
        return next(by_size!(size, stack::push_any));
    }
    rm(c, op, 0);
    if c.long() && size == 8 && c.is_register(0) {
        return next(stack::push_reg);
    }
    next(by_size!(size, stack::push_any))
}

fn pop(c: &Context<'_>, op: &mut Op) -> Choice {
    let i = c.instruction;
    let size = stack_size(c);
    if c.is_register(0) && i.op_register(0).is_segment_register() {
        op.dst = super::segment_index(i.op_register(0));
        op.aux = size;
        return last(stack::pop_segment);
    }
    rm(c, op, 0);
    if c.long() && size == 8 && c.is_register(0) {
        return next(stack::pop_reg);
    }
    next(by_size!(size, stack::pop_any))
}

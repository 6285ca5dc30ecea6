//! What the families of handlers share, and the order in which they are asked.

use super::{Context, Ends, arithmetic, moves, stack, system, transfers};
use crate::execute::data;
use crate::op::{Handler, Op};
use iced_x86::{Mnemonic, OpKind};

/// The handler and whether it ends the block; `None` for another family's instruction.
pub(super) type Choice = Option<(Handler, Ends)>;

/// A handler monomorphised for an operand size in bytes.
macro_rules! by_size {
    ($size:expr, $($path:ident)::+ $(<$($generic:ty),+>)?) => {
        match $size {
            1 => $($path)::+::<$($($generic,)+)? u8> as crate::op::Handler,
            2 => $($path)::+::<$($($generic,)+)? u16> as crate::op::Handler,
            4 => $($path)::+::<$($($generic,)+)? u32> as crate::op::Handler,
            _ => $($path)::+::<$($($generic,)+)? u64> as crate::op::Handler,
        }
    };
}

/// A handler monomorphised for a condition.
macro_rules! by_condition {
    ($condition:expr, $($path:ident)::+ $(, $generic:ty)?) => {
        match $condition & 15 {
            0 => $($path)::+::<0 $(, $generic)?> as crate::op::Handler,
            1 => $($path)::+::<1 $(, $generic)?> as crate::op::Handler,
            2 => $($path)::+::<2 $(, $generic)?> as crate::op::Handler,
            3 => $($path)::+::<3 $(, $generic)?> as crate::op::Handler,
            4 => $($path)::+::<4 $(, $generic)?> as crate::op::Handler,
            5 => $($path)::+::<5 $(, $generic)?> as crate::op::Handler,
            6 => $($path)::+::<6 $(, $generic)?> as crate::op::Handler,
            7 => $($path)::+::<7 $(, $generic)?> as crate::op::Handler,
            8 => $($path)::+::<8 $(, $generic)?> as crate::op::Handler,
            9 => $($path)::+::<9 $(, $generic)?> as crate::op::Handler,
            10 => $($path)::+::<10 $(, $generic)?> as crate::op::Handler,
            11 => $($path)::+::<11 $(, $generic)?> as crate::op::Handler,
            12 => $($path)::+::<12 $(, $generic)?> as crate::op::Handler,
            13 => $($path)::+::<13 $(, $generic)?> as crate::op::Handler,
            14 => $($path)::+::<14 $(, $generic)?> as crate::op::Handler,
            _ => $($path)::+::<15 $(, $generic)?> as crate::op::Handler,
        }
    };
}

pub(super) use {by_condition, by_size};

pub(super) fn next(handler: Handler) -> Choice {
    Some((handler, Ends::No))
}

pub(super) fn last(handler: Handler) -> Choice {
    Some((handler, Ends::Yes))
}

/// Chooses the handler and fills in the operands; `None` for instructions of other families.
pub(super) fn select(c: &Context<'_>, op: &mut Op) -> Choice {
    arithmetic::arithmetic(c, op)
        .or_else(|| moves::moves(c, op))
        .or_else(|| arithmetic::bits(c, op))
        .or_else(|| stack::stack_and_strings(c, op))
        .or_else(|| transfers::transfers(c, op))
        .or_else(|| system::system(c, op))
        .or_else(|| misc(c, op))
}

pub(super) fn is_immediate(kind: OpKind) -> bool {
    !matches!(kind, OpKind::Register | OpKind::Memory)
}
/// Puts a register r/m operand (operand `n`) into `dst`.
pub(super) fn rm(c: &Context<'_>, op: &mut Op, n: u32) -> usize {
    if c.is_register(n) {
        op.dst = c.offset(n);
    }
    c.operand_size(n)
}

/// Puts the destination register (operand 0) into `dst` and a register r/m source (operand `n`)
/// into `src`; the size of the destination.
pub(super) fn reg_rm(c: &Context<'_>, op: &mut Op, n: u32) -> usize {
    op.dst = c.offset(0);
    if c.is_register(n) {
        op.src = c.offset(n);
    }
    c.operand_size(0)
}

fn misc(c: &Context<'_>, op: &mut Op) -> Choice {
    let _ = op;
    match c.instruction.mnemonic() {
        Mnemonic::Nop | Mnemonic::Reservednop => next(data::nop),
        Mnemonic::Lfence | Mnemonic::Mfence | Mnemonic::Sfence => next(data::fence),
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => next(data::flush_line),
        _ => None,
    }
}

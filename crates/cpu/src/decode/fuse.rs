//! Pairs of instructions that execute as one: a comparison or count, and the Jcc behind it.

use super::operand_size_of;
use crate::code::CodeMode;
use crate::execute::alu::shape::{MemImm, RegImm, RegMem, RegReg, UnaryReg};
use crate::execute::alu::{Add, And, Cmp, Dec, Inc, Sub, Test};
use crate::execute::control::{Step, step_jcc};
use crate::op::Handler;
use iced_x86::{Instruction, Mnemonic, OpKind};

/// The handler that executes `first` and the Jcc `second` behind it, if there is one.
pub(super) fn with_jcc(
    first: &Instruction,
    second: &Instruction,
    mode: CodeMode,
) -> Option<Handler> {
    if mode != CodeMode::Bits64 || !second.is_jcc_short_or_near() || first.has_lock_prefix() {
        return None;
    }
    let condition = super::moves::condition(second)?;
    match first.mnemonic() {
        Mnemonic::Cmp => shaped::<Cmp>(first, condition),
        Mnemonic::Test => shaped::<Test>(first, condition),
        Mnemonic::Sub => register::<Sub>(first, condition),
        Mnemonic::Add => register::<Add>(first, condition),
        Mnemonic::And => register::<And>(first, condition),
        Mnemonic::Dec => unary::<Dec>(first, condition),
        Mnemonic::Inc => unary::<Inc>(first, condition),
        _ => None,
    }
}

fn kinds(i: &Instruction) -> (OpKind, OpKind) {
    (i.op_kind(0), i.op_kind(1))
}

/// Comparisons: with registers, immediates and memory.
fn shaped<B: crate::execute::alu::Binary>(i: &Instruction, condition: u8) -> Option<Handler> {
    let size = operand_size_of(i, 0);
    match (kinds(i), size) {
        ((OpKind::Register, OpKind::Memory), 4) => Some(branch::<RegMem<B, u32>>(condition)),
        ((OpKind::Register, OpKind::Memory), 8) => Some(branch::<RegMem<B, u64>>(condition)),
        ((OpKind::Register, OpKind::Memory), _) | ((OpKind::Memory, OpKind::Register), _) => None,
        ((OpKind::Memory, _), 1) => Some(branch::<MemImm<B, u8>>(condition)),
        ((OpKind::Memory, _), 4) => Some(branch::<MemImm<B, u32>>(condition)),
        ((OpKind::Memory, _), 8) => Some(branch::<MemImm<B, u64>>(condition)),
        ((OpKind::Register, OpKind::Register), 1) => Some(branch::<RegReg<B, u8>>(condition)),
        ((OpKind::Register, _), 1) => Some(branch::<RegImm<B, u8>>(condition)),
        _ => register::<B>(i, condition),
    }
}

/// Register and immediate forms of 32 and 64 bits.
fn register<B: crate::execute::alu::Binary>(i: &Instruction, condition: u8) -> Option<Handler> {
    let size = operand_size_of(i, 0);
    match (kinds(i), size) {
        ((OpKind::Register, OpKind::Memory), _) | ((OpKind::Memory, _), _) => None,
        ((OpKind::Register, OpKind::Register), 4) => Some(branch::<RegReg<B, u32>>(condition)),
        ((OpKind::Register, OpKind::Register), 8) => Some(branch::<RegReg<B, u64>>(condition)),
        ((OpKind::Register, OpKind::Register), _) => None,
        ((OpKind::Register, _), 4) => Some(branch::<RegImm<B, u32>>(condition)),
        ((OpKind::Register, _), 8) => Some(branch::<RegImm<B, u64>>(condition)),
        _ => None,
    }
}

fn unary<U: crate::execute::alu::Unary>(i: &Instruction, condition: u8) -> Option<Handler> {
    match (i.op_kind(0), operand_size_of(i, 0)) {
        (OpKind::Register, 4) => Some(branch::<UnaryReg<U, u32>>(condition)),
        (OpKind::Register, 8) => Some(branch::<UnaryReg<U, u64>>(condition)),
        _ => None,
    }
}

fn branch<S: Step>(condition: u8) -> Handler {
    super::general::by_condition!(condition, step_jcc, S)
}

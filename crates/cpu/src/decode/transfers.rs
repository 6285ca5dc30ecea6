//! Handlers for transfers of control.

use super::Context;
use super::general::{Choice, by_condition, is_immediate, last, next, rm};
use super::moves::condition;
use crate::execute::{control, transfer};
use crate::op::Op;
use iced_x86::{Code, Mnemonic, OpKind};

fn near_target(c: &Context<'_>, op: &mut Op) -> u8 {
    let i = c.instruction;
    op.imm = i.near_branch_target();
    match i.op_kind(0) {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        _ => 8,
    }
}

pub(super) fn transfers(c: &Context<'_>, op: &mut Op) -> Choice {
    let i = c.instruction;
    let long = c.long();
    if i.is_jcc_short_or_near() {
        op.aux = near_target(c, op);
        let condition = condition(c.instruction)?;
        return last(if long {
            by_condition!(condition, control::jcc)
        } else {
            by_condition!(condition, control::jcc_legacy)
        });
    }
    match i.mnemonic() {
        Mnemonic::Jmp | Mnemonic::Call => {
            let call = i.mnemonic() == Mnemonic::Call;
            if matches!(i.op_kind(0), OpKind::FarBranch16 | OpKind::FarBranch32) {
                let (offset, size) = if i.op_kind(0) == OpKind::FarBranch16 {
                    (u64::from(i.far_branch16()), 2)
                } else {
                    (u64::from(i.far_branch32()), 4)
                };
                op.imm = offset << 16 | u64::from(i.far_branch_selector());
                op.aux = size;
                return last(if call {
                    transfer::call_far
                } else {
                    transfer::jmp_far
                });
            }
            if i.is_jmp_far_indirect() || i.is_call_far_indirect() {
                op.aux = i.memory_size().size() as u8 - 2;
                return last(if call {
                    transfer::call_far
                } else {
                    transfer::jmp_far
                });
            }
            if is_immediate(i.op_kind(0)) {
                op.aux = near_target(c, op);
                return last(match (long, call) {
                    (true, false) => control::jmp,
                    (true, true) => control::call,
                    (false, false) => control::jmp_legacy,
                    (false, true) => control::call_legacy,
                });
            }
            let size = rm(c, op, 0);
            last(match (long, call, size) {
                (true, false, _) => control::jmp_indirect,
                (true, true, _) => control::call_indirect,
                (false, false, 2) => control::jmp_indirect_legacy::<u16>,
                (false, false, _) => control::jmp_indirect_legacy::<u32>,
                (false, true, 2) => control::call_indirect_legacy::<u16>,
                (false, true, _) => control::call_indirect_legacy::<u32>,
            })
        }
        Mnemonic::Ret => {
            if i.op_count() > 0 {
                op.imm = u64::from(i.immediate16());
            }
            if long {
                return last(control::ret);
            }
            op.aux = match i.code() {
                Code::Retnw | Code::Retnw_imm16 => 2,
                _ => 4,
            };
            last(control::ret_legacy)
        }
        Mnemonic::Retf => {
            if i.op_count() > 0 {
                op.imm = u64::from(i.immediate16());
            }
            op.aux = match i.code() {
                Code::Retfw | Code::Retfw_imm16 => 2,
                Code::Retfd | Code::Retfd_imm16 => 4,
                _ => 8,
            };
            last(transfer::ret_far)
        }
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => {
            op.aux = match i.code() {
                Code::Iretw => 2,
                Code::Iretd => 4,
                _ => 8,
            };
            last(transfer::iret)
        }
        Mnemonic::Loop
        | Mnemonic::Loope
        | Mnemonic::Loopne
        | Mnemonic::Jcxz
        | Mnemonic::Jecxz
        | Mnemonic::Jrcxz => {
            op.aux = near_target(c, op);
            (op.src, op.aux2) = loop_operands(c);
            last(control::loops)
        }
        Mnemonic::Int | Mnemonic::Int3 | Mnemonic::Into | Mnemonic::Int1 => {
            (op.imm, op.aux) = match i.mnemonic() {
                Mnemonic::Int => (u64::from(i.immediate8()), 4),
                Mnemonic::Int3 => (3, 6),
                Mnemonic::Into => (4, 6),
                _ => (1, 5),
            };
            last(transfer::int)
        }
        Mnemonic::Syscall => last(transfer::syscall),
        Mnemonic::Sysret | Mnemonic::Sysretq => {
            op.aux = if i.code() == Code::Sysretq { 8 } else { 4 };
            last(transfer::sysret)
        }
        Mnemonic::Sysenter => last(transfer::sysenter),
        Mnemonic::Sysexit | Mnemonic::Sysexitq => {
            op.aux = if i.code() == Code::Sysexitq { 8 } else { 4 };
            last(transfer::sysexit)
        }
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => last(control::undefined),
        Mnemonic::Bound => {
            op.dst = c.offset(0);
            next(if c.operand_size(0) == 2 {
                control::bound::<u16>
            } else {
                control::bound::<u32>
            })
        }
        _ => None,
    }
}

/// The kind (see [`control::loops`]) and the counter's size.
fn loop_operands(c: &Context<'_>) -> (u8, u8) {
    let kind = match c.instruction.mnemonic() {
        Mnemonic::Loop => 0,
        Mnemonic::Loope => 1,
        Mnemonic::Loopne => 2,
        _ => 3,
    };
    use Code::*;
    let size = match c.instruction.code() {
        Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX
        | Loopne_rel8_16_CX | Loopne_rel8_32_CX | Jcxz_rel8_16 | Jcxz_rel8_32 => 2,
        Loop_rel8_16_ECX | Loop_rel8_32_ECX | Loop_rel8_64_ECX | Loope_rel8_16_ECX
        | Loope_rel8_32_ECX | Loope_rel8_64_ECX | Loopne_rel8_16_ECX | Loopne_rel8_32_ECX
        | Loopne_rel8_64_ECX | Jecxz_rel8_16 | Jecxz_rel8_32 | Jecxz_rel8_64 => 4,
        _ => 8,
    };
    (kind, size)
}

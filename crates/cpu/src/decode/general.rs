//! Handlers for general-purpose and system instructions.

use super::{Context, Ends};
use crate::execute::alu::{self, Adc, Add, And, Cmp, Dec, Inc, Neg, Not, Or, Sbb, Sub, Test, Xor};
use crate::execute::bit::{self, action};
use crate::execute::shift::{self, Rcl, Rcr, Rol, Ror, Sar, Shl, Shr};
use crate::execute::{control, data, io, multiply, privileged, stack, string, tables, transfer};
use crate::op::{Handler, Op, flag};
use arch::exit::ExitReason;
use iced_x86::{Code, Mnemonic, OpKind, Register};

type Choice = Option<(Handler, Ends)>;

/// A handler monomorphised for an operand size in bytes.
macro_rules! by_size {
    ($size:expr, $($path:ident)::+ $(<$($generic:ty),+>)?) => {
        match $size {
            1 => $($path)::+::<$($($generic,)+)? u8> as Handler,
            2 => $($path)::+::<$($($generic,)+)? u16> as Handler,
            4 => $($path)::+::<$($($generic,)+)? u32> as Handler,
            _ => $($path)::+::<$($($generic,)+)? u64> as Handler,
        }
    };
}

/// A handler monomorphised for a condition.
macro_rules! by_condition {
    ($condition:expr, $($path:ident)::+ $(, $generic:ty)?) => {
        match $condition & 15 {
            0 => $($path)::+::<0 $(, $generic)?> as Handler,
            1 => $($path)::+::<1 $(, $generic)?> as Handler,
            2 => $($path)::+::<2 $(, $generic)?> as Handler,
            3 => $($path)::+::<3 $(, $generic)?> as Handler,
            4 => $($path)::+::<4 $(, $generic)?> as Handler,
            5 => $($path)::+::<5 $(, $generic)?> as Handler,
            6 => $($path)::+::<6 $(, $generic)?> as Handler,
            7 => $($path)::+::<7 $(, $generic)?> as Handler,
            8 => $($path)::+::<8 $(, $generic)?> as Handler,
            9 => $($path)::+::<9 $(, $generic)?> as Handler,
            10 => $($path)::+::<10 $(, $generic)?> as Handler,
            11 => $($path)::+::<11 $(, $generic)?> as Handler,
            12 => $($path)::+::<12 $(, $generic)?> as Handler,
            13 => $($path)::+::<13 $(, $generic)?> as Handler,
            14 => $($path)::+::<14 $(, $generic)?> as Handler,
            _ => $($path)::+::<15 $(, $generic)?> as Handler,
        }
    };
}

pub(super) use by_condition;

fn next(handler: Handler) -> Choice {
    Some((handler, Ends::No))
}

fn last(handler: Handler) -> Choice {
    Some((handler, Ends::Yes))
}

/// Chooses the handler and fills in the operands; `None` for instructions of other families.
pub(super) fn select(c: &Context<'_>, op: &mut Op) -> Choice {
    arithmetic(c, op)
        .or_else(|| moves(c, op))
        .or_else(|| bits(c, op))
        .or_else(|| stack_and_strings(c, op))
        .or_else(|| transfers(c, op))
        .or_else(|| system(c, op))
        .or_else(|| misc(c, op))
}

fn is_immediate(kind: OpKind) -> bool {
    !matches!(kind, OpKind::Register | OpKind::Memory)
}

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

/// Puts a register r/m operand (operand `n`) into `dst`.
fn rm(c: &Context<'_>, op: &mut Op, n: u32) -> usize {
    if c.is_register(n) {
        op.dst = c.offset(n);
    }
    c.operand_size(n)
}

/// Puts the destination register (operand 0) into `dst` and a register r/m source (operand `n`)
/// into `src`; the size of the destination.
fn reg_rm(c: &Context<'_>, op: &mut Op, n: u32) -> usize {
    op.dst = c.offset(0);
    if c.is_register(n) {
        op.src = c.offset(n);
    }
    c.operand_size(0)
}

fn shifts<S: shift::Shift>(c: &Context<'_>, op: &mut Op) -> Choice {
    let size = rm(c, op, 0);
    if c.is_register(1) {
        return next(by_size!(size, shift::by_cl<S>));
    }
    op.imm = c.instruction.immediate(1);
    next(by_size!(size, shift::by_imm<S>))
}

fn arithmetic(c: &Context<'_>, op: &mut Op) -> Choice {
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

fn moves(c: &Context<'_>, op: &mut Op) -> Choice {
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
            return last(privileged::mov_to_cr);
        }
        if register.is_dr() {
            op.dst = c.offset(1);
            op.aux = register.number() as u8;
            return last(privileged::mov_dr);
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
            return next(privileged::mov_from_cr);
        }
        if register.is_dr() {
            op.dst = c.offset(0);
            (op.aux, op.aux2) = (register.number() as u8, 1);
            return last(privileged::mov_dr);
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

fn bits(c: &Context<'_>, op: &mut Op) -> Choice {
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

fn stack_and_strings(c: &Context<'_>, op: &mut Op) -> Choice {
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

fn near_target(c: &Context<'_>, op: &mut Op) -> u8 {
    let i = c.instruction;
    op.imm = i.near_branch_target();
    match i.op_kind(0) {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        _ => 8,
    }
}

fn transfers(c: &Context<'_>, op: &mut Op) -> Choice {
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

fn system(c: &Context<'_>, op: &mut Op) -> Choice {
    let i = c.instruction;
    let m = i.mnemonic();
    match m {
        Mnemonic::Cli | Mnemonic::Sti => {
            op.aux = u8::from(m == Mnemonic::Sti);
            if op.aux == 1 {
                last(tables::interrupt_flag)
            } else {
                next(tables::interrupt_flag)
            }
        }
        Mnemonic::Hlt => last(privileged::hlt),
        Mnemonic::Clts => last(privileged::clts),
        Mnemonic::Lmsw => {
            rm(c, op, 0);
            last(privileged::lmsw)
        }
        Mnemonic::Smsw => {
            let size = rm(c, op, 0);
            next(by_size!(size, privileged::smsw))
        }
        Mnemonic::Sgdt | Mnemonic::Sidt | Mnemonic::Lgdt | Mnemonic::Lidt => {
            op.aux = match m {
                Mnemonic::Sgdt => 0,
                Mnemonic::Sidt => 1,
                Mnemonic::Lgdt => 2,
                _ => 3,
            };
            op.aux2 = match i.code() {
                Code::Lgdt_m1632_16
                | Code::Lidt_m1632_16
                | Code::Sgdt_m1632_16
                | Code::Sidt_m1632_16 => 2,
                _ => 4,
            };
            next(tables::descriptor_table)
        }
        Mnemonic::Lldt | Mnemonic::Ltr => {
            rm(c, op, 0);
            op.aux = if m == Mnemonic::Lldt { 2 } else { 3 };
            last(tables::load_system_segment)
        }
        Mnemonic::Sldt | Mnemonic::Str => {
            let size = if c.is_memory(0) { 2 } else { rm(c, op, 0) };
            op.aux = u8::from(m == Mnemonic::Str);
            next(by_size!(size, tables::store_system_segment))
        }
        Mnemonic::Verr | Mnemonic::Verw => {
            rm(c, op, 0);
            op.aux = u8::from(m == Mnemonic::Verw);
            next(tables::verify)
        }
        Mnemonic::Lar | Mnemonic::Lsl => {
            let size = reg_rm(c, op, 1);
            op.aux = u8::from(m == Mnemonic::Lsl);
            next(by_size!(size, tables::load_rights))
        }
        Mnemonic::Arpl => {
            rm(c, op, 0);
            op.src = c.offset(1);
            next(tables::arpl)
        }
        Mnemonic::Rdmsr => next(privileged::rdmsr),
        Mnemonic::Wrmsr => last(privileged::wrmsr),
        Mnemonic::Rdtsc => next(privileged::rdtsc),
        Mnemonic::Rdtscp => {
            op.aux = 1;
            next(privileged::rdtsc)
        }
        Mnemonic::Rdpid => {
            op.dst = c.offset(0);
            next(privileged::rdpid)
        }
        Mnemonic::Rdpmc => next(privileged::rdpmc),
        Mnemonic::Cpuid => last(privileged::cpuid),
        Mnemonic::Invlpg => last(privileged::invlpg),
        Mnemonic::Invpcid => {
            op.dst = c.offset(0);
            last(privileged::invpcid)
        }
        Mnemonic::Swapgs => next(privileged::swapgs),
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase | Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
            op.dst = c.offset(0);
            op.aux = if matches!(m, Mnemonic::Rdfsbase | Mnemonic::Wrfsbase) {
                4
            } else {
                5
            };
            op.aux2 = u8::from(matches!(m, Mnemonic::Wrfsbase | Mnemonic::Wrgsbase));
            next(by_size!(c.operand_size(0), privileged::segment_base))
        }
        Mnemonic::Pause => {
            // With REX.B the opcode is XCHG of R8, prefix or not.
            let rex = c.bytes[c.bytes.len().saturating_sub(2)];
            if c.long() && rex & 0xf1 == 0x41 {
                (op.dst, op.src) = (0, 64);
                let narrow = c.bytes.contains(&0x66);
                return next(match (rex & 8 != 0, narrow) {
                    (true, _) => data::xchg_reg::<u64>,
                    (false, true) => data::xchg_reg::<u16>,
                    (false, false) => data::xchg_reg::<u32>,
                });
            }
            next(privileged::pause)
        }
        Mnemonic::Monitor | Mnemonic::Mwait => {
            op.aux = u8::from(m == Mnemonic::Mwait);
            next(privileged::monitor)
        }
        Mnemonic::Invd => last(privileged::cache),
        Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => {
            op.aux = 1;
            next(privileged::cache)
        }
        Mnemonic::Xgetbv => next(privileged::xgetbv),
        Mnemonic::Xsetbv => last(privileged::xsetbv),
        Mnemonic::Rdrand | Mnemonic::Rdseed => {
            op.dst = c.offset(0);
            op.aux = u8::from(m == Mnemonic::Rdseed);
            next(by_size!(c.operand_size(0), privileged::random))
        }
        Mnemonic::Rdpkru | Mnemonic::Wrpkru => {
            op.aux = u8::from(m == Mnemonic::Wrpkru);
            next(privileged::pkru)
        }
        Mnemonic::Clzero => {
            op.aux2 = if i.op_count() > 0 {
                i.op_register(0).size() as u8
            } else {
                8
            };
            next(privileged::clzero)
        }
        Mnemonic::Rsm => last(privileged::rsm),
        Mnemonic::In | Mnemonic::Out => {
            let input = m == Mnemonic::In;
            let (data, port) = if input { (0, 1) } else { (1, 0) };
            op.aux = i.op_register(data).size() as u8;
            op.aux2 = u8::from(input);
            if is_immediate(i.op_kind(port)) {
                op.aux2 |= 2;
                op.imm = i.immediate(port) & 0xff;
            }
            last(io::in_out)
        }
        Mnemonic::Vmcall | Mnemonic::Vmmcall => last(privileged::vmcall),
        _ => vmx(c, op),
    }
}

fn vmx(c: &Context<'_>, op: &mut Op) -> Choice {
    let reason = match c.instruction.mnemonic() {
        Mnemonic::Vmclear => ExitReason::Vmclear,
        Mnemonic::Vmlaunch => ExitReason::Vmlaunch,
        Mnemonic::Vmptrld => ExitReason::Vmptrld,
        Mnemonic::Vmptrst => ExitReason::Vmptrst,
        Mnemonic::Vmread => ExitReason::Vmread,
        Mnemonic::Vmresume => ExitReason::Vmresume,
        Mnemonic::Vmwrite => ExitReason::Vmwrite,
        Mnemonic::Vmxoff => ExitReason::Vmxoff,
        Mnemonic::Vmxon => ExitReason::Vmxon,
        Mnemonic::Invept => ExitReason::Invept,
        Mnemonic::Invvpid => ExitReason::Invvpid,
        _ => return None,
    };
    if c.instruction.op_count() > 0 && c.is_register(0) {
        op.dst = c.offset(0);
    }
    op.aux = reason as u8;
    last(privileged::vmx)
}

fn misc(c: &Context<'_>, op: &mut Op) -> Choice {
    let _ = op;
    match c.instruction.mnemonic() {
        Mnemonic::Nop
        | Mnemonic::Reservednop
        | Mnemonic::Endbr64
        | Mnemonic::Endbr32
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetch
        | Mnemonic::Prefetchwt1
        | Mnemonic::Rdsspd
        | Mnemonic::Rdsspq => next(data::nop),
        Mnemonic::Lfence | Mnemonic::Mfence | Mnemonic::Sfence => next(data::fence),
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => next(data::flush_line),
        _ => None,
    }
}

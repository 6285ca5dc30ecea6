//! From bytes to [`Op`]s.
//!
//! `iced-x86` decodes; this module turns its instructions into the compact form. [`general`] and
//! its siblings choose handlers for general-purpose and system instructions, [`crate::vector`] for
//! x87, MMX, SSE and AVX. What neither knows, or what CPUID does not offer ([`offered`]), raises
//! #UD.

mod arithmetic;
mod fuse;
mod general;
mod moves;
mod offered;
mod stack;
mod system;
mod transfers;

use crate::code::CodeMode;
use crate::execute::control;
use crate::op::{Handler, Op, flag};
use crate::state::slot;
use crate::vector::Stubs;
use arch::cpuid::{Feature, Features};
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use std::cell::Cell;

/// Instructions in a block at the most.
pub(crate) const MAX_INSTRUCTIONS: u32 = 64;

/// A decoded run of instructions.
pub(crate) struct Decoded {
    pub ops: Vec<Op>,
    /// What executes the first instruction alone, where its op executes two.
    pub first: Handler,
    /// Bytes decoded; 0 if the first instruction does not end within what was given.
    pub len: usize,
    pub instructions: u32,
    /// How many of them the last op that executes anything executes.
    pub tail: u32,
    /// Their accesses to memory, an instruction with a repeat prefix making one.
    pub accesses: u32,
}

/// How many times an instruction asks for the translation of a linear address.
fn accesses(instruction: &Instruction) -> u32 {
    let strings = OpKind::MemorySegSI..=OpKind::MemoryESRDI;
    let in_memory = |n: &u32| match instruction.op_kind(*n) {
        OpKind::Memory => instruction.mnemonic() != Mnemonic::Lea,
        kind => strings.contains(&kind),
    };
    let operands = (0..instruction.op_count()).filter(in_memory).count() as u32;
    operands + u32::from(instruction.stack_pointer_increment() != 0)
}

/// What a handler choice says about the block.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ends {
    /// The block goes on.
    No,
    /// The instruction ends the block.
    Yes,
}

/// One instruction being translated.
pub(crate) struct Context<'a> {
    pub instruction: &'a Instruction,
    pub mode: CodeMode,
    /// The instruction's bytes.
    pub bytes: &'a [u8],
    /// Host code for instructions that the host executes.
    pub stubs: &'a Stubs,
}

fn new_op(offset: u64, len: usize, handler: Handler) -> Op {
    Op {
        handler: Cell::new(handler),
        imm: 0,
        disp: 0,
        offset: offset as u16,
        len: len as u8,
        dst: 0,
        src: 0,
        base: slot::ZERO as u8,
        index: slot::ZERO as u8,
        scale: 0,
        segment: 6,
        flags: 0,
        aux: 0,
        aux2: 0,
    }
}

fn decoder<'a>(bytes: &'a [u8], offset: u64, mode: CodeMode, features: &Features) -> Decoder<'a> {
    // A prefix that makes a new instruction of an old one is ignored by processors that do not have
    // the new one, and hints that they do not have are no operations.
    let mut options = DecoderOptions::FORCE_RESERVED_NOP;
    for (feature, ignore) in [
        (Feature::BMI1, DecoderOptions::NO_MPFX_0FBC),
        (Feature::LZCNT, DecoderOptions::NO_MPFX_0FBD),
        (Feature::WBNOINVD, DecoderOptions::NO_WBNOINVD),
    ] {
        if !features.has(feature) {
            options |= ignore;
        }
    }
    // Branch targets and RIP-relative addresses come out relative to the page.
    Decoder::with_ip(mode.bits(), bytes, offset, options)
}

/// Decodes a block from bytes that lie in one page, the first at `offset` in it.
pub(crate) fn block(
    bytes: &[u8],
    offset: u64,
    mode: CodeMode,
    features: &Features,
    stubs: &Stubs,
) -> Decoded {
    let mut decoder = decoder(bytes, offset, mode, features);
    let mut instruction = Instruction::default();
    let mut ops: Vec<Op> = Vec::with_capacity(12);
    let mut first: Handler = control::undefined;
    let mut previous = Instruction::default();
    let (mut len, mut instructions, mut accessed, mut tail) = (0, 0, 0, 1);
    while len < bytes.len() && instructions < MAX_INSTRUCTIONS {
        decoder.decode_out(&mut instruction);
        if decoder.last_error() == DecoderError::NoMoreBytes && bytes.len() - len < 15 {
            break;
        }
        let size = decoder.position() - len;
        let (op, ends) = translate(
            &instruction,
            &bytes[len..len + size],
            offset + len as u64,
            mode,
            features,
            stubs,
        );
        if instructions == 0 {
            first = op.handler.get();
        } else if let Some(fused) = fuse::with_jcc(&previous, &instruction, mode)
            && let Some(last) = ops.last()
        {
            last.handler.set(fused);
            tail = 2;
        }
        previous = instruction;
        ops.push(op);
        accessed += accesses(&instruction);
        instructions += 1;
        len += size;
        if ends == Ends::Yes {
            break;
        }
    }
    // Also behind an instruction that ends the block: its handler may still say "next", for the
    // case in which it changes nothing that the rest of the block relies on.
    if instructions > 0 {
        ops.push(new_op(offset + len as u64, 0, control::fall_through));
    }
    Decoded {
        ops,
        first,
        len,
        instructions,
        tail,
        accesses: accessed,
    }
}

/// An instruction of a block, apart from its neighbours.
pub(crate) struct Unfused {
    pub instruction: Instruction,
    pub op: Op,
    /// It is an instruction, and CPUID offers it.
    pub is_known: bool,
}

/// Decodes the bytes of a whole block again, without fusing instructions.
pub(crate) fn unfused(
    bytes: &[u8],
    offset: u64,
    mode: CodeMode,
    features: &Features,
    stubs: &Stubs,
) -> Vec<Unfused> {
    let mut all: Vec<Unfused> = peek(bytes, offset, mode, features).collect();
    for one in &mut all {
        let at = u64::from(one.op.offset) - offset;
        let bytes = &bytes[at as usize..][..one.op.len.into()];
        let offset = one.op.offset.into();
        (one.op, _) = translate(&one.instruction, bytes, offset, mode, features, stubs);
    }
    all
}

/// Decodes instructions without choosing what executes them.
pub(crate) fn peek<'a>(
    bytes: &'a [u8],
    offset: u64,
    mode: CodeMode,
    features: &'a Features,
) -> impl Iterator<Item = Unfused> + use<'a> {
    let mut decoder = decoder(bytes, offset, mode, features);
    let mut at = 0;
    std::iter::from_fn(move || {
        if at >= bytes.len() {
            return None;
        }
        let instruction = decoder.decode();
        let end = decoder.position();
        let op = new_op(offset + at as u64, end - at, control::undefined);
        at = end;
        let is_known = !instruction.is_invalid() && offered::is_offered(&instruction, features);
        Some(Unfused {
            instruction,
            op,
            is_known,
        })
    })
}

/// Decodes one instruction, whose bytes may reach into the next page.
pub(crate) fn one(
    bytes: &[u8],
    offset: u64,
    mode: CodeMode,
    features: &Features,
    stubs: &Stubs,
) -> Decoded {
    let mut decoder = decoder(bytes, offset, mode, features);
    let instruction = decoder.decode();
    let len = decoder.position().max(1);
    let (op, _) = translate(&instruction, &bytes[..len], offset, mode, features, stubs);
    let rest = new_op(offset + len as u64, 0, control::fall_through);
    Decoded {
        first: op.handler.get(),
        ops: vec![op, rest],
        len,
        instructions: 1,
        tail: 1,
        accesses: accesses(&instruction),
    }
}

fn translate(
    instruction: &Instruction,
    bytes: &[u8],
    offset: u64,
    mode: CodeMode,
    features: &Features,
    stubs: &Stubs,
) -> (Op, Ends) {
    let mut op = new_op(offset, bytes.len(), control::undefined);
    if instruction.is_invalid() {
        if bytes.len() >= 15 {
            op.handler.set(control::too_long);
        }
        return (op, Ends::Yes);
    }
    if !offered::is_offered(instruction, features) {
        return (op, Ends::Yes);
    }
    let context = Context {
        instruction,
        mode,
        bytes,
        stubs,
    };
    context.operands(&mut op);
    if let Some((handler, ends)) = general::select(&context, &mut op) {
        op.handler.set(handler);
        return (op, ends);
    }
    if let Some(handler) = crate::vector::select(&context, &mut op) {
        op.handler.set(handler);
        return (op, Ends::No);
    }
    (op, Ends::Yes)
}

/// The byte offset of a general-purpose register in the register file.
pub(crate) fn register_offset(register: Register) -> u8 {
    match register {
        Register::AH => 1,
        Register::CH => 9,
        Register::DH => 17,
        Register::BH => 25,
        _ => 8 * register.full_register().number() as u8,
    }
}

/// Size in bytes of an instruction's operand `n`.
fn operand_size_of(instruction: &Instruction, n: u32) -> usize {
    match instruction.op_kind(n) {
        OpKind::Register => instruction.op_register(n).size(),
        _ => instruction.memory_size().size(),
    }
}

/// A segment register's index; 6 (base zero, no checks) for none.
pub(crate) fn segment_index(register: Register) -> u8 {
    match register {
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::DS => 3,
        Register::FS => 4,
        Register::GS => 5,
        _ => 6,
    }
}

impl Context<'_> {
    pub(crate) fn long(&self) -> bool {
        self.mode == CodeMode::Bits64
    }

    /// Whether operand `n` is in memory with a ModRM-style address.
    pub(crate) fn is_memory(&self, n: u32) -> bool {
        n < self.instruction.op_count() && self.instruction.op_kind(n) == OpKind::Memory
    }

    /// Whether operand `n` is a register.
    pub(crate) fn is_register(&self, n: u32) -> bool {
        n < self.instruction.op_count() && self.instruction.op_kind(n) == OpKind::Register
    }

    /// Size in bytes of operand `n`.
    pub(crate) fn operand_size(&self, n: u32) -> usize {
        operand_size_of(self.instruction, n)
    }

    /// Byte offset of register operand `n`.
    pub(crate) fn offset(&self, n: u32) -> u8 {
        register_offset(self.instruction.op_register(n))
    }

    /// Address size in bytes.
    pub(crate) fn address_size(&self) -> u8 {
        let i = self.instruction;
        let registers = [i.memory_base(), i.memory_index()];
        for register in registers {
            match register {
                Register::None => {}
                Register::RIP => return 8,
                Register::EIP => return 4,
                // An index of gathers says nothing of the address size.
                _ if !register.is_gpr() => {}
                _ => return register.size() as u8,
            }
        }
        match i.memory_displ_size() {
            8 => 8,
            4 => 4,
            2 => 2,
            _ => match self.mode {
                CodeMode::Bits16 => 2,
                CodeMode::Bits32 => 4,
                CodeMode::Bits64 => 8,
            },
        }
    }

    /// Fills in what every handler may rely on: the memory operand, prefixes, mode.
    fn operands(&self, op: &mut Op) {
        let i = self.instruction;
        if self.long() {
            op.flags |= flag::LONG;
        }
        if i.has_lock_prefix() {
            op.flags |= flag::LOCK;
        }
        if i.has_rep_prefix() {
            op.flags |= flag::REP;
        }
        if i.has_repne_prefix() {
            op.flags |= flag::REPNE;
        }
        if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) {
            op.flags |= flag::MEMORY;
            self.memory(op);
        }
    }

    fn memory(&self, op: &mut Op) {
        let i = self.instruction;
        op.segment = segment_index(i.memory_segment());
        self.set_address_size(op, self.address_size());
        let base = i.memory_base();
        op.base = match base {
            Register::None => slot::ZERO as u8,
            Register::RIP | Register::EIP => slot::PAGE as u8,
            _ => base.full_register().number() as u8,
        };
        if i.memory_index() != Register::None {
            op.index = i.memory_index().full_register().number() as u8;
            op.scale = i.memory_index_scale().trailing_zeros() as u8;
        }
        op.disp = i.memory_displacement64() as i32;
    }

    /// Records the address size in the flags.
    pub(crate) fn set_address_size(&self, op: &mut Op, size: u8) {
        match size {
            2 => op.flags |= flag::ADDRESS_16 | flag::LEGACY,
            4 => op.flags |= flag::ADDRESS_32 | flag::LEGACY,
            _ => {}
        }
        if !self.long() {
            op.flags |= flag::LEGACY;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vcpu::Vcpu;

    fn decode(bytes: &[u8], offset: u64) -> Decoded {
        let stubs = Stubs::new().unwrap();
        block(
            bytes,
            offset,
            CodeMode::Bits64,
            &Vcpu::host_features(),
            &stubs,
        )
    }

    #[test]
    fn a_block_ends_at_a_branch() {
        // inc eax; jmp $; nop
        let decoded = decode(&[0xff, 0xc0, 0xeb, 0xfe, 0x90], 0x10);
        assert_eq!(
            (decoded.len, decoded.instructions, decoded.ops.len()),
            (4, 2, 3)
        );
        assert_eq!(decoded.ops[1].imm, 0x12);
    }

    #[test]
    fn accesses_are_counted_without_being_made() {
        for (bytes, expected) in [
            (&[0x48, 0x8b, 0x03][..], 1), // mov rax, [rbx]
            (&[0x48, 0x8d, 0x03], 0),     // lea rax, [rbx]
            (&[0x50], 1),                 // push rax
            (&[0xff, 0x33], 2),           // push qword [rbx]
            (&[0xf3, 0xa4], 2),           // rep movsb
            (&[0xc3], 1),                 // ret
            (&[0x48, 0x01, 0xd8], 0),     // add rax, rbx
        ] {
            assert_eq!(decode(bytes, 0).accesses, expected, "{bytes:x?}");
        }
    }

    #[test]
    fn an_instruction_cut_by_the_page_end_is_left_out() {
        let decoded = decode(&[0x90, 0xb8, 0x01], 0xffd);
        assert_eq!(
            (decoded.len, decoded.instructions, decoded.ops.len()),
            (1, 1, 2)
        );
        assert_eq!(decode(&[0xb8, 0x01], 0xffe).len, 0);
    }

    #[test]
    fn rip_relative_operands_are_page_relative() {
        // mov rax, [rip - 0x10] at offset 0x100 (7 bytes): page + 0xf7.
        let decoded = decode(&[0x48, 0x8b, 0x05, 0xf0, 0xff, 0xff, 0xff, 0xc3], 0x100);
        let op = &decoded.ops[0];
        assert_eq!((op.base as usize, op.disp), (slot::PAGE, 0xf7));
    }

    #[test]
    fn high_byte_registers_are_byte_offsets() {
        // mov ah, bh
        let decoded = decode(&[0x88, 0xfc, 0xc3], 0);
        assert_eq!((decoded.ops[0].dst, decoded.ops[0].src), (1, 25));
    }
}

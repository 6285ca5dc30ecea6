//! The compact form of a decoded instruction.

use crate::vcpu::Vcpu;
use std::cell::Cell;

/// What an instruction handler tells the loop that called it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Flow {
    /// Go on with the next instruction of the block.
    Next,
    /// RIP is set: the block ends.
    Branch,
    /// The instruction was not executed, since it may be stale: it is looked up anew.
    Stale,
    /// The instruction did not complete; the reason is in [`Vcpu::cause`].
    Stop,
}

/// The error of everything that can cut an instruction short. The reason is in [`Vcpu::cause`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stop;

impl From<Result<(), Stop>> for Flow {
    #[inline(always)]
    fn from(result: Result<(), Stop>) -> Flow {
        match result {
            Ok(()) => Flow::Next,
            Err(Stop) => Flow::Stop,
        }
    }
}

/// Executes one instruction.
pub(crate) type Handler = fn(&mut Vcpu, &Op) -> Flow;

/// One decoded instruction.
///
/// Register operands are byte offsets into the register file, so that AH is RAX's offset plus
/// one. The memory operand's base and index are slots of [`crate::state::slot`].
#[derive(Clone)]
#[repr(C)]
pub(crate) struct Op {
    /// What executes it. A cell, because a store into the running block makes the rest of it
    /// stale ([`crate::code::Block::make_stale`]).
    pub handler: Cell<Handler>,
    /// Immediate, branch target relative to the page ([`crate::state::slot::PAGE`]), or whatever
    /// the handler wants.
    pub imm: u64,
    /// Displacement of the memory operand.
    pub disp: i32,
    /// Offset of the instruction's first byte in its page.
    pub offset: u16,
    /// Length in bytes.
    pub len: u8,
    /// First register operand (byte offset).
    pub dst: u8,
    /// Second register operand (byte offset).
    pub src: u8,
    /// Base register slot of the memory operand.
    pub base: u8,
    /// Index register slot of the memory operand.
    pub index: u8,
    /// log2 of the index scale.
    pub scale: u8,
    /// Segment of the memory operand: an index into the segment bases.
    pub segment: u8,
    /// Bits of [`flag`].
    pub flags: u8,
    /// Handler-specific: operand size in bytes, condition, and the like.
    pub aux: u8,
    /// Handler-specific.
    pub aux2: u8,
}

/// Bits of [`Op::flags`].
pub(crate) mod flag {
    /// Effective addresses take the slow path: segment limits, or truncation to 32 or 16 bits.
    pub(crate) const LEGACY: u8 = 1 << 0;
    /// The address size is 32 bits.
    pub(crate) const ADDRESS_32: u8 = 1 << 1;
    /// The address size is 16 bits.
    pub(crate) const ADDRESS_16: u8 = 1 << 2;
    /// A LOCK prefix, or an implicit lock.
    pub(crate) const LOCK: u8 = 1 << 3;
    /// A REP or REPE prefix.
    pub(crate) const REP: u8 = 1 << 4;
    /// A REPNE prefix.
    pub(crate) const REPNE: u8 = 1 << 5;
    /// The code is 64-bit code.
    pub(crate) const LONG: u8 = 1 << 6;
    /// The r/m operand is in memory (for handlers that serve both forms).
    pub(crate) const MEMORY: u8 = 1 << 7;
}

const _: () = assert!(size_of::<Op>() == 32);

//! Where the guest's status flags are while a block is written.
//!
//! They live in the host's flags as long as nothing in between clobbers these. What does (a TLB
//! lookup, a check) finds one of three cases: nobody can see the flags before they are written
//! again; they can be computed again from registers that still hold what they came from; or they
//! are saved to memory.

use super::asm::{Asm, Mem, R11, cc};
use super::layout;

/// How to compute flags again.
#[derive(Clone, Debug)]
pub(super) struct Recipe {
    /// Code that does it; it may use R11.
    pub code: Vec<u8>,
    /// Guest registers that it reads, as bits.
    pub registers: u32,
}

/// Where the status flags are.
#[derive(Clone, Debug)]
pub(super) enum Flags {
    /// Saved to memory.
    Memory,
    /// In the host's flags; perhaps they can also be computed again.
    Host(Option<Recipe>),
    /// Nowhere, but they can be computed.
    Pending(Recipe),
    /// Nowhere: they are written before anyone can see them.
    Dead,
}

/// Writes the host's flags to memory.
pub(super) fn save(asm: &mut Asm) {
    asm.bytes(&[0x9c]); // PUSHFQ
    asm.rm(false, &[0x8f], 0, layout::EFLAGS); // POP
}

/// Loads the host's flags from memory. Slow: for cold paths.
pub(super) fn restore(asm: &mut Asm) {
    asm.rm(false, &[0xff], 6, layout::EFLAGS); // PUSH
    asm.bytes(&[0x9d]); // POPFQ
}

/// Loads CF from memory, leaving the other flags undefined.
pub(super) fn restore_carry(asm: &mut Asm) {
    asm.rm(false, &[0x0f, 0xba], 4, layout::EFLAGS); // BT
    asm.bytes(&[0]);
}

const CF: u32 = 1 << 0;
const PF: u32 = 1 << 2;
const ZF: u32 = 1 << 6;
const SF: u32 = 1 << 7;
const OF: u32 = 1 << 11;

/// Tests a condition of the flags in memory; the host condition that says whether it holds.
/// Clobbers R11.
pub(super) fn test_saved(asm: &mut Asm, condition: u8) -> u8 {
    let positive = match condition & !1 {
        0 => Some(OF),
        2 => Some(CF),
        4 => Some(ZF),
        6 => Some(CF | ZF),
        8 => Some(SF),
        10 => Some(PF),
        _ => None,
    };
    match positive {
        Some(mask) => asm.test_mem(layout::EFLAGS, mask),
        None => {
            // SF differs from OF: both at SF's place.
            asm.load32(R11, layout::EFLAGS);
            asm.rr(false, &[0xc1], 5, R11); // SHR
            asm.bytes(&[4]);
            let zero = if condition & !1 == 14 { ZF } else { 0 };
            asm.alu_imm(false, 4, R11, SF as i32);
            asm.rm(false, &[0x33], R11, layout::EFLAGS); // XOR
            asm.rr(false, &[0xf7], 0, R11); // TEST
            asm.bytes(&(SF | zero).to_le_bytes());
        }
    }
    if condition & 1 == 0 { cc::NE } else { cc::E }
}

/// Code that computes the flags of `add` (or, with `subtract`, `sub`) again, from the result in
/// `destination` and the other operand. Clobbers R11.
pub(super) fn arithmetic_again(
    wide: bool,
    subtract: bool,
    destination: u8,
    other: Result<u8, i32>,
) -> Vec<u8> {
    let mut asm = Asm::default();
    match (subtract, other) {
        (true, Ok(other)) => {
            let sum = Mem {
                base: destination,
                index: Some((other, 0)),
                disp: 0,
            };
            asm.rm(wide, &[0x8d], R11, sum);
            asm.rr(wide, &[0x3b], R11, other);
        }
        (true, Err(value)) => {
            asm.rm(wide, &[0x8d], R11, Mem::at(destination, value));
            asm.alu_imm(wide, 7, R11, value);
        }
        (false, Ok(other)) => {
            asm.rr(wide, &[0x8b], R11, destination);
            asm.rr(wide, &[0x2b], R11, other);
            asm.rr(wide, &[0x03], R11, other);
        }
        (false, Err(value)) => {
            asm.rr(wide, &[0x8b], R11, destination);
            asm.alu_imm(wide, 5, R11, value);
            asm.alu_imm(wide, 0, R11, value);
        }
    }
    asm.code
}

/// Code that computes the flags of a logical operation again, from its result.
pub(super) fn logic_again(wide: bool, result: u8) -> Vec<u8> {
    let mut asm = Asm::default();
    asm.rr(wide, &[0x85], result, result);
    asm.code
}

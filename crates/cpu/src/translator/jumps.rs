//! Where translated code for a linear address is: the cache that generated code asks at indirect
//! and page-crossing jumps.

use super::asm::{Asm, Mem, R10, R11, cc};
use super::layout;
use crate::code::JumpKey;
use core::mem::offset_of;

/// Entries.
const COUNT: usize = 4096;
/// Bytes of an entry, as a shift.
const ENTRY_SHIFT: u32 = 5;

/// An entry. `repr(C)`: generated code reads it.
#[derive(Clone, Copy)]
#[repr(C)]
struct Entry {
    linear: u64,
    key: JumpKey,
    host: u64,
    page: u64,
}

const _: () = assert!(size_of::<Entry>() == 1 << ENTRY_SHIFT);

/// How control is transferred to what the cache holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transfer {
    Jump,
    /// A call, whose return address is that of the code behind.
    Call,
}

/// Writes a look into the cache for the linear address in R10, and the transfer to what it holds;
/// the jumps taken when it holds nothing, with RIP set and R10 and R11 clobbered.
pub(super) fn look_up(asm: &mut Asm, transfer: Transfer) -> [usize; 2] {
    let field = |offset: usize| Mem::at(R11, offset as i32);
    asm.store(layout::RIP, R10);
    asm.mov(R11, R10);
    asm.shift(5, R11, 12);
    asm.rr(true, &[0x33], R11, R10); // XOR
    asm.rm(true, &[0x33], R11, layout::JUMP_SALT);
    asm.alu_imm(false, 4, R11, COUNT as i32 - 1);
    asm.shift(4, R11, ENTRY_SHIFT as u8);
    asm.rm(true, &[0x03], R11, layout::JUMPS); // ADD
    asm.rm(true, &[0x3b], R10, field(offset_of!(Entry, linear))); // CMP
    let other = asm.jcc(cc::NE);
    asm.load(R10, layout::JUMP_KEY);
    asm.rm(true, &[0x3b], R10, field(offset_of!(Entry, key)));
    let stale = asm.jcc(cc::NE);
    asm.load(R10, field(offset_of!(Entry, page)));
    asm.store(layout::PAGE, R10);
    let operation = match transfer {
        Transfer::Jump => 4,
        Transfer::Call => 2,
    };
    asm.rm(false, &[0xff], operation, field(offset_of!(Entry, host)));
    [other, stale]
}

/// The cache.
pub(super) struct Jumps(Box<[Entry]>);

impl Jumps {
    pub(super) fn new() -> Jumps {
        let none = Entry {
            linear: 0,
            key: JumpKey::NONE,
            host: 0,
            page: 0,
        };
        Jumps(vec![none; COUNT].into())
    }

    pub(super) fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    /// Remembers the code for a linear address, which lies in the page at `page`.
    pub(super) fn insert(&mut self, linear: u64, key: JumpKey, host: u64, page: u64) {
        self.0[(linear ^ linear >> 12 ^ key.salt()) as usize & (COUNT - 1)] = Entry {
            linear,
            key,
            host,
            page,
        };
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        for entry in &mut self.0 {
            entry.key = JumpKey::NONE;
        }
    }
}

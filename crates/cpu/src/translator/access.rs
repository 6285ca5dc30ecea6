//! Guest memory: addresses and the inline TLB lookup.

use super::asm::{Asm, Mem, R10, R11, RAX, cc};
use super::emit::Emitter;
use super::layout;
use crate::fast_tlb::{ENTRY_SHIFT, FastEntry};
use core::mem::offset_of;
use iced_x86::{Instruction, Register};

/// What a lookup is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

impl Access {
    /// The tag and the page of the entry at R11.
    pub(super) fn fields(self) -> (Mem, Mem) {
        let (tag, page) = match self {
            Access::Read => (
                offset_of!(FastEntry, read_tag),
                offset_of!(FastEntry, read_page),
            ),
            Access::Write => (
                offset_of!(FastEntry, write_tag),
                offset_of!(FastEntry, write_page),
            ),
        };
        (Mem::at(R11, tag as i32), Mem::at(R11, page as i32))
    }
}

/// R11: the entry for the linear address in R10. Clobbers the host's flags.
pub(super) fn find_entry(asm: &mut Asm) {
    let shift = 12 - ENTRY_SHIFT as u8;
    if is_x86_feature_detected!("bmi2") {
        asm.bytes(&[0xc4, 0x43, 0xfb, 0xf0, 0xda, shift]); // RORX R11, R10; the mask drops the rest
    } else {
        asm.mov(R11, R10);
        asm.shift(5, R11, shift);
    }
    asm.rm(true, &[0x23], R11, layout::TLB_MASK); // AND
    asm.rm(true, &[0x03], R11, layout::TLB_TABLE); // ADD
}

impl Emitter<'_> {
    /// Puts the linear address of the current instruction's memory operand into R10. Clobbers
    /// R11, leaves flags.
    pub(super) fn address(&mut self, i: &Instruction) {
        let operand = self.effective(i);
        if i.memory_base() == Register::None && operand.index.is_none() {
            self.asm.mov_imm(R10, operand.disp as i64 as u64);
        } else if operand.index.is_some() || operand.disp != 0 {
            self.asm.lea(R10, operand);
        } else if operand.base != R10 {
            self.asm.mov(R10, operand.base);
        }
        let segment = match i.memory_segment() {
            Register::FS => 4,
            Register::GS => 5,
            _ => return,
        };
        // LEA adds without touching flags.
        self.asm.load(R11, layout::segment_base(segment));
        let sum = Mem {
            base: R10,
            index: Some((R11, 0)),
            disp: 0,
        };
        self.asm.lea(R10, sum);
    }

    /// The effective address of a memory operand as an operand of the host's, with registers that
    /// live in memory loaded into R10 and R11.
    pub(super) fn effective(&mut self, i: &Instruction) -> Mem {
        let disp = i.memory_displacement64() as i32;
        let base = match i.memory_base() {
            Register::None => None,
            Register::RIP => {
                self.asm.load(R10, layout::PAGE);
                Some(R10)
            }
            base => Some(self.in_register(base.number(), R10)),
        };
        let index = match i.memory_index() {
            Register::None => None,
            index => {
                let register = self.in_register(index.number(), R11);
                Some((register, i.memory_index_scale().trailing_zeros() as u8))
            }
        };
        match (base, index) {
            (Some(base), index) => Mem { base, index, disp },
            (None, None) => Mem {
                base: RAX,
                index: None,
                disp,
            },
            (None, Some(index)) => {
                self.asm.mov_imm(R10, 0);
                Mem {
                    base: R10,
                    index: Some(index),
                    disp,
                }
            }
        }
    }

    /// Turns the linear address in R10 into a host address, or takes the slow path. Clobbers R11
    /// and the host's flags, for which [`Emitter::clobber_flags`] has prepared.
    pub(super) fn lookup(&mut self, size: u32, access: Access) {
        let miss = self.lookup_code(size, access);
        self.miss_jump(miss);
    }

    /// The code of [`Emitter::lookup`]; the jump taken when the TLB lacks the translation.
    pub(super) fn lookup_code(&mut self, size: u32, access: Access) -> usize {
        let (tag, page) = access.fields();
        let asm = &mut self.asm;
        find_entry(asm);
        asm.rm(true, &[0x2b], R10, tag); // SUB
        asm.alu_imm(true, 7, R10, 4096 - size as i32); // CMP
        let miss = asm.jcc(cc::A);
        asm.rm(true, &[0x03], R10, page); // ADD
        miss
    }
}

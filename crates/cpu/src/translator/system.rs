//! Instructions that kernels execute so often that a call of their handler would be felt.

use super::access::Access;
use super::asm::{Mem, R10, R11, cc};
use super::emit::Emitter;
use super::layout;
use crate::state::{CpuState, Msrs};
use crate::vcpu::Vcpu;
use arch::control_registers::Rflags;
use arch::segment::{Segment, SegmentName};
use core::mem::offset_of;
use iced_x86::{Instruction, Mnemonic as M};

const fn state(offset: usize) -> Mem {
    layout::field(offset_of!(Vcpu, state) + offset)
}

const fn segment(name: SegmentName) -> usize {
    offset_of!(CpuState, segments) + size_of::<Segment>() * name as usize
}

/// The privilege level in a segment's access rights.
const DPL: u32 = 3 << 5;

const RFLAGS_REST: Mem = state(offset_of!(CpuState, rflags_rest));
const SS_ACCESS: Mem = state(segment(SegmentName::Ss) + offset_of!(Segment, access));
const GS_BASE: Mem = state(segment(SegmentName::Gs) + offset_of!(Segment, base));
const KERNEL_GS_BASE: Mem = state(offset_of!(CpuState, msrs) + offset_of!(Msrs, kernel_gs_base));

impl Emitter<'_> {
    /// Takes the slow path outside CPL 0.
    fn require_cpl0(&mut self) {
        self.clobber_flags();
        // CPL is SS.DPL.
        self.asm.test_mem(SS_ACCESS, DPL);
        let other = self.asm.jcc(cc::NE);
        self.slow_jump(other);
    }

    /// CLI.
    pub(super) fn clear_interrupts(&mut self) {
        self.require_cpl0();
        let keep = !(Rflags::IF.bits() as i32);
        self.asm.alu_mem_imm(4, RFLAGS_REST, keep);
        self.done();
    }

    /// SWAPGS.
    pub(super) fn swap_gs(&mut self) {
        self.require_cpl0();
        self.asm.load(R10, GS_BASE);
        self.asm.load(R11, KERNEL_GS_BASE);
        self.asm.store(KERNEL_GS_BASE, R10);
        self.asm.store(GS_BASE, R11);
        let gs = SegmentName::Gs as usize;
        self.asm.store(layout::segment_base(gs), R11);
        self.done();
    }

    /// PUSHFQ.
    pub(super) fn push_flags(&mut self) {
        self.save_flags();
        self.forget_recipes();
        self.stack_slot();
        self.asm.load(R11, layout::EFLAGS);
        self.asm.alu_imm(true, 4, R11, Rflags::STATUS.bits() as i32);
        self.asm.rm(true, &[0x0b], R11, RFLAGS_REST); // OR
        let hidden = (Rflags::VM | Rflags::RF).bits() as i32;
        self.asm.alu_imm(true, 4, R11, !hidden);
        self.may_fault();
        self.asm.store(Mem::at(R10, 0), R11);
        self.move_stack(-8);
        self.done();
    }

    /// BT, BTS, BTR and BTC of memory by a register: the operand that holds the bit is looked up,
    /// and the host's instruction gets an address from which it reaches just that one.
    pub(super) fn bit_string(&mut self) {
        let i = *self.current().instruction();
        let size = i.op_register(1).size() as u32;
        let bit = i.op_register(1).full_register().number();
        let Some(bytes) = self.encode_at_r10(&i) else {
            return self.callout();
        };
        self.clobber_flags();
        self.forget_recipes();
        self.address(&i);
        self.operand_offset(bit, size);
        let sum = |scale| Mem {
            base: R10,
            index: Some((R11, scale)),
            disp: 0,
        };
        let scale = size.trailing_zeros() as u8;
        self.asm.lea(R10, sum(scale));
        let access = if i.mnemonic() == M::Bt {
            Access::Read
        } else {
            Access::Write
        };
        self.lookup(size, access);
        if i.has_lock_prefix() {
            self.check_lock(size);
        }
        self.operand_offset(bit, size);
        self.asm.rr(true, &[0xf7], 3, R11); // NEG
        self.asm.lea(R10, sum(scale));
        let one = self.current();
        self.provide_flags(one.reads_flags, one.keeps_flags);
        if layout::home(bit).is_none() {
            self.asm.load(R11, layout::register(bit));
        }
        self.may_fault();
        self.asm.bytes(&bytes);
        self.wrote_flags(None);
        self.done();
    }

    /// R11: by how many operands the bit offset in a register moves the address.
    fn operand_offset(&mut self, bit: usize, size: u32) {
        let from = self.in_register(bit, R11);
        if size == 8 {
            self.asm.mov(R11, from);
            self.asm.shift(7, R11, 6);
        } else {
            self.asm.rr(true, &[0x63], R11, from); // MOVSXD
            self.asm.shift(7, R11, 5);
        }
    }

    /// The instruction with its memory operand at R10.
    fn encode_at_r10(&mut self, i: &Instruction) -> Option<Vec<u8>> {
        self.rename(i).map(|renamed| renamed.bytes)
    }
}

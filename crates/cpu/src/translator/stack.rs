//! The guest's stack.
//!
//! A third of all accesses go to one page. What the TLB says of that page is kept where a
//! subtraction and a compare reach it; it is forgotten whenever anything but generated code runs,
//! since nothing else can change the TLB.

use super::access::{Access, find_entry};
use super::asm::{Asm, Mem, R10, R11, RSP, cc};
use super::emit::Emitter;
use super::layout;
use iced_x86::{Instruction, Register};

/// An access to the stack that was not to the page in question.
pub(super) struct StackMiss {
    /// The jump that leads here.
    jump: usize,
    /// Where to try again.
    retry: usize,
    /// Where to go on with the host address in R10.
    done: usize,
    size: u32,
    access: Access,
    slow: usize,
}

/// Writes the trampoline that makes the page of an access the page in question: R10 holds the
/// distance from the old page, R11 the size. Returns with the linear address in R10 and the carry
/// flag set if the access cannot be made so.
pub(super) fn refill_code(asm: &mut Asm) {
    let (tag, page) = Access::Write.fields();
    let size = Mem::at(RSP, 0);
    asm.rm(true, &[0x03], R10, layout::STACK_TAG); // ADD
    asm.bytes(&[0x41, 0x53]); // PUSH R11
    find_entry(asm);
    asm.rm(true, &[0x2b], R10, tag); // SUB
    asm.alu_imm(true, 7, R10, 4095); // CMP
    let other = asm.jcc(cc::A);
    asm.rm(true, &[0x01], R10, size); // ADD
    asm.alu_mem_imm(7, size, 4096);
    let crosses = asm.jcc(cc::A);
    for (from, to) in [(tag, layout::STACK_TAG), (page, layout::STACK_PAGE)] {
        asm.rm(false, &[0xff], 6, from); // PUSH
        asm.rm(false, &[0x8f], 0, to); // POP
    }
    for (jumps, carry) in [(&[][..], 0xf8), (&[other, crosses][..], 0xf9)] {
        for jump in jumps {
            asm.bind(*jump);
        }
        asm.rm(true, &[0x03], R10, tag); // ADD
        asm.bytes(&[0x41, 0x5b, carry, 0xc3]); // POP R11; CLC or STC; RET
    }
}

impl Emitter<'_> {
    /// R10: host address of `size` bytes at a distance from the guest's stack pointer.
    pub(super) fn stack_access(&mut self, disp: i32, size: u32, access: Access) {
        let slow = self.slow_index();
        let asm = &mut self.asm;
        if disp == 0 {
            asm.mov(R10, layout::GUEST_RSP);
        } else {
            asm.lea(R10, Mem::at(layout::GUEST_RSP, disp));
        }
        let retry = asm.here();
        asm.rm(true, &[0x2b], R10, layout::STACK_TAG); // SUB
        asm.alu_imm(true, 7, R10, 4096 - size as i32);
        let jump = asm.jcc(cc::A);
        asm.rm(true, &[0x03], R10, layout::STACK_PAGE); // ADD
        let done = asm.here();
        self.stack_misses.push(StackMiss {
            jump,
            retry,
            done,
            size,
            access,
            slow,
        });
    }

    /// Whether a memory operand is at a constant distance from the stack pointer.
    pub(super) fn is_on_stack(i: &Instruction) -> bool {
        i.memory_base() == Register::RSP
            && i.memory_index() == Register::None
            && !matches!(i.memory_segment(), Register::FS | Register::GS)
    }

    /// Writes what accesses to another page of the stack do.
    pub(super) fn miss_stack(&mut self) {
        for miss in std::mem::take(&mut self.stack_misses) {
            self.asm.bind(miss.jump);
            self.asm.mov_imm(R11, miss.size.into());
            self.call_to(self.trampolines.refill_stack);
            let again = self.asm.jcc(cc::AE);
            self.asm.patch(again, miss.retry as i64);
            // Not writable, perhaps, or across two pages.
            let slow = self.lookup_code(miss.size, miss.access);
            self.late_miss_jump(miss.slow, slow);
            let jump = self.asm.jmp();
            self.asm.patch(jump, miss.done as i64);
        }
    }

    /// R10: host address of the eight bytes below the stack pointer.
    pub(super) fn stack_slot(&mut self) {
        self.stack_access(-8, 8, Access::Write);
    }

    /// Adds to the guest's stack pointer, leaving flags.
    pub(super) fn move_stack(&mut self, by: i32) {
        let rsp = layout::GUEST_RSP;
        self.asm.lea(rsp, Mem::at(rsp, by));
    }

    /// PUSH of a register, an immediate or memory.
    pub(super) fn push(&mut self) {
        let i = *self.current().instruction();
        self.clobber_flags();
        self.forget_recipes();
        if self.current().memory.is_some() {
            self.address(&i);
            self.lookup(8, Access::Read);
            self.may_fault();
            self.asm.load(R10, Mem::at(R10, 0));
            self.asm.store(layout::TEMPORARY, R10);
            self.stack_slot();
            self.asm.load(R11, layout::TEMPORARY);
            self.may_fault();
            self.asm.store(Mem::at(R10, 0), R11);
        } else if i.op_register(0) != Register::None {
            self.stack_slot();
            let from = self.in_register(i.op_register(0).full_register().number(), R11);
            self.may_fault();
            self.asm.store(Mem::at(R10, 0), from);
        } else {
            self.stack_slot();
            self.may_fault();
            self.asm.rm(true, &[0xc7], 0, Mem::at(R10, 0)); // MOV
            let value = i.immediate(0) as u32;
            self.asm.bytes(&value.to_le_bytes());
        }
        self.move_stack(-8);
        self.done();
    }

    /// POP of a register.
    pub(super) fn pop(&mut self) {
        let guest = self.current().instruction().op_register(0).number();
        self.clobber_flags();
        self.forget_recipes();
        self.stack_access(0, 8, Access::Read);
        self.may_fault();
        match layout::home(guest) {
            Some(home) => self.asm.load(home, Mem::at(R10, 0)),
            None => {
                self.asm.load(R11, Mem::at(R10, 0));
                self.asm.store(layout::register(guest), R11);
            }
        }
        if guest != Register::RSP.number() {
            self.move_stack(8);
        }
        self.done();
    }

    /// LEAVE.
    pub(super) fn leave_frame(&mut self) {
        self.clobber_flags();
        self.forget_recipes();
        let rbp = layout::GUEST_RBP;
        self.asm.mov(R10, rbp);
        self.lookup(8, Access::Read);
        self.may_fault();
        self.asm.load(R10, Mem::at(R10, 0));
        self.asm.lea(layout::GUEST_RSP, Mem::at(rbp, 8));
        self.asm.mov(rbp, R10);
        self.done();
    }
}

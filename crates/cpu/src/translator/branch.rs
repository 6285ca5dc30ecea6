//! Near transfers of control.

use super::access::Access;
use super::asm::{Mem, R10, R11, RSP, cc};
use super::emit::Emitter;
use super::flags::{self, Flags};
use super::jumps::{self, Transfer};
use super::layout;
use iced_x86::{Instruction, OpKind};

impl Emitter<'_> {
    /// Jcc: two edges. Flags are saved on those that need them.
    pub(super) fn jcc(&mut self, live: &impl Fn(i32) -> bool) {
        let condition = condition_of(self.current().instruction());
        let (taken, next) = (self.target(), self.next_offset());
        let (taken_live, next_live) = (live(taken), live(next));
        self.compute_flags();
        if let Flags::Host(Some(recipe)) = &self.flags
            && taken == self.start_offset()
        {
            let recipe = recipe.clone();
            let jump = self.asm.jcc(condition);
            self.loop_back(jump, recipe);
            return self.edge(next, next_live);
        }
        let in_host = matches!(self.flags, Flags::Host(_));
        if in_host && taken_live && next_live {
            flags::save(&mut self.asm);
            self.flags = Flags::Memory;
        }
        let condition = if in_host {
            condition
        } else {
            flags::test_saved(&mut self.asm, condition)
        };
        let must_save = taken_live && matches!(self.flags, Flags::Host(_));
        if (0..0x1000).contains(&taken) && !must_save {
            let jump = self.asm.jcc(condition);
            self.edge_of_jump(jump, taken);
        } else {
            let skip = self.asm.jcc(condition ^ 1);
            let before = self.flags.clone();
            self.edge(taken, taken_live);
            self.flags = before;
            self.asm.bind(skip);
        }
        self.edge(next, next_live);
    }

    /// CALL with a relative target.
    pub(super) fn call(&mut self, live: &impl Fn(i32) -> bool) {
        let (target, next) = (self.target(), self.next_offset());
        if live(target) {
            self.save_flags();
        }
        self.clobber_flags();
        self.forget_recipes();
        self.stack_slot();
        self.push_return(next);
        self.remember_call();
        if (0..0x1000).contains(&target) {
            let call = self.asm.call();
            self.edge_of_jump(call, target);
            self.returned(next);
        } else {
            self.asm.load(R10, layout::PAGE);
            self.asm.lea(R10, Mem::at(R10, target));
            self.call_r10(next);
        }
    }

    /// Calls the code at the linear address in R10 and goes on behind the guest's CALL.
    fn call_r10(&mut self, next: i32) {
        let miss = jumps::look_up(&mut self.asm, Transfer::Call);
        self.returned(next);
        for jump in miss {
            self.asm.bind(jump);
        }
        self.leave();
    }

    /// Stores the return address at R10 and moves the stack pointer.
    fn push_return(&mut self, next: i32) {
        self.asm.load(R11, layout::PAGE);
        if next != 0 {
            self.asm.lea(R11, Mem::at(R11, next));
        }
        self.may_fault();
        self.asm.store(Mem::at(R10, 0), R11);
        self.move_stack(-8);
    }

    /// A guest call is about to become a host call: puts beside the host's return address the
    /// page to which the guest's belongs. Too many are forgotten all at once.
    fn remember_call(&mut self) {
        self.asm.rm(true, &[0x3b], RSP, layout::STACK_LIMIT); // CMP
        let fits = self.asm.jcc(cc::A);
        self.asm.load(RSP, layout::STACK_BASE);
        self.asm.bind(fits);
        self.asm.rm(false, &[0xff], 6, layout::PAGE); // PUSH
    }

    /// A RET came back to the host call before this, with the guest's return address in R10. That
    /// it is the one which the guest's CALL pushed is likely, and checked.
    fn returned(&mut self, next: i32) {
        self.asm.bytes(&[0x41, 0x5b]); // POP R11
        self.asm.store(layout::PAGE, R11);
        if next != 0 {
            self.asm.lea(R11, Mem::at(R11, next));
        }
        self.asm.rr(true, &[0x3b], R10, R11); // CMP
        let expected = self.asm.jcc(cc::E);
        self.leave_to(self.trampolines.jump);
        self.asm.bind(expected);
        self.flags = Flags::Memory;
        self.edge_saved(next);
    }

    /// RET, with or without bytes to release.
    pub(super) fn return_near(&mut self) {
        let released = self.current().instruction().stack_pointer_increment();
        self.save_flags();
        self.stack_access(0, 8, Access::Read);
        self.may_fault();
        self.asm.load(R10, Mem::at(R10, 0));
        self.check_canonical();
        self.move_stack(released);
        self.asm.bytes(&[0xc3]);
    }

    /// JMP through a register or memory.
    pub(super) fn jump_indirect(&mut self) {
        self.save_flags();
        self.indirect_target();
        self.indirect_checked();
    }

    /// CALL through a register or memory.
    pub(super) fn call_indirect(&mut self) {
        let next = self.next_offset();
        self.save_flags();
        self.indirect_target();
        self.check_canonical();
        self.asm.store(layout::TEMPORARY, R10);
        self.stack_slot();
        self.push_return(next);
        self.remember_call();
        self.asm.load(R10, layout::TEMPORARY);
        self.call_r10(next);
    }

    /// R10: the target of an indirect branch.
    fn indirect_target(&mut self) {
        let i = *self.current().instruction();
        if i.op_kind(0) == OpKind::Memory {
            self.address(&i);
            self.lookup(8, Access::Read);
            self.may_fault();
            self.asm.load(R10, Mem::at(R10, 0));
        } else {
            let from = self.in_register(i.op_register(0).full_register().number(), R10);
            if from != R10 {
                self.asm.mov(R10, from);
            }
        }
    }

    /// Goes on at R10. What the jump cache does not know is checked before anything changes.
    fn indirect_checked(&mut self) {
        for jump in jumps::look_up(&mut self.asm, Transfer::Jump) {
            self.asm.bind(jump);
        }
        self.asm.load(R10, layout::RIP);
        self.check_canonical();
        self.leave();
    }
}

/// The condition of a Jcc, SETcc or CMOVcc as it is encoded.
pub(super) fn condition_of(i: &Instruction) -> u8 {
    use iced_x86::ConditionCode as C;
    match i.condition_code() {
        C::o | C::None => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
    }
}

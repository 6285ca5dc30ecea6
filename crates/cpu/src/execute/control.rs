//! Near control transfers.

use super::attempt;
use crate::memory::{Int, STACK};
use crate::op::{Flow, Op, Stop};
use crate::state::{Gpr, slot};
use crate::vcpu::Vcpu;
use arch::exception::Exception;

const RSP: usize = Gpr::Rsp as usize;
const RCX: u8 = 8;

/// Jcc in 64-bit code; `imm` is the target relative to the page.
pub(crate) fn jcc<const C: u8>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let page = cpu.state.regs[slot::PAGE];
    let next = u64::from(op.offset) + u64::from(op.len);
    let to = if cpu.condition::<C>() { op.imm } else { next };
    cpu.state.rip = page.wrapping_add(to);
    Flow::Branch
}

/// Jcc in 16- and 32-bit code; `aux` is the operand size.
pub(crate) fn jcc_legacy<const C: u8>(cpu: &mut Vcpu, op: &Op) -> Flow {
    if cpu.condition::<C>() {
        jmp_legacy(cpu, op)
    } else {
        cpu.end_block(op)
    }
}

/// An instruction that can be executed together with the Jcc behind it: it transfers no control.
pub(crate) trait Step {
    /// Executes the instruction.
    fn step(cpu: &mut Vcpu, op: &Op) -> Flow;
}

/// An instruction and the Jcc behind it, in 64-bit code, as one. The Jcc's op follows in memory.
pub(crate) fn step_jcc<const C: u8, S: Step>(cpu: &mut Vcpu, op: &Op) -> Flow {
    match S::step(cpu, op) {
        Flow::Next => {
            // SAFETY: the decoder puts this handler only on an op that another one follows in the
            // same block.
            let branch = unsafe { &*(&raw const *op).add(1) };
            jcc::<C>(cpu, branch)
        }
        other => other,
    }
}

/// JMP relative, in 64-bit code.
pub(crate) fn jmp(cpu: &mut Vcpu, op: &Op) -> Flow {
    cpu.state.rip = cpu.state.regs[slot::PAGE].wrapping_add(op.imm);
    Flow::Branch
}

/// JMP relative, in 16- and 32-bit code.
pub(crate) fn jmp_legacy(cpu: &mut Vcpu, op: &Op) -> Flow {
    let target = cpu.legacy_target(op);
    attempt!(cpu.check_target(target));
    cpu.state.rip = target;
    Flow::Branch
}

impl Vcpu {
    /// The target of a relative branch outside 64-bit code.
    fn legacy_target(&self, op: &Op) -> u64 {
        let target = self.state.regs[slot::PAGE].wrapping_add(op.imm);
        target & if op.aux == 2 { 0xffff } else { 0xffff_ffff }
    }

    /// Checks a branch target: canonical, or inside the code segment.
    pub(crate) fn check_target(&mut self, target: u64) -> Result<(), Stop> {
        if self.long64 {
            if self.is_canonical(target) {
                return Ok(());
            }
            return Err(self.general_protection());
        }
        self.check_code_limit(target, 1)
    }

    /// Pushes in 64-bit code.
    #[inline(always)]
    pub(crate) fn push64(&mut self, value: u64) -> Result<(), Stop> {
        let rsp = self.state.regs[RSP].wrapping_sub(8);
        self.write(rsp, STACK, value)?;
        self.state.regs[RSP] = rsp;
        Ok(())
    }

    /// Pops in 64-bit code.
    #[inline(always)]
    pub(crate) fn pop64(&mut self) -> Result<u64, Stop> {
        let rsp = self.state.regs[RSP];
        let value = self.read(rsp, STACK)?;
        self.state.regs[RSP] = rsp.wrapping_add(8);
        Ok(value)
    }

    /// Sets RIP and ends the block.
    #[inline(always)]
    pub(crate) fn branch_to(&mut self, target: u64) -> Flow {
        self.state.rip = target;
        Flow::Branch
    }
}

/// CALL relative, in 64-bit code.
pub(crate) fn call(cpu: &mut Vcpu, op: &Op) -> Flow {
    let next = cpu.next_rip(op);
    attempt!(cpu.push64(next));
    jmp(cpu, op)
}

/// CALL relative, in 16- and 32-bit code; `aux` is the operand size.
pub(crate) fn call_legacy(cpu: &mut Vcpu, op: &Op) -> Flow {
    let next = cpu.next_rip(op);
    let target = cpu.legacy_target(op);
    attempt!(cpu.check_target(target));
    attempt!(cpu.push_sized(next, op.aux));
    cpu.branch_to(target)
}

/// JMP through a register or memory, in 64-bit code.
pub(crate) fn jmp_indirect(cpu: &mut Vcpu, op: &Op) -> Flow {
    let target = attempt!(cpu.load_rm::<u64>(op));
    attempt!(cpu.check_target(target));
    cpu.branch_to(target)
}

/// CALL through a register or memory, in 64-bit code.
pub(crate) fn call_indirect(cpu: &mut Vcpu, op: &Op) -> Flow {
    let target = attempt!(cpu.load_rm::<u64>(op));
    attempt!(cpu.check_target(target));
    let next = cpu.next_rip(op);
    attempt!(cpu.push64(next));
    cpu.branch_to(target)
}

/// JMP through a register or memory, in 16- and 32-bit code.
pub(crate) fn jmp_indirect_legacy<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let target: u64 = attempt!(cpu.load_rm::<T>(op)).into();
    attempt!(cpu.check_target(target));
    cpu.branch_to(target)
}

/// CALL through a register or memory, in 16- and 32-bit code.
pub(crate) fn call_indirect_legacy<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let target: u64 = attempt!(cpu.load_rm::<T>(op)).into();
    attempt!(cpu.check_target(target));
    let next = cpu.next_rip(op);
    attempt!(cpu.push_sized(next, T::SIZE as u8));
    cpu.branch_to(target)
}

/// RET, in 64-bit code; `imm` more bytes are released.
pub(crate) fn ret(cpu: &mut Vcpu, op: &Op) -> Flow {
    let rsp = cpu.state.regs[RSP];
    let target = attempt!(cpu.read::<u64>(rsp, STACK));
    attempt!(cpu.check_target(target));
    cpu.state.regs[RSP] = rsp.wrapping_add(8).wrapping_add(op.imm);
    cpu.branch_to(target)
}

/// RET, in 16- and 32-bit code; `aux` is the operand size.
pub(crate) fn ret_legacy(cpu: &mut Vcpu, op: &Op) -> Flow {
    let target = attempt!(cpu.peek_sized(0, op.aux));
    attempt!(cpu.check_target(target));
    cpu.release_stack(u64::from(op.aux) + op.imm);
    cpu.branch_to(target)
}

impl Vcpu {
    /// rCX by address size: 2, 4 or 8 bytes.
    pub(crate) fn counter(&self, size: u8) -> u64 {
        self.sized_reg(RCX, size)
    }

    pub(crate) fn set_counter(&mut self, size: u8, value: u64) {
        self.set_sized_reg(RCX, size, value);
    }

    fn relative(&mut self, op: &Op, taken: bool) -> Flow {
        if !taken {
            return self.end_block(op);
        }
        if self.long64 {
            jmp(self, op)
        } else {
            jmp_legacy(self, op)
        }
    }
}

/// LOOP (`src` 0), LOOPE (1), LOOPNE (2), JrCXZ (3); `aux` is the operand size, `aux2` the
/// address size.
pub(crate) fn loops(cpu: &mut Vcpu, op: &Op) -> Flow {
    let count = cpu.counter(op.aux2);
    if op.src == 3 {
        return cpu.relative(op, count == 0);
    }
    let count = count.wrapping_sub(1);
    let bits = 8 * u32::from(op.aux2);
    let left = count << (64 - bits) != 0;
    let zero = cpu.state.flags.result == 0;
    let taken = left && (op.src == 0 || zero == (op.src == 1));
    if taken && !cpu.long64 {
        // A target outside the segment faults with the counter unchanged.
        let target = cpu.legacy_target(op);
        attempt!(cpu.check_target(target));
    }
    cpu.set_counter(op.aux2, count);
    cpu.relative(op, taken)
}

/// UD0, UD1, UD2, and everything that is not offered.
pub(crate) fn undefined(cpu: &mut Vcpu, _op: &Op) -> Flow {
    cpu.undefined();
    Flow::Stop
}

/// An instruction whose bytes are longer than 15, or lie in a way no processor accepts.
pub(crate) fn too_long(cpu: &mut Vcpu, _op: &Op) -> Flow {
    cpu.general_protection();
    Flow::Stop
}

/// The end of a block that no instruction ends: RIP moves past the last one.
pub(crate) fn fall_through(cpu: &mut Vcpu, op: &Op) -> Flow {
    super::stale(cpu, op)
}

/// BOUND; `aux` is the operand size.
pub(crate) fn bound<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let mut bytes = [0; 8];
    attempt!(cpu.read_operand_bytes(op, 0, &mut bytes[..2 * T::SIZE]));
    let both = u64::from_le_bytes(bytes);
    let signed = |value: u64| T::truncate(value).sign_extend() as i64;
    let index = cpu.reg::<T>(op.dst).sign_extend() as i64;
    if index < signed(both) || index > signed(both >> T::BITS) {
        cpu.raise(Exception::BoundRange);
        return Flow::Stop;
    }
    Flow::Next
}

//! PUSH, POP and their families, ENTER, LEAVE, PUSHF, POPF.

use super::attempt;
use crate::memory::{Int, STACK};
use crate::op::{Flow, Op, Stop, flag};
use crate::state::Gpr;
use crate::vcpu::Vcpu;
use arch::control_registers::{Cr4, Rflags};
use arch::controls::Interruptibility;
use arch::exception::Exception;
use arch::segment::{AccessRights, SegmentName};

const RSP: usize = Gpr::Rsp as usize;
const RBP: usize = Gpr::Rbp as usize;

impl Vcpu {
    /// The bits of RSP that stack accesses use.
    pub(crate) fn stack_mask(&self) -> u64 {
        if self.long64 {
            u64::MAX
        } else if self.state.segments[SegmentName::Ss as usize]
            .access
            .has(AccessRights::DB)
        {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Sets the bits of RSP that the stack uses.
    pub(crate) fn set_stack_pointer(&mut self, value: u64) {
        let mask = self.stack_mask();
        let kept = if mask == 0xffff {
            self.state.regs[RSP] & !0xffff
        } else {
            0
        };
        self.state.regs[RSP] = kept | value & mask;
    }

    /// Writes `size` bytes (2, 4 or 8) at `offset` on the stack.
    fn write_stack(&mut self, offset: u64, value: u64, size: u8) -> Result<(), Stop> {
        let address = self.linear(STACK, offset, size.into(), true)?;
        match size {
            2 => self.write(address, STACK, value as u16),
            4 => self.write(address, STACK, value as u32),
            _ => self.write(address, STACK, value),
        }
    }

    /// Pushes `size` bytes in any mode.
    pub(crate) fn push_sized(&mut self, value: u64, size: u8) -> Result<(), Stop> {
        let sp = self.state.regs[RSP].wrapping_sub(size.into()) & self.stack_mask();
        self.write_stack(sp, value, size)?;
        self.set_stack_pointer(sp);
        Ok(())
    }

    /// Reads `size` bytes at `distance` from the top of the stack, in any mode.
    pub(crate) fn peek_sized(&mut self, distance: u64, size: u8) -> Result<u64, Stop> {
        let sp = self.state.regs[RSP].wrapping_add(distance) & self.stack_mask();
        let address = self.linear(STACK, sp, size.into(), false)?;
        Ok(match size {
            2 => self.read::<u16>(address, STACK)?.into(),
            4 => self.read::<u32>(address, STACK)?.into(),
            _ => self.read::<u64>(address, STACK)?,
        })
    }

    /// Moves the stack pointer past `bytes`.
    pub(crate) fn release_stack(&mut self, bytes: u64) {
        self.set_stack_pointer(self.state.regs[RSP].wrapping_add(bytes));
    }

    /// Pops `size` bytes in any mode.
    pub(crate) fn pop_sized(&mut self, size: u8) -> Result<u64, Stop> {
        let value = self.peek_sized(0, size)?;
        self.release_stack(size.into());
        Ok(value)
    }
}

/// `PUSH r64` in 64-bit code.
pub(crate) fn push_reg(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value = cpu.reg::<u64>(op.dst);
    cpu.push64(value).into()
}

/// `PUSH imm` with a 64-bit operand.
pub(crate) fn push_imm(cpu: &mut Vcpu, op: &Op) -> Flow {
    cpu.push64(op.imm).into()
}

/// `POP r64` in 64-bit code.
pub(crate) fn pop_reg(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value = attempt!(cpu.pop64());
    cpu.set_reg(op.dst, value);
    Flow::Next
}

/// PUSH of a register, memory or immediate operand in any mode.
pub(crate) fn push_any<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value = if op.aux == 1 {
        op.imm
    } else {
        attempt!(cpu.load_rm::<T>(op)).into()
    };
    cpu.push_sized(value, T::SIZE as u8).into()
}

/// POP to a register in any mode.
pub(crate) fn pop_any<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value = attempt!(cpu.peek_sized(0, T::SIZE as u8));
    if op.flags & flag::MEMORY == 0 {
        cpu.release_stack(T::SIZE as u64);
        cpu.set_reg(op.dst, T::truncate(value));
        return Flow::Next;
    }
    // An address based on RSP is computed with the incremented value.
    let before = cpu.state.regs[RSP];
    cpu.release_stack(T::SIZE as u64);
    match cpu.store(op, T::truncate(value)) {
        Ok(()) => Flow::Next,
        Err(Stop) => {
            cpu.state.regs[RSP] = before;
            Flow::Stop
        }
    }
}

/// PUSH of segment register `src`; `aux` is the operand size.
pub(crate) fn push_segment(cpu: &mut Vcpu, op: &Op) -> Flow {
    let selector = cpu.state.segments[op.src as usize].selector;
    if op.aux == 4 {
        // Processors write only the selector and leave the upper half of the slot.
        let sp = cpu.state.regs[RSP].wrapping_sub(4) & cpu.stack_mask();
        attempt!(cpu.write_stack(sp, selector.into(), 2));
        cpu.set_stack_pointer(sp);
        return Flow::Next;
    }
    cpu.push_sized(selector.into(), op.aux).into()
}

/// POP of segment register `dst`; `aux` is the operand size.
pub(crate) fn pop_segment(cpu: &mut Vcpu, op: &Op) -> Flow {
    let selector = attempt!(cpu.peek_sized(0, op.aux)) as u16;
    let name = SegmentName::ALL[op.dst as usize];
    attempt!(cpu.load_segment(name, selector));
    cpu.release_stack(op.aux.into());
    if name == SegmentName::Ss {
        cpu.state.interruptibility.insert(Interruptibility::MOV_SS);
        cpu.request_own();
        cpu.update_mode();
    }
    cpu.end_block(op)
}

/// PUSHA; `aux` is the operand size.
pub(crate) fn pusha(cpu: &mut Vcpu, op: &Op) -> Flow {
    let size = op.aux;
    let mask = cpu.stack_mask();
    let top = cpu.state.regs[RSP];
    let mut sp = top;
    for register in 0..8usize {
        sp = sp.wrapping_sub(size.into()) & mask;
        let value = cpu.state.regs[register];
        attempt!(cpu.write_stack(sp, value, size));
    }
    cpu.set_stack_pointer(sp);
    Flow::Next
}

/// POPA; `aux` is the operand size.
pub(crate) fn popa(cpu: &mut Vcpu, op: &Op) -> Flow {
    let size = op.aux;
    let mut values = [0; 8];
    for (i, value) in values.iter_mut().enumerate() {
        *value = attempt!(cpu.peek_sized(i as u64 * u64::from(size), size));
    }
    cpu.release_stack(8 * u64::from(size));
    for (i, value) in values.into_iter().enumerate() {
        let register = 7 - i;
        if register == RSP {
            continue;
        }
        if size == 2 {
            cpu.set_reg(8 * register as u8, value as u16);
        } else {
            cpu.set_reg(8 * register as u8, value as u32);
        }
    }
    Flow::Next
}

/// ENTER; `imm` is the frame size, `aux2` the nesting level, `aux` the operand size.
pub(crate) fn enter(cpu: &mut Vcpu, op: &Op) -> Flow {
    let size = op.aux;
    let mask = cpu.stack_mask();
    let level = op.aux2 & 31;
    let mut sp = cpu.state.regs[RSP].wrapping_sub(size.into()) & mask;
    attempt!(cpu.write_stack(sp, cpu.state.regs[RBP], size));
    let frame = sp;
    let mut bp = cpu.state.regs[RBP];
    for _ in 1..level {
        bp = bp.wrapping_sub(size.into()) & mask;
        let address = attempt!(cpu.linear(STACK, bp, size.into(), false));
        let value = match size {
            2 => attempt!(cpu.read::<u16>(address, STACK)).into(),
            4 => attempt!(cpu.read::<u32>(address, STACK)).into(),
            _ => attempt!(cpu.read::<u64>(address, STACK)),
        };
        sp = sp.wrapping_sub(size.into()) & mask;
        attempt!(cpu.write_stack(sp, value, size));
    }
    if level > 0 {
        sp = sp.wrapping_sub(size.into()) & mask;
        attempt!(cpu.write_stack(sp, frame, size));
    }
    sp = sp.wrapping_sub(op.imm) & mask;
    // The new top of the stack must be writable, though nothing is written there.
    let address = attempt!(cpu.linear(STACK, sp, size.into(), true));
    attempt!(cpu.check_write(address, size.into(), STACK));
    match size {
        2 => cpu.set_reg(8 * RBP as u8, frame as u16),
        4 => cpu.set_reg(8 * RBP as u8, frame as u32),
        _ => cpu.state.regs[RBP] = frame,
    }
    cpu.set_stack_pointer(sp);
    Flow::Next
}

/// LEAVE; `aux` is the operand size.
pub(crate) fn leave(cpu: &mut Vcpu, op: &Op) -> Flow {
    let size = op.aux;
    let before = cpu.state.regs[RSP];
    let bp = cpu.state.regs[RBP];
    cpu.set_stack_pointer(bp);
    let value = match cpu.pop_sized(size) {
        Ok(value) => value,
        Err(Stop) => {
            cpu.state.regs[RSP] = before;
            return Flow::Stop;
        }
    };
    match size {
        2 => cpu.set_reg(8 * RBP as u8, value as u16),
        4 => cpu.set_reg(8 * RBP as u8, value as u32),
        _ => cpu.state.regs[RBP] = value,
    }
    Flow::Next
}

/// LEAVE in 64-bit code.
pub(crate) fn leave64(cpu: &mut Vcpu, _op: &Op) -> Flow {
    let bp = cpu.state.regs[RBP];
    let value = attempt!(cpu.read::<u64>(bp, STACK));
    cpu.state.regs[RBP] = value;
    cpu.state.regs[RSP] = bp.wrapping_add(8);
    Flow::Next
}

/// PUSHF; `aux` is the operand size.
pub(crate) fn pushf(cpu: &mut Vcpu, op: &Op) -> Flow {
    let flags = if attempt!(cpu.flags_image_is_virtual(op.aux)) {
        cpu.virtual_flags_image()
    } else {
        cpu.state.rflags()
    };
    let flags = flags & !(Rflags::VM | Rflags::RF).bits();
    cpu.push_sized(flags, op.aux).into()
}

/// The flags that POPF and IRET may change at this privilege level, beyond the status flags.
pub(crate) fn writable_flags(cpu: &Vcpu, size: u8) -> u64 {
    let mut mask = Rflags::STATUS | Rflags::TF | Rflags::DF | Rflags::NT;
    if size >= 4 {
        mask |= Rflags::AC | Rflags::ID;
    }
    let iopl = (cpu.state.rflags_rest >> 12 & 3) as u8;
    if cpu.real_mode() || cpu.cpl() == 0 {
        mask |= Rflags::IOPL0 | Rflags::IOPL1;
    }
    if cpu.real_mode() || cpu.cpl() <= iopl {
        mask |= Rflags::IF;
    }
    mask.bits()
}

/// POPF; `aux` is the operand size.
pub(crate) fn popf(cpu: &mut Vcpu, op: &Op) -> Flow {
    if attempt!(cpu.flags_image_is_virtual(op.aux)) {
        let image = attempt!(cpu.peek_sized(0, op.aux));
        let flags = attempt!(cpu.flags_from_virtual_image(image));
        cpu.release_stack(op.aux.into());
        cpu.change_rflags(flags);
        return cpu.end_block(op);
    }
    let value = attempt!(cpu.pop_sized(op.aux));
    let mask = writable_flags(cpu, op.aux);
    let old = cpu.state.rflags() & !Rflags::RF.bits();
    cpu.change_rflags(old & !mask | value & mask);
    cpu.end_block(op)
}

impl Vcpu {
    /// Sets RFLAGS and looks at what that changes: contexts (AC), traps (TF), windows (IF).
    pub(crate) fn change_rflags(&mut self, value: u64) {
        let old = self.state.rflags_rest;
        self.state.set_rflags(value);
        if (old ^ value) & Rflags::AC.bits() != 0 {
            self.update_context();
        }
        self.request_own();
    }
}

/// Far-pointer loads LDS, LES, LFS, LGS, LSS: segment register `aux2`, general register `dst`.
pub(crate) fn load_far_pointer<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let mut bytes = [0; 10];
    attempt!(cpu.read_operand_bytes(op, 0, &mut bytes[..T::SIZE + 2]));
    let mut offset = [0; 8];
    offset[..T::SIZE].copy_from_slice(&bytes[..T::SIZE]);
    let selector = u16::from_le_bytes([bytes[T::SIZE], bytes[T::SIZE + 1]]);
    attempt!(cpu.load_segment(SegmentName::ALL[op.aux2 as usize], selector));
    cpu.set_reg(op.dst, T::truncate(u64::from_le_bytes(offset)));
    cpu.update_mode();
    cpu.end_block(op)
}

/// STAC (`aux` 1) and CLAC (`aux` 0).
pub(crate) fn set_ac(cpu: &mut Vcpu, op: &Op) -> Flow {
    if cpu.cpl() != 0 || !cpu.has(arch::cpuid::Feature::SMAP) {
        cpu.raise(Exception::InvalidOpcode);
        return Flow::Stop;
    }
    let ac = Rflags::AC.bits();
    let old = cpu.state.rflags_rest;
    cpu.state.rflags_rest = if op.aux == 1 { old | ac } else { old & !ac };
    if cpu.state.rflags_rest != old && cpu.state.cr4.contains(Cr4::SMAP) {
        cpu.update_context();
    } else {
        cpu.supervisor_reaches_user =
            cpu.state.rflags_rest & ac != 0 || !cpu.state.cr4.contains(Cr4::SMAP);
    }
    Flow::Next
}

//! Execution: the loop, and the handlers by family.
//!
//! ```text
//! run ── attend ── (kicks, windows, traps, single steps)
//!     └─ find block ── execute its ops until one branches or stops ── repeat
//! ```

pub(crate) mod alu;
pub(crate) mod bit;
pub(crate) mod control;
pub(crate) mod control_registers;
pub(crate) mod data;
pub(crate) mod io;
pub(crate) mod msrs;
pub(crate) mod multiply;
pub(crate) mod privileged;
pub(crate) mod run;
pub(crate) mod shift;
pub(crate) mod stack;
pub(crate) mod string;
pub(crate) mod tables;
pub(crate) mod transfer;
mod virtual_flag;
pub(crate) mod wait;

use crate::memory::Int;
use crate::op::{Flow, Op, Stop, flag};
use crate::state::slot;
use crate::vcpu::{Cause, Vcpu};
use arch::exit::VmExit;

/// What replaces the handlers of a block that was overwritten while it ran: the block ends and
/// the instruction is looked up anew.
pub(crate) fn stale(cpu: &mut Vcpu, op: &Op) -> Flow {
    cpu.state.rip = cpu.rip_of(op);
    Flow::Stale
}

impl Vcpu {
    /// RIP of an instruction of the running block.
    #[inline(always)]
    pub(crate) fn rip_of(&self, op: &Op) -> u64 {
        self.wrap_rip(self.state.regs[slot::PAGE].wrapping_add(op.offset.into()))
    }

    /// RIP of the instruction after `op`.
    #[inline(always)]
    pub(crate) fn next_rip(&self, op: &Op) -> u64 {
        let next = u64::from(op.offset) + u64::from(op.len);
        self.wrap_rip(self.state.regs[slot::PAGE].wrapping_add(next))
    }

    /// Truncates an instruction pointer outside 64-bit code.
    #[inline(always)]
    pub(crate) fn wrap_rip(&self, rip: u64) -> u64 {
        match self.code_mode {
            crate::code::CodeMode::Bits64 => rip,
            _ => rip & 0xffff_ffff,
        }
    }

    /// Sets RIP to the next instruction and ends the block.
    #[inline(always)]
    pub(crate) fn end_block(&mut self, op: &Op) -> Flow {
        self.state.rip = self.next_rip(op);
        Flow::Branch
    }

    /// Ends the block behind an instruction that has completed; with `exit`, which is trap-like,
    /// by leaving.
    pub(crate) fn end_with(&mut self, op: &Op, exit: Option<VmExit>) -> Flow {
        match exit {
            Some(exit) => {
                self.stop_with(Cause::ExitAfter(exit));
                Flow::Stop
            }
            None => self.end_block(op),
        }
    }

    /// Reads a register operand given by byte offset.
    #[inline(always)]
    pub(crate) fn reg<T: Int>(&self, offset: u8) -> T {
        debug_assert!(offset as usize + T::SIZE <= 8 * slot::COUNT);
        let base = (&raw const self.state.regs).cast::<u8>();
        // SAFETY: offsets are made by the decoder, below 8 × 16 + 1, and any bit pattern is a T;
        // the register file is 144 bytes.
        unsafe { base.add(offset.into()).cast::<T>().read_unaligned() }
    }

    /// Writes a register operand. 32-bit writes clear the upper half, as in 64-bit mode; in other
    /// modes the upper halves cannot be seen.
    #[inline(always)]
    pub(crate) fn set_reg<T: Int>(&mut self, offset: u8, value: T) {
        debug_assert!(offset as usize + T::SIZE <= 8 * slot::COUNT);
        let base = (&raw mut self.state.regs).cast::<u8>();
        // SAFETY: as in `reg`; a 32-bit operand's offset is a multiple of 8, so the 8-byte write
        // stays inside.
        unsafe {
            let at = base.add(offset.into());
            if T::BITS == 32 {
                at.cast::<u64>().write_unaligned(value.into());
            } else {
                at.cast::<T>().write_unaligned(value);
            }
        }
    }

    /// A general-purpose register by address size: 2, 4 or 8 bytes.
    pub(crate) fn sized_reg(&self, offset: u8, size: u8) -> u64 {
        match size {
            2 => self.reg::<u16>(offset).into(),
            4 => self.reg::<u32>(offset).into(),
            _ => self.reg::<u64>(offset),
        }
    }

    /// Sets a general-purpose register by address size.
    pub(crate) fn set_sized_reg(&mut self, offset: u8, size: u8, value: u64) {
        match size {
            2 => self.set_reg(offset, value as u16),
            4 => self.set_reg(offset, value as u32),
            _ => self.set_reg(offset, value),
        }
    }

    /// The effective address of the memory operand, before segmentation and truncation.
    #[inline(always)]
    pub(crate) fn effective(&self, op: &Op) -> u64 {
        let regs = &self.state.regs;
        debug_assert!((op.base as usize) < slot::COUNT && (op.index as usize) < slot::COUNT);
        // SAFETY: the decoder makes slots below `slot::COUNT`.
        let (base, index) = unsafe {
            (
                *regs.get_unchecked(op.base as usize),
                *regs.get_unchecked(op.index as usize),
            )
        };
        base.wrapping_add(index << op.scale)
            .wrapping_add(op.disp as i64 as u64)
    }

    /// The linear address of the memory operand of `size` bytes.
    #[inline(always)]
    pub(crate) fn address(&mut self, op: &Op, size: u64, write: bool) -> Result<u64, Stop> {
        self.address_at(op, 0, size, write)
    }

    /// The linear address of `size` bytes at `offset` from the start of the memory operand.
    #[inline(always)]
    pub(crate) fn address_at(
        &mut self,
        op: &Op,
        offset: u64,
        size: u64,
        write: bool,
    ) -> Result<u64, Stop> {
        let effective = self.effective(op).wrapping_add(offset);
        if op.flags & flag::LEGACY == 0 {
            let bases = &self.state.segment_bases;
            debug_assert!((op.segment as usize) < bases.len());
            // SAFETY: the decoder makes segment indices below 7.
            let base = unsafe { *bases.get_unchecked(op.segment as usize) };
            return Ok(effective.wrapping_add(base));
        }
        self.linear_legacy(op, effective, size, write)
    }

    /// Reads the memory operand.
    #[inline(always)]
    pub(crate) fn load<T: Int>(&mut self, op: &Op) -> Result<T, Stop> {
        let address = self.address(op, T::SIZE as u64, false)?;
        self.read(address, op.segment)
    }

    /// Writes the memory operand.
    #[inline(always)]
    pub(crate) fn store<T: Int>(&mut self, op: &Op, value: T) -> Result<(), Stop> {
        let address = self.address(op, T::SIZE as u64, true)?;
        self.write(address, op.segment, value)
    }

    /// Reads, computes and writes the memory operand, atomically with a LOCK prefix.
    #[inline(always)]
    pub(crate) fn update<T: Int, R>(
        &mut self,
        op: &Op,
        compute: impl FnMut(T) -> (T, R),
    ) -> Result<R, Stop> {
        let address = self.address(op, T::SIZE as u64, true)?;
        self.modify(address, op.segment, op.flags & flag::LOCK != 0, compute)
    }

    /// Reads the r/m operand, wherever it is; registers are in `op.dst`.
    #[inline(always)]
    pub(crate) fn load_rm<T: Int>(&mut self, op: &Op) -> Result<T, Stop> {
        if op.flags & flag::MEMORY != 0 {
            self.load(op)
        } else {
            Ok(self.reg(op.dst))
        }
    }

    /// Reads the r/m source operand, wherever it is; registers are in `op.src`.
    #[inline(always)]
    pub(crate) fn load_rm_src<T: Int>(&mut self, op: &Op) -> Result<T, Stop> {
        if op.flags & flag::MEMORY != 0 {
            self.load(op)
        } else {
            Ok(self.reg(op.src))
        }
    }

    /// Writes the r/m operand, wherever it is; registers are in `op.dst`.
    #[inline(always)]
    pub(crate) fn store_rm<T: Int>(&mut self, op: &Op, value: T) -> Result<(), Stop> {
        if op.flags & flag::MEMORY != 0 {
            return self.store(op, value);
        }
        self.set_reg(op.dst, value);
        Ok(())
    }
}

/// Unwraps a result inside a handler, or stops.
macro_rules! attempt {
    ($e:expr) => {
        match $e {
            Ok(value) => value,
            Err(crate::op::Stop) => return crate::op::Flow::Stop,
        }
    };
}
pub(crate) use attempt;

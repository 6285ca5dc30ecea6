//! MOVS, STOS, LODS, CMPS and SCAS, with their repeat prefixes.
//!
//! A repeated instruction runs in batches: while the elements lie inside one page on each side
//! and the TLB knows the pages, a whole stretch is moved at once; otherwise element by element.
//! After a batch, or when something wants attention, the registers stand between two iterations
//! and RIP still names the instruction, as the architecture has it at interruptions.

use super::attempt;
use crate::memory::Int;
use crate::op::{Flow, Op, Stop, flag};
use crate::state::Gpr;
use crate::vcpu::Vcpu;
use arch::control_registers::Rflags;
use std::sync::atomic::Ordering;

const RSI: u8 = 8 * Gpr::Rsi as u8;
const RDI: u8 = 8 * Gpr::Rdi as u8;
const RAX: u8 = 0;
const ES: u8 = 0;

/// Elements after which a repeated instruction looks whether anything wants attention.
const BATCH: u32 = 4096;

impl Vcpu {
    fn advance(&mut self, register: u8, size: u8, by: u64) {
        let value = self.sized_reg(register, size).wrapping_add(by);
        self.set_sized_reg(register, size, value);
    }

    /// The step of one element: its size, negative with DF.
    fn step_of<T: Int>(&self) -> u64 {
        let size = T::SIZE as u64;
        if self.state.rflags_rest & Rflags::DF.bits() != 0 {
            size.wrapping_neg()
        } else {
            size
        }
    }

    /// Linear address of a string element. Outside 64-bit code ES is checked like any segment.
    fn element<T: Int>(
        &mut self,
        segment: u8,
        register: u8,
        op: &Op,
        write: bool,
    ) -> Result<u64, Stop> {
        let offset = self.sized_reg(register, op.aux2);
        if self.long64 {
            return Ok(offset.wrapping_add(self.state.segment_bases[segment as usize]));
        }
        self.linear(segment, offset, T::SIZE as u64, write)
    }

    /// How many elements, at most `count`, may be handled as one stretch from these linear
    /// addresses upwards: inside one page, known to the TLB. Zero if none.
    fn stretch<T: Int>(&self, source: Option<u64>, destination: Option<u64>, count: u64) -> u64 {
        if !self.long64 || self.state.rflags_rest & Rflags::DF.bits() != 0 {
            return 0;
        }
        let mut elements = count;
        for (address, write) in [(source, false), (destination, true)] {
            let Some(address) = address else { continue };
            let entry = self.tlb.entry(address);
            let tag = if write { entry.write } else { entry.read };
            if tag != address & !0xfff | self.context {
                return 0;
            }
            elements = elements.min((0x1000 - (address & 0xfff)) / T::SIZE as u64);
        }
        elements
    }

    fn host(&self, address: u64) -> u64 {
        address.wrapping_add(self.tlb.entry(address).addend)
    }
}

/// Runs `one` for each element of a repeated instruction, or once without a prefix.
#[inline(always)]
fn repeat(
    cpu: &mut Vcpu,
    op: &Op,
    mut one: impl FnMut(&mut Vcpu) -> Result<(), Stop>,
    mut stretch: impl FnMut(&mut Vcpu, u64) -> u64,
    until: Option<bool>,
) -> Flow {
    if op.flags & (flag::REP | flag::REPNE) == 0 {
        return one(cpu).into();
    }
    let single = cpu.bus.is_some() || cpu.alone || cpu.must_step();
    let mut budget = BATCH;
    loop {
        let count = cpu.counter(op.aux2);
        if count == 0 {
            return Flow::Next;
        }
        let done = if single {
            0
        } else {
            stretch(cpu, count.min(budget.into()))
        };
        if done != 0 {
            cpu.set_counter(op.aux2, count - done);
            budget = budget.saturating_sub(done as u32);
        } else {
            attempt!(one(cpu));
            cpu.set_counter(op.aux2, count - 1);
            budget = budget.saturating_sub(1);
            if until.is_some_and(|zero| (cpu.state.flags.result == 0) == zero) {
                return Flow::Next;
            }
        }
        if cpu.counter(op.aux2) == 0 {
            return Flow::Next;
        }
        if budget == 0 || single || cpu.attention.flags.load(Ordering::Relaxed) != 0 {
            cpu.state.rip = cpu.rip_of(op);
            return Flow::Branch;
        }
    }
}

/// MOVS.
pub(crate) fn movs<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let step = cpu.step_of::<T>();
    repeat(
        cpu,
        op,
        |cpu| {
            let source = cpu.element::<T>(op.segment, RSI, op, false)?;
            let value: T = cpu.read(source, op.segment)?;
            let destination = cpu.element::<T>(ES, RDI, op, true)?;
            cpu.write(destination, ES, value)?;
            cpu.advance(RSI, op.aux2, step);
            cpu.advance(RDI, op.aux2, step);
            Ok(())
        },
        |cpu, count| {
            let source = cpu
                .sized_reg(RSI, op.aux2)
                .wrapping_add(cpu.state.segment_bases[op.segment as usize]);
            let destination = cpu.sized_reg(RDI, op.aux2);
            let elements = cpu.stretch::<T>(Some(source), Some(destination), count);
            let (from, to) = (cpu.host(source), cpu.host(destination));
            let bytes = elements * T::SIZE as u64;
            // Overlap that a forward element copy would propagate is left to the slow way.
            if elements < 2 || to.wrapping_sub(from) < bytes {
                return 0;
            }
            // SAFETY: both ranges lie inside pages that the TLB maps for this access.
            if unsafe { crate::host::copy_within_guest(to, from, bytes as usize) }.is_err() {
                return 0;
            }
            cpu.advance(RSI, op.aux2, bytes);
            cpu.advance(RDI, op.aux2, bytes);
            elements
        },
        None,
    )
}

/// STOS.
pub(crate) fn stos<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let step = cpu.step_of::<T>();
    let value: T = cpu.reg(RAX);
    repeat(
        cpu,
        op,
        |cpu| {
            let destination = cpu.element::<T>(ES, RDI, op, true)?;
            cpu.write(destination, ES, value)?;
            cpu.advance(RDI, op.aux2, step);
            Ok(())
        },
        |cpu, count| {
            let destination = cpu.sized_reg(RDI, op.aux2);
            let elements = cpu.stretch::<T>(None, Some(destination), count);
            let to = cpu.host(destination);
            for i in 0..elements {
                // SAFETY: the range lies inside a page that the TLB maps for writes.
                if unsafe { T::store(to + i * T::SIZE as u64, value) }.is_err() {
                    cpu.advance(RDI, op.aux2, i * T::SIZE as u64);
                    return i;
                }
            }
            cpu.advance(RDI, op.aux2, elements * T::SIZE as u64);
            elements
        },
        None,
    )
}

/// LODS.
pub(crate) fn lods<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let step = cpu.step_of::<T>();
    repeat(
        cpu,
        op,
        |cpu| {
            let source = cpu.element::<T>(op.segment, RSI, op, false)?;
            let value: T = cpu.read(source, op.segment)?;
            cpu.set_reg(RAX, value);
            cpu.advance(RSI, op.aux2, step);
            Ok(())
        },
        |_, _| 0,
        None,
    )
}

fn compare<T: Int>(cpu: &mut Vcpu, a: T, b: T) {
    use super::alu::{Binary, Cmp};
    cpu.state.flags = Cmp::apply(a, b, &cpu.state.flags).1;
}

/// What ends a repeated comparison early: ZF clear under REPE, set under REPNE.
fn until(op: &Op) -> Option<bool> {
    if op.flags & flag::REP != 0 {
        Some(false)
    } else {
        Some(true)
    }
}

/// CMPS.
pub(crate) fn cmps<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let step = cpu.step_of::<T>();
    repeat(
        cpu,
        op,
        |cpu| {
            let source = cpu.element::<T>(op.segment, RSI, op, false)?;
            let a: T = cpu.read(source, op.segment)?;
            let destination = cpu.element::<T>(ES, RDI, op, false)?;
            let b: T = cpu.read(destination, ES)?;
            compare(cpu, a, b);
            cpu.advance(RSI, op.aux2, step);
            cpu.advance(RDI, op.aux2, step);
            Ok(())
        },
        |_, _| 0,
        until(op),
    )
}

/// SCAS.
pub(crate) fn scas<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let step = cpu.step_of::<T>();
    let a: T = cpu.reg(RAX);
    repeat(
        cpu,
        op,
        |cpu| {
            let destination = cpu.element::<T>(ES, RDI, op, false)?;
            let b: T = cpu.read(destination, ES)?;
            compare(cpu, a, b);
            cpu.advance(RDI, op.aux2, step);
            Ok(())
        },
        |_, _| 0,
        until(op),
    )
}

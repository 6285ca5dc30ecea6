//! Bit tests, scans, counts, BMI1 and BMI2.

use super::attempt;
use crate::memory::Int;
use crate::op::{Flow, Op, flag};
use crate::state::LazyFlags;
use crate::vcpu::Vcpu;
use arch::control_registers::Rflags;

/// What a bit-test instruction does with the bit: the values of `aux`.
pub(crate) mod action {
    /// BT.
    pub(crate) const TEST: u8 = 0;
    /// BTS.
    pub(crate) const SET: u8 = 1;
    /// BTR.
    pub(crate) const RESET: u8 = 2;
    /// BTC.
    pub(crate) const COMPLEMENT: u8 = 3;
}

fn change(value: u64, mask: u64, what: u8) -> u64 {
    match what {
        action::SET => value | mask,
        action::RESET => value & !mask,
        action::COMPLEMENT => value ^ mask,
        _ => value,
    }
}

/// BT, BTS, BTR, BTC with a bit offset inside the operand (an immediate, or a register operand).
fn test_in_operand<T: Int>(cpu: &mut Vcpu, op: &Op, offset: u64) -> Flow {
    let mask = 1u64 << (offset & u64::from(T::BITS - 1));
    let old: u64 = if op.flags & flag::MEMORY == 0 {
        let old: u64 = cpu.reg::<T>(op.dst).into();
        if op.aux != action::TEST {
            cpu.set_reg(op.dst, T::truncate(change(old, mask, op.aux)));
        }
        old
    } else if op.aux == action::TEST {
        attempt!(cpu.load::<T>(op)).into()
    } else {
        let what = op.aux;
        attempt!(cpu.update(op, |a: T| (T::truncate(change(a.into(), mask, what)), a))).into()
    };
    cpu.state.flags.set_carry(old & mask != 0);
    Flow::Next
}

/// The bit offset is an immediate.
pub(crate) fn test_imm<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    test_in_operand::<T>(cpu, op, op.imm)
}

/// The bit offset is in register `src`. A memory operand is a bit string: the offset selects the
/// operand-sized word too.
pub(crate) fn test_reg<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let offset = cpu.reg::<T>(op.src).sign_extend();
    if op.flags & flag::MEMORY == 0 {
        return test_in_operand::<T>(cpu, op, offset);
    }
    let word = (offset as i64 >> T::BITS.trailing_zeros()) * T::SIZE as i64;
    let write = op.aux != action::TEST;
    let address = attempt!(cpu.address_at(op, word as u64, T::SIZE as u64, write));
    let mask = 1u64 << (offset & u64::from(T::BITS - 1));
    let old: u64 = if write {
        let lock = op.flags & flag::LOCK != 0;
        let what = op.aux;
        let compute = |a: T| (T::truncate(change(a.into(), mask, what)), a);
        attempt!(cpu.modify(address, op.segment, lock, compute)).into()
    } else {
        attempt!(cpu.read::<T>(address, op.segment)).into()
    };
    cpu.state.flags.set_carry(old & mask != 0);
    Flow::Next
}

/// BSF (`aux` 0) and BSR (`aux` 1). A zero source leaves the destination.
pub(crate) fn scan<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value: u64 = attempt!(cpu.load_rm_src::<T>(op)).into();
    let mut flags = LazyFlags::logic(T::truncate(value));
    if value == 0 {
        flags.result = 0;
    } else {
        let at = if op.aux == 0 {
            value.trailing_zeros()
        } else {
            63 - value.leading_zeros()
        };
        cpu.set_reg(op.dst, T::truncate(at.into()));
        flags.result = 1;
    }
    cpu.state.flags = flags;
    Flow::Next
}

fn count_flags<T: Int>(cpu: &mut Vcpu, result: u64, cf: bool) {
    let mut flags = LazyFlags::logic(T::truncate(result));
    flags.set_carry_overflow(cf, false);
    cpu.state.flags = flags;
}

/// TZCNT (`aux` 0), LZCNT (`aux` 1).
pub(crate) fn count_zeros<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value: u64 = attempt!(cpu.load_rm_src::<T>(op)).into();
    let count = match (value, op.aux) {
        (0, _) => T::BITS,
        (v, 0) => v.trailing_zeros(),
        (v, _) => v.leading_zeros() - (64 - T::BITS),
    };
    cpu.set_reg(op.dst, T::truncate(count.into()));
    count_flags::<T>(cpu, count.into(), value == 0);
    Flow::Next
}

/// POPCNT.
pub(crate) fn popcnt<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value: u64 = attempt!(cpu.load_rm_src::<T>(op)).into();
    cpu.set_reg(op.dst, T::truncate(value.count_ones().into()));
    let zf = if value == 0 { Rflags::ZF.bits() } else { 0 };
    cpu.state.flags = LazyFlags::from_status(zf);
    Flow::Next
}

/// ANDN: `dst = !aux2 & r/m`.
pub(crate) fn andn<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let b: u64 = attempt!(cpu.load_rm_src::<T>(op)).into();
    let a: u64 = cpu.reg::<T>(op.aux2).into();
    let result = T::truncate(!a & b);
    cpu.set_reg(op.dst, result);
    cpu.state.flags = LazyFlags::logic(result);
    Flow::Next
}

/// BLSI (`aux` 0), BLSMSK (1), BLSR (2).
pub(crate) fn lowest_bit<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value: u64 = attempt!(cpu.load_rm_src::<T>(op)).into();
    let (result, cf) = match op.aux {
        0 => (value & value.wrapping_neg(), value != 0),
        1 => (value ^ value.wrapping_sub(1), value == 0),
        _ => (value & value.wrapping_sub(1), value == 0),
    };
    let result = T::truncate(result);
    cpu.set_reg(op.dst, result);
    let mut flags = LazyFlags::logic(result);
    flags.set_carry_overflow(cf, false);
    cpu.state.flags = flags;
    Flow::Next
}

/// BEXTR: start and length from register `aux2`.
pub(crate) fn bextr<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value: u64 = attempt!(cpu.load_rm_src::<T>(op)).into();
    let control: u64 = cpu.reg::<T>(op.aux2).into();
    let (start, len) = (control & 0xff, control >> 8 & 0xff);
    let shifted = if start >= 64 { 0 } else { value >> start };
    let result = T::truncate(if len >= 64 {
        shifted
    } else {
        shifted & ((1 << len) - 1)
    });
    cpu.set_reg(op.dst, result);
    cpu.state.flags = LazyFlags::logic(result);
    Flow::Next
}

/// BZHI: index from register `aux2`.
pub(crate) fn bzhi<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value: u64 = attempt!(cpu.load_rm_src::<T>(op)).into();
    let index: u64 = cpu.reg::<u8>(op.aux2).into();
    let keep_all = index >= u64::from(T::BITS);
    let result = T::truncate(if keep_all {
        value
    } else {
        value & ((1 << index) - 1)
    });
    cpu.set_reg(op.dst, result);
    let mut flags = LazyFlags::logic(result);
    flags.set_carry_overflow(keep_all, false);
    cpu.state.flags = flags;
    Flow::Next
}

/// PDEP (`aux` 0) and PEXT (`aux` 1): the mask is the r/m operand, the source `aux2`.
pub(crate) fn deposit_extract<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let mut mask: u64 = attempt!(cpu.load_rm_src::<T>(op)).into();
    let source: u64 = cpu.reg::<T>(op.aux2).into();
    let mut result = 0u64;
    let mut n = 0;
    while mask != 0 {
        let at = mask.trailing_zeros();
        let (from, to) = if op.aux == 0 { (n, at) } else { (at, n) };
        result |= (source >> from & 1) << to;
        mask &= mask - 1;
        n += 1;
    }
    cpu.set_reg(op.dst, T::truncate(result));
    Flow::Next
}

/// CRC32 of a source of type `S`; `aux` is 1 when the destination is 64 bits wide.
pub(crate) fn crc32<S: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value: u64 = attempt!(cpu.load_rm_src::<S>(op)).into();
    let mut crc = cpu.reg::<u32>(op.dst);
    for i in 0..S::SIZE {
        crc ^= u32::from((value >> (8 * i)) as u8);
        for _ in 0..8 {
            // The Castagnoli polynomial, reflected.
            crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
    }
    cpu.set_reg(op.dst, crc);
    Flow::Next
}

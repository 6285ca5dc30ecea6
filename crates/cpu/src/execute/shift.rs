//! Shifts, rotates and double shifts.

use super::attempt;
use crate::memory::Int;
use crate::op::{Flow, Op, flag};
use crate::state::LazyFlags;
use crate::vcpu::Vcpu;

/// A shift or rotate by a masked, non-zero count. Counts are at most 31, or 63 at 64 bits.
pub(crate) trait Shift {
    /// Computes the result and the flags.
    fn apply<T: Int>(a: T, count: u32, flags: LazyFlags) -> (T, LazyFlags);
}

fn with_cf_of<T: Int>(result: T, cf: bool, of: bool) -> (T, LazyFlags) {
    let mut flags = LazyFlags::logic(result);
    flags.set_carry_overflow(cf, of);
    (result, flags)
}

/// Rotates change CF and OF only.
fn rotated<T: Int>(result: T, mut flags: LazyFlags, cf: bool, of: bool) -> (T, LazyFlags) {
    let af = flags.carry & 8;
    flags.set_carry_overflow(cf, of);
    flags.carry |= af;
    (result, flags)
}

fn bit<T: Int>(value: T, n: u32) -> bool {
    value.into() >> n & 1 != 0
}

fn msb<T: Int>(value: T) -> bool {
    bit(value, T::BITS - 1)
}

/// SHL.
pub(crate) struct Shl;
impl Shift for Shl {
    #[inline(always)]
    fn apply<T: Int>(a: T, count: u32, _flags: LazyFlags) -> (T, LazyFlags) {
        let wide = u128::from(a.into()) << count;
        let result = T::truncate(wide as u64);
        let cf = wide >> T::BITS & 1 != 0;
        with_cf_of(result, cf, cf ^ msb(result))
    }
}

/// SHR.
pub(crate) struct Shr;
impl Shift for Shr {
    #[inline(always)]
    fn apply<T: Int>(a: T, count: u32, _flags: LazyFlags) -> (T, LazyFlags) {
        let value: u64 = a.into();
        let result = T::truncate(value >> count);
        let cf = value >> (count - 1) & 1 != 0;
        // OF of a one-bit shift is the old sign; the same expression holds for longer ones on
        // the processors that define it.
        with_cf_of(
            result,
            cf,
            msb(result) ^ (T::BITS >= 2 && bit(result, T::BITS - 2)),
        )
    }
}

/// SAR.
pub(crate) struct Sar;
impl Shift for Sar {
    #[inline(always)]
    fn apply<T: Int>(a: T, count: u32, _flags: LazyFlags) -> (T, LazyFlags) {
        let value = a.sign_extend() as i64;
        let cf = value >> (count - 1) & 1 != 0;
        with_cf_of(T::truncate((value >> count) as u64), cf, false)
    }
}

/// ROL.
pub(crate) struct Rol;
impl Shift for Rol {
    #[inline(always)]
    fn apply<T: Int>(a: T, count: u32, flags: LazyFlags) -> (T, LazyFlags) {
        let value: u64 = a.into();
        let n = count % T::BITS;
        let result = if n == 0 {
            a
        } else {
            T::truncate(value << n | value >> (T::BITS - n))
        };
        let cf = bit(result, 0);
        rotated(result, flags, cf, cf ^ msb(result))
    }
}

/// ROR.
pub(crate) struct Ror;
impl Shift for Ror {
    #[inline(always)]
    fn apply<T: Int>(a: T, count: u32, flags: LazyFlags) -> (T, LazyFlags) {
        let value: u64 = a.into();
        let n = count % T::BITS;
        let result = if n == 0 {
            a
        } else {
            T::truncate(value >> n | value << (T::BITS - n))
        };
        rotated(
            result,
            flags,
            msb(result),
            msb(result) ^ bit(result, T::BITS - 2),
        )
    }
}

/// RCL.
pub(crate) struct Rcl;
impl Shift for Rcl {
    #[inline(always)]
    fn apply<T: Int>(a: T, count: u32, flags: LazyFlags) -> (T, LazyFlags) {
        let bits = T::BITS + 1;
        let n = count % bits;
        if n == 0 {
            // A count that is a multiple of the width leaves the operand and CF, not OF.
            let cf = flags.carry_flag();
            return rotated(a, flags, cf, cf ^ msb(a));
        }
        let wide = u128::from(a.into()) | u128::from(flags.carry_flag()) << T::BITS;
        let wide = (wide << n | wide >> (bits - n)) & ((1 << bits) - 1);
        let (result, cf) = (T::truncate(wide as u64), wide >> T::BITS & 1 != 0);
        rotated(result, flags, cf, cf ^ msb(result))
    }
}

/// RCR.
pub(crate) struct Rcr;
impl Shift for Rcr {
    #[inline(always)]
    fn apply<T: Int>(a: T, count: u32, flags: LazyFlags) -> (T, LazyFlags) {
        let bits = T::BITS + 1;
        let n = count % bits;
        if n == 0 {
            let cf = flags.carry_flag();
            return rotated(a, flags, cf, msb(a) ^ bit(a, T::BITS - 2));
        }
        let wide = u128::from(a.into()) | u128::from(flags.carry_flag()) << T::BITS;
        let wide = (wide >> n | wide << (bits - n)) & ((1 << bits) - 1);
        let (result, cf) = (T::truncate(wide as u64), wide >> T::BITS & 1 != 0);
        rotated(result, flags, cf, msb(result) ^ bit(result, T::BITS - 2))
    }
}

#[inline(always)]
fn mask<T: Int>() -> u32 {
    if T::BITS == 64 { 63 } else { 31 }
}

#[inline(always)]
fn shift<S: Shift, T: Int>(cpu: &mut Vcpu, op: &Op, count: u32) -> Flow {
    let count = count & mask::<T>();
    if op.flags & flag::MEMORY != 0 {
        let before = cpu.state.flags;
        let flags = attempt!(cpu.update(op, |a: T| {
            if count == 0 {
                (a, before)
            } else {
                S::apply(a, count, before)
            }
        }));
        cpu.state.flags = flags;
    } else if count != 0 {
        let (result, flags) = S::apply(cpu.reg::<T>(op.dst), count, cpu.state.flags);
        cpu.state.flags = flags;
        cpu.set_reg(op.dst, result);
    } else {
        // A 32-bit destination is zero-extended even so.
        let same = cpu.reg::<T>(op.dst);
        cpu.set_reg(op.dst, same);
    }
    Flow::Next
}

/// Shift or rotate by an immediate.
pub(crate) fn by_imm<S: Shift, T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    shift::<S, T>(cpu, op, op.imm as u32)
}

/// Shift or rotate by CL.
pub(crate) fn by_cl<S: Shift, T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let count = cpu.reg::<u8>(8).into();
    shift::<S, T>(cpu, op, count)
}

fn double<T: Int>(a: T, b: T, count: u32, left: bool) -> (T, LazyFlags) {
    let (x, y) = (u128::from(a.into()), u128::from(b.into()));
    let bits = T::BITS;
    // Counts above the width (16-bit operands only) rotate through both operands again.
    let (result, cf) = if left {
        let wide = x << (2 * bits) | y << bits | x;
        let shifted = wide << count;
        (
            T::truncate((shifted >> (2 * bits)) as u64),
            shifted >> (3 * bits) & 1 != 0,
        )
    } else {
        let wide = x << (2 * bits) | y << bits | x;
        (
            T::truncate((wide >> count) as u64),
            wide >> (count - 1) & 1 != 0,
        )
    };
    with_cf_of(result, cf, msb(result) ^ msb(a))
}

fn double64(a: u64, b: u64, count: u32, left: bool) -> (u64, LazyFlags) {
    let (result, cf) = if left {
        (a << count | b >> (64 - count), a >> (64 - count) & 1 != 0)
    } else {
        (a >> count | b << (64 - count), a >> (count - 1) & 1 != 0)
    };
    with_cf_of(result, cf, msb(result) ^ msb(a))
}

fn double_shift<T: Int>(cpu: &mut Vcpu, op: &Op, count: u32) -> Flow {
    let count = count & mask::<T>();
    let b = cpu.reg::<T>(op.src);
    let left = op.aux == 0;
    let before = cpu.state.flags;
    let compute = |a: T| {
        if count == 0 {
            (a, before)
        } else if T::BITS == 64 {
            let (result, flags) = double64(a.into(), b.into(), count, left);
            (T::truncate(result), flags)
        } else {
            double(a, b, count, left)
        }
    };
    let flags = if op.flags & flag::MEMORY != 0 {
        attempt!(cpu.update(op, compute))
    } else {
        let (result, flags) = compute(cpu.reg::<T>(op.dst));
        cpu.set_reg(op.dst, result);
        flags
    };
    cpu.state.flags = flags;
    Flow::Next
}

/// SHLD (`aux` 0) and SHRD (`aux` 1) by an immediate; the second operand is in `src`.
pub(crate) fn double_imm<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    double_shift::<T>(cpu, op, op.imm as u32)
}

/// SHLD and SHRD by CL.
pub(crate) fn double_cl<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let count = cpu.reg::<u8>(8).into();
    double_shift::<T>(cpu, op, count)
}

/// SARX (`aux` 0), SHLX (1), SHRX (2): `dst = shift(r/m, imm-less count register)`. The count's
/// register offset is in `aux2`, a register source in `src`.
pub(crate) fn shift_without_flags<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value = attempt!(cpu.load_rm_src::<T>(op));
    let count = cpu.reg::<u8>(op.aux2) as u32 & mask::<T>();
    let result = match op.aux {
        0 => (value.sign_extend() as i64 >> count) as u64,
        1 => value.into() << count,
        _ => value.into() >> count,
    };
    cpu.set_reg(op.dst, T::truncate(result));
    Flow::Next
}

/// RORX by an immediate.
pub(crate) fn rorx<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value: u64 = attempt!(cpu.load_rm_src::<T>(op)).into();
    let n = op.imm as u32 & mask::<T>();
    let result = if n == 0 {
        value
    } else {
        value >> n | value << (T::BITS - n)
    };
    cpu.set_reg(op.dst, T::truncate(result));
    Flow::Next
}

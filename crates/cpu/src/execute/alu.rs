//! Two-operand arithmetic and logic, INC, DEC, NEG, NOT, and the flags they set.

use super::attempt;
use crate::memory::Int;
use crate::op::{Flow, Op};
use crate::state::LazyFlags;
use crate::vcpu::Vcpu;

impl LazyFlags {
    /// CF.
    #[inline(always)]
    pub(crate) fn carry_flag(&self) -> bool {
        (self.carry as i64) < 0
    }

    /// The flags of a result with its carry-out vector (unshifted, low bits).
    #[inline(always)]
    pub(crate) fn of<T: Int>(result: T, carry: u64) -> LazyFlags {
        let result = result.sign_extend();
        // Bit 3 keeps the carry out of the low nibble; at 64 bits the shift leaves it there.
        let carry = carry << (64 - T::BITS) | carry & 8;
        LazyFlags {
            result,
            carry,
            sign_parity: result,
        }
    }

    /// The flags of a logical result: CF, OF and AF clear.
    #[inline(always)]
    pub(crate) fn logic<T: Int>(result: T) -> LazyFlags {
        let result = result.sign_extend();
        LazyFlags {
            result,
            carry: 0,
            sign_parity: result,
        }
    }

    /// Sets CF and OF, clears AF.
    #[inline(always)]
    pub(crate) fn set_carry_overflow(&mut self, cf: bool, of: bool) {
        self.carry = u64::from(cf) << 63 | u64::from(cf ^ of) << 62;
    }

    /// Sets CF alone.
    #[inline(always)]
    pub(crate) fn set_carry(&mut self, cf: bool) {
        let of = (self.carry >> 63 ^ self.carry >> 62) & 1;
        let cf = u64::from(cf);
        self.carry = cf << 63 | (cf ^ of) << 62 | self.carry & 8;
    }
}

/// A two-operand operation.
pub(crate) trait Binary {
    /// Whether the result is written back.
    const WRITES: bool = true;
    /// Computes the result and its flags.
    fn apply<T: Int>(a: T, b: T, flags: &LazyFlags) -> (T, LazyFlags);
}

#[inline(always)]
fn add<T: Int>(a: T, b: T, carry_in: u64) -> (T, LazyFlags) {
    let (a, b): (u64, u64) = (a.into(), b.into());
    let sum = a.wrapping_add(b).wrapping_add(carry_in);
    let carry = a & b | (a | b) & !sum;
    let result = T::truncate(sum);
    (result, LazyFlags::of(result, carry))
}

#[inline(always)]
fn subtract<T: Int>(a: T, b: T, borrow_in: u64) -> (T, LazyFlags) {
    let (a, b): (u64, u64) = (a.into(), b.into());
    let difference = a.wrapping_sub(b).wrapping_sub(borrow_in);
    let borrow = !a & b | (!a | b) & difference;
    let result = T::truncate(difference);
    (result, LazyFlags::of(result, borrow))
}

macro_rules! binary {
    ($name:ident, $writes:literal, |$a:ident, $b:ident, $flags:ident| $body:expr) => {
        #[doc = concat!(stringify!($name), ".")]
        pub(crate) struct $name;
        impl Binary for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn apply<T: Int>($a: T, $b: T, $flags: &LazyFlags) -> (T, LazyFlags) {
                $body
            }
        }
    };
}

#[inline(always)]
fn logic<T: Int>(value: u64) -> (T, LazyFlags) {
    let result = T::truncate(value);
    (result, LazyFlags::logic(result))
}

binary!(Add, true, |a, b, _f| add(a, b, 0));
binary!(Adc, true, |a, b, f| add(a, b, f.carry >> 63));
binary!(Sub, true, |a, b, _f| subtract(a, b, 0));
binary!(Sbb, true, |a, b, f| subtract(a, b, f.carry >> 63));
binary!(Cmp, false, |a, b, _f| subtract(a, b, 0));
binary!(And, true, |a, b, _f| logic(a.into() & b.into()));
binary!(Or, true, |a, b, _f| logic(a.into() | b.into()));
binary!(Xor, true, |a, b, _f| logic(a.into() ^ b.into()));
binary!(Test, false, |a, b, _f| logic(a.into() & b.into()));

/// A one-operand operation.
pub(crate) trait Unary {
    /// Computes the result and its flags.
    fn apply<T: Int>(a: T, flags: &LazyFlags) -> (T, LazyFlags);
}

macro_rules! unary {
    ($name:ident, |$a:ident, $flags:ident| $body:expr) => {
        #[doc = concat!(stringify!($name), ".")]
        pub(crate) struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn apply<T: Int>($a: T, $flags: &LazyFlags) -> (T, LazyFlags) {
                $body
            }
        }
    };
}

/// Keeps CF of `before` in the flags of INC and DEC.
#[inline(always)]
fn keep_carry<T>((result, mut flags): (T, LazyFlags), before: &LazyFlags) -> (T, LazyFlags) {
    flags.set_carry(before.carry_flag());
    (result, flags)
}

unary!(Inc, |a, f| keep_carry(add(a, T::truncate(1), 0), f));
unary!(Dec, |a, f| keep_carry(subtract(a, T::truncate(1), 0), f));
unary!(Neg, |a, _f| subtract(T::truncate(0), a, 0));
unary!(Not, |a, f| (T::truncate(!a.into()), *f));

/// `op reg, reg`.
#[inline]
pub(crate) fn reg_reg<B: Binary, T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let (result, flags) = B::apply(cpu.reg::<T>(op.dst), cpu.reg::<T>(op.src), &cpu.state.flags);
    cpu.state.flags = flags;
    if B::WRITES {
        cpu.set_reg(op.dst, result);
    }
    Flow::Next
}

/// `op reg, imm`.
#[inline]
pub(crate) fn reg_imm<B: Binary, T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let (result, flags) = B::apply(cpu.reg::<T>(op.dst), T::truncate(op.imm), &cpu.state.flags);
    cpu.state.flags = flags;
    if B::WRITES {
        cpu.set_reg(op.dst, result);
    }
    Flow::Next
}

/// `op reg, mem`.
#[inline]
pub(crate) fn reg_mem<B: Binary, T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let b = attempt!(cpu.load::<T>(op));
    let (result, flags) = B::apply(cpu.reg::<T>(op.dst), b, &cpu.state.flags);
    cpu.state.flags = flags;
    if B::WRITES {
        cpu.set_reg(op.dst, result);
    }
    Flow::Next
}

#[inline(always)]
fn mem<B: Binary, T: Int>(cpu: &mut Vcpu, op: &Op, b: T) -> Flow {
    let before = cpu.state.flags;
    let flags = if B::WRITES {
        attempt!(cpu.update(op, |a: T| B::apply(a, b, &before)))
    } else {
        let a = attempt!(cpu.load::<T>(op));
        B::apply(a, b, &before).1
    };
    cpu.state.flags = flags;
    Flow::Next
}

/// `op mem, reg`; the register is in `src`.
pub(crate) fn mem_reg<B: Binary, T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let b = cpu.reg::<T>(op.src);
    mem::<B, T>(cpu, op, b)
}

/// `op mem, imm`.
#[inline]
pub(crate) fn mem_imm<B: Binary, T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    mem::<B, T>(cpu, op, T::truncate(op.imm))
}

/// `op reg`.
#[inline]
pub(crate) fn unary_reg<U: Unary, T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let (result, flags) = U::apply(cpu.reg::<T>(op.dst), &cpu.state.flags);
    cpu.state.flags = flags;
    cpu.set_reg(op.dst, result);
    Flow::Next
}

/// `op mem`.
pub(crate) fn unary_mem<U: Unary, T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let before = cpu.state.flags;
    cpu.state.flags = attempt!(cpu.update(op, |a: T| U::apply(a, &before)));
    Flow::Next
}

/// Shapes of operations that a Jcc often follows, for [`super::control::step_jcc`].
pub(crate) mod shape {
    use super::*;
    use crate::execute::control::Step;
    use core::marker::PhantomData;

    macro_rules! shapes {
        ($($name:ident $operation:ident $function:ident)*) => {$(
            #[doc = concat!("[`", stringify!($function), "`] as a type.")]
            pub(crate) struct $name<O, T>(PhantomData<(O, T)>);
            impl<O: $operation, T: Int> Step for $name<O, T> {
                #[inline(always)]
                fn step(cpu: &mut Vcpu, op: &Op) -> Flow {
                    $function::<O, T>(cpu, op)
                }
            }
        )*};
    }

    shapes! {
        RegReg Binary reg_reg
        RegImm Binary reg_imm
        RegMem Binary reg_mem
        MemImm Binary mem_imm
        UnaryReg Unary unary_reg
    }
}

/// XADD; the r/m operand is memory or `dst`, the register `src`.
pub(crate) fn xadd<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let b = cpu.reg::<T>(op.src);
    if op.flags & crate::op::flag::MEMORY != 0 {
        let (old, flags) = attempt!(cpu.update(op, |a: T| {
            let (sum, flags) = add(a, b, 0);
            (sum, (a, flags))
        }));
        cpu.set_reg(op.src, old);
        cpu.state.flags = flags;
    } else {
        let a = cpu.reg::<T>(op.dst);
        let (sum, flags) = add(a, b, 0);
        cpu.set_reg(op.src, a);
        cpu.set_reg(op.dst, sum);
        cpu.state.flags = flags;
    }
    Flow::Next
}

/// CMPXCHG; the r/m operand is memory or `dst`, the register `src`.
pub(crate) fn cmpxchg<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let expected = cpu.reg::<T>(0);
    let new = cpu.reg::<T>(op.src);
    let found = if op.flags & crate::op::flag::MEMORY != 0 {
        // The processor writes in both cases.
        attempt!(cpu.update(op, |a: T| (if a == expected { new } else { a }, a)))
    } else {
        cpu.reg::<T>(op.dst)
    };
    cpu.state.flags = subtract(expected, found, 0).1;
    if found == expected {
        if op.flags & crate::op::flag::MEMORY == 0 {
            cpu.set_reg(op.dst, new);
        }
    } else {
        cpu.set_reg(0, found);
    }
    Flow::Next
}

/// ADCX and ADOX: add with one flag as carry in and out, the others untouched. `aux` is 1 for
/// ADOX.
pub(crate) fn adx<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let b: u64 = attempt!(cpu.load_rm_src::<T>(op)).into();
    let a: u64 = cpu.reg::<T>(op.dst).into();
    let status = cpu.state.flags.status();
    let bit = if op.aux == 1 { 11 } else { 0 };
    let sum = u128::from(a) + u128::from(b) + u128::from(status >> bit & 1);
    let carry = (sum >> T::BITS) as u64 & 1;
    cpu.set_reg(op.dst, T::truncate(sum as u64));
    cpu.state.flags = LazyFlags::from_status(status & !(1 << bit) | carry << bit);
    Flow::Next
}

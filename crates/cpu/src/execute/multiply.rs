//! MUL, IMUL, DIV, IDIV, MULX, and the decimal adjustments.

use super::attempt;
use crate::memory::Int;
use crate::op::{Flow, Op};
use crate::state::LazyFlags;
use crate::vcpu::Vcpu;
use arch::control_registers::Rflags;
use arch::exception::Exception;

const RAX: u8 = 0;
const RDX: u8 = 16;
const AH: u8 = 1;

impl Vcpu {
    /// Writes a double-width product to AX or rDX:rAX.
    fn set_product<T: Int>(&mut self, product: u128) {
        if T::BITS == 8 {
            self.set_reg(RAX, product as u16);
            return;
        }
        self.set_reg(RAX, T::truncate(product as u64));
        self.set_reg(RDX, T::truncate((product >> T::BITS) as u64));
    }

    /// The double-width dividend.
    fn dividend<T: Int>(&self) -> u128 {
        if T::BITS == 8 {
            return self.reg::<u16>(RAX).into();
        }
        let high: u64 = self.reg::<T>(RDX).into();
        let low: u64 = self.reg::<T>(RAX).into();
        u128::from(high) << T::BITS | u128::from(low)
    }

    fn set_quotient<T: Int>(&mut self, quotient: u64, remainder: u64) {
        self.set_reg(RAX, T::truncate(quotient));
        self.set_reg(if T::BITS == 8 { AH } else { RDX }, T::truncate(remainder));
    }
}

/// Flags of a product: SF and PF from the low half, CF and OF when the high half matters.
fn product_flags<T: Int>(low: u64, overflow: bool) -> LazyFlags {
    let mut flags = LazyFlags::logic(T::truncate(low));
    flags.set_carry_overflow(overflow, overflow);
    flags
}

/// MUL of rAX by the r/m operand.
pub(crate) fn mul<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let b: u64 = attempt!(cpu.load_rm::<T>(op)).into();
    let a: u64 = cpu.reg::<T>(RAX).into();
    let product = u128::from(a) * u128::from(b);
    cpu.set_product::<T>(product);
    cpu.state.flags = product_flags::<T>(product as u64, product >> T::BITS != 0);
    Flow::Next
}

fn signed_product<T: Int>(a: T, b: T) -> (i128, bool) {
    let product = i128::from(a.sign_extend() as i64) * i128::from(b.sign_extend() as i64);
    let low = T::truncate(product as u64).sign_extend() as i64;
    (product, product != i128::from(low))
}

/// IMUL of rAX by the r/m operand.
pub(crate) fn imul1<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let b = attempt!(cpu.load_rm::<T>(op));
    let (product, overflow) = signed_product(cpu.reg::<T>(RAX), b);
    cpu.set_product::<T>(product as u128);
    cpu.state.flags = product_flags::<T>(product as u64, overflow);
    Flow::Next
}

/// `IMUL reg, r/m`; a register source is in `src`.
pub(crate) fn imul2<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let b = attempt!(cpu.load_rm_src::<T>(op));
    let (product, overflow) = signed_product(cpu.reg::<T>(op.dst), b);
    cpu.set_reg(op.dst, T::truncate(product as u64));
    cpu.state.flags = product_flags::<T>(product as u64, overflow);
    Flow::Next
}

/// `IMUL reg, r/m, imm`.
pub(crate) fn imul3<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let a = attempt!(cpu.load_rm_src::<T>(op));
    let (product, overflow) = signed_product(a, T::truncate(op.imm));
    cpu.set_reg(op.dst, T::truncate(product as u64));
    cpu.state.flags = product_flags::<T>(product as u64, overflow);
    Flow::Next
}

/// `MULX high, low, r/m`; the high destination is `dst`, the low one `aux2`.
pub(crate) fn mulx<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let b: u64 = attempt!(cpu.load_rm_src::<T>(op)).into();
    let a: u64 = cpu.reg::<T>(RDX).into();
    let product = u128::from(a) * u128::from(b);
    cpu.set_reg(op.aux2, T::truncate(product as u64));
    cpu.set_reg(op.dst, T::truncate((product >> T::BITS) as u64));
    Flow::Next
}

/// DIV of rDX:rAX by the r/m operand.
pub(crate) fn div<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let divisor: u64 = attempt!(cpu.load_rm::<T>(op)).into();
    let dividend = cpu.dividend::<T>();
    if divisor == 0 || dividend >> T::BITS >= u128::from(divisor) {
        cpu.raise(Exception::DivideError);
        return Flow::Stop;
    }
    if T::BITS <= 32 {
        let dividend = dividend as u64;
        cpu.set_quotient::<T>(dividend / divisor, dividend % divisor);
    } else {
        let divisor = u128::from(divisor);
        cpu.set_quotient::<T>((dividend / divisor) as u64, (dividend % divisor) as u64);
    }
    Flow::Next
}

/// IDIV of rDX:rAX by the r/m operand.
pub(crate) fn idiv<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let divisor = i128::from(attempt!(cpu.load_rm::<T>(op)).sign_extend() as i64);
    let raw = cpu.dividend::<T>();
    let unused = 128 - 2 * T::BITS;
    let dividend = (raw << unused) as i128 >> unused;
    let quotient = if divisor == 0 {
        None
    } else {
        dividend.checked_div(divisor)
    };
    let fits = |q: i128| q == i128::from(T::truncate(q as u64).sign_extend() as i64);
    match quotient {
        Some(quotient) if fits(quotient) => {
            cpu.set_quotient::<T>(quotient as u64, (dividend % divisor) as u64);
            Flow::Next
        }
        _ => {
            cpu.raise(Exception::DivideError);
            Flow::Stop
        }
    }
}

impl Vcpu {
    fn set_decimal_flags(&mut self, al: u8, af: bool, cf: bool) {
        let mut flags = LazyFlags::logic(al);
        flags.set_carry_overflow(cf, false);
        flags.carry |= u64::from(af) << 3;
        self.state.flags = flags;
    }
}

/// DAA (`aux` 0) and DAS (`aux` 1).
pub(crate) fn decimal_adjust(cpu: &mut Vcpu, op: &Op) -> Flow {
    let status = Rflags::from_bits_retain(cpu.state.flags.status());
    let (old, old_cf) = (cpu.reg::<u8>(RAX), status.contains(Rflags::CF));
    let subtract = op.aux == 1;
    let adjust = |al: u8, by: u8| {
        if subtract {
            al.wrapping_sub(by)
        } else {
            al.wrapping_add(by)
        }
    };
    let mut al = old;
    let mut cf = false;
    let af = old & 0xf > 9 || status.contains(Rflags::AF);
    if af {
        cf = old_cf || if subtract { old < 6 } else { old > 0xf9 };
        al = adjust(al, 6);
    }
    if old > 0x99 || old_cf {
        al = adjust(al, 0x60);
        cf = true;
    } else if !subtract {
        cf = false;
    }
    cpu.set_reg(RAX, al);
    cpu.set_decimal_flags(al, af, cf);
    Flow::Next
}

/// AAA (`aux` 0) and AAS (`aux` 1).
pub(crate) fn ascii_adjust(cpu: &mut Vcpu, op: &Op) -> Flow {
    let status = Rflags::from_bits_retain(cpu.state.flags.status());
    let ax = cpu.reg::<u16>(RAX);
    let adjust = ax & 0xf > 9 || status.contains(Rflags::AF);
    let ax = match (adjust, op.aux) {
        (false, _) => ax,
        (true, 0) => ax.wrapping_add(0x106),
        (true, _) => ax.wrapping_sub(6).wrapping_sub(0x100),
    } & 0xff0f;
    cpu.set_reg(RAX, ax);
    cpu.set_decimal_flags(ax as u8, adjust, adjust);
    Flow::Next
}

/// AAM by an immediate base.
pub(crate) fn aam(cpu: &mut Vcpu, op: &Op) -> Flow {
    let base = op.imm as u8;
    if base == 0 {
        cpu.raise(Exception::DivideError);
        return Flow::Stop;
    }
    let al = cpu.reg::<u8>(RAX);
    cpu.set_reg(AH, al / base);
    cpu.set_reg(RAX, al % base);
    cpu.state.flags = LazyFlags::logic(al % base);
    Flow::Next
}

/// AAD by an immediate base.
pub(crate) fn aad(cpu: &mut Vcpu, op: &Op) -> Flow {
    let (al, ah) = (cpu.reg::<u8>(RAX), cpu.reg::<u8>(AH));
    let result = al.wrapping_add(ah.wrapping_mul(op.imm as u8));
    cpu.set_reg(RAX, u16::from(result));
    cpu.state.flags = LazyFlags::logic(result);
    Flow::Next
}

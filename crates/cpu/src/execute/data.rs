//! Moves, conditional moves, exchanges, extensions, LEA, and single-flag instructions.

use super::attempt;
use crate::memory::Int;
use crate::op::{Flow, Op, flag};
use crate::state::LazyFlags;
use crate::vcpu::Vcpu;
use arch::control_registers::Rflags;

impl Vcpu {
    /// Whether condition `C` (the low four bits of Jcc's opcode) holds.
    #[inline(always)]
    pub(crate) fn condition<const C: u8>(&self) -> bool {
        let flags = &self.state.flags;
        let sign = || (flags.sign_parity as i64) < 0;
        let zero = || flags.result == 0;
        let overflow = || ((flags.carry ^ flags.carry << 1) as i64) < 0;
        let holds = match C >> 1 {
            0 => overflow(),
            1 => flags.carry_flag(),
            2 => zero(),
            3 => flags.carry_flag() || zero(),
            4 => sign(),
            5 => (flags.sign_parity as u8).count_ones() & 1 == 0,
            6 => sign() != overflow(),
            _ => zero() || sign() != overflow(),
        };
        holds != (C & 1 != 0)
    }
}

/// `MOV reg, reg`.
pub(crate) fn mov_reg_reg<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value = cpu.reg::<T>(op.src);
    cpu.set_reg(op.dst, value);
    Flow::Next
}

/// `MOV reg, imm`.
pub(crate) fn mov_reg_imm<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    cpu.set_reg(op.dst, T::truncate(op.imm));
    Flow::Next
}

/// `MOV reg, mem`.
pub(crate) fn mov_reg_mem<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value = attempt!(cpu.load::<T>(op));
    cpu.set_reg(op.dst, value);
    Flow::Next
}

/// `MOV mem, reg`.
pub(crate) fn mov_mem_reg<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value = cpu.reg::<T>(op.src);
    cpu.store(op, value).into()
}

/// `MOV mem, imm`.
pub(crate) fn mov_mem_imm<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    cpu.store(op, T::truncate(op.imm)).into()
}

/// MOVZX from `S` to `D`.
pub(crate) fn movzx<S: Int, D: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value = attempt!(cpu.load_rm_src::<S>(op));
    cpu.set_reg(op.dst, D::truncate(value.into()));
    Flow::Next
}

/// MOVSX and MOVSXD from `S` to `D`.
pub(crate) fn movsx<S: Int, D: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value = attempt!(cpu.load_rm_src::<S>(op));
    cpu.set_reg(op.dst, D::truncate(value.sign_extend()));
    Flow::Next
}

/// MOVBE from memory.
pub(crate) fn movbe_load<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value: u64 = attempt!(cpu.load::<T>(op)).into();
    cpu.set_reg(op.dst, T::truncate(value.swap_bytes() >> (64 - T::BITS)));
    Flow::Next
}

/// MOVBE to memory.
pub(crate) fn movbe_store<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value: u64 = cpu.reg::<T>(op.src).into();
    cpu.store(op, T::truncate(value.swap_bytes() >> (64 - T::BITS)))
        .into()
}

/// LEA.
pub(crate) fn lea<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let mut address = cpu.effective(op);
    if op.flags & flag::ADDRESS_32 != 0 {
        address &= 0xffff_ffff;
    } else if op.flags & flag::ADDRESS_16 != 0 {
        address &= 0xffff;
    }
    cpu.set_reg(op.dst, T::truncate(address));
    Flow::Next
}

/// XCHG of two registers.
pub(crate) fn xchg_reg<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let (a, b) = (cpu.reg::<T>(op.dst), cpu.reg::<T>(op.src));
    cpu.set_reg(op.dst, b);
    cpu.set_reg(op.src, a);
    Flow::Next
}

/// XCHG with memory: always locked.
pub(crate) fn xchg_mem<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let new = cpu.reg::<T>(op.src);
    let old = attempt!(cpu.update(op, |a: T| (new, a)));
    cpu.set_reg(op.src, old);
    Flow::Next
}

/// BSWAP. The 16-bit form is undefined; it clears the register, as processors do.
pub(crate) fn bswap<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value: u64 = cpu.reg::<T>(op.dst).into();
    let swapped = if T::BITS == 16 {
        0
    } else {
        value.swap_bytes() >> (64 - T::BITS)
    };
    cpu.set_reg(op.dst, T::truncate(swapped));
    Flow::Next
}

/// CBW, CWDE, CDQE: sign-extends the low half of rAX (`S`) into rAX (`D`).
pub(crate) fn extend_rax<S: Int, D: Int>(cpu: &mut Vcpu, _op: &Op) -> Flow {
    let value = cpu.reg::<S>(0);
    cpu.set_reg(0, D::truncate(value.sign_extend()));
    Flow::Next
}

/// CWD, CDQ, CQO: fills rDX with the sign of rAX.
pub(crate) fn extend_rdx<T: Int>(cpu: &mut Vcpu, _op: &Op) -> Flow {
    let sign = (cpu.reg::<T>(0).sign_extend() as i64 >> 63) as u64;
    cpu.set_reg(16, T::truncate(sign));
    Flow::Next
}

/// CMOVcc. The source is read whether or not the condition holds.
pub(crate) fn cmov<const C: u8, T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let source = attempt!(cpu.load_rm_src::<T>(op));
    let value = if cpu.condition::<C>() {
        source
    } else {
        cpu.reg::<T>(op.dst)
    };
    cpu.set_reg(op.dst, value);
    Flow::Next
}

/// SETcc.
pub(crate) fn setcc<const C: u8>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let value = u8::from(cpu.condition::<C>());
    cpu.store_rm(op, value).into()
}

/// XLAT.
pub(crate) fn xlat(cpu: &mut Vcpu, op: &Op) -> Flow {
    let index = u64::from(cpu.reg::<u8>(0));
    let address = attempt!(cpu.address_at(op, index, 1, false));
    let value = attempt!(cpu.read::<u8>(address, op.segment));
    cpu.set_reg(0, value);
    Flow::Next
}

/// LAHF.
pub(crate) fn lahf(cpu: &mut Vcpu, _op: &Op) -> Flow {
    let value = cpu.state.flags.status() as u8 | 2;
    cpu.set_reg(1, value);
    Flow::Next
}

/// SAHF.
pub(crate) fn sahf(cpu: &mut Vcpu, _op: &Op) -> Flow {
    let status = cpu.state.flags.status();
    let ah = u64::from(cpu.reg::<u8>(1));
    cpu.state.flags = LazyFlags::from_status(status & !0xff | ah & 0xd5);
    Flow::Next
}

/// CLC (`aux` 0), STC (1), CMC (2), SALC (3).
pub(crate) fn carry(cpu: &mut Vcpu, op: &Op) -> Flow {
    let old = cpu.state.flags.carry_flag();
    match op.aux {
        0 => cpu.state.flags.set_carry(false),
        1 => cpu.state.flags.set_carry(true),
        2 => cpu.state.flags.set_carry(!old),
        _ => cpu.set_reg(0, if old { 0xffu8 } else { 0 }),
    }
    Flow::Next
}

/// CLD (`aux` 0) and STD (1).
pub(crate) fn direction(cpu: &mut Vcpu, op: &Op) -> Flow {
    if op.aux == 0 {
        cpu.state.rflags_rest &= !Rflags::DF.bits();
    } else {
        cpu.state.rflags_rest |= Rflags::DF.bits();
    }
    Flow::Next
}

/// NOP, prefetches, cache-line flushes without effect here, ENDBR.
pub(crate) fn nop(_cpu: &mut Vcpu, _op: &Op) -> Flow {
    Flow::Next
}

/// LFENCE, MFENCE, SFENCE.
pub(crate) fn fence(_cpu: &mut Vcpu, _op: &Op) -> Flow {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Flow::Next
}

/// CLFLUSH, CLFLUSHOPT, CLWB: checked as a read of one byte; caches are coherent here.
pub(crate) fn flush_line(cpu: &mut Vcpu, op: &Op) -> Flow {
    cpu.load::<u8>(op).map(|_| ()).into()
}

/// CMPXCHG8B.
pub(crate) fn cmpxchg8b(cpu: &mut Vcpu, op: &Op) -> Flow {
    let expected = u64::from(cpu.reg::<u32>(0)) | u64::from(cpu.reg::<u32>(16)) << 32;
    let new = u64::from(cpu.reg::<u32>(24)) | u64::from(cpu.reg::<u32>(8)) << 32;
    let found = attempt!(cpu.update(op, |a: u64| (if a == expected { new } else { a }, a)));
    if found != expected {
        cpu.set_reg(0, found as u32);
        cpu.set_reg(16, (found >> 32) as u32);
    }
    set_zero_flag(cpu, found == expected);
    Flow::Next
}

/// CMPXCHG16B.
pub(crate) fn cmpxchg16b(cpu: &mut Vcpu, op: &Op) -> Flow {
    let pair = |cpu: &Vcpu, low: u8, high: u8| {
        u128::from(cpu.reg::<u64>(low)) | u128::from(cpu.reg::<u64>(high)) << 64
    };
    let expected = pair(cpu, 0, 16);
    let new = pair(cpu, 24, 8);
    let address = attempt!(cpu.address(op, 16, true));
    if address & 15 != 0 {
        cpu.general_protection();
        return Flow::Stop;
    }
    let found = attempt!(cpu.exchange_16(address, op.segment, expected, new));
    if found != expected {
        cpu.set_reg(0, found as u64);
        cpu.set_reg(16, (found >> 64) as u64);
    }
    set_zero_flag(cpu, found == expected);
    Flow::Next
}

/// Sets ZF alone.
pub(crate) fn set_zero_flag(cpu: &mut Vcpu, zero: bool) {
    let status = cpu.state.flags.status() & !Rflags::ZF.bits();
    let zf = if zero { Rflags::ZF.bits() } else { 0 };
    cpu.state.flags = LazyFlags::from_status(status | zf);
}

/// `MOV rAX, [imm64]`.
pub(crate) fn load_absolute<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let address = op
        .imm
        .wrapping_add(cpu.state.segment_bases[op.segment as usize]);
    let value = attempt!(cpu.read::<T>(address, op.segment));
    cpu.set_reg(0, value);
    Flow::Next
}

/// `MOV [imm64], rAX`.
pub(crate) fn store_absolute<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let address = op
        .imm
        .wrapping_add(cpu.state.segment_bases[op.segment as usize]);
    let value = cpu.reg::<T>(0);
    cpu.write(address, op.segment, value).into()
}

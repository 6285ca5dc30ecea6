//! Random user-level instructions and states.

use super::{CODE, DATA, DATA_LEN, State};
use arch::cpuid::Features;
use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register,
};

/// xorshift64*: small, seedable, good enough.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A value that is likely to be near an edge.
    fn interesting(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(256),
            1 => self.below(64).wrapping_neg(),
            2 => 1 << self.below(64),
            3 => (1u64 << self.below(64)).wrapping_sub(1),
            _ => self.next(),
        }
    }
}

/// Random bytes that look like an instruction.
fn bytes(random: &mut Random) -> [u8; 15] {
    let mut out = [0; 15];
    for byte in &mut out {
        *byte = random.next() as u8;
    }
    let mut at = 0;
    let mut put = |byte: u8, out: &mut [u8; 15]| {
        out[at] = byte;
        at += 1;
    };
    let vex = random.below(4) == 0;
    if vex {
        if random.below(2) == 0 {
            put(0xc5, &mut out);
            put(random.next() as u8, &mut out);
        } else {
            put(0xc4, &mut out);
            put(
                random.next() as u8 & 0xe0 | (1 + random.below(3) as u8),
                &mut out,
            );
            put(random.next() as u8, &mut out);
        }
        return out;
    }
    let prefix = random.pick(&[0u8, 0, 0, 0x66, 0x66, 0xf2, 0xf3, 0xf0]);
    if prefix != 0 {
        put(prefix, &mut out);
        if random.below(12) == 0 {
            put(random.pick(&[0x66, 0x67, 0x67, 0xf2, 0xf3]), &mut out);
        }
    }
    if random.below(2) == 0 {
        put(0x40 | random.below(16) as u8, &mut out);
    }
    match random.below(8) {
        0..=2 => {}
        3..=5 => put(0x0f, &mut out),
        6 => {
            put(0x0f, &mut out);
            put(0x38, &mut out);
        }
        _ => {
            put(0x0f, &mut out);
            put(0x3a, &mut out);
        }
    }
    // An x87 escape now and then.
    if random.below(12) == 0 {
        out = [0; 15];
        out[0] = 0xd8 + random.below(8) as u8;
        for byte in &mut out[1..] {
            *byte = random.next() as u8;
        }
    }
    out
}

/// Whether the case can be compared: user-level, no transfer of control, no clock, no system
/// state, and a feature both sides have.
fn comparable(i: &Instruction, features: &Features) -> bool {
    use Mnemonic as M;
    if i.is_invalid() || i.flow_control() != iced_x86::FlowControl::Next {
        return false;
    }
    if !i.cpuid_features().iter().all(|f| offered(*f, features)) {
        return false;
    }
    if i.is_privileged() || i.segment_prefix() != Register::None {
        return false;
    }
    let excluded = matches!(
        i.mnemonic(),
        M::Rdtsc
            | M::Rdtscp
            | M::Rdpid
            | M::Rdrand
            | M::Rdseed
            | M::Cpuid
            | M::Rdpmc
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Lar
            | M::Lsl
            | M::Verr
            | M::Verw
            | M::Rdfsbase
            | M::Rdgsbase
            | M::Wrfsbase
            | M::Wrgsbase
            | M::Monitor
            | M::Mwait
            | M::Monitorx
            | M::Mwaitx
            | M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsavec
            | M::Xsavec64
            | M::Xrstor
            | M::Xrstor64
            | M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Fnstenv
            | M::Fldenv
            | M::Fnsave
            | M::Frstor
            | M::Xgetbv
            | M::Rdpkru
            | M::Wrpkru
            | M::Stac
            | M::Clac
            | M::Clzero
            | M::In
            | M::Out
            | M::Insb
            | M::Insw
            | M::Insd
            | M::Outsb
            | M::Outsw
            | M::Outsd
            | M::Lss
            | M::Lfs
            | M::Lgs
            | M::Pushf
            | M::Pushfq
            | M::Popf
            | M::Popfq
            | M::Pushfd
            | M::Popfd
            | M::Lds
            | M::Les
            | M::Cli
            | M::Sti
            | M::Rdsspd
            | M::Rdsspq
            | M::Prefetchw
            | M::Salc
    );
    let segments = (0..i.op_count()).any(|n| {
        i.op_kind(n) == OpKind::Register && {
            let r = i.op_register(n);
            r.is_segment_register() || r.is_cr() || r.is_dr()
        }
    });
    let makers_differ = super::choices::makers_differ(i);
    !excluded && !segments && !makers_differ && i.code() != Code::Int1
}

fn offered(needed: CpuidFeature, features: &Features) -> bool {
    use CpuidFeature as C;
    use arch::cpuid::Feature as F;
    let feature = match needed {
        C::INTEL8086
        | C::INTEL186
        | C::INTEL286
        | C::INTEL386
        | C::INTEL486
        | C::X64
        | C::MULTIBYTENOP
        | C::FPU
        | C::FPU287
        | C::FPU387
        | C::CMOV
        | C::PAUSE => return true,
        C::MMX => F::MMX,
        C::SSE => F::SSE,
        C::SSE2 => F::SSE2,
        C::SSE3 => F::SSE3,
        C::SSSE3 => F::SSSE3,
        C::SSE4_1 => F::SSE4_1,
        C::SSE4_2 => F::SSE4_2,
        C::PCLMULQDQ => F::PCLMULQDQ,
        C::AES => F::AES,
        C::SHA => F::SHA,
        C::AVX => F::AVX,
        C::AVX2 => F::AVX2,
        C::FMA => F::FMA,
        C::F16C => F::F16C,
        C::BMI1 => F::BMI1,
        C::BMI2 => F::BMI2,
        C::ADX => F::ADX,
        C::LZCNT => F::LZCNT,
        C::POPCNT => F::POPCNT,
        C::MOVBE => F::MOVBE,
        C::CX8 => F::CX8,
        C::CMPXCHG16B => F::CX16,
        C::SSE4A => F::SSE4A,
        _ => return false,
    };
    features.has(feature)
}

/// A random instruction that can be compared, with its bytes.
pub fn instruction(random: &mut Random, features: &Features, bits: u32) -> (Instruction, Vec<u8>) {
    loop {
        let all = bytes(random);
        let mut decoder = Decoder::with_ip(bits, &all, CODE, DecoderOptions::NONE);
        let mut i = decoder.decode();
        let len = decoder.position();
        let mut bytes = all[..len].to_vec();
        if !comparable(&i, features) {
            continue;
        }
        if i.is_ip_rel_memory_operand() {
            // Into the data, most of the time.
            let at = decoder.get_constant_offsets(&i).displacement_offset();
            let target = DATA + random.below(DATA_LEN - 64);
            let displacement = target.wrapping_sub(CODE + len as u64) as u32;
            bytes[at..at + 4].copy_from_slice(&displacement.to_le_bytes());
            i = Decoder::with_ip(64, &bytes, CODE, DecoderOptions::NONE).decode();
        }
        return (i, bytes);
    }
}

/// A random state in which the instruction's memory operands lie, mostly, in the data.
pub fn state(random: &mut Random, i: &Instruction, bits: u32) -> State {
    let mut state = State::default();
    let mask = if bits == 64 { u64::MAX } else { 0xffff_ffff };
    // Where the data lies in its segment.
    let origin = if bits == 16 { 0 } else { DATA };
    for register in &mut state.gpr {
        *register = random.interesting() & mask;
    }
    state.gpr[4] = origin + DATA_LEN / 2 + 8 * random.below(64);
    state.rflags = random.next() & 0x8d5 | 2;
    if random.below(8) == 0 {
        state.rflags |= 1 << 10;
    }
    for byte in &mut state.fpu[160..416] {
        *byte = random.next() as u8;
    }
    for byte in &mut state.fpu[576..832] {
        *byte = random.next() as u8;
    }
    floats(random, &mut state.fpu);
    x87(random, &mut state.fpu);
    place(random, i, &mut state, origin);
    for register in &mut state.gpr {
        *register &= mask;
    }
    state
}

/// Floating-point values worth having, over some of the random lanes; and MXCSR.
fn floats(random: &mut Random, fpu: &mut [u8; 832]) {
    let singles = [
        0f32,
        -0.0,
        1.0,
        -1.5,
        f32::INFINITY,
        f32::NAN,
        f32::MIN_POSITIVE / 4.0,
        3e38,
    ];
    let doubles = [
        0f64,
        -0.0,
        1.0,
        2.5,
        f64::NEG_INFINITY,
        f64::NAN,
        f64::MIN_POSITIVE / 8.0,
        1e300,
    ];
    for lane in 0..64 {
        let at = 160 + 4 * lane;
        match random.below(4) {
            0 => fpu[at..at + 4].copy_from_slice(&random.pick(&singles).to_le_bytes()),
            1 if lane % 2 == 0 => {
                fpu[at..at + 8].copy_from_slice(&random.pick(&doubles).to_le_bytes());
            }
            _ => {}
        }
    }
    // Rounding, flush-to-zero, denormals-are-zero, sticky flags; now and then unmasked.
    let mut mxcsr = 0x1f80 | random.next() as u32 & 0xe07f;
    if random.below(6) == 0 {
        mxcsr = mxcsr & !0x3f | random.next() as u32 & 0x1f80;
        mxcsr &= !0x1f80 | random.next() as u32;
    }
    fpu[24..28].copy_from_slice(&mxcsr.to_le_bytes());
}

fn x87(random: &mut Random, fpu: &mut [u8; 832]) {
    let fcw = 0x37f & !(0x300 & random.next() as u16) | random.next() as u16 & 0xc00;
    // Precision control 1 is reserved.
    let fcw = if fcw & 0x300 == 0x100 {
        fcw | 0x300
    } else {
        fcw
    };
    fpu[0..2].copy_from_slice(&fcw.to_le_bytes());
    let fsw = (random.below(8) as u16) << 11 | random.next() as u16 & 0x4700;
    fpu[2..4].copy_from_slice(&fsw.to_le_bytes());
    fpu[4] = if random.below(2) == 0 {
        0xff
    } else {
        random.next() as u8
    };
    for register in 0..8 {
        let at = 32 + 16 * register;
        let (mantissa, exponent) = match random.below(5) {
            0 => (0, 0),
            1 => (1 << 63, 0x3fff),
            2 => (1 << 63 | random.next(), 0x3fff + random.below(40) as u16),
            3 => (1 << 63 | random.next(), 0x7fff),
            _ => (1 << 63 | random.next(), random.below(0x7fff) as u16),
        };
        fpu[at..at + 8].copy_from_slice(&u64::to_le_bytes(mantissa));
        let sign = (random.below(2) as u16) << 15;
        fpu[at + 8..at + 10].copy_from_slice(&(exponent | sign).to_le_bytes());
    }
}

/// Sets base, index and string registers so that memory operands lie in the data.
fn place(random: &mut Random, i: &Instruction, state: &mut State, origin: u64) {
    let wild = random.below(64) == 0;
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::Memory => place_operand(random, i, state, origin, wild),
            OpKind::MemorySegRSI | OpKind::MemorySegESI | OpKind::MemorySegSI => {
                state.gpr[6] = origin + 0x800 + random.below(DATA_LEN - 0x1000);
            }
            OpKind::MemoryESRDI
            | OpKind::MemoryESEDI
            | OpKind::MemoryESDI
            | OpKind::MemorySegRDI
            | OpKind::MemorySegEDI
            | OpKind::MemorySegDI => {
                state.gpr[7] = origin + 0x800 + random.below(DATA_LEN - 0x1000);
            }
            _ => {}
        }
    }
    if i.has_rep_prefix() || i.has_repne_prefix() {
        state.gpr[1] = random.below(20);
    }
}

fn place_operand(random: &mut Random, i: &Instruction, state: &mut State, origin: u64, wild: bool) {
    let (base, index) = (i.memory_base(), i.memory_index());
    if i.is_vsib() {
        // Indices are vectors: small ones, so that most elements lie in the data.
        for lane in 0..8 {
            for (start, n) in [(160, 16), (576, 16)] {
                let at = start + n * index.number() + 4 * (lane % 4);
                let value = if lane % 2 == 0 {
                    random.below(64) as u32
                } else {
                    0
                };
                state.fpu[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
        }
    }
    if base == Register::None || base == Register::RIP || base == Register::EIP {
        return;
    }
    if base.size() == 2 && origin != 0 {
        // 16-bit addresses reach no data of flat segments: they fault alike.
        return;
    }
    let aligned = if random.below(4) == 0 {
        random.below(64)
    } else {
        32 * random.below(4)
    };
    let mut target = origin + 0x400 + aligned + 64 * random.below(16);
    if random.below(16) == 0 {
        // Around the page boundary.
        target = origin + 0x1000 - random.below(40);
    }
    if wild {
        target = match random.below(3) {
            0 => random.next(),
            1 => origin + DATA_LEN - random.below(16),
            _ => 0x8000_0000_0000_0000 | random.next(),
        };
    }
    let mut offset = i.memory_displacement64();
    // BT and its kin reach beyond their operand by the register's bits.
    if matches!(
        i.mnemonic(),
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
    ) && i.op_kind(1) == OpKind::Register
    {
        let n = i.op_register(1).full_register().number();
        state.gpr[n] = random.below(512);
    }
    if index != Register::None && !i.is_vsib() && index.full_register() != base.full_register() {
        let n = index.full_register().number();
        state.gpr[n] = random.below(256);
        offset = offset.wrapping_add(state.gpr[n].wrapping_mul(i.memory_index_scale().into()));
    }
    let scale = if index.full_register() == base.full_register() && index != Register::None {
        1 + u64::from(i.memory_index_scale())
    } else {
        1
    };
    state.gpr[base.full_register().number()] = target.wrapping_sub(offset) / scale;
}

//! What the translator knows of an instruction before it writes anything.

use crate::decode::Unfused;
use iced_x86::{
    Code, EncodingKind, FlowControl, Instruction, InstructionInfoFactory, Mnemonic as M, OpAccess,
    OpKind, Register, RflagsBits,
};

/// How an instruction is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Itself, with operands renamed.
    Plain,
    /// Itself, after a look whether vector registers are loaded.
    Vector {
        /// It needs what AVX needs.
        avx: bool,
    },
    Nothing,
    /// A bit of a string of bits in memory, by a register.
    BitString,
    PushFlags,
    ClearInterrupts,
    SwapGs,
    Lea,
    Push,
    Pop,
    Leave,
    /// Near jumps, calls and returns.
    Jcc,
    Jump,
    Call,
    Return,
    JumpIndirect,
    CallIndirect,
    /// The interpreter's handler is called.
    Callout,
}

/// The memory operand of an instruction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operand {
    pub size: u32,
    pub write: bool,
}

/// An instruction with what follows from its form.
pub(super) struct Analysed<'a> {
    pub unfused: &'a Unfused,
    pub kind: Kind,
    pub memory: Option<Operand>,
    /// Guest registers written, as bits.
    pub written: u32,
    /// Status flags that it looks at.
    pub reads_flags: u32,
    /// Status flags that it may leave as they are although it writes others.
    pub keeps_flags: u32,
    pub writes_flags: bool,
    /// Status flags are needed behind it.
    pub live_after: bool,
    /// Status flags are needed before it, by itself too.
    pub live_before: bool,
}

pub(super) const STATUS: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

impl<'a> Analysed<'a> {
    pub(super) fn new(unfused: &'a Unfused, factory: &mut InstructionInfoFactory) -> Analysed<'a> {
        let i = &unfused.instruction;
        let mut memory = None;
        let mut written = 0;
        let info = factory.info(i);
        for n in 0..i.op_count() {
            if i.op_kind(n) == OpKind::Memory {
                memory = Some(Operand {
                    size: i.memory_size().size() as u32,
                    write: !matches!(info.op_access(n), OpAccess::Read | OpAccess::CondRead),
                });
            }
        }
        for used in info.used_registers() {
            let reads = matches!(used.access(), OpAccess::Read | OpAccess::CondRead);
            if used.register().is_gpr() && !reads {
                written |= 1 << used.register().full_register().number();
            }
        }
        let kind = if unfused.is_known {
            kind(unfused, memory)
        } else {
            Kind::Callout
        };
        let modified = i.rflags_modified() & STATUS;
        let keeps_flags = match modified {
            0 => 0,
            _ if is_conditional_shift(i) => STATUS,
            _ => STATUS & !modified,
        };
        let reads_flags = if matches!(kind, Kind::Callout | Kind::PushFlags) {
            STATUS
        } else {
            i.rflags_read() & STATUS
        };
        Analysed {
            unfused,
            kind,
            memory: if matches!(kind, Kind::Lea | Kind::Nothing) {
                None
            } else {
                memory
            },
            written,
            reads_flags,
            keeps_flags,
            writes_flags: modified != 0,
            live_after: true,
            live_before: true,
        }
    }

    pub(super) fn instruction(&self) -> &Instruction {
        &self.unfused.instruction
    }

    /// Whether it accesses the stack without naming it.
    pub(super) fn uses_stack(&self) -> bool {
        matches!(
            self.kind,
            Kind::Push
                | Kind::PushFlags
                | Kind::Pop
                | Kind::Leave
                | Kind::Call
                | Kind::Return
                | Kind::CallIndirect
        )
    }

    /// Whether it writes every status flag, whatever its operands.
    fn overwrites_flags(&self) -> bool {
        self.writes_flags && self.keeps_flags == 0
    }

    /// Whether it can end without effect, showing the flags before it.
    fn can_fault(&self) -> bool {
        match self.kind {
            Kind::Nothing | Kind::Lea | Kind::Jcc | Kind::Jump => false,
            Kind::Plain => {
                self.memory.is_some() || matches!(self.instruction().mnemonic(), M::Div | M::Idiv)
            }
            _ => true,
        }
    }

    /// Computes where flags are needed, from whether they are at the end.
    pub(super) fn find_live(all: &mut [Analysed<'_>], at_end: bool) {
        let mut live = at_end;
        for one in all.iter_mut().rev() {
            one.live_after = live;
            live = if one.reads_flags != 0 || one.can_fault() {
                true
            } else {
                live && !one.overwrites_flags()
            };
            one.live_before = live;
        }
    }

    /// What this instruction, at the start of a successor, says about the flags that reach it:
    /// needed, not needed, or unknown.
    pub(super) fn needs_flags(&self) -> Option<bool> {
        if self.reads_flags != 0 || self.can_fault() {
            Some(true)
        } else if self.overwrites_flags() {
            Some(false)
        } else {
            None
        }
    }
}

/// A shift or rotation whose count may be zero, which leaves the flags.
fn is_conditional_shift(i: &Instruction) -> bool {
    use M::*;
    let shift = matches!(
        i.mnemonic(),
        Shl | Shr | Sar | Sal | Rol | Ror | Rcl | Rcr | Shld | Shrd
    );
    let last = i.op_count().saturating_sub(1);
    shift
        && match i.op_kind(last) {
            OpKind::Immediate8 => i.immediate8() & 0x3f == 0 || i.immediate8() & 0x1f == 0,
            _ => true,
        }
}

fn kind(unfused: &Unfused, memory: Option<Operand>) -> Kind {
    let i = &unfused.instruction;
    let wide_stack = i.stack_pointer_increment().abs() == 8;
    if memory.is_some() && !has_long_address(i) {
        return Kind::Callout;
    }
    match i.mnemonic() {
        // Reserved NOPs are NOPs; their memory operands are not accessed.
        M::Nop
        | M::Reservednop
        | M::Endbr64
        | M::Endbr32
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchnta
        | M::Prefetchw => Kind::Nothing,
        M::Lea => Kind::Lea,
        M::Push if wide_stack && !is_segment(i.op_register(0)) => Kind::Push,
        M::Pop if wide_stack && is_general(i, 0) => Kind::Pop,
        M::Leave if i.code() == Code::Leaveq => Kind::Leave,
        M::Pushfq => Kind::PushFlags,
        M::Cli => Kind::ClearInterrupts,
        M::Swapgs => Kind::SwapGs,
        M::Bt | M::Bts | M::Btr | M::Btc if memory.is_some() && is_general(i, 1) => bit_string(i),
        M::Jmp | M::Call | M::Ret => branch(i),
        _ if i.flow_control() == FlowControl::ConditionalBranch => {
            if i.is_jcc_short_or_near() {
                Kind::Jcc
            } else {
                Kind::Callout
            }
        }
        m if is_plain(m) => plain(i, memory),
        _ => vector(i, memory),
    }
}

/// Whether the address of the memory operand is 64 bits wide, and its displacement 32.
fn has_long_address(i: &Instruction) -> bool {
    let is_long = |r: Register| matches!(r, Register::None | Register::RIP) || r.is_gpr64();
    let registers = [i.memory_base(), i.memory_index()];
    let has_any = registers.iter().any(|r| *r != Register::None);
    let displacement = i.memory_displacement64() as i64;
    registers.into_iter().all(is_long)
        && (has_any || i.memory_displ_size() == 8)
        && i32::try_from(displacement).is_ok()
}

fn branch(i: &Instruction) -> Kind {
    match i.flow_control() {
        FlowControl::UnconditionalBranch => Kind::Jump,
        FlowControl::Call => Kind::Call,
        FlowControl::Return if i.stack_pointer_increment() >= 8 && !i.is_far() => Kind::Return,
        FlowControl::IndirectBranch if is_near_target(i) => Kind::JumpIndirect,
        FlowControl::IndirectCall if is_near_target(i) => Kind::CallIndirect,
        _ => Kind::Callout,
    }
}

trait Far {
    fn is_far(&self) -> bool;
}

impl Far for Instruction {
    fn is_far(&self) -> bool {
        self.mnemonic() == M::Retf
    }
}

fn is_near_target(i: &Instruction) -> bool {
    i.is_jmp_near_indirect() || i.is_call_near_indirect()
}

fn is_segment(register: Register) -> bool {
    register.is_segment_register()
}

fn is_general(i: &Instruction, n: u32) -> bool {
    i.op_kind(n) == OpKind::Register && i.op_register(n).is_gpr()
}

fn is_immediate(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

fn plain(i: &Instruction, memory: Option<Operand>) -> Kind {
    let simple = (0..i.op_count())
        .all(|n| is_general(i, n) || i.op_kind(n) == OpKind::Memory || is_immediate(i.op_kind(n)));
    let sized = memory.is_none_or(|m| matches!(m.size, 1 | 2 | 4 | 8 | 16));
    if simple && sized {
        Kind::Plain
    } else {
        Kind::Callout
    }
}

/// The offset into a bit string may reach beyond its operand.
fn bit_string(i: &Instruction) -> Kind {
    if i.op_register(1).size() >= 4 {
        Kind::BitString
    } else {
        Kind::Callout
    }
}

fn vector(i: &Instruction, memory: Option<Operand>) -> Kind {
    use M::*;
    let m = i.mnemonic();
    if matches!(m, Vzeroupper | Vzeroall) {
        return Kind::Vector { avx: true };
    }
    // Elements whose mask bit is clear must not be touched.
    let masked = matches!(
        m,
        Maskmovdqu | Vmaskmovdqu | Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq
    );
    let avx = match i.encoding() {
        EncodingKind::Legacy => false,
        EncodingKind::VEX => true,
        _ => return Kind::Callout,
    };
    let is_vector = |n| {
        let r = i.op_register(n);
        i.op_kind(n) == OpKind::Register && (r.is_xmm() || r.is_ymm())
    };
    let simple = (0..i.op_count()).all(|n| {
        is_vector(n)
            || is_general(i, n)
            || i.op_kind(n) == OpKind::Memory
            || is_immediate(i.op_kind(n))
    });
    let sized = memory.is_none_or(|m| matches!(m.size, 1 | 2 | 4 | 8 | 16 | 32));
    if masked || i.is_vsib() || !simple || !sized || !(0..i.op_count()).any(is_vector) {
        return Kind::Callout;
    }
    Kind::Vector { avx }
}

/// General-purpose instructions that run as themselves.
fn is_plain(m: M) -> bool {
    use M::*;
    matches!(
        m,
        Mov | Movzx
            | Movsx
            | Movsxd
            | Add
            | Sub
            | Adc
            | Sbb
            | And
            | Or
            | Xor
            | Cmp
            | Test
            | Inc
            | Dec
            | Neg
            | Not
            | Shl
            | Shr
            | Sar
            | Sal
            | Rol
            | Ror
            | Rcl
            | Rcr
            | Shld
            | Shrd
            | Imul
            | Mul
            | Div
            | Idiv
            | Cbw
            | Cwde
            | Cdqe
            | Cwd
            | Cdq
            | Cqo
            | Bt
            | Bts
            | Btr
            | Btc
            | Bsf
            | Bsr
            | Bswap
            | Xchg
            | Xadd
            | Cmpxchg
            | Cmpxchg8b
            | Cmpxchg16b
    ) || is_set(m)
        || is_cmov(m)
        || has_host_feature(m)
}

pub(super) fn is_set(m: M) -> bool {
    use M::*;
    matches!(
        m,
        Seta | Setae
            | Setb
            | Setbe
            | Sete
            | Setg
            | Setge
            | Setl
            | Setle
            | Setne
            | Setno
            | Setnp
            | Setns
            | Seto
            | Setp
            | Sets
    )
}

pub(super) fn is_cmov(m: M) -> bool {
    use M::*;
    matches!(
        m,
        Cmova
            | Cmovae
            | Cmovb
            | Cmovbe
            | Cmove
            | Cmovg
            | Cmovge
            | Cmovl
            | Cmovle
            | Cmovne
            | Cmovno
            | Cmovnp
            | Cmovns
            | Cmovo
            | Cmovp
            | Cmovs
    )
}

/// Instructions that a host may lack although guests are offered them.
fn has_host_feature(m: M) -> bool {
    use M::*;
    match m {
        Tzcnt | Andn | Bextr | Blsi | Blsmsk | Blsr => is_x86_feature_detected!("bmi1"),
        Bzhi | Mulx | Pdep | Pext | Rorx | Sarx | Shlx | Shrx => is_x86_feature_detected!("bmi2"),
        Lzcnt => is_x86_feature_detected!("lzcnt"),
        Popcnt => is_x86_feature_detected!("popcnt"),
        Crc32 => is_x86_feature_detected!("sse4.2"),
        Movbe => is_x86_feature_detected!("movbe"),
        Adcx | Adox => is_x86_feature_detected!("adx"),
        Movnti => is_x86_feature_detected!("sse2"),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::code::CodeMode;
    use crate::decode;
    use crate::vcpu::Vcpu;

    fn kind_of(bytes: &[u8]) -> Kind {
        let features = Vcpu::host_features();
        let one = decode::peek(bytes, 0, CodeMode::Bits64, &features).next();
        Analysed::new(&one.unwrap(), &mut InstructionInfoFactory::new()).kind
    }

    #[test]
    fn frequent_instructions_need_no_handler() {
        for (bytes, expected) in [
            (&[0x0f, 0x1f, 0x44, 0, 0][..], Kind::Nothing),
            (&[0x0f, 0x0d, 0x08], Kind::Nothing),
            (&[0x0f, 0x18, 0x08], Kind::Nothing),
            (&[0xc9], Kind::Leave),
            (&[0x48, 0x8b, 0x87, 0x40, 3, 0, 0], Kind::Plain),
            (&[0x55], Kind::Push),
            (&[0xc3], Kind::Return),
            (&[0xff, 0xe0], Kind::JumpIndirect),
            (&[0xff, 0x10], Kind::CallIndirect),
            (&[0x0f, 0x01, 0xf8], Kind::SwapGs),
            (&[0x67, 0x8b, 0x00], Kind::Callout),
            (&[0x66, 0x0f, 0x6f, 0x00], Kind::Vector { avx: false }),
        ] {
            assert_eq!(kind_of(bytes), expected, "{bytes:02x?}");
        }
    }
}

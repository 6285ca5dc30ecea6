//! What processors of different makers and models choose: the one table of what the comparison
//! with the host leaves open.
//!
//! The architecture leaves some answers to the processor, and the host is only one processor. Each
//! row of [`CHOICES`] names such an answer and its source, and says for a case how far both sides
//! may differ. It says so as narrowly as it can: of two faults that an instruction has, each side
//! must report one that is there.
//!
//! Not here, because no case can see it: the accessed and dirty bits of the host's page tables and
//! descriptors, which a process does not read.

use super::native::Trap;
use super::{DATA, DATA_LEN, State};
use iced_x86::{
    Code, CodeSize, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, Register,
};
use std::ops::Range;

/// A case that ran on both sides.
pub struct Case<'a> {
    pub instruction: &'a Instruction,
    pub before: &'a State,
    /// What the data was.
    pub data: &'a [u8],
    pub native: &'a (State, Trap),
    pub guest: &'a (State, Trap),
}

/// How far the faults of both sides may differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FaultFreedom {
    /// Not at all, but for the bits of the address that are not compared.
    #[default]
    None,
    /// Each side's is one of the faults that the instruction has: vector, error code and address
    /// are not compared any more.
    Any,
}

/// How far both sides may differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Freedom {
    pub fault: FaultFreedom,
    /// Bits of a page fault's address.
    pub address: u64,
    /// Flags.
    pub flags: u64,
    /// Bytes of the extended state.
    pub extended: Vec<usize>,
    /// Bytes of the data.
    pub memory: Vec<Range<usize>>,
}

/// An answer that the architecture leaves to the processor.
struct Choice {
    what: &'static str,
    source: &'static str,
    /// Widens the freedom if the case is of this kind.
    widen: fn(&Case<'_>, &mut Freedom),
}

const CHOICES: [Choice; 12] = [
    Choice {
        what: "flags that an instruction leaves undefined",
        source: "SDM volume 2, \"Flags Affected\" of each instruction",
        widen: |case, freedom| freedom.flags |= undefined_flags(case.instruction),
    },
    Choice {
        what: "which of two operands' faults comes first (CMPS, MOVS, PUSH and POP of memory)",
        source: "SDM volume 3, \"Priority Among Concurrent Events\": faults of one class come in \
                 an order that the implementation chooses",
        widen: |case, freedom| {
            let operands = case.operands();
            let plausible = |trap: &Trap| operands.iter().any(|o| o.may_raise(trap));
            if operands.len() > 1 && plausible(&case.native.1) && plausible(&case.guest.1) {
                freedom.fault = FaultFreedom::Any;
            }
        },
    },
    Choice {
        what: "whether BOUND reads the upper bound when the index is below the lower one",
        source: "SDM volume 3, \"Priority Among Concurrent Events\"",
        widen: |case, freedom| {
            let operands = case.operands();
            let of_memory = |trap: &Trap| operands.iter().any(|o| o.may_raise(trap));
            let (native, guest) = (&case.native.1, &case.guest.1);
            let is_either =
                native.vector == 5 && of_memory(guest) || guest.vector == 5 && of_memory(native);
            if case.instruction.mnemonic() == Mnemonic::Bound && is_either {
                freedom.fault = FaultFreedom::Any;
            }
        },
    },
    Choice {
        what: "whether an operand that wraps at 4 GiB is beyond the limit, or faults by its pages",
        source: "SDM volume 3, \"Limit Checking\": with an effective limit of FFFFFFFFH such \
                 accesses may or may not cause the exceptions",
        widen: |case, freedom| {
            let wraps = |operand: &Operand| operand.bits == 32 && operand.wraps();
            let operands = case.operands();
            let plausible = |trap: &Trap| operands.iter().any(|o| wraps(o) && o.may_raise(trap));
            if plausible(&case.native.1) && plausible(&case.guest.1) {
                freedom.fault = FaultFreedom::Any;
            }
        },
    },
    Choice {
        what: "beyond the stack segment and misaligned: #SS or #GP",
        source: "SDM volume 3, \"Priority Among Concurrent Events\"",
        widen: |case, freedom| {
            let large = case.instruction.memory_size().size() >= 16;
            if large && (case.native.1.vector, case.guest.1.vector) == (13, 12) {
                freedom.fault = FaultFreedom::Any;
            }
        },
    },
    Choice {
        what: "which fault of a far transfer comes first: offset beyond the limit, CS, or SS",
        source: "SDM volume 3, \"Priority Among Concurrent Events\"; the pseudocode of IRET and \
                 RET looks at SS before the offset on Intel's processors (family 6, model 207)",
        widen: |case, freedom| {
            if case.is_far_transfer() && case.names_selector(&[case.native.1, case.guest.1]) {
                freedom.fault = FaultFreedom::Any;
            }
        },
    },
    Choice {
        what: "whether an MMX store that faults has made the x87 registers MMX's",
        source: "observed: Intel's processors have (family 6, model 207), AMD's have not",
        widen: |case, freedom| {
            if case.faulted() && case.has_entered_mmx() {
                freedom.extended.extend((0..5).chain(32..160));
            }
        },
    },
    Choice {
        what: "what an XRSTOR that refuses MXCSR has loaded before",
        source: "observed: Intel's processors all components (family 6, model 207), AMD's none",
        widen: |case, freedom| {
            let is_restore =
                [Mnemonic::Xrstor, Mnemonic::Xrstor64].contains(&case.instruction.mnemonic());
            if is_restore && [case.native.1, case.guest.1].iter().all(|t| t.vector == 13) {
                freedom.extended.extend(case.loaded_from_area());
            }
        },
    },
    Choice {
        what: "which byte of a masked store a page fault names",
        source: "SDM volume 2, \"MASKMOVDQU\": implementation-specific whether and which bytes \
                 with a zero mask fault",
        widen: |case, freedom| {
            let masked = [
                Mnemonic::Maskmovdqu,
                Mnemonic::Vmaskmovdqu,
                Mnemonic::Maskmovq,
            ];
            if masked.contains(&case.instruction.mnemonic()) {
                freedom.address |= 0xfff;
            }
        },
    },
    Choice {
        what: "elements to the left of the one whose fault ends a gather, and its mask but for the sign",
        source: "SDM volume 2, \"VPGATHERDD\": faults come from right to left, elements to the \
                 left may have been gathered already; what is not the sign of a mask's element \
                 is extended from it on Intel's processors",
        widen: |case, freedom| freedom.extended.extend(case.behind_gather_fault()),
    },
    Choice {
        what: "what a store of more than eight bytes has stored when it faults",
        source: "SDM volume 3, \"Guaranteed Atomic Operations\": x87 and SSE accesses may be \
                 several, of which some complete",
        widen: |case, freedom| {
            if case.faulted() {
                let operands = case.operands();
                let large = operands.iter().filter(|operand| operand.size > 8);
                freedom.memory.extend(large.map(Operand::in_data));
            }
        },
    },
    Choice {
        what: "whether a far call that faults at its target has pushed the return address",
        source: "observed: AMD's processors push first (family 25), Intel's do not",
        widen: |case, freedom| {
            let is_call = case.instruction.flow_control() == FlowControl::IndirectCall;
            if case.faulted() && is_call {
                let (at, size) = (case.before.gpr[4].wrapping_sub(16), 16);
                freedom.memory.push(
                    Operand {
                        at,
                        size,
                        bits: 64,
                        origin: 0,
                    }
                    .in_data(),
                );
            }
        },
    },
];

/// Bytes of memory that an instruction accesses.
struct Operand {
    at: u64,
    size: u64,
    /// Width of an address in its code.
    bits: u32,
    /// Where its segment starts.
    origin: u64,
}

impl Operand {
    fn wraps(&self) -> bool {
        let last = self.at.checked_add(self.size - 1);
        last.is_none_or(|last| self.bits != 64 && last >> self.bits != 0)
    }

    /// Beyond what can be addressed: #GP, or #SS in the stack segment.
    fn is_beyond(&self) -> bool {
        let last = self.at.wrapping_add(self.size - 1);
        match self.bits {
            64 => [self.at, last]
                .iter()
                .any(|&a| (a as i64) << 16 >> 16 != a as i64),
            32 => self.wraps(),
            _ => last >= DATA_LEN,
        }
    }

    /// Whether the operand can be the cause of a fault.
    fn may_raise(&self, trap: &Trap) -> bool {
        match trap.vector {
            12 | 13 => self.is_beyond(),
            14 => {
                let offset = trap.address.wrapping_sub(self.origin).wrapping_sub(self.at);
                let mask = if self.bits == 64 {
                    u64::MAX
                } else {
                    0xffff_ffff
                };
                offset & mask < self.size
            }
            _ => false,
        }
    }

    /// Its bytes in the data.
    fn in_data(&self) -> Range<usize> {
        let start = self.at.wrapping_add(self.origin).saturating_sub(DATA);
        let start = start.min(DATA_LEN);
        start as usize..(start + self.size).min(DATA_LEN) as usize
    }
}

impl Case<'_> {
    /// How far both sides may differ, by all rows.
    pub fn freedom(&self) -> Freedom {
        let mut freedom = Freedom::default();
        for choice in &CHOICES {
            (choice.widen)(self, &mut freedom);
        }
        freedom
    }

    fn faulted(&self) -> bool {
        self.native.1.vector != super::BREAKPOINT
    }

    /// The operands in memory where the guest's registers, which both sides must share, say: a
    /// repeated instruction faults in some iteration. Not the elements of gathers.
    fn operands(&self) -> Vec<Operand> {
        let bits = match self.instruction.code_size() {
            CodeSize::Code16 => 16,
            CodeSize::Code32 => 32,
            _ => 64,
        };
        let value = |register: Register| {
            let full = register.full_register();
            if register.is_segment_register() {
                return Some(0);
            }
            let value = match full {
                Register::RIP => return Some(0),
                _ => self.guest.0.gpr.get(full.number())?,
            };
            let width = 8 * register.size() as u32;
            Some(value & (u64::MAX >> (64 - width)))
        };
        if self.instruction.is_vsib() {
            return Vec::new();
        }
        let mut factory = InstructionInfoFactory::new();
        let used = factory.info(self.instruction).used_memory().iter();
        used.filter_map(|memory| {
            let at = memory.virtual_address(0, |register, _, _| value(register))?;
            let size = memory.memory_size().size().max(1) as u64;
            let origin = if bits == 16 { DATA } else { 0 };
            let at = if bits == 64 { at } else { at & 0xffff_ffff };
            Some(Operand {
                at,
                size,
                bits,
                origin,
            })
        })
        .collect()
    }

    fn is_far_transfer(&self) -> bool {
        let i = self.instruction;
        let is_far = i.is_call_far_indirect() || i.is_jmp_far_indirect();
        is_far || i.mnemonic() == Mnemonic::Retf || i.flow_control() == FlowControl::Return
    }

    /// Whether the faults all are #TS, #NP, #SS or #GP with an error code of zero or of a selector
    /// in the operand or on the stack.
    fn names_selector(&self, traps: &[Trap]) -> bool {
        let places = [self.before.gpr[4], self.before.gpr[6]].map(|at| {
            let start = at.wrapping_sub(DATA).min(self.data.len() as u64) as usize;
            &self.data[start..(start + 40).min(self.data.len())]
        });
        let names = |error: u32| {
            let mut words = places.iter().flat_map(|place| place.chunks_exact(2));
            error == 0 || words.any(|w| u32::from(u16::from_le_bytes([w[0], w[1]])) & !3 == error)
        };
        traps
            .iter()
            .all(|trap| matches!(trap.vector, 10..=13) && names(trap.error))
    }

    /// Bytes of the host's extended state that are as in the area that RDI points to, or initial.
    fn loaded_from_area(&self) -> Vec<usize> {
        let area = self.before.gpr[7].wrapping_sub(DATA) as usize;
        let native = &self.native.0.fpu;
        let initial = State::default().fpu;
        let loaded = |at: &usize| {
            native[*at] == initial[*at] || self.data.get(area + at) == Some(&native[*at])
        };
        (0..832).filter(loaded).collect()
    }

    /// Whether the instruction is MMX's and the host's x87 state is what MMX instructions make of
    /// it: the top of the stack is register 0, and all registers are in use or as they were.
    fn has_entered_mmx(&self) -> bool {
        let i = self.instruction;
        if !(0..i.op_count()).any(|n| i.op_register(n).is_mm()) {
            return false;
        }
        let (before, native) = (&self.before.fpu, &self.native.0.fpu);
        let top = usize::from(before[3] >> 3 & 7);
        let tags = [before[4], 0xff].contains(&native[4]);
        let status = (native[2], native[3]) == (before[2], before[3] & !0x38);
        // The image has the registers from the top of the stack.
        let same = (0..8).all(|register| {
            let (new, old) = (32 + 16 * register, 32 + 16 * ((register + 8 - top) % 8));
            native[new..new + 10] == before[old..old + 10]
        });
        tags && status && same
    }

    /// Bytes of a gather's destination and mask that stand to the left of the element that faulted.
    fn behind_gather_fault(&self) -> Vec<usize> {
        let i = self.instruction;
        if !i.is_vsib() || !self.faulted() {
            return Vec::new();
        }
        let size = i.memory_size().size();
        let byte = |register: usize, at: usize| match at {
            0..16 => 160 + 16 * register + at,
            _ => 576 + 16 * register + at - 16,
        };
        let (destination, mask) = (i.op_register(0).number(), i.op_register(2).number());
        let is_set = |side: &State, lane: usize| {
            let sign = side.fpu[byte(mask, size * (lane + 1) - 1)];
            sign & 0x80 != 0
        };
        let faulting = |side| (0..32 / size).find(|&lane| is_set(side, lane));
        let (native, guest) = (faulting(&self.native.0), faulting(&self.guest.0));
        let Some(lane) = guest.filter(|_| native == guest) else {
            return Vec::new();
        };
        let own = (size * lane..size * (lane + 1)).map(|at| byte(mask, at));
        let left = size * (lane + 1)..32;
        own.chain(left.flat_map(|at| [byte(destination, at), byte(mask, at)]))
            .collect()
    }
}

/// A 64-bit offset to which a far transfer may go in a code segment that is not 64-bit: with more
/// than 32 bits AMD's processors raise #GP, and Intel's (family 6, model 207) drop them.
pub fn offset_in_compatibility_mode(offset: u64) -> u64 {
    offset & 0xffff_ffff
}

/// Whether processors of the two makers do not agree on what an instruction is, so that it is not
/// tried at all.
pub fn makers_differ(i: &Instruction) -> bool {
    // Register forms of 0F 0D are NOPs on Intel's processors and #UD on AMD's; MOVSXD with a
    // 16-bit destination reads two bytes there and four here; MXCSR has one bit more (MM) here.
    let everywhere = matches!(
        i.code(),
        Code::Reservednop_rm16_r16_0F0D
            | Code::Reservednop_rm32_r32_0F0D
            | Code::Reservednop_rm64_r64_0F0D
            | Code::Movsxd_r16_rm16
            | Code::Ldmxcsr_m32
            | Code::VEX_Vldmxcsr_m32
    );
    // With VEX.W outside 64-bit code Intel's processors ignore W and AMD's raise #UD.
    let with_w = matches!(
        i.code(),
        Code::VEX_Vpinsrd_xmm_xmm_rm32_imm8 | Code::VEX_Vpextrd_rm32_xmm_imm8
    );
    // F3 90 with REX.B is XCHG with R8 on AMD's processors and PAUSE on Intel's.
    let pause = i.code() == Code::Pause && i.len() > 2;
    everywhere || pause || i.code_size() != CodeSize::Code64 && with_w
}

/// Whether a byte of an area that FXSAVE (`legacy`) or XSAVE wrote is not compared: opcode and
/// pointers of the last x87 instruction, which name each side's own, and MXCSR_MASK; padding of
/// x87 registers; what is left for software.
pub fn is_open_in_area(at: usize, legacy: bool) -> bool {
    matches!(at, 5..=23 | 28..=31)
        || (32..160).contains(&at) && at % 16 >= 10
        || legacy && (464..512).contains(&at)
}

/// The flags that an instruction leaves undefined: what `iced-x86` lists, and more.
pub fn undefined_flags(i: &Instruction) -> u64 {
    use iced_x86::{Mnemonic as M, RflagsBits as B};
    let bits = i.rflags_undefined();
    let mut mask = 0;
    for (bit, flag) in [
        (B::OF, 1u64 << 11),
        (B::SF, 1 << 7),
        (B::ZF, 1 << 6),
        (B::AF, 1 << 4),
        (B::CF, 1),
        (B::PF, 1 << 2),
    ] {
        if bits & bit != 0 {
            mask |= flag;
        }
    }
    // Shifts by CL: what is undefined depends on the count.
    if matches!(i.mnemonic(), M::Shl | M::Sal | M::Shr | M::Sar) {
        mask |= 1 << 11 | 1 << 4;
    }
    if matches!(
        i.mnemonic(),
        M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    ) {
        mask |= 1 << 11;
    }
    if matches!(i.mnemonic(), M::Shld | M::Shrd) {
        mask |= 1 << 4;
    }
    mask
}

/// Whether the architecture leaves the result undefined for this state; such a case is not run.
pub fn undefined_result(i: &Instruction, state: &State) -> bool {
    use iced_x86::Mnemonic as M;
    let count = |imm: bool| {
        if imm {
            u64::from(i.immediate8())
        } else {
            state.gpr[1] & 0xff
        }
    };
    match i.mnemonic() {
        M::Shld | M::Shrd => {
            let imm = i.op_kind(2) != iced_x86::OpKind::Register;
            i.op_register(1).size() == 2 && count(imm) & 31 > 16
        }
        M::Shl | M::Sal | M::Shr | M::Sar => {
            // CF is undefined for counts past the operand's width.
            let imm = i.op_kind(1) != iced_x86::OpKind::Register;
            let size = match i.op_kind(0) {
                iced_x86::OpKind::Register => i.op_register(0).size(),
                _ => i.memory_size().size(),
            };
            size < 4 && count(imm) & 31 > 8 * size as u64
        }
        M::Bswap => i.op_register(0).size() == 2,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CODE, bench, compare, generate, segments, source};
    use arch::cpuid::{Feature, Features};

    #[test]
    fn each_choice_has_a_source() {
        for choice in &CHOICES {
            assert!(!choice.what.is_empty() && !choice.source.is_empty());
        }
    }

    fn trap(vector: u8, address: u64) -> Trap {
        let error = if vector == 14 { 4 } else { 0 };
        Trap {
            vector,
            address,
            error,
        }
    }

    /// Whether a made-up host's answer is taken where the guest has another.
    fn agrees(bytes: &[u8], bits: u32, state: &State, native: Trap, guest: Trap) -> bool {
        let i = iced_x86::Decoder::with_ip(bits, bytes, CODE, 0).decode();
        let (native, guest) = ((state.clone(), native), (state.clone(), guest));
        let case = Case {
            instruction: &i,
            before: state,
            data: &[],
            native: &native,
            guest: &guest,
        };
        compare(&case, &case.freedom()).is_ok()
    }

    fn pointing(rsi: u64, rdi: u64) -> State {
        let mut state = State::default();
        (state.gpr[6], state.gpr[7]) = (rsi, rdi);
        state.gpr[4] = DATA + 0x1000;
        state
    }

    #[test]
    fn either_operand_of_two_may_fault_first() {
        // CMPS and MOVS, repeated or not, with each address size.
        for instruction in [0xa6, 0xa7, 0xa4, 0xa5] {
            for prefixes in [&[][..], &[0x67], &[0xf3], &[0xf2, 0x67], &[0x66, 0x67]] {
                let bytes = [prefixes, &[instruction]].concat();
                let state = pointing(0x1234, 0x5678);
                let agree = |native, guest| agrees(&bytes, 32, &state, native, guest);
                assert!(agree(trap(14, 0x5678), trap(14, 0x1234)), "{bytes:02x?}");
                assert!(agree(trap(14, 0x1234), trap(14, 0x5678)));
                assert!(!agree(trap(14, 0x9999), trap(14, 0x1234)), "no operand's");
                assert!(!agree(trap(13, 0), trap(14, 0x1234)), "none is beyond");
                assert!(!agree(trap(3, 0), trap(14, 0x1234)), "one has none");
            }
        }
        // Not canonical and not mapped.
        let state = pointing(1 << 63, 0x5678);
        assert!(agrees(&[0xa4], 64, &state, trap(13, 0), trap(14, 0x5678)));
        // One operand has one fault.
        let state = pointing(0x1234, 0x5678);
        assert!(!agrees(
            &[0xac],
            32,
            &state,
            trap(14, 0x5678),
            trap(14, 0x1234)
        ));
        // PUSH and POP of memory.
        let mut state = pointing(0x1234, 0);
        state.gpr[4] = 0x8000;
        let (push, pop) = ([0xff, 0x36], [0x8f, 0x06]);
        assert!(agrees(
            &push,
            64,
            &state,
            trap(14, 0x7ff8),
            trap(14, 0x1234)
        ));
        assert!(agrees(&pop, 64, &state, trap(14, 0x1234), trap(14, 0x8000)));
    }

    #[test]
    fn a_store_that_wraps_has_either_fault() {
        // FSTP m80 to [ESI].
        let fstp = [0xdb, 0x3e];
        let state = pointing(0xffff_fffa, 0);
        assert!(agrees(&fstp, 32, &state, trap(14, 0), trap(13, 0)));
        assert!(agrees(
            &fstp,
            32,
            &state,
            trap(13, 0),
            trap(14, 0xffff_fffa)
        ));
        assert!(!agrees(&fstp, 32, &state, trap(14, 0x10), trap(13, 0)));
        let inside = pointing(0xffff_fff0, 0);
        assert!(!agrees(
            &fstp,
            32,
            &inside,
            trap(14, 0xffff_fff0),
            trap(13, 0)
        ));
    }

    #[test]
    fn elements_left_of_a_gathers_fault_may_differ() {
        // VPGATHERDD xmm1, [rsi + xmm2], xmm3: element 1 faults.
        let gather = [0xc4, 0xe2, 0x61, 0x90, 0x0c, 0x16];
        let mut state = pointing(0x1234, 0);
        for lane in 1..4 {
            state.fpu[160 + 16 * 3 + 4 * lane + 3] = 0x80;
        }
        let i = iced_x86::Decoder::with_ip(64, &gather, CODE, 0).decode();
        let agree = |changed: usize| {
            let mut host = state.clone();
            host.fpu[changed] ^= 0x80;
            let (native, guest) = ((host, trap(14, 0x1234)), (state.clone(), trap(14, 0x1234)));
            let case = Case {
                instruction: &i,
                before: &state,
                data: &[],
                native: &native,
                guest: &guest,
            };
            compare(&case, &case.freedom()).is_ok()
        };
        let lane = |register: usize, lane: usize| 160 + 16 * register + 4 * lane + 3;
        assert!(agree(lane(1, 2)) && agree(lane(3, 3)));
        assert!(agree(lane(3, 1) - 1), "not a sign");
        assert!(!agree(lane(1, 1)) && !agree(lane(1, 0)) && !agree(lane(3, 1)));
        assert!(!agree(lane(2, 2)), "the indices");
    }

    /// The cases in which a processor of family 25, model 17 chose otherwise than Intel's, with
    /// the features that it has.
    #[test]
    fn the_other_operands_fault_is_taken_where_it_was_seen() {
        let (_alone, mut bench) = bench();
        for seed in [5136, 36172, 220_318, 239_880] {
            let mut random = source(seed);
            let (i, bytes) = generate::instruction(&mut random, &Features::NONE.with(SEEN), 32);
            assert!(matches!(i.mnemonic(), Mnemonic::Cmpsb | Mnemonic::Cmpsd));
            let before = State {
                rip: CODE,
                cs: segments::CODE_32,
                ..generate::state(&mut random, &i, 32)
            };
            let mut code = [0xcc; 4096];
            code[..bytes.len()].copy_from_slice(&bytes);
            bench.guest_code.write(0, &code);
            let guest = bench.run_guest(&before);
            let [si, di] = [6, 7].map(|register| before.gpr[register] & 0xffff);
            let other = match guest.1.address {
                address if address == si => di,
                address if address == di => si,
                address => panic!("{seed}: the guest faults at {address:#x}"),
            };
            for (address, is_taken) in [(other, true), (si ^ 0x8000, false)] {
                let native = (guest.0.clone(), trap(14, address));
                let case = Case {
                    instruction: &i,
                    before: &before,
                    data: &[],
                    native: &native,
                    guest: &guest,
                };
                assert_eq!(compare(&case, &case.freedom()).is_ok(), is_taken, "{seed}");
            }
        }
    }

    /// The features of that processor which the generator asks for.
    const SEEN: &[Feature] = &[
        Feature::MMX,
        Feature::SSE,
        Feature::SSE2,
        Feature::SSE3,
        Feature::SSSE3,
        Feature::SSE4_1,
        Feature::SSE4_2,
        Feature::SSE4A,
        Feature::PCLMULQDQ,
        Feature::AES,
        Feature::SHA,
        Feature::AVX,
        Feature::AVX2,
        Feature::FMA,
        Feature::F16C,
        Feature::BMI1,
        Feature::BMI2,
        Feature::ADX,
        Feature::LZCNT,
        Feature::POPCNT,
        Feature::MOVBE,
        Feature::CX8,
        Feature::CX16,
    ];
}

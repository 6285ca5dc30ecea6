//! Stubs: one host instruction on guest registers.
//!
//! ```text
//!   RDI = &CpuState, RSI = &Scratch
//!   load the registers the instruction uses (or, for x87 and MMX, the whole FXSAVE image)
//!   load the guest's MXCSR, if the instruction looks at it
//!   the instruction, its memory operand replaced by [R8], its integer register by RAX
//!   store MXCSR and what was written; put the host's control registers back
//! ```
//!
//! An exception of the instruction is raised on the host too, where the signal handler resumes at
//! the stub's second exit, which stores MXCSR and nothing else.
//!
//! Stubs belong to one processor and are bounded ([`Stubs`]): a guest that executes more encodings
//! than there is room for has them made again.

use super::form::{self, Family};
use super::scratch::{OPERAND, Scratch, note_fault};
use crate::host::code_memory::{CodeMemory, Fixup};
use crate::state::{CpuState, ExtendedState};
use core::mem::offset_of;
use iced_x86::{
    Encoder, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register, RflagsBits,
};
use std::cell::RefCell;
use std::collections::HashMap;

/// Bytes of stubs that one processor keeps.
const STUB_BYTES: usize = 4 << 20;

/// Bytes that the stubs of one block may take: no stub has more than a few hundred.
const BLOCK_BYTES: usize = 64 << 10;

/// A generated stub.
pub(super) struct Stub {
    pub code: u64,
    pub family: Family,
    /// Bytes of the memory operand; 0 without one.
    pub memory: usize,
    pub reads: bool,
    pub writes: bool,
    /// Alignment the memory operand needs; 1 for none.
    pub alignment: usize,
    pub reads_flags: bool,
    pub writes_flags: bool,
    /// Sets the x87 instruction and data pointers.
    pub sets_pointers: bool,
    /// Clears them (FNINIT).
    pub clears_pointers: bool,
}

/// The stubs of one processor, by encoding.
pub(crate) struct Stubs(RefCell<Store>);

struct Store {
    memory: CodeMemory,
    stubs: HashMap<Vec<u8>, Box<Stub>>,
}

impl Stubs {
    pub(crate) fn new() -> std::io::Result<Stubs> {
        Ok(Stubs(RefCell::new(Store {
            memory: CodeMemory::new(STUB_BYTES, note_fault)?,
            stubs: HashMap::new(),
        })))
    }

    /// Whether the stubs of one more block may not fit.
    pub(crate) fn is_full(&self) -> bool {
        !self.0.borrow().memory.has_room(BLOCK_BYTES)
    }

    /// Drops every stub. No block that holds one may execute any more.
    pub(crate) fn clear(&mut self) {
        let store = self.0.get_mut();
        store.stubs.clear();
        store.memory.reset();
    }

    /// The stub for an instruction, made now or before: valid until they are cleared. `None` if it
    /// cannot be run this way.
    pub(super) fn get(&self, instruction: &Instruction) -> Option<*const Stub> {
        if !form::is_hosted(instruction) {
            return None;
        }
        let (body, renamed) = rewrite(instruction)?;
        let Store { memory, stubs } = &mut *self.0.borrow_mut();
        // The renamed guest register is not in the body.
        let mut key = body.clone();
        key.push(renamed.map_or(0xff, |(guest, _)| guest as u8));
        if let Some(stub) = stubs.get(&key) {
            return Some(&raw const **stub);
        }
        let stub = Box::new(build(memory, instruction, &body, renamed)?);
        let stub = stubs.entry(key).insert_entry(stub);
        Some(&raw const **stub.get())
    }
}

const EXTENDED: usize = offset_of!(CpuState, extended);

/// The status flags of RFLAGS as `iced-x86` numbers them.
const STATUS_FLAGS: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

const RDI: u8 = 7;
const RSI: u8 = 6;

/// A few fixed encodings.
#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// ModRM for `[base + disp32]`.
    fn operand(&mut self, reg: u8, base: u8, displacement: usize) {
        self.0.push(0x80 | (reg & 7) << 3 | base);
        self.bytes(&(displacement as u32).to_le_bytes());
    }

    /// MOVUPS between `xmm` and memory.
    fn movups(&mut self, store: bool, xmm: u8, displacement: usize) {
        if xmm >= 8 {
            self.0.push(0x44);
        }
        self.bytes(&[0x0f, 0x10 | u8::from(store)]);
        self.operand(xmm, RDI, displacement);
    }

    /// VINSERTF128 or VEXTRACTF128 of the upper half of `ymm`.
    fn upper(&mut self, store: bool, ymm: u8, displacement: usize) {
        let r = if ymm >= 8 { 0 } else { 0x80 };
        let source = if store { 0x78 } else { (!ymm & 0xf) << 3 };
        self.bytes(&[0xc4, r | 0x63, source | 0x05, 0x18 | u8::from(store)]);
        self.operand(ymm, RDI, displacement);
        self.0.push(1);
    }

    /// VMOVUPS of the lower half, which clears the upper half on loading.
    fn vmovups(&mut self, store: bool, xmm: u8, displacement: usize) {
        let r = if xmm >= 8 { 0 } else { 0x80 };
        self.bytes(&[0xc5, r | 0x78, 0x10 | u8::from(store)]);
        self.operand(xmm, RDI, displacement);
    }

    /// MOV between integer register `reg` (0 to 7) and its guest register `guest`.
    fn integer(&mut self, store: bool, reg: u8, guest: usize) {
        self.bytes(&[0x48, if store { 0x89 } else { 0x8b }]);
        self.operand(reg, RDI, 8 * guest);
    }

    fn mxcsr(&mut self, store: bool, base: u8, displacement: usize) {
        self.bytes(&[0x0f, 0xae]);
        self.operand(if store { 3 } else { 2 }, base, displacement);
    }
}

/// What an instruction touches.
#[derive(Default)]
struct Uses {
    vectors: u32,
    written: u32,
    /// Integer registers used implicitly or after renaming: RAX, RCX, RDX as bits.
    integers: u8,
    integers_written: u8,
}

/// Alignment that the memory operand needs, found by trying: which instructions insist differs
/// between processors. `None` if the host does not know the instruction.
fn alignment(code: u64, size: usize) -> Option<usize> {
    let mut state = Box::new(CpuState::reset());
    let mut fault_at = |misalignment: usize| {
        let mut scratch = Scratch::new();
        run(code, &mut state, &mut scratch, misalignment)
    };
    if fault_at(0) == INVALID_OPCODE {
        return None;
    }
    let mut faults = |misalignment| fault_at(misalignment) == GENERAL_PROTECTION;
    Some(match size {
        ..16 => 1,
        32.. if faults(16) => size,
        _ if faults(1) => 16,
        _ => 1,
    })
}

const INVALID_OPCODE: u64 = 6;
const GENERAL_PROTECTION: u64 = 13;

/// Runs a stub's code with its memory operand at an address of that misalignment (below 64).
/// Returns the vector of the exception it raised, 0 for none.
pub(super) fn run(
    code: u64,
    state: &mut CpuState,
    scratch: &mut Scratch,
    misalignment: usize,
) -> u64 {
    scratch.fault = 0;
    scratch.operand = scratch.memory.as_ptr() as u64 + misalignment as u64;
    // SAFETY: the stub follows the C calling convention, touches the two structures it is given
    // and the caller-saved registers of the vector and x87 units, and leaves the host's control
    // registers as they were.
    unsafe {
        let code: extern "C" fn(*mut CpuState, *mut Scratch) =
            core::mem::transmute(code as *const ());
        code(state, scratch);
    }
    // SAFETY: the signal handler may have written the field, behind the compiler's back.
    unsafe { (&raw const scratch.fault).read_volatile() }
}

/// The instruction as it runs on the host, and the guest register that RAX stands for with the
/// way it is used.
type Rewritten = (Vec<u8>, Option<(usize, OpAccess)>);

fn rewrite(instruction: &Instruction) -> Option<Rewritten> {
    let mut host = *instruction;
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(instruction);
    let mut renamed = None;
    for n in 0..instruction.op_count() {
        match instruction.op_kind(n) {
            OpKind::Memory => {
                if instruction.is_vsib() {
                    return None;
                }
                host.set_segment_prefix(Register::None);
                host.set_memory_base(Register::R8);
                host.set_memory_index(Register::None);
                host.set_memory_index_scale(1);
                host.set_memory_displacement64(0);
                host.set_memory_displ_size(0);
            }
            OpKind::Register if instruction.op_register(n).is_gpr() => {
                // FNSTSW AX and its like name RAX already.
                let register = instruction.op_register(n);
                let size = register.size();
                if renamed.is_some() {
                    return None;
                }
                renamed = Some((register.full_register().number(), info.op_access(n)));
                host.set_op_register(
                    n,
                    match size {
                        8 => Register::RAX,
                        4 => Register::EAX,
                        2 => Register::AX,
                        _ => return None,
                    },
                );
            }
            OpKind::Register
            | OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64 => {}
            _ => return None,
        }
    }
    let mut encoder = Encoder::new(64);
    encoder.encode(&host, 0).ok()?;
    Some((encoder.take_buffer(), renamed))
}

fn uses(instruction: &Instruction, renamed: Option<(usize, OpAccess)>) -> Uses {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(instruction);
    let mut uses = Uses::default();
    for used in info.used_registers() {
        let register = used.register();
        let writes = matches!(
            used.access(),
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        );
        if register.is_vector_register() {
            uses.vectors |= 1 << register.number();
            if writes {
                uses.written |= 1 << register.number();
            }
        } else if register.is_gpr() {
            let number = register.full_register().number();
            let explicit = renamed.is_some_and(|(guest, _)| guest == number);
            // One that is only part of the address is loaded in vain.
            if !explicit && number < 3 {
                uses.integers |= 1 << number;
                if writes {
                    uses.integers_written |= 1 << number;
                }
            }
        }
    }
    uses
}

/// What a stub does around its instruction.
struct Plan<'a> {
    body: &'a [u8],
    renamed: Option<(usize, OpAccess)>,
    uses: Uses,
    /// x87 or MMX: the FXSAVE image is loaded and stored.
    has_legacy_state: bool,
    is_avx: bool,
    uses_mxcsr: bool,
    reads_flags: bool,
    writes_flags: bool,
}

const HOST_MXCSR: usize = offset_of!(Scratch, host_mxcsr);
const GUEST_MXCSR: usize = EXTENDED + ExtendedState::MXCSR;

fn xmm(n: u8) -> usize {
    EXTENDED + ExtendedState::XMM + 16 * usize::from(n)
}

fn ymm_high(n: u8) -> usize {
    EXTENDED + ExtendedState::YMM_HIGH + 16 * usize::from(n)
}

/// The numbers of the bits in a set of registers.
fn each(set: u32) -> impl Iterator<Item = u8> {
    (0..16u8).filter(move |n| set >> n & 1 != 0)
}

impl Plan<'_> {
    /// Whether MXCSR is the guest's while the instruction runs.
    fn switches_mxcsr(&self) -> bool {
        self.has_legacy_state || self.uses_mxcsr
    }

    /// Loads guest registers.
    fn before(&self, code: &mut Code) {
        if self.switches_mxcsr() {
            code.mxcsr(true, RSI, HOST_MXCSR);
        }
        if self.has_legacy_state {
            code.bytes(&[0x48, 0x0f, 0xae]); // FXRSTOR64
            code.operand(1, RDI, EXTENDED);
        } else {
            for n in each(self.uses.vectors) {
                if self.is_avx {
                    code.vmovups(false, n, xmm(n));
                    code.upper(false, n, ymm_high(n));
                } else {
                    code.movups(false, n, xmm(n));
                }
            }
        }
        for n in each(self.uses.integers.into()) {
            code.integer(false, n, n.into());
        }
        if let Some((guest, _)) = self.renamed {
            code.integer(false, 0, guest);
        }
        if self.uses_mxcsr {
            code.mxcsr(false, RDI, GUEST_MXCSR);
        }
        code.bytes(&[0x4c, 0x8b]); // MOV R8, operand
        code.operand(0, RSI, offset_of!(Scratch, operand));
        if self.reads_flags {
            code.0.push(0xff); // PUSH flags
            code.operand(6, RSI, offset_of!(Scratch, flags));
            code.0.push(0x9d); // POPFQ
        }
    }

    /// Stores what the instruction wrote, and returns.
    fn after(&self, code: &mut Code) {
        if self.writes_flags {
            code.0.push(0x9c); // PUSHFQ
            code.0.push(0x8f); // POP flags
            code.operand(0, RSI, offset_of!(Scratch, flags));
        }
        if self.uses_mxcsr {
            code.mxcsr(true, RDI, GUEST_MXCSR);
            code.mxcsr(false, RSI, HOST_MXCSR);
        }
        for n in each(self.uses.integers_written.into()) {
            code.integer(true, n, n.into());
        }
        if let Some((guest, access)) = self.renamed
            && !matches!(access, OpAccess::Read | OpAccess::CondRead)
        {
            // A 16-bit destination (FNSTSW AX) leaves the rest, which was loaded.
            code.integer(true, 0, guest);
        }
        if self.has_legacy_state {
            code.bytes(&[0x48, 0x0f, 0xae]); // FXSAVE64
            code.operand(0, RDI, EXTENDED);
            code.bytes(&[0xdb, 0xe3]); // FNINIT
            code.mxcsr(false, RSI, HOST_MXCSR);
        } else {
            for n in each(self.uses.written) {
                if self.is_avx {
                    code.vmovups(true, n, xmm(n));
                    code.upper(true, n, ymm_high(n));
                } else {
                    code.movups(true, n, xmm(n));
                }
            }
        }
        self.leave(code);
    }

    /// Goes on after the instruction raised an exception.
    fn after_fault(&self, code: &mut Code) {
        if self.has_legacy_state {
            // A conversion that faults has switched to MMX state already.
            code.bytes(&[0x48, 0x0f, 0xae]); // FXSAVE64
            code.operand(0, RDI, EXTENDED);
            code.bytes(&[0xdb, 0xe2]); // FNCLEX
            code.bytes(&[0xdb, 0xe3]); // FNINIT
            code.mxcsr(false, RSI, HOST_MXCSR);
        } else if self.uses_mxcsr {
            code.mxcsr(true, RDI, GUEST_MXCSR);
            code.mxcsr(false, RSI, HOST_MXCSR);
        }
        self.leave(code);
    }

    /// Goes on when guest registers could not even be loaded.
    fn after_failed_load(&self, code: &mut Code) {
        if self.switches_mxcsr() {
            code.mxcsr(false, RSI, HOST_MXCSR);
        }
        self.leave(code);
    }

    fn leave(&self, code: &mut Code) {
        if self.is_avx && !self.has_legacy_state {
            code.bytes(&[0xc5, 0xf8, 0x77]); // VZEROUPPER
        }
        code.0.push(0xc3);
    }

    /// The stub's code, and where it goes on after faults.
    fn generate(&self) -> (Vec<u8>, [Fixup; 2]) {
        let mut code = Code::default();
        self.before(&mut code);
        let instruction = code.0.len() as u32;
        code.bytes(self.body);
        self.after(&mut code);
        let fault = code.0.len() as u32;
        self.after_fault(&mut code);
        let failed_load = code.0.len() as u32;
        self.after_failed_load(&mut code);
        let fixups = [
            Fixup {
                instructions: 0..instruction,
                resume: failed_load,
            },
            Fixup {
                instructions: instruction..fault,
                resume: fault,
            },
        ];
        (code.0, fixups)
    }
}

/// Bytes of the memory operand and how it is accessed, if there is one. The error is an operand
/// whose size is not known or not small.
fn memory_operand(instruction: &Instruction) -> Result<Option<(usize, OpAccess)>, ()> {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(instruction);
    let operand = (0..instruction.op_count()).find(|&n| instruction.op_kind(n) == OpKind::Memory);
    let Some(operand) = operand else {
        return Ok(None);
    };
    match instruction.memory_size().size() {
        size @ 1..=OPERAND => Ok(Some((size, info.op_access(operand)))),
        _ => Err(()),
    }
}

fn build(
    memory: &mut CodeMemory,
    instruction: &Instruction,
    body: &[u8],
    renamed: Option<(usize, OpAccess)>,
) -> Option<Stub> {
    use OpAccess as A;
    let operand = memory_operand(instruction).ok()?;
    let is_x87 = form::is_x87(instruction);
    let has_legacy_state = is_x87 || form::touches_mmx(instruction);
    let plan = Plan {
        body,
        renamed,
        uses: uses(instruction, renamed),
        has_legacy_state,
        is_avx: form::is_avx(instruction),
        uses_mxcsr: !has_legacy_state && form::uses_mxcsr(instruction),
        // The sets also name the x87 condition codes, which live in the status word.
        reads_flags: instruction.rflags_read() & STATUS_FLAGS != 0,
        writes_flags: instruction.rflags_modified() & STATUS_FLAGS != 0,
    };
    let (code, fixups) = plan.generate();
    let code = memory.add(&code, &fixups)?;
    let (size, access) = operand.unwrap_or((0, A::None));
    Some(Stub {
        code,
        family: form::family(instruction),
        memory: size,
        reads: !matches!(access, A::Write | A::CondWrite | A::None),
        writes: matches!(
            access,
            A::Write | A::CondWrite | A::ReadWrite | A::ReadCondWrite
        ),
        alignment: alignment(code, size)?,
        reads_flags: plan.reads_flags,
        writes_flags: plan.writes_flags,
        sets_pointers: is_x87 && !form::is_control(instruction),
        clears_pointers: instruction.mnemonic() == iced_x86::Mnemonic::Fninit,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Code, Decoder, DecoderOptions};
    use std::collections::HashSet;

    /// Instructions of every code that the host executes, with a register and with memory.
    fn hosted() -> Vec<Instruction> {
        let mut seen = HashSet::new();
        let mut found = Vec::new();
        let mut look_at = |bytes: &[u8]| {
            let mut padded = [0x11; 15];
            padded[..bytes.len()].copy_from_slice(bytes);
            let instruction = Decoder::new(64, &padded, DecoderOptions::NONE).decode();
            let is_memory = instruction.memory_size().size() != 0;
            if form::is_hosted(&instruction) && seen.insert((instruction.code(), is_memory)) {
                found.push(instruction);
            }
        };
        for opcode in 0..=255_u8 {
            // With a register for each extension of the opcode, with any, and with memory.
            for operand in (0..8_u8).flat_map(|n| [n << 3 | 3, n << 3 | 0xc1, n | 0xc8]) {
                for prefix in [&[][..], &[0x66], &[0xf2], &[0xf3]] {
                    for rex in [&[][..], &[0x48]] {
                        for map in [&[][..], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]] {
                            look_at(&[prefix, rex, map, &[opcode, operand]].concat());
                        }
                    }
                }
                for (map, selection) in (1..4_u8).flat_map(|m| (0..16_u8).map(move |s| (m, s))) {
                    let last = (selection & 8) << 4 | selection & 7;
                    for vvvv in [0x78, 0x68] {
                        look_at(&[0xc4, 0xe0 | map, last | vvvv, opcode, operand]);
                    }
                }
            }
        }
        found
    }

    /// Vectors of values that arithmetic has something to say about: signalling NaNs, denormals,
    /// numbers that are inexact in fewer bits, integers too large to convert.
    const VALUES: [u64; 6] = [
        0x7ff0_0000_0000_0001,
        0x7f80_0001_7f80_0001,
        0x0000_0001_0000_0001,
        0x000f_ffff_807f_ffff,
        0x43e5_5555_5555_5555,
        0x3ff5_5555_3eaa_aaab,
    ];

    fn host_mxcsr(value: u32) -> u32 {
        let mut found = 0_u32;
        // SAFETY: stores to and loads from the variables named; all exceptions stay masked.
        unsafe {
            std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut found);
            std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const value);
        }
        found
    }

    #[test]
    fn what_runs_with_the_hosts_mxcsr_is_no_arithmetic() {
        crate::faults::install();
        let stubs = Stubs::new().unwrap();
        let mut state = Box::new(CpuState::reset());
        let mut count = 0;
        for instruction in hosted() {
            let legacy = form::is_x87(&instruction) || form::touches_mmx(&instruction);
            if legacy || form::uses_mxcsr(&instruction) {
                continue;
            }
            let Some(stub) = stubs.get(&instruction) else {
                continue;
            };
            // SAFETY: just made, and not dropped before the next is asked for.
            let stub = unsafe { &*stub };
            for value in VALUES {
                state.regs[..16].fill(value);
                for chunk in state.extended.0[ExtendedState::XMM..][..256].chunks_exact_mut(8) {
                    chunk.copy_from_slice(&value.to_le_bytes());
                }
                let mut scratch = Scratch::new();
                for chunk in scratch.memory.chunks_exact_mut(8) {
                    chunk.copy_from_slice(&value.to_le_bytes());
                }
                host_mxcsr(0x1f80);
                run(stub.code, &mut state, &mut scratch, 0);
                let flags = host_mxcsr(0x1f80);
                assert_eq!(flags, 0x1f80, "{:?} of {value:#x}", instruction.code());
            }
            count += 1;
        }
        assert!(count > 400, "{count}");
    }

    #[test]
    fn the_host_executes_only_what_the_list_names() {
        for (bytes, hosted) in [
            (&[0x0f, 0x58, 0xc1][..], true),          // addps
            (&[0xd8, 0xc1], true),                    // fadd
            (&[0x9b], true),                          // fwait
            (&[0x0f, 0x77], true),                    // emms
            (&[0xf3, 0x0f, 0x2d, 0x03], true),        // cvtss2si eax, [rbx]
            (&[0x0f, 0x01, 0xd6], false),             // xtest
            (&[0x0f, 0x01, 0xd7], false),             // enclu
            (&[0x0f, 0x01, 0xcf], false),             // encls
            (&[0x0f, 0x01, 0xd5], false),             // xend
            (&[0x0f, 0xae, 0xe8], false),             // lfence
            (&[0x0f, 0x18, 0x03], false),             // prefetchnta
            (&[0x0f, 0x05], false),                   // syscall
            (&[0xcc], false),                         // int3
            (&[0x66, 0x0f, 0x38, 0xf8, 0x03], false), // movdir64b
            (&[0x0f, 0x0e], false),                   // femms
        ] {
            let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
            assert_ne!(instruction.code(), Code::INVALID);
            assert_eq!(form::is_hosted(&instruction), hosted, "{bytes:x?}");
        }
    }

    #[test]
    fn a_stub_is_made_once_and_fits_what_is_kept_free_for_it() {
        crate::faults::install();
        let mut stubs = Stubs::new().unwrap();
        let all = hosted();
        for instruction in &all {
            assert_eq!(stubs.get(instruction), stubs.get(instruction));
        }
        let store = stubs.0.get_mut();
        assert!(store.stubs.len() > 600, "{}", store.stubs.len());
        let mut factory = CodeMemory::new(BLOCK_BYTES, note_fault).unwrap();
        for chunk in all.chunks(64) {
            for instruction in chunk {
                if let Some((body, renamed)) = rewrite(instruction) {
                    let _ = build(&mut factory, instruction, &body, renamed);
                }
            }
            assert!(factory.has_room(BLOCK_BYTES / 4));
            factory.reset();
        }
    }
}

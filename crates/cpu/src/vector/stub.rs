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
//! An unmasked floating-point exception faults on the host too; the signal handler resumes at the
//! stub's second exit, which stores MXCSR and nothing else.

use super::buffer::{Scratch, buffer};
use crate::state::{CpuState, ExtendedState};
use core::mem::offset_of;
use iced_x86::{
    CpuidFeature, Encoder, EncodingKind, Instruction, InstructionInfoFactory, OpAccess, OpKind,
    Register, RflagsBits,
};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Which check precedes the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// x87: CR0.EM and CR0.TS raise #NM.
    X87,
    /// FWAIT: CR0.MP with CR0.TS raises #NM.
    Wait,
    /// MMX: CR0.EM raises #UD, CR0.TS #NM.
    Mmx,
    /// SSE: as MMX, and CR4.OSFXSR must be set.
    Sse,
    /// AVX: CR4.OSXSAVE and XCR0 must enable it.
    Avx,
}

/// A generated stub.
pub(super) struct Stub {
    pub code: u64,
    /// Address of the exit taken after a fault.
    pub resume: u64,
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

fn is_x87(instruction: &Instruction) -> bool {
    use CpuidFeature as C;
    let features = instruction.cpuid_features();
    if instruction.mnemonic() == iced_x86::Mnemonic::Wait {
        return true;
    }
    features
        .iter()
        .any(|f| matches!(f, C::FPU | C::FPU287 | C::FPU387))
}

fn touches_mmx(instruction: &Instruction) -> bool {
    instruction.cpuid_features().contains(&CpuidFeature::MMX)
        || (0..instruction.op_count()).any(|n| {
            instruction.op_kind(n) == OpKind::Register && instruction.op_register(n).is_mm()
        })
}

/// Whether the instruction may look at or set MXCSR: all but moves, logic and integer
/// instructions.
fn uses_mxcsr(instruction: &Instruction) -> bool {
    let name = format!("{:?}", instruction.mnemonic());
    let name = name.strip_prefix('V').unwrap_or(&name).to_ascii_lowercase();
    let quiet = [
        "p",
        "mov",
        "unpck",
        "shuf",
        "and",
        "or",
        "xor",
        "lddqu",
        "blend",
        "insert",
        "extract",
        "broadcast",
        "perm",
        "aes",
        "sha",
        "zero",
        "test",
        "maskmov",
        "emms",
        "extrq",
    ];
    // PACK, PADD …: integer; but nothing that starts with "p" here is floating point.
    !quiet.iter().any(|prefix| name.starts_with(prefix))
}

/// Alignment that the memory operand needs, found by trying: which instructions insist differs
/// between processors.
fn alignment(code: u64, resume: u64, size: usize) -> usize {
    if size < 16 {
        return 1;
    }
    let faults = |misalignment: usize| {
        let mut state = Box::new(CpuState::reset());
        let mut scratch = Scratch::new();
        run(code, resume, &mut state, &mut scratch, misalignment) == GENERAL_PROTECTION
    };
    match (faults(1), size >= 32 && faults(16)) {
        (_, true) => size,
        (true, false) => 16,
        (false, false) => 1,
    }
}

const GENERAL_PROTECTION: u64 = 13;

/// Runs a stub's code with its memory operand at an address of that misalignment (below 64).
/// Returns the vector of the exception it raised, 0 for none.
pub(super) fn run(
    code: u64,
    resume: u64,
    state: &mut CpuState,
    scratch: &mut Scratch,
    misalignment: usize,
) -> u64 {
    scratch.fault = 0;
    scratch.resume = resume;
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

/// The stub for an instruction, made now or before. `None` if it cannot be run this way.
pub(super) fn get(instruction: &Instruction) -> Option<&'static Stub> {
    static STUBS: Mutex<Option<HashMap<Vec<u8>, &'static Stub>>> = Mutex::new(None);
    let (body, renamed) = rewrite(instruction)?;
    let mut stubs = STUBS.lock().unwrap_or_else(PoisonError::into_inner);
    let stubs = stubs.get_or_insert_default();
    // The renamed guest register is not in the body.
    let mut key = body.clone();
    key.push(renamed.map_or(0xff, |(guest, _)| guest as u8));
    if let Some(stub) = stubs.get(&key) {
        return Some(stub);
    }
    let stub: &'static Stub = Box::leak(Box::new(build(instruction, &body, renamed)?));
    stubs.insert(key, stub);
    Some(stub)
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

fn build(
    instruction: &Instruction,
    body: &[u8],
    renamed: Option<(usize, OpAccess)>,
) -> Option<Stub> {
    let x87 = is_x87(instruction);
    let mmx = touches_mmx(instruction);
    let legacy_state = x87 || mmx;
    let avx = instruction.code().encoding() != EncodingKind::Legacy;
    let uses = uses(instruction, renamed);
    let mxcsr = !legacy_state && uses_mxcsr(instruction);
    let scratch_mxcsr = offset_of!(Scratch, host_mxcsr);
    let flags = offset_of!(Scratch, flags);
    let guest_mxcsr = EXTENDED + ExtendedState::MXCSR;
    let xmm = |n: u8| EXTENDED + ExtendedState::XMM + 16 * usize::from(n);
    let high = |n: u8| EXTENDED + ExtendedState::YMM_HIGH + 16 * usize::from(n);
    let each = |set: u32| (0..16u8).filter(move |n| set >> n & 1 != 0);
    // The sets also name the x87 condition codes, which live in the status word.
    let reads_flags = instruction.rflags_read() & STATUS_FLAGS != 0;
    let writes_flags = instruction.rflags_modified() & STATUS_FLAGS != 0;

    let mut code = Code::default();
    if legacy_state || mxcsr {
        code.mxcsr(true, RSI, scratch_mxcsr);
    }
    if legacy_state {
        code.bytes(&[0x48, 0x0f, 0xae]); // FXRSTOR64
        code.operand(1, RDI, EXTENDED);
    } else {
        for n in each(uses.vectors) {
            if avx {
                code.vmovups(false, n, xmm(n));
                code.upper(false, n, high(n));
            } else {
                code.movups(false, n, xmm(n));
            }
        }
    }
    for n in each(uses.integers.into()) {
        code.integer(false, n, n.into());
    }
    if let Some((guest, _)) = renamed {
        code.integer(false, 0, guest);
    }
    if mxcsr {
        code.mxcsr(false, RDI, guest_mxcsr);
    }
    code.bytes(&[0x4c, 0x8b]); // MOV R8, operand
    code.operand(0, RSI, offset_of!(Scratch, operand));
    if reads_flags {
        code.0.push(0xff); // PUSH flags
        code.operand(6, RSI, flags);
        code.0.push(0x9d); // POPFQ
    }
    code.bytes(body);
    if writes_flags {
        code.0.push(0x9c); // PUSHFQ
        code.0.push(0x8f); // POP flags
        code.operand(0, RSI, flags);
    }
    if mxcsr {
        code.mxcsr(true, RDI, guest_mxcsr);
        code.mxcsr(false, RSI, scratch_mxcsr);
    }
    for n in each(uses.integers_written.into()) {
        code.integer(true, n, n.into());
    }
    if let Some((guest, access)) = renamed
        && !matches!(access, OpAccess::Read | OpAccess::CondRead)
    {
        // A 16-bit destination (FNSTSW AX) leaves the rest, which was loaded.
        code.integer(true, 0, guest);
    }
    if legacy_state {
        code.bytes(&[0x48, 0x0f, 0xae]); // FXSAVE64
        code.operand(0, RDI, EXTENDED);
        code.bytes(&[0xdb, 0xe3]); // FNINIT
        code.mxcsr(false, RSI, scratch_mxcsr);
    } else {
        for n in each(uses.written) {
            if avx {
                code.vmovups(true, n, xmm(n));
                code.upper(true, n, high(n));
            } else {
                code.movups(true, n, xmm(n));
            }
        }
    }
    if avx && !legacy_state {
        code.bytes(&[0xc5, 0xf8, 0x77]); // VZEROUPPER
    }
    code.0.push(0xc3);
    let resume = code.0.len();
    if legacy_state {
        // A conversion that faults has switched to MMX state already.
        code.bytes(&[0x48, 0x0f, 0xae]); // FXSAVE64
        code.operand(0, RDI, EXTENDED);
        code.bytes(&[0xdb, 0xe2]); // FNCLEX
        code.bytes(&[0xdb, 0xe3]); // FNINIT
        code.mxcsr(false, RSI, scratch_mxcsr);
    } else if mxcsr {
        code.mxcsr(true, RDI, guest_mxcsr);
        code.mxcsr(false, RSI, scratch_mxcsr);
    }
    if avx && !legacy_state {
        code.bytes(&[0xc5, 0xf8, 0x77]);
    }
    code.0.push(0xc3);

    let address = buffer()?.add(&code.0)?;
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(instruction);
    let memory_operand =
        (0..instruction.op_count()).find(|&n| instruction.op_kind(n) == OpKind::Memory);
    let access = memory_operand.map(|n| info.op_access(n));
    let size = match memory_operand {
        Some(_) => instruction.memory_size().size(),
        None => 0,
    };
    if memory_operand.is_some() && (size == 0 || size > 512) {
        return None;
    }
    Some(Stub {
        code: address,
        resume: address + resume as u64,
        family: family(instruction, x87, mmx, avx),
        memory: size,
        reads: access
            .is_some_and(|a| !matches!(a, OpAccess::Write | OpAccess::CondWrite | OpAccess::None)),
        writes: access.is_some_and(|a| {
            matches!(
                a,
                OpAccess::Write
                    | OpAccess::CondWrite
                    | OpAccess::ReadWrite
                    | OpAccess::ReadCondWrite
            )
        }),
        alignment: alignment(address, address + resume as u64, size),
        reads_flags,
        writes_flags,
        sets_pointers: x87 && !is_control(instruction),
        clears_pointers: instruction.mnemonic() == iced_x86::Mnemonic::Fninit,
    })
}

fn family(instruction: &Instruction, x87: bool, mmx: bool, avx: bool) -> Family {
    if instruction.mnemonic() == iced_x86::Mnemonic::Wait {
        Family::Wait
    } else if x87 {
        Family::X87
    } else if mmx && (0..instruction.op_count()).any(|n| instruction.op_register(n).is_xmm()) {
        Family::Sse
    } else if mmx {
        Family::Mmx
    } else if avx {
        Family::Avx
    } else {
        Family::Sse
    }
}

/// x87 control instructions leave the instruction and data pointers alone.
fn is_control(instruction: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Fninit | M::Fnclex | M::Fldcw | M::Fnstcw | M::Fnstsw | M::Wait | M::Fnop
    )
}

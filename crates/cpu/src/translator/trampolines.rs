//! Code that every block uses: the way in, the way out, calls of handlers, and loading and saving
//! of vector registers.

use super::Hot;
use super::asm::{Asm, Mem, R10, R11, RAX, RBP, RDI, RDX, RSI, RSP, cc};
use super::jumps::{self, Transfer};
use super::layout::{self, HOMES};
use super::stack;
use crate::host::code_memory::CodeMemory;
use crate::op::Op;
use crate::state::ExtendedState;
use crate::vcpu::Vcpu;
use core::mem::offset_of;

/// What a handler's caller does next.
pub(super) mod verdict {
    /// Go on behind the instruction.
    pub(crate) const NEXT: u32 = 0;
    /// Leave: RIP is set.
    pub(crate) const LEAVE: u32 = 1;
    /// Leave: the instruction stopped, and RIP names it.
    pub(crate) const STOPPED: u32 = 2;
}

/// Calls the handler of an instruction of a block.
pub(super) type Callout = extern "C" fn(&mut Vcpu, *const Op, u64) -> u32;

/// Addresses of the trampolines.
pub(super) struct Trampolines {
    /// `extern "C" fn(&mut Vcpu, code) -> verdict`.
    pub enter: u64,
    /// Leaves with verdict [`verdict::LEAVE`]; RIP is set, registers are where they live.
    pub leave: u64,
    /// Called with the op in R10 and the block in R11; returns behind the instruction or leaves.
    pub callout: u64,
    /// Jumped to; goes on at the linear address in R10, which is canonical.
    pub jump: u64,
    /// Called; see [`stack::refill_code`].
    pub refill_stack: u64,
    /// Called; loads vector registers if they may be used. Keeps all but the host's flags.
    pub load_vectors: u64,
}

/// Callee-saved registers of the C calling convention, in the order of their saving.
const SAVED: [u8; 6] = [3, 5, 12, 13, 14, 15];

impl Trampolines {
    /// Writes the trampolines into empty memory.
    pub(super) fn new(memory: &mut CodeMemory, callout: Callout) -> Option<Trampolines> {
        let avx = is_x86_feature_detected!("avx");
        let mut asm = Asm::default();
        let save = asm.here();
        save_vectors(&mut asm, avx);
        let load = asm.here();
        load_vectors(&mut asm, avx);
        let refill = asm.here();
        stack::refill_code(&mut asm);
        // A RET whose CALL is not remembered.
        let underflow = asm.here();
        asm.load(RSP, layout::STACK_BASE);
        let jump = asm.here();
        let miss = jumps::look_up(&mut asm, Transfer::Jump);
        for jump in miss {
            asm.bind(jump);
        }
        let leave = asm.here();
        asm.mov_imm(R10, verdict::LEAVE.into());
        spill(&mut asm);
        save_if_loaded(&mut asm, save);
        let leave_spilled = asm.here();
        return_to_caller(&mut asm);
        let enter = asm.here();
        enter_code(&mut asm, memory.next_address() + underflow as u64);
        let call = asm.here();
        call_handler(&mut asm, save, leave_spilled, callout);
        let base = memory.add(&asm.code, &[])?;
        Some(Trampolines {
            enter: base + enter as u64,
            leave: base + leave as u64,
            callout: base + call as u64,
            jump: base + jump as u64,
            refill_stack: base + refill as u64,
            load_vectors: base + load as u64,
        })
    }
}

fn spill(asm: &mut Asm) {
    for (guest, host) in HOMES {
        asm.store(layout::register(guest), host);
    }
}

fn fill(asm: &mut Asm) {
    for (guest, host) in HOMES {
        asm.load(host, layout::register(guest));
    }
}

fn push(asm: &mut Asm, register: u8) {
    if register >= 8 {
        asm.bytes(&[0x41]);
    }
    asm.bytes(&[0x50 | register & 7]);
}

fn pop(asm: &mut Asm, register: u8) {
    if register >= 8 {
        asm.bytes(&[0x41]);
    }
    asm.bytes(&[0x58 | register & 7]);
}

/// Bytes of the host's stack on which guest calls are remembered.
const REMEMBERED: i32 = 32 << 10;

/// Bytes below the saved registers: alignment, and what a RET finds whose CALL is not remembered.
const FRAME: i32 = 8 + 16;

/// RDI: the processor, RSI: the code.
fn enter_code(asm: &mut Asm, underflow: u64) {
    for register in SAVED {
        push(asm, register);
    }
    // Six registers and the return address: the stack is aligned to 16 bytes with one more.
    asm.alu_imm(true, 5, RSP, 8);
    asm.lea(RBP, Mem::at(RDI, layout::BIAS));
    asm.mov_imm(R10, underflow);
    push(asm, R10);
    push(asm, R10);
    asm.store(layout::STACK_BASE, RSP);
    asm.lea(R10, Mem::at(RSP, -REMEMBERED));
    asm.store(layout::STACK_LIMIT, R10);
    asm.mov(R10, RSI);
    fill(asm);
    asm.rr(false, &[0xff], 4, R10); // JMP
}

/// R10: the verdict; guest registers are in memory. The host's stack may hold anything.
fn return_to_caller(asm: &mut Asm) {
    asm.mov(RAX, R10);
    asm.load(RSP, layout::STACK_BASE);
    asm.alu_imm(true, 0, RSP, FRAME);
    for register in SAVED.into_iter().rev() {
        pop(asm, register);
    }
    asm.bytes(&[0xc3]);
}

fn save_if_loaded(asm: &mut Asm, save: usize) {
    asm.cmp_byte(layout::VECTORS_LOADED, 0);
    let skip = asm.jcc(cc::E);
    let call = asm.call();
    asm.patch(call, save as i64);
    asm.bind(skip);
}

/// R10: the op, R11: the block, on the stack: where to go on.
fn call_handler(asm: &mut Asm, save: usize, leave_spilled: usize, callout: Callout) {
    spill(asm);
    save_if_loaded(asm, save);
    asm.lea(RDI, Mem::at(RBP, -layout::BIAS));
    asm.mov(RSI, R10);
    asm.mov(RDX, R11);
    asm.alu_imm(true, 5, RSP, 8);
    asm.mov_imm(RAX, callout as usize as u64);
    asm.rr(false, &[0xff], 2, RAX); // CALL
    asm.alu_imm(true, 0, RSP, 8);
    asm.rr(false, &[0x85], RAX, RAX); // TEST
    let out = asm.jcc(cc::NE);
    fill(asm);
    asm.bytes(&[0xc3]);
    asm.bind(out);
    asm.mov(R10, RAX);
    let jump = asm.jmp();
    asm.patch(jump, leave_spilled as i64);
}

fn xmm(n: u8) -> Mem {
    layout::extended(ExtendedState::XMM + 16 * usize::from(n))
}

fn high(n: u8) -> Mem {
    layout::extended(ExtendedState::YMM_HIGH + 16 * usize::from(n))
}

/// MOVUPS between `register` and memory.
fn movups(asm: &mut Asm, store: bool, register: u8, mem: Mem) {
    asm.rm(false, &[0x0f, 0x10 | u8::from(store)], register, mem);
}

/// A VEX instruction of 256-bit registers with a memory operand at a distance from RBP: `map`
/// holds the opcode map and the prefix.
fn vex(asm: &mut Asm, map: u8, prefix: u8, opcode: u8, register: u8, source: u8, mem: Mem) {
    let r = if register >= 8 { 0 } else { 0x80 };
    asm.bytes(&[
        0xc4,
        r | 0x60 | map,
        (!source & 15) << 3 | 4 | prefix,
        opcode,
    ]);
    asm.bytes(&[0x80 | (register & 7) << 3 | RBP]);
    asm.bytes(&mem.disp.to_le_bytes());
}

/// Saves vector registers and MXCSR, and gives the host its own. Keeps all but flags.
fn save_vectors(asm: &mut Asm, avx: bool) {
    for n in 0..16 {
        movups(asm, true, n, xmm(n));
        if avx {
            vex(asm, 3, 1, 0x19, n, 0, high(n)); // VEXTRACTF128
            asm.bytes(&[1]);
        }
    }
    if avx {
        asm.bytes(&[0xc5, 0xf8, 0x77]); // VZEROUPPER
    }
    asm.rm(false, &[0x0f, 0xae], 3, layout::MXCSR); // STMXCSR
    asm.rm(false, &[0x0f, 0xae], 2, layout::HOST_MXCSR); // LDMXCSR
    asm.rm(false, &[0xc6], 0, layout::VECTORS_LOADED); // MOV
    asm.bytes(&[0, 0xc3]);
}

/// Loads what may be loaded, unless it is. Keeps all but flags.
fn load_vectors(asm: &mut Asm, avx: bool) {
    asm.cmp_byte(layout::VECTORS_LOADED, 0);
    let loaded = asm.jcc(cc::NE);
    asm.cmp_byte(layout::VECTORS_ALLOWED, 0);
    let refused = asm.jcc(cc::E);
    asm.rm(false, &[0x0f, 0xae], 3, layout::HOST_MXCSR); // STMXCSR
    asm.rm(false, &[0x0f, 0xae], 2, layout::MXCSR); // LDMXCSR
    for n in 0..16 {
        if avx {
            // Moves the lower half and clears the upper one, which VINSERTF128 then sets.
            let r = if n >= 8 { 0 } else { 0x80 };
            asm.bytes(&[0xc5, r | 0x78, 0x10, 0x80 | (n & 7) << 3 | RBP]);
            asm.bytes(&xmm(n).disp.to_le_bytes());
            vex(asm, 3, 1, 0x18, n, n, high(n));
            asm.bytes(&[1]);
        } else {
            movups(asm, false, n, xmm(n));
        }
    }
    // Flags but no register may change: the value goes over the stack.
    asm.rm(
        false,
        &[0xff],
        6,
        layout::field(offset_of!(Vcpu, hot) + offset_of!(Hot, vectors_allowed)),
    );
    push(asm, RAX);
    asm.load(RAX, Mem::at(RSP, 8));
    asm.rm(false, &[0x88], RAX, layout::VECTORS_LOADED);
    pop(asm, RAX);
    asm.lea(RSP, Mem::at(RSP, 8));
    for jump in [loaded, refused] {
        asm.bind(jump);
    }
    asm.bytes(&[0xc3]);
}

//! The second engine: guest code translated to host code.
//!
//! The host is an x86, so most instructions become themselves with their operands renamed
//! ([`operate`]). Guest registers live in host registers ([`layout`]) across chained blocks;
//! memory is reached by an inline TLB lookup ([`access`]); status flags stay in the host's flags
//! as long as they can ([`flags`]). A block is translated when it has run often enough.
//!
//! The translator has no idea of its own of what an instruction does beyond that. Everything
//! rare leaves generated code with exact state and is done by the interpreter's handler of that
//! one instruction ([`emit`]): TLB misses, devices, faults of every kind, instructions that are
//! not known here. A host fault in generated code is such a case, too.
//!
//! ```text
//!   run ── attend ── block ── cold: interpret
//!                        └─── hot: enter ──▶ block ─chain─▶ block ─chain─▶ … ──▶ leave
//! ```
//!
//! Chains stay inside one page of linear addresses; other jumps ask the cache of [`jumps`], whose
//! key changes with everything that a mapping of code depends on. So code that goes away is never
//! entered again by a chain from elsewhere, and its own page's chains go with it.

mod access;
mod analysis;
mod asm;
mod branch;
mod emit;
mod flags;
mod jumps;
mod layout;
mod operate;
mod stack;
mod system;
mod trampolines;

use crate::code::{Block, CodeMode};
use crate::decode;
use crate::fast_tlb;
use crate::host::code_memory::CodeMemory;
use crate::op::{Flow, Op};
use crate::state::LazyFlags;
use crate::vcpu::Vcpu;
use analysis::Analysed;
use arch::control_registers::{Cr0, Cr4, Xcr0};
use emit::{Emitter, FORWARD, MISSED};
use iced_x86::InstructionInfoFactory;
use jumps::Jumps;
use trampolines::{Trampolines, verdict};

/// Which engine executes guest code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// The interpreter only.
    Interpreter,
    /// Translated code for what runs often, the interpreter for the rest.
    Translator,
}

/// The environment variable that names the engine of new processors.
const VARIABLE: &str = "EPTIDE_ENGINE";

/// There is no such engine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no engine: there are \"interpreter\" and \"translator\"")]
pub struct NoSuchEngine(pub String);

impl std::str::FromStr for Engine {
    type Err = NoSuchEngine;

    fn from_str(name: &str) -> Result<Engine, NoSuchEngine> {
        match name {
            "interpreter" => Ok(Engine::Interpreter),
            "translator" => Ok(Engine::Translator),
            _ => Err(NoSuchEngine(name.into())),
        }
    }
}

impl std::fmt::Display for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Engine::Interpreter => "interpreter",
            Engine::Translator => "translator",
        })
    }
}

impl Engine {
    /// The engine of new processors: what `EPTIDE_ENGINE` names, or the translator. A name that
    /// is no engine's is as good as none; whoever has a user to tell may parse it first.
    pub fn from_environment() -> Engine {
        std::env::var(VARIABLE)
            .ok()
            .and_then(|name| name.parse().ok())
            .unwrap_or(Engine::Translator)
    }
}

/// Executions of a block before it is translated, unless `EPTIDE_TRANSLATE_AFTER` says otherwise:
/// tests that want every block translated set it to 0.
const THRESHOLD: u32 = 24;

fn threshold_from_environment() -> u32 {
    std::env::var("EPTIDE_TRANSLATE_AFTER")
        .ok()
        .and_then(|value| value.parse().ok())
        .unwrap_or(THRESHOLD)
}

/// Bytes of generated code for a processor at the most.
const CODE_BYTES: usize = 32 << 20;

/// Instructions of a successor that are looked at to see whether it needs flags.
const LOOK_AHEAD: usize = 6;

/// What generated code touches beside guest registers.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct Hot {
    /// Status flags at their RFLAGS positions; other bits mean nothing.
    pub eflags: u64,
    /// The table of [`crate::fast_tlb`] in use, and the mask of offsets in it.
    pub table: u64,
    pub mask: u64,
    /// The cache of [`jumps`].
    pub jumps: u64,
    /// [`crate::code::JumpKey::salt`] of the current key.
    pub jump_salt: u64,
    /// Address of the attention word.
    pub attention: u64,
    /// The jump by which a block was left that could lead on directly; 0 for none.
    pub link: u64,
    pub temporary: u64,
    /// The page of the guest's stack, as [`crate::fast_tlb::FastEntry`] holds it for writes. Good
    /// until anything but generated code runs.
    pub stack_tag: u64,
    pub stack_page: u64,
    /// Where the host's stack pointer stands when no guest call is remembered on it, and how far
    /// down calls may be remembered.
    pub stack_base: u64,
    pub stack_limit: u64,
    /// The host's MXCSR while the guest's is loaded.
    pub host_mxcsr: u32,
    /// Vector registers hold the guest's values: bit 0, and bit 1 if AVX may be used.
    pub vectors_loaded: u8,
    /// What could be loaded, in the same form.
    pub vectors_allowed: u8,
    /// The running code was changed: leave behind the current instruction.
    pub leave: bool,
    _pad: [u8; 8],
}

/// Translated code of one processor.
pub(crate) struct Translator {
    memory: CodeMemory,
    trampolines: Trampolines,
    jumps: Jumps,
    threshold: u32,
    /// The code was made for linear addresses of 57 bits.
    la57: bool,
}

/// The translation of one block.
pub(crate) struct Body {
    entry: u64,
    /// Where chains from further up in the page enter.
    forward_entry: u64,
    /// Its instructions one by one, for their slow paths.
    ops: Box<[Op]>,
}

impl Body {
    fn is_last(&self, op: &Op) -> bool {
        self.ops.last().is_some_and(|last| std::ptr::eq(last, op))
    }
}

impl Translator {
    /// `None` where the host allows no executable memory.
    pub(crate) fn new() -> Option<Translator> {
        let mut memory = CodeMemory::new(CODE_BYTES, nothing_to_note).ok()?;
        let trampolines = Trampolines::new(&mut memory, callout)?;
        Some(Translator {
            memory,
            trampolines,
            jumps: Jumps::new(),
            threshold: threshold_from_environment(),
            la57: false,
        })
    }

    /// Forgets all code.
    fn clear(&mut self) {
        self.memory.reset();
        self.jumps.clear();
        if let Some(trampolines) = Trampolines::new(&mut self.memory, callout) {
            self.trampolines = trampolines;
        }
    }
}

/// Whatever faults in generated code is executed again by its handler, which finds out why.
unsafe fn nothing_to_note(_: &mut [libc::greg_t], _: u8) {}

/// Executes the instruction of `op`, which belongs to the translated block at `block`.
extern "C" fn callout(cpu: &mut Vcpu, op: *const Op, block: u64) -> u32 {
    // SAFETY: generated code passes addresses that live as long as it; a block that was dropped
    // is freed only by a later lookup.
    let (op, missed) = (unsafe { &*op }, block & MISSED != 0);
    // SAFETY: as above.
    let block = unsafe { &*((block & !MISSED) as *const Block) };
    cpu.current = block;
    cpu.state.flags = LazyFlags::from_status(cpu.hot.eflags);
    cpu.hot.leave = false;
    cpu.hot.stack_tag = fast_tlb::INVALID_TAG;
    cpu.state.rip = cpu.rip_of(op);
    let touched = if missed {
        cpu.touched_by(op)
    } else {
        [None; 2]
    };
    let flow = (op.handler.get())(cpu, op);
    cpu.hot.eflags = cpu.state.flags.status();
    match flow {
        Flow::Next => {
            for address in touched.into_iter().flatten() {
                cpu.promote(address);
            }
            cpu.update_vectors_allowed();
            if !cpu.hot.leave {
                return verdict::NEXT;
            }
            cpu.state.rip = cpu.next_rip(op);
            cpu.uncount(block, op, 1);
            verdict::LEAVE
        }
        // Ops of translations are never made stale.
        Flow::Branch | Flow::Stale => {
            for address in touched.into_iter().flatten() {
                cpu.promote(address);
            }
            let again = cpu.state.rip == cpu.rip_of(op);
            let is_last = block.body().is_some_and(|body| body.is_last(op));
            cpu.uncount(block, op, i64::from(is_last || !again));
            verdict::LEAVE
        }
        Flow::Stop => {
            cpu.state.rip = cpu.rip_of(op);
            cpu.uncount(block, op, 0);
            verdict::STOPPED
        }
    }
}

impl Vcpu {
    /// Chooses the engine. Without executable memory it stays the interpreter.
    pub fn set_engine(&mut self, engine: Engine) {
        if self.engine() == engine {
            return;
        }
        self.code.clear();
        self.update_jump_key();
        self.translator = match engine {
            Engine::Interpreter => None,
            Engine::Translator => Translator::new().map(Box::new),
        };
        if let Some(translator) = &self.translator {
            self.hot.jumps = translator.jumps.address();
            self.hot.attention = self.attention.address();
        }
    }

    /// The engine in use.
    pub fn engine(&self) -> Engine {
        match self.translator {
            Some(_) => Engine::Translator,
            None => Engine::Interpreter,
        }
    }

    /// How often a block is interpreted before it is translated, for tests and measurements.
    pub fn translate_after(&mut self, executions: u32) {
        if let Some(translator) = &mut self.translator {
            translator.threshold = executions;
        }
    }

    /// Linear addresses that an instruction is likely to access, for the TLB of generated code.
    fn touched_by(&self, op: &Op) -> [Option<u64>; 2] {
        let rsp = self.state.regs[4];
        if op.flags & crate::op::flag::MEMORY == 0 {
            return [Some(rsp), Some(rsp.wrapping_sub(8))];
        }
        let base = self.state.segment_bases[usize::from(op.segment)];
        let operand = self.effective(op).wrapping_add(base);
        // CALL and PUSH of memory touch the stack, too.
        let stack = operand & !0xfff != rsp & !0xfff;
        [Some(operand), stack.then(|| rsp.wrapping_sub(8))]
    }

    /// Lets generated code find a translation that the TLB has.
    fn promote(&mut self, gva: u64) {
        if self.tlb.promote(self.context, gva) {
            self.select_table();
        }
    }

    /// Points generated code to the table of the current context.
    pub(crate) fn select_table(&mut self) {
        if self.translator.is_some() {
            (self.hot.table, self.hot.mask) = self.tlb.fast.select(self.context);
        }
    }

    /// Takes back the instructions of a block that were counted but not executed: those behind
    /// `op`, and itself unless `executed`.
    fn uncount(&mut self, block: &Block, op: &Op, executed: i64) {
        if let Some(body) = block.body() {
            // SAFETY: the op is one of the body's.
            let index = unsafe { std::ptr::from_ref(op).offset_from(body.ops.as_ptr()) } as i64;
            self.countdown += body.ops.len() as i64 - index - executed;
        }
    }

    /// Recomputes which vector instructions the control registers allow.
    fn update_vectors_allowed(&mut self) {
        let (cr0, cr4) = (self.state.cr0, self.state.cr4);
        let sse = !cr0.intersects(Cr0::EM | Cr0::TS) && cr4.contains(Cr4::OSFXSR);
        let avx = !cr0.contains(Cr0::TS)
            && cr4.contains(Cr4::OSXSAVE)
            && self.state.xcr0.contains(Xcr0::SSE | Xcr0::AVX)
            && !self.real_segments();
        self.hot.vectors_allowed = u8::from(sse) | u8::from(sse && avx) << 1;
    }

    /// Whether `block` is to be executed by its translation, which is made if it has run often.
    #[inline]
    pub(crate) fn translation_of(&mut self, block: &Block) -> Option<u64> {
        if let Some(body) = block.body() {
            return Some(body.entry);
        }
        let threshold = self.translator.as_ref()?.threshold;
        if block.heat() < threshold || block.crosses || self.code_mode != CodeMode::Bits64 {
            return None;
        }
        self.translate(block)
    }

    #[cold]
    fn translate(&mut self, block: &Block) -> Option<u64> {
        if !self.code.is_settled(block) {
            return None;
        }
        let la57 = self.state.cr4.contains(Cr4::LA57);
        if self.translator.as_ref()?.la57 != la57 {
            self.drop_translations();
            self.translator.as_mut()?.la57 = la57;
            return None;
        }
        self.code.depend_on(block.hva, block.len.into());
        if !block.is_current() {
            return None;
        }
        let offset = block.hva & 0xfff;
        let unfused = decode::unfused(
            block.bytes(),
            offset,
            self.code_mode,
            &self.features,
            &self.stubs,
        );
        let ops: Box<[Op]> = unfused.iter().map(|one| one.op.clone()).collect();
        let mut factory = InstructionInfoFactory::new();
        let mut all: Vec<Analysed<'_>> = unfused
            .iter()
            .map(|one| Analysed::new(one, &mut factory))
            .collect();
        if all.is_empty() {
            return None;
        }
        let live: Vec<(i32, bool)> = successors(&all)
            .into_iter()
            .map(|target| (target, self.needs_flags(block, target)))
            .collect();
        Analysed::find_live(
            &mut all,
            live.iter().any(|(_, live)| *live) || live.is_empty(),
        );
        let translator = self.translator.as_mut()?;
        let emitter = Emitter::new(
            &all,
            &translator.trampolines,
            ops.as_ptr(),
            std::ptr::from_ref(block) as u64,
            if la57 { 56 } else { 47 },
            translator.memory.next_address(),
        );
        let is_live = |target| {
            let known = live.iter().find(|(at, _)| *at == target);
            known.is_none_or(|(_, live)| *live)
        };
        let emitted = emitter.block(is_live);
        match translator.memory.add(&emitted.code, &emitted.fixups) {
            Some(entry) => {
                self.statistics.blocks_translated += 1;
                self.statistics.bytes_translated += emitted.code.len() as u64;
                block.set_body(Body {
                    entry,
                    forward_entry: entry + emitted.forward_entry as u64,
                    ops,
                });
                Some(entry)
            }
            None => {
                // Full: everything is dropped, and what is hot is translated anew.
                self.drop_translations();
                None
            }
        }
    }

    /// Drops all code. A block in use stays until the next lookup.
    fn drop_translations(&mut self) {
        if let Some(translator) = &mut self.translator {
            translator.clear();
        }
        self.code.clear();
        self.update_jump_key();
    }

    /// Whether the code at `target` in the block's page may show the flags that it finds.
    fn needs_flags(&mut self, block: &Block, target: i32) -> bool {
        if !(0..0x1000).contains(&target) {
            return true;
        }
        let mut bytes = [0; 15 * LOOK_AHEAD];
        let hva = (block.hva & !0xfff) + target as u64;
        let len = bytes.len().min(0x1000 - target as usize);
        // What is looked at must not change without this block being dropped. Its page has code,
        // so nothing is owed for more of it.
        self.machine.register_code(&self.attention, hva, len as u64);
        self.code.depend_on(hva, len as u64);
        // SAFETY: the page of a block's code, which came from a TLB entry.
        if unsafe { crate::host::copy_from(hva, &mut bytes[..len]) }.is_err() {
            return true;
        }
        let bytes = &bytes[..len];
        let ahead = decode::peek(bytes, target as u64, self.code_mode, &self.features);
        let mut factory = InstructionInfoFactory::new();
        ahead
            .take(LOOK_AHEAD)
            .find_map(|one| Analysed::new(&one, &mut factory).needs_flags())
            .unwrap_or(true)
    }

    /// Runs translated code from `entry` until it leaves. Returns whether an instruction stopped.
    pub(crate) fn execute_translated(&mut self, entry: u64) -> bool {
        let Some(translator) = &self.translator else {
            return false;
        };
        let enter = translator.trampolines.enter;
        self.hot.eflags = self.state.flags.status();
        self.hot.link = 0;
        self.hot.stack_tag = fast_tlb::INVALID_TAG;
        self.update_vectors_allowed();
        // SAFETY: the trampoline follows the C calling convention; generated code touches the
        // processor, which is borrowed exclusively, and guest memory.
        let verdict = unsafe {
            let enter: extern "C" fn(*mut Vcpu, u64) -> u32 =
                core::mem::transmute(enter as *const ());
            enter(self, entry)
        };
        self.state.flags = LazyFlags::from_status(self.hot.eflags);
        verdict == verdict::STOPPED
    }

    /// Makes the jump by which generated code was left lead to `block`, and lets generated code
    /// find the block by its address.
    pub(crate) fn connect(&mut self, block: &Block, linear: u64) {
        let Some(body) = block.body() else { return };
        let link = std::mem::take(&mut self.hot.link);
        let (link, forward) = (link & !FORWARD, link & FORWARD != 0);
        let page = self.state.regs[crate::state::slot::PAGE];
        let Some(translator) = &mut self.translator else {
            return;
        };
        if link != 0
            && let Some(field) = translator.memory.writable_view(link, 4)
        {
            let entry = if forward {
                body.forward_entry
            } else {
                body.entry
            };
            let distance = entry.wrapping_sub(link + 4) as i32;
            field.copy_from_slice(&distance.to_le_bytes());
        }
        translator
            .jumps
            .insert(linear, self.jump_key, body.entry, page);
    }
}

/// Where a block may go on inside its page, as far as that can be told.
fn successors(all: &[Analysed<'_>]) -> Vec<i32> {
    use analysis::Kind;
    let Some(last) = all.last() else {
        return Vec::new();
    };
    let op = &last.unfused.op;
    let next = i32::from(op.offset) + i32::from(op.len);
    let target = last.instruction().near_branch_target() as i32;
    match last.kind {
        Kind::Jcc => vec![target, next],
        Kind::Jump | Kind::Call => vec![target],
        Kind::Return | Kind::JumpIndirect | Kind::CallIndirect => Vec::new(),
        _ => vec![next],
    }
}

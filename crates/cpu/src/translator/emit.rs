//! Writing a block: its instructions in order, then what is rarely executed.
//!
//! ```text
//!   entry:  count instructions, look for attention      ── or leave
//!           instruction                                  ── or its slow path
//!           …
//!           edge to a successor
//!   cold:   slow path of an instruction: save flags, call the handler, come back
//!           exits of edges that lead nowhere yet
//! ```
//!
//! A slow path executes the whole instruction by the interpreter's handler. That is how TLB
//! misses, page crossings, devices and faults of any kind are dealt with, and all instructions
//! that the translator does not know.

use super::analysis::{Analysed, Kind};
use super::asm::{Asm, Mem, R10, R11, Reg, cc};
use super::flags::{self, Flags, Recipe};
use super::jumps::{self, Transfer};
use super::layout;
use super::stack::StackMiss;
use super::trampolines::Trampolines;
use crate::host::code_memory::Fixup;
use crate::op::Op;
use iced_x86::Encoder;

/// Set in a block's address when a handler is called because of a miss of the TLB.
pub(super) const MISSED: u64 = 1;

/// A finished block, relative to its start.
pub(super) struct Emitted {
    pub code: Vec<u8>,
    /// Where chains from further up in the page enter, which need not look for attention.
    pub forward_entry: usize,
    /// Host accesses that may fault and where they resume.
    pub fixups: Vec<Fixup>,
}

/// What leads out of the hot path at one instruction.
struct Slow {
    index: usize,
    /// Jumps to patch.
    jumps: Vec<usize>,
    /// Host instructions that may fault.
    accesses: Vec<usize>,
    before: Flags,
    /// A miss of the TLB leads there.
    misses: bool,
    /// Where to come back, with flags and vector registers as the hot path has them there.
    back: Option<Back>,
}

struct Back {
    at: usize,
    flags_in_host: bool,
    vectors: u8,
}

/// Why a block is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// It ends. The jump may be patched to lead to the target itself.
    Edge,
    /// Something wants attention before it begins.
    Attention,
    /// The countdown ran out before it began.
    Clock,
}

/// Set in the address of a jump that leads down the page.
pub(super) const FORWARD: u64 = 1 << 63;

/// What happens once, at the end of a block, for a way out of it.
struct Exit {
    /// The jump that leads there.
    jump: usize,
    /// Offset of the target in the page.
    target: i32,
    kind: Way,
    /// Where flags are, which must be in memory behind it.
    flags: Flags,
}

/// A block that ends in a conditional jump to its own start is written twice: the second time
/// for all rounds but the first, with what is known at the end of a round.
struct Loop {
    /// The jumps at the end of a round.
    jumps: Vec<usize>,
    flags: Flags,
    vectors: u8,
}

/// A block being written.
pub(super) struct Emitter<'a> {
    pub asm: Asm,
    pub all: &'a [Analysed<'a>],
    pub flags: Flags,
    /// Which vector registers are known to be loaded: bits of `Hot::vectors_loaded`.
    pub vectors: u8,
    pub encoder: Encoder,
    pub trampolines: &'a Trampolines,
    ops: *const Op,
    block: u64,
    /// The highest bit of a linear address that is not a copy of another.
    sign_bit: u8,
    /// Address at which the code will run.
    address: u64,
    slow: Vec<Slow>,
    exits: Vec<Exit>,
    pub stack_misses: Vec<StackMiss>,
    again: Option<Loop>,
    forward_entry: usize,
    /// Whether a slow path of the current instruction exists.
    has_slow: bool,
    index: usize,
}

impl<'a> Emitter<'a> {
    pub(super) fn new(
        all: &'a [Analysed<'a>],
        trampolines: &'a Trampolines,
        ops: *const Op,
        block: u64,
        sign_bit: u8,
        address: u64,
    ) -> Emitter<'a> {
        Emitter {
            asm: Asm::default(),
            all,
            flags: Flags::Memory,
            vectors: 0,
            encoder: Encoder::new(64),
            trampolines,
            ops,
            block,
            sign_bit,
            address,
            slow: Vec::new(),
            exits: Vec::new(),
            stack_misses: Vec::new(),
            again: None,
            forward_entry: 0,
            has_slow: false,
            index: 0,
        }
    }

    /// Offset in the page of the instruction behind the current one.
    pub(super) fn next_offset(&self) -> i32 {
        let op = &self.all[self.index].unfused.op;
        i32::from(op.offset) + i32::from(op.len)
    }

    /// Writes the whole block.
    pub(super) fn block(mut self, live: impl Fn(i32) -> bool) -> Emitted {
        self.once(&live);
        if let Some(again) = self.again.take() {
            let start = self.asm.here();
            self.flags = again.flags.clone();
            self.vectors = again.vectors;
            self.once(&live);
            let rounds = self.again.take().map_or(Vec::new(), |again| again.jumps);
            for jump in again.jumps.into_iter().chain(rounds) {
                self.asm.patch(jump, start as i64);
            }
        }
        self.cold()
    }

    /// Writes the block's instructions.
    fn once(&mut self, live: &impl Fn(i32) -> bool) {
        self.prologue();
        let count = self.all.len();
        for index in 0..count {
            self.index = index;
            self.has_slow = false;
            self.instruction(live);
        }
        let last = &self.all[count - 1];
        if !matches!(
            last.kind,
            Kind::Jump | Kind::Call | Kind::Return | Kind::JumpIndirect | Kind::CallIndirect
        ) && last.kind != Kind::Jcc
        {
            let next = self.next_offset();
            self.edge(next, live(next));
        }
    }

    /// A conditional jump at `jump` leads back to the block's start, the flags being computable.
    pub(super) fn loop_back(&mut self, jump: usize, recipe: Recipe) {
        self.again = Some(Loop {
            jumps: vec![jump],
            flags: Flags::Pending(recipe),
            vectors: self.vectors,
        });
    }

    /// Offset in the page of the block's first instruction.
    pub(super) fn start_offset(&self) -> i32 {
        self.all[0].unfused.op.offset.into()
    }

    fn prologue(&mut self) {
        let count = self.all.len() as i32;
        let start = self.start_offset();
        self.asm.load(R10, layout::ATTENTION);
        self.asm.rm(false, &[0x83], 7, Mem::at(R10, 0)); // CMP
        self.asm.bytes(&[0]);
        let attention = self.asm.jcc(cc::NE);
        if self.forward_entry == 0 {
            self.forward_entry = self.asm.here();
        }
        self.asm.alu_mem_imm(5, layout::COUNTDOWN, count); // SUB
        let clock = self.asm.jcc(cc::S);
        for (jump, kind) in [(attention, Way::Attention), (clock, Way::Clock)] {
            self.exits.push(Exit {
                jump,
                target: start,
                kind,
                flags: self.flags.clone(),
            });
        }
    }

    fn instruction(&mut self, live: &impl Fn(i32) -> bool) {
        match self.all[self.index].kind {
            Kind::Nothing => {}
            Kind::Plain => self.plain(),
            Kind::Vector { avx } => self.vector(avx),
            Kind::BitString => self.bit_string(),
            Kind::PushFlags => self.push_flags(),
            Kind::ClearInterrupts => self.clear_interrupts(),
            Kind::SwapGs => self.swap_gs(),
            Kind::Lea => self.lea(),
            Kind::Push => self.push(),
            Kind::Pop => self.pop(),
            Kind::Leave => self.leave_frame(),
            Kind::Jcc => self.jcc(live),
            Kind::Jump => {
                let target = self.target();
                self.edge(target, live(target));
            }
            Kind::Call => self.call(live),
            Kind::Return => self.return_near(),
            Kind::JumpIndirect => self.jump_indirect(),
            Kind::CallIndirect => self.call_indirect(),
            Kind::Callout => self.callout(),
        }
    }

    /// Where the current direct branch leads, as an offset in the page.
    pub(super) fn target(&self) -> i32 {
        self.all[self.index].instruction().near_branch_target() as i32
    }

    pub(super) fn current(&self) -> &'a Analysed<'a> {
        &self.all[self.index]
    }

    // ---- slow paths ----

    /// The slow path of the current instruction, made at its first use.
    fn slow(&mut self) -> &mut Slow {
        if !self.has_slow {
            self.has_slow = true;
            self.slow.push(Slow {
                index: self.index,
                jumps: Vec::new(),
                accesses: Vec::new(),
                before: self.flags.clone(),
                misses: false,
                back: None,
            });
        }
        let last = self.slow.len() - 1;
        &mut self.slow[last]
    }

    /// A jump at `jump` leads to the current instruction's slow path.
    pub(super) fn slow_jump(&mut self, jump: usize) {
        self.slow().jumps.push(jump);
    }

    /// A jump at `jump` is taken when the TLB lacks a translation.
    pub(super) fn miss_jump(&mut self, jump: usize) {
        let slow = self.slow();
        slow.jumps.push(jump);
        slow.misses = true;
    }

    /// Which slow path is the current instruction's.
    pub(super) fn slow_index(&mut self) -> usize {
        self.slow();
        self.slow.len() - 1
    }

    /// Like [`Emitter::miss_jump`], for the slow path of that index.
    pub(super) fn late_miss_jump(&mut self, slow: usize, jump: usize) {
        self.slow[slow].jumps.push(jump);
        self.slow[slow].misses = true;
    }

    /// The next host instruction may fault, which leads to the slow path.
    pub(super) fn may_fault(&mut self) {
        let here = self.asm.here();
        self.slow().accesses.push(here);
    }

    /// The current instruction is complete: its slow path comes back here.
    pub(super) fn done(&mut self) {
        if !self.has_slow {
            return;
        }
        let back = Back {
            at: self.asm.here(),
            flags_in_host: matches!(self.flags, Flags::Host(_)),
            vectors: self.vectors,
        };
        self.slow().back = Some(back);
    }

    /// Executes the current instruction by its handler only.
    pub(super) fn callout(&mut self) {
        let jump = self.asm.jmp();
        self.slow_jump(jump);
        self.vectors = 0;
        self.flags = Flags::Memory;
        self.done();
    }

    // ---- flags ----

    /// What comes next clobbers the host's flags.
    pub(super) fn clobber_flags(&mut self) {
        if let Flags::Host(recipe) = &self.flags {
            let recipe = recipe.clone();
            self.flags = if !self.current().live_before {
                Flags::Dead
            } else if let Some(recipe) = recipe {
                Flags::Pending(recipe)
            } else {
                flags::save(&mut self.asm);
                Flags::Memory
            };
        }
    }

    /// Makes the status flags stand in the host's flags, if they are to be had without loading
    /// them from memory. Clobbers R11.
    pub(super) fn compute_flags(&mut self) {
        if let Flags::Pending(recipe) = &self.flags {
            let recipe = recipe.clone();
            self.asm.bytes(&recipe.code);
            self.flags = Flags::Host(Some(recipe));
        }
    }

    /// Prepares for an instruction that looks at `reads` or passes on `keeps` of the host's
    /// flags. Clobbers R11.
    pub(super) fn provide_flags(&mut self, reads: u32, keeps: u32) {
        let keeps = if self.current().live_after { keeps } else { 0 };
        let needed = reads | keeps;
        if needed == 0 {
            return;
        }
        self.compute_flags();
        if matches!(self.flags, Flags::Memory) {
            if needed == iced_x86::RflagsBits::CF {
                flags::restore_carry(&mut self.asm);
            } else {
                flags::restore(&mut self.asm);
            }
        }
    }

    /// The current instruction is about to write guest registers: flags that could be computed
    /// from them no longer can.
    pub(super) fn forget_recipes(&mut self) {
        let one = self.current();
        let written = one.written;
        let passes_on = one.live_after && (!one.writes_flags || one.keeps_flags != 0);
        match &mut self.flags {
            Flags::Host(recipe) if recipe.as_ref().is_some_and(|r| r.registers & written != 0) => {
                *recipe = None;
            }
            Flags::Pending(recipe) if recipe.registers & written != 0 && passes_on => {
                let code = recipe.code.clone();
                self.asm.bytes(&code);
                self.flags = Flags::Host(None);
                if one.memory.is_some() || one.uses_stack() {
                    flags::save(&mut self.asm);
                    self.flags = Flags::Memory;
                }
            }
            _ => {}
        }
    }

    /// The current instruction has written the host's flags; `recipe` says how to compute them
    /// again.
    pub(super) fn wrote_flags(&mut self, recipe: Option<Recipe>) {
        self.flags = if self.current().live_after {
            Flags::Host(recipe)
        } else {
            Flags::Dead
        };
    }

    /// Writes the flags to memory, if they are not there yet.
    pub(super) fn save_flags(&mut self) {
        self.compute_flags();
        if matches!(self.flags, Flags::Host(_)) {
            flags::save(&mut self.asm);
            self.flags = Flags::Memory;
        }
    }

    // ---- ways out ----

    /// Goes on at `target` in the page, or in another page. With `live`, flags are needed there.
    pub(super) fn edge(&mut self, target: i32, live: bool) {
        if live {
            self.save_flags();
        }
        self.edge_saved(target);
    }

    /// Like [`Emitter::edge`], flags being where they belong.
    pub(super) fn edge_saved(&mut self, target: i32) {
        if (0..0x1000).contains(&target) {
            let jump = self.asm.jmp();
            self.edge_of_jump(jump, target);
        } else {
            self.asm.load(R10, layout::PAGE);
            self.asm.lea(R10, Mem::at(R10, target));
            self.indirect();
        }
    }

    /// A conditional jump at `jump` leads to `target` in the page, flags being where they belong.
    pub(super) fn edge_of_jump(&mut self, jump: usize, target: i32) {
        self.exits.push(Exit {
            jump,
            target,
            kind: Way::Edge,
            flags: Flags::Memory,
        });
    }

    /// Goes on at the linear address in R10, which is canonical.
    pub(super) fn indirect(&mut self) {
        for jump in jumps::look_up(&mut self.asm, Transfer::Jump) {
            self.asm.bind(jump);
        }
        self.leave();
    }

    /// Checks that R10, which RIP holds too, is canonical; the current instruction's slow path
    /// deals with it otherwise. Clobbers R11.
    pub(super) fn check_canonical(&mut self) {
        self.asm.mov(R11, R10);
        self.asm.shift(7, R11, self.sign_bit);
        self.asm.alu_imm(true, 0, R11, 1);
        self.asm.alu_imm(true, 7, R11, 1);
        let jump = self.asm.jcc(cc::A);
        self.slow_jump(jump);
    }

    /// Leaves generated code: RIP says where to go on.
    pub(super) fn leave(&mut self) {
        self.leave_to(self.trampolines.leave);
    }

    /// Leaves generated code by a trampoline.
    pub(super) fn leave_to(&mut self, trampoline: u64) {
        let jump = self.asm.jmp();
        let target = trampoline.wrapping_sub(self.address) as i64;
        self.asm.patch(jump, target);
    }

    pub(super) fn call_to(&mut self, trampoline: u64) {
        let call = self.asm.call();
        let target = trampoline.wrapping_sub(self.address) as i64;
        self.asm.patch(call, target);
    }

    // ---- the end ----

    /// Writes slow paths and exits.
    fn cold(mut self) -> Emitted {
        let mut fixups = Vec::new();
        self.miss_stack();
        let slow = std::mem::take(&mut self.slow);
        // The block's own ways to the trampoline, which wants to know the block.
        let gates = [self.gate(&slow, false), self.gate(&slow, true)];
        for one in slow {
            let start = self.asm.here() as u32;
            self.slow_path(&one, gates[usize::from(one.misses)]);
            fixups.extend(one.accesses.iter().map(|at| Fixup {
                instructions: *at as u32..*at as u32 + 1,
                resume: start,
            }));
        }
        for exit in std::mem::take(&mut self.exits) {
            self.exit(&exit);
        }
        fixups.sort_unstable_by_key(|fixup| fixup.instructions.start);
        Emitted {
            code: self.asm.code,
            forward_entry: self.forward_entry,
            fixups,
        }
    }

    /// The way of those slow paths that a miss of the TLB leads to, or of the others.
    fn gate(&mut self, slow: &[Slow], misses: bool) -> usize {
        let gate = self.asm.here();
        if slow.iter().any(|one| one.misses == misses) {
            let block = self.block | if misses { MISSED } else { 0 };
            self.asm.mov_imm(R11, block);
            self.leave_to(self.trampolines.callout);
        }
        gate
    }

    fn slow_path(&mut self, slow: &Slow, gate: usize) {
        for jump in &slow.jumps {
            self.asm.bind(*jump);
        }
        match &slow.before {
            Flags::Pending(recipe) => {
                self.asm.bytes(&recipe.code);
                flags::save(&mut self.asm);
            }
            Flags::Host(_) => flags::save(&mut self.asm),
            Flags::Memory | Flags::Dead => {}
        }
        // SAFETY is the reader's: the array outlives the code, and only its address is used.
        let op = self.ops.wrapping_add(slow.index) as u64;
        self.asm.mov_imm(R10, op);
        let call = self.asm.call();
        self.asm.patch(call, gate as i64);
        let Some(back) = &slow.back else {
            return;
        };
        if back.vectors != 0 {
            self.call_to(self.trampolines.load_vectors);
        }
        if back.flags_in_host {
            flags::restore(&mut self.asm);
        }
        let jump = self.asm.jmp();
        self.asm.patch(jump, back.at as i64);
    }

    fn exit(&mut self, exit: &Exit) {
        self.asm.bind(exit.jump);
        if let Flags::Pending(recipe) = &exit.flags {
            self.asm.bytes(&recipe.code);
            flags::save(&mut self.asm);
        }
        match exit.kind {
            Way::Edge => {
                // A loop has a jump that does not lead down.
                let forward = exit.target > self.start_offset();
                let field = self.address + exit.jump as u64;
                self.asm
                    .mov_imm(R11, field | if forward { FORWARD } else { 0 });
                self.asm.store(layout::LINK, R11);
            }
            Way::Attention => {}
            Way::Clock => {
                let count = self.all.len() as i32;
                self.asm.alu_mem_imm(0, layout::COUNTDOWN, count);
            }
        }
        self.asm.load(R10, layout::PAGE);
        if exit.target != 0 {
            self.asm.lea(R10, Mem::at(R10, exit.target));
        }
        self.asm.store(layout::RIP, R10);
        self.leave();
    }

    /// Makes sure that vector registers are loaded, as far as `need` says; else the current
    /// instruction takes its slow path.
    pub(super) fn need_vectors(&mut self, need: u8) {
        if self.vectors & need == need {
            return;
        }
        self.clobber_flags();
        // What AVX needs includes what SSE needs.
        let decisive = if need == 3 { 2 } else { 1 };
        self.asm.test_byte(layout::VECTORS_LOADED, decisive);
        self.asm.bytes(&[0x75, 0]); // JNE
        let skip = self.asm.here();
        self.call_to(self.trampolines.load_vectors);
        self.asm.test_byte(layout::VECTORS_LOADED, decisive);
        let refused = self.asm.jcc(cc::E);
        self.slow_jump(refused);
        let distance = self.asm.here() - skip;
        self.asm.code[skip - 1] = distance as u8;
        self.vectors |= need;
    }

    /// Loads a guest register into a scratch register, or says where it lives.
    pub(super) fn in_register(&mut self, guest: usize, scratch: Reg) -> Reg {
        match layout::home(guest) {
            Some(home) => home,
            None => {
                self.asm.load(scratch, layout::register(guest));
                scratch
            }
        }
    }
}

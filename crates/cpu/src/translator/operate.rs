//! Instructions that run as themselves, with their registers renamed and their memory operand
//! replaced by a host address.

use super::access::Access;
use super::analysis::{is_cmov, is_set};
use super::asm::{R10, R11, Reg};
use super::branch::condition_of;
use super::emit::Emitter;
use super::flags::{self, Flags, Recipe};
use super::layout;
use iced_x86::{Code, Instruction, Mnemonic as M, OpKind, Register};

/// An instruction as the host executes it.
pub(super) struct Renamed {
    pub bytes: Vec<u8>,
    /// Guest registers in memory, and the scratch registers that stand for them.
    loads: [Option<(usize, Reg)>; 2],
}

impl Emitter<'_> {
    pub(super) fn plain(&mut self) {
        let one = self.current();
        let mut i = *one.instruction();
        // What was decoded as BSF on a processor without TZCNT must not become TZCNT.
        if matches!(i.mnemonic(), M::Bsf | M::Bsr) {
            i.set_has_rep_prefix(false);
            i.set_has_repne_prefix(false);
        }
        let condition = is_set(i.mnemonic()) || is_cmov(i.mnemonic());
        // Chosen before anything is written: a form that cannot be renamed is called.
        let Some(renamed) = self.rename(&i) else {
            return self.callout();
        };
        let divides = matches!(i.mnemonic(), M::Div | M::Idiv);
        if one.memory.is_some() {
            self.clobber_flags();
        }
        self.forget_recipes();
        if let Some(memory) = one.memory {
            self.operand(&i, memory.size, memory.write);
            if i.has_lock_prefix() || i.mnemonic() == M::Xchg {
                self.check_lock(memory.size);
            }
        }
        let mut bytes = renamed.bytes.clone();
        if condition {
            bytes = self.conditional(&i, bytes);
        } else {
            self.provide_flags(one.reads_flags, one.keeps_flags);
        }
        for (guest, scratch) in renamed.loads.iter().flatten() {
            self.asm.load(*scratch, layout::register(*guest));
        }
        if one.memory.is_some() || divides {
            self.may_fault();
        }
        self.asm.bytes(&bytes);
        for (guest, scratch) in renamed.loads.iter().flatten() {
            if one.written >> guest & 1 != 0 {
                self.asm.store(layout::register(*guest), *scratch);
            }
        }
        if one.writes_flags {
            let recipe = self.recipe(&i, &renamed);
            self.wrote_flags(recipe);
        }
        self.done();
    }

    /// R10: host address of the memory operand.
    fn operand(&mut self, i: &Instruction, size: u32, write: bool) {
        let access = if write { Access::Write } else { Access::Read };
        if Self::is_on_stack(i) {
            self.stack_access(i.memory_displacement64() as i32, size, access);
        } else {
            self.address(i);
            self.lookup(size, access);
        }
    }

    /// A locked access that is not aligned takes the slow path, which knows of split locks.
    pub(super) fn check_lock(&mut self, size: u32) {
        if size > 1 {
            self.asm.rr(false, &[0xf6], 0, R10); // TEST R10B
            self.asm.bytes(&[size as u8 - 1]);
            let split = self.asm.jcc(super::asm::cc::NE);
            self.slow_jump(split);
        }
    }

    /// SETcc or CMOVcc: with the flags in memory, the instruction asks for what a test of them
    /// says.
    fn conditional(&mut self, i: &Instruction, bytes: Vec<u8>) -> Vec<u8> {
        self.compute_flags();
        if !matches!(self.flags, Flags::Memory) {
            return bytes;
        }
        let condition = flags::test_saved(&mut self.asm, condition_of(i));
        let mut changed = *i;
        changed.set_code(code_with(i, condition));
        self.rename(&changed).map_or(bytes, |renamed| renamed.bytes)
    }

    /// The instruction with host registers and, for memory, `[R10]`. `None` if it has no such
    /// form.
    pub(super) fn rename(&mut self, i: &Instruction) -> Option<Renamed> {
        let mut host = *i;
        let mut loads = [None; 2];
        let has_memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        for n in 0..i.op_count() {
            match i.op_kind(n) {
                OpKind::Memory => point_to_r10(&mut host),
                OpKind::Register if i.op_register(n).is_gpr() => {
                    let register = i.op_register(n);
                    if is_high_byte(register) {
                        continue;
                    }
                    let guest = register.full_register().number();
                    let to = match layout::home(guest) {
                        Some(home) => home,
                        None => scratch_for(&mut loads, guest, has_memory)?,
                    };
                    host.set_op_register(n, sized(to, register.size()));
                }
                _ => {}
            }
        }
        if !self.implicit_registers_stay(i) {
            return None;
        }
        // An encoder leaves part of an instruction behind when it fails.
        self.encoder.set_buffer(Vec::new());
        let encoded = self.encoder.encode(&host, 0);
        let bytes = self.encoder.take_buffer();
        encoded.ok().map(|_| Renamed { bytes, loads })
    }

    /// Whether the registers that the instruction uses without naming them have the same homes
    /// in guest and host.
    fn implicit_registers_stay(&self, i: &Instruction) -> bool {
        let named = (0..i.op_count())
            .filter(|&n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_gpr())
            .fold(0u32, |set, n| {
                set | 1 << i.op_register(n).full_register().number()
            });
        // RAX, RCX, RDX, RBX, RSI and RDI.
        self.current().written & !named & !0xcf == 0
    }

    /// How to compute the flags that this instruction leaves, from what it leaves in registers.
    fn recipe(&self, i: &Instruction, renamed: &Renamed) -> Option<Recipe> {
        if !self.current().live_after || renamed.loads[0].is_some() || i.op_count() != 2 {
            return None;
        }
        let register = |n: u32| {
            (i.op_kind(n) == OpKind::Register && !is_high_byte(i.op_register(n)))
                .then(|| i.op_register(n))
        };
        let number = |r: Register| r.full_register().number();
        let compares = matches!(i.mnemonic(), M::Cmp | M::Test);
        if compares && self.current().memory.is_none() {
            let registers = [0, 1].into_iter().filter_map(register);
            return Some(Recipe {
                code: renamed.bytes.clone(),
                registers: registers.fold(0, |set, r| set | 1 << number(r)),
            });
        }
        let result = register(0)?;
        let (wide, full) = (result.size() == 8, number(result));
        if result.size() < 4 || compares {
            return None;
        }
        let home = layout::home(full)?;
        let code = match i.mnemonic() {
            M::And | M::Or | M::Xor => flags::logic_again(wide, home),
            M::Add | M::Sub => {
                let other = match register(1) {
                    Some(other) if number(other) != full => Ok(layout::home(number(other))?),
                    None if i.op_kind(1) != OpKind::Memory && i.op_kind(1) != OpKind::Register => {
                        Err(i.immediate(1) as i32)
                    }
                    _ => return None,
                };
                flags::arithmetic_again(wide, i.mnemonic() == M::Sub, home, other)
            }
            _ => return None,
        };
        let mut registers = 1 << full;
        if let (M::Add | M::Sub, Some(other)) = (i.mnemonic(), register(1)) {
            registers |= 1 << number(other);
        }
        Some(Recipe { code, registers })
    }

    pub(super) fn lea(&mut self) {
        let one = self.current();
        let i = *one.instruction();
        self.forget_recipes();
        let destination = i.op_register(0);
        let guest = destination.full_register().number();
        // A 16-bit destination keeps the rest of its register.
        let Some(home) = layout::home(guest).filter(|_| destination.size() != 2) else {
            return self.lea_slowly(&i, guest);
        };
        let operand = self.effective(&i);
        if i.memory_base() == Register::None && operand.index.is_none() {
            let value = operand.disp as i64 as u64;
            let mask = if destination.size() == 4 {
                0xffff_ffff
            } else {
                u64::MAX
            };
            self.asm.mov_imm(home, value & mask);
        } else {
            self.asm.rm(destination.size() == 8, &[0x8d], home, operand);
        }
        self.done();
    }

    fn lea_slowly(&mut self, i: &Instruction, guest: usize) {
        let operand = self.effective(i);
        if i.memory_base() == Register::None && operand.index.is_none() {
            self.asm.mov_imm(R10, operand.disp as i64 as u64);
        } else {
            self.asm.lea(R10, operand);
        }
        let to = layout::register(guest);
        match (i.op_register(0).size(), layout::home(guest)) {
            (2, Some(home)) => {
                self.asm.bytes(&[0x66]);
                self.asm.rr(false, &[0x8b], home, R10);
            }
            (2, None) => {
                self.asm.bytes(&[0x66]);
                self.asm.rm(false, &[0x89], R10, to);
            }
            (4, _) => {
                self.asm.rr(false, &[0x8b], R10, R10);
                self.asm.store(to, R10);
            }
            _ => self.asm.store(to, R10),
        }
        self.done();
    }

    pub(super) fn vector(&mut self, avx: bool) {
        let one = self.current();
        let i = *one.instruction();
        let Some(renamed) = self.rename(&i) else {
            return self.callout();
        };
        self.need_vectors(if avx { 3 } else { 1 });
        if one.memory.is_some() {
            self.clobber_flags();
        }
        self.forget_recipes();
        if let Some(memory) = one.memory {
            self.operand(&i, memory.size, memory.write);
        }
        self.provide_flags(one.reads_flags, one.keeps_flags);
        for (guest, scratch) in renamed.loads.iter().flatten() {
            self.asm.load(*scratch, layout::register(*guest));
        }
        // An unmasked floating-point exception is a fault, too.
        self.may_fault();
        self.asm.bytes(&renamed.bytes);
        for (guest, scratch) in renamed.loads.iter().flatten() {
            if one.written >> guest & 1 != 0 {
                self.asm.store(layout::register(*guest), *scratch);
            }
        }
        if one.writes_flags {
            self.wrote_flags(None);
        }
        self.done();
    }
}

/// A scratch register for a guest register that lives in memory: R11, then R10 if it is free.
fn scratch_for(
    loads: &mut [Option<(usize, Reg)>; 2],
    guest: usize,
    has_memory: bool,
) -> Option<Reg> {
    if let Some((_, scratch)) = loads.iter().flatten().find(|(g, _)| *g == guest) {
        return Some(*scratch);
    }
    let (slot, scratch) = match loads {
        [None, _] => (&mut loads[0], R11),
        [_, None] if !has_memory => (&mut loads[1], R10),
        _ => return None,
    };
    *slot = Some((guest, scratch));
    Some(scratch)
}

fn point_to_r10(host: &mut Instruction) {
    host.set_segment_prefix(Register::None);
    host.set_memory_base(Register::R10);
    host.set_memory_index(Register::None);
    host.set_memory_index_scale(1);
    host.set_memory_displacement64(0);
    host.set_memory_displ_size(0);
}

fn is_high_byte(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::CH | Register::DH | Register::BH
    )
}

/// A host register of `size` bytes.
fn sized(register: Reg, size: usize) -> Register {
    let base = match size {
        1 if register < 4 => Register::AL,
        // With a REX prefix these follow the first four.
        1 => return Register::SPL + u32::from(register - 4),
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    base + u32::from(register)
}

/// A SETcc or CMOVcc with another condition: equal or not equal.
fn code_with(i: &Instruction, condition: u8) -> Code {
    let equal = condition == super::asm::cc::E;
    let pick = |e, ne| if equal { e } else { ne };
    if is_set(i.mnemonic()) {
        return pick(Code::Sete_rm8, Code::Setne_rm8);
    }
    match i.op_register(0).size() {
        2 => pick(Code::Cmove_r16_rm16, Code::Cmovne_r16_rm16),
        4 => pick(Code::Cmove_r32_rm32, Code::Cmovne_r32_rm32),
        _ => pick(Code::Cmove_r64_rm64, Code::Cmovne_r64_rm64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_have_every_size() {
        assert_eq!(sized(14, 1), Register::R14L);
        assert_eq!(sized(6, 1), Register::SIL);
        assert_eq!(sized(2, 1), Register::DL);
        assert_eq!(sized(15, 4), Register::R15D);
    }
}

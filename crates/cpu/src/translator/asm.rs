//! A small assembler for the code around guest instructions.
//!
//! Guest instructions themselves are encoded by `iced-x86`; what surrounds them (address
//! computations, TLB lookups, exits) is a few dozen fixed forms, which this writes directly.

/// A host register by its encoding.
pub(super) type Reg = u8;

pub(super) const RAX: Reg = 0;
pub(super) const RDX: Reg = 2;
pub(super) const RSP: Reg = 4;
pub(super) const RBP: Reg = 5;
pub(super) const RSI: Reg = 6;
pub(super) const RDI: Reg = 7;
pub(super) const R10: Reg = 10;
pub(super) const R11: Reg = 11;

/// Condition codes as Jcc encodes them.
pub(super) mod cc {
    pub(crate) const AE: u8 = 3;
    pub(crate) const E: u8 = 4;
    pub(crate) const NE: u8 = 5;
    pub(crate) const A: u8 = 7;
    pub(crate) const S: u8 = 8;
}

/// A memory operand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mem {
    pub base: Reg,
    /// Index register and log2 of its scale.
    pub index: Option<(Reg, u8)>,
    pub disp: i32,
}

impl Mem {
    pub(super) fn at(base: Reg, disp: i32) -> Mem {
        Mem {
            base,
            index: None,
            disp,
        }
    }
}

/// Code being written, at addresses relative to its start.
#[derive(Default)]
pub(super) struct Asm {
    pub code: Vec<u8>,
}

impl Asm {
    /// Where the next byte goes.
    pub(super) fn here(&self) -> usize {
        self.code.len()
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    fn imm32(&mut self, value: i32) {
        self.bytes(&value.to_le_bytes());
    }

    fn rex(&mut self, wide: bool, reg: Reg, index: Reg, base: Reg) {
        let rex = u8::from(wide) << 3 | reg >> 3 << 2 | index >> 3 << 1 | base >> 3;
        if rex != 0 {
            self.code.push(0x40 | rex);
        }
    }

    /// An instruction with ModRM, `rm` in memory.
    pub(super) fn rm(&mut self, wide: bool, opcode: &[u8], reg: Reg, mem: Mem) {
        let index = mem.index.map_or(0, |(index, _)| index);
        self.rex(wide, reg, index, mem.base);
        self.bytes(opcode);
        let mode = match mem.disp {
            0 if mem.base & 7 != RBP => 0,
            -128..=127 => 1,
            _ => 2,
        };
        let modrm = mode << 6 | (reg & 7) << 3;
        match mem.index {
            None if mem.base & 7 != RSP => self.code.push(modrm | mem.base & 7),
            None => self.bytes(&[modrm | 4, 0x24]),
            Some((index, scale)) => {
                self.bytes(&[modrm | 4, scale << 6 | (index & 7) << 3 | mem.base & 7]);
            }
        }
        match mode {
            0 => {}
            1 => self.code.push(mem.disp as u8),
            _ => self.imm32(mem.disp),
        }
    }

    /// An instruction with ModRM, `rm` a register.
    pub(super) fn rr(&mut self, wide: bool, opcode: &[u8], reg: Reg, rm: Reg) {
        self.rex(wide, reg, 0, rm);
        self.bytes(opcode);
        self.code.push(0xc0 | (reg & 7) << 3 | rm & 7);
    }

    /// `mov to, [mem]`, 64 bits.
    pub(super) fn load(&mut self, to: Reg, mem: Mem) {
        self.rm(true, &[0x8b], to, mem);
    }

    /// `mov to, [mem]`, 32 bits.
    pub(super) fn load32(&mut self, to: Reg, mem: Mem) {
        self.rm(false, &[0x8b], to, mem);
    }

    /// `mov [mem], from`, 64 bits.
    pub(super) fn store(&mut self, mem: Mem, from: Reg) {
        self.rm(true, &[0x89], from, mem);
    }

    /// `mov to, from`, 64 bits.
    pub(super) fn mov(&mut self, to: Reg, from: Reg) {
        self.rr(true, &[0x8b], to, from);
    }

    /// `lea to, [mem]`, 64 bits.
    pub(super) fn lea(&mut self, to: Reg, mem: Mem) {
        self.rm(true, &[0x8d], to, mem);
    }

    /// `mov to, value` in the shortest form.
    pub(super) fn mov_imm(&mut self, to: Reg, value: u64) {
        if let Ok(value) = u32::try_from(value) {
            self.rex(false, 0, 0, to);
            self.code.push(0xb8 | to & 7);
            self.imm32(value as i32);
        } else if let Ok(value) = i32::try_from(value as i64) {
            self.rr(true, &[0xc7], 0, to);
            self.imm32(value);
        } else {
            self.rex(true, 0, 0, to);
            self.code.push(0xb8 | to & 7);
            self.bytes(&value.to_le_bytes());
        }
    }

    /// Group 1 (`add`, `or`, …, by `operation`) of a register and an immediate.
    pub(super) fn alu_imm(&mut self, wide: bool, operation: u8, reg: Reg, value: i32) {
        if let Ok(value) = i8::try_from(value) {
            self.rr(wide, &[0x83], operation, reg);
            self.code.push(value as u8);
        } else {
            self.rr(wide, &[0x81], operation, reg);
            self.imm32(value);
        }
    }

    /// Group 1 of 64-bit memory and an immediate.
    pub(super) fn alu_mem_imm(&mut self, operation: u8, mem: Mem, value: i32) {
        if let Ok(value) = i8::try_from(value) {
            self.rm(true, &[0x83], operation, mem);
            self.code.push(value as u8);
        } else {
            self.rm(true, &[0x81], operation, mem);
            self.imm32(value);
        }
    }

    /// `test dword [mem], value`.
    pub(super) fn test_mem(&mut self, mem: Mem, value: u32) {
        self.rm(false, &[0xf7], 0, mem);
        self.imm32(value as i32);
    }

    /// `cmp byte [mem], value`.
    pub(super) fn cmp_byte(&mut self, mem: Mem, value: u8) {
        self.rm(false, &[0x80], 7, mem);
        self.code.push(value);
    }

    /// `test byte [mem], value`.
    pub(super) fn test_byte(&mut self, mem: Mem, value: u8) {
        self.rm(false, &[0xf6], 0, mem);
        self.code.push(value);
    }

    /// `shl`, `shr` or `sar` (4, 5, 7) of a 64-bit register by a constant.
    pub(super) fn shift(&mut self, operation: u8, reg: Reg, count: u8) {
        self.rr(true, &[0xc1], operation, reg);
        self.code.push(count);
    }

    /// A jump with a condition; where its 32-bit displacement stands.
    pub(super) fn jcc(&mut self, condition: u8) -> usize {
        self.bytes(&[0x0f, 0x80 | condition, 0, 0, 0, 0]);
        self.here() - 4
    }

    /// A jump; where its displacement stands.
    pub(super) fn jmp(&mut self) -> usize {
        self.bytes(&[0xe9, 0, 0, 0, 0]);
        self.here() - 4
    }

    /// A call; where its displacement stands.
    pub(super) fn call(&mut self) -> usize {
        self.bytes(&[0xe8, 0, 0, 0, 0]);
        self.here() - 4
    }

    /// Makes the displacement at `at` lead to `target`, an offset from the start of the code that
    /// may lie outside it.
    pub(super) fn patch(&mut self, at: usize, target: i64) {
        let distance = (target - (at as i64 + 4)) as i32;
        self.code[at..at + 4].copy_from_slice(&distance.to_le_bytes());
    }

    /// Makes the displacement at `at` lead here.
    pub(super) fn bind(&mut self, at: usize) {
        let here = self.here();
        self.patch(at, here as i64);
    }
}

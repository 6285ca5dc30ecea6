//! Random short sequences: segment loads, far transfers, extended state to memory and back.

use crate::generate::{self, Random};
use crate::segments::{CODE_32, CODE_64, FLAT_DATA, LOCAL_COUNT};
use crate::{CODE, DATA, DATA_LEN, State, choices, first_difference, random_data};
use iced_x86::code_asm::*;
use iced_x86::{Decoder, DecoderOptions, Instruction};

/// A sequence with its state.
pub struct Case {
    pub name: &'static str,
    /// The first instruction, whose choices are left open.
    pub instruction: Instruction,
    pub code: Vec<u8>,
    pub before: State,
    pub data: Vec<u8>,
    /// Where an area of extended state was saved.
    saved: Option<Saved>,
}

struct Saved {
    at: usize,
    /// Written by FXSAVE or FXSAVE64: no header.
    legacy: bool,
}

/// Where far transfers mostly go, from the start of the code page.
const TARGET: u64 = 0x100;
/// Where operands lie in the data.
const OPERAND: u64 = 0x400;
const AREA: u64 = 0x1000;

type Write = fn(&mut CodeAssembler);
/// Name, 64-bit code and 32-bit code; `None` where the mode has no such instruction.
type Form = (&'static str, Option<Write>, Option<Write>);

/// Loads from AX, or from the operand that rSI points to.
const LOADS: [Form; 10] = [
    (
        "mov ds",
        Some(|a| a.mov(ds, ax).unwrap()),
        Some(|a| a.mov(ds, ax).unwrap()),
    ),
    (
        "mov es",
        Some(|a| a.mov(es, eax).unwrap()),
        Some(|a| a.mov(es, ax).unwrap()),
    ),
    (
        "mov gs",
        Some(|a| a.mov(gs, ax).unwrap()),
        Some(|a| a.mov(gs, ax).unwrap()),
    ),
    (
        "mov ss",
        Some(|a| a.mov(ss, ax).unwrap()),
        Some(|a| a.mov(ss, ax).unwrap()),
    ),
    (
        "mov es, memory",
        Some(|a| a.mov(es, word_ptr(rsi + 4)).unwrap()),
        Some(|a| a.mov(es, word_ptr(esi + 4)).unwrap()),
    ),
    (
        "pop gs",
        Some(|a| a.pop(gs).unwrap()),
        Some(|a| a.pop(gs).unwrap()),
    ),
    ("pop ds", None, Some(|a| a.pop(ds).unwrap())),
    (
        "lgs",
        Some(|a| a.lgs(ebx, ptr(rsi)).unwrap()),
        Some(|a| a.lgs(ebx, ptr(esi)).unwrap()),
    ),
    (
        "lss",
        Some(|a| a.lss(ebx, ptr(rsi)).unwrap()),
        Some(|a| a.lss(ebx, ptr(esi)).unwrap()),
    ),
    ("les", None, Some(|a| a.les(ebx, ptr(esi)).unwrap())),
];

/// Looks at a selector.
const LOOKS: [Form; 4] = [
    (
        "lar",
        Some(|a| a.lar(ebx, eax).unwrap()),
        Some(|a| a.lar(ebx, eax).unwrap()),
    ),
    (
        "lsl",
        Some(|a| a.lsl(rbx, rax).unwrap()),
        Some(|a| a.lsl(bx, ax).unwrap()),
    ),
    (
        "verr",
        Some(|a| a.verr(ax).unwrap()),
        Some(|a| a.verr(word_ptr(esi + 4)).unwrap()),
    ),
    (
        "verw",
        Some(|a| a.verw(word_ptr(rsi + 4)).unwrap()),
        Some(|a| a.verw(ax).unwrap()),
    ),
];

/// Far transfers: the operand that rSI points to, or the top of the stack. Operands with 64-bit
/// offsets are Intel's alone.
const TRANSFERS: [Form; 9] = [
    (
        "jmp m16:32",
        Some(|a| a.db(&[0xff, 0x2e]).unwrap()),
        Some(|a| a.db(&[0xff, 0x2e]).unwrap()),
    ),
    (
        "jmp m16:16",
        Some(|a| a.db(&[0x66, 0xff, 0x2e]).unwrap()),
        Some(|a| a.db(&[0x66, 0xff, 0x2e]).unwrap()),
    ),
    (
        "call m16:32",
        Some(|a| a.db(&[0xff, 0x1e]).unwrap()),
        Some(|a| a.db(&[0xff, 0x1e]).unwrap()),
    ),
    (
        "retf",
        Some(|a| a.db(&[0xcb]).unwrap()),
        Some(|a| a.db(&[0xcb]).unwrap()),
    ),
    (
        "retf imm",
        Some(|a| a.db(&[0xca, 0x10, 0]).unwrap()),
        Some(|a| a.db(&[0xca, 0x10, 0]).unwrap()),
    ),
    ("retf, 64-bit", Some(|a| a.db(&[0x48, 0xcb]).unwrap()), None),
    (
        "iret",
        Some(|a| a.db(&[0xcf]).unwrap()),
        Some(|a| a.db(&[0xcf]).unwrap()),
    ),
    ("iretq", Some(|a| a.db(&[0x48, 0xcf]).unwrap()), None),
    (
        "iret, 16-bit",
        Some(|a| a.db(&[0x66, 0xcf]).unwrap()),
        Some(|a| a.db(&[0x66, 0xcf]).unwrap()),
    ),
];

/// Extended state to the area that rDI points to.
const SAVES: [Form; 7] = [
    (
        "fxsave",
        Some(|a| a.fxsave(ptr(rdi)).unwrap()),
        Some(|a| a.fxsave(ptr(edi)).unwrap()),
    ),
    ("fxsave64", Some(|a| a.fxsave64(ptr(rdi)).unwrap()), None),
    (
        "xsave",
        Some(|a| a.xsave(ptr(rdi)).unwrap()),
        Some(|a| a.xsave(ptr(edi)).unwrap()),
    ),
    ("xsave64", Some(|a| a.xsave64(ptr(rdi)).unwrap()), None),
    (
        "xsaveopt",
        Some(|a| a.xsaveopt(ptr(rdi)).unwrap()),
        Some(|a| a.xsaveopt(ptr(edi)).unwrap()),
    ),
    (
        "xsavec",
        Some(|a| a.xsavec(ptr(rdi)).unwrap()),
        Some(|a| a.xsavec(ptr(edi)).unwrap()),
    ),
    ("xsavec64", Some(|a| a.xsavec64(ptr(rdi)).unwrap()), None),
];

/// And back.
const RESTORES: [Form; 4] = [
    (
        "fxrstor",
        Some(|a| a.fxrstor(ptr(rdi)).unwrap()),
        Some(|a| a.fxrstor(ptr(edi)).unwrap()),
    ),
    ("fxrstor64", Some(|a| a.fxrstor64(ptr(rdi)).unwrap()), None),
    (
        "xrstor",
        Some(|a| a.xrstor(ptr(rdi)).unwrap()),
        Some(|a| a.xrstor(ptr(edi)).unwrap()),
    ),
    ("xrstor64", Some(|a| a.xrstor64(ptr(rdi)).unwrap()), None),
];

fn selector(random: &mut Random, has_ldt: bool) -> u16 {
    match random.below(8) {
        // Null with another RPL than 0 does not outlast an interrupt on the host.
        0 => 0,
        1 => FLAT_DATA,
        2 => CODE_32,
        3 => CODE_64,
        // Everything in the GDT but the segment that holds the processor's number.
        4 => (random.below(15) << 3 | random.below(4)) as u16,
        // Beyond its end.
        5 => (0x80 + 8 * random.below(100)) as u16,
        _ if has_ldt => (random.below(LOCAL_COUNT as u64 + 2) << 3 | 7) as u16,
        _ => FLAT_DATA,
    }
}

fn assemble(bits: u32, write: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    write(&mut a);
    a.assemble(CODE).unwrap()
}

impl Case {
    pub fn new(random: &mut Random, has_ldt: bool) -> Case {
        let bits = if random.below(2) == 0 { 64 } else { 32 };
        let mut before = State {
            rip: CODE,
            cs: if bits == 64 { CODE_64 } else { CODE_32 },
            ..generate::state(random, &Instruction::default(), bits)
        };
        let mut data = random_data(random);
        before.gpr[6] = DATA + OPERAND;
        before.gpr[4] = DATA + DATA_LEN / 2;
        let mut case = Case {
            name: "",
            instruction: Instruction::default(),
            code: Vec::new(),
            before,
            data: Vec::new(),
            saved: None,
        };
        match random.below(4) {
            0 => case.load(random, bits, has_ldt, &mut data),
            1 => case.transfer(random, bits, has_ldt, &mut data),
            2 => case.look(random, bits, has_ldt, &mut data),
            _ => case.state(random, bits, &mut data),
        }
        case.instruction = Decoder::new(bits, &case.code, DecoderOptions::NONE).decode();
        case.data = data;
        case
    }

    fn pick(&mut self, random: &mut Random, forms: &[Form], bits: u32) -> Write {
        loop {
            let (name, long, legacy) = forms[random.below(forms.len() as u64) as usize];
            self.name = name;
            if let Some(write) = if bits == 64 { long } else { legacy } {
                return write;
            }
        }
    }

    /// A segment load, what it left in the registers, and an access through the segment.
    fn load(&mut self, random: &mut Random, bits: u32, has_ldt: bool, data: &mut [u8]) {
        let write = self.pick(random, &LOADS, bits);
        self.place_selector(random, has_ldt, data);
        let access = random.below(4);
        self.before.gpr[1] = match random.below(4) {
            0 => random.below(0x1100),
            1 => 0x7f8 + random.below(16),
            2 => 0xff8 + random.below(16),
            _ => DATA + random.below(0x1000),
        };
        self.code = assemble(bits, |a| {
            write(a);
            a.mov(edx, ds).unwrap();
            a.mov(ebp, es).unwrap();
            a.mov(edi, gs).unwrap();
            if bits == 32 {
                match access {
                    0 => a.mov(eax, dword_ptr(ecx)).unwrap(),
                    1 => a.mov(dword_ptr(ecx).es(), eax).unwrap(),
                    2 => a.mov(dword_ptr(ecx), eax).unwrap(),
                    _ => a.mov(eax, dword_ptr(ecx).gs()).unwrap(),
                }
            }
        });
    }

    fn look(&mut self, random: &mut Random, bits: u32, has_ldt: bool, data: &mut [u8]) {
        let write = self.pick(random, &LOOKS, bits);
        self.place_selector(random, has_ldt, data);
        self.code = assemble(bits, write);
    }

    /// AX, the operand (offset, then selector) and the top of the stack hold one selector.
    fn place_selector(&mut self, random: &mut Random, has_ldt: bool, data: &mut [u8]) {
        let selector = selector(random, has_ldt);
        self.before.gpr[0] = random.next() & 0xffff_0000 | u64::from(selector);
        let at = OPERAND as usize + 4;
        data[at..at + 2].copy_from_slice(&selector.to_le_bytes());
        let top = (DATA_LEN / 2) as usize;
        data[top..top + 2].copy_from_slice(&selector.to_le_bytes());
    }

    fn transfer(&mut self, random: &mut Random, bits: u32, has_ldt: bool, data: &mut [u8]) {
        let write = self.pick(random, &TRANSFERS, bits);
        self.code = assemble(bits, write);
        let selector = selector(random, has_ldt);
        let in_segment = random.below(2) == 0;
        let offset = match random.below(8) {
            0 => random.next(),
            1 => (CODE + TARGET) | 1 << 47,
            _ if in_segment => TARGET,
            _ => CODE + TARGET,
        };
        let wide = self.name.contains("64") || self.name == "iretq";
        let size = match self.name {
            name if name.contains("16-bit") || name.contains("16:16") => 2,
            _ if wide => 8,
            _ => 4,
        };
        let is_long = selector & !3 == CODE_64 & !3;
        let offset = if wide && !is_long {
            choices::offset_in_compatibility_mode(offset)
        } else {
            offset
        };
        let flags = self.before.rflags & 0x8d5 | 2;
        let new_rsp = DATA + DATA_LEN / 4;
        let new_ss: u16 = if random.below(8) == 0 {
            random.next() as u16
        } else {
            FLAT_DATA
        };
        let frame = [offset, selector.into(), flags, new_rsp, new_ss.into()];
        let at = OPERAND as usize;
        data[at..at + size].copy_from_slice(&offset.to_le_bytes()[..size]);
        data[at + size..at + size + 2].copy_from_slice(&selector.to_le_bytes());
        // RETF has no flags in its frame, which an inner level does not matter to.
        let top = (DATA_LEN / 2) as usize;
        for (i, value) in frame.into_iter().enumerate() {
            let at = top + size * i;
            data[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        }
    }

    fn state(&mut self, random: &mut Random, bits: u32, data: &mut [u8]) {
        // Components: any of x87, SSE and AVX.
        let mask = random.below(8);
        (self.before.gpr[0], self.before.gpr[2]) = (mask, 0);
        let misaligned = random.below(16) == 0;
        self.before.gpr[7] = DATA + AREA + if misaligned { random.below(64) } else { 0 };
        let at = AREA as usize;
        if random.below(2) == 0 {
            let write = self.pick(random, &SAVES, bits);
            self.code = assemble(bits, write);
            self.saved = Some(Saved {
                at,
                legacy: self.name.starts_with("fx"),
            });
            return;
        }
        let write = self.pick(random, &RESTORES, bits);
        self.code = assemble(bits, write);
        // A header that is good, mostly.
        let present = random.below(8);
        let compacted = random.below(2) == 0;
        let format = if compacted {
            1 << 63 | present | random.below(8)
        } else {
            0
        };
        let mut header = [0u64; 8];
        (header[0], header[1]) = (present, format);
        match random.below(12) {
            0 => header[0] |= 1 << 62,
            1 => header[1] ^= 1 << (60 + random.below(2)),
            2 => header[2 + random.below(6) as usize] = 1,
            _ => {}
        }
        for (i, word) in header.into_iter().enumerate() {
            let at = at + 512 + 8 * i;
            data[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        let other = generate::state(random, &Instruction::default(), bits);
        data[at..at + 416].copy_from_slice(&other.fpu[..416]);
        if random.below(12) == 0 {
            // A reserved bit of MXCSR; the host has one bit more than is offered here.
            data[at + 24 + 3] = 0x80;
        }
    }

    /// The first byte of memory that differs and should not.
    pub fn first_difference(&self, native: &[u8], guest: &[u8]) -> Option<usize> {
        let Some(saved) = &self.saved else {
            return first_difference(native, guest);
        };
        let ignored = |at: usize| {
            let at = at.checked_sub(saved.at);
            at.is_some_and(|at| choices::is_open_in_area(at, saved.legacy))
        };
        (0..native.len()).find(|&at| native[at] != guest[at] && !ignored(at))
    }
}

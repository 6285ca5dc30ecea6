//! A guest with descriptor tables: every vector's handler halts where its number can be told.

use crate::guest::Guest;
use arch::exit::{ExitReason, VmExit};
use arch::segment::{DescriptorTable, Segment};
use iced_x86::code_asm::CodeAssembler;

/// Where the code of a test goes.
pub const CODE: u64 = 0x2_0000;
/// Top of the stack of ring 0.
pub const STACK: u64 = 0x3_0000;
/// Top of the stack of ring 3.
pub const USER_STACK: u64 = 0x3_8000;
/// Interrupt-stack-table stack 1.
pub const IST1: u64 = 0x3_c000;
/// A page for data.
pub const DATA: u64 = 0x4_0000;
/// Handlers: vector n halts at HANDLERS + 16 n.
pub const HANDLERS: u64 = 0x1_0000;
pub const GDT: u64 = 0x7000;
pub const IDT: u64 = 0x8000;
pub const TSS: u64 = 0x9000;

pub const KERNEL_CODE: u16 = 0x08;
pub const KERNEL_DATA: u16 = 0x10;
pub const USER_DATA: u16 = 0x1b;
pub const USER_CODE: u16 = 0x23;
pub const TSS_SELECTOR: u16 = 0x28;
/// A data segment that is not present.
pub const ABSENT: u16 = 0x38;
/// 16-byte system descriptor of the TSS takes two slots; a 32-bit code segment follows.
pub const COMPAT_CODE: u16 = 0x40;

/// Assembles 16-, 32- or 64-bit code for an address.
pub fn assemble(bits: u32, at: u64, write: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    write(&mut a);
    a.assemble(at).unwrap()
}

/// A 64-bit interrupt gate.
pub fn gate64(offset: u64, selector: u16, kind: u64, dpl: u64, ist: u64) -> [u64; 2] {
    let low = offset & 0xffff
        | u64::from(selector) << 16
        | ist << 32
        | (0x80 | dpl << 5 | kind) << 40
        | (offset >> 16 & 0xffff) << 48;
    [low, offset >> 32]
}

/// A guest in 64-bit mode at CPL 0 with tables set up.
pub fn long_guest() -> Guest {
    let mut guest = Guest::new(0x10_0000);
    guest.long_mode(0);
    let descriptors: [u64; 9] = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x0000_8b00_0000_0067 | (TSS & 0xff_ffff) << 16,
        0,
        0x00cf_1300_0000_ffff,
        0x00cf_9b00_0000_ffff,
    ];
    for (i, descriptor) in descriptors.into_iter().enumerate() {
        guest.memory.write_u64(GDT + 8 * i as u64, descriptor);
    }
    for vector in 0..256 {
        let gate = gate64(HANDLERS + 16 * vector, KERNEL_CODE, 14, 0, 0);
        guest.memory.write_u64(IDT + 16 * vector, gate[0]);
        guest.memory.write_u64(IDT + 16 * vector + 8, gate[1]);
        guest.memory.write(HANDLERS + 16 * vector, &[0xf4]);
    }
    guest.memory.write_u64(TSS + 4, STACK);
    guest.memory.write_u64(TSS + 36, IST1);
    guest.memory.write(TSS + 102, &0x68u16.to_le_bytes());
    let state = &mut guest.vcpu.state;
    state.gdtr = DescriptorTable {
        base: GDT,
        limit: 8 * 9 - 1,
    };
    state.idtr = DescriptorTable {
        base: IDT,
        limit: 0xfff,
    };
    state.tr.base = TSS;
    state.tr.limit = 0x67;
    state.tr.selector = TSS_SELECTOR;
    let selectors = [KERNEL_DATA, KERNEL_CODE, KERNEL_DATA, KERNEL_DATA, 0, 0];
    for (segment, selector) in state.segments.iter_mut().zip(selectors) {
        segment.selector = selector;
        if selector == 0 {
            *segment = Segment::UNUSABLE;
        }
    }
    state.rip = CODE;
    state.regs[4] = STACK;
    state.set_rflags(2);
    guest
}

impl Guest {
    /// Puts code at [`CODE`] and points RIP there.
    pub fn load(&mut self, code: &[u8]) {
        self.memory.write(CODE, code);
        self.vcpu.entered_from_user();
        self.vcpu.state.rip = CODE;
    }

    /// Runs; the vector whose handler halted.
    pub fn run_to_handler(&mut self) -> u8 {
        let exit = self.run();
        assert_eq!(
            exit.reason,
            ExitReason::Hlt,
            "{exit:?} at {:#x}",
            self.vcpu.state.rip
        );
        let at = self.vcpu.state.rip;
        assert!(
            (HANDLERS..HANDLERS + 0x1000).contains(&at),
            "halted at {at:#x}"
        );
        ((at - HANDLERS) / 16) as u8
    }

    /// Runs code that ends in HLT.
    pub fn run_to_halt(&mut self) {
        let exit = self.run();
        assert_eq!(
            exit.reason,
            ExitReason::Hlt,
            "{exit:?} at {:#x}",
            self.vcpu.state.rip
        );
        let at = self.vcpu.state.rip;
        assert!(
            !(HANDLERS..HANDLERS + 0x1000).contains(&at),
            "vector {} was raised; CR2 {:#x}",
            (at - HANDLERS) / 16,
            self.vcpu.state.cr2
        );
    }

    /// Runs; the exit, which must have this reason.
    pub fn run_to(&mut self, reason: ExitReason) -> VmExit {
        let exit = self.run();
        assert_eq!(
            exit.reason, reason,
            "{exit:?} at {:#x}",
            self.vcpu.state.rip
        );
        exit
    }

    /// Quadword `n` from the top of the current stack.
    pub fn stack(&self, n: u64) -> u64 {
        self.memory.read_u64(self.vcpu.state.regs[4] + 8 * n)
    }
}

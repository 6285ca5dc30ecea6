//! Virtual-8086 mode extensions and protected-mode virtual interrupts.

use crate::bench::*;
use crate::guest::Guest;
use crate::modes::{protected_guest, to_ring3};
use arch::control_registers::{Cr4, Rflags};
use arch::exit::ExitReason;
use arch::interruption::{InterruptionInfo, InterruptionType};
use arch::segment::{AccessRights, Segment};
use iced_x86::code_asm::*;

const IF: u64 = Rflags::IF.bits();
const VIF: u64 = Rflags::VIF.bits();
const VIP: u64 = Rflags::VIP.bits();
const TF: u64 = Rflags::TF.bits();
const VM: u64 = Rflags::VM.bits();
const IOPL: u64 = 3 << 12;

/// The program's stack pointer; its segments start at [`CODE`].
const SP: u64 = 0x800;
/// Where handlers of the program lie: vector n at this offset in its segment, plus n.
const OWN_HANDLERS: u64 = 0x400;
/// The redirection bitmap in the TSS.
const BITMAP: u64 = TSS + 0x68;

/// A guest in virtual-8086 mode with these flags, about to execute `code`; #UD ends it.
fn program(flags: u64, vme: bool, write: impl FnOnce(&mut CodeAssembler)) -> Guest {
    let mut guest = protected_guest();
    guest.load(&assemble(16, 0, |a| {
        write(a);
        a.ud2().unwrap();
    }));
    let state = &mut guest.vcpu.state;
    state.rip = 0;
    state.regs[4] = SP;
    state.set_rflags(flags | VM | 2);
    state.cr4.set(Cr4::VME, vme);
    let selector = (CODE >> 4) as u16;
    state.segments = [Segment {
        base: CODE,
        limit: 0xffff,
        access: AccessRights(0xf3),
        selector,
    }; 6];
    state.tr.limit = 0x2087;
    guest.memory.write(TSS + 102, &0x88u16.to_le_bytes());
    for vector in 0..256u64 {
        let target = (OWN_HANDLERS + vector) | u64::from(selector) << 16;
        guest
            .memory
            .write(4 * vector, &(target as u32).to_le_bytes());
        guest.memory.write(CODE + OWN_HANDLERS + vector, &[0x90]);
    }
    // After the handlers, which are NOPs: #UD.
    guest.memory.write(CODE + OWN_HANDLERS + 256, &[0x0f, 0x0b]);
    guest
}

/// Runs to a handler of the monitor; its vector, the program's flags and its stack pointer.
fn outcome(guest: &mut Guest) -> (u8, u64, u64) {
    let vector = guest.run_to_handler();
    let has_code = u64::from(matches!(vector, 8 | 10..=14));
    let top = guest.vcpu.state.regs[4];
    let word = |n: u64| {
        let at = (top + 4 * (n + has_code)) as usize;
        u64::from(u32::from_le_bytes(
            guest.memory.bytes()[at..at + 4].try_into().unwrap(),
        ))
    };
    assert_ne!(word(2) & VM, 0);
    (
        vector,
        word(2) & !(VM | 2 | Rflags::RF.bits() | Rflags::STATUS.bits()),
        word(3),
    )
}

fn word(guest: &Guest, offset: u64) -> u64 {
    let at = (CODE + offset) as usize;
    u64::from(u16::from_le_bytes(
        guest.memory.bytes()[at..at + 2].try_into().unwrap(),
    ))
}

#[test]
fn cli_and_sti_act_on_the_flag_that_iopl_allows() {
    type Write = fn(&mut CodeAssembler);
    let (cli, sti): (Write, Write) = (|a| a.cli().unwrap(), |a| a.sti().unwrap());
    let cases = [
        (IOPL | VIF | IF, true, cli, (6, IOPL | VIF)),
        (IOPL | VIF, true, sti, (6, IOPL | VIF | IF)),
        (VIF | IF, true, cli, (6, IF)),
        (0, true, sti, (6, VIF)),
        (IF | VIP, true, sti, (13, IF | VIP)),
        (VIF | VIP, true, cli, (6, VIP)),
        (0, false, sti, (13, 0)),
        (VIF, false, cli, (13, VIF)),
    ];
    for (flags, vme, write, expected) in cases {
        let mut guest = program(flags, vme, write);
        let (vector, after, _) = outcome(&mut guest);
        assert_eq!((vector, after), expected, "{flags:#x} {vme}");
    }
}

#[test]
fn pushed_flags_show_the_virtual_flag_and_iopl_3() {
    for (flags, shown) in [
        (VIF, IOPL | IF),
        (IF, IOPL),
        (IOPL | IF, IOPL | IF),
        (IOPL | VIF, IOPL),
    ] {
        let mut guest = program(flags, true, |a| a.pushf().unwrap());
        assert_eq!(outcome(&mut guest), (6, flags, SP - 2));
        assert_eq!(word(&guest, SP - 2) & !0xd7, shown, "{flags:#x}");
    }
    // Not with 32-bit operands, and not without the extensions.
    for (vme, wide) in [(true, true), (false, false)] {
        let mut guest = program(VIF, vme, |a| {
            if wide {
                a.pushfd().unwrap();
            } else {
                a.pushf().unwrap();
            }
        });
        assert_eq!(outcome(&mut guest), (13, VIF, SP));
    }
}

#[test]
fn popped_flags_set_the_virtual_flag() {
    const DF: u64 = 1 << 10;
    // Flags before, image, whether the image is popped.
    let cases = [
        (IF, IF | DF | IOPL, Some(IF | VIF | DF)),
        (IF | VIF, DF, Some(IF | DF)),
        (VIP, DF, Some(VIP | DF)),
        (VIP, IF, None),
        (0, TF, None),
        (IOPL | VIP, IF, Some(IOPL | VIP | IF)),
    ];
    for (flags, image, after) in cases {
        for by_iret in [false, true] {
            let mut guest = program(flags, true, |a| {
                if by_iret {
                    a.iret().unwrap();
                    for _ in 0..0x20 {
                        a.nop().unwrap();
                    }
                } else {
                    a.popf().unwrap();
                }
            });
            let frame = if by_iret {
                [0x10, CODE >> 4, image]
            } else {
                [image, 0, 0]
            };
            let size = if by_iret { 6 } else { 2 };
            for (i, value) in frame.into_iter().enumerate() {
                guest
                    .memory
                    .write(CODE + SP + 2 * i as u64, &(value as u16).to_le_bytes());
            }
            let expected = match after {
                Some(after) => (6, after, SP + size),
                None => (13, flags, SP),
            };
            assert_eq!(
                outcome(&mut guest),
                expected,
                "{flags:#x} {image:#x} {by_iret}"
            );
        }
    }
    let mut guest = program(0, true, |a| a.popfd().unwrap());
    assert_eq!(outcome(&mut guest).0, 13);
    let mut guest = program(0, true, |a| a.iretd().unwrap());
    assert_eq!(outcome(&mut guest).0, 13);
}

#[test]
fn software_interrupts_go_where_the_bitmap_says() {
    // IOPL, VME, the vector's bit; where INT 21H goes.
    let own = None;
    let cases = [
        (IOPL, false, false, Some(0x21)),
        (0, false, false, Some(13)),
        (0, true, true, Some(13)),
        (IOPL, true, true, Some(0x21)),
        (IOPL, true, false, own),
        (0, true, false, own),
    ];
    for (iopl, vme, bit, target) in cases {
        let mut guest = program(iopl | IF | VIF, vme, |a| a.int(0x21).unwrap());
        // A gate that a software interrupt may use.
        let at = IDT + 8 * 0x21;
        let gate = guest.memory.read_u64(at) | 3 << 45;
        guest.memory.write_u64(at, gate);
        guest.memory.write(BITMAP + 4, &[u8::from(bit) << 1]);
        let (vector, flags, top) = outcome(&mut guest);
        if let Some(expected) = target {
            assert_eq!((vector, top), (expected, SP), "{iopl:#x} {vme} {bit}");
            continue;
        }
        // The program's handler ran, with the flag masked that it owns.
        assert_eq!((vector, top), (6, SP - 6));
        let (left, pushed) = if iopl == 0 { (IF, IF) } else { (VIF, IF) };
        assert_eq!(flags, iopl | left);
        assert_eq!([word(&guest, SP - 6), word(&guest, SP - 4)], [2, CODE >> 4]);
        assert_eq!(word(&guest, SP - 2) & !0xd7, IOPL | pushed);
    }
}

#[test]
fn a_bitmap_beyond_the_tss_is_a_fault() {
    for (limit, io_map) in [(101, 0x88u16), (0x67, 0x88), (0x2087, 0x10)] {
        let mut guest = program(IOPL, true, |a| a.int(0x21).unwrap());
        guest.vcpu.state.tr.limit = limit;
        guest.memory.write(TSS + 102, &io_map.to_le_bytes());
        assert_eq!(outcome(&mut guest).0, 13, "{limit:#x} {io_map:#x}");
    }
}

#[test]
fn breakpoints_and_injected_interrupts() {
    // INT3 is never redirected.
    let mut guest = program(IOPL, true, |a| a.int3().unwrap());
    let at = IDT + 8 * 3;
    let gate = guest.memory.read_u64(at) | 3 << 45;
    guest.memory.write_u64(at, gate);
    assert_eq!(outcome(&mut guest).0, 3);
    // An injected software interrupt is, and IOPL does not matter to it.
    let mut guest = program(VIF, true, |a| a.nop().unwrap());
    guest.controls.interruption_info =
        InterruptionInfo::new(InterruptionType::SoftwareInterrupt, 0x30, false);
    guest.controls.instruction_length = 0;
    assert_eq!(outcome(&mut guest), (6, 0, SP - 6));
    // An external interrupt goes to the monitor.
    let mut guest = program(IF | VIF, true, |a| a.nop().unwrap());
    guest.controls.interruption_info =
        InterruptionInfo::new(InterruptionType::ExternalInterrupt, 0x30, false);
    assert_eq!(outcome(&mut guest), (0x30, IF | VIF, SP));
}

#[test]
fn protected_mode_programs_have_a_virtual_flag_for_cli_and_sti_only() {
    type Write = fn(&mut CodeAssembler);
    let cases: [(Write, u64, bool, u8, u64); 6] = [
        (|a| a.sti().unwrap(), 0, true, 6, VIF),
        (|a| a.cli().unwrap(), VIF | IF, true, 6, IF),
        (|a| a.sti().unwrap(), VIP, true, 13, VIP),
        (|a| a.sti().unwrap(), 0, false, 13, 0),
        (|a| a.sti().unwrap(), IOPL, true, 6, IOPL | IF),
        // POPF leaves both flags alone.
        (
            |a| {
                a.push(0x202).unwrap();
                a.popfd().unwrap();
            },
            0,
            true,
            6,
            0,
        ),
    ];
    for (write, flags, pvi, vector, after) in cases {
        let mut guest = protected_guest();
        to_ring3(&mut guest);
        guest.load(&assemble(32, CODE, |a| {
            write(a);
            a.ud2().unwrap();
        }));
        guest.vcpu.state.set_rflags(flags | 2);
        guest.vcpu.state.cr4.set(Cr4::PVI, pvi);
        assert_eq!(guest.run_to_handler(), vector);
        let top = guest.vcpu.state.regs[4] as usize + if vector == 13 { 12 } else { 8 };
        let pushed = u32::from_le_bytes(guest.memory.bytes()[top..top + 4].try_into().unwrap());
        assert_eq!(u64::from(pushed) & !(2 | Rflags::RF.bits()), after);
    }
    // In 64-bit code, too; and never at CPL 0.
    let mut guest = long_guest();
    super::exceptions::to_user(&mut guest);
    guest.vcpu.state.cr4 |= Cr4::PVI;
    guest.load(&assemble(64, CODE, |a| {
        a.sti().unwrap();
        a.ud2().unwrap();
    }));
    assert_eq!(guest.run_to_handler(), 6);
    assert_eq!(guest.stack(2) & (VIF | IF), VIF);
    let mut guest = long_guest();
    guest.vcpu.state.cr4 |= Cr4::PVI | Cr4::VME;
    guest.load(&assemble(64, CODE, |a| {
        a.sti().unwrap();
        a.hlt().unwrap();
    }));
    assert_eq!(guest.run_to(ExitReason::Hlt).instruction_length, 1);
    assert_eq!(guest.vcpu.state.rflags() & (VIF | IF), IF);
}

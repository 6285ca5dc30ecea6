//! Debug exceptions that wait behind MOV SS, and what the next instruction makes of them.
//!
//! Source: SDM volume 3, "Masking Exceptions and Interrupts When Switching Stacks", "Debug
//! Exceptions" and, under VMX, "Delivery of Pending Debug Exceptions after VM Entry".

use crate::bench::*;
use crate::guest::Guest;
use arch::control_registers::{Cr4, Dr7, Efer};
use arch::segment::{AccessRights, Segment};
use iced_x86::code_asm::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Kernel,
    Compatibility,
    User,
}
use Mode::{Compatibility, Kernel, User};

/// Where SYSCALL goes.
const SYSTEM_CALL: u64 = 0x5_0000;

/// MOV SS from memory that a data breakpoint watches, then `next`.
fn guest(mode: Mode, next: &[u8]) -> Guest {
    let mut guest = long_guest();
    for vector in [1, 3, 4, 0x41] {
        let gate = gate64(HANDLERS + 16 * vector, KERNEL_CODE, 14, 3, 0);
        guest.memory.write_u64(IDT + 16 * vector, gate[0]);
    }
    let mut stack = KERNEL_DATA;
    if mode == User {
        guest.long_mode(3);
        let state = &mut guest.vcpu.state;
        state.tr.access.0 = 0x8b;
        state.segments[1].selector = USER_CODE;
        state.segments[2].selector = USER_DATA;
        stack = USER_DATA;
    }
    if mode == Compatibility {
        guest.vcpu.state.segments[1] = Segment {
            selector: COMPAT_CODE,
            limit: u32::MAX,
            access: AccessRights(0xc09b),
            ..Segment::default()
        };
    }
    guest.memory.write_u64(DATA, stack.into());
    guest.memory.write(SYSTEM_CALL, &[0xf4]);
    guest.load(&[&[0x8e, 0x11], next, &[0xf4]].concat());
    let state = &mut guest.vcpu.state;
    state.cr4 |= Cr4::DE;
    state.efer |= Efer::SCE;
    state.msrs.star = u64::from(KERNEL_CODE) << 32 | u64::from(KERNEL_DATA) << 48;
    state.msrs.lstar = SYSTEM_CALL;
    state.regs[1] = DATA;
    state.regs[4] = if mode == User { USER_STACK } else { STACK };
    state.dr[0] = DATA;
    state.dr7 |= Dr7::from_bits_retain(0b10 | 0b11 << 16 | 0b11 << 18);
    state.set_rflags(0x802); // OF, for INTO
    guest
}

/// Events of a program leave the trap to strike at the first instruction of their handler.
#[test]
fn behind_a_programs_event_it_strikes_in_the_handler() {
    let cases: [(&[u8], u64, &[Mode]); 4] = [
        (&[0xcc], HANDLERS + 16 * 3, &[Kernel, Compatibility, User]),
        (
            &[0xcd, 0x41],
            HANDLERS + 16 * 0x41,
            &[Kernel, Compatibility, User],
        ),
        (&[0xce], HANDLERS + 16 * 4, &[Compatibility]),
        (&[0x0f, 0x05], SYSTEM_CALL, &[Kernel, User]),
    ];
    for (next, handler, modes) in cases {
        for &mode in modes {
            let mut guest = guest(mode, next);
            assert_eq!(guest.run_to_handler(), 1, "{next:x?} {mode:?}");
            assert_eq!(guest.stack(0), handler, "{next:x?} {mode:?}");
            assert_eq!(guest.vcpu.state.dr6.bits() & 0xf, 1, "{next:x?} {mode:?}");
        }
    }
}

/// Behind any other instruction it strikes, as a trap.
#[test]
fn behind_an_instruction_it_strikes_as_a_trap() {
    for mode in [Kernel, Compatibility, User] {
        let mut guest = guest(mode, &[0x90]);
        assert_eq!(guest.run_to_handler(), 1, "{mode:?}");
        assert_eq!(guest.stack(0), CODE + 3, "{mode:?}");
        assert_eq!(guest.vcpu.state.dr6.bits() & 0xf, 1, "{mode:?}");
    }
}

/// Exceptions and INT1 take it with them: one event, whose frame is theirs.
#[test]
fn exceptions_and_int1_take_it_with_them() {
    // The instruction, the vector, whether it is a fault, whether there is an error code.
    let cases: [(&[u8], u8, bool, u64); 5] = [
        (&[0xf1], 1, false, 0),
        (&[0x0f, 0x0b], 6, true, 0),
        // DIV AH, which is 0.
        (&[0xf6, 0xf4], 0, true, 0),
        // LTR of a null selector.
        (&[0x0f, 0x00, 0xd9], 13, true, 1),
        (&[0x0f, 0x21, 0xc0], 1, true, 0), // MOV EAX, DR0 under general detect
    ];
    for (next, vector, is_fault, error) in cases {
        for mode in [Kernel, Compatibility, User] {
            let mut guest = guest(mode, next);
            let mut expected = (vector, error);
            if next[1..].starts_with(&[0x21]) {
                guest.vcpu.state.dr7 |= Dr7::GD;
                if mode == User {
                    expected = (13, 1);
                }
            }
            let before = if mode == User {
                STACK
            } else {
                guest.vcpu.state.regs[4]
            };
            assert_eq!(guest.run_to_handler(), expected.0, "{next:x?} {mode:?}");
            let length = if is_fault { 0 } else { next.len() as u64 };
            assert_eq!(
                guest.stack(expected.1),
                CODE + 2 + length,
                "{next:x?} {mode:?}"
            );
            let frame = 8 * (5 + expected.1);
            let depth = (before & !0xf) - guest.vcpu.state.regs[4];
            assert_eq!(depth, frame, "{next:x?} {mode:?}: one frame");
            assert_eq!(guest.vcpu.state.pending_debug, 0, "{next:x?} {mode:?}");
        }
    }
}

/// The handler of a #DB may touch the debug registers again, however the #DB came about.
#[test]
fn the_handler_of_general_detect_finds_it_off() {
    let mut guest = guest(Kernel, &[0x90, 0x0f, 0x21, 0xc0]);
    guest.vcpu.state.dr7 = Dr7::from_bits_retain(Dr7::FIXED_1) | Dr7::GD;
    guest.memory.write(
        HANDLERS + 16,
        &assemble(64, HANDLERS + 16, |a| {
            a.mov(rbx, dr6).unwrap();
            a.mov(rdx, dr7).unwrap();
            a.hlt().unwrap();
        }),
    );
    guest.vcpu.entered_from_user();
    guest.run_to(arch::exit::ExitReason::Hlt);
    let regs = &guest.vcpu.state.regs;
    assert_eq!((regs[3] >> 13 & 1, regs[2] >> 13 & 1), (1, 0));
    assert_eq!(guest.stack(0), CODE + 3);
}

/// An instruction that exits after an access that a breakpoint watches has not been executed: the trap
/// comes when it is.
#[test]
fn an_instruction_that_exits_has_matched_nothing() {
    let mut guest = guest(Kernel, &[]);
    guest.load(&[0xff, 0x31, 0xf4]); // PUSH [RCX]
    let stack = guest.memory.hva + STACK - 0x1000;
    guest.ept.set(STACK - 0x1000, 0);
    guest.run_to(arch::exit::ExitReason::EptViolation);
    assert_eq!(
        (guest.vcpu.state.rip, guest.vcpu.state.pending_debug),
        (CODE, 0)
    );
    guest.ept.set(STACK - 0x1000, stack | crate::guest::EPT_RWX);
    guest.vcpu.flush(eptide_cpu::Flush::All);
    assert_eq!(guest.run_to_handler(), 1);
    assert_eq!(guest.stack(0), CODE + 2);
}

//! Every opcode of every map, with every prefix that may change its meaning, in 16-, 32- and
//! 64-bit code: whatever a guest executes, the process lives and nothing but guest memory changes.
//!
//! Code that is generated for an instruction is the host's; what the host does not know, or what
//! would mean something else there than in the guest, must not get that far. The short sweep leaves
//! out most combinations of prefixes that do not select the instruction; `EPTIDE_LONG_TESTS` has
//! them all.
#![allow(unreachable_pub, reason = "modules of a test binary")]

mod guest;

use arch::control_registers::Cr0;
use arch::controls::{EntryControls, PinControls};
use arch::exit::ExitReason;
use arch::segment::{AccessRights, Segment};
use eptide_cpu::{Bus, BusResponse, CpuState, Emulated};
use guest::{Guest, Memory};

const MEMORY: usize = 0x8_0000;
const CODE: u64 = 0x2_0000;
const STACK: u64 = 0x3_0800;
const DATA: u64 = 0x4_0000;

/// What follows an instruction: immediates and displacements, then instructions that leave.
const TAIL: [u8; 24] = [
    0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4,
    0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4,
];

/// How the guest's code is read, and by whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Real,
    Protected,
    Kernel,
    User,
}

struct Sink;

impl Bus for Sink {
    fn read(&mut self, _gpa: u64, data: &mut [u8]) -> BusResponse {
        data.fill(0xa5);
        BusResponse::Done
    }
    fn write(&mut self, _gpa: u64, _data: &[u8]) -> BusResponse {
        BusResponse::Done
    }
}

/// A guest in one mode, and memory around it that must keep its pattern.
struct Stage {
    guest: Guest,
    initial: CpuState,
    canary: Memory,
    mode: Mode,
    run: u64,
    /// How often instructions ended in #UD.
    undefined: u64,
}

impl Stage {
    fn new(mode: Mode) -> Stage {
        let mut guest = Guest::new(MEMORY);
        let canary = Memory::new(0x4000);
        canary.write(0, &[0xcc; 0x4000]);
        match mode {
            Mode::Real => {}
            Mode::Protected => {
                guest.vcpu.state.cr0 |= Cr0::PE;
                guest.vcpu.state.segments = guest::flat_segments_32();
            }
            Mode::Kernel | Mode::User => guest.long_mode(if mode == Mode::User { 3 } else { 0 }),
        }
        let state = &mut guest.vcpu.state;
        if !matches!(mode, Mode::Kernel | Mode::User) {
            use arch::control_registers::{Cr4, Xcr0};
            state.cr4 |= Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::OSXSAVE;
            state.xcr0 = Xcr0::X87 | Xcr0::SSE | Xcr0::AVX;
        }
        for (n, register) in state.regs[..16].iter_mut().enumerate() {
            *register = DATA + 0x100 * n as u64;
        }
        state.regs[1] = 3;
        state.regs[4] = STACK;
        state.rip = CODE;
        if mode == Mode::Real {
            state.rip = CODE & 0xffff;
            for register in &mut state.regs[..16] {
                *register &= 0xfff;
            }
            state.segments = [Segment {
                selector: (CODE >> 4) as u16,
                base: CODE & !0xffff,
                limit: 0xffff,
                access: AccessRights(0x93),
            }; 6];
            state.segments[1].access = AccessRights(0x9b);
        }
        state.set_rflags(2);
        let controls = &mut guest.controls;
        controls.pin = PinControls::PREEMPTION_TIMER;
        controls.preemption_timer = 50;
        controls.exception_bitmap = u32::MAX;
        let initial = guest.vcpu.state.clone();
        Stage {
            guest,
            initial,
            canary,
            mode,
            run: 0,
            undefined: 0,
        }
    }

    /// Runs one instruction from the initial state, or what there is of it.
    fn play(&mut self, code: &[u8]) {
        self.run += 1;
        let guest = &mut self.guest;
        guest.memory.write(CODE, code);
        guest.memory.write(CODE + code.len() as u64, &TAIL);
        guest.vcpu.state.clone_from(&self.initial);
        guest.controls.entry = match self.mode {
            Mode::Kernel | Mode::User => EntryControls::LOAD_EFER | EntryControls::IA32E_MODE_GUEST,
            _ => EntryControls::empty(),
        };
        guest.vcpu.entered_from_user();
        let exit = guest.run();
        assert_ne!(
            exit.reason,
            ExitReason::InvalidGuestState,
            "{code:x?} in {:?}",
            self.mode
        );
        let undefined = 6 | 3 << 8 | 1 << 31;
        if exit.reason == ExitReason::ExceptionOrNmi && exit.interruption_info.0 == undefined {
            self.undefined += 1;
        }
        if exit.reason == ExitReason::EptViolation {
            let controls = guest.controls.clone();
            let _: Emulated = guest.vcpu.emulate(&controls, None, &mut Sink);
        }
        if self.run.is_multiple_of(4096) {
            self.check();
        }
    }

    /// What lies beside guest memory is as it was, and so are the host's control registers.
    fn check(&self) {
        assert!(self.canary.bytes().iter().all(|byte| *byte == 0xcc));
        let (mut mxcsr, mut control) = (0_u32, 0_u16);
        // SAFETY: both store into the variables named.
        unsafe {
            std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut mxcsr);
            std::arch::asm!("fnstcw [{}]", in(reg) &raw mut control);
        }
        assert_eq!((mxcsr & !0x3f, control), (0x1f80, 0x37f));
    }
}

fn long() -> bool {
    std::env::var_os("EPTIDE_LONG_TESTS").is_some()
}

const MANDATORY: [&[u8]; 4] = [&[], &[0x66], &[0xf2], &[0xf3]];
/// LOCK, a segment, the other address size, two mandatory prefixes at once.
const OTHER: [&[u8]; 5] = [&[], &[0xf0], &[0x64], &[0x67], &[0x66, 0xf3]];
const REX: [&[u8]; 4] = [&[], &[0x48], &[0x45], &[0x4f]];
/// How the maps of legacy instructions are reached.
const MAPS: [&[u8]; 4] = [&[], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]];

/// ModRM bytes: each `reg` with a memory operand and with a register; with `all`, each register.
fn operands(all: bool) -> impl Iterator<Item = u8> {
    (0..=255_u8).filter(move |byte| match byte >> 6 {
        0 => byte & 7 == 3,
        3 => all || byte & 7 == 1,
        _ => false,
    })
}

/// Opcodes of the groups and escapes in which each ModRM byte is an instruction of its own.
fn is_extended(map: usize, opcode: u8) -> bool {
    match map {
        0 => (0xd8..=0xdf).contains(&opcode),
        1 => matches!(opcode, 0x00 | 0x01 | 0x18..=0x1f | 0xae | 0xc7),
        _ => false,
    }
}

/// Whether a combination that does not select the instruction is left out of the short sweep.
fn is_left_out(count: &mut u64) -> bool {
    *count += 1;
    !long() && !count.is_multiple_of(23)
}

fn sweep_legacy(mode: Mode) {
    let mut stage = Stage::new(mode);
    let mut code = Vec::new();
    let rex_prefixes: &[&[u8]] = match mode {
        Mode::Kernel | Mode::User => &REX,
        _ => &REX[..1],
    };
    let mut count = 0;
    for (map, escape) in MAPS.into_iter().enumerate() {
        for opcode in 0..=255_u8 {
            for mandatory in MANDATORY {
                for other in OTHER {
                    for (n, rex) in rex_prefixes.iter().enumerate() {
                        for operand in operands(long() || is_extended(map, opcode)) {
                            let plain = other.is_empty() && n < 2;
                            if !plain && is_left_out(&mut count) {
                                continue;
                            }
                            code.clear();
                            for part in [mandatory, other, rex, escape, &[opcode, operand]] {
                                code.extend_from_slice(part);
                            }
                            stage.play(&code);
                        }
                    }
                }
            }
        }
    }
    stage.check();
    assert!(stage.undefined > stage.run / 20, "{}", stage.undefined);
}

#[test]
fn instructions_of_16_bit_code_stay_inside() {
    sweep_legacy(Mode::Real);
}

#[test]
fn instructions_of_32_bit_code_stay_inside() {
    sweep_legacy(Mode::Protected);
}

#[test]
fn instructions_of_64_bit_code_stay_inside() {
    sweep_legacy(Mode::User);
}

#[test]
fn privileged_instructions_of_64_bit_code_stay_inside() {
    sweep_legacy(Mode::Kernel);
}

/// VEX and XOP prefixes of three bytes: every map, W, L and mandatory prefix.
fn sweep_vex(mode: Mode, first: u8, maps: std::ops::Range<u8>) {
    let mut stage = Stage::new(mode);
    let mut count = 0;
    for map in maps {
        for opcode in 0..=255_u8 {
            for selection in 0..16_u8 {
                let (w, low) = (selection & 8, selection & 7);
                // The register in `vvvv`: none, or the third.
                for vvvv in [0x78, 0x68] {
                    for operand in operands(long()) {
                        if vvvv != 0x78 && w != 0 && is_left_out(&mut count) {
                            continue;
                        }
                        let prefix = [first, 0xe0 | map, w << 4 | vvvv | low];
                        stage.play(&[prefix[0], prefix[1], prefix[2], opcode, operand]);
                    }
                }
            }
        }
    }
    stage.check();
    assert!(stage.undefined > stage.run / 10);
}

#[test]
fn vex_instructions_stay_inside() {
    sweep_vex(Mode::User, 0xc4, 0..8);
}

#[test]
fn vex_instructions_of_32_bit_code_stay_inside() {
    sweep_vex(Mode::Protected, 0xc4, 1..4);
}

#[test]
fn xop_instructions_stay_inside() {
    sweep_vex(Mode::User, 0x8f, 8..11);
}

#[test]
fn evex_and_3dnow_instructions_stay_inside() {
    let mut stage = Stage::new(Mode::User);
    for opcode in 0..=255_u8 {
        for operand in operands(long()) {
            stage.play(&[0x0f, 0x0f, operand, opcode]);
            for map in 0..8 {
                for selection in 0..8_u8 {
                    let (w, pp) = (selection >> 2 << 7, selection & 3);
                    for length in [0x08, 0x28, 0x48, 0x99] {
                        stage.play(&[0x62, 0xf0 | map, w | 0x7c | pp, length, opcode, operand]);
                    }
                }
            }
        }
    }
    stage.check();
}

//! The interpreter is the oracle: random sequences run on both engines from the same state, and
//! everything must agree: registers, memory, the exit, how many instructions were executed.

use super::generate::{self, Random};
use crate::guest::{EPT_RWX, Guest};
use arch::exit::{ExitReason, VmExit};
use eptide_cpu::{Engine, ExtendedState, Vcpu};
use iced_x86::{
    Instruction, InstructionInfoFactory, Mnemonic as M, OpAccess, OpKind, Register, RflagsBits,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const MEMORY: usize = 0x4_0000;
const CODE: u64 = 0x2_0000;
/// Three pages that can be written, one that can only be read, and a hole.
const DATA: u64 = 0x2_8000;
const READ_ONLY: u64 = 0x2_b000;
const HOLE: u64 = 0x2_c000;
/// Where subroutines stand.
const SUBROUTINES: u64 = CODE + 0x400;
const STATUS: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

/// A sequence, with the status flags that are not defined somewhere in it.
struct Sequence {
    code: Vec<u8>,
    subroutines: Vec<u8>,
    undefined: u32,
}

/// Whether what an instruction leaves depends on the processor's maker.
fn is_defined(i: &Instruction) -> bool {
    let shifts_by_much = matches!(i.mnemonic(), M::Shld | M::Shrd | M::Rcl | M::Rcr);
    let swaps = i.mnemonic() == M::Bswap && i.op_register(0).size() == 2;
    !shifts_by_much && !swaps && !matches!(i.mnemonic(), M::Bsf | M::Bsr)
}

/// Whether it may write a register, as far as its full name goes.
fn writes(i: &Instruction, register: Register) -> bool {
    let mut factory = InstructionInfoFactory::new();
    let used = factory.info(i).used_registers();
    used.iter().any(|used| {
        let reads = matches!(used.access(), OpAccess::Read | OpAccess::CondRead);
        !reads && used.register().full_register() == register
    })
}

/// A random instruction that looks at no undefined flag and does not write `kept`, and the flags
/// undefined behind it.
fn instruction(random: &mut Random, undefined: &mut u32, kept: &[Register]) -> Vec<u8> {
    let features = Vcpu::host_features();
    loop {
        let (i, bytes) = generate::instruction(random, &features, 64);
        if i.rflags_read() & *undefined & STATUS != 0 || !is_defined(&i) {
            continue;
        }
        if kept.iter().any(|register| writes(&i, *register)) {
            continue;
        }
        // A shift by a register may leave the flags or make them undefined.
        let by_register = i.op_count() > 1 && i.op_kind(i.op_count() - 1) == OpKind::Register;
        let shift = matches!(
            i.mnemonic(),
            M::Shl | M::Shr | M::Sar | M::Sal | M::Rol | M::Ror
        );
        if shift && by_register {
            *undefined |= i.rflags_modified();
        } else {
            *undefined &= !(i.rflags_written() | i.rflags_cleared() | i.rflags_set());
            *undefined |= i.rflags_undefined();
        }
        return bytes;
    }
}

fn sequence(random: &mut Random) -> Sequence {
    let (mut code, mut subroutines) = (Vec::new(), Vec::new());
    let (mut undefined, mut ever) = (0, 0);
    for _ in 0..2 + random.below(19) {
        let form = random.below(8);
        // A subroutine must find its way back, and a loop its end.
        let kept: &[Register] = match form {
            1 => &[Register::RSP],
            2 => &[Register::R13],
            _ => &[],
        };
        let before = undefined;
        let one = instruction(random, &mut undefined, kept);
        ever |= undefined;
        match form {
            // Around it, on a flag that is defined.
            0 if before & RflagsBits::ZF == 0 => {
                // What it defines it may not have defined.
                undefined |= before;
                code.extend([0x74 | random.below(2) as u8, one.len() as u8]);
                code.extend(one);
            }
            1 => {
                let at = SUBROUTINES + subroutines.len() as u64;
                let next = CODE + code.len() as u64 + 5;
                code.push(0xe8);
                code.extend((at.wrapping_sub(next) as u32).to_le_bytes());
                subroutines.extend(one);
                subroutines.push(0xc3);
            }
            // Three rounds of it: MOV R13D, 3; it; DEC R13D; JNZ.
            2 => {
                code.extend([0x41, 0xbd, 3, 0, 0, 0]);
                let len = one.len() as u8;
                code.extend(one);
                code.extend([0x41, 0xff, 0xcd, 0x75, (5 + len).wrapping_neg()]);
                undefined &= !STATUS | RflagsBits::CF;
            }
            _ => code.extend(one),
        }
    }
    code.push(0xf4);
    Sequence {
        code,
        subroutines,
        undefined: positions(ever),
    }
}

/// Status flags as the decoder numbers them, at their RFLAGS positions.
fn positions(flags: u32) -> u32 {
    [
        (RflagsBits::CF, 0),
        (RflagsBits::PF, 2),
        (RflagsBits::AF, 4),
        (RflagsBits::ZF, 6),
        (RflagsBits::SF, 7),
        (RflagsBits::OF, 11),
    ]
    .iter()
    .filter(|(flag, _)| flags & flag != 0)
    .fold(0, |set, (_, at)| set | 1 << at)
}

fn register(random: &mut Random) -> u64 {
    match random.below(8) {
        0 => random.below(256),
        1 => random.next(),
        2 => READ_ONLY - 8 + random.below(16),
        3 => HOLE - 16 + random.below(24),
        4 => DATA + 0xff0 + random.below(32),
        _ => DATA + random.below(0x3000),
    }
}

/// One engine's guest.
struct Side(Guest);

impl Side {
    fn new(engine: Engine) -> Side {
        let mut guest = Guest::new(MEMORY);
        guest.vcpu.set_engine(engine);
        guest.vcpu.translate_after(0);
        guest.ept.set(HOLE, 0);
        let read_only = (guest.memory.hva + READ_ONLY) | EPT_RWX & !2;
        guest.ept.set(READ_ONLY, read_only);
        guest.controls.exception_bitmap = u32::MAX;
        Side(guest)
    }

    /// Runs the sequence from a state made of `seed`; the exit and the instructions executed.
    fn run(&mut self, sequence: &Sequence, seed: u64) -> (VmExit, u64) {
        let guest = &mut self.0;
        let mut random = Random(seed);
        guest.vcpu.state = eptide_cpu::CpuState::reset();
        guest.long_mode(if random.below(2) == 0 { 0 } else { 3 });
        for offset in (0..0x4000).step_by(8) {
            guest.memory.write_u64(DATA + offset, random.next());
        }
        guest.memory.write(CODE, &sequence.code);
        guest.memory.write(SUBROUTINES, &sequence.subroutines);
        let state = &mut guest.vcpu.state;
        for n in 0..16 {
            state.regs[n] = register(&mut random);
        }
        state.regs[4] = DATA + 0x800 + random.below(0x1000) / 8 * 8;
        for at in (160..416).chain(576..832) {
            state.extended.0[at] = random.next() as u8;
        }
        state.set_rflags(random.next() & u64::from(positions(STATUS)) | 2);
        state.rip = CODE;
        guest.vcpu.entered_from_user();
        guest.vcpu.flush(eptide_cpu::Flush::All);
        let before = guest.vcpu.statistics().instructions;
        let exit = guest.run();
        (exit, guest.vcpu.statistics().instructions - before)
    }
}

/// What differs between the two sides, if anything does.
fn difference(sides: &[Side; 2], undefined: u32) -> Option<String> {
    let [a, b] = sides.each_ref().map(|side| &side.0.vcpu.state);
    let [flags_a, flags_b] = [a, b].map(|state| state.rflags() as u32 & !undefined);
    for n in 0..16 {
        if a.regs[n] != b.regs[n] {
            return Some(format!("register {n}: {:#x} {:#x}", a.regs[n], b.regs[n]));
        }
    }
    if (a.rip, flags_a) != (b.rip, flags_b) {
        return Some(format!(
            "RIP {:#x} {:#x}, flags {flags_a:#x} {flags_b:#x}",
            a.rip, b.rip
        ));
    }
    let image = |state: &ExtendedState| state.0[..832].to_vec();
    if image(&a.extended) != image(&b.extended) {
        return Some("extended state".into());
    }
    let [a, b] = sides.each_ref().map(|side| side.0.memory.bytes());
    let at = (DATA as usize..MEMORY).find(|&at| a[at] != b[at])?;
    Some(format!("memory at {at:#x}: {:#x} {:#x}", a[at], b[at]))
}

/// Ends runs that take too long: a subroutine may overwrite its return address with one that
/// makes a loop without end.
struct Watchdog {
    /// Counts the runs.
    run: Arc<AtomicU64>,
}

impl Watchdog {
    /// Watches these sides until it is dropped.
    fn new(sides: &[Side; 2]) -> Watchdog {
        let run = Arc::new(AtomicU64::new(0));
        let watched = Arc::downgrade(&run);
        let kicks = sides.each_ref().map(|side| side.0.vcpu.attention());
        std::thread::spawn(move || {
            let mut last = 0;
            while let Some(run) = watched.upgrade() {
                let now = run.load(Ordering::Relaxed);
                if now == last {
                    kicks.iter().for_each(|attention| attention.kick());
                }
                last = now;
                drop(run);
                std::thread::sleep(Duration::from_secs(2));
            }
        });
        Watchdog { run }
    }

    /// A run begins.
    fn begin(&self) {
        self.run.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn engines_agree_on_sequences() {
    let cases = super::setting("EPTIDE_ORACLE_CASES", 100_000).div_ceil(4);
    let first = super::first_seed();
    let mut sides = [
        Side::new(Engine::Interpreter),
        Side::new(Engine::Translator),
    ];
    let watchdog = Watchdog::new(&sides);
    let mut reasons = std::collections::BTreeMap::new();
    for seed in first..first + cases {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let sequence = sequence(&mut random);
        let from = random.next() | 1;
        let [a, b] = sides.each_mut().map(|side| {
            watchdog.begin();
            side.0.vcpu.attention().clear_kick();
            side.run(&sequence, from)
        });
        if [&a, &b].map(|(exit, _)| exit.reason) == [ExitReason::ExternalInterrupt; 2] {
            continue;
        }
        let shown = || {
            format!(
                "seed {seed}: {:02x?} {:02x?}",
                sequence.code, sequence.subroutines
            )
        };
        *reasons.entry(format!("{:?}", a.0.reason)).or_insert(0) += 1;
        // RDTSC and its kind are not among the instructions, so that exits are the same.
        assert_eq!(format!("{:?}", a.0), format!("{:?}", b.0), "{}", shown());
        if let Some(what) = difference(&sides, sequence.undefined) {
            panic!("{what}, undefined {:#x}, {}", sequence.undefined, shown());
        }
        let at = sides[0].0.vcpu.state.rip;
        assert_eq!(a.1, b.1, "instructions, {:?} at {at:#x}, {}", a.0, shown());
    }
    assert!(reasons.len() > 2, "{reasons:?}");
    assert!(sides[1].0.vcpu.statistics().blocks_translated > cases);
}

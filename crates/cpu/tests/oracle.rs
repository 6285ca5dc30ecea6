//! The host processor is the oracle: random user-level instructions run natively and on the
//! software processor from the same state, and everything defined must agree.
//!
//! Beside it the two engines are compared with each other, on sequences with branches, calls and
//! accesses that fault or exit.
//!
//! Four tests with the host: single instructions in 64-bit code, in 32-bit and in 16-bit code, and short
//! sequences that load segments, transfer control far, and save and restore extended state.
//!
//! `EPTIDE_ORACLE_CASES` sets the number of cases (100,000 by default), `EPTIDE_ORACLE_SEED` the
//! first seed (`time` takes another one in each run). A failure prints the seed that repeats it alone.
#![allow(unreachable_pub, reason = "modules of a test binary")]

#[path = "oracle/choices.rs"]
mod choices;
#[path = "oracle/engines.rs"]
mod engines;
#[path = "oracle/generate.rs"]
mod generate;
mod guest;
#[path = "oracle/native.rs"]
mod native;
#[path = "oracle/segments.rs"]
mod segments;
#[path = "oracle/sequences.rs"]
mod sequences;

use arch::exit::ExitReason;
use eptide_cpu::{ExtendedState, Vcpu};
use guest::{Guest, Memory};
use iced_x86::Instruction;
use native::Trap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Linear address of the code page, on both sides.
pub const CODE: u64 = 0x3000_0000;
/// Linear address of the data, on both sides; what follows it is not mapped.
pub const DATA: u64 = 0x3010_0000;
/// Bytes of data.
pub const DATA_LEN: u64 = 0x4000;

/// User-visible registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) gpr: [u64; 16],
    pub(crate) rip: u64,
    pub(crate) rflags: u64,
    pub(crate) cs: u16,
    pub(crate) ss: u16,
    /// DS and ES; what becomes of them is not compared.
    pub(crate) ds: u16,
    pub(crate) fpu: [u8; 832],
}

impl Default for State {
    fn default() -> State {
        let mut fpu = [0; 832];
        fpu.copy_from_slice(&ExtendedState::initial().0[..832]);
        State {
            gpr: [0; 16],
            rip: 0,
            rflags: 2,
            cs: segments::CODE_64,
            ss: segments::FLAT_DATA,
            ds: segments::FLAT_DATA,
            fpu,
        }
    }
}

/// Both sides.
struct Bench {
    native_code: Memory,
    native_data: Memory,
    guest: Guest,
    guest_code: Memory,
    guest_data: Memory,
}

const BREAKPOINT: u8 = 3;

impl Bench {
    fn new() -> Bench {
        let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let native_code = Memory::at(CODE, 4096, all);
        let native_data = Memory::at(DATA, DATA_LEN as usize, all & !libc::PROT_EXEC);
        let mut guest = Guest::new(0x10000);
        let guest_code = Memory::new(4096);
        let guest_data = Memory::new(DATA_LEN as usize);
        guest.ept.map(CODE, &guest_code, guest::EPT_RWX);
        guest.ept.map(DATA, &guest_data, guest::EPT_RWX);
        guest.long_mode(3);
        // Small pages for the region of the test, so that its edges fault as on the host.
        for i in 0..512 {
            guest.memory.write_u64(0x3000 + 8 * i, 0);
        }
        let table = 0x5000;
        guest.memory.write_u64(0x3000 + 8 * (CODE >> 21), table | 7);
        guest
            .memory
            .write_u64(table + 8 * (CODE >> 12 & 511), CODE | 7);
        for page in 0..DATA_LEN >> 12 {
            let address = DATA + (page << 12);
            guest
                .memory
                .write_u64(table + 8 * (address >> 12 & 511), address | 1 << 63 | 7);
        }
        assert_eq!(CODE >> 21, DATA >> 21);
        // The tables of segments, where the host has nothing.
        guest
            .memory
            .write_u64(table + 8 * (segments::TABLES >> 12 & 511), 0x6000 | 3);
        segments::install(&mut guest, 0x6000);
        guest.controls.exception_bitmap = u32::MAX;
        native::install();
        Bench {
            native_code,
            native_data,
            guest,
            guest_code,
            guest_data,
        }
    }

    fn run_guest(&mut self, state: &State) -> (State, Trap) {
        let vcpu = &mut self.guest.vcpu;
        vcpu.entered_from_user();
        vcpu.state.regs[..16].copy_from_slice(&state.gpr);
        vcpu.state.rip = state.rip;
        vcpu.state.set_rflags(state.rflags | 0x202);
        vcpu.state.extended.0[..832].copy_from_slice(&state.fpu);
        segments::load(&mut vcpu.state, state);
        let mut exit = self.guest.vcpu.enter(&self.guest.controls);
        let mut guard = 0;
        while exit.reason == ExitReason::ExternalInterrupt && guard < 3 {
            exit = self.guest.vcpu.enter(&self.guest.controls);
            guard += 1;
        }
        let vcpu = &self.guest.vcpu;
        let mut out = State {
            rip: vcpu.state.rip,
            rflags: vcpu.state.rflags(),
            cs: vcpu.state.segments[1].selector,
            ss: vcpu.state.segments[2].selector,
            ..State::default()
        };
        out.gpr.copy_from_slice(&vcpu.state.regs[..16]);
        out.fpu.copy_from_slice(&vcpu.state.extended.0[..832]);
        let trap = match exit.reason {
            ExitReason::ExceptionOrNmi => Trap {
                vector: exit.interruption_info.vector(),
                address: exit.qualification,
                error: exit.interruption_error_code,
            },
            other => panic!("unexpected exit {other:?}: {exit:?}"),
        };
        if trap.vector == BREAKPOINT {
            // INT3 is a trap natively: RIP is past it.
            out.rip += 1;
        }
        (out, trap)
    }
}

/// RFLAGS bits that the comparison looks at.
const FLAGS: u64 = 0x8d5 | 1 << 10;

struct Failure(String);

fn compare(case: &choices::Case<'_>, freedom: &choices::Freedom) -> Result<(), Failure> {
    let fail = |what: String| Err(Failure(what));
    let (before, native, guest) = (case.before, case.native, case.guest);
    if freedom.fault != choices::FaultFreedom::Any && native.1.vector != guest.1.vector {
        return fail(format!(
            "vector: native {:?}, guest {:?}",
            native.1, guest.1
        ));
    }
    if freedom.fault == choices::FaultFreedom::None {
        let differs = (native.1.address ^ guest.1.address) & !freedom.address != 0;
        if native.1.vector == 14 && differs {
            return fail(format!("fault address: {:x?} and {:x?}", native.1, guest.1));
        }
        if matches!(native.1.vector, 10..=13) && native.1.error != guest.1.error {
            return fail(format!("error code: {:x?} and {:x?}", native.1, guest.1));
        }
    }
    let (n, g) = (&native.0, &guest.0);
    if (n.cs, n.ss) != (g.cs, g.ss) {
        return fail(format!(
            "CS and SS: native {:x?}, guest {:x?}",
            (n.cs, n.ss),
            (g.cs, g.ss)
        ));
    }
    if n.rip != g.rip {
        return fail(format!("rip: native {:#x}, guest {:#x}", n.rip, g.rip));
    }
    for r in 0..16 {
        // Returns to a 16-bit stack leave something of the kernel's in RSP.
        let hidden = if r == 4 && n.ss & 4 != 0 { 32 } else { 0 };
        if (n.gpr[r] ^ g.gpr[r]) << hidden != 0 {
            return fail(format!(
                "register {r}: native {:#x}, guest {:#x}",
                n.gpr[r], g.gpr[r]
            ));
        }
    }
    let mask = FLAGS & !freedom.flags;
    if native.1.vector == BREAKPOINT && (n.rflags ^ g.rflags) & mask != 0 {
        return fail(format!(
            "flags: native {:#x}, guest {:#x} of {mask:#x}",
            n.rflags, g.rflags
        ));
    }
    // The x87 instruction pointers and opcode differ by nature: each names its own side.
    for range in [0..5, 24..28, 32..416, 576..832] {
        for at in range {
            let padding = (32..160).contains(&at) && at % 16 >= 10;
            if !padding && !freedom.extended.contains(&at) && n.fpu[at] != g.fpu[at] {
                return fail(format!(
                    "extended state at {at}: native {:02x?}, guest {:02x?}, before {:02x?}",
                    &n.fpu[at & !15..(at & !15) + 16],
                    &g.fpu[at & !15..(at & !15) + 16],
                    &before.fpu[at & !15..(at & !15) + 16],
                ));
            }
        }
    }
    Ok(())
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(default)
}

/// The first case's seed: `time` gives other cases in each run, of which a failure names its own.
fn first_seed() -> u64 {
    let name = "EPTIDE_ORACLE_SEED";
    if std::env::var_os(name).is_some_and(|value| value == "time") {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        return now.map_or(1, |time| time.as_secs() << 20);
    }
    setting(name, 1)
}

/// One of the tests' benches at a time: both sides use fixed addresses.
fn bench() -> (MutexGuard<'static, ()>, Bench) {
    static ALONE: Mutex<()> = Mutex::new(());
    let guard = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    (guard, Bench::new())
}

impl Bench {
    /// Runs `code` on both sides from the same registers and random data, which must be the same
    /// afterwards, too. `i` is the instruction whose undefined flags do not count.
    fn case(
        &mut self,
        i: &Instruction,
        before: &State,
        code: &[u8],
        data: &[u8],
        difference: impl Fn(&[u8], &[u8]) -> Option<usize>,
    ) -> Result<(), Failure> {
        let mut page = [0xcc; 4096];
        page[..code.len()].copy_from_slice(code);
        self.native_code.write(0, &page);
        self.guest_code.write(0, &page);
        self.native_data.write(0, data);
        self.guest_data.write(0, data);
        let native = native::run(before);
        let guest = self.run_guest(before);
        let case = choices::Case {
            instruction: i,
            before,
            data,
            native: &native,
            guest: &guest,
        };
        let freedom = case.freedom();
        compare(&case, &freedom)?;
        for range in freedom.memory {
            let same = self.native_data.bytes()[range.clone()].to_vec();
            self.guest_data.write(range.start as u64, &same);
        }
        let (on_host, in_guest) = (self.native_data.bytes(), self.guest_data.bytes());
        match difference(on_host, in_guest) {
            Some(at) => {
                let of = |memory: &Memory| memory.bytes()[at & !7..][..8].to_vec();
                let (native, guest) = (of(&self.native_data), of(&self.guest_data));
                Err(Failure(format!(
                    "memory at {at:#x}: native {native:02x?}, guest {guest:02x?}"
                )))
            }
            None => Ok(()),
        }
    }
}

/// The first byte that differs.
fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    (a != b).then(|| a.iter().zip(b).position(|(a, b)| a != b).unwrap_or(0))
}

fn random_data(random: &mut generate::Random) -> Vec<u8> {
    (0..DATA_LEN / 8)
        .flat_map(|_| random.next().to_le_bytes())
        .collect()
}

/// What disagreed, by form: the first of each with its seed.
#[derive(Default)]
struct Report {
    seen: std::collections::HashMap<String, u32>,
    failures: Vec<String>,
}

impl Report {
    fn add(&mut self, seed: u64, name: String, bytes: &[u8], failure: Failure) {
        let count = self.seen.entry(name.clone()).or_default();
        *count += 1;
        if *count == 1 {
            let Failure(what) = failure;
            self.failures
                .push(format!("seed {seed}: {name} {bytes:02x?}: {what}"));
        }
    }

    fn finish(mut self) {
        let most = setting("EPTIDE_ORACLE_FAILURES", 20) as usize;
        self.failures.truncate(most);
        assert!(
            self.failures.is_empty(),
            "{} forms disagree:\n{}",
            self.seen.len(),
            self.failures.join("\n")
        );
    }
}

/// The random source of a case.
fn source(seed: u64) -> generate::Random {
    let mut random = generate::Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    random.next();
    random
}

/// Single instructions in code of `bits`.
fn single_instructions(bits: u32, cases: u64) {
    let first = first_seed();
    let features = Vcpu::host_features();
    let (_alone, mut bench) = bench();
    let mut report = Report::default();
    for seed in first..first + cases {
        let mut random = source(seed);
        let (i, bytes) = generate::instruction(&mut random, &features, bits);
        let (rip, cs, data_segment) = match bits {
            64 => (CODE, segments::CODE_64, segments::FLAT_DATA),
            32 => (CODE, segments::CODE_32, segments::FLAT_DATA),
            _ => (0, segments::CODE_16, segments::DATA_16),
        };
        let before = State {
            rip,
            cs,
            ss: data_segment,
            ds: data_segment,
            ..generate::state(&mut random, &i, bits)
        };
        if choices::undefined_result(&i, &before) {
            continue;
        }
        let mut code = bytes.clone();
        if random.below(3) == 0 && choices::undefined_flags(&i) & !(1 << 4) == 0 {
            // Jcc over an INT3: the processor may run it together with the instruction before.
            code.extend([0x70 | random.below(16) as u8, 1, 0xcc]);
        }
        let data = random_data(&mut random);
        if let Err(failure) = bench.case(&i, &before, &code, &data, first_difference) {
            report.add(seed, format!("{:?}", i.code()), &bytes, failure);
        }
    }
    report.finish();
}

#[test]
fn instructions_agree_with_the_host() {
    single_instructions(64, setting("EPTIDE_ORACLE_CASES", 100_000));
}

#[test]
fn instructions_of_32_bit_code_agree_with_the_host() {
    single_instructions(32, setting("EPTIDE_ORACLE_CASES", 100_000).div_ceil(2));
}

#[test]
fn instructions_of_16_bit_code_agree_with_the_host() {
    if !segments::install_on_host() {
        eprintln!("skipped: the host gives no process an LDT");
        return;
    }
    single_instructions(16, setting("EPTIDE_ORACLE_CASES", 100_000).div_ceil(2));
}

#[test]
fn sequences_agree_with_the_host() {
    let cases = setting("EPTIDE_ORACLE_CASES", 100_000).div_ceil(4);
    let first = first_seed();
    let (_alone, mut bench) = bench();
    let has_ldt = segments::install_on_host();
    let mut report = Report::default();
    for seed in first..first + cases {
        let mut random = source(seed);
        let case = sequences::Case::new(&mut random, has_ldt);
        let result = bench.case(
            &case.instruction,
            &case.before,
            &case.code,
            &case.data,
            |native, guest| case.first_difference(native, guest),
        );
        if let Err(failure) = result {
            report.add(seed, case.name.into(), &case.code, failure);
        }
    }
    report.finish();
}

//! Bochs against this processor: one ROM with the measured loops, in both, taking turns.
//!
//! `cargo bench -p eptide-cpu --bench bochs` prints each loop's best time on both sides and the
//! ratio. Bochs is the program that `EPTIDE_BOCHS` names, else `bochs`; it needs its terminal
//! display (Debian: `bochs`, `bochs-term`). Without Bochs there is nothing to compare, and the
//! bench says so.
//!
//! The ROM goes from reset to 64-bit mode, copies a loop to memory, fills its data, and marks the
//! beginning and the end of the loop on port E9H, where Bochs has a console. The marks are timed as
//! they arrive.
#![allow(
    unreachable_pub,
    reason = "modules shared with tests and other benches"
)]

#[path = "../tests/guest/mod.rs"]
mod guest;
mod loops;

use arch::exit::{ExitReason, IoAccess};
use arch::msr;
use guest::{EPT_RWX, Guest, Memory};
use iced_x86::code_asm::*;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Bytes of the ROM, which ends at 4 GiB and shows at F_0000H, too.
const ROM: usize = 64 << 10;
const ROM_LOW: u64 = 0xf_0000;
/// Where in the ROM the parts lie: 64-bit code, then the loops.
const LONG_CODE: usize = 0x200;
const LOOPS: usize = 0x1000;
const LOOP_SIZE: usize = 0x200;
/// Memory of the guest: tables, the loop that runs, stack, data.
const TABLES: u64 = 0x1000;
const CODE: u64 = 0x1_0000;
const STACK: u64 = 0x8_0000;
const DATA: u64 = 0x20_0000;
const DATA_QUADWORDS: u64 = 1 << 17;
const MEMORY: usize = 16 << 20;

const CONSOLE: u16 = 0xe9;
/// A port at which writing "Shutdown" ends Bochs.
const SHUTDOWN: u16 = 0x8900;

/// Rounds of each loop, some tenths of a second in Bochs.
const ROUNDS: [(&str, u64); 4] = [
    ("integer", 8_000_000),
    ("crc", 5_000_000),
    ("chase", 10_000_000),
    ("quicksort", 200_000),
];

fn assemble(bits: u32, at: u64, write: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    write(&mut a);
    a.assemble(at).unwrap()
}

/// From reset to 64-bit mode with the first gigabyte mapped to itself.
fn real_mode_code() -> Vec<u8> {
    let descriptors: [u64; 3] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    let mut code = assemble(16, 0, |a| {
        a.cli().unwrap();
        a.cld().unwrap();
        a.mov(ax, 0xf000u32 as i32).unwrap();
        a.mov(ds, ax).unwrap();
        a.xor(ax, ax).unwrap();
        a.mov(es, ax).unwrap();
        // Tables: 1000H → 2000H → 3000H, which has 2 MiB pages.
        a.xor(eax, eax).unwrap();
        a.mov(di, TABLES as i32).unwrap();
        a.mov(cx, 0x3000 / 4).unwrap();
        a.rep().stosd().unwrap();
        for (at, value) in [
            (TABLES, TABLES + 0x1003),
            (TABLES + 0x1000, TABLES + 0x2003),
        ] {
            a.mov(dword_ptr(at as i32).es(), value as i32).unwrap();
        }
        a.mov(di, (TABLES + 0x2000) as i32).unwrap();
        a.mov(eax, 0x83).unwrap();
        a.mov(cx, 512).unwrap();
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.mov(dword_ptr(di).es(), eax).unwrap();
        a.add(di, 8).unwrap();
        a.add(eax, 1 << 21).unwrap();
        a.dec(cx).unwrap();
        a.jnz(again).unwrap();
        a.lgdt(fword_ptr(0x1f0)).unwrap();
        a.mov(eax, 1 << 5).unwrap();
        a.mov(cr4, eax).unwrap();
        a.mov(eax, TABLES as i32).unwrap();
        a.mov(cr3, eax).unwrap();
        a.mov(ecx, msr::EFER as i32).unwrap();
        a.mov(eax, 1 << 8).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.mov(eax, 0x8000_0011u32 as i32).unwrap();
        a.mov(cr0, eax).unwrap();
        // A far jump with a 32-bit offset.
        let target = ((ROM_LOW + LONG_CODE as u64) as u32).to_le_bytes();
        a.db(&[0x66, 0xea, target[0], target[1], target[2], target[3], 8, 0])
            .unwrap();
    });
    assert!(code.len() <= 0x1d8);
    code.resize(0x1d8, 0);
    code.extend(descriptors.iter().flat_map(|d| d.to_le_bytes()));
    code.extend(23u16.to_le_bytes());
    code.extend((ROM_LOW as u32 + 0x1d8).to_le_bytes());
    code.resize(LONG_CODE, 0);
    code
}

fn say(a: &mut CodeAssembler, text: &str) {
    for byte in text.bytes() {
        a.mov(al, i32::from(byte)).unwrap();
        a.out(CONSOLE as i32, al).unwrap();
    }
}

fn long_mode_code() -> Vec<u8> {
    assemble(64, ROM_LOW + LONG_CODE as u64, |a| {
        a.mov(eax, 0x10).unwrap();
        for segment in [ds, es, ss] {
            a.mov(segment, ax).unwrap();
        }
        for (i, (name, rounds)) in ROUNDS.into_iter().enumerate() {
            // Random data.
            a.mov(rdi, DATA).unwrap();
            a.mov(ecx, DATA_QUADWORDS as i32).unwrap();
            a.mov(eax, 1).unwrap();
            let mut fill = a.create_label();
            a.set_label(&mut fill).unwrap();
            for (shift, left) in [(13, true), (7, false), (17, true)] {
                a.mov(rdx, rax).unwrap();
                if left {
                    a.shl(rdx, shift).unwrap();
                } else {
                    a.shr(rdx, shift).unwrap();
                }
                a.xor(rax, rdx).unwrap();
            }
            a.stosq().unwrap();
            a.dec(ecx).unwrap();
            a.jnz(fill).unwrap();
            if name == "chase" {
                // One cycle through 4096 cache lines.
                a.xor(ecx, ecx).unwrap();
                let mut link = a.create_label();
                a.set_label(&mut link).unwrap();
                a.lea(eax, dword_ptr(ecx + ecx * 4 + 1237)).unwrap();
                a.and(eax, 4095).unwrap();
                a.shl(eax, 6).unwrap();
                a.mov(edx, ecx).unwrap();
                a.shl(edx, 6).unwrap();
                a.mov(qword_ptr(rdx + DATA as i32), rax).unwrap();
                a.inc(ecx).unwrap();
                a.cmp(ecx, 4096).unwrap();
                a.jb(link).unwrap();
            }
            // The loop, from the ROM to memory.
            a.mov(rsi, ROM_LOW + (LOOPS + i * LOOP_SIZE) as u64)
                .unwrap();
            a.mov(rdi, CODE).unwrap();
            a.mov(ecx, LOOP_SIZE as i32).unwrap();
            a.rep().movsb().unwrap();
            a.mov(rsp, STACK).unwrap();
            let arguments = match name {
                "quicksort" => [DATA, DATA + 4 * (rounds - 1), 0],
                "chase" => [rounds, DATA, 0],
                _ => [rounds, DATA, DATA + 0x1000],
            };
            for (register, value) in [rdi, rsi, rdx].into_iter().zip(arguments) {
                a.mov(register, value).unwrap();
            }
            say(a, "@+");
            a.mov(rbp, CODE).unwrap();
            a.call(rbp).unwrap();
            a.mov(rbx, rax).unwrap();
            say(a, "@-");
        }
        // Bochs' way to end.
        a.mov(edx, i32::from(SHUTDOWN)).unwrap();
        for byte in b"Shutdown" {
            a.mov(al, i32::from(*byte)).unwrap();
            a.out(dx, al).unwrap();
        }
        a.hlt().unwrap();
    })
}

fn rom() -> Vec<u8> {
    let mut rom = real_mode_code();
    rom.extend(long_mode_code());
    assert!(rom.len() <= LOOPS);
    for (i, (name, _)) in ROUNDS.into_iter().enumerate() {
        let (.., code) = loops::all()
            .into_iter()
            .find(|(found, ..)| *found == name)
            .unwrap();
        assert!(code.len() <= LOOP_SIZE);
        rom.resize(LOOPS + i * LOOP_SIZE, 0xcc);
        rom.extend(code);
    }
    rom.resize(ROM - 16, 0xcc);
    // The reset vector: a far jump to the start of the lower view.
    rom.extend([0xea, 0, 0, 0, 0xf0]);
    rom.resize(ROM, 0);
    rom
}

/// The times between the marks in a stream of console bytes.
#[derive(Default)]
struct Marks {
    last: u8,
    begun: Option<Instant>,
    times: Vec<Duration>,
}

impl Marks {
    fn byte(&mut self, byte: u8) {
        match (self.last, byte) {
            (b'@', b'+') => self.begun = Some(Instant::now()),
            (b'@', b'-') => self.times.extend(self.begun.take().map(|t| t.elapsed())),
            _ => {}
        }
        self.last = byte;
    }
}

fn run_here(rom: &[u8]) -> Vec<Duration> {
    let mut guest = Guest::new(MEMORY);
    guest.memory.write(ROM_LOW, rom);
    let top = Memory::new(ROM);
    top.write(0, rom);
    guest.ept.map((1 << 32) - ROM as u64, &top, EPT_RWX);
    guest.controls.msr_bitmap.set(msr::EFER, true, false);
    let mut marks = Marks::default();
    loop {
        let exit = guest.run();
        if exit.reason != ExitReason::IoInstruction {
            panic!("{exit:x?} at {:#x}", guest.vcpu.state.rip);
        }
        let io = IoAccess::from_qualification(exit.qualification);
        match io.port {
            CONSOLE => marks.byte(guest.vcpu.state.regs[0] as u8),
            _ => return marks.times,
        }
        guest.vcpu.state.rip += u64::from(exit.instruction_length);
    }
}

/// Bochs with the ROM, under a terminal of its own. `None` if it cannot be started.
fn run_bochs(program: &str, rom: &[u8]) -> Option<Vec<Duration>> {
    let folder = std::env::temp_dir().join(format!("eptide-bochs-{}", std::process::id()));
    std::fs::create_dir_all(&folder).ok()?;
    let file = |name: &str| folder.join(name).display().to_string();
    std::fs::write(file("rom"), rom).ok()?;
    // A Bochs with its debugger waits to be told to go on.
    std::fs::write(file("continue"), "continue\n").ok()?;
    let configuration = format!(
        "megs: 16\nromimage: file={}, address=0xffff0000\nvga: extension=none\n\
         port_e9_hack: enabled=1\ncpu: count=1, ips=50000000\nclock: sync=none\n\
         plugin_ctrl: speaker=0\nlog: {}\npanic: action=fatal\ndisplay_library: term\n",
        file("rom"),
        file("log"),
    );
    std::fs::write(file("configuration"), configuration).ok()?;
    let help = Command::new(program)
        .arg("--help")
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let help = [help.stdout, help.stderr].concat();
    let has_debugger = String::from_utf8_lossy(&help).contains("-rc ");
    let mut line = format!("{program} -q -f {}", file("configuration"));
    if has_debugger {
        line += &format!(" -rc {}", file("continue"));
    }
    // Only a program on a terminal gets the display.
    let mut child = Command::new("script")
        .args(["-qefc", &line, "/dev/null"])
        .env("TERM", "vt100")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let mut marks = Marks::default();
    let mut output = child.stdout.take()?;
    let mut buffer = [0; 4096];
    while let Ok(read @ 1..) = output.read(&mut buffer) {
        buffer[..read].iter().for_each(|&byte| marks.byte(byte));
    }
    // Bochs' exit status says nothing: it takes the shutdown for a panic.
    let _ = child.wait();
    let _ = std::fs::remove_dir_all(&folder);
    Some(marks.times)
}

fn main() {
    let program = std::env::var("EPTIDE_BOCHS").unwrap_or_else(|_| "bochs".into());
    let rom = rom();
    let mut best = [[Duration::MAX; ROUNDS.len()]; 2];
    for _ in 0..3 {
        let Some(bochs) = run_bochs(&program, &rom) else {
            println!("{program} could not be started: nothing to compare with");
            return;
        };
        for (side, times) in best.iter_mut().zip([run_here(&rom), bochs]) {
            assert_eq!(times.len(), ROUNDS.len(), "a side stopped early: {times:?}");
            for (best, time) in side.iter_mut().zip(times) {
                *best = time.min(*best);
            }
        }
    }
    println!(
        "{:<10} {:>12} {:>12} {:>8}   best of 3",
        "loop", "here", "Bochs", "ratio"
    );
    for (i, (name, _)) in ROUNDS.into_iter().enumerate() {
        let [here, bochs] = [best[0][i], best[1][i]];
        let ratio = here.as_secs_f64() / bochs.as_secs_f64();
        println!("{name:<10} {here:>12.2?} {bochs:>12.2?} {ratio:>8.2}");
    }
}

//! Repeated string instructions that overwrite themselves, and stores into the next instruction,
//! here and on the host.
//!
//! Processors choose how much such an instruction still writes. Intel's family 6, model 207 sees each
//! store into its own bytes: the instruction ends there, as if interrupted, and what lies at its
//! address then is executed; only its fast strings, which write whole cache lines, finish the line.
//! Others are allowed to write everything (SDM volume 3A, "Handling Self- and Cross-Modifying Code":
//! programs cannot rely on either).

#[allow(unreachable_pub, reason = "modules of a test binary")]
mod guest;

use core::arch::asm;
use guest::{Guest, Memory};
use iced_x86::code_asm::CodeAssembler;

/// Where in a page the instruction is; what precedes and follows it is NOP.
const AT: u64 = 1024;
/// Where in the page the code ends, by HLT in the guest and RET on the host.
const END: u64 = 4000;
/// Guest-physical and linear address of the guest's page, and of NOPs to copy.
const PAGE: u64 = 0x2_0000;
const SOURCE: u64 = 0x4_0000;

/// Count and destination register, and the page.
#[derive(Debug, PartialEq, Eq)]
struct Result {
    count: u64,
    destination: u64,
    page: Vec<u8>,
}

struct Case {
    code: &'static [u8],
    size: u64,
    down: bool,
    /// Where in the page the first element goes.
    start: u64,
    count: u64,
}

fn page(code: &[u8], end: u8) -> Vec<u8> {
    let mut page = vec![0x90; 4096];
    page[AT as usize..][..code.len()].copy_from_slice(code);
    page[END as usize] = end;
    page
}

/// The case in a guest.
fn here(case: &Case) -> Result {
    let mut guest = Guest::new(0x10_0000);
    guest.long_mode(0);
    guest.memory.write(PAGE, &page(case.code, 0xf4));
    guest.memory.write(SOURCE - 4096, &[0x90; 8192]);
    let state = &mut guest.vcpu.state;
    state.rip = PAGE + AT - 16;
    (state.regs[0], state.regs[1]) = (0x9090_9090_9090_9090, case.count);
    (state.regs[6], state.regs[7]) = (SOURCE, PAGE + case.start);
    state.set_rflags(if case.down { 0x402 } else { 2 });
    let exit = guest.run();
    assert_eq!(exit.reason, arch::exit::ExitReason::Hlt, "{exit:?}");
    let mut page = guest.memory.bytes()[PAGE as usize..][..4096].to_vec();
    page[END as usize] = 0;
    let state = &guest.vcpu.state;
    Result {
        count: state.regs[1],
        destination: state.regs[7] - PAGE,
        page,
    }
}

/// The case on the host.
fn there(case: &Case) -> Result {
    let access = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    let code = Memory::at(0, 4096, access);
    let source = Memory::new(8192);
    code.write(0, &page(case.code, 0xc3));
    source.write(0, &[0x90; 8192]);
    let (mut count, mut destination) = (case.count, code.hva + case.start);
    // SAFETY: the code is NOPs, one string instruction whose elements lie inside the two mappings,
    // and RET; DF is clear again behind it.
    unsafe {
        asm!(
            "test {down:e}, {down:e}",
            "jz 2f",
            "std",
            "2: call {entry}",
            "cld",
            down = in(reg) u32::from(case.down),
            entry = in(reg) code.hva + AT - 16,
            inout("rcx") count,
            inout("rdi") destination,
            inout("rsi") source.hva + 4096 => _,
            in("rax") 0x9090_9090_9090_9090u64,
            clobber_abi("C"),
        );
    }
    let mut page = code.bytes().to_vec();
    page[END as usize] = 0;
    Result {
        count,
        destination: destination - code.hva,
        page,
    }
}

/// Elements written when the first byte of the instruction is: up to the one that overwrites it.
fn elements_to_overwrite(case: &Case) -> u64 {
    let end = AT + case.code.len() as u64;
    let hits = |n: u64| {
        let offset = n * case.size;
        let at = if case.down {
            case.start - offset
        } else {
            case.start + offset
        };
        at < end && at + case.size > AT
    };
    (0..case.count)
        .find(|&n| hits(n))
        .map_or(case.count, |n| n + 1)
}

fn cases() -> impl Iterator<Item = Case> {
    const CODES: [(&[u8], u64); 9] = [
        (&[0xf3, 0xaa], 1),
        (&[0xf2, 0xaa], 1),
        (&[0xf3, 0x66, 0xab], 2),
        (&[0xf3, 0xab], 4),
        (&[0xf3, 0x48, 0xab], 8),
        (&[0xf3, 0xa4], 1),
        (&[0xf3, 0x66, 0xa5], 2),
        (&[0xf3, 0xa5], 4),
        (&[0xf3, 0x48, 0xa5], 8),
    ];
    // Onto itself at once, after a while, and after long enough for fast strings; bytes in all.
    const PLACES: [(u64, u64); 4] = [(0, 64), (64, 128), (64, 1024), (800, 1600)];
    CODES.into_iter().flat_map(|(code, size)| {
        PLACES.into_iter().flat_map(move |(before, bytes)| {
            [false, true].map(|down| Case {
                code,
                size,
                down,
                start: if down { AT + before } else { AT - before },
                count: bytes / size,
            })
        })
    })
}

#[test]
fn string_instructions_over_themselves_end_as_on_the_host() {
    for case in cases() {
        let (here, there) = (here(&case), there(&case));
        let name = format!(
            "{:x?} from {:#x}, down {}",
            case.code, case.start, case.down
        );
        let done = |result: &Result| case.count - result.count;
        let least = elements_to_overwrite(&case);
        assert_eq!(done(&here), least, "{name}");
        // To the end of the cache line, or of the instruction.
        let line = 64 / case.size;
        let allowed = least..=least + line;
        assert!(
            allowed.contains(&done(&there)) || there.count == 0,
            "{name}: {} on the host",
            done(&there)
        );
        if done(&there) == least {
            assert_eq!(here, there, "{name}");
        }
    }
}

/// A store into the instruction behind it, of each string instruction that stores: the new one runs.
#[test]
fn the_next_instruction_is_the_new_one() {
    // The word behind is INC ECX, and becomes two NOPs.
    const INC: [u8; 2] = [0xff, 0xc1];
    for string in [&[0x66, 0xab][..], &[0x66, 0xa5], &[0x66, 0xf3, 0xab]] {
        let mut assembler = CodeAssembler::new(64).unwrap();
        assembler.db(&[string, &INC].concat()).unwrap();
        let code: &'static [u8] = assembler.assemble(PAGE).unwrap().leak();
        let case = Case {
            code,
            size: 2,
            down: false,
            start: AT + string.len() as u64,
            count: 1,
        };
        let (here, there) = (here(&case), there(&case));
        let count = u64::from(string.len() == 2);
        assert_eq!((here.count, there.count), (count, count), "{string:x?}");
        assert_eq!(here, there, "{string:x?}");
    }
}

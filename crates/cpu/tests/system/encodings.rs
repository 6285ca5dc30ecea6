//! A guest that executes more encodings than host code is kept for.

use super::bench::{CODE, long_guest};
use arch::exit::ExitReason;

/// Instructions in one block.
const BLOCK: usize = 60;

/// Number `n` of a million encodings of VPBLENDW, with a destination other than XMM0 and XMM1.
fn blend(n: usize) -> [u8; 6] {
    let (immediate, n) = (n as u8, n >> 8);
    let (first, n) = (n as u8 & 15, n >> 4);
    let (second, n) = (n as u8 & 15, n >> 4);
    let destination = 2 + n as u8 % 14;
    let extension = |register: u8, bit: u8| if register >= 8 { 0 } else { bit };
    [
        0xc4,
        0x43 | extension(destination, 0x80) | extension(second, 0x20),
        0x01 | (!first & 15) << 3,
        0x0e,
        0xc0 | (destination & 7) << 3 | second & 7,
        immediate,
    ]
}

#[test]
fn encodings_without_end_take_bounded_memory_and_go_on_working() {
    let count = match std::env::var_os("EPTIDE_LONG_TESTS") {
        Some(_) => 900_000,
        None => 120_000,
    };
    let mut guest = long_guest();
    let xmm = eptide_cpu::ExtendedState::XMM;
    for first in (0..count).step_by(BLOCK) {
        let mut code = Vec::new();
        for n in first..first + BLOCK {
            code.extend_from_slice(&blend(n));
        }
        // VPBLENDW XMM2, XMM0, XMM1, 0FH; HLT
        code.extend_from_slice(&[0xc4, 0xe3, 0x79, 0x0e, 0xd1, 0x0f, 0xf4]);
        guest.load(&code);
        guest.vcpu.state.extended.0[xmm..xmm + 16].fill(0x11);
        guest.vcpu.state.extended.0[xmm + 16..xmm + 32].fill(0x22);
        let exit = guest.run();
        assert_eq!(exit.reason, ExitReason::Hlt, "at encoding {first}");
        assert_eq!(guest.vcpu.state.rip, CODE + code.len() as u64 - 1);
        let result = &guest.vcpu.state.extended.0[xmm + 32..xmm + 48];
        assert_eq!(result, [[0x22; 8], [0x11; 8]].concat());
    }
    let statistics = guest.vcpu.statistics();
    assert!(statistics.instructions_decoded >= count as u64);
}

#[test]
fn a_processors_host_code_is_freed_with_it() {
    let mapped = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|l| l.contains("eptide-code")).count()
    };
    let before = mapped();
    for _ in 0..40 {
        let mut guest = long_guest();
        // ADDPS XMM0, XMM1; HLT
        guest.load(&[0x0f, 0x58, 0xc1, 0xf4]);
        assert_eq!(guest.run().reason, ExitReason::Hlt);
        assert!(mapped() > before);
    }
    assert!(mapped() <= before + 4, "other tests may run");
}

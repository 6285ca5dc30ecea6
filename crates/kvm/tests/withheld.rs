//! Instructions whose CPUID bit is not set: which execute all the same, as on VT-x.
//!
//! Source: SDM volume 3C, "Secondary Processor-Based VM-Execution Controls"; for each instruction the
//! #UD row of its exceptions in volume 2.

mod common;

use common::*;
use eptide_kvm as kvm;
use kvm_bindings::CpuId;

const HANDLER: u64 = 0x3000;
const DATA: u64 = 0x5000;

/// What becomes of an instruction that CPUID does not offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Nothing gates it.
    Executes,
    /// A control, or a bit of CR4 or XCR0 that may not be set, takes it away.
    Undefined,
}
use Fate::{Executes, Undefined};

/// Name, whether the host has it, 64-bit code with RBX at 64 aligned bytes of data, fate.
fn cases() -> Vec<(&'static str, bool, &'static [u8], Fate)> {
    macro_rules! host {
        ($feature:tt) => {
            std::arch::is_x86_feature_detected!($feature)
        };
    }
    vec![
        ("rdmsr", true, &[0x0f, 0x32], Executes),
        ("rdtsc", true, &[0x0f, 0x31], Executes),
        ("cmpxchg8b", true, &[0x0f, 0xc7, 0x0b], Executes),
        ("cmpxchg16b", true, &[0x48, 0x0f, 0xc7, 0x0b], Executes),
        ("cmovz", true, &[0x0f, 0x44, 0xc1], Executes),
        ("fld1", true, &[0xd9, 0xe8], Executes),
        ("fcmovb", true, &[0xda, 0xc1], Executes),
        ("fxsave", true, &[0x0f, 0xae, 0x03], Executes),
        ("clflush", true, &[0x0f, 0xae, 0x3b], Executes),
        ("clflushopt", true, &[0x66, 0x0f, 0xae, 0x3b], Executes),
        ("clwb", true, &[0x66, 0x0f, 0xae, 0x33], Executes),
        ("prefetchw", true, &[0x0f, 0x0d, 0x0b], Executes),
        ("wbnoinvd", true, &[0xf3, 0x0f, 0x09], Executes),
        ("paddb mm", true, &[0x0f, 0xfc, 0xc1], Executes),
        ("addps", true, &[0x0f, 0x58, 0xc1], Executes),
        ("addpd", true, &[0x66, 0x0f, 0x58, 0xc1], Executes),
        (
            "pshufb",
            host!("ssse3"),
            &[0x66, 0x0f, 0x38, 0x00, 0xc1],
            Executes,
        ),
        (
            "pmulld",
            host!("sse4.1"),
            &[0x66, 0x0f, 0x38, 0x40, 0xc1],
            Executes,
        ),
        (
            "crc32",
            host!("sse4.2"),
            &[0xf2, 0x0f, 0x38, 0xf1, 0xc1],
            Executes,
        ),
        (
            "aesenc",
            host!("aes"),
            &[0x66, 0x0f, 0x38, 0xdc, 0xc1],
            Executes,
        ),
        (
            "pclmulqdq",
            host!("pclmulqdq"),
            &[0x66, 0x0f, 0x3a, 0x44, 0xc1, 0],
            Executes,
        ),
        (
            "sha1msg1",
            host!("sha"),
            &[0x0f, 0x38, 0xc9, 0xc1],
            Executes,
        ),
        ("popcnt", true, &[0xf3, 0x0f, 0xb8, 0xc1], Executes),
        ("movbe", true, &[0x0f, 0x38, 0xf0, 0x03], Executes),
        ("lzcnt", true, &[0xf3, 0x0f, 0xbd, 0xc1], Executes),
        ("tzcnt", true, &[0xf3, 0x0f, 0xbc, 0xc1], Executes),
        ("andn", true, &[0xc4, 0xe2, 0x70, 0xf2, 0xc1], Executes),
        ("pext", true, &[0xc4, 0xe2, 0x72, 0xf5, 0xc1], Executes),
        ("adcx", true, &[0x66, 0x0f, 0x38, 0xf6, 0xc1], Executes),
        ("clac", true, &[0x0f, 0x01, 0xca], Executes),
        ("lahf", true, &[0x9f], Executes),
        ("rdtscp", true, &[0x0f, 0x01, 0xf9], Undefined),
        ("rdpid", true, &[0xf3, 0x0f, 0xc7, 0xf8], Undefined),
        ("invpcid", true, &[0x66, 0x0f, 0x38, 0x82, 0x03], Undefined),
        ("rdrand", true, &[0x0f, 0xc7, 0xf0], Undefined),
        ("rdseed", true, &[0x0f, 0xc7, 0xf8], Undefined),
        ("tpause", true, &[0x66, 0x0f, 0xae, 0xf1], Undefined),
        ("rdfsbase", true, &[0xf3, 0x48, 0x0f, 0xae, 0xc0], Undefined),
        ("rdpkru", true, &[0x0f, 0x01, 0xee], Undefined),
        ("xgetbv", true, &[0x0f, 0x01, 0xd0], Undefined),
        ("xsave", true, &[0x0f, 0xae, 0x23], Undefined),
        ("xsaveopt", true, &[0x0f, 0xae, 0x33], Undefined),
        ("xsaves", true, &[0x0f, 0xc7, 0x2b], Undefined),
        ("vaddps", true, &[0xc5, 0xf0, 0x58, 0xc1], Undefined),
        (
            "vfmadd132ps",
            true,
            &[0xc4, 0xe2, 0x71, 0x98, 0xc1],
            Undefined,
        ),
        ("vmcall of the other", true, &[0x0f, 0x01, 0xc2], Undefined),
    ]
}

/// A CPUID that offers 64-bit mode and nothing else.
fn nothing(mut cpuid: CpuId) -> CpuId {
    for e in cpuid.as_mut_slice() {
        match e.function {
            1 => (e.ecx, e.edx) = (0, 0),
            7 | 0x8000_0008 => (e.ebx, e.ecx, e.edx) = (0, 0, 0),
            0xd => (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0),
            0x8000_0001 => (e.ecx, e.edx) = (0, 1 << 29),
            _ => {}
        }
    }
    cpuid
}

/// Executes `code`; whether it raised #UD, and RAX.
fn execute(machine: &mut Machine, code: &[u8]) -> (bool, u64) {
    let mut all = code.to_vec();
    all.extend([0xe6, 0x80]);
    machine.memory.write(CODE, &all);
    machine.memory.write_u64(DATA + 0x800, 0);
    let mut regs = machine.vcpu().get_regs().unwrap();
    (regs.rip, regs.rsp, regs.rflags) = (CODE, STACK, 2);
    (regs.rax, regs.rbx, regs.rcx, regs.rdx) = (0, DATA, 1, 0);
    machine.vcpu().set_regs(&regs).unwrap();
    runs_to_stop(machine);
    let undefined = machine.memory.read_u64(DATA + 0x800) != 0;
    (undefined, machine.vcpu().get_regs().unwrap().rax)
}

/// A machine that offers nothing, with a handler of #UD that leaves the test's instruction out.
fn machine(kvm: kvm::Kvm) -> Machine {
    let mut machine = Machine::new_in(kvm, Irqchip::None, 1, &[]);
    let cpuid = nothing(machine.kvm.get_supported_cpuid(256).unwrap());
    machine.vcpu().set_cpuid2(&cpuid).unwrap();
    machine.gate(6, HANDLER);
    machine.code_at(HANDLER, |a| {
        a.inc(dword_ptr(DATA + 0x800))?;
        stop(a)
    });
    machine
}

#[test]
fn only_what_a_control_or_a_register_gates_is_undefined() {
    let mut machine = machine(system());
    for (name, host_has, code, fate) in cases() {
        if host_has {
            let (undefined, _) = execute(&mut machine, code);
            assert_eq!(undefined, fate == Undefined, "{name}");
        }
    }
    // Not BSR with a prefix, which would find 0.
    assert_eq!(execute(&mut machine, &[0xf3, 0x0f, 0xbd, 0xc1]).1, 31);
}

/// The option that has CPUID decide alone.
#[test]
fn everything_is_undefined_where_cpuid_decides() {
    let mut machine = machine(kvm::Kvm::with_options(
        kvm::Options::default().with_strict_cpuid(true),
    ));
    /// These are there in every processor with 64-bit mode, are hints, or old instructions with
    /// a prefix.
    const ALWAYS: [&str; 6] = ["lahf", "prefetchw", "wbnoinvd", "lzcnt", "tzcnt", "cmovz"];
    for (name, host_has, code, _) in cases() {
        if host_has && !ALWAYS.contains(&name) {
            assert!(execute(&mut machine, code).0, "{name}");
        }
    }
    assert_eq!(execute(&mut machine, &[0xf3, 0x0f, 0xbd, 0xc1]).1, 0);
}

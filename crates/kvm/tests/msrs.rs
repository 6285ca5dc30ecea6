//! Which model-specific registers a guest has, by the features that its CPUID offers.

mod common;

use common::*;
use kvm_bindings::CpuId;

/// Where the handler of #GP is, and where it counts.
const HANDLER: u64 = 0x3000;
const FAULTS: u64 = 0x4000;

/// A guest that executes RDMSR or WRMSR with the registers that the test sets.
struct Guest {
    machine: Machine,
}

/// The bit of an output register of CPUID: leaf, register (EAX first), bit.
type Bit = (u32, usize, u32);

const SPEC_CTRL: Bit = (7, 3, 26);
const STIBP: Bit = (7, 3, 27);
const FLUSH_L1D: Bit = (7, 3, 28);
const CAPABILITIES: Bit = (7, 3, 29);
const SSBD: Bit = (7, 3, 31);
const AMD_IBPB: Bit = (0x8000_0008, 1, 12);
const AMD_IBRS: Bit = (0x8000_0008, 1, 14);
const AMD_STIBP: Bit = (0x8000_0008, 1, 15);
const AMD_SSBD: Bit = (0x8000_0008, 1, 24);
const OSVW: Bit = (0x8000_0001, 2, 9);
const RDTSCP: Bit = (0x8000_0001, 3, 27);
const RDPID: Bit = (7, 2, 22);
const XSAVES: Bit = (0xd, 0, 3);

impl Guest {
    /// A guest whose CPUID is what is supported, changed.
    fn with(change: impl FnOnce(&mut CpuId)) -> Guest {
        let code = assemble(|a| {
            a.rdmsr()?;
            stop(a)?;
            a.wrmsr()?;
            stop(a)
        });
        let machine = Machine::new(Irqchip::None, 1, &code);
        machine.gate(13, HANDLER);
        machine.code_at(HANDLER, |a| {
            a.inc(dword_ptr(FAULTS))?;
            a.add(rsp, 8)?;
            a.add(qword_ptr(rsp), 2)?;
            a.iretq()
        });
        let mut cpuid = machine.kvm.get_supported_cpuid(256).unwrap();
        change(&mut cpuid);
        machine.vcpus[0].set_cpuid2(&cpuid).unwrap();
        Guest { machine }
    }

    /// A guest in whose CPUID of `all` bits only those in `offered` are set.
    fn offered(all: &[Bit], offered: &[Bit]) -> Guest {
        Guest::with(|cpuid| {
            for e in cpuid.as_mut_slice() {
                let subleaf = if e.function == 0xd { 1 } else { 0 };
                for bit in all {
                    if (e.function, e.index) != (bit.0, subleaf) {
                        continue;
                    }
                    let output = [&mut e.eax, &mut e.ebx, &mut e.ecx, &mut e.edx];
                    let register = output.into_iter().nth(bit.1).unwrap();
                    *register &= !(1 << bit.2);
                    *register |= (offered.contains(bit) as u32) << bit.2;
                }
            }
        })
    }

    fn execute(&mut self, offset: u64, index: u32, value: u64) -> Option<u64> {
        self.machine.memory.write_u64(FAULTS, 0);
        let mut regs = self.machine.vcpu().get_regs().unwrap();
        (regs.rip, regs.rsp, regs.rcx) = (CODE + offset, STACK, u64::from(index));
        (regs.rax, regs.rdx) = (value & 0xffff_ffff, value >> 32);
        self.machine.vcpu().set_regs(&regs).unwrap();
        runs_to_stop(&mut self.machine);
        let regs = self.machine.vcpu().get_regs().unwrap();
        let faulted = self.machine.memory.read_u64(FAULTS) != 0;
        (!faulted).then_some(regs.rax & 0xffff_ffff | regs.rdx << 32)
    }

    /// What RDMSR reads; nothing if it faults.
    fn read(&mut self, index: u32) -> Option<u64> {
        self.execute(0, index, 0)
    }

    /// Whether WRMSR does not fault.
    fn write(&mut self, index: u32, value: u64) -> bool {
        self.execute(4, index, value).is_some()
    }
}

/// Registers that are there if CPUID has one of some bits. Source: SDM volume 4, "Architectural
/// MSRs", the column of the condition; AMD's manual volume 2, "Hardware Virtualization and
/// Speculation"; for PRED_CMD and FLUSH_CMD, which are written only, the value 1 is the command.
const CONDITIONAL: &[(u32, &[Bit])] = &[
    (
        0x48,
        &[SPEC_CTRL, STIBP, SSBD, AMD_IBRS, AMD_STIBP, AMD_SSBD],
    ),
    (0x49, &[SPEC_CTRL, AMD_IBPB]),
    (0x10a, &[CAPABILITIES]),
    (0x10b, &[FLUSH_L1D]),
    (0xda0, &[XSAVES]),
    (0xc000_0103, &[RDTSCP, RDPID]),
    (0xc001_0140, &[OSVW]),
    (0xc001_0141, &[OSVW]),
];

#[test]
fn registers_go_with_their_features() {
    const COMMANDS: [u32; 2] = [0x49, 0x10b];
    let exists = |guest: &mut Guest, index: u32| {
        if COMMANDS.contains(&index) {
            assert_eq!(guest.read(index), None, "{index:#x} is only written");
            assert!(!guest.write(index, 2), "{index:#x} has no other command");
            guest.write(index, 1)
        } else {
            guest.read(index).is_some()
        }
    };
    for &(index, bits) in CONDITIONAL {
        let mut guest = Guest::offered(bits, &[]);
        assert!(!exists(&mut guest, index), "{index:#x} without feature");
        assert!(!guest.write(index, 0), "{index:#x} without feature");
        for &bit in bits {
            let mut guest = Guest::offered(bits, &[bit]);
            assert!(exists(&mut guest, index), "{index:#x} with {bit:x?}");
        }
    }
}

/// What stock kernels, firmware and Windows read whatever CPUID offers, with the value where it
/// is the same on every processor, and whether 0 may be written.
const UNCONDITIONAL: &[(u32, Option<u64>, bool)] = &[
    (0x0, Some(0), false), // IA32_P5_MC_ADDR
    (0x1, Some(0), false), // IA32_P5_MC_TYPE
    (0x17, Some(0), false),
    (0x1b, None, true),
    (0x2a, Some(0), false),       // EBL_CR_POWERON
    (0x2c, Some(1 << 24), false), // EBC_FREQUENCY_ID: a ratio of 1, at 100 MHz
    (0x3a, Some(0), true),
    (0x3b, None, true),
    (0x79, Some(0), true),
    (0x8b, None, true),
    (0xc1, Some(0), true), // P6's performance counters
    (0xc2, Some(0), true),
    (0xcd, None, false),
    (0xce, None, false),
    (0xfe, None, false),
    (0x11e, Some(0xbe70_2111), true),
    (0x140, Some(0), true),
    (0x174, None, true),
    (0x175, None, true),
    (0x176, None, true),
    (0x179, None, false),
    (0x17a, None, true),
    (0x17b, None, true),
    (0x186, Some(0), true), // P6's event selectors
    (0x187, Some(0), true),
    (0x198, None, false),
    (0x199, Some(0), true),
    (0x1a0, None, false),
    (0x1d9, Some(0), true),
    (0x1db, Some(0), true),
    (0x1de, Some(0), true),
    (0x1fc, None, true),
    (0x200, None, true),
    (0x20f, None, true),
    (0x250, None, true),
    (0x26f, None, true),
    (0x277, None, true),
    (0x2ff, None, true),
    (0x400, None, true),
    (0x401, None, true),
    (0x606, Some(0), false),
    (0x611, Some(0), false),
    (0x619, Some(0), false),
    (0x639, Some(0), false),
    (0x641, Some(0), false),
    (0x6e0, None, true),
    (0xc000_0080, None, false),
    (0xc000_0081, None, true),
    (0xc000_0082, None, true),
    (0xc000_0083, None, true),
    (0xc000_0084, None, true),
    (0xc000_0100, None, true),
    (0xc000_0101, None, true),
    (0xc000_0102, None, true),
    (0xc001_0000, Some(0), true),
    (0xc001_0003, Some(0), true),
    (0xc001_0004, Some(0), true),
    (0xc001_0007, Some(0), true),
    (0xc001_0010, Some(0), true),
    (0xc001_0015, None, true),
    (0xc001_001b, Some(0x2000_0000), false), // CLK_CTL: what Linux wants to find in it
    (0xc001_001f, Some(0), true),
    (0xc001_0055, Some(0), false),
    (0xc001_0058, Some(0), true),
    (0xc001_0112, Some(0), false),
    (0xc001_0113, Some(0), false),
    (0xc001_0117, Some(0), true),
    (0xc001_1020, Some(0), true),
    (0xc001_1021, Some(0), true),
    (0xc001_1022, Some(0), true),
    (0xc001_1023, Some(0), true),
    (0xc001_1029, None, true),
    (0xc001_102a, Some(0), true),
    (0xc001_102c, Some(0), true),
];

#[test]
fn registers_that_systems_read_unasked() {
    // Of a processor that offers next to nothing, too.
    for poor in [false, true] {
        let mut guest = Guest::with(|cpuid| {
            for e in cpuid.as_mut_slice().iter_mut().filter(|_| poor) {
                match e.function {
                    1 => (e.ecx, e.edx) = (0, 1 << 5),
                    7 | 0x8000_0008 => (e.ebx, e.ecx, e.edx) = (0, 0, 0),
                    0x8000_0001 => (e.ecx, e.edx) = (0, 1 << 29),
                    0xd => (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0),
                    _ => {}
                }
            }
        });
        for &(index, value, writable) in UNCONDITIONAL {
            let read = guest.read(index);
            assert!(read.is_some(), "{index:#x} faults, poor {poor}");
            assert!(value.is_none() || read == value, "{index:#x}: {read:x?}");
            assert_eq!(guest.write(index, 0), writable, "{index:#x}, poor {poor}");
        }
    }
    let mut guest = Guest::with(|_| {});
    for absent in [
        0x2,
        0x29,
        0x2b,
        0xcf,
        0x122,
        0x5555,
        0xc001_0114,
        0xc001_011f,
    ] {
        assert_eq!(guest.read(absent), None, "{absent:#x}");
        assert!(!guest.write(absent, 0), "{absent:#x}");
    }
}

/// IA32_MCi_CTL2 exists for as many banks as there are. Source: SDM volume 4, IA32_MC0_CTL2.
#[test]
fn machine_check_banks_have_their_registers() {
    let mut guest = Guest::with(|_| {});
    let banks = (guest.read(0x179).unwrap() & 0xff) as u32;
    for (first, step) in [(0x280, 1), (0x400, 4)] {
        assert!(guest.read(first + step * (banks - 1)).is_some());
    }
    // Two banks.
    guest.machine.vcpu().setup_mce(2).unwrap();
    for (first, step) in [(0x280, 1), (0x400, 4)] {
        assert!(guest.read(first + step).is_some());
        assert_eq!(guest.read(first + 2 * step), None, "{first:#x}");
        assert!(!guest.write(first + 2 * step, 0), "{first:#x}");
    }
}

/// The registers of asynchronous page faults. Source: the kernel's "KVM-specific MSRs".
#[test]
fn asynchronous_page_faults_are_accepted_by_interrupt() {
    const ENABLE: u32 = 0x4b56_4d02;
    const VECTOR: u32 = 0x4b56_4d06;
    const ACKNOWLEDGE: u32 = 0x4b56_4d07;
    let mut guest = Guest::with(|_| {});
    let cpuid = guest.machine.kvm.get_supported_cpuid(256).unwrap();
    let features = cpuid.as_slice().iter().find(|e| e.function == 0x4000_0001);
    let features = features.unwrap().eax;
    assert_eq!(features >> 4 & 1, 1, "KVM_FEATURE_ASYNC_PF");
    assert_eq!(features >> 14 & 1, 1, "KVM_FEATURE_ASYNC_PF_INT");
    assert_eq!(features >> 10 & 1, 0, "KVM_FEATURE_ASYNC_PF_VMEXIT");
    for (index, value, is_good) in [
        (VECTOR, 0xf3, true),
        (VECTOR, 0x1f3, false),
        (ENABLE, 0x6000 | 0b1011, true),
        (ENABLE, 0x6000 | 0b0100, false),
        (ENABLE, 0x6000 | 0b1_0001, false),
        (ENABLE, 0x6000 | 0b10_0001, false),
        (ACKNOWLEDGE, 1, true),
    ] {
        assert_eq!(guest.write(index, value), is_good, "{index:#x} {value:#x}");
    }
    let read = [ENABLE, VECTOR, ACKNOWLEDGE].map(|index| guest.read(index));
    assert_eq!(read, [Some(0x600b), Some(0xf3), Some(0)]);
}

//! Mode changes: from reset through protected mode to 64-bit code and back, virtual-8086 mode,
//! system calls, call gates, task switches.

use crate::bench::*;
use crate::guest::{Guest, flat_segments_32};
use arch::control_registers::{Cr0, Cr4, Efer, Rflags};
use arch::cpuid::Feature;
use arch::exit::{ExitReason, TaskSwitchSource, task_switch_qualification};
use arch::segment::{AccessRights, DescriptorTable, Segment, SegmentName};
use iced_x86::code_asm::*;

/// A guest in its reset state, except that CS is based at zero.
fn real_guest() -> Guest {
    let mut guest = Guest::new(0x10_0000);
    guest.vcpu.state.segments[1] = Segment::real_mode(0, true);
    guest.vcpu.state.idtr = DescriptorTable {
        base: 0,
        limit: 0x3ff,
    };
    guest.vcpu.state.regs[4] = 0xf000;
    guest
}

#[test]
fn from_real_mode_to_64_bit_code() {
    let mut guest = real_guest();
    guest.controls.msr_bitmap.set(arch::msr::EFER, true, false);
    guest.controls.msr_bitmap.set(arch::msr::EFER, false, false);
    // Tables as the 64-bit bench has them.
    let template = long_guest();
    guest
        .memory
        .write(0x1000, &template.memory.bytes()[0x1000..0x4000]);
    guest
        .memory
        .write(GDT, &template.memory.bytes()[GDT as usize..][..0x100]);
    guest.memory.write(0x6000, &0x47u16.to_le_bytes());
    guest.memory.write(0x6002, &(GDT as u32).to_le_bytes());
    let (protected, long) = (0xa100u64, 0xa200u64);
    let real = assemble(16, 0xa000, |a| {
        a.lgdt(fword_ptr(0x6000)).unwrap();
        a.mov(eax, cr0).unwrap();
        a.or(eax, 1).unwrap();
        a.mov(cr0, eax).unwrap();
        a.db(&[0x66, 0xea]).unwrap();
        a.dd(&[protected as u32]).unwrap();
        a.dw(&[COMPAT_CODE]).unwrap();
    });
    guest.memory.write(0xa000, &real);
    let flat = assemble(32, protected, |a| {
        a.mov(eax, u32::from(KERNEL_DATA)).unwrap();
        a.mov(ds, eax).unwrap();
        a.mov(ss, eax).unwrap();
        a.mov(eax, 0x20).unwrap();
        a.mov(cr4, eax).unwrap();
        a.mov(eax, 0x1000).unwrap();
        a.mov(cr3, eax).unwrap();
        a.mov(ecx, arch::msr::EFER).unwrap();
        a.rdmsr().unwrap();
        a.or(eax, 0x100).unwrap();
        a.wrmsr().unwrap();
        a.mov(eax, cr0).unwrap();
        a.or(eax, 0x8000_0000u32).unwrap();
        a.mov(cr0, eax).unwrap();
        a.db(&[0xea]).unwrap();
        a.dd(&[long as u32]).unwrap();
        a.dw(&[KERNEL_CODE]).unwrap();
    });
    guest.memory.write(protected, &flat);
    let code = assemble(64, long, |a| {
        a.mov(rax, 0x1122_3344_5566_7788u64).unwrap();
        a.hlt().unwrap();
    });
    guest.memory.write(long, &code);
    guest.vcpu.state.rip = 0xa000;
    guest.run_to(ExitReason::Hlt);
    let state = &guest.vcpu.state;
    assert_eq!(state.regs[0], 0x1122_3344_5566_7788);
    assert!(state.efer.contains(Efer::LMA | Efer::LME));
    assert!(state.cr0.contains(Cr0::PG | Cr0::PE) && state.cr4.contains(Cr4::PAE));
    assert!(state.segments[1].access.has(AccessRights::L));
}

#[test]
fn real_mode_interrupts_and_segments() {
    let mut guest = real_guest();
    // INT 0x21 goes to 0x0100:0x0020.
    guest.memory.write(4 * 0x21, &[0x20, 0, 0, 1]);
    guest
        .memory
        .write(0x1020, &assemble(16, 0x20, |a| a.iret().unwrap()));
    let code = assemble(16, 0x8000, |a| {
        a.mov(ax, 0x1234).unwrap();
        a.mov(ds, eax).unwrap();
        a.mov(word_ptr(0x10), 0x5aa5).unwrap();
        a.sti().unwrap();
        a.int(0x21).unwrap();
        a.hlt().unwrap();
    });
    guest.memory.write(0x8000, &code);
    guest.vcpu.state.rip = 0x8000;
    guest.run_to(ExitReason::Hlt);
    assert_eq!(guest.memory.bytes()[0x12350..0x12352], [0xa5, 0x5a]);
    assert_eq!(guest.vcpu.state.regs[4] & 0xffff, 0xf000);
    assert!(
        guest.vcpu.state.rflags() & 0x200 != 0,
        "IRET brought IF back"
    );
}

#[test]
fn unreal_mode_keeps_a_large_limit() {
    let mut guest = real_guest();
    guest.vcpu.state.segments[SegmentName::Ds as usize].limit = u32::MAX;
    let code = assemble(16, 0x8000, |a| {
        a.mov(ebx, 0x9_0000u32).unwrap();
        a.mov(byte_ptr(ebx), 0x77).unwrap();
        a.hlt().unwrap();
    });
    guest.memory.write(0x8000, &code);
    guest.vcpu.state.rip = 0x8000;
    guest.run_to(ExitReason::Hlt);
    assert_eq!(guest.memory.bytes()[0x9_0000], 0x77);

    // With the usual limit it is #GP, vector 13.
    let mut guest = real_guest();
    guest.memory.write(0x8000, &code);
    guest.memory.write(4 * 13, &[0x40, 0, 0, 1]);
    guest.memory.write(0x1040, &[0xf4]);
    guest.vcpu.state.rip = 0x8000;
    guest.run_to(ExitReason::Hlt);
    assert_eq!(guest.vcpu.state.rip, 0x40);
}

/// A 32-bit protected-mode guest with flat segments, a GDT and an IDT of halting handlers.
pub fn protected_guest() -> Guest {
    let mut guest = Guest::new(0x10_0000);
    let descriptors: [u64; 10] = [
        0,
        0x00cf_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x0000_8b00_0000_0067 | TSS << 16,
        0x0000_8900_0000_0067 | (TSS + 0x80) << 16,
        // A call gate for ring 3 to ring 0 with one parameter.
        0x0000_ec01_0008_0000 | (CODE + 0x400) & 0xffff | ((CODE + 0x400) >> 16) << 48,
        // A task gate to the second TSS.
        0x0000_8500_0030_0000,
        0x0000_8200_0000_0007 | DATA << 16,
    ];
    for (i, descriptor) in descriptors.into_iter().enumerate() {
        guest.memory.write_u64(GDT + 8 * i as u64, descriptor);
    }
    for vector in 0..256u64 {
        let offset = HANDLERS + 16 * vector;
        let gate = offset & 0xffff | 8 << 16 | 0x8e00 << 32 | (offset >> 16) << 48;
        guest.memory.write_u64(IDT + 8 * vector, gate);
        guest.memory.write(offset, &[0xf4]);
    }
    guest.memory.write(TSS + 4, &(STACK as u32).to_le_bytes());
    guest.memory.write(TSS + 8, &0x10u16.to_le_bytes());
    let state = &mut guest.vcpu.state;
    state.cr0 = Cr0::PE | Cr0::ET | Cr0::NE;
    state.gdtr = DescriptorTable {
        base: GDT,
        limit: 79,
    };
    state.idtr = DescriptorTable {
        base: IDT,
        limit: 0x7ff,
    };
    state.tr = Segment {
        base: TSS,
        limit: 0x67,
        access: AccessRights(0x8b),
        selector: 0x28,
    };
    state.segments = flat_segments_32();
    state.rip = CODE;
    state.regs[4] = STACK;
    guest
}

pub fn to_ring3(guest: &mut Guest) {
    let state = &mut guest.vcpu.state;
    for (n, segment) in state.segments.iter_mut().enumerate() {
        segment.access.0 |= 3 << 5;
        segment.selector = if n == 1 { 0x23 } else { 0x1b };
    }
    state.regs[4] = USER_STACK;
}

#[test]
fn a_call_gate_changes_stacks_and_copies_parameters() {
    let mut guest = protected_guest();
    to_ring3(&mut guest);
    guest.load(&assemble(32, CODE, |a| {
        a.push(0x1234_5678).unwrap();
        a.db(&[0x9a]).unwrap();
        a.dd(&[0]).unwrap();
        a.dw(&[0x3b]).unwrap();
        a.ud2().unwrap();
    }));
    // The callee returns and drops the parameter.
    guest.memory.write(
        CODE + 0x400,
        &assemble(32, CODE + 0x400, |a| {
            a.mov(eax, dword_ptr(esp + 8)).unwrap();
            a.retf_1(4).unwrap();
        }),
    );
    assert_eq!(guest.run_to_handler(), 6, "back in ring 3, at UD2");
    assert_eq!(guest.vcpu.state.regs[0], 0x1234_5678);
    let top = guest.vcpu.state.regs[4];
    let word = |n: u64| {
        let at = (top + 4 * n) as usize;
        u32::from_le_bytes(guest.memory.bytes()[at..at + 4].try_into().unwrap())
    };
    assert_eq!(word(1), 0x23, "the fault came from ring 3");
    assert_eq!(u64::from(word(3)), USER_STACK, "whose stack is balanced");
}

#[test]
fn every_way_to_switch_tasks_exits() {
    let cases: [(Vec<u8>, u64); 3] = [
        (
            assemble(32, CODE, |a| {
                a.db(&[0xea]).unwrap();
                a.dd(&[0]).unwrap();
                a.dw(&[0x30]).unwrap();
            }),
            task_switch_qualification(TaskSwitchSource::Jmp, 0x30),
        ),
        (
            assemble(32, CODE, |a| {
                a.db(&[0x9a]).unwrap();
                a.dd(&[0]).unwrap();
                a.dw(&[0x40]).unwrap();
            }),
            task_switch_qualification(TaskSwitchSource::Call, 0x30),
        ),
        (
            assemble(32, CODE, |a| a.iretd().unwrap()),
            task_switch_qualification(TaskSwitchSource::Iret, 0x30),
        ),
    ];
    for (code, qualification) in cases {
        let mut guest = protected_guest();
        guest.memory.write(TSS, &0x30u16.to_le_bytes());
        if code == [0xcf] {
            guest.vcpu.state.rflags_rest |= Rflags::NT.bits();
        }
        guest.load(&code);
        let exit = guest.run_to(ExitReason::TaskSwitch);
        assert_eq!(exit.qualification, qualification);
        assert_eq!(exit.instruction_length as usize, code.len());
        assert_eq!(guest.vcpu.state.rip, CODE);
    }
    // Through a task gate in the IDT.
    let mut guest = protected_guest();
    guest.memory.write_u64(IDT + 8 * 6, 0x0000_8500_0030_0000);
    guest.load(&[0x0f, 0x0b]);
    let exit = guest.run_to(ExitReason::TaskSwitch);
    assert_eq!(
        exit.qualification,
        task_switch_qualification(TaskSwitchSource::Idt, 0x30)
    );
    assert_eq!(exit.idt_vectoring_info.vector(), 6);
}

#[test]
fn segment_limits_and_rights_are_checked_in_protected_mode() {
    type Prepare = fn(&mut Guest);
    let cases: [(Prepare, u8); 5] = [
        (|g| g.vcpu.state.segments[3].limit = 0xfff, 13),
        (|g| g.vcpu.state.segments[3].access.0 = 0xc091, 13),
        (|g| g.vcpu.state.segments[3] = Segment::UNUSABLE, 13),
        // Expand-down: valid above the limit only.
        (
            |g| {
                g.vcpu.state.segments[3].access.0 = 0xc097;
                g.vcpu.state.segments[3].limit = 0xf_ffff
            },
            13,
        ),
        (|_| {}, 6),
    ];
    for (prepare, vector) in cases {
        let mut guest = protected_guest();
        guest.load(&assemble(32, CODE, |a| {
            a.mov(dword_ptr(ecx), eax).unwrap();
            a.ud2().unwrap();
        }));
        guest.vcpu.state.regs[1] = DATA;
        prepare(&mut guest);
        assert_eq!(guest.run_to_handler(), vector);
    }
}

#[test]
fn virtual_8086_mode_goes_in_by_iret_and_out_by_faults() {
    let mut guest = protected_guest();
    guest.load(&assemble(32, CODE, |a| {
        for value in [
            0x1000, 0x1000, 0x1000, 0x1000, 0x1000, 0x800, 0x2_0002, 0x1000, 0x10,
        ] {
            a.push(value).unwrap();
        }
        a.iretd().unwrap();
    }));
    // mov word [0x20], 0x4242; cli (IOPL 0: #GP)
    guest
        .memory
        .write(0x1_0010, &[0xc7, 0x06, 0x20, 0x00, 0x42, 0x42, 0xfa]);
    for vector in 0..256u64 {
        // Handlers moved away from where the 8086 code lies.
        let offset = 0x5_0000 + 16 * vector;
        let gate = offset & 0xffff | 8 << 16 | 0x8e00 << 32 | (offset >> 16) << 48;
        guest.memory.write_u64(IDT + 8 * vector, gate);
        guest.memory.write(offset, &[0xf4]);
    }
    guest.run_to(ExitReason::Hlt);
    assert_eq!(guest.vcpu.state.rip, 0x5_0000 + 16 * 13);
    assert_eq!(guest.memory.bytes()[0x1_0020..0x1_0022], [0x42, 0x42]);
    let state = &guest.vcpu.state;
    assert_eq!(state.rflags() & Rflags::VM.bits(), 0);
    assert!(
        !state.segments[3].access.usable(),
        "DS is null after leaving"
    );
    let top = state.regs[4] as usize;
    let frame: Vec<u32> = (0..10)
        .map(|n| u32::from_le_bytes(guest.memory.bytes()[top + 4 * n..][..4].try_into().unwrap()))
        .collect();
    assert_eq!(frame[1], 0x16, "EIP of the CLI");
    assert_eq!(frame[2], 0x1000);
    assert_ne!(frame[3] & Rflags::VM.bits() as u32, 0);
    assert_eq!(&frame[6..10], &[0x1000; 4], "ES, DS, FS, GS");
}

#[test]
fn fast_system_calls_go_there_and_back() {
    let mut guest = long_guest();
    super::exceptions::to_user(&mut guest);
    guest.vcpu.state.msrs.star = u64::from(KERNEL_CODE) << 32 | 0x13 << 48;
    guest.vcpu.state.msrs.lstar = CODE + 0x100;
    guest.vcpu.state.msrs.fmask = 0x200;
    guest.vcpu.state.set_rflags(0x202);
    guest.load(&assemble(64, CODE, |a| {
        a.syscall().unwrap();
        a.ud2().unwrap();
    }));
    guest.memory.write(
        CODE + 0x100,
        &assemble(64, CODE + 0x100, |a| {
            a.pushfq().unwrap();
            a.pop(rdx).unwrap();
            a.sysretq().unwrap();
        }),
    );
    assert_eq!(guest.run_to_handler(), 6);
    let state = &guest.vcpu.state;
    assert_eq!(state.regs[2] & 0x200, 0, "FMASK cleared IF");
    assert_eq!(state.regs[11] & 0x200, 0x200);
    assert_eq!(state.regs[1], CODE + 2);
    assert_eq!(guest.stack(1), 0x23, "SYSRET went to ring 3");
}

#[test]
fn compatibility_mode_enters_the_kernel_through_cstar() {
    for cstar in [0, CODE + 0x200] {
        let mut guest = long_guest();
        super::exceptions::to_user(&mut guest);
        let code = &mut guest.vcpu.state.segments[1];
        code.access.0 = code.access.0 & !AccessRights::L | AccessRights::DB;
        guest.vcpu.state.msrs.star = u64::from(KERNEL_CODE) << 32;
        guest.vcpu.state.msrs.cstar = cstar;
        guest.load(&[0x0f, 0x05]);
        guest.memory.write(CODE + 0x200, &[0xf4]);
        if cstar == 0 {
            assert_eq!(guest.run_to_handler(), 6);
            continue;
        }
        guest.run_to_halt();
        let state = &guest.vcpu.state;
        assert_eq!((state.rip, state.regs[1]), (CODE + 0x200, CODE + 2));
        assert!(state.segments[1].access.has(AccessRights::L) && state.cpl() == 0);
    }
}

#[test]
fn a_processor_without_an_extension_ignores_what_selects_it() {
    let code = |a: &mut CodeAssembler| {
        a.mov(ecx, 0x50).unwrap();
        // TZCNT, LZCNT.
        a.db(&[0xf3, 0x0f, 0xbc, 0xc1]).unwrap();
        a.db(&[0xf3, 0x0f, 0xbd, 0xd1]).unwrap();
        // WBNOINVD, CLDEMOTE [RBX], BNDCL BND0, EAX, ENDBR64, PREFETCHIT0 [RIP].
        a.db(&[0xf3, 0x0f, 0x09]).unwrap();
        a.db(&[0x0f, 0x1c, 0x03]).unwrap();
        a.db(&[0xf3, 0x0f, 0x1a, 0xc0]).unwrap();
        a.db(&[0xf3, 0x0f, 0x1e, 0xfa]).unwrap();
        a.db(&[0x0f, 0x18, 0x3d, 0, 0, 0, 0]).unwrap();
        a.hlt().unwrap();
    };
    let counts = |absent: &[Feature]| {
        let mut guest = long_guest();
        let mut features = eptide_cpu::Vcpu::host_features();
        for &feature in absent {
            features.remove(feature);
        }
        guest.vcpu.set_features(features, 46);
        guest.load(&assemble(64, CODE, code));
        guest.run_to_halt();
        (guest.vcpu.state.regs[0], guest.vcpu.state.regs[2])
    };
    let has = |feature| eptide_cpu::Vcpu::host_features().has(feature);
    assert_eq!(
        counts(&[Feature::BMI1, Feature::LZCNT, Feature::WBNOINVD]),
        (4, 6)
    );
    if has(Feature::BMI1) && has(Feature::LZCNT) {
        assert_eq!(counts(&[]), (4, 25));
    }
}

/// What a return to an outer level does to data segments that it may not keep, and to null ones: the
/// selector goes, and the bases of FS and GS stay, as 64-bit systems rely on. For null selectors
/// measured on Intel family 6, model 207, whose interrupts in user code return by IRET; SDM volume 2,
/// "IRET/IRETD/IRETQ", the steps RETURN-TO-OUTER-PRIVILEGE-LEVEL.
#[test]
fn returns_to_an_outer_level_keep_the_bases_of_fs_and_gs() {
    const USER: u64 = 0x6000;
    const BASE: u64 = 0x1234_5678_9000;
    let null = |rpl| Segment {
        selector: rpl,
        base: BASE,
        ..Segment::UNUSABLE
    };
    let data = |selector, access| Segment {
        selector,
        base: BASE,
        limit: u32::MAX,
        access: AccessRights(access),
    };
    for (name, before, kept) in [
        ("null", null(0), false),
        ("null with an RPL", null(3), false),
        ("inner", data(KERNEL_DATA, 0xc093), false),
        ("outer", data(USER_DATA, 0xc0f3), true),
    ] {
        for (size, iret) in [2, 4, 8].into_iter().flat_map(|n| [(n, false), (n, true)]) {
            let mut guest = long_guest();
            let prefix: &[u8] = match size {
                2 => &[0x66],
                4 => &[],
                _ => &[0x48],
            };
            guest.load(&[prefix, &[if iret { 0xcf } else { 0xcb }]].concat());
            guest.memory.write(USER, &[0x0f, 0x0b]);
            let flags: &[u64] = if iret { &[2] } else { &[] };
            let frame = [
                &[USER, USER_CODE.into()][..],
                flags,
                &[0x5000, USER_DATA.into()],
            ];
            for (n, value) in frame.concat().into_iter().enumerate() {
                let bytes = &value.to_le_bytes()[..size];
                guest.memory.write(STACK - 0x100 + (n * size) as u64, bytes);
            }
            let state = &mut guest.vcpu.state;
            state.regs[4] = STACK - 0x100;
            for n in [0, 3, 4, 5] {
                state.segments[n] = before;
            }
            assert_eq!(guest.run_to_handler(), 6, "{name} {size} {iret}");
            assert_eq!(guest.stack(0), USER, "{name} {size} {iret}");
            for n in [0, 3, 4, 5] {
                let after = guest.vcpu.state.segments[n];
                let expected = if kept { USER_DATA } else { 0 };
                assert_eq!(after.selector, expected, "{name} {size} {iret}");
                assert_eq!(after.access.usable(), kept, "{name} {size} {iret}");
                assert!(n < 4 || after.base == BASE, "{name} {size} {iret}");
            }
        }
    }
}

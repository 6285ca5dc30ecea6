//! Every cause of a VM exit that an instruction or the loop raises, with its exit information.

use crate::bench::*;
use crate::guest::{EPT_RWX, Guest, Memory};
use arch::control_registers::{Cr0, Cr4, Rflags};
use arch::controls::{Interruptibility, PinControls, PrimaryControls, SecondaryControls};
use arch::exit::{CrAccess, DrAccess, EptViolation, ExitReason, IoAccess};
use iced_x86::code_asm::*;

type Case = (
    &'static str,
    fn(&mut CodeAssembler),
    fn(&mut Guest),
    ExitReason,
    u64,
);

fn primary(guest: &mut Guest, control: PrimaryControls) {
    guest.controls.primary |= control;
}

fn secondary(guest: &mut Guest, control: SecondaryControls) {
    guest.controls.secondary |= control;
}

fn cases() -> Vec<Case> {
    use ExitReason as R;
    use PrimaryControls as P;
    use SecondaryControls as S;
    let io = |size, input, string, rep, immediate, port| {
        IoAccess {
            size,
            input,
            string,
            rep,
            immediate,
            port,
        }
        .qualification()
    };
    vec![
        ("CPUID", |a| a.cpuid().unwrap(), |_| {}, R::Cpuid, 0),
        ("HLT", |a| a.hlt().unwrap(), |_| {}, R::Hlt, 0),
        ("INVD", |a| a.invd().unwrap(), |_| {}, R::Invd, 0),
        ("VMCALL", |a| a.vmcall().unwrap(), |_| {}, R::Vmcall, 0),
        ("XSETBV", |a| a.xsetbv().unwrap(), |_| {}, R::Xsetbv, 0),
        ("RDMSR", |a| a.rdmsr().unwrap(), |_| {}, R::Rdmsr, 0),
        ("WRMSR", |a| a.wrmsr().unwrap(), |_| {}, R::Wrmsr, 0),
        (
            "WBINVD",
            |a| a.wbinvd().unwrap(),
            |g| secondary(g, S::WBINVD_EXITING),
            R::Wbinvd,
            0,
        ),
        (
            "RDTSC",
            |a| a.rdtsc().unwrap(),
            |g| primary(g, P::RDTSC_EXITING),
            R::Rdtsc,
            0,
        ),
        (
            "RDTSCP",
            |a| a.rdtscp().unwrap(),
            |g| primary(g, P::RDTSC_EXITING),
            R::Rdtscp,
            0,
        ),
        (
            "RDPMC",
            |a| a.rdpmc().unwrap(),
            |g| primary(g, P::RDPMC_EXITING),
            R::Rdpmc,
            0,
        ),
        (
            "PAUSE",
            |a| a.pause().unwrap(),
            |g| primary(g, P::PAUSE_EXITING),
            R::Pause,
            0,
        ),
        (
            "MONITOR",
            |a| a.monitor().unwrap(),
            |g| primary(g, P::MONITOR_EXITING),
            R::Monitor,
            0,
        ),
        (
            "MWAIT",
            |a| a.mwait().unwrap(),
            |g| primary(g, P::MWAIT_EXITING),
            R::Mwait,
            0,
        ),
        (
            "RDRAND",
            |a| a.rdrand(eax).unwrap(),
            |g| secondary(g, S::RDRAND_EXITING),
            R::Rdrand,
            0,
        ),
        (
            "RDSEED",
            |a| a.rdseed(eax).unwrap(),
            |g| secondary(g, S::RDSEED_EXITING),
            R::Rdseed,
            0,
        ),
        (
            "INVLPG",
            |a| a.invlpg(byte_ptr(rcx + 0x10)).unwrap(),
            |g| {
                g.vcpu.state.regs[1] = DATA;
                primary(g, P::INVLPG_EXITING)
            },
            R::Invlpg,
            DATA + 0x10,
        ),
        (
            "INVPCID",
            |a| a.invpcid(rax, xmmword_ptr(rcx)).unwrap(),
            |g| {
                g.vcpu.state.regs[1] = DATA;
                primary(g, P::INVLPG_EXITING)
            },
            R::Invpcid,
            0,
        ),
        (
            "MOV to CR0, owned bit",
            |a| a.mov(cr0, rcx).unwrap(),
            |g| {
                g.controls.cr0_mask = Cr0::TS.bits();
                g.vcpu.state.regs[1] = 0x8005_003b
            },
            R::CrAccess,
            CrAccess::MovTo { cr: 0, register: 1 }.qualification(),
        ),
        (
            "MOV to CR3",
            |a| a.mov(cr3, r9).unwrap(),
            |g| primary(g, P::CR3_LOAD_EXITING),
            R::CrAccess,
            CrAccess::MovTo { cr: 3, register: 9 }.qualification(),
        ),
        (
            "MOV from CR3",
            |a| a.mov(rdx, cr3).unwrap(),
            |g| primary(g, P::CR3_STORE_EXITING),
            R::CrAccess,
            CrAccess::MovFrom { cr: 3, register: 2 }.qualification(),
        ),
        (
            "MOV to CR4, owned bit",
            |a| a.mov(cr4, rcx).unwrap(),
            |g| {
                g.controls.cr4_mask = Cr4::VMXE.bits();
                g.vcpu.state.regs[1] = 1 << 13
            },
            R::CrAccess,
            CrAccess::MovTo { cr: 4, register: 1 }.qualification(),
        ),
        (
            "MOV to CR8",
            |a| a.mov(cr8, rcx).unwrap(),
            |g| primary(g, P::CR8_LOAD_EXITING),
            R::CrAccess,
            CrAccess::MovTo { cr: 8, register: 1 }.qualification(),
        ),
        (
            "MOV from CR8",
            |a| a.mov(rcx, cr8).unwrap(),
            |g| primary(g, P::CR8_STORE_EXITING),
            R::CrAccess,
            CrAccess::MovFrom { cr: 8, register: 1 }.qualification(),
        ),
        (
            "CLTS, owned",
            |a| a.clts().unwrap(),
            |g| {
                g.controls.cr0_mask = 8;
                g.controls.cr0_shadow = 8
            },
            R::CrAccess,
            CrAccess::Clts.qualification(),
        ),
        (
            "LMSW, owned",
            |a| a.lmsw(cx).unwrap(),
            |g| {
                g.controls.cr0_mask = 8;
                g.vcpu.state.regs[1] = 9
            },
            R::CrAccess,
            CrAccess::Lmsw {
                source: 9,
                memory: false,
            }
            .qualification(),
        ),
        (
            "MOV to DR",
            |a| a.mov(dr6, r10).unwrap(),
            |g| primary(g, P::MOV_DR_EXITING),
            R::DrAccess,
            DrAccess {
                dr: 6,
                from: false,
                register: 10,
            }
            .qualification(),
        ),
        (
            "MOV from DR",
            |a| a.mov(rbx, dr7).unwrap(),
            |g| primary(g, P::MOV_DR_EXITING),
            R::DrAccess,
            DrAccess {
                dr: 7,
                from: true,
                register: 3,
            }
            .qualification(),
        ),
        (
            "IN AL, imm8",
            |a| a.in_(al, 0x71).unwrap(),
            |_| {},
            R::IoInstruction,
            io(1, true, false, false, true, 0x71),
        ),
        (
            "OUT DX, EAX",
            |a| a.out(dx, eax).unwrap(),
            |g| g.vcpu.state.regs[2] = 0xcf8,
            R::IoInstruction,
            io(4, false, false, false, false, 0xcf8),
        ),
        (
            "REP INSB",
            |a| a.rep().insb().unwrap(),
            |g| {
                g.vcpu.state.regs[2] = 0x1f0;
                g.vcpu.state.regs[1] = 4;
                g.vcpu.state.regs[7] = DATA
            },
            R::IoInstruction,
            io(1, true, true, true, false, 0x1f0),
        ),
        (
            "OUTSW",
            |a| a.outsw().unwrap(),
            |g| {
                g.vcpu.state.regs[2] = 0x1f0;
                g.vcpu.state.regs[6] = DATA
            },
            R::IoInstruction,
            io(2, false, true, false, false, 0x1f0),
        ),
        (
            "LGDT",
            |a| a.lgdt(fword_ptr(rcx)).unwrap(),
            |g| secondary(g, S::DESCRIPTOR_TABLE_EXITING),
            R::GdtrIdtrAccess,
            0,
        ),
        (
            "SIDT",
            |a| a.sidt(fword_ptr(rcx)).unwrap(),
            |g| secondary(g, S::DESCRIPTOR_TABLE_EXITING),
            R::GdtrIdtrAccess,
            0,
        ),
        (
            "LTR",
            |a| a.ltr(ecx).unwrap(),
            |g| secondary(g, S::DESCRIPTOR_TABLE_EXITING),
            R::LdtrTrAccess,
            0,
        ),
        (
            "SLDT",
            |a| a.sldt(ecx).unwrap(),
            |g| secondary(g, S::DESCRIPTOR_TABLE_EXITING),
            R::LdtrTrAccess,
            0,
        ),
        (
            "XSAVES",
            |a| a.xsaves64(ptr(rcx)).unwrap(),
            |g| {
                g.vcpu.state.msrs.xss = 1 << 11;
                g.controls.xss_exiting_bitmap = 1 << 11;
                g.vcpu.state.regs[0] = 1 << 11;
                g.vcpu.state.regs[1] = DATA
            },
            R::Xsaves,
            0,
        ),
        (
            "XRSTORS",
            |a| a.xrstors64(ptr(rcx)).unwrap(),
            |g| {
                g.vcpu.state.msrs.xss = 1 << 11;
                g.controls.xss_exiting_bitmap = 1 << 11;
                g.vcpu.state.regs[0] = 1 << 11;
                g.vcpu.state.regs[1] = DATA
            },
            R::Xrstors,
            0,
        ),
    ]
}

#[test]
fn instructions_exit_with_their_information_and_no_effect() {
    for (name, code, prepare, reason, qualification) in cases() {
        let mut guest = long_guest();
        let bytes = assemble(64, CODE, code);
        guest.load(&bytes);
        prepare(&mut guest);
        let before = guest.vcpu.state.regs;
        let exit = guest.run_to(reason);
        assert_eq!(exit.qualification, qualification, "qualification of {name}");
        assert_eq!(
            exit.instruction_length as usize,
            bytes.len(),
            "length of {name}"
        );
        assert_eq!(guest.vcpu.state.rip, CODE, "RIP of {name}");
        assert_eq!(
            guest.vcpu.state.regs[..16],
            before[..16],
            "registers of {name}"
        );
    }
}

#[test]
fn without_their_controls_the_same_instructions_do_not_exit() {
    for (name, code, _, reason, _) in cases() {
        let always = matches!(
            reason,
            ExitReason::Cpuid
                | ExitReason::Invd
                | ExitReason::Vmcall
                | ExitReason::Xsetbv
                | ExitReason::Hlt
                | ExitReason::Rdpmc
                | ExitReason::Xsaves
                | ExitReason::Xrstors
                | ExitReason::Rdmsr
                | ExitReason::Wrmsr
                | ExitReason::LdtrTrAccess
        );
        if always {
            continue;
        }
        let mut guest = long_guest();
        guest.controls.primary -= PrimaryControls::UNCONDITIONAL_IO_EXITING;
        let mut bytes = assemble(64, CODE, code);
        bytes.push(0xf4);
        guest.load(&bytes);
        guest.vcpu.state.regs[1] = DATA;
        if name.contains("MOV to CR") {
            guest.vcpu.state.regs[1] = match name {
                "MOV to CR0, owned bit" => guest.vcpu.state.cr0.bits(),
                "MOV to CR4, owned bit" => guest.vcpu.state.cr4.bits(),
                _ => 3,
            };
            guest.vcpu.state.regs[9] = guest.vcpu.state.cr3;
        }
        if name == "LMSW, owned" {
            guest.vcpu.state.regs[1] = 1;
        }
        if name == "MOV to DR" {
            guest.vcpu.state.regs[10] = 0;
        }
        if matches!(name, "REP INSB" | "OUTSW") {
            guest.vcpu.state.regs[1] = 2;
            guest.vcpu.state.regs[7] = DATA;
            guest.vcpu.state.regs[6] = DATA;
        }
        if name == "LGDT" {
            guest.memory.write(DATA, &0x47u16.to_le_bytes());
            guest.memory.write(DATA + 2, &GDT.to_le_bytes());
        }
        guest.run_to_halt();
    }
}

#[test]
fn vmx_instructions_exit_once_enabled() {
    type Write = fn(&mut CodeAssembler);
    let code: [(Write, ExitReason); 4] = [
        (|a| a.vmxoff().unwrap(), ExitReason::Vmxoff),
        (|a| a.vmlaunch().unwrap(), ExitReason::Vmlaunch),
        (|a| a.vmread(rax, rcx).unwrap(), ExitReason::Vmread),
        (
            |a| a.invept(rax, xmmword_ptr(rcx)).unwrap(),
            ExitReason::Invept,
        ),
    ];
    for (write, reason) in code {
        let mut guest = long_guest();
        guest.vcpu.state.cr4 |= Cr4::VMXE;
        guest.load(&assemble(64, CODE, write));
        guest.run_to(reason);
    }
}

#[test]
fn ept_violations_say_what_was_tried_and_what_is_allowed() {
    let read = EptViolation::READ | EptViolation::LINEAR_VALID | EptViolation::FINAL;
    let write = EptViolation::WRITE | EptViolation::LINEAR_VALID | EptViolation::FINAL;
    let fetch = EptViolation::FETCH | EptViolation::LINEAR_VALID | EptViolation::FINAL;
    type Access = fn(&mut CodeAssembler);
    let cases: [(Access, u64, EptViolation); 5] = [
        (|a| a.mov(rax, qword_ptr(rcx)).unwrap(), 0, read),
        (|a| a.mov(qword_ptr(rcx), rax).unwrap(), 0, write),
        (
            |a| a.mov(qword_ptr(rcx), rax).unwrap(),
            5,
            write | EptViolation::READABLE | EptViolation::EXECUTABLE,
        ),
        (
            |a| a.jmp(rcx).unwrap(),
            3,
            fetch | EptViolation::READABLE | EptViolation::WRITABLE,
        ),
        (
            |a| a.mov(rax, qword_ptr(rcx)).unwrap(),
            4,
            read | EptViolation::EXECUTABLE,
        ),
    ];
    for (code, rights, expected) in cases {
        let mut guest = long_guest();
        let page = guest.memory.hva + DATA;
        guest.ept.set(
            DATA,
            if rights == 0 {
                0
            } else {
                page | 6 << 3 | rights
            },
        );
        guest.load(&assemble(64, CODE, code));
        guest.vcpu.state.regs[1] = DATA + 0x18;
        let exit = guest.run_to(ExitReason::EptViolation);
        assert_eq!(EptViolation::from_bits_retain(exit.qualification), expected);
        assert_eq!(exit.guest_linear_address, DATA + 0x18);
        assert_eq!(exit.guest_physical_address, DATA + 0x18);
    }
}

#[test]
fn an_ept_violation_on_a_guest_table_is_not_final() {
    let mut guest = long_guest();
    guest.ept.set(0x3000, 0);
    guest.load(&[0xf4]);
    let exit = guest.run_to(ExitReason::EptViolation);
    let q = EptViolation::from_bits_retain(exit.qualification);
    assert!(q.contains(EptViolation::READ | EptViolation::LINEAR_VALID));
    assert!(!q.contains(EptViolation::FINAL));
    assert_eq!(exit.guest_physical_address, 0x3000);
    assert_eq!(exit.guest_linear_address, CODE);
}

#[test]
fn an_illegal_ept_entry_is_a_misconfiguration() {
    for bits in [2, 6, 7 | 2 << 3, 7 | 3 << 3] {
        let mut guest = long_guest();
        let page = guest.memory.hva + DATA;
        guest.ept.set(DATA, page | bits);
        guest.load(&assemble(64, CODE, |a| a.mov(rax, qword_ptr(rcx)).unwrap()));
        guest.vcpu.state.regs[1] = DATA;
        let exit = guest.run_to(ExitReason::EptMisconfiguration);
        assert_eq!(exit.guest_physical_address, DATA);
        // Nothing was cached: mended, the access goes through.
        guest.ept.set(DATA, page | EPT_RWX);
        guest.memory.write(CODE + 3, &[0xf4]);
        guest.vcpu.entered_from_user();
        guest.run_to_halt();
    }
}

#[test]
fn windows_open_after_the_shadow_of_sti() {
    let mut guest = long_guest();
    guest.controls.primary |= PrimaryControls::INTERRUPT_WINDOW_EXITING;
    guest.load(&assemble(64, CODE, |a| {
        a.nop().unwrap();
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    }));
    guest.run_to(ExitReason::InterruptWindow);
    assert_eq!(guest.vcpu.state.rip, CODE + 3, "one instruction after STI");

    let mut guest = long_guest();
    guest.controls.primary |= PrimaryControls::NMI_WINDOW_EXITING;
    guest.vcpu.state.interruptibility = Interruptibility::NMI;
    let code = assemble(64, CODE, |a| {
        a.push(i32::from(KERNEL_DATA)).unwrap();
        a.push(STACK as i32).unwrap();
        a.push(2).unwrap();
        a.push(i32::from(KERNEL_CODE)).unwrap();
        a.push((CODE + 0x40) as i32).unwrap();
        a.iretq().unwrap();
    });
    guest.load(&code);
    guest.run_to(ExitReason::NmiWindow);
    assert_eq!(guest.vcpu.state.rip, CODE + 0x40, "IRET unblocks NMIs");
}

/// What a window's exit announces can be injected at the next entry (SDM volume 3, "Checks on Guest
/// Non-Register State"); otherwise an instruction goes first.
#[test]
fn a_window_is_open_where_its_exit_is() {
    let windows = [
        PrimaryControls::NMI_WINDOW_EXITING,
        PrimaryControls::INTERRUPT_WINDOW_EXITING,
        PrimaryControls::NMI_WINDOW_EXITING | PrimaryControls::INTERRUPT_WINDOW_EXITING,
    ];
    for (window, blocking) in windows
        .into_iter()
        .flat_map(|w| (0..8).map(move |b| (w, b)))
    {
        for flags in [0x002, 0x202] {
            let blocking = [
                Interruptibility::STI,
                Interruptibility::MOV_SS,
                Interruptibility::NMI,
            ]
            .into_iter()
            .enumerate()
            .filter(|(bit, _)| blocking >> bit & 1 != 0)
            .fold(Interruptibility::empty(), |all, (_, one)| all | one);
            let both = Interruptibility::STI | Interruptibility::MOV_SS;
            if blocking.contains(both) || flags == 2 && blocking.contains(Interruptibility::STI) {
                continue;
            }
            let mut guest = long_guest();
            guest.controls.primary |= window;
            guest.load(&[0x90, 0x90, 0xf4]);
            guest.vcpu.state.set_rflags(flags);
            guest.vcpu.state.interruptibility = blocking;
            let exit = guest.run();
            let state = &guest.vcpu.state;
            let moved = state.rip != CODE;
            assert_eq!(
                moved,
                blocking.intersects(both) || exit.reason == ExitReason::Hlt
            );
            let closed = match exit.reason {
                ExitReason::NmiWindow => both | Interruptibility::NMI,
                ExitReason::InterruptWindow => both,
                ExitReason::Hlt => continue,
                other => panic!("{other:?}"),
            };
            assert!(!state.interruptibility.intersects(closed), "{blocking:?}");
        }
    }
}

#[test]
fn the_monitor_trap_flag_exits_after_each_instruction() {
    let mut guest = long_guest();
    guest.controls.primary |= PrimaryControls::MONITOR_TRAP_FLAG;
    guest.load(&assemble(64, CODE, |a| {
        a.cmp(eax, ecx).unwrap();
        a.jz(CODE + 0x20).unwrap();
    }));
    guest.run_to(ExitReason::MonitorTrapFlag);
    assert_eq!(
        guest.vcpu.state.rip,
        CODE + 2,
        "a fused pair is two instructions"
    );
    guest.run_to(ExitReason::MonitorTrapFlag);
    assert_eq!(guest.vcpu.state.rip, CODE + 0x20);
}

#[test]
fn the_preemption_timer_ends_a_loop() {
    let mut guest = long_guest();
    guest.controls.pin |= PinControls::PREEMPTION_TIMER;
    guest.controls.preemption_timer = 100_000;
    guest.load(&[0xeb, 0xfe]);
    guest.run_to(ExitReason::PreemptionTimer);
    assert_eq!(guest.vcpu.state.rip, CODE);
}

#[test]
fn a_kick_ends_a_loop() {
    let mut guest = long_guest();
    guest.load(&[0xeb, 0xfe]);
    let attention = guest.vcpu.attention();
    let kicker = std::thread::spawn(move || {
        while !attention.in_guest() {
            std::thread::yield_now();
        }
        attention.kick();
    });
    guest.run_to(ExitReason::ExternalInterrupt);
    kicker.join().unwrap();
    guest.vcpu.rest();
    assert!(!guest.vcpu.attention().in_guest());
}

#[test]
fn a_lowered_task_priority_exits_after_the_instruction() {
    let mut guest = long_guest();
    let page = Memory::new(4096);
    page.write(0x80, &[0x70]);
    guest.controls.primary |= PrimaryControls::TPR_SHADOW;
    guest.controls.virtual_apic = page.hva;
    guest.controls.tpr_threshold = 5;
    guest.load(&assemble(64, CODE, |a| a.mov(cr8, rcx).unwrap()));
    guest.vcpu.state.regs[1] = 3;
    guest.run_to(ExitReason::TprBelowThreshold);
    assert_eq!((page.bytes()[0x80], guest.vcpu.state.rip), (0x30, CODE + 4));
}

#[test]
fn single_steps_and_breakpoints_trap() {
    // TF: #DB after the instruction that follows POPF.
    let mut guest = long_guest();
    guest.load(&assemble(64, CODE, |a| {
        a.push(0x102).unwrap();
        a.popfq().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    }));
    assert_eq!(guest.run_to_handler(), 1);
    let after = CODE
        + assemble(64, CODE, |a| {
            a.push(0x102).unwrap();
            a.popfq().unwrap();
            a.nop().unwrap();
        })
        .len() as u64;
    assert_eq!(guest.stack(0), after);
    assert_eq!(guest.vcpu.state.dr6.bits() & 0x4000, 0x4000);

    // An instruction breakpoint is a fault.
    let mut guest = long_guest();
    guest.load(&[0x90, 0x90, 0xf4]);
    guest.vcpu.state.dr[0] = CODE + 1;
    guest.vcpu.state.dr7 |= arch::control_registers::Dr7::from_bits_retain(2);
    assert_eq!(guest.run_to_handler(), 1);
    assert_eq!(guest.stack(0), CODE + 1);
    assert_eq!(guest.vcpu.state.dr6.bits() & 0xf, 1);

    // A data breakpoint on what is read and written in one.
    let mut guest = long_guest();
    guest.load(&assemble(64, CODE, |a| {
        a.inc(dword_ptr(rcx)).unwrap();
        a.hlt().unwrap();
    }));
    guest.vcpu.state.regs[1] = DATA;
    guest.vcpu.state.dr[0] = DATA;
    guest.vcpu.state.dr7 |= arch::control_registers::Dr7::from_bits_retain(2 | 1 << 16);
    assert_eq!(guest.run_to_handler(), 1);
    assert_eq!(guest.vcpu.state.dr6.bits() & 0xf, 1);

    // A data breakpoint is a trap.
    let mut guest = long_guest();
    guest.load(&assemble(64, CODE, |a| {
        a.mov(qword_ptr(rcx), rax).unwrap();
        a.nop().unwrap();
    }));
    guest.vcpu.state.regs[1] = DATA;
    guest.vcpu.state.dr[1] = DATA + 4;
    guest.vcpu.state.dr7 |= arch::control_registers::Dr7::from_bits_retain(2 << 2 | 0b0001 << 20);
    assert_eq!(guest.run_to_handler(), 1);
    assert_eq!(guest.stack(0), CODE + 3);
    assert_eq!(guest.vcpu.state.dr6.bits() & 0xf, 2);
}

#[test]
fn bad_guest_state_fails_the_entry_by_name() {
    type Break = fn(&mut Guest);
    let cases: [(Break, &str); 9] = [
        (|g| g.vcpu.state.cr0 -= Cr0::PE, "CR0.PG requires CR0.PE"),
        (
            |g| g.vcpu.state.cr4 -= Cr4::PAE,
            "IA-32e mode requires CR0.PG and CR4.PAE",
        ),
        (
            |g| g.vcpu.state.cr3 = 1 << 60,
            "CR3 lies within the physical-address width",
        ),
        (
            |g| g.vcpu.state.tr.access.0 = 0x10000,
            "TR is usable and a busy TSS",
        ),
        (
            |g| g.vcpu.state.segments[1].access.0 |= 1 << 14,
            "CS.L excludes CS.D in IA-32e mode",
        ),
        (
            |g| g.vcpu.state.set_rflags(1 << 63),
            "RFLAGS reserved bits are as fixed",
        ),
        (
            |g| g.vcpu.state.rflags_rest |= Rflags::VM.bits(),
            "virtual-8086 mode excludes IA-32e mode",
        ),
        (
            |g| g.vcpu.state.interruptibility = Interruptibility::STI,
            "blocking by STI requires RFLAGS.IF",
        ),
        (
            |g| g.vcpu.state.efer = arch::control_registers::Efer::LMA,
            "EFER.LMA equals CR0.PG and EFER.LME",
        ),
    ];
    for (spoil, rule) in cases {
        let mut guest = long_guest();
        guest.load(&[0xf4]);
        spoil(&mut guest);
        let exit = guest.run_to(ExitReason::InvalidGuestState);
        assert!(exit.entry_failure);
        assert_eq!(eptide_cpu::Vcpu::failed_entry_check(&exit), Some(rule));
    }
}

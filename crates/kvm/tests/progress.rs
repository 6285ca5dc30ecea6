//! An entry that cannot inject what waits executes an instruction before the processor leaves
//! again, whatever waits, whatever is blocked and whatever window is asked for.
//!
//! Source: SDM volume 3, "Other Causes of VM Exits" and "Interruptibility State"; the KVM API
//! documentation on KVM_GET_VCPU_EVENTS.

mod common;

use common::*;
use eptide_kvm::VcpuExit;
use kvm_bindings::*;

const NMIS: u64 = 0x5000;
const INTERRUPTS: u64 = 0x5008;
const VECTOR: u8 = 0x60;

/// What runs first, behind the blocking.
const FIRST: [(&str, &[u8]); 5] = [
    ("nop", &[0x90]),
    ("cli", &[0xfa]),
    ("sti", &[0xfb]),
    ("cpuid", &[0x0f, 0xa2]),
    ("mov ss", &[0x8e, 0xd0]),
];

/// The blocking by the instruction before, and by an NMI.
const SHADOWS: [u8; 3] = [
    0,
    KVM_X86_SHADOW_INT_STI as u8,
    KVM_X86_SHADOW_INT_MOV_SS as u8,
];

#[derive(Clone, Copy, Debug)]
struct Case {
    first: &'static str,
    shadow: u8,
    nmi_masked: bool,
    interrupt_flag: bool,
    nmi: bool,
    interrupt: bool,
    window: bool,
    trap_flag: bool,
}

fn machine(irqchip: Irqchip, first: &[u8]) -> Machine {
    let mut code = first.to_vec();
    code.extend(assemble_at(CODE + first.len() as u64, |a| {
        a.nop()?;
        a.nop()?;
        stop(a)
    }));
    let machine = Machine::new(irqchip, 1, &code);
    machine.count(VECTOR, 0x2000, INTERRUPTS);
    machine.count(2, 0x2100, NMIS);
    machine.code_at(0x2200, |a| a.iretq());
    machine.gate(1, 0x2200);
    machine
}

/// Puts the guest back to its first instruction, in a case's state.
fn prepare(machine: &mut Machine, case: &Case) {
    machine.memory.write_u64(NMIS, 0);
    machine.memory.write_u64(INTERRUPTS, 0);
    machine.long_mode(0);
    let vcpu = machine.vcpu();
    let mut regs = vcpu.get_regs().unwrap();
    regs.rax = 16;
    regs.rflags = 2 | u64::from(case.interrupt_flag) << 9 | u64::from(case.trap_flag) << 8;
    vcpu.set_regs(&regs).unwrap();
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    events.interrupt.shadow = case.shadow;
    events.nmi.masked = case.nmi_masked.into();
    vcpu.set_vcpu_events(&events).unwrap();
    if case.nmi {
        vcpu.nmi().unwrap();
    }
    if case.interrupt {
        vcpu.interrupt(VECTOR.into()).unwrap();
    }
    vcpu.get_kvm_run().request_interrupt_window = case.window.into();
}

/// Runs to the end; what the guest counted.
fn counts(machine: &mut Machine, case: &Case) -> (u64, u64) {
    for _ in 0..8 {
        match machine.vcpu().run().unwrap() {
            VcpuExit::IoOut(0x80, _) => {
                // Completes the write.
                machine.vcpu().set_kvm_immediate_exit(1);
                machine.vcpu().run().unwrap_err();
                machine.vcpu().set_kvm_immediate_exit(0);
                let memory = &machine.memory;
                return (memory.read_u64(NMIS), memory.read_u64(INTERRUPTS));
            }
            VcpuExit::IrqWindowOpen => {
                assert!(case.window, "{case:?}");
                machine.vcpu().get_kvm_run().request_interrupt_window = 0;
            }
            other => panic!("{case:?}: {other:?}"),
        }
    }
    panic!("{case:?}: the guest does not go on");
}

fn check(machine: &mut Machine, case: &Case) {
    prepare(machine, case);
    let (nmis, interrupts) = counts(machine, case);
    // STI opens the window, CLI closes it: only before it is anything taken then.
    let blocked = case.shadow != 0;
    let taken = case.interrupt
        && match case.first {
            "sti" => true,
            "cli" => case.interrupt_flag && !blocked,
            _ => case.interrupt_flag,
        };
    assert_eq!(interrupts, u64::from(taken), "{case:?}");
    // The IRET of any handler ends the blocking of NMIs.
    let unmasked = !case.nmi_masked || taken || case.trap_flag;
    assert_eq!(nmis, u64::from(case.nmi && unmasked), "{case:?}");
    if case.nmi_masked {
        // What waits must not reach the next case.
        let events = kvm_vcpu_events {
            flags: KVM_VCPUEVENT_VALID_NMI_PENDING,
            ..Default::default()
        };
        machine.vcpu().set_vcpu_events(&events).unwrap();
    }
}

fn flags(bits: u32) -> [bool; 6] {
    [0, 1, 2, 3, 4, 5].map(|bit| bits >> bit & 1 != 0)
}

#[test]
fn every_combination_of_events_windows_and_blocking_goes_on() {
    for (first, bytes) in FIRST {
        let mut machine = machine(Irqchip::None, bytes);
        for shadow in SHADOWS {
            for bits in 0..1 << 6 {
                let [
                    nmi_masked,
                    interrupt_flag,
                    nmi,
                    interrupt,
                    window,
                    trap_flag,
                ] = flags(bits);
                let case = Case {
                    first,
                    shadow,
                    nmi_masked,
                    interrupt_flag,
                    nmi,
                    interrupt,
                    window,
                    trap_flag,
                };
                // An interrupt that is never taken would wait for the next case.
                let is_left = interrupt && (first == "cli" || !interrupt_flag) && first != "sti";
                // No processor is in this state, and no entry allows it.
                let is_valid = interrupt_flag || shadow != KVM_X86_SHADOW_INT_STI as u8;
                if is_valid && !is_left {
                    check(&mut machine, &case);
                }
            }
        }
    }
}

/// A debugger holds interrupts back (KVM_GUESTDBG_BLOCKIRQ), and user space waits for the window.
#[test]
fn an_interrupt_that_a_debugger_holds_back_does_not_hold_the_guest() {
    for (interrupt, window) in [(true, true), (true, false), (false, true)] {
        let mut machine = machine(Irqchip::None, &[0x90]);
        let case = Case {
            first: "nop",
            shadow: 0,
            nmi_masked: false,
            interrupt_flag: true,
            nmi: false,
            interrupt,
            window,
            trap_flag: false,
        };
        prepare(&mut machine, &case);
        let debug = kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_BLOCKIRQ,
            ..Default::default()
        };
        machine.vcpu().set_guest_debug(&debug).unwrap();
        assert_eq!(counts(&mut machine, &case), (0, 0));
    }
}

/// As a kernel does that idles: STI, with an NMI and an interrupt sent by another processor.
#[test]
fn nmis_and_interrupts_that_arrive_at_any_time_are_taken() {
    let code = assemble(|a| {
        enable_apic(a)?;
        let mut again = a.create_label();
        a.mov(ecx, 20_000)?;
        a.set_label(&mut again)?;
        a.cli()?;
        a.sti()?;
        a.nop()?;
        a.dec(ecx)?;
        a.jnz(again)?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    machine.count(2, 0x2100, NMIS);
    let done = std::sync::atomic::AtomicBool::new(false);
    let Machine { vm, vcpus, .. } = &mut machine;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use std::sync::atomic::Ordering::Relaxed;
            let nmi = kvm_msi {
                address_lo: 0xfee0_0000,
                data: 0x400,
                ..Default::default()
            };
            while !done.load(Relaxed) {
                vm.signal_msi(nmi).unwrap();
                std::thread::yield_now();
            }
        });
        let exit = vcpus[0].run().map(|exit| format!("{exit:?}"));
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(exit.unwrap().starts_with("IoOut(128"));
    });
    assert_ne!(machine.memory.read_u64(NMIS), 0);
}

//! Timers, as a guest that programs them sees them: every interrupt comes, none comes early.

mod common;

use common::*;
use kvm_bindings::kvm_pit_config;

/// Interrupts that a guest waits for.
const TICKS: u64 = 5;
/// Where the guest's handler puts the counter's value at each interrupt.
const SEEN: u64 = 0x5000;
/// Nanoseconds that the timers are set to.
const PERIOD: u64 = 3_000_000;
/// Divider of the local APIC's timer: by one, so that it counts nanoseconds.
const BY_ONE: i32 = 0xb;
/// IA32_TSC_DEADLINE.
const TSC_DEADLINE: i32 = 0x6e0;

type Code<'a> = &'a dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// RDTSC into RAX.
fn now(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)
}

/// Sets a register of the local APIC.
fn apic(a: &mut CodeAssembler, register: i32, value: i32) -> Result<(), IcedError> {
    a.mov(dword_ptr(rbx + register), value)
}

/// A guest that takes interrupt 41H `TICKS` times in halts: `setup` once, `start` once or, with
/// `again`, before each; the counter's advance since the last start, for each.
fn advances(again: bool, setup: Code<'_>, start: Code<'_>) -> (u64, Vec<u64>) {
    let code = assemble(|a| {
        let (mut first, mut wait) = (a.create_label(), a.create_label());
        a.mov(rbx, APIC)?;
        apic(a, 0xf0, 0x1ff)?;
        a.xor(r12d, r12d)?;
        setup(a)?;
        a.set_label(&mut first)?;
        now(a)?;
        a.mov(r13, rax)?;
        start(a)?;
        a.mov(r14, r12)?;
        a.set_label(&mut wait)?;
        a.sti()?;
        a.hlt()?;
        a.cli()?;
        a.cmp(r12, r14)?;
        a.je(wait)?;
        a.mov(r14, r12)?;
        let mut done = a.create_label();
        a.cmp(r12, TICKS as i32)?;
        a.jae(done)?;
        a.jmp(if again { first } else { wait })?;
        a.set_label(&mut done)?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    let pit = kvm_pit_config::default();
    machine.vm.create_pit2(pit).unwrap();
    machine.gate(0x41, 0x2000);
    machine.code_at(0x2000, |a| {
        a.push(rax)?;
        a.push(rdx)?;
        now(a)?;
        a.sub(rax, r13)?;
        a.mov(qword_ptr(r12 * 8 + SEEN as i32), rax)?;
        a.inc(r12)?;
        apic(a, 0xb0, 0)?; // EOI
        a.pop(rdx)?;
        a.pop(rax)?;
        a.iretq()
    });
    runs_to_stop(&mut machine);
    let khz = machine.vcpu().get_tsc_khz().unwrap() as u64;
    let seen = (0..TICKS).map(|i| machine.memory.read_u64(SEEN + 8 * i));
    (khz, seen.collect())
}

/// The counter's ticks in so many nanoseconds, less what the measured frequency may be off by.
fn least(nanoseconds: u64, khz: u64) -> u64 {
    nanoseconds * khz / 1_000_000 * 9995 / 10_000
}

/// Each came no earlier than a period after its own start.
fn each_waits((khz, seen): (u64, Vec<u64>)) {
    assert!(
        seen.iter().all(|&ticks| ticks >= least(PERIOD, khz)),
        "{seen:?}"
    );
}

/// The nth came no earlier than n periods after the start.
fn all_wait((khz, seen): (u64, Vec<u64>)) {
    for (n, &ticks) in (1..).zip(&seen) {
        assert!(ticks >= least(n * PERIOD, khz), "{n}: {seen:?}");
    }
}

#[test]
fn the_local_apics_timer_runs_once() {
    let setup = |a: &mut CodeAssembler| {
        apic(a, 0x3e0, BY_ONE)?;
        apic(a, 0x320, 0x41)
    };
    each_waits(advances(true, &setup, &|a| apic(a, 0x380, PERIOD as i32)));
}

#[test]
fn the_local_apics_timer_runs_periodically() {
    let setup = |a: &mut CodeAssembler| {
        apic(a, 0x3e0, BY_ONE)?;
        apic(a, 0x320, 0x2_0041)
    };
    all_wait(advances(false, &setup, &|a| apic(a, 0x380, PERIOD as i32)));
}

#[test]
fn the_local_apics_timer_has_a_deadline() {
    const AHEAD: u64 = 8_000_000;
    let setup = |a: &mut CodeAssembler| apic(a, 0x320, 0x4_0041);
    // EDX:EAX is the counter's value at the start.
    let start = |a: &mut CodeAssembler| {
        a.mov(rax, r13)?;
        a.add(rax, AHEAD as i32)?;
        a.mov(rdx, rax)?;
        a.shr(rdx, 32)?;
        a.mov(ecx, TSC_DEADLINE)?;
        a.wrmsr()
    };
    let (_, seen) = advances(true, &setup, &start);
    assert!(seen.iter().all(|&ticks| ticks >= AHEAD), "{seen:?}");
}

/// Channel 0 as a rate generator, through the I/O APIC (pin 0, where the default routing leads it)
/// and not through the 8259s.
#[test]
fn the_pit_ticks() {
    const COUNT: u64 = PERIOD * 1_193_182 / 1_000_000_000 + 1;
    let setup = |a: &mut CodeAssembler| {
        a.mov(eax, 0xff)?;
        a.out(0x21, al)?;
        a.mov(rcx, 0xfec0_0000u64)?;
        a.mov(dword_ptr(rcx), 0x10)?;
        a.mov(dword_ptr(rcx + 0x10), 0x41)
    };
    let start = |a: &mut CodeAssembler| {
        for (port, value) in [(0x43, 0x34), (0x40, COUNT & 0xff), (0x40, COUNT >> 8)] {
            a.mov(eax, value as i32)?;
            a.out(port, al)?;
        }
        Ok(())
    };
    all_wait(advances(false, &setup, &start));
}

/// A guest with interrupt 41H's handler, which leaves where it struck in R15 and ends the guest;
/// `code` runs with interrupts enabled. The address that it struck at, from the code's label on.
fn strikes_at(code: &[u8]) -> u64 {
    let mut machine = Machine::new(Irqchip::Full, 1, code);
    machine.gate(0x41, 0x2000);
    machine.code_at(0x2000, |a| {
        a.mov(r15, qword_ptr(rsp))?;
        stop(a)
    });
    runs_to_stop(&mut machine);
    machine.vcpu().get_regs().unwrap().r15
}

/// Code that `prepare`s, executes `last`, and goes on for a while, and where it goes on.
fn then_computes(prepare: Code<'_>, last: Code<'_>) -> (Vec<u8>, u64) {
    let mut next = 0;
    let code = assemble(|a| {
        a.mov(rbx, APIC)?;
        apic(a, 0xf0, 0x1ff)?;
        prepare(a)?;
        a.sti()?;
        a.nop()?;
        last(a)?;
        next = a.instructions().len();
        let mut on = a.create_label();
        a.mov(ecx, 1_000_000)?;
        a.set_label(&mut on)?;
        a.dec(ecx)?;
        a.jne(on)?;
        a.xor(r15, r15)?;
        stop(a)
    });
    let mut decoder = iced_x86::Decoder::with_ip(64, &code, CODE, 0);
    let at = decoder.iter().nth(next).unwrap().ip();
    (code, at)
}

/// A TSC deadline in the past interrupts at the instruction that sets it, a count of a nanosecond
/// or none at all likewise. Source: SDM volume 3A, "TSC-Deadline Mode": writing a value that is
/// not later than the counter delivers an interrupt "immediately".
#[test]
fn what_is_due_interrupts_at_once() {
    let deadline = |a: &mut CodeAssembler| {
        apic(a, 0x320, 0x4_0041)?;
        a.mov(ecx, TSC_DEADLINE)?;
        a.mov(eax, 1)?;
        a.xor(edx, edx)
    };
    let count = |lvt: i32| {
        move |a: &mut CodeAssembler| {
            apic(a, 0x3e0, BY_ONE)?;
            apic(a, 0x320, lvt)
        }
    };
    // Made to be in the past by moving the counter.
    let far = |a: &mut CodeAssembler| {
        apic(a, 0x320, 0x4_0041)?;
        now(a)?;
        a.shr(rax, 32)?;
        a.mov(edx, eax)?;
        a.add(edx, 2)?;
        a.mov(ecx, TSC_DEADLINE)?;
        a.wrmsr()?;
        a.mov(ecx, 0x10)?;
        a.add(edx, 1)
    };
    let wrmsr = |a: &mut CodeAssembler| a.wrmsr();
    let start = |a: &mut CodeAssembler| apic(a, 0x380, 1);
    let once = count(0x41);
    let cases: [(&str, Code<'_>, Code<'_>); 3] = [
        ("deadline", &deadline, &wrmsr),
        ("counter moved", &far, &wrmsr),
        ("once", &once, &start),
    ];
    for (name, prepare, last) in cases {
        let (code, next) = then_computes(prepare, last);
        for _ in 0..20 {
            assert_eq!(strikes_at(&code), next, "{name}");
        }
    }
}

/// Once the current count reads 0, or the deadline does, the interrupt is in the IRR.
#[test]
fn what_has_expired_has_been_requested() {
    // Waits until the register at RBX + 390H, or the deadline, reads 0; the IRR's word to ESI.
    let code = |deadline: bool| {
        assemble(|a| {
            a.mov(rbx, APIC)?;
            apic(a, 0xf0, 0x1ff)?;
            apic(a, 0x3e0, BY_ONE)?;
            apic(a, 0x320, if deadline { 0x4_0041 } else { 0x41 })?;
            let mut wait = a.create_label();
            a.mov(ecx, TSC_DEADLINE)?;
            if deadline {
                now(a)?;
                a.add(rax, 300_000)?;
                a.mov(rdx, rax)?;
                a.shr(rdx, 32)?;
                a.wrmsr()?;
            } else {
                apic(a, 0x380, 100_000)?;
            }
            a.set_label(&mut wait)?;
            if deadline {
                a.rdmsr()?;
                a.or(eax, edx)?;
            } else {
                a.mov(eax, dword_ptr(rbx + 0x390))?;
            }
            a.test(eax, eax)?;
            a.jne(wait)?;
            a.mov(esi, dword_ptr(rbx + 0x220))?;
            stop(a)
        })
    };
    for deadline in [false, true] {
        let code = code(deadline);
        for _ in 0..20 {
            let mut machine = Machine::new(Irqchip::Full, 1, &code);
            runs_to_stop(&mut machine);
            let regs = machine.vcpu().get_regs().unwrap();
            assert_eq!(regs.rsi, 2, "deadline {deadline}");
        }
    }
}

/// A one-shot timer that has expired is not started again by saving and restoring it, nor is its
/// interrupt lost or made twice.
#[test]
fn an_expired_timer_is_restored_as_such() {
    let code = assemble(|a| {
        a.mov(rbx, APIC)?;
        apic(a, 0xf0, 0x1ff)?;
        apic(a, 0x3e0, BY_ONE)?;
        apic(a, 0x320, 0x41)?;
        apic(a, 0x380, 1000)?;
        stop(a)?;
        a.mov(eax, dword_ptr(rbx + 0x220))?;
        a.mov(ecx, dword_ptr(rbx + 0x390))?;
        stop(a)
    });
    for _ in 0..20 {
        let mut machine = Machine::new(Irqchip::Full, 1, &code);
        runs_to_stop(&mut machine);
        std::thread::sleep(std::time::Duration::from_micros(100));
        let mut page = machine.vcpu().get_lapic().unwrap();
        assert_eq!(page.regs[0x220], 2, "in the IRR when the count is 0");
        page.regs[0x220] = 0;
        machine.vcpu().set_lapic(&page).unwrap();
        runs_to_stop(&mut machine);
        let regs = machine.vcpu().get_regs().unwrap();
        assert_eq!((regs.rax & 2, regs.rcx), (0, 0));
    }
}

/// Once the PIT's output is high, which the read-back command shows, the 8259 has the request.
#[test]
fn what_the_pit_shows_has_been_requested() {
    let code = assemble(|a| {
        for (port, value) in [(0x43, 0x30), (0x40, 100), (0x40, 0)] {
            a.mov(eax, value)?;
            a.out(port, al)?;
        }
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.mov(eax, 0xe2)?; // the status of channel 0
        a.out(0x43, al)?;
        a.in_(al, 0x40)?;
        a.test(al, 0x80)?;
        a.je(wait)?;
        a.mov(eax, 0x0a)?; // the request register
        a.out(0x20, al)?;
        a.in_(al, 0x20)?;
        stop(a)
    });
    for _ in 0..20 {
        let mut machine = Machine::new(Irqchip::Full, 1, &code);
        machine.vm.create_pit2(kvm_pit_config::default()).unwrap();
        runs_to_stop(&mut machine);
        assert_eq!(machine.vcpu().get_regs().unwrap().rax & 1, 1);
    }
}

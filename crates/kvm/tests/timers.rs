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

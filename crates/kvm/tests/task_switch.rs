//! Hardware task switches, from 32-bit protected mode without paging.

mod common;

use common::*;
use kvm_bindings::*;

const GDT: u64 = 0xa000;
const TSS_A: u64 = 0xb000;
const TSS_B: u64 = 0xb100;
const TSS_16: u64 = 0xb200;
const TASK_B_CODE: u32 = 0x2000;
const HANDLER: u32 = 0x2800;
const STACK_B: u32 = 0x7000;
const SELECTOR_A: u16 = 0x18;
const SELECTOR_B: u16 = 0x20;
const SELECTOR_16: u16 = 0x28;
/// Counters and results of the guests.
const DATA: u32 = 0x5000;

const AVAILABLE_32: u64 = 0x89;
const BUSY_32: u64 = 0x8b;
const AVAILABLE_16: u64 = 0x81;

fn descriptor(base: u64, limit: u64, access: u64, flags: u64) -> u64 {
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}

fn far(a: &mut CodeAssembler, opcode: u8, selector: u16) -> Result<(), IcedError> {
    let [low, high] = selector.to_le_bytes();
    a.db(&[opcode, 0, 0, 0, 0, low, high])
}

fn call_task(a: &mut CodeAssembler, selector: u16) -> Result<(), IcedError> {
    far(a, 0x9a, selector)
}

fn jump_task(a: &mut CodeAssembler, selector: u16) -> Result<(), IcedError> {
    far(a, 0xea, selector)
}

/// A machine that runs `code` as task A.
fn machine(code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Machine {
    let code = assemble32(CODE as u32, code);
    let machine = Machine::new(Irqchip::None, 1, &code);
    let memory = &machine.memory;
    for (i, entry) in [
        0,
        descriptor(0, 0xf_ffff, 0x9b, 0xc),
        descriptor(0, 0xf_ffff, 0x93, 0xc),
        descriptor(TSS_A, 0x67, BUSY_32, 0),
        descriptor(TSS_B, 0x67, AVAILABLE_32, 0),
        descriptor(TSS_16, 0x2b, AVAILABLE_16, 0),
    ]
    .into_iter()
    .enumerate()
    {
        memory.write_u64(GDT + 8 * i as u64, entry);
    }
    let word = |at: u64, value: u32| memory.write(at, &value.to_le_bytes());
    word(TSS_B + 32, TASK_B_CODE);
    word(TSS_B + 36, 2);
    word(TSS_B + 44, 0xc0de);
    word(TSS_B + 56, STACK_B);
    for (offset, selector) in [(72, 16), (76, 8), (80, 16), (84, 16)] {
        word(TSS_B + offset, selector);
    }
    let half = |at: u64, value: u16| memory.write(at, &value.to_le_bytes());
    half(TSS_16 + 14, TASK_B_CODE as u16);
    half(TSS_16 + 16, 2);
    half(TSS_16 + 20, 0xc0de);
    half(TSS_16 + 26, STACK_B as u16);
    for (offset, selector) in [(34, 16), (36, 8), (38, 16), (40, 16)] {
        half(TSS_16 + offset, selector);
    }
    machine.protected_mode();
    let vcpu = &machine.vcpus[0];
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.tr = kvm_segment {
        base: TSS_A,
        limit: 0x67,
        selector: SELECTOR_A,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    sregs.gdt = kvm_dtable {
        base: GDT,
        limit: 0x2f,
        ..Default::default()
    };
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x33, 0, 0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    machine
}

fn gate32(machine: &Machine, vector: u8) {
    let (low, high) = ((HANDLER & 0xffff) as u64, (HANDLER >> 16) as u64);
    machine.memory.write_u64(
        IDT + 8 * vector as u64,
        low | 8 << 16 | 0x8e00 << 32 | high << 48,
    );
}

fn task_gate(machine: &Machine, vector: u8, selector: u16) {
    machine.memory.write_u64(
        IDT + 8 * vector as u64,
        (selector as u64) << 16 | 0x8500 << 32,
    );
}

fn code_at(
    machine: &Machine,
    at: u32,
    build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) {
    machine.memory.write(at as u64, &assemble32(at, build));
}

fn word(machine: &Machine, at: u64) -> u32 {
    (machine.memory.read_u64(at & !7) >> (8 * (at & 7))) as u32
}

fn kind(machine: &Machine, selector: u16) -> u8 {
    (machine.memory.read_u64(GDT + selector as u64) >> 40 & 0xf) as u8
}

#[test]
fn calls_return_and_jumps_stay() {
    let mut machine = machine(|a| {
        a.mov(esi, 0x1234)?;
        call_task(a, SELECTOR_B)?;
        stop(a)?;
        jump_task(a, SELECTOR_B)?;
        stop(a)
    });
    code_at(&machine, TASK_B_CODE, |a| {
        a.mov(dword_ptr(DATA), ecx)?;
        stop(a)?;
        a.iretd()?;
        a.inc(dword_ptr(DATA + 4))?;
        stop(a)?;
        jump_task(a, SELECTOR_A)
    });
    runs_to_stop(&mut machine);
    assert_eq!(word(&machine, DATA as u64), 0xc0de);
    let sregs = machine.vcpu().get_sregs().unwrap();
    assert_eq!(
        (sregs.tr.selector, sregs.tr.base, sregs.tr.type_),
        (SELECTOR_B, TSS_B, 11)
    );
    assert_eq!(sregs.cr0 & 8, 8, "TS");
    let regs = machine.vcpu().get_regs().unwrap();
    assert_eq!((regs.rsp, regs.rflags & 0x4000), (STACK_B as u64, 0x4000));
    assert_eq!(word(&machine, TSS_B) as u16, SELECTOR_A);
    assert_eq!(
        word(&machine, TSS_A + 32),
        CODE as u32 + 12,
        "after the call"
    );
    assert_eq!(word(&machine, TSS_A + 64), 0x1234, "ESI");
    assert_eq!(
        (kind(&machine, SELECTOR_A), kind(&machine, SELECTOR_B)),
        (11, 11)
    );

    runs_to_stop(&mut machine);
    let regs = machine.vcpu().get_regs().unwrap();
    assert_eq!((regs.rsi, regs.rflags & 0x4000), (0x1234, 0));
    assert_eq!(machine.vcpu().get_sregs().unwrap().tr.selector, SELECTOR_A);
    assert_eq!(
        (kind(&machine, SELECTOR_A), kind(&machine, SELECTOR_B)),
        (11, 9)
    );
    assert_eq!(word(&machine, TSS_B + 36) & 0x4000, 0, "NT is not saved");

    runs_to_stop(&mut machine);
    assert_eq!(word(&machine, DATA as u64 + 4), 1);
    assert_eq!(
        (kind(&machine, SELECTOR_A), kind(&machine, SELECTOR_B)),
        (9, 11)
    );
    assert_eq!(machine.vcpu().get_regs().unwrap().rflags & 0x4000, 0);
    runs_to_stop(&mut machine);
    assert_eq!(
        (kind(&machine, SELECTOR_A), kind(&machine, SELECTOR_B)),
        (11, 9)
    );
}

#[test]
fn sixteen_bit_tasks_switch_too() {
    let mut machine = machine(|a| {
        a.mov(ecx, 0x7fff_0001)?;
        call_task(a, SELECTOR_16)?;
        stop(a)
    });
    code_at(&machine, TASK_B_CODE, |a| {
        a.mov(dword_ptr(DATA), ecx)?;
        a.iretd()
    });
    runs_to_stop(&mut machine);
    assert_eq!(word(&machine, DATA as u64), 0xc0de);
    assert_eq!(word(&machine, TSS_16) as u16, SELECTOR_A);
    let regs = machine.vcpu().get_regs().unwrap();
    assert_eq!((regs.rcx, regs.rsp), (0x7fff_0001, STACK));
    assert_eq!(kind(&machine, SELECTOR_16), 1);
}

#[test]
fn exceptions_and_interrupts_go_through_task_gates() {
    const FAULTING: u32 = CODE as u32 + 5;
    let mut machine = machine(|a| {
        a.mov(eax, 0x7b)?;
        a.mov(ds, eax)?; // beyond the table: #GP(0x78)
        stop(a)?;
        a.int(0x30)?;
        stop(a)?;
        a.sti()?;
        a.nop()?;
        stop(a)?;
        stop(a)
    });
    task_gate(&machine, 13, SELECTOR_B);
    code_at(&machine, TASK_B_CODE, |a| {
        a.pop(dword_ptr(DATA))?;
        a.mov(eax, dword_ptr(TSS_A as u32 + 32))?;
        a.mov(dword_ptr(DATA + 4), eax)?;
        a.add(dword_ptr(TSS_A as u32 + 32), 2)?;
        a.iretd()?;
        // The next switch to this task goes on here, with no error code.
        a.mov(dword_ptr(DATA + 8), esp)?;
        a.iretd()?;
        a.inc(dword_ptr(DATA + 12))?;
        a.iretd()
    });
    runs_to_stop(&mut machine);
    assert_eq!(word(&machine, DATA as u64), 0x78);
    assert_eq!(word(&machine, DATA as u64 + 4), FAULTING);
    task_gate(&machine, 0x30, SELECTOR_B);
    runs_to_stop(&mut machine);
    assert_eq!(word(&machine, DATA as u64 + 8), STACK_B);
    task_gate(&machine, 0x31, SELECTOR_B);
    runs_to_stop(&mut machine);
    machine.vcpu().interrupt(0x31).unwrap();
    runs_to_stop(&mut machine);
    assert_eq!(word(&machine, DATA as u64 + 12), 1);
    assert_eq!(kind(&machine, SELECTOR_B), 9);
}

/// What a switch that fails raises: vector, error code, and the task it is raised in.
fn failing(vector: u8, prepare: impl FnOnce(&Machine), source: u8) -> (u32, u16) {
    let mut machine = machine(|a| match source {
        0x9a | 0xea => far(a, source, SELECTOR_B),
        _ => a.int(0x30),
    });
    gate32(&machine, vector);
    code_at(&machine, HANDLER, |a| {
        a.pop(dword_ptr(DATA))?;
        a.pop(dword_ptr(DATA + 4))?;
        stop(a)
    });
    task_gate(&machine, 0x30, SELECTOR_B);
    prepare(&machine);
    runs_to_stop(&mut machine);
    let tr = machine.vcpu().get_sregs().unwrap().tr.selector;
    if tr == SELECTOR_A {
        // The old task's fault names the instruction that tried.
        assert_eq!(word(&machine, DATA as u64 + 4), CODE as u32);
        assert_eq!(kind(&machine, SELECTOR_A), 11);
    }
    (word(&machine, DATA as u64), tr)
}

#[test]
fn switches_that_fail_raise_exceptions() {
    let tss = |machine: &Machine, limit, access| {
        let entry = descriptor(TSS_B, limit, access, 0);
        machine.memory.write_u64(GDT + SELECTOR_B as u64, entry);
    };
    let segment = |machine: &Machine, offset: u64, selector: u16| {
        machine
            .memory
            .write(TSS_B + offset, &selector.to_le_bytes());
    };
    let b = SELECTOR_B as u32;
    // Too small a TSS; not present; busy.
    assert_eq!(
        failing(10, |m| tss(m, 0x66, AVAILABLE_32), 0x9a),
        (b, SELECTOR_A)
    );
    assert_eq!(failing(11, |m| tss(m, 0x67, 0x09), 0xea), (b, SELECTOR_A));
    assert_eq!(
        failing(13, |m| tss(m, 0x67, BUSY_32), 0xcd),
        (b, SELECTOR_A)
    );
    // Faults of the new task: no code segment, null stack, LDT that is none.
    assert_eq!(failing(10, |m| segment(m, 76, 16), 0x9a), (16, SELECTOR_B));
    assert_eq!(failing(10, |m| segment(m, 80, 0), 0xea), (0, SELECTOR_B));
    assert_eq!(failing(10, |m| segment(m, 96, 8), 0xcd), (8, SELECTOR_B));
}
